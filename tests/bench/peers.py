"""What else a Python user can run these flows with, each as its documentation says to run it fast.

A peer is a class whose constructor takes a configuration and the number of threads and imports its library: one that
is not installed raises ImportError and is skipped. `function(op, *given)` returns a function of arrays of such shapes,
rows and where there is one a context, prepared for them (compiled, bound) where the library can be. Peers whose
mathematics is ours (`other_maths` False) hold the same parameters as nvpflow and answer to the oracle. The others
answer to `reference`, their own model in float64. NumPy arrays go in and come out.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import formula
import numpy as np
from configurations import Configuration, reference
from general_oracle import raw_numbers
from timing import Call, Function

LEARNING_RATE = 1e-3
CHUNK = 1024


def fused_layers(configuration: Configuration) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Per coupling with one network, (kernel [in, out], bias) of its layers; the last are scale and translation."""
    found, layers = formula.parameters(configuration), []
    for k in range(configuration.num_flows):
        names = [name.removesuffix(".kernel") for name in found if name.startswith(f"flow_{k}_") and "kernel" in name]
        layers.append([(found[f"{name}.kernel"], found[f"{name}.bias"]) for name in names])
    return layers


def training_steps(step: Callable[[], Any]) -> Function:
    """Times a training step that returns its loss; reading the last loss waits for what is still under way."""

    def seconds_per_call(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            loss = step()
        float(loss)
        return (time.perf_counter() - start) / calls

    return Function(seconds_per_call, result=lambda: [float(step()) for _ in range(3)])


def in_chunks(function: Callable[..., Any], x: np.ndarray, op: str) -> Callable[..., Any]:
    """Feeds rows, and contexts, to a function of CHUNK rows, chunk by chunk, and collects the results."""
    out = (np.empty_like(x), np.empty(len(x), x.dtype))
    wanted = {"forward": out, "inverse": out[:1], "log_prob": out[1:]}[op]

    def run(x: np.ndarray, *context: np.ndarray) -> Any:
        for at in range(0, len(x), CHUNK):
            results = function(x[at : at + CHUNK], *(c[at : at + CHUNK] if c.ndim == 2 else c for c in context))
            for target, part in zip(wanted, results if op == "forward" else (results,), strict=True):
                target[at : at + CHUNK] = part
        return wanted if op == "forward" else wanted[0]

    return run


class Peer:
    """The defaults of a peer."""

    other_maths = False
    other_steps = False  # our mathematics of other parameters: a step of Adam moves them elsewhere
    can_train = False
    chunks = False  # also run large batches in chunks of CHUNK rows
    slow_to_build = False  # seconds for each shape: not run at every batch size

    @staticmethod
    def holds(configuration: Configuration) -> bool:
        """Whether it can be such a flow, or with other mathematics one that is used for the same."""
        return configuration.plain

    @staticmethod
    def checked_as(configuration: Configuration) -> Configuration:
        """Whose oracle it answers to."""
        return configuration

    def function(self, op: str, x: np.ndarray, *context: np.ndarray) -> Callable[..., Any]:
        raise NotImplementedError

    def call(self, op: str, x: np.ndarray, *context: np.ndarray, chunked: bool = False) -> Call:
        if chunked:
            run = in_chunks(self.function(op, *(a[:CHUNK].copy() if a.ndim == 2 else a for a in (x, *context))), x, op)
        else:
            run = self.function(op, x, *context)
        names = dict(zip("xc", (x, *context), strict=False))
        return Call(f"run({', '.join(names)})", {"run": run, **names})

    def train(self, x: np.ndarray, *context: np.ndarray) -> Function:
        raise NotImplementedError

    def reference(self, op: str, x: np.ndarray, *context: np.ndarray) -> Any:
        """Float64 results of a model with other mathematics; None where the library cannot, then by round trip."""
        return None


# ------------------------------------------------------------------------------------------ one formula


class Formula(Peer):
    """formula.py in an array library: every configuration, with our parameters."""

    chunks = True

    @staticmethod
    def holds(configuration):
        return True


class Numpy(Formula):
    def __init__(self, configuration: Configuration, threads: int) -> None:
        self.arrays, self.flow = formula.numpy_arrays(), formula.flow(configuration)
        self.parameters = formula.composed(configuration, formula.parameters(configuration))

    def function(self, op, x, *context):
        return lambda *given: formula.run(self.arrays, self.flow, self.parameters, op, *given)


class Jax(Formula):
    """jit with the weights as constants, which it runs faster than weights passed as arguments."""

    can_train = True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import jax

        self.jax = jax
        self.arrays, self.flow = formula.jax_arrays(), formula.flow(configuration)
        self.parameters = formula.parameters(configuration)
        self.composed = formula.composed(configuration, self.parameters)

    def function(self, op, x, *context):
        weights = self.jax.tree.map(self.arrays.module.asarray, self.composed)
        return self.compiled(lambda *given: formula.run(self.arrays, self.flow, weights, op, *given), op)

    def compiled(self, run: Callable, op: str) -> Callable[..., Any]:
        """A jitted function whose results are NumPy's."""
        compiled = self.jax.jit(run)
        if op == "forward":
            return lambda *given: tuple(map(np.asarray, compiled(*given)))
        return lambda *given: np.asarray(compiled(*given))

    def nll(self, parameters, x, *context):
        return -formula.run(self.arrays, self.flow, parameters, "log_prob", x, *context).mean()

    def train(self, *given):
        import jax.numpy as jnp
        import optax

        adam = optax.adam(LEARNING_RATE)
        parameters = self.jax.tree.map(jnp.array, self.parameters)  # copies: a step overwrites them
        state = (parameters, adam.init(parameters))
        given = tuple(map(jnp.asarray, given))

        def update(state, given):
            loss, gradient = self.jax.value_and_grad(self.nll)(state[0], *given)
            updates, moments = adam.update(gradient, state[1])
            return (optax.apply_updates(state[0], updates), moments), loss

        compiled = self.jax.jit(update, donate_argnums=0)

        def step():
            nonlocal state
            state, loss = compiled(state, given)
            return loss

        return training_steps(step)


# ------------------------------------------------------------------------------------------ PyTorch


def torch_flow(configuration: Configuration, one_head: bool, compiled: bool = False) -> Any:
    """The formula as a module: what depends on no row is computed ahead in eval mode, in each step in training."""
    import torch
    from torch import nn

    arrays, flow = formula.torch_arrays(compiled), formula.flow(configuration)
    trained = formula.parameters(configuration, one_head)

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.composed = self._tensors(formula.composed(configuration, trained))
            self.trained = {name: nn.Parameter(value) for name, value in self._tensors(trained).items()}
            for name, value in self.trained.items():
                self.register_parameter(name.replace(".", "_"), value)

        @staticmethod
        def _tensors(values):
            return {name: torch.tensor(value) for name, value in values.items()}

        def run(self, op, *given):
            return formula.run(arrays, flow, self.trained if self.training else self.composed, op, *given)

        def log_prob(self, *given):
            return self.run("log_prob", *given)

        def forward(self, *given):
            return self.run("forward", *given)

        def inverse(self, *given):
            return self.run("inverse", *given)

    return Flow()


class TorchPeer(Peer):
    """A torch module; subclasses say how log_prob, forward and inverse are called on it."""

    can_train = True
    adam_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.module = self.build(configuration).eval()
        self.serving = copy.deepcopy(self.module)  # what some libraries cache for inference stays in here

    def build(self, configuration: Configuration) -> Any:
        raise NotImplementedError

    def run(self, module: Any, op: str, x: Any, *context: Any) -> Any:
        return {"log_prob": module.log_prob, "forward": module, "inverse": module.inverse}[op](x, *context)

    def compile(self, function: Callable) -> Callable:
        return function

    def function(self, op, *given):
        run = self.compile(lambda *given: self.run(self.serving, op, *given))

        def call(*given):
            with self.torch.inference_mode():
                results = run(*map(self.torch.from_numpy, given))
            return tuple(r.numpy() for r in results) if op == "forward" else results.numpy()

        return call

    def train(self, *given):
        given = tuple(map(self.torch.from_numpy, given))
        module = copy.deepcopy(self.module).train()
        adam = self.torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, **self.adam_options)
        nll = self.compile(lambda *given: -self.run(module, "log_prob", *given).mean())

        def step():
            adam.zero_grad()
            loss = nll(*given)
            loss.backward()
            adam.step()
            return loss.detach()

        return training_steps(step)

    def reference(self, op, *given):
        module = copy.deepcopy(self.module).double().train()  # the caches of nflows make float32 matrices in eval mode
        with self.torch.no_grad():
            results = self.run(module, op, *(self.torch.from_numpy(array).double() for array in given))
        return tuple(r.numpy() for r in results) if op == "forward" else results.numpy()


class TorchEager(TorchPeer, Formula):
    def build(self, configuration):
        return torch_flow(configuration, one_head=False)


class TorchFused(TorchPeer, Formula):
    """One matrix for both heads, and Adam's fused implementation."""

    adam_options: ClassVar[dict[str, Any]] = {"fused": True}

    def build(self, configuration):
        return torch_flow(configuration, one_head=True)


class TorchCompile(TorchFused):
    """torch.compile of the same, for one shape at a time."""

    slow_to_build = True

    def build(self, configuration):
        return torch_flow(configuration, one_head=True, compiled=True)

    def compile(self, function):
        self.torch._dynamo.reset()
        return self.torch.compile(function, dynamic=False)


# ------------------------------------------------------------------------------------------ flow libraries


class Library(TorchPeer):
    """A library of flows on PyTorch: A to E, and what else it can be of the others."""

    other_maths = True

    @staticmethod
    def holds(configuration):
        return configuration.mask != "random"  # R is about nvpflow alone


def _assign(linear: Any, kernel: np.ndarray, bias: np.ndarray) -> None:
    import torch

    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.T)))
        linear.bias.copy_(torch.from_numpy(bias))


Head = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _affine_head(interleaved: bool) -> Head:
    """A network's last layer in a library's order: shift first, then scale, of each feature or of all."""

    def reordered(kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(bias.size).reshape(2, -1)[::-1]
        at = at.T.ravel() if interleaved else at.ravel()
        return kernel[:, at], bias[at]

    return reordered


def _spline_head(configuration: Configuration, size_factor: float = 1.0) -> Head:
    """The same: all numbers of a feature side by side; slopes without an offset, sizes that the library divides."""
    counts = raw_numbers(configuration.spline)
    factor = np.repeat([size_factor, size_factor, 1.0], list(counts.values()))
    offset = np.repeat([0.0, 0.0, configuration.spline["derivative"]["offset"]], list(counts.values()))

    def by_feature(numbers: np.ndarray) -> np.ndarray:
        """[..., P n], number p of feature j from p n + j to j P + p."""
        apart = numbers.reshape(*numbers.shape[:-1], len(factor), -1)
        return np.swapaxes(apart, -1, -2).reshape(numbers.shape).astype(np.float32)

    def reordered(kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = bias.size // len(factor)
        times, more = np.repeat(factor, features), np.repeat(offset, features)
        return by_feature(kernel * times), by_feature(bias * times + more)

    return reordered


def _assign_linears(module: Any, layers: Any, head: Head) -> None:
    """Give a module's dense layers our weights."""
    # zuko's Linear is a class of its own.
    linears = iter([m for m in module.modules() if type(m).__name__ == "Linear"])
    for dense in layers:
        for i, (kernel, bias) in enumerate(dense):
            if i == len(dense) - 1:
                kernel, bias = head(kernel, bias)
            _assign(next(linears), kernel, bias)
    assert next(linears, None) is None, "the library's model has more layers than ours"


def _assign_factors(linears: Any, configuration: Configuration) -> None:
    """Give LU layers of nflows, or of normflows, which took them over, our factors; the diagonal is softplus + eps."""
    import torch

    parameters = reference(configuration).parameters
    names = [step.name for step in formula.steps(configuration) if isinstance(step, formula.Linear)]
    for name, linear in zip(names, linears, strict=True):
        values = {
            "lower_entries": parameters[f"{name}.lower"],
            "upper_entries": parameters[f"{name}.upper"],
            "unconstrained_upper_diag": np.log(np.expm1(np.exp(parameters[f"{name}.log_diagonal"]) - linear.eps)),
            "bias": parameters[f"{name}.bias"],
        }
        with torch.no_grad():
            for part, value in values.items():
                getattr(linear, part).copy_(torch.from_numpy(value))


def _gates_first(configuration: Configuration) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """`fused_layers` in the order of the modules of nflows and normflows: a gate stands first in a block."""
    layers = fused_layers(configuration)
    if configuration.network != "residual" or not configuration.context_size:
        return layers
    at = [0, *(3 * j + i for j in range(configuration.num_blocks) for i in (3, 1, 2)), -1]
    return [[dense[i] for i in at] for dense in layers]


def _marks(configuration: Configuration, features: tuple[int, ...]) -> Any:
    """A mask [D] of PyTorch, true at `features`."""
    import torch

    return torch.from_numpy(np.isin(np.arange(configuration.input_size), features))


class Zuko(Library):
    """zuko.flows.NICE, its RealNVP: checkered masks, a soft clip of the log-scale; networks without gates.

    With splines coupling by coupling: its NSF(passes=2) would make masked networks of twice the arithmetic.
    """

    def build(self, configuration):
        import zuko

        c = configuration
        sizes = {"context": c.context_size, "hidden_features": c.widths}
        if c.mixing or c.splines:
            return self.assembled(configuration, sizes)
        flow = zuko.flows.NICE(c.input_size, transforms=c.num_flows, **sizes)
        if c.plain:
            _assign_linears(flow, fused_layers(configuration), _affine_head(interleaved=True))
        else:
            for transform in flow.transform.transforms:
                transform.hyper = self.pair(transform.hyper, c.widths)
        return flow

    @staticmethod
    def pair(one: Any, widths: tuple[int, ...]) -> Any:
        """Two networks in place of one, whose results it wants side by side for each feature: shift, then scale."""
        import torch
        import zuko
        from torch import nn

        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.shift, self.scale = (
                    zuko.nn.MLP(one.in_features, one.out_features // 2, widths, activation)
                    for activation in (nn.ReLU, nn.Tanh)
                )

            def forward(self, x):
                return torch.stack([self.shift(x), self.scale(x)], dim=-1).flatten(-2)

        return Pair()

    def assembled(self, configuration: Configuration, sizes: dict[str, Any]) -> Any:
        """With permutations and LULinearTransform, which has no bias; splines that end in slope 1."""
        import torch
        from zuko import distributions, flows, lazy, transforms

        size, steps = configuration.input_size, []
        if configuration.splines:
            bins, bound = configuration.num_bins, configuration.spline["upper"]
            sizes |= {"univariate": partial(transforms.MonotonicRQSTransform, bound=bound)}
            sizes |= {"shapes": [(bins,), (bins,), (bins - 1,)]}
        for step in formula.steps(configuration):
            if isinstance(step, formula.Coupling):
                mask = _marks(configuration, step.passed)
                steps.append(flows.GeneralCouplingTransform(size, mask=mask, **sizes))
                continue
            if step.order != tuple(range(size)):
                order = torch.tensor(step.order)
                steps.append(lazy.UnconditionalTransform(transforms.PermutationTransform, order, buffer=True))
            steps.append(lazy.UnconditionalTransform(transforms.LULinearTransform, torch.eye(size)))
        if configuration.bounded:
            of_base = distributions.BoxUniform, {"lower": -torch.ones(size), "upper": torch.ones(size)}
        else:
            of_base = distributions.DiagNormal, {"loc": torch.zeros(size), "scale": torch.ones(size)}
        return lazy.Flow(steps, lazy.UnconditionalDistribution(of_base[0], buffer=True, **of_base[1]))

    def run(self, module, op, x, *context):
        distribution = module(*context)
        if op == "log_prob":
            return distribution.log_prob(x)
        return distribution.transform.call_and_ladj(x) if op == "forward" else distribution.transform.inv(x)


class Nflows(Library):
    """nflows' couplings, its MLP, ResidualNet and LULinear, cached.

    The scale of an affine coupling is sigmoid(u + 2) + 1e-3; splines are ours, with sizes divided by the root of the
    hidden units.
    """

    @staticmethod
    def holds(configuration):
        return Library.holds(configuration) and configuration.network != "pair"

    def build(self, configuration):
        import torch
        from nflows import transforms
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow

        self.other_maths, self.other_steps = not configuration.splines, configuration.splines
        size, steps, linears = configuration.input_size, [], []
        for step in formula.steps(configuration):
            if isinstance(step, formula.Linear):
                linears.append(transforms.LULinear(size, using_cache=True))
                if step.order != tuple(range(size)):
                    steps.append(transforms.Permutation(torch.tensor(step.order)))
                steps.append(linears[-1])
            else:
                steps.append(self.coupling(configuration, _marks(configuration, step.moved).int()))
        base = self.uniform() if configuration.bounded else StandardNormal([size])
        flow = Flow(transforms.CompositeTransform(steps), base)
        head = _affine_head(interleaved=False)
        if configuration.splines:
            head = _spline_head(configuration, math.sqrt(configuration.hidden_sizes[0]))
        _assign_linears(flow, _gates_first(configuration), head)
        _assign_factors(linears, configuration)
        return flow

    @staticmethod
    def coupling(configuration: Configuration, mask: Any) -> Any:
        from nflows import transforms

        network = partial(Nflows.network, configuration)
        if not configuration.splines:
            return transforms.AffineCouplingTransform(mask, network)
        tails = None if configuration.bounded else "linear"
        return transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, network, num_bins=configuration.num_bins, tails=tails, tail_bound=configuration.spline["upper"]
        )

    @staticmethod
    def network(configuration: Configuration, size_in: int, size_out: int) -> Any:
        from nflows.nn.nets import MLP, ResidualNet

        class Net(MLP):
            hidden_features = configuration.hidden_sizes[0]  # by which the splines divide sizes

            def forward(self, inputs, context=None):
                return super().forward(inputs)

        hidden = list(configuration.hidden_sizes)
        if configuration.network == "mlp":
            return Net([size_in], [size_out], hidden)
        sizes = {"context_features": configuration.context_size or None, "num_blocks": configuration.num_blocks}
        return ResidualNet(size_in, size_out, hidden[0], **sizes)

    @staticmethod
    def uniform() -> Any:
        """Uniform on the unit cube, outside of which its splines refuse rows; its BoxUniform is no base of its Flow."""
        from nflows.distributions import Distribution

        class Uniform(Distribution):
            def _log_prob(self, inputs, context):
                return inputs.new_zeros(len(inputs))

        return Uniform()

    def run(self, module, op, x, *context):
        context = [c.expand(len(x), -1) for c in context]
        if op == "log_prob":
            return module.log_prob(x, *context)
        return module._transform(x, *context) if op == "forward" else module._transform.inverse(x, *context)[0]


class Normflows(Library):
    """normflows' AffineCouplingBlock: scale exp(u) without tanh; its log_prob runs the couplings' inverses.

    With permuted LU layers between; with a network for each head its MaskedAffineFlow, whose mathematics is ours; with
    splines its CoupledRationalQuadraticSpline, whose mathematics is ours, too, without those of the other features.
    """

    @staticmethod
    def holds(configuration):
        return Library.holds(configuration) and (configuration.splines or not configuration.context_size)

    def build(self, configuration):
        import normflows as nf

        c = configuration
        self.other_maths, self.other_steps = c.network != "pair" and not c.splines, c.splines
        made_by = self.splines if c.splines else self.pairs if c.network == "pair" else self.blocks
        base = nf.distributions.DiagGaussian(c.input_size, trainable=False)
        if c.bounded:
            base = nf.distributions.base.Uniform(c.input_size, 0.0, 1.0)
        return (nf.ConditionalNormalizingFlow if c.context_size else nf.NormalizingFlow)(base, made_by(c))

    @staticmethod
    def blocks(configuration: Configuration) -> list[Any]:
        import normflows as nf
        import torch

        layers, size = iter(fused_layers(configuration)), configuration.input_size
        flows, linears = [], []
        for step in formula.steps(configuration):
            if isinstance(step, formula.Linear):
                linears.append(nf.flows.LULinearPermute(size))
                flows.append(linears[-1])
                continue
            dense = next(layers)
            flows.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([len(dense[0][0]), *(b.size for _, b in dense)])))
            if configuration.mixing is None:
                flows.append(nf.flows.Permute(size, mode="swap"))
        _assign_linears(torch.nn.ModuleList(flows), fused_layers(configuration), _affine_head(interleaved=True))
        if linears:
            _assign_factors([flow.linear for flow in linears], configuration)
            flows.reverse()  # its order is from latents to data
        return flows

    @staticmethod
    def splines(configuration: Configuration) -> list[Any]:
        import normflows as nf
        import torch

        size, flows, linears = configuration.input_size, [], []
        for step in formula.steps(configuration):
            if isinstance(step, formula.Linear):
                flows.append(nf.flows.LULinearPermute(size))
                flows[-1].permutation._permutation.copy_(torch.tensor(step.order))
                linears.append(flows[-1].linear)
            else:
                flows.append(Normflows.coupling(configuration, _marks(configuration, step.moved).int()))
        divisor = configuration.hidden_sizes[0] if configuration.network == "residual" else 1
        head = _spline_head(configuration, math.sqrt(divisor))
        _assign_linears(torch.nn.ModuleList(flows), _gates_first(configuration), head)
        _assign_factors(linears, configuration)
        return flows[::-1]

    @staticmethod
    def coupling(configuration: Configuration, mask: Any) -> Any:
        """CoupledRationalQuadraticSpline of any mask; its networks are residual, else nets.MLP takes their place."""
        import normflows as nf
        from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

        class Mlp(nf.nets.MLP):
            def forward(self, x, context=None):
                return super().forward(x)

        def network(size_in: int, size_out: int) -> Any:
            hidden = configuration.hidden_sizes
            if configuration.network == "mlp":
                return Mlp([size_in, *hidden, size_out])
            sizes = {"context_features": configuration.context_size or None, "num_blocks": configuration.num_blocks}
            return nf.nets.ResidualNet(size_in, size_out, hidden[0], **sizes)

        flow = nf.flows.CoupledRationalQuadraticSpline(configuration.input_size, 1, 1)
        flow.prqct = PiecewiseRationalQuadraticCoupling(
            mask,
            network,
            num_bins=configuration.num_bins,
            tails=None if configuration.bounded else "linear",
            tail_bound=configuration.spline["upper"],
            apply_unconditional_transform=False,
        )
        return flow

    @staticmethod
    def pairs(configuration: Configuration) -> list[Any]:
        import normflows as nf
        import torch
        from torch import nn

        size, parameters = configuration.input_size, formula.parameters(configuration)

        def network(step: formula.Coupling, head: str, activation: type[nn.Module]) -> nn.Module:
            """All features in and out: of those that are masked, zeros."""
            names = [f"{step.name}_{head}_dense_{j}" for j in range(len(configuration.hidden_sizes))]
            widths, modules = [size, *configuration.hidden_sizes, size], []
            for name, size_in, size_out in zip([*names, f"{step.name}_{head}"], widths, widths[1:], strict=False):
                kernel, bias = np.zeros((size_in, size_out), np.float32), np.zeros(size_out, np.float32)
                rows = list(step.passed) if size_in == size else slice(None)
                columns = list(step.moved) if size_out == size else slice(None)
                kernel[rows, columns], bias[columns] = parameters[f"{name}.kernel"], parameters[f"{name}.bias"]
                modules += [nn.Linear(size_in, size_out), activation()]
                _assign(modules[-2], kernel, bias)
            return nn.Sequential(*modules[:-1])

        flows = []
        for step in formula.steps(configuration):
            networks = (network(step, "translation", nn.ReLU), network(step, "scale", nn.Tanh))
            flows.append(nf.flows.MaskedAffineFlow(_marks(configuration, step.passed).to(torch.float32), *networks))
        return flows[::-1]

    def function(self, op, *given):
        for module in self.serving.modules():
            if hasattr(module, "use_cache"):  # of linear layers; their inverses call what PyTorch has no longer
                module.use_cache(op != "inverse")
        return super().function(op, *given)

    def run(self, module, op, x, *context):
        if op == "log_prob":
            return module.log_prob(x, *context)
        return module.inverse_and_log_det(x, *context) if op == "forward" else module.forward(x, *context)


class Freia(Library):
    """FrEIA's AllInOneBlock, a step of Glow: coupling, actnorm, a fixed rotation; RNVPCouplingBlock for two networks.

    Its own weights; the networks are perceptrons without gates.
    """

    @staticmethod
    def holds(configuration):
        return Library.holds(configuration) and not (configuration.plain or configuration.splines)

    def build(self, configuration):
        from FrEIA import framework, modules
        from torch import nn

        c = configuration

        def network(size_in, size_out):
            widths = [size_in, *c.widths]
            hidden = [m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair), nn.ReLU())]
            return nn.Sequential(*hidden, nn.Linear(widths[-1], size_out))

        flow = framework.SequenceINN(c.input_size)
        options: dict[str, Any] = {"subnet_constructor": network}
        if c.context_size:
            options |= {"cond": 0, "cond_shape": (c.context_size,)}
        for _ in range(c.num_flows // 2 if c.network == "pair" else c.num_flows):
            if c.network == "pair":  # two couplings each
                flow.append(modules.RNVPCouplingBlock, **options)
            else:
                flow.append(modules.AllInOneBlock, permute_soft=True, **options)
        return flow

    def run(self, module, op, x, *context):
        context = [c.expand(len(x), -1) for c in context]
        if op == "inverse":
            return module(x, c=context, rev=True, jac=False)[0]
        z, log_det = module(x, c=context)
        if op == "forward":
            return z, log_det
        return log_det - 0.5 * ((z * z).sum(1) + x.shape[1] * formula.LOG_2_PI)


class Madnis(Library):
    """madnis' Flow on the unit cube: its slopes are (softplus(u) + 1e-3) / (ln 2 + 1e-3)."""

    @staticmethod
    def holds(configuration):
        return configuration.bounded

    def build(self, configuration):
        from madnis.nn import Flow

        flow = Flow(
            configuration.input_size,
            permutations="exchange",
            blocks=configuration.num_flows,
            layers=1 + len(configuration.hidden_sizes),
            units=configuration.hidden_sizes[0],
            bins=configuration.num_bins,
        )
        _assign_linears(flow, fused_layers(configuration), _spline_head(configuration))
        return flow

    def run(self, module, op, x):
        if op == "log_prob":
            return module.log_prob(x)
        z, log_det = module.transform(x, inverse=op == "inverse")
        return (z, log_det) if op == "forward" else z


class Flowjax(Jax):
    """flowjax' coupling_flow, its own permutations and weights; jit over the whole.

    Scales are softplus; splines have free slopes at the ends.

    Not with two networks: one of them is half the arithmetic.
    """

    other_maths = True
    can_train = chunks = False

    @staticmethod
    def holds(configuration):
        return Library.holds(configuration) and configuration.network != "pair"

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import jax
        import jax.numpy as jnp
        from flowjax.bijections import Affine, RationalQuadraticSpline
        from flowjax.distributions import Normal, Uniform
        from flowjax.flows import coupling_flow

        self.jax, c, transformer = jax, configuration, Affine()
        if c.splines:
            interval = c.spline["lower"], c.spline["upper"]
            transformer = RationalQuadraticSpline(knots=c.num_bins - 1, interval=interval)
        zeros = jnp.zeros(c.input_size)
        self.flow = coupling_flow(
            jax.random.key(0),
            base_dist=Uniform(zeros, zeros + 1) if c.bounded else Normal(zeros),
            transformer=transformer,
            cond_dim=c.context_size or None,
            flow_layers=c.num_flows,
            nn_width=c.widths[0],
            nn_depth=len(c.widths),
        )

    def function(self, op, x, *context):
        bijection = self.flow.bijection
        axes = (0, *(0 if c.ndim == 2 else None for c in context))
        run = {
            "log_prob": lambda *given: self.flow.log_prob(*given),  # jit wants something with a hash
            "forward": self.jax.vmap(bijection.inverse_and_log_det, axes),
            "inverse": self.jax.vmap(bijection.transform, axes),
        }[op]
        return self.compiled(run, op)


# ------------------------------------------------------------------------------------------ inference runtimes


class OnnxPeer(Formula):
    """A runtime of ONNX models."""

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import onnx  # noqa: F401  (says here what is missing)

        self.flow, self.threads = formula.flow(configuration), threads
        self.parameters = formula.composed(configuration, formula.parameters(configuration))

    def model(self, op: str, *given: np.ndarray) -> bytes:
        import onnx_graph

        return onnx_graph.build(self.flow, self.parameters, op, *given)


class OnnxRuntime(OnnxPeer):
    """session.run with a dictionary of arrays."""

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import onnxruntime

        super().__init__(configuration, threads)
        self.runtime, self.options = onnxruntime, onnxruntime.SessionOptions()
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = threads, 1

    def session(self, op: str, *given: np.ndarray) -> Any:
        return self.runtime.InferenceSession(self.model(op, *given), self.options, providers=["CPUExecutionProvider"])

    def function(self, op, x, *context):
        session = self.session(op, x, *context)
        if op == "forward":
            return lambda *given: tuple(session.run(None, dict(zip("xc", given, strict=False))))
        return lambda *given: session.run(None, dict(zip("xc", given, strict=False)))[0]


class OnnxRuntimeBound(OnnxRuntime):
    """The same with I/O binding: inputs and outputs live in arrays that are bound once."""

    def function(self, op, x, *context):
        bound = (x, *context)
        session = self.session(op, *bound)
        binding = session.io_binding()
        sources = [self.runtime.OrtValue.ortvalue_from_numpy(array) for array in bound]
        for name, source in zip("xc", sources, strict=False):
            binding.bind_ortvalue_input(name, source)
        names = [output.name for output in session.get_outputs()]
        arrays = [np.empty((len(x), x.shape[1]) if name == "y" else len(x), np.float32) for name in names]
        for name, array in zip(names, arrays, strict=True):
            binding.bind_ortvalue_output(name, self.runtime.OrtValue.ortvalue_from_numpy(array))
        results = tuple(arrays) if op == "forward" else arrays[0]

        def call(*given):
            if given[0] is not bound[0]:
                for source, array in zip(sources, given, strict=True):
                    source.update_inplace(array)
            session.run_with_iobinding(binding)
            return results

        return call


class OpenVino(OnnxPeer):
    """Latency hint, float32, inputs and outputs shared with NumPy arrays."""

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import openvino

        super().__init__(configuration, threads)
        self.openvino = openvino
        self.residual = configuration.network == "residual"
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }

    def function(self, op, x, *context):
        if self.residual and not context and len(x) < 16:
            raise RuntimeError("its CPU plugin (2026.4) ends the process on such a network and fewer than 16 rows")
        bound, core = (x, *context), self.openvino.Core()
        compiled = core.compile_model(core.read_model(self.model(op, *bound)), "CPU", self.options)
        request = compiled.create_infer_request()
        for i, array in enumerate(bound):
            request.set_input_tensor(i, self.openvino.Tensor(array, shared_memory=True))
        outputs = tuple(request.get_output_tensor(i).data for i in range(len(compiled.outputs)))
        results = outputs if op == "forward" else outputs[0]

        def call(*given):
            if given[0] is not bound[0]:
                for target, array in zip(bound, given, strict=True):
                    target[:] = array
            request.infer(share_outputs=True)
            return results

        return call


# The order of tables and pictures.
PEERS: dict[str, type[Peer]] = {
    "numpy": Numpy,
    "torch_eager": TorchEager,
    "torch_fused": TorchFused,
    "torch_compile": TorchCompile,
    "onnxruntime": OnnxRuntime,
    "onnxruntime_bound": OnnxRuntimeBound,
    "openvino": OpenVino,
    "jax": Jax,
    "zuko": Zuko,
    "nflows": Nflows,
    "normflows": Normflows,
    "freia": Freia,
    "madnis": Madnis,
    "flowjax": Flowjax,
}
# The flow libraries on PyTorch; flowjax, compiled as a whole, is as fast as hand-written JAX.
TORCH_FLOW_LIBRARIES = ("zuko", "nflows", "normflows", "freia", "madnis")
COMPILED = ("torch_compile", "jax", "flowjax", "onnxruntime", "onnxruntime_bound", "openvino")
PACKAGES = [
    "numpy",
    "nvpflow",
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "jax",
    "optax",
    "zuko",
    "nflows",
    "normflows",
    "FrEIA",
    "madnis",
    "flowjax",
]
