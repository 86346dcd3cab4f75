"""The contender of `speed.py` that runs in JAX: NumPyro, which is optional."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from contenders import LATENTS, LEARNING_RATE, Job, Weights
from jax import Array, lax, random
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO


class InNumPyro:
    """An epoch is one call: shuffling, binarizing and a scan over the batches are compiled."""

    def __init__(self, job: Job) -> None:
        if job.precision != "highest":
            raise NotImplementedError("NumPyro runs at the highest precision only")
        jax.config.update("jax_platforms", job.device)
        jax.config.update("jax_default_matmul_precision", "highest")
        self.initial = job.initial()
        self.grey = jnp.asarray(job.images())
        self.batch_size = job.batch_size
        loss = Trace_ELBO() if job.particles == 1 else RenyiELBO(0, num_particles=job.particles)
        self.svi = SVI(self.model, self.guide, numpyro.optim.Adam(LEARNING_RATE), loss)
        self.key, key = random.split(random.key(0))
        self.state = self.svi.init(key, self.grey[: job.batch_size])
        self.run = jax.jit(self._epoch, donate_argnums=0)

    def _layer(self, name: str, x: Array) -> Array:
        weight, bias = (numpyro.param(f"{name}.{k}", self.initial[f"{name}.{k}"]) for k in _PARTS)
        return x @ weight.T + bias

    def model(self, x: Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENTS), 1.0).to_event(1))
            hidden = jax.nn.softplus(self._layer("decoder.0", z))
            logits = self._layer("decoder.2", hidden)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Array) -> None:
        standardized = (x - self.initial["mean"]) / self.initial["std"]
        hidden = jax.nn.softplus(self._layer("encoder.0", standardized))
        loc, log_scale = jnp.split(self._layer("encoder.2", hidden), 2, axis=-1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    def _epoch(self, state: Any, grey: Array, key: Array) -> Any:
        key, key_order = random.split(key)
        order = random.permutation(key_order, len(grey))
        steps = len(grey) // self.batch_size

        def step(carried: tuple[Any, Array], index: Array) -> tuple[tuple[Any, Array], Array]:
            state, key = carried
            key, key_x = random.split(key)
            batch = grey[index]
            x = (random.uniform(key_x, batch.shape) < batch).astype(jnp.float32)
            state, loss = self.svi.update(state, x)
            return (state, key), loss

        whole = order[: steps * self.batch_size].reshape(steps, self.batch_size)
        carried, _ = lax.scan(step, (state, key), whole)
        if len(order) > whole.size:
            carried, _ = step(carried, order[whole.size :])
        return carried[0]

    def epoch(self) -> None:
        self.key, key = random.split(self.key)
        self.state = jax.block_until_ready(self.run(self.state, self.grey, key))

    def weights(self) -> Weights:
        trained = self.svi.get_params(self.state).items()
        return self.initial | {name: np.array(value) for name, value in trained}


_PARTS = ("weight", "bias")
