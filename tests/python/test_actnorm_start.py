"""What `fit` sets actnorm layers from: the training rows, layer by layer, where a layer is still all zeros."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import nvpflow
import pytest
from general_oracle import GeneralFlow
from test_lu_linear import LINEAR, coupling, document, reversal

ACTNORM, BACKWARDS = {"kind": "actnorm", "inverse": False}, {"kind": "actnorm", "inverse": True}


def rows(count: int, size: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(12)
    mixed = rng.normal(size=(count, size)) @ rng.normal(size=(size, size))
    return (mixed * np.geomspace(0.5, 2, size) + np.linspace(-2, 3, size)).astype(dtype)


def started(layers: list[dict[str, Any]], x: np.ndarray, **options: Any) -> tuple[nvpflow.Flow, dict[str, np.ndarray]]:
    """A flow after a fit that moves nothing, and the parameters before it."""
    spec = document(x.shape[1], layers, x.dtype.name)
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)), seed=3)
    rng = np.random.default_rng(4)
    values = {
        name: (v + 0.3 * rng.normal(size=v.shape)).astype(v.dtype) if name.startswith("flow") else v
        for name, v in flow.parameters().items()
    }
    flow.set_parameters({**values, **options.pop("values", {})})
    before = flow.parameters()
    flow.fit(x, epochs=1, learning_rate=1e-30, validation=0, weight_decay=0.0, **options)
    return flow, before


def outputs(flow: nvpflow.Flow, x: np.ndarray, layer: int) -> np.ndarray:
    """What the oracle has behind `layer`."""
    spec = json.loads(flow.spec._to_full_json())
    oracle = GeneralFlow(spec, {name: v.astype(np.float64) for name, v in flow.parameters().items()})
    oracle.layers = oracle.layers[: layer + 1]
    return oracle.forward(x.astype(np.float64))[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layers_output_has_mean_0_and_deviation_1(dtype: str) -> None:
    x = rows(3000, 6, dtype)
    layers = [ACTNORM, coupling("odd"), reversal(6), LINEAR, BACKWARDS, coupling("even"), coupling("odd"), ACTNORM]
    flow, before = started(layers, x)
    for layer in (0, 4, 7):
        out = outputs(flow, x, layer)
        np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4 if dtype == "float32" else 1e-12)
        np.testing.assert_allclose(out.std(axis=0), 1, rtol=1e-4 if dtype == "float32" else 1e-12)
    for name, value in flow.parameters().items():
        if not name.startswith("actnorm"):
            np.testing.assert_allclose(value, before[name], rtol=0, atol=1e-12)


def test_behind_a_standardize_layer_and_for_float64_rows() -> None:
    x = rows(2000, 5, "float64")
    spec = document(5, [{"kind": "standardize"}, coupling("odd"), ACTNORM], "float32")
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    flow.fit(x, epochs=1, learning_rate=1e-30, validation=0, weight_decay=0.0)
    out = outputs(flow, x, 2)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(axis=0), 1, rtol=1e-4)


def test_under_contexts() -> None:
    """The networks before a layer see each row's own context."""
    x = rows(2000, 4)
    c = np.random.default_rng(5).normal(3, 2, size=(2000, 2)).astype(np.float32)
    spec = document(4, [ACTNORM, coupling("odd"), coupling("even"), ACTNORM], "float32")
    spec |= {"context_size": 2, "standardize_context": True}
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)), seed=3)
    rng = np.random.default_rng(4)
    values = {
        name: (v + rng.normal(size=v.shape)).astype(v.dtype) if name.startswith("flow") else v
        for name, v in flow.parameters().items()
    }
    flow.set_parameters(values)
    flow.fit(x, context=c, epochs=1, learning_rate=1e-30, validation=0, weight_decay=0.0)
    oracle = GeneralFlow(spec, {name: v.astype(np.float64) for name, v in flow.parameters().items()})
    z, _ = oracle.forward(x.astype(np.float64), c.astype(np.float64))
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "of_rows"), [("float32", "float32"), ("float64", "float64"), ("float32", "float64")])
def test_initialize_from_does_what_fit_does(dtype: str, of_rows: str) -> None:
    """The layer in front, the context's statistics and every actnorm layer, whatever they were."""
    x = rows(2000, 4, of_rows)
    c = np.random.default_rng(5).normal(3, 2, size=(2000, 2)).astype(dtype)
    layers = [{"kind": "standardize"}, coupling("odd"), ACTNORM, coupling("even"), BACKWARDS]
    spec = document(4, layers, dtype) | {"context_size": 2, "standardize_context": True}
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)), seed=3)
    rng = np.random.default_rng(4)
    values = {
        name: (v + rng.normal(size=v.shape)).astype(v.dtype) if name.startswith(("flow", "actnorm")) else v
        for name, v in flow.parameters().items()
    }
    flow.set_parameters(values)
    assert flow.initialize_from(x, context=c) == {}
    after = flow.parameters()
    np.testing.assert_allclose(after["context.mean"], c.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.exp(after["context.log_std"]), c.std(axis=0), rtol=1e-5)
    oracle = GeneralFlow(spec, {name: v.astype(np.float64) for name, v in after.items()})
    for end in (3, 5):
        oracle.layers = json.loads(json.dumps(spec["layers"]))[:end]
        z, _ = oracle.forward(x.astype(np.float64), c.astype(np.float64))
        np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-4)
    for name, value in after.items():
        if name.startswith("flow"):
            np.testing.assert_array_equal(value, values[name])
    again = nvpflow.Flow(flow.spec)
    again.set_parameters({**values, **{name: np.zeros_like(v) for name, v in values.items() if name[:4] != "flow"}})
    again.fit(x, context=c, epochs=1, learning_rate=1e-30, validation=0, weight_decay=0.0, standardize="mean")
    for name, value in again.parameters().items():
        np.testing.assert_allclose(value, after[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_initialize_from_needs_the_context_and_something_to_set() -> None:
    x, c = rows(50, 3), np.zeros((50, 2))
    flow = nvpflow.build(3, 1, (4,), context_size=2)
    for wrong, message in ((None, "context is missing, expected"), (c[:9], r"context has shape \(9, 2\)")):
        with pytest.raises(ValueError, match=message):
            flow.initialize_from(x, context=wrong)
    with pytest.raises(ValueError, match="the flow does not begin with a standardize layer, which"):
        nvpflow.build(3, 1, (4,), standardize=False).initialize_from(x)
    nvpflow.build(3, 1, (4,), standardize=False, actnorm=True).initialize_from(x)


def test_a_layer_that_is_not_all_zeros_stays() -> None:
    x = rows(500, 4)
    given = np.array([0, 0, 0.5, 0], np.float32)
    flow, _ = started([ACTNORM, coupling(), ACTNORM], x, values={"actnorm_0.shift": given})
    values = flow.parameters()
    np.testing.assert_allclose(values["actnorm_0.log_scale"], 0, atol=1e-12)
    np.testing.assert_allclose(values["actnorm_0.shift"], given, atol=1e-12)
    assert np.any(values["actnorm_2.shift"] != 0)
    np.testing.assert_allclose(outputs(flow, x, 2).std(axis=0), 1, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:x. no coupling transforms")  # of one coupling, and of rows far from normal
def test_only_training_rows_count() -> None:
    x = rows(400, 3)
    far = np.concatenate([x, x[:50] + 1000])
    spec = nvpflow.FlowSpec.from_json(json.dumps(document(3, [ACTNORM, coupling()], "float32")))
    flow = nvpflow.Flow(spec)
    flow.fit(x, validation=far, epochs=1, learning_rate=1e-30, weight_decay=0.0)
    np.testing.assert_allclose(outputs(flow, x, 0).std(axis=0), 1, rtol=1e-4)


def test_of_many_rows_65536_are_looked_at() -> None:
    x = rows(80_000, 2)
    flow, _ = started([ACTNORM, coupling(hidden=())], x, batch_size=80_000)
    out = outputs(flow, x, 0)
    assert not np.allclose(out.std(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=0.01)
    np.testing.assert_allclose(out.std(axis=0), 1, rtol=0.01)


def test_a_feature_that_is_constant_there_is_only_moved() -> None:
    x = rows(1, 3)  # one row tells nothing of a column, so that a fit takes it
    with pytest.warns(nvpflow.DataWarning, match="1 row is few"):
        flow, _ = started([ACTNORM, coupling(), BACKWARDS], x)
    for layer in (0, 2):
        np.testing.assert_allclose(flow.parameters()[f"actnorm_{layer}.log_scale"], 0, atol=1e-12)
    np.testing.assert_allclose(outputs(flow, x, 0), 0, atol=1e-5)
    np.testing.assert_allclose(outputs(flow, x, 2), 0, atol=1e-5)


def test_a_second_fit_goes_on_from_what_the_first_one_left() -> None:
    x = rows(600, 4)
    flow, _ = started([ACTNORM, coupling()], x)
    first = flow.parameters()["actnorm_0.shift"].copy()
    flow.fit(2 * x, epochs=1, learning_rate=1e-30, weight_decay=0.0, validation=0)
    np.testing.assert_allclose(flow.parameters()["actnorm_0.shift"], first, atol=1e-12)
