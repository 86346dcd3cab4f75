"""log p(x_observed): of single values, of the linear Gaussian model, and under every objective.

Each `CHECK` holds for the package and fails for the planted faults below it.
"""

from __future__ import annotations

import dataclasses
import math
import typing

import pyro
import pytest
import torch
from conftest import all_likelihoods, example_vae
from masked import (
    exact_log_evidence,
    hidden,
    masked_oracle,
    missing_splits,
    missing_vae,
)
from scipy import stats
from torch.distributions import Normal

import pyro_vae
from pyro_vae.capture.captured import capture
from pyro_vae.config.options import Objective
from pyro_vae.evidence.importance import importance_sample
from pyro_vae.models import likelihoods, missing
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.missing import ObservedPart
from pyro_vae.models.networks import Encoder
from pyro_vae.training.loop import fit, iterate

FALSE_ALARM = 1e-4  # of each comparison with a closed form


def rows_of(vae, splits, count: int = 8):
    """x (B, *data_shape) with missing values, in the dtype of the model."""
    x = next(splits.train.fixed(vae.likelihood_module.units, 0, count))
    return x.to(next(vae.parameters()).dtype)


def lacking(spec, missing: bool = True):
    return dataclasses.replace(spec, missing=missing)


# --- p(x|z) ---------------------------------------------------------------------------------------


@all_likelihoods
def test_log_prob_is_the_sum_over_observed_values(name):
    """Value by value, from a likelihood of a single value that knows of no missing ones."""
    vae, splits = missing_vae(name)
    x, z = rows_of(vae, splits), torch.randn(5, 8, 3)
    known = vae.likelihood_module.spec
    found = vae.likelihood(z).log_prob(x)
    vae.likelihood_module.spec = lacking(known, False)
    plain = vae.likelihood(z).base_dist
    complete = torch.where(x.isnan(), plain.sample(), x)
    each = plain.log_prob(complete)
    expected = torch.where(x.isnan(), 0.0, each).flatten(2).sum(-1)
    torch.testing.assert_close(found, expected)
    assert x.isnan().any()
    assert (each.flatten(2).sum(-1) - found).abs().mean() > 0.1


@all_likelihoods
def test_without_missing_values_nothing_changes(name, tmp_path):
    """The same bits, draws included."""
    vae, _ = example_vae(name, tmp_path)
    likelihood, raw = vae.likelihood_module, vae.decoder(torch.randn(7, 3, dtype=torch.float64))
    plain = likelihood(raw)
    likelihood.spec = lacking(likelihood.spec)
    ours = likelihood(raw)
    assert isinstance(ours, ObservedPart)
    torch.manual_seed(0)
    x = plain.sample()
    assert torch.equal(ours.log_prob(x), plain.log_prob(x))
    torch.manual_seed(0)
    assert torch.equal(ours.sample(), x)
    assert torch.equal(ours.mean, plain.mean)
    assert (ours.batch_shape, ours.event_shape) == (plain.batch_shape, plain.event_shape)
    wide = ours.expand((4, 7))
    assert torch.equal(wide.log_prob(x), plain.expand((4, 7)).log_prob(x))
    assert ours.support.check(x).all()


@all_likelihoods
def test_supports_contain_nan_but_no_other_wrong_value(name):
    vae, splits = missing_vae(name)
    x = rows_of(vae, splits)
    p = vae.likelihood(torch.zeros(8, 3))
    assert p.support.check(x).all()
    with pyro.validation_enabled():
        p.log_prob(x)
    if name == "gaussian":
        return
    wrong = torch.where(x.isnan(), x, -0.5)
    assert not p.support.check(wrong).any()
    with pyro.validation_enabled(), pytest.raises(ValueError, match="support"):
        vae.likelihood(torch.zeros(8, 3)).log_prob(wrong)


def test_gradients_are_finite_where_decoder_outputs_are_extreme():
    """The branch that is not taken must be finite: σ is 10⁻², and values are missing."""
    for name in LIKELIHOODS:
        vae, splits = missing_vae(name)
        x = rows_of(vae, splits)
        size = vae.likelihood_module.num_parameters
        for extreme in (-1e4, 1e4):
            raw = torch.full((8, size, 1, 4, 5), extreme).requires_grad_()
            vae.likelihood_module(raw).log_prob(x).sum().backward()
            assert raw.grad.isfinite().all(), name
            unseen = raw.grad.movedim(1, 0)[:, x.isnan()]
            assert (unseen == 0).all(), name


# --- q(z|x) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_the_encoder_sees_zeros_and_the_mask(architecture):
    shape, hidden_sizes = ((2, 8, 8), (3,)) if architecture == "conv" else ((5,), (7,))
    mean, std = torch.randn(shape), torch.tensor(2.0)
    network = Encoder(architecture, shape, hidden_sizes, "SiLU", 4, mean, std, missing=True)
    x = hidden(torch.randn(6, *shape))
    seen = {}
    network.layers.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    features = network(x)
    assert features.isfinite().all()
    values, observed = seen["x"].chunk(2, dim=1)
    assert torch.equal(observed, (~x.isnan()).float())
    assert torch.equal(values[x.isnan()], torch.zeros(int(x.isnan().sum())))
    torch.testing.assert_close(values[~x.isnan()], ((x - mean) / std)[~x.isnan()])
    # an observed mean is not a missing value
    assert not torch.allclose(network(torch.where(x.isnan(), mean, x)), features)


def test_models_without_missing_values_have_the_weights_that_they_had():
    vae, _ = missing_vae("gaussian", (5,))
    plain = pyro_vae.build(
        pyro_vae.ModelConfig(latent_dim=3, hidden=(16,)), pyro_vae.load_data(torch.randn(50, 5))
    )
    assert plain.state_dict().keys() == vae.state_dict().keys()
    different = [k for k, v in plain.state_dict().items() if v.shape != vae.state_dict()[k].shape]
    assert different == ["encoder.layers.1.weight"]


# --- the linear Gaussian model --------------------------------------------------------------------


def check_evidence() -> None:
    """log p(x_observed) of an exact guide: equal weights, so that one draw is enough."""
    vae, x = masked_oracle()
    found = importance_sample(vae, x, num_samples=4)
    torch.testing.assert_close(found.log_evidence, exact_log_evidence(vae, x))
    assert (found.effective_sample_size > 4 - 1e-6).all()


def check_sampled_evidence() -> None:
    """From the prior as proposal: z-tests of each row, Bonferroni's correction."""
    vae, x = masked_oracle(count=12)
    torch.manual_seed(2)
    wide = pyro.distributions.Normal(torch.zeros(12, 2).double(), 1.0).to_event(1)
    found = importance_sample(vae, x, num_samples=40_000, proposal=wide)
    off = (found.log_evidence - exact_log_evidence(vae, x)) / found.standard_error
    assert off.abs().max() < stats.norm.isf(FALSE_ALARM / 2 / len(x))


def check_gradient() -> None:
    """The gradient of the ELBO is that of a loss written out here, term by term."""
    vae, splits = missing_vae("gaussian", (5,))
    vae = vae.double()
    x = rows_of(vae, splits)
    torch.manual_seed(3)
    loss = pyro_vae.objective("trace").differentiable_loss(vae.model, vae.guide, x)
    found = torch.autograd.grad(loss, list(vae.parameters()))
    torch.manual_seed(3)
    seen = ~x.isnan()
    values = torch.where(seen, (x - vae.encoder.mean) / vae.encoder.std, 0.0)
    features = vae.encoder.layers(torch.cat([values, seen.double()], 1))
    mean, log_scale = features.chunk(2, -1)
    q = Normal(mean, log_scale.exp())
    z = q.rsample()
    likelihood = vae.likelihood_module
    loc = likelihood.mean + likelihood.std * vae.decoder(z)[:, 0]
    scale = likelihood.std * (likelihoods.MIN_SCALE + likelihood.log_scale.exp())
    total = torch.zeros((), dtype=torch.float64)
    for n, j in seen.nonzero().tolist():
        away = (x[n, j] - loc[n, j]) / scale[j]
        total = total - away**2 / 2 - scale[j].log() - math.log(2 * math.pi) / 2
    prior = Normal(torch.zeros_like(z), 1.0)
    expected_loss = -(total + (prior.log_prob(z) - q.log_prob(z)).sum())
    expected = torch.autograd.grad(expected_loss, list(vae.parameters()))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def check_moments() -> None:
    """Mean and standard deviation are those of observed values, of columns and of pixels."""
    splits = missing_splits("gaussian", (5,))
    rows = splits.train.values[splits.train.rows].double()
    mean, std = pyro_vae.data.splits.moments(splits.train, "real")
    for j in range(5):
        known = rows[:, j][~rows[:, j].isnan()]
        torch.testing.assert_close(mean[j], known.mean().float())
        torch.testing.assert_close(std[j], known.std(correction=0).float())
    splits = missing_splits("gaussian")
    rows = splits.train.values[splits.train.rows].double()
    mean, std = pyro_vae.data.splits.moments(splits.train, "real")
    torch.testing.assert_close(mean, rows.nanmean(0).float())
    spread = (rows - rows.nanmean(0).mean()).square().nanmean(0).mean().sqrt()
    torch.testing.assert_close(std, spread.float())


CHECKS = [check_evidence, check_sampled_evidence, check_gradient, check_moments]


@pytest.mark.parametrize("check", CHECKS)
def test_with_missing_values(check):
    check()


def forgotten(self, value):
    """The mean stands for missing values, as after an imputation."""
    return self.base_dist.log_prob(torch.where(value.isnan(), self.fill, value)).flatten(1).sum(-1)


def inverted(self, value):
    gone = value.isnan()
    density = self.base_dist.log_prob(torch.where(gone, self.fill, value))
    return torch.where(gone, density, 0.0).flatten(-len(self.event_shape)).sum(-1)


def averaged(self, value):
    """A mean of observed values in place of their sum."""
    gone = value.isnan()
    density = self.base_dist.log_prob(torch.where(gone, self.fill, value))
    return torch.where(gone, 0.0, density).flatten(-len(self.event_shape)).mean(-1)


@pytest.mark.parametrize("fault", [forgotten, inverted, averaged])
@pytest.mark.parametrize("check", [check_evidence, check_sampled_evidence, check_gradient])
def test_planted_faults_of_the_likelihood_are_caught(fault, check, monkeypatch):
    monkeypatch.setattr(missing.ObservedPart, "log_prob", fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_moments_that_count_zeros_are_caught(monkeypatch):
    monkeypatch.setattr(pyro_vae.data.splits.Tensor, "isnan", lambda x: torch.zeros_like(x) > 0)
    with pytest.raises(AssertionError):
        check_moments()


# --- training -------------------------------------------------------------------------------------


OBJECTIVES = typing.get_args(Objective)
CAPTURED = ("trace", "dreg", "mmd")  # the others are captured in slow tests


def step_of(name: str, vae, x, captured: bool = False):
    """Loss and gradients of an objective, from the same draws."""
    elbo = pyro_vae.objective(name, 1 if name in ("trace", "beta", "mean-field") else 8, 1)
    torch.manual_seed(4)
    vae.zero_grad()
    loss = (capture(elbo, "graph") if captured else elbo).loss_and_grads(vae.model, vae.guide, x)
    return loss, [p.grad.clone() for p in vae.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_with_missing_values(name):
    vae, splits = missing_vae("gaussian", (5,))
    loss, gradients = step_of(name, vae, rows_of(vae, splits))
    assert math.isfinite(loss)
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in CAPTURED else [pytest.mark.slow]) for n in OBJECTIVES],
)
def test_captured_objectives_with_missing_values(name):
    vae, splits = missing_vae("gaussian", (5,))
    x = rows_of(vae, splits)
    loss, gradients = step_of(name, vae, x)
    again, others = step_of(name, vae, x, captured=True)
    assert again == pytest.approx(loss, rel=1e-5)
    size = max(g.abs().max() for g in gradients)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size.item())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bernoulli", {"architecture": "conv", "hidden": (4,)}),
        ("continuous-bernoulli", {"prior": "mixture components=3"}),
        ("binomial", {"guide": "full"}),
        ("gaussian", {"prior": "vamp components=4"}),
        ("discretized-logistic", {"kind": "ae"}),
        ("gaussian", {"guide": "flow hidden=8", "prior": "flow hidden=8"}),
        ("gaussian", {"guide": "mixture components=2"}),
    ],
)
def test_every_likelihood_and_family_trains(name, settings):
    settings = dict(settings)
    for key in ("guide", "prior"):
        text = settings.get(key)
        if text:
            family, *options = text.split()
            pairs = (option.split("=") for option in options)
            settings[key] = {"family": family, **{k: int(v) for k, v in pairs}}
    model = pyro_vae.config.options.structure(
        pyro_vae.ModelConfig,
        {"latent_dim": 2, "hidden": [8], "likelihood": name, **settings},
        "model.",
    )
    splits = missing_splits(name, (1, 8, 8))
    vae = pyro_vae.build(model, splits)
    before = [p.clone() for p in vae.parameters()]
    (record,) = fit(vae, splits, pyro_vae.FitConfig(epochs=1, batch_size=16))
    assert math.isfinite(record.validation_reconstruction)
    assert any(not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    assert all(p.isfinite().all() for p in vae.parameters())


def test_a_resumed_training_equals_the_uninterrupted_one():
    """To the last bit, draws of the binarization of observed values included."""
    config = pyro_vae.FitConfig(epochs=4, batch_size=16)
    runs = []
    for stop in (None, 2):
        vae, splits = missing_vae("continuous-bernoulli", likelihood="bernoulli")
        records = iterate(vae, splits, config)
        lines = [next(records) for _ in range(stop or 4)]
        if stop:
            records = iterate(vae, splits, config, state=lines[-1].state())
            lines += list(records)
        runs.append(([line.train_elbo for line in lines], vae.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


@pytest.mark.slow
def test_training_learns_the_correlation_of_columns_that_are_never_seen_complete():
    """Two columns that are equal, one of them missing in each row but a few: one latent joins them.

    A model of rows filled by means would see columns without correlation.
    """
    random = torch.Generator().manual_seed(0)
    z = torch.randn(600, 1, generator=random)
    x = z + 0.1 * torch.randn(600, 3, generator=random)
    gone = torch.rand(600, 3, generator=random) < 0.5
    gone[gone.all(1), 0] = False
    splits = pyro_vae.load_data(torch.where(gone, torch.nan, x), missing="model")
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=1, hidden=(16,)), splits)
    config = pyro_vae.FitConfig(epochs=30, batch_size=32, learning_rate=1e-2, kl_warmup=0.5)
    fit(vae, splits, config)
    torch.manual_seed(0)
    drawn = vae.likelihood(vae.prior().sample((2000,))).sample()
    assert torch.corrcoef(drawn.T).min() > 0.8
