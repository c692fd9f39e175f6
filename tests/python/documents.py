"""The code blocks of Markdown pages, and how they run: `test_readme.py` and `test_docs.py` share this.

    python   runs, in one namespace per page, in order; a shell block is `sh`, run by bash in the page's folder
    text     right after one of those: what it printed. ... stands for anything; after <!-- numbers differ --> every
             number stands for any number
    pytb     right after one of those: how it failed, `ValueError: x has ...`. By itself: a message that occurs so in
             the sources, where ... stands for what is put in
    console  does not run: installs, settings of a machine, figures of one

The comment <!-- slow --> before a block leaves it out of the default run, <!-- needs zuko --> wherever zuko is missing.
Whatever else a page imports it needs as a whole.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^>]*) -->\n+)?```(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
RUN = ("python", "sh")
# What the package's own modules import beside NumPy.
OPTIONAL = {
    "nvpflow.torch": "torch",
    "nvpflow.sklearn": "sklearn",
    "nvpflow.plot": "matplotlib",
    "nvpflow.report": "matplotlib",
    "nvpflow.jax": "jax",
    "nvpflow.exporters": "torch",
}


class NotHere(Exception):
    """A library that a page is about is not installed."""


@dataclass
class Block:
    """A fenced block, the comment before it, and what follows it as its result."""

    language: str
    text: str
    line: int
    mark: str = ""
    result: Block | None = None

    def imports(self) -> list[str]:
        """Return the top-level modules that a Python block imports, those of nvpflow's optional parts included."""
        if self.language != "python":
            return []
        found = []
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        return sorted({OPTIONAL.get(name, name.split(".")[0]) for name in found})


@dataclass
class Page:
    """A Markdown file and its blocks."""

    path: Path
    blocks: list[Block] = field(default_factory=list)

    def marks(self) -> list[str]:
        """Return the marks that leave blocks out of the default run."""
        return sorted({block.mark for block in self.blocks if block.language in RUN and block.mark})


def read(path: Path) -> Page:
    """Take a page apart."""
    text = path.read_text(encoding="utf-8")
    page, end = Page(path), 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        block = Block(match["language"], match["text"], line, match["mark"] or "")
        between = text[end : match.start()]
        follows = page.blocks and page.blocks[-1].language in RUN and not between.strip()
        if follows and block.language in ("text", "json", "pytb"):
            page.blocks[-1].result = block
        else:
            page.blocks.append(block)
        end = match.end()
    return page


def run(page: Page, folder: Path, marks: tuple[str, ...] = ()) -> dict[str, object]:
    """Run a page in `folder`: all blocks without a mark, and those with one of `marks`. Return its namespace."""
    namespace: dict[str, object] = {"__name__": "page"}
    for block in page.blocks:
        if block.language not in RUN or (block.mark and block.mark not in marks):
            continue
        for module in block.imports():
            if importlib.util.find_spec(module) is None:
                raise NotHere(f"{module} is not installed")
        where = f"{page.path}:{block.line}"
        printed, failed = (run_python if block.language == "python" else run_shell)(block, where, folder, namespace)
        expected = block.result
        if expected is not None and expected.language == "pytb":
            assert failed, f"{where} should have failed with {expected.text}"
            assert matches(failed, expected), f"{where} failed with\n{failed}\nexpected\n{expected.text}"
            continue
        assert not failed, f"{where} failed:\n{failed}"
        if expected is not None:
            assert matches(printed, expected), f"{where} printed\n{printed}\nexpected\n{expected.text}"
    return namespace


def run_python(block: Block, where: str, folder: Path, namespace: dict[str, object]) -> tuple[str, str]:
    """Return what a block printed, and the error that it ended with, as the last lines of a traceback have it."""
    code = compile("\n" * block.line + block.text, where.rsplit(":", 1)[0], "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        for library in {"torch", "ray", "pyspark"} & {*sys.modules}:
            warnings.filterwarnings("ignore", module=library)
        try:
            exec(code, namespace)
        except Exception as error:
            if block.result is None or block.result.language != "pytb":
                raise
            return printed.getvalue(), f"{type(error).__name__}: {error}"
    return printed.getvalue(), ""


def run_shell(block: Block, where: str, folder: Path, namespace: dict[str, object]) -> tuple[str, str]:
    """Return what a block wrote to standard output and, if it failed, to standard error."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block.text],
        env={**os.environ, "PATH": path, "MPLBACKEND": "Agg"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    failed = done.returncode not in (0, 141)  # 141: a writer whose reader had enough, `head` for example
    return done.stdout, done.stderr or f"exit status {done.returncode}" if failed else ""


NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def matches(printed: str, expected: Block) -> bool:
    """Compare line by line, without regard to spaces at the ends of lines."""
    seen, wanted = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (printed, expected.text))
    if "numbers differ" in expected.mark:
        squeeze = re.compile(r" +")  # columns are as wide as their numbers
        seen, wanted = (squeeze.sub(" ", NUMBER.sub("#", text)) for text in (seen, wanted))
    pattern = ".*".join(re.escape(part) for part in wanted.split("..."))
    return re.fullmatch(pattern, seen, flags=re.DOTALL) is not None


def sources() -> str:
    """Return the sources in one string, literals that the compiler joins joined and escapes undone."""
    files = [ROOT / "CMakeLists.txt", *(p for folder in ("cpp", "cuda", "python") for p in (ROOT / folder).rglob("*"))]
    kinds = {".cpp", ".hpp", ".cu", ".cuh", ".h", ".py", ".txt"}
    text = "\n".join(p.read_text(encoding="utf-8") for p in files if p.suffix in kinds)
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return text.replace('\\"', '"')


def occurs(message: str, text: str) -> bool:
    """Tell whether the fixed parts of a message, between its dots, follow one another closely in the sources."""
    message = re.sub(r"^(CMake )?\w*(Error|Exception|Interrupt): ", "", message.strip())
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    return re.search(r"[\s\S]{0,300}?".join(parts), text) is not None
