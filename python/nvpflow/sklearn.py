"""Flows as scikit-learn estimators: `FlowDensity` and `FlowOutlierDetector` (``pip install "scikit-learn>=1.6"``)."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

try:
    from joblib import effective_n_jobs
    from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError('nvpflow.sklearn needs scikit-learn 1.6 or newer: pip install "scikit-learn>=1.6"') from error

from nvpflow import _bases, _bounds, _checks, _data, _frames, _hints, _sample_weight, _training_options
from nvpflow._architecture import OPTIONS
from nvpflow._defaults import HIDDEN_SIZES, NUM_FLOWS, default_activation, default_standardize
from nvpflow.adam import AdamState
from nvpflow.conditioned import ConditionedFlow
from nvpflow.flow import Flow, build
from nvpflow.layers import Bounds

if TYPE_CHECKING:
    from nvpflow._core import EpochRecord

__all__ = ["FlowDensity", "FlowOutlierDetector"]

_PARAMETERS = """num_flows, hidden_sizes, activation, dtype
        The model, as in `nvpflow.build`; activation None is relu for up to 12 features and silu above. A layer that
        standardizes the features comes first, so that raw data will do; its log-determinant counts, and densities are
        those of the data as given. The layer is applied in float64, so that X of
        float64 loses no digit there in float32 either.
    coupling, scale, scale_bound, num_bins, tail_bound, mask, mixing, actnorm, network, num_blocks, layer_norm
        Other models than a RealNVP of halves, as in `nvpflow.build`. `coupling` is its `transform`, "affine",
        "additive" or "spline"; scikit-learn has a method of that name. network="residual" takes one width, for example
        ``hidden_sizes=(64,)``.
    base
        What latents are, as in `nvpflow.build`. "uniform" goes with ``coupling="spline"`` and with X that lies in its
        interval: no layer standardizes there.
    bounds
        Intervals that features cannot leave, as in `nvpflow.build`: by name where X has names, or by index. X outside
        or on an edge is refused by `fit`, and scores -inf.
    discrete
        The features that hold integers, as in `nvpflow.build`: names where X has some, or indices. `fit` adds noise to
        them, and samples are integers. `bounds` of them are the least and the largest integer.
    context_features
        The features of X that condition the others: the density is p(others | these), and a row's log-density, its
        score and its threshold are so. An int: so many last ones. A sequence: their indices, or their names where X has
        some. They are standardized, too. None: no feature.
    epochs, learning_rate, schedule, weight_decay, clip_norm, averaging
        Training, as in `nvpflow.Flow.fit`.
    standardize, max_deviation
        What the standardizing layer is set from, and how far out rows are left out, as in `nvpflow.Flow.fit`.
        "covariance": also a layer that whitens, as in `nvpflow.build`. The flow then begins as a Gaussian, and `fit`
        leaves it there where no epoch is better. None: "covariance" for `fit` on fewer than 50 rows for each feature,
        with the normal base and without `context_features`, and "auto" for all else.
    allow_degenerate
        Keep features that are copies or linear combinations of others, as in `nvpflow.Flow.fit`.
    batch_size
        Most rows per update, as in `nvpflow.Flow.fit`. None: an eighth of the training rows, from 16 to 256.
    validation_fraction
        Share of the rows, in (0, 1), that `fit` sets aside. The epoch that explains them best gives the weights. Where
        it would hold no row, `folds` take its place. None: no rows are set aside, and the epoch that explains the
        training rows best gives the weights.
        Not used where `fit` is given ``X_val``.
    folds
        Cross-validation in place of a share of the rows, as in `nvpflow.Flow.fit`. None: where rows are few.
    patience
        Stop after this many epochs without a better one on the validation rows. None: train all epochs.
    device, precision, weights
        Where and in what arithmetic, as in `nvpflow.build`.
    random_state
        Of the initial weights, the validation rows and the order of the rows. An int makes `fit` repeatable, bit for
        bit, for any `n_jobs`, and the same as ``nvpflow.build(seed=random_state)`` and ``Flow.fit(seed=random_state)``.
    n_jobs
        Threads: None is 1 (unless in a joblib context), -1 all processors.
    verbose
        Print the losses of every `verbose`-th epoch; 0 or False: print nothing."""

_ATTRIBUTES = """flow_ : nvpflow.Flow
        The trained flow, with everything that a flow can do: ``flow_.forward(X)``, ``flow_.save(path)``.
    history_ : nvpflow.History
        Losses of every epoch in nats per row, the best epoch, and why training stopped.
    n_iter_ : int
        Epochs trained.
    adam_ : nvpflow.AdamState
        What Adam keeps between calls of `partial_fit`; absent after `fit`.
    context_features_ : ndarray of shape (n_context_features,)
        The indices of `context_features`, in their order, which is that of the flow's context.
    n_features_in_ : int
        Features seen in `fit`, those of the context among them.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where X had some (a DataFrame with strings for columns)."""


def _documented(cls: type) -> type:
    """Fill the lists that both estimators share into a class's docstring, if it has not been stripped (-OO)."""
    if cls.__doc__:
        cls.__doc__ = cls.__doc__.replace("{parameters}", _PARAMETERS).replace("{attributes}", _ATTRIBUTES)
    return cls


def _weights(given: Any, rows: NDArray[Any], name: str = "sample_weight") -> NDArray[np.float64] | None:
    """Return the weights of rows, None where all count alike."""
    return None if given is None else _sample_weight.read(given, len(rows), name)


def _seed_of(random_state: int | np.random.RandomState | None) -> int:
    """Return an int itself, and otherwise a seed drawn from the generator that scikit-learn takes."""
    if isinstance(random_state, numbers.Integral):
        return _checks.integer("random_state", random_state, unsigned=True)
    return int(check_random_state(random_state).randint(2**63 - 1, dtype=np.int64))


def _quantile(log_p: NDArray[np.float64], weights: NDArray[np.float64] | None, share: float) -> float:
    """Return a quantile of log-densities, which may be -inf."""
    limit = float(_sample_weight.quantile(log_p, weights, share))
    if not math.isfinite(limit):
        raise ValueError(
            f"X has {np.sum(~np.isfinite(log_p))} of {len(log_p)} rows whose log-density is -inf, contamination is "
            f"{share:g}: there is no threshold; leave these rows out, or give more epochs"
        )
    return limit


class _FlowEstimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: parameters, training and `score_samples`."""

    @_hints.explained
    def __init__(
        self,
        *,
        num_flows: int = NUM_FLOWS,
        hidden_sizes: Sequence[int] = HIDDEN_SIZES,
        activation: str | None = None,
        coupling: str = "affine",
        scale: str = "tanh",
        scale_bound: float = 1.0,
        num_bins: int = 8,
        tail_bound: float = 3.0,
        mask: Any = "halves",
        mixing: str | None = None,
        actnorm: bool = False,
        network: str = "mlp",
        num_blocks: int = 2,
        layer_norm: bool = False,
        base: Any = "normal",
        bounds: Any = None,
        discrete: Sequence[str] | Sequence[int] | None = None,
        context_features: int | Sequence[int] | Sequence[str] | None = None,
        dtype: str = "float32",
        epochs: int = 100,
        batch_size: int | None = None,
        learning_rate: float = 3e-3,
        schedule: str = "cosine",
        weight_decay: float | None = None,
        clip_norm: float | None = 5.0,
        averaging: float | None = 0.8,
        folds: int | None = None,
        standardize: str | None = None,
        max_deviation: float | str | None = "auto",
        allow_degenerate: bool = False,
        validation_fraction: float | None = 0.1,
        patience: int | None = None,
        device: str = "cpu",
        precision: str = "float32",
        weights: str = "full",
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.num_flows = num_flows
        self.hidden_sizes = hidden_sizes
        self.activation = activation
        self.coupling = coupling
        self.scale = scale
        self.scale_bound = scale_bound
        self.num_bins = num_bins
        self.tail_bound = tail_bound
        self.mask = mask
        self.mixing = mixing
        self.actnorm = actnorm
        self.network = network
        self.num_blocks = num_blocks
        self.layer_norm = layer_norm
        self.base = base
        self.bounds = bounds
        self.discrete = discrete
        self.context_features = context_features
        self.dtype = dtype
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.averaging = averaging
        self.folds = folds
        self.standardize = standardize
        self.max_deviation = max_deviation
        self.allow_degenerate = allow_degenerate
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.precision = precision
        self.weights = weights
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    @_hints.explained
    def fit(
        self, X: Any, y: object = None, sample_weight: Any = None, *, X_val: Any = None, sample_weight_val: Any = None
    ) -> Any:
        """Train a new flow on the rows of X by maximum likelihood.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            At least two rows and two features, all finite.
        y : ignored
            There by scikit-learn's convention.
        sample_weight : array-like of shape (n_samples,), default=None
            What each row counts for, as in `nvpflow.Flow.fit`: at least 0, not all 0; a row of weight 0 counts as
            absent. Rows set aside take theirs along. None: all rows count alike.
        X_val : array-like or DataFrame of shape (n_validation, n_features), default=None
            Rows of their own to choose the epoch by, in place of a share of X.
        sample_weight_val : array-like of shape (n_validation,), default=None
            Their weights: where there are both `X_val` and `sample_weight`, and only there.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError
            X has NaN or infinite values, a feature without a density (constant, a copy, a linear combination of
            others), or too few rows or features; or a parameter is out of range. The message names it.
        TypeError
            A parameter is of the wrong type.
        nvpflow.TrainingError
            The loss became NaN or infinite.

        Warns
        -----
        nvpflow.DataWarning
            Of all else that `nvpflow.check_data` finds in X, in one message: lost digits, outliers, values that repeat.
            After training, where the validation rows are likelier under a Gaussian (see `nvpflow.Flow.fit`).
        """
        table = self._training_rows(X)
        self.context_features_: NDArray[np.intp] = self._context_places(table.shape[1])
        weights = _weights(sample_weight, table)
        rows, context = self._parts(table)
        validation = self._held_out(X_val, sample_weight_val, weighted=weights is not None)
        seed = _seed_of(self.random_state)
        flow = self._new_flow(rows.shape[1], seed, self._standardize_for(*rows.shape))
        history = flow.fit(
            rows,
            context=context,
            sample_weight=weights,
            validation=validation,
            **self._training_options(),
            seed=seed,
            progress=False,
            callback=self._printer(),
        )
        self.flow_: Flow = flow
        self.history_ = history
        self.n_iter_ = len(history)
        self.__dict__.pop("adam_", None)  # of the flow that is replaced
        return self

    @_hints.explained
    def partial_fit(self, X: Any, y: object = None, sample_weight: Any = None, *, restandardize: bool = False) -> Any:
        """Train on some more rows, which are passed over once; the first call makes the flow.

        Adam's state is kept from one call to the next. A stream of rows so trains one flow, at the constant step size
        `learning_rate`. Of the parameters of training `epochs`, `schedule`, `averaging`, `validation_fraction` and
        `patience` are for `fit` only.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            At least two rows, all finite; the features of the first call, or of `fit`, which this goes on from.
        y : ignored
            There by scikit-learn's convention.
        sample_weight : array-like of shape (n_samples,), default=None
            What each of these rows counts for, beside the others of them, as in `fit`.
        restandardize : bool, default=False
            Set the standardizing layer from these rows, also where it has been set: for rows that have moved.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError, nvpflow.TrainingError
            As `fit`.
        """
        goes_on = hasattr(self, "flow_")
        table = self._in_dtype(self._validated(X, reset=False)) if goes_on else self._training_rows(X)
        if not goes_on:
            self.context_features_ = self._context_places(table.shape[1])
        weights = _weights(sample_weight, table)
        rows, context = self._parts(table)
        seed = _seed_of(self.random_state)
        flow = self.flow_ if goes_on else self._new_flow(rows.shape[1], seed, self._own_standardize())
        adam = getattr(self, "adam_", AdamState())
        flow.num_threads = effective_n_jobs(self.n_jobs)
        of_streams = {"epochs": 1, "schedule": "constant", "averaging": None, "folds": None, "patience": None}
        self.history_ = flow.fit(
            rows,
            context=context,
            sample_weight=weights,
            validation=None,
            **{**self._training_options(), **of_streams},
            restandardize=restandardize,
            adam=adam,
            seed=seed,
            progress=False,
            callback=self._printer(),
        )
        self.flow_, self.adam_ = flow, adam
        self.n_iter_ = getattr(self, "n_iter_", 0) + 1
        return self

    def _own_standardize(self) -> Literal["covariance"] | None:
        """Return what `build` is told of what the caller says."""
        return "covariance" if self.standardize == "covariance" else None

    def _standardize_for(self, rows: int, columns: int) -> Literal["covariance"] | None:
        """Return what `build` is told for a table of this shape."""
        if self.standardize is not None:
            return self._own_standardize()
        plain = isinstance(_bases.checked(self.base), _bases.Normal) and isinstance(self.mask, str)
        return default_standardize(rows, columns, plain=plain and not self.context_features_.size)

    def _new_flow(self, columns: int, seed: int, standardize: Literal["covariance"] | None) -> Flow:
        flow = self._built(columns, seed, standardize)
        flow.num_threads = effective_n_jobs(self.n_jobs)
        names = getattr(self, "feature_names_in_", None)
        if names is not None:
            flow.column_names = names[self._own_places()]
            flow.context_names = names[self.context_features_]
        return flow

    @_hints.explained
    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Return the log-density of every row.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            All finite.

        Returns
        -------
        ndarray of shape (n_samples,)
            log p in nats. A row's value does not depend on the other rows. ``-inf`` where a row is so far out that
            the arithmetic of `dtype` overflows.
        """
        check_is_fitted(self)
        rows, context = self._parts(self._rows(X))
        # Another n_jobs may have been set since, and a process of a pool has other processors than the one that fitted.
        self.flow_.num_threads = effective_n_jobs(self.n_jobs)
        log_p = self.flow_.log_probability(rows, context=context).astype(np.float64)
        return np.asarray(log_p)

    @_hints.explained
    def condition(self, context: Any) -> ConditionedFlow:
        """Return the flow under one context, with the methods of a flow that has none.

        Parameters
        ----------
        context : array-like of shape (n_context_features,)
            Values of `context_features`, in their order.

        Returns
        -------
        nvpflow.ConditionedFlow
            A view of `flow_`, whose ``log_probability(x)`` takes the other features, and whose ``sample`` draws them.
        """
        check_is_fitted(self)
        self.flow_.num_threads = effective_n_jobs(self.n_jobs)
        return self.flow_.condition(context)

    def _built(self, columns: int, seed: int, standardize: Literal["covariance"] | None) -> Flow:
        """Return a new flow for so many columns."""
        try:
            return build(
                columns,
                self.num_flows,
                self.hidden_sizes,
                default_activation(columns) if self.activation is None else self.activation,
                **{name: getattr(self, "coupling" if name == "transform" else name) for name in OPTIONS},
                bounds=self._own_bounds(),
                context_size=self.context_features_.size,
                standardize=standardize,
                dtype=self.dtype,
                seed=seed,
                device=self.device,
                precision=self.precision,
                weights=self.weights,
            )
        except ValueError as error:  # which calls the coupling as `build` does
            text = re.sub(r"\btransform(?= is |=)", "coupling", str(error))
            if text == str(error):
                raise
            raise ValueError(text) from None

    def _own_bounds(self) -> Bounds | None:
        """Return the bounds of the features whose density it is; those of `bounds` are by X's names or indices."""
        names = getattr(self, "feature_names_in_", None)
        listed = None if names is None else names.tolist()
        bounds = _bounds.checked(self.bounds, self.n_features_in_, listed, self.discrete)
        if bounds is None:
            return None
        bad = [j for j in self.context_features_.tolist() if not bounds.is_free(j)]
        if bad:
            raise ValueError(f"bounds names feature {bad[0]}, which is one of context_features; expected others")
        if bad := [j for j in self.context_features_.tolist() if j in bounds.discrete]:
            raise ValueError(f"discrete names feature {bad[0]}, which is one of context_features; expected others")
        return _bounds.of_columns(bounds, self._own_places().tolist())

    def _context_places(self, count: int) -> NDArray[np.intp]:
        """Return the indices of `context_features` among so many features."""
        given: Any = self.context_features
        if given is None:
            return np.empty(0, np.intp)
        if hasattr(given, "__index__") and not isinstance(given, np.ndarray):
            last = _checks.integer("context_features", given)
            if not 1 <= last < count:
                raise ValueError(f"context_features is {last}, expected 1 to {count - 1} of X's {count} features")
            return np.arange(count - last, count)
        if isinstance(given, (str, bytes, Set, Mapping)) or not isinstance(given, Iterable):
            expected = "expected how many last features, a sequence of their indices or names, or None"
            raise TypeError(f"context_features is {_checks.describe(given)}, {expected}")
        found = [self._place(f"context_features[{i}]", feature, count) for i, feature in enumerate(given)]
        if again := [place for i, place in enumerate(found) if place in found[:i]]:
            raise ValueError(f"context_features holds feature {again[0]} twice, expected each once")
        if len(found) == count:
            raise ValueError(f"context_features holds all {count} features of X, expected some that they condition")
        return np.array(found, np.intp)

    def _place(self, argument: str, feature: Any, count: int) -> int:
        """Return the index of a feature that is given by index or by name."""
        if not isinstance(feature, str):
            place = _checks.integer(argument, feature)
            if not 0 <= place < count:
                raise ValueError(f"{argument} is {place}, expected an index from 0 to {count - 1}")
            return place
        names = getattr(self, "feature_names_in_", None)
        if names is None:
            raise ValueError(f"{argument} is {feature!r}, but X has no names; expected an index, or X as a DataFrame")
        if feature not in names:
            known = _checks.shortened(", ".join(map(repr, names)))
            raise ValueError(f"{argument} is {_checks.shortened(repr(feature))}, expected one of X's features: {known}")
        return int(np.flatnonzero(names == feature)[0])

    def _own_places(self) -> NDArray[np.intp]:
        """Return the indices of the features whose density it is."""
        return np.setdiff1d(np.arange(self.n_features_in_), self.context_features_)

    def _parts(self, X: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return the features whose density it is, and those of the context."""
        if not self.context_features_.size:
            return X, None
        return np.take(X, self._own_places(), axis=1), np.take(X, self.context_features_, axis=1)

    def _training_rows(self, X: Any) -> NDArray[Any]:
        """Return X as the flow takes it."""
        X = self._validated(X, ensure_min_samples=2)
        if X.shape[1] < 2:
            raise ValueError(
                f"Found array with 1 feature(s) (shape={X.shape}) while a minimum of 2 is required by "
                f"{type(self).__name__}: each layer transforms some features given the others, or given those of "
                "context_features. For one feature take sklearn.neighbors.KernelDensity."
            )
        return self._in_dtype(X)

    def _rows(self, X: Any) -> NDArray[Any]:
        """Return X as the flow takes it, with the features that `fit` has seen."""
        return self._in_dtype(self._validated(X, reset=False))

    def _validated(self, X: Any, **options: Any) -> NDArray[Any]:
        try:
            rows: NDArray[Any] = validate_data(self, X, dtype=(np.float64, np.float32), order="C", **options)
        except (TypeError, ValueError) as error:
            _frames.refuse("X", X)
            # scikit-learn names no column, and one thing at a time.
            fits = options.get("reset", True)
            if text := _data.refusal("X", X) if fits else _frames.not_numbers("X", X):
                raise ValueError(text) from error
            raise
        return rows

    def _in_dtype(self, X: NDArray[Any]) -> NDArray[Any]:
        dtype = _checks.dtype_name("dtype", self.dtype)
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'float64'")
        if dtype == "float32" and not _bases.is_bounded(_bases.checked(self.base)):
            return X  # a flow that standardizes takes both
        return X.astype(dtype, copy=False)

    def _training_options(self) -> dict[str, Any]:
        """Return the options of `Flow.fit` among the parameters."""
        options = _training_options.among(self.get_params(deep=False))
        return options | {"standardize": None} if options["standardize"] == "covariance" else options

    def _held_out(self, X_val: Any, sample_weight_val: Any, *, weighted: bool) -> Any:
        """Return what epochs are compared by, as `Flow.fit` takes it."""
        if sample_weight_val is not None and (X_val is None or not weighted):
            lacking = "X_val" if X_val is None else "sample_weight"
            raise ValueError(f"sample_weight_val is given without {lacking}, expected both or neither")
        if X_val is None:
            return self._validation()
        table = self._rows(X_val)
        if weighted and sample_weight_val is None:
            raise ValueError(
                "sample_weight_val is missing, expected a weight for each row of X_val where X has weights; ones count "
                "rows alike"
            )
        own, context = self._parts(table)
        weights = _weights(sample_weight_val, table, "sample_weight_val")
        parts = [part for part in (own, context, weights) if part is not None]
        return tuple(parts) if len(parts) > 1 else own

    def _validation(self) -> float | None:
        if self.validation_fraction is None:
            if self.patience is not None:
                raise ValueError(
                    f"patience is {self.patience}, expected None without validation; give validation_fraction, or X_val"
                )
            return None
        fraction = _checks.real("validation_fraction", self.validation_fraction)
        if not 0 < fraction < 1:
            raise ValueError(f"validation_fraction is {fraction}, expected a share of the rows in (0, 1), or None")
        return fraction

    def _printer(self) -> Callable[[EpochRecord], None] | None:
        every = self.verbose
        if not isinstance(every, (bool, np.bool_)):
            every = _checks.integer("verbose", every)
        if every < 0:
            raise ValueError(f"verbose is {every}, expected at least 0")
        if not every:
            return None

        def after_epoch(record: EpochRecord) -> None:
            if record["epoch"] % every:
                return
            validation = record["validation_loss"]
            held_out = "" if math.isnan(validation) else f", validation {validation:.4f}"
            print(
                f"{type(self).__name__} epoch {record['epoch']}/{self.epochs}: "
                f"training nll {record['train_loss']:.4f}{held_out} nats",
                flush=True,
            )

        return after_epoch


@_documented
class FlowDensity(DensityMixin, _FlowEstimator):  # type: ignore[misc]
    """Density estimation with a normalizing flow: exact log-densities and samples.

    Used as `sklearn.neighbors.KernelDensity` and `sklearn.mixture.GaussianMixture` are; needs two features or more.
    With `context_features` it is a conditional density, of the other features given these.

    Parameters
    ----------
    {parameters}

    Attributes
    ----------
    {attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from nvpflow.sklearn import FlowDensity
    >>> X = np.random.default_rng(0).normal(size=(500, 2))
    >>> density = FlowDensity(hidden_sizes=(32,), epochs=5, random_state=0).fit(X)
    >>> density.score_samples(X[:3]).shape
    (3,)
    >>> density.sample(4, random_state=1).shape
    (4, 2)
    """

    @_hints.explained
    def score(self, X: Any, y: object = None, sample_weight: Any = None) -> float:
        """Return the mean log-density of the rows of X, in nats per row (higher is better).

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            All finite.
        y : ignored
            There by scikit-learn's convention.
        sample_weight : array-like of shape (n_samples,), default=None
            What each row counts for in the mean. None: all rows count alike.

        Returns
        -------
        float
            The mean, as `sklearn.mixture.GaussianMixture.score` returns (`KernelDensity.score` is a sum).
        """
        log_p = self.score_samples(X)
        weights = _weights(sample_weight, log_p)
        if weights is None:
            return float(log_p.mean())
        counts = weights > 0  # a row of weight 0 may have no density at all
        return float(np.average(log_p[counts], weights=weights[counts]))

    @_hints.explained
    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None, *, context: Any = None
    ) -> NDArray[np.float32] | NDArray[np.float64]:
        """Draw rows from the density, of the features that are not `context_features`.

        Parameters
        ----------
        n_samples : int, default=1
            How many.
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows every time, those of ``flow_.sample(n_samples, seed=random_state)``, but for
            their dtype.
        context : array-like or DataFrame of shape (n_context_features,) or (n_contexts, n_context_features)
            With `context_features`: their values, in their order, to draw under one or under each of.

        Returns
        -------
        ndarray of shape (n_samples, n_features) or (n_contexts, n_samples, n_features)
            Of `dtype`, or of float64 where float32 would blur a feature, whose values are large beside their spread.
        """
        check_is_fitted(self)
        count = _checks.count("n_samples", n_samples)
        self.flow_.num_threads = effective_n_jobs(self.n_jobs)
        drawn: NDArray[Any] = self.flow_.sample(
            count, seed=_seed_of(random_state), dtype=self.flow_._rows_dtype(), context=context
        )
        return drawn

    @_hints.explained
    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return the names of the features that `sample` draws: those of X that are not `context_features`.

        Parameters
        ----------
        input_features : array-like of str, default=None
            The names of X's features, where `fit` has seen none; else none or the same. None: x0, x1 and so on.

        Returns
        -------
        ndarray of str
            In their order.
        """
        check_is_fitted(self)
        known, count = getattr(self, "feature_names_in_", None), self.n_features_in_
        names = known
        if input_features is not None:
            names = np.asarray(input_features, dtype=object)
            if names.shape != (count,) or (known is not None and names.tolist() != known.tolist()):
                raise ValueError(
                    f"input_features is {_checks.describe(input_features)}, expected the {count} names that fit saw"
                )
        if names is None:
            names = np.array([f"x{i}" for i in range(count)], dtype=object)
        return np.asarray(names[self._own_places()], dtype=object)


@_documented
class FlowOutlierDetector(OutlierMixin, _FlowEstimator):  # type: ignore[misc]
    """Outlier detection with a normalizing flow: a row is an outlier where its density is low.

    Used as `sklearn.ensemble.IsolationForest` is; needs two features or more. With `context_features` it judges a row
    by its other features given these.

    Parameters
    ----------
    contamination
        Share of outliers among the rows of `fit`, in (0, 0.5]: that many of them lie below the threshold `offset_`.
    {parameters}

    Attributes
    ----------
    offset_ : float
        The threshold in nats: ``decision_function(X) = score_samples(X) - offset_``. The `contamination` quantile of
        the log-densities of all rows given to `fit`. A flow explains rows it was trained on a little better than new
        ones, of which a larger share may lie below. Set `offset_` from new rows where that share matters. It is
        ``flow_.threshold.log_p``: a file that ``flow_.save`` writes holds it, and C++ and C read it.
    {attributes}

    Examples
    --------
    >>> import numpy as np
    >>> from nvpflow.sklearn import FlowOutlierDetector
    >>> X = np.random.default_rng(0).normal(size=(500, 2))
    >>> detector = FlowOutlierDetector(contamination=0.02, hidden_sizes=(32,), epochs=5, random_state=0).fit(X)
    >>> detector.predict([[0.0, 0.0], [9.0, -9.0]])
    array([ 1, -1])
    """

    @_hints.explained
    def __init__(
        self,
        *,
        contamination: float = 0.1,
        num_flows: int = NUM_FLOWS,
        hidden_sizes: Sequence[int] = HIDDEN_SIZES,
        activation: str | None = None,
        coupling: str = "affine",
        scale: str = "tanh",
        scale_bound: float = 1.0,
        num_bins: int = 8,
        tail_bound: float = 3.0,
        mask: Any = "halves",
        mixing: str | None = None,
        actnorm: bool = False,
        network: str = "mlp",
        num_blocks: int = 2,
        layer_norm: bool = False,
        base: Any = "normal",
        bounds: Any = None,
        discrete: Sequence[str] | Sequence[int] | None = None,
        context_features: int | Sequence[int] | Sequence[str] | None = None,
        dtype: str = "float32",
        epochs: int = 100,
        batch_size: int | None = None,
        learning_rate: float = 3e-3,
        schedule: str = "cosine",
        weight_decay: float | None = None,
        clip_norm: float | None = 5.0,
        averaging: float | None = 0.8,
        folds: int | None = None,
        standardize: str | None = None,
        max_deviation: float | str | None = "auto",
        allow_degenerate: bool = False,
        validation_fraction: float | None = 0.1,
        patience: int | None = None,
        device: str = "cpu",
        precision: str = "float32",
        weights: str = "full",
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        # Named one by one: scikit-learn reads an estimator's parameters off this signature.
        super().__init__(
            num_flows=num_flows,
            hidden_sizes=hidden_sizes,
            activation=activation,
            coupling=coupling,
            scale=scale,
            scale_bound=scale_bound,
            num_bins=num_bins,
            tail_bound=tail_bound,
            mask=mask,
            mixing=mixing,
            actnorm=actnorm,
            network=network,
            num_blocks=num_blocks,
            layer_norm=layer_norm,
            base=base,
            bounds=bounds,
            discrete=discrete,
            context_features=context_features,
            dtype=dtype,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            averaging=averaging,
            folds=folds,
            standardize=standardize,
            max_deviation=max_deviation,
            allow_degenerate=allow_degenerate,
            validation_fraction=validation_fraction,
            patience=patience,
            device=device,
            precision=precision,
            weights=weights,
            random_state=random_state,
            n_jobs=n_jobs,
            verbose=verbose,
        )
        self.contamination = contamination

    @_hints.explained
    def fit(
        self, X: Any, y: object = None, sample_weight: Any = None, *, X_val: Any = None, sample_weight_val: Any = None
    ) -> Any:
        """Train a new flow on the rows of X and set the threshold.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            At least two rows and two features, all finite.
        y : ignored
            There by scikit-learn's convention.
        sample_weight : array-like of shape (n_samples,), default=None
            What each row counts for, as in `FlowDensity.fit`. The threshold is then a quantile by weight:
            `contamination` is the share that the outliers have in the weights.
        X_val : array-like or DataFrame of shape (n_validation, n_features), default=None
            Rows of their own to choose the epoch by, in place of a share of X. They do not move the threshold.
        sample_weight_val : array-like of shape (n_validation,), default=None
            Their weights, as in `FlowDensity.fit`.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError, nvpflow.TrainingError
            As `FlowDensity.fit`; and where `contamination` is out of range.
        """
        contamination = self._contamination()
        super().fit(X, y, sample_weight, X_val=X_val, sample_weight_val=sample_weight_val)
        return self._set_threshold(X, sample_weight, contamination)

    @_hints.explained
    def partial_fit(self, X: Any, y: object = None, sample_weight: Any = None, *, restandardize: bool = False) -> Any:
        """Train on some more rows, as `FlowDensity.partial_fit`, and set the threshold by these rows.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            At least two rows, all finite; the features of the first call, or of `fit`, which this goes on from.
        y : ignored
            There by scikit-learn's convention.
        sample_weight : array-like of shape (n_samples,), default=None
            What each of these rows counts for, beside the others of them, as in `fit`.
        restandardize : bool, default=False
            Set the standardizing layer from these rows, also where it has been set: for rows that have moved.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError, nvpflow.TrainingError
            As `FlowDensity.fit`; and where `contamination` is out of range.
        """
        contamination = self._contamination()
        super().partial_fit(X, y, sample_weight, restandardize=restandardize)
        return self._set_threshold(X, sample_weight, contamination)

    def _contamination(self) -> float:
        contamination = _checks.real("contamination", self.contamination)
        if not 0 < contamination <= 0.5:
            raise ValueError(f"contamination is {contamination}, expected a share of the rows in (0, 0.5]")
        return contamination

    def _set_threshold(self, X: Any, sample_weight: Any, contamination: float) -> Any:
        log_p = self.score_samples(X)
        weights = _weights(sample_weight, log_p)
        if weights is not None:
            log_p, weights = log_p[weights > 0], weights[weights > 0]
        self.flow_.set_threshold(_quantile(log_p, weights, contamination), contamination)
        return self

    @property
    def offset_(self) -> float:
        """The threshold in nats, that of `flow_`; settable."""
        threshold = self.flow_.threshold
        if threshold is None:
            raise AttributeError("flow_ has no threshold: its weights were replaced after fit; set offset_ anew")
        return threshold.log_p

    @offset_.setter
    def offset_(self, value: float) -> None:
        self.flow_.set_threshold(value)

    @_hints.explained
    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return how far every row's log-density lies above the threshold.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            All finite.

        Returns
        -------
        ndarray of shape (n_samples,)
            ``score_samples(X) - offset_`` in nats; negative for outliers.
        """
        log_p = self.score_samples(X)
        return np.asarray(log_p - self.offset_)

    @_hints.explained
    def predict(self, X: Any) -> NDArray[np.int64]:
        """Tell outliers from inliers.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            All finite.

        Returns
        -------
        ndarray of shape (n_samples,)
            -1 for outliers, 1 for inliers.
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)
