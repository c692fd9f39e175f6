"""How an importer says no: by the path of the object, what it is, what was expected, what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from nvpflow import _checks


def kind_of(source: Any) -> str:
    """Return the class of an object of another library; a tensor file's stand-ins say it themselves."""
    return str(getattr(source, "_stands_for", None) or type(source).__name__)


def refused(path: str, what: str, expected: str, do: str = "") -> ValueError:
    """Return the error to raise: `path` is `what`, expected `expected`; `do`."""
    return ValueError(f"{path} is {what}, expected {expected}" + (f"; {do}" if do else ""))


def refused_kind(path: str, source: Any, expected: str, do: str = "") -> ValueError:
    """Return the error to raise for an object whose class has no importer."""
    return refused(path, named(kind_of(source)), expected, do)


def named(kind: str) -> str:
    """Return the name of a class with its article."""
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def attribute(path: str, source: Any, name: str) -> Any:
    """Return an attribute that objects of its class have in the versions known here."""
    try:
        return getattr(source, name)
    except AttributeError:
        raise ValueError(
            f"{path} is a {kind_of(source)} without .{name}, expected one; this version of its library is not known "
            "here"
        ) from None


def library_of(source: Any) -> str:
    """Return the name of the package that an object's class is from."""
    return type(source).__module__.partition(".")[0]


def described(source: Any) -> str:
    """Return an object's class with its module, for messages about an object that is not a flow."""
    return _checks.shortened(f"{type(source).__module__}.{type(source).__qualname__}")


def way_of_tensors(source: Any) -> str:
    """Return the advice for a state dict or a path to one, which is not a model; else ""."""
    return "; for tensors alone take from_state_dict" if isinstance(source, (str, os.PathLike, Mapping)) else ""
