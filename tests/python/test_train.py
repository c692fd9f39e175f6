"""fit: its updates against the oracle's AdamW, its reproducibility, its stops, and the data it must refuse."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from oracle import AdamW, assert_same_bits, clip_to_norm, oracle_of, unit_data

SIZE = 5


def curved(rows: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Five columns with something to learn: two depend on the other three."""
    x = unit_data(rows, SIZE, seed)
    x[:, 3] = 0.3 * x[:, 3] + np.sin(2 * x[:, 0])
    x[:, 4] = 0.3 * x[:, 4] + x[:, 1] * x[:, 2]
    return x.astype(dtype)


def new_flow(dtype: str = "float32", **options):
    options = {"num_flows": 3, "hidden_sizes": (16,), "activation": "tanh", "standardize": False, "seed": 1, **options}
    return nvpflow.build(input_size=SIZE, dtype=dtype, **options)


def flat(flow) -> np.ndarray:
    return np.concatenate([value.ravel() for value in flow.parameters().values()])


def fit(flow, x, **options):
    return flow.fit(x, **{"progress": False, "epochs": 4, "batch_size": 64, "seed": 3, **options})


# ---------------------------------------------------------------------------------------------- what a step does


@pytest.mark.parametrize(
    ("learning_rate", "weight_decay", "clip_norm"),
    [(1e-3, 0.0, None), (3e-2, 0.1, None), (1e-2, 0.0, 0.05), (1e-2, 0.3, 0.5)],
)
def test_steps_are_adamw_on_the_oracles_gradient(make_flow, learning_rate, weight_decay, clip_norm) -> None:
    """One batch of all rows, so that their order cannot matter; constant learning rate; float64."""
    flow, oracle = make_flow(SIZE, 3, (7,), "silu")
    x = curved(200, dtype="float64")
    optimiser = AdamW(learning_rate, weight_decay)
    losses, norms = [], []
    for _ in range(6):
        loss, gradients = oracle.nll_gradient(x)
        gradients, norm = clip_to_norm(gradients, clip_norm or np.inf)
        losses.append(loss)
        norms.append(norm)
        optimiser.step(oracle.parameters, gradients)

    history = fit(
        flow,
        x,
        validation=None,
        epochs=6,
        batch_size=200,
        learning_rate=learning_rate,
        schedule="constant",
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )
    np.testing.assert_allclose(history.train_loss, losses, rtol=1e-10)
    np.testing.assert_allclose(history.gradient_norm, norms, rtol=1e-9)
    np.testing.assert_array_equal(history.learning_rate, learning_rate)
    assert history.best_epoch == 6
    for name, value in flow.parameters().items():
        # Adam divides by the gradient's own size: where that is near zero its rounding becomes the step's.
        np.testing.assert_allclose(value, oracle.parameters[name], rtol=0, atol=1e-4 * learning_rate, err_msg=name)
    if clip_norm is not None:
        assert min(norms) > clip_norm, "the clipping was never needed: the test says nothing"


def test_weight_decay_is_on_kernels_alone() -> None:
    x = curved(256, dtype="float64")
    plain, decayed = new_flow("float64"), new_flow("float64")
    shared = {"validation": None, "epochs": 1, "batch_size": 256, "schedule": "constant", "learning_rate": 1e-2}
    start = {name: value.copy() for name, value in plain.parameters().items()}
    fit(plain, x, weight_decay=0.0, **shared)
    fit(decayed, x, weight_decay=0.5, **shared)
    for name, value in decayed.parameters().items():
        difference = value - plain.parameters()[name]
        expected = -1e-2 * 0.5 * start[name] if name.endswith(".kernel") else np.zeros_like(value)
        np.testing.assert_allclose(difference, expected, rtol=0, atol=1e-15, err_msg=name)


def test_cosine_schedule_runs_from_the_full_rate_to_nearly_none() -> None:
    x = curved(640)
    rate, epochs, steps = 1e-2, 8, 10
    history = fit(new_flow(), x, validation=None, epochs=epochs, learning_rate=rate, schedule="cosine")
    last_steps = np.arange(1, epochs + 1) * steps - 1  # of each epoch, counted from 0
    np.testing.assert_allclose(
        history.learning_rate, rate * (1 + np.cos(np.pi * last_steps / (epochs * steps))) / 2, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "softplus"])
def test_the_loss_falls(dtype, activation) -> None:
    flow = new_flow(dtype, activation=activation, standardize=True)
    x = curved(4000, dtype=dtype)
    before = flow.nll(x)
    history = fit(flow, x, epochs=15, learning_rate=5e-3, weight_decay=0, clip_norm=None)
    assert history.train_loss[-1] < history.train_loss[0] - 0.3
    assert history.best_loss < before - 1.0
    assert flow.nll(x) == pytest.approx(history.best_loss, abs=0.2)
    assert len(history.train_loss) == 15
    assert history.stop_reason == "epochs"
    assert np.all(np.diff(history.epoch) == 1)
    assert np.all(history.seconds > 0)


def test_every_row_is_used_once_per_epoch() -> None:
    """At a learning rate near zero the mean loss of an epoch is that of all the rows, the last short batch included."""
    x = curved(1000, dtype="float64")
    flow = new_flow("float64")
    expected = flow.nll(x)
    for batch_size in (1, 7, 64, 1000):
        history = fit(flow, x, validation=None, epochs=1, batch_size=batch_size, learning_rate=1e-15)
        assert history.train_loss[0] == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------------------------------- reproducible


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hidden_sizes", [(16,), (300, 200)], ids=["narrow", "updates shared by threads"])
def test_same_seed_same_bits_for_any_number_of_threads(hidden_sizes, dtype) -> None:
    x = curved(2000, dtype=dtype)
    shape = {"hidden_sizes": hidden_sizes, "standardize": True}
    reference = new_flow(dtype, **shape)
    first = fit(reference, x, batch_size=512, weight_decay=0.01, clip_norm=1.0, num_threads=1)
    for threads in (1, 2, 3, 4):
        flow = new_flow(dtype, **shape)
        history = fit(flow, x, batch_size=512, weight_decay=0.01, clip_norm=1.0, num_threads=threads)
        assert_same_bits(flat(flow), flat(reference), f"{threads} threads")
        assert_same_bits(history.train_loss, first.train_loss, f"{threads} threads: losses")
        assert_same_bits(history.validation_loss, first.validation_loss, f"{threads} threads: validation")
    other = new_flow(dtype, **shape)
    fit(other, x, batch_size=512, weight_decay=0.01, clip_norm=1.0, seed=4)
    assert np.any(flat(other) != flat(reference))


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of few epochs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path, dtype, stop_after) -> None:
    x = curved(1500, dtype=dtype)
    options = {"epochs": 6, "weight_decay": 0.02, "clip_norm": 2.0, "learning_rate": 3e-3}
    whole = new_flow(dtype, standardize=True)
    expected = fit(whole, x, **options)

    path = tmp_path / "run.checkpoint"
    stopped = new_flow(dtype, standardize=True)
    part = fit(stopped, x, checkpoint=path, callback=lambda record: record["epoch"] < stop_after, **options)
    assert part.stop_reason == "callback"
    assert list(part.epoch) == list(range(1, stop_after + 1))
    assert path.exists()

    seen = []
    resumed = new_flow(dtype, standardize=True, seed=99)  # other initial weights: the checkpoint's count
    history = fit(resumed, x, checkpoint=path, callback=lambda record: seen.append(record["epoch"]), **options)
    assert seen == list(range(stop_after + 1, 7))
    assert_same_bits(flat(resumed), flat(whole), "weights")
    assert_same_bits(history.train_loss, expected.train_loss, "losses")
    assert_same_bits(history.validation_loss, expected.validation_loss, "validation losses")
    assert (history.best_epoch, history.best_loss) == (expected.best_epoch, expected.best_loss)


def stored(path: Path, name: str, dtype: str) -> np.ndarray:
    """A tensor of a checkpoint."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8:start])[name]["data_offsets"]
    return np.frombuffer(raw[start + begin : start + end], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_epoch_counts_by_the_better_of_its_weights_and_their_average(tmp_path, dtype) -> None:
    x, validation, kept, path = curved(600, dtype=dtype), curved(400, 5, dtype), 0.6, tmp_path / "run.checkpoint"
    options = {"validation": validation, "epochs": 30, "learning_rate": 5e-2, "schedule": "constant"}
    weights: list[np.ndarray] = []

    def remember(_: object) -> None:
        weights.append(stored(path, "parameters", dtype))

    plain = fit(new_flow(dtype), x, averaging=None, checkpoint=path, callback=remember, **options)
    flow, probe = new_flow(dtype), new_flow(dtype)
    history = fit(flow, x, averaging=kept, **options)
    assert_same_bits(history.train_loss, plain.train_loss, "the updates do not depend on the average")

    candidates, losses = [], []
    for n in range(1, 31):
        shares = kept ** np.arange(n)[::-1]
        average = (shares / shares.sum()) @ np.stack(weights[:n]).astype(np.float64)
        both = []
        for values in (weights[n - 1], average.astype(dtype)):
            probe._set_flat_parameters(values)
            both.append(probe.nll(validation))
        losses.append(min(both))
        candidates.append(average if both[1] < both[0] else weights[n - 1])
        if n == 1:
            assert_same_bits(average.astype(dtype)[:10], weights[0][:10], "the first average")
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(history.validation_loss, losses, rtol=tolerance)
    assert history.best_epoch == 1 + int(np.argmin(losses))
    assert min(losses) < min(plain.validation_loss) - 0.02, "the average takes out the noise of a constant step size"
    np.testing.assert_allclose(flat(flow), candidates[history.best_epoch - 1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rows", "decay"), [(4000, (225 * SIZE / 4000) ** 2), (900, 1.0)])
def test_the_automatic_weight_decay_falls_with_the_square_of_the_rows(rows, decay) -> None:
    automatic, told, none = new_flow(), new_flow(), new_flow()
    fit(automatic, curved(rows), validation=None, epochs=2)
    fit(told, curved(rows), validation=None, epochs=2, weight_decay=decay)
    fit(none, curved(rows), validation=None, epochs=2, weight_decay=0)
    assert_same_bits(flat(automatic), flat(told), "weights")
    assert np.any(flat(automatic) != flat(none))


def test_the_average_leaves_the_standardize_layer_as_it_is() -> None:
    x = 1e3 + curved(600)
    layers = []
    for averaging in (None, 0.7):
        flow = new_flow(standardize=True)
        fit(flow, x, averaging=averaging, epochs=6, learning_rate=3e-2)
        layers.append(np.concatenate([flow.parameters()[f"standardize_0.{name}"] for name in ("mean", "log_std")]))
    assert_same_bits(layers[0], layers[1], "mean and log_std")


def test_a_checkpoint_of_another_run_is_refused(tmp_path) -> None:
    x = curved(500)
    path = tmp_path / "run.checkpoint"
    fit(new_flow(), x, checkpoint=path, epochs=1, callback=lambda record: False)
    before = path.read_bytes()
    for changed in (
        {"batch_size": 32},
        {"learning_rate": 0.5},
        {"seed": 8},
        {"schedule": "constant"},
        {"epochs": 9},
        {"averaging": 0.5},
    ):
        flow = new_flow()
        weights = flat(flow)
        with pytest.raises(ValueError, match=next(iter(changed))):
            fit(flow, x, checkpoint=path, **{"epochs": 1, **changed})
        assert_same_bits(flat(flow), weights, "weights after a refused checkpoint")
    with pytest.raises(ValueError, match=r"hidden_sizes.*16.*17|hidden_sizes.*17.*16"):
        fit(new_flow(hidden_sizes=(17,)), x, checkpoint=path, epochs=1)
    for rows in (499, 100):  # with so few a batch of its own size
        with pytest.raises(ValueError, match=rf'its x is "500 rows .*", this run\'s is "{rows} rows'):
            new_flow().fit(curved(rows), checkpoint=path, epochs=1, progress=False)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(nvpflow.FileFormatError):
        fit(new_flow(), x, checkpoint=path, epochs=1)


def changed_checkpoint(content: bytes, tensors: dict[str, dict[int, float]], **training: object) -> bytes:
    """The checkpoint with some elements of tensors and some values of its description replaced."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    metadata = header["__metadata__"]
    metadata["nvpflow.training"] = json.dumps(json.loads(metadata["nvpflow.training"]) | training)
    for name, elements in tensors.items():
        begin, end = header[name]["data_offsets"]
        values = np.frombuffer(bytes(data[begin:end]), "<f8" if header[name]["dtype"] == "F64" else "<f4").copy()
        for index, value in elements.items():
            values[index] = value
        data[begin:end] = values.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def refused_checkpoints() -> dict[str, tuple[str, dict[str, dict[int, float]], dict[str, object]]]:
    """What a checkpoint of 2 epochs of 7 steps cannot hold, and what its message says."""
    found: dict[str, tuple[str, dict[str, dict[int, float]], dict[str, object]]] = {}
    for steps in (0, 2, 13, 15, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1):
        found[f"steps {steps}"] = ("adam_steps", {}, {"adam_steps": steps})
    for epoch in (-1, 3, 2**63 - 1, 2**64 - 1):
        found[f"best epoch {epoch}"] = ("best_epoch", {}, {"best_epoch": epoch})
    found["best epoch 0"] = ("best_loss", {}, {"best_epoch": 0})
    for value in (math.nan, math.inf, -math.inf, -1e30):
        found[f"best loss {value}"] = ("best_loss", {"best_loss": {0: value}}, {})
    fields = ("train_loss", "validation_loss", "learning_rate", "gradient_norm", "seconds")
    for value in (math.nan, math.inf, -math.inf):
        for at, field in enumerate(fields, start=1):
            found[f"{field} {value}"] = (f"epoch 2 of its history has {field}", {"history": {7 + at: value}}, {})
        for name in ("parameters", "best_parameters", "first_moment", "second_moment"):
            found[f"{name} {value}"] = (name, {name: {3: value}}, {})
    found["round trip"] = ("epoch 1 of its history has round_trip", {"history": {6: 0.5}}, {})
    found["second moment"] = ("second_moment holds NaN, negative", {"second_moment": {0: -1e-6}}, {})
    return found


@pytest.mark.parametrize("case", refused_checkpoints())
def test_a_checkpoint_that_training_cannot_have_written_is_refused(tmp_path, case) -> None:
    message, tensors, training = refused_checkpoints()[case]
    x = curved(500)
    path = tmp_path / "run.checkpoint"
    options = {"epochs": 4, "batch_size": 64, "checkpoint": path}
    fit(new_flow(), x, callback=lambda record: record["epoch"] < 2, **options)
    content = path.read_bytes()
    path.write_bytes(changed_checkpoint(content, {}))
    assert len(fit(new_flow(), x, callback=lambda record: False, **options)) == 3  # as it is, it goes on
    path.write_bytes(changed_checkpoint(content, tensors, **training))
    flow = new_flow()
    weights = flat(flow)
    with pytest.raises(nvpflow.FileFormatError, match=message):
        fit(flow, x, **options)
    assert_same_bits(flat(flow), weights, "weights after a refused checkpoint")


# ---------------------------------------------------------------------------------------------- validation and stops


def test_validation_array_is_scored_as_it_is() -> None:
    x, validation = curved(1000), curved(333, seed=9)
    flow = new_flow()
    losses = []
    history = fit(flow, x, validation=validation, callback=lambda record: losses.append(record["validation_loss"]))
    assert history.validation_rows == 333
    assert history.train_rows == 1000
    assert losses == list(history.validation_loss)
    assert history.best_loss == min(losses)
    assert history.best_epoch == 1 + int(np.argmin(losses))
    assert flow.nll(validation) == pytest.approx(history.best_loss, rel=1e-6)


def test_validation_fraction_sets_rows_aside() -> None:
    x = curved(1000)
    history = fit(new_flow(), x, validation=0.25)
    assert (history.train_rows, history.validation_rows) == (750, 250)
    assert np.all(np.isfinite(history.validation_loss))
    flow = new_flow()
    history = fit(flow, x, validation=None)
    assert (history.train_rows, history.validation_rows) == (1000, 0)
    assert np.all(np.isnan(history.validation_loss))
    # Of the weights after the best epoch, which the epoch's own mean is not.
    assert history.best_loss == pytest.approx(flow.nll(x), rel=1e-6)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one step
def test_validation_rows_are_not_trained_on() -> None:
    """A hundred outliers far away: if any were trained on, the training loss would show it."""
    x = curved(1000, dtype="float64")
    flow = new_flow("float64")
    history = fit(flow, x, validation=0.2, epochs=1, batch_size=800, learning_rate=1e-15)
    # 800 rows trained and 200 set aside are all the rows: the two means make the mean of all.
    together = 0.8 * history.train_loss[0] + 0.2 * history.validation_loss[0]
    assert together == pytest.approx(flow.nll(x), rel=1e-9)
    assert abs(history.train_loss[0] - history.validation_loss[0]) > 1e-6


def test_patience_stops_and_restores_the_best_epoch() -> None:
    x, validation = curved(128), curved(2000, seed=5)
    weights = {}
    flow = new_flow(hidden_sizes=(64, 64))

    def remember(record) -> None:
        weights[record["epoch"]] = flat(flow)

    # 128 rows and two wide hidden layers: it overfits.
    history = fit(
        flow, x, validation=validation, epochs=400, batch_size=128, learning_rate=1e-2, schedule="constant",
        patience=5, callback=remember,
    )  # fmt: skip
    assert history.stop_reason == "patience"
    assert len(history.epoch) == history.best_epoch + 5
    assert history.best_epoch == 1 + int(np.argmin(history.validation_loss))
    assert flow.nll(validation) == pytest.approx(history.best_loss, rel=1e-5)
    assert flow.nll(validation) < history.validation_loss[-1]


def test_patience_needs_validation() -> None:
    with pytest.raises(ValueError, match=r"patience.*validation"):
        fit(new_flow(), curved(200), validation=None, patience=3)


def test_a_callback_that_returns_false_stops() -> None:
    flow = new_flow()
    history = fit(flow, curved(500), epochs=50, callback=lambda record: record["epoch"] != 2)
    assert history.stop_reason == "callback"
    assert list(history.epoch) == [1, 2]


def test_an_exception_in_the_callback_passes_through_and_keeps_the_best_weights() -> None:
    x = curved(500)
    flow, reference = new_flow(), new_flow()

    class Stop(Exception):
        pass

    def fail(record) -> None:
        if record["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(flow, x, callback=fail, schedule="constant")
    history = fit(reference, x, callback=lambda record: record["epoch"] < 2, schedule="constant")
    assert history.best_epoch in (1, 2)
    assert_same_bits(flat(flow), flat(reference), "best weights")


def test_the_record_of_an_epoch() -> None:
    records = []
    history = fit(new_flow(), curved(500), callback=records.append)
    assert [sorted(record) for record in records] == [
        sorted(["epoch", "train_loss", "validation_loss", "learning_rate", "gradient_norm", "seconds", "round_trip"])
    ] * 4
    assert [record["train_loss"] for record in records] == list(history.train_loss)
    assert [record["gradient_norm"] for record in records] == list(history.gradient_norm)


# ---------------------------------------------------------------------------------------------- standardize


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_standardize_is_set_from_the_training_rows_and_not_trained(dtype) -> None:
    x = (curved(3000, dtype="float64") * [1.0, 10.0, 0.1, 2.0, 1e3] + [0.0, 5.0, -1.0, 100.0, 1e4]).astype(dtype)
    flow = new_flow(dtype, standardize=True)
    fit(flow, x, validation=None, epochs=3)
    parameters = flow.parameters()
    wide = x.astype(np.float64)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(
        parameters["standardize_0.mean"], wide.mean(axis=0), rtol=tolerance, atol=1e-3 * tolerance
    )
    np.testing.assert_allclose(np.exp(parameters["standardize_0.log_std"]), wide.std(axis=0), rtol=1e-3)
    np.testing.assert_allclose(parameters["standardize_0.log_std"], np.log(wide.std(axis=0)), atol=max(tolerance, 2e-4))

    # It is no longer the identity: a second fit on other data leaves it alone, and says so where they lie far off.
    mean, log_std = parameters["standardize_0.mean"].copy(), parameters["standardize_0.log_std"].copy()
    with pytest.warns(nvpflow.DataWarning, match=r"column 3 has mean .* the flow was trained around -0\.99"):
        fit(flow, (x + 1).astype(dtype), validation=None, epochs=1)
    assert_same_bits(flow.parameters()["standardize_0.mean"], mean, "mean")
    assert_same_bits(flow.parameters()["standardize_0.log_std"], log_std, "log_std")


def test_standardize_does_not_look_at_the_validation_rows() -> None:
    x, validation = curved(500), curved(100, seed=7) + 50
    flow = new_flow(standardize=True)
    fit(flow, x, validation=validation, epochs=1)
    np.testing.assert_allclose(flow.parameters()["standardize_0.mean"], x.mean(axis=0), atol=1e-5)


def test_a_constant_column_cannot_be_standardized() -> None:
    x = curved(300)
    x[:, 2] = 4.5
    flow = new_flow(standardize=True)
    before = flat(flow)
    with pytest.raises(ValueError, match=r"column 3 is constant, 4.5"):
        fit(flow, x)
    assert_same_bits(flat(flow), before, "weights")


# ---------------------------------------------------------------------------------------------- what must be refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_counted_and_named(bad) -> None:
    x = curved(1000)
    x[[17, 401, 999], [0, 3, 4]] = bad
    flow = new_flow()
    before = flat(flow)
    with pytest.raises(ValueError, match=r"^x\b.*\b3\b.*\b17\b.*\b401\b"):
        fit(flow, x)
    assert_same_bits(flat(flow), before, "weights")
    validation = curved(50)
    validation[31, 1] = bad
    with pytest.raises(ValueError, match=r"validation.*\b1\b.*\b31\b"):
        fit(flow, curved(1000), validation=validation)


@pytest.mark.parametrize("rows", [1, 50, 64])
@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")  # of few rows
def test_a_batch_is_all_rows_where_there_are_fewer(rows) -> None:
    whole, more = new_flow(), new_flow()
    fit(whole, curved(rows), validation=None, batch_size=rows)
    fit(more, curved(rows), validation=None, batch_size=10_000)
    assert_same_bits(flat(whole), flat(more), "weights")
    with pytest.raises(ValueError, match=r"^x has no rows"):
        fit(new_flow(), curved(0), validation=None)


@pytest.mark.parametrize(("rows", "taken"), [(10, 10), (20, 16), (128, 16), (129, 17), (1000, 125), (5000, 256)])
@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")  # of few rows
def test_the_automatic_batch_leaves_few_rows_several_steps(rows, taken) -> None:
    """An eighth of the rows, at least 16 and at most 256; with 20 rows `fit` once asked for a batch_size."""
    automatic, told = new_flow(), new_flow()
    fit(automatic, curved(rows), validation=None, epochs=1, batch_size=None)
    fit(told, curved(rows), validation=None, epochs=1, batch_size=taken)
    assert_same_bits(flat(automatic), flat(told), "weights")
    default = new_flow()
    history = default.fit(curved(max(rows, 20)), epochs=1, progress=False)
    assert history.validation_rows == max(rows, 20) // 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs.*0"),
        ({"epochs": -1}, r"epochs.*-1"),
        ({"batch_size": 0}, r"batch_size.*0"),
        ({"batch_size": -5}, r"batch_size.*-5"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"averaging": 1.0}, "averaging is 1"),
        ({"averaging": -0.1}, "averaging is -0.1"),
        ({"averaging": float("nan")}, "averaging"),
        ({"patience": -1}, "patience"),
        ({"validation": 1.0}, "validation"),
        ({"validation": -0.1}, "validation"),
        ({"validation": float("nan")}, "validation"),
        ({"schedule": "linear"}, "schedule.*linear.*constant.*cosine|schedule.*linear.*cosine.*constant"),
        ({"seed": -1}, "seed"),
        ({"num_threads": -1}, "num_threads is -1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused_and_named(options, message) -> None:
    flow = new_flow()
    before = flat(flow)
    with pytest.raises(ValueError, match=message):
        fit(flow, curved(200), **options)
    assert_same_bits(flat(flow), before, "weights")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2.5}, "epochs"),
        ({"batch_size": "64"}, "batch_size"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"schedule": 3}, "schedule"),
        ({"callback": 3}, "callback"),
        ({"checkpoint": 3}, "checkpoint"),
        ({"seed": 1.5}, "seed"),
        ({"progress": "yes"}, "progress"),
        ({"nonsense": 1}, "nonsense"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_of_the_wrong_type_are_refused_and_named(options, message) -> None:
    with pytest.raises(TypeError, match=message):
        fit(new_flow(), curved(200), **options)


def test_arrays_of_the_wrong_kind_are_refused_and_named() -> None:
    flow = new_flow()
    with pytest.raises(ValueError, match=r"^x\b.*\(200, 4\)"):
        fit(flow, curved(200)[:, :4])
    with pytest.raises(ValueError, match=r"^x\b.*\(5,\)"):
        fit(flow, curved(200)[0])
    with pytest.raises(TypeError, match=r"^x\b.*float64.*float32"):
        fit(flow, curved(200, dtype="float64"))
    with pytest.raises(ValueError, match=r"^validation\b.*\(50, 4\)"):
        fit(flow, curved(200), validation=curved(50)[:, :4])
    with pytest.raises((ValueError, TypeError), match=r"^validation\b"):
        fit(flow, curved(200), validation=curved(0))


@pytest.mark.parametrize("batch_size", [64, 1000])
@pytest.mark.parametrize("validation", [None, curved(100, seed=4)], ids=["none", "array"])
def test_a_loss_that_is_no_number_stops_with_the_step_and_good_weights(validation, batch_size) -> None:
    x = curved(1000)
    flow = new_flow(activation="relu", scale_bound=50.0)
    before = flow.nll(x)
    with pytest.raises(nvpflow.TrainingError, match=r"step \d+"):
        fit(flow, x, validation=validation, epochs=200, batch_size=batch_size, learning_rate=1e18, schedule="constant")
    assert np.all(np.isfinite(flat(flow)))
    assert flow.nll(x) <= before, "worse than what training started from"


# ---------------------------------------------------------------------------------------------- interruption

_LONG_FIT = """
import sys, time
import numpy as np, nvpflow
x = np.random.default_rng(0).normal(size=(400_000, 16)).astype(np.float32)
x[:, 8:] += np.sin(2 * x[:, :8])
flow = nvpflow.build(input_size=16, num_flows=8, hidden_sizes=(128, 128), seed=1)
initial = flow.nll(x[:10_000])
epochs = 0
def callback(record):
    global epochs
    epochs += 1
    print("epoch", flush=True)
print("started", flush=True)
try:
    flow.fit(x[:int(sys.argv[1])], epochs=10_000, seed=1, callback=callback, progress=False)
except KeyboardInterrupt:
    used = time.process_time()
    print("stopped", used, epochs, flow.nll(x[:10_000]) - initial, flush=True)
"""


def _processor_seconds(pid: int) -> float:
    """Processor time that a process has used, by Linux's /proc; elsewhere infinity, which asks nothing of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
@pytest.mark.parametrize(("rows", "wait_for"), [(400_000, "started"), (4_000, "epoch")], ids=["first epoch", "later"])
def test_ctrl_c_stops_within_a_second_and_keeps_the_best_weights(rows, wait_for) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _LONG_FIT, str(rows)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    try:
        for line in process.stdout:
            if line.strip() == wait_for:
                break
        time.sleep(0.7)
        used = _processor_seconds(process.pid)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    stopped, epochs, change = rest.splitlines()[-1].removeprefix("stopped").split()
    # A second on the clock of an idle machine. Processor time of all threads does not depend on what else runs.
    assert float(stopped) - used < 1.5 * nvpflow.available_threads()
    # The flow holds the best weights so far: the initial ones until an epoch is done.
    if int(epochs) == 0:
        assert float(change) == 0
    else:
        assert float(change) < -0.01


def test_fit_agrees_with_itself_after_conversion() -> None:
    """A Fortran-ordered array and a memory map are the same data."""
    x = curved(500)
    first, second = new_flow(), new_flow()
    fit(first, x)
    fit(second, np.asfortranarray(x))
    assert_same_bits(flat(first), flat(second), "Fortran order")


def test_trained_weights_score_as_the_oracle_says() -> None:
    flow = new_flow("float64", standardize=True)
    x = curved(1000, dtype="float64")
    history = fit(flow, x, validation=x[:200], epochs=3)
    assert oracle_of(flow).nll(x[:200]) == pytest.approx(history.best_loss, rel=1e-12)
