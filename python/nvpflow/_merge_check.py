"""Whether files that jobs wrote together are all there and fit together, by what they say of themselves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nvpflow import _checks, _parts
from nvpflow._text import counted

_OF_A_FILE = frozenset(("bytes", "time", "start", "rows"))  # may differ among files
_CALLED = {"what": "contents", "model": "model", "on": "instruction set", "version": "version of nvpflow"}
_NAMED = 5


@dataclass(frozen=True)
class FilesCheck:
    """What `check_files` found. Prints as a few lines.

    Attributes
    ----------
    folder
        As given.
    what
        "scores" or "sample"; "" where there is no file.
    files, rows
        How many there are that nvpflow wrote.
    model
        The fingerprint of the model that made most of them.
    computed_on, version
        The instruction set, or "cuda", and the version of nvpflow of most of them.
    unfinished
        Hidden files that killed jobs left behind, or that jobs are writing now.
    problems
        Why the files are not a whole, in sentences; empty where they are.
    """

    folder: str
    what: str
    files: int
    rows: int
    model: str
    computed_on: str
    version: str
    unfinished: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all files are there, of one model, one instruction set and the same options."""
        return not self.problems

    def __str__(self) -> str:
        """Return a few lines: what there is, and what is wrong with it."""
        kind = {"scores": " of scores", "sample": " of a sample"}.get(self.what, "")
        verdict = "complete" if self.ok else "not complete"
        lines = [f"{self.folder}: {verdict}, {counted(self.files, 'file')}{kind}, {counted(self.rows, 'row')}"]
        if self.files:
            lines.append(f"  model {self.model[:16]}, computed on {self.computed_on} by nvpflow {self.version}")
        lines += [f"  {problem}" for problem in self.problems]
        if self.unfinished:
            lines.append(f"  {counted(self.unfinished, 'file')} .nvpflow-*.tmp: unfinished; delete when no job runs")
        return "\n".join(lines)


class _File(NamedTuple):
    name: str
    found: _parts.Found


def check_files(folder: str | os.PathLike[str], *, files: int | None = None, rows: int | None = None) -> FilesCheck:
    """Check that the files of a folder are all there and fit together, from their Parquet metadata alone.

    Parameters
    ----------
    folder
        Where ``nvpflow score -o``, ``nvpflow sample --rows-per-file`` or `nvpflow.dask.score` has written.
    files
        How many there should be. None: what the files say; those of a bare `score_file` do not say it.
    rows
        How many there should be in all. None: any number, but a sample must have no gap.

    Raises
    ------
    NotADirectoryError, FileNotFoundError
        There is no such folder.
    ImportError
        pyarrow is not installed.
    """
    folder = _checks.path("folder", folder)
    files = None if files is None else _checks.count("files", files)
    rows = None if rows is None else _checks.count("rows", rows)
    names = sorted(os.listdir(folder))
    tables = [name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    read = [_File(name, _parts.read(os.path.join(folder, name))) for name in tables]
    ours = [file for file in read if not file.found.problem]
    problems = [] if tables else ["there is no .parquet file"]
    problems += _strangers([file for file in read if file.found.problem])
    most, different = _options(ours)
    problems += different
    total = sum(file.found.rows for file in ours)
    if most.get("what") == "sample" and not different:
        problems += _gaps(ours)
    if tables:
        problems += _completeness(ours, tables, files)
    if rows is not None and total != rows:
        problems.append(f"they have {counted(total, 'row')}, expected {rows:,}")
    unfinished = sum(name.startswith(".nvpflow-") and name.endswith(".tmp") for name in names)
    return FilesCheck(
        folder=folder,
        what=str(most.get("what", "")),
        files=len(ours),
        rows=total,
        model=str(most.get("model", "")),
        computed_on=str(most.get("on", "")),
        version=str(most.get("version", "")),
        unfinished=unfinished,
        problems=tuple(problems),
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _strangers(files: Sequence[_File]) -> Iterator[str]:
    by_problem: dict[str, list[str]] = {}
    for name, found in files:
        by_problem.setdefault(found.problem, []).append(name)
    for problem, names in by_problem.items():
        yield f"{problem}: {_listed(names)}"


def _options(files: Sequence[_File]) -> tuple[Mapping[str, Any], list[str]]:
    """Return what most files are made of, and what to say of those that are made otherwise."""
    most: dict[str, Any] = {}
    problems = []
    for key in dict.fromkeys(key for file in files for key in file.found.made if key not in _OF_A_FILE):
        values = [repr(file.found.made.get(key)) for file in files]
        common = Counter(values).most_common(1)[0][0]
        others = [file.name for file, value in zip(files, values, strict=True) if value != common]
        most[key] = next(file.found.made.get(key) for file, v in zip(files, values, strict=True) if v == common)
        if others:
            called = _CALLED.get(key, f"option {key}")
            problems.append(f"another {called} than the other files have: {_listed(others)}")
    return most, problems


def _gaps(files: Sequence[_File]) -> Iterator[str]:
    """Yield where a sample is no run of rows."""
    end = None
    for name, found in sorted(files, key=lambda file: file.found.made.get("start", 0)):
        start, count = found.made.get("start", 0), found.made.get("rows")
        if found.rows != count:
            yield f"{name} has {counted(found.rows, 'row')}, expected {count:,}"
        if end is not None and start != end:
            between = f"rows {end:,} to {start - 1:,} are missing before {name}"
            yield between if start > end else f"{name} begins at row {start:,}, expected {end:,}"
        end = start + found.rows


def _completeness(files: Sequence[_File], names: Sequence[str], expected: int | None) -> Iterator[str]:
    """Yield what to say where the files are not those of one of their jobs."""
    jobs = [file.found.job for file in files if file.found.job is not None]
    if expected is not None:
        if len(names) != expected:
            yield f"there are {counted(len(names), 'file')}, expected {expected:,}{_missing(files)}"
        return
    if not jobs:
        yield "no file says how many there should be; say it: files=N"
        return
    digest = _parts.names_digest(names)
    if any(job.names == digest and job.files == len(names) for job in jobs):
        return
    most = max(job.files for job in jobs)
    if len(names) < most:
        yield f"{len(names)} of {counted(most, 'file')} are there{_missing(files)}; the same command writes the others"
    else:
        yield f"no job was to write just these {counted(len(names), 'file')}; say how many there should be: files=N"


def _missing(files: Sequence[_File]) -> str:
    """Return behind which files some are missing, where all are of one job."""
    numbers = {file.found.job.number: file.name for file in files if file.found.job is not None}
    if len(numbers) != len(files) or len({file.found.job and file.found.job.names for file in files}) != 1:
        return ""
    job = files[0].found.job
    lost = [k for k in range(job.files if job else 0) if k not in numbers]
    before = [f"behind {numbers[k - 1]}" if k else "the first" for k in lost if k == 0 or k - 1 in numbers]
    return f", missing: {_listed(before)}" if before else ""
