"""What `Flow.certify` found: `Certificate`, and the largest errors in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nvpflow import _checks, _html
from nvpflow._text import counted

PROMISED = {"float32": 1e-5, "float64": 1e-12}
"""Relative errors that flows of unit data and moderate weights stay within, by dtype (README)."""
TOLERANCE = 1e-3
"""The default of the largest relative error that is not called unreliable."""


@dataclass(frozen=True)
class Deviation:
    """The largest difference between two ways to compute the same.

    Attributes
    ----------
    relative
        Largest error in proportion to 1 + the size of what should have come out; which is what the verdict judges.
    row
        Where that was, counted from 0 over all rows.
    absolute
        Largest error as such, which may be another row's.
    """

    relative: float
    row: int
    absolute: float


@dataclass(frozen=True, repr=False)
class Certificate:
    """What `Flow.certify` found. Prints as a table.

    Errors of x are in units of the columns' standard deviations: those of a standardize layer that comes first, else
    those of the data. Latents have the unit of the flow's base, log p and log-determinants are in nats. A `Deviation`
    is None where nothing could be measured.

    Attributes
    ----------
    verdict
        "accurate": every judged error is within `promised`. "reduced": within `tolerance`. "unreliable": beyond it, or
        finite rows gave NaN or infinity, or there was no finite row. Judged are `round_trip`, `log_prob` and `log_det`,
        and also `input_resolution`. Beyond 0.01 (or `tolerance`, where that is more) even an exact flow is
        unreliable: the rows have lost the digits that its density is about.
    advice
        What to do about it, in sentences; empty where there is nothing to say.
    promised
        Relative error within which flows of this dtype compute where data and weights are moderate: 1e-5 or 1e-12.
    tolerance
        As given to `Flow.certify`.
    rows
        All rows.
    nonfinite_rows, first_nonfinite_row
        Rows that hold NaN or infinity, whose results are NaN, and the first of them. They are left out of all else.
    input_resolution
        Distance of neighbouring numbers of the rows' dtype at a column's largest value, in units of the column's
        standard deviation. That is of the rows or of a standardize layer, the larger one. The column with the largest
        such distance counts. None where it is not known: no spread.
    blurred_columns
        Columns where that is above 0.01: their values are large beside their spread, and have lost digits that count.
    failed_rows, first_failed_row
        Finite rows with results that are not, and the first of them. They are left out of the errors.
    round_trip
        Of x' = inverse(forward(x)): ``|x' - x| / (std + |x|)``, element by element.
    latent_round_trip
        Of z' = forward(inverse(z)), z = forward(x): ``|z' - z| / (1 + |z|)``. Not judged: where rows lie far from zero
        in units of their spread, x' has no room for the digits of z.
    log_prob
        Of log p against its computation in float64, of the rows that have a density in both. Rows outside of a bounded
        base (`FlowSpec.base`) have none.
    log_det
        Of the log-determinant against that of the float64 Jacobian, on `jacobian_rows` rows.
    jacobian_rows
        Rows whose Jacobian was formed: drawn at random, and the row with the worst round trip. Less those whose
        determinant float64 does not hold.
    jacobian_resolution
        Relative error of those determinants themselves: D times float64's epsilon times the Jacobian's condition
        number. A difference below it is not held against the flow. None without Jacobians.
    stretch, shrink
        Largest singular values of dz/dx and dx/dz among those rows: how much a rounding of x can move z, and a rounding
        of z x. None without Jacobians, or beyond float64's range.
    float64_round_trip
        The relative error of `round_trip` in a float64 copy of the flow, of the row where it is worst and of those
        drawn for Jacobians.
    round_trip_bound
        Bound on the relative `round_trip` error of every row that stays, in each layer, in the range of these rows. To
        first order in the dtype's epsilon, from the weights' norms, and usually far too large. None where it is not
        finite, and for arithmetic that is rounded on purpose (tf32, bfloat16). It is known for the normal base,
        standardize layers, and couplings of halves with one MLP and the log-scale ``B tanh(u / B)``; else None.
    no_bound
        Why `round_trip_bound` is None, in words; None where there is a bound.
    flow
        The flow as it prints.
    dtype, device, precision, weights
        How it computed.
    cpu_isa
        Instruction set of the CPU kernels.
    version
        Of nvpflow.
    parameters_sha256
        Of the flat parameters' bytes, in the flow's dtype: which weights this certificate is for.
    """

    verdict: str
    advice: tuple[str, ...]
    promised: float
    tolerance: float
    rows: int
    nonfinite_rows: int
    first_nonfinite_row: int | None
    input_resolution: float | None
    blurred_columns: tuple[str, ...]
    failed_rows: int
    first_failed_row: int | None
    round_trip: Deviation | None
    latent_round_trip: Deviation | None
    log_prob: Deviation | None
    log_det: Deviation | None
    jacobian_rows: int
    jacobian_resolution: float | None
    stretch: float | None
    shrink: float | None
    float64_round_trip: float | None
    round_trip_bound: float | None
    no_bound: str | None
    flow: str
    dtype: str
    device: str
    precision: str
    weights: str
    cpu_isa: str
    version: str
    parameters_sha256: str

    @property
    def ok(self) -> bool:
        """Whether the verdict is not "unreliable"."""
        return self.verdict != "unreliable"

    def _errors(self, arrow: str) -> dict[str, Deviation | None]:
        """Return the lines of tables; `arrow` is how they write one."""
        return {
            f"x {arrow} z {arrow} x": self.round_trip,
            f"z {arrow} x {arrow} z, not judged": self.latent_round_trip,
            "log p against float64": self.log_prob,
            f"log_det against {self.jacobian_rows} Jacobians": self.log_det,
        }

    def __repr__(self) -> str:
        """Return the table."""
        bound = f"none: {self.no_bound}" if self.round_trip_bound is None else f"{self.round_trip_bound:.1e}"
        double = "not measured" if self.float64_round_trip is None else f"{self.float64_round_trip:.1e}"
        resolution = "not known" if self.input_resolution is None else f"{self.input_resolution:.1e}"
        singular = ["not known" if v is None else f"{v:.3g}" for v in (self.stretch, self.shrink)]
        lines = [
            f"Certificate: {self.verdict}; {self.dtype} promises {self.promised:.0e}, tolerated {self.tolerance:.0e}",
            "  " + self.flow.replace("\n", "\n  "),
            f"  {counted(self.rows, 'row')}; {self.nonfinite_rows:,} with NaN or inf"
            f"{first(self.first_nonfinite_row)}; {self.failed_rows:,} finite ones failed"
            f"{first(self.first_failed_row)}",
            f"  {'largest error':<32}  relative  absolute  worst row",
            *(f"    {name:<30}  {_columns(error)}" for name, error in self._errors("->").items()),
            f"  {'x -> z -> x, worst, in float64':<32}  {double}",
            f"  {'steps of x, in its spread':<32}  {resolution}",
            f"  {'bound on x -> z -> x, by weights':<32}  {bound}",
            f"  {'largest singular values':<32}  dz/dx {singular[0]}, dx/dz {singular[1]}",
            *(f"  * {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table of the errors, and the advice, for notebooks."""
        caption = (
            f"Certificate: {self.verdict}; {self.dtype} promises {self.promised:.0e}, tolerated {self.tolerance:.0e}; "
            f"{counted(self.rows, 'row')}, {self.nonfinite_rows:,} with NaN or inf, {self.failed_rows:,} failed"
        )
        lines = [
            (name, "not measured", "", "")
            if e is None
            else (name, f"{e.relative:.1e}", f"{e.absolute:.1e}", f"{e.row}")
            for name, e in self._errors("\N{RIGHTWARDS ARROW}").items()
        ]
        found = _html.table(caption, ("largest error", "relative", "absolute", "worst row"), lines)
        return found + _html.items(self.advice)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as numbers, strings, lists, dicts and None."""
        return asdict(self) | {"advice": list(self.advice), "blurred_columns": list(self.blurred_columns)}

    def to_json(self) -> str:
        """Return all of it as JSON, with every digit."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Return the certificate that `to_dict` was called on.

        Raises
        ------
        ValueError
            `values` has not the keys of one.
        """
        _check_keys(cls, values)
        nested = {name: values[name] for name in ("round_trip", "latent_round_trip", "log_prob", "log_det")}
        for given in nested.values():
            if given is not None:
                _check_keys(Deviation, given)
        made = {name: None if given is None else Deviation(**given) for name, given in nested.items()}
        lists = {name: tuple(values[name]) for name in ("advice", "blurred_columns")}
        return cls(**{**values, **made, **lists})

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Return the certificate that `to_json` was called on; ValueError where it is not one."""
        return cls.from_dict(json.loads(text))


def _check_keys(cls: type, values: Any) -> None:
    expected = {field.name for field in fields(cls)}
    if not isinstance(values, Mapping) or set(values) != expected:
        came = ", ".join(map(str, values)) if isinstance(values, Mapping) else _checks.describe(values)
        raise ValueError(f"the {cls.__name__} holds {came}, expected {', '.join(sorted(expected))}")


def first(row: int | None) -> str:
    """Return in brackets which row was the first one; nothing where there is none."""
    return "" if row is None else f" (first: row {row})"


def _columns(error: Deviation | None) -> str:
    if error is None:
        return "not measured"
    return f"{error.relative:>8.1e}  {error.absolute:>8.1e}  {error.row:>9}"
