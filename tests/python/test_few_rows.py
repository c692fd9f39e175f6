"""Training on few rows: folds, the flow as it starts, and the Gaussian that it must not be worse than."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvpflow
import pytest

SMALL: dict[str, Any] = {"num_flows": 2, "hidden_sizes": (16,), "standardize": "covariance"}


def normal(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size))


def exponential(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return rng.exponential(size=(count, size)) @ rng.normal(size=(size, size))


def student(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return rng.standard_t(4, size=(count, size)) @ rng.normal(size=(size, size))


def mixture(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return 3 * rng.normal(size=(4, size))[rng.integers(4, size=count)] + rng.normal(size=(count, size))


def bent(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    z = rng.normal(size=(count, size))
    z[:, 1:] += np.square(z[:, :1]) - 1
    return z


def of_unlike_units(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return normal(rng, count, size) * np.geomspace(0.01, 100, size)


KINDS = (normal, exponential, student, mixture, bent, of_unlike_units)
SIZES = ((30, 2), (60, 5), (200, 5), (200, 20), (1000, 10), (5000, 8))
QUICK = ((60, 5), (200, 5))


def tables(sizes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for kind in KINDS:
        for count, size in sizes:
            rows = kind(np.random.default_rng([1, count, size]), count + 5000, size)
            yield f"{kind.__name__} {count} x {size}", rows[:count], rows[count:]


def gaussian(x: np.ndarray, rows: np.ndarray) -> float:
    """The mean log-density by scikit-learn's estimator, from the rows as they are."""
    stats = pytest.importorskip("scipy.stats")
    found = pytest.importorskip("sklearn.covariance").LedoitWolf().fit(x)
    return float(stats.multivariate_normal(found.location_, found.covariance_).logpdf(rows).mean())


def losses(sizes: tuple[tuple[int, int], ...]) -> dict[str, tuple[float, float]]:
    """What flows as they start, and fitted ones, lose against the Gaussian where either is more than 0.05 nats."""
    worse = {}
    for name, x, held_out in tables(sizes):
        flow = nvpflow.build(x.shape[1], standardize="covariance")
        flow.initialize_from(x)
        base = gaussian(x, held_out)
        starts = base - float(flow.log_probability(held_out).mean())
        flow = nvpflow.build(x.shape[1], standardize="covariance")
        flow.fit(x, progress=False)
        loss = base - float(flow.log_probability(held_out).mean())
        if max(starts, loss) > 0.05:
            worse[name] = starts, loss
    return worse


@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
def test_never_worse_than_a_gaussian() -> None:
    assert losses(QUICK) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
def test_never_worse_than_a_gaussian_on_36_tables() -> None:
    assert losses(SIZES) == {}


@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
@pytest.mark.parametrize("standardize", [True, "covariance"])
@pytest.mark.parametrize("count", [2, 3, 5, 9, 10, 17])
def test_from_two_rows_on(count: int, standardize: Any) -> None:
    x = np.random.default_rng(count).normal(size=(count, 3))
    flow = nvpflow.build(3, 2, (8,), standardize=standardize)
    history = flow.fit(x, epochs=4, batch_size=1000, progress=False)
    folds = count if count < 10 else 5 if standardize == "covariance" else 0
    assert history.folds == folds
    assert np.isfinite(flow.log_probability(x)).all()
    if folds:
        assert history.train_rows == history.validation_rows == count
        assert f"{count} training rows, validated in {folds} folds" in repr(history)


@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
def test_no_rows_and_one() -> None:
    flow = nvpflow.build(3, **SMALL)
    with pytest.raises(ValueError, match="x has no rows, expected at least one"):
        flow.fit(np.zeros((0, 3)))
    with pytest.raises(
        ValueError, match="x has 1 row to train on, expected at least 2: one to train on and one to compare epochs by"
    ):
        flow.fit(np.ones((1, 3)))


def test_each_row_is_held_out_once_and_the_flow_is_that_of_all_rows() -> None:
    """The weights are those of a run on all rows, after the epoch that the folds choose."""
    x = exponential(np.random.default_rng(3), 200, 4).astype(np.float32)
    flow = nvpflow.build(4, **SMALL)
    history = flow.fit(x, epochs=12, folds=4, averaging=None, seed=5, progress=False)
    assert history.folds == 4
    assert history.best_epoch > 0
    assert history.best_loss == history.validation_loss[history.best_epoch - 1]
    same = nvpflow.build(4, **SMALL)
    stop = history.best_epoch
    whole = same.fit(
        x,
        epochs=12,
        validation=None,
        averaging=None,
        seed=5,
        progress=False,
        callback=lambda record: record["epoch"] < stop,
    )
    np.testing.assert_array_equal(whole.train_loss, history.train_loss[:stop])
    if whole.best_epoch == stop:
        assert same == flow


def test_one_fold_is_the_run_without_its_rows() -> None:
    """Two folds of two rows: each set of weights has seen the other row only, a Gaussian around it."""
    x = np.array([[0.0, 1.0], [2.0, -3.0]])
    flow = nvpflow.build(2, **SMALL)
    history = flow.fit(x, epochs=1, learning_rate=1e-30, weight_decay=0.0, progress=False)
    # Standardized, the rows are (-1, 1) and (1, -1): each lies (2, 2) from the other, and variances are 1.
    expected = 0.5 * 8 + np.log(2 * np.pi) + np.log(x.std(axis=0)).sum()
    assert history.initial_loss == pytest.approx(expected, rel=1e-6)
    assert history.best_epoch == 0
    assert "kept as it started, a Gaussian: no epoch beats its validation nll" in repr(history)


def test_the_same_bits_with_any_threads_and_again() -> None:
    x = student(np.random.default_rng(1), 150, 5)
    made = []
    for threads in (1, 3, 1):
        flow = nvpflow.build(5, **SMALL)
        history = flow.fit(x, epochs=5, progress=False, num_threads=threads)
        made.append((flow, history.validation_loss.tolist(), history.initial_loss))
    assert made[0] == made[1] == made[2]


def test_a_stop_keeps_the_start_or_leaves_the_flow() -> None:
    x = normal(np.random.default_rng(2), 60, 4)
    flow = nvpflow.build(4, **SMALL)
    history = flow.fit(x, epochs=50, progress=False, callback=lambda _: False)
    assert (history.stop_reason, len(history)) == ("callback", 1)
    started = nvpflow.build(4, **SMALL)
    started.initialize_from(x)
    if history.best_epoch == 0:
        np.testing.assert_allclose(flow.log_probability(x), started.log_probability(x), atol=1e-4)
    patient = nvpflow.build(4, **SMALL).fit(x, epochs=50, patience=3, progress=False)
    assert patient.stop_reason == "patience"


def test_a_plain_share_compares_with_the_start_too() -> None:
    x = normal(np.random.default_rng(2), 2000, 4)
    history = nvpflow.build(4, **SMALL).fit(x, epochs=3, progress=False)
    assert history.folds == 0
    assert history.initial_loss is not None
    with pytest.warns(nvpflow.DataWarning, match="worse than a Gaussian"):
        assert nvpflow.build(4, 2, (16,)).fit(x, epochs=3, progress=False).initial_loss is None
    back = nvpflow.History.from_dict(history.to_dict())
    assert (back.initial_loss, back.folds) == (history.initial_loss, history.folds)


def test_a_checkpoint_goes_on(tmp_path: Any) -> None:
    """There are no folds then, and the start stays a candidate."""
    x = normal(np.random.default_rng(2), 400, 4)
    options: dict[str, Any] = {"epochs": 6, "progress": False}
    whole = nvpflow.build(4, **SMALL)
    expected = whole.fit(x, **options, folds=1)
    flow = nvpflow.build(4, **SMALL)
    path = tmp_path / "checkpoint"
    flow.fit(x, **options, checkpoint=path, callback=lambda record: record["epoch"] < 3)
    again = nvpflow.build(4, **SMALL)
    history = again.fit(x, **options, checkpoint=path)
    assert again == whole
    assert (history.best_epoch, history.best_loss) == (expected.best_epoch, expected.best_loss)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"folds": 0}, "folds is 0, expected at least 2, 1 for none, or None to have them where rows are few"),
        ({"folds": -1}, r"folds is -1, expected at least 0 \(0: automatic, 1: none\)"),
        ({"folds": 50}, "folds is 50 beside 40 rows, expected at most one for each row"),
        ({"folds": 2, "validation": np.zeros((5, 4))}, "folds is 2 beside rows for validation, expected 0 or 1"),
        ({"folds": 2, "validation": None}, "folds is 2 beside validation 0, expected a share above 0"),
        ({"folds": 2, "checkpoint": "run"}, "folds is 2 beside a checkpoint, expected 0 or 1"),
        (
            {"folds": 2, "adam": nvpflow.AdamState(), "averaging": None},
            "folds is 2 beside adam, expected 0 or 1",
        ),
    ],
    ids=str,
)
def test_messages(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        nvpflow.build(4, **SMALL).fit(normal(np.random.default_rng(2), 40, 4), progress=False, **options)


def test_columns_that_follow_from_others_are_kept_on_request() -> None:
    x = normal(np.random.default_rng(2), 400, 4)
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    flow = nvpflow.build(4, **SMALL)
    with pytest.raises(ValueError, match=r"no density together: .*allow_degenerate=True"):
        flow.fit(x, progress=False)
    with pytest.warns(nvpflow.DataWarning, match="linear combination"):
        flow.fit(x, epochs=2, allow_degenerate=True, progress=False)
    assert np.isfinite(flow.log_probability(x)).all()


def test_the_warning_names_it() -> None:
    x = normal(np.random.default_rng(4), 300, 8)
    with pytest.warns(nvpflow.DataWarning, match="standardize='covariance', so that it begins as that Gaussian"):
        nvpflow.build(8).fit(x, epochs=1, progress=False, learning_rate=0.03)
