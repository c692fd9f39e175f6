"""The options of training, one row each: how `Flow.fit` checks them, and how the command line has them.

Signatures name them too, `Flow.fit`'s with the defaults and what they mean; the extension checks their ranges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nvpflow import _checks

_REFUSED, _AUTOMATIC = object(), object()  # what None can be, besides a value: left out if automatic


class Flag(NamedTuple):
    """An option of ``nvpflow fit`` that is an argument of `Flow.fit`, with its default."""

    type: Callable[[str], Any]
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None


class Option(NamedTuple):
    """One argument of `Flow.fit`."""

    name: str
    check: Callable[[str, Any], Any]
    none: Any = _REFUSED
    flag: Flag | None = None


def _batch_size(name: str, value: Any) -> int:
    size = _checks.integer(name, value)
    if size == 0:  # the extension's word for None
        raise ValueError(f"{name} is 0, expected at least 1, or None for an automatic size")
    return size


def _folds(name: str, value: Any) -> int:
    count = _checks.integer(name, value)
    if count == 0:  # the extension's word for None
        raise ValueError(f"{name} is 0, expected at least 2, 1 for none, or None to have them where rows are few")
    return count


def _file(name: str, value: Any) -> str:
    path = _checks.path(name, value)
    if not path:
        raise ValueError(f"{name} is an empty path, expected that of a file, or None for no {name}")
    return path


def _deviation(name: str, value: Any) -> Any:
    return value if isinstance(value, str) and value == AUTO else _checks.real(name, value)


def _deviation_of(text: str) -> float | str:
    return text if text == AUTO else float(text)


AUTO = "auto"  # a value that leaves the choice to the extension, where None is another
MAX_DEVIATION = 1000.0  # what the extension chooses where it leaves rows out

OPTIONS = (
    Option("epochs", _checks.integer, flag=Flag(int, "N", "passes over the rows")),
    Option(
        "batch_size",
        _batch_size,
        _AUTOMATIC,
        Flag(int, "N", "most rows per update (default: an eighth of the training rows, from 16 to 256)"),
    ),
    Option("learning_rate", _checks.real, flag=Flag(float, "X", "Adam's step size")),
    Option("schedule", _checks.text, flag=Flag(str, None, "of the learning rate", choices=("cosine", "constant"))),
    Option(
        "weight_decay",
        _checks.real,
        _AUTOMATIC,
        Flag(float, "X", "decoupled, on kernels only (default: the square of 225 columns / training rows, at most 1)"),
    ),
    Option("clip_norm", _checks.real, 0.0, Flag(float, "X", "scale longer gradients down to this norm; 0: never")),
    Option(
        "averaging",
        _checks.real,
        0.0,
        Flag(float, "X", "share that each epoch keeps of the weights' moving average; 0: none"),
    ),
    Option(
        "standardize",
        _checks.text,
        _AUTOMATIC,
        Flag(
            str,
            None,
            "what the layer for the columns' means and standard deviations is set from, as fit's standardize "
            "(default: auto); covariance: a layer for their correlations, too (default below 50 rows a column)",
            choices=("auto", "mean", "robust", "covariance"),
        ),
    ),
    Option(
        "max_deviation",
        _deviation,
        0.0,
        Flag(
            _deviation_of,
            "X",
            "leave out rows so many standard deviations from the mean of a column; 0: none; auto: 1000, or none with "
            "--base student_t",
        ),
    ),
    Option("restandardize", _checks.boolean),
    Option("allow_degenerate", _checks.boolean),
    Option(
        "folds",
        _folds,
        _AUTOMATIC,
        Flag(int, "K", "of cross-validation; 1: none (default: where a share of the rows would be too few)"),
    ),
    Option("patience", _checks.integer, 0, Flag(int, "N", "stop after N epochs without a better one")),
    Option(
        "max_round_trip",
        _checks.real,
        0.0,
        Flag(float, "X", "keep no epoch whose validation rows come back from the latents with a larger relative error"),
    ),
    Option(
        "seed",
        functools.partial(_checks.integer, unsigned=True),
        flag=Flag(int, "S", "of the weights, the split and the order"),
    ),
    Option("num_threads", functools.partial(_checks.integer, bits=32), 0),
    Option(
        "checkpoint",
        _file,
        "",
        Flag(str, "FILE", "written after every epoch; where it exists, training goes on from it"),
    ),
    Option(
        "checkpoint_every",
        _checks.integer,
        0,
        Flag(int, "N", "write the checkpoint also after every N updates of an epoch"),
    ),
    Option("shards", _checks.integer, 0),
)
FLAGS = {option.name: option.flag for option in OPTIONS if option.flag is not None}


_SHARED = ("learning_rate", "schedule", "clip_norm", "averaging", "patience", "seed", "num_threads", "checkpoint")
DENSITY_OPTIONS = (
    *(option for option in OPTIONS if option.name in _SHARED),
    Option("steps", _checks.integer),
    Option("batch_size", _checks.integer),
    Option("estimator", _checks.text),
    Option("weight_decay", _checks.real, 0.0),
    Option("report_every", _checks.integer),
    Option("validation", _checks.integer),
)
"""Those of `Flow.fit_density`."""


def among(values: Mapping[str, Any], known: tuple[Option, ...] = OPTIONS) -> dict[str, Any]:
    """Return the options of training among a caller's values."""
    return {option.name: values[option.name] for option in known if option.name in values}


def checked(options: Mapping[str, Any], known: tuple[Option, ...] = OPTIONS) -> dict[str, Any]:
    """Return all options as the extension takes them, of the right types."""
    values: dict[str, Any] = {}
    for name, check, none, _ in known:
        value = options[name]
        if value is not None or none is _REFUSED:
            found = check(name, value)
            if not (check is _deviation and found == AUTO):
                values[name] = found
        elif none is not _AUTOMATIC:
            values[name] = none
    return values
