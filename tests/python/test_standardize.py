"""What the standardize layer is set from, by `fit` and by `initialize_from`, and what becomes of rows far out."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits

NORMAL = 1.3489795003921634  # width of a normal distribution's interquartile range, in standard deviations
FAR = "x has rows that are far out"


def layer_of(flow: nvpflow.Flow) -> tuple[np.ndarray, np.ndarray]:
    parameters = flow.parameters()
    return parameters["standardize_0.mean"].copy(), parameters["standardize_0.log_std"].copy()


def cloud(rows: int, seed: int = 0, columns: int = 3, every: int = 1000, far: float = 1e5) -> np.ndarray:
    """Rows of a standard normal distribution; each `every`-th is multiplied by `far`."""
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    x[::every] *= far
    return x


def ordinary(x: np.ndarray) -> np.ndarray:
    return x[np.abs(x).max(axis=1) < 100]


def assert_layer(flow: nvpflow.Flow, centre: np.ndarray, scale: np.ndarray) -> None:
    tolerance = 1e-6 if flow.spec.dtype == "float32" else 1e-13
    mean, log_std = layer_of(flow)
    np.testing.assert_allclose(mean, centre, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.exp(log_std.astype(float)), scale, rtol=3 * tolerance)


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [4, 5, 102, 1003])
def test_robust_statistics_are_numpys(dtype, rows) -> None:
    """More columns than the implementation takes at once."""
    x = np.random.default_rng(rows).standard_cauchy(size=(rows, 37)).astype(dtype)
    flow = nvpflow.build(37, 2, (4,), dtype=dtype)
    assert set(flow.initialize_from(x, standardize="robust").values()) == {"robust"}
    low, centre, high = np.percentile(x.astype(float), [25, 50, 75], axis=0)
    assert_layer(flow, centre, (high - low) / NORMAL)
    assert flow.initialize_from(x, standardize="mean") == {}
    assert_layer(flow, x.astype(float).mean(axis=0), x.astype(float).std(axis=0))


def test_quantiles_of_many_rows_are_those_of_every_kth() -> None:
    rows = (1 << 20) + 1
    x = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    flow = nvpflow.build(2, 1, (2,))
    flow.initialize_from(x, standardize="robust")
    low, centre, high = np.percentile(x[::2].astype(float), [25, 50, 75], axis=0)
    assert_layer(flow, centre, (high - low) / NORMAL)


def test_auto_takes_quartiles_where_the_two_scales_disagree_by_ten() -> None:
    quiet = np.random.default_rng(1).normal(size=1000)
    x = np.stack([quiet, quiet, quiet], axis=1)
    x[0] = [1, 250, 340]  # standard deviations of 1, 8 and 10.8
    flow = nvpflow.build(3, dtype="float64")
    flow.column_names = ("a", "b", "c")
    assert flow.initialize_from(x) == {"c": "robust"}
    low, centre, high = np.percentile(x[:, 2], [25, 50, 75])
    assert_layer(flow, [*x[:, :2].mean(axis=0), centre], [*x[:, :2].std(axis=0), (high - low) / NORMAL])
    flow.column_names = None
    assert flow.initialize_from(x) == {"column 3": "robust"}


def test_a_column_that_is_nearly_always_small_has_no_outliers() -> None:
    r = np.random.default_rng(4)
    x = r.normal(size=(2000, 2))
    x[r.random(2000) < 0.03, 1] += 100
    assert x[:, 1].std() > 10 * np.subtract(*np.percentile(x[:, 1], [75, 25])) / NORMAL
    assert nvpflow.build(2, dtype="float64").initialize_from(x) == {}


@pytest.mark.parametrize(
    ("share", "how", "range_", "width"),
    [(0.6, "robust (5 to 95 %)", (5, 95), 3.2897072539), (0.95, "robust (1 to 99 %)", (1, 99), 4.6526957481)],
)
def test_where_quartiles_are_equal_a_wider_range_takes_their_place(share, how, range_, width) -> None:
    r = np.random.default_rng(2)
    x = r.normal(size=(2000, 2))
    x[r.random(2000) < share, 1] = 0
    flow = nvpflow.build(2, dtype="float64")
    assert flow.initialize_from(x, standardize="robust") == {"column 1": "robust", "column 2": how}
    low, high = np.percentile(x[:, 1], range_)
    np.testing.assert_allclose(np.exp(layer_of(flow)[1][1]), (high - low) / width, rtol=1e-9)
    assert flow.initialize_from(x) == {}  # the standard deviation says the same


def test_where_every_range_is_empty_it_is_the_standard_deviation() -> None:
    x = np.random.default_rng(3).normal(size=(2000, 2))
    x[10:, 1] = 5
    flow = nvpflow.build(2, dtype="float64")
    assert flow.initialize_from(x, standardize="robust") == {"column 1": "robust"}
    np.testing.assert_allclose(np.exp(layer_of(flow)[1][1]), x[:, 1].std(), rtol=1e-12)


def test_initialize_from_does_what_fit_does() -> None:
    x = ordinary(cloud(600)).astype(np.float32)
    fitted, initialized = nvpflow.build(3, 2, (4,)), nvpflow.build(3, 2, (4,))
    fitted.fit(x, validation=None, epochs=1, progress=False, callback=lambda record: False)
    initialized.initialize_from(x)
    for ours, theirs in zip(layer_of(initialized), layer_of(fitted), strict=True):
        assert_same_bits(ours, theirs, "layer")
    weights = initialized.parameters()["flow_0_coupling_dense_0.kernel"]
    assert_same_bits(weights, nvpflow.build(3, 2, (4,)).parameters()["flow_0_coupling_dense_0.kernel"], "weights")


def test_initialize_from_refuses_what_it_cannot_use() -> None:
    flow = nvpflow.build(3, 2, (4,))
    before = flow._copy_flat_parameters()
    for rows, message in [
        (np.ones((5, 3)), "x is constant in column"),
        (np.full((5, 3), np.nan), "x has 5 of 5 rows with NaN or infinite values"),
        (np.zeros((0, 3)), "x holds 0 elements, expected rows of input_size 3, at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow.initialize_from(rows.astype(np.float32))
    with pytest.raises(ValueError, match=r"standardize is 'median', expected one of auto, mean, robust"):
        flow.initialize_from(np.eye(3, dtype=np.float32), standardize="median")
    with pytest.raises(ValueError, match=r"robust; a flow has it from build\(standardize=\"covariance\"\) on"):
        flow.initialize_from(np.eye(3, dtype=np.float32), standardize="covariance")
    assert_same_bits(flow._copy_flat_parameters(), before, "after refusals")
    with pytest.raises(ValueError, match=r"does not begin with a standardize layer"):
        nvpflow.build(3, standardize=False).initialize_from(np.eye(3, dtype=np.float32))


# ---------------------------------------------------------------------------------------------- the choice


def fit(flow: nvpflow.Flow, x: np.ndarray, **options) -> nvpflow.History:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = flow.fit(x.astype(flow.spec.dtype), progress=False, **{"epochs": 2, **options})
    assert all(w.category is nvpflow.DataWarning for w in caught), [str(w.message) for w in caught]
    own = [w for w in caught if FAR in str(w.message) or "has outliers" in str(w.message)]
    asked = options.get("standardize") == "robust" or flow._statistics() == "robust"
    done = history.rows_left_out or (history.standardized and not asked)
    assert len(own) == 1 or not (own or done)
    return history


def test_build_says_what_fit_takes_and_copies_keep_it(tmp_path) -> None:
    x = cloud(300, far=1)
    flow = nvpflow.build(3, 2, (4,), standardize="robust")
    assert "standardize='robust'" in repr(flow)
    for twin in (copy.copy(flow), pickle.loads(pickle.dumps(flow)), flow.to("cpu"), flow.astype("float64")):
        assert "standardize='robust'" in repr(twin)
        assert set(fit(twin, x).standardized) == {"column 1", "column 2", "column 3"}
    flow.save(tmp_path / "flow")
    loaded = nvpflow.load(tmp_path / "flow")
    assert loaded == flow
    assert "standardize" not in repr(loaded)
    assert fit(loaded, x).standardized == {}
    assert fit(copy.copy(flow), x, standardize="mean").standardized == {}
    assert set(fit(nvpflow.build(3, 2, (4,)), x, standardize="robust").standardized.values()) == {"robust"}
    assert fit(nvpflow.build(3, 2, (4,), standardize="mean"), cloud(300), max_deviation=None).standardized == {}


def test_a_choice_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="standardize is 'mean', but the flow does not begin with"):
        nvpflow.build(3, standardize=False).fit(cloud(50).astype(np.float32), standardize="mean")
    with pytest.raises(ValueError, match="max_deviation is -1, expected a finite number, at least 0"):
        fit(nvpflow.build(3), cloud(50), max_deviation=-1)


# ---------------------------------------------------------------------------------------------- rows far out


def test_one_row_in_a_thousand_times_1e5_costs_ordinary_rows_next_to_nothing() -> None:
    """The densities are normal: a flow that is left alone comes within a hundredth of the truth."""
    x, test = cloud(3000, 1), ordinary(cloud(4000, 2))
    flow = nvpflow.build(3, 4, (16,))
    history = fit(flow, x, epochs=15)
    assert history.rows_left_out == 3
    assert history.train_rows + history.validation_rows == 2997
    assert set(history.standardized) == {"column 1", "column 2", "column 3"}
    truth = -0.5 * (3 * np.log(2 * np.pi) + np.square(test).sum(axis=1))
    lost = truth - flow.log_prob(test.astype(np.float32))
    assert abs(lost.mean()) < 0.05
    assert "left out of training and validation: 3 rows that are extremely far out" in repr(history)
    assert "column 2: robust" in repr(history)
    again = nvpflow.History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert (again.standardized, again.rows_left_out) == (history.standardized, 3)
    older = {k: v for k, v in history.to_dict().items() if k not in ("standardized", "rows_left_out")}
    assert nvpflow.History.from_dict(older).rows_left_out == 0


def test_rows_left_out_are_as_if_they_were_never_there() -> None:
    """The layer is set beforehand, and the validation rows are given, so that nothing else can differ."""
    x, validation = cloud(640), cloud(90, 5, every=30)
    flows = [nvpflow.build(3, 2, (8,)) for _ in range(2)]
    for flow in flows:
        flow.initialize_from(ordinary(x).astype(np.float32))
    left_out = fit(flows[0], x, validation=validation.astype(np.float32))
    removed = fit(flows[1], ordinary(x), validation=ordinary(validation).astype(np.float32))
    assert left_out.rows_left_out == len(x) - len(ordinary(x)) + len(validation) - len(ordinary(validation))
    assert removed.rows_left_out == 0
    assert flows[0] == flows[1]
    assert_same_bits(left_out.validation_loss, removed.validation_loss, "validation")


def test_no_row_changes_sides_and_threads_do_not_count() -> None:
    x = cloud(640, every=64)
    results = []
    for threads in (1, 3):
        flow = nvpflow.build(3, 2, (8,))
        history = fit(flow, x, validation=0.25, num_threads=threads)
        results.append(flow)
        assert history.rows_left_out == 10
        assert history.train_rows <= 480
        assert history.validation_rows <= 160
    assert results[0] == results[1]


def test_max_deviation_0_leaves_no_row_out() -> None:
    for none in (0, None):
        history = fit(nvpflow.build(3, 2, (8,)), cloud(640, far=1e3), max_deviation=none, clip_norm=1)
        assert history.rows_left_out == 0
        assert history.train_rows + history.validation_rows == 640


def test_where_no_row_is_near_it_is_said() -> None:
    flow = nvpflow.build(3, 2, (8,))
    flow.initialize_from(ordinary(cloud(200)).astype(np.float32))
    rows = ordinary(cloud(200)).astype(np.float32)
    with pytest.raises(ValueError, match=r"^x has no row within max_deviation 1e"):
        fit(flow, rows + 1e5, validation=rows)
    with pytest.raises(ValueError, match=r"^validation has no row within max_deviation 1e"):
        fit(flow, rows, validation=rows + 1e5)


def test_a_stopped_run_with_rows_left_out_goes_on(tmp_path) -> None:
    x = cloud(640, every=64)
    whole, stopped = nvpflow.build(3, 2, (8,)), nvpflow.build(3, 2, (8,))
    fit(whole, x, epochs=4)
    fit(stopped, x, epochs=4, checkpoint=tmp_path / "c", callback=lambda record: record["epoch"] < 2)
    history = fit(stopped, x, epochs=4, checkpoint=tmp_path / "c")
    assert stopped == whole
    assert (len(history), history.rows_left_out) == (4, 10)
