"""The switch of mutate.py for Python, as mutant.hpp is for C++; in the package under test it is _mutant.py."""

import mmap
import os

_active = int(os.environ.get("NVPFLOW_MUTANT", "-1"))
_reached = None
if _path := os.environ.get("NVPFLOW_MUTANTS_REACHED"):
    with open(_path, "r+b") as _file:
        _reached = mmap.mmap(_file.fileno(), 0)


def mutant(number: int) -> bool:
    """Whether the mutant is on; and a note that the program came past it."""
    if _reached is not None:
        _reached[number] = 1
    return number == _active


def _raise(error: BaseException) -> None:
    raise error
