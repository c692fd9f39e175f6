"""Types of the compiled extension. `Array` results have the flow's dtype; see `nvpflow.Flow` for the documentation."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypedDict, overload

from numpy.typing import ArrayLike, DTypeLike, NDArray

from nvpflow._bases import Base
from nvpflow.adam import AdamState
from nvpflow.layers import Layer

Array = NDArray[Any]

class OnDevice(Protocol):
    def __dlpack_device__(self) -> tuple[Any, int]: ...

class CudaArray(Protocol):
    @property
    def __cuda_array_interface__(self) -> Any: ...

Rows = ArrayLike | OnDevice | CudaArray
Wrt = Literal["all", "both", "x", "parameters", "context"]

__version__: str

class FileFormatError(ValueError):
    """A model file is damaged, foreign, or newer than this library."""

class TrainingError(ArithmeticError):
    """Training met a NaN or infinite loss or gradient (the best weights are kept), or kept no epoch."""

class CudaError(RuntimeError):
    """CUDA cannot be used here, or a CUDA device failed."""

def cpu_isa() -> str: ...
def cpu_isas_available() -> tuple[str, ...]: ...
def activation_names() -> tuple[str, ...]: ...
def available_threads() -> int: ...
def cuda_why_unavailable() -> str: ...
def cuda_device_count() -> int: ...
def cuda_device_name(index: int) -> str: ...

class DeviceArray:
    """A C-contiguous array in the memory of a CUDA device, which any library takes by DLPack."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def numpy(self) -> Array: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class FlowSpec:
    def __init__(
        self,
        input_size: int,
        num_flows: int = 4,
        hidden_sizes: Sequence[int] = (256,),
        activation: str = "relu",
        scale_bound: float = 1.0,
        standardize: bool = False,
        dtype: str = "float32",
    ) -> None: ...
    @property
    def input_size(self) -> int: ...
    @property
    def context_size(self) -> int: ...
    @property
    def standardize_context(self) -> bool: ...
    @property
    def num_flows(self) -> int: ...
    @property
    def hidden_sizes(self) -> tuple[int, ...]: ...
    @property
    def activation(self) -> str: ...
    @property
    def scale_bound(self) -> float: ...
    @property
    def standardize(self) -> bool: ...
    @property
    def dtype(self) -> str: ...
    @property
    def _takes_float64_rows(self) -> bool: ...
    @property
    def _is_bounded(self) -> bool: ...
    @property
    def _has_bounds(self) -> bool: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def base(self) -> Base: ...
    def with_dtype(self, dtype: str) -> FlowSpec: ...
    def to_json(self) -> str: ...
    def _to_full_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> FlowSpec: ...
    @staticmethod
    def from_layers(
        input_size: int,
        layers: Iterable[Layer],
        dtype: str = "float32",
        context_size: int = 0,
        standardize_context: bool = False,
        base: str | Base = "normal",
    ) -> FlowSpec: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

class EpochRecord(TypedDict):
    epoch: int
    train_loss: float
    validation_loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    round_trip: float

class FitSummary(TypedDict):
    epochs: list[EpochRecord]
    best_epoch: int
    best_loss: float
    stop_reason: Literal["epochs", "patience", "callback", "interrupted"]
    train_rows: int
    validation_rows: int
    effective_rows: float
    standardized: list[str]
    rows_left_out: int

class DensityRecord(TypedDict):
    step: int
    loss: float
    validation_loss: float
    ess: float
    learning_rate: float
    gradient_norm: float
    seconds: float

class DensitySummary(TypedDict):
    reports: list[DensityRecord]
    best_step: int
    best_loss: float
    stop_reason: Literal["steps", "patience", "callback", "interrupted"]

class Flow:
    def __init__(
        self,
        spec: FlowSpec,
        seed: int = 0,
        *,
        device: str = "cpu",
        precision: str = "float32",
        weights: str = "full",
        init: str = "fan_in",
    ) -> None: ...
    @property
    def spec(self) -> FlowSpec: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @num_threads.setter
    def num_threads(self, value: int) -> None: ...
    def forward(
        self, x: Rows, *, out: tuple[Any, Any] | None = None, context: Rows | None = None
    ) -> tuple[Any, Any]: ...
    @overload
    def inverse(
        self,
        z: Rows,
        *,
        with_log_det: Literal[False] = False,
        out: Any = None,
        dtype: DTypeLike | None = None,
        context: Rows | None = None,
    ) -> Any: ...
    @overload
    def inverse(
        self,
        z: Rows,
        *,
        with_log_det: Literal[True],
        out: tuple[Any, Any] | None = None,
        dtype: DTypeLike | None = None,
        context: Rows | None = None,
    ) -> tuple[Any, Any]: ...
    def log_probability(
        self, x: Rows, *, out: Any = None, temperature: float | None = None, context: Rows | None = None
    ) -> Any: ...
    def log_prob(
        self, x: Rows, *, out: Any = None, temperature: float | None = None, context: Rows | None = None
    ) -> Any: ...
    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        start: int = 0,
        out: Any = None,
        dtype: DTypeLike | None = None,
        temperature: float | None = None,
        context: Rows | None = None,
    ) -> Any: ...
    def sample_and_log_prob(
        self,
        n: int,
        *,
        seed: int | None = None,
        start: int = 0,
        out: tuple[Any, Any] | None = None,
        dtype: DTypeLike | None = None,
        temperature: float | None = None,
        context: Rows | None = None,
    ) -> tuple[Any, Any]: ...
    def nll(self, x: Rows, sample_weight: Rows | None = None, *, context: Rows | None = None) -> float: ...
    def nll_gradient(
        self,
        x: Rows,
        sample_weight: Rows | None = None,
        *,
        out: Any = None,
        total_rows: float | None = None,
        accumulate: bool = False,
        index: ArrayLike | None = None,
        context: Rows | None = None,
    ) -> tuple[float, Any]: ...
    def vjp(
        self,
        x: Rows,
        grad_out: Rows | None = None,
        grad_log_det: Rows | None = None,
        *,
        direction: Literal["forward", "inverse"] = "forward",
        wrt: Wrt | tuple[Wrt, ...] = "all",
        out: tuple[Any, ...] | None = None,
        context: Rows | None = None,
    ) -> tuple[Any, ...]: ...
    def log_prob_vjp(
        self,
        x: Rows,
        grad_log_prob: Rows,
        *,
        wrt: Wrt | tuple[Wrt, ...] = "all",
        out: tuple[Any, ...] | None = None,
        context: Rows | None = None,
    ) -> tuple[Any, ...]: ...
    def score(self, x: Rows, *, out: Any = None, context: Rows | None = None) -> Any: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...
    def reload(self, path: str | os.PathLike[str]) -> None: ...
    def _swap(self, other: Flow) -> None: ...
    def _column_names(self) -> list[str]: ...
    def _set_column_names(self, names: list[str]) -> None: ...
    def _context_names(self) -> list[str]: ...
    def _set_context_names(self, names: list[str]) -> None: ...
    def _threshold(self) -> tuple[float, float | None] | None: ...
    def _set_threshold(self, log_prob: float | None, quantile: float | None) -> None: ...
    def _import_report(self) -> str | None: ...
    def _set_import_report(self, text: str | None) -> None: ...
    def _layout(self) -> list[tuple[str, tuple[int, ...], int]]: ...
    def _flat_parameters(self) -> Array: ...
    def _copy_flat_parameters(self) -> Array: ...
    def _copy_state(self) -> tuple[Array, Array | None]: ...
    def _mean_low(self) -> Array | None: ...
    def _set_flat_parameters(self, values: Array, mean_low: Array | None = None) -> None: ...
    def _has_flat_parameters(self, values: Any) -> bool: ...
    def _log_prob_and_vjp(
        self, x: Rows, grad_log_prob: Rows, *, wrt: Wrt | tuple[Wrt, ...] = "all", context: Rows | None = None
    ) -> tuple[Any, tuple[Any, ...]]: ...
    def _noise(self, n: int, seed: int) -> Array: ...
    def _context_row(self, context: Rows) -> Array: ...
    def _conditioner(self, layer: int, x: Array, *, context: Array | None = None) -> tuple[Array, Array]: ...
    def _statistics(self) -> str: ...
    def _set_statistics(self, name: str) -> None: ...
    def _initialize_from(
        self,
        x: Array,
        statistics: str,
        context: Array | None = None,
        sample_weight: Array | None = None,
        allow_degenerate: bool = False,
    ) -> list[str]: ...
    def _fit(
        self,
        x: Array,
        validation: Array | None,
        options: dict[str, Any],
        on_progress: Callable[[int, int, int], bool | None] | None,
        on_epoch: Callable[[EpochRecord], bool | None] | None,
        context: Array | None = None,
        validation_context: Array | None = None,
        adam: AdamState | None = None,
        sample_weight: Array | None = None,
        validation_weight: Array | None = None,
        communicator: object = None,
    ) -> FitSummary: ...
    def _fit_density(
        self,
        log_density: Callable[[Array, Array | None, bool], tuple[Array, Array | None]],
        options: dict[str, Any],
        on_progress: Callable[[int, int], bool | None] | None,
        on_report: Callable[[DensityRecord], bool | None] | None,
        context: Array | None = None,
    ) -> DensitySummary: ...

class Adam:
    def __init__(self, flow: Flow) -> None: ...

class ArrowColumns:
    @property
    def formats(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> int: ...
    def gather(self, dtype: str, through_double: bool) -> tuple[Array, bool]: ...

class ConditionedFlow:
    """See `nvpflow.ConditionedFlow`."""

    def __init__(self, flow: Flow, context: Array) -> None: ...
    @property
    def flow(self) -> Flow: ...
    @property
    def context(self) -> Array: ...
    def forward(self, x: Rows, *, out: tuple[Any, Any] | None = None) -> tuple[Any, Any]: ...
    @overload
    def inverse(
        self, z: Rows, *, with_log_det: Literal[False] = False, out: Any = None, dtype: DTypeLike | None = None
    ) -> Any: ...
    @overload
    def inverse(
        self,
        z: Rows,
        *,
        with_log_det: Literal[True],
        out: tuple[Any, Any] | None = None,
        dtype: DTypeLike | None = None,
    ) -> tuple[Any, Any]: ...
    def log_probability(self, x: Rows, *, out: Any = None, temperature: float | None = None) -> Any: ...
    def log_prob(self, x: Rows, *, out: Any = None, temperature: float | None = None) -> Any: ...
    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        start: int = 0,
        out: Any = None,
        dtype: DTypeLike | None = None,
        temperature: float | None = None,
    ) -> Any: ...
    def sample_and_log_prob(
        self,
        n: int,
        *,
        seed: int | None = None,
        start: int = 0,
        out: tuple[Any, Any] | None = None,
        dtype: DTypeLike | None = None,
        temperature: float | None = None,
    ) -> tuple[Any, Any]: ...
    def score(self, x: Rows, *, out: Any = None) -> Any: ...
    def nll(self, x: Rows, sample_weight: Rows | None = None) -> float: ...
    def nll_gradient(
        self,
        x: Rows,
        sample_weight: Rows | None = None,
        *,
        out: Any = None,
        total_rows: float | None = None,
        accumulate: bool = False,
        index: ArrayLike | None = None,
    ) -> tuple[float, Any]: ...
    def vjp(
        self,
        x: Rows,
        grad_out: Rows | None = None,
        grad_log_det: Rows | None = None,
        *,
        direction: Literal["forward", "inverse"] = "forward",
        wrt: Wrt | tuple[Wrt, ...] = "all",
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]: ...
    def log_prob_vjp(
        self,
        x: Rows,
        grad_log_prob: Rows,
        *,
        wrt: Wrt | tuple[Wrt, ...] = "all",
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]: ...

def _trained(spec: FlowSpec) -> set[str]: ...
def _from_data(spec: FlowSpec) -> set[str]: ...
def _layout_of(spec: FlowSpec) -> list[tuple[str, tuple[int, ...], int]]: ...
def _adam_step(
    adam: Adam, gradient: ArrayLike, learning_rate: float, weight_decay: float, clip_norm: float
) -> float: ...
def _adam_take_state(adam: Adam, state: AdamState) -> None: ...
def _adam_give_state(adam: Adam, state: AdamState) -> None: ...
def _arrow_columns(table: Any) -> ArrowColumns: ...
def _check_weights(name: str, weights: Array) -> None: ...
def _rows_of_process(rows: int, shards: int, rank: int, size: int) -> tuple[int, int]: ...
def _fail_together(communicator: object, message: str) -> None: ...
def _split_rows(total: int, share: float, seed: int, most: int) -> tuple[list[int], list[int]]: ...
def _xla_handlers() -> dict[str, Any]: ...
def _load_model(
    path: str, expected: FlowSpec | None
) -> tuple[FlowSpec, Array, Array | None, list[str], list[str], tuple[float, float | None] | None, str | None]: ...
def _new_flat_parameters(spec: FlowSpec) -> Array: ...
def _device_array(values: Array, device: str) -> DeviceArray: ...
def _host_array(object: Any) -> Any: ...
