"""The table of planted faults: one-line errors in the package, and the check that catches each.

A check asks for no other truth than its own: closed forms written out here, sums over a grid,
counting, enumeration. It passes on the sound code and has to fail on the faulty one. Where chance
enters, the seed is fixed and all comparisons of one `agree` raise a false alarm together once in
15,800 seeds, as one at four standard errors does; where it does not, the check is exact.
"""

from __future__ import annotations

import __future__
import importlib
import inspect
import itertools
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pyro
import pytest
import torch
from conftest import SIGMAS, example_spec
from pyro.infer import SVI, Trace_ELBO
from scipy import integrate, stats
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_vae import (
    FitConfig,
    annealing,
    calibration,
    diagnostics,
    evidence,
    nuts,
    objectives,
    quadrature,
    refinement,
    svi,
)
from pyro_vae.data import DataSpec, Split, Splits
from pyro_vae.likelihoods import LIKELIHOODS
from pyro_vae.linear_gaussian import LinearGaussian, probabilistic_pca
from pyro_vae.priors import StandardNormal
from pyro_vae.vae import VAE

torch.set_num_threads(1)
FALSE_ALARM = 2 * stats.norm.sf(SIGMAS)


def agree(draws, truth) -> None:
    """The means of independent draws (R, ...) are `truth`, by Student's t, Bonferroni's bound."""
    draws, truth = (np.asarray(torch.as_tensor(a).detach().double()) for a in (draws, truth))
    off, error = draws.mean(0) - truth, draws.std(0, ddof=1) / math.sqrt(len(draws))
    bound = stats.t.isf(FALSE_ALARM / 2 / off.size, len(draws) - 1)
    assert (np.abs(off) <= bound * error + 1e-9).all(), f"off {off}, standard errors {error}"


def same(value, truth, tolerance: float = 1e-8) -> None:
    value, truth = (torch.as_tensor(a).detach().double() for a in (value, truth))
    torch.testing.assert_close(value, truth.expand(value.shape), rtol=tolerance, atol=tolerance)


# --- two models, and what is known of them without the package ------------------------------------

D, Z, NOISE = 6, 2, 0.9


class Line:
    """z ~ N(0, I), x ~ N(W z, σ² I) with orthogonal W, so that p(z|x) has independent latents.

    `vae` is a `VAE` whose guide is the posterior, but for `factor` on its scales and `shift` of its
    means in units of them; the rest is from the joint Gaussian. The 8 x are not drawn from p(x): of
    such x any two models' densities have the mean ratio 1.
    """

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        torch.manual_seed(0)
        self.weight = torch.linalg.qr(torch.randn(D, Z).double()).Q * torch.tensor([1.5, 0.6])
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(D).double()
        gain = self.weight.T @ torch.linalg.inv(covariance)
        self.x = 1.3 * torch.randn(8, D).double()
        self.evidence = MultivariateNormal(torch.zeros(D).double(), covariance).log_prob(self.x)
        self.mean, self.scale = self.x @ gain.T, (1 - (gain @ self.weight).diagonal()).sqrt()
        self.vae = plain_vae(D, Z).double()
        with torch.no_grad():
            self.vae.encoder.weight.copy_(torch.cat([gain, 0 * gain]))
            self.vae.encoder.bias[:Z] = shift * self.scale
            self.vae.encoder.bias[Z:] = (factor * self.scale).log()
            self.vae.decoder[0].weight.copy_(self.weight)
            self.vae.decoder[0].bias.zero_()
            self.vae.likelihood_module.log_scale.fill_(math.log(NOISE - 0.01))


def plain_vae(data_dim: int, latent_dim: int) -> VAE:
    """Linear encoder and decoder, one noise scale: probabilistic PCA."""
    spec = DataSpec((data_dim,), None, discrete=False)
    likelihood = LIKELIHOODS["gaussian"](spec, torch.zeros(data_dim), torch.ones(()))
    decoder = nn.Sequential(nn.Linear(latent_dim, data_dim), nn.Unflatten(-1, (1, data_dim)))
    encoder = nn.Linear(data_dim, 2 * latent_dim)
    return VAE(StandardNormal(latent_dim), encoder, decoder, likelihood)


def closed_form(vae: VAE, x):
    """E_q[log p(x|z)] and KL(q(z|x) ‖ p(z)), (B,) each, of a `plain_vae`, differentiable."""
    mean, log_scale = vae.encoder(x).chunk(2, -1)
    linear, variance = vae.decoder[0], (0.01 + vae.likelihood_module.log_scale.exp()) ** 2
    spread = (linear.weight.square().sum(0) * (2 * log_scale).exp()).sum(-1)
    square = (x - linear(mean)).square().sum(-1) + spread
    reconstruction = -(x.shape[1] * (2 * math.pi * variance).log() + square / variance) / 2
    return reconstruction, (mean**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1) / 2


class Curve:
    """One latent, five binary values through a tanh, a guide that ignores x; truths by a grid."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        linear, encoder = nn.Linear(1, 5), nn.Linear(5, 2)
        linear.weight.data *= 3
        encoder.weight.data.zero_()
        encoder.bias.data = torch.tensor([0.3, math.log(1.2)])
        decoder = nn.Sequential(linear, nn.Tanh(), nn.Unflatten(-1, (1, 5)))
        likelihood = LIKELIHOODS["bernoulli"](DataSpec((5,), 1, True), torch.zeros(5), torch.ones(5))
        self.vae = VAE(StandardNormal(1), encoder, decoder, likelihood).double()
        self.x = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 0.0]]).double()
        self.z = torch.linspace(-12, 12, 2401).double()
        with torch.no_grad():
            logits = torch.tanh(linear(self.z[:, None]))[:, None]
        self.likelihood = (torch.sigmoid(logits * (2 * self.x - 1))).prod(-1)  # (M, B)
        self.joint = self.likelihood * (-(self.z**2) / 2).exp()[:, None] / math.sqrt(2 * math.pi)
        self.guide = 0.01 * Normal(0.3, 1.2).log_prob(self.z).exp()[:, None]
        self.evidence = (0.01 * self.joint.sum(0)).log()

    def draws(self, count: int):
        """(B, count, 1) of p(z|x)."""
        return self.z[torch.multinomial(self.joint.T, count, replacement=True)].unsqueeze(-1)


# --- the checks ---------------------------------------------------------------------------------


def check_likelihoods_have_mass_one_and_draw_what_they_say():
    """Sums and Simpson's rule, exact to 1e-6; the means of draws by `agree`, five times."""
    torch.manual_seed(0)
    for name, kind in LIKELIHOODS.items():
        spec, raw = example_spec(name, (1,)), torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0]).double()
        bound = spec.max_value or 1
        likelihood = kind(spec, torch.tensor([bound / 2]), torch.tensor([bound / 3])).double()
        p = likelihood(raw[:, None, None] - 2 * torch.arange(likelihood.num_parameters)[:, None])
        ends = {"real": (-30, 30, 6001), "unit": (0, 1, 2001)}
        x = torch.linspace(*ends.get(likelihood.units, (0, bound, bound + 1))).double()
        density = p.log_prob(x[:, None, None]).exp().detach()
        if likelihood.is_discrete:
            mass, mean = density.sum(0), (density * x[:, None]).sum(0)
        else:
            mass = integrate.simpson(density, x=x, axis=0)
            mean = integrate.simpson(density * x[:, None], x=x, axis=0)
        same(mass, 1, 1e-6)
        same(p.mean[:, 0], torch.as_tensor(mean), 1e-6)
        agree(p.sample((4000,))[..., 0], mean)


def check_elbo_of_the_exact_guide_is_the_evidence():
    """Every draw's weight is p(x), whatever the estimator makes of it: exact."""
    line = Line()
    z = line.vae.posterior(line.x).sample((8,))
    weights = line.vae.likelihood(z).log_prob(line.x) + line.vae.prior().log_prob(z)
    same(weights - line.vae.posterior(line.x).log_prob(z), line.evidence)
    for name, count in [("trace", 1), ("trace", 5), ("iwae", 5)]:
        loss = objectives.objective(name, count).loss(line.vae.model, line.vae.guide, line.x)
        same(-loss, line.evidence.sum())
    for count in (2, 8):
        result = evidence.importance_sample(line.vae, line.x, count)
        same(result.log_evidence, line.evidence)
        same(result.effective_sample_size, count)
        same(evidence.upper_bound(line.vae, line.x, z[0], count), line.evidence)
    same(refinement.elbo(line.vae, line.vae.posterior(line.x), line.x, 8), line.evidence)


def check_objectives_and_their_gradients_are_the_closed_form():
    """By `agree`, five times: E_q[log p(x|z)] − β KL, all its derivatives, and E[ŵ] = p(x)."""
    line = Line(factor=1.4, shift=0.5)
    vae, x = line.vae, line.x
    torch.manual_seed(0)
    for name, weight in itertools.product(["trace", "mean-field"], [1.0, 0.3]):
        vae.kl_weight, rows = weight, []
        elbo = objectives.objective(name, 40)
        reconstruction, kl = closed_form(vae, x)
        truth = -(reconstruction - weight * kl).sum()
        for loss in [truth, *(elbo.differentiable_loss(vae.model, vae.guide, x) for _ in range(30))]:
            slopes = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
            slopes = [torch.zeros(1) if s is None else s.flatten() for s in slopes]
            rows.append(torch.cat([loss.reshape(1), *slopes]))
            assert rows[-1].shape == rows[0].shape, "a parameter without a gradient"
        agree(torch.stack(rows[1:]), rows[0])
    vae.kl_weight, bound = 1.0, objectives.objective("iwae", 10)
    losses = [bound.loss(vae.model, vae.guide, x[:1]) for _ in range(150)]
    agree((-torch.tensor(losses) - line.evidence[0]).exp(), 1)


def check_importance_sampling_reaches_quadrature():
    """E[ŵ] = p(x), reconstruction and, with z* ~ p(z|x), E[1/ŵ] = 1/p(x): `agree`, three times.

    The effective sample size within 5%, at least five times its deviation.
    """
    curve, count = Curve(), 120
    torch.manual_seed(0)
    x = curve.x.repeat_interleave(40, 0)
    result = evidence.importance_sample(curve.vae, x, count)  # as many samples as rows
    ratio = (result.log_evidence.reshape(3, 40).T - curve.evidence).exp()
    agree(ratio, torch.ones(3))
    truth = (curve.guide * curve.likelihood.log()).sum(0)
    agree(result.reconstruction.reshape(3, 40).T, truth)
    many = evidence.importance_sample(curve.vae, curve.x, 20_000)
    squares = ((0.01 * curve.joint) ** 2 / curve.guide).sum(0)
    same(many.effective_sample_size / 20_000, (2 * curve.evidence).exp() / squares, 0.05)
    z = curve.draws(1500).reshape(-1, 1)
    upper = evidence.upper_bound(curve.vae, curve.x.repeat_interleave(1500, 0), z, 3)
    agree((curve.evidence - upper.reshape(3, 1500).T).exp(), torch.ones(3))


def check_standard_errors_are_the_spread_over_repetitions():
    """Of 400: a deviation's own error is 1/√800, here four of them, and 5% for what is not normal."""
    curve = Curve()
    torch.manual_seed(0)
    x = curve.x[:1].expand(400, 5)
    for estimate, error in [
        (lambda r: (r.log_evidence, r.standard_error))(evidence.importance_sample(curve.vae, x, 90)),
        (lambda r: (r.lower, r.standard_error))(annealing.anneal(curve.vae, x, 3, 30)),
    ]:
        assert abs(math.log(error.square().mean().sqrt() / estimate.std())) < 4 / 800**0.5 + 0.05


def check_pareto_k_of_known_tails():
    """w = u^−k has the shape k: means of 20 estimates, `agree` to 0.05 for the estimator's bias."""
    torch.manual_seed(0)
    for k in (0.3, 0.9):
        estimate = evidence.pareto_k(-k * torch.rand(4000, 20).double().log())
        assert abs(estimate.mean() - k) < SIGMAS * estimate.std() / 20**0.5 + 0.05


def check_quadrature_is_the_closed_form():
    """Evidence and moments exact to 1e-6, its error smaller still; the draws' moments by `agree`."""
    line = Line()
    torch.manual_seed(0)
    result = quadrature.quadrature(line.vae, line.x, 201)
    same(result.log_evidence, line.evidence, 1e-6)
    assert result.error.max() < 1e-6
    same(result.mean, line.mean, 1e-6)
    same(result.covariance, line.scale.square().diag(), 1e-6)
    scores = (result.sample(40_000) - line.mean) / line.scale
    agree(scores, torch.zeros(8, Z))


def check_oracle_by_torch_distributions():
    """Conditioning the joint Gaussian, KL between Gaussians, a gradient that vanishes: exact."""
    torch.manual_seed(0)
    weight, loc, x = torch.randn(5, 3).double(), torch.randn(5).double(), torch.randn(7, 5).double()
    covariance = weight @ weight.T + 0.36 * torch.eye(5).double()
    gain = weight.T @ torch.linalg.inv(covariance)
    mean, spread = (x - loc) @ gain.T, torch.eye(3).double() - gain @ weight
    vae = LinearGaussian(weight, loc, 0.6)
    same(vae.exact_log_evidence(x), MultivariateNormal(loc, covariance).log_prob(x))
    for q in (vae.exact_posterior(x), vae.posterior(x)):
        same(q.mean, mean)
        same(q.covariance_matrix, spread)
    z = torch.randn(7, 3).double()
    same(vae.likelihood(z).log_prob(x), Normal(z @ weight.T + loc, 0.6).log_prob(x).sum(-1))
    best = MultivariateNormal(mean, (1 / torch.linalg.inv(spread).diagonal()).diag())
    same(vae.approximation_gap, kl_divergence(best, MultivariateNormal(mean, spread))[0])
    diagonal = LinearGaussian(weight, loc, 0.6, "diagonal", shift=0.5).posterior(x)
    same(diagonal.mean, mean + 0.5 * best.stddev)
    same(diagonal.stddev, best.stddev)
    x = torch.randn(50, 5).double() * torch.arange(1, 6)
    pca = probabilistic_pca(x, 2)
    parameters = [p.detach().requires_grad_() for p in (pca.weight, pca.loc, pca.noise_scale)]
    covariance = parameters[0] @ parameters[0].T + parameters[2] ** 2 * torch.eye(5).double()
    likelihood = MultivariateNormal(parameters[1], covariance).log_prob(x).mean()
    for slope in torch.autograd.grad(likelihood, parameters):
        same(slope, 0)


def check_annealing_brackets_the_evidence():
    """E[w] = p(x) forward and, from z* ~ p(z|x), E[1/w] = 1/p(x) in reverse, by `agree`."""
    line, rows = Line(), 700
    torch.manual_seed(0)
    x = line.x[:2].repeat_interleave(rows, 0)
    z = line.mean[:2].repeat_interleave(rows, 0) + line.scale * torch.randn(2 * rows, Z).double()
    result = annealing.anneal(line.vae, x, num_steps=8, num_chains=2, z=z)
    agree((result.lower.reshape(2, rows).T - line.evidence[:2]).exp(), torch.ones(2))
    agree((line.evidence[:2] - result.upper.reshape(2, rows).T).exp(), torch.ones(2))


def check_ranks_are_counts_and_uniform_for_the_exact_guide():
    """Ranks by counting, exact; p-values of the exact guide, of which the least is 1 in 15,800."""
    seen = []
    torch.manual_seed(0)
    quantities = {"tied": lambda z, x: seen.append(z) or z[..., 0].round()}
    result = calibration.simulate(Line().vae, 1000, 39, quantities)
    draws = torch.cat(seen, 1).numpy()
    for j in range(Z):
        counts = [int((column[1:] < column[0]).sum()) for column in draws[..., j].T]
        assert result.ranks[:, j].tolist() == counts
    tests = calibration.check_ranks(result)
    assert {"z1", "z2", "tied", calibration.LIKELIHOOD, calibration.DENSITY} == set(result.names)
    assert min(test.p_value for test in tests) * len(tests) > FALSE_ALARM


def check_rank_tests_by_enumeration():
    """All 256 vectors of four ranks on {0 … 3}, and Pearson's statistic by hand: exact."""
    every = [np.array(ranks) for ranks in itertools.product(range(4), repeat=4)]

    def gamma(ranks):
        tails = []
        for i in (1, 2, 3):
            below, binomial = int((ranks < i).sum()), stats.binom(4, i / 4)
            tails += [binomial.cdf(below), binomial.sf(below - 1)]
        return min(1, 2 * min(tails))

    truths = np.array([gamma(ranks) for ranks in every])
    same(np.array([calibration.gamma_discrepancy(ranks, 3) for ranks in every]), truths)
    for value in np.unique(truths.round(9)):
        same(calibration.gamma_p_value(value + 1e-9, 4, 3), (truths < value + 1e-8).mean())
    ranks = np.repeat(np.arange(10), [4, 4, 9, 2, 1, 7, 3, 3, 3, 4])[:, None]
    none = np.zeros((40, 1))
    result = calibration.Simulations(("a",), ranks, 9, none, none, none, none[0])
    (test,) = calibration.check_ranks(result)  # two bins, of 20 and 20
    same(test.p_chi_squared, 1)
    ranks = np.concatenate([ranks[:30], 0 * ranks[:10]])  # 30 − … in the first
    (test,) = calibration.check_ranks(calibration.Simulations(("a",), ranks, 9, none, none, none, none[0]))
    first = (ranks < 5).sum()
    same(test.p_chi_squared, stats.chi2.sf(((first - 20) ** 2 + (20 - first) ** 2) / 20, 1))
