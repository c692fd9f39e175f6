"""nvpflow.torch: gradients, PyTorch's customs (modules, optimizers, copies, compilation), distributions."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from oracle import assert_within_budget, unit_data

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import nvpflow.torch  # noqa: E402
from nvpflow import DataWarning  # noqa: E402
from nvpflow.torch import FlowDistribution, FlowModule, FlowTransform  # noqa: E402

SIZE = 5
METHODS = {
    "forward": lambda m, x: m(x),
    "inverse": lambda m, x: m.inverse(x, with_log_det=True),
    "log_prob": lambda m, x: (m.log_prob(x),),
}


@pytest.fixture
def make(make_flow):
    """A module with random parameters, all of which want gradients, its flow, and the oracle."""

    def make(dtype="float64", **options):
        options = {"input_size": SIZE, "num_flows": 3, "hidden_sizes": (7,), "standardize": True, **options}
        flow, oracle = make_flow(dtype=dtype, **options)
        return FlowModule(flow).requires_grad_(), flow, oracle

    return make


def rows(count=6, dtype="float64", seed=1):
    return torch.from_numpy(unit_data(count, SIZE, seed, dtype))


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_the_flows_bit_for_bit(make, dtype):
    module, flow, oracle = make(dtype)
    x = rows(9, dtype)
    z, log_det = module(x)
    assert_within_budget(module.log_prob(x).detach().numpy(), oracle.log_prob(x.numpy()), dtype)
    for followed in (True, False):
        with torch.set_grad_enabled(followed):
            assert torch.equal(module.log_prob(x), flow.log_prob(x))
            assert torch.equal(module(x)[0], flow.forward(x)[0])
            assert torch.equal(module(x)[1], flow.forward(x)[1])
            assert torch.equal(module.inverse(x), flow.inverse(x))
            assert torch.equal(module.inverse(x, with_log_det=True)[1], flow.inverse(x, with_log_det=True)[1])
            assert torch.equal(module.sample(4, seed=3), torch.from_numpy(flow.sample(4, seed=3)))
    assert z.requires_grad
    assert log_det.requires_grad
    assert not module.sample(4).requires_grad
    with torch.inference_mode():
        assert torch.equal(module.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0), (2, 1, 3)])
def test_any_leading_axes(make, shape):
    module, flow, _ = make()
    x = torch.from_numpy(unit_data(6, SIZE, 2, "float64")).reshape(-1)[: SIZE * int(np.prod(shape))]
    x = x.reshape(*shape, SIZE).requires_grad_()
    z, log_det = module(x)
    assert z.shape == x.shape
    assert log_det.shape == module.log_prob(x).shape == shape
    assert module.inverse(x).shape == x.shape
    flat = x.detach().reshape(-1, SIZE)
    assert torch.equal(module.log_prob(x).reshape(-1), flow.log_prob(flat))
    (z.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in module.parameters())
    if not flat.numel():
        assert all(torch.all(p.grad == 0) for p in module.parameters())


def test_names_and_values_of_parameters(make):
    module, flow, _ = make()
    expected = flow.parameters()
    assert [name for name, _ in module.named_parameters()] == list(expected)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(expected[name].copy()))
    assert not any(p.requires_grad for n, p in FlowModule(flow).named_parameters() if n.startswith("standardize"))
    assert all(p.requires_grad for n, p in FlowModule(flow).named_parameters() if n.startswith("flow"))
    assert "input_size=5" in repr(module)


def test_module_and_flow_share_nothing(make):
    module, flow, _ = make()
    x = rows()
    before = flow.log_prob(x)
    back = module.to_flow()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    assert torch.equal(flow.log_prob(x), before)
    assert torch.equal(back.log_prob(x), before)
    assert not torch.equal(module.log_prob(x), before)
    assert torch.equal(module.to_flow().log_prob(x), module.log_prob(x))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_gradcheck(make, method, activation):
    module, _, _ = make(activation=activation, hidden_sizes=(4, 3), num_flows=2)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return METHODS[method](self.module, x)

    holder = Call()

    def function(x, *parameters):
        given = {f"module.{name}": p for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(holder, given, (x,))

    assert torch.autograd.gradcheck(function, (rows(3).requires_grad_(), *values))


@pytest.mark.parametrize("wanted", ["x", "parameters", "both", "one parameter"])
def test_only_wanted_gradients_are_formed(make, wanted):
    module, flow, _ = make()
    x = rows()
    if wanted == "x":
        module.requires_grad_(False)
    if wanted == "one parameter":
        module.requires_grad_(False)
        module.flow_1_scale.kernel.requires_grad_()
    x.requires_grad_(wanted in ("x", "both"))
    for _ in range(3):
        module.zero_grad()
        x.grad = None
        (-module.log_prob(x).mean()).backward()
        grad_x, flat = flow.log_prob_vjp(x.detach(), torch.full((len(x),), -1 / len(x), dtype=torch.float64))
        parts = dict(zip(flow.parameters(), flat.split([p.numel() for p in module.parameters()]), strict=True))
        if x.requires_grad:
            assert torch.equal(x.grad, grad_x)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert torch.allclose(parameter.grad.reshape(-1), parts[name], rtol=1e-13, atol=1e-15)
            else:
                assert parameter.grad is None


def test_rsample_is_differentiable(make):
    module, flow, _ = make()
    noise = torch.from_numpy(flow._noise(8, 5))
    expected = gradients(module, (module.inverse(noise) ** 2).sum())
    assert all(map(torch.equal, gradients(module, (module.rsample(8, seed=5) ** 2).sum()), expected))
    assert any(torch.any(g != 0) for g in expected)


def test_gradients_of_views_and_odd_layouts(make):
    module, _, _ = make()
    base = torch.randn(
        12, 2 * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    weight = torch.linspace(1, 2, 4, dtype=torch.float64)
    (module.log_prob(base[::3, ::2]) * weight.flip(0).flip(0)).sum().backward()
    x = base[::3, ::2].detach().clone().requires_grad_()
    (module.log_prob(x) * weight).sum().backward()
    assert torch.equal(base.grad[::3, ::2], x.grad)
    assert torch.count_nonzero(base.grad) == torch.count_nonzero(x.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of torch.func itself
def test_second_derivatives_are_refused(make):
    module, _, _ = make()
    x = rows().requires_grad_()
    (grad,) = torch.autograd.grad(module.log_prob(x).sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(module.log_prob(x).sum(), x)
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match=r"first derivatives only.*exporters.to_torch"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"only in reverse mode.*exporters.to_torch"):
        torch.func.hessian(module.log_prob)(rows()[0])


def test_functional_transforms(make):
    module, _, _ = make()
    x = rows()
    expected = x.clone().requires_grad_()
    module.log_prob(expected).sum().backward()
    assert torch.equal(torch.func.grad(lambda x: module.log_prob(x).sum())(x), expected.grad)
    parameters = dict(module.named_parameters())
    by_parameters = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,))[1].sum())(parameters)
    for got, want in zip(by_parameters.values(), gradients(module, module(x)[1].sum()), strict=True):
        assert torch.equal(got, want)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], x[0])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, module(x[0])[1], rtol=1e-12)


class _Counted:
    """The calls of an engine, with the rows of each."""

    def __init__(self, module, monkeypatch):
        self.rows = []
        for kind in ("forward", "inverse", "log_prob", "vjp"):
            method = getattr(module._engine, kind)

            def counted(*given, method=method, at=1 if kind == "vjp" else 0):
                self.rows.append(len(given[at]))
                return method(*given)

            monkeypatch.setattr(module._engine, kind, counted)


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_rows_is_one_call(make, method, followed, monkeypatch):
    module, _, _ = make()
    module.requires_grad_(followed)
    x = rows(6).reshape(2, 3, SIZE)
    function = lambda x: METHODS[method](module, x)  # noqa: E731
    expected = function(x)
    counted = _Counted(module, monkeypatch)
    with torch.set_grad_enabled(followed):
        for found in (
            torch.func.vmap(torch.func.vmap(function))(x),
            torch.func.vmap(function)(x),
            torch.func.vmap(function, in_dims=1, out_dims=1)(x),
        ):
            assert all(map(torch.equal, found, expected))
    assert counted.rows == [6, 6, 6]


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_with_vmap(make, method, monkeypatch):
    module, _, _ = make()
    x = rows(6)
    loss = lambda x: sum((r * r.detach().cos()).sum() for r in METHODS[method](module, x))  # noqa: E731
    given = x.clone().requires_grad_()
    by_rows = torch.autograd.grad(loss(given), given)[0]
    expected = gradients(module, loss(x))
    counted = _Counted(module, monkeypatch)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), by_rows)
    assert torch.equal(torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(x), by_rows)
    for got, want in zip(gradients(module, torch.func.vmap(loss)(x).sum()), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-13)
    assert set(counted.rows) == {6}
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    of = lambda p, x: sum(  # noqa: E731
        (r * r.detach().cos()).sum() for r in torch.func.functional_call(_Method(module, METHODS[method]), p, (x,))
    )
    parameters = {f"module.{name}": p for name, p in parameters.items()}
    each = torch.func.vmap(torch.func.grad(of), in_dims=(None, 0))(parameters, x)
    for got, want in zip(each.values(), expected, strict=True):
        assert torch.allclose(got.sum(0), want, rtol=1e-12, atol=1e-13)
    stacked = {name: torch.stack([p, 0.5 * p]) for name, p in parameters.items()}
    members = torch.func.vmap(of, in_dims=(0, None))(stacked, x)
    assert torch.equal(members[1], of({name: 0.5 * p for name, p in parameters.items()}, x))


class _Method(torch.nn.Module):
    def __init__(self, module, method):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x):
        return self.method(self.module, x)


def test_jacobians_with_vmap(make):
    module, _, _ = make()
    x = rows(4)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: module(x)[0]))(x)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, module(x)[1], rtol=1e-12)


def test_changes_between_the_passes_are_noticed(make):
    module, _, _ = make()
    x = rows().requires_grad_() * 1
    loss = module.log_prob(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = module.log_prob(rows()).sum()
    with torch.no_grad():
        module.flow_0_scale.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_outlives_its_module(make):
    module, _, _ = make()
    x = rows().requires_grad_()
    expected = torch.autograd.grad(module.log_prob(x).sum(), x)[0]
    loss = copy.deepcopy(module).log_prob(x).sum()
    gc.collect()
    loss.backward()
    assert torch.equal(x.grad, expected)


# ---- gradients formed with the value: never another result -----------------------------------------------------------


class TestForeseenGradients:
    """From the second step on, a mean's gradient is formed with its value. What comes out must not show it."""

    def step(self, module, x, factor=1.0):
        return gradients(module, factor * -module.log_prob(x).mean())

    def fresh(self, module, x, factor=1.0):
        return self.step(copy.deepcopy(module), x, factor)

    def test_it_happens(self, make):
        """Else the other tests of this class would show nothing."""
        module, _, _ = make()
        x = rows()
        self.step(module, x)
        engine, calls = module._engine, []
        engine.vjp = lambda *arguments: calls.append(arguments)
        self.step(module, x)
        assert not calls

    def test_same_gradients_and_values(self, make):
        module, flow, _ = make()
        x = rows(200)
        expected = self.fresh(module, x)
        for _ in range(4):
            assert torch.equal(module.log_prob(x), flow.log_prob(x))
            assert all(map(torch.equal, self.step(module, x), expected))

    def test_another_loss_batch_or_weight(self, make):
        module, _, _ = make()
        x = rows(20)
        for batch, factor in ((x, 1), (x, 2), (x[:7], 2), (x, 2), (x.flip(0), 2), (x, 1)):
            got, want = self.step(module, batch, factor), self.fresh(module, batch, factor)
            assert all(map(torch.equal, got, want))
        weights = torch.linspace(0, 1, 20, dtype=torch.float64)
        for _ in range(2):
            self.step(module, x)
            got = gradients(module, (weights * module.log_prob(x)).sum())
            twin = copy.deepcopy(module)
            assert all(map(torch.equal, got, gradients(twin, (weights * twin.log_prob(x)).sum())))

    def test_rows_overwritten_behind_pytorch(self, make):
        module, _, _ = make()
        buffer = unit_data(20, SIZE, 3, "float64")
        x = torch.from_numpy(buffer)
        self.step(module, x)
        self.step(module, x)
        module.log_prob(x).mean()  # a loss that nobody differentiates
        buffer *= 0.5
        module.log_prob(x)
        buffer += 0.25
        assert all(map(torch.equal, self.step(module, x), self.fresh(module, x)))

    def test_two_losses_at_once(self, make):
        module, _, _ = make()
        x, y = rows(8, seed=4), rows(8, seed=5)
        expected = [a + b for a, b in zip(self.fresh(module, x), self.fresh(module, y), strict=True)]
        self.step(module, x)
        first, second = -module.log_prob(x).mean(), -module.log_prob(y).mean()
        for got, want in zip(gradients(module, first + second), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-13, atol=1e-15)

    def test_backward_twice(self, make):
        module, _, _ = make()
        x = rows(8)
        (expected, *_), _ = self.fresh(module, x), self.step(module, x)
        module.zero_grad()
        loss = -module.log_prob(x).mean()
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            assert torch.allclose(next(module.parameters()).grad, times * expected, rtol=1e-14)

    def test_gradients_that_are_kept_are_not_written_to_again(self, make):
        module, _, _ = make()
        kept = []
        for seed in range(4):
            x = rows(8, seed=seed)
            want = self.fresh(module, x)
            kept.append((torch.autograd.grad(-module.log_prob(x).mean(), list(module.parameters())), want))
        for got, want in kept:
            assert all(map(torch.equal, got, want))

    def test_frozen_parameters_and_rows_that_want_gradients(self, make):
        module, _, _ = make()
        x = rows(8)
        self.step(module, x)
        module.flow_0_scale.requires_grad_(False)
        follower = x.clone().requires_grad_()
        twin = copy.deepcopy(module)
        for m in (module, twin):
            m.zero_grad()
        (-module.log_prob(follower).mean()).backward()
        got, follower.grad = follower.grad, None
        (-twin.log_prob(follower).mean()).backward()
        assert torch.equal(got, follower.grad)
        assert module.flow_0_scale.kernel.grad is None


# ---- changes of parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["data", "numpy", "copy_", "assign", "load_state_dict", "data of another", "fused"])
@pytest.mark.parametrize("followed", [True, False])
def test_no_change_is_missed(make, how, followed):
    """PyTorch's own account of changes leaves out some of these."""
    module, _, _ = make()
    x = rows()
    with torch.set_grad_enabled(followed):
        before = module.log_prob(x).detach().clone()
        name, parameter = list(module.named_parameters())[-1]
        new = parameter.detach() + 0.25
        if how == "data":
            parameter.data.add_(0.25)
        elif how == "numpy":
            parameter.detach().numpy()[...] += 0.25
        elif how == "copy_":
            with torch.no_grad():
                parameter.copy_(new)
        elif how == "assign":
            module.flow_2_translation.bias = torch.nn.Parameter(new)
        elif how == "load_state_dict":
            module.load_state_dict({**module.state_dict(), name: new}, assign=True)
        elif how == "data of another":
            parameter.data = new
        else:
            parameter.grad = torch.full_like(parameter, -0.25)
            torch.optim.SGD([parameter], lr=1, fused=True).step()
        assert name == "flow_2_translation.bias"
        expected = module.to_flow()
        assert torch.equal(torch.from_numpy(expected.parameters()[name].copy()), new)
        assert torch.equal(module.log_prob(x).detach(), expected.log_prob(x))
        assert not torch.equal(module.log_prob(x), before)


def test_parametrizations(make):
    """A parametrization may give a transposed view of the module's own memory."""
    module, flow, _ = make(input_size=4, hidden_sizes=(2,), num_flows=2, standardize=False)

    class Transposed(torch.nn.Module):
        def forward(self, kernel):
            return kernel.T

    name = "flow_0_coupling_dense_0.kernel"
    values = flow.parameters()
    flow.set_parameters({**values, name: values[name].T.copy()})
    torch.nn.utils.parametrize.register_parametrization(module.flow_0_coupling_dense_0, "kernel", Transposed())
    x = torch.from_numpy(unit_data(5, 4, 6, "float64"))
    assert torch.equal(module.log_prob(x), flow.log_prob(x))
    module.log_prob(x).sum().backward()
    assert module.flow_0_coupling_dense_0.parametrizations.kernel.original.grad.shape == (2, 2)


def test_parameters_that_do_not_fit_are_named(make):
    module, _, _ = make()
    module.flow_1_scale.float()
    with pytest.raises(ValueError, match=r"flow_1_scale\.kernel is torch\.float32.*all of one dtype"):
        module.log_prob(rows())
    module.flow_1_scale.half()
    with pytest.raises(TypeError, match=r"flow_1_scale\.kernel has dtype torch\.float16"):
        module.log_prob(rows())
    module.double()
    module.flow_1_scale.bias.data = torch.zeros(9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"flow_1_scale\.bias has shape \(9,\), expected"):
        module.log_prob(rows())


# ---- PyTorch's customs -----------------------------------------------------------------------------------------------


def test_to_another_dtype_and_back(make):
    module, flow, _ = make("float32", standardize=False)
    x = rows(5, "float32")
    expected = module.log_prob(x)
    assert module.double() is module
    assert module.log_prob(x.double()).dtype == torch.float64
    assert torch.allclose(module.log_prob(x.double()).float(), expected, rtol=1e-5)
    assert torch.equal(module.float().log_prob(x), expected)
    assert torch.equal(expected, flow.log_prob(x))
    for name in ("half", "bfloat16"):
        with pytest.raises(TypeError, match=r"expected torch.float32 or torch.float64"):
            getattr(module, name)()
    assert torch.equal(module.log_prob(x), expected)


def test_a_module_of_shapes_alone(make):
    module, _, _ = make()
    module.to("meta")
    z, log_det = module(torch.zeros(3, SIZE, dtype=torch.float64, device="meta"))
    assert (z.device.type, z.shape, log_det.shape) == ("meta", (3, SIZE), (3,))


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies(make, how):
    module, _, _ = make()
    module.num_threads = 2
    module.flow_0_scale.requires_grad_(False)
    x = rows()
    expected = module.log_prob(x)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        make_copy = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
        other = make_copy[how](module)
    assert torch.equal(other.log_prob(x), expected)
    assert other.num_threads == 2
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in module.parameters()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(module.log_prob(x), expected) == (how != "copy")  # which shares parameters everywhere in PyTorch


def test_state_dict_and_safetensors(make, tmp_path):
    module, flow, _ = make()
    other = FlowModule(nvpflow.Flow(flow.spec, seed=9))
    x = rows()
    assert not torch.equal(other.log_prob(x), module.log_prob(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.log_prob(x), module.log_prob(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        FlowModule(nvpflow.build(SIZE, dtype="float64", standardize=True)).load_state_dict(module.state_dict())
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_model(module, str(tmp_path / "module.safetensors"))
    assert nvpflow.load(tmp_path / "module.safetensors", spec=flow.spec) == flow
    flow.save(tmp_path / "flow.safetensors")
    fresh = FlowModule(nvpflow.Flow(flow.spec, seed=10))
    safetensors.load_model(fresh, str(tmp_path / "flow.safetensors"))
    assert torch.equal(fresh.log_prob(x), module.log_prob(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {"fused": True}), ("Adam", {"foreach": True}), ("LBFGS", {})],
    ids=str,
)
def test_optimizers(make, name, options):
    module, _, _ = make(num_flows=2, standardize=False)
    x = rows(64) * 0.5 + 1
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=1e-2, **options)

    def closure():
        optimizer.zero_grad()
        loss = -module.log_prob(x).mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert closure().item() < first - 0.1


def test_training_is_that_of_plain_pytorch(make):
    """The same steps as a model of PyTorch's own operations takes from the same weights."""
    module, _, _ = make(activation="tanh", standardize=False)
    names = [name for name, _ in module.named_parameters()]
    own = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}

    def log_prob(x):
        half, log_det = SIZE // 2, 0
        halves = [x[:, :half], x[:, half:]]
        for k in range(3):
            a, b = (0, 1) if k % 2 == 0 else (1, 0)
            hidden = torch.tanh(
                halves[a] @ own[f"flow_{k}_coupling_dense_0.kernel"] + own[f"flow_{k}_coupling_dense_0.bias"]
            )
            s = torch.tanh(hidden @ own[f"flow_{k}_scale.kernel"] + own[f"flow_{k}_scale.bias"])
            t = hidden @ own[f"flow_{k}_translation.kernel"] + own[f"flow_{k}_translation.bias"]
            halves[b] = halves[b] * torch.exp(s) + t
            log_det = log_det + s.sum(1)
        z = torch.cat(halves, 1)
        return log_det - 0.5 * (z * z).sum(1) - 0.5 * SIZE * np.log(2 * np.pi)

    ours, theirs = torch.optim.Adam(module.parameters(), lr=1e-2), torch.optim.Adam(own.values(), lr=1e-2)
    for step in range(30):
        x = rows(32, seed=step)
        for optimizer, function in ((ours, module.log_prob), (theirs, log_prob)):
            optimizer.zero_grad()
            (-function(x).mean()).backward()
            optimizer.step()
    for name, parameter in zip(names, module.parameters(), strict=True):
        assert torch.allclose(parameter, own[name], rtol=1e-9, atol=1e-11), name


def test_lower_precisions_come_in_and_autocast_stays_out(make):
    module, flow, _ = make("float32", standardize=False)
    x = rows(6, "float32")
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(module.log_prob(x.to(dtype)), flow.log_prob(x.to(dtype).float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.log_prob(x), flow.log_prob(x))
        layer = torch.nn.Linear(SIZE, SIZE)
        (-module.log_prob(layer(x)).mean()).backward()
    assert layer.weight.grad.dtype == module.flow_0_scale.kernel.grad.dtype == torch.float32
    assert torch.any(layer.weight.grad != 0)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, SIZE), TypeError, r"^x has dtype torch\.float64|^x has dtype torch\.float32|^x is float32"),
        (torch.zeros(3, SIZE, dtype=torch.int64), TypeError, r"^x has dtype torch\.int64, expected torch\.float64"),
        (torch.zeros(3, SIZE + 1, dtype=torch.float64), ValueError, r"^x has shape \(3, 6\), expected \(\.\.\., 5\)"),
        (torch.zeros((), dtype=torch.float64), ValueError, r"^x has shape \(\)"),
        (torch.zeros(3, SIZE, dtype=torch.float64, device="meta"), ValueError, r"^x is on 'meta', expected 'cpu'"),
        (torch.zeros(3, SIZE, dtype=torch.float64).to_sparse(), TypeError, r"^x has layout torch\.sparse_coo"),
        (np.zeros((3, SIZE)), TypeError, r"^x is ndarray, expected a torch\.Tensor"),
    ],
    ids=["float32", "int", "columns", "no axes", "meta", "sparse", "numpy"],
)
def test_wrong_rows(make, x, error, message):
    module, flow, _ = make()
    if isinstance(x, torch.Tensor) and x.dtype == torch.float32:  # narrower than the module's: converted
        assert torch.equal(module.log_prob(x), flow.log_prob(x.double()))
        module.float()
        x = x.double()
    with pytest.raises(error, match=message):
        module.log_prob(x)


def test_wrong_arguments(make):
    module, flow, _ = make()
    with pytest.raises(TypeError, match=r"(?s)flow is .*, expected an nvpflow\.Flow"):
        FlowModule(module)
    for bad in (-1, 1.5, "3"):
        with pytest.raises((TypeError, ValueError), match=r"^n\b"):
            module.sample(bad)
    with pytest.raises((TypeError, ValueError), match=r"^seed\b"):
        module.sample(3, seed=-1)
    with pytest.raises(ValueError, match=r"^num_threads is -1"):
        module.num_threads = -1
    assert module.num_threads == flow.num_threads


def test_sampling_follows_pytorchs_seed(make):
    module, _, _ = make()
    torch.manual_seed(3)
    first = module.sample(4)
    assert not torch.equal(module.sample(4), first)
    torch.manual_seed(3)
    assert torch.equal(module.sample(4), first)
    assert module.sample(0).shape == (0, SIZE)


def test_bfloat16_weights_are_not_taken_over():
    flow = nvpflow.build(SIZE, weights="bfloat16")
    x = rows(3, "float32")
    assert torch.equal(FlowModule(flow).log_prob(x), flow.to("cpu", weights="full").log_prob(x))


def test_threads_on_one_module_while_its_parameters_change(make):
    """Each call sees one state or the other of all parameters, never a mixture."""
    module, _flow, _ = make("float32", hidden_sizes=(64,), standardize=False)
    x = rows(100, "float32")
    states = [dict(module.state_dict()), {n: v * 0.5 for n, v in module.state_dict().items()}]
    states = [{n: v.clone() for n, v in state.items()} for state in states]
    answers = []
    for state in states:
        module.load_state_dict(state)
        answers.append(module.log_prob(x).detach())
    failures: list[str] = []
    stop = threading.Event()

    def read(state, expected):
        while not stop.is_set():
            got = torch.func.functional_call(Scores(module), {f"module.{n}": v for n, v in state.items()}, (x,))
            if not torch.equal(got, expected):
                failures.append("another state's result")

    class Scores(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.__dict__["inner"] = inner  # functional_call would swap the parameters of a shared module under others
            self.module = copy.copy(inner)

        def forward(self, x):
            with torch.no_grad():
                return self.module.log_prob(x)

    threads = [threading.Thread(target=read, args=pair) for pair in zip(states * 2, answers * 2, strict=True)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_share_one_packed_flow(make):
    module, _, _ = make("float32", hidden_sizes=(64,), standardize=False)
    x = rows(2000, "float32")
    expected = module.log_prob(x).detach()
    packed = module._engine._packed
    wrong: list[int] = []

    def work():
        for i in range(30):
            loss = module.log_prob(x[: 100 + i])
            if not torch.equal(loss.detach(), expected[: 100 + i]):
                wrong.append(i)
            torch.autograd.grad(loss.mean(), module.flow_0_scale.kernel)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert module._engine._packed is packed  # no copy of the parameters for each call that overlaps another


def test_steps_leave_no_memory_behind(make):
    module, _, _ = make(standardize=False)
    x = rows()

    def step():
        gradients(module, -module.log_prob(x).mean())
        gradients(module, (module.rsample(3) ** 2).mean())

    for _ in range(3):
        step()
    gc.collect()
    gc.disable()
    try:
        before = len([o for o in gc.get_objects() if type(o) is torch.Tensor])
        for _ in range(20):
            step()
        assert len([o for o in gc.get_objects() if type(o) is torch.Tensor]) <= before + 2
    finally:
        gc.enable()


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _quiet():
    """PyTorch's compiler warns of its own parts."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_in_one_graph(make, method):
    module, _, _ = make(standardize=False)
    layer = torch.nn.Linear(SIZE, SIZE, dtype=torch.float64)

    def loss(x):
        return sum((r**2).sum() for r in METHODS[method](module, torch.tanh(layer(x))))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (4, 9, 1):
        x = rows(count)
        expected = gradients(module, loss(x))
        by_layer = layer.weight.grad.clone()
        layer.zero_grad()
        got = gradients(module, compiled(x))
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(got, expected, strict=True))
        assert torch.allclose(layer.weight.grad, by_layer, rtol=1e-12, atol=1e-14)
        layer.zero_grad()
        with torch.no_grad():
            assert torch.allclose(compiled(x), loss(x), rtol=1e-13)


@pytest.mark.usefixtures("_quiet")
def test_operators_pass_pytorchs_own_checks(make):
    module, _, _ = make(standardize=False, num_flows=2, hidden_sizes=(3,))
    parameters, handle = module._tensors(), module._engine.handle
    x = rows(3).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator in (torch.ops.nvpflow.forward, torch.ops.nvpflow.inverse, torch.ops.nvpflow.log_prob):
        torch.library.opcheck(operator.default, (x, None, parameters, handle), test_utils=tests)


@pytest.mark.usefixtures("_quiet")
def test_one_compiled_function_for_several_modules(make):
    compiled = torch.compile(lambda module, x: module.log_prob(x), fullgraph=True, backend="aot_eager")
    x = rows()
    for seed in range(3):
        module, flow, _ = make(seed=seed)
        assert torch.allclose(compiled(module, x), flow.log_prob(x), rtol=1e-13)


# ---- torch.distributions ---------------------------------------------------------------------------------------------


class TestDistributions:
    def test_transform(self, make):
        module, _, _ = make()
        z = rows(7)
        for cache_size in (0, 1):
            transform = FlowTransform(module, cache_size=cache_size)
            x = transform(z)
            assert torch.allclose(transform.inv(x.clone()), z, rtol=1e-10, atol=1e-12)
            log_det = transform.log_abs_det_jacobian(z, x)
            jacobian = torch.autograd.functional.jacobian(lambda z: transform._call(z).sum(0), z).permute(1, 0, 2)  # noqa: B023
            assert torch.allclose(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-12)
            assert torch.allclose(transform.inv.log_abs_det_jacobian(x, z), -log_det)
        assert transform == FlowTransform(module)
        assert transform != FlowTransform(copy.deepcopy(module))
        assert transform.with_cache(0)._cache_size == 0
        assert transform.domain.event_dim == transform.codomain.event_dim == 1
        assert transform.forward_shape((3, SIZE)) == transform.inverse_shape((3, SIZE)) == (3, SIZE)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(z), transform(z))

    @pytest.mark.parametrize("cache_size", [0, 1])
    def test_change_of_variables(self, make, cache_size):
        """A TransformedDistribution over the flow's transform is the flow."""
        module, _, _ = make()
        base = torch.distributions.Independent(
            torch.distributions.Normal(torch.zeros(SIZE, dtype=torch.float64), torch.ones(SIZE, dtype=torch.float64)), 1
        )
        transformed = torch.distributions.TransformedDistribution(base, [FlowTransform(module, cache_size)])
        assert (transformed.batch_shape, transformed.event_shape) == ((), (SIZE,))
        x = rows(9).reshape(3, 3, SIZE)
        assert torch.allclose(transformed.log_prob(x), FlowDistribution(module).log_prob(x), rtol=1e-12)
        assert torch.all(transformed.support.check(transformed.sample((4,))))
        for got, want in zip(
            gradients(module, transformed.log_prob(x).mean()),
            gradients(module, FlowDistribution(module).log_prob(x).mean()),
            strict=True,
        ):
            assert torch.allclose(got, want, rtol=1e-10, atol=1e-13)

    def test_the_cache_saves_a_pass(self, make):
        module, _, _ = make()
        calls = []
        module.register_forward_hook(lambda *_: calls.append(1))
        module.forward = (lambda forward: lambda *given: (calls.append(1), forward(*given))[1])(module.forward)
        transform = FlowTransform(module, cache_size=1)
        x = rows()
        transform.log_abs_det_jacobian(transform.inv(x), x)
        assert len(calls) == 1

    def test_the_cache_of_a_sample_loses_no_gradient(self, make):
        module, _, _ = make()
        base = torch.distributions.MultivariateNormal(torch.zeros(SIZE).double(), torch.eye(SIZE).double())
        cached, plain = (
            torch.distributions.TransformedDistribution(base, [FlowTransform(module, size)]) for size in (1, 0)
        )
        y = rows()
        for how in ("sample", "log_prob"):
            with torch.no_grad():
                given = cached.sample((6,)) if how == "sample" else (cached.log_prob(y), y)[1]
            got = gradients(module, cached.log_prob(given).sum())
            for ours, want in zip(got, gradients(module, plain.log_prob(given).sum()), strict=True):
                assert torch.allclose(ours, want, rtol=1e-10, atol=1e-12)
        transform = FlowTransform(module, 1)
        with torch.no_grad():
            z = transform.inv(y)
            transform.log_abs_det_jacobian(z, y)
        assert transform.log_abs_det_jacobian(z, y).requires_grad
        assert transform(z).requires_grad

    def test_other_bases(self, make):
        module, _, _ = make()
        base = torch.distributions.MultivariateNormal(
            torch.arange(SIZE, dtype=torch.float64), 2 * torch.eye(SIZE, dtype=torch.float64)
        )
        chain = [torch.distributions.AffineTransform(1.0, 0.5, event_dim=1), FlowTransform(module, cache_size=1)]
        transformed = torch.distributions.TransformedDistribution(base, chain)
        x = transformed.rsample((6,))
        z, log_det = module(x)
        expected = base.log_prob((z - 1) / 0.5) + log_det - SIZE * np.log(0.5)
        assert torch.allclose(transformed.log_prob(x), expected, rtol=1e-10)

    def test_distribution(self, make):
        module, _, _ = make()
        distribution = FlowDistribution(module, validate_args=True)
        assert (distribution.batch_shape, distribution.event_shape) == ((), (SIZE,))
        assert distribution.rsample((2, 3)).shape == (2, 3, SIZE)
        assert distribution.rsample().requires_grad
        assert not distribution.sample((2,)).requires_grad
        assert distribution.sample().shape == (SIZE,)
        with pytest.raises(ValueError, match="support"):
            distribution.log_prob(torch.full((SIZE,), torch.nan, dtype=torch.float64))
        with pytest.raises(ValueError, match="event_shape"):
            distribution.log_prob(torch.zeros(SIZE + 1, dtype=torch.float64))
        batch = distribution.expand((4,))
        assert (batch.batch_shape, batch.event_shape) == ((4,), (SIZE,))
        assert batch.sample((3,)).shape == (3, 4, SIZE)
        x = batch.sample((3,))
        assert batch.log_prob(x).shape == (3, 4)
        assert batch.log_prob(x[0, 0]).shape == (4,)
        assert torch.equal(batch.log_prob(x), module.log_prob(x))
        assert "FlowDistribution" in repr(distribution)

    def test_density_of_samples_integrates(self, make):
        """E[q(x) / p(x)] under p is 1 for any density q: the samples are of the density that log_prob says."""
        module, _, _ = make(input_size=2, num_flows=2, standardize=False, kernel_scale=0.5)
        torch.manual_seed(0)
        distribution = FlowDistribution(module)
        with torch.no_grad():
            x = distribution.sample((200_000,))
            narrow = torch.distributions.MultivariateNormal(x.mean(0), 0.25 * torch.cov(x.T))
            ratio = torch.exp(narrow.log_prob(x) - distribution.log_prob(x))
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(len(x))
        assert ratio.std() < 20


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path, monkeypatch):
    """The Python of python/docs/pytorch.md, block after block."""
    page = Path(__file__).parents[2] / "python" / "docs" / "pytorch.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)
    torch.compiler.reset()


def test_the_absence_of_pytorch_says_what_to_install(run_python):
    output = run_python(
        """
import sys
sys.modules["torch"] = None
import nvpflow
try:
    import nvpflow.torch
except ImportError as error:
    print(error)
"""
    )
    assert 'pip install "torch>=2.4"' in output


def test_a_trace_computes_anew_or_is_refused() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    module = FlowModule(nvpflow.build(4, 2, (8,), seed=1))
    first, second = torch.randn(10, 4), torch.randn(10, 4)
    with torch.no_grad():
        torch.testing.assert_close(make_fx(lambda x: module.log_prob(x))(first)(second), module.log_prob(second))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, on torch.jit.trace
            with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace cannot record"):
                torch.jit.trace(lambda x: module.log_prob(x), first)


def test_shared_parameters_stay_shared() -> None:
    module = FlowModule(nvpflow.build(4, 2, (8,), seed=1))
    x = torch.randn(10, 4)
    before = module.log_prob(x)
    module.share_memory()
    assert all(parameter.is_shared() for parameter in module.parameters())
    torch.testing.assert_close(module.log_prob(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward mode
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("of", ["rows", "parameters"])
def test_forward_mode_is_refused_also_without_gradients(make_flow, gradients, of) -> None:
    forward_ad = torch.autograd.forward_ad
    module = FlowModule(make_flow(SIZE, 2, (4,))[0])
    x = rows(3)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        changed = {}
        if of == "rows":
            given = forward_ad.make_dual(x, torch.ones_like(x))
        else:
            given, name = x, "flow_1_scale.kernel"
            kernel = module.get_parameter(name).detach()
            changed = {name: forward_ad.make_dual(kernel, torch.ones_like(kernel))}
        for method in ("forward", "inverse", "log_prob"):
            wrapped = torch.nn.Module()
            wrapped.flow = module
            wrapped.forward = lambda rows, method=method: getattr(module, method)(rows)
            with pytest.raises(NotImplementedError, match="tangent of forward-mode"):
                torch.func.functional_call(wrapped, {f"flow.{n}": v for n, v in changed.items()}, (given,))
    with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="tangent of forward-mode"):
        torch.func.jvp(module.log_prob, (x,), (x,))
    with forward_ad.dual_level():
        assert torch.equal(module.log_prob(x), module.log_prob(x.clone()))


# ---------------------------------------------------------------------------------------------- what fit does elsewhere


def raw_rows(rows: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator) * torch.tensor([1.0, 100.0, 1e-3, 1.0]) + 50


def test_initialize_from_sets_the_layer_as_the_flow_does() -> None:
    flow = nvpflow.build(4, 2, (8,), seed=1)
    module = FlowModule(flow)
    x = raw_rows()
    assert module.initialize_from(x.reshape(10, 20, 4)) == {}
    flow.initialize_from(x.numpy())
    assert module.to_flow() == flow
    far = x.clone()
    far[0] = 1e6
    assert set(module.initialize_from(far)) == {"column 1", "column 2", "column 3", "column 4"}
    assert module.initialize_from(far, standardize="mean") == {}
    with pytest.raises(ValueError, match="does not begin with a standardize layer"):
        FlowModule(nvpflow.build(4, standardize=False)).initialize_from(x)


def test_rows_far_from_unit_scale_are_said_once() -> None:
    module = FlowModule(nvpflow.build(4, 2, (8,)))
    module.log_prob(raw_rows(15))  # too few to tell
    with pytest.warns(DataWarning, match=r"still the identity and column 1, 2, 3, 4 of the rows"):
        module.log_prob(raw_rows())
    module.log_prob(raw_rows())
    for silent in (FlowModule(nvpflow.build(4, 2, (8,))), FlowModule(nvpflow.build(4, standardize=False))):
        silent.log_prob(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))
        silent.log_prob(raw_rows())
    initialized = FlowModule(nvpflow.build(4, 2, (8,)))
    initialized.initialize_from(raw_rows())
    initialized(raw_rows() * 1e3)


@pytest.mark.parametrize("how", ["as it is", "double", "deepcopy", "pickle"])
def test_what_a_flow_was_told_stays_with_it(how) -> None:
    flow = nvpflow.build(2, 2, (4,), context_size=1, standardize="robust")
    flow.column_names, flow.context_names = ["speed", "load"], ["day"]
    module = FlowModule(flow)
    if how == "double":
        module.double()
    elif how == "deepcopy":
        module = copy.deepcopy(module).double()
    elif how == "pickle":
        module = pickle.loads(pickle.dumps(module))
    back = module.to_flow()
    assert (back.column_names, back.context_names) == (("speed", "load"), ("day",))
    assert "standardize='robust'" in repr(back)
    x = raw_rows().to(module.context.mean.dtype)
    assert set(module.initialize_from(x[:, :2], x[:, 2:3])) == {"speed", "load"}


def test_to_flow_does_not_drop_a_base() -> None:
    module = FlowModule(nvpflow.build(4, 2, (8,)))
    module.to_flow()
    base = torch.distributions.Independent(torch.distributions.StudentT(torch.full((4,), 5.0)), 1)
    torch.distributions.TransformedDistribution(base, [FlowTransform(module)])
    for used in (module, copy.deepcopy(module)):
        with pytest.raises(ValueError, match=r"base distribution is not in the module.*to_flow\(drop_base=True\)"):
            used.to_flow()
        assert used.to_flow(drop_base=True) == nvpflow.build(4, 2, (8,))


def test_reset_parameters_draws_anew_what_is_drawn() -> None:
    module = FlowModule(nvpflow.build(4, 2, (8,), seed=1))
    module.initialize_from(raw_rows())
    layer = module.standardize_0.mean.clone()
    module.reset_parameters(seed=5)
    assert torch.equal(module.standardize_0.mean, layer)
    for init in ("fan_in", "glorot"):
        module.reset_parameters(seed=5, init=init)
        new = nvpflow.build(4, 2, (8,), seed=5, init=init).parameters()
        for name, value in module.state_dict().items():
            assert name.startswith("standardize") or np.array_equal(value.numpy(), new[name]), name
    torch.manual_seed(0)
    for part in module.modules():
        assert part is module or part.reset_parameters() is None  # as libraries do that reset every part
    module.reset_parameters()
    first = module.to_flow()
    torch.manual_seed(0)
    module.reset_parameters()
    assert module.to_flow() == first


def test_sample_and_log_prob_agree(make) -> None:
    module, flow, _ = make()
    x, log_p = module.rsample_and_log_prob(50, seed=3)
    assert np.array_equal(x.detach().numpy(), flow.sample(50, seed=3))
    np.testing.assert_allclose(log_p.detach().numpy(), flow.log_prob(x.detach().numpy()), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_p.detach().numpy(), flow.sample_and_log_prob(50, seed=3)[1], rtol=1e-13, atol=1e-13)
    drawn = module.sample_and_log_prob(50, seed=3)
    assert all(map(torch.equal, drawn, (x, log_p)))
    assert not any(tensor.requires_grad for tensor in drawn)


def test_gradients_of_rsample_and_log_prob(make) -> None:
    """The gradient of log q(x) at the rows that are drawn, through the rows and the density."""
    module, _, _ = make()
    by_one_pass = gradients(module, module.rsample_and_log_prob(50, seed=3)[1].sum())
    by_two = gradients(module, module.log_prob(module.rsample(50, seed=3)).sum())
    for got, want in zip(by_one_pass, by_two, strict=True):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-9)


# ---- one parameter for all -------------------------------------------------------------------------------------------


FLAT_OPTIONS = [
    {},
    {"frozen": ["flow_1_scale", "flow_0_translation.bias"]},
]


@pytest.mark.parametrize("options", FLAT_OPTIONS, ids=["all", "some frozen"])
def test_a_flat_module_is_the_module(make, options) -> None:
    _, flow, _ = make()
    plain, flat = FlowModule(flow, **options), FlowModule(flow, flat=True, **options)
    for kind, method in METHODS.items():
        assert all(map(torch.equal, method(flat, rows()), method(plain, rows()))), kind
    wanted = {name: p.grad for name, p in _after(plain, plain.log_prob(rows()).mean())}
    found = {}
    by_name = dict(_after(flat, flat.log_prob(rows()).mean()))
    for piece in flat._engine.pieces:
        parameter = by_name[piece.name]
        if not piece.parts:
            assert parameter.grad is None
            found[piece.name] = None
        for name, shape, start in piece.parts:
            found[name] = parameter.grad[start : start + shape.numel()].view(shape)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None), name
        assert grad is None or torch.equal(found[name], grad), name
    assert sum(p.requires_grad for p in flat.parameters()) == (1 if not options else 3)
    assert {name for name, p in plain.named_parameters() if not p.requires_grad} == {
        name for name, p in flat.named_parameters() if not p.requires_grad
    }


def _after(module, loss):
    loss.backward()
    return module.named_parameters()


@pytest.mark.parametrize("options", FLAT_OPTIONS, ids=["all", "some frozen"])
def test_state_dicts_go_from_one_form_to_the_other(make, options, tmp_path) -> None:
    _, flow, _ = make()
    plain, flat = FlowModule(flow), FlowModule(flow, flat=True, **options)
    state = flat.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in plain.state_dict().items()
    }
    plain.reset_parameters(seed=3)
    flat.load_state_dict(plain.state_dict())
    assert torch.equal(flat.log_prob(rows()), plain.log_prob(rows()))
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())  # views, as elsewhere
    other = FlowModule(flow)
    other.load_state_dict(flat.state_dict())
    assert other.to_flow() == flat.to_flow() == plain.to_flow()
    nested = torch.nn.ModuleDict({"a": flat, "b": torch.nn.Linear(2, 2)})
    again = torch.nn.ModuleDict({"a": FlowModule(flow, flat=True), "b": torch.nn.Linear(2, 2)})
    again.load_state_dict(nested.state_dict())
    assert again["a"].to_flow() == plain.to_flow()
    again["a"].load_state_dict(other.state_dict(), assign=True)
    assert again["a"].to_flow() == plain.to_flow()
    kept = flat.state_dict(keep_vars=True)
    assert kept["flow_0_scale.kernel"].requires_grad
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(flat.state_dict(), tmp_path / "flat.safetensors")
    other.reset_parameters(seed=9)
    other.load_state_dict(safetensors.load_file(tmp_path / "flat.safetensors"))
    assert other.to_flow() == plain.to_flow()


def test_what_a_state_dict_lacks_is_named(make) -> None:
    _, flow, _ = make()
    flat = FlowModule(flow, flat=True)
    before = flat.to_flow()
    state = FlowModule(nvpflow.build(SIZE, 3, (7,), dtype="float64", seed=8)).state_dict()
    kernel = state.pop("flow_1_scale.kernel")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "flow_1_scale.kernel"'):
        flat.load_state_dict(state)
    missing, unexpected = FlowModule(before, flat=True).load_state_dict({**state, "more": kernel}, strict=False)
    assert (missing, unexpected) == (["flow_1_scale.kernel"], ["more"])
    with pytest.raises(RuntimeError, match=r"size mismatch for flow_1_scale.kernel: .*\[2, 7\].*\[7, 2\]"):
        flat.load_state_dict({**state, "flow_1_scale.kernel": kernel.T})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_flat_module(make, how, tmp_path) -> None:
    _, flow, _ = make()
    flat = FlowModule(flow, flat=True, frozen=["flow_1_scale"])
    copies = {
        "deepcopy": lambda: copy.deepcopy(flat),
        "pickle": lambda: pickle.loads(pickle.dumps(flat)),
        "torch.save": lambda: (
            torch.save(flat, tmp_path / "m.pt"),
            torch.load(tmp_path / "m.pt", weights_only=False),
        )[1],
    }
    other = copies[how]()
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in flat.named_parameters()]
    other.reset_parameters(seed=1)
    assert other.to_flow() != flat.to_flow() == flow
    assert other.float().log_prob(rows(dtype="float32")).dtype == torch.float32
    assert other.double()._engine.are_flat(other._tensors())


def test_a_flat_module_trains_as_the_module(make) -> None:
    _, flow, _ = make()
    plain, flat = FlowModule(flow), FlowModule(flow, flat=True)
    for module in (plain, flat):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for step in range(10):
            optimizer.zero_grad()
            (-module.log_prob(rows(64, seed=step)).mean()).backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.allclose(flat.state_dict()[name], value, rtol=1e-12, atol=1e-14), name


def test_initial_values_of_a_flat_module() -> None:
    flat = FlowModule(nvpflow.build(4, 2, (8,), mixing="lu", actnorm=True, seed=1), flat=True)
    plain = FlowModule(nvpflow.build(4, 2, (8,), mixing="lu", actnorm=True, seed=1))
    assert [name for name, p in flat.named_parameters() if not p.requires_grad] == [
        name for name, p in plain.named_parameters() if not p.requires_grad
    ]
    assert flat.initialize_from(raw_rows()) == plain.initialize_from(raw_rows())
    assert flat.to_flow() == plain.to_flow()


def test_what_is_frozen_has_a_name(make) -> None:
    _, flow, _ = make()
    with pytest.raises(ValueError, match="frozen has 'flow_9_scale', expected names of layers or tensors; the layers"):
        FlowModule(flow, frozen=["flow_9_scale"])
    with pytest.raises(TypeError, match=r"frozen is a str, expected several names; write \['flow_0_scale'\]"):
        FlowModule(flow, frozen="flow_0_scale")
    with pytest.raises(TypeError, match=r"frozen is None \(NoneType\), expected names of layers or tensors"):
        FlowModule(flow, frozen=None)
    module = FlowModule(flow, flat=True, frozen=["flow_0_scale"])
    module.flow_0_scale.kernel.requires_grad_()
    (-module.log_prob(rows()).mean()).backward()
    assert module.flow_0_scale.kernel.grad is not None
    assert module.flow_0_scale.bias.grad is None


# ---- citizens of torch.distributions ---------------------------------------------------------------------------------


def test_a_transform_is_a_module(make) -> None:
    module, _, _ = make()
    transform = FlowTransform(module, cache_size=1)
    assert list(transform.parameters()) == list(module.parameters())
    assert list(torch.nn.ModuleList([transform]).parameters()) == list(module.parameters())
    assert len({transform, FlowTransform(module)}) == 1
    assert len({transform, FlowTransform(copy.deepcopy(module))}) == 2
    transform.apply(lambda m: m.reset_parameters(seed=4) if isinstance(m, FlowModule) else None)
    assert module.to_flow(drop_base=True) == FlowTransform(module).double().module.to_flow(drop_base=True)
    other = copy.deepcopy(transform)
    assert other.module is not module
    other.load_state_dict(transform.state_dict())
    assert torch.equal(other(rows()), transform(rows()))
    assert "FlowTransform" in repr(transform)


def test_the_log_determinant_is_cached_both_ways(make) -> None:
    module, _, _ = make()
    base = torch.distributions.MultivariateNormal(torch.zeros(SIZE).double(), torch.eye(SIZE).double())
    q = torch.distributions.TransformedDistribution(base, [FlowTransform(module, cache_size=1)])
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    module.forward = (lambda forward: lambda *given: (calls.append(1), forward(*given))[1])(module.forward)
    torch.manual_seed(1)
    x = q.rsample((7,))
    log_q = q.log_prob(x)
    assert not calls
    torch.manual_seed(1)
    z = base.rsample((7,))
    expected = base.log_prob(z) - module.inverse(z, with_log_det=True)[1]
    assert torch.equal(log_q, expected)
    assert all(map(torch.equal, gradients(module, log_q.sum()), gradients(module, expected.sum())))


def test_a_distribution_tells_its_parameters_and_modules(make) -> None:
    module, _, _ = make()
    q = FlowDistribution(module)
    assert list(q.parameters()) == list(module.parameters())
    assert list(q.modules()) == list(module.modules())
    torch.manual_seed(2)
    x, log_q = q.rsample_and_log_prob((3, 2))
    assert (x.shape, log_q.shape) == ((3, 2, SIZE), (3, 2))
    assert x.requires_grad
    assert log_q.requires_grad
    assert torch.allclose(log_q, q.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.manual_seed(2)
    drawn = q.sample_and_log_prob(torch.Size((3, 2)))
    assert all(map(torch.equal, drawn, (x, log_q)))
    assert not any(tensor.requires_grad for tensor in drawn)
    assert q.rsample_and_log_prob()[1].shape == ()


@pytest.mark.parametrize("flat", [False, True])
def test_sbi_walks_through_a_distribution(make, flat) -> None:
    utils = pytest.importorskip("sbi.samplers.vi.vi_utils", reason="sbi is not installed")
    _, flow, _ = make()
    q = FlowDistribution(FlowModule(flow, flat=flat))
    before = q.log_prob(rows())
    utils.detach_all_non_leaf_tensors(q)
    assert torch.equal(q.log_prob(rows()), before)
    assert torch.equal(copy.deepcopy(q).log_prob(rows()), before)


def test_divergences(make) -> None:
    module, _, _ = make()
    q, normal = FlowDistribution(module), torch.distributions.MultivariateNormal(torch.zeros(SIZE), torch.eye(SIZE))
    assert torch.equal(torch.distributions.kl_divergence(q, FlowDistribution(module)), torch.zeros(()).double())
    for pair in ((q, FlowDistribution(copy.deepcopy(module))), (q, normal), (normal, q)):
        with pytest.raises(NotImplementedError, match=r"has no formula; estimate it from rows of p, .*\.mean\(0\)"):
            torch.distributions.kl_divergence(*pair)
