"""The benchmark's models, in one place: sizes, parameters, data and how much arithmetic a row is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))  # for the oracle

from general_oracle import GeneralFlow, spline_of, tensor_shapes
from oracle import random_parameters, unit_data, well_conditioned_scale

FLOAT32_BYTES = 4
# Forward, and twice as much back: for the inputs and for the weights.
TRAINING_FLOPS_FACTOR = 3
_MASKS = {"halves": ("second_half", "first_half"), "checkered": ("odd", "even"), "even_first": ("even", "odd")}
# The dense layers that a context enters.
_ENTERED = re.compile(r"flow_\d+_(coupling_dense_0|initial|block_\d+_context)\.kernel")


@dataclass(frozen=True)
class Configuration:
    """A flow in the terms of `nvpflow.build`, relu unless it says otherwise, without a standardize layer.

    network="pair" is the coupling of the MAF paper (Papamakarios et al., 2017) without its batch normalization: a
    network with tanh for the scale, one with relu for the translation, read from latents to data, a scale of exp(u).
    mixing="lu" is a permutation and an LU layer before each coupling and at the end; "lu_behind" an LU layer behind
    each coupling, as sbi has it. Float32 throughout the benchmark unless a contender says otherwise.
    """

    name: str
    input_size: int
    num_flows: int
    hidden_sizes: tuple[int, ...]
    mask: str = "halves"
    mixing: str | None = None
    network: str = "mlp"
    num_blocks: int = 2
    context_size: int = 0
    one_context: bool = False  # for all rows of a call; else each row has its own
    num_bins: int = 0  # of rational-quadratic splines in place of affine maps
    bounded: bool = False  # splines with free ends on [0, 1], where latents are uniform; else those of layers.Spline

    @property
    def plain(self) -> bool:
        """Whether it is a RealNVP of halves: what every peer can be."""
        kind = (self.mask, self.mixing, self.network, self.context_size, self.num_bins)
        return kind == ("halves", None, "mlp", 0, 0)

    @property
    def splines(self) -> bool:
        return self.num_bins > 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hidden layers of a network; of a residual one those of the perceptron with as many layers."""
        return self.hidden_sizes * (1 + 2 * self.num_blocks) if self.network == "residual" else self.hidden_sizes

    @property
    def expression(self) -> str:
        """The flow in Python, where `from nvpflow.layers import *` has been run."""
        if self.network == "pair" or self.mixing == "lu_behind" or self.bounded:
            return self._expression_of_layers()
        given = {"mask": self.mask, "mixing": self.mixing, "network": self.network, "context_size": self.context_size}
        usual = {"mask": "halves", "mixing": None, "network": "mlp", "context_size": 0}
        options = [f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in given.items() if v != usual[k]]
        if self.network == "residual":
            options.append(f"num_blocks={self.num_blocks}")
        if self.splines:
            options += ['transform="spline"', f"num_bins={self.num_bins}"]
        sizes = f"{self.input_size}, {self.num_flows}, {self.hidden_sizes}"
        return f"nvpflow.build({', '.join([sizes, *options, 'standardize=False'])})"

    def _expression_of_layers(self) -> str:
        """Of flows that are made of layers one by one."""
        first, second = _MASKS[self.mask]
        sets = f'{self.num_flows // 2} * ("{first}", "{second}")' + (f' + ("{first}",)' if self.num_flows % 2 else "")
        options = [f"{self.input_size}"]
        if self.network == "pair":
            networks = f'scale_network=MLP({self.hidden_sizes}, "tanh"), translation_network=MLP({self.hidden_sizes})'
            coupling = f'Coupling(features, Affine("exp"), inverse=True, {networks})'
        elif self.bounded:
            options.append("base=Uniform(0, 1)")
            spline = f'Spline({self.num_bins}, interval=(0, 1), boundary="free")'
            coupling = f"Coupling(features, {spline}, MLP({self.hidden_sizes}))"
        else:
            options.append(f"context_size={self.context_size}")
            coupling = (
                f"Coupling(features, Spline({self.num_bins}), ResidualNet({self.hidden_sizes[0]}, context_gates=True))"
            )
        each = f"{coupling} for features in {sets}"
        if self.mixing:
            each = f"layer for features in {sets} for layer in ({coupling}, LULinear())"
        return f"nvpflow.build({', '.join(options)}, layers=[{each}])"

    @property
    def spec(self) -> dict[str, Any]:
        """The same as the file format writes it, with orders and masks that never change."""
        rng = np.random.default_rng([4, self.input_size])
        layers: list[dict[str, Any]] = []

        def mix() -> None:
            if self.mixing == "lu":
                order = [int(j) for j in rng.permutation(self.input_size)]
                layers.extend([{"kind": "permutation", "order": order}, {"kind": "lu_linear", "inverse": False}])

        for features in self._feature_sets(rng):
            mix()
            layers.append({"kind": "coupling", "inverse": False, "transformed": features, **self._coupling()})
            if self.mixing == "lu_behind":
                layers.append({"kind": "lu_linear", "inverse": False})
        mix()
        return {
            "input_size": self.input_size,
            "context_size": self.context_size,
            "standardize_context": False,
            "dtype": "float32",
            "base": {"kind": "uniform", "low": 0.0, "high": 1.0} if self.bounded else {"kind": "normal"},
            "layers": layers,
        }

    def _feature_sets(self, rng: np.random.Generator) -> Iterator[str | list[int]]:
        """What each coupling transforms: the second of two takes what the first has left."""
        for k in range(self.num_flows):
            if self.mask in _MASKS:
                yield _MASKS[self.mask][k % 2]
                continue
            if k % 2 == 0:
                order = rng.permutation(self.input_size)
            half = self.input_size // 2
            yield sorted(int(j) for j in (order[half:] if k % 2 == 0 else order[:half]))

    def _coupling(self) -> dict[str, Any]:
        mlp = {"kind": "mlp", "hidden_sizes": list(self.hidden_sizes), "activation": "relu", "layer_norm": False}
        if self.network == "pair":
            return {
                "inverse": True,
                "transform": {"kind": "affine", "log_scale": {"function": "identity"}},
                "scale_network": {**mlp, "activation": "tanh"},
                "translation_network": mlp,
            }
        residual = {
            "kind": "residual",
            "hidden_size": self.hidden_sizes[0],
            "num_blocks": self.num_blocks,
            "activation": "relu",
            "context_gates": self.context_size > 0,
            "block_affines": False,
        }
        tanh = {"function": "tanh", "factor": 1.0, "divisor": 1.0}
        affine = {"kind": "affine", "log_scale": tanh}
        transform = {"kind": "spline", **self.spline} if self.splines else affine
        return {"transform": transform, "network": residual if self.network == "residual" else mlp}

    @property
    def spline(self) -> dict[str, Any]:
        """What the file format says of each spline."""
        ends = {"lower": 0.0, "upper": 1.0, "boundary": "free"} if self.bounded else {}
        return spline_of(self.num_bins, **ends)

    def _products(self) -> Iterator[tuple[int, int]]:
        """(in, out) of each matrix that a row is multiplied with.

        An lu_linear layer is one matrix, as it is computed. One context for all rows has been made into biases.
        """
        folded = self.context_size if self.one_context else 0
        for name, shape in tensor_shapes(self.spec):
            if name.endswith(".kernel"):
                yield shape[0] - (folded if _ENTERED.fullmatch(name) else 0), shape[1]
            elif name.endswith(".log_diagonal"):
                yield self.input_size, self.input_size

    @property
    def flops_per_row(self) -> int:
        """2 per multiply-add of the dense and the linear layers, nothing else."""
        return sum(2 * size_in * size_out for size_in, size_out in self._products())

    @property
    def weight_bytes(self) -> int:
        """What a density reads beside its rows: matrices and biases in float32, and gates that are one for all rows."""
        return FLOAT32_BYTES * sum((size_in + 1) * size_out for size_in, size_out in self._products())

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
        # As in Glow (Kingma and Dhariwal, 2018).
        Configuration("J", 6, 10, (100, 100), mixing="lu"),
        # A conditional density as sbi builds its flows, with affine couplings instead of splines.
        Configuration("G", 5, 5, (50,), mixing="lu", network="residual", context_size=10),
        Configuration("G1", 5, 5, (50,), mixing="lu", network="residual", context_size=10, one_context=True),
        Configuration("M", 6, 10, (100, 100), mask="checkered", network="pair"),
        # What masks cost that no placement of the features makes contiguous: beside A, its halves.
        Configuration("R", 16, 4, (128,), mask="random"),
        # RQ-NSF (C) of POWER (Durkan et al., 2019), without splines of the features that a coupling passes on.
        Configuration("F", 6, 10, (256,), mask="checkered", mixing="lu", network="residual", num_bins=8),
        # sbi's nsf.
        Configuration(
            *("S", 5, 5, (50,)),
            mask="even_first",
            mixing="lu_behind",
            network="residual",
            context_size=10,
            num_bins=10,
        ),
        # As in importance sampling on a unit cube (MadNIS, Heimel et al., 2023).
        Configuration("H", 4, 4, (32, 32, 32), num_bins=10, bounded=True),
        Configuration("I", 6, 8, (64, 64), num_bins=8),
    )
}


def reference(configuration: Configuration) -> GeneralFlow:
    """The float64 oracle with parameters that are float32 values: every contender starts from the same ones."""
    shapes = dict(tensor_shapes(configuration.spec))
    # Weights at which a flow does not amplify rounding, so that a check against the oracle tests the contender alone.
    random = random_parameters(shapes, seed=1, kernel_scale=well_conditioned_scale(configuration.num_flows))
    random |= {name: np.ones(shape) for name, shape in shapes.items() if name.endswith(".sign")}
    return GeneralFlow(configuration.spec, {name: value.astype(np.float32) for name, value in random.items()})


def data(configuration: Configuration, rows: int) -> np.ndarray:
    """Rows of unit scale, or in the unit cube, float32 [rows, D]; fewer rows are the first of more."""
    if configuration.bounded:  # a little inside of it: some libraries refuse what rounding puts outside
        rng = np.random.default_rng([2, configuration.input_size])
        return rng.uniform(0.01, 0.99, size=(rows, configuration.input_size)).astype(np.float32)
    return unit_data(rows, configuration.input_size, seed=2, dtype="float32")


def given(configuration: Configuration, rows: int) -> tuple[np.ndarray, ...]:
    """What a call is given: the rows, and where there is a context that, [rows, C] or [C]."""
    x, c = data(configuration, rows), configuration
    if not c.context_size:
        return (x,)
    contexts = unit_data(1 if c.one_context else rows, c.context_size, seed=3, dtype="float32")
    return x, contexts[0] if c.one_context else contexts
