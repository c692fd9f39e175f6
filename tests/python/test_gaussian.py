"""The Gaussians that flows are compared with, and what `fit` says where one is better."""

from __future__ import annotations

import re
import warnings

import numpy as np
import nvpflow
import pytest
from nvpflow import _core, cli, training
from nvpflow._gaussian import shrunk_log_prob
from nvpflow.layers import MLP, Coupling, Permutation, Standardize

COVARIANCE = "build the flow with standardize='covariance', so that it begins as that Gaussian, "
FIGURES = re.compile(
    r"^the flow is worse than a Gaussian: the mean log-density of ([\d,]+) validation rows is (\S+) nats, and (\S+) "
    r"under a Gaussian of the training rows \(better by (\S+), with a standard error of (\S+); the best epoch was "
    r"\d+ of \d+\); "
)


def correlated(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    mix = np.random.default_rng(9).normal(size=(columns, columns))
    return (np.random.default_rng(seed).normal(size=(rows, columns)) @ mix).astype(np.float32)


def told(flow: nvpflow.Flow, x: np.ndarray, **options) -> tuple[list[str], nvpflow.training.History]:
    """Return what `fit` warns of, and its history."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        history = flow.fit(x, progress=False, **options)
    assert all(warning.category is nvpflow.DataWarning for warning in seen)
    return [str(warning.message) for warning in seen], history


def small(columns: int, **options) -> nvpflow.Flow:
    return nvpflow.build(columns, num_flows=2, hidden_sizes=(8,), **options)


# ---------------------------------------------------------------------------------------------------- the Gaussian


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (30, 3), (400, 6), (5000, 2)])
def test_the_shrunk_gaussian_is_the_formula_of_ledoit_and_wolf(rows, columns) -> None:
    """Their section 3.2, written out row by row, for columns of unit variance."""
    x, others = correlated(rows, columns).astype(np.float64), correlated(50, columns, seed=1).astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    z = (x - mean) / std
    s = sum(np.outer(row, row) for row in z) / rows
    m = np.trace(s) / columns
    d2 = np.trace((s - m * np.eye(columns)) @ (s - m * np.eye(columns)).T) / columns
    b2 = sum(np.trace((np.outer(row, row) - s) @ (np.outer(row, row) - s).T) / columns for row in z) / rows**2
    shrunk = min(b2, d2) / d2 * m * np.eye(columns) + (d2 - min(b2, d2)) / d2 * s
    covariance = np.diag(std) @ shrunk @ np.diag(std)
    off = others - mean
    square = np.einsum("ij,jk,ik->i", off, np.linalg.inv(covariance), off)
    expected = -0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(shrunk_log_prob(x, others), expected, rtol=1e-9)


def test_the_shrunk_gaussian_does_not_depend_on_units() -> None:
    x, units = correlated(40, 3).astype(np.float64), np.array([1e-6, 1.0, 1e9])
    scaled = shrunk_log_prob(x * units + 5, x * units + 5)
    np.testing.assert_allclose(scaled, shrunk_log_prob(x, x) - np.log(units).sum(), rtol=1e-6)


def test_a_constant_column_has_no_gaussian() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        shrunk_log_prob(np.ones((5, 2)), np.ones((5, 2)))


# ---------------------------------------------------------------------------------------------------------- in fit


def test_fit_warns_once_of_a_flow_that_is_worse_than_a_gaussian() -> None:
    x, validation = correlated(200, 20), correlated(300, 20, seed=1)
    flow = nvpflow.build(20, num_flows=8, hidden_sizes=(64, 64), seed=0)
    (few, message), history = told(flow, x, validation=validation)
    assert few.startswith("x: 200 rows are few for 20 columns; give 30 for each column at least")
    found = FIGURES.match(message)
    assert found, message
    ours, gaussian = flow.log_prob(validation).astype(np.float64), shrunk_log_prob(x, validation)
    better = gaussian - ours
    expected = [ours.mean(), gaussian.mean(), better.mean(), better.std(ddof=1) / np.sqrt(300)]
    assert found[1] == "300"
    assert [float(figure) for figure in found.groups()[1:]] == pytest.approx(expected, abs=0.006)
    assert history.best_epoch < 80
    assert message.endswith(
        f"; {COVARIANCE}give more rows, or take fewer couplings or hidden units (num_flows, hidden_sizes) or more "
        "weight_decay"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("far", [0, 7])
def test_the_rows_compared_are_those_that_epochs_are_compared_by(dtype, far) -> None:
    """One epoch knows nothing of the correlations; the flow's figure is the loss that `fit` found itself."""
    x = correlated(1000, 6).astype(dtype)
    x[:far, 2] += 1e6
    messages, history = told(small(6, dtype=dtype), x, epochs=1, standardize="robust", seed=4)
    found = FIGURES.match(messages[-1])
    assert found, messages
    assert history.rows_left_out == far
    assert int(found[1]) == history.validation_rows
    assert float(found[2]) == pytest.approx(-history.best_loss, abs=0.001)
    assert len(messages) == (2 if far else 1)
    first = "mend what nvpflow.check_data finds in x, then " if far else ""
    assert f"; {first}train for more epochs, {COVARIANCE}give more rows" in messages[-1]


def test_float64_rows_of_a_float32_flow_are_compared_in_float64() -> None:
    x = correlated(1000, 4).astype(np.float64) + np.array([0, 1e9, 0, 0])
    messages, history = told(small(4), x, epochs=1)
    found = FIGURES.match(messages[-1])
    assert found, messages
    assert float(found[2]) == pytest.approx(-history.best_loss, abs=0.001)


def test_fit_says_nothing_of_flows_that_are_as_good() -> None:
    gaussian = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    assert told(small(3), gaussian, epochs=10)[0] == []
    curved = gaussian.copy()
    curved[:, 2] = np.sin(3 * curved[:, 0]) + 0.1 * curved[:, 2]
    assert told(small(3), curved, epochs=40)[0] == []


@pytest.mark.parametrize(
    "options", [{"validation": None}, {"validation": 0.0}, {"validation": correlated(4, 6, seed=1)}], ids=str
)
def test_without_enough_validation_rows_nothing_is_compared(options) -> None:
    assert told(small(6), correlated(1000, 6), epochs=1, **options)[0] == []


def test_wide_tables_are_not_compared(monkeypatch) -> None:
    monkeypatch.setattr(training, "_MOST_COLUMNS", 5)
    assert told(small(6), correlated(1000, 6), epochs=1)[0] == []


def test_what_chance_explains_is_no_finding() -> None:
    """Of 40 fits of a flow that cannot differ much from the truth, few are warned of."""
    warned = 0
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=(100, 2)).astype(np.float32)
        warned += bool(told(small(2), x, epochs=2, seed=seed)[0])
    assert warned <= 4


@pytest.mark.parametrize("order", [None, [1, 2, 0]])
def test_a_column_that_no_coupling_transforms_is_named_where_it_is_not_normal(order) -> None:
    x = np.random.default_rng(0).normal(size=(2000, 3))
    x[:, 2] = np.exp(x[:, 2])
    layers = [Standardize(), Coupling([0], network=MLP((8,))), Coupling([1], network=MLP((8,)))]
    layers += [] if order is None else [Permutation(order)]
    flow = nvpflow.build(3, layers=layers)
    flow.column_names = ["a", "b", "income"]
    told_of = [message for message in told(flow, x, epochs=3)[0] if "only normal distributions" in message]
    assert told_of == [
        "x: no coupling transforms column 'income', for which this flow knows only normal distributions; the rows are "
        "of another shape. Put such columns into what a Coupling transforms, or into a mask of build"
    ]
    x[:, 2] = np.log(x[:, 2])
    assert "only normal distributions" not in "".join(told(nvpflow.build(3, layers=layers), x, epochs=3)[0])


@pytest.mark.parametrize(("rows", "share"), [(10, 0.3), (1000, 0.1), (1000, 0.0)])
def test_split_rows_are_all_rows_once(rows, share) -> None:
    set_aside, trained_on = _core._split_rows(rows, share, 7, rows)
    assert sorted(set_aside + trained_on) == list(range(rows))
    assert len(set_aside) == int(share * rows)
    assert _core._split_rows(rows, share, 7, 2) == (set_aside[:2], trained_on[:2])


def test_the_command_names_its_own_options(tmp_path, capsys) -> None:
    np.save(tmp_path / "x.npy", correlated(1000, 6))
    code = cli.main(["fit", str(tmp_path / "x.npy"), "-o", str(tmp_path / "m.safetensors"), "--epochs", "1", "--quiet"])
    assert code == 0
    message = capsys.readouterr().err
    assert "nvpflow: warning: the flow is worse than a Gaussian" in message
    assert "(--num-flows, --hidden-sizes) or more --weight-decay" in message
