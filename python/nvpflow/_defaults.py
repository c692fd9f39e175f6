"""The model that the command line, the demo and the estimators take where nothing is said.

Measured by tests/bench/defaults.py on 16 data sets; python/docs/benchmarks.md has the table.
"""

from __future__ import annotations

from typing import Literal

NUM_FLOWS = 8
HIDDEN_SIZES = (64, 64)
_MOST_RELU_COLUMNS = 12
_FEW_ROWS_A_COLUMN = 50


def default_activation(input_size: int) -> str:
    """Return relu for up to 12 columns, which follows edges and gaps; above, silu, which overfits later."""
    return "relu" if input_size <= _MOST_RELU_COLUMNS else "silu"


def default_standardize(rows: int, columns: int, *, plain: bool) -> Literal["covariance"] | None:
    """Return what `build` is told: tables of fewer than 50 rows a column begin as a Gaussian.

    plain: the base is normal, masks go by name, and there is no context. Of more rows neither start is better in the
    median.
    """
    return "covariance" if plain and rows < _FEW_ROWS_A_COLUMN * columns else None
