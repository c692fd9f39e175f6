"""Flows as modules of plain PyTorch and as ONNX files: the flow's own results, without nvpflow."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import nvpflow
import pytest
from nvpflow import cli
from nvpflow import layers as L
from nvpflow.exporters import to_onnx, to_torch
from oracle import assert_within_budget
from test_general_layers import Case, make_case, smooth_case

DTYPES = ("float32", "float64")
SEEDS = [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 200))]


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def onnxruntime() -> Any:
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


def scrambled(flow: nvpflow.Flow, seed: int = 0, scale: float = 0.3) -> nvpflow.Flow:
    """Move all weights that training moves."""
    rng, trained = np.random.default_rng(seed), nvpflow._core._trained(flow.spec)
    flow.set_parameters(
        {
            name: (value + scale * rng.normal(size=value.shape) * (name in trained)).astype(value.dtype)
            for name, value in flow.parameters().items()
        }
    )
    return flow


def smooth_flow(dtype: str = "float64", context_size: int = 2) -> nvpflow.Flow:
    """One flow of all that has derivatives of every order."""
    couplings = [
        L.Coupling("odd", L.Spline(4, 3.0), L.MLP((6,), "silu")),
        L.Coupling("even", L.Affine("tanh"), L.ResidualNet(5, 1, "tanh", context_gates=context_size > 0), inverse=True),
        L.Coupling("all" if context_size else [0], L.Additive(), L.MLP((4,), "gelu", layer_norm=True)),
    ]
    spline = L.ElementSpline("all", L.Spline(3, boundary="free", tails="slope"), inverse=True)
    layers = [L.Standardize(), L.ActNorm(), *couplings, L.Permutation([2, 0, 1]), L.LULinear(inverse=True), spline]
    return scrambled(nvpflow.build(3, layers=layers, context_size=context_size, dtype=dtype))


def uniform_flow(dtype: str = "float64") -> nvpflow.Flow:
    return scrambled(nvpflow.build(3, 4, (8,), transform="spline", base="uniform", dtype=dtype))


def tensors(torch: Any, case: Case) -> tuple[Any, dict[str, Any]]:
    context = {} if case.context is None else {"context": torch.from_numpy(case.context)}
    return torch.from_numpy(case.x), context


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = 1e-10) -> None:
    found = actual.detach().numpy() if hasattr(actual, "detach") else actual
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    equal = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(equal, 0, np.abs(found - expected) / (1 + np.abs(expected)))
    assert np.max(error, initial=0) <= tolerance


# ------------------------------------------------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("seed", SEEDS)
def test_a_module_computes_what_the_flow_does(seed, torch) -> None:
    case = make_case(seed, "float64", rows=150)
    case.x[::3] *= 3  # also beyond the ends of splines
    module, (x, given) = to_torch(case.flow), tensors(torch, case)
    with torch.no_grad():
        for actual, expected in zip(module(x, **given), case.flow.forward(case.x, **case.given()), strict=True):
            assert_close(actual, expected)
        back = case.flow.inverse(case.x, with_log_det=True, **case.given())
        for actual, expected in zip(module.inverse(x, **given), back, strict=True):
            assert_close(actual, expected)
        assert_close(module.log_prob(x, **given), case.flow.log_prob(case.x, **case.given()))


@pytest.mark.parametrize("seed", range(12))
def test_a_float32_module_keeps_the_budget_of_float32(seed, torch) -> None:
    case = make_case(seed, "float32", rows=100)
    module, (x, given) = to_torch(case.flow), tensors(torch, case)
    with torch.no_grad():
        for direction in ("forward", "inverse"):
            expected = getattr(case.oracle, direction)(case.x, **case.given())
            for actual, values in zip(getattr(module, direction)(x, **given), expected, strict=True):
                assert_within_budget(actual.numpy(), values, "float32", direction)


def test_the_base_may_be_uniform(torch) -> None:
    flow = uniform_flow()
    module, x = to_torch(flow), np.random.default_rng(0).uniform(-0.1, 1.1, size=(200, 3))
    expected = flow.log_prob(x)
    assert np.isneginf(expected).any()
    assert np.isfinite(expected).any()
    assert_close(module.log_prob(torch.from_numpy(x)), expected)
    drawn = module.sample(500)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert torch.isfinite(module.log_prob(drawn)).all()


BASES = (L.StudentT(3.0), L.StudentT(2e4, trainable=False), L.Mixture(1), L.Mixture(3), L.Mixture(2, "full"))


def based_flow(base: Any, dtype: str) -> nvpflow.Flow:
    options = {"context_size": 2, "standardize": False, "dtype": dtype, "seed": 1}
    return scrambled(nvpflow.build(3, 2, (8,), base=base, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_bases_with_parameters(base, dtype, torch) -> None:
    flow, rng = based_flow(base, dtype), np.random.default_rng(0)
    module, c = to_torch(flow), rng.normal(size=(60, 2)).astype(dtype)
    x = (rng.normal(size=(60, 3)) * 10.0 ** rng.uniform(-1, 4, size=(60, 1))).astype(dtype)
    given = torch.from_numpy(x), torch.from_numpy(c)
    expected = flow.astype("float64").log_prob(x.astype(np.float64), context=c.astype(np.float64))
    assert_within_budget(module.log_prob(*given).detach().numpy(), expected, dtype)
    trained = nvpflow._core._trained(flow.spec)
    sizes = sum(int(np.prod(shape)) for name, shape, _ in flow._layout() if name in trained)
    assert sum(p.numel() for p in module.parameters()) == sizes
    drawn = module.sample(100_000, given[1][0]).detach().numpy()
    ours, shares = flow.sample(100_000, seed=2, context=c[0]), [0.1, 0.3, 0.5, 0.7, 0.9]
    spread = np.quantile(ours, 0.75, axis=0) - np.quantile(ours, 0.25, axis=0)
    assert (np.abs(np.quantile(drawn, shares, axis=0) - np.quantile(ours, shares, axis=0)) < 0.05 * spread).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(module)
    for method, rest in (("log_prob", given), ("sample", (5, given[1]))):
        torch.manual_seed(0)
        once = getattr(module, method)(*rest)
        torch.manual_seed(0)
        assert torch.equal(getattr(script, method)(*rest), once)


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_gradients_by_the_bases_parameters(base, torch) -> None:
    flow, rng = based_flow(base, "float64"), np.random.default_rng(0)
    module, x, c = to_torch(flow), rng.normal(size=(21, 3)), rng.normal(size=(21, 2))
    module.log_prob(torch.from_numpy(x), torch.from_numpy(c)).sum().backward()
    _, of_parameters, _ = flow.log_prob_vjp(x, np.ones(21), context=c, wrt="parameters")
    for name, shape, at in flow._layout():
        own = dict(module.named_parameters()).get(name)
        if name.startswith("base.") and own is not None:
            wanted = of_parameters[at : at + int(np.prod(shape))].reshape(shape)
            np.testing.assert_allclose(own.grad.numpy(), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_files_of_bases_with_parameters(base, dtype, onnxruntime, tmp_path) -> None:
    flow, path, rng = based_flow(base, dtype), tmp_path / "flow.onnx", np.random.default_rng(0)
    for method in ("forward", "inverse", "log_prob", "sample"):
        assert to_onnx(flow, path, method) <= (1e-9 if dtype == "float64" else 5e-4)
    context = np.tile(rng.normal(size=2), (100_000, 1)).astype(dtype)
    x, log_p = session_of(onnxruntime, path).run(None, {"context": context})
    assert_within_budget(log_p, flow.log_prob(x, context=context).astype(np.float64), dtype)
    ours, shares = flow.sample(100_000, seed=2, context=context[0]), [0.1, 0.3, 0.5, 0.7, 0.9]
    spread = np.quantile(ours, 0.75, axis=0) - np.quantile(ours, 0.25, axis=0)
    assert (np.abs(np.quantile(x, shares, axis=0) - np.quantile(ours, shares, axis=0)) < 0.05 * spread).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize("scale", [1e3, 1e10, 1e20])
def test_no_finite_row_gives_nan_whatever_the_weights(scale, transform, dtype, torch) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 3):  # also a context whose statistics overflow
        options = {"transform": transform, "context_size": 2, "standardize_context": True, "dtype": dtype}
        flow = scrambled(nvpflow.build(size, 3, (8,), **options))
        flow.set_parameters(
            {name: (scale * rng.normal(size=value.shape)).astype(dtype) for name, value in flow.parameters().items()}
        )
        x = (rng.normal(size=(100, size)) * 10.0 ** rng.uniform(-3, 20, size=(100, 1))).astype(dtype)
        given = torch.from_numpy(x), torch.from_numpy(rng.normal(size=(100, 2)).astype(dtype))
        module = to_torch(flow)
        for values in (*module(*given), *module.inverse(*given), module.log_prob(*given)):
            assert not values.isnan().any()


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_marked_as_the_flow_marks_them(seed, torch) -> None:
    case = make_case(seed, "float64", rows=40)
    case.x[5, -1], case.x[6, 0], case.x[7, 0] = np.nan, np.inf, -np.inf
    if case.context is not None:
        case.context[11, 0] = np.nan
    case.x[20:30] *= np.finfo(np.float64).max / 16
    case.x[30:40] *= np.finfo(np.float64).max ** 0.5
    module, (x, given) = to_torch(case.flow), tensors(torch, case)
    log_p = module.log_prob(x, **given)
    expected = case.flow.log_prob(case.x, **case.given())
    assert np.array_equal(np.isnan(log_p.detach().numpy()), np.isnan(expected))
    assert_close(log_p[:20], expected[:20])
    for actual, wanted in zip(module(x, **given), case.flow.forward(case.x, **case.given()), strict=True):
        assert np.array_equal(np.isnan(actual.detach().numpy()), np.isnan(wanted))


def test_leading_axes_broadcast(torch) -> None:
    flow = smooth_flow()
    module, rng = to_torch(flow), np.random.default_rng(0)
    x, c = rng.normal(size=(5, 1, 3)), rng.normal(size=(4, 2))
    log_p = module.log_prob(torch.from_numpy(x), torch.from_numpy(c))
    assert log_p.shape == (5, 4)
    for j in range(4):
        assert_close(log_p[:, j], flow.log_prob(x[:, 0], context=c[j]))
    z, log_det = module(torch.from_numpy(x[0, 0]), torch.from_numpy(c[0]))
    assert z.shape == (3,)
    assert log_det.shape == ()


@pytest.mark.parametrize("seed", range(8))
def test_gradients_are_the_flows(seed, torch) -> None:
    case = smooth_case(seed, "float64", "forward", 21)
    module, (x, given) = to_torch(case.flow), tensors(torch, case)
    x.requires_grad_()
    module.log_prob(x, **given).sum().backward()
    of_x, of_parameters, *_ = case.flow.log_prob_vjp(case.x, np.ones(21), **case.given())
    assert_close(x.grad, of_x, 1e-9)
    squares = sum(float((p.grad**2).sum()) for p in module.parameters() if p.grad is not None)
    trained = nvpflow._core._trained(case.flow.spec)
    expected = sum(
        float((of_parameters[at : at + int(np.prod(shape))] ** 2).sum())
        for name, shape, at in case.flow._layout()
        if name in trained
    )
    assert squares == pytest.approx(expected, rel=1e-8)


def test_a_module_trains_what_fit_trains(torch) -> None:
    flow = smooth_flow()
    trained = nvpflow._core._trained(flow.spec)
    sizes = sum(int(np.prod(shape)) for name, shape, _ in flow._layout() if name in trained)
    assert sum(p.numel() for p in to_torch(flow).parameters()) == sizes


def test_second_derivatives_are_exact(torch) -> None:
    module, rng = to_torch(smooth_flow()), np.random.default_rng(0)
    x, c = (torch.from_numpy(rng.normal(size=(4, size)) * 0.5).requires_grad_() for size in (3, 2))
    for method in (module.log_prob, module, module.inverse):
        assert torch.autograd.gradcheck(method, (x, c))
        assert torch.autograd.gradgradcheck(method, (x, c))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # which PyTorch itself uses for forward mode
def test_functional_transforms_work(torch) -> None:
    flow = smooth_flow(context_size=0)
    module, x = to_torch(flow), np.random.default_rng(0).normal(size=(7, 3))
    rows = torch.from_numpy(x)
    assert_close(torch.func.vmap(module.log_prob)(rows), flow.log_prob(x))
    for actual, expected in zip(torch.func.vmap(module.inverse)(rows), flow.inverse(x, with_log_det=True), strict=True):
        assert_close(actual, expected)
    scores = torch.func.vmap(torch.func.grad(module.log_prob))(rows)
    assert_close(scores, flow.log_prob_vjp(x, np.ones(7), wrt="x")[0])
    hessians = torch.func.vmap(torch.func.hessian(module.log_prob))(rows)
    assert_close(hessians, hessians.transpose(1, 2).detach().numpy(), 1e-9)
    _, along = torch.func.jvp(module.log_prob, (rows,), (torch.ones_like(rows),))
    assert_close(along, scores.sum(-1).detach().numpy())


@pytest.mark.parametrize("form", ["script", "trace", "export"])
def test_programs_run_without_nvpflow(form, torch, run_python, tmp_path) -> None:
    flow, path = smooth_flow(), tmp_path / "program.pt2"
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(50, 3)), rng.normal(size=(50, 2))
    np.savez(tmp_path / "rows.npz", x=x, c=c)
    module, example = to_torch(flow).eval(), (torch.from_numpy(x[:4]), torch.from_numpy(c[:4]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and torch.export says that empty tensors are
        if form == "script":
            torch.jit.save(torch.jit.script(module), path)
        elif form == "trace":
            torch.jit.save(torch.jit.trace(module, example), path)
        else:
            rows = torch.export.Dim("rows")
            program = torch.export.export(module, example, dynamic_shapes=({0: rows}, {0: rows}))
            torch.export.save(program, path)
    script = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
sys.modules["nvpflow"] = None
form, path, rows, out = sys.argv[1:]
given = [torch.from_numpy(values) for values in np.load(rows).values()]
if form == "export":
    (z, log_det), more = torch.export.load(path).module()(*given), {}
else:
    module = torch.jit.load(path)
    z, log_det = module(*given)
    more = {"log_prob": module.log_prob(*given), "x": module.inverse(*given)[0]}
    if form == "script":
        torch.manual_seed(0)
        more["drawn"] = module.sample(3, given[1])
np.savez(out, z=z.detach(), log_det=log_det.detach(), **{name: value.detach() for name, value in more.items()})
"""
    run_python(script, form, path, tmp_path / "rows.npz", tmp_path / "out.npz")
    found = dict(np.load(tmp_path / "out.npz"))
    z, log_det = flow.forward(x, context=c)
    expected = {"z": z, "log_det": log_det, "log_prob": flow.log_prob(x, context=c), "x": flow.inverse(x, context=c)}
    for name in found.keys() - {"drawn"}:
        assert_close(found[name], expected[name])
    if form == "script":
        torch.manual_seed(0)
        assert_close(found["drawn"], module.sample(3, example[1].new_tensor(c)).detach().numpy())


def test_samples_are_the_inverse_of_noise(torch) -> None:
    flow = smooth_flow()
    module, c = to_torch(flow), torch.zeros(4, 2, dtype=torch.float64)
    draw = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = module.sample(5, c, draw[0])
    assert drawn.shape == (4, 5, 3)
    noise = torch.randn(4, 5, 3, generator=draw[1], dtype=torch.float64)
    for i in range(4):
        assert_close(drawn[i], flow.inverse(noise[i].numpy(), context=c[i].numpy()))
    assert module.sample(5, c[0]).shape == (5, 3)


def test_a_module_is_its_own(torch) -> None:
    """It shares no weights, draws no random numbers, and says what is wrong with rows."""
    flow = smooth_flow()
    state = torch.get_rng_state()
    module = to_torch(flow)
    assert torch.equal(torch.get_rng_state(), state)
    before = {name: value.copy() for name, value in flow.parameters().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(np.array_equal(flow.parameters()[name], value) for name, value in before.items())
    x, c = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for rows, context, message in (
        (x[:, :2], c, r"rows have shape \[2, 2\], expected \(\.\.\., 3\)"),
        (x, c[:, :1], r"context has shape \[2, 1\], expected \(\.\.\., 2\)"),
        (x, None, "context is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            module.log_prob(rows, context)
    for rows in (x.float(), x.numpy()[:, :2].astype("float32")):
        with pytest.raises(TypeError, match=r"rows have dtype .*float32, expected the module's, torch\.float64"):
            module.log_prob(rows, c)
    with pytest.raises(ValueError, match="context is a tensor, expected None"):
        to_torch(smooth_flow(context_size=0)).log_prob(x, c)
    with pytest.raises(TypeError, match=r"flow is 3 \(int\), expected an nvpflow\.Flow"):
        to_torch(3)


def test_means_that_float32_does_not_hold_are_refused(torch) -> None:
    flow = nvpflow.build(2)
    flow.initialize_from(np.random.default_rng(0).normal(size=(100, 2)) + 1e9)
    with pytest.raises(ValueError, match=r"pass flow\.astype\('float64'\)"):
        to_torch(flow)
    x = np.random.default_rng(1).normal(size=(5, 2)) + 1e9
    wide = flow.astype("float64")
    assert_close(to_torch(wide).log_prob(torch.from_numpy(x)), wide.log_prob(x))


# --------------------------------------------------------------------------------------------------------------- ONNX


def session_of(onnxruntime: Any, path: Path) -> Any:
    return onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])


def has_gelu(flow: nvpflow.Flow) -> bool:
    return "gelu" in flow.spec.to_json()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_computes_what_the_flow_does(seed, dtype, onnxruntime, tmp_path) -> None:
    case, path = make_case(seed, dtype, rows=300), tmp_path / "flow.onnx"
    if dtype == "float64" and has_gelu(case.flow):
        pytest.skip("onnxruntime has no error function in float64")
    flow, limit = case.flow, 1e-10 if dtype == "float64" else 2e-4
    for method in ("log_prob", "forward", "inverse"):
        assert to_onnx(flow, path, method) <= limit
        session = session_of(onnxruntime, path)
        name = "z" if method == "inverse" else "x"
        for rows in (0, 1, 7, 300):
            found = session.run(None, {name: case.x[:rows], **case.given(slice(rows))})
            expected = (
                flow.inverse(case.x[:rows], with_log_det=True, **case.given(slice(rows)))
                if method == "inverse"
                else getattr(flow, method)(case.x[:rows], **case.given(slice(rows)))
            )
            for actual, values in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
                assert_close(actual, values, limit)


@pytest.mark.parametrize("kind", ["context", "plain", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_draw_samples(kind, dtype, onnxruntime, tmp_path) -> None:
    rows, plain = 20_000, nvpflow.build(3, activation="tanh", context_size=2 if kind == "context" else 0, dtype=dtype)
    flow = uniform_flow(dtype) if kind == "uniform" else scrambled(plain, scale=0.1)
    context = np.random.default_rng(0).normal(size=(rows, 2)).astype(dtype)
    given = {"context": context} if kind == "context" else {}
    to_onnx(flow, tmp_path / "flow.onnx", "sample")
    session = session_of(onnxruntime, tmp_path / "flow.onnx")
    assert [output.name for output in session.get_outputs()] == ["x", "log_prob"]
    x, log_p = session.run(None, given or {"n": np.array([rows])})
    assert x.shape == (rows, 3)
    z, _ = flow.forward(x, **given)
    np.testing.assert_allclose(log_p, flow.log_prob(x, **given), atol=1e-2 if dtype == "float32" else 1e-8)
    centre, spread = (0.5, 12**-0.5) if kind == "uniform" else (0, 1)
    np.testing.assert_allclose(z.mean(axis=0), centre, atol=0.04)
    np.testing.assert_allclose(z.std(axis=0), spread, atol=0.04)
    assert not np.array_equal(session.run(None, given or {"n": np.array([rows])})[0], x)


def test_rows_of_files_are_marked_as_the_flow_marks_them(onnxruntime, tmp_path) -> None:
    flow = smooth_flow("float32")
    x, c = np.zeros((6, 3), np.float32), np.zeros((6, 2), np.float32)
    x[1, 2], x[2, 0], c[3, 1] = np.nan, np.inf, np.nan
    x[4] = np.finfo(np.float32).max
    for method in ("log_prob", "forward", "inverse"):
        to_onnx(flow, tmp_path / "flow.onnx", method)
        given = {"z" if method == "inverse" else "x": x, "context": c}
        for found in session_of(onnxruntime, tmp_path / "flow.onnx").run(None, given):
            assert np.isnan(found[1:4]).all()
            assert not np.isnan(found[[0, 4, 5]]).any()


def test_a_file_that_computes_something_else_is_not_written(onnxruntime, tmp_path, monkeypatch) -> None:
    from nvpflow.exporters import _onnx_file

    flow, path = nvpflow.build(3, 2, (8,)), tmp_path / "flow.onnx"
    path.write_text("an older file")
    original = _onnx_file._results
    monkeypatch.setattr(
        _onnx_file, "_results", lambda *given: {name: value + 1 for name, value in original(*given).items()}
    )
    with pytest.raises(RuntimeError, match=r"log_prob .* where the flow has .* in 256 of 256 rows; the file is not"):
        to_onnx(flow, path)
    assert [file.name for file in tmp_path.iterdir()] == ["flow.onnx"]
    assert path.read_text() == "an older file"


def test_what_onnxruntime_cannot_run_is_refused(onnxruntime, tmp_path) -> None:
    flow = nvpflow.build(3, activation="gelu", dtype="float64")
    with pytest.raises(RuntimeError, match=r"onnxruntime .* cannot run the model: .*Erf"):
        to_onnx(flow, tmp_path / "flow.onnx")
    assert not list(tmp_path.iterdir())
    to_onnx(flow.astype("float32"), tmp_path / "flow.onnx")


def test_arguments_of_to_onnx_are_checked(onnxruntime, tmp_path) -> None:
    flow = nvpflow.build(3)
    for arguments, error, message in (
        ((3, "a.onnx"), TypeError, r"flow is 3 .*, expected an nvpflow\.Flow"),
        ((flow, "a.onnx", "nll"), ValueError, "method is 'nll', expected one of log_prob, forward, inverse, sample"),
        ((flow, tmp_path / "no" / "a.onnx"), FileNotFoundError, "there is no folder"),
        ((flow, tmp_path), IsADirectoryError, "is a directory"),
    ):
        with pytest.raises(error, match=message):
            to_onnx(*arguments)


@pytest.mark.parametrize(
    ("library", "call", "hint"),
    [
        ("torch", "to_torch(flow)", 'pip install "torch>=2.4"'),
        ("onnx", "to_onnx(flow, 'a.onnx')", "pip install onnx onnxruntime"),
        ("onnxruntime", "to_onnx(flow, 'a.onnx')", "pip install onnx onnxruntime"),
    ],
)
def test_a_missing_library_is_named(library, call, hint, run_python) -> None:
    script = f"""
import sys
sys.modules[{library!r}] = None
import nvpflow
flow = nvpflow.build(2)
try:
    nvpflow.exporters.{call}
except ImportError as error:
    print(error)
"""
    assert hint in run_python(script)


def test_the_command_exports(onnxruntime, tmp_path, capsys) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main(["export", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    flow, model = scrambled(nvpflow.build(3)), tmp_path / "flow.safetensors"
    flow.save(model)
    x = np.random.default_rng(0).normal(size=(10, 3))
    for dtype, limit in (("float32", 1e-4), ("float64", 1e-10)):
        path = tmp_path / f"{dtype}.onnx"
        code, said = run(model, "-o", path, "--dtype", dtype)
        assert code == 0
        assert f"log_prob written to {path}; onnxruntime differs from the flow by " in said
        (found,) = session_of(onnxruntime, path).run(None, {"x": x.astype(dtype)})
        assert_close(found, flow.astype(dtype).log_prob(x.astype(dtype)), limit)
    code, said = run(model, "-o", path)
    assert code == 1
    assert "exists already (--force overwrites it)" in said
    assert run(model, "-o", path, "--force", "--method", "inverse")[0] == 0
    code, said = run(model, "-o", tmp_path / "flow.pt")
    assert code == 1
    assert "does not end in .onnx, expected the name of an ONNX file" in said
