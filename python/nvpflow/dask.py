"""Scores of many files, and training on them, on a cluster of Dask."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvpflow import _checks, _dask_training, _parts, distributed, tables
from nvpflow._core import cpu_isa
from nvpflow._text import counted
from nvpflow.flow import Flow
from nvpflow.history import History

__all__ = ["Report", "fit", "score"]

_WAIT_SECONDS = 120  # for a worker in place of the last one that was lost
_LOOK_SECONDS = 0.05  # between two looks at whether all workers are there
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


def fit(
    flow: Flow,
    sources: Sequence[str | os.PathLike[str]],
    *,
    client: Any = None,
    columns: Sequence[str] | None = None,
    context_columns: Sequence[str] | None = None,
    weight_column: str | None = None,
    shards: int = distributed.SHARDS,
    restarts: int = 3,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> History:
    """Train on Parquet files on a cluster of Dask: `Flow.fit` of several processes, one on each worker.

    The weights and the history have the same bits for any number of workers. They are those of
    ``flow.fit(x, shards=...)`` on all rows in one process, given as float64 where the flow takes such. Where a worker
    is lost, the others start again, from the checkpoint where there is one, and end with the same bits.

    Parameters
    ----------
    flow
        What is trained.
    sources
        Parquet files that all workers see, which are one table, in this order. A worker reads those that hold its rows.
    client
        A ``dask.distributed.Client``. None: the one that there is.
    columns, context_columns
        The flow's columns, by name, and those of its context. None: as the flow knows them, or all others.
    weight_column
        The column that says what each row counts for.
    shards
        As of `Flow.fit`; no more workers take part.
    restarts
        How often training starts again where workers are lost.
    checkpoint
        As of `Flow.fit`: a path that all workers see.
    options
        Other arguments of `Flow.fit`. `validation` is a share or None. `num_threads` is the worker's number of threads
        where it is not given. There is no `callback`, `progress`, `adam` or `communicator`.

    Returns
    -------
    History
        As of `Flow.fit`.

    Raises
    ------
    ImportError
        dask.distributed or pyarrow is not installed.
    ValueError, TypeError
        An argument is wrong, or what `Flow.fit` says of the rows.
    RuntimeError
        Workers were lost more often than `restarts`.
    """
    client = _client(client)
    if not isinstance(flow, Flow):
        raise TypeError(f"flow is {_checks.describe(flow)}, expected nvpflow.Flow")
    for name in ("callback", "progress", "adam", "communicator", "x", "context", "sample_weight"):
        if name in options:
            came = _checks.describe(options[name])
            raise TypeError(f"{name} is {came}, expected none: nvpflow.dask.fit has no argument of that name")
    if isinstance(sources, (str, os.PathLike)) or len(sources) == 0:
        raise TypeError(f"sources is {_checks.describe(sources)}, expected a sequence of one path at least")
    restarts = _checks.integer("restarts", restarts, bits=31, unsigned=True)
    options["shards"] = _checks.integer("shards", shards, bits=21, unsigned=True)
    if checkpoint is not None:
        options["checkpoint"] = os.path.abspath(_checks.path("checkpoint", checkpoint))
    paths = [os.path.abspath(_checks.path(f"sources[{i}]", source)) for i, source in enumerate(sources)]
    columns = columns if columns is None else _checks.column_names("columns", columns)
    if context_columns is not None:
        context_columns = _checks.column_names("context_columns", context_columns)
    table = _dask_training.Table([(path, _rows_of(path)) for path in paths], columns, context_columns, weight_column)
    with table.open(flow, paths[0]) as first:
        names, context_names = first.names, first.context_names
    if flow.column_names is None and columns is None:
        table = table._replace(columns=names)  # by name in all files, whatever their order
    if flow.spec.context_size and flow.context_names is None and context_columns is None:
        table = table._replace(context_columns=context_names)
    for attempt in range(restarts + 1):
        if attempt > 0:
            client.wait_for_workers(1, timeout=_WAIT_SECONDS)
        found = _trained(client, flow, table, options)
        if found is not None:
            found.give_to(flow)
            if flow.column_names is None and names is not None:
                flow._set_column_names(list(names))
            if flow.spec.context_size and flow.context_names is None and context_names is not None:
                flow._set_context_names(list(context_names))
            flow._set_threshold(None, None)
            return found.history
    raise RuntimeError(f"workers were lost {counted(restarts + 1, 'time')} in training; restarts allows for more")


def _rows_of(path: str) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def _trained(
    client: Any, flow: Flow, table: _dask_training.Table, options: Mapping[str, Any]
) -> _dask_training.Trained | None:
    """Return what the first worker comes to, or None where a worker is lost."""
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])[: max(1, options["shards"])]
    if not workers:
        raise ValueError("client has no workers, expected one at least")
    seats = len(workers)
    # An actor lives as long as somebody holds its future.
    held = client.submit(_dask_training.Meeting, seats, actor=True, workers=[workers[-1]], pure=False)
    meeting = held.result()
    train: Any = _dask_training.train
    tasks = [
        client.submit(train, flow, meeting, rank, seats, table, options, workers=[worker], pure=False, retries=0)
        for rank, worker in enumerate(workers)
    ]
    try:
        while not all(task.done() for task in tasks):
            time.sleep(_LOOK_SECONDS)
            if not set(workers) <= set(client.scheduler_info(n_workers=-1)["workers"]):
                return None
        return _first_of(tasks)
    finally:
        _end(meeting)
        client.cancel(tasks)


def _first_of(tasks: Sequence[Any]) -> _dask_training.Trained | None:
    errors = [task.exception() for task in tasks if task.status == "error"]
    lost = [error for error in errors if type(error).__name__ == "KilledWorker" or str(error) == _dask_training.GONE]
    if lost or any(task.status not in ("finished", "error") for task in tasks):
        return None
    if errors:  # that of the worker that met it, not what it told the others
        raise next((error for error in errors if not str(error).startswith("process ")), errors[0])
    found: _dask_training.Trained = tasks[0].result()
    return found


def _end(meeting: Any) -> None:
    """Let nobody wait at a meeting, unless its own worker is lost."""
    try:
        meeting.end().result(timeout=5)
    except Exception:
        return
