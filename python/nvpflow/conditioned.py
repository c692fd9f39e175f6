"""A flow under one context: `ConditionedFlow`, which `Flow.condition` makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from nvpflow import _checks, _core, _hints, certificate
from nvpflow._core import FlowSpec
from nvpflow._model import Threshold


class ConditionedFlow(_core.ConditionedFlow):
    """The density p(x | c) under one context c: a view of a flow, made by `Flow.condition`.

    Parameters
    ----------
    flow
        A `Flow` with a context, which the view keeps alive.
    context
        c [C], rounded to the flow's dtype; it is copied.

    Attributes
    ----------
    flow : Flow
        The flow.
    context : ndarray [C]
        The context, read-only.

    Notes
    -----
    `log_probability`, `log_prob`, `forward`, `inverse`, `sample`, `sample_and_log_prob`, `nll`, `nll_gradient`,
    `vjp`, `log_prob_vjp` and `score` are those of `Flow` without ``context=``, and give the same bits as with it. What
    the context comes to in each network is computed when the view is made, and not in each call. After the flow's
    weights have changed the view gives the new results, but computes that anew in each call: make it again.

    What changes or keeps the flow stays on ``view.flow``: `fit`, `fit_threshold`, `set_threshold`, `set_parameters`,
    `save`, `reload`, `swap`, `to`, `astype`, and the setters of names and ``num_threads``.
    """

    __slots__ = ()

    flow: Any  # a Flow, whose module is above this one

    @_hints.explained
    def __init__(self, flow: _core.Flow, context: ArrayLike) -> None:
        if not isinstance(flow, _core.Flow):
            raise TypeError(f"flow is {_checks.describe(flow)}, expected a Flow")
        super().__init__(flow, flow._context_row(context))

    @property
    def spec(self) -> FlowSpec:
        """The flow's spec."""
        spec: FlowSpec = self.flow.spec
        return spec

    @property
    def context_size(self) -> int:
        """0: calls take no ``context=`` any more; that of the flow is ``flow.context_size``."""
        return 0

    @property
    def column_names(self) -> tuple[str, ...] | None:
        """The flow's names of the columns of x."""
        names: tuple[str, ...] | None = self.flow.column_names
        return names

    @property
    def context_names(self) -> tuple[str, ...] | None:
        """The flow's names of the numbers of `context`."""
        names: tuple[str, ...] | None = self.flow.context_names
        return names

    @property
    def threshold(self) -> Threshold | None:
        """The flow's limit of log p, which is one for all contexts, or None."""
        found: Threshold | None = self.flow.threshold
        return found

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the flow."""
        return int(self.flow.num_parameters)

    @property
    def device(self) -> str:
        """Where the flow runs: "cpu", "cuda:0"."""
        return str(self.flow.device)

    @property
    def precision(self) -> str:
        """How a CUDA device forms the flow's products."""
        return str(self.flow.precision)

    @property
    def weights(self) -> str:
        """How the CPU stores the flow's kernels."""
        return str(self.flow.weights)

    @property
    def num_threads(self) -> int:
        """Threads that calls may use; set it on the flow."""
        return int(self.flow.num_threads)

    @_hints.explained
    def certify(
        self, x: ArrayLike, *, tolerance: float = certificate.TOLERANCE, jacobian_rows: int | None = None
    ) -> certificate.Certificate:
        """Measure how exactly the flow computes on rows under this context: `Flow.certify`."""
        found: certificate.Certificate = self.flow.certify(
            x, context=self.context, tolerance=tolerance, jacobian_rows=jacobian_rows
        )
        return found

    if not TYPE_CHECKING:  # a function __getattr__ would let checkers believe in every name

        def __getattr__(self, name):
            """Say where what the view does not have is to be found."""
            kind = type(self).__name__
            known = name != "flow" and not name.startswith("_") and hasattr(type(self.flow), name)
            way = f"; it is of the flow: view.flow.{name}" if known else ""
            raise AttributeError(f"{kind!r} object has no attribute {name!r}{way}", name=name, obj=self)

    def __repr__(self) -> str:
        """Return a summary such as ``ConditionedFlow(Flow(...), context=[0.5, 1])``."""
        shown = [f"{number:.6g}" for number in self.context[:6].tolist()]
        more = ", ..." if len(self.context) > len(shown) else ""
        return f"{type(self).__name__}({self.flow!r}, context=[{', '.join(shown)}{more}])"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the flow and the context."""
        return type(self), (self.flow, self.context.copy())
