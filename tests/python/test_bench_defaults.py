"""The benchmark of the defaults: what its table says of given records, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import defaults


def record(data: str, contender: str, seed: int, log_p: float) -> dict:
    return {"data": data, "contender": contender, "seed": seed, "log_p": log_p, "rows": 500, "columns": 2}


def test_the_table_has_means_and_gaps_to_the_best_reference() -> None:
    records = [
        record("a", "Gaussian", 0, -3.0),
        record("a", "before", 0, -2.0),
        record("a", "default", 0, -2.5),
        record("a", "default", 1, -1.9),
        record("b", "Gaussian", 0, -1.0),
        record("b", "before", 0, -4.0),
        record("b", "default", 0, -1.1),
    ]
    lines = defaults.table(records).splitlines()
    assert lines[2:] == [
        "| a | 500 | -3.000 | -2.000 | -2.200 | +0.200 |",
        "| b | 500 | -1.000 | -4.000 | -1.100 | +0.100 |",
        "| mean gap | |  |  |  | +0.150 |",
    ]
    assert defaults.below_the_gaussian(records) == [
        "| before | b | 3.000 |",
        "| default | b | 0.100 |",
    ]


def test_the_true_density_of_the_clusters_integrates_to_one() -> None:
    side = np.linspace(-6, 6, 401)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    assert np.exp(defaults.clusters_log_prob(grid)).sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=1e-6)


def test_it_runs(tmp_path) -> None:
    command = [sys.executable, defaults.__file__, "--quick", "--data", "moons, few", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| mean gap |" in done.stdout
    records = json.loads((tmp_path / "r.json").read_text())
    assert {r["contender"] for r in records} == set(defaults.CONTENDERS)
    assert all(np.isfinite(r["log_p"]) for r in records)
