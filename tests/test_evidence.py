"""Importance-sampled evidence against closed forms and quadrature, with planted faults."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SIGMAS, example_spec
from pyro.distributions import Normal
from torch import nn

import pyro_vae
from pyro_vae import evidence
from pyro_vae.data import DataSpec
from pyro_vae.evidence import importance_sample, log_evidence
from pyro_vae.likelihoods import LIKELIHOODS
from pyro_vae.priors import StandardNormal
from pyro_vae.vae import VAE

D, Z, NOISE = 6, 2, 0.7


class LinearDecoder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z):
        return (z @ self.weight.T).unsqueeze(-2)  # (..., P = 1, D)


class GaussianEncoder(nn.Module):
    """Exact posterior of a linear Gaussian model with orthogonal columns; its sd times a factor."""

    def __init__(self, weight, factor=1.0):
        super().__init__()
        precision = 1 + (weight**2).sum(0) / NOISE**2
        self.map = nn.Parameter((weight / NOISE**2 / precision).T)
        self.log_scale = nn.Parameter(-0.5 * precision.log() + math.log(factor))

    def forward(self, x):
        loc = x @ self.map.T
        return torch.cat([loc, self.log_scale.expand(loc.shape)], -1)


def linear_gaussian(factor=1.0):
    """A VAE whose evidence is N(x; 0, WWᵀ + σ²I), and exact values of it for some x."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, Z, dtype=torch.float64)).Q
    weight = basis * torch.tensor([2.0, 0.5], dtype=torch.float64)
    spec = DataSpec((D,), None, discrete=False)
    likelihood = LIKELIHOODS["gaussian"](spec, torch.zeros(D), torch.ones(D))
    likelihood.log_scale.data.fill_(math.log(NOISE - 0.01))
    encoder = GaussianEncoder(weight, factor)
    vae = VAE(StandardNormal(Z), encoder, LinearDecoder(weight), likelihood).double()
    covariance = weight @ weight.T + NOISE**2 * torch.eye(D, dtype=torch.float64)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(D).double(), covariance)
    x = marginal.sample((50,))
    return vae, x, marginal.log_prob(x)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_with_the_exact_posterior_every_weight_is_the_evidence(num_samples):
    vae, x, exact = linear_gaussian()
    result = importance_sample(vae, x, num_samples)
    torch.testing.assert_close(result.log_evidence, exact, rtol=1e-6, atol=1e-6)
    full = torch.full((50,), float(num_samples), dtype=torch.float64)
    torch.testing.assert_close(result.effective_sample_size, full, rtol=1e-6, atol=0)
    if num_samples > 1:
        assert result.standard_error.max() < 1e-6
    else:
        assert result.standard_error.isnan().all()


def test_a_planted_fault_is_seen():
    """Posterior sd × 0.8: single weights are off by tenths of a nat, not by 1e-6."""
    vae, x, exact = linear_gaussian(factor=0.8)
    assert (log_evidence(vae, x, 1) - exact).abs().median() > 0.05


@pytest.mark.parametrize("factor", [0.9, 1.3])
def test_estimates_are_within_their_standard_errors(factor):
    torch.manual_seed(1)
    vae, x, exact = linear_gaussian(factor)
    result = importance_sample(vae, x, 20_000)
    assert result.standard_error.max() < 0.02, "errors small enough to matter"
    assert ((result.log_evidence - exact).abs() < SIGMAS * result.standard_error).all()
    # power: a log taken of the wrong number of samples is seen in every image
    wrong = result.log_evidence + math.log(20_000 / 16_384)
    assert ((wrong - exact).abs() > SIGMAS * result.standard_error).all()


def test_standard_error_is_the_spread_over_repetitions():
    vae, x, _ = linear_gaussian(1.3)
    torch.manual_seed(2)
    runs = [importance_sample(vae, x[:10], 500) for _ in range(400)]
    spread = torch.stack([r.log_evidence for r in runs]).std(0)
    claimed = torch.stack([r.standard_error for r in runs]).mean(0)
    # the sd of an sd over 400 Gaussian repetitions is 1/√800 of it
    assert ((claimed / spread).log().abs() < SIGMAS / math.sqrt(800) + 0.02).all()


@pytest.mark.parametrize("chunk_values", [1, 13, D * 7, D * 50 * 3, 2**23])
def test_every_chunking_uses_all_samples(chunk_values, monkeypatch):
    """In chunks of images, of samples, of one value: the same formula, the same count."""
    monkeypatch.setattr(evidence, "CHUNK_VALUES", chunk_values)
    vae, x, exact = linear_gaussian()
    done = []
    result = importance_sample(vae, x[:9], 23, on_chunk=done.append)
    torch.testing.assert_close(result.log_evidence, exact[:9], rtol=1e-6, atol=1e-6)
    assert sum(done) == 9 * 23
    assert max(done) <= max(1, chunk_values // D)


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_every_likelihood_against_quadrature(name):
    """One latent: log p(x) by Gauss-Hermite quadrature, exact for these smooth decoders."""
    torch.manual_seed(3)
    spec = example_spec(name, (5,))
    likelihood = LIKELIHOODS[name](spec, torch.full((5,), 0.5), torch.ones(5))
    decoder = nn.Sequential(
        nn.Linear(1, 5 * likelihood.num_parameters),
        nn.Tanh(),
        nn.Unflatten(-1, (likelihood.num_parameters, 5)),
    )
    vae = VAE(StandardNormal(1), Encoder(), decoder, likelihood).double()
    x = vae.likelihood(vae.prior().sample((20,))).sample()
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    log_weights = torch.from_numpy(np.log(weights / weights.sum()))
    with torch.no_grad():
        log_likelihood = vae.likelihood(torch.from_numpy(nodes)[:, None, None]).log_prob(x)
    exact = (log_likelihood + log_weights[:, None]).logsumexp(0)
    result = importance_sample(vae, x, 40_000)
    assert result.standard_error.max() < 0.03
    assert ((result.log_evidence - exact).abs() < SIGMAS * result.standard_error).all()


class Encoder(nn.Module):
    """A guide wider than any posterior here, so that weights are bounded."""

    def forward(self, x):
        zeros = torch.zeros(*x.shape[:-1], 1, dtype=x.dtype)
        return torch.cat([zeros, zeros + math.log(1.1)], -1)


def test_bad_arguments():
    vae, x, _ = linear_gaussian()
    with pytest.raises(ValueError, match="num_samples expects an integer of at least 1; got 0"):
        log_evidence(vae, x, 0)
    bernoulli = LIKELIHOODS["bernoulli"](DataSpec((D,), 1, True), torch.zeros(D), torch.ones(D))
    vae.likelihood_module = bernoulli
    with pytest.raises(ValueError, match="support"):
        log_evidence(vae, x, 10)


def test_a_users_own_model_of_the_same_shape():
    """Anything with the three distributions will do."""

    class Mine:
        def prior(self):
            return Normal(torch.zeros(1), torch.ones(1)).to_event(1)

        def posterior(self, x):
            return Normal(x / 2, 0.5**0.5).to_event(1)

        def likelihood(self, z):
            return Normal(z, 1.0).to_event(1)

    x = torch.tensor([[0.3], [2.0]])
    exact = torch.distributions.Normal(0.0, 2**0.5).log_prob(x)[:, 0].double()
    estimate = pyro_vae.log_evidence(Mine(), x, num_samples=3)
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    vae, x, exact = linear_gaussian()
    estimate = log_evidence(vae.to("cuda"), x.to("cuda"), 100)
    torch.testing.assert_close(estimate.cpu(), exact, rtol=1e-6, atol=1e-6)
