"""What prints as the call that makes it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from nvpflow import _checks

HOME = "nvpflow.layers"  # where users and pickles find the classes that derive from Expression


class Expression:
    """Base of frozen dataclasses whose repr leaves out what is None, and behind the first arguments what is default."""

    _by_position: ClassVar[int] = 0  # arguments that are always shown, without their names

    def _arguments(self) -> Iterator[str]:
        for i, field in enumerate(dataclasses.fields(self)):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is None or not field.init or (i >= self._by_position and value == field.default):
                continue
            yield repr(value) if i < self._by_position else f"{field.name}={value!r}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _set(self, **values: object) -> None:
        """Give the fields of a frozen object their checked values."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setstate__(self, state: object) -> None:
        """Take the fields from a pickle, which may hold anything: the constructor checks them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        if not isinstance(state, dict) or set(state) != {field.name for field in fields}:
            expected = f"a dict of {', '.join(field.name for field in fields) or 'nothing'}"
            raise TypeError(f"the pickled {type(self).__name__} is {_checks.describe(state)}, expected {expected}")
        made = type(self)(**{field.name: state[field.name] for field in fields if field.init})
        hidden = {field.name: state[field.name] for field in fields if not field.init}  # integers, or None
        self._set(**vars(made) | {name: v if v is None else _checks.integer(name, v) for name, v in hidden.items()})
