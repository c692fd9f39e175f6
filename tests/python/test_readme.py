"""The README's Python runs as it stands, and says the truth about names and options."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["samples"].shape == (1000, 2)
    assert abs(namespace["x_again"] - namespace["x"]).max() < 1e-5
    assert namespace["out"][0] == namespace["log_p"][0]
    assert "best" in capsys.readouterr().out


def test_two_commands_stand_at_the_top():
    first = blocks("sh")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == [
        'pip install ".[cli]" && nvpflow demo',
        'pip install ".[test]" && pytest',
    ]


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("command", ["fit", "score", "sample", "check", "info", "report", "demo"])
def test_documented_commands_exist(command):
    done = subprocess.run(
        [sys.executable, "-m", "nvpflow", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"nvpflow {command}" in README.read_text(encoding="utf-8")
