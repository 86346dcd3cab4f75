"""The table of planted faults: one-line errors in the package, and the check that catches each.

A check takes no truth from the package: closed forms written out here, counting, enumeration. It
passes on the sound code and has to fail on the faulty one. Where chance enters the seed is fixed,
and the comparisons of one `agree` raise a false alarm, all together, once in 15,800 seeds, as one
does at four standard errors; elsewhere the docstring says what is allowed.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SIGMAS
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_vae import FitConfig
from pyro_vae.data.splits import DataSpec, Split, Splits
from pyro_vae.diagnostics import aggregate, refinement
from pyro_vae.diagnostics import sbc as calibration
from pyro_vae.evidence import annealing, evaluation
from pyro_vae.evidence import importance as evidence
from pyro_vae.models import linear_gaussian
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.vae import VAE
from pyro_vae.objectives import registry as objectives
from pyro_vae.training import loop as svi

FALSE_ALARM = 2 * stats.norm.sf(SIGMAS)


def agree(draws, truth) -> None:
    """The means of independent draws (R, ...) are `truth`: Student's t, Bonferroni's correction."""
    draws, truth = (torch.as_tensor(a, dtype=torch.float64).detach() for a in (draws, truth))
    off, error = draws.mean(0) - truth, draws.std(0) / math.sqrt(len(draws))
    bound = stats.t.isf(FALSE_ALARM / 2 / off.numel(), len(draws) - 1)
    assert (off.abs() <= bound * error + 1e-9).all(), f"off {off}, standard errors {error}"


def same(value, truth, tolerance: float = 1e-8) -> None:
    value, truth = (torch.as_tensor(a, dtype=torch.float64).detach() for a in (value, truth))
    torch.testing.assert_close(value, truth.expand(value.shape), rtol=tolerance, atol=tolerance)


# --- a model, and what is known of it without the package -----------------------------------------

D, Z, NOISE = 6, 2, 1.2


def plain_vae(data_dim: int, latent_dim: int) -> VAE:
    """Linear encoder and decoder, one noise scale: probabilistic PCA."""
    spec = DataSpec((data_dim,), None, discrete=False)
    likelihood = LIKELIHOODS["gaussian"](spec, torch.zeros(data_dim), torch.ones(()))
    decoder = nn.Sequential(nn.Linear(latent_dim, data_dim), nn.Unflatten(-1, (1, data_dim)))
    return VAE(StandardNormal(latent_dim), nn.Linear(data_dim, 2 * latent_dim), decoder, likelihood)


def closed_form(vae: VAE, x):
    """E_q[log p(x|z)] and KL(q(z|x) ‖ p(z)), (B,) each, of a `plain_vae`, differentiable."""
    mean, log_scale = vae.encoder(x).chunk(2, -1)
    linear, variance = vae.decoder[0], (0.01 + vae.likelihood_module.log_scale.exp()) ** 2
    spread = (linear.weight.square().sum(0) * (2 * log_scale).exp()).sum(-1)
    square = (x - linear(mean)).square().sum(-1) + spread
    reconstruction = -(x.shape[1] * (2 * math.pi * variance).log() + square / variance) / 2
    return reconstruction, (mean**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1) / 2


class Line:
    """z ~ N(0, I), x ~ N(W z, σ² I) with orthogonal W, so that p(z|x) has independent latents.

    The guide of `vae` is p(z|x), but for `factor` on its scales and `shift` of its means in units
    of them. The 8 x are not drawn from p(x): over such x any two densities have the mean ratio 1.
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
            bias = torch.cat([shift * self.scale, (factor * self.scale).log()])
            self.vae.encoder.bias.copy_(bias)
            self.vae.decoder[0].weight.copy_(self.weight)
            self.vae.decoder[0].bias.zero_()
            self.vae.likelihood_module.log_scale.fill_(math.log(NOISE - 0.01))


# --- the checks -----------------------------------------------------------------------------------


def check_elbo_of_the_exact_guide_is_the_evidence():
    """Every draw's weight is p(x), whatever an estimator makes of it: exact."""
    line = Line()
    z = line.vae.posterior(line.x).sample((8,))
    weights = line.vae.likelihood(z).log_prob(line.x) + line.vae.prior().log_prob(z)
    same(weights - line.vae.posterior(line.x).log_prob(z), line.evidence)
    for name, count in [("trace", 5), ("iwae", 5)]:
        loss = objectives.objective(name, count).loss(line.vae.model, line.vae.guide, line.x)
        same(-loss, line.evidence.sum())
    for count in (2, 8):
        result = evidence.importance_sample(line.vae, line.x, count)
        same(result.log_evidence, line.evidence)
        same(result.effective_sample_size, count)
        same(evidence.upper_bound(line.vae, line.x, z[0], count), line.evidence)
    same(refinement.elbo(line.vae, line.vae.posterior(line.x), line.x, 8), line.evidence)


def check_objectives_and_their_gradients_are_the_closed_form():
    """E_q[log p(x|z)] − β KL with all its derivatives, and E[ŵ] = p(x): `agree`, five times."""
    line = Line(factor=1.4, shift=0.5)
    vae, x = line.vae, line.x
    torch.manual_seed(0)
    for name, weight in itertools.product(["trace", "mean-field"], [1.0, 0.3]):
        rows, elbo = [], objectives.objective(name, 40)
        elbo.kl_weight = weight
        reconstruction, kl = closed_form(vae, x)
        truth = -(reconstruction - weight * kl).sum()
        losses = [elbo.differentiable_loss(vae.model, vae.guide, x) for _ in range(25)]
        for loss in [truth, *losses]:
            slopes = torch.autograd.grad(loss, list(vae.parameters()), materialize_grads=True)
            rows.append(torch.cat([loss[None], *(s.flatten() for s in slopes)]))
        agree(torch.stack(rows[1:]), rows[0])
    bound = objectives.objective("iwae", 10)
    losses = [bound.loss(vae.model, vae.guide, x[:1]) for _ in range(150)]
    agree((-torch.tensor(losses) - line.evidence[0]).exp(), 1)


def check_importance_sampling_reaches_the_evidence():
    """E[ŵ] = p(x), the reconstruction and, with z* ~ p(z|x), E[1/ŵ] = 1/p(x): `agree`, three times.

    Evidence and effective size of 20,000 samples (four chunks) within 5%, six deviations or more.
    """
    line, rows = Line(1.3, 0.4), 30  # 240 rows, as many as samples
    torch.manual_seed(0)
    result = evidence.importance_sample(line.vae, line.x.repeat_interleave(rows, 0), 8 * rows)
    agree((result.log_evidence.reshape(8, rows).T - line.evidence).exp(), torch.ones(8))
    agree(result.reconstruction.reshape(8, rows).T, closed_form(line.vae, line.x)[0])
    with mock.patch.object(evidence, "CHUNKS_PER_BLOCK", 1):
        many = evidence.importance_sample(line.vae, line.x, 20_000)
    wide = 2 * 1.3**2 - 1
    squares = (1.3**2 / math.sqrt(wide) * math.exp(0.4**2 / wide)) ** Z  # E_q[(p(z|x) / q(z|x))²]
    same(many.effective_sample_size, 20_000 / squares, 0.05)
    same(many.log_evidence, line.evidence, 0.05)
    x = line.x[:2].repeat_interleave(1500, 0)
    z = line.mean[:2].repeat_interleave(1500, 0) + line.scale * torch.randn(3000, Z).double()
    upper = evidence.upper_bound(line.vae, x, z, 3).reshape(2, 1500).T
    agree((line.evidence[:2] - upper).exp(), torch.ones(2))


def check_weights_say_how_far_to_trust_them():
    """Standard errors are the spread over 400 repetitions; w = u^−k has a tail of shape k.

    At 4 standard errors, and 5% for what is not normal, 0.05 for the bias of the shape.
    """
    line = Line(1.3, 0.4)
    torch.manual_seed(0)
    x = line.x[:1].expand(400, D)
    sampled = evidence.importance_sample(line.vae, x, 90)
    annealed = annealing.anneal(line.vae, x, 9, 30)
    for estimate, result in [(sampled.log_evidence, sampled), (annealed.lower, annealed)]:
        claimed = result.standard_error.square().mean().sqrt()
        assert abs(math.log(claimed / estimate.std())) < SIGMAS / math.sqrt(800) + 0.05
    shapes = evidence.pareto_k(-0.8 * torch.rand(4000, 20).double().log())
    assert abs(shapes.mean() - 0.8) < SIGMAS * shapes.std() / math.sqrt(20) + 0.05


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
    best = MultivariateNormal(mean, (1 / torch.linalg.inv(spread).diagonal()).diag())
    same(vae.approximation_gap, kl_divergence(best, MultivariateNormal(mean, spread))[0])
    diagonal = LinearGaussian(weight, loc, 0.6, "diagonal").posterior(x)
    same(diagonal.stddev, best.stddev)
    x = torch.randn(50, 5).double() * torch.arange(1, 6)
    pca = linear_gaussian.probabilistic_pca(x, 2)
    parameters = [p.detach().requires_grad_() for p in (pca.weight, pca.loc, pca.noise_scale)]
    covariance = parameters[0] @ parameters[0].T + parameters[2] ** 2 * torch.eye(5).double()
    likelihood = MultivariateNormal(parameters[1], covariance).log_prob(x).mean()
    for slope in torch.autograd.grad(likelihood, parameters):
        same(slope, 0)


def check_annealing_brackets_the_evidence():
    """E[w] = p(x) forward and, from z* ~ p(z|x), E[1/w] = 1/p(x) in reverse: `agree`, twice."""
    line, rows = Line(), 2500
    torch.manual_seed(0)
    x = line.x[:2].repeat_interleave(rows, 0)
    z = line.mean[:2].repeat_interleave(rows, 0) + line.scale * torch.randn(2 * rows, Z).double()
    with mock.patch.object(annealing, "FIRST_STEP", 1.0):  # so that proposals are refused
        result = annealing.anneal(line.vae, x, num_steps=8, num_chains=2, z=z)
    agree((result.lower.reshape(2, rows).T - line.evidence[:2]).exp(), torch.ones(2))
    agree((line.evidence[:2] - result.upper.reshape(2, rows).T).exp(), torch.ones(2))


def check_ranks_are_counts_and_uniform_for_the_exact_guide():
    """Ranks by counting, exact; of the exact guide's p-values the least is no false alarm."""
    seen = []
    torch.manual_seed(0)
    quantities = {"tied": lambda z, x: seen.append(z) or z[..., 0].round()}
    result = calibration.simulate(Line().vae, 1000, 39, quantities)
    draws = torch.cat(seen, 1).numpy()  # (1 + L, N, Z)
    for name, values in zip(["z1", "z2", "tied"], [*draws.T, draws.T[0].round()], strict=True):
        ranks = result.ranks[:, result.names.index(name)]
        truths, values = values[:, :1], values[:, 1:]
        low, high = (values < truths).sum(1), (values <= truths).sum(1)
        assert ((low <= ranks) & (ranks <= high)).all()
    p_values = [test.p_value for test in calibration.check_ranks(result)]
    assert min(p_values) * len(p_values) > FALSE_ALARM


def given_ranks(latent, density, num_draws: int) -> calibration.Simulations:
    none, ranks = np.zeros((len(latent), 1)), np.stack([latent, density], axis=1)
    names = ("z1", calibration.DENSITY)
    return calibration.Simulations(names, ranks, num_draws, none, none, none, none[0])


def check_rank_tests_by_enumeration():
    """All 256 vectors of four ranks 0 … 3, and Pearson's statistic by hand: exact."""
    every = [np.array(ranks) for ranks in itertools.product(range(4), repeat=4)]

    def gamma(ranks):
        below = [((ranks < i).sum(), stats.binom(4, i / 4)) for i in (1, 2, 3)]
        return min(1, 2 * min(min(law.cdf(r), law.sf(r - 1)) for r, law in below))

    truths = np.array([gamma(ranks) for ranks in every])
    same(np.array([calibration.gamma_discrepancy(ranks, 3) for ranks in every]), truths)
    for value in np.unique(truths):
        same(calibration.gamma_p_value(value, 4, 3), (truths < value + 1e-9).mean())
    ranks = np.repeat(np.arange(10), [14, 4, 9, 12, 1, 17, 3, 13, 23, 4])
    (test, _) = calibration.check_ranks(given_ranks(ranks, ranks, 9))
    chi_squared = sum((count - 20) ** 2 / 20 for count in [18, 21, 18, 16, 27])
    same([test.chi_squared, test.p_chi_squared], [chi_squared, stats.chi2.sf(chi_squared, 4)])


def check_calibration_of_a_narrow_guide_is_the_closed_form():
    """Scales × 0.8, means + 0.6: scores are N(−3/4, 5/4²). 22 numbers at 4.7 errors, as one at 4.

    Regions of ranks that occur once each hold their nominal share exactly; HDRs hold the mode.
    """
    count, draws = 2000, 199
    latent, mode = np.arange(draws + 1), np.full(draws + 1, draws)
    table = calibration.coverage(given_ranks(latent, mode, draws))
    same(table.covered[:, 0], table.nominal)
    same(table.covered[:, -1], 1)
    line, one = Line(0.8, 0.6), 4.7 / math.sqrt(count)
    torch.manual_seed(0)
    result = calibration.simulate(line.vae, count, draws)
    quantiles = (np.arange(2000) + 0.5) / 2000
    below = stats.binom(draws, stats.norm.cdf(1.25 * stats.norm.ppf(quantiles) - 0.75))
    radii = 1.25**2 * stats.ncx2.ppf(quantiles, Z, Z * 0.6**2)
    table = calibration.coverage(result)
    for level, row in zip(table.nominal, table.covered, strict=True):
        out = round((1 - level) * (draws + 1) / 2)
        central = (below.cdf(draws - out) - below.cdf(out - 1)).mean()
        hdr = stats.binom(draws, stats.chi2.sf(radii, Z)).sf(2 * out - 1).mean()
        for share, truth in zip(row, [central] * (Z + 1) + [hdr], strict=True):
            assert abs(share - truth) < one * math.sqrt(truth * (1 - truth))
    error = calibration.miscalibration(result)
    for bias, spread in zip(error.bias, error.spread, strict=True):
        assert abs(bias.estimate + 0.75) < one * 1.25
        assert abs(spread.estimate - 1.25) < one * 1.25 / math.sqrt(2)
    truth = (1 - line.scale**2).sqrt().numpy()
    assert (abs(result.recovery - truth) < one * (1 - truth**2)).all()
    same(result.contraction, 1 - 0.64 * line.scale**2)


def check_refinement_finds_the_closed_form_gaps():
    """Within 0.08 nats, for the noise of SVI: the largest error of 25 seeds was 0.038."""
    torch.manual_seed(0)
    weight = torch.tensor([[1.0, 0.8], [0.2, 0.9], [1.2, 0.7]]).double()
    x = torch.randn(2, 3).double()
    covariance = torch.linalg.inv(torch.eye(2).double() + weight.T @ weight)
    exact = MultivariateNormal(x @ weight @ covariance, covariance)
    variance = 1 / torch.linalg.inv(covariance).diagonal()
    own = MultivariateNormal(exact.mean + 0.5 * variance.sqrt(), 1.3**2 * variance.diag())
    best = MultivariateNormal(exact.mean, variance.diag())
    vae = LinearGaussian(weight, torch.zeros(3).double(), 1.0, "diagonal", 1.3, 0.5)
    result = refinement.gaps(vae, x, 150, 40_000)
    loss, least = kl_divergence(own, exact), kl_divergence(best, exact)
    values = torch.stack([result.amortization, result.correlation, result.remainder])
    assert (values - torch.stack([loss - least, least, 0 * least])).abs().max() < 0.08


def check_energy_test_by_enumeration():
    """The coefficient by loops, exact; p-values of all 126 labellings of 4 + 5, at 4 errors."""
    random = np.random.default_rng(0)
    both = random.normal(size=(9, 2)) + np.array([1.0, 0.0]) * (np.arange(9) < 4)[:, None]
    apart = np.linalg.norm(both[:, None] - both, axis=-1)

    def coefficient(first):
        sides = [list(first), [i for i in range(9) if i not in first]]
        between = np.mean([apart[pair] for pair in itertools.product(*sides)])
        within = [np.mean([apart[p] for p in itertools.permutations(side, 2)]) for side in sides]
        return (2 * between - sum(within)) / (2 * between)

    every = np.array([coefficient(first) for first in itertools.combinations(range(9), 4)])
    result = aggregate.energy_test(both[:4], both[4:], 2000)
    same(result.coefficient, every[0])
    p_value = (every >= every[0] - 1e-9).mean()
    assert abs(result.p_value - p_value) < SIGMAS * math.sqrt(p_value * (1 - p_value) / 2000)
    far = aggregate.energy_test(random.normal(size=(20, 1)), random.normal(99, 1, (20, 1)), 19)
    same(far.p_value, 1 / 20)  # none of 19 other labellings is as far apart, but once in 10⁹


def splits_of(values, spec: DataSpec, repeats: int = 1) -> Splits:
    rows = Split(values.float(), torch.arange(len(values)), spec)
    train = Split(rows.values, rows.rows.repeat(repeats), spec)
    return Splits("x", train, rows, rows, spec, "", (), 0.0, 1.0, False, "")


def check_training_moves_every_parameter_and_reaches_pca():
    """β-VAE of a line, β = ½, from random weights: within 0.01 nats of the optimum.

    With s = β σ² for the noise it is probabilistic PCA, W Wᵀ = (λ₁ − s) u uᵀ, whose reconstruction
    is −½ D (1 + log 2πσ²) and KL −½ log s/λ₁, but at σ² = (λ₂ + … + λ_D) / (D − β). The
    largest shortfall of 25 seeds was 0.0033.
    """
    torch.manual_seed(0)
    x = torch.randn(256, 1) * torch.tensor([2.0, 1.0, 0.0, -1.0]) + torch.randn(256, 4)
    vae, variances = plain_vae(4, 1), torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    noise = variances[:-1].sum() / 3.5
    best = -2 * (1 + (2 * math.pi * noise).log()) + (noise / 2 / variances[-1]).log() / 4
    before = [p.clone() for p in vae.parameters()]
    config = FitConfig("mean-field", epochs=6, learning_rate=0.2, beta=0.5)
    svi.fit(vae, splits_of(x, vae.likelihood_module.spec, 50), config)
    assert not any((old == new).any() for old, new in zip(before, vae.parameters(), strict=True))
    reconstruction, kl = closed_form(vae, x)
    assert -1e-4 < best - (reconstruction - kl / 2).mean() < 0.01


def check_records_are_the_closed_form():
    """ELBO terms of weights that stand still, over 20 seeds and 5 particles: `agree`."""
    vae, x, rows = Line(1.3, 0.5).vae.float(), Line().x.float(), []
    reconstruction, kl = (term.mean().item() for term in closed_form(vae, x))
    splits, config = (
        splits_of(x, vae.likelihood_module.spec),
        FitConfig("trace", 5, epochs=1, batch_size=4, learning_rate=1e-12),
    )
    for seed in range(20):
        (record,) = svi.fit(vae, splits, config, seed)
        same([record.kl, record.validation_kl], kl, 1e-5)
        elbos = [record.train_elbo + kl, record.validation_elbo + kl]
        rows.append([record.reconstruction, record.validation_reconstruction, *elbos])
    agree(rows, [reconstruction] * 4)


def check_noise_does_not_follow_the_binarization():
    """E log p(x|z) of x ~ Bernoulli(0.3), drawn apart from z, over 20 seeds: `agree`."""
    likelihood = LIKELIHOODS["bernoulli"](DataSpec((1,), 255, True), torch.zeros(1), torch.ones(1))
    encoder, decoder = nn.Linear(1, 2), nn.Sequential(nn.Linear(1, 1), nn.Unflatten(-1, (1, 1)))
    vae = VAE(StandardNormal(1), encoder, decoder, likelihood)
    for parameter, value in zip(vae.parameters(), [0.0, 0.0, 3.0, 1.0], strict=True):
        parameter.data.fill_(value)
    split = splits_of(torch.full((512, 1), 76.5), likelihood.spec).train
    rows = [evaluation.elbo_terms(vae, split, seed)[0] for seed in range(20)]
    z = torch.linspace(-9, 9, 3601).double()
    log_likelihood = nn.functional.logsigmoid(3 * z + 1) - 0.7 * (3 * z + 1)
    agree(rows, 0.005 * (Normal(0.0, 1.0).log_prob(z).exp() * log_likelihood).sum())


# --- the table ------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """In `target`, a function or method, `old`, which occurs there once, is replaced by `new`."""

    name: str
    target: str
    old: str
    new: str


# fmt: off
TABLE: dict[Callable[[], None], list[Fault]] = {
    check_elbo_of_the_exact_guide_is_the_evidence: [
      Fault("prior's sd 1.1",                       "models.priors.StandardNormal.forward",
            "Normal(self.loc, self.scale)",                "Normal(self.loc, 1.1 * self.scale)"),
      Fault("posterior's scale taken as variance",  "models.posteriors.scale_of",
            "width=2.0).exp()",                            "width=2.0).exp().sqrt()"),
      Fault("variance for the noise's scale",       "models.likelihoods.GaussianLikelihood.forward",
            "MIN_SCALE + log_scale.exp()",                 "MIN_SCALE + (2 * log_scale).exp()"),
      Fault("likelihood averaged over values",      "models.log_weights.log_weights",
            "x, z).double()",                              "x, z).double() / 6"),
      Fault("log-sum for log-mean",             "evidence.importance._estimate",
            "log_sum - math.log(count),",                  "log_sum,"),
      Fault("K - 1 for K",                      "evidence.importance._estimate",
            "math.log(count),",                            "math.log(count - 1),"),
      Fault("squared weights, squared once",    "evidence.importance._estimate",
            "(2 * log_w)",                                 "log_w")],
    check_objectives_and_their_gradients_are_the_closed_form: [
      Fault("β on the likelihood too",          "objectives.elbos._ScaledLatents._pyro_sample",
            "if is_latent(msg):",                          "if True:"),
      Fault("encoder's mean detached",              "models.posteriors.DiagonalGaussian.forward",
            "Normal(loc,",                                 "Normal(loc.detach(),"),
      Fault("particles averaged outside the log", "objectives.importance_weighted._bound",
            "log_w.logsumexp(dim) - math.log",             "log_w.mean(dim) - 0 * math.log")],
    check_importance_sampling_reaches_the_evidence: [
      Fault("log q of the wrong sign",              "models.log_weights.log_weights",
            "- posterior.log_prob(z)",                     "+ posterior.log_prob(z)"),
      Fault("log p(z) left out",                    "models.log_weights.log_weights",
            "vae.prior().log_prob(z) - posterior",         "-posterior"),
      Fault("summed over rows",                 "evidence.importance._estimate",
            ", log_w.logsumexp(0)",                        ", log_w.logsumexp(1)"),
      Fault("the last chunk alone",             "evidence.importance._estimate",
            "torch.logaddexp(log_sum, log_w.logsumexp(0))", "log_w.logsumexp(0)"),
      Fault("upper bound without the true z",   "evidence.importance.upper_bound",
            "own = torch.logaddexp(own, others)",          "own = others")],
    check_weights_say_how_far_to_trust_them: [
      Fault("deviation for standard error",     "evidence.importance._estimate",
            "relative_variance / (count - 1)",             "relative_variance"),
      Fault("tail of the inverse weights",      "evidence.importance._smoothed",
            "psislw(-weights)",                            "psislw(weights)")],
    check_oracle_by_torch_distributions: [
      Fault("noise scale for its variance",         "models.linear_gaussian._precision",
            "noise_scale**2",                              "noise_scale"),
      Fault("missing ½ in the gap",       "models.linear_gaussian.LinearGaussian.approximation_gap",
            "/ 2",                                         ""),
      Fault("marginal variances for 1 / Λⱼⱼ",      "models.linear_gaussian.LinearGaussian.__init__",
            "precision.diagonal().rsqrt()",                "covariance.diagonal().sqrt()"),
      Fault("covariance by N - 1",                  "models.linear_gaussian.probabilistic_pca",
            "/ len(x)",                                    "/ (len(x) - 1)")],
    check_annealing_brackets_the_evidence: [
      Fault("every proposal accepted",            "evidence.annealing._hmc",
            "_choose(taken, end, start)",                  "end"),
      Fault("a last whole kick",                  "evidence.annealing._hmc",
            "(2 if last else 1)",                          "1"),
      Fault("missing ½ in the kinetic energy",    "evidence.annealing._hmc",
            ".sum(-1) / 2",                                ".sum(-1)"),
      Fault("forward kernel of β a step early",   "evidence.annealing._chain",
            "t if reverse else t + 1",                     "t"),
      Fault("reverse kernel of β a step late",    "evidence.annealing._chain",
            "t if reverse else t + 1",                     "t + 1"),
      Fault("weights of the step before",         "evidence.annealing._chain",
            "betas[t + 1] - betas[t]",                     "betas[t] - betas[t - 1]"),
      Fault("reverse weights not inverted",       "evidence.annealing._bounds",
            "inverse = -_chain",                           "inverse = _chain")],
    check_ranks_are_counts_and_uniform_for_the_exact_guide: [
      Fault("≤ for <",                                 "diagnostics.sbc._rank",
            "values[1:] < values[0]",                      "values[1:] <= values[0]"),
      Fault("ranks of squared values",                 "diagnostics.sbc._rank",
            "values[1:] < values[0]",                      "values[1:] ** 2 < values[0] ** 2"),
      Fault("draws of the prior",                      "diagnostics.sbc.simulate",
            "posterior.sample((num_draws,))",              "prior.sample((num_draws, len(x)))")],
    check_rank_tests_by_enumeration: [
      Fault("the other tail",                          "diagnostics.sbc.gamma_p_value",
            "1 - _stays",                                  "_stays"),
      Fault("P(R > r) for P(R ≥ r)",                   "diagnostics.sbc._tails",
            "below, below[::-1, ::-1]",                    "below, 1 - below"),
      Fault("bins of unequal width",                   "diagnostics.sbc.check_ranks",
            "// num_ranks,",                               "// (num_ranks + 1),")],
    check_calibration_of_a_narrow_guide_is_the_closed_form: [
      Fault("interval off by one rank",                "diagnostics.sbc.coverage",
            "latents >= out",                              "latents > out"),
      Fault("HDR from the wrong end",                  "diagnostics.sbc.coverage",
            "density >= 2 * out",                          "density < num_ranks - 2 * out"),
      Fault("variance for sd in z-scores",             "diagnostics.sbc.Simulations.z_scores",
            "/ self.scale",                                "/ self.scale**2"),
      Fault("scale for variance in contraction",       "diagnostics.sbc.Simulations.contraction",
            "** 2",                                        "")],
    check_refinement_finds_the_closed_form_gaps: [
      Fault("amortization of the wrong sign",  "diagnostics.refinement.gaps",
            "diagonal_elbo - encoder_elbo",                "encoder_elbo - diagonal_elbo"),
      Fault("correlation counted twice",       "diagnostics.refinement.gaps",
            "evidence.log_evidence - full_elbo",           "evidence.log_evidence - diagonal_elbo"),
      Fault("off-diagonal part left out",      "diagnostics.refinement.PerRowGuide.posterior",
            "+ self.lower.tril(-1)",                       "")],
    check_energy_test_by_enumeration: [
      Fault("draws paired with themselves",    "diagnostics.aggregate._coefficients",
            "(n * (n - 1))",                               "(n * n)"),
      Fault("missing ½ in the coefficient",    "diagnostics.aggregate._coefficients",
            "(2 * between)",                               "between"),
      Fault("without the observed labelling",  "diagnostics.aggregate.energy_test",
            "larger.mean()",                               "larger[1:].mean()")],
    check_training_moves_every_parameter_and_reaches_pca: [
      Fault("β squared",                          "training.schedules.kl_weight",
            "config.kl_weight *",                          "config.kl_weight**2 *")],
    check_records_are_the_closed_form: [
      Fault("KL of the wrong sign, training",     "training.records.Sums.means",
            "reconstruction - kl",                         "reconstruction + kl"),
      Fault("KL the other way, ELBO terms",         "models.vae.VAE.elbo_terms",
            "kl(posterior, self.prior()",                   "kl(self.prior(), posterior"),
      Fault("posterior's mean for a draw",          "models.vae.VAE.elbo_terms",
            "posterior.sample()",                          "posterior.mean"),
      Fault("particles summed",                   "training.terms.ElboTerms.observed",
            ".mean(0)",                                    ".sum(0)")],
    check_noise_does_not_follow_the_binarization: [
      Fault("one seed for noise and binarization", "evidence.evaluation._bounds",
            'derive(seed, "posterior")',                   "seed")],
}
# fmt: on


def each_fault(table: dict[Callable, list[Fault]]) -> pytest.MarkDecorator:
    """Parametrizes a test by the checks and faults of a table."""
    cases = [pytest.param(c, f, id=f.name) for c, faults in table.items() for f in faults]
    return pytest.mark.parametrize(("check", "fault"), cases)


CHECKS = list(TABLE)


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the faulty function wherever the sound one was known."""
    package, home, *owners, name = fault.target.split(".")
    module = importlib.import_module(f"pyro_vae.{package}.{home}")
    owner = getattr(module, owners[0]) if owners else module
    sound = inspect.getattr_static(owner, name)
    source = inspect.getsource(sound.fget if isinstance(sound, property) else sound)
    if (count := source.count(fault.old)) != 1:
        raise LookupError(f"{fault.old!r} occurs {count} times in {fault.target}, not once")
    source = textwrap.dedent(source).replace(fault.old, fault.new)
    # Within a function of `__class__`, for super() without arguments; annotations stay text here.
    source = f"def make(__class__):\n{textwrap.indent(source, '    ')}\n    return {name}"
    made: dict[str, Callable] = {}
    exec(compile(source, f"<{fault.name}>", "exec"), module.__dict__, made)
    faulty = made["make"](owner)
    monkeypatch.setattr(owner, name, faulty)
    for other in [m for key, m in sys.modules.items() if key.startswith("pyro_vae")]:
        for key, value in list(vars(other).items()):
            if value is sound:
                monkeypatch.setattr(other, key, faulty)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound_code_passes(check):
    check()


@each_fault(TABLE)
def test_planted_fault_is_caught(check, fault, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("log_sum_squares", 4)])
def test_a_row_whose_text_is_gone_fails_loudly(old, count, monkeypatch):
    with pytest.raises(LookupError, match=f"occurs {count} times"):
        plant(Fault("", "evidence.importance._estimate", old, ""), monkeypatch)
