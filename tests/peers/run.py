"""The tests of zuko, nflows and normflows, with nvpflow computing in place of the libraries.

    python tests/peers/run.py                     # all three; fetches the sources of the versions that are installed
    python tests/peers/run.py --libraries zuko    # one of them
    python tests/peers/run.py --write             # and writes the tables of README.md beside this file

Each suite runs twice: as it is, and with through_nvpflow.py. The command fails where a test passes as it is only, or
where fewer tests than before meet nvpflow at all. What does not meet it is listed with the reason.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- suites:begin -->", "<!-- suites:end -->"


class Suite(NamedTuple):
    """Where a library's tests are, and how many of them nvpflow computes at least."""

    paths: tuple[str, ...]
    files: str
    least: int
    in_wheel: bool = False
    only: str = ""


SUITES = {
    "zuko": Suite(("tests/test_flows.py",), "test_*.py", 2, only="test_flows and (NICE or NSF)"),
    "nflows": Suite(("tests/transforms", "tests/flows"), "*_test.py", 40),
    "normflows": Suite(("normflows/flows",), "*_test.py", 7, in_wheel=True),
}
REASONS = {
    r"no vectors|of images": "rows are images, or numbers without an axis",
    r"Autoregressive": "autoregressive flows take D passes one way",
    r"Linear(CouplingTransform|CDF)|Quadratic(CouplingTransform|CDF)|Cubic": "splines of other kinds",
    r"Circular|Periodic": "circular splines have no counterpart",
    r"Planar|Radial|Residual": "there is no closed inverse",
    r"HamiltonianMonteCarlo|MetropolisHastings": "a sampler, not a map",
    r"first batch|at hand": "the batch sets the layer",
    r"CCAffineConst": "class-conditional layers have no counterpart",
    r"PiecewiseRationalQuadraticCoupling": "importers read the class around it",
    r"^Linear: ": "an abstract layer, of which the test looks at the cache",
    r"torch\.solve": "fails as it is: PyTorch has removed torch.solve",
}
NO_LAYER = "they call no layer, but functions, or look at messages and weights"


def source_of(library: str, folder: Path) -> Path:
    """Return a folder with the sources of the installed version."""
    if SUITES[library].in_wheel:
        found = importlib.util.find_spec(library)
        assert found is not None
        assert found.origin is not None
        return Path(found.origin).parent.parent
    version = importlib.metadata.version(library)
    options = ["--no-deps", "--no-binary", ":all:", "-q", "-d", str(folder), f"{library}=={version}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def outcomes(library: str, source: Path, results: Path, *, ours: bool) -> dict[str, Any]:
    """Run a suite; return what became of each test."""
    suite = SUITES[library]
    environment = os.environ | {
        "NVPFLOW_PEER": library if ours else "",
        "NVPFLOW_PEER_RESULTS": str(results),
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "through_nvpflow", "-p", "no:cacheprovider"]
    command += ["-W", "ignore", "-c", os.devnull, "--rootdir", str(source), "-o", f"python_files={suite.files}"]
    command += ["-k", suite.only] if suite.only else []
    done = subprocess.run(
        [*command, *suite.paths], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    if not results.exists():
        raise SystemExit(f"the tests of {library} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(results.read_text())
    results.unlink()
    return found


def reason_for(refusals: list[str]) -> str:
    """Return why a test met its own library only."""
    if not refusals:
        return NO_LAYER
    for text in refusals:
        for pattern, reason in REASONS.items():
            if re.search(pattern, text):
                return reason
    raise SystemExit(f"no reason is known for: {refusals[0]}")


def look_at(library: str, folder: Path) -> tuple[list[str], list[str]]:
    """Run both; return what is wrong, and the rows of the table."""
    source = source_of(library, folder)
    own = outcomes(library, source, folder / "own.json", ours=False)
    ours = outcomes(library, source, folder / "ours.json", ours=True)
    wrong = [
        f"{library}: {test} passes as it is and fails with nvpflow"
        for test, found in ours.items()
        if found["served"] and found["outcome"] == "failed" and own.get(test, found)["outcome"] == "passed"
    ]
    met = [test for test, found in ours.items() if found["served"]]
    if len(met) < SUITES[library].least:
        wrong.append(f"{library}: {len(met)} tests met nvpflow, expected {SUITES[library].least} at least")
    without: collections.Counter[str] = collections.Counter(
        reason_for(found["refused"]) for found in ours.values() if not found["served"]
    )
    passed = sum(ours[test]["outcome"] == "passed" for test in met)
    rows = [f"| {library} {importlib.metadata.version(library)} | {passed} of {len(met)} pass by nvpflow |"]
    rows += [f"| | {count} without it: {reason} |" for reason, count in sorted(without.items())]
    return wrong, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", default=",".join(SUITES), help="comma-separated (default: all)")
    parser.add_argument("--write", action="store_true", help="write the table of README.md")
    options = parser.parse_args()
    libraries = options.libraries.split(",")
    if unknown := set(libraries) - set(SUITES):
        parser.error(f"--libraries has {', '.join(sorted(unknown))}, expected some of {', '.join(SUITES)}")
    wrong, rows = [], ["| library | its tests |", "| --- | --- |"]
    for library in libraries:
        with tempfile.TemporaryDirectory() as folder:
            more, table = look_at(library, Path(folder))
        wrong += more
        rows += table
    print("\n".join(rows))
    if options.write:
        page = HERE / "README.md"
        head, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{head}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{rest.partition(END)[2]}")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
