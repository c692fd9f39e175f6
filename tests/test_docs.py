"""Every code block of python/docs runs as it stands, page by page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PAGES = sorted((Path(__file__).parent.parent / "python" / "docs").glob("*.md"))
# What a page's code imports beside NumPy.
NEEDS = {"scikit_learn": ("sklearn", "pandas"), "plots": ("matplotlib",)}


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"```(python|sh)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    for module in NEEDS.get(page.stem, ()):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    rows = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    np.save("train.npy", rows[:500])
    np.save("test.npy", rows[500:])
    commands = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    namespace: dict[str, object] = {}
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, str(page), "exec"), namespace)
        else:
            subprocess.run(["bash", "-e", "-c", block], check=True, env=commands, capture_output=True, timeout=120)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_there_are_pages():
    assert {page.stem for page in PAGES} >= {"plots", "scikit_learn"}
    assert all(blocks(page) for page in PAGES)
