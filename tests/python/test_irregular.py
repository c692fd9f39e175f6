"""Flows whose couplings differ, or come in an order of their own, wherever a flow can be taken: one test a place."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle

import numpy as np
import nvpflow
import pytest
from nvpflow import cli
from oracle import Coupling, OracleFlow, Standardize, assert_within_budget, random_parameters, unit_data

# Smooth activations: a gradient in float32 has no kinks to step over.
FLOWS = {
    # Sizes, activations and bounds differ; the halves alternate.
    "couplings": (
        5,
        [
            Standardize(),
            Coupling(False, (8,), "silu", 1.0),
            Coupling(True, (5, 7), "tanh", 2.0),
            Coupling(False, (), "silu", 0.5),
        ],
    ),
    # All couplings are alike; their order is not that of `build`, and the standardize layer stands among them.
    "order": (
        4,
        [
            Coupling(True, (6,), "gelu", 1.5),
            Coupling(True, (6,), "gelu", 1.5),
            Standardize(),
            Coupling(False, (6,), "gelu", 1.5),
        ],
    ),
    # Both, and a standardize layer at either end.
    "both": (
        3,
        [
            Standardize(),
            Coupling(True, (33,), "softplus", 1.0),
            Coupling(True, (4, 4, 4), "sigmoid", 1.0),
            Standardize(),
        ],
    ),
}


def json_of(layer: Coupling | Standardize) -> dict[str, object]:
    if isinstance(layer, Standardize):
        return {"kind": "standardize"}
    return {
        "kind": "coupling",
        "swapped": layer.swapped,
        "hidden_sizes": list(layer.hidden_sizes),
        "activation": layer.activation,
        "scale_bound": layer.scale_bound,
    }


@pytest.fixture(params=FLOWS)
def layers(request):
    return FLOWS[request.param]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def oracle(layers, dtype):
    columns, listed = layers
    oracle = OracleFlow(columns, listed)
    random = random_parameters(oracle.shapes(), 7, 0.7)
    oracle.set_parameters({name: value.astype(dtype) for name, value in random.items()})
    return oracle


@pytest.fixture
def flow(oracle, dtype):
    listed = [json_of(layer) for layer in oracle.layers]
    spec = {"input_size": oracle.input_size, "dtype": dtype, "layers": listed}
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    flow.set_parameters({name: value.astype(dtype) for name, value in oracle.parameters.items()})
    return flow


@pytest.fixture
def x(oracle, dtype):
    return unit_data(400, oracle.input_size, 1, dtype)


def flat(gradients):
    return np.concatenate([gradient.ravel() for gradient in gradients.values()])


def assert_is_the_flow(other, flow, oracle, x) -> None:
    """The same spec and weights, and the oracle's densities."""
    assert other == flow
    assert other is not flow
    assert_within_budget(other.log_probability(x), oracle.log_prob(x), flow.spec.dtype, "log p")


# ------------------------------------------------------------------------------------------------------- what it does


def test_values_and_gradients(flow, oracle, x, dtype) -> None:
    for actual, expected in zip(flow.forward(x), oracle.forward(x), strict=True):
        assert_within_budget(actual, expected, dtype, "forward")
    for actual, expected in zip(flow.inverse(x, with_log_det=True), oracle.inverse(x), strict=True):
        assert_within_budget(actual, expected, dtype, "inverse")
    nll, gradient = flow.nll_gradient(x)
    expected_nll, expected = oracle.nll_gradient(x)
    assert_within_budget(np.asarray(nll, dtype), expected_nll, dtype, "nll")
    assert_within_budget(gradient, flat(expected), dtype, "gradient")


def test_sample_is_the_inverse_of_the_oracle(flow, oracle, dtype) -> None:
    drawn = flow.sample(50, seed=3, dtype=dtype)
    assert_within_budget(drawn, oracle.inverse(flow._noise(50, 3))[0], dtype, "samples")


def test_training_lowers_the_loss(flow, x) -> None:
    before = flow.nll(x)
    history = flow.fit(x, validation=None, epochs=3, progress=False)
    assert flow.nll(x) < before
    assert len(history) == 3


# ------------------------------------------------------------------------------------------------------- copies of it


def test_copies_pickles_and_files(flow, oracle, x, tmp_path) -> None:
    flow.save(tmp_path / "model.safetensors")
    for other in (
        copy.copy(flow),
        copy.deepcopy(flow),
        flow.to("cpu"),
        pickle.loads(pickle.dumps(flow)),
        nvpflow.load(tmp_path / "model.safetensors"),
        nvpflow.load(tmp_path / "model.safetensors", spec=flow.spec),
    ):
        assert_is_the_flow(other, flow, oracle, x)


def test_specs_go_through_json_pickles_and_sets(flow) -> None:
    for other in (nvpflow.FlowSpec.from_json(flow.spec.to_json()), pickle.loads(pickle.dumps(flow.spec))):
        assert other == flow.spec
        assert {other} == {flow.spec}


def test_astype_keeps_every_layer(flow, oracle, x, dtype) -> None:
    other = "float64" if dtype == "float32" else "float32"
    converted = flow.astype(other)
    assert converted.spec.dtype == other
    of_flow, of_converted = json.loads(flow.spec.to_json()), json.loads(converted.spec.to_json())
    assert of_converted == of_flow | {"dtype": other}
    log_p = converted.log_probability(x.astype(other))
    assert_within_budget(log_p.astype("float32"), oracle.log_prob(x), "float32", "log p")
    if dtype == "float32":
        assert converted.astype(dtype) == flow


# --------------------------------------------------------------------------------------------------- what it is said


def test_reprs_say_what_the_layers_are(flow, oracle) -> None:
    assert repr(flow) == f"Flow({flow.spec!r}, {flow.num_parameters:,} parameters)"
    bounds = [f"{layer.scale_bound:g}" for layer in oracle.layers if isinstance(layer, Coupling)]
    table = flow._repr_html_()
    assert f"<td>{' / '.join(dict.fromkeys(bounds))}</td>" in table
    for layer in oracle.layers:
        if isinstance(layer, Coupling):
            assert layer.activation in repr(flow)
            assert layer.activation in table
            assert ", ".join(map(str, layer.hidden_sizes)) in table


def test_certificates_are_those_of_the_oracle(flow, oracle, x, dtype) -> None:
    found = flow.certify(x, jacobian_rows=5)
    assert found.verdict == "accurate"
    assert found.flow == repr(flow)
    error = np.abs(flow.log_probability(x).astype(np.float64) - oracle.log_prob(x))
    assert found.log_prob.absolute == pytest.approx(error.max(), rel=1e-6, abs=1e-14)
    assert found.round_trip.relative <= found.round_trip_bound
    assert found.log_det.relative <= found.promised


def test_a_flow_in_need_of_advice_hears_of_every_bound(layers) -> None:
    columns, listed = layers
    spec = {"input_size": columns, "dtype": "float32", "layers": [json_of(layer) for layer in listed]}
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    random = random_parameters({name: value.shape for name, value in flow.parameters().items()}, 1, 60.0)
    flow.set_parameters({name: value.astype(np.float32) for name, value in random.items()})
    found = flow.certify(unit_data(200, columns, 2, "float32"), tolerance=1e-5)
    assert found.verdict == "unreliable"
    bounds = dict.fromkeys(f"{layer.scale_bound:g}" for layer in listed if isinstance(layer, Coupling))
    assert any(f"scale_bound (now {' / '.join(bounds)})" in sentence for sentence in found.advice)


def test_only_a_layer_in_front_is_set_from_rows(flow, oracle, x) -> None:
    if isinstance(oracle.layers[0], Standardize):
        flow.initialize_from(x)
        assert_within_budget(flow.parameters()["standardize_0.mean"], x.mean(axis=0), flow.spec.dtype, "mean")
        return
    with pytest.raises(ValueError, match="standardize"):
        flow.initialize_from(x)
    with pytest.raises(ValueError, match="does not begin with a standardize layer"):
        flow.fit(x, standardize="robust", epochs=1)


def test_the_command_line_scores_checks_and_samples(flow, oracle, x, dtype, tmp_path, capsys) -> None:
    flow.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "data.npy", x)
    model, data = str(tmp_path / "model.safetensors"), str(tmp_path / "data.npy")
    assert cli.main(["score", model, data, "-o", str(tmp_path / "scores.npy")]) == 0
    assert_within_budget(np.load(tmp_path / "scores.npy"), oracle.log_prob(x), dtype, "scores")
    assert cli.main(["check", model, data]) == 0
    assert "Certificate: accurate" in capsys.readouterr().out
    assert cli.main(["info", model]) == 0
    assert repr(flow) in capsys.readouterr().out
    assert cli.main(["info", "--json", model]) == 0
    assert json.loads(capsys.readouterr().out)["spec"] == json.loads(flow.spec.to_json())


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="Matplotlib is not installed")
def test_reports(flow, x, tmp_path) -> None:
    flow.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "data.npy", x)
    arguments = ["report", str(tmp_path / "model.safetensors"), str(tmp_path / "data.npy")]
    assert cli.main([*arguments, "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "400 rows: accurate" in page
    assert "log p against float64" in page


# ------------------------------------------------------------------------------------------------- other libraries


def test_pytorch(flow, oracle, x, dtype) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from nvpflow.torch import FlowDistribution, FlowModule

    module = FlowModule(flow).requires_grad_()
    rows = torch.from_numpy(x).requires_grad_()
    loss = -module.log_prob(rows).mean()
    loss.backward()
    expected_nll, expected = oracle.nll_gradient(x)
    assert_within_budget(loss.detach().numpy(), expected_nll, dtype, "loss")
    for parameter, (name, gradient) in zip(module.parameters(), expected.items(), strict=True):
        assert_within_budget(parameter.grad.numpy(), gradient, dtype, name)
    z, _ = oracle.forward(x)
    by_rows, _ = oracle.vjp(x, z / len(x), np.full(len(x), -1 / len(x)))
    assert_within_budget(rows.grad.numpy(), by_rows, dtype, "rows")
    assert "".join(repr(flow.spec).split()) in "".join(repr(module).split())  # PyTorch indents it
    assert module.to_flow() == flow
    wide = module.double()
    assert_within_budget(
        wide.log_prob(torch.from_numpy(x).double()).detach().numpy(), oracle.log_prob(x), "float64", "as float64"
    )

    distribution = FlowDistribution(FlowModule(flow))
    assert distribution.event_shape == (oracle.input_size,)
    assert_within_budget(
        distribution.log_prob(torch.from_numpy(x)).detach().numpy(), oracle.log_prob(x), dtype, "distribution"
    )
    assert distribution.rsample((4,)).shape == (4, oracle.input_size)


def test_jax(flow, oracle, x, dtype) -> None:
    jax = pytest.importorskip("jax", minversion="0.5", reason="JAX is not installed")
    import nvpflow.jax as nj

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        parameters = nj.parameters(flow)

        def nll(parameters):
            return -nj.log_prob(flow.spec, parameters, x).mean()

        value, gradient = jax.jit(jax.value_and_grad(nll))(parameters)
        expected_nll, expected = oracle.nll_gradient(x)
        assert_within_budget(np.asarray(value), expected_nll, dtype, "nll")
        for name, of_name in expected.items():
            assert_within_budget(np.asarray(gradient[name]), of_name, dtype, name)
        assert_within_budget(np.asarray(nj.forward(flow.spec, parameters, x)[0]), oracle.forward(x)[0], dtype, "z")
    finally:
        jax.config.update("jax_enable_x64", before)
