"""The model: `Flow`, and the two ways to get one, `build` and `load`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nvpflow import _checks, _core, training
from nvpflow._core import FlowSpec


def build(
    input_size: int,
    num_flows: int = 4,
    hidden_sizes: Sequence[int] = (256,),
    activation: str = "relu",
    *,
    scale_bound: float = 1.0,
    standardize: bool = False,
    dtype: DTypeLike = "float32",
    seed: int = 0,
) -> Flow:
    """Build a RealNVP flow with new weights.

    Parameters
    ----------
    input_size
        D, the number of columns; at least 2, even or odd. Each coupling layer splits them at ``D // 2``.
    num_flows
        K, the number of coupling layers. They alternate: the first half conditions the second, then the reverse.
    hidden_sizes
        Widths of the hidden layers of each coupling's network; ``()`` makes it affine.
    activation
        Of the hidden layers: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid or softplus.
    scale_bound
        B in the log-scale ``s = B tanh(u / B)``: no layer can stretch or shrink by more than ``exp(B)``.
    standardize
        Put a diagonal affine layer in front, which `Flow.fit` sets to the training rows' mean and standard deviation.
        Until then it is the identity. Its log-determinant counts, so densities stay those of the data as given.
    dtype
        float32 or float64: of the weights, of the arrays and of the arithmetic.
    seed
        Of the initial weights, in [0, 2**64): the same seed gives the same weights. The last layer of each network
        starts near zero, so that a new flow is near the identity.

    Returns
    -------
    Flow
        The model, ready for every method; `Flow.fit` trains it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Notes
    -----
    The coupling layer is equation 7 and 8 of Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP"
    (2017), initialised as in Glorot and Bengio (2010).
    """
    spec = FlowSpec(
        input_size=_checks.integer("input_size", input_size),
        num_flows=_checks.integer("num_flows", num_flows),
        hidden_sizes=_checks.sizes("hidden_sizes", hidden_sizes),
        activation=_checks.text("activation", activation),
        scale_bound=_checks.real("scale_bound", scale_bound),
        standardize=_checks.boolean("standardize", standardize),
        dtype=_checks.dtype_name("dtype", dtype),
    )
    return Flow(spec, _checks.integer("seed", seed, unsigned=True))


def load(path: str | os.PathLike[str], *, spec: FlowSpec | None = None) -> Flow:
    """Read a model file, or a safetensors file that holds only a RealNVP's weights.

    Parameters
    ----------
    path
        A file written by `Flow.save`, or any safetensors file whose tensors carry the names of `Flow.parameters`.
    spec
        The model to expect. Needed only for a file of tensors without a description whose sizes leave the model
        open (the activation is in no tensor: relu is assumed). Otherwise it is compared with the file's own.

    Returns
    -------
    Flow
        The model, of the dtype in the file.

    Raises
    ------
    OSError
        The file cannot be read (FileNotFoundError, IsADirectoryError, ...).
    FileFormatError
        The file is truncated, over-long, foreign, of a newer format, or contradicts itself or `spec`. Nothing in a
        file is executed, and every length is checked before memory is allocated for it.
    """
    if spec is not None and not isinstance(spec, FlowSpec):
        raise TypeError(f"spec must be a FlowSpec or None, got {_checks.describe(spec)}")
    found, parameters = _core._load_model(_checks.path("path", path), spec)
    return _restore(Flow, found, parameters, num_threads=0)


def _restore(cls: type[Flow], spec: FlowSpec, parameters: NDArray[Any], num_threads: int) -> Flow:
    flow = cls(spec)
    flow._set_flat_parameters(parameters)
    flow.num_threads = num_threads
    return flow


def _unpickle(cls: type[Flow], spec_json: str, parameters: NDArray[Any], num_threads: int) -> Flow:
    return _restore(cls, FlowSpec.from_json(spec_json), parameters, num_threads)


class Flow(_core.Flow):
    """A RealNVP normalizing flow: an invertible map between data x and latents z that are standard normal.

    ``log p(x) = log N(z; 0, I) + log|det dz/dx|``, in nats, exactly. Made by `build` and `load`, or from a `FlowSpec`.

    Parameters
    ----------
    spec
        What the model is.
    seed
        Of the initial weights, in [0, 2**64).

    Notes
    -----
    Shapes are ``[B, D]`` for a batch and ``[D]`` for one row; D is ``flow.spec.input_size``. Results have the
    model's dtype. Arrays that are C-contiguous and of that dtype are used in place; others are converted where NumPy
    calls it safe and refused otherwise. ``out=`` takes the result without an allocation. A row's result depends on
    that row alone, bit for bit: not on the batch, its size, or the number of threads. A row that holds NaN or
    infinity gives NaN. Every method may be called from many threads at once.

    The methods that work on rows are those of the compiled extension itself, with nothing in between: `forward`,
    `inverse`, `log_probability` (also called `log_prob`), `sample`, `nll`, `nll_gradient`, `vjp` and `save`.

    Two flows are equal if their specs and all their weights are. Flows can be copied and pickled.
    """

    __slots__ = ()  # a misspelt attribute is an error, not a new attribute

    def parameters(self) -> dict[str, NDArray[Any]]:
        """Return every parameter under its name.

        Returns
        -------
        dict
            Read-only views of the flow's own memory: they show what `set_parameters` and `fit` write to it, so copy
            what must stay as it is. Per coupling layer k:
            ``flow_{k}_coupling_dense_{j}.kernel`` [in, out] and ``.bias`` [out] of hidden layer j,
            ``flow_{k}_scale.kernel``/``.bias`` and ``flow_{k}_translation.kernel``/``.bias``; of a standardize layer
            ``standardize_{i}.mean`` and ``.log_std`` [D].
        """
        flat = self._flat_parameters()
        flat.flags.writeable = False
        return {name: flat[at : at + _size(shape)].reshape(shape) for name, shape, at in self._layout()}

    def set_parameters(self, parameters: Mapping[str, ArrayLike]) -> None:
        """Replace every parameter; on an error none has changed.

        Parameters
        ----------
        parameters
            An array for each name of `parameters`, of its shape, and of a dtype that NumPy converts safely.

        Raises
        ------
        ValueError
            Names are missing or unknown, or a shape is wrong; the message names them.
        TypeError
            A dtype does not convert safely.
        """
        layout = self._layout()
        names = {name for name, _, _ in layout}
        if missing := [name for name, _, _ in layout if name not in parameters]:
            raise ValueError(f"parameters lacks {_listed(missing)}")
        if unknown := [name for name in parameters if name not in names]:
            raise ValueError(f"parameters holds names this flow does not have: {_listed(unknown)}")
        flat = np.empty(self.num_parameters, dtype=self.spec.dtype)
        for name, shape, at in layout:
            values = _checks.array(f"parameters[{name!r}]", parameters[name], flat.dtype)
            if values.shape != shape:
                raise ValueError(f"parameters[{name!r}] has shape {values.shape}, expected {shape}")
            flat[at : at + values.size] = values.ravel()
        self._set_flat_parameters(flat)

    def fit(
        self,
        x: ArrayLike,
        *,
        validation: float | ArrayLike | None = 0.1,
        epochs: int = 100,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        schedule: Literal["cosine", "constant"] = "cosine",
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        patience: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        callback: Callable[[_core.EpochRecord], object] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        num_threads: int | None = None,
    ) -> training.History:
        """Train on the rows of `x` by maximum likelihood: Adam on minibatches, minimising ``-mean(log p(x))``.

        The flow ends with the weights of its best epoch: the lowest validation loss, or training loss where there is
        no validation data. A standardize layer that is still the identity is first set to the mean and standard
        deviation of the training rows. The same data, options and seed give the same weights, bit for bit, for any
        number of threads.

        Parameters
        ----------
        x
            Training rows [N, D], all finite, of the model's dtype or one that NumPy converts to it safely. A C-ordered
            array of that dtype is read in place (also a memory-mapped one).
        validation
            A share of the rows in [0, 1) to set aside, drawn by `seed`; or rows [M, D] of their own; or None.
        epochs
            Passes over the training rows.
        batch_size
            Rows per update; no more than there are training rows.
        learning_rate
            Adam's step size at the start.
        schedule
            "cosine" lets the step size fall to zero along half a cosine over all epochs; "constant" keeps it.
        weight_decay
            Decoupled weight decay (AdamW: Loshchilov and Hutter, 2019), on kernels only.
        clip_norm
            Scale a gradient down to this Euclidean norm where it is longer. None or 0: never.
        patience
            Stop after this many epochs without a better validation loss. None or 0: never.
        seed
            Of the validation split and of the order of the rows, in [0, 2**64).
        progress
            Show a progress bar on stderr, in nats per row. None: where tqdm is installed and stderr is a terminal.
        callback
            Called after every epoch with a dict of epoch, train_loss, validation_loss, learning_rate,
            gradient_norm and seconds. Training stops where it returns False.
        checkpoint
            A file to write after every epoch. Where it exists already, training goes on from it, and ends as it would
            have without the interruption, bit for bit.
        num_threads
            Threads to train with. None: those of the flow's ``num_threads``.

        Returns
        -------
        History
            Losses in nats per row and times in seconds, per epoch; which epoch was best, and why training stopped.

        Raises
        ------
        TypeError, ValueError
            Naming the argument. Rows that hold NaN or infinity are counted and named. Nothing has been trained.
        TrainingError
            The loss or its gradient became NaN or infinite; the message names the step. The best weights are kept.
        ImportError
            `progress` is True and tqdm is not installed.
        KeyboardInterrupt
            Ctrl-C, within a second; the best weights so far are kept.
        """
        return training.fit(
            self,
            x,
            validation=validation,
            options={
                "epochs": epochs,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "schedule": schedule,
                "weight_decay": weight_decay,
                "clip_norm": clip_norm,
                "patience": patience,
                "seed": seed,
                "num_threads": num_threads,
                "checkpoint": checkpoint,
            },
            progress=progress,
            callback=callback,
        )

    def __repr__(self) -> str:
        """Return the model in one line; options at their defaults are left out."""
        spec = self.spec
        fields = [
            f"input_size={spec.input_size}",
            f"num_flows={spec.num_flows}",
            f"hidden_sizes={spec.hidden_sizes}",
            f"activation={spec.activation!r}",
            f"dtype={spec.dtype!r}",
        ]
        if spec.scale_bound != 1.0:
            fields.append(f"scale_bound={spec.scale_bound:g}")
        if spec.standardize:
            fields.append("standardize=True")
        return f"{type(self).__name__}({', '.join(fields)}, {self.num_parameters:,} parameters)"

    def __eq__(self, other: object) -> bool:
        """Tell whether both the specs and all the weights are equal; a flow is mutable and has no hash."""
        if not isinstance(other, Flow):
            return NotImplemented
        return self.spec == other.spec and np.array_equal(self._copy_flat_parameters(), other._copy_flat_parameters())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the spec's JSON and the weights."""
        return _unpickle, (type(self), self.spec.to_json(), self._copy_flat_parameters(), self.num_threads)

    def __copy__(self) -> Flow:
        """Return a flow with weights of its own, which start equal to these."""
        return _restore(type(self), self.spec, self._copy_flat_parameters(), self.num_threads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Flow:
        """As `copy.copy`: nothing is shared there either."""
        return self.__copy__()


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
