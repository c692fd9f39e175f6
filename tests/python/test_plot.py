"""Pictures: what is drawn is what was given, and what cannot be drawn is refused by name."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest

pytest.importorskip("matplotlib", reason="Matplotlib is not installed (pip install matplotlib)")

import matplotlib
import matplotlib.pyplot as plt
from nvpflow import plot


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("Agg")


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(500, 3)) * [1, 2, 3] + [0, 10, -5]


@pytest.fixture(scope="module")
def history(rows):
    flow = nvpflow.build(3, 2, (8,), standardize=True)
    return flow.fit(rows.astype(np.float32), epochs=4, progress=False, num_threads=1)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def points_of(ax):
    """Return the points of a panel in the order they are drawn, and which of them have the data's colour."""
    dots = ax.collections[0]
    return dots.get_offsets(), (dots.get_facecolors()[:, :3] == matplotlib.colors.to_rgb("C0")).all(axis=1)


def draw_all(rows, history, axes):
    plot.latent_qq(rows, ax=axes[0])
    plot.latent_correlation(rows, ax=axes[1])
    plot.learning_curve(history, ax=axes[2])
    plot.log_likelihood(rows[:, 0], ax=axes[3])


def posterior(rows: int, draws: int, columns: int = 2, width: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """True values, and draws of the same distribution, or of one that is as wide as `width` says."""
    rng = np.random.default_rng(5)
    return rng.normal(size=(rows, columns)), width * rng.normal(size=(rows, draws, columns))


def test_every_function_draws_on_the_axes_it_is_given(rows, history):
    axes = plt.subplots(1, 4)[1]
    assert plot.latent_qq(rows, ax=axes[0]) is axes[0]
    assert plot.latent_correlation(rows, ax=axes[1]) is axes[1]
    assert plot.learning_curve(history, ax=axes[2]) is axes[2]
    assert plot.log_likelihood(rows[:, 0], ax=axes[3]) is axes[3]
    assert plot.rank_histogram(*posterior(100, 9), ax=axes[0]) is axes[0]
    grid = plt.subplots(3, 3)[1]
    drawn = plot.corner(rows, ax=grid)
    assert all(drawn[i, j] is grid[i, j] for i in range(3) for j in range(i + 1))
    assert not any(grid[i, j].axison for i in range(3) for j in range(i + 1, 3))
    assert len(plt.get_fignums()) == 2


def test_without_axes_there_is_a_new_figure(rows, history):
    for count, draw in enumerate(
        (
            lambda: plot.latent_qq(rows),
            lambda: plot.latent_correlation(rows),
            lambda: plot.learning_curve(history),
            lambda: history.plot(),
            lambda: plot.log_likelihood(rows[:, 0]),
            lambda: plot.corner(rows)[0, 0],
            lambda: plot.rank_histogram(*posterior(100, 9)),
        ),
        1,
    ):
        ax = draw()
        assert len(plt.get_fignums()) == count
        ax.figure.canvas.draw()


def test_style_is_undone_and_has_two_grounds(rows, history):
    before = dict(matplotlib.rcParams)
    for dark in (False, True):
        with plot.style(dark=dark):
            figure, axes = plt.subplots(1, 4)
            draw_all(rows, history, axes)
            figure.canvas.draw()
            ink, ground = (
                sum(matplotlib.colors.to_rgb(matplotlib.rcParams[k])) for k in ("text.color", "axes.facecolor")
            )
            assert (ink > ground) is dark
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(TypeError, match=r"dark is 'yes' .*, expected True or False"):
        plot.style(dark="yes")


# ------------------------------------------------------------------------------------------------------- corner


def test_corner_counts_all_rows_and_scales_the_samples(rows):
    samples = np.repeat(rows, 3, axis=0)
    grid = plot.corner(rows, samples, names=["a", "b", "c (V)"], labels=("ours", "theirs"))
    data, drawn = (stairs.get_data() for stairs in grid[1, 1].patches)
    inside = (rows[:, 1] >= data.edges[0]) & (rows[:, 1] <= data.edges[-1])
    assert data.values.sum() == inside.sum()
    assert np.allclose(drawn.values, data.values)
    points, ours = points_of(grid[2, 0])
    assert len(points) == 1000
    assert np.array_equal(np.sort(points[ours], axis=0), np.sort(rows[:, [0, 2]], axis=0))  # column across, row up
    assert grid[2, 0].get_ylabel() == grid[2, 2].get_title() == "c (V)"
    assert grid[2, 0].get_xlabel() == "a"
    assert labels(grid[0, 0]) == ["ours", "theirs"]
    assert grid[0, 1] is None


def test_corner_thins_out_points(rows):
    grid = plot.corner(np.tile(rows, (10, 1)), columns=[2, 0])
    assert grid.shape == (2, 2)
    assert len(grid[1, 0].collections[0].get_offsets()) == 2000


def test_corner_draws_data_and_samples_in_one_shuffled_order():
    ordered = np.sort(np.random.default_rng(1).normal(size=(2000, 2)), axis=0)  # by time, say
    points, ours = points_of(plot.corner(ordered, ordered)[1, 0])
    again, same = points_of(plot.corner(ordered, ordered)[1, 0])
    assert np.array_equal(points, again)
    assert np.array_equal(ours, same)
    for part in np.array_split(ours, 8):
        assert 0.4 < part.mean() < 0.6  # neither kind lies on top
    assert np.abs(np.corrcoef(np.arange(len(points)), points[:, 0])[0, 1]) < 0.1  # nor any time


def test_corner_names_the_columns_that_it_cannot_draw(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": rows[:50, 0], "kind": pandas.Categorical(["x", "y"] * 25), "b": rows[:50, 1]})
    with pytest.raises(TypeError, match=r"^data: column 'kind' is category: encode it as numbers, or drop it$"):
        plot.corner(frame)
    frame["kind"] = frame["kind"] == "x"
    plot.corner(frame)  # false and true are 0 and 1
    frame.loc[3, "b"] = np.nan
    with pytest.raises(ValueError, match=r"data has 1 of 50 rows .* in column 'b'\); leave out the rows, or a column"):
        plot.corner(frame)
    with pytest.raises(ValueError, match=r"in column 3\)"):
        plot.corner(frame.to_numpy(float))


@pytest.mark.parametrize("offset", [1e16, -1e16, 1e300])
def test_corner_of_large_numbers_has_axes_of_some_width(rows, offset):
    """Matplotlib warns, an error here, where both ends of an axis are one number."""
    grid = plot.corner(np.column_stack([rows[:50, :2], rows[:50, 0] * 1e-3 + offset]))
    low, high = grid[2, 2].get_xlim()
    assert low < offset < high
    grid[2, 2].figure.canvas.draw()


def test_corner_frame_holds_against_one_wild_row(rows):
    wild = rows.copy()
    wild[7] = 1e30
    low, high = plot.corner(wild)[1, 1].get_xlim()
    assert low < rows[:, 1].min()
    assert rows[:, 1].max() < high < 100


def test_corner_counts_and_marks_what_is_beyond_its_axes(rows):
    wild = rows.copy()
    wild[[7, 9, 11], 2] = 1e30
    wild[13, 2] = -1e4
    samples = rows.copy()
    samples[0, 2] = 1e6
    grid = plot.corner(wild, samples)
    right, left = "\N{RIGHTWARDS ARROW}", "\N{LEFTWARDS ARROW}"
    assert [text.get_text() for text in grid[2, 2].texts] == [f"{left} 1 beyond", f"3 {right}", f"1 beyond {right}"]
    assert not grid[0, 0].texts
    assert not grid[1, 1].texts
    (marks,) = grid[2, 1].collections[1:]
    low, high = grid[2, 1].get_ylim()
    assert sorted(marks.get_offsets()[:, 1]) == [low, high, high, high]
    assert len(grid[1, 0].collections) == 1


@pytest.mark.parametrize("count", [3, 7])
def test_long_names_do_not_collide(count):
    rows = np.random.default_rng(2).normal(size=(50, count)) * 1e6
    name = "the_amount_of_money in US$ that was transferred to the other account"
    with plot.style():
        grid = plot.corner(rows, names=[name] * count)
        figure = grid[0, 0].figure
        figure.canvas.draw()
    drawn = [grid[i, i].title for i in range(count)]
    drawn += [ax.xaxis.label for ax in grid[-1]] + [ax.yaxis.label for ax in grid[1:, 0]]
    boxes = [text.get_window_extent() for text in drawn]
    inside = [(ax.get_ylim(), tick) for ax in grid[1:, 0] for tick in ax.yaxis.get_major_ticks()]
    boxes += [tick.label1.get_window_extent() for (low, high), tick in inside if low <= tick.get_loc() <= high]
    boxes += [ax.xaxis.get_offset_text().get_window_extent() for ax in grid[-1]]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i]), i
    assert drawn[0].get_text().count("\n") == 1
    assert drawn[0].get_text().endswith("\N{HORIZONTAL ELLIPSIS}")


def test_dates_are_those_that_are_named_or_given_as_datetimes(rows):
    from matplotlib import dates

    seconds = rows.copy()
    seconds[:, 1] = 1.76e9 + 3600 * np.arange(len(rows))
    grid = plot.corner(seconds, seconds, dates=[1])
    start = dates.date2num(np.datetime64("2025-10-09T08:53:20"))
    points, _ = points_of(grid[1, 0])
    assert points[:, 1].min() == pytest.approx(start, abs=1e-9)
    for axis in (grid[1, 0].yaxis, grid[1, 1].xaxis, grid[2, 1].xaxis):
        assert isinstance(axis.get_major_formatter(), dates.ConciseDateFormatter)
    grid[0, 0].figure.canvas.draw()
    assert "Oct" in grid[2, 1].xaxis.get_offset_text().get_text()
    assert not isinstance(grid[2, 0].xaxis.get_major_formatter(), dates.ConciseDateFormatter)

    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(seconds, columns=["a", "when", "c"])
    for zone in (None, "UTC"):
        frame["when"] = pandas.to_datetime(seconds[:, 1], unit="s", utc=zone is not None)
        given = plot.corner(frame, seconds)
        assert given[1, 1].get_xlim() == grid[1, 1].get_xlim()
        assert given[1, 1].get_title() == "when"
        assert isinstance(given[1, 1].xaxis.get_major_formatter(), dates.ConciseDateFormatter)
    with pytest.raises(ValueError, match=r"dates is \[3\] \(list\), expected indices from 0 to 2"):
        plot.corner(seconds, dates=[3])
    frame["c"] = "text"
    with pytest.raises(TypeError, match=r"data has dtype .* in column 'c', expected real numbers or dates"):
        plot.corner(frame)
    frame.loc[3, "when"] = pandas.NaT
    with pytest.raises(ValueError, match="data has 1 of 500 rows with NaN"):
        plot.corner(frame[["a", "when"]])


def test_corner_of_constant_and_binary_columns():
    rows = np.column_stack([np.ones(50), np.arange(50) % 2, np.arange(50.0)])
    grid = plot.corner(rows, rows)
    assert grid[0, 0].get_xlim()[0] < 1 < grid[0, 0].get_xlim()[1]
    grid[0, 0].figure.canvas.draw()


def test_names_come_from_frames_and_dollars_are_not_formulas(rows):
    frame = pytest.importorskip("pandas", reason="pandas is not installed").DataFrame(rows, columns=["a", "b$", "$c$"])
    grid = plot.corner(frame)
    grid[0, 0].figure.canvas.draw()
    assert grid[2, 2].get_title() == r"\$c\$"
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed").Table.from_pandas(frame)
    assert plot.corner(arrow)[2, 2].get_title() == r"\$c\$"
    assert plot.corner(rows)[2, 2].get_title() == "x$_{2}$"


# ------------------------------------------------------------------------------------------------------ latents


def test_qq_of_normal_latents_stays_in_the_band():
    z = np.random.default_rng(1).normal(size=(4000, 5))
    ax = plot.latent_qq(z, names=list("abcde"))
    band = ax.collections[0].get_datalim(ax.transData)
    assert band.y0 < 0 < band.y1
    normal, off = ax.lines[1].get_data()
    probability, _ = plot._qq_positions(4000)
    low, high = (edge - normal for edge in plot._qq_band(4000, probability))
    share = np.mean([(line.get_ydata() >= low) & (line.get_ydata() <= high) for line in ax.lines[1:6]])
    assert share > 0.85  # 95 % of points that depend on each other
    assert np.abs(off).max() < 1


def test_qq_names_the_dimensions_that_are_off():
    z = np.random.default_rng(2).normal(size=(4000, 5))
    z[:, 3] *= 1.5
    z[:, 1] += 0.3
    shown = labels(plot.latent_qq(z, names=["p", "q", "r", "s", "t"]))
    assert shown[1].startswith("s: up to 1.")
    assert shown[2].startswith("q: up to 0.")
    assert shown[-1] == "2 more, nearer"


def test_qq_line_is_the_difference_of_quantiles():
    z = np.random.default_rng(3).normal(size=(1000, 1)) * 2
    normal, off = plot.latent_qq(z).lines[1].get_data()
    middle = np.abs(normal) < 1.5
    slope = np.polyfit(normal[middle], off[middle], 1)[0]
    assert slope == pytest.approx(1.0, abs=0.15)  # twice as wide: a slope of one more


def test_correlation_writes_r_and_the_level_of_chance():
    z = np.random.default_rng(4).normal(size=(1000, 3))
    z[:, 2] = 0.6 * z[:, 0] + 0.8 * z[:, 2]
    ax = plot.latent_correlation(z, names=["a", "b", "c"])
    r = np.corrcoef(z, rowvar=False)
    written = [float(text.get_text().replace("\N{MINUS SIGN}", "-")) for text in ax.texts]
    assert written == [round(r[1, 0], 2), round(r[2, 0], 2), round(r[2, 1], 2)]
    assert f"largest |r|: {abs(r[2, 0]):.3f}" in ax.get_title(loc="left")
    # Sidak for 3 pairs: the normal 0.5 + 0.5 * 0.95 ** (1/3) point, 2.388, over the root of 1000
    assert "up to 0.076" in ax.get_title(loc="left")


# -------------------------------------------------------------------------------------- training and likelihoods


def test_learning_curve_is_minus_the_losses(history):
    ax = plot.learning_curve(history, reference={"other": -7.5})
    assert np.array_equal(ax.lines[0].get_ydata(), -history.train_loss)
    assert np.array_equal(ax.lines[1].get_ydata(), -history.validation_loss)
    assert ax.lines[2].get_xdata()[0] == history.best_epoch
    assert "other: \N{MINUS SIGN}7.500" in labels(ax)
    assert ax.get_ylim()[0] < -7.5


def test_learning_curve_leaves_a_plunge_out_and_says_so(history):
    from dataclasses import replace

    losses = np.concatenate([[1e6], np.linspace(5, 4, 29)])
    values = dict.fromkeys(("train_loss", "validation_loss"), losses)
    same = dict.fromkeys(("learning_rate", "gradient_norm", "seconds"), np.ones(30))
    long = replace(history, epoch=np.arange(1, 31), **values, **same, best_epoch=30, best_loss=4.0)
    ax = plot.learning_curve(long)
    assert ax.get_ylim()[0] > -10
    assert any("1 epoch below" in text.get_text() for text in ax.texts)


def test_learning_curve_without_validation(rows):
    flow = nvpflow.build(3, 2, (8,), standardize=True)
    history = flow.fit(rows.astype(np.float32), validation=None, epochs=1, progress=False)
    assert labels(plot.learning_curve(history)) == ["training rows"]


def outside(ax) -> list[int]:
    """How many bars are out of the band, as the legend says."""
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    return [int(text.split(": ")[1].split(" of ")[0]) for text in texts if " of " in text]


@pytest.mark.parametrize("draws", [1, 2, 9, 30, 99])  # ranks that bars divide, and others
def test_ranks_are_uniform_where_the_draws_are_right(draws):
    truth, drawn = posterior(2000, draws, columns=3)
    ax = plot.rank_histogram(truth, drawn, names=["a", "b", "c"])
    assert sum(outside(ax)) <= 3  # of at most 60 bars, each out of its band in one case of 100
    lines = [patch.get_data().values for patch in ax.patches if patch.get_data().baseline is None]
    counts = [values for values in lines if (values == np.round(values)).all() and values.sum() == 2000][-3:]
    bars = min(20, draws + 1)
    first = ((drawn < truth[:, None]).sum(axis=1) * bars // (draws + 1) == 0).sum(axis=0)
    assert sorted(values[0] for values in counts) == sorted(first)
    assert all(len(values) == bars for values in counts)


@pytest.mark.parametrize("width", [0.7, 1.4])
def test_ranks_show_a_wrong_width(width):
    assert min(outside(plot.rank_histogram(*posterior(2000, 99, width=width)))) >= 8


def test_log_likelihood_names_the_least_likely_rows():
    log_p = np.random.default_rng(5).normal(size=1000)
    log_p[[17, 400, 3]] = [np.nan, -np.inf, -8.0]
    ax = plot.log_likelihood(log_p, outliers=3)
    outside = 1 + int(np.sum(log_p < ax.get_xlim()[0]))  # NaN is one, too
    title, *lowest = labels(ax)[1:]
    assert title == f"least likely ({outside} outside):"
    assert lowest == ["row 17 (NaN)", "row 400 (\N{MINUS SIGN}\N{INFINITY})", "row 3 (\N{MINUS SIGN}8.0)"]
    shares = ax.patches[0].get_data().values
    assert 3 <= outside < 6
    assert shares.sum() == pytest.approx(1 - outside / 1000)
    assert plot.log_likelihood(log_p, outliers=0).get_legend() is None
    named = plot.log_likelihood(log_p, names=[f"id{i}" for i in range(1000)], reference={"other": log_p})
    assert "other" in labels(named)
    assert "id17 (NaN)" in labels(named)


def test_log_likelihood_frame_holds_against_one_wild_row():
    log_p = np.append(np.random.default_rng(6).normal(size=400), -1e30)
    ax = plot.log_likelihood(log_p)
    assert ax.get_xlim()[0] > -50
    assert "least likely (1 outside):" in labels(ax)


# ------------------------------------------------------------------------------------------------------ refusals


def damaged(rows):
    changed = rows.copy()
    changed[4, 1] = np.nan
    return changed


@pytest.mark.parametrize(
    ("draw", "kind", "message"),
    [
        (lambda x: plot.corner(damaged(x)), ValueError, "data has 1 of 500 rows with NaN.*first is row 4"),
        (lambda x: plot.corner(x, damaged(x)), ValueError, "samples has 1 of 500"),
        (lambda x: plot.corner(x, x[:, :2]), ValueError, r"samples has shape \(500, 2\), expected \[N, 3\]"),
        (lambda x: plot.corner(x[0]), ValueError, r"data has shape \(3,\)"),
        (lambda x: plot.corner(x[:0]), ValueError, "at least one row"),
        (lambda x: plot.corner(np.array([["a"]])), TypeError, "data has dtype <U1, expected real numbers"),
        (lambda x: plot.corner(x, names=["a"]), ValueError, "expected 3 names"),
        (lambda x: plot.corner(x, names="abc"), ValueError, "expected 3 names"),
        (lambda x: plot.corner(x, columns=[0, 3]), ValueError, "expected indices from 0 to 2"),
        (lambda x: plot.corner(x, columns=[]), ValueError, "expected indices"),
        (lambda x: plot.corner(np.tile(x, 5)), ValueError, "15 columns.*choose some by columns="),
        (lambda x: plot.corner(x, ax=np.empty((2, 2), object)), ValueError, r"expected Axes \[3, 3\]"),
        (lambda x: plot.latent_qq(damaged(x)), ValueError, "z has 1 of 500"),
        (lambda x: plot.latent_qq(x, ax=3), TypeError, "ax is 3 .*, expected Axes"),
        (lambda x: plot.latent_correlation(x[:2]), ValueError, "N at least 3"),
        (lambda x: plot.latent_correlation(x[:, :1]), ValueError, "D at least 2"),
        (lambda x: plot.latent_correlation(x * [0, 1, 1]), ValueError, "does not vary"),
        (lambda x: plot.log_likelihood(x), ValueError, r"log_p has shape \(500, 3\), expected \[N\]"),
        (lambda x: plot.log_likelihood(x[:, 0] * np.nan), ValueError, "no finite value among 500"),
        (lambda x: plot.log_likelihood(x[:, 0], outliers=-1), ValueError, "outliers is -1"),
        (lambda x: plot.log_likelihood(x[:, 0], names=["a"]), ValueError, "expected 500 names"),
        (lambda x: plot.rank_histogram(x, x), ValueError, r"draws has shape \(500, 3\), expected \[500, L, 3\]"),
        (lambda x: plot.rank_histogram(x, x[:, None, :2]), ValueError, r"draws has shape \(500, 1, 2\), expected"),
        (lambda x: plot.rank_histogram(x, np.empty((500, 0, 3))), ValueError, "at least one draw"),
        (lambda x: plot.rank_histogram(x, damaged(x)[:, None]), ValueError, "draws has 1 of 500"),
        (lambda x: plot.rank_histogram(x, x[:, None], bins=1), ValueError, "bins is 1, expected at least 2"),
    ],
)
def test_arguments_that_are_refused(rows, draw, kind, message):
    with pytest.raises(kind, match=message):
        draw(rows)
    assert not plt.get_fignums()


def test_absence_of_matplotlib_says_what_to_install(run_python):
    script = """
import sys
sys.modules["matplotlib"] = None
import numpy as np
from nvpflow import plot
for draw in (plot.corner, plot.latent_qq, plot.latent_correlation, plot.style):
    try:
        draw(np.random.default_rng(0).normal(size=(9, 2))) if draw is not plot.style else draw()
    except ImportError as error:
        print(error)
"""
    assert run_python(script).count("pip install matplotlib") == 4
