"""nvpflow.torch under a context: values, the context's gradient, networks in front of it, distributions p(x | c)."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import nvpflow
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from nvpflow import layers as L  # noqa: E402
from nvpflow.torch import FlowDistribution, FlowModule, FlowTransform  # noqa: E402

SIZE, CONTEXT = 4, 3
PLAIN = {"num_flows": 3, "hidden_sizes": (7,), "activation": "tanh"}
KINDS = {
    "plain": {**PLAIN, "standardize": False},
    "standardized": {**PLAIN, "standardize": True, "standardize_context": True},
    "lu": {**PLAIN, "num_flows": 2, "mixing": "lu", "actnorm": True, "mask": "checkered"},
    "residual": {**PLAIN, "num_flows": 2, "hidden_sizes": (5,), "activation": "silu", "network": "residual"},
    "layer_norm": {**PLAIN, "num_flows": 2, "layer_norm": True, "scale": "softplus"},
    "spline": {
        "layers": [
            L.Coupling("even", L.Spline(4), L.MLP((6,), "tanh")),
            L.ElementSpline("all", L.Spline(3, 2.5, boundary="free", tails="slope"), inverse=True),
            L.Coupling("odd", L.Spline(5, derivative="exp"), L.MLP((4,), "silu"), inverse=True),
        ],
    },
    "base": {  # a conditional diagonal Gaussian behind a coupling that is read backwards
        "layers": [
            L.Coupling("odd", L.Affine("atan"), L.MLP((5,), "softplus"), inverse=True),
            L.Coupling("all", L.Affine("exp"), L.MLP((4,), "tanh")),
        ],
        "standardize_context": True,
    },
}
METHODS = {
    "forward": lambda m, x, c: m(x, c),
    "inverse": lambda m, x, c: m.inverse(x, c, with_log_det=True),
    "log_prob": lambda m, x, c: (m.log_prob(x, c),),
}


def make_flow(kind="standardized", dtype="float64", seed=0):
    """A flow whose random parameters are far from the identity, which new weights are close to."""
    flow = nvpflow.build(SIZE, context_size=CONTEXT, dtype=dtype, seed=seed, **KINDS[kind])
    random = np.random.default_rng(seed)
    values = {n: random.normal(0, 0.4, p.shape) for n, p in flow.parameters().items() if not n.endswith(".sign")}
    flow.set_parameters({**flow.parameters(), **{name: value.astype(dtype) for name, value in values.items()}})
    return flow


def make(kind="standardized", dtype="float64", seed=0):
    flow = make_flow(kind, dtype, seed)
    module = FlowModule(flow)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.endswith(".sign"))
    return module, flow


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def given(rows=6, seed=1, dtype=torch.float64):
    return normal(rows, SIZE, seed=seed, dtype=dtype), normal(rows, CONTEXT, seed=seed + 100, dtype=dtype)


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_flows_bit_for_bit(kind, dtype):
    module, flow = make(kind, dtype)
    x, c = given(9, dtype=getattr(torch, dtype))
    for followed in (True, False):
        with torch.set_grad_enabled(followed):
            for context in (c, c[2]):
                assert torch.equal(module.log_prob(x, context), flow.log_prob(x, context=context))
                for ours, its in zip(module(x, context), flow.forward(x, context=context), strict=True):
                    assert torch.equal(ours, its)
                for ours, its in zip(
                    module.inverse(x, context, with_log_det=True),
                    flow.inverse(x, context=context, with_log_det=True),
                    strict=True,
                ):
                    assert torch.equal(ours, its)
                assert torch.equal(module.sample(5, context, seed=3), flow.sample(5, context=context, seed=3))
    assert module.log_prob(x, c).requires_grad


@pytest.mark.parametrize(
    ("of_rows", "of_context", "axes"),
    [
        ((), (), ()),
        ((6,), (), (6,)),
        ((6,), (1,), (6,)),
        ((6,), (1, 1), (1, 6)),
        ((), (5,), (5,)),
        ((2, 3), (3,), (2, 3)),
        ((6, 1), (5,), (6, 5)),
        ((2, 3), (2, 1), (2, 3)),
        ((1,), (1,), (1,)),
        ((0,), (), (0,)),
        ((0,), (0,), (0,)),
        ((1,), (0,), (0,)),
        ((2, 0), (1, 0), (2, 0)),
    ],
    ids=str,
)
def test_leading_axes_broadcast(of_rows, of_context, axes):
    module, flow = make()
    x, c = normal(*of_rows, SIZE).requires_grad_(), normal(*of_context, CONTEXT, seed=2).requires_grad_()
    z, log_det = module(x, c)
    assert z.shape == (*axes, SIZE)
    assert log_det.shape == module.log_prob(x, c).shape == axes
    assert module.inverse(x, c).shape == z.shape
    rows = x.detach().expand(*axes, SIZE).reshape(-1, SIZE)
    contexts = c.detach().expand(*axes, CONTEXT).reshape(-1, CONTEXT)
    assert torch.equal(module.log_prob(x, c).reshape(-1), flow.log_prob(rows, context=contexts))
    (z.sum() + 2 * log_det.sum()).backward()
    ones = torch.ones(len(rows), dtype=torch.float64)
    grad_x, _, grad_c = flow.vjp(rows, torch.ones_like(rows), 2 * ones, context=contexts)
    torch.testing.assert_close(x.grad, grad_x.reshape(*axes, SIZE).sum_to_size(x.shape))
    torch.testing.assert_close(c.grad, grad_c.reshape(*axes, CONTEXT).sum_to_size(c.shape))


def test_samples_under_contexts():
    module, flow = make()
    contexts = normal(2, 3, CONTEXT)
    x = module.sample(5, contexts, seed=7)
    assert x.shape == (2, 3, 5, SIZE)
    assert torch.equal(x.reshape(6, 5, SIZE), flow.sample(5, context=contexts.reshape(6, CONTEXT), seed=7))
    assert module.sample(0, contexts).shape == (2, 3, 0, SIZE)
    assert module.sample(4, contexts[:, :0]).shape == (2, 0, 4, SIZE)
    drawn, log_p = module.sample_and_log_prob(5, contexts, seed=7)
    assert torch.equal(drawn, x)
    torch.testing.assert_close(log_p, module.log_prob(x, contexts.unsqueeze(-2)), rtol=1e-9, atol=1e-9)
    torch.manual_seed(3)
    first = module.sample(4, contexts)
    torch.manual_seed(3)
    assert torch.equal(module.sample(4, contexts), first)


# ---- gradients -------------------------------------------------------------------------------------------------------


class Parametrized(torch.nn.Module):
    """A method of a module as a function of rows, context and parameters, as gradcheck wants it."""

    def __init__(self, module, call, embedding=None):
        super().__init__()
        self.module, self.call, self.embedding = module, call, embedding
        self.names = [name for name, p in self.named_parameters() if p.requires_grad]

    def forward(self, x, c):
        return self.call(self.module, x, c if self.embedding is None else self.embedding(c))

    def check(self, x, c):
        values = [self.get_parameter(name).detach().clone().requires_grad_() for name in self.names]

        def function(x, c, *parameters):
            return torch.func.functional_call(self, dict(zip(self.names, parameters, strict=True)), (x, c))

        assert torch.autograd.gradcheck(function, (x.requires_grad_(), c.requires_grad_(), *values))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, method):
    module, _ = make(kind)
    Parametrized(module, METHODS[method]).check(*given(3))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_one_context_for_all_rows(method):
    module, _ = make()
    x, c = given(3)
    Parametrized(module, METHODS[method]).check(x, c[0])
    Parametrized(module, METHODS[method]).check(x[:, None], c[:2])


@pytest.mark.parametrize("kind", ["standardized", "residual"])
def test_gradients_of_an_embedding_network(kind):
    module, _ = make(kind)
    torch.manual_seed(0)
    embedding = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, CONTEXT)).double()
    x, labels = normal(3, SIZE), normal(3, 2, seed=2)
    Parametrized(module, METHODS["log_prob"], embedding).check(x, labels)
    Parametrized(module, lambda m, _, c: (m.rsample(2, c, seed=1),), embedding).check(x, labels)


def test_an_embedding_network_learns_with_the_flow():
    """Rows lie about a nonlinear function of what the embedding reads; the flow finds it through the embedding."""
    torch.manual_seed(0)
    module = FlowModule(nvpflow.build(2, 3, (16,), "silu", context_size=CONTEXT, seed=0))
    embedding = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.SiLU(), torch.nn.Linear(16, CONTEXT))

    def draw(count):
        angle = 6 * torch.rand(count, 1)
        return torch.cat([angle.sin(), angle.cos()], 1) + 0.3 * torch.randn(count, 2), angle / 3 - 1

    def loss(x, c):
        return -module.log_prob(x, embedding(c)).mean()

    held_out = draw(2000)
    with torch.no_grad():
        first = loss(*held_out).item()
    optimizer = torch.optim.Adam([*trained(module), *embedding.parameters()], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss(*draw(256)).backward()
        assert all(torch.any(p.grad != 0) for p in embedding.parameters())
        optimizer.step()
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3))
    with torch.no_grad():
        last = loss(*held_out).item()
        samples = module.sample(500, embedding(torch.tensor([[1.5 / 3 - 1]])))
    assert first > entropy + 1
    assert entropy - 0.1 < last < entropy + 0.15
    assert torch.allclose(samples.mean((0, 1)), torch.tensor([math.sin(1.5), math.cos(1.5)]), atol=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("x",), ("context",), ("parameters",), ("x", "context"), ("parameters", "context")])
def test_only_wanted_gradients_are_formed(method, wanted, monkeypatch):
    module, flow = make("lu")
    asked = []
    for name in ("vjp", "log_prob_vjp"):
        formed = getattr(nvpflow.Flow, name)

        def record(*arguments, formed=formed, **options):
            asked.append(options["wrt"])
            return formed(*arguments, **options)

        monkeypatch.setattr(nvpflow.Flow, name, record)
    x, c = given()
    module.requires_grad_("parameters" in wanted)
    x.requires_grad_("x" in wanted)
    c.requires_grad_("context" in wanted)
    sum(result.sum() for result in METHODS[method](module, x, c)).backward()
    assert asked == [wanted]
    cotangent = torch.ones(len(x), dtype=torch.float64)
    if method == "log_prob":
        grad_x, flat, grad_c = flow.log_prob_vjp(x.detach(), cotangent, wrt="all", context=c.detach())
    else:
        options = {"direction": method, "wrt": "all", "context": c.detach()}
        grad_x, flat, grad_c = flow.vjp(x.detach(), torch.ones_like(x), cotangent, **options)
    for tensor, name, expected in ((x, "x", grad_x), (c, "context", grad_c)):
        assert torch.equal(tensor.grad, expected) if name in wanted else tensor.grad is None
    for parameter, part in zip(module.parameters(), flat.split([p.numel() for p in module.parameters()]), strict=True):
        if "parameters" in wanted:
            torch.testing.assert_close(parameter.grad.reshape(-1), part, rtol=1e-12, atol=1e-13)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("follows", [False, True], ids=["data", "of a network"])
def test_steps_of_a_mean_loss_have_the_gradients_of_a_first_one(follows):
    """From the second step on, gradients may be formed with the value, which the results must not show."""
    module, flow = make()
    for step, factor in enumerate((1, 1, 1, 2, 2)):
        x, c = given(20, seed=step // 2)
        results = []
        for used in (module, copy.deepcopy(module)):
            used.zero_grad()
            context = c.clone().requires_grad_(follows)
            log_p = used.log_prob(x, context)
            assert torch.equal(log_p, flow.log_prob(x, context=c))
            (-factor * log_p.mean()).backward()
            results.append([context.grad, *(p.grad for p in used.parameters())])
        for got, expected in zip(*results, strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected)


@pytest.mark.parametrize("tensors", ["x", "context", "parameters", "x context", "x context parameters"])
def test_those_steps_pass_through_the_flow_once(tensors, monkeypatch):
    module, _ = make()
    module.requires_grad_("parameters" in tensors)
    x, c = given()
    leaves = [x.requires_grad_("x " in f"{tensors} "), c.requires_grad_("context" in tensors), *module.parameters()]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(module.log_prob(x, c).sum(), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(module._engine, "vjp", None)
        for got, first in zip(torch.autograd.grad(module.log_prob(x, c).sum(), wanted), expected, strict=True):
            assert torch.equal(got, first)
        # Of what was formed, only a part may be asked for.
        assert torch.equal(torch.autograd.grad(module.log_prob(x, c).sum(), wanted[:1])[0], expected[0])


def test_second_derivatives_are_refused():
    module, _ = make()
    x, c = given()
    c.requires_grad_()
    (grad,) = torch.autograd.grad(module.log_prob(x, c).sum(), c, create_graph=True)
    (plain,) = torch.autograd.grad(module.log_prob(x, c).sum(), c)
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


def test_one_context_twice_in_a_graph():
    module, _ = make()
    x, c = given()
    c.requires_grad_()
    parts = [torch.autograd.grad(module.log_prob(rows, c).sum(), c)[0] for rows in (x, x + 1)]
    (module.log_prob(x, c) + module.log_prob(x + 1, c)).sum().backward()
    torch.testing.assert_close(c.grad, parts[0] + parts[1])
    changed = c.detach() * 1
    loss = module.log_prob(x, changed).sum()
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward mode
def test_functional_transforms():
    module, _ = make()
    x, c = given()
    expected = c.clone().requires_grad_()
    module.log_prob(x, expected).sum().backward()
    assert torch.equal(torch.func.grad(lambda c: module.log_prob(x, c).sum())(c), expected.grad)
    with torch.no_grad():
        assert torch.equal(torch.func.grad(lambda c: module.log_prob(x, c).sum())(c), expected.grad)
    jacobian = torch.autograd.functional.jacobian(lambda c: module(x[0], c)[0], c[0])
    assert jacobian.shape == (SIZE, CONTEXT)
    for followed in (True, False):
        with torch.set_grad_enabled(followed), pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda c: module.log_prob(x, c), (c,), (c,))


# Shapes of x and of the context, and what vmap is over.
SLICES = {
    "rows and contexts": ((5, SIZE), (5, CONTEXT), (0, 0)),
    "rows": ((5, SIZE), (CONTEXT,), (0, None)),
    "contexts": ((SIZE,), (5, CONTEXT), (None, 0)),
    "rows, second axis": ((4, 5, SIZE), (4, CONTEXT), (1, None)),
    "batches, a context for each": ((5, 4, SIZE), (5, CONTEXT), (0, 0)),
    "batches, a context for each row": ((5, 4, SIZE), (5, 4, CONTEXT), (0, 0)),
    "batches under one context": ((5, 4, SIZE), (CONTEXT,), (0, None)),
    "contexts of a batch": ((4, SIZE), (5, CONTEXT), (None, 0)),
    "contexts, last axis": ((4, SIZE), (4, CONTEXT, 5), (None, 2)),
}


@pytest.mark.parametrize("case", SLICES)
@pytest.mark.parametrize("method", METHODS)
def test_vmap_is_one_call(method, case, monkeypatch):
    of_x, of_context, dims = SLICES[case]
    module, _ = make()
    module.requires_grad_(False)
    x, c = normal(*of_x), normal(*of_context, seed=2)
    function = lambda x, c: METHODS[method](module, x, c)  # noqa: E731
    loss = lambda x, c: sum((r * r.detach().cos()).sum() for r in function(x, c))  # noqa: E731
    slices = [[t if d is None else t.select(d, i) for t, d in zip((x, c), dims, strict=True)] for i in range(5)]
    calls = []
    for kind in (method, "vjp"):
        original = getattr(module._engine, kind)
        monkeypatch.setattr(module._engine, kind, lambda *a, original=original: (calls.append(1), original(*a))[1])
    for found, each in zip(
        torch.func.vmap(function, in_dims=dims)(x, c), zip(*(function(*s) for s in slices), strict=True), strict=True
    ):
        assert torch.equal(found, torch.stack(each))
    assert len(calls) == 6
    gradient = torch.func.grad(loss, argnums=(0, 1))
    found = torch.func.vmap(gradient, in_dims=dims)(x, c)
    assert len(calls) == 8
    for got, want in zip(found, zip(*(gradient(*s) for s in slices), strict=True), strict=True):
        assert torch.allclose(got, torch.stack(want), rtol=1e-12, atol=1e-13)


# ---- PyTorch's customs -----------------------------------------------------------------------------------------------


def test_lower_precisions_come_in_and_autocast_stays_out():
    module, flow = make("plain", "float32")
    x, c = given(dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        low = c.to(dtype).requires_grad_()
        log_p = module.log_prob(x, low)
        assert torch.equal(log_p, flow.log_prob(x, context=low.detach().float()))
        log_p.sum().backward()
        assert low.grad.dtype == dtype
    double, in_double = make("plain")
    assert torch.equal(double.log_prob(x.double(), c), in_double.log_prob(x.double(), context=c.double()))
    embedding = torch.nn.Linear(2, CONTEXT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = embedding(normal(6, 2, dtype=torch.float32))
        assert context.dtype == torch.bfloat16
        (-module.log_prob(x, context).mean()).backward()
    assert embedding.weight.grad.dtype == torch.float32
    assert torch.any(embedding.weight.grad != 0)


METHODS_WITHOUT_ROWS = {
    "sample": lambda m, c: m.sample(2, c),
    "sample_and_log_prob": lambda m, c: m.sample_and_log_prob(2, c),
    "distribution": lambda m, c: FlowDistribution(m, c),
    "transform": lambda m, c: FlowTransform(m, context=c),
}
CALLS = {
    **{name: lambda m, c, call=call: call(m, torch.zeros(5, SIZE), c) for name, call in METHODS.items()},
    **METHODS_WITHOUT_ROWS,
}


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, r"^context is missing, expected a tensor \(\.\.\., 3\): the flow is a density p\(x \| c"),
        (torch.zeros(5, 2), ValueError, r"^context has shape \(5, 2\), expected \(\.\.\., 3\)"),
        (torch.zeros(()), ValueError, r"^context has shape \(\), expected"),
        (
            torch.zeros(5, 3).double(),
            TypeError,
            r"dtype torch\.float64, expected torch\.float32, the module's; convert",
        ),
        (
            torch.zeros(5, 3).long(),
            TypeError,
            r"^context has dtype torch\.int64, expected torch\.float32, the module's; convert",
        ),
        (torch.zeros(5, 3, device="meta"), ValueError, r"^context is on 'meta', expected 'cpu', the module's; move"),
        (torch.zeros(5, 3).to_sparse(), TypeError, r"^context has layout torch\.sparse_coo"),
        (np.zeros((5, 3), np.float32), TypeError, r"^context is ndarray, expected a torch\.Tensor"),
    ],
    ids=["none", "columns", "no axes", "float64", "int", "meta", "sparse", "numpy"],
)
@pytest.mark.parametrize("call", CALLS)
def test_wrong_contexts(call, context, error, message):
    module, _ = make(dtype="float32")
    with pytest.raises(error, match=message):
        CALLS[call](module, context)


@pytest.mark.parametrize("call", CALLS)
def test_a_flow_without_a_context_takes_none(call):
    module = FlowModule(nvpflow.build(SIZE, 2, (4,)))
    CALLS[call](module, None)
    with pytest.raises(ValueError, match=r"^context is Tensor, expected None: the flow has no context; build it with"):
        CALLS[call](module, torch.zeros(5, 3))


@pytest.mark.parametrize(("method", "name"), [("forward", "x"), ("inverse", "z"), ("log_prob", "x")])
def test_contexts_of_other_numbers_of_rows(method, name):
    module, _ = make()
    x, c = given()
    wanted = rf"expected \(6, 3\), one for each row of {name}, or \(3,\), one for all; other leading axes must"
    with pytest.raises(ValueError, match=rf"^context has shape \(5, 3\), {wanted} broadcast with \(6,\)$"):
        METHODS[method](module, x, c[:5])


def test_contexts_of_one_number_have_an_axis_for_it():
    module = FlowModule(nvpflow.build(SIZE, 2, (4,), context_size=1))
    for context in (torch.zeros(5), torch.zeros(())):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 1\); context.unsqueeze\(-1\) makes a row of each"):
            module.log_prob(torch.zeros(5, SIZE), context)
    with pytest.raises(ValueError, match=r"^context has shape \(5, 2\), expected \(\.\.\., 1\)$"):
        module.log_prob(torch.zeros(5, SIZE), torch.zeros(5, 2))


def test_rows_that_do_not_go_with_the_contexts_of_a_distribution():
    module, _ = make()
    x, c = given()
    with pytest.raises(ValueError, match=r"^context has shape \(5, 3\), expected \(6, 3\), one for each row of x"):
        FlowDistribution(module, c[:5], validate_args=False).log_prob(x)


def test_a_context_that_is_not_finite_gives_nan_in_its_row():
    module, _ = make()
    x, c = given()
    c[2, 1] = torch.nan
    assert torch.isnan(module.log_prob(x, c)).tolist() == [row == 2 for row in range(6)]


def test_names_copies_and_the_way_back(tmp_path):
    module, flow = make()
    x, c = given()
    assert [name for name, _ in module.named_parameters()] == list(flow.parameters())
    assert torch.equal(module.context.mean, torch.from_numpy(flow.parameters()["context.mean"].copy()))
    fresh = {n: p.requires_grad for n, p in FlowModule(flow).named_parameters()}
    assert not fresh["context.mean"]
    assert not fresh["context.log_std"]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.log_prob(x, c), module.log_prob(x, c))
    other = FlowModule(nvpflow.Flow(flow.spec, seed=9))
    other.load_state_dict(module.state_dict())
    assert other.to_flow() == flow
    module.to_flow().save(tmp_path / "flow.safetensors")
    assert nvpflow.load(tmp_path / "flow.safetensors") == flow
    assert torch.equal(module.to_flow().condition(c[0]).log_prob(x), module.log_prob(x, c[0]))


def test_initialize_from_sets_what_standardizes_the_context():
    flow = nvpflow.build(SIZE, 2, (4,), context_size=CONTEXT)
    x, c = normal(200, SIZE).float() * 3, normal(200, CONTEXT, seed=2).float() * 50 + 7
    module = FlowModule(flow)
    assert module.initialize_from(x.reshape(4, 50, SIZE), c.reshape(4, 50, CONTEXT)) == {}
    flow.initialize_from(x.numpy(), context=c.numpy())
    assert module.to_flow() == flow
    module.initialize_from(x, c[:1])  # one for all
    flow.initialize_from(x.numpy(), context=c[:1].expand(200, -1).numpy())
    assert module.to_flow() == flow
    with pytest.raises(ValueError, match="context is missing"):
        module.initialize_from(x)
    with pytest.raises(ValueError, match="the flow has no context"):
        FlowModule(nvpflow.build(SIZE)).initialize_from(x, c)


def test_contexts_far_from_unit_scale_are_said_once():
    x, c = normal(200, SIZE).float(), normal(200, CONTEXT, seed=2).float()
    far = c * torch.tensor([1.0, 100.0, 1.0])
    module = FlowModule(nvpflow.build(SIZE, context_size=CONTEXT))
    module.log_prob(x, far[0])  # one context cannot tell
    with torch.no_grad():
        module.log_prob(x, far)  # nor those that a network may have made
    with pytest.warns(nvpflow.DataWarning, match=r"the context is still the identity and column 2 of the context"):
        module.log_prob(x, far)
    module.log_prob(x, far)
    initialized = FlowModule(nvpflow.build(SIZE, context_size=CONTEXT))
    initialized.initialize_from(x, far)
    initialized.log_prob(x, far * 100)
    FlowModule(nvpflow.build(SIZE, context_size=CONTEXT, standardize_context=False)).log_prob(x, far)
    embedded = FlowModule(nvpflow.build(SIZE, context_size=CONTEXT))
    embedded.log_prob(x, far.clone().requires_grad_())
    embedded.log_prob(x, far)


def test_a_module_of_shapes_alone():
    module, _ = make()
    module.to("meta")
    x, c = torch.zeros(6, 1, SIZE, device="meta").double(), torch.zeros(5, CONTEXT, device="meta").double()
    z, log_det = module(x, c.requires_grad_())
    assert (z.device.type, z.shape, log_det.shape) == ("meta", (6, 5, SIZE), (6, 5))
    log_det.sum().backward()
    assert c.grad.shape == (5, CONTEXT)


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
@pytest.mark.parametrize("of", ["each row", "all rows"])
def test_compiled_in_one_graph(method, of):
    module, _ = make()
    embedding = torch.nn.Linear(2, CONTEXT, dtype=torch.float64)

    def loss(x, c):
        return sum((r**2).sum() for r in METHODS[method](module, x, torch.tanh(embedding(c))))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (4, 9, 1):
        x = normal(count, SIZE)
        c = normal(count, 2, seed=2) if of == "each row" else normal(2, seed=2)
        results = []
        for function in (loss, compiled):
            module.zero_grad()
            embedding.zero_grad()
            function(x, c).backward()
            results.append([p.grad.clone() for p in (*trained(module), *embedding.parameters())])
            with torch.no_grad():
                assert torch.allclose(function(x, c), loss(x, c), rtol=1e-13)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("frozen", [False, True])
def test_operators_pass_pytorchs_own_checks(frozen):
    module, _ = make("plain")
    parameters, handle = module.requires_grad_(not frozen)._tensors(), module._engine.handle
    x, c = given(3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator in (torch.ops.nvpflow.forward, torch.ops.nvpflow.inverse, torch.ops.nvpflow.log_prob):
        for context in (c, c[0]):
            arguments = (x, context.clone().requires_grad_(), parameters, handle)
            torch.library.opcheck(operator.default, arguments, test_utils=tests)


# ---- torch.distributions ---------------------------------------------------------------------------------------------


class TestDistributions:
    def test_a_batch_of_densities(self):
        module, flow = make()
        contexts = normal(3, CONTEXT).requires_grad_()
        distribution = FlowDistribution(module, contexts, validate_args=True)
        assert (distribution.batch_shape, distribution.event_shape) == ((3,), (SIZE,))
        assert distribution.sample().shape == (3, SIZE)
        assert distribution.sample((2, 5)).shape == (2, 5, 3, SIZE)
        x = distribution.rsample((7,))
        assert x.requires_grad
        expected = torch.stack([flow.log_prob(x[:, i].detach(), context=contexts[i].detach()) for i in range(3)], 1)
        assert torch.equal(distribution.log_prob(x.detach()), expected)
        one = x[0, 0].detach()
        assert torch.equal(distribution.log_prob(one), flow.log_prob(one.expand(3, -1), context=contexts.detach()))
        x.sum().backward()
        assert torch.all(contexts.grad.abs().sum(1) > 0)
        with pytest.raises(ValueError, match="support"):
            distribution.log_prob(torch.full((SIZE,), torch.nan).double())
        with pytest.raises(ValueError, match="batch_shape"):
            distribution.log_prob(torch.zeros(4, SIZE).double())
        assert repr(distribution) == "FlowDistribution(context: torch.Size([3, 3]))"

    def test_one_density(self):
        module, flow = make()
        x, c = given()
        distribution = FlowDistribution(module, context=c[0])
        assert (distribution.batch_shape, distribution.event_shape) == ((), (SIZE,))
        assert torch.equal(distribution.log_prob(x), flow.log_prob(x, context=c[0]))
        assert distribution.sample().shape == (SIZE,)
        torch.manual_seed(1)
        drawn = distribution.sample((5,))
        torch.manual_seed(1)
        assert torch.equal(drawn, module.sample(5, c[0]))

    def test_expand(self):
        module, _ = make()
        contexts = normal(3, CONTEXT)
        distribution = FlowDistribution(module, contexts)
        batch = distribution.expand((2, 3))
        assert (batch.batch_shape, batch.event_shape, batch.context.shape) == ((2, 3), (SIZE,), (2, 3, CONTEXT))
        x = batch.sample((4,))
        assert x.shape == (4, 2, 3, SIZE)
        assert torch.equal(batch.log_prob(x), module.log_prob(x, contexts))
        assert batch.log_prob(x[0, 0, 0]).shape == (2, 3)
        assert FlowDistribution(module, contexts[0]).expand((6,)).sample((2,)).shape == (2, 6, SIZE)
        with pytest.raises(RuntimeError):
            distribution.expand((4,))
        wrapped = torch.distributions.Independent(distribution, 1)
        assert wrapped.log_prob(x[:, 0]).shape == (4,)

    def test_contexts_are_checked_as_parameters_are(self):
        module, _ = make()
        contexts = normal(3, CONTEXT)
        contexts[1, 0] = torch.nan
        with pytest.raises(ValueError, match=r"Expected parameter context .* to satisfy the constraint"):
            FlowDistribution(module, contexts, validate_args=True)
        FlowDistribution(module, contexts, validate_args=False)
        empty = FlowDistribution(module, contexts[:0], validate_args=True)
        assert empty.sample((2,)).shape == (2, 0, SIZE)
        assert empty.log_prob(torch.zeros(SIZE).double()).shape == (0,)

    @pytest.mark.parametrize("cache_size", [0, 1])
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
    def test_change_of_variables(self, cache_size, batch):
        """A TransformedDistribution over the transform is the distribution."""
        module, _ = make()
        contexts = normal(*batch, CONTEXT).requires_grad_()
        base = torch.distributions.MultivariateNormal(torch.zeros(SIZE).double(), torch.eye(SIZE).double())
        transform = FlowTransform(module, cache_size, contexts)
        transformed = torch.distributions.TransformedDistribution(base, [transform])
        ours = FlowDistribution(module, contexts)
        assert (transformed.batch_shape, transformed.event_shape) == (ours.batch_shape, ours.event_shape)
        x = transformed.sample((5,))
        assert x.shape == ours.sample((5,)).shape == (5, *batch, SIZE)
        gradients = []
        for distribution in (transformed, ours):
            gradients.append(torch.autograd.grad(distribution.log_prob(x).sum(), [contexts, *trained(module)]))
        torch.testing.assert_close(transformed.log_prob(x), ours.log_prob(x), rtol=1e-10, atol=1e-10)
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        expanded = transformed.expand((7, *batch))
        assert expanded.sample((2,)).shape == (2, 7, *batch, SIZE)

    def test_transform(self):
        module, _ = make()
        contexts = normal(3, CONTEXT)
        transform = FlowTransform(module, context=contexts)
        z = normal(SIZE)
        x = transform(z)
        assert x.shape == transform.forward_shape(z.shape) == transform.inverse_shape(z.shape) == (3, SIZE)
        torch.testing.assert_close(transform.inv(x.clone()), z.expand(3, -1))
        log_det = transform.log_abs_det_jacobian(z, x)
        for i in range(3):
            jacobian = torch.autograd.functional.jacobian(lambda z, i=i: module.inverse(z, contexts[i]), z)
            torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet)
        assert transform == FlowTransform(module, context=contexts.clone())
        assert transform != FlowTransform(module, context=contexts + 1)
        assert transform != FlowTransform(module, context=contexts[0])
        assert torch.equal(transform.with_cache().context, contexts)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(z), x)

    def test_density_of_samples_integrates(self):
        """E[q(x) / p(x | c)] under p(x | c) is 1 for any density q, for each context."""
        module, _ = make("lu")
        torch.manual_seed(0)
        distribution = FlowDistribution(module, normal(2, CONTEXT))
        x = distribution.sample((100_000,))
        for i in range(2):
            rows = x[:, i]
            with torch.no_grad():
                narrow = torch.distributions.MultivariateNormal(rows.mean(0), 0.25 * torch.cov(rows.T))
                ratio = torch.exp(narrow.log_prob(rows) - distribution.log_prob(x)[:, i])
            assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(len(rows))
            assert ratio.std() < 20
