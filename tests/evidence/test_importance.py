"""Importance-sampled evidence against closed forms and quadrature, with planted faults."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SIGMAS, example_spec
from pyro.distributions import Normal
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_vae
from pyro_vae.data.splits import DataSpec
from pyro_vae.evidence import importance as evidence
from pyro_vae.evidence.importance import (
    importance_sample,
    log_evidence,
    pareto_k,
    reliable_k,
    upper_bound,
)
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.refined import Refined
from pyro_vae.models.vae import VAE
from pyro_vae.runtime import memory as chunks

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
    monkeypatch.setattr(chunks, "CACHE_VALUES", chunk_values)
    vae, x, exact = linear_gaussian()
    done, decoded, likelihood = [], [], vae.likelihood
    vae.likelihood = lambda z: decoded.append(z[..., 0].numel()) or likelihood(z)
    result = importance_sample(vae, x[:9], 23, on_chunk=done.append)
    torch.testing.assert_close(result.log_evidence, exact[:9], rtol=1e-6, atol=1e-6)
    assert sum(done) == 9 * 23
    assert sum(decoded) == 9 * 23
    assert max(decoded) <= max(1, chunk_values // D)


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


# In one latent, with p(z|x) = N(μ, τ²) and q = N(m, s²), all of the weights w ∝ p / q is known:
#
#     E[(w / E w)²] = s² / (τ √(2s² − τ²)) · exp((μ − m)² / (2s² − τ²))        for 2s² > τ²
#
# whose inverse is ESS / K in the limit, and the tail's shape is k = 1 − s²/τ² for s < τ. The oracle
# plants s / τ and (m − μ) / τ.


def one_latent(factor: float, shift: float, count: int):
    """An oracle, x from it, log p(x), and E[(w / E w)²]."""
    torch.manual_seed(6)
    weight, loc = torch.full((1, 1), 1.3).double(), torch.full((1,), 0.2).double()
    vae = LinearGaussian(weight, loc, 0.8, "exact", factor, shift)
    x = vae.likelihood(vae.prior().sample((count,))).sample().detach()
    room = 2 * factor**2 - 1
    second = factor**2 / math.sqrt(room) * math.exp(shift**2 / room) if room > 0 else math.inf
    return vae, x, vae.exact_log_evidence(x).detach(), second


@pytest.mark.parametrize(("factor", "shift"), [(0.9, 0.3), (1.2, 0.0), (1.5, -0.8)])
def test_effective_sample_size_and_standard_error_are_the_closed_forms(factor, shift):
    """Means over 100 images of 20,000 samples."""
    vae, x, _, second = one_latent(factor, shift, 100)
    torch.manual_seed(7)
    result = importance_sample(vae, x, 20_000)
    for measured, exact, other in [
        (result.effective_sample_size / 20_000, 1 / second, 1 / (1.03 * second)),
        (20_000 * result.standard_error.square(), second - 1, 1.03 * second - 1),
    ]:
        error = measured.std() / 10
        assert error < 0.008 * exact, "errors small enough to matter"
        assert abs(measured.mean() - exact) < SIGMAS * error
        assert abs(measured.mean() - other) > SIGMAS * error, "power: of 3% in the second moment"


def unshrunk(tails):
    """k̂ before the fit's prior: ten observations' worth of ½ beside 3 √K = 424 of the tail."""
    return (tails * (424 + 10) - 0.5 * 10) / 424


def test_pareto_k_of_pareto_weights():
    """w = u^−k has the shape k, exactly, and so has every tail of it."""
    torch.manual_seed(8)
    found = {}
    for k in (0.2, 0.5, 0.7, 1.0):
        tails = unshrunk(pareto_k(-k * torch.rand(20_000, 60).double().log()))
        error = tails.std() / math.sqrt(60)
        assert error < 0.02, "errors small enough to matter"
        # The estimator has a bias of the order of 1 / 424 itself, a third of the error.
        assert abs(tails.mean() - k) < SIGMAS * error
        found[k] = tails
    # power: the other tail, whose values are bounded; the inverse weights
    assert unshrunk(pareto_k(0.5 * torch.rand(20_000, 9).double().log())).max() < 0
    # whatever the scale of the weights, and one by one
    torch.manual_seed(9)
    log_weights = -0.7 * torch.rand(500, 3).double().log()
    torch.testing.assert_close(pareto_k(log_weights - 3000), pareto_k(log_weights))
    torch.testing.assert_close(pareto_k(log_weights)[1:2], pareto_k(log_weights[:, 1:2]))


@pytest.mark.parametrize("factor", [0.9, 0.7, 0.6])
def test_pareto_k_of_a_guide_that_is_too_narrow(factor):
    """At r deviations a Gaussian's tail has the shape k r² / (1 + r²), below k = 1 − s²/τ².

    Only around the exact mean: beside it the tail within reach is heavier.
    """
    vae, x, _, _ = one_latent(factor, 0.0, 60)
    torch.manual_seed(10)
    result = importance_sample(vae, x, 20_000, with_pareto_k=True)
    tails, k = unshrunk(result.pareto_k), 1 - factor**2
    error = tails.std() / math.sqrt(60)
    assert error < 0.015, "errors small enough to matter"
    reach = 2.3  # deviations, of which 424 of 20,000 lie beyond
    assert k * reach**2 / (1 + reach**2) - SIGMAS * error < tails.mean() < k + SIGMAS * error
    # power: the shape of another guide, and that of the weights' square roots
    assert not k / 2 * reach**2 / (1 + reach**2) - SIGMAS * error < tails.mean() < k / 2
    assert (result.pareto_k > reliable_k(20_000)).sum() == 0 or factor < 0.7


def test_pareto_k_where_there_is_no_tail():
    equal = torch.full((100, 2), -1234.5)
    assert (pareto_k(equal) == -math.inf).all()
    # equal but for rounding: an exact guide in single precision
    vae, x, _, _ = one_latent(1.0, 0.0, 5)
    vae, x = vae.float(), x.float()
    assert (importance_sample(vae, x, 1000, with_pareto_k=True).pareto_k == -math.inf).all()
    with pytest.raises(ValueError, match="at least 25 samples; got 24"):
        pareto_k(torch.randn(24, 3))
    assert pareto_k(torch.randn(25, 3)).isfinite().all()


@pytest.mark.parametrize("spread", [100.0, 300.0, 1000.0, 1e5])
def test_pareto_k_where_one_weight_is_all(spread):
    """Weights that differ by hundreds of nats, as those of a collapsed guide on images do."""
    torch.manual_seed(11)
    assert (pareto_k(spread * torch.randn(1000, 8).double()) > 10).all()
    assert (pareto_k(spread * torch.randn(1000, 8)) > 10).all()


def test_pareto_k_is_none_unless_asked():
    vae, x, _, _ = one_latent(0.8, 0.0, 7)
    assert importance_sample(vae, x, 30).pareto_k is None
    tails = importance_sample(vae, x, 30, with_pareto_k=True).pareto_k
    assert tails.shape == (7,)
    assert tails.dtype == torch.float64


def test_every_number_is_that_of_all_chunks_of_samples(monkeypatch):
    """Weights that are known one by one: the same numbers from all of them at once."""
    monkeypatch.setattr(chunks, "CACHE_VALUES", 40)

    class Fixed:
        """Draws z = 0, 1, 2, …; log w = z for the first image and z / 100 for the second."""

        drawn = 0

        def prior(self):
            return Normal(torch.zeros(1), 1.0).to_event(1)

        posterior = None

        def likelihood(self, z):
            return Weights(z[..., 0])

    class Weights:
        def __init__(self, z):
            self.z = z

        def log_prob(self, x):
            return self.z * torch.tensor([1.0, 0.01]).double()

    class Counting:
        """A proposal that cancels the prior."""

        def sample(self, shape):
            start, Fixed.drawn = Fixed.drawn, Fixed.drawn + shape[0]
            return torch.arange(start, start + shape[0]).double()[:, None, None].expand(-1, 2, 1)

        def log_prob(self, z):
            return Fixed().prior().log_prob(z)

    result = importance_sample(
        Fixed(), torch.zeros(2, 1), 90, with_pareto_k=True, proposal=Counting()
    )
    steps = torch.arange(90).double()[:, None] * torch.tensor([1.0, 0.01]).double()
    torch.testing.assert_close(result.pareto_k, pareto_k(steps))
    torch.testing.assert_close(result.log_evidence, steps.logsumexp(0) - math.log(90))
    weights = steps.exp()
    error = weights.std(0) / weights.mean(0) / math.sqrt(90)
    torch.testing.assert_close(result.standard_error, error)
    torch.testing.assert_close(
        result.effective_sample_size, weights.sum(0).square() / weights.square().sum(0)
    )
    torch.testing.assert_close(result.reconstruction, steps.mean(0))


def test_reliable_k():
    expected = {
        1: -2.32,
        2: -2.32,
        10: 0.0,
        100: 0.5,
        1000: 2 / 3,
        2154: 0.7,
        5000: 0.7,
        10**6: 0.7,
    }
    for num_samples, k in expected.items():
        assert reliable_k(num_samples) == pytest.approx(k, abs=2e-3)


def test_a_proposal_in_place_of_the_guide():
    """With the exact posterior every weight is the evidence, whatever the guide is."""
    vae, x, exact = linear_gaussian(factor=3.0)
    right, _, _ = linear_gaussian()
    done = []
    result = importance_sample(vae, x, 9, done.append, proposal=right.posterior(x))
    torch.testing.assert_close(result.log_evidence, exact, rtol=1e-6, atol=1e-6)
    assert sum(done) == 9 * len(x)


def simulated(guide: str, count: int):
    """A simulated oracle: z*, x, log p(x)."""
    torch.manual_seed(12)
    weight = torch.randn(5, 3, dtype=torch.float64)
    vae = LinearGaussian(weight, torch.randn(5, dtype=torch.float64), 1.0, guide)
    z = vae.prior().sample((count,))
    x = vae.likelihood(z).sample().detach()
    return vae, z, x, vae.exact_log_evidence(x).detach()


@pytest.mark.parametrize("num_samples", [1, 2, 3, 100])
def test_upper_bound_with_the_exact_guide_is_the_evidence(num_samples):
    vae, z, x, exact = simulated("exact", 20)
    bound = upper_bound(vae, x, z, num_samples)
    assert bound.dtype == torch.float64
    torch.testing.assert_close(bound, exact, rtol=1e-10, atol=1e-10)
    # power: a diagonal guide is off by tenths
    vae, z, x, exact = simulated("diagonal", 20)
    assert (upper_bound(vae, x, z, num_samples) - exact).abs().max() > 1e-2


def test_upper_bound_of_one_sample_is_the_weight_of_z():
    vae, z, x, _ = simulated("diagonal", 20)
    weight = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z) - vae.posterior(x).log_prob(z)
    torch.testing.assert_close(upper_bound(vae, x, z, 1), weight.detach())


def test_upper_bound_is_above_on_average_and_tightens():
    """With one sample by KL(p(z|x) ‖ q), in closed form; 1 / ŵ is unbiased with any number."""
    vae, z, x, exact = simulated("diagonal", 4000)
    torch.manual_seed(13)
    guide = vae.posterior(x)
    guide = MultivariateNormal(guide.mean, guide.variance.diag_embed())
    divergence = kl_divergence(vae.exact_posterior(x), guide).detach()
    gaps = {k: upper_bound(vae, x, z, k) - exact for k in (1, 8, 64)}

    def score(draws, expected):
        off = draws - expected
        return (off.mean() / off.std() * math.sqrt(len(off))).item()

    assert divergence.mean() > 0.1
    assert (gaps[1] - divergence).std() < 0.02 * math.sqrt(4000), "errors small enough to matter"
    assert abs(score(gaps[1], divergence)) < SIGMAS
    for k, gap in gaps.items():
        assert score(gap, 0.0) > SIGMAS if k < 64 else score(gap, 0.0) > -SIGMAS
        assert (-gap).exp().std() < 0.06 * math.sqrt(4000)
        assert abs(score((-gap).exp(), 1.0)) < SIGMAS
    assert score(gaps[1] - gaps[8], 0.0) > SIGMAS
    assert score(gaps[8] - gaps[64], 0.0) > SIGMAS
    # power: z* of another image; a draw of the guide, which leaves a lower bound
    assert abs(score(upper_bound(vae, x, z.roll(1, 0), 1) - exact, divergence)) > SIGMAS
    wrong = upper_bound(vae, x, vae.posterior(x).sample(), 8) - exact
    assert score(wrong, 0.0) < -SIGMAS
    assert abs(score((-wrong).exp(), 1.0)) > SIGMAS


def test_upper_bound_refuses_no_samples():
    vae, z, x, _ = simulated("exact", 3)
    for num_samples in (0, -1):
        with pytest.raises(ValueError, match=f"integer of at least 1; got {num_samples}"):
            upper_bound(vae, x, z, num_samples)


@pytest.mark.parametrize(
    "mode", ["eager", "graph", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_captured_sampling_is_exact_too(mode, monkeypatch):
    """With the exact posterior every weight is the evidence, whatever draws and decodes."""
    monkeypatch.setattr(chunks, "CACHE_VALUES", 2**12)  # a graph is for a whole chunk
    vae, x, exact = linear_gaussian()
    result = importance_sample(vae, x[:7], 1000, mode=mode)
    torch.testing.assert_close(result.log_evidence, exact[:7], rtol=1e-9, atol=1e-9)
    assert mode == "eager" or evidence._captured(vae, mode).graphs.captures == 1
    vae, x, exact = linear_gaussian(factor=1.5)
    result = importance_sample(vae, x, 4000, mode=mode)
    z = (result.log_evidence - exact) / result.standard_error
    assert z.abs().max() < SIGMAS
    assert result.standard_error.max() < 0.05


@pytest.mark.parametrize(
    "mode", ["eager", "graph", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_captured_decoding_of_draws_from_a_proposal_is_exact_too(mode, monkeypatch):
    """The exact posterior is given; the model's own guide is wrong, and is not asked."""
    monkeypatch.setattr(chunks, "CACHE_VALUES", 2**12)
    _, x, exact = linear_gaussian()
    x, exact = x[:7], exact[:7]
    wrong, *_ = linear_gaussian(factor=1.5)
    posterior = linear_gaussian()[0].posterior(x)
    result = importance_sample(wrong, x, 1000, proposal=posterior, mode=mode)
    torch.testing.assert_close(result.log_evidence, exact, rtol=1e-9, atol=1e-9)
    assert mode == "eager" or evidence._captured(wrong, mode, draws=False).graphs.captures == 1
    # power: weights of other draws than those that are decoded
    true = posterior.log_prob
    monkeypatch.setattr(posterior, "log_prob", lambda z: true(z.roll(1, 0)))
    result = importance_sample(wrong, x, 1000, proposal=posterior, mode=mode)
    assert (result.log_evidence - exact).abs().max() > 0.05


def test_refined_guides_are_found_once_and_captured_without_their_draws(monkeypatch):
    """At the same draws, the weights are those of the uncaptured sampling."""
    vae, x, _ = linear_gaussian(factor=1.5)
    vae.family, x = Refined(Z, 2, 1).double(), x[:5]
    size = chunks.rows_at_once(x.numel(), x.device)  # a whole chunk, which is one graph
    found = []
    posterior = mock.Mock(wraps=vae.posterior)
    monkeypatch.setattr(vae, "posterior", posterior)
    for mode in ("eager", "graph"):
        torch.manual_seed(0)
        found.append(importance_sample(vae, x, size, mode=mode))
    assert posterior.call_count == 2
    assert evidence._captured(vae, "graph", draws=False).graphs.captures == 1
    torch.testing.assert_close(found[1].log_evidence, found[0].log_evidence)
    torch.testing.assert_close(found[1].standard_error, found[0].standard_error)


def test_refined_guides_are_found_for_many_rows_together(monkeypatch):
    """For 64, if a chunk holds 8 draws of each; the number of rows is a power of two."""
    vae, x, _ = linear_gaussian()
    x = x[:1].expand(200, D)
    sizes, true = [], vae.posterior

    def together(values):
        monkeypatch.setattr(chunks, "CACHE_VALUES", values)
        sizes.clear()
        importance_sample(vae, x, 3)
        return sizes[0]

    monkeypatch.setattr(vae, "posterior", lambda x: sizes.append(len(x)) or true(x))
    assert [together(draws * D) for draws in (1, 8 * 5, 64 * 9, 64 * 130)] == [1, 1, 8, 128]
    assert sizes == [128, 72]
    vae.family = Refined(Z, 1, 1).double()
    assert [together(draws * D) for draws in (1, 8 * 5, 64 * 9, 64 * 130)] == [1, 4, 64, 128]


def test_kl_and_mean_are_those_of_q_of_each_row(monkeypatch):
    """In parts of a row each, and for a given q."""
    vae, x, _ = linear_gaussian(factor=1.5)
    q = vae.posterior(x)
    expected = kl_divergence(q, vae.prior())
    assert expected.unique().numel() == len(x)
    given = importance_sample(vae, x, 3, proposal=q, with_posterior=True)
    monkeypatch.setattr(chunks, "CACHE_VALUES", 1)
    for found in (given, importance_sample(vae, x, 3, with_posterior=True)):
        torch.testing.assert_close(found.kl, expected)
        torch.testing.assert_close(found.mean, q.mean)


def test_what_is_captured_is_kept_for_the_model_and_follows_its_weights(monkeypatch):
    monkeypatch.setattr(chunks, "CACHE_VALUES", 2**12)
    vae, x, exact = linear_gaussian()
    importance_sample(vae, x[:7], 1000, mode="graph")
    kept = evidence._captured(vae, "graph")
    assert kept.graphs.captures == 1
    importance_sample(vae, x[7:14], 1000, mode="graph")
    assert kept.graphs.captures == 1
    with torch.no_grad():
        vae.decoder.weight.mul_(1.2)
    changed = importance_sample(vae, x[:7], 4000, mode="graph")
    truth = importance_sample(vae, x[:7], 4000, mode="eager")
    error = (changed.standard_error**2 + truth.standard_error**2).sqrt()
    assert ((changed.log_evidence - truth.log_evidence) / error).abs().max() < SIGMAS
    assert (changed.log_evidence - exact[:7]).abs().max() > 0.05  # power: the weights matter
    assert kept.graphs.captures == 1


def test_what_the_model_itself_holds_is_watched_too(monkeypatch):
    """No submodule has it, and the captured function has the model by a weak reference alone."""
    monkeypatch.setattr(chunks, "CACHE_VALUES", 2**12)

    class Scaled(VAE):
        plain = 1.0

        def likelihood(self, z):
            return super().likelihood(self.factor * self.plain * z)

    vae, x, _ = linear_gaussian()
    parts = (vae.prior_module, vae.encoder, vae.decoder, vae.likelihood_module)
    for change in ("factor", "plain"):
        scaled = Scaled(*parts)
        scaled.factor, scaled.plain = nn.Parameter(torch.ones(()).double()), 1.0
        importance_sample(scaled, x[:7], 1000, mode="graph")
        zero = nn.Parameter(torch.zeros(()).double()) if change == "factor" else 0.0
        setattr(scaled, change, zero)
        result = importance_sample(scaled, x[:7], 1000, mode="graph")
        expected = vae.likelihood(torch.zeros(Z).double()).log_prob(x[:7])  # whatever z is drawn
        torch.testing.assert_close(result.reconstruction, expected)


def test_models_that_are_no_modules_are_not_captured():
    class Plain:
        __slots__ = ("vae",)

        def __init__(self, vae):
            self.vae = vae

        def __getattr__(self, name):
            return getattr(self.vae, name)

    vae, x, exact = linear_gaussian()
    result = importance_sample(Plain(vae), x[:7], 100, mode="compiled")
    torch.testing.assert_close(result.log_evidence, exact[:7], rtol=1e-9, atol=1e-9)


def test_long_evaluations_are_compiled_and_short_ones_not():
    assert evidence.choose_mode(179 * 5000 * 64) == "eager"
    assert evidence.choose_mode(10_000 * 5000 * 784) == "compiled"


# The faults of a second run, whose memory a first one has had
PAGE_FAULTS = """
import resource, torch, pyro_vae
from pyro_vae.models.build import build_blank
from pyro_vae.data.splits import DataSpec
from pyro_vae.evidence.importance import log_evidence
config = pyro_vae.ModelConfig(latent_dim=20, hidden=(400,), likelihood="bernoulli")
vae = build_blank(config, DataSpec((1, 28, 28), 1, discrete=True))
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    log_evidence(vae, torch.zeros(20, 1, 28, 28), 500)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_of_chunks_is_kept():
    """It costs no pages again; but where the thresholds of malloc are a user's, they stay."""
    faults = []
    for settings in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        done = subprocess.run(
            [sys.executable, "-c", PAGE_FAULTS],
            env={**os.environ, **settings},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        faults.append(int(done.stdout))
    assert faults[0] < 1000
    assert faults[1] > 5 * 512, "power: five chunks, of 2 MiB at least"
