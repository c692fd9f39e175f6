"""Training by several processes: what they are called by, and which rows are whose.

``Flow.fit(x, shards=V, communicator=c)`` trains on the rows of all processes of `c`. The same shards give the same
weights, bit for bit, for any number of processes and any engine between them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks, _core

__all__ = ["SHARDS", "Communicator", "communicator", "rows_of_process", "told_to_others"]

SHARDS = 64
"""Shards of `Flow.fit` where there is a communicator and nothing is said."""


@runtime_checkable
class Communicator(Protocol):
    """The processes of one training run, as one of them sees them.

    All make the same calls, in the same order, on arrays of the same length. Only integers travel, whose sums are
    exact: in which order an engine adds does not show. An exception ends `Flow.fit` in this process alone, so an engine
    whose peer is gone should raise in all others rather than wait.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def sum(self, values: NDArray[np.int64]) -> object:
        """Make each value the sum of those of all processes, in place."""

    def max(self, values: NDArray[np.int64]) -> object:
        """Make each value the largest of those of all processes, in place."""


class _Mpi:
    """A communicator of mpi4py."""

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm, self._mpi = comm, MPI

    def sum(self, values: NDArray[np.int64]) -> None:
        self._comm.Allreduce(self._mpi.IN_PLACE, values, op=self._mpi.SUM)

    def max(self, values: NDArray[np.int64]) -> None:
        self._comm.Allreduce(self._mpi.IN_PLACE, values, op=self._mpi.MAX)


class _Torch:
    """A process group of PyTorch."""

    def __init__(self, group: Any) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._torch, self._dist = group, torch, dist
        # NCCL moves what is on a GPU.
        self._device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"

    def _reduce(self, values: NDArray[np.int64], op: Any) -> None:
        tensor = self._torch.from_numpy(values).to(self._device)
        self._dist.all_reduce(tensor, op=op, group=self._group)
        if self._device != "cpu":
            values[:] = tensor.cpu().numpy()

    def sum(self, values: NDArray[np.int64]) -> None:
        self._reduce(values, self._dist.ReduceOp.SUM)

    def max(self, values: NDArray[np.int64]) -> None:
        self._reduce(values, self._dist.ReduceOp.MAX)


class Patient:
    """A communicator whose operations Ctrl-C does not end, but `look` behind them: else the others would wait."""

    def __init__(self, of: Communicator) -> None:
        self.rank, self.size, self.sum, self.max = of.rank, of.size, of.sum, of.max
        self._before: Any = None
        self._caught: Any = None

    def __enter__(self) -> Patient:
        """Keep signals from here on; only the main thread gets any."""
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._keep)
        return self

    def _keep(self, number: int, frame: Any) -> None:
        self._caught = number, frame

    def look(self) -> None:
        """Do what a signal that was kept is to do."""
        caught, self._caught = self._caught, None
        if caught is not None:
            self._before(*caught)

    def __exit__(self, *error: object) -> None:
        """Let signals through again."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if error[0] is None:
            self.look()


def communicator(given: object) -> Communicator:
    """Return a communicator of what an engine calls its own.

    Parameters
    ----------
    given
        A communicator of mpi4py (``MPI.COMM_WORLD``), a process group of PyTorch (``torch.distributed.group.WORLD``,
        after ``init_process_group("gloo")`` or ``"nccl"``), or an object that is a `Communicator` already.

    Raises
    ------
    TypeError
        For anything else.
    """
    if "mpi4py.MPI" in sys.modules and isinstance(given, sys.modules["mpi4py.MPI"].Comm):
        return _Mpi(given)
    if "torch" in sys.modules and _is_group(given):
        return _Torch(given)
    if isinstance(given, Communicator):
        rank, size = _checks.integer("communicator.rank", given.rank), _checks.integer("communicator.size", given.size)
        if 0 <= rank < size:
            return given
        raise ValueError(f"communicator has rank {rank} and size {size}, expected a rank from 0 below the size")
    raise TypeError(
        f"communicator is {_checks.describe(given)}, expected a communicator of mpi4py, a process group of PyTorch, or "
        "an object with rank, size, sum and max (nvpflow.distributed.Communicator)"
    )


def _is_group(given: object) -> bool:
    dist = sys.modules["torch"].distributed
    return dist.is_available() and isinstance(given, dist.ProcessGroup)


@contextmanager
def told_to_others(communicator: Communicator | None) -> Iterator[None]:
    """Tell the other processes, which wait for this one in `Flow.fit`, why it does not get there.

    An exception inside of the context ends their `fit` with its text, and goes on here. None: there are no others.
    """
    try:
        yield
    except BaseException as error:
        if communicator is not None:
            _core._fail_together(communicator, _told(error))
        raise


def _told(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # of an error that cannot say what it is
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()


def rows_of_process(rows: int, shards: int, communicator: object) -> slice:
    """Return which of all rows are those of this process, so that each reads its own part.

    Parameters
    ----------
    rows
        All rows, of training or of validation.
    shards
        As of `Flow.fit`: the rows are cut into so many consecutive parts, and each process has several of them.
    communicator
        As of `Flow.fit`.

    Raises
    ------
    ValueError
        Where there are fewer shards than processes.
    """
    of = _communicator(communicator)
    begin, end = _core._rows_of_process(
        _checks.integer("rows", rows), _checks.integer("shards", shards), of.rank, of.size
    )
    return slice(begin, end)


_communicator = communicator  # an argument has that name
