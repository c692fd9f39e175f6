"""`fit_density`: a flow trained on a log-density, and `importance` and `check_modes` behind it."""

from __future__ import annotations

import json
import math
import signal
import threading
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from general_oracle import GeneralFlow, base_log_density
from oracle import assert_same_bits
from test_sample_density import MIXTURE, STUDENT, make_case

QUIET = {"progress": False}
MEAN = np.array([1.0, -2.0, 0.5])
COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])
PRECISION = np.linalg.inv(COVARIANCE)
LOG_Z = 0.5 * float(np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]) + 7.0


def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An unnormalized normal density, whose integral is exp(LOG_Z)."""
    off = x - MEAN
    return 7.0 - 0.5 * np.einsum("bi,ij,bj->b", off, PRECISION, off), -off @ PRECISION


def banana(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A normal distribution bent along a parabola, normalized."""
    bent = x[:, 1] - 0.5 * (x[:, 0] ** 2 - 1)
    log_p = -0.5 * x[:, 0] ** 2 - 0.5 * (bent / 0.5) ** 2 - math.log(2 * math.pi * 0.5)
    by_second = -bent / 0.25
    return log_p, np.stack([-x[:, 0] - by_second * x[:, 0], by_second], axis=1)


def two_modes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two normal distributions of equal shares, 12 standard deviations apart, normalized."""
    x = x.astype(np.float64)
    parts = np.stack([-0.5 * ((x - shift) ** 2).sum(axis=1) for shift in (-6.0, 6.0)])
    log_p = np.logaddexp(*parts) - math.log(2) - x.shape[1] / 2 * math.log(2 * math.pi)
    share = np.exp(parts[1] - np.logaddexp(*parts))[:, None]
    return log_p, -(x + 6) * (1 - share) - (x - 6) * share


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"F32": np.float32, "F64": np.float64}
    return {
        name: np.frombuffer(data[8 + size :][slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def first_gradient(flow: nvpflow.Flow, target, folder: Path, **options) -> np.ndarray:
    """The gradient of the first step, which Adam's first moment keeps a tenth of."""
    path = folder / "one.checkpoint"
    given = {"steps": 1, "batch_size": 9, "clip_norm": None, "averaging": None, "checkpoint": path}
    flow.fit_density(target, **{**given, **options}, **QUIET)
    gradient = tensors_of(path)["first_moment"] / (1 - 0.9)
    path.unlink()
    return gradient


def square(x: np.ndarray, *context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shift = context[0].sum(axis=1, keepdims=True) if context else 0.0
    return -0.5 * ((x - 0.3 - shift) ** 2).sum(axis=1), -(x - 0.3 - shift)


def base_of(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in parameters.items() if name.startswith("base.")}


@pytest.mark.parametrize("base", [None, STUDENT, MIXTURE], ids=["normal", "student_t", "mixture"])
@pytest.mark.parametrize("estimator", ["reparameterized", "path"])
@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_is_that_of_the_loss(seed, estimator, base, tmp_path) -> None:
    flow, oracle = make_case(seed, "float64", base)
    size = flow.spec.context_size
    contexts = np.random.default_rng(seed).normal(size=(1, size)) if size else None
    context = None if contexts is None else contexts[0]
    names = [name for name, _, _ in flow._layout()]
    start = {name: value.copy() for name, value in flow.parameters().items() if name in names}
    gradient = first_gradient(flow.astype("float64"), square, tmp_path, estimator=estimator, seed=4, context=context)
    z = flow._noise(9, 4)
    each = {} if contexts is None else {"context": np.tile(contexts, (9, 1))}
    held = GeneralFlow(oracle.spec, start)

    def losses(parameters: dict[str, np.ndarray]) -> np.ndarray:
        x, log_det = GeneralFlow(oracle.spec, {**parameters, **base_of(start)}).inverse(z, **each)
        own = base_log_density(oracle.spec, z, start) - log_det
        log_q = own if estimator != "path" else held.log_prob(x, **each)
        return log_q - square(x, *each.values())[0]

    begun = losses(start)
    beside = begun - (begun.sum() - begun) / 8  # from the mean of the others

    def loss(parameters: dict[str, np.ndarray]) -> float:
        of_base = beside * base_log_density(oracle.spec, z, parameters) if base else 0.0
        return float((losses(parameters) + of_base).mean())

    trained = nvpflow._core._trained(flow.spec)
    random = np.random.default_rng(seed)
    for _ in range(4):
        along = {n: random.normal(size=v.shape) * (n in trained) for n, v in start.items()}
        step = 1e-6
        ahead, behind = ({n: start[n] + sign * step * along[n] for n in start} for sign in (1, -1))
        wanted = (loss(ahead) - loss(behind)) / (2 * step)
        found = float(gradient @ np.concatenate([along[n].ravel() for n in names]))
        assert abs(found - wanted) < 1e-5 * (1 + abs(wanted))


@pytest.mark.parametrize("base", ["student_t", "mixture"])
def test_the_gradient_by_the_base_is_that_of_the_integral(base, tmp_path) -> None:
    flow = nvpflow.build(2, 1, (1,), base=base, standardize=False, dtype="float64", seed=1)
    spec = json.loads(flow.spec.to_json())
    names = [name for name, _, _ in flow._layout()]
    random = np.random.default_rng(2)
    start = {name: 0 * value for name, value in flow.parameters().items()}  # the layers are the identity
    start |= {name: 0.5 + random.normal(size=value.shape) for name, value in base_of(start).items()}
    flow.set_parameters(start)
    axis = np.linspace(-12, 12, 1201)  # x = sinh(axis), which reaches into heavy tails
    grid = np.sinh(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    areas = np.cosh(np.arcsinh(grid)).prod(axis=1) * (axis[1] - axis[0]) ** 2

    def target(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return -np.log1p((x - 1) ** 2).sum(axis=1), -2 * (x - 1) / (1 + (x - 1) ** 2)

    def integral(parameters: dict[str, np.ndarray]) -> float:
        log_b = base_log_density(spec, grid, parameters)
        return float((np.exp(log_b) * (log_b - target(grid)[0])) @ areas)

    found = [first_gradient(flow.astype("float64"), target, tmp_path, batch_size=20_000, seed=s) for s in range(8)]
    for _ in range(4):
        along = {n: random.normal(size=v.shape) * (n in base_of(start)) for n, v in start.items()}
        flat = np.concatenate([along[n].ravel() for n in names])
        ahead, behind = ({n: start[n] + sign * 1e-4 * along[n] for n in start} for sign in (1, -1))
        wanted = (integral(ahead) - integral(behind)) / 2e-4
        slopes = np.array(found) @ flat
        assert abs(slopes.mean() - wanted) < 5 * slopes.std(ddof=1) / np.sqrt(len(slopes)) + 1e-3


@pytest.mark.parametrize("estimator", ["reparameterized", "path"])
def test_a_normal_target_is_reached(estimator) -> None:
    flow = nvpflow.build(3, 4, (32,), mixing="lu", actnorm=True, standardize=False, seed=1)
    options = {"steps": 800, "batch_size": 512, "learning_rate": 1e-2, "seed": 1}
    history = flow.fit_density(gaussian, estimator=estimator, **options, **QUIET)
    assert history.stop_reason == "steps"
    assert abs(history.best_loss + LOG_Z) < 0.01
    assert history.ess[-1] > 0.99
    found = nvpflow.importance(flow, gaussian, 20_000, seed=5)
    assert found.ess > 0.99 * 20_000
    assert abs(found.log_evidence - LOG_Z) < 0.01
    assert abs(found.log_evidence - LOG_Z) < 5 * found.log_evidence_error
    mean, error = found.mean()
    assert (np.abs(mean - MEAN) < 5 * error).all()
    covariance, error = found.mean(lambda x: ((x - MEAN)[:, :, None] * (x - MEAN)[:, None, :]).reshape(-1, 9))
    assert (np.abs(covariance.reshape(3, 3) - COVARIANCE) < 5 * error.reshape(3, 3)).all()


def test_a_bent_target_is_reached() -> None:
    flow = nvpflow.build(2, 6, (32,), standardize=False, seed=1)
    history = flow.fit_density(banana, steps=1200, batch_size=512, learning_rate=5e-3, estimator="path", **QUIET)
    assert history.best_loss < 0.02  # KL: the target is normalized
    found = nvpflow.importance(flow, banana, 20_000, seed=5)
    assert found.ess > 0.95 * 20_000
    assert abs(found.log_evidence) < max(5 * found.log_evidence_error, 0.01)


@pytest.mark.parametrize("base", [None, STUDENT, MIXTURE], ids=["normal", "student_t", "mixture"])
def test_the_path_gradient_has_no_noise_at_the_optimum(base) -> None:
    cases = (make_case(i, "float64", base) for i in range(9))
    flow, _ = next(case for case in cases if case[0].context_size == 0)
    norms = {}
    for estimator in ("reparameterized", "path"):
        same = flow.astype("float64")
        options = {"steps": 1, "batch_size": 64, "learning_rate": 1e-9, "averaging": None}
        history = same.fit_density(lambda x: (flow.log_prob(x), flow.score(x)), estimator=estimator, **options, **QUIET)
        norms[estimator] = history.gradient_norm[0]
        assert abs(history.loss[0]) < 1e-9
    assert norms["path"] < 1e-9
    assert norms["reparameterized"] > 1e-3


def test_other_libraries_give_the_same_steps() -> None:
    def trained(target) -> np.ndarray:
        flow = nvpflow.build(2, 2, (8,), standardize=False, dtype="float64", seed=1)
        flow.fit_density(target, steps=60, batch_size=64, report_every=20, validation=64, **QUIET)
        return flow._flat_parameters().copy()

    wanted = trained(banana)

    def bent(x):
        off = x[:, 1] - 0.5 * (x[:, 0] ** 2 - 1)
        return -0.5 * x[:, 0] ** 2 - 0.5 * (off / 0.5) ** 2

    pytest.importorskip("torch")
    from nvpflow.torch import density as density_of_torch

    np.testing.assert_allclose(trained(density_of_torch(bent)), wanted, atol=1e-9)
    jax = pytest.importorskip("jax")
    from nvpflow.jax import density as density_of_jax

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        found = trained(density_of_jax(bent))
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_a_target_in_torch_has_a_gradient_by_x() -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.torch import density

    weight, x = torch.ones(3, requires_grad=True), np.ones((3, 2), np.float32)
    for lost in (lambda x: x.detach().sum(dim=1), lambda x: torch.zeros(len(x)), lambda x: weight):
        with pytest.raises(ValueError, match=r"a tensor without a gradient by x, .*; leave out detach\(\) and no_grad"):
            density(lost)(x)


def run(flow: nvpflow.Flow, target=banana, **options):
    given = {"steps": 90, "batch_size": 64, "report_every": 20, "validation": 128, "learning_rate": 1e-2, **QUIET}
    return flow.fit_density(target, **{**given, **options})


def bent_flow(**options) -> nvpflow.Flow:
    return nvpflow.build(2, 3, (16,), **{"standardize": False, "seed": 2, **options})


def test_bits_do_not_depend_on_threads() -> None:
    found = []
    for threads in (1, 3):
        flow = bent_flow()
        history = run(flow, num_threads=threads, batch_size=5000, steps=10)
        found.append((flow._flat_parameters().copy(), history.to_dict() | {"seconds": None}))
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    other = bent_flow()
    run(other, seed=1)
    assert not np.array_equal(other._flat_parameters(), found[0][0])


@pytest.mark.parametrize("stop", [20, 60])
def test_a_resumed_run_ends_with_the_same_bits(stop, tmp_path) -> None:
    whole, parts = bent_flow(), bent_flow()
    wanted = run(whole)
    path = tmp_path / "run.checkpoint"
    first = run(parts, checkpoint=path, callback=lambda report: report["step"] < stop)
    assert first.stop_reason == "callback"
    assert list(first.step) == list(range(20, stop + 1, 20))
    found = run(parts, checkpoint=path)
    assert_same_bits(parts._flat_parameters(), whole._flat_parameters())
    assert found.to_dict() | {"seconds": None} == wanted.to_dict() | {"seconds": None}
    assert list(found.step) == [20, 40, 60, 80, 90]
    again = run(parts, checkpoint=path)
    assert again.to_dict() == found.to_dict()
    with pytest.raises(ValueError, match="belongs to another run: its seed is 0, this run's is 1"):
        run(bent_flow(), checkpoint=path, seed=1)
    with pytest.raises(ValueError, match="belongs to another run"):
        parts.fit(np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32), checkpoint=path, epochs=1, **QUIET)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(nvpflow.FileFormatError):
        run(bent_flow(), checkpoint=path)
    with pytest.raises(FileNotFoundError, match="its folder cannot be used"):
        run(bent_flow(), checkpoint=tmp_path / "nowhere" / "run")


def test_ctrl_c_leaves_the_best_weights() -> None:
    flow, steps = bent_flow(), []

    def target(x):
        steps.append(len(x))
        if len(steps) == 60:
            signal.raise_signal(signal.SIGINT)
        return banana(x)

    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(flow, target, steps=10**6, callback=lambda report: seen.append(flow._flat_parameters().copy()))
    assert len(seen) >= 1
    assert not np.array_equal(flow._flat_parameters(), seen[0])  # those of the best report, not of the start


def test_an_error_of_the_target_passes_through() -> None:
    flow = bent_flow()
    before = flow._flat_parameters().copy()

    def target(x):
        raise RuntimeError("the simulator is away")

    with pytest.raises(RuntimeError, match="the simulator is away"):
        run(flow, target)
    assert_same_bits(flow._flat_parameters(), before)


def spoilt(where: int, what: float, of_gradient: bool = False):
    calls = []

    def target(x):
        log_p, gradient = banana(x.astype(np.float64))
        calls.append(1)
        if len(calls) == where:
            (gradient if of_gradient else log_p)[3] = what
        return log_p, gradient

    return target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (spoilt(2, np.nan), r"log_density gave NaN at step 2, for x = \[.*\]; the flow is left as it was; mend"),
        (spoilt(2, np.inf), "log_density gave inf at step 2"),
        (spoilt(2, -np.inf), "log_density gave -inf at step 2.* no density the loss is infinite"),
        (spoilt(3, np.nan, True), "log_density gave a gradient with NaN at step 3"),
        (spoilt(21, np.nan), "log_density gave NaN at the report after step 20"),
        (spoilt(25, np.nan), "log_density gave NaN at step 23, .*; the flow keeps the weights of step 20"),
    ],
)
def test_a_target_that_is_not_finite(target, message) -> None:
    flow = bent_flow()
    with pytest.raises(nvpflow.TrainingError, match=message):
        run(flow, target)


def test_wrong_returns() -> None:
    flow = bent_flow()
    pair = r"a tuple \(log_p \[B\], gradient \[B, D\]\)"
    for target, error, message in (
        (lambda x: banana(x)[0], TypeError, rf"log_density returned ndarray of shape \(64,\), expected {pair}"),
        (lambda x: None, TypeError, "log_density returned None"),
        (lambda x: (1.0, banana(x)[1]), ValueError, r"the log_p .* has shape \(\), expected \(64,\)"),
        (lambda x: (banana(x)[0][:, None], banana(x)[1]), ValueError, r"the log_p .* has shape \(64, 1\)"),
        (lambda x: (banana(x)[0], banana(x)[0]), ValueError, r"the gradient .* has shape \(64,\), expected \(64, 2\)"),
        (lambda x: (banana(x)[0], banana(x)[1] * 1j), TypeError, "the gradient .* has dtype complex"),
        (lambda x, c: banana(x), TypeError, "missing 1 required positional argument"),
        (3, TypeError, "log_density is 3 .*expected a function"),
    ):
        with pytest.raises(error, match=message):
            run(flow, target)
    run(flow, lambda x: [banana(x)[0].tolist(), banana(x)[1].tolist()], steps=1)  # lists will do


def test_wrong_options() -> None:
    flow = bent_flow()
    for options, message in (
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"steps": 2**61, "batch_size": 64}, "expected at most"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a finite number above 0"),
        ({"estimator": "score"}, "estimator is 'score', expected 'reparameterized' or 'path'"),
        ({"averaging": 1.0}, "averaging is 1, expected"),
        ({"report_every": 0}, "report_every is 0"),
        ({"validation": 1}, "validation is 1, expected at least 2 rows"),
        ({"context": [1.0]}, "the flow has no context"),
    ):
        with pytest.raises(ValueError, match=message):
            run(flow, **options)
    with pytest.raises(TypeError, match="callback is 3"):
        run(flow, callback=3)


def test_patience_and_callbacks() -> None:
    flow, seen = bent_flow(), []
    history = run(flow, steps=4000, learning_rate=0.3, schedule="constant", patience=2, callback=seen.append)
    assert history.stop_reason == "patience"
    assert history.best_step == history.step[-3]
    assert [report["step"] for report in seen] == list(history.step)
    assert "stop reason: patience" in repr(history)
    assert "<table" in history._repr_html_()


def test_rows_belong_to_the_caller_and_threads_go_on() -> None:
    kept, flow = [], bent_flow()

    def target(x):
        assert threading.current_thread() is threading.main_thread()
        kept.append(x)
        log_p, gradient = banana(x.copy())
        x[:] = 0  # it is the caller's
        return log_p, gradient

    run(flow, target, steps=3)
    other = bent_flow()
    run(other, steps=3)
    assert_same_bits(flow._flat_parameters(), other._flat_parameters())
    assert len({id(x) for x in kept}) == len(kept)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_contexts_are_learnt(dtype) -> None:
    flow = nvpflow.build(2, 2, (32,), context_size=1, mixing="lu", standardize=False, dtype=dtype, seed=1)
    seen = []

    def target(x, context):
        seen.append(context)
        return -0.5 * ((x - context) ** 2).sum(axis=1), context - x

    contexts = np.linspace(-2, 2, 7)[:, None]
    history = flow.fit_density(target, context=contexts, steps=600, batch_size=210, learning_rate=1e-2, **QUIET)
    assert np.isnan(history.ess).all()
    for i in range(10):  # each context as often as all others
        values, counts = np.unique(seen[i][:, 0], return_counts=True)
        np.testing.assert_allclose(values, contexts[:, 0], rtol=1e-6)
        assert (counts == 30).all()
    for context in (-1.5, 0.0, 1.9):
        found = nvpflow.importance(flow, target, 4000, context=[context], seed=3)
        assert found.ess > 0.95 * 4000
        assert abs(found.log_evidence - math.log(2 * math.pi)) < 0.02
        view = nvpflow.importance(flow.condition([context]), target, 4000, seed=3)
        assert_same_bits(view.log_weights, found.log_weights)


def test_one_context_for_all_rows() -> None:
    flows = [nvpflow.build(2, 2, (8,), context_size=2, standardize=False, seed=1) for _ in range(2)]
    for flow, context in zip(flows, ([0.5, -1.0], [[0.5, -1.0]]), strict=True):
        history = run(flow, square, context=context)
        assert np.isfinite(history.ess).all()
    assert_same_bits(flows[0]._flat_parameters(), flows[1]._flat_parameters())
    with pytest.raises(ValueError, match="context is missing"):
        run(flows[0], square)
    with pytest.raises(ValueError, match="context has shape"):
        run(flows[0], square, context=[[1.0]])


def test_what_is_not_trained_stays() -> None:
    flow = nvpflow.build(3, 2, (16,), mixing="lu", seed=1)
    rows = np.random.default_rng(0).normal(size=(200, 3)) * 20 + 500
    flow.initialize_from(rows)
    before = {name: value.copy() for name, value in flow.parameters().items()}

    def far(x):
        off = (x.astype(np.float64) - 500) / 20
        return -0.5 * (off**2).sum(axis=1), -off / 20

    history = flow.fit_density(far, steps=200, batch_size=256, learning_rate=1e-2, **QUIET)
    assert history.ess[-1] > 0.98
    for name in ("standardize_0.mean", "standardize_0.log_std"):
        assert_same_bits(flow.parameters()[name], before[name])


def test_a_uniform_base_and_a_rounded_flow() -> None:
    uniform = nvpflow.build(2, 3, (16,), transform="spline", base="uniform", seed=1)

    def sloped(x):
        x = x.astype(np.float64)
        return np.log(0.5 + x).sum(axis=1), 1 / (0.5 + x)

    history = uniform.fit_density(sloped, steps=300, batch_size=512, learning_rate=1e-2, **QUIET)
    assert abs(history.best_loss) < 0.01
    full, rounded = bent_flow(), bent_flow(weights="bfloat16")
    run(full)
    run(rounded)
    assert_same_bits(full._flat_parameters(), rounded._flat_parameters())


@pytest.mark.parametrize("estimator", ["reparameterized", "path"])
def test_a_mixture_reaches_both_modes(estimator) -> None:
    flow = nvpflow.build(2, 2, (16,), base=nvpflow.layers.Mixture(2), standardize=False, seed=1)
    flow.initialize_from(np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32) * 8)
    history = flow.fit_density(
        two_modes, steps=400, batch_size=512, learning_rate=2e-2, estimator=estimator, averaging=None, **QUIET
    )
    assert history.ess[-1] > 0.95
    assert not nvpflow.check_modes(flow, two_modes, known=[[-6.0, -6.0], [6.0, 6.0]], seed=3).dropped


def student(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's t distribution with 3 degrees of freedom in each column, normalized."""
    x = x.astype(np.float64)
    constant = math.lgamma(2) - math.lgamma(1.5) - 0.5 * math.log(3 * math.pi)
    return (constant - 2 * np.log1p(x**2 / 3)).sum(axis=1), -4 * x / (3 + x**2)


def test_degrees_of_freedom_are_found() -> None:
    flow = nvpflow.build(2, 2, (16,), base=nvpflow.layers.StudentT(10.0), standardize=False, seed=1)
    options = {"steps": 800, "batch_size": 512, "learning_rate": 1e-2, "seed": 1}
    history = flow.fit_density(student, **options, **QUIET)
    assert history.ess[-1] > 0.99
    np.testing.assert_allclose(np.exp(flow.parameters()["base.log_df"]), 3, rtol=0.3)
    held = nvpflow.build(2, 2, (16,), base=nvpflow.layers.StudentT(4.0, trainable=False), standardize=False, seed=1)
    held.fit_density(student, **{**options, "steps": 50}, **QUIET)
    assert_same_bits(held.parameters()["base.log_df"], np.full(2, np.log(4.0), np.float32))


@pytest.mark.parametrize("base", ["student_t", "mixture"])
def test_bits_of_a_trained_base(base, tmp_path) -> None:
    def trained(**options) -> np.ndarray:
        flow = bent_flow(base=base)
        run(flow, **options)
        return flow._flat_parameters().copy()

    wanted = trained(batch_size=5000, steps=30, num_threads=1)
    assert_same_bits(trained(batch_size=5000, steps=30, num_threads=3), wanted)
    path, more = tmp_path / "run.checkpoint", {"batch_size": 5000, "steps": 30}
    trained(checkpoint=path, callback=lambda report: report["step"] < 20, **more)
    assert_same_bits(trained(checkpoint=path, **more), wanted)
    assert np.isfinite(trained(batch_size=1, steps=30)).all()


def test_a_history_comes_back_from_json_and_is_drawn() -> None:
    history = run(bent_flow())
    again = nvpflow.DensityHistory.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again.to_dict() == history.to_dict()
    assert again.step.dtype == np.int64
    assert repr(again) == repr(history)
    values = history.to_dict()
    for wrong, message in (
        ({**values, "epoch": []}, "the history holds .*epoch, expected step, loss, "),
        ({name: values[name] for name in list(values)[1:]}, "the history holds loss, "),
        ({**values, "loss": values["loss"][1:]}, "the history's lists have shapes"),
        ({**values, "best_step": "last"}, "the history holds something else"),
    ):
        with pytest.raises(ValueError, match=message):
            nvpflow.DensityHistory.from_dict(wrong)
    pytest.importorskip("matplotlib")
    from nvpflow import plot

    ax = history.plot()
    first, second, best = ax.get_lines()
    np.testing.assert_array_equal(first.get_ydata(), -history.loss)
    np.testing.assert_array_equal(second.get_ydata(), -history.validation_loss)
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (history.best_step, -history.best_loss)
    assert plot.evidence_curve(history, reference={"exact": 0.0}, ax=ax) is ax
    assert "exact: " in ax.get_legend().get_texts()[-1].get_text()
    none = {name: [] if isinstance(value, list) else value for name, value in values.items()}
    with pytest.raises(ValueError, match="history has no reports"):
        plot.evidence_curve(nvpflow.DensityHistory.from_dict(none))


# ---- importance ------------------------------------------------------------------------------------------------------


def test_the_error_of_the_evidence_is_its_spread() -> None:
    flow = nvpflow.build(2, 2, (8,), standardize=False, seed=1)

    def wide(x):
        return -0.5 * (x**2).sum(axis=1) / 0.8

    exact = math.log(2 * math.pi * 0.8)
    scores = []
    for seed in range(200):
        found = nvpflow.importance(flow, wide, 400, seed=seed)
        scores.append((found.log_evidence - exact) / found.log_evidence_error)
    assert abs(np.mean(scores)) < 0.35
    assert 0.85 < np.std(scores) < 1.15


def test_weights() -> None:
    flow = nvpflow.build(2, 2, (8,), standardize=False, seed=1)
    found = nvpflow.importance(flow, two_modes, 1000, seed=3)
    x, log_q = flow.sample_and_log_prob(1000, seed=3)
    assert_same_bits(found.x, x)
    log_w = two_modes(x)[0] - log_q.astype(np.float64)
    np.testing.assert_allclose(found.log_weights, log_w)
    w = np.exp(log_w)
    np.testing.assert_allclose(found.weights, w / w.sum())
    assert found.ess == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert found.log_evidence == pytest.approx(np.log(w.mean()))
    error = w.std(ddof=1) / w.mean() / math.sqrt(len(w))
    assert found.log_evidence_error == pytest.approx(error, rel=1e-6)
    drawn = found.resample(50, seed=1)
    assert (drawn[:, None] == x[None]).all(axis=2).any(axis=1).all()
    shifted = nvpflow.importance(flow, lambda x: two_modes(x)[0] - 1e4, 1000, seed=3)
    assert shifted.log_evidence == pytest.approx(found.log_evidence - 1e4)
    assert shifted.ess == pytest.approx(found.ess)
    bounded = nvpflow.importance(flow, lambda x: np.where(x[:, 0] > 0, 0.0, -np.inf), 1000)
    assert (bounded.weights[bounded.x[:, 0] <= 0] == 0).all()
    mean, error = bounded.mean(lambda x: np.where(x[:, 0] > 0, 1.0, np.inf))  # what is where p is 0 counts for nothing
    assert mean == pytest.approx(1)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.2])
def test_the_tail_index_of_weights(shape) -> None:
    from nvpflow.importance_sampling import _pareto_k

    found = [_pareto_k(shape * np.random.default_rng(seed).exponential(size=20_000)) for seed in range(20)]
    assert abs(np.mean(found) - shape) < 0.1
    assert _pareto_k(np.zeros(1000)) == 0
    assert math.isnan(_pareto_k(np.zeros(24)))


def test_what_importance_refuses() -> None:
    flow = nvpflow.build(2, 2, (8,), standardize=False, seed=1)
    for wrong, message in (
        (lambda x: np.full(len(x), np.nan), r"log_density gave nan for x = \[.*\], expected a number, or -inf where"),
        (lambda x: np.full(len(x), np.inf), "log_density gave inf"),
        (lambda x: np.full(len(x), -np.inf), "-inf for every row"),
        (lambda x: np.zeros(3), r"has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            nvpflow.importance(flow, wrong, 100)
    with pytest.raises(ValueError, match="n is 1, expected at least 2"):
        nvpflow.importance(flow, banana, 1)
    with pytest.raises(ValueError, match="the flow has no context"):
        nvpflow.importance(flow, banana, 10, context=[1.0])
    with pytest.raises(TypeError, match="flow is 3"):
        nvpflow.importance(3, banana)
    with pytest.raises(ValueError, match="flow has discrete columns, expected none"):
        nvpflow.importance(nvpflow.build(2, 2, (8,), discrete=[1]), banana, 10)
    for too_many in (2**45, 2**62):  # at once, not after all memory is full
        with pytest.raises(MemoryError):
            nvpflow.importance(flow, banana, too_many)
    assert nvpflow.importance(flow, banana, 1000, temperature=2.0).x.shape == (1000, 2)


def test_what_means_refuse() -> None:
    found = nvpflow.importance(nvpflow.build(2, 2, (8,), standardize=False, seed=1), banana, 100)
    for wrong, error, message in (
        (3, TypeError, r"function is 3 \(int\), expected a function of rows \[n, D\], or None"),
        (lambda x: 3.0, ValueError, r"what function returned has shape \(\), expected \[100\] or \[100, K\]"),
        (lambda x: x[:1], ValueError, r"what function returned has shape \(1, 2\), expected \[100\]"),
        (lambda x: x.T, ValueError, r"what function returned has shape \(2, 100\), expected \[100\]"),
        (lambda x: None, TypeError, "what function returned has dtype object, expected real numbers"),
    ):
        with pytest.raises(error, match=message):
            found.mean(wrong)
    assert found.mean(lambda x: x[:, :, None] * x[:, None, :])[0].shape == (2, 2)


# ---- modes that were dropped -----------------------------------------------------------------------------------------


def one_mode() -> nvpflow.Flow:
    """The flow that reverse KL finds where a target has two modes: one of them."""
    flow = nvpflow.build(2, 2, (8,), actnorm=True, standardize=False, seed=1)
    flow.fit_density(two_modes, steps=400, batch_size=256, learning_rate=2e-2, **QUIET)
    return flow


def test_a_dropped_mode_is_seen_from_a_known_row() -> None:
    flow = one_mode()
    near = 6.0 if flow.sample(1000, seed=1).mean() > 0 else -6.0
    assert abs(flow.sample(1000, seed=1).mean() - near) < 0.2
    alone = nvpflow.importance(flow, two_modes, 10_000, seed=3)
    assert alone.ess > 9_000  # it looks perfect
    assert abs(alone.log_evidence - math.log(0.5)) < 0.02
    found = nvpflow.check_modes(flow, two_modes, known=[[-near, -near]], seed=3)
    assert found.dropped
    assert abs(found.missed - 0.5) < 5 * found.missed_error + 1e-3
    assert abs(found.log_evidence) < 5 * found.log_evidence_error + 1e-3
    assert found.excess[0] > 20
    assert "leaves out a part" in repr(found)
    assert not nvpflow.check_modes(flow, two_modes, known=[[near, near]], seed=3).dropped


def test_a_flow_that_is_the_target_has_dropped_nothing() -> None:
    flow = nvpflow.build(3, 3, (16,), standardize=False, seed=1)
    for known in (None, flow.sample(5, seed=9)):
        found = nvpflow.check_modes(flow, flow.log_prob, 4000, known=known)
        assert not found.dropped
        assert found.missed < 1e-6
        assert abs(found.log_evidence) < 5 * found.log_evidence_error
        assert abs(found.log_evidence_of_flow) < 1e-5
        assert "cannot be seen" in repr(found)
    assert found.excess.shape == (5,)
    assert (np.abs(found.excess) < 0.2).all()


def test_what_the_check_refuses() -> None:
    flow = nvpflow.build(2, 2, (8,), standardize=False, seed=1)
    for options, message in (
        ({"known": [1.0, 2.0]}, r"known has shape \(2,\), expected \[K, 2\]"),
        ({"known": [[np.nan, 2.0]]}, "known has rows with NaN"),
        ({"known": [[1e300, 2.0]]}, "known has rows with NaN or infinite values in float32"),
        ({"known": [[0.0, 1.0]], "temperature": 1.0}, "temperature is 1, expected a number above 1"),
    ):
        with pytest.raises(ValueError, match=message):
            nvpflow.check_modes(flow, banana, 100, **options)
    uniform = nvpflow.build(2, 2, (8,), transform="spline", base="uniform")
    with pytest.raises(ValueError, match="known is None"):
        nvpflow.check_modes(uniform, lambda x: np.zeros(len(x)), 100)

    def inside(x):
        return np.where(((x >= 0) & (x <= 1)).all(axis=1), 0.0, -np.inf)

    with pytest.raises(ValueError, match=r"known\[1\] is a row where log_density is -inf"):
        nvpflow.check_modes(uniform, inside, 100, known=[[0.5, 0.5], [2.0, 0.5]])
    assert not nvpflow.check_modes(uniform, inside, 100, known=[[0.5, 0.5]]).dropped


def test_rows_around_those_known_keep_to_the_bounds() -> None:
    flow = nvpflow.build(2, 2, (8,), bounds={0: (0, 1), 1: (0, None)}, standardize=False, seed=1)

    def share_and_duration(x):
        x = x.astype(np.float64)
        assert ((x > 0) & (x < [1, np.inf])).all()  # a target knows nothing of what lies outside
        return np.log(2 * x[:, 0]) - x[:, 1]

    found = nvpflow.check_modes(flow, share_and_duration, 20_000, known=[[0.5, 0.5], [1e-6, 1e-6]], seed=3)
    assert abs(found.log_evidence) < 5 * found.log_evidence_error
    assert found.log_evidence_error < 0.02
    with pytest.raises(ValueError, match=r"known\[1, 0\] is 1.5, expected a number inside the flow's bounds, \(0, 1\)"):
        nvpflow.check_modes(flow, share_and_duration, 100, known=[[0.5, 0.5], [1.5, 0.5]])
