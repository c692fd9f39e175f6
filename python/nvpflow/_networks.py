"""What makes the parameters of a coupling layer: `MLP` and `ResidualNet` of `nvpflow.layers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvpflow import _checks, _core
from nvpflow._expression import HOME, Kind
from nvpflow._text import counted


@dataclass(frozen=True, repr=False)
class MLP(Kind):
    """Dense layers: ``h_0 = [x_a, c]``, ``h_{j+1} = act(W_j h_j + b_j)``; the heads are linear in the last h.

    Parameters
    ----------
    hidden_sizes
        Units of each hidden layer, each at least 1; a tuple. None of them: the heads are linear in x_a and c.
    activation
        What follows each hidden layer, as in `nvpflow.build`.
    layer_norm
        Bring the output of each hidden layer to mean 0 and variance 1 (unbiased, plus 1e-5), without a trained map
        behind it. Needs at least 2 units a layer.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """

    _kind = "mlp"
    _by_position = 2

    hidden_sizes: Sequence[int] = (256,)
    activation: str = "relu"
    layer_norm: bool = False

    def __post_init__(self) -> None:
        sizes = _checks.sizes("hidden_sizes", self.hidden_sizes)
        layer_norm = _checks.boolean("layer_norm", self.layer_norm)
        for i, size in enumerate(sizes):
            if size < 1 + layer_norm:
                needs = "2 with layer_norm: one number has no variance" if layer_norm else "1"
                raise ValueError(f"hidden_sizes[{i}] is {size}, expected at least {needs}")
        self._set(hidden_sizes=sizes, activation=_activation(self.activation), layer_norm=layer_norm)

    def _sizes_in_words(self, between: str) -> str:
        """Return the hidden layers, for tables; between: stands between their sizes."""
        normalized = ", each normalized" if self.layer_norm else ""
        return (between.join(map(str, self.hidden_sizes)) or "none") + normalized


@dataclass(frozen=True, repr=False)
class ResidualNet(Kind):
    """Blocks that add to what they are given: ``h = W [x_a, c] + b``, ``h += W_1 act(W_0 act(h) + b_0) + b_1``; heads.

    Parameters
    ----------
    hidden_size
        Units of every layer, at least 1.
    num_blocks
        Blocks of two dense layers, at least 0.
    activation
        What precedes each of the two layers, as in `nvpflow.build`.
    context_gates
        Multiply what a block adds by ``sigmoid(W_c c + b_c)``; only in flows with a context.
    block_affines
        ``h * scale + shift`` in place of h before the first activation of each block, one scale and shift a unit:
        what a batch normalization becomes after training.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.

    References
    ----------
    He et al., Identity mappings in deep residual networks, 2016; as in Durkan et al., Neural spline flows, 2019.
    """

    _kind = "residual"
    _by_position = 1

    hidden_size: int = 256
    num_blocks: int = 2
    activation: str = "relu"
    context_gates: bool = False
    block_affines: bool = False

    def __post_init__(self) -> None:
        self._set(
            hidden_size=_at_least("hidden_size", self.hidden_size, 1),
            num_blocks=_at_least("num_blocks", self.num_blocks, 0),
            activation=_activation(self.activation),
            context_gates=_checks.boolean("context_gates", self.context_gates),
            block_affines=_checks.boolean("block_affines", self.block_affines),
        )

    def _sizes_in_words(self, between: str) -> str:
        return f"{counted(self.num_blocks, 'residual block')} of {self.hidden_size}"


Network = MLP | ResidualNet
for _kind in (MLP, ResidualNet):
    _kind.__module__ = HOME


def _activation(value: str) -> str:
    name = _checks.text("activation", value)
    if name not in _core.activation_names():
        known = ", ".join(_core.activation_names())
        raise ValueError(f"activation is {name[:80]!r}, expected one of {known}")
    return name


def _at_least(name: str, value: int, lowest: int) -> int:
    number = _checks.integer(name, value)
    if number < lowest:
        raise ValueError(f"{name} is {number}, expected at least {lowest}")
    return number
