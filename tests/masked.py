"""Data with missing values, and the linear Gaussian model whose posterior of such rows is exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from conftest import example_values
from pyro.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import MultivariateNormal as Normal

import pyro_vae
from pyro_vae.diagnostics import suite
from pyro_vae.models.linear_gaussian import LinearGaussian

# The smallest studies that test each kind of check
EFFORT = suite.Effort(
    held_out=30,
    importance_samples=40,
    refined=5,
    refine_steps=5,
    simulations=60,
    draws=19,
    annealed=10,
    anneal_steps=5,
    anneal_chains=2,
    chain_rows=2,
    chains=2,
    chain_warmup=4,
    chain_draws=6,
    aggregate=40,
)


class MaskedOracle(LinearGaussian):
    """z ~ N(0, I), x ~ N(W z + μ, σ² I), and q(z|x) = p(z|x_observed)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        noise = self.likelihood_module
        noise.spec = dataclasses.replace(noise.spec, missing=True)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        observed = ~x.isnan()
        seen = observed.unsqueeze(-1) * self.weight  # (..., D, Z)
        precision = torch.eye(seen.shape[-1]).to(x) + seen.mT @ seen / self.noise_scale**2
        away = torch.where(observed, x - self.loc, 0.0)
        loc = torch.linalg.solve(precision, (away.unsqueeze(-2) @ seen).mT / self.noise_scale**2)
        return MultivariateNormal(loc.squeeze(-1), precision_matrix=precision)


def masked_oracle(seed: int = 0, count: int = 40, data_dim: int = 6, latent_dim: int = 2):
    """The oracle in float64, and draws of x (count, D) of which about 40% are missing."""
    torch.manual_seed(seed)
    weight = torch.randn(data_dim, latent_dim, dtype=torch.float64)
    vae = MaskedOracle(weight, 3 + torch.randn(data_dim, dtype=torch.float64), 0.6)
    x = vae.likelihood(vae.prior().sample((count,))).sample().detach()
    return vae, hidden(x)


def hidden(x: Tensor, share: float = 0.4) -> Tensor:
    """x with NaN at random places, but at least one value in each row."""
    missing = torch.rand(x.shape, dtype=torch.float64) < share
    missing.flatten(1)[torch.arange(len(x)), torch.randint(x[0].numel(), (len(x),))] = False
    return torch.where(missing, torch.nan, x)


def moments(vae: LinearGaussian) -> tuple[Tensor, Tensor]:
    """μ and W Wᵀ + σ² I, the mean and covariance of x."""
    weight, noise = vae.weight.detach(), vae.noise_scale.detach() ** 2
    return vae.loc.detach(), weight @ weight.T + noise * torch.eye(len(weight)).to(weight)


def exact_log_evidence(vae: LinearGaussian, x: Tensor) -> Tensor:
    """log p(x_observed) (B,), from the marginal distribution of the observed values."""
    mean, covariance = moments(vae)
    found = []
    for row in x:
        o = ~row.isnan()
        found.append(Normal(mean[o], covariance[o][:, o]).log_prob(row[o]))
    return torch.stack(found)


def exact_conditional(vae: LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, D) of each missing value given the observed; x and 0 else."""
    mean, covariance = moments(vae)
    means, scales = x.clone(), torch.zeros_like(x)
    for row, out, scale in zip(x, means, scales, strict=True):
        m, o = row.isnan(), ~row.isnan()
        gain = torch.linalg.solve(covariance[o][:, o], covariance[o][:, m]).T
        out[m] = mean[m] + gain @ (row[o] - mean[o])
        scale[m] = (covariance[m][:, m] - gain @ covariance[o][:, m]).diagonal().sqrt()
    return means, scales


def missing_values(name: str, count: int = 60, shape: tuple[int, ...] = (1, 4, 5)) -> np.ndarray:
    """Stored values of `example_values`, as floats, of which a third are NaN."""
    values = example_values(name, count, shape).astype(np.float32)
    random = np.random.default_rng(5)
    missing = random.random(values.shape) < 1 / 3
    missing.reshape(count, -1)[np.arange(count), random.integers(values[0].size, size=count)] = 0
    return np.where(missing, np.float32(np.nan), values)


def missing_splits(name: str, shape: tuple[int, ...] = (1, 4, 5), count: int = 60):
    most = 16 if name == "binomial" else None
    values = missing_values(name, count, shape)
    return pyro_vae.load_data(values, max_value=most, missing="model")


def missing_vae(name: str, shape: tuple[int, ...] = (1, 4, 5), **settings):
    """A small untrained VAE for data with missing values, in float32, and its data."""
    splits = missing_splits(name, shape)
    settings = {"latent_dim": 3, "hidden": (16,), "likelihood": name, **settings}
    return pyro_vae.build(pyro_vae.ModelConfig(**settings), splits), splits
