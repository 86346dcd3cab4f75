"""Refits against closed forms: the linear-Gaussian model, whose posterior is known.

With s = 0 the loss is −ELBO, with s = 1 it is −log q over simulated pairs. A family that contains
the posterior reaches it either way. The best diagonal Gaussian has the variances 1 / Λⱼⱼ for the
first, and the diagonal of Λ⁻¹ for the second.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from pyro_vae.models.laplace import MAX_DF, Laplace, local_shape
from test_faults import Fault, plant
from torch.distributions import kl_divergence

import pyro_vae
from pyro_vae import InputError, LinearGaussian, RefitConfig, refit
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.vae import VAE
from pyro_vae.training import refitting

DATA, LATENTS, NOISE = 5, 2, 0.6


def oracle(guide="collapsed") -> LinearGaussian:
    torch.manual_seed(3)
    weight = torch.randn(DATA, LATENTS) + torch.tensor([1.0, 0.0]).flip(0)
    return LinearGaussian(weight, torch.randn(DATA), NOISE, guide=guide)


@pytest.fixture(scope="module")
def rows() -> pyro_vae.Splits:
    vae = oracle()
    torch.manual_seed(4)
    return pyro_vae.load_data(vae.likelihood(vae.prior().sample((600,))).sample().detach().numpy())


FAST = RefitConfig("full", encoder_hidden=(), steps=400, batch_size=64, learning_rate=0.03)


def fitted(rows, **changes):
    """The exact posterior and the refitted one of 50 rows."""
    vae = oracle()
    new = refit(vae, rows, dataclasses.replace(FAST, **changes), seed=1)
    x = next(rows.test.fixed("real", 0))[:50]
    with torch.no_grad():
        return vae, vae.exact_posterior(x), new.posterior(x)


def check_the_full_guide_reaches_the_posterior(rows):
    for simulated in (0.0, 0.5, 1.0):
        _, exact, q = fitted(rows, simulated=simulated)
        assert kl_divergence(q, exact).max() < 0.01, simulated


def check_the_diagonal_guide_reaches_the_best_one(rows):
    for simulated in (0.0, 1.0):
        vae, exact, q = fitted(rows, guide="diagonal", simulated=simulated)
        precision = vae.posterior_precision
        best = (
            1 / precision.diagonal() if simulated == 0 else torch.linalg.inv(precision).diagonal()
        )
        torch.testing.assert_close(q.variance, best.expand(50, -1), rtol=0.08, atol=0)
        off = (q.mean - exact.mean) / best.sqrt()
        assert off.abs().max() < 0.1


def check_steps_see_the_data_in_the_units_of_the_likelihood(monkeypatch):
    """Binarized rows, of which half are near training rows, and pairs of the model."""
    splits = pyro_vae.load_data("digits")
    vae = pyro_vae.build(
        pyro_vae.ModelConfig(likelihood="bernoulli", hidden=(4,), latent_dim=2), splits
    )
    with torch.no_grad():  # z is written into the first two pixels
        vae.decoder.layers[-1].weight.zero_()
        vae.decoder.bias.fill_(-3.0)
        vae.decoder.bias[..., 7, 7] = 30.0  # no training row has ink there
    seen = []

    class Spy:
        def step(self, *arguments):
            seen.append(arguments)
            return 0.0

    torch.manual_seed(0)
    refitting._step(Spy(), vae, vae, splits.train, RefitConfig(batch_size=40))
    ((x, simulated, z),) = seen
    assert len(x) == len(simulated) == len(z) == 40
    assert set(x.unique().tolist()) == set(simulated.unique().tolist()) == {0.0, 1.0}
    from_model = x[:, 0, 7, 7] == 1
    assert from_model[:20].all() and not from_model[20:].any()
    assert (simulated[:, 0, 7, 7] == 1).all()


def check_the_best_record_is_kept(rows):
    """A learning rate that ends in noise: the guide is that of the best record."""
    records = []
    config = dataclasses.replace(FAST, steps=20, learning_rate=0.5)
    vae = oracle()
    new = refit(vae, rows, config, seed=1, on_record=records.append)
    scores = [record.score for record in records]
    assert scores.index(max(scores)) < len(scores) - 1
    again = refitting._record(new, rows.validation, config, 1, 0, 0.0)
    assert again.score == pytest.approx(max(scores), abs=1e-4)


def check_the_laplace_guide_is_exact_for_the_linear_model(rows):
    vae = oracle()
    x = next(rows.test.fixed("real", 0))[:50]
    exact = vae.exact_posterior(x)
    family = Laplace(LATENTS, 8)
    for parameter in family.correction[-1].parameters():
        torch.nn.init.zeros_(parameter)
    torch.manual_seed(0)
    features = torch.cat([torch.randn(50, LATENTS), torch.zeros(50, 8)], -1)
    q = family(features, x, vae)
    torch.testing.assert_close(q.mean, exact.mean, rtol=1e-3, atol=1e-3)
    covariance = q.scale_tril @ q.scale_tril.mT
    torch.testing.assert_close(covariance, exact.covariance_matrix, rtol=1e-3, atol=1e-4)
    assert (q.scale_tril.triu(1) == 0).all()
    assert q.df.unique() == MAX_DF


def check_tails_are_found():
    """Radii of t distributions: ν and c, within four standard errors (about 4% and 0.2%)."""
    generator = np.random.default_rng(0)
    family = Laplace(6, 8)
    for df, width in ((8.0, 0.9), (30.0, 1.2)):
        normal = generator.standard_normal((40_000, 6))
        radii = width * np.linalg.norm(normal, axis=1)
        radii *= np.sqrt(df / generator.chisquare(df, 40_000))
        family.set_tail(radii)
        assert family.df.item() == pytest.approx(df, rel=0.16)
        assert family.width.item() == pytest.approx(width, rel=0.01)
    family.set_tail(np.linalg.norm(generator.standard_normal((40_000, 6)), axis=1))
    assert family.df > 300


def check_radii_are_in_units_of_the_scale(rows):
    """Of the exact guide, squared radii of pairs are chi-square with Z degrees of freedom."""
    radii = refitting._radii(oracle("exact"), 0)
    assert len(radii) == refitting.TAIL_PAIRS
    error = math.sqrt(2 * LATENTS / len(radii))
    assert (radii**2).mean() == pytest.approx(LATENTS, abs=4 * error)


TABLE = {
    check_the_full_guide_reaches_the_posterior: [
        Fault(
            "sign of the pairs",
            "objectives.simulated.WithSimulated.differentiable_loss",
            "- self.simulated * log_q",
            "+ 0.3 * self.simulated * log_q",
        ),
        Fault(
            "pairs of other rows",
            "training.refitting._step",
            "simulated = vae.likelihood(z).sample()",
            "simulated = vae.likelihood(z.flip(0)).sample()",
        ),
        Fault(
            "z of the guide for that of the prior",
            "training.refitting._step",
            "z = vae.prior().sample((len(x),))",
            "z = vae.posterior(x).sample() + 1",
        ),
    ],
    check_the_diagonal_guide_reaches_the_best_one: [
        Fault(
            "weights swapped",
            "objectives.simulated.WithSimulated.differentiable_loss",
            "(1 - self.simulated) * loss - self.simulated * log_q",
            "self.simulated * loss - (1 - self.simulated) * log_q",
        ),
    ],
    check_steps_see_the_data_in_the_units_of_the_likelihood: [
        Fault(
            "binarization forgotten",
            "training.refitting._step",
            "train.take(index, vae.likelihood_module.units)",
            'train.take(index, "unit")',
        ),
        Fault(
            "means for near rows",
            "training.refitting._step",
            ".sample()).sample()",
            ".sample()).mean",
        ),
        Fault("near rows only", "training.refitting._step", "x[num_near:]", "near"),
    ],
    check_the_best_record_is_kept: [
        Fault("the worst", "training.refitting.refit", "record.score > best_score", "True"),
        Fault(
            "ELBO of the wrong sign",
            "training.refitting._record",
            "(1 - config.simulated) * elbo +",
            "(config.simulated - 1) * elbo +",
        ),
    ],
    check_the_laplace_guide_is_exact_for_the_linear_model: [
        Fault(
            "without the prior's slope",
            "models.laplace.local_shape",
            "prior_slope + likelihood_slope",
            "likelihood_slope",
        ),
        Fault(
            "without the prior's precision",
            "models.laplace.local_shape",
            "vae.prior().variance.reciprocal().diag()",
            "0",
        ),
        Fault(
            "no curvature", "models.laplace.local_shape", "weight = -_first", "weight = 0 * _first"
        ),
        Fault(
            "factor of the precision",
            "models.laplace.local_shape",
            "solve_triangular(upper.mT, identity",
            "solve_triangular(identity, upper.mT",
        ),
        Fault("half a step", "models.laplace.newton_step", "_apply(factor, wh", "_apply(0.5 * factor, wh"),
        Fault("step upwards", "models.laplace.newton_step", "factor.mT", "-factor.mT"),
        Fault("slope not whitened", "models.laplace.newton_step", "factor.mT", "factor"),
    ],
    check_tails_are_found: [
        Fault("radii squared twice", "models.laplace.Laplace.set_tail", ") ** 2 / df", ") ** 4 / df"),
        Fault("width inverted", "models.laplace.Laplace.set_tail", "+ size * logs[0]", "- size * logs[0]"),
        Fault("degrees of freedom", "models.laplace.Laplace.set_tail", "gammaln(df / 2)", "gammaln(df)"),
    ],
    check_radii_are_in_units_of_the_scale: [
        Fault("without the mean", "training.refitting._radii", "z - q.loc", "z"),
        Fault("transposed", "training.refitting._radii", "q.scale_tril, away", "q.scale_tril.mT.contiguous(), away"),
    ],
}  # fmt: skip


def run_check(check, rows, monkeypatch):
    names = check.__code__.co_varnames[: check.__code__.co_argcount]
    check(*[{"rows": rows, "monkeypatch": monkeypatch}[name] for name in names])


@pytest.mark.parametrize("check", list(TABLE), ids=lambda check: check.__name__)
def test_sound_refit_passes(check, rows, monkeypatch):
    run_check(check, rows, monkeypatch)


@pytest.mark.parametrize(
    ("check", "fault"),
    [pytest.param(c, f, id=f.name) for c, faults in TABLE.items() for f in faults],
)
def test_planted_fault_of_a_refit_is_caught(check, fault, rows, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        run_check(check, rows, monkeypatch)


def test_the_model_stays_bit_for_bit_and_the_guide_moves(rows):
    vae = oracle()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    new = refit(vae, rows, dataclasses.replace(FAST, guide="laplace", steps=5), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]), name
    for part in ("prior_module", "decoder", "likelihood_module"):
        for name, value in getattr(new, part).state_dict().items():
            assert torch.equal(value, getattr(vae, part).state_dict()[name]), name
    assert all(p.requires_grad for p in vae.parameters())
    assert all(p.requires_grad for p in new.parameters())
    fresh = pyro_vae.models.build.new_guide(vae, new_family := RefitConfig().guide, (), seed=1)
    assert new_family.family == "laplace"
    for name, value in fresh.encoder.named_parameters():
        assert not torch.equal(value, dict(new.encoder.named_parameters())[name]), name
    again = refit(vae, rows, dataclasses.replace(FAST, guide="laplace", steps=5), seed=1)
    other = refit(vae, rows, dataclasses.replace(FAST, guide="laplace", steps=5), seed=2)
    x = next(rows.test.fixed("real", 0))
    assert torch.equal(again.posterior(x).mean, new.posterior(x).mean)
    assert not torch.equal(other.posterior(x).mean, new.posterior(x).mean)


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_local_shape_is_the_gradient_and_the_curvature(name):
    """Against torch's own derivatives, of a nonlinear decoder in float64."""
    splits = pyro_vae.load_data("digits")
    if name == "gaussian":
        rows = np.random.default_rng(0).normal(size=(200, 6))
        splits = pyro_vae.load_data(rows)
    config = pyro_vae.ModelConfig(likelihood=name, hidden=(7,), latent_dim=3)
    vae = pyro_vae.build(config, splits, seed=1).double()
    x = next(splits.test.fixed(vae.likelihood_module.units, 0))[:4].double()
    torch.manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.float64)
    slope, factor = local_shape(vae, x, z)

    def log_joint(z, row):
        return vae.likelihood(z).log_prob(row) + vae.prior().log_prob(z)

    for i in range(4):
        row, point = x[i], z[i]
        expected = torch.autograd.functional.jacobian(lambda p: log_joint(p, row), point)  # noqa: B023
        torch.testing.assert_close(slope[i], expected, rtol=1e-9, atol=1e-9)
        raw = vae.decoder(point)
        columns = torch.autograd.functional.jacobian(lambda p: vae.decoder(p)[0], point).flatten(
            0, -2
        )

        def of_first(first):
            output = torch.cat([first.reshape(1, *raw.shape[1:]), raw[1:]])  # noqa: B023
            return vae.likelihood_module(output).log_prob(row)  # noqa: B023

        hessian = torch.autograd.functional.hessian(of_first, raw[0].detach().flatten())
        weight = (-hessian.diagonal()).clamp_min(0)
        precision = columns.T @ (weight[:, None] * columns) + torch.eye(3, dtype=torch.float64)
        found = torch.linalg.inv(factor[i] @ factor[i].T)
        torch.testing.assert_close(found, precision, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("guide", ["diagonal", "full", "flow", "mixture", "laplace"])
@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", "flow"])
def test_every_family_can_be_refitted(guide, prior, digits):
    model = pyro_vae.ModelConfig(prior=prior, hidden=(8,), latent_dim=2)
    vae = pyro_vae.build(model, digits)
    config = RefitConfig(guide, steps=2, batch_size=8)
    new = refit(vae, digits, config)
    x = next(digits.test.fixed("count", 0))[:6]
    assert torch.isfinite(new.posterior(x).log_prob(torch.zeros(6, 2))).all()
    # The density of a vamp prior, and of all others, is that of the trained model.
    z = torch.randn(50, 2)
    assert torch.equal(new.prior().log_prob(z), vae.prior().log_prob(z))
    blank = pyro_vae.models.build.build_blank(
        refitting.refitted_config(dataclasses.replace(model, likelihood="binomial"), config),
        digits.spec,
    )
    blank.load_state_dict(new.state_dict())
    torch.testing.assert_close(blank.eval().posterior(x).mean, new.posterior(x).mean)


def test_images_and_convolutions(digits):
    vae = pyro_vae.build(
        pyro_vae.ModelConfig(architecture="conv", hidden=(4, 4), latent_dim=2), digits
    )
    new = refit(vae, digits, RefitConfig(steps=2, batch_size=8))
    assert new.posterior(next(digits.test.fixed("count", 0))[:3]).mean.shape == (3, 2)


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
        refit(oracle(), rows, RefitConfig(batch_size=2**40))
    vae = oracle()
    with torch.no_grad():
        vae.decoder.bias.fill_(math.nan)
    with pytest.raises(pyro_vae.training.records.Diverged, match="not finite"):
        refit(vae, rows, dataclasses.replace(FAST, steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulated": 1.5}, "--simulated expects 0 to 1; got 1.5"),
        ({"steps": 0}, "--steps expects an integer of at least 1"),
        ({"batch_size": -1}, "--batch-size expects an integer of at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate expects a number above 0"),
        ({"encoder_hidden": (3, 0)}, "--encoder-hidden expects an integer of at least 1"),
        ({"guide": "fll"}, "--guide expects one of diagonal, full, flow, mixture, laplace"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        RefitConfig(**changes)
