"""float64 rows of a float32 flow: the standardize layer in float64, the rest in float32."""

from __future__ import annotations

import pickle

import numpy as np
import nvpflow
import pytest
from oracle import OracleFlow, Standardize, random_parameters

# Seconds since 1970 with a spread of a minute, a length of 1e9 with a spread of a tenth, and columns of unit scale.
MEANS = (1.7e9 + 12.25, 1e9 + 0.37, 0.3, -2.0, 5.5)
SPREADS = (60.0, 0.1, 1.0, 0.5, 3.0)


def flow_and_oracle(columns=5, *, dtype="float32", device="cpu", kernel_scale=0.5, seed=1, num_flows=3, hidden=(16,)):
    """A flow whose float32 means are off by up to 170 standard deviations without their low part, and its oracle."""
    flow = nvpflow.build(columns, num_flows, hidden, "silu", standardize=True, dtype=dtype, device=device)
    shapes = {name: value.shape for name, value in flow.parameters().items()}
    parameters = random_parameters(shapes, seed, kernel_scale)
    given = {name: value.astype(dtype) for name, value in parameters.items()}
    mean = np.resize(MEANS, columns)
    given["standardize_0.mean"] = mean.astype(dtype)
    given["standardize_0.log_std"] = np.log(np.resize(SPREADS, columns)).astype(dtype)
    if dtype == "float32":
        low = (mean - given["standardize_0.mean"]).astype(np.float32)
        low[np.abs(low) < np.resize(SPREADS, columns) / 128] = 0
        flow.set_parameters({**given, "standardize_0.mean_low": low})
    else:
        flow.set_parameters(given)
    oracle = OracleFlow(columns, oracle_layers(flow))
    exact = {name: value.astype(np.float64) for name, value in flow.parameters().items()}
    if "standardize_0.mean_low" in exact:
        exact["standardize_0.mean"] = exact["standardize_0.mean"] + exact.pop("standardize_0.mean_low")
    oracle.set_parameters(exact)
    return flow, oracle


def oracle_layers(flow):
    from oracle import Coupling

    spec = flow.spec
    couplings = [Coupling(k % 2 == 1, spec.hidden_sizes, spec.activation) for k in range(spec.num_flows)]
    return [Standardize(), *couplings]


def rows_of(count, columns=5, seed=0):
    noise = np.random.default_rng(seed).normal(size=(count, columns))
    return np.resize(MEANS, columns) + np.resize(SPREADS, columns) * noise


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_array_less(np.abs(actual - expected) / (1 + np.abs(expected)), tolerance)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 5, 100, 1500])
def test_density_and_both_directions_are_those_of_the_oracle(device, count):
    flow, oracle = flow_and_oracle(device=device)
    x = rows_of(count)
    log_p = flow.log_probability(x)
    assert log_p.dtype == np.float32
    close(log_p, oracle.log_prob(x))
    z, log_det = flow.forward(x)
    expected_z, expected_log_det = oracle.forward(x)
    assert (z.dtype, log_det.dtype) == (np.float32, np.float32)
    close(z, expected_z)
    close(log_det, expected_log_det)
    back, log_det_back = flow.inverse(z, with_log_det=True, dtype="float64")
    assert (back.dtype, log_det_back.dtype) == (np.float64, np.float32)
    close((back - x) / np.array(SPREADS), 0)
    close(log_det_back, -expected_log_det)
    assert flow.nll(x) == pytest.approx(oracle.nll(x), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_those_of_the_oracle(device):
    flow, oracle = flow_and_oracle(device=device)
    x = rows_of(70)
    rng = np.random.default_rng(3)
    grad_z, grad_log_det = rng.normal(size=x.shape).astype(np.float32), rng.normal(size=70).astype(np.float32)
    grad_x, grad_parameters = flow.vjp(x, grad_z, grad_log_det)
    expected_x, expected_parameters = oracle.vjp(x, grad_z, grad_log_det)
    assert grad_x.dtype == np.float32
    close(grad_x * np.array(SPREADS), expected_x * np.array(SPREADS), 1e-4)
    flat = np.concatenate([expected_parameters[name].ravel() for name in oracle.shapes()])
    scale = np.abs(flat).max()
    np.testing.assert_allclose(grad_parameters, flat, rtol=2e-4, atol=2e-6 * scale)
    loss, gradient = flow.nll_gradient(x)
    expected_loss, expected = oracle.nll_gradient(x)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    flat = np.concatenate([expected[name].ravel() for name in oracle.shapes()])
    np.testing.assert_allclose(gradient, flat, rtol=2e-4, atol=2e-6 * np.abs(flat).max())
    score, none = flow.log_prob_vjp(x, np.ones(70, np.float32), wrt="x")
    assert none is None
    expected_score, _ = oracle.vjp(x, -oracle.forward(x)[0], np.ones(70))
    close(score * np.array(SPREADS), expected_score * np.array(SPREADS), 1e-4)


def test_gradients_of_many_rows_are_added_up_in_one_order(monkeypatch):
    flow, _ = flow_and_oracle(64, hidden=(8,))
    x = rows_of(40_000, 64)  # more than one chunk of standardized rows
    flow.num_threads = 1
    loss, gradient = flow.nll_gradient(x)
    flow.num_threads = 3
    again, same = flow.nll_gradient(x)
    assert loss == again
    np.testing.assert_array_equal(gradient, same)
    halves = [flow.nll_gradient(part)[1] for part in (x[:20_000], x[20_000:])]
    np.testing.assert_allclose(gradient, (halves[0] + halves[1]) / 2, rtol=1e-3, atol=1e-3 * np.abs(gradient).max())


def test_float32_rows_are_the_float64_rows_that_they_hold_where_the_mean_has_a_low_part():
    flow, oracle = flow_and_oracle()
    x = rows_of(300).astype(np.float32)
    np.testing.assert_array_equal(flow.log_probability(x), flow.log_probability(x.astype(np.float64)))
    for a, b in zip(flow.forward(x), flow.forward(x.astype(np.float64)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert flow.nll(x) == flow.nll(x.astype(np.float64))
    np.testing.assert_array_equal(flow.nll_gradient(x)[1], flow.nll_gradient(x.astype(np.float64))[1])
    close(flow.log_probability(x), oracle.log_prob(x.astype(np.float64)))
    z = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    np.testing.assert_array_equal(flow.inverse(z), flow.inverse(z, dtype="float64").astype(np.float32))


@pytest.mark.parametrize("columns", [2, 3, 7, 16, 33])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_depends_on_nothing_but_itself(columns, device):
    flow, _ = flow_and_oracle(columns, device=device)
    x = rows_of(1300, columns, seed=4)
    for threads in (1, 3):
        flow.num_threads = threads
        log_p, (z, log_det) = flow.log_probability(x), flow.forward(x)
        for first, last in ((0, 1), (5, 6), (17, 40), (200, 300), (640, 641), (900, 1300)):
            np.testing.assert_array_equal(flow.log_probability(x[first:last]), log_p[first:last])
            part_z, part_log_det = flow.forward(x[first:last])
            np.testing.assert_array_equal(part_z, z[first:last])
            np.testing.assert_array_equal(part_log_det, log_det[first:last])
            back = flow.inverse(z, dtype="float64")
            np.testing.assert_array_equal(flow.inverse(z[first:last], dtype="float64"), back[first:last])
        assert flow.log_probability(x[7]) == log_p[7]


def test_layouts_are_read_as_they_are_for_the_flows_own_dtype():
    flow, _ = flow_and_oracle()
    rng = np.random.default_rng(6)
    for _ in range(40):
        count, step, offset = rng.integers(1, 60), rng.integers(1, 4), rng.integers(0, 3)
        x = rows_of(count, seed=int(rng.integers(1000)))
        expected = flow.log_probability(x)
        base = np.zeros((count * step, 5 + offset))
        base[::step, offset:] = x
        swapped = x.astype(x.dtype.newbyteorder())
        read_only = x.copy()
        read_only.flags.writeable = False
        for same in (base[::step, offset:], np.asfortranarray(x), x[::-1][::-1], swapped, read_only):
            np.testing.assert_array_equal(flow.log_probability(same), expected)
        np.testing.assert_array_equal(flow.log_probability(x.tolist()), expected)
        np.testing.assert_array_equal(flow.log_probability(tuple(map(tuple, x))), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_make_their_own_row_nan(device):
    flow, _ = flow_and_oracle(device=device)
    x = rows_of(100)
    good = flow.log_probability(x)
    bad = x.copy()
    bad[3, 0], bad[50, 4], bad[99, 2] = np.nan, np.inf, -np.inf
    log_p = flow.log_probability(bad)
    assert np.isnan(log_p[[3, 50, 99]]).all()
    kept = np.setdiff1d(np.arange(100), [3, 50, 99])
    np.testing.assert_array_equal(log_p[kept], good[kept])
    assert np.isnan(flow.forward(bad)[0][3]).all()
    grad_x, _ = flow.vjp(bad, np.ones((100, 5), np.float32), wrt="x")
    assert np.isnan(grad_x[3]).all()
    assert np.isfinite(grad_x[kept]).all()


def test_finite_numbers_beyond_float32_stay_finite_on_their_way_in():
    flow = nvpflow.build(2, 1, (), standardize=True)  # near the identity
    flow.set_parameters({name: np.zeros_like(value) for name, value in flow.parameters().items()})
    z, _ = flow.forward(np.array([[1e300, -1e308], [1.0, 2.0]]))
    np.testing.assert_array_equal(z[0], [np.finfo(np.float32).max, -np.finfo(np.float32).max])
    np.testing.assert_array_equal(z[1], [1, 2])


def test_out_and_dtype_of_samples():
    flow, oracle = flow_and_oracle()
    drawn = flow.sample(1000, seed=3, dtype="float64")
    assert drawn.dtype == np.float64
    assert len(np.unique(drawn[:, 1])) == 1000  # float32 has a number every 64 there
    expected, _ = oracle.inverse(flow._noise(1000, 3).astype(np.float64))
    close((drawn - expected) / np.array(SPREADS), 0)
    np.testing.assert_array_equal(flow.sample(1000, seed=3), drawn.astype(np.float32))
    np.testing.assert_array_equal(flow.sample(10, seed=3, start=500, dtype=np.float64), drawn[500:510])
    out = np.empty((1000, 5))
    assert flow.sample(1000, seed=3, out=out) is out
    np.testing.assert_array_equal(out, drawn)
    z, _ = flow.forward(drawn)
    x, log_det = np.empty((1000, 5)), np.empty(1000, np.float32)
    flow.inverse(z, with_log_det=True, out=(x, log_det))
    np.testing.assert_array_equal(x, flow.inverse(z, dtype="float64"))
    with pytest.raises(TypeError, match=r"out has dtype float64, expected float32"):
        flow.log_probability(drawn, out=np.empty(1000))
    with pytest.raises(
        TypeError, match=r"dtype is float64, expected float32, the flow's dtype: only a flow that begins"
    ):
        nvpflow.build(2, standardize=False).sample(3, dtype="float64")
    with pytest.raises(TypeError, match=r"dtype is float32, expected float64"):
        nvpflow.build(2, dtype="float64").sample(3, dtype="float32")
    assert nvpflow.build(2, dtype="float64").sample(3, dtype="float64").dtype == np.float64
    with pytest.raises(TypeError, match="dtype is int64, expected float32 or float64"):
        flow.sample(3, dtype=int)


def test_results_must_not_overlap_the_rows():
    flow, _ = flow_and_oracle()
    memory = np.zeros(100)
    x = memory[:50].reshape(10, 5)
    x[...] = rows_of(10)
    with pytest.raises(ValueError, match="out overlaps x"):
        flow.log_probability(x, out=memory.view(np.float32)[95:105])
    flow.log_probability(x, out=memory.view(np.float32)[100:110])
    z = memory[50:75].view(np.float32).reshape(10, 5)
    with pytest.raises(ValueError, match="out overlaps z"):
        flow.inverse(z, out=memory[40:90].reshape(10, 5))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32])
def test_integers_that_float32_does_not_hold_are_float64(dtype):
    flow, oracle = flow_and_oracle()
    x = np.abs(np.rint(rows_of(50))).astype(dtype)
    close(flow.log_probability(x), oracle.log_prob(x.astype(np.float64)), 1e-4)
    small = x[:, 2:].astype(np.int16)
    flow = nvpflow.build(3, standardize=True)
    np.testing.assert_array_equal(flow.log_probability(small), flow.log_probability(small.astype(np.float32)))


def test_without_a_standardize_layer_nobody_is_told_to_cast():
    flow = nvpflow.build(5, standardize=False)
    x = rows_of(300)
    calls = [
        lambda: flow.log_probability(x),
        lambda: flow.log_prob(x.astype(np.int64)),
        lambda: flow.forward(x),
        lambda: flow.nll(x),
        lambda: flow.nll_gradient(x),
        lambda: flow.vjp(x, np.ones((300, 5), np.float32)),
        lambda: flow.fit(x, epochs=1, progress=False),
        lambda: flow.fit(x.astype(np.float32), validation=x, epochs=1, progress=False),
        lambda: flow.certify(x),
    ]
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        text = str(caught.value)
        assert "standardize=True" in text
        assert "loses digits" in text
        assert "astype(np.float32)" not in text
    # Latents are of unit scale: a cast will do.
    standardizing, _ = flow_and_oracle()
    for given in (flow, standardizing):
        with pytest.raises(TypeError, match=r"z has dtype float64.*convert it with z\.astype\(np\.float32\)"):
            given.inverse(np.zeros((3, 5)))


@pytest.mark.parametrize("device", DEVICES)
def test_seconds_since_1970_are_fitted_without_a_conversion(device):
    rng = np.random.default_rng(0)
    x = np.column_stack([1.7e9 + 60 * rng.normal(size=5000), rng.normal(size=5000), rng.normal(size=5000)])
    x[:, 1] += (x[:, 0] - 1.7e9) / 60
    flow = nvpflow.build(3, num_flows=6, hidden_sizes=(64,), standardize=True, device=device)
    flow.num_threads = 1
    history = flow.fit(x, epochs=8 if device == "cpu" else 2, progress=False)
    exact = flow.astype("float64")
    assert history.best_loss < (8.6 if device == "cpu" else 9.5)  # the truth is 8.35
    assert flow.nll(x) == pytest.approx(exact.nll(x), abs=2e-5)
    assert len(np.unique(flow.sample(5000, seed=1, dtype="float64")[:, 0])) == 5000
    if device == "cpu":
        assert flow.certify(x, jacobian_rows=4).verdict == "accurate"
        other = nvpflow.build(3, num_flows=6, hidden_sizes=(64,), standardize=True)
        other.num_threads = 2
        again = other.fit(x, epochs=8, progress=False)
        assert other == flow
        assert again.best_loss == history.best_loss


def offset_rows(spread, count=600):
    rng = np.random.default_rng(1)
    return np.array([1.7e9 + 37.0, 0.0]) + np.array([spread, 1.0]) * rng.normal(size=(count, 2))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 3600.0])
def test_means_between_float32s_numbers_are_kept_where_they_matter(spread):
    x = offset_rows(spread)
    flow = nvpflow.build(2, num_flows=2, hidden_sizes=(8,), standardize=True)
    flow.fit(x, epochs=2, batch_size=100, validation=None, progress=False)
    mean = flow.parameters()["standardize_0.mean"].astype(np.float64)
    low = flow.parameters()["standardize_0.mean_low"]
    assert low[1] == 0
    assert not low.flags.writeable
    off = np.abs(mean + low - x.mean(axis=0)) / x.std(axis=0)
    assert off.max() < 1e-2
    assert np.abs(mean - x.mean(axis=0))[0] / x.std(axis=0)[0] > 1 / 128
    z, _ = flow.forward(x)
    assert np.abs(z).max() < 30


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_default_flows_have_no_low_part(tmp_path):
    x = np.random.default_rng(0).normal(3, 2, size=(500, 3))
    wide, narrow = (nvpflow.build(3, standardize=True) for _ in range(2))
    wide.fit(x, epochs=1, progress=False)
    narrow.fit(x.astype(np.float32), epochs=1, progress=False)
    assert list(wide.parameters()) == list(narrow.parameters())
    np.testing.assert_allclose(wide.nll(x), narrow.nll(x.astype(np.float32)), rtol=1e-3)
    wide.save(tmp_path / "wide.safetensors")
    assert b"mean_low" not in (tmp_path / "wide.safetensors").read_bytes()


def test_the_low_part_survives_everything(tmp_path):
    flow, oracle = flow_and_oracle()
    x = rows_of(100)
    expected = flow.log_probability(x)
    path = tmp_path / "flow.safetensors"
    flow.save(path)
    assert b'"nvpflow.format_version":"1.1"' in path.read_bytes().replace(b" ", b"")
    fresh = nvpflow.build(5, 3, (16,), "silu", standardize=True)
    fresh.reload(path)
    swapped = nvpflow.build(5, 3, (16,), "silu", standardize=True)
    swapped.swap(nvpflow.load(path))
    copies = [nvpflow.load(path), pickle.loads(pickle.dumps(flow)), flow.to("cpu"), fresh, swapped]
    copies.append(nvpflow.build(5, 3, (16,), "silu", standardize=True))
    copies[-1].set_parameters(flow.parameters())
    copies.append(flow.astype("float64").astype("float32"))
    for copy in copies:
        assert copy == flow
        np.testing.assert_array_equal(copy.log_probability(x), expected)
    wide = flow.astype("float64")
    assert "standardize_0.mean_low" not in wide.parameters()
    close(wide.log_probability(x), oracle.log_prob(x), 1e-7)
    assert wide.certify(x).parameters_sha256 != flow.certify(x).parameters_sha256
    without = {k: v for k, v in flow.parameters().items() if k != "standardize_0.mean_low"}
    copies[0].set_parameters(without)
    assert copies[0] != flow
    assert copies[0]._mean_low() is None
    assert copies[0].certify(x, jacobian_rows=0).parameters_sha256 != flow.certify(x, jacobian_rows=0).parameters_sha256
    with pytest.raises(ValueError, match=r"standardize_0.mean_low'\] has shape \(3,\), expected \(5,\)"):
        flow.set_parameters({**without, "standardize_0.mean_low": np.zeros(3, np.float32)})
    plain = nvpflow.build(5, standardize=False)
    with pytest.raises(ValueError, match="mean_low"):
        plain.set_parameters({**plain.parameters(), "standardize_0.mean_low": np.zeros(5)})


def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    x = offset_rows(60.0)

    def train(epochs_before_a_stop=None):
        flow = nvpflow.build(2, num_flows=2, hidden_sizes=(8,), standardize=True)
        path = tmp_path / f"checkpoint-{epochs_before_a_stop}"
        stop = None if epochs_before_a_stop is None else (lambda r: r["epoch"] < epochs_before_a_stop)
        history = flow.fit(x, epochs=6, batch_size=64, progress=False, checkpoint=path, callback=stop)
        return (flow, history) if stop is None else (nvpflow.build(2, 2, (8,), standardize=True), path)

    whole, history = train()
    fresh, path = train(3)
    again = fresh.fit(x, epochs=6, batch_size=64, progress=False, checkpoint=path)
    assert fresh == whole
    np.testing.assert_array_equal(again.validation_loss, history.validation_loss)
    assert history.best_loss == pytest.approx(whole.nll(x), abs=0.5)
    other = nvpflow.build(2, 2, (8,), standardize=True)
    _, path = train(3)
    mean, std = x.mean(axis=0).astype(np.float32), 1.1 * x.std(axis=0)
    other.set_parameters(
        {**other.parameters(), "standardize_0.mean": mean, "standardize_0.log_std": np.log(std).astype(np.float32)}
    )
    with pytest.raises(ValueError, match="standardized its rows otherwise"):
        other.fit(x, epochs=6, batch_size=64, progress=False, checkpoint=path)


@pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")
def test_a_flow_with_a_low_part_is_trained_on_with_float32_rows_too():
    x = offset_rows(3600.0)
    flow = nvpflow.build(2, num_flows=2, hidden_sizes=(8,), standardize=True)
    flow.fit(x, epochs=3, batch_size=64, progress=False)
    low = flow._mean_low()
    history = flow.fit(x.astype(np.float32), validation=x, epochs=2, batch_size=64, progress=False, max_round_trip=1e-3)
    np.testing.assert_array_equal(flow._mean_low(), low)
    history = flow.fit(x.astype(np.float32), validation=None, epochs=1, batch_size=64, progress=False)
    assert history.best_loss == pytest.approx(flow.nll(x.astype(np.float32)), abs=1e-4)


def test_validation_rows_may_be_of_the_other_dtype():
    x = np.random.default_rng(0).normal(size=(300, 3))
    for train, validation in ((x, x.astype(np.float32)), (x.astype(np.float32), x), (x.tolist(), x)):
        flow = nvpflow.build(3, hidden_sizes=(8,), standardize=True)
        history = flow.fit(train, validation=validation, epochs=1, progress=False)
        assert history.best_loss == pytest.approx(flow.nll(x), abs=1e-4)
        history = flow.fit(train, validation=validation, epochs=4, averaging=0.9, progress=False)
        assert history.best_loss == pytest.approx(flow.nll(x), abs=1e-4)


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    flow, _ = flow_and_oracle()
    x = rows_of(40)
    log_p = flow.log_prob(torch.from_numpy(x))
    assert isinstance(log_p, torch.Tensor)
    assert log_p.dtype == torch.float32
    np.testing.assert_array_equal(log_p.numpy(), flow.log_prob(x))
    z, _ = flow.forward(torch.from_numpy(x))
    assert flow.inverse(z, dtype="float64").dtype == torch.float64
    from nvpflow.torch import FlowModule

    with pytest.raises(ValueError, match="mean_low"):
        FlowModule(flow)
    with pytest.raises(TypeError, match=r"x has dtype torch.float64, expected torch.float32.*float64 module"):
        FlowModule(nvpflow.build(5, standardize=True)).log_prob(torch.from_numpy(x))


def test_estimators_keep_the_digits():
    pytest.importorskip("sklearn")
    from nvpflow.sklearn import FlowDensity

    x = offset_rows(60.0, 1000)
    model = FlowDensity(num_flows=2, hidden_sizes=(8,), epochs=3, n_jobs=1, random_state=0).fit(x)
    assert len(np.unique(model.sample(1000, random_state=0)[:, 0])) == 1000
    np.testing.assert_array_equal(model.score_samples(x).astype(np.float32), model.flow_.log_probability(x))


def test_the_command_line_keeps_the_digits(tmp_path):
    from nvpflow.cli import main

    x = offset_rows(60.0, 600)
    np.savetxt(tmp_path / "a.csv", x, delimiter=",", fmt="%.3f", header="time,load", comments="")
    model, table = str(tmp_path / "m.safetensors"), str(tmp_path / "a.csv")
    assert main(["fit", table, "-o", model, "--epochs", "2", "--threads", "1", "--quiet"]) == 0
    read = np.loadtxt(table, delimiter=",", skiprows=1)
    flow = nvpflow.load(model)
    assert flow._mean_low() is not None
    assert main(["score", model, table, "-o", str(tmp_path / "s.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), flow.log_probability(read))
    assert main(["sample", model, "-n", "500", "--seed", "1", "-o", str(tmp_path / "x.csv")]) == 0
    drawn = np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(drawn, flow.sample(500, seed=1, dtype="float64"))
    assert main(["check", model, table, "--jacobian-rows", "2"]) == 0


def test_initialize_from_keeps_the_digits_too():
    x = offset_rows(60.0)
    flow = nvpflow.build(2, 2, (8,), standardize=True)
    flow.initialize_from(x)
    z, _ = nvpflow.Flow.forward(flow, x)
    mean = flow.parameters()["standardize_0.mean"].astype(np.float64) + flow.parameters()["standardize_0.mean_low"]
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-10, atol=1e-7)
    assert np.isfinite(z).all()


def test_far_rows_of_float64_are_left_out_as_those_of_float32():
    x = np.random.default_rng(0).normal(size=(2000, 2))
    x[7] = 1e9
    flows = [nvpflow.build(2, 2, (8,), standardize=True) for _ in range(2)]
    with pytest.warns(nvpflow.DataWarning):
        wide = flows[0].fit(x, epochs=1, progress=False)
    with pytest.warns(nvpflow.DataWarning):
        narrow = flows[1].fit(x.astype(np.float32), epochs=1, progress=False)
    assert wide.rows_left_out == narrow.rows_left_out == 1
    assert (wide.train_rows, wide.validation_rows) == (narrow.train_rows, narrow.validation_rows)
    assert wide.standardized == narrow.standardized
