"""Quadrature against the oracle, and its draws against distribution functions; planted faults."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from conftest import SIGMAS, oracle
from pyro.distributions import Normal

from pyro_vae.evidence.quadrature import quadrature

CASES = [(2, 1, 0, 401), (5, 1, 1, 401), (6, 2, 2, 201)]  # D, Z, seed, nodes


def widest(count: int) -> float:
    """The bound for the largest of `count` z-scores, with the false alarms of one at SIGMAS."""
    return NormalDist().inv_cdf(1 - NormalDist().cdf(-SIGMAS) / count)


@pytest.mark.parametrize("case", CASES)
def test_evidence_and_posterior_are_those_of_the_oracle(case):
    *sizes, num_nodes = case
    vae, x = oracle(*sizes)
    x = x[:10]
    truth = quadrature(vae, x, num_nodes)
    assert truth.nodes.shape == (num_nodes ** sizes[1], sizes[1])
    assert truth.error.max() < 1e-11
    posterior = vae.exact_posterior(x)
    near = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(truth.log_evidence, vae.exact_log_evidence(x).detach(), **near)
    torch.testing.assert_close(truth.mean, posterior.mean.detach(), **near)
    torch.testing.assert_close(truth.covariance, posterior.covariance_matrix.detach(), **near)
    # the masses are the density, node by node
    nodes = truth.nodes[:: max(1, len(truth.nodes) // 2000)].unsqueeze(1)
    density = posterior.log_prob(nodes).exp() * truth.spacing.prod()
    masses = truth.masses[:: max(1, len(truth.nodes) // 2000)]
    torch.testing.assert_close(masses, density.detach(), **near)


def test_single_precision():
    vae, x = oracle(2, 1, 0)
    exact = vae.exact_log_evidence(x).detach()
    truth = quadrature(vae.float(), x.float())
    assert truth.log_evidence.dtype == torch.float64
    torch.testing.assert_close(truth.log_evidence, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_error_is_an_upper_bound(case):
    """On grids whose spacing is up to 1.25 of the posterior's least deviation.

    Coarser ones can miss it: where a mode lies half way between two nodes both grids err alike.
    """
    *sizes, _ = case
    vae, x = oracle(*sizes)
    exact = vae.exact_log_evidence(x).detach()
    least = 1 / torch.linalg.eigvalsh(vae.posterior_precision).max().sqrt().item()
    claimed, actual = [], []
    for nodes_in_deviation in (0.8, 0.9, 1.0, 1.2, 3.0):
        truth = quadrature(vae, x, 2 * math.ceil(8 * nodes_in_deviation / least) + 1)
        claimed.append(truth.error)
        actual.append((truth.log_evidence - exact).abs())
        assert (actual[-1] <= truth.error + 1e-12).all()
    assert actual[0].max() > 1e-8, "errors large enough to see"
    assert actual[-1].max() < 1e-12
    assert claimed[-1].max() < 1e-11, "a bound that tells a fine grid"
    # power: the smallest bound of these grids is none for the first
    assert (actual[0] > claimed[-1] + 1e-12).all()


def test_a_prior_of_another_place_and_width():
    """The grid follows the prior's mean and deviation, a different one in each dimension."""
    loc = torch.tensor([3.0, -20.0], dtype=torch.float64)
    scale = torch.tensor([0.1, 5.0], dtype=torch.float64)

    class Moved:
        def prior(self):
            return Normal(loc, scale).to_event(1)

        def likelihood(self, z):
            return Normal(z, 2 * scale).to_event(1)

    x = loc + scale * torch.tensor([[0.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)
    truth = quadrature(Moved(), x, 201)
    exact = Normal(loc, 5**0.5 * scale).to_event(1).log_prob(x)
    torch.testing.assert_close(truth.log_evidence, exact)
    torch.testing.assert_close(truth.mean, loc + (x - loc) / 5)
    torch.testing.assert_close(truth.covariance, (0.8 * scale**2).diag().expand(2, 2, 2))
    torch.testing.assert_close(truth.spacing, 16 * scale / 200)


def draws_z_scores(draws, mean, covariance):
    """Of each mean (B, Z), and of each variance along the axes and the diagonal (B, ·)."""
    count = len(draws)
    off = draws - mean
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    along = torch.cat([off, off.sum(-1, keepdim=True)], -1)
    variance = torch.cat([deviation**2, covariance.sum((1, 2))[:, None]], -1)
    # of a Gaussian: the variance of a square is twice the square of the variance
    of_mean = off.mean(0) / deviation * math.sqrt(count)
    of_variance = (along.square().mean(0) / variance - 1) * math.sqrt(count / 2)
    return torch.cat([of_mean, of_variance], -1)


@pytest.mark.parametrize("case", CASES)
def test_moments_of_the_draws(case):
    """Standard errors: 0.7% of the deviation for a mean, 1% for a variance."""
    *sizes, num_nodes = case
    vae, x = oracle(*sizes)
    truth = quadrature(vae, x[:5], num_nodes)
    torch.manual_seed(4)
    draws = truth.sample(20_000)
    assert draws.shape == (20_000, 5, sizes[1])
    posterior = vae.exact_posterior(x[:5])
    mean, covariance = posterior.mean.detach(), posterior.covariance_matrix.detach()
    scores = draws_z_scores(draws, mean, covariance)
    assert scores.abs().max() < widest(scores.numel())
    # power: deviations too wide by 5%, a mean off by 5% of one, latents that forget each other
    for wrong in (
        mean + 1.05 * (draws - mean),
        draws + 0.05 * covariance.diagonal(dim1=1, dim2=2).sqrt(),
    ):
        assert draws_z_scores(wrong, mean, covariance).abs().max() > widest(scores.numel())
    if sizes[1] == 2:
        mixed = torch.stack([draws[..., 0], draws[..., 1].roll(1, 0)], -1)
        assert draws_z_scores(mixed, mean, covariance).abs().max() > widest(scores.numel())


class Folded:
    """x = z² + noise in one latent: two modes, ±√x, for x well above 0."""

    def prior(self):
        return Normal(torch.zeros(1).double(), 1.0).to_event(1)

    def likelihood(self, z):
        return Normal(z.square(), 0.5).to_event(1)


def distance(draws, lines, heights):
    """Kolmogorov's √S · max |F_S − F| of draws (S, B) from piecewise linear F; heights (L, B)."""
    worst = []
    for values, height in zip(draws.T, heights.T, strict=True):
        values = values.sort().values
        index = torch.searchsorted(lines, values).clamp(1, len(lines) - 1)
        share = (values - lines[index - 1]) / (lines[index] - lines[index - 1])
        exact = height[index - 1] + share * (height[index] - height[index - 1])
        ranks = torch.arange(len(values) + 1) / len(values)
        worst.append(torch.maximum(ranks[1:] - exact, exact - ranks[:-1]).max())
    return torch.stack(worst) * math.sqrt(len(draws))


def test_draws_from_two_modes_follow_the_distribution_function():
    """Its values by Simpson's rule on 20,001 nodes. √S D exceeds λ with probability 2 exp(−2λ²)."""
    x = torch.tensor([[-0.5], [0.3], [1.5], [3.0]], dtype=torch.float64)
    lines = torch.linspace(-6, 6, 20_001, dtype=torch.float64)

    def joint(z):
        vae = Folded()
        return (vae.prior().log_prob(z)[:, None] + vae.likelihood(z[:, None]).log_prob(x)).exp()

    ends, middles = joint(lines[:, None]), joint((lines[1:] + lines[:-1])[:, None] / 2)
    pieces = (ends[1:] + 4 * middles + ends[:-1]) / 6 * (lines[1] - lines[0])
    heights = torch.cat([torch.zeros(1, len(x)).double(), pieces.cumsum(0)])
    truth = quadrature(Folded(), x, 801)
    torch.testing.assert_close(truth.log_evidence, heights[-1].log(), rtol=1e-10, atol=1e-10)
    heights = heights / heights[-1]

    bound = math.sqrt(math.log(2 * len(x) / (2 * NormalDist().cdf(-SIGMAS))) / 2)
    torch.manual_seed(5)
    draws = truth.sample(20_000)[..., 0]
    assert distance(draws, lines, heights).max() < bound
    assert truth.mean.abs().max() < 1e-10
    assert (draws[:, 3].abs() > 0.5).all(), "two modes that do not touch"

    # power: every planted fault is seen by the same distance
    spread = truth.covariance[:, 0, 0].sqrt()
    gaussian = spread * torch.randn(20_000, len(x)).double()
    assert (distance(gaussian, lines, heights) > bound)[1:].all()  # the first has one mode
    one_sided = torch.where(torch.rand_like(draws) < 0.06, draws.abs(), draws)
    assert (distance(one_sided, lines, heights) > bound).all()
    coarse = quadrature(Folded(), x, 201)
    torch.manual_seed(5)
    assert distance(coarse.sample(20_000)[..., 0], lines, heights).max() < bound
    on_nodes = replace(coarse, spacing=0 * coarse.spacing).sample(20_000)[..., 0]
    assert (distance(on_nodes, lines, heights) > bound).all()


def test_a_mirrored_decoder_in_two_latents():
    """x = |z₁|, |z₂| + noise: four modes of a quarter each."""

    class Mirrored:
        def prior(self):
            return Normal(torch.zeros(2).double(), 1.0).to_event(1)

        def likelihood(self, z):
            return Normal(z.abs(), 0.2).to_event(1)

    x = torch.tensor([[1.0, 1.5]], dtype=torch.float64)
    torch.manual_seed(6)
    draws = quadrature(Mirrored(), x, 201).sample(20_000)[:, 0]
    quarter = 2 * (draws[:, 0] > 0).long() + (draws[:, 1] > 0).long()
    shares = torch.bincount(quarter, minlength=4) / 20_000
    error = math.sqrt(3 / 16 / 20_000)  # 0.3%
    assert (shares - 0.25).abs().max() < widest(4) * error


def test_bad_arguments():
    vae, x = oracle(5, 3, 1)
    with pytest.raises(ValueError, match="one or two latents; got 3"):
        quadrature(vae, x)
    vae, x = oracle(2, 1, 0)
    for num_nodes in (400, 1, 0, -3):
        with pytest.raises(ValueError, match=f"odd number of at least 3; got {num_nodes}"):
            quadrature(vae, x, num_nodes)
