"""Files that jobs write together: which job writes which, what made each of them, and whether it is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nvpflow import _checks, data_io
from nvpflow._core import __version__, cpu_isa
from nvpflow.flow import Flow

_MADE = b"nvpflow.made"  # in the metadata of a file: what made it
_JOB = b"nvpflow.job"  # and of which files it is one


def fingerprint(flow: Flow) -> str:
    """Return the SHA-256 of what decides a flow's numbers: its spec, its weights, and how it multiplies."""
    parameters, mean_low = flow._copy_state()
    said = (flow.spec.to_json(), flow.precision, flow.weights)
    digest = hashlib.sha256(json.dumps(said).encode())
    for values in (parameters, mean_low):
        if values is not None:
            digest.update(values.data)
    return digest.hexdigest()


def made_by(flow: Flow, model: str, what: str, **more: Any) -> dict[str, Any]:
    """Return what tells a file from others: `model` is the flow's fingerprint, `what` "scores" or "sample"."""
    where = cpu_isa() if flow.device == "cpu" else "cuda"
    return {"what": what, "model": model, "on": where, "version": __version__, **more}


def made_of(source: str) -> dict[str, int]:
    """Return what tells that a source has not changed."""
    found = os.stat(source)
    return {"bytes": found.st_size, "time": found.st_mtime_ns}


# ----------------------------------------------------------------------------------------------------------- plans


class Job(NamedTuple):
    """Which of how many files one is, by their order, and the digest of all their names."""

    number: int
    files: int
    names: str


class Planned(NamedTuple):
    """A file to write, and the table that it is made of."""

    source: str
    target: str
    job: Job


def planned(sources: Sequence[str], folder: str) -> list[Planned]:
    """Return a target in the folder for each source, in an order that does not depend on that of the sources."""
    by_name: dict[str, str] = {}
    for source in sources:
        name = f"{_stem(source)}.parquet"
        other = by_name.get(name)
        if other is not None and os.path.realpath(other) == os.path.realpath(source):
            raise data_io.DataError(f"{source} is given twice, expected each source once")
        if other is not None:
            raise data_io.DataError(
                f"{other} and {source} would both be scored into {os.path.join(folder, name)}, expected sources of "
                "different names; give each folder of sources a folder of scores"
            )
        check_apart(source, os.path.join(folder, name))
        by_name[name] = source
    names = sorted(by_name)
    return [
        Planned(by_name[name], os.path.join(folder, name), job) for name, job in zip(names, jobs_of(names), strict=True)
    ]


def check_apart(source: str, target: str) -> None:
    """Refuse to write a file over what it is made of."""
    if os.path.realpath(target) == os.path.realpath(source):
        raise data_io.DataError(f"{source} would be overwritten by its own scores; give them another place")


def jobs_of(names: Sequence[str]) -> list[Job]:
    """Return for each of the names, which are sorted, of which files it is one."""
    return [Job(i, len(names), names_digest(names)) for i in range(len(names))]


def names_digest(names: Sequence[str]) -> str:
    """Return the digest of sorted names."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def _stem(source: str) -> str:
    """Return the name of a table without its folder, and without what says its kind."""
    name = os.path.basename(source)
    kinds = (".npy", ".parquet", *data_io.CSV_SUFFIXES, *data_io.IPC_SUFFIXES)
    for suffixes in (data_io.COMPRESSIONS, kinds):
        stem, suffix = os.path.splitext(name)
        name = stem if suffix.lower() in suffixes else name
    return name


# ----------------------------------------------------------------------------------------------------------- files


def metadata(made: Mapping[str, Any], job: Job | None) -> dict[bytes, bytes]:
    """Return what a file's metadata say."""
    found = {_MADE: json.dumps(made).encode()}
    return found if job is None else {**found, _JOB: json.dumps(job._asdict()).encode()}


def write_once(
    target: str,
    made: Mapping[str, Any],
    job: Job | None,
    write: Callable[[dict[bytes, bytes]], int],
    *,
    force: bool,
) -> tuple[int, bool]:
    """Write a file unless it is done. Return its rows, and whether it was there already.

    `write` takes the metadata, writes all of the file or nothing, and returns the rows. Without `force` it raises
    FileExistsError where another job has written the target in the meantime.
    """
    rows = None if force else rows_done(target, made)
    if rows is not None:
        return rows, True
    try:
        return write(metadata(made, job)), False
    except FileExistsError:
        rows = rows_done(target, made)
        if rows is None:
            raise
        return rows, True


def rows_done(target: str, made: Mapping[str, Any]) -> int | None:
    """Return the rows of a target that is done, None where there is none yet.

    Raises
    ------
    FileExistsError
        Something else is there, and what tells it apart.
    """
    if not os.path.exists(target):
        return None
    found = read(target)
    wanted = json.loads(json.dumps(made))
    if found.made == wanted:
        return found.rows
    why = f"and is {found.problem}" if found.problem else _difference(found.made, wanted)
    raise FileExistsError(f"{target} exists, {why}; force=True overwrites it")


class Found(NamedTuple):
    """What a file says of itself."""

    made: dict[str, Any]
    rows: int
    job: Job | None
    problem: str
    """What it is where it says nothing; empty where it does."""


def read(target: str) -> Found:
    """Return what a file says of itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(target)
        said = footer.metadata or {}
        made, job = (json.loads(said[key]) if key in said else None for key in (_MADE, _JOB))
        if isinstance(made, dict):
            return Found(made, footer.num_rows, None if job is None else Job(**job), "")
    except pa.ArrowInvalid:
        return Found({}, 0, None, "no whole Parquet file")
    except (ValueError, TypeError):  # not what `metadata` returns
        pass
    return Found({}, footer.num_rows, None, "not written by nvpflow")


_DIFFERENCES = {
    "what": "and holds the {found}, not the {wanted}, of a flow",
    "model": "made by another model",
    "bytes": "made of another source, or its source has changed since",
    "time": "made of another source, or its source has changed since",
    "on": "made with {found}, and this process computes with {wanted}: other bits; NVPFLOW_ISA=... sets it",
    "version": "made by nvpflow {found}, and this is {wanted}",
}


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first thing that tells two files apart, in words."""
    for key, words in _DIFFERENCES.items():
        if found.get(key) != wanted.get(key):
            return words.format(found=found.get(key), wanted=wanted.get(key))
    return f"made with other options: {different_options(found, wanted)}"


def different_options(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the options in which two files differ, with what each has."""
    names = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return "; ".join(
        f"{key} {_checks.shortened(repr(found.get(key)))} there, {_checks.shortened(repr(wanted.get(key)))} here"
        for key in names
    )
