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


def line_of(output: str, pattern: str, part: str = "") -> tuple[float, ...]:
    found = re.search(rf"^nvpflow{part}: {pattern}", output, re.MULTILINE)
    assert found, output
    return tuple(map(float, found.groups()))


@pytest.mark.parametrize(("name", "library", "truth"), [("nessai", "nessai", -5.804), ("pocomc", "pocomc", -5.998)])
def test_the_evidence_is_that_of_the_problem(name, library, truth) -> None:
    log_z, error = line_of(run(name, library), rf"log Z {NUMBER} \+- {NUMBER}")
    assert abs(log_z - truth) < 4 * error + 0.05


def test_a_guide_of_pyro_trains() -> None:
    (elbo,) = line_of(run("pyro", "pyro"), f"ELBO {NUMBER}")
    assert elbo > -36  # an untrained one is at -79


def test_sbi_trains_posteriors_and_likelihoods() -> None:
    output = run("sbi", "sbi")
    (divergence,) = line_of(output, rf"KL\(q \|\| p\) {NUMBER}", part=", vi")
    assert abs(divergence) < 0.1
    log_q, uniform = line_of(output, f"log q {NUMBER} nats, p of uniform ranks {NUMBER}", part=", npe")
    (own,) = map(float, re.search(f"^sbi's nsf, npe: log q {NUMBER}", output, re.MULTILINE).groups())
    assert log_q > own - 0.1
    assert uniform > 0.001
    behind, off = line_of(output, f"{NUMBER} nats behind, mean off by {NUMBER}", part=", nle")
    assert 0 < behind < 0.3
    assert off < 0.15
    assert float(re.search(r"^imported: off by (\S+) nats", output, re.MULTILINE)[1]) < 1e-3


def test_flowmc_trains_a_model() -> None:
    output = run("flowmc", "flowMC")
    (mean,) = line_of(output, f"mean log p {NUMBER}")
    (own,) = map(float, re.search(f"^flowMC's RealNVP: mean log p {NUMBER}", output, re.MULTILINE).groups())
    assert mean > own - 0.2
