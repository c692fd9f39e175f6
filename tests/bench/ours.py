"""nvpflow as a contender: through its public Python methods, timed as a user writes the call."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
from configurations import Configuration, reference
from peers import LEARNING_RATE, Jax, Peer, TorchPeer
from timing import Call, Function

# An epoch of training is about this much arithmetic, a fraction of a second, in 4 to 128 steps.
FLOPS_PER_EPOCH = 20e9


class Nvpflow(Peer):
    """Results go into arrays of the caller's (`out=`)."""

    can_train = True
    dtype = "float32"

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import nvpflow

        self.configuration = configuration
        self.flow = nvpflow.build(
            configuration.input_size,
            configuration.num_flows,
            configuration.hidden_sizes,
            "relu",
            standardize=False,
            dtype=self.dtype,
        )
        self.parameters = {k: v.astype(self.dtype) for k, v in reference(configuration).parameters.items()}
        self.flow.set_parameters(self.parameters)
        self.flow.num_threads = threads
        self.isa = nvpflow.cpu_isa()

    def call(self, op: str, x: np.ndarray, chunked: bool = False) -> Call:
        x = x.astype(self.dtype)
        rows, row = np.empty_like(x), np.empty(len(x), x.dtype)
        out = {"log_prob": row, "forward": (rows, row), "inverse": rows}[op]
        method = "log_probability" if op == "log_prob" else op
        return Call(f"flow.{method}(x, out=out)", {"flow": self.flow, "x": x, "out": out})

    def _fit(self, x: np.ndarray, batch: int, epochs: int, validation: np.ndarray) -> list[float]:
        """Training from the common parameters; the loss of each epoch."""
        self.flow.set_parameters(self.parameters)
        losses = []
        self.flow.fit(
            x,
            validation=validation,
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
        )
        self.flow.set_parameters(self.parameters)
        return losses

    def train(self, x):
        """Seconds of a step as the difference of two runs of fit.

        That takes off what a run costs besides its steps: checks of the data, packing, the beginning and the end. One
        row validates, because epochs without validation data are compared by a pass over the training rows, which is no
        part of a step. What an epoch costs besides its steps is spread over them and counts against us, as does the
        gathering of shuffled rows: the peers take their steps on one resident batch.
        """
        batch = len(x)
        steps = min(max(4, round(FLOPS_PER_EPOCH / self.configuration.flops("train", batch))), 128)
        many = np.tile(x, (steps, 1))
        validation = x[:1].copy()

        def seconds_per_call(calls: int) -> float:
            epochs = max(3, round(calls / steps))  # fewer are lost in what the two runs have in common
            while True:
                start = time.perf_counter()
                self._fit(many, batch, 1, validation)
                middle = time.perf_counter()
                self._fit(many, batch, 1 + epochs, validation)
                difference = (time.perf_counter() - middle) - (middle - start)
                if difference > 0:  # else the machine did something else during the short run
                    return difference / (epochs * steps)

        return Function(seconds_per_call, result=lambda: self._fit(x, batch, 3, validation))


class NvpflowAllocating(Nvpflow):
    """Without `out=`: a new array for each result."""

    def call(self, op, x, chunked=False):
        with_out = super().call(op, x)
        return Call(with_out.statement.replace(", out=out", ""), with_out.names)


class NvpflowFloat64(Nvpflow):
    """A float64 flow with the same parameters on the same rows."""

    dtype = "float64"


class NvpflowTorch(TorchPeer):
    """A training step as one writes it in PyTorch, with FlowModule in place of PyTorch's own operations."""

    adam_options: ClassVar[dict[str, Any]] = {"fused": True}

    def __init__(self, configuration: Configuration, threads: int) -> None:
        super().__init__(configuration, threads)
        self.module.num_threads = threads

    def build(self, configuration):
        from nvpflow.torch import FlowModule

        return FlowModule(Nvpflow(configuration, 1).flow)


class NvpflowJax(Jax):
    """nvpflow.jax under jit, parameters as arguments; a training step as one writes it with optax."""

    chunks = False

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import nvpflow.jax

        super().__init__(configuration, threads)
        flow = Nvpflow(configuration, 1).flow
        self.functions, self.spec, self.threads = nvpflow.jax, flow.spec, threads
        self.parameters = nvpflow.jax.parameters(flow)

    def function(self, op, x):
        method, parameters = getattr(self.functions, op), self.parameters
        compiled = self.jax.jit(lambda parameters, x: method(self.spec, parameters, x, num_threads=self.threads))
        if op == "forward":
            return lambda x: tuple(map(np.asarray, compiled(parameters, x)))
        return lambda x: np.asarray(compiled(parameters, x))

    def nll(self, parameters, x):
        return self.functions.nll(self.spec, parameters, x, num_threads=self.threads)


OURS: dict[str, type[Peer]] = {
    "nvpflow": Nvpflow,
    "nvpflow_new_array": NvpflowAllocating,
    "nvpflow_float64": NvpflowFloat64,
    "nvpflow_torch": NvpflowTorch,
    "nvpflow_jax": NvpflowJax,
}
