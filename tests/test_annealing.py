"""Annealed evidence against the oracle and quadrature, from both sides; faults planted in it.

What is exact: E[w] = p(x) over forward chains and E[1/w] = 1/p(x) over reverse chains from z*, for
any number of steps and any step size, as long as every kernel leaves its distribution invariant.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from conftest import SIGMAS, all_likelihoods, example_spec
from pyro.distributions import Normal
from test_evidence import Encoder
from test_linear_gaussian import oracle
from torch import nn

from pyro_vae import annealing, evidence
from pyro_vae.annealing import anneal
from pyro_vae.likelihoods import LIKELIHOODS
from pyro_vae.priors import StandardNormal
from pyro_vae.quadrature import quadrature
from pyro_vae.vae import VAE


def widest(count: int) -> float:
    """The bound for the largest of `count` z-scores, with the false alarms of one at SIGMAS."""
    return NormalDist().inv_cdf(1 - NormalDist().cdf(-SIGMAS) / count)


def simulated(case, count: int, **settings):
    """An oracle, z and x drawn from it, and log p(x)."""
    vae, _ = oracle(*case, **settings)
    z = vae.prior().sample((count,))
    x = vae.likelihood(z).sample().detach()
    return vae, z, x, vae.exact_log_evidence(x).detach()


def agree(result, exact) -> bool:
    """Whether forward estimates are within their claimed errors: the largest, and the mean."""
    off, error = result.lower - exact, result.standard_error
    largest = (off / error).abs().max() < widest(len(off))
    return bool(largest and off.sum().abs() < SIGMAS * error.square().sum().sqrt())


CASES = [(2, 1, 0), (4, 2, 1), (3, 6, 3), (5, 3, 1)]  # D, Z (Z > D too), seed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_estimates_are_within_their_errors(case, dtype):
    vae, _, x, exact = simulated(case, 20)
    torch.manual_seed(1)
    result = anneal(vae.to(dtype), x.to(dtype), num_steps=60, num_chains=200)
    assert result.lower.dtype == result.standard_error.dtype == torch.float64
    assert result.upper is None
    assert result.standard_error.max() < 0.09, "errors small enough to matter"
    assert result.standard_error.mean() < 0.04
    assert agree(result, exact)
    assert ((result.acceptance > 0.6) & (result.acceptance < 1)).all()


def test_claimed_errors_are_the_spread_over_repetitions():
    vae, _, x, _ = simulated((4, 2, 1), 200)
    torch.manual_seed(2)
    # 200 images with one posterior covariance: their errors are about alike
    once, again = anneal(vae, x, 20, 40), anneal(vae, x, 20, 40)
    ratio = (once.lower - again.lower).square().mean() / (2 * once.standard_error.square().mean())
    # A mean of 200 squares: 1/√100 of itself, and as much again for the claimed ones.
    assert abs(ratio.log()) < SIGMAS * math.sqrt(2 / 100)
    assert anneal(vae, x[:3], 5, 1).standard_error.isnan().all()


def weights_are_unbiased(vae, z, x, exact) -> tuple[bool, bool]:
    """Whether means over images of w / p(x) and p(x) / w are 1, from one chain each."""
    result = anneal(vae, x, num_steps=30, num_chains=1, z=z)
    seen = []
    for ratio in ((result.lower - exact).exp(), (exact - result.upper).exp()):
        error = ratio.std() / math.sqrt(len(ratio))
        assert error < 0.05, "errors small enough to matter"
        seen.append(bool((ratio.mean() - 1).abs() < SIGMAS * error))
    return seen[0], seen[1]


# Noise that leaves the posterior wide, or single weights would have no mean to speak of.
WIDE = (2, 1, 5)


def test_forward_and_reverse_weights_are_unbiased():
    """Both at 4 standard errors, below 5%; the bounds on log p(x) follow, by Jensen."""
    for case in [WIDE, (4, 2, 0)]:
        vae, z, x, exact = simulated(case, 2000)
        torch.manual_seed(3)
        assert weights_are_unbiased(vae, z, x, exact) == (True, True)


class Wrapped:
    """A VAE, with some of its distributions replaced."""

    def __init__(self, vae, prior_scale: float = 1.0):
        self.vae, self.scale = vae, prior_scale
        self.likelihood, self.posterior = vae.likelihood, vae.posterior

    def prior(self):
        (latent_dim,) = self.vae.prior().event_shape
        return Normal(torch.zeros(latent_dim).double(), self.scale).to_event(1)


class Slowed(annealing._Target):
    """The last of the weights belongs to β = 0.97, not 1."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.betas[-1] = 0.97


def forgets_momentum(target, start, k):
    """A chain that accepts by position alone."""
    torch.manual_seed(k)
    move = annealing._Target._move_as_it_is
    end, _ = move(target, start, k)
    return end, torch.ones(start.z.shape[:2], dtype=torch.float64)


@pytest.mark.parametrize("fault", ["prior", "accept", "schedule", "late", "slope"])
def test_planted_faults_are_seen_by_the_same_checks(fault, monkeypatch):
    vae, z, x, exact = simulated((5, 3, 1), 20)
    single = simulated((4, 2, 0), 2000)
    if fault == "prior":  # the model's prior is 10% too wide
        vae, single = Wrapped(vae, 1.1), (Wrapped(single[0], 1.1), *single[1:])
    elif fault == "accept":  # every proposal is taken
        monkeypatch.setattr(annealing._Point, "where", lambda self, chosen, other: self)
    elif fault == "schedule":
        monkeypatch.setattr(annealing, "_Target", Slowed)
    elif fault == "late":  # the kernel of β_k+1 where that of β_k belongs
        move = annealing._Target._move
        monkeypatch.setattr(annealing._Target, "_move", lambda s, p, k: move(s, p, k + 1))
    else:  # half the slope of the likelihood in the acceptance's density
        density = annealing._Point.log_density
        monkeypatch.setattr(annealing._Point, "log_density", lambda p, beta: density(p, beta / 2))
    torch.manual_seed(1)
    forward = agree(anneal(vae, x, 60, 200), exact)
    torch.manual_seed(3)
    print(fault, forward, weights_are_unbiased(*single))
