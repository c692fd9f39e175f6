"""Commands that write a file for each of many: which are theirs, which are done already, what is said of them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple, TypeVar

import nvpflow
from nvpflow import _parts, data_io, tables
from nvpflow._text import counted

_SECONDS_BETWEEN_LINES = 10.0
_OPTIONS = ("columns", "drop", "context_columns", "keep", "append", "missing", "ignore_names", "delimiter")

_MOST_FILES = 1_000_000

Item = TypeVar("Item")


class Share(NamedTuple):
    """Which of the files a job writes: every `of`-th."""

    number: int
    of: int

    def picked(self, items: Sequence[Item]) -> list[Item]:
        """Return those that are this job's; numbers from 0 to N - 1 and from 1 to N are both all of them."""
        return list(items[self.number % self.of :: self.of])


def share(text: str) -> Share:
    """Return what --part gives."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part, expected one such as 3/64, the third of 64")
    if not int(number) <= int(of) or int(of) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no part, expected a number from 1 to {of} or from 0 to N - 1, as I/N; an array of jobs "
            "counts without gaps"
        )
    return Share(int(number), int(of))


def add_share(command: Any) -> None:
    """Add --part."""
    help = "write the I-th of N shares of the files only, counted from 1 or from 0: a job of an array"
    command.add_argument("--part", type=share, metavar="I/N", help=help)


def scores_into_folder(arguments: argparse.Namespace) -> bool:
    """Tell whether `score` is to write a file for each table."""
    tables, output = arguments.tables, arguments.output
    if len(tables) == 1 and arguments.part is None and not output.endswith(os.sep) and not os.path.isdir(output):
        return False
    what = "--part is given" if len(tables) == 1 else counted(len(tables), "table")
    if output == "-":
        raise data_io.DataError(f"{what}, expected -o with the folder for their scores")
    if special := [table for table in tables if table == "-" or data_io.is_special(table)]:
        raise data_io.DataError(f"{special[0]} is a pipe, expected files where -o is a folder; name a file with -o")
    if arguments.format not in (None, "parquet"):
        raise data_io.DataError(f"--format is {arguments.format}, expected parquet where -o is a folder")
    return True


def score(
    arguments: argparse.Namespace, score_table: Callable[[nvpflow.Flow, str, str, Mapping[bytes, bytes]], int]
) -> int:
    """Score tables into a folder.

    `score_table` takes the flow, the table, the target and its metadata, and returns the rows.
    """
    planned = _parts.planned(arguments.tables, arguments.output)
    mine = planned if arguments.part is None else arguments.part.picked(planned)
    _make_folder(arguments.output)
    flow = nvpflow.load(arguments.model, device=arguments.device, precision=arguments.precision)
    flow.num_threads = arguments.threads
    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name))}
    model = _parts.fingerprint(flow)

    def made(item: _parts.Planned) -> dict[str, Any]:
        return _parts.made_by(flow, model, "scores", **_parts.made_of(item.source), **options)

    def write(item: _parts.Planned) -> tuple[int, bool]:
        arguments.data = item.source

        def write_it(metadata: Mapping[bytes, bytes]) -> int:
            return score_table(flow, item.source, item.target, metadata)

        return _parts.write_once(item.target, made(item), item.job, write_it, force=arguments.force)

    return _write_all(arguments, [(item, item.target, made(item)) for item in mine], write)


def rows_number(text: str) -> int:
    """Return a number of rows: 1000, 1e9."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = Decimal(text)
        if number.is_finite() and number.adjusted() < 30 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of rows, expected one such as 1000 or 1e9")


def samples_into_folder(arguments: argparse.Namespace) -> bool:
    """Tell whether `sample` is to write several files."""
    output, most = arguments.output, arguments.rows_per_file
    folder = output.endswith(os.sep) or os.path.isdir(output)
    if most is None:
        if folder:
            raise data_io.DataError(f"-o: {output} is a folder, expected a file, or --rows-per-file beside the folder")
        if arguments.part is not None:
            raise data_io.DataError("--part is given, expected --rows-per-file and a folder beside it")
        return False
    if output == "-":
        raise data_io.DataError("--rows-per-file is given, expected -o with the folder for the files")
    if most < 1:
        raise data_io.DataError(f"--rows-per-file is {most}, expected at least 1")
    if arguments.rows > most * _MOST_FILES:
        raise data_io.DataError(
            f"--rows-per-file is {most}, expected at least {-(-arguments.rows // _MOST_FILES)}: at most "
            f"{_MOST_FILES:,} files"
        )
    if arguments.format not in (None, "parquet"):
        raise data_io.DataError(f"--format is {arguments.format}, expected parquet with --rows-per-file")
    if arguments.context_from is not None:
        raise data_io.DataError(
            "--context-from is given with --rows-per-file, expected --context: all files are drawn under one context"
        )
    return True


def sample(arguments: argparse.Namespace, flow: nvpflow.Flow, context: Any, dtype: str) -> int:
    """Draw a sample into files of a folder."""
    count = max(1, -(-arguments.rows // arguments.rows_per_file))
    names = [f"part-{i:0{max(5, len(str(count - 1)))}}.parquet" for i in range(count)]
    jobs = _parts.jobs_of(names)
    mine = list(range(count)) if arguments.part is None else arguments.part.picked(range(count))
    _make_folder(arguments.output)
    given = {"seed": arguments.seed, "dtype": dtype, "temperature": arguments.temperature, "context": context}
    model = _parts.fingerprint(flow)

    def rows(i: int) -> range:
        first = i * arguments.rows_per_file
        last = min(first + arguments.rows_per_file, arguments.rows)
        return range(arguments.start + first, arguments.start + last)

    def write(i: int) -> tuple[int, bool]:
        target = os.path.join(arguments.output, names[i])
        done = tables._sample_file(flow, model, target, rows(i), given, jobs[i], force=arguments.force)
        return done.rows, done.skipped

    files = (
        (i, os.path.join(arguments.output, names[i]), tables._sample_made(flow, model, rows(i), given)) for i in mine
    )
    return _write_all(arguments, files, write)


def check(arguments: argparse.Namespace) -> int:
    """Say whether files that jobs wrote together are all there."""
    found = tables.check_files(arguments.folder, files=arguments.files, rows=arguments.rows)
    print(str(found).replace("files=N", "--files N"))
    return 0 if found.ok else 1


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise data_io.DataError(f"-o: {folder} is a file, expected a folder") from None


def _write_all(
    arguments: argparse.Namespace,
    files: Iterable[tuple[Item, str, Mapping[str, Any]]],
    write: Callable[[Item], tuple[int, bool]],
) -> int:
    """Write what is not done: items with the target and what makes it. Return the exit code."""
    found = [(item, None if arguments.force else _parts.rows_done(target, made)) for item, target, made in files]
    waiting = [item for item, rows in found if rows is None]
    progress = _Progress(arguments.output, len(waiting))
    for _, rows in found:
        if rows is not None:
            progress.count(rows, skipped=True)
    progress.begin()
    failed = 0
    for item in waiting:
        try:
            rows, skipped = write(item)
        except data_io.DataError as error:  # of this table: the others are written all the same
            failed += 1
            print(f"nvpflow: error: {error}", file=sys.stderr, flush=True)
            continue
        progress.count(rows, skipped=skipped)
        progress.move()
    progress.end(failed)
    return 1 if failed else 0


class _Progress:
    """What is said on the way: on a terminal after each file, in a log now and then."""

    def __init__(self, folder: str, waiting: int) -> None:
        self._folder, self._waiting = folder, waiting
        self._written = self._skipped = self._rows = self._rows_written = 0
        self._started = self._said = time.monotonic()

    def count(self, rows: int, *, skipped: bool) -> None:
        """Count a file."""
        self._rows += rows
        self._skipped += skipped
        if not skipped:
            self._written += 1
            self._rows_written += rows

    def begin(self) -> None:
        """Say what is done already."""
        if self._skipped:
            print(f"nvpflow: {counted(self._skipped, 'file')} done already", file=sys.stderr, flush=True)

    def move(self) -> None:
        """Say how far it is."""
        now = time.monotonic()
        if sys.stderr.isatty() or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            speed = self._rows_written / max(now - self._started, 1e-9)
            done = f"{self._written} of {counted(self._waiting, 'file')}"
            print(f"nvpflow: {done}, {self._rows_written:,} rows, {speed:,.0f} rows/s", file=sys.stderr, flush=True)

    def end(self, failed: int) -> None:
        """Say what there is now."""
        failures = f", {failed} failed" if failed else ""
        print(
            f"{self._folder}: {counted(self._written, 'file')} written, {self._skipped} done before{failures}; "
            f"{counted(self._rows, 'row')}"
        )
