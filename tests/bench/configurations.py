"""The benchmark's models, in one place: sizes, parameters, data and how much arithmetic a row is."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))  # for the oracle

from oracle import OracleFlow, random_parameters, real_nvp, unit_data, well_conditioned_scale

FLOAT32_BYTES = 4
# Forward, and twice as much back: for the inputs and for the weights.
TRAINING_FLOPS_FACTOR = 3


@dataclass(frozen=True)
class Configuration:
    """A RealNVP with relu; float32 throughout the benchmark unless a contender says otherwise."""

    name: str
    input_size: int
    num_flows: int
    hidden_sizes: tuple[int, ...]

    def dense_shapes(self, layer: int) -> list[tuple[int, int]]:
        """(in, out) of the dense layers of one coupling; the two heads count as one matrix."""
        first = self.input_size // 2
        halves = (first, self.input_size - first)
        passed, moved = halves if layer % 2 == 0 else halves[::-1]
        widths = (passed, *self.hidden_sizes, 2 * moved)
        return list(itertools.pairwise(widths))

    def _all_dense_shapes(self) -> list[tuple[int, int]]:
        return [shape for layer in range(self.num_flows) for shape in self.dense_shapes(layer)]

    @property
    def flops_per_row(self) -> int:
        """2 per multiply-add of the dense layers, nothing else."""
        return sum(2 * size_in * size_out for size_in, size_out in self._all_dense_shapes())

    @property
    def weight_bytes(self) -> int:
        """Kernels and biases in float32."""
        return FLOAT32_BYTES * sum((size_in + 1) * size_out for size_in, size_out in self._all_dense_shapes())

    def flops(self, op: str, batch: int) -> int:
        return self.flops_per_row * batch * (TRAINING_FLOPS_FACTOR if op == "train" else 1)


CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("A", 16, 4, (128,)),
        Configuration("B", 16, 4, (256,)),
        Configuration("C", 64, 8, (256, 256)),
        Configuration("D", 6, 8, (64, 64)),
        Configuration("E", 784, 8, (1024,)),
    )
}


def reference(configuration: Configuration) -> OracleFlow:
    """The float64 oracle with parameters that are float32 values: every contender starts from the same ones."""
    oracle = real_nvp(configuration.input_size, configuration.num_flows, configuration.hidden_sizes, "relu")
    # Weights at which a flow does not amplify rounding, so that a check against the oracle tests the contender alone.
    random = random_parameters(oracle.shapes(), seed=1, kernel_scale=well_conditioned_scale(configuration.num_flows))
    oracle.set_parameters({name: value.astype(np.float32) for name, value in random.items()})
    return oracle


def data(configuration: Configuration, rows: int) -> np.ndarray:
    """Rows of unit scale, float32 [rows, D]; fewer rows are the first of more."""
    return unit_data(rows, configuration.input_size, seed=2, dtype="float32")
