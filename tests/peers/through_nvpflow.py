"""A pytest plugin: other libraries' layers compute by nvpflow while their own tests run (see run.py).

Each layer that `nvpflow.importers` can read is imported when it is called, and the flow gives the numbers. Where the
importer refuses it, the layer computes as it is, and the reason is noted. So a test that passes has compared nvpflow
with what the library's authors expect, where the table of run.py counts calls for it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import nvpflow
import pytest
import torch
from nvpflow import importers

LIBRARY = os.environ["NVPFLOW_PEER"]  # empty: as it is
RESULTS = os.environ["NVPFLOW_PEER_RESULTS"]


# Of a layer with so many features, and so many numbers of a context (0: none).
FlowOf = Callable[[Any, int, int], nvpflow.Flow]


class Tally:
    """What became of the calls of each test."""

    def __init__(self) -> None:
        self.test = ""
        self.inside = False  # an imported layer's own code runs, for the comparison with it
        self.served: collections.Counter[str] = collections.Counter()
        self.refused: dict[str, set[str]] = collections.defaultdict(set)
        self.outcome: dict[str, str] = {}

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


tally = Tally()


def through(method: Callable[..., Any], forward: bool, flow_of: FlowOf) -> Any:
    """Return the method of a layer that nvpflow computes. forward: it goes the way that nvpflow calls forward."""

    @functools.wraps(method)
    def computed(self: Any, inputs: Any, context: Any = None, *rest: Any, **more: Any) -> Any:
        def own() -> Any:
            given = () if context is None else (context,)
            return method(self, inputs, *given, *rest, **more)

        if tally.inside:
            return own()
        with tally.guard():
            try:
                if not torch.is_tensor(inputs) or inputs.dim() != 2:
                    raise ValueError("its rows are no vectors: flows of images have no counterpart here")
                flow = flow_of(self, inputs.shape[1], 0 if context is None else context.shape[-1])
            except (TypeError, ValueError) as error:
                tally.refused[tally.test].add(f"{type(self).__name__}: {error}")
                return own()
        tally.served[tally.test] += 1
        rows = inputs.detach().numpy().astype("float64")
        given = None if context is None else context.detach().numpy().astype("float64")
        transform = flow.forward if forward else functools.partial(flow.inverse, with_log_det=True)
        return tuple(torch.from_numpy(out).to(inputs.dtype) for out in transform(rows, context=given))

    return computed


def all_below(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from all_below(kind)


def adapt(base: type, flow_of: FlowOf, *, forward: bool) -> None:
    """Make every layer below a class compute by nvpflow. forward: its forward goes from data to latents."""
    for kind in set(all_below(base)):
        for name, way in (("forward", forward), ("inverse", not forward)):
            if name in vars(kind):
                setattr(kind, name, through(vars(kind)[name], way, flow_of))


def adapt_nflows() -> None:
    from nflows import transforms
    from nflows.distributions import StandardNormal, uniform
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    class BoxUniform(uniform.BoxUniform):
        def log_prob(self, value: torch.Tensor, context: Any = None) -> torch.Tensor:  # a Flow passes one
            return super().log_prob(value)

    def identity(features: int, context: int) -> transforms.Transform:
        net = functools.partial(ResidualNet, hidden_features=1, num_blocks=1, context_features=context or None)
        coupling = transforms.AdditiveCouplingTransform(torch.arange(features) < max(1, features // 2), net)
        with torch.no_grad():
            for parameter in coupling.parameters():
                parameter.zero_()
        return coupling

    def flow_of(transform: Any, features: int, context: int) -> nvpflow.Flow:
        refuse_what_the_batch_sets(transform)
        whole = transform
        if not any(hasattr(part, "transform_features") for part in transform.modules()):  # importers want a coupling
            whole = transforms.CompositeTransform([transform, identity(features, context)])
        on_the_unit_cube = any(getattr(part, "tails", "linear") is None for part in transform.modules())
        unit = torch.zeros(features), torch.ones(features)
        base = BoxUniform(*unit) if on_the_unit_cube else StandardNormal([features])
        return importers.from_nflows(Flow(whole, base), dtype="float64")

    adapt(transforms.Transform, flow_of, forward=True)


def adapt_normflows() -> None:
    import normflows

    def flow_of(flow: Any, features: int, context: int) -> nvpflow.Flow:
        refuse_what_the_batch_sets(flow)
        base = normflows.distributions.DiagGaussian(features, trainable=False)
        if context:
            return importers.from_normflows(normflows.ConditionalNormalizingFlow(base, [flow]), dtype="float64")
        mask = (torch.arange(features) < features // 2).float()
        identity = normflows.flows.MaskedAffineFlow(mask, normflows.nets.MLP([features, 1, features], init_zeros=True))
        return importers.from_normflows(normflows.NormalizingFlow(base, [flow, identity]), dtype="float64")

    adapt(normflows.flows.Flow, flow_of, forward=False)


def refuse_what_the_batch_sets(layer: torch.nn.Module) -> None:
    """Leave to a layer's own code what it does to the batch at hand."""
    for part in layer.modules():
        if type(part).__name__ == "BatchNorm" and part.training:
            raise ValueError("in training it normalizes by the batch at hand")
        done = getattr(part, "initialized", getattr(part, "data_dep_init_done", True))
        if not bool(done):
            raise ValueError("its first batch sets it")


def adapt_zuko() -> None:
    """NICE and NSF of zuko's tests as flows of nvpflow, which train through PyTorch."""
    import flows_for_zuko
    import zuko

    flows_for_zuko.note = lambda: tally.served.update([tally.test])
    zuko.flows.NICE, zuko.flows.NSF = flows_for_zuko.NICE, flows_for_zuko.NSF


def pytest_configure() -> None:
    if LIBRARY:
        {"nflows": adapt_nflows, "normflows": adapt_normflows, "zuko": adapt_zuko}[LIBRARY]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    tally.test = item.nodeid.rpartition("/")[2]
    torch.manual_seed(0)  # the same rows and weights as without nvpflow
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        tally.outcome[tally.test] = "failed" if report.failed else report.outcome


def pytest_sessionfinish() -> None:
    found = {
        test: {"outcome": outcome, "served": tally.served[test], "refused": sorted(tally.refused[test])}
        for test, outcome in tally.outcome.items()
    }
    with open(RESULTS, "w") as file:
        json.dump(found, file, indent=1)
