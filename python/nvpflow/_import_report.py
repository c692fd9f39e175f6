"""What an importer found out: `ImportReport` of `nvpflow.importers`, which a flow keeps and files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nvpflow import _checks, _html
from nvpflow._text import counted, visible

HOME = "nvpflow.importers"  # where users and pickles find these classes
VERDICTS = ("exact", "close", "different", "unchecked")


@dataclass(frozen=True)
class Imported:
    """What a layer of the source became.

    Attributes
    ----------
    path
        Where it is: "flow.transform.transforms[3]".
    kind
        Its class, without the module.
    became
        Layers here, in words and in their order; empty: none was needed.
    """

    path: str
    kind: str
    became: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    """Largest differences between a flow and its source, each in proportion to 1 + the size of the source's number.

    Attributes
    ----------
    log_prob, z, log_det
        Of log p, latents and log-determinants, data to latent.
    x
        Of data, latent to data; None where the source cannot compute it.
    round_trip
        Of ``inverse(forward(x))`` against x, of the flow here alone.
    """

    log_prob: float
    z: float
    x: float | None
    log_det: float
    round_trip: float


@dataclass(frozen=True, repr=False)
class ImportReport:
    """How a flow of another library became one here, and how far the two agree. Prints as a table.

    Attributes
    ----------
    verdict
        "exact": in float64 all numbers of all rows agree to 1e-9, times the row's condition number where that is more
        than 1. "close": to 1e-6 times that. "different": not so, or a result is finite on one side only.
        "unchecked": nothing was compared; `unchecked` says why.
    library, version
        What the flow comes from; the version is "" where it is not known.
    nvpflow_version
        Of nvpflow.
    dtype
        Of the flow: "float32" or "float64".
    layers
        What each layer of the source became, an `Imported` each, data side first.
    dropped
        What is of no effect after training and was left out, such as dropout.
    folded
        What became part of weights, such as a batch normalization.
    assumed
        What the source does not tell, and was taken for granted; empty for live objects.
    rows
        Rows that were compared: half drawn at random, half samples of the source, whose latents are random.
    failed_rows
        Rows that the source itself could not compute; they are left out of the differences.
    nonfinite_rows
        Rows of which a result is finite on one side only.
    condition
        The largest condition number that was taken into account, from 1 to 10,000: by how much a change of a row is
        amplified. None where nothing was compared.
    float64
        `Differences` of a float64 flow of the same weights; None where nothing was compared.
    in_dtype
        Those of the flow itself where its dtype is float32, from the source in float64; else None.
    unchecked
        Why nothing was compared, or None.
    """

    verdict: str
    library: str
    version: str
    nvpflow_version: str
    dtype: str
    layers: tuple[Imported, ...]
    dropped: tuple[str, ...]
    folded: tuple[str, ...]
    assumed: tuple[str, ...]
    rows: int
    failed_rows: int
    nonfinite_rows: int
    condition: float | None
    float64: Differences | None
    in_dtype: Differences | None
    unchecked: str | None

    @property
    def ok(self) -> bool:
        """Whether the verdict is "exact" or "close"."""
        return self.verdict in ("exact", "close")

    @property
    def source(self) -> str:
        """The library and its version, "zuko 1.6.0"."""
        return f"{self.library} {self.version}".rstrip()

    def _compared(self) -> str:
        if self.unchecked is not None:
            return f"nothing was compared: {self.unchecked}"
        failed = f"; the source failed on {self.failed_rows:,}" if self.failed_rows else ""
        wrong = f"; {self.nonfinite_rows:,} finite on one side only" if self.nonfinite_rows else ""
        return f"{counted(self.rows, 'row')}{failed}{wrong}; condition {self.condition:.3g}"

    def _differences(self, arrow: str) -> list[tuple[str, ...]]:
        """Return the lines of a table: what, in float64, in the flow's dtype; `arrow` is how it writes one."""
        columns = [found for found in (self.float64, self.in_dtype) if found is not None]
        names = {
            "log_prob": "log p",
            "z": f"z, x {arrow} z",
            "log_det": "log_det",
            "x": f"x, z {arrow} x",
            "round_trip": f"x {arrow} z {arrow} x, here alone",
        }
        return [(text, *(_shown(getattr(found, name)) for found in columns)) for name, text in names.items()]

    def _notes(self) -> list[str]:
        notes = {"dropped": self.dropped, "folded": self.folded, "assumed": self.assumed}
        return [f"{name}: {text}" for name, texts in notes.items() for text in texts]

    def _dtypes(self) -> list[str]:
        return ["float64", *(["float32"] if self.in_dtype is not None else [])]

    def __repr__(self) -> str:
        """Return the table."""
        lines = [f"ImportReport: {self.verdict}; from {self.source} to {self.dtype}", f"  {self._compared()}"]
        if self.float64 is not None:
            lines.append(f"    {'largest difference':<24}" + "".join(f"{name:>9}" for name in self._dtypes()))
            for name, *numbers in self._differences("->"):
                lines.append(f"    {name:<24}" + "".join(f"{number:>9}" for number in numbers))
        for layer in self.layers:
            lines.append(f"  {layer.path}: {layer.kind}")
            lines += [f"    -> {text}" for text in layer.became or ("nothing: it is the identity",)]
        return "\n".join(map(visible, [*lines, *(f"  * {note}" for note in self._notes())]))

    def _repr_html_(self) -> str:
        """Return tables of the differences and of the layers, for notebooks."""
        caption = f"ImportReport: {self.verdict}; from {self.source} to {self.dtype}; {self._compared()}"
        differences = [] if self.float64 is None else self._differences("\N{RIGHTWARDS ARROW}")
        head = ("largest difference", *self._dtypes()) if differences else ()
        layers = [(f"{layer.path}: {layer.kind}", ", ".join(layer.became)) for layer in self.layers]
        tables = _html.table(caption, head, differences) + _html.table("Layers", ("there", "here"), layers, text_from=1)
        return tables + _html.items(self._notes())

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as numbers, strings, lists, dicts and None."""
        lists = {name: list(getattr(self, name)) for name in ("dropped", "folded", "assumed")}
        layers = [asdict(layer) | {"became": list(layer.became)} for layer in self.layers]
        return asdict(self) | lists | {"layers": layers}

    def to_json(self) -> str:
        """Return all of it as JSON, with every digit."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImportReport:
        """Return the report that `to_dict` was called on.

        Raises
        ------
        ValueError
            `values` has not the keys of one, or a value of another type.
        """
        given = _checked(cls, values)
        for name in ("dropped", "folded", "assumed"):
            given[name] = tuple(_typed(f"{name}[{i}]", text, str) for i, text in enumerate(given[name]))
        given["layers"] = tuple(_imported(f"layers[{i}]", layer) for i, layer in enumerate(given["layers"]))
        for name in ("float64", "in_dtype"):
            given[name] = None if given[name] is None else Differences(**_checked(Differences, given[name]))
        if given["verdict"] not in VERDICTS:
            raise ValueError(f"verdict is {_checks.describe(given['verdict'])}, expected one of {', '.join(VERDICTS)}")
        compared = given["verdict"] != "unchecked"
        for name, there in (("unchecked", not compared), ("condition", compared), ("float64", compared)):
            if (given[name] is not None) != there:
                expected = "a value" if there else "None"
                raise ValueError(f"{name} is {given[name]} beside verdict {given['verdict']!r}, expected {expected}")
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> ImportReport:
        """Return the report that `to_json` was called on; ValueError where it is not one."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("text has lists within lists without end, expected what to_json returned") from None
        return cls.from_dict(values)


def _shown(difference: float | None) -> str:
    return "unknown" if difference is None else f"{difference:.1e}"


# By the annotation of a field; what a value from JSON may be.
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "Differences | None": (dict, type(None)),
}


def _checked(cls: type, values: Any) -> dict[str, Any]:
    """Return a dict of the fields of a dataclass here, whose values may come from anybody's file."""
    expected = {field.name: str(field.type) for field in fields(cls)}
    if not isinstance(values, Mapping) or set(values) != set(expected):
        came = ", ".join(map(str, values)) if isinstance(values, Mapping) else _checks.describe(values)
        raise ValueError(f"{cls.__name__} holds {_checks.shortened(came)}, expected {', '.join(expected)}")
    return {name: _typed(name, values[name], *_TYPES.get(kind, (list, tuple))) for name, kind in expected.items()}


def _typed(name: str, value: Any, *types: type) -> Any:
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{name} is {_checks.describe(value)}, expected {expected}")
    return value


def _imported(name: str, values: Any) -> Imported:
    given = _checked(Imported, values)
    became = tuple(_typed(f"{name}.became[{i}]", text, str) for i, text in enumerate(given["became"]))
    return Imported(given["path"], given["kind"], became)


for _kind in (Imported, Differences, ImportReport):
    _kind.__module__ = HOME
