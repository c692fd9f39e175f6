"""Flows that the tests of bases, bounds and samples share: random ones with their oracles, and the identity."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import nvpflow
from general_oracle import GeneralFlow, Spec, scrambled
from nvpflow.layers import MLP, Additive, Coupling

DTYPES = ("float32", "float64")
# Layers of two columns that are the identity, its bits and all, where their weights are zeros.
ADDITIVE = [Coupling(name, Additive(), MLP((4,))) for name in ("second_half", "first_half")]


def identity(base: Any, columns: int = 2, dtype: str = "float32", **own: Any) -> nvpflow.Flow:
    """A flow that is its base, whose tensors are given without "base." in front."""
    flow = nvpflow.build(columns, layers=ADDITIVE, base=base, dtype=dtype)
    values = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    flow.set_parameters(values | {f"base.{name}": np.asarray(value, dtype) for name, value in own.items()})
    return flow


def flow_and_oracle(spec: Spec, rng: np.random.Generator) -> tuple[nvpflow.Flow, GeneralFlow]:
    """A flow of a spec with random weights, rounded to its dtype, and the oracle that holds the same ones."""
    dtype = spec["dtype"]
    parameters = {name: v.astype(dtype).astype(np.float64) for name, v in scrambled(spec, rng, 0.3).items()}
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    flow.set_parameters({name: value.astype(dtype) for name, value in parameters.items()})
    return flow, GeneralFlow(spec, parameters)


def contexts_of(spec: Spec, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """A context for each of so many rows, where the flow has one, as `context=`."""
    size = spec.get("context_size", 0)
    return {"context": rng.normal(size=(rows, size)).astype(spec["dtype"])} if size else {}
