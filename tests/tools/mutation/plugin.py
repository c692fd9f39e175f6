"""pytest's side of tests/tools/mutate.py: which mutants each test comes past, and how long it takes."""

import json
import mmap
import os
from pathlib import Path

import pytest

NOTES: dict[str, dict[str, object]] = {}
AT_IMPORT: set[int] = set()  # what a program comes past once, when it begins, every test depends on


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    AT_IMPORT.update(
        number for number, byte in enumerate(Path(os.environ["NVPFLOW_MUTANTS_REACHED"]).read_bytes()) if byte
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    path = Path(os.environ["NVPFLOW_MUTANTS_REACHED"])
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as notes:
        notes[:] = bytes(len(notes))
        result = yield
        reached = sorted(AT_IMPORT.union(number for number, byte in enumerate(notes[:]) if byte))
    NOTES[item.nodeid] = {"reached": reached, "seconds": 0.0, **NOTES.get(item.nodeid, {})}
    return result


def pytest_runtest_logreport(report):
    note = NOTES.setdefault(report.nodeid, {})
    note["seconds"] = note.get("seconds", 0.0) + report.duration
    if report.failed:
        note["failed"] = True


def pytest_sessionfinish():
    Path(os.environ["NVPFLOW_MUTATION_NOTES"]).write_text(json.dumps(NOTES))
