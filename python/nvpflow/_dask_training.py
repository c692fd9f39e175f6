"""Training on workers of Dask: where they meet, and what one of them does."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvpflow import data_io, distributed
from nvpflow.flow import Flow
from nvpflow.history import History

GONE = "another worker of this training run is gone"


class Meeting:
    """Lives on one worker, as an actor: adds up what the others bring, in the order in which it comes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rounds: dict[int, _Round] = {}
        self._over = False

    async def meet(self, number: int, kind: str, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sum or the maximum of what all bring to a round."""
        if number not in self._rounds:
            self._rounds[number] = _Round(self._size)
        of = self._rounds[number]
        of.take(kind, values)
        await of.complete.wait()
        if self._over or of.total is None:
            raise RuntimeError(GONE)
        of.readers -= 1
        if of.readers == 0:
            del self._rounds[number]
        return of.total

    async def end(self) -> None:
        """Let nobody wait for one who does not come."""
        self._over = True
        for of in self._rounds.values():
            of.complete.set()


class _Round:
    def __init__(self, size: int) -> None:
        self.missing = self.readers = size
        self.total: NDArray[np.int64] | None = None
        self.complete = asyncio.Event()

    def take(self, kind: str, values: NDArray[np.int64]) -> None:
        combine = np.add if kind == "sum" else np.maximum
        self.total = values if self.total is None else combine(self.total, values)
        self.missing -= 1
        if self.missing == 0:
            self.complete.set()


class _Seat:
    """A communicator: one worker's seat at a meeting."""

    def __init__(self, meeting: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._meeting, self._number = meeting, 0

    def _meet(self, kind: str, values: NDArray[np.int64]) -> None:
        self._number += 1
        values[:] = self._meeting.meet(self._number, kind, values.copy()).result()

    def sum(self, values: NDArray[np.int64]) -> None:
        self._meet("sum", values)

    def max(self, values: NDArray[np.int64]) -> None:
        self._meet("max", values)


class Table(NamedTuple):
    """Files that are one table, with the rows of each, and which columns of it are the flow's."""

    files: Sequence[tuple[str, int]]
    columns: Sequence[str] | None
    context_columns: Sequence[str] | None
    weight_column: str | None

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(rows for _, rows in self.files)

    def open(self, flow: Flow, file: str) -> Any:
        """Return a context in which a file is a table."""
        spec = flow.spec
        reading = data_io.Reading(columns=self.columns, context=self.context_columns, weight=self.weight_column)
        names, context_names = flow.column_names, flow.context_names
        model = data_io.ModelColumns(spec.input_size, names, spec.context_size, context_names)
        return data_io.open_table(file, reading, model)

    def read(self, flow: Flow, part: slice) -> dict[str, Any]:
        """Return arguments of `Flow.fit`: some of the rows, opening only the files that hold them."""
        count = part.stop - part.start
        # Of one dtype, whatever the dtypes in this worker's files are.
        rows = np.empty((count, flow.spec.input_size), "float64" if flow.spec._takes_float64_rows else flow.spec.dtype)
        context = np.empty((count, flow.spec.context_size), flow.spec.dtype)
        weights = np.empty(count)
        begin = 0
        for file, held in self.files:
            first, last = max(part.start - begin, 0), min(part.stop - begin, held)
            if first < last:
                with self.open(flow, file) as table:
                    content = table.read(rows.dtype.name)
                if len(content.rows) != held:
                    raise ValueError(f"{file} has {len(content.rows)} rows, expected the {held} that it had before")
                to = slice(begin + first - part.start, begin + last - part.start)
                rows[to] = content.rows[first:last]
                if content.context is not None:
                    context[to] = content.context[first:last]
                if content.weights is not None:
                    weights[to] = content.weights[first:last]
            begin += held
        return {
            "x": rows,
            "context": context if flow.spec.context_size else None,
            "sample_weight": weights if self.weight_column else None,
        }


class Trained(NamedTuple):
    """What a worker comes to: the history, and from the first of them the weights."""

    history: History
    parameters: NDArray[Any] | None
    mean_low: NDArray[Any] | None

    def give_to(self, flow: Flow) -> None:
        """Give the flow the weights."""
        assert self.parameters is not None
        flow._set_flat_parameters(self.parameters, self.mean_low)


def train(flow: Flow, meeting: Any, rank: int, size: int, table: Table, options: Mapping[str, Any]) -> Trained:
    """Train on this worker's part of the table: a task."""
    from distributed import get_worker

    flow = copy.deepcopy(flow)  # workers that share a process share what they are given
    seat = _Seat(meeting, rank, size)
    options = {"num_threads": get_worker().state.nthreads} | dict(options)
    with distributed.told_to_others(seat):
        part = distributed.rows_of_process(table.rows, options["shards"], seat)
        given = table.read(flow, part)
    history = flow.fit(**given, communicator=seat, progress=False, **options)
    if rank != 0:
        return Trained(history, None, None)
    return Trained(history, flow.parameters_flat(), flow._mean_low())
