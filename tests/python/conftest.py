"""Fixtures that the tests share. Markers and strictness are in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# `pytest &` in a script, nohup and some CI start with SIGINT ignored, and children inherit that: the tests of Ctrl-C
# would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("SIGHUP", "SIGTERM"):  # nohup ignores the first
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), signal.SIG_DFL)


def chromium() -> str | None:
    """Path of a Chromium that the system brings, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    """Closes the figures of a test: Matplotlib keeps them for the whole process."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def pytest_configure() -> None:
    """Fail where NVPFLOW_REQUIRE names modules, separated by commas, whose tests would be skipped: they are missing."""
    required = filter(None, os.environ.get("NVPFLOW_REQUIRE", "").split(","))
    if missing := [name for name in required if importlib.util.find_spec(name) is None]:
        raise pytest.UsageError(f"NVPFLOW_REQUIRE names modules that are not installed: {', '.join(missing)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked data, gpu and browser where there is no such thing, and say what is missing."""
    missing = {}
    if not os.environ.get("NVPFLOW_DATA"):
        missing["data"] = "set NVPFLOW_DATA to the folder of the data sets"
    if any(item.get_closest_marker("gpu") for item in items):
        import nvpflow

        if reason := nvpflow.cuda.why_unavailable():
            missing["gpu"] = f"no CUDA device: {reason.split(';')[0]}"
    if importlib.util.find_spec("playwright") is None:
        missing["browser"] = "playwright is not installed (pip install playwright)"
    elif chromium() is None:
        missing["browser"] = "there is no chromium or google-chrome on PATH"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def make_flow():
    """Builds a flow with random parameters far from the identity, and the oracle that holds the same ones."""
    import nvpflow
    from oracle import oracle_of, random_parameters

    def make(
        input_size,
        num_flows=2,
        hidden_sizes=(8,),
        activation="silu",
        *,
        dtype="float64",
        scale_bound=1.0,
        standardize=False,
        seed=0,
        kernel_scale=1.0,
    ):
        flow = nvpflow.build(
            input_size=input_size,
            num_flows=num_flows,
            hidden_sizes=hidden_sizes,
            activation=activation,
            dtype=dtype,
            scale_bound=scale_bound,
            standardize=standardize,
        )
        shapes = {name: value.shape for name, value in flow.parameters().items()}
        random = random_parameters(shapes, seed, kernel_scale)
        flow.set_parameters({name: value.astype(dtype) for name, value in random.items()})
        return flow, oracle_of(flow)

    return make


@pytest.fixture(scope="session")
def run_python():
    """Runs a script in a fresh interpreter that can import the test helpers; returns its standard output."""

    def run(
        script: str, *arguments: object, env: dict[str, str] | None = None, check: bool = True, timeout: float = 120
    ):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=TESTS,
            env={**os.environ, **(env or {})},
        )
        if not check:
            return result
        assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    return run
