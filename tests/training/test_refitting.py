"""Refits against closed forms: the linear-Gaussian model, whose posterior is known.

With s = 0 the loss is −ELBO, with s = 1 it is −log q over simulated pairs. A family that contains
the posterior reaches it either way. The best diagonal Gaussian has the variances 1 / Λⱼⱼ for the
first, and the diagonal of Λ⁻¹ for the second.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
from pyro.distributions import MultivariateStudentT
from test_faults import Fault, plant
from torch.distributions import kl_divergence

import pyro_vae
from pyro_vae import InputError, LinearGaussian, RefitConfig, refit
from pyro_vae.models import refined
from pyro_vae.models.build import build_blank, new_guide
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.refined import MAX_DF, Refined, local_shape
from pyro_vae.models.vae import VAE
from pyro_vae.training import refitting
from pyro_vae.training.records import Diverged

DATA, LATENTS, NOISE = 5, 2, 0.6


def oracle(guide="collapsed") -> LinearGaussian:
    torch.manual_seed(3)
    mixing = torch.tensor([[1.0, 0.9], [0.0, 0.5]])  # latents of the posterior are correlated
    weight = torch.randn(DATA, LATENTS) @ mixing
    return LinearGaussian(weight, torch.randn(DATA), NOISE, guide=guide)


@pytest.fixture(scope="module")
def rows() -> pyro_vae.Splits:
    vae = oracle()
    torch.manual_seed(4)
    return pyro_vae.load_data(vae.likelihood(vae.prior().sample((600,))).sample().detach().numpy())


FAST = RefitConfig("full", encoder_hidden=(), steps=400, batch_size=256, learning_rate=0.1)


def fitted(rows, **changes):
    """The oracle, and the exact and the refitted posterior of 50 rows."""
    vae = oracle()
    new = refit(vae, rows, dataclasses.replace(FAST, **changes), seed=1)
    x = next(rows.test.fixed("real", 0))[:50]
    with torch.no_grad():
        return vae, vae.exact_posterior(x), new.posterior(x)


def check_the_full_guide_reaches_the_posterior(rows, simulated=0.5):
    _, exact, q = fitted(rows, simulated=simulated)
    assert kl_divergence(q, exact).mean() < 0.01


def check_the_diagonal_guide_reaches_the_best_one(rows, simulated=1.0):
    vae, exact, q = fitted(rows, guide="diagonal", simulated=simulated)
    covariance = torch.linalg.inv(vae.posterior_precision)
    best = 1 / vae.posterior_precision.diagonal() if simulated == 0 else covariance.diagonal()
    torch.testing.assert_close(q.variance.log().mean(0), best.log(), rtol=0, atol=0.1)
    assert ((q.mean - exact.mean) / best.sqrt()).square().mean() < 0.02


def check_steps_see_the_data_in_the_units_of_the_likelihood():
    """Binarized rows, of which half are near training rows, and pairs of the model."""
    splits = pyro_vae.load_data("digits")
    config = pyro_vae.ModelConfig(likelihood="bernoulli", hidden=(4,), latent_dim=2)
    vae = pyro_vae.build(config, splits)
    with torch.no_grad():  # rows of the model have ink where no training row has any
        vae.decoder.layers[-1].weight.zero_()
        vae.decoder.bias.fill_(-3.0)
        vae.decoder.bias[..., 0, 0] = 30.0
    seen = []

    class Spy:
        def step(self, *arguments):
            seen.append(arguments)
            return 0.0

    torch.manual_seed(0)
    refitting._step(Spy(), vae, vae, splits.train, dataclasses.replace(FAST, batch_size=40))
    ((x, simulated, z),) = seen
    assert len(x) == len(simulated) == len(z) == 40
    assert set(x.unique().tolist()) == set(simulated.unique().tolist()) == {0.0, 1.0}
    from_model = x[:, 0, 0, 0] == 1
    assert from_model[:20].all()
    assert not from_model[20:].any()
    assert (simulated[:, 0, 0, 0] == 1).all()


def check_the_best_record_is_kept(rows):
    """The guide is that of the record with the highest score, here made the fourth of ten."""
    record, weights = refitting._record, []

    def scored(vae, splits, config, seed, step, seconds):
        weights.append(vae.encoder.layers[-1].weight.clone())
        found = record(vae, splits, config, seed, step, seconds)
        return dataclasses.replace(found, score=-abs(step - 8.0))

    config = dataclasses.replace(FAST, steps=20, batch_size=8)
    with mock.patch.object(refitting, "_record", scored):
        new = refit(oracle(), rows, config, seed=1)
    assert len(weights) == 10
    assert torch.equal(new.encoder.layers[-1].weight, weights[3])


def check_a_score_is_the_loss_of_the_validation_rows(rows):
    records = []
    config = dataclasses.replace(FAST, steps=3, batch_size=8, simulated=0.25)
    refit(oracle(), rows, config, seed=1, on_record=records.append)
    for record in records:
        mean = 0.75 * record.validation_elbo + 0.25 * record.simulated_log_q
        assert abs(record.score - mean) < 1e-6 * abs(mean)


def guesses(loc: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Features of N(loc, scale²)."""
    return torch.cat([loc, torch.full_like(loc, math.log(scale))], dim=-1)


def check_the_refined_guide_is_exact_for_the_linear_model(rows):
    """From guesses at any distance; without sweeps and with them."""
    vae = oracle()
    x = next(rows.test.fixed("real", 0))[:50]
    exact = vae.exact_posterior(x)
    for newton, sweeps in ((6, 0), (6, 1)):
        torch.manual_seed(0)
        q = Refined(LATENTS, newton, sweeps)(guesses(torch.randn(50, LATENTS)), x, vae)
        torch.testing.assert_close(q.mean, exact.mean, rtol=1e-3, atol=1e-3)
        covariance = q.scale_tril @ q.scale_tril.mT
        torch.testing.assert_close(covariance, exact.covariance_matrix, rtol=1e-3, atol=1e-4)
        assert (q.scale_tril.triu(1) == 0).all()
        assert q.df.unique() == MAX_DF


def check_a_sweep_reaches_the_posterior_of_the_linear_model(rows):
    """From N(μ, B Bᵀ) within three standard deviations; its ELBO is in closed form."""
    vae = oracle().double()
    x = next(rows.test.fixed("real", 0))[:50].double()
    exact = vae.exact_posterior(x)
    torch.manual_seed(0)
    factor = exact.scale_tril @ (torch.eye(LATENTS) + 0.5 * torch.rand(50, 2, 2)).tril().double()
    loc = exact.mean + 0.3 * exact.variance.sqrt()
    elbo, new_loc, new_factor = refined.sweep(vae, x, loc, factor)
    torch.testing.assert_close(new_loc, exact.mean, rtol=1e-6, atol=1e-6)
    covariance = new_factor @ new_factor.mT
    torch.testing.assert_close(covariance, exact.covariance_matrix, rtol=1e-6, atol=1e-6)
    q = torch.distributions.MultivariateNormal(loc, scale_tril=factor)
    expected = vae.exact_log_evidence(x) - kl_divergence(q, exact)
    constant = LATENTS * (1 + math.log(2 * math.pi)) / 2
    torch.testing.assert_close(elbo + constant, expected, rtol=1e-6, atol=1e-6)


class Steep(torch.nn.Module):
    """x = tanh(3 z): where it is flat, sweeps from a narrow Gaussian overshoot."""

    def forward(self, z):
        return torch.tanh(3 * z)


def check_the_iterate_with_the_highest_elbo_is_taken():
    vae = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 0.05)
    vae.decoder = Steep()
    x = torch.linspace(-1.2, 1.2, 25)[:, None]
    guess = guesses(0.2 * x)
    start, end = (Refined(1, 4, sweeps)(guess, x, vae) for sweeps in (0, 4))
    torch.manual_seed(0)
    before, after = (refined.sweep(vae, x, q.loc, q.scale_tril)[0] for q in (start, end))
    assert (after >= before - 1e-4).all()
    assert (after - before).max() > 0.05  # the sweeps are of use


class Steps(LinearGaussian):
    """p(z) is narrow around −1 and 1: far steeper than its variance tells."""

    def prior(self):
        normals = torch.distributions.Normal(torch.tensor([[-1.0], [1.0]]), 0.02)
        weights = torch.distributions.Categorical(torch.ones(2))
        parts = torch.distributions.Independent(normals, 1)
        return torch.distributions.MixtureSameFamily(weights, parts)


def check_no_row_is_worse_than_its_guess():
    """Newton steps leave such a prior, and sweeps do not come back."""
    vae = Steps(torch.ones(1, 1), torch.zeros(1), 1.0)
    x = torch.linspace(-2, 2, 8)[:, None]
    near = x.sign() + torch.linspace(-0.03, 0.03, 8)[:, None]
    q = Refined(1, 3, 3)(guesses(near, 0.03), x, vae)
    factor = torch.full((8, 1, 1), 0.03)
    before, after = (refined.sweep(vae, x, *g)[0] for g in ((near, factor), (q.loc, q.scale_tril)))
    assert (after >= before - 1e-4).all()
    torch.testing.assert_close(q.mean, x.sign() + 0.0004 * (x - x.sign()), rtol=0, atol=2e-3)


class Folded(torch.nn.Module):
    """x = z² + z: two z for each x, of which the prior prefers the one nearer to 0."""

    def forward(self, z):
        return z**2 + z


def check_the_highest_mode_is_found():
    """From guesses at the other root of z² + z = 2, −2; the higher mode is near 1."""
    vae = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 0.1)
    vae.decoder = Folded()
    vae.family = refined.Refined(1, 4, 2)
    torch.manual_seed(0)
    vae.family.starts.normal_()
    x, guess = torch.full((5, 1), 2.0), torch.linspace(-2.3, 1.3, 5)[:, None]
    q = vae.family(guesses(guess), x, vae)
    assert (q.mean - 1).abs().max() < 0.05
    # A guess that is better than all draws is kept.
    vae.family.starts.fill_(-2.0)
    assert (vae.family(guesses(torch.tensor([[1.01]])), x[:1], vae).mean - 1).abs() < 0.05


def check_tails_are_found():
    """Radii of t distributions: ν and c, within four standard errors (about 4% and 0.2%)."""
    generator = np.random.default_rng(0)
    family = Refined(6, 0, 0)
    for df, width in ((8.0, 0.9), (30.0, 1.2)):
        normal = generator.standard_normal((40_000, 6))
        radii = width * np.linalg.norm(normal, axis=1)
        radii *= np.sqrt(df / generator.chisquare(df, 40_000))
        family.set_tail(radii)
        assert abs(family.df.item() / df - 1) < 0.16
        assert abs(family.width.item() / width - 1) < 0.01
    family.set_tail(np.linalg.norm(generator.standard_normal((40_000, 6)), axis=1))
    assert family.df > 300


def check_the_posterior_has_the_fitted_tail(rows):
    vae, x = oracle(), next(rows.test.fixed("real", 0))[:5]
    family = Refined(LATENTS, 3, 0)
    before = family(guesses(torch.zeros(5, LATENTS)), x, vae)
    family.width.fill_(1.3)
    family.df.fill_(9.0)
    after = family(guesses(torch.zeros(5, LATENTS)), x, vae)
    torch.testing.assert_close(after.scale_tril, 1.3 * before.scale_tril)
    assert torch.equal(after.mean, before.mean)
    assert after.df.unique() == 9


def check_radii_are_in_units_of_the_scale():
    """Of the exact guide, squared radii of pairs are chi-square with Z degrees of freedom."""
    vae, done = oracle("exact"), []
    radii = refitting._radii(vae, 0, done.append)
    assert len(radii) == sum(done) == refitting.TAIL_PAIRS
    error = math.sqrt(2 * LATENTS / len(radii))
    assert abs((radii**2).mean() - LATENTS) < 4 * error


# fmt: off
TABLE = {
    check_the_full_guide_reaches_the_posterior: [
        Fault("sign of the pairs",    "objectives.simulated.WithSimulated.differentiable_loss",
              "- self.simulated * log_q",            "+ 0.3 * self.simulated * log_q"),
        Fault("pairs of other rows",  "training.refitting._step",
              "simulated = vae.likelihood(z).sample()",
              "simulated = vae.likelihood(z.flip(0)).sample()"),
        Fault("z after noise",        "training.refitting._step",
              "torch.cat([near, x[num_near:]]), simulated, z",
              "torch.cat([near, x[num_near:]]), simulated, z + 0.3 * torch.randn_like(z)")],
    check_the_diagonal_guide_reaches_the_best_one: [
        Fault("weights swapped",      "objectives.simulated.WithSimulated.differentiable_loss",
              "(1 - self.simulated) * loss - self.simulated * log_q",
              "self.simulated * loss - (1 - self.simulated) * log_q")],
    check_steps_see_the_data_in_the_units_of_the_likelihood: [
        Fault("binarization forgotten", "training.refitting._step",
              "train.take(index, vae.likelihood_module.units)", 'train.take(index, "unit")'),
        Fault("means for near rows",  "training.refitting._step",
              ".sample()).sample()",                 ".sample()).mean"),
        Fault("near rows only",       "training.refitting._step", "x[num_near:]", "near")],
    check_the_best_record_is_kept: [
        Fault("the last",             "training.refitting._trained",
              "record.score > best_score",           "True")],
    check_a_score_is_the_loss_of_the_validation_rows: [
        Fault("ELBO of the wrong sign", "training.refitting._record",
              "(1 - config.simulated) * elbo +",     "(config.simulated - 1) * elbo +")],
    check_the_refined_guide_is_exact_for_the_linear_model: [
        Fault("no slope of the prior", "models.refined._slopes",
              "+ vae.prior().log_prob(z)",           ""),
        Fault("no precision of the prior", "models.refined.local_shape",
              "variance.reciprocal().diag()",        "0"),
        Fault("no curvature",         "models.refined.local_shape",
              "weight = -_first",                    "weight = 0 * _first"),
        Fault("factor transposed",    "models.refined.local_shape",
              "solve_triangular(upper.mT, identity, upper=False)",
              "solve_triangular(upper, identity, upper=True)"),
        Fault("a third of a step",    "models.refined.newton_step",
              "_apply(factor, wh",                   "_apply(factor / 3, wh"),
        Fault("step upwards",         "models.refined.newton_step", "factor.mT", "-factor.mT"),
        Fault("slope not whitened",   "models.refined.newton_step", "factor.mT", "factor")],
    check_a_sweep_reaches_the_posterior_of_the_linear_model: [
        Fault("points too near",      "models.refined.sweep",
              "math.sqrt(size) * factor.movedim",    "factor.movedim"),
        Fault("rows of B for columns", "models.refined.sweep",
              "factor.movedim(-1, 0)",               "factor.movedim(-2, 0)"),
        Fault("curvature upwards",    "models.refined.sweep", "below - above", "above - below"),
        Fault("slope below only",     "models.refined.sweep", "slopes.mean(0)", "slopes[-1]"),
        Fault("precision for covariance", "models.refined.sweep",
              "values.reciprocal()",                 "values"),
        Fault("no entropy",           "models.refined.sweep",
              ".log().sum(-1)",                      ".log().sum(-1) * 0")],
    check_the_iterate_with_the_highest_elbo_is_taken: [
        Fault("the last iterate",     "models.refined.Refined._gaussian",
              "choose(elbo > highest",               "choose(elbo == elbo")],
    check_no_row_is_worse_than_its_guess: [
        Fault("from Newton's place",  "models.refined.Refined._gaussian",
              "best = [guess, scale.diag_embed()]",  "best = [loc, factor]"),
        Fault("with any scale",       "models.refined.Refined._gaussian",
              "scale.diag_embed()",                  "(scale * 30).diag_embed()"),
        Fault("on from Newton's",     "models.refined.Refined._gaussian",
              "choose(better, after, following)", "after")],
    check_the_highest_mode_is_found: [
        Fault("always the guess",     "models.refined.Refined._start",
              "own >= highest",                      "own == own"),
        Fault("never the guess",      "models.refined.Refined._start",
              "own >= highest",                      "own != own"),
        Fault("the worst start",      "models.refined.Refined._start", ".max(0)", ".min(0)")],
    check_tails_are_found: [
        Fault("squared twice",        "models.refined.Refined.set_tail",
              ") ** 2 / df",                         ") ** 4 / df"),
        Fault("width inverted",       "models.refined.Refined.set_tail",
              "+ size * logs[0]",                    "- size * logs[0]"),
        Fault("degrees of freedom",   "models.refined.Refined.set_tail",
              "gammaln(df / 2)",                     "gammaln(df)")],
    check_the_posterior_has_the_fitted_tail: [
        Fault("width inverted, used", "models.refined.Refined.forward",
              "self.width.to(loc) * factor",         "factor / self.width.to(loc)"),
        Fault("width not used",       "models.refined.Refined.forward",
              "self.width.to(loc) * factor",         "factor"),
        Fault("tails not used",       "models.refined.Refined.forward",
              "self.df.to(loc)",                     "torch.tensor(1000.0)")],
    check_radii_are_in_units_of_the_scale: [
        Fault("without the mean",     "training.refitting._radii", "z - q.loc", "z"),
        Fault("scale squared",        "training.refitting._radii",
              "q.scale_tril, away",                  "q.scale_tril @ q.scale_tril, away")],
}
# fmt: on


def run_check(check, rows):
    check(*[rows][: "rows" in check.__code__.co_varnames[: check.__code__.co_argcount]])


@pytest.mark.slow
@pytest.mark.parametrize("simulated", [0.0, 1.0])
def test_either_half_alone_reaches_the_closed_form(simulated, rows):
    check_the_full_guide_reaches_the_posterior(rows, simulated)
    check_the_diagonal_guide_reaches_the_best_one(rows, simulated)


@pytest.mark.parametrize("check", list(TABLE), ids=lambda check: check.__name__)
def test_sound_refit_passes(check, rows):
    run_check(check, rows)


@pytest.mark.parametrize(
    ("check", "fault"),
    [pytest.param(c, f, id=f.name) for c, faults in TABLE.items() for f in faults],
)
def test_planted_fault_of_a_refit_is_caught(check, fault, rows, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, torch.linalg.LinAlgError, Diverged)):
        run_check(check, rows)


def test_the_model_stays_bit_for_bit_and_the_guide_moves(rows):
    vae = oracle()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    few = dataclasses.replace(FAST, steps=5)
    new = refit(vae, rows, few, seed=1)
    refit(vae, rows, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]), name
    for part in ("prior_module", "decoder", "likelihood_module"):
        for name, value in getattr(new, part).state_dict().items():
            assert torch.equal(value, getattr(vae, part).state_dict()[name]), name
    assert all(p.requires_grad for p in vae.parameters())
    assert all(p.requires_grad for p in new.parameters())
    fresh = new_guide(vae, few.guide, few.encoder_hidden, seed=1)
    for name, value in fresh.encoder.named_parameters():
        assert not torch.equal(value, dict(new.encoder.named_parameters())[name]), name
    again, other = refit(vae, rows, few, seed=1), refit(vae, rows, few, seed=2)
    x = next(rows.test.fixed("real", 0))
    assert torch.equal(again.posterior(x).mean, new.posterior(x).mean)
    assert not torch.equal(other.posterior(x).mean, new.posterior(x).mean)


def test_the_students_density_and_draws_are_those_of_pyro():
    torch.manual_seed(0)
    factor, loc = torch.randn(4, 3, 3).tril().double(), torch.randn(4, 3).double()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.3)
    ours, theirs = (
        kind(torch.tensor(7.0).double(), loc, factor)
        for kind in (refined.StudentT, MultivariateStudentT)
    )
    draws = []
    for q in (ours, theirs, ours.expand((5, 4))):
        torch.manual_seed(1)
        draws.append(q.rsample(() if len(q.batch_shape) == 2 else (5,)))
    torch.testing.assert_close(draws[0], draws[1])
    torch.testing.assert_close(ours.log_prob(draws[0]), theirs.log_prob(draws[0]))
    torch.testing.assert_close(ours.expand((5, 4)).log_prob(draws[2]), theirs.log_prob(draws[2]))


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_local_shape_is_the_gradient_and_the_curvature(name):
    """Against torch's own derivatives, of a nonlinear decoder in float64."""
    splits = pyro_vae.load_data("digits")
    if name == "gaussian":
        splits = pyro_vae.load_data(np.random.default_rng(0).normal(size=(200, 6)))
    config = pyro_vae.ModelConfig(likelihood=name, hidden=(7,), latent_dim=3)
    vae = pyro_vae.build(config, splits, seed=1).double()
    x = next(splits.test.fixed(vae.likelihood_module.units, 0))[:4].double()
    torch.manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        slope, factor = local_shape(vae, vae.prior().variance, x, z)
    jacobian = torch.autograd.functional.jacobian
    for row, point, found, root in zip(x, z, slope, factor, strict=True):

        def log_joint(z, row=row):
            return vae.likelihood(z).log_prob(row) + vae.prior().log_prob(z)

        torch.testing.assert_close(found, jacobian(log_joint, point), rtol=1e-9, atol=1e-9)
        raw = vae.decoder(point).detach()

        def of_first(first, raw=raw, row=row):
            output = torch.cat([first.reshape(1, *raw.shape[1:]), raw[1:]])
            return vae.likelihood_module(output).log_prob(row)

        columns = jacobian(lambda p: vae.decoder(p)[0], point).flatten(0, -2)
        hessian = torch.autograd.functional.hessian(of_first, raw[0].flatten())
        weight = (-hessian.diagonal()).clamp_min(0)
        precision = columns.T @ (weight[:, None] * columns) + torch.eye(3, dtype=torch.float64)
        inverse = torch.linalg.inv(root @ root.T)
        torch.testing.assert_close(inverse, precision, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("guide", ["diagonal", "full", "flow", "mixture", "refined"])
@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", "flow"])
def test_every_family_can_be_refitted(guide, prior, digits, monkeypatch):
    monkeypatch.setattr(refitting, "TAIL_PAIRS", 50)
    monkeypatch.setattr(refitting, "SCORED", 50)
    model = pyro_vae.ModelConfig(prior=prior, hidden=(8,), latent_dim=2)
    vae = pyro_vae.build(model, digits)
    config = RefitConfig(guide) if guide == "refined" else RefitConfig(guide, None, 0.5, 2, 8)
    new = refit(vae, digits, config)
    x = next(digits.test.fixed("count", 0))[:6]
    assert torch.isfinite(new.posterior(x).log_prob(torch.zeros(6, 2))).all()
    # The density of a vamp prior, as of all others, is that of the trained model.
    z = torch.randn(50, 2)
    torch.testing.assert_close(new.prior().log_prob(z), vae.prior().log_prob(z))
    settings = dataclasses.replace(model, likelihood="binomial")
    blank = build_blank(refitting.refitted_config(settings, config), digits.spec)
    blank.load_state_dict(new.state_dict())
    torch.testing.assert_close(blank.eval().posterior(x).mean, new.posterior(x).mean)


@pytest.mark.parametrize("guide", ["diagonal", "full", "flow", "mixture"])
def test_guesses_of_a_refined_guide_are_those_of_the_trained_one(guide, digits):
    vae = pyro_vae.build(pyro_vae.ModelConfig(guide=guide, hidden=(8,), latent_dim=2), digits)
    x = next(digits.test.fixed("count", 0))[:6]
    features = new_guide(vae, RefitConfig().guide, None).encoder(x)
    loc, log_scale = features.chunk(2, dim=-1)
    q = vae.posterior(x)
    means = q.loc if guide == "flow" else q.mean
    if guide == "mixture":
        means = q.component_distribution.mean[:, 0]
        scales = q.component_distribution.stddev[:, 0]
    elif guide == "diagonal":
        scales = q.stddev
    else:  # given the latents before it
        scales = q.scale_tril.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(loc, means)
    torch.testing.assert_close(log_scale.exp(), scales)


def test_images_and_convolutions(digits, monkeypatch):
    monkeypatch.setattr(refitting, "TAIL_PAIRS", 50)
    config = pyro_vae.ModelConfig(architecture="conv", hidden=(4, 4), latent_dim=2)
    new = refit(pyro_vae.build(config, digits), digits)
    x = next(digits.test.fixed("count", 0))[:3]
    assert new.posterior(x).mean.shape == (3, 2)
    # Rows of any leading shape, and in chunks
    torch.testing.assert_close(
        new.posterior(x.reshape(3, 1, 1, 8, 8)).mean[:, 0], new.posterior(x).mean
    )
    monkeypatch.setattr("pyro_vae.models.refined.rows_at_once", lambda *args, **kwargs: 2)
    torch.testing.assert_close(new.posterior(x).mean, new.posterior(x).mean)


def test_what_cannot_be_refitted_says_so(rows, digits):
    autoencoder = pyro_vae.build(pyro_vae.ModelConfig(kind="ae", hidden=(4,)), digits)
    with pytest.raises(InputError, match="expects a VAE"):
        refit(autoencoder, digits)

    class Own(VAE):
        def model(self, x):
            return super().model(x)

    own = pyro_vae.build(pyro_vae.ModelConfig(hidden=(4,)), digits)
    own.__class__ = Own
    with pytest.raises(InputError, match="Own has its own model"):
        refit(own, digits)
    with pytest.raises(InputError, match="not enough memory"):
        refit(oracle(), rows, dataclasses.replace(FAST, batch_size=2**40))
    with pytest.raises(InputError, match="train with another, and refit"):
        pyro_vae.fit(refit(oracle(), rows), rows)
    vae = oracle()
    with torch.no_grad():
        vae.decoder.bias.fill_(math.nan)
    with pytest.raises(Diverged, match="not finite"):
        refit(vae, rows, dataclasses.replace(FAST, steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulated": 1.5}, "--simulated expects 0 to 1; got 1.5"),
        ({"steps": 0}, "--steps expects an integer of at least 1"),
        ({"batch_size": -1}, "--batch-size expects an integer of at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate expects a number above 0"),
        ({"encoder_hidden": (3, 0)}, "--encoder-hidden expects an integer of at least 1"),
        ({"guide": "fll"}, "--guide expects one of diagonal, full, flow, mixture, refined"),
        ({"guide": "refined", "steps": 3}, "--steps has no effect on --guide refined"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        RefitConfig(**{"guide": "full", **changes})
