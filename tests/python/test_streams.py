"""Rows that come in parts: Adam's state from one call of `fit` to the next, and standardize layers that move."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits

OPTIONS = {"validation": None, "averaging": None, "schedule": "constant", "progress": False, "max_deviation": None}
DTYPES = ("float32", "float64")


def rows(count: int = 640, columns: int = 3, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns))
    x[:, 1] += 0.5 * x[:, 0] ** 2
    return x.astype(dtype)


def new_flow(dtype: str = "float32", **options) -> nvpflow.Flow:
    return nvpflow.build(3, 2, (16,), "silu", dtype=dtype, seed=1, **options)


def assert_same_weights(a: nvpflow.Flow, b: nvpflow.Flow) -> None:
    for name, value in a.parameters().items():
        assert_same_bits(value, b.parameters()[name])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_fits_with_kept_state_are_one_fit(dtype, threads) -> None:
    x = rows(dtype=dtype)
    # Losses that fall in every epoch: the best one is the last, whose weights both then have.
    whole, half = new_flow(dtype), new_flow(dtype)
    history = whole.fit(x, epochs=4, learning_rate=1e-3, num_threads=threads, **OPTIONS)
    assert history.best_epoch == 4
    adam = nvpflow.AdamState()
    for done in (1, 2, 3, 4):
        half.fit(x, epochs=1, learning_rate=1e-3, adam=adam, num_threads=threads, **OPTIONS)
        assert adam.epochs == done
    assert_same_weights(half, whole)
    assert adam.steps == 4 * 8
    assert adam.first_moment.shape == adam.second_moment.shape == (whole.num_parameters,)
    anew = new_flow(dtype)
    for _ in range(4):
        anew.fit(x, epochs=1, learning_rate=1e-3, num_threads=threads, **OPTIONS)
    assert anew != whole  # which is what the state is for


def test_rows_of_float64_and_contexts() -> None:
    x = rows(dtype="float64") + 1e6
    contexts = rows(columns=2, seed=5)
    whole, half = (new_flow(standardize=True, context_size=2) for _ in range(2))
    assert whole.fit(x, context=contexts, epochs=2, learning_rate=1e-3, **OPTIONS).best_epoch == 2
    adam = nvpflow.AdamState()
    for _ in range(2):
        half.fit(x, context=contexts, epochs=1, learning_rate=1e-3, adam=adam, **OPTIONS)
    assert half == whole


def test_the_flow_ends_with_the_weights_of_the_last_epoch() -> None:
    x, flow, adam = rows(), new_flow(), nvpflow.AdamState()
    history = flow.fit(x, epochs=3, learning_rate=0.3, adam=adam, **OPTIONS)  # too high to fall every time
    assert history.best_epoch == 3
    steps = new_flow()
    again = nvpflow.AdamState()
    for _ in range(3):
        steps.fit(x, epochs=1, learning_rate=0.3, adam=again, **OPTIONS)
    assert_same_weights(steps, flow)
    assert again == adam


def test_states_can_be_copied_and_pickled() -> None:
    x, flow, adam = rows(), new_flow(), nvpflow.AdamState()
    assert repr(adam) == "AdamState(steps=0, epochs=0)"
    flow.fit(x, epochs=1, adam=adam, **OPTIONS)
    for other in (copy.deepcopy(adam), pickle.loads(pickle.dumps(adam))):
        assert other == adam
        copied = flow.copy() if hasattr(flow, "copy") else copy.deepcopy(flow)
        copied.fit(x, epochs=1, adam=other, **OPTIONS)
        assert other != adam
        assert other.epochs == 2
    assert adam.epochs == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("steps", lambda v: v + 0.5, "adam.steps is 8.5 .float., expected an integer"),
        ("steps", lambda v: 2**63, "adam.steps is 9223372036854775808 .int., expected"),
        ("epochs", lambda v: -1, "adam.epochs is -1, expected 0 or more"),
        ("first_moment", np.float32, "adam.first_moment is .*, expected an array of float64"),
        ("first_moment", lambda v: v[1:], "adam has made 8 steps with moments of"),
        (
            "first_moment",
            lambda v: v * np.nan,
            "adam.first_moment holds NaN or infinity, expected finite numbers",
        ),
        ("second_moment", lambda v: None, "adam.second_moment is None .*, expected an array of float64"),
        ("second_moment", lambda v: v - 1, "adam.second_moment holds negative numbers, expected .* none below 0"),
    ],
)
def test_what_is_no_state_is_refused(name, change, message) -> None:
    x, flow, adam = rows(), new_flow(), nvpflow.AdamState()
    flow.fit(x, epochs=1, adam=adam, **OPTIONS)
    setattr(adam, name, change(getattr(adam, name)))
    before = copy.deepcopy(flow)
    with pytest.raises((TypeError, ValueError), match=message):
        flow.fit(x, epochs=1, adam=adam, **OPTIONS)
    assert flow == before


def test_an_interrupted_fit_leaves_the_state_of_its_weights() -> None:
    x, flow, adam = rows(), new_flow(), nvpflow.AdamState()

    def fail_after_two(record):
        if record["epoch"] == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        flow.fit(x, epochs=5, adam=adam, callback=fail_after_two, **OPTIONS)
    assert adam.epochs == 2
    other, its = new_flow(), nvpflow.AdamState()
    other.fit(x, epochs=2, adam=its, **OPTIONS)
    assert_same_weights(flow, other)
    assert its == adam


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"averaging": 0.8}, "averaging is 0.8 beside adam, expected 0: the flow ends with the weights of the last"),
        ({"max_round_trip": 1e-3}, "max_round_trip is 0.001 beside adam, expected 0"),
        ({"patience": 3, "validation": 0.1}, "patience is 3 beside adam, expected 0"),
        ({"checkpoint": "run.ckpt"}, "checkpoint is .*run.ckpt beside adam, expected none"),
    ],
)
def test_what_contradicts_a_kept_state_is_refused(options, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flow, adam = new_flow(), nvpflow.AdamState()
    with pytest.raises(ValueError, match=message):
        flow.fit(rows(), epochs=1, adam=adam, **{**OPTIONS, **options})
    assert adam == nvpflow.AdamState()


def test_states_of_other_flows_are_refused() -> None:
    x, adam = rows(), nvpflow.AdamState()
    new_flow().fit(x, epochs=1, adam=adam, **OPTIONS)
    larger = nvpflow.build(3, 2, (17,))
    with pytest.raises(ValueError, match=r"adam has made 8 steps with moments of \d+ and \d+ parameters, expected"):
        larger.fit(x, epochs=1, adam=adam, **OPTIONS)
    with pytest.raises(TypeError, match=r"adam is .*, expected an nvpflow.AdamState or None"):
        larger.fit(x, epochs=1, adam={}, **OPTIONS)


def test_a_standardize_layer_moves_with_the_rows() -> None:
    x, flow, adam = rows(), new_flow(standardize=True), nvpflow.AdamState()
    options = {"epochs": 1, "adam": adam, **OPTIONS}
    flow.fit(x, **options)
    before = flow.parameters()
    moved = 3 * x + 100
    with pytest.warns(nvpflow.DataWarning, match="the flow was trained around"):
        flow.fit(moved, **options)
    assert_same_bits(flow.parameters()["standardize_0.mean"], before["standardize_0.mean"])
    flow.fit(moved, restandardize=True, **options)
    np.testing.assert_allclose(flow.parameters()["standardize_0.mean"], moved.mean(0), rtol=1e-5)
    np.testing.assert_allclose(flow.parameters()["standardize_0.log_std"], np.log(moved.std(0)), atol=1e-5)
    with pytest.raises(ValueError, match="restandardize is true, but the flow standardizes neither its rows nor"):
        new_flow(standardize=False).fit(x, restandardize=True, epochs=1, **OPTIONS)
    with pytest.raises(TypeError, match="restandardize"):
        flow.fit(x, restandardize="yes", epochs=1, **OPTIONS)


def test_a_flow_follows_a_stream_that_drifts() -> None:
    flow, adam = new_flow(standardize=True), nvpflow.AdamState()
    for part in range(6):
        x = rows(seed=part) * (1 + part) + 50 * part
        flow.fit(x, epochs=1, restandardize=True, adam=adam, learning_rate=1e-2, **OPTIONS)
    new = rows(seed=99) * 6 + 250
    gaussian = -0.5 * (((new - new.mean(0)) / new.std(0)) ** 2).sum(1) - np.log(new.std(0) * np.sqrt(2 * np.pi)).sum()
    assert flow.log_prob(new).mean() > gaussian.mean()


# ---- estimators ------------------------------------------------------------------------------------------------------


def test_estimators_learn_in_parts() -> None:
    sklearn = pytest.importorskip("nvpflow.sklearn", reason="scikit-learn is not installed")
    density = sklearn.FlowDensity(hidden_sizes=(16,), num_flows=2, random_state=3, learning_rate=1e-3)
    for part in range(3):
        assert density.partial_fit(rows(seed=part)) is density
    assert density.n_iter_ == density.adam_.epochs == 3
    flow, adam = nvpflow.build(3, 2, (16,), "relu", seed=3), nvpflow.AdamState()
    options = {**OPTIONS, "max_deviation": 1000.0}
    for part in range(3):
        flow.fit(rows(seed=part), epochs=1, seed=3, adam=adam, learning_rate=1e-3, **options)
    assert_same_weights(flow, density.flow_)
    other = pickle.loads(pickle.dumps(density))
    other.partial_fit(rows(seed=7))
    density.partial_fit(rows(seed=7))
    assert other.flow_ == density.flow_
    moved = rows(seed=8) + 40
    density.partial_fit(moved, restandardize=True)
    np.testing.assert_allclose(density.flow_.parameters()["standardize_0.mean"], moved.mean(0), rtol=1e-4)
    with pytest.raises(ValueError, match="features"):
        density.partial_fit(rows(columns=4))
    density.set_params(epochs=2).fit(rows())
    assert not hasattr(density, "adam_")
    density.partial_fit(rows())  # goes on from fit
    assert density.n_iter_ == 3


def test_a_detector_sets_its_threshold_by_each_part() -> None:
    sklearn = pytest.importorskip("nvpflow.sklearn", reason="scikit-learn is not installed")
    detector = sklearn.FlowOutlierDetector(contamination=0.05, hidden_sizes=(16,), num_flows=2, random_state=3)
    for part in range(2):
        x = rows(seed=part)
        detector.partial_fit(x)
        assert np.mean(detector.predict(x) < 0) == pytest.approx(0.05, abs=0.01)
