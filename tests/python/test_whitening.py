"""Flows that begin as the Gaussian of the rows' shrunk covariance: `build(standardize="covariance")`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvpflow
import pytest
from nvpflow.layers import MLP, ActNorm, Additive, Coupling, ElementSpline, LULinear, Permutation, Standardize

NO_TRAINING: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-30, "validation": None, "weight_decay": 0.0}


def table(count: int, size: int, dtype: str = "float64") -> np.ndarray:
    rng = np.random.default_rng([3, count, size])
    mixed = rng.exponential(size=(count, size)) @ rng.normal(size=(size, size))
    return (mixed * np.geomspace(0.01, 50, size) + np.linspace(-40, 3, size)).astype(dtype)


SHARES = (0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1)


def covariance_of(x: np.ndarray) -> np.ndarray:
    return np.cov(x.T, bias=True).reshape(x.shape[1], x.shape[1])


def identity_in(units: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The identity times the mean variance of x in other units, as a covariance in those of x."""
    return np.diag((x * units).var(axis=0).mean() / units**2)


def candidates(x: np.ndarray, units: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Covariances, and the log-densities of left-out rows but for a constant; Ledoit and Wolf's in own units first."""
    estimator = pytest.importorskip("sklearn.covariance").LedoitWolf
    size, few = x.shape[1], len(x) <= x.shape[1] + 1
    others = [np.delete(x, i, axis=0) for i in range(len(x))]
    rests = np.array([covariance_of(rest) for rest in others])
    deviations = x - np.array([rest.mean(axis=0) for rest in others])
    for unit in (units, np.ones_like(units)):
        target = identity_in(unit, x)
        theirs = max(estimator().fit(x * unit).shrinkage_, 1 / len(x) if few else 0)
        for share in (theirs, *SHARES):
            if few and share == 0:
                continue
            matrices = (1 - share) * rests + share * target
            squares = (deviations * np.linalg.solve(matrices, deviations[:, :, None])[:, :, 0]).sum(axis=1)
            best = squares.mean() / size if not few or share * len(x) >= 1 else 1.0
            for widening in (1.0, max(1.0, best)):
                log_p = -0.5 * (np.linalg.slogdet(widening * matrices)[1] + squares / widening)
                yield widening * ((1 - share) * covariance_of(x) + share * target), log_p


def white_gaussian(x: np.ndarray, units: np.ndarray) -> Any:
    """The Gaussian of Ledoit and Wolf, or the one that is best for left-out rows, by more than chance."""
    best, chosen, base = 0.0, None, None
    for covariance, found in candidates(x, units):
        base = found if base is None else base
        gain = found - base
        if chosen is None or gain.mean() > max(best, 3 * gain.std() / np.sqrt(len(x) - 1)):
            best, chosen = gain.mean(), covariance
    return pytest.importorskip("scipy.stats").multivariate_normal(x.mean(axis=0), chosen)


def gaussian(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """log p of rows under the shrunk Gaussian of x."""
    x, rows = x.astype(np.float64), rows.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    log_p = white_gaussian((x - mean) / std, std).logpdf((rows - mean) / std)
    return np.atleast_1d(log_p) - np.log(std).sum()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("count", "size"), [(6, 4), (15, 9), (40, 2), (600, 7)])
def test_a_flow_begins_as_the_shrunk_gaussian(count: int, size: int, dtype: str) -> None:
    x = table(count, size)
    flow = nvpflow.build(size, 3, (8,), standardize="covariance", dtype=dtype)
    assert flow.spec.layers[:2] == (Standardize(), LULinear(whitens=True))
    flow.initialize_from(x)
    expected = gaussian(x, x)
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(flow.log_probability(x), expected, rtol=tolerance, atol=10 * tolerance)
    fitted = nvpflow.build(size, 3, (8,), standardize="covariance", dtype=dtype)
    fitted.fit(x, **NO_TRAINING)
    np.testing.assert_allclose(fitted.log_probability(x), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    "options",
    [
        *({"transform": "affine", "scale": s} for s in ("tanh", "softsign", "atan", "sigmoid", "softplus", "exp")),
        {"transform": "additive"},
        {"transform": "spline"},
        {"mixing": "lu", "actnorm": True, "network": "residual", "hidden_sizes": (8,)},
        {"mask": "checkered", "mixing": "reverse", "layer_norm": True},
        {"context_size": 2},
    ],
    ids=str,
)
def test_every_coupling_begins_as_the_identity(options: dict[str, Any]) -> None:
    x = table(300, 5)
    flow = nvpflow.build(5, **{"num_flows": 3, "hidden_sizes": (8,), **options}, standardize="covariance", seed=2)
    given = {"context": np.random.default_rng(1).normal(size=(300, 2))} if "context_size" in options else {}
    flow.initialize_from(x, **given)
    np.testing.assert_allclose(flow.log_probability(x, **given), gaussian(x, x), rtol=1e-4, atol=1e-3)


def test_one_column_under_a_context() -> None:
    rng = np.random.default_rng(0)
    c = rng.normal(size=(400, 1))
    x = 3 + 0.1 * c + rng.normal(size=(400, 1))
    flow = nvpflow.build(1, 2, (8,), context_size=1, standardize="covariance")
    flow.initialize_from(x, context=c)
    np.testing.assert_allclose(flow.log_probability(x, context=c), gaussian(x, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_layer_between_others_sees_what_they_make(inverse: bool) -> None:
    """Read in either direction, behind layers that move the rows."""
    x = table(300, 4)
    layers = [Standardize(), Permutation([2, 0, 3, 1]), ElementSpline("all"), LULinear(inverse, whitens=True)]
    flow = nvpflow.build(4, layers=[*layers, Coupling("odd", Additive(), MLP((4,)))], dtype="float64")
    rng = np.random.default_rng(4)
    drawn = {n: 0.5 * rng.normal(size=v.shape) for n, v in flow.parameters().items() if n.startswith("spline_2")}
    flow.set_parameters({**flow.parameters(), **drawn})
    flow.initialize_from(x)
    z = flow.forward(x)[0]
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-10)
    before = nvpflow.build(4, layers=[*layers[:3], Coupling("odd", Additive(), MLP(()))], dtype="float64")
    values = {n: v for n, v in flow.parameters().items() if n in before.parameters()}
    zeros = {n: np.zeros_like(v) for n, v in before.parameters().items() if n.startswith("flow")}
    before.set_parameters({**before.parameters(), **values, **zeros})
    arrived = before.forward(x)[0]
    found = white_gaussian(arrived, np.ones(4))
    white = np.linalg.solve(np.linalg.cholesky(found.cov), (arrived - found.mean).T).T
    np.testing.assert_allclose(z, white, atol=1e-9)


def test_actnorm_behind_it_stays_the_identity() -> None:
    """The variances were shrunk on purpose."""
    flow = nvpflow.build(4, 2, (4,), actnorm=True, standardize="covariance")
    flow.fit(table(8, 4), **NO_TRAINING)
    values = flow.parameters()
    assert all(np.abs(values[name]).max() < 1e-20 for name in values if name.startswith("actnorm"))


def test_training_leaves_the_layer_and_moves_the_rest() -> None:
    x = table(400, 4, "float32")
    flow = nvpflow.build(4, 2, (8,), standardize="covariance", mixing="lu")
    flow.initialize_from(x)
    before = {n: v.copy() for n, v in flow.parameters().items()}
    flow.fit(x, epochs=3, validation=None)
    after = {n: v.copy() for n, v in flow.parameters().items()}
    fixed = ("standardize_0.", "lu_linear_1.")
    for name, value in before.items():
        assert np.array_equal(value, after[name]) == (name.startswith(fixed) or name.endswith(".sign")), name
    flow.fit(10 * x + 3, epochs=1, validation=None, restandardize=True, learning_rate=1e-30)
    moved = {n: v.copy() for n, v in flow.parameters().items()}
    assert not np.array_equal(moved["standardize_0.mean"], after["standardize_0.mean"])
    np.testing.assert_allclose(moved["lu_linear_1.lower"], after["lu_linear_1.lower"], atol=1e-4)
    flow.fit(x @ np.triu(np.ones((4, 4), np.float32)), epochs=1, validation=None, restandardize=True)
    assert not np.allclose(flow.parameters()["lu_linear_1.lower"], moved["lu_linear_1.lower"], atol=1e-2)


def test_the_same_bits_with_any_threads() -> None:
    x = table(3000, 20)
    made = [nvpflow.build(20, 1, (4,), standardize="covariance") for _ in range(2)]
    for flow, threads in zip(made, (1, 3), strict=True):
        flow.num_threads = threads
        flow.initialize_from(x)
    assert made[0] == made[1]


def test_files_and_text(tmp_path: Any) -> None:
    flow = nvpflow.build(3, 2, (4,), standardize="covariance")
    flow.initialize_from(table(50, 3))
    flow.save(tmp_path / "model.safetensors")
    back = nvpflow.load(tmp_path / "model.safetensors")
    assert back == flow
    assert '"kind":"lu_linear","inverse":false,"whitens":true' in flow.spec.to_json()
    assert "LULinear(whitens=True)" in repr(flow)
    plain = json.loads(nvpflow.build(3, 2, (4,), mixing="lu").spec.to_json())
    assert {"kind": "lu_linear", "inverse": False} in plain["layers"]
    with pytest.raises(ValueError, match=r"layers\[1\]\.whitens is '3', expected true or false"):
        nvpflow.FlowSpec.from_json(flow.spec.to_json().replace('"whitens":true', '"whitens":3'))


def test_columns_that_follow_from_others_are_refused() -> None:
    x = table(300, 5)
    x[:, 4] = x[:, 0] - 2 * x[:, 2]
    names = ["a", "b", "c", "d", "e"]
    flow = nvpflow.build(5, 1, (4,), standardize="covariance")
    flow.column_names = names
    with pytest.raises(ValueError, match=r"no density together: column 'e' follows from column 'a' and column 'c'; "):
        flow.initialize_from(x)
    assert not flow.parameters()["standardize_0.mean"].any()
    with pytest.raises(TypeError, match="allow_degenerate is 1 "):
        flow.initialize_from(x, allow_degenerate=1)
    flow.initialize_from(x, allow_degenerate=True)
    assert np.isfinite(flow.log_probability(x)).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"standardize": "cov"}, "standardize is 'cov', expected True, False, 'mean', 'robust' or 'covariance'"),
        (
            {"standardize": "covariance", "base": "uniform", "transform": "spline"},
            "standardize is 'covariance' with base=.* it carries rows out of the interval",
        ),
        (
            {"standardize": "covariance", "layers": [Standardize(), Coupling()]},
            r"standardize is 'covariance' beside layers, expected LULinear\(whitens=True\) among them",
        ),
        (
            {"standardize": "covariance", "mask": [[True, False, False]] * 2, "num_flows": 2},
            "mask transforms 2 features in all couplings together, expected at least 3",
        ),
    ],
    ids=str,
)
def test_messages(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        nvpflow.build(3, **arguments)


def test_layers_take_it_by_themselves() -> None:
    layers = [Standardize(), LULinear(whitens=True), ActNorm(), Coupling()]
    assert nvpflow.build(3, layers=layers, standardize="covariance").spec.layers == tuple(layers)
    with pytest.raises(TypeError, match="whitens is 1 "):
        LULinear(whitens=1)
