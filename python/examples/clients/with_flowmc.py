"""flowMC (adaptive MCMC in JAX): its training loop with a flow of nvpflow beside that with its own RealNVP.

Needs ``pip install flowMC``. Its loss is the mean of ``vmap`` over the log-density of a row, and stays as it is. The
rows are those of its dual moon, drawn by Metropolis' algorithm. ``--full`` takes 100 epochs of one step.
"""

from __future__ import annotations

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import nvpflow
import nvpflow.jax as nj
import optax
from flowMC.resource.model.nf_model.base import NFModel
from flowMC.resource.model.nf_model.realNVP import RealNVP


# --- the adapter
class NvpModel(NFModel):
    parameters: dict
    _n_features: int
    _data_mean: jax.Array
    _data_cov: jax.Array
    spec: nvpflow.FlowSpec = eqx.field(static=True)

    def __init__(self, size, seed, **options):
        flow = nvpflow.build(size, seed=seed, **options)
        self.parameters, self.spec, self._n_features = nj.parameters(flow), flow.spec, size
        self._data_mean, self._data_cov = jnp.zeros(size), jnp.eye(size)

    def _scale(self):
        return jnp.sqrt(jnp.diag(self.data_cov))

    def forward(self, x, key=None):
        return nj.forward(self.spec, self.parameters, x)

    def inverse(self, x):
        return nj.inverse(self.spec, self.parameters, x, with_log_det=True)

    def sample(self, rng_key, n_samples):
        return nj.sample(self.spec, self.parameters, rng_key, n_samples) * self._scale() + self.data_mean

    def log_prob(self, x):
        scale = self._scale()
        return nj.log_prob(self.spec, self.parameters, (x - self.data_mean) / scale) - jnp.log(scale).sum()

    def print_parameters(self):
        print(self.spec)


# --- the problem

SIZE = 5


def log_density(x: jax.Array) -> jax.Array:
    """Return log p of flowMC's dual moon, but for a constant: a shell with two ends in each of two columns."""
    shell = -0.5 * ((jnp.linalg.norm(x) - 2) / 0.1) ** 2
    ends = [jnp.logaddexp(-0.5 * ((x[i] + 3) / 0.6) ** 2, -0.5 * ((x[i] - 3) / 0.6) ** 2) for i in range(2)]
    return shell + sum(ends)


def draw(key: jax.Array, count: int) -> jax.Array:
    """Return rows [count, SIZE] from chains of their own."""
    start = 2 * jax.random.normal(key, (count, SIZE))

    def step(x, key):
        move, accept = jax.random.split(key)
        proposed = x + 0.08 * jax.random.normal(move, x.shape)
        better = jax.vmap(log_density)(proposed) - jax.vmap(log_density)(x)
        return jnp.where((jnp.log(jax.random.uniform(accept, (count,))) < better)[:, None], proposed, x), None

    return jax.jit(lambda x: jax.lax.scan(step, x, jax.random.split(key, 2000))[0])(start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="100 epochs of one step, as flowMC takes them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    epochs, batch = (100, 5000) if options.full else (15, 1000)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    rows, held_out = draw(keys[0], 5000), draw(keys[1], 2000)
    models = {
        "flowMC's RealNVP": RealNVP(SIZE, 10, 64, keys[2]),
        "nvpflow": NvpModel(SIZE, options.seed, num_flows=10, hidden_sizes=(64,)),
    }
    for name, model in models.items():
        optimizer = optax.adam(1e-3)
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        key, model, state, _ = model.train(keys[2], rows, optimizer, state, 1, batch, verbose=False)  # compiles
        start = time.process_time()
        _, model, _, _ = model.train(key, rows, optimizer, state, epochs, batch, verbose=False)
        took = time.process_time() - start
        mean = float(jax.vmap(model.log_prob)(held_out).mean())
        step = 1e3 * took / epochs * batch / len(rows)
        print(f"{name}: mean log p {mean:.3f} nats on rows set aside, {step:.1f} ms a step")


if __name__ == "__main__":
    main()
