"""What else a Python user can run an affine flow with, each as its documentation says to run it fast.

A peer is a class whose constructor takes a configuration and the number of threads and imports its library: one that
is not installed raises ImportError and is skipped. `function(op, x)` returns a function of arrays of x's shape,
prepared for that shape (compiled, bound) where the library can be. Peers whose mathematics is ours (`other_maths`
False) hold the same parameters as nvpflow and answer to the oracle. The others answer to `reference`, their own model
in float64. NumPy arrays go in and come out.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from configurations import Configuration, reference
from timing import Call, Function

LOG_2_PI = math.log(2 * math.pi)
LEARNING_RATE = 1e-3
CHUNK = 1024


def fused_layers(configuration: Configuration) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Per coupling, (kernel [in, out], bias) of its dense layers; the last is scale and translation side by side."""
    parameters = reference(configuration).parameters
    layers = []
    for k in range(configuration.num_flows):
        names = [f"flow_{k}_coupling_dense_{j}" for j in range(len(configuration.hidden_sizes))]
        dense = [(parameters[f"{name}.kernel"], parameters[f"{name}.bias"]) for name in names]
        heads = [
            np.concatenate([parameters[f"flow_{k}_{head}.{part}"] for head in ("scale", "translation")], axis=-1)
            for part in ("kernel", "bias")
        ]
        layers.append([(kernel.astype(np.float32), bias.astype(np.float32)) for kernel, bias in (*dense, heads)])
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


def in_chunks(function: Callable[[np.ndarray], Any], x: np.ndarray, op: str) -> Callable[[np.ndarray], Any]:
    """Feeds x to a function of CHUNK rows, chunk by chunk, and collects the results."""
    out = (np.empty_like(x), np.empty(len(x), x.dtype))
    wanted = {"forward": out, "inverse": out[:1], "log_prob": out[1:]}[op]

    def run(x: np.ndarray) -> Any:
        for at in range(0, len(x), CHUNK):
            results = function(x[at : at + CHUNK])
            for target, part in zip(wanted, results if op == "forward" else (results,), strict=True):
                target[at : at + CHUNK] = part
        return wanted if op == "forward" else wanted[0]

    return run


class Peer:
    """The defaults of a peer."""

    other_maths = False
    can_train = False
    chunks = False  # also run large batches in chunks of CHUNK rows
    slow_to_build = False  # seconds for each shape: not run at every batch size

    def function(self, op: str, x: np.ndarray) -> Callable[[np.ndarray], Any]:
        raise NotImplementedError

    def call(self, op: str, x: np.ndarray, chunked: bool = False) -> Call:
        run = in_chunks(self.function(op, x[:CHUNK].copy()), x, op) if chunked else self.function(op, x)
        return Call("run(x)", {"run": run, "x": x})

    def train(self, x: np.ndarray) -> Function:
        raise NotImplementedError

    def reference(self, op: str, x: np.ndarray) -> Any:
        """Float64 results of a model with other mathematics; None where the library cannot, then by round trip."""
        return None


# ------------------------------------------------------------------------------------------ NumPy and JAX: one formula


def _run_flow(xp: Any, layers: Any, op: str, x: Any) -> Any:
    """log_prob, forward or inverse in any array library; halves are kept apart and joined once."""
    half = x.shape[1] // 2
    halves = [x[:, :half], x[:, half:]]
    log_det = 0
    order = list(enumerate(layers))
    for k, dense in order if op != "inverse" else reversed(order):
        passed, moved = (0, 1) if k % 2 == 0 else (1, 0)
        hidden = halves[passed]
        for kernel, bias in dense[:-1]:
            hidden = xp.maximum(hidden @ kernel + bias, 0)
        heads = hidden @ dense[-1][0] + dense[-1][1]
        width = heads.shape[1] // 2
        scale, shift = xp.tanh(heads[:, :width]), heads[:, width:]
        if op == "inverse":
            halves[moved] = (halves[moved] - shift) * xp.exp(-scale)
        else:
            halves[moved] = halves[moved] * xp.exp(scale) + shift
            log_det = log_det + scale.sum(axis=1)
    if op == "log_prob":
        squares = sum((part * part).sum(axis=1) for part in halves)
        return log_det - 0.5 * (squares + x.shape[1] * LOG_2_PI)
    joined = xp.concatenate(halves, axis=1)
    return joined if op == "inverse" else (joined, log_det)


class Numpy(Peer):
    chunks = True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        self.layers = fused_layers(configuration)

    def function(self, op, x):
        return lambda x: _run_flow(np, self.layers, op, x)


class Jax(Peer):
    """jit with the weights as constants, which it runs faster than weights passed as arguments."""

    can_train = chunks = True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import jax

        self.layers = self.parameters = fused_layers(configuration)
        self.jax = jax

    def function(self, op, x):
        import jax.numpy as jnp

        layers = self.jax.tree.map(jnp.asarray, self.layers)
        compiled = self.jax.jit(lambda x: _run_flow(jnp, layers, op, x))
        if op == "forward":
            return lambda x: tuple(map(np.asarray, compiled(x)))
        return lambda x: np.asarray(compiled(x))

    def nll(self, parameters, x):
        import jax.numpy as jnp

        return -_run_flow(jnp, parameters, "log_prob", x).mean()

    def train(self, x):
        import jax.numpy as jnp
        import optax

        adam = optax.adam(LEARNING_RATE)
        parameters = self.jax.tree.map(jnp.array, self.parameters)  # copies: a step overwrites them
        state = (parameters, adam.init(parameters))
        x = jnp.asarray(x)

        def update(state, x):
            loss, gradient = self.jax.value_and_grad(self.nll)(state[0], x)
            updates, moments = adam.update(gradient, state[1])
            return (optax.apply_updates(state[0], updates), moments), loss

        compiled = self.jax.jit(update, donate_argnums=0)

        def step():
            nonlocal state
            state, loss = compiled(state, x)
            return loss

        return training_steps(step)


# ------------------------------------------------------------------------------------------ PyTorch


def _torch_flow(configuration: Configuration, fused: bool) -> Any:
    """The flow as one would write it in PyTorch: separate heads, or one matrix for both."""
    import torch
    from torch import nn

    def linear(kernel: np.ndarray, bias: np.ndarray) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, *kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.T)))
            layer.bias.copy_(torch.from_numpy(bias))
        return layer

    class Coupling(nn.Module):
        def __init__(self, dense):
            super().__init__()
            hidden = [module for kernel, bias in dense[:-1] for module in (linear(kernel, bias), nn.ReLU())]
            self.trunk = nn.Sequential(*hidden)
            kernel, bias = dense[-1]
            parts = [slice(None)] if fused else [slice(0, bias.size // 2), slice(bias.size // 2, None)]
            self.heads = nn.ModuleList(linear(kernel[:, part], bias[part]) for part in parts)

        def forward(self, passed):
            hidden = self.trunk(passed)
            raw, shift = self.heads[0](hidden).chunk(2, 1) if fused else (head(hidden) for head in self.heads)
            return torch.tanh(raw), shift

    class RealNVP(nn.Module):
        def __init__(self):
            super().__init__()
            self.couplings = nn.ModuleList(Coupling(dense) for dense in fused_layers(configuration))

        def halves(self, x):
            half = x.shape[1] // 2
            return [x[:, :half], x[:, half:]]

        def transform(self, x):
            halves, log_det = self.halves(x), 0
            for k, coupling in enumerate(self.couplings):
                passed, moved = (0, 1) if k % 2 == 0 else (1, 0)
                scale, shift = coupling(halves[passed])
                halves[moved] = halves[moved] * torch.exp(scale) + shift
                log_det = log_det + scale.sum(1)
            return halves, log_det

        def log_prob(self, x):
            halves, log_det = self.transform(x)
            return log_det - 0.5 * (sum((h * h).sum(1) for h in halves) + x.shape[1] * LOG_2_PI)

        def forward(self, x):
            halves, log_det = self.transform(x)
            return torch.cat(halves, 1), log_det

        def inverse(self, z):
            halves = self.halves(z)
            for k in reversed(range(len(self.couplings))):
                passed, moved = (0, 1) if k % 2 == 0 else (1, 0)
                scale, shift = self.couplings[k](halves[passed])
                halves[moved] = (halves[moved] - shift) * torch.exp(-scale)
            return torch.cat(halves, 1)

    return RealNVP()


class TorchPeer(Peer):
    """A torch module; subclasses say how log_prob, forward and inverse are called on it."""

    can_train = True
    adam_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.module = self.build(configuration).eval()

    def build(self, configuration: Configuration) -> Any:
        raise NotImplementedError

    def run(self, module: Any, op: str, x: Any) -> Any:
        return {"log_prob": module.log_prob, "forward": module, "inverse": module.inverse}[op](x)

    def compile(self, function: Callable) -> Callable:
        return function

    def function(self, op, x):
        run = self.compile(lambda x: self.run(self.module, op, x))

        def call(x):
            with self.torch.inference_mode():
                results = run(self.torch.from_numpy(x))
            return tuple(r.numpy() for r in results) if op == "forward" else results.numpy()

        return call

    def train(self, x):
        x = self.torch.from_numpy(x)
        module = copy.deepcopy(self.module).train()
        adam = self.torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, **self.adam_options)
        nll = self.compile(lambda x: -self.run(module, "log_prob", x).mean())

        def step():
            adam.zero_grad()
            loss = nll(x)
            loss.backward()
            adam.step()
            return loss.detach()

        return training_steps(step)

    def reference(self, op, x):
        with self.torch.no_grad():
            results = self.run(copy.deepcopy(self.module).double(), op, self.torch.from_numpy(x).double())
        return tuple(r.numpy() for r in results) if op == "forward" else results.numpy()


class TorchEager(TorchPeer):
    chunks = True

    def build(self, configuration):
        return _torch_flow(configuration, fused=False)


class TorchFused(TorchPeer):
    """One matrix for both heads, and Adam's fused implementation."""

    chunks = True
    adam_options: ClassVar[dict[str, Any]] = {"fused": True}

    def build(self, configuration):
        return _torch_flow(configuration, fused=True)


class TorchCompile(TorchFused):
    """torch.compile of the same, for one shape at a time."""

    slow_to_build = True

    def compile(self, function):
        self.torch._dynamo.reset()
        return self.torch.compile(function, dynamic=False)


# ------------------------------------------------------------------------------------------ flow libraries


def _assign_linears(module: Any, layers: Any, order: str) -> None:
    """Give a module's dense layers our weights, the heads' outputs in the library's order."""
    import torch

    # zuko's Linear is a class of its own.
    linears = iter([m for m in module.modules() if type(m).__name__ == "Linear"])
    for dense in layers:
        for i, (kernel, bias) in enumerate(dense):
            if i == len(dense) - 1:
                at = np.arange(bias.size).reshape(2, -1)[::-1]  # shift first, then scale
                at = at.T.ravel() if order == "interleaved" else at.ravel()
                kernel, bias = kernel[:, at], bias[at]
            linear = next(linears)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.T)))
                linear.bias.copy_(torch.from_numpy(bias))
    assert next(linears, None) is None, "the library's model has more layers than ours"


class Zuko(TorchPeer):
    """zuko.flows.NICE, its RealNVP: checkered masks, a soft clip of the log-scale."""

    other_maths = True

    def build(self, configuration):
        import zuko

        flow = zuko.flows.NICE(
            configuration.input_size, transforms=configuration.num_flows, hidden_features=configuration.hidden_sizes
        )
        _assign_linears(flow, fused_layers(configuration), "interleaved")
        return flow

    def run(self, module, op, x):
        distribution = module()
        if op == "log_prob":
            return distribution.log_prob(x)
        return distribution.transform.call_and_ladj(x) if op == "forward" else distribution.transform.inv(x)


class Nflows(TorchPeer):
    """nflows' AffineCouplingTransform with its MLP: scale sigmoid(u + 2) + 1e-3."""

    other_maths = True

    def build(self, configuration):
        import torch
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.nn.nets import MLP
        from nflows.transforms import AffineCouplingTransform, CompositeTransform

        class Net(MLP):
            def forward(self, inputs, context=None):
                return super().forward(inputs)

        size = configuration.input_size
        first = torch.arange(size) >= size // 2
        couplings = [
            AffineCouplingTransform(
                (first if k % 2 == 0 else ~first).int(),
                lambda size_in, size_out: Net([size_in], [size_out], list(configuration.hidden_sizes)),
            )
            for k in range(configuration.num_flows)
        ]
        flow = Flow(CompositeTransform(couplings), StandardNormal([size]))
        _assign_linears(flow, fused_layers(configuration), "consecutive")
        return flow

    def run(self, module, op, x):
        if op == "log_prob":
            return module.log_prob(x)
        return module._transform(x) if op == "forward" else module._transform.inverse(x)[0]


class Normflows(TorchPeer):
    """normflows' AffineCouplingBlock: scale exp(u) without tanh; its log_prob runs the couplings' inverses."""

    other_maths = True

    def build(self, configuration):
        import normflows as nf

        flows = []
        for k in range(configuration.num_flows):
            shapes = configuration.dense_shapes(k)
            flows += [
                nf.flows.AffineCouplingBlock(nf.nets.MLP([shapes[0][0], *(size_out for _, size_out in shapes)])),
                nf.flows.Permute(configuration.input_size, mode="swap"),
            ]
        base = nf.distributions.DiagGaussian(configuration.input_size, trainable=False)
        model = nf.NormalizingFlow(base, flows)
        _assign_linears(model, fused_layers(configuration), "interleaved")
        return model

    def run(self, module, op, x):
        if op == "log_prob":
            return module.log_prob(x)
        return module.inverse_and_log_det(x) if op == "forward" else module.forward(x)


class Flowjax(Peer):
    """flowjax' coupling_flow with Affine: softplus scale, its own permutations and weights; jit over the whole."""

    other_maths = True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import jax
        import jax.numpy as jnp
        from flowjax.bijections import Affine
        from flowjax.distributions import Normal
        from flowjax.flows import coupling_flow

        self.jax = jax
        self.flow = coupling_flow(
            jax.random.key(0),
            base_dist=Normal(jnp.zeros(configuration.input_size)),
            transformer=Affine(),
            flow_layers=configuration.num_flows,
            nn_width=configuration.hidden_sizes[0],
            nn_depth=len(configuration.hidden_sizes),
        )

    def function(self, op, x):
        bijection = self.flow.bijection
        run = {
            "log_prob": lambda x: self.flow.log_prob(x),  # jit wants something with a hash
            "forward": self.jax.vmap(bijection.inverse_and_log_det),
            "inverse": self.jax.vmap(bijection.transform),
        }[op]
        compiled = self.jax.jit(run)
        if op == "forward":
            return lambda x: tuple(map(np.asarray, compiled(x)))
        return lambda x: np.asarray(compiled(x))


# ------------------------------------------------------------------------------------------ inference runtimes


class OnnxRuntime(Peer):
    """session.run with a dictionary of arrays."""

    chunks = True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import onnx  # noqa: F401  (says here what is missing)
        import onnxruntime

        self.runtime = onnxruntime
        self.configuration, self.layers = configuration, fused_layers(configuration)
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = threads, 1

    def session(self, op: str, x: np.ndarray) -> Any:
        import onnx_graph

        model = onnx_graph.build(self.layers, op, len(x), self.configuration.input_size)
        return self.runtime.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])

    def function(self, op, x):
        session = self.session(op, x)
        if op == "forward":
            return lambda x: tuple(session.run(None, {"x": x}))
        return lambda x: session.run(None, {"x": x})[0]


class OnnxRuntimeBound(OnnxRuntime):
    """The same with I/O binding: input and outputs live in arrays that are bound once."""

    def function(self, op, x):
        session = self.session(op, x)
        binding = session.io_binding()
        bound = x
        source = self.runtime.OrtValue.ortvalue_from_numpy(bound)
        binding.bind_ortvalue_input("x", source)
        names = [output.name for output in session.get_outputs()]
        arrays = [np.empty((len(x), x.shape[1]) if name == "y" else len(x), np.float32) for name in names]
        for name, array in zip(names, arrays, strict=True):
            binding.bind_ortvalue_output(name, self.runtime.OrtValue.ortvalue_from_numpy(array))
        results = tuple(arrays) if op == "forward" else arrays[0]

        def call(x):
            if x is not bound:
                source.update_inplace(x)
            session.run_with_iobinding(binding)
            return results

        return call


class OpenVino(Peer):
    """Latency hint, float32, input and outputs shared with NumPy arrays."""

    chunks = True

    def __init__(self, configuration: Configuration, threads: int) -> None:
        import onnx  # noqa: F401  (says here what is missing)
        import openvino

        self.openvino = openvino
        self.configuration, self.layers = configuration, fused_layers(configuration)
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }

    def function(self, op, x):
        import onnx_graph

        model = onnx_graph.build(self.layers, op, len(x), self.configuration.input_size)
        core = self.openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", self.options)
        request = compiled.create_infer_request()
        bound = x
        request.set_input_tensor(self.openvino.Tensor(bound, shared_memory=True))
        outputs = tuple(request.get_output_tensor(i).data for i in range(len(compiled.outputs)))
        results = outputs if op == "forward" else outputs[0]

        def call(x):
            if x is not bound:
                bound[:] = x
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
    "flowjax": Flowjax,
}
# The flow libraries on PyTorch; flowjax, compiled as a whole, is as fast as hand-written JAX.
TORCH_FLOW_LIBRARIES = ("zuko", "nflows", "normflows")
PACKAGES = [
    "numpy",
    "nvpflow",
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "jax",
    "optax",
    *TORCH_FLOW_LIBRARIES,
    "flowjax",
]
