"""Samplers and trainers of other people with a flow of nvpflow in them: python/examples/clients.

They take a minute or two each, and libraries that few have: `pip install ".[clients]" && pytest -m clients`.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from documents import ROOT

pytestmark = pytest.mark.clients

NUMBER = r"(-?\d+\.\d+)"


def run(name: str, library: str) -> str:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    script = ROOT / "python" / "examples" / "clients" / f"with_{name}.py"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def line_of(output: str, pattern: str) -> tuple[float, ...]:
    found = re.search(rf"^nvpflow: {pattern}", output, re.MULTILINE)
    assert found, output
    return tuple(map(float, found.groups()))


@pytest.mark.parametrize(("name", "library", "truth"), [("nessai", "nessai", -5.804), ("pocomc", "pocomc", -5.998)])
def test_the_evidence_is_that_of_the_problem(name, library, truth) -> None:
    log_z, error = line_of(run(name, library), rf"log Z {NUMBER} \+- {NUMBER}")
    assert abs(log_z - truth) < 4 * error + 0.05


def test_a_guide_of_pyro_trains() -> None:
    (elbo,) = line_of(run("pyro", "pyro"), f"ELBO {NUMBER}")
    assert elbo > -36  # an untrained one is at -79


def test_a_posterior_of_sbi_is_near() -> None:
    (divergence,) = line_of(run("sbi", "sbi"), rf"KL\(q \|\| p\) {NUMBER}")
    assert abs(divergence) < 0.1


def test_flowmc_trains_a_model() -> None:
    output = run("flowmc", "flowMC")
    (mean,) = line_of(output, f"mean log p {NUMBER}")
    (own,) = map(float, re.search(f"^flowMC's RealNVP: mean log p {NUMBER}", output, re.MULTILINE).groups())
    assert mean > own - 0.2
