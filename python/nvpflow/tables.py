"""Scores of tables for the engines that move them: Dask, Ray, Spark, Polars, DuckDB, or a loop over files."""

from __future__ import annotations

import copyreg
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nvpflow import _arrow_rows, _checks, _frames, _output, _parts, data_io
from nvpflow._arrow_rows import ArrowRows, arrow_array
from nvpflow._merge_check import FilesCheck, check_files
from nvpflow._source import rows_per_block
from nvpflow._text import counted
from nvpflow.flow import Flow

__all__ = ["Done", "FilesCheck", "Scorer", "check_files", "sample_file", "score_file"]

Array = NDArray[Any]

_flows: dict[tuple[str, str], Flow] = {}  # of this process, by fingerprint and device
_MOST_FLOWS = 8  # that a process keeps
_FILE_ROWS = 1 << 17  # of a file at once, at most: rows of a row group of Parquet


class Scorer:
    """A function from tables to log p that every engine can send to its workers.

    Called with a table it returns a table of the same kind: the columns of `keep`, and log p. Kinds are frames of
    pandas and Polars, tables and record batches of Arrow, and dicts of columns. Rows keep their order, and pandas'
    index. The bits are those of `Flow.log_probability`, whatever the batches are.

    A pickle holds the flow's weights, out of band where protocol 5 is asked for that, as Dask and Ray do. A process
    makes one flow of them, however many pickles of it arrive.

    Parameters
    ----------
    flow
        What scores the rows.
    columns
        Names of the columns that the flow reads, in its order. None: `Flow.column_names`.
    context_columns
        The same of its context. None: the names that `fit` saw.
    keep
        Columns of the table that the result has, too, such as an identifier.
    name
        Of the column of log p, in nats.
    num_threads
        That a call may use, as `Flow.num_threads`. 1, because engines run a worker a core.

    Raises
    ------
    TypeError
        An argument is of the wrong type. When called: the table is of no known kind, or columns are not numbers.
    ValueError
        Names are unknown, repeated, or as many as the flow does not read. When called: the table lacks columns.

    Examples
    --------
    >>> import numpy as np, nvpflow
    >>> flow = nvpflow.build(2)
    >>> scorer = nvpflow.tables.Scorer(flow, ["a", "b"], keep=["id"])
    >>> table = {"id": np.arange(3), "a": np.zeros(3), "b": np.ones(3)}
    >>> list(scorer(table))
    ['id', 'log_p']
    """

    def __init__(
        self,
        flow: Flow,
        columns: Sequence[str] | None = None,
        *,
        context_columns: Sequence[str] | None = None,
        keep: Sequence[str] = (),
        name: str = "log_p",
        num_threads: int = 1,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow is {_checks.describe(flow)}, expected a nvpflow.Flow")
        spec = flow.spec
        self.columns = _named("columns", columns, flow.column_names, spec.input_size)
        self.context_columns = _named("context_columns", context_columns, flow._context_names(), spec.context_size)
        self.keep = tuple(_checks.column_names("keep", keep))
        for argument in ("columns", "context_columns", "keep"):
            if twice := _checks.repeated(getattr(self, argument)):
                raise ValueError(f"{argument}: {twice}, expected each once")
        self.name = _checks.text("name", name)
        if self.name in self.keep:
            raise ValueError(f"name is {name!r}, a column of keep; expected another name for log p")
        self.num_threads = _checks.integer("num_threads", num_threads, bits=31, unsigned=True)
        weights: list[pickle.PickleBuffer] = []
        self._pickled = pickle.dumps(flow, protocol=5, buffer_callback=weights.append)
        self._weights: Sequence[Any] = weights  # in the order in which the pickle asks for them
        self._device = flow.device
        self.fingerprint = _parts.fingerprint(flow)

    @property
    def flow(self) -> Flow:
        """The flow of this process."""
        key = self.fingerprint, self._device
        found = _flows.get(key)
        if found is None:
            found = pickle.loads(self._pickled, buffers=self._weights)
            while len(_flows) >= _MOST_FLOWS:
                _flows.pop(next(iter(_flows)), None)
            _flows[key] = found
        found.num_threads = self.num_threads
        return found

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle with the weights as they are: out of band, without a copy, for who asks for that (protocol 5)."""
        form = pickle.PickleBuffer if int(protocol) >= 5 else bytes
        return copyreg.__newobj__, (type(self),), {**vars(self), "_weights": [form(part) for part in self._weights]}  # type: ignore[attr-defined]

    def _made(self, source: str) -> dict[str, Any]:
        """Return what tells the scores of a file from others."""
        names = {"columns": self.columns, "context_columns": self.context_columns, "keep": self.keep, "name": self.name}
        return _parts.made_by(self.flow, self.fingerprint, "scores", **_parts.made_of(source), **names)

    def __repr__(self) -> str:
        kept = f", keep={list(self.keep)!r}" if self.keep else ""
        return f"Scorer({self.flow!r}, {list(self.columns)!r}{kept}, name={self.name!r})"

    def __call__(self, table: Any) -> Any:
        """Return log p of a table's rows, as a table of the same kind with the columns of `keep`."""
        kind = _kind_of(table)
        known = kind.names(table)
        missing = [name for name in (*self.columns, *self.context_columns, *self.keep) if name not in known]
        if missing:
            raise ValueError(
                f"table has no column {_listed(missing)}, expected {_listed(self.columns)} and those of keep; it has "
                f"{_listed(known)}"
            )
        return kind.result(table, self.keep, self.name, self._log_p(kind, table))

    def _log_p(self, kind: type[_Kind], table: Any) -> Array:
        rows = kind.rows(table, self.columns)
        return log_p_of(self.flow, rows, kind.rows(table, self.context_columns) if self.context_columns else None)

    def batches(self, tables: Iterable[Any]) -> Iterator[Any]:
        """Yield the result for each of several tables, as Spark's mapInArrow and mapInPandas want it."""
        return map(self, tables)

    def arrow_columns(self, *columns: Any) -> Any:
        """Return log p as an Arrow array: what DuckDB wants of a function with ``type="arrow"``.

        Parameters
        ----------
        columns
            Arrow arrays, one for each column of the flow and then one for each of its context.
        """
        import pyarrow as pa

        wanted = [*self.columns, *self.context_columns]
        if len(columns) != len(wanted):
            raise ValueError(f"columns are {len(columns)}, expected {len(wanted)}: {_listed(wanted)}")
        return arrow_array(self._log_p(_ArrowTable, pa.table(list(columns), names=wanted)))


class Done(NamedTuple):
    """What became of a file: its path, how many rows it has, and whether it was there already."""

    target: str
    rows: int
    skipped: bool


def score_file(
    scorer: Scorer, source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False
) -> Done:
    """Score a Parquet file into a Parquet file: one task of an engine, or of a loop, that can be started again.

    The target appears when it is whole, and holds the columns of `keep` and log p. Its metadata says what made it: the
    scorer, the instruction set, and the source's size and time. Where all of that is so again, nothing is done. Memory
    does not grow with the file.

    Parameters
    ----------
    scorer
        Of the rows.
    source
        A Parquet file.
    target
        The file to write. Its folder must exist.
    force
        Score again in any case, and overwrite a file that something else made.

    Raises
    ------
    FileExistsError
        The target is there, and something else made it; the message says what differs.
    ImportError
        pyarrow is not installed.
    ValueError, TypeError
        The source lacks columns, or they are not numbers.
    """
    source, target = _checks.path("source", source), _checks.path("target", target)
    _parts.check_apart(source, target)
    return _score_file(scorer, source, target, None, force=force)


def _score_file(scorer: Scorer, source: str, target: str, job: _parts.Job | None, *, force: bool) -> Done:
    def write(metadata: Mapping[bytes, bytes]) -> int:
        return _write_scores(scorer, source, target, metadata, force=force)

    return Done(target, *_parts.write_once(target, scorer._made(source), job, write, force=force))


def _write_scores(scorer: Scorer, source: str, target: str, metadata: Mapping[bytes, bytes], *, force: bool) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nvpflow._arrow import parquet_writer

    wanted = [*scorer.keep, *scorer.columns, *scorer.context_columns]
    with (
        pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file,
        _output.replacing(target, force=force) as out,
    ):
        nothing = pa.RecordBatchReader.from_batches(file.schema_arrow, [])  # empty_table() would import pandas
        schema = scorer(nothing.read_all()).schema.with_metadata(metadata)
        with parquet_writer(out, schema) as writer:
            for batch in file.iter_batches(batch_size=_rows_at_once(len(wanted)), columns=wanted):
                writer.write_batch(scorer(batch))
        rows: int = file.metadata.num_rows
        return rows


def sample_file(
    flow: Flow,
    target: str | os.PathLike[str],
    *,
    rows: int,
    start: int = 0,
    seed: int = 0,
    context: ArrayLike | None = None,
    temperature: float | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
) -> Done:
    """Draw rows into a Parquet file: one task of an engine, or of a loop, that can be started again.

    The rows are ``flow.sample(rows, seed=seed, start=start)``: files of consecutive rows are one sample. The target
    appears when it is whole, and says in its metadata what made it. Where all of that is so again, nothing is done.
    Memory does not grow with the file. Columns have the flow's names, or are called column_1, column_2 and so on.

    Parameters
    ----------
    flow
        What is drawn from.
    target
        The file to write. Its folder must exist.
    rows
        How many.
    start, seed, temperature, dtype
        As of `Flow.sample`; the seed is 0 where none is given.
    context
        [C], of a flow with a context: all rows are drawn under it. The file does not hold it.
    force
        Draw again in any case, and overwrite a file that something else made.

    Raises
    ------
    FileExistsError
        The target is there, and something else made it; the message says what differs.
    ImportError
        pyarrow is not installed.
    TypeError, ValueError
        Naming the argument.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow is {_checks.describe(flow)}, expected a nvpflow.Flow")
    target, rows = _checks.path("target", target), _checks.count("rows", rows)
    start, seed = _checks.count("start", start), _checks.integer("seed", seed, unsigned=True)
    given = {"seed": seed, "dtype": dtype, "temperature": temperature, "context": context}
    return _sample_file(flow, _parts.fingerprint(flow), target, range(start, start + rows), given, None, force=force)


def _sample_file(
    flow: Flow,
    model: str,
    target: str,
    rows: range,
    given: Mapping[str, Any],
    job: _parts.Job | None,
    *,
    force: bool,
) -> Done:
    made = _sample_made(flow, model, rows, given)

    def write(metadata: Mapping[bytes, bytes]) -> int:
        return _write_sample(flow, target, rows, given, metadata, force=force)

    return Done(target, *_parts.write_once(target, made, job, write, force=force))


def _sample_made(flow: Flow, model: str, rows: range, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a file of rows from others; `given` are arguments of `Flow.sample`, which are checked."""
    last = flow.sample(min(len(rows), 1), start=max(rows.stop - 1, 0) if rows else rows.start, **given)
    if last.ndim != 2:
        raise ValueError(
            f"context has shape {np.shape(given['context'])}, expected ({flow.context_size},): one context"
        )
    under = given["context"]
    return _parts.made_by(
        flow,
        model,
        "sample",
        seed=given["seed"],
        start=rows.start,
        rows=len(rows),
        dtype=last.dtype.name,
        temperature=given["temperature"],
        context=None if under is None else np.asarray(under, np.float64).tolist(),
        columns=flow.column_names,
    )


def _write_sample(
    flow: Flow, target: str, rows: range, given: Mapping[str, Any], metadata: Mapping[bytes, bytes], *, force: bool
) -> int:
    import pyarrow as pa

    from nvpflow._arrow import parquet_writer

    names = list(flow.column_names or (f"column_{i + 1}" for i in range(flow.spec.input_size)))
    step = _rows_at_once(len(names))
    kind = pa.from_numpy_dtype(flow.sample(0, **given).dtype)
    schema = pa.schema([(name, kind) for name in names], metadata=metadata)
    with _output.replacing(target, force=force) as out, parquet_writer(out, schema) as writer:
        for first in range(rows.start, rows.stop, step):
            drawn = flow.sample(min(step, rows.stop - first), start=first, **given)
            writer.write_batch(pa.record_batch([arrow_array(column) for column in drawn.T], schema=schema))
    return len(rows)


def _rows_at_once(columns: int) -> int:
    return min(_FILE_ROWS, 4 * rows_per_block(columns))


def log_p_of(flow: Flow, rows: Array | ArrowRows, context: Array | ArrowRows | None) -> Array:
    """Return log p of rows [N, D] of any real dtype: NaN where a row or its context holds NaN or infinity."""
    dtype = flow.spec.dtype
    given = None if context is None else _converted(context, dtype)
    x = _converted(rows, dtype, wide=flow.spec._takes_float64_rows)
    log_p: Array = flow.log_probability(x, context=given)
    lost = np.isnan(log_p)
    if lost.any():  # of a number beyond the flow's dtype the density is 0, as of all that overflows
        sound = rows.are_finite(x) if isinstance(rows, ArrowRows) else np.isfinite(rows).all(axis=1)
        if given is not None:  # beyond the dtype, it is not known what the density is under it
            sound &= np.isfinite(given).all(axis=1)
        log_p[lost & sound] = -np.inf
    return log_p


def _converted(rows: Array | ArrowRows, dtype: str, *, wide: bool = False) -> Array:
    if isinstance(rows, ArrowRows):
        return rows.converted(dtype, wide=wide)
    return data_io.converted(rows, dtype, wide=wide)


def _named(argument: str, given: Sequence[str] | None, known: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return as many names as the flow reads."""
    if given is None and not known and count:
        raise ValueError(f"{argument} is None, expected {counted(count, 'name')}: the flow knows none")
    found = tuple(known or ()) if given is None else tuple(_checks.column_names(argument, given))
    if len(found) != count:
        raise ValueError(f"{argument} are {counted(len(found), 'name')}, expected {count}: as many as the flow reads")
    return found


def _listed(names: Sequence[str]) -> str:
    return _checks.shortened(", ".join(map(repr, names)))


def _gathered(table: Any) -> Array | ArrowRows:
    """Return the rows of a table of nothing else, without a copy of columns where that can be."""
    rows = _arrow_rows.read(table)
    return np.asarray(_frames.read("table", table, None)[0]) if rows is None else rows


class _Kind:
    """A kind of tables: the names of its columns, rows of some of them, and a table of the same kind."""

    @staticmethod
    def names(table: Any) -> list[str]:
        return [str(name) for name in table.columns]

    @staticmethod
    def rows(table: Any, columns: Sequence[str]) -> Array | ArrowRows:
        return np.asarray(_frames.read("table", table[list(columns)], None)[0])

    @staticmethod
    def result(table: Any, keep: Sequence[str], name: str, log_p: Array) -> Any:
        raise NotImplementedError


class _PandasFrame(_Kind):
    @staticmethod
    def result(table: Any, keep: Sequence[str], name: str, log_p: Array) -> Any:
        return table[list(keep)].assign(**{name: log_p})


class _PolarsFrame(_Kind):
    @staticmethod
    def rows(table: Any, columns: Sequence[str]) -> Array | ArrowRows:
        return _gathered(table[list(columns)])

    @staticmethod
    def result(table: Any, keep: Sequence[str], name: str, log_p: Array) -> Any:
        import polars  # not needed before a frame of it comes

        return polars.DataFrame([*(table.get_column(kept) for kept in keep), polars.Series(name, log_p)])


class _ArrowTable(_Kind):
    @staticmethod
    def names(table: Any) -> list[str]:
        return list(table.schema.names)

    @staticmethod
    def rows(table: Any, columns: Sequence[str]) -> Array | ArrowRows:
        return _gathered(table.select(list(columns)))

    @staticmethod
    def result(table: Any, keep: Sequence[str], name: str, log_p: Array) -> Any:
        import pyarrow as pa

        return pa.table([*(table.column(kept) for kept in keep), arrow_array(log_p)], names=[*keep, name])


class _ArrowBatch(_ArrowTable):
    @staticmethod
    def rows(table: Any, columns: Sequence[str]) -> Array | ArrowRows:
        rows = _arrow_rows.read(table.select(list(columns)))
        if rows is not None:
            return rows
        import pyarrow as pa

        return _ArrowTable.rows(pa.Table.from_batches([table]), columns)

    @staticmethod
    def result(table: Any, keep: Sequence[str], name: str, log_p: Array) -> Any:
        import pyarrow as pa

        return pa.record_batch([*(table.column(kept) for kept in keep), arrow_array(log_p)], names=[*keep, name])


class _Columns(_Kind):
    @staticmethod
    def names(table: Any) -> list[str]:
        return list(table)

    @staticmethod
    def rows(table: Any, columns: Sequence[str]) -> Array:
        parts = [_checks.numbers(f"table[{name!r}]", table[name]) for name in columns]
        for name, part in zip(columns, parts, strict=True):
            if part.ndim != 1 or len(part) != len(parts[0]):
                raise ValueError(f"table[{name!r}] has shape {part.shape}, expected ({len(parts[0])},), one axis")
        return np.column_stack(parts)

    @staticmethod
    def result(table: Any, keep: Sequence[str], name: str, log_p: Array) -> Any:
        return {**{kept: table[kept] for kept in keep}, name: log_p}


_KINDS: dict[tuple[str, str], type[_Kind]] = {
    ("pandas", "DataFrame"): _PandasFrame,
    ("polars", "DataFrame"): _PolarsFrame,
    ("pyarrow", "Table"): _ArrowTable,
    ("pyarrow", "RecordBatch"): _ArrowBatch,
}


def _kind_of(table: Any) -> type[_Kind]:
    if isinstance(table, Mapping):
        return _Columns
    for base in type(table).__mro__:  # of a subclass, too
        if kind := _KINDS.get((base.__module__.partition(".")[0], base.__name__)):
            return kind
    raise TypeError(
        f"table is {_checks.describe(table)}, expected a DataFrame of pandas or Polars, a Table or RecordBatch of "
        "pyarrow, or a dict of columns"
    )
