"""A page about a flow: how well it explains data, how normal its latents are, how exactly it inverts.

`html` returns the page and ``nvpflow report`` writes it. It is one file with everything in it: no script, no address,
the pictures inline, each once for light and once for dark ground. Needs Matplotlib (``pip install matplotlib``).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _context, _core, _frames, _html, _spec
from nvpflow._bases import NORMAL, Base, Normal, in_words
from nvpflow._blame import blame
from nvpflow._core import FlowSpec, __version__, cpu_isa
from nvpflow._findings import Findings, Rows, examine
from nvpflow._text import counted
from nvpflow.flow import Flow
from nvpflow.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["html"]

Array = NDArray[Any]

CORNER_COLUMNS, CORNER_CONTEXTS = 8, 3  # at most so many, and so many of them of a context
OUTLIERS = 10
_TIMES = "\N{MULTIPLICATION SIGN}"
SMALL, SQUARE = (4.5, 3.5), (4.5, 4.1)  # inches; nearly the width they are shown at, so that letters keep their size


def html(
    flow: Flow,
    data: ArrayLike,
    *,
    context: ArrayLike | None = None,
    train: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    history: History | None = None,
    names: Sequence[str] | None = None,
    context_names: Sequence[str] | None = None,
    title: str = "A flow and its data",
    details: Mapping[str, str] | None = None,
) -> str:
    """Return a page about a flow and rows of data, best rows that it was not trained on.

    Parameters
    ----------
    flow
        The flow.
    data
        Rows [N, D], of the flow's dtype or one that NumPy converts to it safely; at least 10 of them finite. Rows with
        NaN or infinite values are counted on the page and left out. A frame must have the flow's `column_names`, where
        it has some.
    context
        Of a flow with a context: [N, C], or [C] for all rows. Samples are drawn under these contexts.
    train
        The rows [M, D] that the flow was trained on; with a context a tuple (rows [M, D], context [M, C]). The Gaussian
        beside the flow is fitted to them; its mean is then linear in the context. None: it is fitted to one half of
        `data` and scored on the other, in turns.
    history
        What `nvpflow.Flow.fit` returned, for the learning curve.
    names
        Of the D columns. None: those of a frame, else the flow's.
    context_names
        Of the C numbers of a context. None: likewise.
    title
        Of the page.
    details
        More lines of the model card, such as the names of files.

    Returns
    -------
    str
        HTML 5, self-contained.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described; the message names it.
    ImportError
        Matplotlib is not installed.
    """
    rows, known = _read("data", data, flow)
    table = Rows(rows, _context.rows(context, len(rows), flow.spec, names=flow.context_names))
    reference = None if train is None else _training_rows(flow, train)
    frame = _frames.inspect(context)
    of_context = flow.context_names if frame is None or frame.names is None else frame.names
    of_columns = _names("names", names, known, flow.spec.input_size, "column")
    of_context = _names("context_names", context_names, of_context, flow.spec.context_size, "number of a context")
    findings = examine(flow, table, reference, of_columns, of_context)
    return _page(flow, findings, history, title, details or {})


def _read(name: str, table: ArrayLike, flow: Flow) -> tuple[Array, Sequence[str] | None]:
    """Return rows [N, D] and the names of their columns: those of a frame, else the flow's."""
    given, of_frame = _frames.read(name, table, flow.column_names)
    return _checks.rows(name, _core._host_array(given), flow.spec), of_frame or flow.column_names


def _training_rows(flow: Flow, train: ArrayLike | tuple[ArrayLike, ArrayLike]) -> Rows:
    """Return the rows that were trained on, those that are finite."""
    given: Any = train
    contexts = None
    if flow.spec.context_size:
        if not isinstance(train, tuple) or len(train) != 2:
            raise ValueError("train holds rows without their context, expected a tuple (rows, context)")
        given, contexts = train
    rows, _ = _read("train", given, flow)
    name = "the context of train"
    found = Rows(rows, _context.rows(contexts, len(rows), flow.spec, name, names=flow.context_names, one_for_all=False))
    return found.those(found.finite())


def _names(
    argument: str, names: Sequence[str] | None, known: Sequence[str] | None, count: int, each: str
) -> list[str] | None:
    """Return the names that are given, else those that are known; None where there are none."""
    given = known if names is None else names
    if given is None:
        return None
    if isinstance(given, str) or len(given) != count:
        raise ValueError(f"{argument} is {_checks.describe(given)}, expected {count} names, one for each {each}")
    return [str(name) for name in given]


# -------------------------------------------------------------------------------------------------------- pictures


@dataclass
class Picture:
    """A drawing, what it is called, what it shows in words, and how to read it."""

    title: str
    alt: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any], object]
    grid: int = 1  # panels on a side

    def figure(self) -> str:
        """Return the HTML of both renderings, of which the page's style shows one."""
        try:
            light, dark = (_drawn(self, dark=dark) for dark in (False, True))
        except ValueError as error:  # of nvpflow.plot: what this data cannot show
            return f'<p class="note">{escape(self.title)}: not drawn. {escape(str(error))}.</p>'
        kind = "wide" if self.grid > 1 else "plain"
        scroll = f' role="region" tabindex="0" aria-label="{escape(self.title)}, scrollable"' if self.grid > 1 else ""
        width = f"max-width:{self.size[0] * 6:.1f}rem"  # where letters have their size
        images = "".join(
            f'<img class="{ground}" style="{width}" alt="{escape(self.alt)}" src="{address}">'
            for ground, address in (("light", light), ("dark", dark))
        )
        heading = f"<strong>{escape(self.title)}.</strong> {escape(self.caption)}"
        frame = f'<div class="frame"{scroll}>{images}</div>'
        return f'<figure class="{kind}">{frame}<figcaption>{heading}</figcaption></figure>'


def _drawn(picture: Picture, *, dark: bool) -> str:
    """Return a drawing as the address of an inline picture."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nvpflow import plot

    with plot.style(dark=dark), matplotlib.rc_context({"svg.hashsalt": "nvpflow"}):
        figure: Figure = Figure(figsize=picture.size, dpi=190, layout=None if picture.grid > 1 else "constrained")
        canvas: Any = FigureCanvasAgg(figure)
        picture.draw(_panels(figure, picture.grid) if picture.grid > 1 else figure.subplots())
        if picture.grid > 1:
            canvas.draw()
            return _address("image/png", _png(np.asarray(canvas.buffer_rgba())))
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _address("image/svg+xml", file.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _png(pixels: Array) -> bytes:
    """Return a PNG of 64 colours: a fifth of the size, where thousands of points lie, and no difference to be seen."""
    from PIL import Image  # Matplotlib brings it

    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    few = image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    file = io.BytesIO()
    few.save(file, "png", optimize=True)
    return file.getvalue()


def _panels(figure: Figure, count: int) -> NDArray[np.object_]:
    from nvpflow import plot

    grid = figure.add_gridspec(count, count, **plot.corner_margins(figure.get_figwidth()))
    panels = np.full((count, count), None, dtype=object)
    for i, j in np.argwhere(np.tri(count)).tolist():
        panels[i, j] = figure.add_subplot(grid[i, j])
    return panels


def _likelihood_picture(found: Findings) -> Picture:
    from nvpflow import plot

    names = [f"row {number}" for number in found.numbers[plot.least_likely(found.log_p, 5)]]
    finite = found.log_p[found.scored]

    def draw(ax: Axes) -> None:
        reference = {"samples of the flow": found.samples_log_p} if np.isfinite(found.samples_log_p).any() else {}
        plot.log_likelihood(found.log_p, reference=reference, names=_Numbered(found.numbers), ax=ax)

    return Picture(
        "Log-likelihood of the rows",
        f"Histogram of log p of {len(found.log_p):,} rows: median {_nats(np.median(finite), 2)}, from "
        f"{_nats(finite.min(), 2)} to {_nats(finite.max(), 2)} nats. Least likely are {', '.join(names)}.",
        "Where the flow has learnt the distribution of the data, the histogram of the data and that of the flow's own "
        "samples agree.",
        SMALL,
        draw,
    )


class _Numbered(Sequence[str]):
    """Names of rows, made when they are asked for: there may be millions."""

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return f"row {self._numbers[index]}"


def _corner_picture(found: Findings) -> Picture:
    from nvpflow import plot

    count = len(found.names)
    worst = np.argsort(-found.distance, kind="stable")
    contexts = found.context_names[:CORNER_CONTEXTS]
    chosen = sorted(worst[: CORNER_COLUMNS - len(contexts)].tolist())
    which = "" if len(chosen) == count else f" The {len(chosen)} of {count} columns in which they differ most."
    if contexts:
        last = "last column shows" if len(contexts) == 1 else f"last {len(contexts)} columns show"
        part = "which" if len(contexts) == len(found.context_names) else "the first numbers of which"
        which += f" Each sample is drawn under the context of a row, {part} the {last}."
    chosen += range(count, count + len(contexts))
    tables = [
        rows if context is None else np.hstack([rows, context[:, : len(contexts)]])
        for rows, context in ((found.rows, found.contexts), (found.samples, found.samples_contexts))
    ]
    draw = partial(plot.corner, *tables, names=[*found.names, *contexts], columns=chosen)
    return Picture(
        "Data and samples, column against column",
        f"Scatter plots of every pair of {len(chosen)} columns, data and samples of the flow over each other, and "
        f"histograms on the diagonal. The distributions differ most in {found.names[worst[0]]}, by "
        f"{found.distance[worst[0]]:.3f} (Kolmogorov-Smirnov distance).",
        "Up to 2,000 points of each kind; histograms count all rows, on a logarithmic scale." + which,
        (1.0 + len(chosen) * min(2.0, max(1.35, 9 / len(chosen))),) * 2,
        lambda panels: draw(ax=panels),
        grid=len(chosen),
    )


def _latent_pictures(found: Findings, base: Base) -> list[Picture]:
    from nvpflow import plot

    count = len(found.names)
    scores = "" if isinstance(base, Normal) else f"Latents that should be {in_words(base)}, as normal scores. "
    spread = f"{scores}Standard deviations of the {count} latent dimensions lie between "
    std = found.latents.std(axis=0) if len(found.latents) else np.zeros(1)
    spread += f"{std.min():.3f} and {std.max():.3f}, means between "
    mean = found.latents.mean(axis=0) if len(found.latents) else np.zeros(1)
    spread += f"{_nats(mean.min(), 3)} and {_nats(mean.max(), 3)}."
    with np.errstate(all="ignore"):
        r = np.abs(np.corrcoef(found.latents, rowvar=False)) if len(found.latents) > 2 else np.eye(count)
    strongest = float(np.nan_to_num(r[np.tril_indices(count, -1)]).max())
    return [
        Picture(
            "Latents beside a normal distribution",
            f"Worm plot of the quantiles of {len(found.latents):,} latents. {spread}",
            f"{scores}Distance of the latents' quantiles from the standard normal ones. Lines that leave the band show "
            "what the flow has not learnt: a slope a wrong width, a bow a skew, an S heavy or light tails.",
            SMALL,
            lambda ax: plot.latent_qq(found.latents, names=found.names, ax=ax),
        ),
        Picture(
            "Correlations between latents",
            f"Matrix of the correlations between {count} latent dimensions; the largest in size is {strongest:.3f}.",
            "Independent where the flow is right; “by chance” is the 95 % point of the largest of them then.",
            SQUARE,
            lambda ax: plot.latent_correlation(found.latents, names=found.names, ax=ax),
        ),
    ]


def _curve_picture(history: History, gaussian: float | None) -> Picture:
    from nvpflow import plot

    reference = {} if gaussian is None else {"Gaussian, these rows": gaussian}
    return Picture(
        "Learning curve",
        f"Log-likelihood over {len(history)} epochs; the best is {_nats(-history.best_loss, 3)} nats per row at epoch "
        f"{history.best_epoch}.",
        "The flow has the weights of its best epoch.",
        SMALL,
        lambda ax: plot.learning_curve(history, reference=reference, ax=ax),
    )


# ------------------------------------------------------------------------------------------------------------ page


def _page(flow: Flow, found: Findings, history: History | None, title: str, details: Mapping[str, str]) -> str:
    gaussian = None if found.gaussian is None else float(found.gaussian[found.scored].mean())
    training = "" if history is None else _section("Training", _curve_picture(history, gaussian).figure())
    latents = "".join(picture.figure() for picture in _latent_pictures(found, flow.spec.base))
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(repr(flow))}</p></header>",
        "".join(f'<p class="note">{escape(notice)}</p>' for notice in found.notices),
        _headline(found),
        _section("Model card", _card(flow, found, history, details)),
        _section("Likelihood", f'<div class="pair">{_likelihood_picture(found).figure()}{_comparison(found)}</div>'),
        _section("Least likely rows", _outliers(flow, found)),
        _section("Samples beside the data", _corner_picture(found).figure() + _summary(found)),
        _section("Latents", f'<div class="pair">{latents}</div>'),
        training,
        _section("Invertibility", _invertibility(flow, found)),
        f"<footer><p>Made by nvpflow {escape(__version__)} ({escape(cpu_isa())}). Log-likelihoods are natural "
        "logarithms, in nats; higher is better.</p></footer>",
    ]
    style = resources.files("nvpflow").joinpath("report.css").read_text(encoding="utf-8")
    # Makes sure of what is promised: nothing is fetched and no script runs.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _headline(found: Findings) -> str:
    ours = found.log_p[found.scored]
    tiles = [(_nats(ours.mean(), 3), f"nats per row, ± {_error(ours)}", "mean log-likelihood")]
    if found.gaussian is not None:
        gain = ours - found.gaussian[found.scored]
        sign = "+" if gain.mean() > 0 else ""
        tiles.append((sign + _nats(gain.mean(), 3), f"nats per row, ± {_error(gain)}", "gain over a Gaussian"))
    round_trip = found.certificate.round_trip
    largest = "not measured" if round_trip is None else _scientific(round_trip.relative)
    tiles.append((largest, f"relative, {found.certificate.verdict}", "largest round-trip error"))
    tiles.append((f"{len(found.rows):,}", f"rows of {len(found.names)} columns", "data"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b> <span>{escape(unit)}</span></dd></div>"
        for value, unit, name in tiles
    )
    return f'<dl class="headline">{items}</dl>'


_COUPLINGS = {"scale bound": "Log-scale bound", "splines": "Splines"}


def _card(flow: Flow, found: Findings, history: History | None, details: Mapping[str, str]) -> str:
    spec = flow.spec
    couplings = _spec.in_words(spec, f" {_TIMES} ")
    lines = {
        "Model": f"{'Coupling flow' if _spec.regular(spec) is None else 'RealNVP'}, {_spec.kinds_in_words(spec)}",
        "Conditioner networks": f"hidden layers {couplings['hidden layers']}, {couplings['activation']}",
        **{title: couplings[name] for name, title in _COUPLINGS.items() if name in couplings},
        **({"Bounds": within} if (within := _spec.bounds_in_words(spec, found.names)) else {}),
        "Standardize layer": "yes" if spec.standardize else "no",
        **({} if spec.base == NORMAL else {"Base": f"latents {in_words(spec.base)}"}),
        **({"Context": _context_in_words(spec, found)} if spec.context_size else {}),
        "Parameters": f"{flow.num_parameters:,}, {spec.dtype}",
        **details,
        "Training": _training_line(history),
        "Data": f"{counted(len(found.rows), 'row')} of {found.total:,}, {len(found.names)} columns",
        "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return (
        '<dl class="card">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in lines.items()) + "</dl>"
    )


def _context_in_words(spec: FlowSpec, found: Findings) -> str:
    more = len(found.context_names) - 8
    shown = ", ".join(found.context_names[:8]) + (f" and {more} more" if more > 0 else "")
    return f"{counted(spec.context_size, 'number')}: {shown}{'; standardized' if spec.standardize_context else ''}"


def _training_line(history: History | None) -> str:
    if history is None:
        return "not recorded in the model file; give the history for the learning curve"
    held_out = f"{history.validation_rows:,} validation rows" if history.validation_rows else "no validation rows"
    return (
        f"{counted(len(history), 'epoch')} in {history.seconds.sum():.1f} s on {history.train_rows:,} rows, "
        f"{held_out}; best epoch {history.best_epoch} with {_nats(-history.best_loss, 3)} nats per row; "
        f"stop reason: {history.stop_reason}"
    )


def _comparison(found: Findings) -> str:
    ours = found.log_p[found.scored]
    lines = [("flow", ours)]
    if found.gaussian is not None:
        theirs = found.gaussian[found.scored]
        lines += [("Gaussian", theirs), ("difference", ours - theirs)]
    cells = [(name, _nats(v.mean(), 3), _error(v), _nats(np.median(v), 3)) for name, v in lines]
    table = _table("Log-likelihood in nats per row", ("", "mean", "± s.e.", "median"), cells)
    linear = "" if found.contexts is None else " and a mean that is linear in the context"
    note = (
        f"s.e.: standard error of the mean. Gaussian: with full covariance{linear}, {found.gaussian_source}. "
        "These are held-out figures if the flow was trained on none of these rows, which this page cannot know."
    )
    return f'<div>{table}<p class="caption">{escape(note)}</p></div>'


def _outliers(flow: Flow, found: Findings) -> str:
    from nvpflow import plot

    mean = found.rows.mean(axis=0, dtype=np.float64)
    std = found.rows.std(axis=0, dtype=np.float64)
    std[std == 0] = 1
    chosen = plot.least_likely(found.log_p, OUTLIERS)
    lines = []
    for at, gains in zip(chosen, _blame(flow, found, chosen), strict=True):
        row = found.rows[at]
        scores = (row.astype(np.float64) - mean) / std
        values = [f"{found.names[i]} {_plain(row[i], std[i])} ({_nats(scores[i], 1, '+')})" for i in _farthest(scores)]
        columns = [f"{found.names[i]} {_nats(gains[i], 1, '+')}" for i in _farthest(gains)]
        texts = ["; ".join(values), "; ".join(columns)]
        if found.contexts is not None:
            texts.append(_context_of(found, at))
        lines.append((str(found.numbers[at]), _nats(found.log_p[at], 2), *texts))
    head = ["row", "log p", "values farthest from the mean (in standard deviations)", "columns to blame (nats)"]
    given = "the other columns of the row"
    if found.contexts is not None:
        head.append("context")
        given += " and its context"
    note = (
        f"To blame: by how much log p would rise if that column had its likeliest value, given {given}. "
        "Where two columns do not fit each other, both are blamed."
    )
    table = _table("Rows counted from 0, log p in nats", head, lines, text_from=2)
    return f'{table}<p class="caption">{note}</p>'


def _blame(flow: Flow, found: Findings, chosen: NDArray[Any]) -> Array:
    """Return `blame` of some rows, each under its own context."""
    if found.contexts is None:
        return np.asarray(blame(flow, found.rows[chosen]))
    return np.array([blame(flow.condition(found.contexts[at]), found.rows[at]) for at in chosen])


def _context_of(found: Findings, at: int) -> str:
    """Return the first numbers of a row's context as text."""
    assert found.contexts is not None
    numbers = [f"{float(number):.6g}".replace("-", "\N{MINUS SIGN}") for number in found.contexts[at, :CORNER_CONTEXTS]]
    shown = [f"{name} {number}" for name, number in zip(found.context_names, numbers, strict=False)]
    return "; ".join(shown) + ("; …" if len(found.context_names) > len(shown) else "")


def _farthest(scores: Array) -> list[int]:
    """Return the two largest in size, NaN first."""
    size = np.where(np.isnan(scores), np.inf, np.abs(scores))
    return np.argsort(-size, kind="stable")[:2].tolist()  # type: ignore[no-any-return]


def _summary(found: Findings) -> str:
    head = ("column", "mean", "mean, samples", "std", "std, samples", "least", "median", "largest", "distance")
    data, samples = found.rows, found.samples
    statistics = [
        *(part.mean(axis=0, dtype=np.float64) for part in (data, samples)),
        *(part.std(axis=0, dtype=np.float64) for part in (data, samples)),
        data.min(axis=0),
        np.median(data, axis=0),
        data.max(axis=0),
    ]
    lines = [
        (name, *(_plain(value[i], statistics[2][i]) for value in statistics), f"{found.distance[i]:.3f}")
        for i, name in enumerate(found.names)
    ]
    note = (
        "Distance: Kolmogorov-Smirnov, between the column in the data and in the samples; from 0 to 1, less is better."
    )
    return _table("Columns of the data, and of the flow's samples", head, lines) + f'<p class="caption">{note}</p>'


def _invertibility(flow: Flow, found: Findings) -> str:
    certificate, dtype = found.certificate, flow.spec.dtype
    lines = [
        (name, "not measured", "", "")
        if error is None
        else (name, _scientific(error.relative), _scientific(error.absolute), f"{error.row}")
        for name, error in certificate._errors("\N{RIGHTWARDS ARROW}").items()
    ]
    table = _table("Largest errors", ("", "relative", "absolute", "row"), lines)
    note = (
        f"The certificate of {counted(certificate.rows, 'row')}: {certificate.verdict}. A flow is invertible in exact "
        f"arithmetic; these are the roundings of {dtype}, whose numbers are {_scientific(float(np.finfo(dtype).eps))} "
        f"apart at 1. {dtype} promises relative errors of {_scientific(certificate.promised)}. flow.certify and "
        "nvpflow check give all of it."
    )
    advice = certificate.advice if certificate.verdict != "accurate" else ()
    told = "".join(f'<p class="caption">{escape(sentence)}</p>' for sentence in advice)
    return f'{table}<p class="caption">{escape(note)}</p>{told}'


def _table(caption: str, head: Sequence[str], lines: Sequence[Sequence[str]], text_from: int = 99) -> str:
    """Return `_html.table` in a region that scrolls."""
    region = f'class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"'
    return f"<div {region}>{_html.table(caption, head, lines, text_from)}</div>"


def _nats(value: Any, digits: int, sign: str = "") -> str:
    """Write a number with so many decimals and the minus sign of typography."""
    number = float(value)
    if not math.isfinite(number):
        return "not a number" if math.isnan(number) else "∞" if number > 0 else "\N{MINUS SIGN}∞"
    if abs(number) >= 1e7:
        return _scientific(number)
    text = f"{number:{sign},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def _plain(value: Any, scale: Any) -> str:
    """Write a measurement to about a hundredth of the spread of its column."""
    number = float(value)
    spread = abs(float(scale)) or abs(number) or 1.0
    if not 1e-4 <= spread < 1e7 or abs(number) >= 1e9:
        return _scientific(number)
    return _nats(number, max(0, 3 - round(math.log10(spread))))


def _scientific(value: float) -> str:
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else _nats(value, 1)
    mantissa, exponent = f"{value:.1e}".split("e")
    powers = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{mantissa.replace('-', chr(0x2212))} {_TIMES} 10{str(int(exponent)).translate(powers)}"


def _error(values: Array) -> str:
    return f"{values.std() / math.sqrt(len(values)):.3f}"
