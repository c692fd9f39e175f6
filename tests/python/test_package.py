"""What an installed nvpflow brings along, and what it costs to import."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import nvpflow
import pytest


def test_importing_costs_less_than_half_of_what_importing_numpy_costs(run_python) -> None:
    """Processor time, and a ratio within one process: neither depends on what else the machine does."""
    script = """
import time
start = time.process_time()
import numpy
middle = time.process_time()
import nvpflow
print((time.process_time() - middle) / (middle - start))
"""
    # The best of several: the first one compiles Python to bytecode.
    assert min(float(run_python(script)) for _ in range(5)) < 0.5


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


def test_optional_modules_come_where_they_are_asked_for(run_python) -> None:
    script = """
import sys
import nvpflow
lazy = ("demo", "exporters", "importers", "jax", "plot", "report", "sklearn", "torch")
assert not [name for name in lazy if f"nvpflow.{name}" in sys.modules]
assert nvpflow.demo is sys.modules["nvpflow.demo"]
assert {"build", "demo", "cuda", "functional", "__version__"} <= set(dir(nvpflow))
sys.modules["matplotlib"] = sys.modules["torch"] = None     # as where they are not installed
assert nvpflow.plot.corner is sys.modules["nvpflow.plot"].corner
assert not {"report", "torch"} & set(dir(nvpflow))
try:
    nvpflow.torch
except ImportError as error:
    print(error)
try:
    nvpflow.tensorflow
except AttributeError as error:
    print(error)
"""
    needs, unknown = run_python(script).splitlines()
    assert needs == 'nvpflow.torch needs PyTorch 2.4 or newer: pip install "torch>=2.4"'
    assert unknown == "module 'nvpflow' has no attribute 'tensorflow'"


def _imported(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, wherever in it: at its head, for types, in functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules


def test_imports_run_one_way() -> None:
    """No module imports one that imports it, not even for types; nvpflow itself, which gathers them all, apart."""
    folder = Path(nvpflow.__file__).parent
    files = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }
    del files["nvpflow"]
    order = TopologicalSorter({name: _imported(path, set(files)) for name, path in files.items()})
    below = list(order.static_order())  # CycleError names the circle
    assert below.index("nvpflow._model") < below.index("nvpflow.training") < below.index("nvpflow.flow")


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (pip install mypy)")
def test_type_checkers_know_the_optional_modules(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import nvpflow\nreveal_type(nvpflow.plot.corner)\nnvpflow.sklearn.FlowDensity\nnvpflow.plott\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--cache-dir", tmp_path / "cache", "user.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert re.search(r'note: Revealed type is "def \(data: ', done.stdout), done.stdout + done.stderr
    (error,) = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert 'Module has no attribute "plott"' in error


def test_the_installed_package_is_whole() -> None:
    folder = Path(nvpflow.__file__).parent
    for name in ("py.typed", "_core.pyi", "data/household_power.npy", "data/README.md", "report.css"):
        assert (folder / name).is_file(), name
    distribution = importlib.metadata.distribution("nvpflow")
    assert distribution.version == nvpflow.__version__
    requires = [text for text in distribution.requires or [] if "extra ==" not in text]
    assert [re.split(r"[<>=! ]", text)[0] for text in requires] == ["numpy"]
    files = [str(path) for path in distribution.files or []]
    for name in ("LICENSE", "nlohmann-json.txt", "pybind11.txt"):  # and those of what is compiled in
        assert any(path.endswith(f"licenses/{name}") for path in files), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_the_extension_needs_the_systems_own_libraries_alone() -> None:
    found = subprocess.run(["ldd", nvpflow._core.__file__], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in found.splitlines() if line.strip()}
    own = r"linux-vdso|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+|libc\.musl-\w+|ld-musl-\w+"
    assert not [name for name in names if not re.fullmatch(rf"({own})\.so[.\d]*", name)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf on PATH (binutils)")
@pytest.mark.skipif(bool(os.environ.get("NVPFLOW_SANITIZED")), reason="a build with sanitizers goes without hardening")
def test_the_compiled_parts_are_hardened() -> None:
    module = Path(nvpflow._core.__file__)
    shared = sorted((module.parent / "lib").glob("libnvpflow.so*"))
    assert shared, "the shared library is part of the package"
    for path in (module, *shared):
        found = subprocess.run(
            ["readelf", "-lWd", "--dyn-syms", path], capture_output=True, text=True, check=True
        ).stdout
        assert "GNU_RELRO" in found, path
        assert re.search(r"\(FLAGS(_1)?\).*\bNOW\b", found), path  # with it, the whole table of addresses is read-only
        (stack,) = re.findall(r"GNU_STACK .*? (R\w*) +0x", found)
        assert stack == "RW", path
        assert "TEXTREL" not in found, path
        assert "__stack_chk_fail" in found or "__stack_chk_guard" in found, path
        # What std::vector's operator[] says where its check fails.
        assert b"__n < this->size()" in path.read_bytes(), path


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the fortified functions are glibc's")
def test_the_extension_calls_the_fortified_functions_of_libc() -> None:
    assert re.search(rb"\0__\w+_chk\0", Path(nvpflow._core.__file__).read_bytes().replace(b"__stack_chk_fail", b""))
