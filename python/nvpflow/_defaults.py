"""The model that the command line, the demo and the estimators take where nothing is said.

Measured by tests/bench/defaults.py on 16 data sets; python/docs/benchmarks.md has the table.
"""

from __future__ import annotations

NUM_FLOWS = 8
HIDDEN_SIZES = (64, 64)
_MOST_RELU_COLUMNS = 12


def default_activation(input_size: int) -> str:
    """Return relu for up to 12 columns, which follows edges and gaps; above, silu, which overfits later."""
    return "relu" if input_size <= _MOST_RELU_COLUMNS else "silu"
