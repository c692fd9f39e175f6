"""Pictures of a flow: its samples beside the data, its latents beside a normal distribution, its training, its scores.

Every function takes arrays that a flow's methods return (or NumPy reads), draws with Matplotlib
(``pip install matplotlib``) and returns the Axes. ``ax=`` says where to draw; without it there is a new figure.
The first two colours of the current style stand for the data and the flow. `style` is a look that suits them, on white
or on dark ground. Rows that hold NaN or infinity are refused, not left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _bases, _checks, _frames, _scores
from nvpflow._bases import Base
from nvpflow._model import Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "corner",
    "evidence_curve",
    "latent_correlation",
    "latent_qq",
    "learning_curve",
    "log_likelihood",
    "rank_histogram",
    "style",
]

Array = NDArray[np.float64]

_DATA, _FLOW = "C0", "C1"
_LIGHT = {
    "ink": "#1d2530",
    "muted": "#5d6875",
    "ground": "#ffffff",
    "colours": ["#30435f", "#e8743b", "#2a8c82", "#a2436f"],
}
_DARK = {
    "ink": "#e8ebef",
    "muted": "#a3adb9",
    "ground": "#15191f",
    "colours": ["#9fb8dc", "#f5904f", "#56c2b4", "#e08bb4"],
}

_MOST_COLUMNS = 12  # of a corner plot that nobody asked to be larger
_MOST_POINTS = 2000  # of either kind in one panel: more hide each other
_QQ_POINTS = 201


def style(*, dark: bool = False) -> AbstractContextManager[None]:
    """Return a context in which new figures have the look of nvpflow's own pictures.

    Parameters
    ----------
    dark
        Light ink on dark ground, instead of dark ink on white.

    Returns
    -------
    context manager
        Matplotlib's settings are as before where it ends. ``matplotlib.rcParams.update`` is not called for good.

    Raises
    ------
    ImportError
        Matplotlib is not installed (``pip install matplotlib``).
    """
    look: dict[str, Any] = _DARK if _checks.boolean("dark", dark) else _LIGHT
    settings = {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), look["ink"]
        ),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), look["muted"]),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), look["ground"]),
        "axes.prop_cycle": _matplotlib().cycler(color=look["colours"]),
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.labelsize": 9.5,
        "axes.linewidth": 0.8,
        "axes.unicode_minus": True,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "svg.fonttype": "path",
    }
    context: AbstractContextManager[None] = _matplotlib().rc_context(settings)
    return context


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("nvpflow.plot needs Matplotlib: pip install matplotlib") from error
    return matplotlib


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes to draw on: those given, or those of a new figure of this size in inches."""
    if ax is None:
        _matplotlib()
        import matplotlib.pyplot as plt

        made: Axes = plt.subplots(figsize=size, layout="constrained")[1]
        return made
    if not hasattr(ax, "plot"):
        raise TypeError(f"ax is {_checks.describe(ax)}, expected Axes of Matplotlib or None")
    return ax


def _open_frame(ax: Axes) -> None:
    """Leave the axis lines that carry numbers, and a quiet grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=_muted(), alpha=0.16, linewidth=0.7)
    ax.set_axisbelow(True)


def _muted() -> Any:
    return _matplotlib().rcParams["ytick.color"]


def _ink() -> Any:
    return _matplotlib().rcParams["text.color"]


def _table(name: str, values: ArrayLike, columns: int | None = None) -> Array:
    """Return rows [N, D] of finite numbers as float64."""
    rows = _real(name, values)
    if rows.ndim != 2 or 0 in rows.shape or columns not in (None, rows.shape[1]):
        wanted = "[N, D]" if columns is None else f"[N, {columns}]"
        raise ValueError(f"{name} has shape {rows.shape}, expected {wanted} with at least one row and one column")
    gaps = ~np.isfinite(rows)
    bad = np.flatnonzero(gaps.any(axis=1))
    if bad.size:
        labels = _frames.labels(_titles(values), rows.shape[1])
        where = ", ".join(labels[j] for j in np.flatnonzero(gaps.any(axis=0))[:5])
        raise ValueError(
            f"{name} has {bad.size} of {len(rows)} rows with NaN or infinite values (the first is row {bad[0]}, "
            f"counted from 0; in {where}); leave out the rows, or a column that has no others"
        )
    return rows


def _real(name: str, values: ArrayLike) -> Array:
    _checks.unmasked(name, values)
    if text := _frames.not_numbers(name, values):
        raise TypeError(text)
    frame = _frames.inspect(values)
    given = np.asarray(values) if frame is None else frame.array()
    if given.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {given.dtype}, expected real numbers")
    return given.astype(np.float64, copy=False)


def _titles(table: Any) -> list[str] | None:
    """Return the names of a frame's columns; None if it is not a frame."""
    titles = getattr(table, "column_names", None)  # of pyarrow, whose columns are the data
    titles = getattr(table, "columns", None) if titles is None else titles
    return None if titles is None else [str(title) for title in titles]


def _names(names: Sequence[str] | None, source: object, count: int, letter: str) -> list[str]:
    """Return a name for each column: those given, those of a frame, or a letter with an index."""
    if names is None:
        names = _titles(source)
    if names is None:
        return [f"{letter}$_{{{i}}}$" for i in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"names is {_checks.describe(names)}, expected {count} names, one for each column")
    return [str(name).replace("$", r"\$") for name in names]


# ------------------------------------------------------------------------------------------------ data and samples


def corner(
    data: ArrayLike,
    samples: ArrayLike | None = None,
    *,
    names: Sequence[str] | None = None,
    columns: Sequence[int] | None = None,
    dates: Sequence[int] = (),
    labels: tuple[str, str] = ("data", "samples"),
    ax: NDArray[np.object_] | None = None,
) -> NDArray[np.object_]:
    """Draw every pair of columns, and on the diagonal every column, of data against samples.

    Parameters
    ----------
    data
        Rows [N, D], finite; a DataFrame brings names along, and its columns of datetimes are dates.
    samples
        Rows [M, D], finite, such as ``flow.sample(10_000, seed=0)``; dates in seconds since 1970. None: only the data.
    names
        Of the D columns, with units.
    columns
        Which columns to draw, by index. None: all, which at most 12 may be.
    dates
        Which columns are seconds since 1970-01-01 UTC, by index: their axes show dates. Those that the data give as
        datetimes need not be named.
    labels
        What the legend calls data and samples.
    ax
        Array of Axes [C, C], C columns drawn, as ``plt.subplots(C, C)`` returns it. Those above the diagonal are
        switched off, and may be None.

    Returns
    -------
    ndarray of shape (C, C)
        The Axes; None above the diagonal.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described; the message names it.
    ImportError
        Matplotlib is not installed.

    Notes
    -----
    Panels show up to 2,000 points of each kind, chosen at random but always alike. They are drawn in one random order,
    so that neither kind hides the other. Histograms count all rows, on a logarithmic scale, where rare modes and tails
    can be seen. Counts of the samples are scaled to the number of rows of the data.

    An axis holds all values of the data but those farther from the inner 98 % than these are wide. The histogram
    counts these at its edge ("3 beyond", samples in their own colour). The other panels have a mark at the edge for
    each such row of the data.
    """
    data, found = _seconds("data", data)
    drawn = None if samples is None else _seconds("samples", samples)[0]
    rows = _table("data", data)
    drawn = None if drawn is None else _table("samples", drawn, rows.shape[1])
    titles = _names(names, data, rows.shape[1], "x")
    chosen = _chosen(columns, rows.shape[1])
    days = {*found, *(() if len(dates) == 0 else _indices("dates", dates, rows.shape[1]))}
    sets = [_dated(table, days) for table in (rows, drawn) if table is not None]
    grid = _corner_axes(ax, len(chosen))
    limits = [_limits(sets[0][:, c]) for c in chosen]
    points = [some_rows(table, min(_MOST_POINTS, *map(len, sets))) for table in sets]
    for i, row in enumerate(chosen):
        for j, column in enumerate(chosen[: i + 1]):
            panel = grid[i, j]
            if i == j:
                _draw_histogram(panel, [table[:, row] for table in sets], limits[i])
            else:
                _draw_pair(panel, [table[:, [column, row]] for table in points], limits[j], limits[i])
                _mark_beyond(panel, sets[0][:, [column, row]], limits[j], limits[i])
            _set_ticks(panel, across=column in days, up=None if i == j else row in days)
            _label_panel(panel, i, j, len(chosen), titles[row], titles[column])
    _draw_corner_legend(grid[0, 0], labels[: len(sets)])
    return grid


def _seconds(name: str, table: Any) -> tuple[Any, list[int]]:
    """Return a table with its datetimes as seconds since 1970, and the columns they are in."""
    if getattr(table, "dtype", None) is not None and np.dtype(table.dtype).kind == "M":
        return _since_1970(table), list(range(np.asarray(table).shape[-1]))
    if not hasattr(table, "columns") or not hasattr(table, "__getitem__"):
        return table, []
    names = list(table.column_names if hasattr(table, "column_names") else table.columns)
    columns = [np.asarray(table[key]) for key in names] if len(set(names)) == len(names) else []
    dates = [i for i, values in enumerate(columns) if _are_datetimes(values)]
    if not dates:
        return table, []
    for i, values in enumerate(columns):
        if i not in dates and values.dtype.kind not in "fiub":
            raise TypeError(
                f"{name} has dtype {values.dtype} in column {str(names[i])!r}, expected real numbers or dates"
            )
    whole = [_since_1970(table[key]) if i in dates else columns[i] for i, key in enumerate(names)]
    return _Frame(np.column_stack(whole).astype(np.float64), names), dates


class _Frame:
    """Rows and the names of their columns, as far as `corner` asks a DataFrame."""

    def __init__(self, rows: Array, columns: list[Any]) -> None:
        self.rows, self.columns = rows, columns

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.rows


def _are_datetimes(values: NDArray[Any]) -> bool:
    # Those of a time zone come as objects.
    return values.dtype.kind == "M" or (
        values.dtype.kind == "O" and len(values) > 0 and hasattr(values[0], "timestamp")
    )


def _since_1970(values: Any) -> Array:
    times = np.asarray(values, dtype="datetime64[ns]")
    return np.where(np.isnat(times), np.nan, times.astype(np.int64) / 1e9)


def _dated(table: Array, days: set[int]) -> Array:
    """Return the rows with seconds since 1970 as Matplotlib counts dates, in days."""
    if not days:
        return table
    import matplotlib.dates

    dates: Any = matplotlib.dates
    table = table.copy()
    epoch = float(dates.date2num(np.datetime64(0, "s")))
    for column in days:
        table[:, column] = epoch + table[:, column] / 86400
    return table


def _set_ticks(ax: Axes, *, across: bool, up: bool | None) -> None:
    """Choose few ticks, and formatters whose labels are short; `up` None: that axis has counts."""
    import matplotlib.dates
    from matplotlib import ticker

    dates: Any = matplotlib.dates
    for axis, dated, most in ((ax.xaxis, across, 3), (ax.yaxis, up, 4)):
        if dated is None:
            continue
        if dated:
            locator = dates.AutoDateLocator(minticks=2, maxticks=most)
            axis.set_major_locator(locator)
            axis.set_major_formatter(dates.ConciseDateFormatter(locator))
        else:
            axis.set_major_locator(ticker.MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]))
            formatter = ticker.ScalarFormatter()
            formatter.set_powerlimits((-3, 4))
            axis.set_major_formatter(formatter)
        axis.get_offset_text().set_fontsize("x-small")


def _chosen(columns: Sequence[int] | None, count: int) -> list[int]:
    """Return which columns to draw."""
    if columns is None:
        if count > _MOST_COLUMNS:
            raise ValueError(
                f"data has {count} columns, which makes {count * (count + 1) // 2} panels; choose some by columns=[...]"
            )
        return list(range(count))
    return _indices("columns", columns, count)


def _indices(name: str, columns: Sequence[int], count: int) -> list[int]:
    chosen = list(_checks.sizes(name, columns))
    if not chosen or any(not 0 <= column < count for column in chosen):
        raise ValueError(f"{name} is {_checks.describe(columns)}, expected indices from 0 to {count - 1}")
    return chosen


def _corner_axes(ax: Any, count: int) -> NDArray[np.object_]:
    grid = np.full((count, count), None, dtype=object)
    if ax is None:
        _matplotlib()
        import matplotlib.pyplot as plt

        side = 1.4 + 1.55 * count
        given = np.asarray(plt.subplots(count, count, figsize=(side, side), squeeze=False)[1])
        given[0, 0].figure.subplots_adjust(**corner_margins(side))
    else:
        given = np.asarray(ax, dtype=object)
        if given.shape != (count, count):
            raise ValueError(
                f"ax has shape {given.shape}, expected Axes [{count}, {count}], one for each pair of columns"
            )
    for i in range(count):
        for j in range(count):
            if j <= i:
                grid[i, j] = given[i, j]
            elif given[i, j] is not None:
                given[i, j].set_axis_off()
    return grid


def corner_margins(side: float) -> dict[str, float]:
    """Return the margins of a figure of so many inches, which hold names of two lines, for its grid of panels."""
    return {
        "left": 0.95 / side,
        "right": 1 - 0.15 / side,
        "bottom": 0.75 / side,
        "top": 1 - 0.5 / side,
        "hspace": 0.09,
        "wspace": 0.09,
    }


def some_rows(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Return so many of the rows, in their order, chosen at random but always alike; all where there are no more."""
    if len(rows) <= count:
        return np.ascontiguousarray(rows)
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), count, replace=False))]


def _limits(values: Array) -> tuple[float, float]:
    """Return an interval that holds the values, but for those farther from the inner 98 % than these are wide."""
    inner_low, inner_high = np.quantile(values, [0.01, 0.99])
    low, high = values.min(), values.max()
    if inner_low < inner_high:
        reach = inner_high - inner_low
        low, high = max(low, inner_low - reach), min(high, inner_high + reach)
    least = 64 * np.spacing(max(abs(low), abs(high)))  # of large numbers 0.5 more may be the same number
    margin = max(0.06 * (high - low) or 0.5, least)
    return float(low - margin), float(high + margin)


def _draw_pair(ax: Axes, sets: list[Array], across: tuple[float, float], up: tuple[float, float]) -> None:
    points = np.concatenate(sets)
    colours = np.repeat([_DATA, _FLOW][: len(sets)], [len(table) for table in sets])
    order = np.random.default_rng(0).permutation(len(points))  # what is drawn last hides the rest
    size = float(np.clip(7000 / len(points), 2.2, 14))
    ax.scatter(points[order, 0], points[order, 1], c=colours[order], s=size, linewidths=0, alpha=0.6, rasterized=True)
    ax.set(xlim=across, ylim=up)


def _mark_beyond(ax: Axes, pairs: Array, across: tuple[float, float], up: tuple[float, float]) -> None:
    """Mark the edge where rows of the data lie outside the panel."""
    low, high = np.array([across, up]).T
    outside = pairs[((pairs < low) | (pairs > high)).any(axis=1)]
    if len(outside):
        at = np.clip(some_rows(outside, _MOST_POINTS), low, high)
        ax.scatter(
            at[:, 0],
            at[:, 1],
            s=13,
            marker="D",
            facecolors="none",
            edgecolors=_DATA,
            linewidths=0.9,
            clip_on=False,
            zorder=3,
        )


def _draw_histogram(ax: Axes, sets: list[Array], limits: tuple[float, float]) -> None:
    edges = np.linspace(*limits, 49)
    counts = [np.histogram(values, edges)[0] * (len(sets[0]) / len(values)) for values in sets]
    ax.stairs(counts[0], edges, fill=True, color=_DATA, alpha=0.45)
    if len(counts) > 1:
        ax.stairs(counts[1], edges, color=_FLOW, linewidth=1.4)
    lines = _count_beyond(ax, sets, limits)
    ax.set(xlim=limits, yscale="log", ylim=(0.7, 2 * 8**lines * max(1.0, *(float(c.max()) for c in counts))))


def _count_beyond(ax: Axes, sets: list[Array], limits: tuple[float, float]) -> int:
    """Write at either edge how many values lie beyond it; return the number of lines."""
    left, right = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    lines = 0
    for values, colour in zip(sets, (_DATA, _FLOW), strict=False):
        below, above = int(np.sum(values < limits[0])), int(np.sum(values > limits[1]))
        style: dict[str, Any] = {"va": "top", "fontsize": "x-small", "color": colour, "transform": ax.transAxes}
        height = 0.97 - 0.12 * lines
        if below:
            ax.text(0.03, height, f"{left} {below:,} beyond", ha="left", **style)
        if above:  # beside the other side's, there is room for the number only
            ax.text(0.97, height, f"{above:,}{'' if below else ' beyond'} {right}", ha="right", **style)
        lines += bool(below or above)
    return lines


def _label_panel(ax: Axes, row: int, column: int, count: int, up: str, across: str) -> None:
    """Name the axes at the grid's outer edges only."""
    ax.tick_params(length=2.5)
    if row == count - 1:
        ax.set_xlabel(_fitted(ax, across, 0), labelpad=11 if _has_offset(ax.xaxis) else 4)
    else:
        ax.tick_params(labelbottom=False)
        ax.xaxis.get_offset_text().set_visible(False)
    if row == column:
        ax.tick_params(axis="y", which="both", left=False, labelleft=False)
        ax.set_title(_fitted(ax, up, 0, "axes.titlesize"), pad=4)
    elif column == 0:
        ax.set_ylabel(_fitted(ax, up, 1))
        ax.yaxis.set_label_coords(-0.55 / _panel_inches(ax)[0], 0.5)
    else:
        ax.tick_params(labelleft=False)
        ax.yaxis.get_offset_text().set_visible(False)


def _panel_inches(ax: Axes) -> tuple[float, float]:
    box = ax.get_position()
    figure: Any = ax.figure
    width, height = figure.get_window_extent().size / figure.dpi
    return float(box.width * width), float(box.height * height)


def _has_offset(axis: Any) -> bool:
    """Tell whether what the tick labels have in common will be written beside them."""
    axis.get_major_formatter().format_ticks(axis.get_majorticklocs())
    return bool(axis.get_major_formatter().get_offset())


def _fitted(ax: Axes, name: str, side: int, size: str = "axes.labelsize") -> str:
    """Break a name into two lines where it is longer than the panel's side, and cut off what is left over."""
    from matplotlib.font_manager import FontProperties

    points = FontProperties(size=_matplotlib().rcParams[size]).get_size_in_points()
    letters = max(4, int(_panel_inches(ax)[side] * 72 / (0.58 * points)))
    if len(name) <= letters or "$_{" in name:
        return name
    return _wrapped(name.replace(r"\$", "$"), letters).replace("$", r"\$")


def _wrapped(name: str, letters: int) -> str:
    """Return a name in one or two lines of at most so many letters."""
    cut = max((name.rfind(mark, 0, letters) + 1 for mark in (" ", "_", "-", ".", "/")), default=0)
    cut = cut if cut > letters // 3 else letters
    first, rest = name[:cut].rstrip(), name[cut:].lstrip()
    if len(rest) > letters:
        rest = rest[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{first}\n{rest}"


def _draw_corner_legend(ax: Axes, labels: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_DATA, alpha=0.75, label=labels[0])]
    if len(labels) > 1:
        patches.append(Patch(color=_FLOW, alpha=0.9, label=labels[1]))
    ax.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(1.04, 1.0), frameon=False, borderaxespad=0, handlelength=1.1
    )


# --------------------------------------------------------------------------------------------------------- latents


def latent_qq(
    z: ArrayLike, *, names: Sequence[str] | None = None, base: str | Base | Model = "normal", ax: Axes | None = None
) -> Axes:
    """Draw how far the quantiles of every latent dimension lie from those of the standard normal distribution.

    A Q-Q plot with its diagonal laid level, so that small departures can be seen. It is the worm plot of van Buuren and
    Fredriks (Statistics in Medicine 20, 2001). Where the flow is right, the latents of data are standard normal and the
    lines stay in the band, as far as chance goes.

    Parameters
    ----------
    z
        Latents [N, D], finite: ``flow.forward(x)[0]``.
    names
        Of the D dimensions, which are those of the data.
    base
        What they should be, ``flow.spec.base``, or the flow itself, which a base with parameters needs. Those of
        another base than the normal one are drawn as normal scores: the standard normal quantiles of their shares.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The three dimensions farthest off are coloured and named, with their largest distance from the level between
        the 0.5 and the 99.5 per cent points.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described; the message names it.
    ImportError
        Matplotlib is not installed.

    Notes
    -----
    The band holds 95 % of such points of N independent standard normal values, each point for itself. The i-th of N
    uniform values in order is Beta(i, N + 1 - i) distributed (David and Nagaraja, Order Statistics, 2003, section 2.3).
    """
    own = base.spec.base if isinstance(base, Model) else _bases.checked(base)
    parameters = base.parameters() if isinstance(base, Model) else None
    latents = _scores.normal_scores(own, _table("z", z), parameters)
    if not (inside := np.isfinite(latents).all(axis=1)).all():
        raise ValueError(
            f"z has {np.sum(~inside)} of {len(latents)} rows outside of base={own!r}, expected none; leave them out"
        )
    titles = _names(names, z, latents.shape[1], "z")
    probability, normal = _qq_positions(len(latents))
    observed = np.quantile(latents, probability, axis=0)  # [points, D]
    off = observed - normal[:, None]
    low, high = (edge - normal for edge in _qq_band(len(latents), probability))
    inner = (probability >= 0.005) & (probability <= 0.995)
    distance = np.abs(off)[inner].max(axis=0)

    ax = _axes(ax, (5.2, 3.6))
    ax.fill_between(normal, low, high, color=_muted(), alpha=0.2, linewidth=0, label="95 % by chance")
    ax.axhline(0.0, color=_muted(), linewidth=0.9, linestyle=(0, (4, 3)))
    farthest = np.argsort(-distance, kind="stable")
    for i in farthest[3:]:
        ax.plot(normal, off[:, i], color=_muted(), linewidth=0.9, alpha=0.7)
    for colour, i in zip((_FLOW, _DATA, "C2"), farthest[:3], strict=False):
        ax.plot(normal, off[:, i], color=colour, linewidth=1.6, label=f"{titles[i]}: up to {distance[i]:.2f}")
    if latents.shape[1] > 3:
        ax.plot([], [], color=_muted(), linewidth=0.9, alpha=0.7, label=f"{latents.shape[1] - 3} more, nearer")
    reach = 1.15 * max(0.1, float(distance.max()), float(np.abs([low, high]).max()))  # far tails may leave the frame
    ax.set(ylim=(-reach, reach), xlabel="standard normal quantile", ylabel="latent minus normal quantile")
    _open_frame(ax)
    ax.legend(frameon=False, loc="best")
    return ax


def _qq_positions(rows: int) -> tuple[Array, Array]:
    """Return probabilities evenly spaced in normal quantiles, out to the farthest that so many rows can show."""
    standard = NormalDist()
    edge = standard.inv_cdf(1 - 0.5 / max(rows, 2))
    normal = np.linspace(-edge, edge, min(_QQ_POINTS, max(rows, 3)))
    return np.array([standard.cdf(value) for value in normal]), normal


def _qq_band(rows: int, probability: Array) -> tuple[Array, Array]:
    draws = np.random.default_rng(0).beta(
        rows * probability + 0.5, rows * (1 - probability) + 0.5, size=(4000, len(probability))
    )
    standard = NormalDist()
    low, high = np.clip(np.quantile(draws, [0.025, 0.975], axis=0), 1e-300, 1 - 1e-16)
    return np.array([standard.inv_cdf(p) for p in low]), np.array([standard.inv_cdf(p) for p in high])


def latent_correlation(z: ArrayLike, *, names: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the correlations between latent dimensions, which are independent where the flow is right.

    Parameters
    ----------
    z
        Latents [N, D], finite, N at least 3: ``flow.forward(x)[0]``.
    names
        Of the D dimensions, which are those of the data.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Pearson's r below the diagonal, written out for up to 12 dimensions; the title says how large the largest of
        them would be by chance.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described; the message names it.
    ImportError
        Matplotlib is not installed.

    Notes
    -----
    Between independent columns r is about normal with standard deviation ``1/sqrt(N)``. The level of chance is the 95 %
    point of the largest of ``D(D-1)/2`` of them (Sidak's correction).
    """
    latents = _table("z", z)
    rows, count = latents.shape
    if rows < 3 or count < 2:
        raise ValueError(f"z has shape {latents.shape}, expected [N, D] with N at least 3 and D at least 2")
    titles = _names(names, z, count, "z")
    with np.errstate(invalid="ignore"):
        r: Array = np.asarray(np.corrcoef(latents, rowvar=False))
    if not np.isfinite(r).all():
        raise ValueError("z has a column that does not vary, expected none: its correlations are not defined")
    below = np.tril_indices(count, -1)
    largest = float(np.abs(r[below]).max())
    chance = NormalDist().inv_cdf(0.5 + 0.5 * 0.95 ** (1 / len(below[0]))) / np.sqrt(rows)

    ax = _axes(ax, (4.8, 4.4))
    scale = max(0.1, np.ceil(10 * largest) / 10)
    shown = np.ma.masked_array(r, mask=np.triu(np.ones_like(r, dtype=bool)))[1:, :-1]
    picture = ax.imshow(shown, cmap=_diverging(), vmin=-scale, vmax=scale)
    if count <= _MOST_COLUMNS:
        size = "small" if count <= 7 else "xx-small"
        for i, j in np.stack(below, axis=1).tolist():
            ax.text(j, i - 1, _signed(r[i, j], 2), ha="center", va="center", fontsize=size)
    ticks = np.arange(count - 1) if count <= 30 else np.linspace(0, count - 2, 8).astype(int)
    long_names = max(map(len, titles)) > 6
    ax.set_xticks(
        ticks, [titles[i] for i in ticks], rotation=40 if long_names else 0, ha="right" if long_names else "center"
    )
    ax.set_yticks(ticks, [titles[i + 1] for i in ticks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar: Any = ax.figure.colorbar(
        picture, ax=ax, shrink=0.75, pad=0.02, aspect=25, ticks=[-scale, -scale / 2, 0, scale / 2, scale]
    )
    bar.outline.set_visible(False)
    bar.set_label("correlation r")
    ax.set_title(f"largest |r|: {largest:.3f}\nby chance, up to {chance:.3f}", loc="left", fontsize="medium")
    return ax


def _signed(value: float, digits: int) -> str:
    """Write a number with the minus sign of typography, and none before a nought."""
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    text = f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.1e}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _diverging() -> Any:
    """From one colour of the style over its ground to the other, so that nought is the ground itself."""
    matplotlib = _matplotlib()
    data, flow = matplotlib.colors.to_rgb(_DATA), matplotlib.colors.to_rgb(_FLOW)
    ground = matplotlib.colors.to_rgb(matplotlib.rcParams["axes.facecolor"])
    cold = tuple(0.7 * c + 0.3 * g for c, g in zip(data, ground, strict=True))  # ink must stay readable on it
    return matplotlib.colors.LinearSegmentedColormap.from_list("data_to_flow", [cold, ground, flow])


# ------------------------------------------------------------------------------------------ training and likelihoods


class DensityLosses(Protocol):
    """What an evidence curve shows of an `nvpflow.DensityHistory`."""

    @property
    def step(self) -> NDArray[np.int64]: ...
    @property
    def loss(self) -> Array: ...
    @property
    def validation_loss(self) -> Array: ...
    @property
    def best_step(self) -> int: ...
    @property
    def best_loss(self) -> float: ...


class Losses(Protocol):
    """What a learning curve shows of an `nvpflow.History`."""

    @property
    def epoch(self) -> NDArray[np.int64]: ...
    @property
    def train_loss(self) -> Array: ...
    @property
    def validation_loss(self) -> Array: ...
    @property
    def best_epoch(self) -> int: ...
    @property
    def best_loss(self) -> float: ...
    @property
    def validation_rows(self) -> int: ...


def learning_curve(history: Losses, *, reference: Mapping[str, float] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the log-likelihood over the epochs of a training run.

    Parameters
    ----------
    history
        What `nvpflow.Flow.fit` returned.
    reference
        Log-likelihoods in nats per row to compare with, by name, drawn as level lines.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        In nats per row, higher is better: minus the losses of the history. The best epoch is marked. Epochs far below
        the rest are left out of the frame, and a note counts them.

    Raises
    ------
    ValueError
        The history has no epochs.
    ImportError
        Matplotlib is not installed.
    """
    if len(history.epoch) == 0:
        raise ValueError("history has no epochs, expected at least one")
    curves = {"training rows": -history.train_loss}
    best = None
    if history.validation_rows:
        curves["validation rows"] = -history.validation_loss
        if history.best_epoch:
            best = history.best_epoch, -history.best_loss
    ax = _curves(ax, history.epoch, curves, best, reference, "epoch", "epoch")
    ax.set(xlabel="epoch", ylabel="log-likelihood (nats per row)")
    return ax


def evidence_curve(
    history: DensityLosses, *, reference: Mapping[str, float] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the lower bound of the evidence over the steps of a training on a log-density.

    Parameters
    ----------
    history
        What `nvpflow.Flow.fit_density` returned.
    reference
        Log evidences in nats to compare with, by name, drawn as level lines.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        In nats, higher is better: minus the losses of the history, of the steps' rows and of those that reports are
        compared by. The best report is marked. Reports far below the rest are left out of the frame, and a note counts
        them.

    Raises
    ------
    ValueError
        The history has no reports.
    ImportError
        Matplotlib is not installed.
    """
    if len(history.step) == 0:
        raise ValueError("history has no reports, expected at least one")
    curves = {"rows of the steps": -history.loss, "rows of the reports": -history.validation_loss}
    best = (history.best_step, -history.best_loss) if history.best_step else None
    ax = _curves(ax, history.step, curves, best, reference, "step", "report")
    ax.set(xlabel="step", ylabel="lower bound of the log evidence (nats)")
    return ax


def _curves(
    ax: Axes | None,
    places: NDArray[np.int64],
    curves: Mapping[str, Array],
    best: tuple[int, float] | None,
    reference: Mapping[str, float] | None,
    counter: str,
    record: str,
) -> Axes:
    """Draw a first curve in grey and perhaps a second one with its best place, over level lines."""
    given = {} if reference is None else reference
    levels = {name: _checks.real(f"reference[{name!r}]", v) for name, v in given.items()}
    ax = _axes(ax, (5.2, 3.6))
    marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(places) < 3 else {}
    for (label, values), colour, width in zip(curves.items(), (_muted(), _FLOW), (1.3, 1.9), strict=False):
        ax.plot(places, values, color=colour, linewidth=width, label=label, **marker)
    if best is not None:
        label = f"best: {_signed(best[1], 3)}, {counter} {best[0]}"
        ax.plot(*best, "o", color=_FLOW, markersize=6, markeredgewidth=0, label=label)
    for (name, level), colour in zip(levels.items(), [_DATA, "C2", "C3"] * len(levels), strict=False):
        ax.axhline(level, color=colour, linestyle=(0, (4, 3)), linewidth=1.2, label=f"{name}: {_signed(level, 3)}")
    _frame_curves(ax, list(curves.values()), list(levels.values()), record)
    ax.locator_params(axis="x", integer=True)
    _open_frame(ax)
    ax.legend(frameon=False, loc="best")
    return ax


def _frame_curves(ax: Axes, curves: list[Array], levels: list[float], record: str) -> None:
    """Fit the frame to the curves but for a first plunge, which would flatten all that follows."""
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    if not values.size:
        return
    top = max([float(values.max()), *levels])
    usual = float(np.quantile(values, 0.1))
    floor = min([usual - 1.5 * (top - usual), *levels])
    hidden = max(int(np.sum(curve < floor)) for curve in curves)
    low = floor if hidden else min([float(values.min()), *levels])
    margin = 0.05 * (top - low) or 0.5
    ax.set_ylim(low - margin, top + margin)
    if hidden:
        note = f"\N{DOWNWARDS ARROW} {hidden} {record}{'s' if hidden > 1 else ''} below"
        ax.annotate(note, (0.02, 0.02), xycoords="axes fraction", color=_muted(), fontsize="small")


def log_likelihood(
    log_p: ArrayLike,
    *,
    reference: Mapping[str, ArrayLike] | None = None,
    names: Sequence[str] | None = None,
    outliers: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Draw a histogram of the rows' log-likelihoods, and name the least likely rows.

    Parameters
    ----------
    log_p
        Log-densities [N] in nats: ``flow.log_probability(x)``. They may be -inf or NaN: such rows come first among
        the least likely ones.
    reference
        Log-densities to compare with, by name, any number of rows each. Of the flow's own samples: where the flow is
        right, the histograms are alike. Or of the same rows under another model. Drawn as outlines; what is not finite
        is left out.
    names
        Of the N rows. None: their numbers, from 0.
    outliers
        How many of the least likely rows to mark and name; 0: none.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Share of the rows in each bin. An arrow at the edge stands for rows below the frame.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described, or no value is finite; the message names it.
    ImportError
        Matplotlib is not installed.
    """
    values = _vector("log_p", log_p)
    others = {name: _vector(f"reference[{name!r}]", other) for name, other in (reference or {}).items()}
    if names is not None and (isinstance(names, str) or len(names) != len(values)):
        raise ValueError(f"names is {_checks.describe(names)}, expected {len(values)} names, one for each row")
    count = _checks.integer("outliers", outliers)
    if count < 0:
        raise ValueError(f"outliers is {count}, expected at least 0")
    ax = _axes(ax, (5.2, 3.6))
    from matplotlib import ticker

    limits = _histogram_limits([values, *others.values()], values[least_likely(values, count)])
    edges = np.linspace(*limits, 61)
    ax.stairs(_shares(values, edges), edges, fill=True, color=_DATA, alpha=0.5, label="rows")
    for (name, other), colour in zip(others.items(), [_FLOW, "C2", "C3"] * len(others), strict=False):
        ax.stairs(_shares(other, edges), edges, color=colour, linewidth=1.5, label=name)
    ax.set(xlim=limits, xlabel="log p (nats)", ylabel="share of rows")
    ax.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    _open_frame(ax)
    if count:
        _mark_outliers(ax, values, names, count, limits)
    if others or count:
        ax.legend(frameon=False, loc="upper left")
    return ax


def _vector(name: str, values: ArrayLike) -> Array:
    vector = _real(name, values)
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}, expected [N]")
    if not np.isfinite(vector).any():
        raise ValueError(f"{name} has no finite value among {len(vector)}, expected at least one")
    return vector


def _histogram_limits(sets: list[Array], lowest: Array) -> tuple[float, float]:
    """Return a frame for the bulk of all sets and the lowest rows, where these would not press it into a few bins."""
    finite = [values[np.isfinite(values)] for values in sets]
    low = min(_lower_edge(values) for values in finite)
    high = max(float(values.max()) for values in finite)
    near = lowest[np.isfinite(lowest) & (lowest > low - 0.5 * (high - low))]
    low = min([low, *near.tolist()])
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _lower_edge(values: Array) -> float:
    low, inner_low, inner_high = np.quantile(values, [0.002, 0.05, 0.95])
    return float(max(low, inner_low - 5 * (inner_high - inner_low)) if inner_low < inner_high else low)


def _shares(values: Array, edges: Array) -> Array:
    return np.histogram(values, edges)[0] / len(values)


def _mark_outliers(
    ax: Axes, values: Array, names: Sequence[str] | None, count: int, limits: tuple[float, float]
) -> None:
    lowest = least_likely(values, count)
    at = values[lowest]
    inside = at[np.isfinite(at) & (at >= limits[0])]
    outside = int(np.sum(~(values >= limits[0])))
    title = f"least likely ({outside:,} outside):" if outside else "least likely:"
    mark: dict[str, Any] = {"color": "C3", "linestyle": "", "markeredgewidth": 0, "transform": ax.get_xaxis_transform()}
    ax.plot(inside, np.full(len(inside), 0.025), marker="v", markersize=5, label=title, **mark)
    if len(inside) < len(lowest):
        ax.plot(limits[0], 0.025, marker="<", markersize=7, clip_on=False, **mark)
    for row, value in zip(lowest, at, strict=True):
        named = f"row {row}" if names is None else str(names[row]).replace("$", r"\$")
        ax.plot([], [], linestyle="", label=f"{named} ({_signed(value, 1)})")


def rank_histogram(
    truth: ArrayLike, draws: ArrayLike, *, names: Sequence[str] | None = None, bins: int = 20, ax: Axes | None = None
) -> Axes:
    """Draw the ranks of true values among draws from their posteriors: simulation-based calibration.

    Each row of `truth` comes from the prior, its draws from the posterior given what was simulated with it. Its rank
    among them is then uniform (Talts et al., 2018). A posterior that is too narrow makes a U, one that is too wide
    a hump, and a shifted one a slope.

    Parameters
    ----------
    truth
        True values [N, D], finite.
    draws
        Draws [N, L, D], finite, L under each row's context: ``flow.sample(L, context=observations)``.
    names
        Of the D dimensions.
    bins
        Bars, at least 2; no more than L + 1 ranks, nor than one for 20 rows, are drawn.
    ax
        Where to draw; None makes a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The three dimensions that are least uniform are coloured and named, with the number of their bars out of the
        band.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described; the message names it.
    ImportError
        Matplotlib is not installed.

    Notes
    -----
    The band holds 99 % of the counts of each bar where ranks are uniform, which are binomial.
    """
    values = _table("truth", truth)
    given = np.asarray(draws)
    rows, columns = values.shape
    if given.ndim != 3 or given.shape[::2] != (rows, columns) or given.shape[1] == 0:
        raise ValueError(f"draws has shape {given.shape}, expected [{rows}, L, {columns}] with at least one draw")
    posterior = _table("draws", given.reshape(-1, columns)).reshape(given.shape)
    wanted = _checks.integer("bins", bins)
    if wanted < 2:
        raise ValueError(f"bins is {wanted}, expected at least 2")
    titles = _names(names, truth, columns, "x")
    ranks = given.shape[1] + 1
    count = max(2, min(wanted, ranks, rows // 20))
    of_rank = np.arange(ranks) * count // ranks  # the bar of each rank
    expected = np.bincount(of_rank, minlength=count) / ranks * rows
    found = (posterior < values[:, None, :]).sum(axis=1)  # [N, D]
    bars = np.stack([np.bincount(of_rank[found[:, j]], minlength=count) for j in range(columns)])
    low, high = _counts_band(rows, expected / rows)

    ax = _axes(ax, (5.2, 3.6))
    edges = np.linspace(0, 1, count + 1)
    ax.stairs(high, edges, baseline=low, fill=True, color=_muted(), alpha=0.2, label="99 % by chance")
    ax.stairs(expected, edges, baseline=None, color=_muted(), linewidth=0.9, linestyle=(0, (4, 3)))
    farthest = np.argsort(-((bars - expected) ** 2 / expected).sum(axis=1), kind="stable")
    for j in farthest[3:]:
        ax.stairs(bars[j], edges, baseline=None, color=_muted(), linewidth=0.9, alpha=0.7)
    for colour, j in zip((_FLOW, _DATA, "C2"), farthest[:3], strict=False):
        outside = int(((bars[j] < low) | (bars[j] > high)).sum())
        ax.stairs(
            bars[j],
            edges,
            baseline=None,
            color=colour,
            linewidth=1.6,
            label=f"{titles[j]}: {outside} of {count} outside",
        )
    if columns > 3:
        ax.plot([], [], color=_muted(), linewidth=0.9, alpha=0.7, label=f"{columns - 3} more, nearer")
    ax.set(xlim=(0, 1), ylim=(0, 1.35 * float(max(bars.max(), high.max()))))
    ax.set(xlabel=f"rank of the true value among {ranks - 1} draws, as a share", ylabel="rows")
    _open_frame(ax)
    ax.legend(frameon=False, loc="upper center", ncols=2)
    return ax


def _counts_band(rows: int, shares: Array) -> tuple[Array, Array]:
    draws = np.random.default_rng(0).binomial(rows, shares, size=(20_000, len(shares)))
    low, high = np.quantile(draws, [0.005, 0.995], axis=0)
    return low, high


def least_likely(log_p: ArrayLike, count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` rows of least log-density, NaN and -inf first."""
    values = np.asarray(log_p, dtype=np.float64)
    return np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")[:count]
