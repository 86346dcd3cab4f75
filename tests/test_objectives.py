"""Each name gives the bound that it says, per image, by hand from the same draws."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from conftest import batch, example_vae
from torch.distributions import kl_divergence

import pyro_vae

K = 7


def log_weights(vae, x):
    z = vae.posterior(x).rsample((K,))
    return (
        vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z) - vae.posterior(x).log_prob(z)
    ), z


@pytest.mark.parametrize("name", ["trace", "mean-field", "iwae"])
def test_value(name, tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    x = batch(splits, "binomial")
    elbo = pyro_vae.objective(name, num_particles=K)
    assert isinstance(elbo, pyro.infer.ELBO)
    torch.manual_seed(0)
    value = -elbo.loss(vae.model, vae.guide, x)
    torch.manual_seed(0)
    weights, z = log_weights(vae, x)
    expected = {
        "trace": weights.mean(0),
        "mean-field": vae.likelihood(z).log_prob(x).mean(0)
        - kl_divergence(vae.posterior(x), vae.prior()),
        "iwae": weights.logsumexp(0) - math.log(K),
    }[name]
    assert value == pytest.approx(expected.sum().item(), rel=1e-9)


def test_one_particle_is_the_elbo_for_all(tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    x = batch(splits, "binomial")
    values = []
    for name in ("trace", "iwae"):
        torch.manual_seed(0)
        values.append(pyro_vae.objective(name, 1).loss(vae.model, vae.guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_unknown_name():
    with pytest.raises(ValueError, match="expects trace, mean-field or iwae; got 'elbo'"):
        pyro_vae.objective("elbo")
