"""Columns of integers: noise at training, log P of cells, samples that are integers, and who refuses such flows."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from typing import Any

import numpy as np
import nvpflow
import pytest
from cases import ADDITIVE, DTYPES
from general_oracle import GeneralFlow, random_spec, scrambled
from nvpflow import _bounds
from nvpflow.layers import Bounds, Standardize
from oracle import assert_same_bits, assert_within_budget, philox4x32


def counts(rows: int = 3000, seed: int = 0) -> np.ndarray:
    """A count and a number."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.poisson(4, rows), rng.normal(size=rows)])


def small(**options: Any) -> nvpflow.Flow:
    return nvpflow.build(2, 2, (8,), **{"discrete": ["n"], "column_names": ["n", "x"]} | options)


def noise(rows: int, columns: tuple[int, ...], seed: int, stream: int = 4) -> np.ndarray:
    """The noise that `fit` adds, from the formulas alone."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = [[philox4x32((row, 0, j, stream), key)[0] >> 8 for j in columns] for row in range(rows)]
    return (np.array(words, np.float64) + 0.5) / 2**24 - 0.5


def log_factorial(n: np.ndarray) -> np.ndarray:
    return np.vectorize(math.lgamma)(n + 1.0)


# ----------------------------------------------------------------------------------------------- what is discrete


def test_build_takes_names_and_indices() -> None:
    flow = nvpflow.build(3, discrete=["b", 0], column_names=["a", "b", "c"])
    layer = Bounds([None] * 3, [None] * 3, discrete=(0, 1))
    assert flow.spec.layers[:2] == (layer, Standardize())
    assert repr(layer) == "Bounds((None, None, None), (None, None, None), discrete=(0, 1))"
    assert layer == eval(repr(layer)) == copy.copy(layer) == pickle.loads(pickle.dumps(layer))
    assert "discrete=(0, 1)" in repr(flow)
    assert flow._repr_html_().count("integers") == 2
    assert nvpflow.build(3, discrete=np.array([1])).spec.layers[0].discrete == (1,)
    assert nvpflow.build(3, discrete=[]).spec == nvpflow.build(3, discrete=None).spec == nvpflow.build(3).spec
    assert nvpflow.build(3, bounds=layer).spec.layers[0] == layer
    for standardize in (False, "covariance", "robust"):
        assert nvpflow.build(3, discrete=[2], standardize=standardize).spec.layers[0].discrete == (2,)


def test_bounds_of_a_discrete_column_are_its_least_and_largest_integer() -> None:
    flow = nvpflow.build(5, bounds=[(0, None), (1, 6), (0, 1), (None, -2), None], discrete=[0, 1, 3, 4])
    layer = flow.spec.layers[0]
    assert layer == Bounds([-0.5, 0.5, 0, None, None], [None, 6.5, 1, -1.5, None], discrete=(0, 1, 3, 4))
    said = [_bounds.interval(layer, j) for j in range(5)]
    assert said == ["integers from 0 on", "integers from 1 to 6", "(0, 1)", "integers up to -2", "integers"]
    assert _bounds.of_columns(layer, [2, 3]) == Bounds([0, None], [1, -1.5], discrete=(1,))
    x = flow.sample(5000, seed=1)
    assert x[:, 0].min() == 0
    assert (x[:, 1].min(), x[:, 1].max()) == (1, 6)
    assert x[:, 3].max() == -2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"discrete": "n"}, TypeError, "discrete is 'n' (str), expected a sequence of columns such as ['count'"),
        ({"discrete": 1}, TypeError, "discrete is 1 (int), expected a sequence of columns"),
        ({"discrete": [2]}, ValueError, "discrete names column 2, expected 0 to 1, counted from 0, or a name"),
        ({"discrete": [1, 1]}, ValueError, "discrete names column 2 twice, expected it once"),
        ({"discrete": ["n"]}, ValueError, "discrete names column 'n', but the columns have no names"),
        (
            {"discrete": [0], "bounds": [(0.25, 3), None]},
            ValueError,
            "the bounds of discrete column 1 are (0.25, 3), expected integers: the least and the largest",
        ),
        (
            {"discrete": [0], "bounds": Bounds([0, None], [1, None])},
            ValueError,
            "discrete is [0] beside bounds=Bounds(",
        ),
        ({"discrete": [0], "layers": ADDITIVE}, ValueError, "discrete is [0] beside layers, expected it left out"),
        ({"discrete": [0], "base": "uniform", "transform": "spline"}, ValueError, "bounds is Bounds((None, None)"),
        ({"integers": [0]}, TypeError, "build() got an unexpected argument 'integers'; columns of integers are called"),
    ],
)
def test_what_build_cannot_take_is_refused(options, error, message) -> None:
    with pytest.raises(error) as caught:
        nvpflow.build(2, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("low", "high", "discrete", "error", "message"),
    [
        ([0], [None], [0], ValueError, "low[0] is 0 of a discrete column, expected the edge of an integer's cell"),
        ([None], [2.25], [0], ValueError, "high[0] is 2.25 of a discrete column, expected the edge"),
        ([None], [None], [1], ValueError, "discrete[0] is 1, expected 0 to 0"),
        ([None] * 2, [None] * 2, [1, 0], ValueError, "discrete[1] is 0 after 1, expected ascending columns"),
        ([None], [None], 0, TypeError, "discrete is 0 (int), expected a sequence of integers"),
        ([None], [None], [], ValueError, "low and high hold no number, expected a bound of one column at least"),
    ],
)
def test_what_is_no_layer_is_refused(low, high, discrete, error, message) -> None:
    with pytest.raises(error) as caught:
        Bounds(low, high, discrete=discrete)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"discrete":[2]', r"layers\[0\]\.discrete\[0\] is 2, expected 0 to 1"),
        ('"discrete":[0,0]', r"layers\[0\]\.discrete\[1\] is 0 after 0, expected ascending columns"),
        ('"discrete":[1]', r"layers\[0\]\.low\[1\] is 1 of a discrete column, expected the edge of an integer's cell"),
        ('"discrete":1', r"layers\[0\]\.discrete is '1', expected an array"),
        ('"discrete":[0.5]', r"layers\[0\]\.discrete\[0\] is '0.5', expected a whole number"),
    ],
)
def test_files_that_say_something_else_are_refused(entry, message) -> None:
    text = nvpflow.build(2, bounds={1: (1, None)}).spec.to_json()
    changed = text.replace('"high":[null,null]', f'"high":[null,null],{entry}')
    assert changed != text
    with pytest.raises(nvpflow.FileFormatError, match=message):
        nvpflow.FlowSpec.from_json(changed)


def test_files_copies_and_pickles_keep_it(tmp_path) -> None:
    flow = small(seed=3)
    flow.initialize_from(counts())
    flow.save(tmp_path / "m.safetensors")
    loaded = nvpflow.load(tmp_path / "m.safetensors")
    assert loaded == flow == pickle.loads(pickle.dumps(flow)) == copy.copy(flow)
    assert loaded.spec.layers[0].discrete == flow.astype("float64").spec.layers[0].discrete == (0,)
    assert json.loads(flow.spec.to_json())["layers"][0] == {
        "kind": "bounds",
        "low": [None, None],
        "high": [None, None],
        "discrete": [0],
    }
    assert "discrete" not in nvpflow.build(2, bounds=[(0, 1), None]).spec.to_json()
    with pytest.raises(nvpflow.FileFormatError, match=r"layers\[0\]"):
        small(discrete=["x"]).reload(tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_log_p_is_the_density_at_the_middle_of_cells(seed, dtype) -> None:
    rng = np.random.default_rng([seed, 0xD1])
    spec = random_spec(rng, dtype=dtype, max_size=9)
    size, rows = spec["input_size"], 60
    columns = sorted(rng.choice(size, rng.integers(1, size + 1), replace=False).tolist())  # some, or all
    ends = [-4.5 if j in columns and rng.random() < 0.5 else None for j in range(size)]
    bounds = {"kind": "bounds", "low": ends, "high": [None] * size}
    spec |= {"base": {"kind": "normal"}, "layers": [bounds, *spec["layers"]]}
    parameters = {name: v.astype(dtype).astype(np.float64) for name, v in scrambled(spec, rng, 0.2).items()}
    oracle = GeneralFlow(spec, parameters)
    own = spec | {"layers": [bounds | {"discrete": columns}, *spec["layers"][1:]]}
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(own)))
    flow.set_parameters({name: value.astype(dtype) for name, value in parameters.items()})
    x = rng.normal(size=(rows, size))
    x[:, columns] = rng.integers(-3, 4, (rows, len(columns)))
    x[::7, columns[0]] += 0.25
    x[1, columns[-1]] = np.nan
    x = x.astype(dtype)
    c = rng.normal(size=(rows, spec["context_size"])).astype(dtype) if spec["context_size"] else None
    given = {} if c is None else {"context": c}
    whole = np.arange(rows) % 7 != 0
    whole[1] = False
    log_p = flow.log_prob(x, **given)
    expected = oracle.log_prob(x.astype(np.float64), None if c is None else c.astype(np.float64))
    assert np.isneginf(log_p[::7]).all()
    assert np.isnan(log_p[1])
    assert_within_budget(log_p[whole], expected[whole], dtype)
    gradient = flow.log_prob_vjp(x, np.ones(rows, dtype), **given)[0]
    assert (gradient[::7] == 0).all()
    z, log_det = flow.forward(x, **given)  # which takes any number
    assert np.isfinite(log_det[::7]).all()
    back = flow.inverse(z, **given)
    good = np.arange(rows) != 1
    assert np.abs(back[good] - x[good]).max() < (1e-2 if dtype == "float32" else 1e-8)
    assert flow.nll(x[::7], **{name: value[::7] for name, value in given.items()}) == math.inf


def test_equal_rows_have_equal_bits_in_any_batch() -> None:
    flow = small()
    flow.initialize_from(counts())
    x = counts(500, 3)
    log_p, mass = flow.log_prob(x), flow.log_mass(x, points=5)
    assert_same_bits(np.array([flow.log_prob(row) for row in x[:20]]), log_p[:20])
    assert_same_bits(np.array([flow.log_mass(row, points=5) for row in x[:20]]), mass[:20])
    assert_same_bits(flow.log_prob(np.vstack([x[:3]] * 40))[-3:], log_p[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_mass_is_the_mean_over_cells(dtype) -> None:
    flow = nvpflow.build(3, 2, (8,), discrete=[0, 2], bounds={2: (0, None)}, dtype=dtype, seed=2)
    plain = nvpflow.build(3, 2, (8,), bounds={2: (-0.5, None)}, dtype=dtype, seed=2)
    x = np.column_stack([np.arange(-3, 3), np.linspace(-1, 1, 6), np.arange(6)]).astype(dtype)
    fine = (np.arange(60) + 0.5) / 60 - 0.5
    at = [np.array([u, 0, v]) for u, v in itertools.product(fine, fine)]
    density = np.mean([np.exp(plain.log_prob((x + shift).astype(dtype)).astype(float)) for shift in at], axis=0)
    np.testing.assert_allclose(flow.log_mass(x, points=1000), np.log(density), atol=2e-3)
    np.testing.assert_allclose(flow.log_mass(x, points=1), flow.log_prob(x), atol=1e-6)
    bad = x.copy()
    bad[0, 0], bad[1, 2], bad[2, 1] = 0.5, -1, np.nan
    found = flow.log_mass(bad, points=3)
    assert np.isneginf(found[:2]).all()
    assert np.isnan(found[2])
    assert_same_bits(found[3:], flow.log_mass(x[3:], points=3))
    assert flow.log_mass(x[0]).shape == ()
    whole = nvpflow.build(2, 1, (4,), dtype=dtype)
    assert_same_bits(whole.log_mass(x[:, :2]), whole.log_prob(x[:, :2]).astype(np.float64))
    with pytest.raises(ValueError, match="points is 0, expected at least 1"):
        flow.log_mass(x, points=0)
    with pytest.raises(ValueError, match="x has shape"):
        flow.log_mass(x[:, :2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_integers_with_their_log_p(dtype) -> None:
    flow = small(bounds={"n": (0, None)}, dtype=dtype)
    flow.initialize_from(counts().astype(dtype))
    x = flow.sample(5000, seed=1)
    again, log_p = flow.sample_and_log_prob(5000, seed=1)
    assert_same_bits(x, again)
    assert (x[:, 0] == np.rint(x[:, 0])).all()
    assert (x[:, 0] >= 0).all()
    assert not np.signbit(x[:, 0]).any()
    assert np.abs(x[:, 1] - np.rint(x[:, 1])).max() > 0.4
    assert_same_bits(log_p, flow.log_prob(x))
    assert_same_bits(flow.sample(100, seed=1, start=300), x[300:400])
    free = small(dtype=dtype)
    assert (free.sample(1000, seed=0)[:, 0] < 0).any()
    assert not np.signbit(free.sample(1000, seed=0)[free.sample(1000, seed=0)[:, 0] == 0, 0]).any()


def test_views_under_a_context_do_the_same() -> None:
    flow = nvpflow.build(1, 2, (8,), context_size=2, discrete=[0], transform="spline")
    c = np.array([0.5, -1], np.float32)
    view = flow.condition(c)
    x = view.sample(300, seed=1)
    assert (x == np.rint(x)).all()
    assert_same_bits(x, flow.sample(300, seed=1, context=c))
    assert_same_bits(view.log_prob(x), flow.log_prob(x, context=c))
    many = np.tile(c, (300, 1))
    assert_same_bits(flow.log_mass(x, context=many, points=3), flow.log_mass(x, context=c, points=3))
    assert np.isneginf(view.log_prob(x + np.float32(0.5))).all()


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("bounds", [None, {"n": (0, None)}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_is_that_of_rows_with_uniform_noise(dtype, bounds) -> None:
    x, held_out, seed = counts(300), counts(100, 1), 12345678901
    options = {"epochs": 2, "progress": False, "seed": seed}
    flow = small(bounds=bounds, dtype=dtype)
    history = flow.fit(x, validation=held_out, **options)
    edges = None if bounds is None else {"n": (-0.5, None)}
    other = small(bounds=edges, discrete=None, dtype=dtype)
    dithered = [x.copy(), held_out.copy()]
    dithered[0][:, :1] += noise(300, (0,), seed)
    dithered[1][:, :1] += noise(100, (0,), seed, stream=6)
    theirs = other.fit(dithered[0], validation=dithered[1], **options)
    assert history.validation_loss.tolist() == theirs.validation_loss.tolist()
    for (name, value), wanted in zip(flow.parameters().items(), other.parameters().values(), strict=True):
        assert_same_bits(value, wanted, name)
    assert np.isfinite(flow.log_prob(x)).all()


def test_noise_is_of_the_seed_and_the_rows_stay_as_they_are() -> None:
    x = counts(300)
    before = x.copy()
    found = [small() for _ in range(3)]
    for flow, seed in zip(found, (0, 0, 1), strict=True):
        flow.fit(x, epochs=1, progress=False, seed=seed, num_threads=1 + seed)
    np.testing.assert_array_equal(x, before)
    assert found[0] == found[1] != found[2]
    flow = small()
    flow.initialize_from(x)
    mean = (x[:, 0] + noise(300, (0,), 0)[:, 0]).mean()
    assert flow.parameters()["standardize_1.mean"][0] == pytest.approx(mean, rel=1e-6)


def test_weights_and_covariance_go_with_it() -> None:
    x = counts(400)
    twice = np.repeat([1.0, 2.0], 200)
    flow = small(standardize="covariance", bounds={"n": (0, None)})
    history = flow.fit(x, epochs=3, sample_weight=twice, progress=False)
    assert history.effective_rows < 400
    drawn = flow.sample(2000, seed=0)
    assert (drawn[:, 0] % 1 == 0).all()
    assert abs(drawn[:, 0].mean() - 4) < 0.5


def test_fit_names_what_a_discrete_column_cannot_hold() -> None:
    x = counts(300)
    x[[4, 9], 0] = 0.5, -2
    flow = small(bounds={"n": (0, None)})
    before = copy.copy(flow)
    said = (
        r"column 'n' does not hold integers from 0 on in 2 of 300 rows \(rows 4, 9, counted from 0; the first holds "
        r"0.5\); round or remove such rows"
    )
    with pytest.raises(ValueError, match=said):
        flow.fit(x, progress=False)
    with pytest.raises(ValueError, match=r"validation has numbers that a discrete column cannot hold: column 'n' in 1"):
        flow.fit(counts(300), validation=x, progress=False)
    with pytest.raises(ValueError, match=r"column 'n' in 1 row \(4, counted from 0; the first holds 0.5, expected an"):
        flow.initialize_from(x)
    x[4, 0] = 0
    with pytest.raises(ValueError, match=r"x has 1 of 300 rows outside the bounds .* expected more than -0.5\)"):
        flow.initialize_from(x)
    assert flow == before


def test_large_integers_are_those_that_the_dtype_tells_apart() -> None:
    x = counts(2000)
    x[:, 0] += 2**24 - 30
    flow = small()
    flow.fit(x, epochs=1, progress=False)
    assert np.isfinite(flow.log_prob(x)).all()
    drawn = flow.sample(1000, seed=0)
    assert (drawn[:, 0] == np.rint(drawn[:, 0])).all()
    assert abs(drawn[:, 0].astype(np.float64).mean() - x[:, 0].mean()) < 1
    x[7, 0] = 2**24 + 2
    for made, rows, most in (
        (small(), x, "16777216"),
        (small(standardize=False, actnorm=True), x[:, [1, 1]].round().astype(np.float32) + 70000, "65536"),
        (small(dtype="float64"), x * 2**20, "1099511627776"),
    ):
        with pytest.raises(ValueError, match=f"expected an integer of at most {most} in size"):
            made.initialize_from(rows.round())
    small(dtype="float64").initialize_from(x)


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_poisson_and_binomial_columns_come_out(transform) -> None:
    rng, test = np.random.default_rng(0), np.random.default_rng(1)
    n, p = 8, 0.3

    def truth(x: np.ndarray) -> np.ndarray:
        first, second = x.T
        poisson = first * math.log(4) - 4 - log_factorial(first)
        chosen = log_factorial(np.array(float(n))) - log_factorial(second) - log_factorial(n - second)
        return poisson + chosen + second * math.log(p) + (n - second) * math.log(1 - p)

    def drawn(generator: np.random.Generator, rows: int) -> np.ndarray:
        return np.column_stack([generator.poisson(4, rows), generator.binomial(n, p, rows)])

    grid = np.array(list(itertools.product(range(25), range(-2, n + 3))), np.float64)
    rows = drawn(test, 10_000)
    for bounds in (None, [(0, None), (0, n)]):
        flow = nvpflow.build(2, 4, (32,), transform=transform, bounds=bounds, discrete=[0, 1], seed=0)
        flow.fit(drawn(rng, 4000), epochs=20, progress=False)
        assert abs((flow.log_prob(rows) - truth(rows)).mean()) < 0.1  # all columns are discrete
        assert np.exp(flow.log_prob(grid).astype(np.float64)).sum() == pytest.approx(1, abs=0.06)
        assert np.exp(flow.log_mass(grid, points=64)).sum() == pytest.approx(1, abs=0.03)
        found = flow.sample(20_000, seed=2)
        for column in (0, 1):
            known = np.bincount(rows[:, column], minlength=12)[:12] / len(rows)
            ours = np.bincount(np.maximum(found[:, column].astype(int), 0), minlength=12)[:12] / len(found)
            assert np.abs(known - ours).max() < 0.04


def test_two_values_and_one_column() -> None:
    rng = np.random.default_rng(0)
    flow = nvpflow.build(1, 4, (16,), context_size=1, discrete=[0], transform="spline", seed=0)
    c = rng.normal(size=(3000, 1)).astype(np.float32)  # which tells nothing
    x = (rng.random((3000, 1)) < 0.3).astype(np.float32)
    flow.fit(x, context=c, epochs=30, progress=False)
    grid = np.arange(-3.0, 5)[:, None].astype(np.float32)
    mass = np.exp(flow.log_mass(grid, context=[0.0], points=100))
    assert mass.sum() == pytest.approx(1, abs=0.01)
    assert mass[3] == pytest.approx(1 - x.mean(), abs=0.05)
    assert mass[4] == pytest.approx(x.mean(), abs=0.05)
    assert np.exp(flow.log_prob(grid, context=[0.0]).astype(float)).sum() == pytest.approx(1, abs=0.25)


# ------------------------------------------------------------------------------------------- findings, and others


def test_repeated_values_are_found_where_a_column_is_not_called_discrete() -> None:
    x = counts(5000)
    (found,) = nvpflow.check_data(x).findings
    assert found.kind == "few"
    assert "build the flow with discrete= for counts" in found.remedy
    assert nvpflow.check_data(x, discrete=[0]).ok
    assert nvpflow.check_data(x, discrete=[0], bounds={0: (0, None)}).ok
    rng = np.random.default_rng(0)
    tens = rng.normal(size=(5000, 2))
    tens[:, 0] = np.round(tens[:, 0], 1)
    for rows in (tens, tens.astype(np.float32)):
        (found,) = nvpflow.check_data(rows).findings
        assert found.kind == "ties"
        assert found.severity == "warning"
        assert found.columns == (1,)
        assert "in steps of 0.1, on which a density is unbounded" in found.text
        assert "add uniform noise of one step" in found.remedy
    again = rng.normal(size=(3000, 2))[rng.integers(0, 3000, 5000)]  # rows drawn with replacement
    found = nvpflow.check_data(again).findings
    assert {finding.kind for finding in found} == {"ties"}
    assert "sample_weight" in found[0].remedy
    fine = np.column_stack([np.round(rng.normal(size=5000), 3), rng.normal(size=5000)])  # as good as continuous
    assert nvpflow.check_data(fine).ok
    assert nvpflow.check_data(rng.normal(size=(20_000, 2)).astype(np.float32)).ok
    assert nvpflow.check_data(rng.random(size=(20_000, 2)).astype(np.float32)).ok
    with pytest.warns(nvpflow.DataWarning, match="in steps of 0.1"):
        nvpflow.build(2, 1, (4,)).fit(tens, epochs=1, progress=False)
    x[3, 0] = 0.5
    (found,) = nvpflow.check_data(x, discrete=[0]).errors
    assert found.kind == "outside"
    assert "column 1 does not hold integers in 1 of 5,000 rows (row 3" in found.text


def test_certificates_and_blame() -> None:
    flow = small(bounds={"n": (0, None)}, standardize="covariance")
    x = counts(600)
    flow.fit(x, epochs=2, progress=False)
    found = flow.certify(x)
    assert found.verdict == "accurate"
    assert found.no_bound == "it is not derived for columns with bounds or discrete ones"
    beyond = np.vstack([x[:50], [[0.5, 1], [-1, 1]]])
    said = "2 rows outside the bounds of their columns, no integers in discrete ones, or on an edge"
    assert any(said in line for line in flow.certify(beyond).advice)
    gains = nvpflow.blame(flow, np.array([[60.0, 2.0], [4.0, 2.0]]))
    assert gains[0].argmax() == 0
    assert gains[0, 0] > 5 > gains[1].max()
    assert (gains >= 0).all()


def test_who_cannot_round_or_score_integers_refuses() -> None:
    flow = small()
    for call in (
        lambda: flow.sample(3, temperature=0.5),
        lambda: flow.log_prob(np.zeros((1, 2)), temperature=0.5),
    ):
        with pytest.raises(ValueError, match=r"temperature is 0\.5, expected 1: the flow has discrete columns"):
            call()
    with pytest.raises(ValueError, match="the flow has discrete columns, expected none"):
        flow.fit_density(lambda x: (-0.5 * (x**2).sum(axis=1), -x), progress=False)


def test_torch_and_exporters_refuse() -> None:
    pytest.importorskip("torch")
    import nvpflow.torch
    from nvpflow.exporters import to_onnx, to_torch

    message = r"flow has discrete columns \(1\), expected none: their samples are rounded"
    for make in (nvpflow.torch.FlowModule, to_torch, lambda flow: to_onnx(flow, "never.onnx")):
        with pytest.raises(ValueError, match=message):
            make(small())


def test_jax_refuses() -> None:
    pytest.importorskip("jax")
    import nvpflow.jax

    flow = small()
    with pytest.raises(ValueError, match=r"flow has discrete columns \(1\), expected none"):
        nvpflow.jax.parameters(flow)
    with pytest.raises(ValueError, match=r"spec has discrete columns \(1\), expected none"):
        nvpflow.jax.log_prob(flow.spec, {}, np.zeros((1, 2), np.float32))


def test_sklearn() -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("sklearn")
    from nvpflow.sklearn import FlowDensity
    from sklearn.base import clone

    x = counts(500)
    frame = pandas.DataFrame({"n": x[:, 0], "load": np.arange(500.0), "x": x[:, 1]})
    options = {"num_flows": 2, "hidden_sizes": (8,), "epochs": 2, "random_state": 0, "standardize": "covariance"}
    estimator = FlowDensity(discrete=["n"], bounds={"n": (0, None)}, context_features=["load"], **options)
    assert clone(estimator).get_params()["discrete"] == ["n"]
    estimator.fit(frame)
    assert estimator.flow_.spec.layers[0] == Bounds([-0.5, None], [None, None], discrete=(0,))
    assert np.isneginf(estimator.score_samples(frame.assign(n=0.5))).all()
    assert np.isfinite(estimator.score_samples(frame)).all()
    plain = FlowDensity(discrete=[0], **options).fit(x)
    assert (plain.sample(100)[:, 0] % 1 == 0).all()
    with pytest.raises(ValueError, match="discrete names feature 1, which is one of context_features"):
        clone(estimator).set_params(discrete=["load"]).fit(frame)
    with pytest.raises(ValueError, match="column 'n' does not hold integers from 0 on"):
        clone(estimator).fit(frame.assign(n=frame["n"] + 0.5))


def test_command_line(tmp_path, capsys) -> None:
    from nvpflow import cli

    x = counts(500)
    np.savetxt(tmp_path / "data.csv", x, delimiter=",", header="n,x", comments="")
    np.save(tmp_path / "data.npy", x)
    model = str(tmp_path / "model.safetensors")
    options = ["--epochs", "1", "--force", "--quiet"]
    for source, name in (("data.csv", "n"), ("data.npy", "1")):
        fit = ["fit", str(tmp_path / source), "-o", model, *options]
        assert cli.main([*fit, "--discrete", name, "--bounds", f"{name}=0:"]) == 0
        assert nvpflow.load(model).spec.layers[0] == Bounds([-0.5, None], [None, None], discrete=(0,))
        capsys.readouterr()
        assert cli.main(["info", model]) == 0
        shown = "'n'" if source == "data.csv" else "column 1"
        assert f"{shown} integers from 0 on" in capsys.readouterr().out.replace("'column 1'", "column 1")
        assert cli.main(["check", model, str(tmp_path / source)]) == 0
        assert "unbounded" not in capsys.readouterr().err
        assert cli.main(["sample", model, "-n", "50", "-o", str(tmp_path / "rows.npy"), "--force"]) == 0
        assert (np.load(tmp_path / "rows.npy")[:, 0] % 1 == 0).all()
        assert cli.main([*fit, "--discrete", "m"]) == 1
        assert "column 'm', expected" in capsys.readouterr().err


def test_a_report_says_it() -> None:
    pytest.importorskip("matplotlib")
    from nvpflow import report

    x = counts(800)
    flow = small(bounds={"n": (0, None)}, standardize="covariance")
    flow.fit(x[:600], epochs=1, progress=False)
    text = report.html(flow, x[600:])
    assert "<dt>Bounds</dt><dd>n integers from 0 on</dd>" in text
    x[700, 0] = 0.5
    assert "no integer in a discrete one" in report.html(flow, x[600:])
