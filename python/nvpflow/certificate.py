"""How exactly a flow computes: measured on rows, compared with float64, and bounded from the weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _bound, _checks, _core, _data, _frames, _html

if TYPE_CHECKING:
    from nvpflow.flow import Flow

Array = NDArray[Any]

PROMISED = {"float32": 1e-5, "float64": 1e-12}
"""Relative errors that flows of unit data and moderate weights stay within, by dtype (README)."""
TOLERANCE = 1e-3
"""The default of the largest relative error that is not called unreliable."""

_BLOCK_VALUES = 1 << 18
_JACOBIAN_FLOPS = 2e10  # for all Jacobians, a few seconds of one core
_LARGEST_JACOBIAN_FLOPS = 1e12  # where one takes minutes, none is formed unless asked for
_MOST_JACOBIANS = 64
_VJP_COST = 6  # FLOPs per parameter and row


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

    Errors of x are in units of the standard deviations of the flow's first layer where that is a standardize layer,
    else in those of the data; latents have the unit of their standard normal distribution; log p and log-determinants
    are in nats. A `Deviation` is None where nothing could be measured.

    Attributes
    ----------
    verdict
        "accurate": every judged error is within `promised`. "reduced": within `tolerance`. "unreliable": beyond it, or
        finite rows gave NaN or infinity, or there was no finite row. Judged are `round_trip`, `log_prob` and `log_det`;
        and `input_resolution`: beyond 0.01 (or `tolerance`, where that is more) a flow that computes exactly is
        unreliable all the same, for the rows have lost what its density is of.
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
        standard deviation (of the rows, or that of a standardize layer, where it is larger); of the column where it is
        largest. None where it is not known: no spread.
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
        Of log p against its computation in float64.
    log_det
        Of the log-determinant against that of the float64 Jacobian, on `jacobian_rows` rows.
    jacobian_rows
        Rows whose Jacobian was formed: drawn at random, and the row with the worst round trip. Less those whose
        determinant float64 does not hold.
    jacobian_resolution
        Relative error of those determinants themselves: D times float64's epsilon times the Jacobian's condition
        number; a difference below it is not held against the flow. None without Jacobians.
    stretch, shrink
        Largest singular values of dz/dx and dx/dz among those rows: how much a rounding of x can move z, and a rounding
        of z x. None without Jacobians, or beyond float64's range.
    float64_round_trip
        The relative error of `round_trip` in a float64 copy of the flow, of the row where it is worst and of those
        drawn for Jacobians.
    round_trip_bound
        Bound on the relative `round_trip` error, to first order in the dtype's epsilon, of every row that stays where
        these rows were seen in each layer; derived from the weights' norms, and usually far too large. None where it is
        not finite, and for arithmetic that is rounded on purpose (tf32, bfloat16).
    flow
        The flow in one line.
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

    def __repr__(self) -> str:
        """Return the table."""
        errors = {
            "x -> z -> x": self.round_trip,
            "z -> x -> z, not judged": self.latent_round_trip,
            "log p against float64": self.log_prob,
            f"log_det against {self.jacobian_rows} Jacobians": self.log_det,
        }
        bound = "none" if self.round_trip_bound is None else f"{self.round_trip_bound:.1e}"
        double = "not measured" if self.float64_round_trip is None else f"{self.float64_round_trip:.1e}"
        resolution = "not known" if self.input_resolution is None else f"{self.input_resolution:.1e}"
        singular = ["not known" if v is None else f"{v:.3g}" for v in (self.stretch, self.shrink)]
        lines = [
            f"Certificate: {self.verdict}; {self.dtype} promises {self.promised:.0e}, tolerated {self.tolerance:.0e}",
            f"  {self.flow}",
            f"  {_counted(self.rows, 'row')}; {self.nonfinite_rows:,} with NaN or inf"
            f"{_first(self.first_nonfinite_row)}; {self.failed_rows:,} finite ones failed"
            f"{_first(self.first_failed_row)}",
            f"  {'largest error':<32}  relative  absolute  worst row",
            *(f"    {name:<30}  {_columns(error)}" for name, error in errors.items()),
            f"  {'x -> z -> x, worst, in float64':<32}  {double}",
            f"  {'steps of x, in its spread':<32}  {resolution}",
            f"  {'bound on x -> z -> x, by weights':<32}  {bound}",
            f"  {'largest singular values':<32}  dz/dx {singular[0]}, dx/dz {singular[1]}",
            *(f"  * {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table of the errors, and the advice, for notebooks."""
        errors = {
            "x → z → x": self.round_trip,
            "z → x → z, not judged": self.latent_round_trip,
            "log p against float64": self.log_prob,
            f"log_det against {self.jacobian_rows} Jacobians": self.log_det,
        }
        caption = (
            f"Certificate: {self.verdict}; {self.dtype} promises {self.promised:.0e}, tolerated {self.tolerance:.0e}; "
            f"{_counted(self.rows, 'row')}, {self.nonfinite_rows:,} with NaN or inf, {self.failed_rows:,} failed"
        )
        lines = [
            (name, "not measured", "", "")
            if e is None
            else (name, f"{e.relative:.1e}", f"{e.absolute:.1e}", f"{e.row}")
            for name, e in errors.items()
        ]
        advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.advice)
        found = _html.table(caption, ("largest error", "relative", "absolute", "worst row"), lines)
        return found + (f"<ul>{advice}</ul>" if advice else "")

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
        raise ValueError(f"a {cls.__name__} holds {', '.join(sorted(expected))}; got {came}")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _first(row: int | None) -> str:
    return "" if row is None else f" (first: row {row})"


def _columns(error: Deviation | None) -> str:
    if error is None:
        return "not measured"
    return f"{error.relative:>8.1e}  {error.absolute:>8.1e}  {error.row:>9}"


# -------------------------------------------------------------------------------------------------------- measuring


class _Worst:
    """The `Deviation` of rows that come in blocks."""

    def __init__(self) -> None:
        self._found: Deviation | None = None

    def add(self, relative: Array, absolute: Array, rows: Array) -> int | None:
        """Take errors [n] or [n, D] of the rows with these numbers; return the place of a new worst row."""
        if len(rows) == 0:
            return None
        largest = relative.reshape(len(rows), -1).max(axis=1)
        at, known = int(np.argmax(largest)), self._found
        better = known is None or largest[at] > known.relative
        first = Deviation(float(largest[at]), int(rows[at]), 0.0)
        found = first if known is None or better else known
        before = 0.0 if known is None else known.absolute
        self._found = Deviation(found.relative, found.row, max(before, float(absolute.max())))
        return at if better else None

    def found(self) -> Deviation | None:
        return self._found


class Certifier:
    """Takes rows in as many calls of `add` as one likes, and then gives the `Certificate`.

    It works on a copy of the flow, made at the start. Arguments as in `Flow.certify`.
    """

    def __init__(self, flow: Flow, *, tolerance: float = TOLERANCE, jacobian_rows: int | None = None) -> None:
        self._flow = flow.to(flow.device, flow.precision, flow.weights)
        self._reference = self._flow.to("cpu", "float32", "full").astype("float64")
        # Of float64 rows of a float32 flow errors count from the columns' means on, as the standardize layer sees them.
        self._centre = np.zeros(flow.spec.input_size)
        self._promised = PROMISED[flow.spec.dtype]
        self._tolerance = _checks.real("tolerance", tolerance)
        if not self._promised <= self._tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance}, expected a number of at least {self._promised:g}")
        self._wanted = self._affordable() if jacobian_rows is None else _checks.integer("jacobian_rows", jacobian_rows)
        if self._wanted < 0:
            raise ValueError(f"jacobian_rows is {jacobian_rows}, expected at least 0")
        self._walk = _bound.Walk(self._reference)
        self._std = _standard_deviations(self._reference)
        self.rows = self._nonfinite = self._failed = 0
        self._first_nonfinite: int | None = None
        self._first_failed: int | None = None
        self._digits = _data.Digits(flow.spec.input_size)
        self._round_trip, self._latent, self._log_prob = _Worst(), _Worst(), _Worst()
        self._largest = self._judged_log_det = 0.0
        columns = self._flow.spec.input_size
        self._random = np.random.default_rng(0)
        self._keys = np.empty(0)  # of the rows drawn so far: those with the smallest keys
        self._drawn = np.empty((0, columns), self._flow.spec.dtype)
        self._drawn_rows = np.empty(0, np.int64)
        self._worst = self._drawn[:0]
        self._worst_row = self._drawn_rows[:0]

    def _affordable(self) -> int:
        columns = self._flow.spec.input_size
        cost = columns * _VJP_COST * self._flow.num_parameters + 4 * columns**3  # determinant, singular values
        if cost > _LARGEST_JACOBIAN_FLOPS:
            return 0
        return max(1, min(_MOST_JACOBIANS, int(_JACOBIAN_FLOPS / cost)))

    def add(self, rows: Array) -> None:
        """Measure rows [n, D] of the flow's dtype, or of float64 where the flow takes that; all of one dtype."""
        if self.rows == 0 and rows.dtype != self._flow.spec.dtype:
            self._count_from_means()
        step = max(1, _BLOCK_VALUES // self._flow.spec.input_size)
        for first in range(0, len(rows), step):
            # What overflows is looked for and counted.
            with np.errstate(all="ignore"):
                self._add_block(rows[first : first + step])

    def _count_from_means(self) -> None:
        parameters = dict(self._reference.parameters())
        self._centre = parameters["standardize_0.mean"].copy()
        self._reference.set_parameters(parameters | {"standardize_0.mean": np.zeros_like(self._centre)})
        self._walk = _bound.Walk(self._reference)
        self._drawn = self._worst = np.empty((0, len(self._centre)))

    def _add_block(self, x: Array) -> None:
        numbers = np.arange(self.rows, self.rows + len(x))
        keys = self._random.random(len(x))
        self.rows += len(x)
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            self._nonfinite += int(np.count_nonzero(~finite))
            self._first_nonfinite = _earlier(self._first_nonfinite, numbers[~finite])
            x, numbers, keys = x[finite], numbers[finite], keys[finite]
        if len(x) == 0:
            return
        wide = x.astype(np.float64) - self._centre
        self._digits.add(x)
        z, log_det = self._flow.forward(x)
        back = self._flow.inverse(z, dtype=x.dtype)
        again, _ = self._flow.forward(back)
        log_prob, expected = self._flow.log_probability(x), self._walk.log_prob(wide)
        good = np.isfinite(log_det) & np.isfinite(log_prob) & np.isfinite(expected)
        for results in (z, back, again):
            good &= np.isfinite(results).all(axis=1)
        if not good.all():
            self._failed += int(np.count_nonzero(~good))
            self._first_failed = _earlier(self._first_failed, numbers[~good])
            x, wide, z, back, again = x[good], wide[good], z[good], back[good], again[good]
            log_prob, expected, numbers, keys = log_prob[good], expected[good], numbers[good], keys[good]
        if len(x) == 0:
            return
        self._largest = max(self._largest, float((np.abs(wide) / self._std).max()))
        at = self._round_trip.add(*self._round_trip_errors(wide, back - self._centre), numbers)
        if at is not None:
            self._worst, self._worst_row = x[at : at + 1].copy(), numbers[at : at + 1]
        error = np.abs(again.astype(np.float64) - z)
        self._latent.add(error / (1 + np.abs(z)), error, numbers)
        error = np.abs(log_prob - expected)
        self._log_prob.add(error / (1 + np.abs(expected)), error, numbers)
        self._draw(x, numbers, keys)

    def _round_trip_errors(self, x: Array, back: Array) -> tuple[Array, Array]:
        error = np.abs(back - x)
        return error / (self._std + np.abs(x)), error / self._std

    def _draw(self, x: Array, numbers: Array, keys: Array) -> None:
        """Keep the rows with the smallest keys: a uniform draw without replacement, whatever the blocks are."""
        if self._wanted == 0:
            return
        if len(self._keys) == self._wanted:
            candidates = keys < self._keys.max()
            x, numbers, keys = x[candidates], numbers[candidates], keys[candidates]
        keys = np.concatenate([self._keys, keys])
        kept = np.argsort(keys, kind="stable")[: self._wanted]
        self._keys = keys[kept]
        self._drawn = np.concatenate([self._drawn, x])[kept]
        self._drawn_rows = np.concatenate([self._drawn_rows, numbers])[kept]

    # -- the end

    def certificate(self) -> Certificate:
        """Return what was found so far; ValueError where there were no rows."""
        if self.rows == 0:
            raise ValueError("x has no rows, expected at least one: there is nothing to measure")
        flow, spec = self._flow, self._flow.spec
        rounded = flow.precision != "float32" or flow.weights != "full"
        resolution = self._digits.resolution(self._std if spec.standardize else np.zeros(spec.input_size))
        labels = _frames.labels(flow._column_names(), spec.input_size)
        known = resolution[np.isfinite(resolution)]
        found: dict[str, Any] = {
            "promised": self._promised,
            "tolerance": self._tolerance,
            "rows": self.rows,
            "nonfinite_rows": self._nonfinite,
            "first_nonfinite_row": self._first_nonfinite,
            # The sums behind it depend on the blocks' sizes in the last digits.
            "input_resolution": float(f"{known.max():.6g}") if known.size else None,
            "blurred_columns": tuple(labels[j] for j in np.flatnonzero(resolution > _data.COARSE)),
            "failed_rows": self._failed,
            "first_failed_row": self._first_failed,
            "round_trip": self._round_trip.found(),
            "latent_round_trip": self._latent.found(),
            "log_prob": self._log_prob.found(),
            **self._jacobians(),
            "round_trip_bound": None if rounded else self._walk.bound(float(np.finfo(spec.dtype).eps)),
            "flow": repr(flow),
            "dtype": spec.dtype,
            "device": flow.device,
            "precision": flow.precision,
            "weights": flow.weights,
            "cpu_isa": _core.cpu_isa(),
            "version": _core.__version__,
            "parameters_sha256": _sha256(flow),
        }
        verdict = self._verdict(found)
        return Certificate(verdict=verdict, advice=tuple(self._advice(verdict, found)), **found)

    def _jacobians(self) -> dict[str, Any]:
        """Compare log-determinants of the drawn rows and the worst one, and take those through float64."""
        fresh = ~np.isin(self._worst_row, self._drawn_rows)
        x = np.concatenate([self._drawn, self._worst[fresh]])
        numbers = np.concatenate([self._drawn_rows, self._worst_row[fresh]])
        worst, measured, resolution, stretch, shrink = _Worst(), 0, 0.0, 0.0, 0.0
        self._judged_log_det = 0.0
        columns = self._flow.spec.input_size
        constant = float(np.log(self._std).sum())
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64) - self._centre
            _, computed = self._flow.forward(x)
            for row, log_det, number in zip(wide, computed, numbers, strict=True) if self._wanted else ():
                jacobian, _ = self._reference.vjp(np.tile(row, (columns, 1)), np.eye(columns))
                jacobian *= self._std  # of z with respect to x in units of its standard deviations
                expected = np.linalg.slogdet(jacobian)[1] - constant
                if not np.isfinite(expected):  # beyond the range of float64: nothing to compare with
                    continue
                measured += 1
                singular = np.linalg.svd(jacobian, compute_uv=False)
                stretch = max(stretch, float(singular[0]))
                shrink = max(shrink, float(1 / singular[-1]))
                own = columns * float(np.finfo(np.float64).eps * singular[0] / singular[-1])
                resolution = max(resolution, own)
                error = np.array([abs(float(log_det) - expected)])
                relative = error / (1 + abs(expected))
                worst.add(relative, error, np.array([number]))
                if relative[0] > own:
                    self._judged_log_det = max(self._judged_log_det, float(relative[0]))
            back = self._reference.inverse(self._reference.forward(wide)[0])
            errors = self._round_trip_errors(wide, back)[0]
        return {
            "log_det": worst.found(),
            "jacobian_rows": measured,
            "jacobian_resolution": _finite(resolution) if measured else None,
            "stretch": _finite(stretch) if measured else None,
            "shrink": _finite(shrink) if measured else None,
            "float64_round_trip": float(errors.max()) if len(x) and np.isfinite(errors).all() else None,
        }

    def _verdict(self, found: Mapping[str, Any]) -> str:
        errors = [found[name].relative for name in ("round_trip", "log_prob") if found[name] is not None]
        errors.append(self._judged_log_det)
        if found["failed_rows"] or found["round_trip"] is None or max(errors) > self._tolerance:
            return "unreliable"
        if found["blurred_columns"] and found["input_resolution"] > self._tolerance:
            return "unreliable"
        return "accurate" if max(errors) <= self._promised and not found["blurred_columns"] else "reduced"

    def _exact(self, found: Mapping[str, Any]) -> bool:
        """Tell whether the arithmetic is what was promised, whatever the rows are."""
        errors = [found[name].relative for name in ("round_trip", "log_prob") if found[name] is not None]
        return bool(errors) and not found["failed_rows"] and max(*errors, self._judged_log_det) <= self._promised

    def _advice(self, verdict: str, found: Mapping[str, Any]) -> list[str]:
        spec, advice = self._flow.spec, []
        if self._nonfinite:
            advice.append(
                f"{_counted(self._nonfinite, 'row')} with NaN or infinity{_first(self._first_nonfinite)}: the results "
                "are NaN; remove or repair them."
            )
        if self._failed:
            advice.append(
                f"{_counted(self._failed, 'finite row')}{_first(self._first_failed)} overflowed: far outside the data "
                f"that the flow was trained on, or beyond what {spec.dtype} holds."
            )
        if blurred := found["blurred_columns"]:
            shown = ", ".join(blurred[:5]) + (f" and {len(blurred) - 5} more" if len(blurred) > 5 else "")
            advice.append(
                f"The rows have lost digits before they came, in {shown}: neighbouring numbers are "
                f"{found['input_resolution']:.1g} standard deviations apart. Subtract an offset in float64 before "
                "rounding, in training and here; however exactly the flow computes, its density is of what is left."
            )
        if verdict == "accurate" or self._exact(found):
            return advice
        if found["precision"] != "float32" or found["weights"] != "full":
            advice.append(
                f"The flow rounds on purpose (precision={found['precision']!r}, weights={found['weights']!r}): "
                "certify it with 'float32' and 'full' to see the model's own part."
            )
        if self._largest > 100 and not spec.standardize:
            advice.append(
                f"The data reach {self._largest:.3g}: bring them to unit scale, or train with a standardize layer."
            )
        double = found["float64_round_trip"]
        if spec.dtype == "float32" and double is not None and double <= self._tolerance:
            when = "Use float64" if verdict == "unreliable" else "Where that is not enough, use float64"
            advice.append(
                f"{when}, in which the worst row's round trip is off by {double:.1e} or less: flow.astype('float64'), "
                "or train with dtype='float64'."
            )
        if verdict == "unreliable":
            advice.append(
                f"The model is ill-conditioned on these rows. Train it with a lower scale_bound (now "
                f"{spec.scale_bound:g}), weight_decay, fewer couplings (now {spec.num_flows}), or max_round_trip, "
                "which keeps the best epoch that can be inverted."
            )
        return advice


def _sha256(flow: Flow) -> str:
    parameters, mean_low = flow._copy_state()
    return hashlib.sha256(parameters.tobytes() + (b"" if mean_low is None else mean_low.tobytes())).hexdigest()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _earlier(known: int | None, rows: Array) -> int:
    return int(rows[0]) if known is None else known


def _standard_deviations(flow: Flow) -> Array:
    """Return the units of x [D]: of a standardize layer that comes first, else ones."""
    log_std = flow.parameters().get("standardize_0.log_std")
    return np.ones(flow.spec.input_size) if log_std is None else np.exp(log_std)
