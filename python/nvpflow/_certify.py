"""Measures how exactly a flow computes: on rows, beside a float64 copy, and by the determinants of its Jacobians."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _bases, _bound, _bounds, _checks, _context, _core, _data, _frames, _spec
from nvpflow._model import Model
from nvpflow._text import counted
from nvpflow.certificate import PROMISED, TOLERANCE, Certificate, Deviation, first

Array = NDArray[Any]

_BLOCK_VALUES = 1 << 18
_JACOBIAN_FLOPS = 2e10  # for all Jacobians, a few seconds of one core
_LARGEST_JACOBIAN_FLOPS = 1e12  # where one takes minutes, none is formed unless asked for
_MOST_JACOBIANS = 64
_VJP_COST = 6  # FLOPs per parameter and row
_TAMER = {"scale bound": "a lower scale_bound", "splines": "fewer bins"}  # options by what tables call them


def certify(
    flow: Model, x: ArrayLike, *, context: ArrayLike | None, tolerance: float, jacobian_rows: int | None
) -> Certificate:
    """Measure `flow` on rows [N, D] or one row; `Flow.certify` documents the arguments."""
    given, _ = _frames.read("x", x, flow._column_names())
    rows = _checks.rows("x", _core._host_array(given), flow.spec, one_row=True)
    contexts = _context.rows(context, len(rows), flow.spec, names=flow._context_names())
    certifier = Certifier(flow, tolerance=tolerance, jacobian_rows=jacobian_rows)
    certifier.add(rows, contexts)
    return certifier.certificate()


def _widened(contexts: Array | None) -> Array | None:
    return None if contexts is None else contexts.astype(np.float64)


def _joined(parts: Iterable[Array | None]) -> Array | None:
    """Return contexts that may be none, one behind the other."""
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


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

    def __init__(self, flow: Model, *, tolerance: float = TOLERANCE, jacobian_rows: int | None = None) -> None:
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
        self._walk = _bound.walk(self._reference)
        self._bounds = _spec.bounds_of(flow.spec)
        self._middle, self._std = _units(self._reference)
        self._standardizes = _spec.begins_with_standardize(flow.spec)
        self.rows = self._nonfinite = self._failed = self._outside = self._beyond = 0
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
        size = self._flow.spec.context_size
        self._drawn_contexts = np.empty((0, size), self._flow.spec.dtype) if size else None
        self._worst_context = self._drawn_contexts

    def _affordable(self) -> int:
        columns = self._flow.spec.input_size
        cost = columns * _VJP_COST * self._flow.num_parameters + 4 * columns**3  # determinant, singular values
        if cost > _LARGEST_JACOBIAN_FLOPS:
            return 0
        return max(1, min(_MOST_JACOBIANS, int(_JACOBIAN_FLOPS / cost)))

    def add(self, rows: Array, contexts: Array | None = None) -> None:
        """Measure rows [n, D] of the flow's dtype, or of float64 where the flow takes that; all of one dtype.

        contexts: [n, C] of the flow's dtype, of a flow with a context.
        """
        if self.rows == 0 and rows.dtype != self._flow.spec.dtype:
            self._drawn = self._worst = np.empty((0, len(self._centre)))
            if self._bounds is None:
                self._count_from_means()
        step = max(1, _BLOCK_VALUES // self._flow.spec.input_size)
        for start in range(0, len(rows), step):
            # What overflows is looked for and counted.
            with np.errstate(all="ignore"):
                part = slice(start, start + step)
                self._add_block(rows[part], None if contexts is None else contexts[part])

    def _count_from_means(self) -> None:
        parameters = dict(self._reference.parameters())
        self._centre = parameters["standardize_0.mean"].copy()
        self._reference.set_parameters(parameters | {"standardize_0.mean": np.zeros_like(self._centre)})
        self._walk = _bound.walk(self._reference)

    def _add_block(self, x: Array, contexts: Array | None) -> None:
        numbers = np.arange(self.rows, self.rows + len(x))
        keys = self._random.random(len(x))
        self.rows += len(x)
        finite = np.isfinite(x).all(axis=1)
        if contexts is not None:
            finite &= np.isfinite(contexts).all(axis=1)
        if not finite.all():
            self._nonfinite += int(np.count_nonzero(~finite))
            self._first_nonfinite = _earlier(self._first_nonfinite, numbers[~finite])
            x, numbers, keys = x[finite], numbers[finite], keys[finite]
            contexts = None if contexts is None else contexts[finite]
        if self._bounds is not None:
            inside = _bounds.contains(self._bounds, x).all(axis=1)
            self._beyond += int(np.count_nonzero(~inside))
            x, numbers, keys = x[inside], numbers[inside], keys[inside]
            contexts = None if contexts is None else contexts[inside]
        if len(x) == 0:
            return
        wide = x.astype(np.float64) - self._centre
        self._digits.add(x)
        z, log_det = self._flow.forward(x, context=contexts)
        back = self._flow.inverse(z, dtype=x.dtype, context=contexts)
        again, _ = self._flow.forward(back, context=contexts)
        log_prob = self._flow.log_probability(x, context=contexts)
        expected = self._walk.log_prob(wide, _widened(contexts))
        outside = np.zeros(len(x), np.bool_)
        if self._flow.spec._is_bounded:  # at an edge also of one of them only
            outside = np.isneginf(log_prob) | np.isneginf(expected)
        good = np.isfinite(log_det) & (outside | (np.isfinite(log_prob) & np.isfinite(expected)))
        for results in (z, back, again):
            good &= np.isfinite(results).all(axis=1)
        if not good.all():
            self._failed += int(np.count_nonzero(~good))
            self._first_failed = _earlier(self._first_failed, numbers[~good])
            x, wide, z, back, again = x[good], wide[good], z[good], back[good], again[good]
            log_prob, expected, numbers, keys = log_prob[good], expected[good], numbers[good], keys[good]
            outside = outside[good]
            contexts = None if contexts is None else contexts[good]
        if len(x) == 0:
            return
        self._largest = max(self._largest, float((np.abs(wide) / self._std).max()))
        at = self._round_trip.add(*self._round_trip_errors(wide, back - self._centre), numbers)
        if at is not None:
            self._worst, self._worst_row = x[at : at + 1].copy(), numbers[at : at + 1]
            self._worst_context = None if contexts is None else contexts[at : at + 1].copy()
        error = np.abs(again.astype(np.float64) - z)
        self._latent.add(error / (1 + np.abs(z)), error, numbers)
        self._outside += int(np.count_nonzero(outside))
        log_prob, expected = log_prob[~outside], expected[~outside]
        error = np.abs(log_prob - expected)
        self._log_prob.add(error / (1 + np.abs(expected)), error, numbers[~outside])
        self._draw(x, contexts, numbers, keys)

    def _round_trip_errors(self, x: Array, back: Array) -> tuple[Array, Array]:
        error = np.abs(back - x)
        return error / (self._std + np.abs(x - self._middle)), error / self._std

    def _draw(self, x: Array, contexts: Array | None, numbers: Array, keys: Array) -> None:
        """Keep the rows with the smallest keys: a uniform draw without replacement, whatever the blocks are."""
        if self._wanted == 0:
            return
        if len(self._keys) == self._wanted:
            candidates = keys < self._keys.max()
            x, numbers, keys = x[candidates], numbers[candidates], keys[candidates]
            contexts = None if contexts is None else contexts[candidates]
        keys = np.concatenate([self._keys, keys])
        kept = np.argsort(keys, kind="stable")[: self._wanted]
        self._keys = keys[kept]
        self._drawn = np.concatenate([self._drawn, x])[kept]
        self._drawn_rows = np.concatenate([self._drawn_rows, numbers])[kept]
        drawn = _joined((self._drawn_contexts, contexts))
        self._drawn_contexts = None if drawn is None else drawn[kept]

    # -- the end

    def certificate(self) -> Certificate:
        """Return what was found so far; ValueError where there were no rows."""
        if self.rows == 0:
            raise ValueError("x has no rows, expected at least one: there is nothing to measure")
        flow, spec = self._flow, self._flow.spec
        bound, why_none = self._walk.bound(float(np.finfo(spec.dtype).eps))
        if flow.precision != "float32" or flow.weights != "full":
            bound, why_none = None, "the flow rounds on purpose"
        resolution = self._digits.resolution(self._std if self._standardizes else np.zeros(spec.input_size))
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
            "round_trip_bound": bound,
            "no_bound": why_none,
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
        contexts = _joined((self._drawn_contexts, self._worst_context if fresh.any() else None))
        wide_contexts = _widened(contexts)
        worst, measured, resolution, stretch, shrink = _Worst(), 0, 0.0, 0.0, 0.0
        self._judged_log_det = 0.0
        columns = self._flow.spec.input_size
        constant = float(np.log(self._std).sum())
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64) - self._centre
            _, computed = self._flow.forward(x, context=contexts)
            for i, (row, log_det, number) in enumerate(zip(wide, computed, numbers, strict=True)):
                if self._wanted == 0:  # of the worst row neither
                    break
                of_row = None if wide_contexts is None else wide_contexts[i]
                tiled = np.tile(row, (columns, 1))
                jacobian = self._reference.vjp(tiled, np.eye(columns), wrt="x", context=of_row)[0]
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
            latents, _ = self._reference.forward(wide, context=wide_contexts)
            back = self._reference.inverse(latents, context=wide_contexts)
            errors = self._round_trip_errors(wide, back)[0]
        return {
            "log_det": worst.found(),
            "jacobian_rows": measured,
            "jacobian_resolution": _finite(resolution) if measured else None,
            "stretch": _finite(stretch) if measured else None,
            "shrink": _finite(shrink) if measured else None,
            "float64_round_trip": float(errors.max()) if len(x) and np.isfinite(errors).all() else None,
        }

    def _errors(self, found: Mapping[str, Any]) -> list[float]:
        """Return the relative errors that are judged."""
        errors = [found[name].relative for name in ("round_trip", "log_prob") if found[name] is not None]
        return [*errors, self._judged_log_det]

    def _verdict(self, found: Mapping[str, Any]) -> str:
        errors = self._errors(found)
        if found["failed_rows"] or found["round_trip"] is None or max(errors) > self._tolerance:
            return "unreliable"
        if found["blurred_columns"] and found["input_resolution"] > self._tolerance:
            return "unreliable"
        return "accurate" if max(errors) <= self._promised and not found["blurred_columns"] else "reduced"

    def _exact(self, found: Mapping[str, Any]) -> bool:
        """Tell whether the arithmetic is what was promised, whatever the rows are."""
        if found["round_trip"] is None or found["failed_rows"]:
            return False
        return max(self._errors(found)) <= self._promised

    def _advice(self, verdict: str, found: Mapping[str, Any]) -> list[str]:
        advice = self._advice_on_rows(found)
        exact = verdict == "accurate" or self._exact(found)
        return advice if exact else advice + self._advice_on_flow(verdict, found)

    def _advice_on_rows(self, found: Mapping[str, Any]) -> list[str]:
        spec, advice = self._flow.spec, []
        if self._nonfinite:
            advice.append(
                f"{counted(self._nonfinite, 'row')} with NaN or infinity{first(self._first_nonfinite)}: the results "
                "are NaN; remove or repair them."
            )
        if self._failed:
            advice.append(
                f"{counted(self._failed, 'finite row')}{first(self._first_failed)} overflowed: far outside the data "
                f"that the flow was trained on, or beyond what {spec.dtype} holds."
            )
        if self._outside:
            advice.append(
                f"{counted(self._outside, 'row')} outside of the base, whose latents are {_bases.in_words(spec.base)}, "
                "or at its edge: the density is 0 there, and there is no log p to compare."
            )
        if self._beyond:
            no_integers = ", no integers in discrete ones," if self._bounds and self._bounds.discrete else ""
            advice.append(
                f"{counted(self._beyond, 'row')} outside the bounds of their columns{no_integers} or on an edge: the "
                "density is 0 there, and nothing was measured."
            )
        if blurred := found["blurred_columns"]:
            shown = ", ".join(blurred[:5]) + (f" and {len(blurred) - 5} more" if len(blurred) > 5 else "")
            advice.append(
                f"The rows have lost digits before they came, in {shown}: neighbouring numbers are "
                f"{found['input_resolution']:.1g} standard deviations apart. Subtract an offset in float64 before "
                "rounding, in training and here; however exactly the flow computes, its density is of what is left."
            )
        return advice

    def _advice_on_flow(self, verdict: str, found: Mapping[str, Any]) -> list[str]:
        spec, advice = self._flow.spec, []
        if found["precision"] != "float32" or found["weights"] != "full":
            advice.append(
                f"The flow rounds on purpose (precision={found['precision']!r}, weights={found['weights']!r}): "
                "certify it with 'float32' and 'full' to see the model's own part."
            )
        if self._largest > 100 and not self._standardizes:
            way = "" if spec._is_bounded else ", or train with a standardize layer"
            advice.append(f"The data reach {self._largest:.3g}: bring them to unit scale{way}.")
        if _spec.splines(spec) and not found["failed_rows"] and found["round_trip"] is not None:
            digits = math.floor(-math.log10(max(self._errors(found))))
            advice.append(
                f"{spec.dtype} keeps {counted(max(0, digits), 'digit')} on these rows: splines multiply rounding where "
                "they are steep, in any implementation."
            )
        double = found["float64_round_trip"]
        if spec.dtype == "float32" and double is not None and double <= self._tolerance:
            when = "Use float64" if verdict == "unreliable" else "Where that is not enough, use float64"
            advice.append(
                f"{when}, in which the worst row's round trip is off by {double:.1e} or less: flow.astype('float64'), "
                "or train with dtype='float64'."
            )
        if verdict == "unreliable":
            words = _spec.in_words(spec)
            tamer = [f"{option} (now {words[name]})" for name, option in _TAMER.items() if name in words]
            advice.append(
                f"The model is ill-conditioned on these rows. Train it with {', '.join(tamer)}, weight_decay, fewer "
                f"couplings (now {spec.num_flows}), or max_round_trip, which keeps the best epoch that can be inverted."
            )
        return advice


def _sha256(flow: Model) -> str:
    import hashlib  # loads OpenSSL: an eighth of what importing nvpflow would cost

    parameters, mean_low = flow._copy_state()
    return hashlib.sha256(parameters.tobytes() + (b"" if mean_low is None else mean_low.tobytes())).hexdigest()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _earlier(known: int | None, rows: Array) -> int:
    return int(rows[0]) if known is None else known


def _units(flow: Model) -> tuple[Array, Array]:
    """Return where errors count from [D], and the units of x [D]: of a standardize layer that comes first, else ones.

    Behind bounds the former is what the mean comes from, else 0.
    """
    parameters, name, bounds = flow.parameters(), _spec.standardize_name(flow.spec), _spec.bounds_of(flow.spec)
    mean, std = np.zeros(flow.spec.input_size), np.ones(flow.spec.input_size)
    if _spec.begins_with_standardize(flow.spec):
        std = np.exp(parameters[f"{name}.log_std"])
        mean = mean if bounds is None else parameters[f"{name}.mean"]
    return _bounds.in_front(bounds, mean, std)
