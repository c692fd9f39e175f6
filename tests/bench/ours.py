"""nvpflow as a contender: through its public Python methods, timed as a user writes the call."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, ClassVar

import numpy as np
from configurations import Configuration, reference
from peers import LEARNING_RATE, Jax, Peer, TorchPeer
from timing import Call, Function

# An epoch of training is about this much arithmetic, a fraction of a second, in 4 to 128 steps.
FLOPS_PER_EPOCH = 20e9


def flow_of(configuration: Configuration, dtype: str = "float32", **where: Any) -> Any:
    """A flow with the parameters that all share, rounded to its dtype; `where` are device and precision."""
    import nvpflow

    spec = nvpflow.FlowSpec.from_json(json.dumps({**configuration.spec, "dtype": dtype}))
    flow = nvpflow.Flow(spec, **where)
    flow.set_parameters({k: v.astype(dtype) for k, v in reference(configuration).parameters.items()})
    return flow


class Nvpflow(Peer):
    """Results go into arrays of the caller's (`out=`). One context for all rows is bound once, by `Flow.condition`."""

    can_train = True
    dtype = "float32"

    @staticmethod
    def holds(configuration):
        return True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import nvpflow

        self.configuration = configuration
        self.flow = flow_of(configuration, self.dtype)
        self.parameters = {name: value.copy() for name, value in self.flow.parameters().items()}
        self.flow.num_threads = threads
        self.isa = nvpflow.cpu_isa()

    def call(self, op, x, *context, chunked=False):
        x, *context = (array.astype(self.dtype) for array in (x, *context))
        rows, row = np.empty_like(x), np.empty(len(x), x.dtype)
        out = {"log_prob": row, "forward": (rows, row), "inverse": rows}[op]
        method = "log_probability" if op == "log_prob" else op
        names = {"flow": self.flow, "x": x, "out": out}
        if not context:
            return Call(f"flow.{method}(x, out=out)", names)
        if self.configuration.one_context:
            return Call(f"flow.{method}(x, out=out)", {**names, "flow": self.flow.condition(*context)})
        return Call(f"flow.{method}(x, context=c, out=out)", {**names, "c": context[0]})

    def _fit(self, given: tuple[np.ndarray, ...], batch: int, epochs: int) -> list[float]:
        """Training from the common parameters; the loss of each epoch."""
        self.flow.set_parameters(self.parameters)
        losses = []
        first = tuple(array[:1].copy() for array in given)
        self.flow.fit(
            *given[:1],
            validation=first if len(first) > 1 else first[0],
            epochs=epochs,
            batch_size=batch,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            weight_decay=0,  # a step is the peers' step: Adam alone, on every row
            clip_norm=None,
            averaging=None,
            max_deviation=None,
            progress=False,
            callback=lambda record: losses.append(record["train_loss"]),
            **({"context": given[1]} if len(given) > 1 else {}),
        )
        self.flow.set_parameters(self.parameters)
        return losses

    def train(self, *given):
        """Seconds of a step as the difference of two runs of fit.

        That takes off what a run costs besides its steps: checks of the data, packing, the beginning and the end. One
        row validates, because epochs without validation data are compared by a pass over the training rows, which is no
        part of a step. What an epoch costs besides its steps is spread over them and counts against us, as does the
        gathering of shuffled rows: the peers take their steps on one resident batch.
        """
        batch = len(given[0])
        steps = min(max(4, round(FLOPS_PER_EPOCH / self.configuration.flops("train", batch))), 128)
        many = tuple(np.tile(array, (steps, 1)) for array in given)

        def seconds_per_call(calls: int) -> float:
            epochs = max(3, round(calls / steps))  # fewer are lost in what the two runs have in common
            while True:
                start = time.perf_counter()
                self._fit(many, batch, 1)
                middle = time.perf_counter()
                self._fit(many, batch, 1 + epochs)
                difference = (time.perf_counter() - middle) - (middle - start)
                if difference > 0:  # else the machine did something else during the short run
                    return difference / (epochs * steps)

        return Function(seconds_per_call, result=lambda: self._fit(given, batch, 3))


class NvpflowAllocating(Nvpflow):
    """Without `out=`: a new array for each result."""

    def call(self, op, *given, chunked=False):
        with_out = super().call(op, *given)
        return Call(with_out.statement.replace(", out=out", ""), with_out.names)


class NvpflowFloat64(Nvpflow):
    """A float64 flow with the same parameters on the same rows."""

    dtype = "float64"


class NvpflowHalves(Nvpflow):
    """Halves in place of the random masks of R: the same sizes, and what these masks may cost."""

    def __init__(self, configuration: Configuration, threads: int) -> None:
        super().__init__(self.checked_as(configuration), threads)

    @staticmethod
    def holds(configuration):
        return configuration.mask == "random"

    @staticmethod
    def checked_as(configuration):
        return dataclasses.replace(configuration, mask="halves")


class NvpflowTorch(TorchPeer):
    """A training step as one writes it in PyTorch, with FlowModule in place of PyTorch's own operations."""

    adam_options: ClassVar[dict[str, Any]] = {"fused": True}
    holds = staticmethod(Nvpflow.holds)

    def __init__(self, configuration: Configuration, threads: int) -> None:
        super().__init__(configuration, threads)
        self.module.num_threads = threads

    def build(self, configuration):
        from nvpflow.torch import FlowModule

        return FlowModule(flow_of(configuration))


class NvpflowJax(Jax):
    """nvpflow.jax under jit, parameters as arguments; a training step as one writes it with optax."""

    chunks = False

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import nvpflow.jax

        super().__init__(configuration, threads)
        flow = flow_of(configuration)
        self.functions, self.spec, self.threads = nvpflow.jax, flow.spec, threads
        self.parameters = nvpflow.jax.parameters(flow)

    def function(self, op, x, *context):
        run = self.compiled(lambda parameters, *given: self._apply(op, parameters, *given), op)
        return lambda *given: run(self.parameters, *given)

    def nll(self, parameters, *given):
        return self._apply("nll", parameters, *given)

    def _apply(self, name: str, parameters: Any, x: Any, *context: Any) -> Any:
        options = {"context": context[0]} if context else {}
        return getattr(self.functions, name)(self.spec, parameters, x, num_threads=self.threads, **options)


OURS: dict[str, type[Peer]] = {
    "nvpflow": Nvpflow,
    "nvpflow_new_array": NvpflowAllocating,
    "nvpflow_float64": NvpflowFloat64,
    "nvpflow_halves": NvpflowHalves,
    "nvpflow_torch": NvpflowTorch,
    "nvpflow_jax": NvpflowJax,
}
