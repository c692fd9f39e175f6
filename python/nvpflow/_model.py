"""What a model is: its spec, weights and what goes with them; to copy, move, convert, compare and pickle it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nvpflow import _bounds, _checks, _core, _hints
from nvpflow._core import FlowSpec
from nvpflow._spec import bounds_of

if TYPE_CHECKING:
    from nvpflow._import_report import ImportReport


class Threshold(NamedTuple):
    """A limit of log p, below which a row counts as unlikely; see `Flow.fit_threshold`."""

    log_p: float
    """Nats."""
    quantile: float | None
    """The share of rows that lay below it where it was found; None: unknown."""


Self = TypeVar("Self", bound="Model")

_DEFAULT_WHERE = {"device": "cpu", "precision": "float32", "weights": "full"}


def _where(device: str, precision: str, weights: str) -> dict[str, str]:
    given = zip(_DEFAULT_WHERE, (device, precision, weights), strict=True)
    return {name: _checks.text(name, value) for name, value in given}


def _restore(
    cls: type[Self],
    spec: FlowSpec,
    state: tuple[NDArray[Any], NDArray[Any] | None],
    num_threads: int,
    where: dict[str, str],
    names: tuple[list[str], list[str]],
    threshold: tuple[float, float | None] | None,
    statistics: str = "auto",
    report: str | None = None,
) -> Self:
    # A subclass's constructor may take only the spec, as Flow's did before there were devices.
    given: dict[str, Any] = {name: value for name, value in where.items() if value != _DEFAULT_WHERE[name]}
    flow = cls(spec, **given)
    flow._set_flat_parameters(*state)
    flow.num_threads = num_threads
    flow._set_column_names(names[0])
    flow._set_context_names(names[1])
    flow._set_threshold(*(threshold or (None, None)))
    flow._set_statistics(statistics)
    flow._set_import_report(report)
    return flow


def _unpickle(
    cls: type[Self],
    spec_json: str,
    parameters: NDArray[Any] | tuple[Any, ...],
    num_threads: int,
    device: str = "cpu",
    precision: str = "float32",
    weights: str = "full",
    column_names: Sequence[str] = (),
    threshold: tuple[float, float | None] | None = None,
    statistics: str = "auto",
    mean_low: NDArray[Any] | None = None,
    context_names: Sequence[str] = (),
    report: str | None = None,
) -> Self:
    if not (isinstance(cls, type) and issubclass(cls, Model)):
        raise TypeError(
            f"the pickled class is {_checks.describe(cls)}, expected nvpflow.Flow or a class derived from it"
        )
    where = _where(device, precision, weights)
    spec = FlowSpec.from_json(_checks.text("the pickled spec", spec_json))
    flat = _core._new_flat_parameters(spec)
    if isinstance(parameters, tuple):
        _join(parameters, flat)
    else:
        flat[:] = _flat("the pickled array of weights", parameters, flat.dtype, flat.size)
    if mean_low is not None:
        mean_low = _flat("the pickled mean_low", mean_low, np.dtype(np.float32), spec.input_size)
    names = (
        _checks.column_names("the pickled column_names", column_names),
        _checks.column_names("the pickled context_names", context_names),
    )
    threads, how = _checks.integer("the pickled num_threads", num_threads), _checks.text("standardize", statistics)
    text = None if report is None else _checks.text("the pickled import_report", report)
    return _restore(cls, spec, (flat, mean_low), threads, where, names, _threshold_of(threshold), how, text)


def _flat(name: str, values: Any, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return an array [size] of a pickle, which may be anything."""
    if not isinstance(values, np.ndarray) or values.shape != (size,) or values.dtype != dtype:
        came = f"has shape {values.shape} and dtype {values.dtype}" if isinstance(values, np.ndarray) else ""
        raise TypeError(f"{name} {came or f'is {_checks.describe(values)}'}, expected an array ({size},) of {dtype}")
    return values


def _threshold_of(pickled: Any) -> tuple[float, float | None] | None:
    if pickled is None:
        return None
    if not isinstance(pickled, tuple) or len(pickled) != 2:
        raise TypeError(f"the pickled threshold is {_checks.describe(pickled)}, expected (log_p, quantile) or None")
    limit, quantile = pickled
    share = None if quantile is None else _checks.real("the pickled threshold's quantile", quantile)
    return _checks.real("the pickled threshold's log_p", limit), share


_PIECE_BYTES = 1 << 19


class _Piece:
    """Some of the weights' bytes. What pickles them is Python, which lets other threads run between two pieces."""

    __slots__ = ("_bytes",)

    def __init__(self, values: NDArray[Any]) -> None:
        self._bytes: Any = values.view(np.uint8)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _piece, (pickle.PickleBuffer(self._bytes) if int(protocol) >= 5 else self._bytes.tobytes(),)


def _piece(data: Any) -> Any:
    return data


def _pieces(parameters: NDArray[Any]) -> tuple[_Piece, ...]:
    step = _PIECE_BYTES // parameters.itemsize
    return tuple(_Piece(parameters[at : at + step]) for at in range(0, len(parameters), step))


def _join(pieces: tuple[Any, ...], parameters: NDArray[Any]) -> None:
    into, at = parameters.view(np.uint8), 0
    for piece in pieces:
        try:  # of what engines hand back for a buffer out of band, too
            data: Any = piece._bytes if isinstance(piece, _Piece) else np.frombuffer(memoryview(piece), np.uint8)
        except TypeError:
            raise TypeError(f"the pickled weights hold {_checks.describe(piece)}, expected bytes") from None
        if at + len(data) <= len(into):
            into[at : at + len(data)] = data
        at += len(data)
    if at != len(into):
        raise ValueError(f"the pickle holds {at} bytes of weights, expected {len(into)}")


for _named in (_unpickle, _piece):
    _named.__module__ = "nvpflow.flow"  # the name in every pickle


class Model(_core.Flow):
    """A model without the verbs of `nvpflow.Flow`, which derives from it and documents it."""

    __slots__ = ()  # a misspelt attribute is an error, not a new attribute

    @_hints.explained
    def __init__(
        self,
        spec: FlowSpec,
        seed: int = 0,
        *,
        device: str = "cpu",
        precision: str = "float32",
        weights: str = "full",
        init: str = "fan_in",
    ) -> None:
        if not isinstance(spec, FlowSpec):
            way = "nvpflow.build makes a flow from the number of columns"
            raise TypeError(f"spec is {_checks.describe(spec)}, expected a FlowSpec; {way}")
        super().__init__(
            spec,
            _checks.integer("seed", seed, unsigned=True),
            init=_checks.text("init", init),
            **_where(device, precision, weights),
        )

    @property
    def column_names(self) -> tuple[str, ...] | None:
        """Names of the columns, in their order, or None; settable. `save` keeps them, and so do copies.

        Methods take arrays, which have no names, and look at none. The command line does: ``nvpflow fit`` keeps the
        names of a table that has some. Later commands refuse a table with other names or another order.
        """
        return tuple(self._column_names()) or None

    @column_names.setter
    def column_names(self, names: Sequence[str] | None) -> None:
        self._set_column_names(_checks.column_names("column_names", names))

    @property
    def context_size(self) -> int:
        """C, how many numbers condition a row: that of the spec; 0 where calls take no ``context=``."""
        return self.spec.context_size

    @property
    def context_names(self) -> tuple[str, ...] | None:
        """Names of the numbers of a context, in their order, or None; settable, and kept as `column_names` are.

        None of them may be a name of a column: a table that holds both has one column of each name.
        """
        return tuple(self._context_names()) or None

    @context_names.setter
    def context_names(self, names: Sequence[str] | None) -> None:
        self._set_context_names(_checks.column_names("context_names", names))

    @property
    def threshold(self) -> Threshold | None:
        """The limit of log p that goes with the weights, or None; `fit_threshold` and `set_threshold` set it.

        `save` keeps it, and so do copies; C++ and C read it (``Flow::threshold``, ``nvpflow_threshold``). It holds
        only for these weights: `fit` and `set_parameters` remove it, `reload` takes that of the file, and `swap`
        exchanges it with the weights. No method applies it; compare yourself:
        ``flow.log_probability(x) < flow.threshold.log_p``.
        """
        found = self._threshold()
        return None if found is None else Threshold(*found)

    def set_threshold(self, log_p: float | None, quantile: float | None = None) -> None:
        """Set `threshold` to a limit of your own, or remove it.

        Parameters
        ----------
        log_p
            Nats, finite. None: no threshold.
        quantile
            The share of rows in [0, 1] that it stands for. None: unknown.

        Raises
        ------
        TypeError, ValueError
            Naming the argument. Nothing has changed.
        """
        if log_p is None and quantile is not None:
            raise ValueError(f"quantile is {_checks.describe(quantile)}, expected None where log_p is None")
        limit = None if log_p is None else _checks.real("log_p", log_p)
        if limit is not None and not np.isfinite(limit):
            raise ValueError(f"log_p is {limit}, expected a finite number of nats")
        share = None if quantile is None else _checks.real("quantile", quantile)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"quantile is {share}, expected a share of the rows in [0, 1]")
        self._set_threshold(limit, share)

    @property
    def import_report(self) -> ImportReport | None:
        """What `nvpflow.importers` found out as it made the flow from one of another library; None of other flows.

        `save` keeps it, and so do copies. It is of these weights: `fit` and `set_parameters` remove it, `reload` takes
        that of the file, and `swap` exchanges it with the weights.
        """
        text = self._import_report()
        if text is None:
            return None
        from nvpflow._import_report import ImportReport

        return ImportReport.from_json(text)

    def _rows_dtype(self) -> str:
        """Return the dtype in which rows that this flow draws keep their digits."""
        spec = self.spec
        if spec._takes_float64_rows:
            mean, log_std = self._flat_parameters()[: 2 * spec.input_size].reshape(2, -1).astype(np.float64)
            mean, std = _bounds.in_front(bounds_of(spec), mean, np.exp(log_std))
            if np.any(np.abs(mean) * np.finfo(np.float32).eps / 2 > _MEAN_TOLERANCE * std):
                return "float64"
        return spec.dtype

    def parameters(self) -> dict[str, NDArray[Any]]:
        """Return every parameter under its name.

        Returns
        -------
        dict
            Read-only views of the flow's own memory: they show what `set_parameters` and `fit` write to it, so copy
            what must stay as it is. Per coupling layer k:
            ``flow_{k}_coupling_dense_{j}.kernel`` [in, out] and ``.bias`` [out] of hidden layer j,
            ``flow_{k}_scale.kernel``/``.bias`` and ``flow_{k}_translation.kernel``/``.bias``; of a standardize layer
            ``standardize_{i}.mean`` and ``.log_std`` [D]. Where `fit` saw float64 rows whose mean float32 cannot tell
            to 1/128 of a standard deviation, also ``standardize_0.mean_low`` [D]. It is a copy, and is to be added to
            the mean in float64.
        """
        flat = self._flat_parameters()
        flat.flags.writeable = False
        found = {name: flat[at : at + _size(shape)].reshape(shape) for name, shape, at in self._layout()}
        low = self._mean_low()
        if low is not None:
            low.flags.writeable = False
            found[_mean_low_name(self.spec)] = low
        return found

    def set_parameters(self, parameters: Mapping[str, ArrayLike]) -> None:
        """Replace every parameter, and remove the `threshold`, which was that of others; on an error none has changed.

        Parameters
        ----------
        parameters
            An array for each name of `parameters`, of its shape, and of a dtype that NumPy converts safely. Without
            ``standardize_0.mean_low`` that is zero.

        Raises
        ------
        ValueError
            Names are missing or unknown, or a shape is wrong; the message names them.
        TypeError
            `parameters` is not a mapping, or a dtype does not convert safely.
        """
        if not isinstance(parameters, Mapping):
            raise TypeError(f"parameters is {_checks.describe(parameters)}, expected a mapping of names to arrays")
        layout = self._layout()
        low, low_name = None, _mean_low_name(self.spec)
        if self.spec._takes_float64_rows and low_name in parameters:
            low = _checks.array(f"parameters[{low_name!r}]", parameters[low_name], np.float32)
            if low.shape != (self.spec.input_size,):
                raise ValueError(f"parameters[{low_name!r}] has shape {low.shape}, expected {(self.spec.input_size,)}")
            parameters = {name: value for name, value in parameters.items() if name != low_name}
        _checks.names("parameters", parameters, [name for name, _, _ in layout])
        flat = _core._new_flat_parameters(self.spec)
        for name, shape, at in layout:
            values = _checks.array(f"parameters[{name!r}]", parameters[name], flat.dtype)
            if values.shape != shape:
                raise ValueError(f"parameters[{name!r}] has shape {values.shape}, expected {shape}")
            flat[at : at + values.size] = values.ravel()
        self._set_flat_parameters(flat, low)

    def parameters_flat(self) -> NDArray[Any]:
        """Return every parameter in one vector, for optimizers that want one.

        Returns
        -------
        ndarray, [num_parameters]
            A copy, of the flow's dtype: the arrays of `parameters` one behind the other, each in C order. This is the
            order of the gradients of `nll_gradient`, `vjp` and `log_prob_vjp`. Tensors that `fit` sets and does not
            train, such as those of a standardize layer, are among them. ``standardize_0.mean_low`` is not.

        Examples
        --------
        >>> import numpy as np, nvpflow
        >>> from scipy.optimize import minimize
        >>> x = np.random.default_rng(0).normal(2, 3, size=(200, 1))
        >>> flow = nvpflow.build(1, 1, dtype="float64")
        >>> def loss(values):
        ...     flow.set_parameters_flat(values)
        ...     return flow.nll_gradient(x)
        >>> found = minimize(loss, flow.parameters_flat(), jac=True, options={"maxiter": 5})
        >>> bool(found.fun < 3)
        True
        """
        flat: NDArray[Any] = self._copy_flat_parameters()
        return flat

    def set_parameters_flat(self, values: ArrayLike) -> None:
        """Replace every parameter by those of a vector, and remove the `threshold`; on an error none has changed.

        What is kept beside the mean of a standardize layer (``standardize_0.mean_low``) stays in columns whose mean
        stays as it is.

        Parameters
        ----------
        values
            [num_parameters], in the order of `parameters_flat`, of a dtype that NumPy converts safely.

        Raises
        ------
        TypeError, ValueError
            `values` is not such a vector.
        """
        flat = _checks.array("values", values, np.dtype(self.spec.dtype))
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"values has shape {flat.shape}, expected {(self.num_parameters,)}")
        low = None
        if self.spec._takes_float64_rows:
            own, low = self._copy_state()
        if low is not None:
            low[flat[: len(low)] != own[: len(low)]] = 0
        self._set_flat_parameters(flat, low)

    def to(self: Self, device: str, precision: str | None = None, weights: str | None = None) -> Self:
        """Return a copy of the flow on a device; this one stays where and as it is.

        Parameters
        ----------
        device
            "cpu", "cuda" or "cuda:N".
        precision
            As in `build`. None: that of this flow on a CUDA device, "float32" on the CPU.
        weights
            As in `build`. None: that of this flow on the CPU, "full" on a CUDA device.

        Returns
        -------
        Flow
            With weights of its own, also where nothing changes.

        Raises
        ------
        ValueError
            There is no such device, or it has no such precision or weights.
        CudaError
            CUDA cannot be used; the message says why.
        MemoryError
            The device has no room; the message states the sizes.
        """
        if precision is None:
            precision = "float32" if device == "cpu" else self.precision
        if weights is None:
            weights = self.weights if device == "cpu" else "full"
        where = _where(device, precision, weights)
        return self._copy(self.spec, self._copy_state(), where)

    def astype(self: Self, dtype: DTypeLike) -> Self:
        """Return a copy of the flow that computes in another dtype, on the same device; this one stays as it is.

        Parameters
        ----------
        dtype
            float32 or float64. The weights are widened exactly, or rounded to nearest. What float32 does not hold of
            the mean of a standardize layer is kept beside it, where it matters (see `parameters`).

        Returns
        -------
        Flow
            With arrays, arithmetic and files of that dtype. A float64 flow has float32's ``precision`` and full
            ``weights``, the only ones there are.

        Raises
        ------
        TypeError, ValueError
            `dtype` is another one, or a weight is too large for float32.
        """
        name = _checks.dtype_name("dtype", dtype)
        if name not in ("float32", "float64"):
            raise ValueError(f"dtype is '{name}', expected one of float32, float64")
        spec = self.spec.with_dtype(name)
        given, low = self._copy_state()
        with np.errstate(over="ignore"):
            parameters = given.astype(name)
        if not np.isfinite(parameters[np.isfinite(given)]).all():
            raise ValueError(f"dtype is {name!r}, expected float64: the flow has weights beyond its range")
        if name != self.spec.dtype:
            low = _move_mean(given, low, parameters, spec)
        same = name == self.spec.dtype
        where = _where(self.device, self.precision, self.weights) if same else _DEFAULT_WHERE | {"device": self.device}
        return self._copy(spec, (parameters, low), where)

    def _copy(
        self: Self, spec: FlowSpec, state: tuple[NDArray[Any], NDArray[Any] | None], where: dict[str, str]
    ) -> Self:
        names = self._column_names(), self._context_names()
        described = names, self._threshold(), self._statistics(), self._import_report()
        return _restore(type(self), spec, state, self.num_threads, where, *described)

    def swap(self, other: _core.Flow) -> None:
        """Exchange the weights of two flows of the same spec, while other threads may call both.

        Each flow changes at one moment; the two moments differ. Thresholds go with the weights, column names stay.

        Parameters
        ----------
        other
            The other flow.

        Raises
        ------
        TypeError, ValueError
            `other` is not a flow, or of another spec. Nothing has changed.
        """
        if not isinstance(other, _core.Flow):
            raise TypeError(f"other is {_checks.describe(other)}, expected a Flow")
        self._swap(other)

    def __eq__(self, other: object) -> bool:
        """Tell whether both the specs and all the weights are equal; a flow is mutable and has no hash."""
        if not isinstance(other, Model):
            return NotImplemented
        if self.spec != other.spec:
            return False
        (own, own_low), (others, others_low) = self._copy_state(), other._copy_state()
        same_low = own_low is others_low is None or np.array_equal(own_low, others_low)  # type: ignore[arg-type]
        # In parts: between them other threads run, and what NumPy compares into is small.
        parts = range(0, len(own), _PIECE_BYTES)
        return same_low and all(np.array_equal(own[i : i + _PIECE_BYTES], others[i : i + _PIECE_BYTES]) for i in parts)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the spec's JSON, the weights and the device, which must be there where it is unpickled.

        With protocol 5 and a ``buffer_callback`` the weights go out of band, in buffers of 512 KB that are not copied.
        """
        parameters, mean_low = self._copy_state()
        state = (type(self), self.spec.to_json(), _pieces(parameters), self.num_threads)
        described = (self._column_names(), self._threshold(), self._statistics(), mean_low)
        names, report = self._context_names(), self._import_report()
        more = [names, report] if report else [names] if names else []  # which older versions cannot take
        return _unpickle, (*state, self.device, self.precision, self.weights, *described, *more)

    def __copy__(self: Self) -> Self:
        """Return a flow with weights of its own, which start equal to these."""
        return self.to(self.device, self.precision, self.weights)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """As `copy.copy`: nothing is shared there either."""
        return self.__copy__()


def _mean_low_name(spec: FlowSpec) -> str:
    """Return what the mean of the standardize layer that a flow begins with is beyond float32, as a tensor's name."""
    return f"standardize_{int(spec._has_bounds)}.mean_low"


_MEAN_TOLERANCE = 1 / 128
"""As of the training loop: below this part of a standard deviation it does not matter what float32 loses of a mean."""


def _move_mean(
    given: NDArray[Any], low: NDArray[Any] | None, parameters: NDArray[Any], spec: FlowSpec
) -> NDArray[np.float32] | None:
    """Put the mean and its low part from one dtype into the other's parameters; return what is the low part there."""
    columns = spec.input_size
    if spec.dtype == "float64":
        if low is not None:
            parameters[:columns] += low
        return None
    if not spec._takes_float64_rows:
        return None
    rest = given[:columns] - parameters[:columns]
    rest[np.abs(rest) <= _MEAN_TOLERANCE * np.exp(given[columns : 2 * columns])] = 0
    kept: NDArray[np.float32] = rest.astype(np.float32)
    return kept


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
