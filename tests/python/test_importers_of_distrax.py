"""nvpflow.importers.from_distrax: the flow that is declared computes what distrax does."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import nvpflow
import pytest
from nvpflow.importers import ParityError, from_distrax
from oracle import unit_data

jax = pytest.importorskip("jax", reason="JAX is not installed")


def _distrax():
    """Import distrax, which newer versions of JAX lack a name for."""
    import jax.interpreters.xla as xla
    from jax._src import core

    if not hasattr(xla, "pytype_aval_mappings"):
        xla.pytype_aval_mappings = core.pytype_aval_mappings
    return pytest.importorskip("distrax", reason="distrax is not installed")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    distrax = _distrax()

L = nvpflow.layers
D, HIDDEN = 4, (12, 10)
MASKS = np.array([[True, False, True, False], [False, True, True, False], [True, True, False, True]])


def drawn(outputs, context=0, seed=0):
    """The dense layers of a conditioner for each mask."""
    rng, sizes = np.random.default_rng(seed), [D + context, *HIDDEN, D * outputs]
    return [
        [(rng.normal(size=(i, o)) * 0.4, rng.normal(size=o) * 0.2) for i, o in itertools.pairwise(sizes)] for _ in MASKS
    ]


def conditioner(net, outputs, context):
    def call(x):
        h = x if context is None else jax.numpy.concatenate([x, context])
        for w, b in net[:-1]:
            h = jax.numpy.tanh(h @ w + b)
        w, b = net[-1]
        return (h @ w + b).reshape(D, outputs)

    return call


def maker(bijector, outputs, inverse):
    def make(weights, context=None):
        layers = [
            distrax.MaskedCoupling(mask, conditioner(net, outputs, context), bijector)
            for mask, net in zip(MASKS, weights, strict=True)
        ]
        chain = distrax.Chain(layers[::-1] if inverse else layers)  # it applies its last bijector first
        base = distrax.Independent(distrax.Normal(jax.numpy.zeros(D), jax.numpy.ones(D)), 1)
        return distrax.Transformed(base, distrax.Inverse(chain) if inverse else chain)

    return make


def declared(transform, inverse):
    """The layers of maker(), from data to latent."""
    return [L.Coupling(~mask, transform, L.MLP(HIDDEN, "tanh"), inverse=not inverse) for mask in MASKS]


def spline(bins, low, high, slopes):
    return lambda p: distrax.RationalQuadraticSpline(p, low, high, boundary_slopes=slopes)


SPLINES = {
    "unconstrained": L.Spline(5, interval=(-2, 3), boundary="free", tails="slope", min_bin_width=2e-5,
                              min_bin_height=2e-5, min_derivative=1e-4),
    "identity": L.Spline(5, interval=(-2, 3), min_bin_width=2e-5, min_bin_height=2e-5, min_derivative=1e-4),
}  # fmt: skip


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", ["affine", *SPLINES])
def test_couplings_of_distrax(kind, inverse):
    if kind == "affine":
        outputs, transform = 2, L.Affine("identity")
        bijector = lambda p: distrax.ScalarAffine(shift=p[..., 0], log_scale=p[..., 1])  # noqa: E731
    else:
        outputs, transform, bijector = 16, SPLINES[kind], spline(5, -2.0, 3.0, kind)
    weights, make = drawn(outputs), maker(bijector, outputs, inverse)
    layers = declared(transform, inverse)
    flow = from_distrax(layers, weights, make, input_size=D, dtype="float64")
    assert flow.import_report.verdict == "exact", flow.import_report
    x = unit_data(32, D, 4, "float64")
    with jax.enable_x64(True):
        theirs = np.asarray(make(weights).log_prob(jax.numpy.asarray(x)[0]))
    assert flow.log_prob(x)[0] == pytest.approx(theirs, rel=1e-10)
    with pytest.raises(ParityError):
        from_distrax(layers[::-1], weights, make, input_size=D)
    assert from_distrax(layers, weights, input_size=D).import_report.verdict == "unchecked"


def test_a_context_goes_behind_the_features():
    bijector = lambda p: distrax.ScalarAffine(shift=p[..., 0], log_scale=p[..., 1])  # noqa: E731
    weights = drawn(2, context=3)
    layers = [*declared(L.Affine("identity"), True), L.Permutation([0, 1, 2, 3])]
    flow = from_distrax(layers, weights, maker(bijector, 2, True), input_size=D, context_size=3, dtype="float64")
    assert flow.import_report.verdict == "exact", flow.import_report


def test_what_is_declared_wrongly_is_refused():
    layers, weights = declared(L.Affine("identity"), True), drawn(2)
    for given, arrays, message in (
        (layers, weights[:2], r"weights is of 2 couplings, expected an entry for each coupling of layers"),
        (layers[:2], weights, r"weights is of 3 couplings, expected 2, as layers has"),
        (layers, drawn(3), r"weights\[0\] is of kernels \[\(4, 12\), .*expected \[\(4, 12\)"),
        ([L.ActNorm(), *layers], weights, r"layers\[0\] is an ActNorm, expected a Coupling or Permutation"),
    ):
        with pytest.raises(ValueError, match=message):
            from_distrax(given, arrays, input_size=D)
