"""Scores of many files on a cluster of Dask."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvpflow import _checks, _parts, tables
from nvpflow._core import cpu_isa
from nvpflow._text import counted
from nvpflow.flow import Flow

__all__ = ["Report", "score"]

_REMEDY = "make one: dask.distributed.Client(), with the address of a scheduler or without"


@dataclass(frozen=True, repr=False)
class Report:
    """What `score` did. Prints as a line.

    Attributes
    ----------
    files
        A `nvpflow.tables.Done` for each source: the target, its rows, and whether it was there already. They are in the
        order of their names.
    seconds
        From the first task to the last result.
    rows_of_workers
        How many rows each worker scored, by its address. Those that were there already count for none.
    cpu_isa
        The instruction set of the workers.
    """

    files: tuple[tables.Done, ...]
    seconds: float
    rows_of_workers: Mapping[str, int]
    cpu_isa: str

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)

    @property
    def skipped(self) -> int:
        """How many files were there already."""
        return sum(file.skipped for file in self.files)

    def __repr__(self) -> str:
        """Return a line: files, rows, time and workers."""
        workers = counted(len(self.rows_of_workers), "worker")
        done = f"{counted(len(self.files), 'file')}, {self.skipped} of them done before, {counted(self.rows, 'row')}"
        return f"Report: {done}; {self.seconds:.1f} s on {workers} with {self.cpu_isa}"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as lists and numbers of Python."""
        return {**asdict(self), "files": [file._asdict() for file in self.files]}


def score(
    flow: Flow,
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    client: Any = None,
    columns: Sequence[str] | None = None,
    context_columns: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    name: str = "log_p",
    num_threads: int = 1,
    retries: int = 3,
    force: bool = False,
) -> Report:
    """Score Parquet files into a folder on a cluster of Dask: `nvpflow.tables.score_file` as a task a file.

    Files that are done are left alone, so that a job that lost its cluster can be started again. Where a worker is
    lost, others do its files. Whatever happens, the files are those that one process writes.

    Parameters
    ----------
    flow
        What scores the rows.
    sources
        Parquet files that all workers see, of different names.
    target
        A folder that all workers see; it is made where it is missing. Each file is called as its source.
    client
        A ``dask.distributed.Client``. None: the one that there is.
    columns, context_columns, keep, name, num_threads
        As of `nvpflow.tables.Scorer`.
    retries
        How often a file that fails is tried again.
    force
        Score again in any case, and overwrite files that something else made.

    Returns
    -------
    Report
        What became of each file.

    Raises
    ------
    ImportError
        dask.distributed is not installed.
    ValueError, TypeError
        An argument is wrong, two sources have one name, or there is no client.
    RuntimeError
        Files could not be scored, as the message says of the first; all others are done. Or the workers' instruction
        sets differ, and with them bits of the scores.
    """
    client = _client(client)
    scorer = tables.Scorer(
        flow, columns, context_columns=context_columns, keep=keep, name=name, num_threads=num_threads
    )
    retries = _checks.integer("retries", retries, bits=31, unsigned=True)
    force = _checks.boolean("force", force)
    if isinstance(sources, (str, os.PathLike)):
        raise TypeError(f"sources is {_checks.describe(sources)}, expected a sequence of paths")
    paths = [_checks.path(f"sources[{i}]", source) for i, source in enumerate(sources)]
    planned = _parts.planned(paths, _checks.path("target", target))
    if not planned:
        raise ValueError("sources is empty, expected one Parquet file at least")
    return _scored(client, scorer, planned, retries, force)


def _client(given: Any) -> Any:
    try:
        from distributed import Client, get_client
    except ImportError as error:
        raise ImportError("nvpflow.dask needs dask.distributed: pip install distributed") from error
    if given is None:
        try:
            return get_client()
        except ValueError:
            raise ValueError(f"client is None, and there is no client of dask.distributed; {_REMEDY}") from None
    if not isinstance(given, Client):
        raise TypeError(f"client is {_checks.describe(given)}, expected a dask.distributed.Client; {_REMEDY}")
    return given


def _scored(client: Any, scorer: tables.Scorer, planned: Sequence[_parts.Planned], retries: int, force: bool) -> Report:
    import distributed

    wait: Any = distributed.wait
    started = time.monotonic()
    # The result of a task, which is done again where its worker is lost. What `scatter` puts there is lost with it.
    model = client.submit(_handed_on, scorer, pure=False, retries=retries)
    tasks = client.map(_score, planned, model=model, force=force, retries=retries, pure=False, batch_size=1000)
    try:
        with client.as_current():  # wait asks for it
            wait(tasks)
        lost = [task.exception() if task.status == "error" else None for task in tasks]
        # All at once: a call for each costs a fifth of what Dask costs.
        results = iter(client.gather([task for task, error in zip(tasks, lost, strict=True) if error is None]))
        found = [error or next(results) for error in lost]
    finally:
        client.cancel([model, *tasks])  # what Ctrl-C leaves undone
    failed = [i for i, result in enumerate(found) if isinstance(result, BaseException)]
    if failed:
        count, first, error = counted(len(tasks), "file"), planned[failed[0]].source, found[failed[0]]
        raise RuntimeError(
            f"{len(failed)} of {count} could not be scored, the others are done; {first}: {error}"
        ) from error
    return _report(found, time.monotonic() - started)


def _report(found: Sequence[tuple[tables.Done, str, str]], seconds: float) -> Report:
    kinds = sorted({isa for _, _, isa in found})
    if len(kinds) > 1:
        raise RuntimeError(
            f"workers have different instruction sets, {', '.join(kinds)}, and so have the files: their scores differ "
            f"in last bits; set NVPFLOW_ISA={kinds[0]} for all workers and score with force=True"
        )
    rows: dict[str, int] = {}
    for done, address, _ in found:
        if not done.skipped:
            rows[address] = rows.get(address, 0) + done.rows
    return Report(tuple(done for done, _, _ in found), seconds, rows, "".join(kinds))


def _handed_on(scorer: tables.Scorer) -> tables.Scorer:
    return scorer


def _score(planned: _parts.Planned, model: tables.Scorer, force: bool) -> Any:
    """Score a file: what a worker does. An error that another try would meet again is a result, and not tried again."""
    from distributed import get_worker

    try:
        os.makedirs(os.path.dirname(planned.target) or ".", exist_ok=True)
        done = tables._score_file(model, planned.source, planned.target, planned.job, force=force)
    except (ValueError, TypeError, FileExistsError, FileNotFoundError) as error:
        return error
    return done, get_worker().address, cpu_isa()
