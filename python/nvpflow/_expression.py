"""What prints as the call that makes it again, and the kinds of it that JSON tells apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

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


class Kind(Expression):
    """Base of the kinds of one part of a flow, a layer or a base: each says here what the package asks of it."""

    _kind: ClassVar[str]  # its name in JSON, and in messages

    def _to_json(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {"kind": self._kind} | self._fields_to_json()

    def _fields_to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Any:
        """Return it from what JSON holds beside the kind."""
        return cls(**fields)


_Some = TypeVar("_Some", bound=Kind)


def from_json(kinds: Iterable[type[_Some]], entry: Mapping[str, Any]) -> _Some:
    """Return what an entry holds that the extension wrote, which is of one of these kinds."""
    fields = dict(entry)
    name = fields.pop("kind")
    (kind,) = (kind for kind in kinds if kind._kind == name)
    return kind._from_fields(fields)  # type: ignore[no-any-return]
