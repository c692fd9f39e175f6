"""What an installed nvpflow brings along, and what it costs to import."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import nvpflow
import pytest


def test_importing_takes_less_than_50_ms_beyond_numpy(run_python) -> None:
    script = """
import time
import numpy
start = time.perf_counter()
import nvpflow
print(time.perf_counter() - start)
"""
    # The fastest of several: the first one reads the file from the disk, and others may be computing here.
    assert min(float(run_python(script)) for _ in range(5)) < 0.05


def test_importing_brings_nothing_but_numpy_and_the_standard_library(run_python) -> None:
    script = """
import sys, json
import numpy
before = set(sys.modules)
import nvpflow
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
"""
    found = {name for name in json.loads(run_python(script)) if not name.startswith("__")}
    assert found <= {"numpy", "nvpflow"}  # NumPy loads parts of itself on demand


def test_the_installed_package_is_whole() -> None:
    folder = Path(nvpflow.__file__).parent
    for name in ("py.typed", "_core.pyi", "data/household_power.npy", "data/README.md", "report.css"):
        assert (folder / name).is_file(), name
    distribution = importlib.metadata.distribution("nvpflow")
    assert distribution.version == nvpflow.__version__
    requires = [text for text in distribution.requires or [] if "extra ==" not in text]
    assert [re.split(r"[<>=! ]", text)[0] for text in requires] == ["numpy"]
    files = [str(path) for path in distribution.files or []]
    assert any(name.endswith("LICENSE") for name in files)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_the_extension_needs_the_systems_own_libraries_alone() -> None:
    found = subprocess.run(["ldd", nvpflow._core.__file__], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in found.splitlines() if line.strip()}
    own = r"linux-vdso|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+|libc\.musl-\w+|ld-musl-\w+"
    assert not [name for name in names if not re.fullmatch(rf"({own})\.so[.\d]*", name)]
