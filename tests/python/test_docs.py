"""The documentation: every block of every page runs, quoted messages are real, the site builds without a warning."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import documents
import numpy as np
import nvpflow
import pytest

DOCS = documents.ROOT / "python" / "docs"
PAGES = {str(path.relative_to(DOCS).with_suffix("")): documents.read(path) for path in sorted(DOCS.rglob("*.md"))}
# Its programs are compiled by another test, where there is one.
COMPILED = {"cpp"}
LANGUAGES = {"python", "sh", "pytb", "console", "cmake", "cpp", "c"}


def run(page: documents.Page, folder: Path, monkeypatch: pytest.MonkeyPatch, *marks: str) -> None:
    """Run a page where its examples and the tables of its commands are."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (folder / "python").symlink_to(documents.ROOT / "python")
    rows = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    np.save("train.npy", rows[:500])
    np.save("test.npy", rows[500:])
    try:
        documents.run(page, folder, marks)
    except documents.NotHere as missing:
        pytest.skip(str(missing))
    finally:
        if "torch._dynamo" in sys.modules:
            sys.modules["torch"].compiler.reset()


@pytest.mark.parametrize("name", [name for name in PAGES if name not in COMPILED])
def test_blocks_run_in_order(name, tmp_path, monkeypatch):
    run(PAGES[name], tmp_path, monkeypatch)


ENGINES = {"needs ray", "needs pyspark"}  # which take minutes to install and to start


def needing() -> list[Any]:
    """Return pages with all their marks of libraries: to run a page for each of them would repeat the rest."""
    found = []
    for name, page in PAGES.items():
        needs = [mark for mark in page.marks() if mark.startswith("needs ")]
        for engines in (False, True):
            if marks := tuple(mark for mark in needs if (mark in ENGINES) == engines):
                found.append(
                    pytest.param(
                        name, marks, id=name + "-engines" * engines, marks=[pytest.mark.engines] if engines else []
                    )
                )
    return found


@pytest.mark.parametrize(("name", "marks"), needing())
def test_blocks_about_other_libraries_run(name, marks, tmp_path, monkeypatch):
    modules = [mark.removeprefix("needs ") for mark in marks]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if there := [module for module in modules if module not in missing]:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setenv("PYTHONWARNINGS", "ignore")
            warnings.simplefilter("ignore")  # of their imports
            for module in there:
                importlib.import_module(module)
        run(PAGES[name], tmp_path, monkeypatch, *(f"needs {module}" for module in there))
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "slow" in page.marks()])
def test_slow_blocks_run(name, tmp_path, monkeypatch):
    run(PAGES[name], tmp_path, monkeypatch, "slow")


def test_no_block_is_left_out():
    for name, page in PAGES.items():
        for block in page.blocks:
            assert block.language in LANGUAGES, f"{name}, line {block.line}: a block of {block.language!r} is not run"
            assert block.mark in ("", "slow") or block.mark.startswith("needs "), f"{name}, line {block.line}"


def test_quoted_messages_are_in_the_sources():
    text = documents.sources()
    quoted = [(name, block) for name, page in PAGES.items() for block in page.blocks if block.language == "pytb"]
    assert len(quoted) >= 5
    for name, block in quoted:
        assert documents.occurs(block.text, text), f"{name}, line {block.line}: not in the sources: {block.text}"


def test_every_entry_of_troubleshooting_quotes_its_message():
    text = PAGES["troubleshooting"].path.read_text(encoding="utf-8")
    entries = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(entries) >= 25
    for entry in entries:
        heading, body = entry.split("\n", 1)
        part = re.search(r"`(.+?)`", heading)[1]
        message = re.search(r"```pytb\n(.*?)```", body, flags=re.S)
        assert message, f"no message under {heading}"
        for piece in part.split("..."):
            assert piece.strip() in message[1], f"{piece!r} of the heading is not in the message: {message[1]}"
    assert sum("```python" in entry or "```sh" in entry for entry in entries) >= 20  # provoked, not only found


def test_a_result_that_differs_is_noticed(tmp_path):
    """The comparison itself: numbers, dots, failures that do not come or are others."""

    def passes(text: str) -> bool:
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
        try:
            documents.run(documents.read(tmp_path / "page.md"), tmp_path)
        except AssertionError:
            return False
        return True

    assert passes("```python\nprint(12)\n```\n\n```text\n12\n```\n")
    assert not passes("```python\nprint(12)\n```\n\n```text\n13\n```\n")
    assert passes("```python\nprint(1.5, 'us')\n```\n\n<!-- numbers differ -->\n```text\n20 us\n```\n")
    assert not passes("```python\nprint(1.5, 'ms')\n```\n\n<!-- numbers differ -->\n```text\n20 us\n```\n")
    assert passes("```python\nprint('a b c')\n```\n```text\na ... c\n```\n")
    assert not passes("```python\nprint('a b c')\n```\n```text\na ... d\n```\n")
    assert passes("```python\nint('x')\n```\n```pytb\nValueError: invalid literal ...\n```\n")
    assert not passes("```python\nint('1')\n```\n```pytb\nValueError: invalid literal ...\n```\n")
    assert not passes("```python\nint('x')\n```\n```pytb\nTypeError: invalid literal ...\n```\n")
    assert passes("```sh\necho a; exit 0\n```\n```text\na\n```\n")
    assert not passes("```sh\nfalse\n```\n")
    assert not documents.occurs("x has ... pink elephants", documents.sources())


def test_the_pages_for_developers_keep_their_form():
    def lines(name: str) -> list[str]:
        return (documents.ROOT / name).read_text(encoding="utf-8").splitlines()

    architecture = lines("cpp/ARCHITECTURE.md")
    assert len(architecture) <= 150
    assert not [line for line in architecture if re.search(r"\b20\d\d-\d\d|FLOP/s", line)], "it is no lab book"
    assert len(lines("CONTRIBUTING.md")) <= 80
    entries = re.split(r"^(?=\*\*D-)", "\n".join(lines("cpp/design/decisions.md")), flags=re.M)[1:]
    assert [entry[2:7] for entry in entries] == [f"D-{number:03}" for number in range(1, len(entries) + 1)]
    for entry in entries:
        assert len(entry.split("\n\n")[0].splitlines()) <= 5, f"more than five lines: {entry.splitlines()[0]}"


def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f'{module} is not installed (pip install ".[docs]")')
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            DOCS.parent / "mkdocs.yml",
            "-d",
            tmp_path / "site",
        ],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "site" / "reference" / "flow" / "index.html").read_text(encoding="utf-8")
    for method in ("forward", "inverse", "log_probability", "sample", "fit", "vjp", "save", "parameters"):
        assert f'id="nvpflow.Flow.{method}"' in reference, f"{method} is missing from the reference"
    for page in (tmp_path / "site" / "reference").rglob("index.html"):  # an example outside its section is a quotation
        assert "<blockquote>" not in page.read_text(encoding="utf-8"), page
    estimators = (tmp_path / "site" / "reference" / "sklearn" / "index.html").read_text(encoding="utf-8")
    assert "{parameters}" not in estimators
    assert "num_flows" in estimators


@pytest.mark.parametrize("name", ["nvpflow", *documents.OPTIONAL])
def test_examples_of_docstrings_run(name):
    """Those of the reference; what has none passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries themselves
        pytest.importorskip(documents.OPTIONAL.get(name, name))
        module = importlib.import_module(name)
    failed, run = doctest.testmod(module)
    assert failed == 0
    assert run > 0 or name in ("nvpflow.plot", "nvpflow.report")


def test_sentences_of_the_compiled_docstrings_are_short():
    """Those that tests/tools/prose.py cannot read in the sources."""
    place = importlib.util.spec_from_file_location("prose", documents.ROOT / "tests" / "tools" / "prose.py")
    prose = importlib.util.module_from_spec(place)
    place.loader.exec_module(prose)
    found, read = [], 0
    for kind in (nvpflow.Flow, nvpflow.ConditionedFlow, nvpflow.FlowSpec, nvpflow.cuda.DeviceArray):
        for name in (name for name in dir(kind) if not name.startswith("_")):
            text = inspect.cleandoc(inspect.getattr_static(kind, name).__doc__ or "")
            read += 1
            for line, block in prose.blocks(list(enumerate(text.splitlines(), 1))):
                found += prose.too_long(f"{kind.__name__}.{name}:{line}", block)
    assert found == []
    assert read > 50


def test_pictures_are_few_and_small():
    pictures = [path for path in (DOCS / "pictures").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in pictures) < 400_000
    pages = [page.path for page in PAGES.values()]
    text = "".join(path.read_text(encoding="utf-8") for path in [*pages, documents.ROOT / "README.md"])
    for path in pictures:
        assert f"pictures/{path.name}" in text, f"{path.name} is shown nowhere"
