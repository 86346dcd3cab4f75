"""Guides and priors of every family: SVI's objectives are those of the three distributions."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pyro
import pytest
import torch
from conftest import SIGMAS
from family_models import PAIRS, config, model, randomized, rows
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_vae
from pyro_vae import Config, FitConfig, InputError, ModelConfig, train
from pyro_vae.config.families import OBJECTIVE_FAMILIES, check_objective_families
from pyro_vae.config.options import Objective
from pyro_vae.models.build import build
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.posteriors import kl

OBJECTIVES = get_args(Objective)


def works(objective: str, guide: str, prior: str) -> bool:
    guides, priors, _ = OBJECTIVE_FAMILIES.get(objective, ((guide,), (prior,), ""))
    return guide in guides and prior in priors


# --- the objectives by hand -----------------------------------------------------------------------


def discrepancy(first: Tensor, second: Tensor, spread: Tensor) -> Tensor:
    """The unbiased estimate of MMD² between samples (B, Z)."""
    total = torch.zeros((), dtype=first.dtype)
    count = len(first)
    for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = scale * spread
        own, other, between = (
            c / (c + torch.cdist(a, b).square())
            for a, b in ((first, first), (second, second), (first, second))
        )
        pairs = own.sum() + other.sum() - own.diagonal().sum() - other.diagonal().sum()
        total = total + pairs / (count * (count - 1)) - 2 * between.mean()
    return total


def by_hand(objective: str, vae: Any, x: Tensor, particles: int) -> Tensor:
    """The objective, from draws and densities of the three distributions."""
    q, p = vae.posterior(x), vae.prior()
    z = q.expand((particles, len(x))).sample()  # as in the plates of particles and rows
    log_x, log_z, log_q = vae.likelihood(z).log_prob(x), p.log_prob(z), q.log_prob(z)
    log_w = log_x + log_z - log_q  # (K, B)
    elbo = log_w.mean(0).sum()
    bound = (log_w.logsumexp(0) - math.log(particles)).sum()
    if objective in ("iwae", "dreg", "piwae", "wake-sleep"):
        return bound
    if objective == "renyi":
        return ((0.5 * log_w).logsumexp(0) - math.log(particles)).sum() / 0.5
    if objective == "ciwae":
        return 0.05 * elbo + 0.95 * bound
    if objective == "miwae":
        groups = log_w.reshape(8, particles // 8, -1)
        return (groups.logsumexp(1) - math.log(particles // 8)).mean(0).sum()
    if objective == "beta":
        return (log_x + 4 * (log_z - log_q)).mean(0).sum()
    if objective == "mean-field":
        return (log_x.mean(0) - kl_divergence(q, p)).sum()
    if objective == "free-bits":
        each = kl_divergence(q.base_dist, p.base_dist).mean(0)
        return log_x.mean(0).sum() - len(x) * each.clamp_min(0.1).sum()
    if objective == "beta-tc":
        others = q.base_dist.log_prob(z[0].unsqueeze(1))  # row n's draw under row m's posterior
        joint = others.sum(-1).logsumexp(1) - math.log(len(x))
        each = others.logsumexp(1) - math.log(len(x))
        return elbo - 5 * (joint - each.sum(-1)).sum()
    if objective == "mmd":
        draws = p.expand((len(x),)).sample()
        return log_x.sum() - 100 * len(x) * discrepancy(z[0], draws, 2 * p.variance.sum())
    return elbo  # trace, stl, score-function, score-baseline


def particles_of(objective: str) -> int:
    if objective in ("mean-field", "free-bits", "beta-tc", "mmd"):
        return 1
    return 2 if objective in ("trace", "stl", "score-function", "beta", "score-baseline") else 8


def compare(objective: str, guide: str, prior: str, name: str) -> None:
    vae, x = model(guide, prior, name)
    particles = particles_of(objective)
    elbo = pyro_vae.objective(objective, particles, max_plate_nesting=1)
    torch.manual_seed(1)
    loss = elbo.loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = by_hand(objective, vae, x, particles).item()
    assert -loss == pytest.approx(expected, rel=1e-9), (objective, guide, prior, name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_svi_computes_the_objective_of_the_three_distributions(objective):
    """For each pair of families; the likelihoods take turns, so that each meets each family."""
    names = itertools.cycle(sorted(LIKELIHOODS))
    for guide, prior in PAIRS:
        if works(objective, guide, prior):
            compare(objective, guide, prior, next(names))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_svi_computes_it_under_each_likelihood(objective):
    for (guide, prior), name in itertools.product(PAIRS, sorted(LIKELIHOODS)):
        if works(objective, guide, prior):
            compare(objective, guide, prior, name)


# --- what does not work together ------------------------------------------------------------------

REFUSED = [
    (objective, guide, prior)
    for objective in OBJECTIVES
    for guide, prior in PAIRS
    if not works(objective, guide, prior)
]


def test_an_objective_that_does_not_suit_the_families_is_refused():
    """By the settings of a run, and by `fit`, which has a model and no settings of it."""
    models: dict[Any, Any] = {}
    for objective, guide, prior in REFUSED:
        families, settings = config(guide, prior), FitConfig(objective=objective, epochs=1)
        refusal = f"^--objective {objective} expects --.*; got .*$"
        with pytest.raises(InputError, match=refusal):
            Config(model=families, fit=settings)
        vae = models.setdefault((guide, prior), build(families, rows("gaussian")))
        with pytest.raises(InputError, match=refusal):
            pyro_vae.fit(vae, rows("gaussian"), settings)


def test_the_table_of_refusals_is_the_one_of_the_docs():
    """Each refusal, written out: a change of the table shows here."""
    refused = {(o, g) for o, g, p in REFUSED if p == "normal"}
    assert refused == {
        *(("mean-field", g) for g in ("flow", "mixture")),
        *(("free-bits", g) for g in ("full", "flow", "mixture")),
        *(("beta-tc", g) for g in ("full", "flow", "mixture")),
    }
    refused = {(o, p) for o, g, p in REFUSED if g == "diagonal"}
    assert refused == {
        *(("mean-field", p) for p in ("mixture", "vamp", "flow")),
        *(("free-bits", p) for p in ("mixture", "vamp", "flow")),
        *(("mmd", p) for p in ("mixture", "vamp")),
    }
    check_objective_families("mmd", None, None)  # modules of the user's own


@pytest.mark.parametrize("guide", ["flow", "mixture"])
def test_a_vamp_prior_expects_a_guide_of_gaussians(guide):
    with pytest.raises(InputError, match=r"^--prior vamp expects --guide diagonal or full"):
        ModelConfig(guide=guide, prior="vamp")


@pytest.mark.parametrize("families", [{"guide": "flow"}, {"prior": "flow"}])
@pytest.mark.parametrize("latents", [1, 1025])
def test_flows_expect_some_latents(families, latents):
    (flag,) = families
    with pytest.raises(InputError, match=f"^--{flag} flow expects --latent-dim of 2 to 1024; got"):
        ModelConfig(latent_dim=latents, **families)


def test_a_mixture_guide_of_one_latent(tmp_path):
    vae = build(config("mixture", "normal", latent_dim=1), rows("gaussian"))
    x = next(rows("gaussian").train.fixed("real", seed=0, num_images=5))
    loss = pyro_vae.objective("trace").differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())


# Words after a flag, and the line that says what is wrong with them.
WRONG = [
    ("--guide fulll", "--guide expects one of diagonal, full, flow, mixture; got 'fulll'"),
    ("--guide", "--guide expects one of diagonal, full, flow, mixture; got None"),
    ("--guide vamp", "--guide expects one of diagonal, full, flow, mixture; got 'vamp'"),
    ("--prior full", "--prior expects one of normal, mixture, vamp, flow; got 'full'"),
    ("--guide full components=3", "--guide full has no option 'components'; it has no options"),
    ("--guide diagonal x=1", "--guide diagonal has no option 'x'; it has no options"),
    (
        "--guide flow component=3",
        "--guide flow has no option 'component'; it has transforms and hidden",
    ),
    ("--guide mixture family=full", "--guide mixture expects each option once; got 'family' again"),
    (
        "--guide flow hidden=3 hidden=4",
        "--guide flow expects each option once; got 'hidden' again",
    ),
    ("--guide mixture 3", "--guide mixture expects OPTION=VALUE; got '3'"),
    ("--guide mixture components", "--guide mixture expects OPTION=VALUE; got 'components'"),
    (
        "--guide mixture components=0",
        "--guide mixture: components expects an integer from 1 to 1048576; got 0",
    ),
    (
        "--guide mixture components=-3",
        "--guide mixture: components expects an integer from 1 to 1048576; got -3",
    ),
    (
        f"--guide mixture components={10**30}",
        "--guide mixture: components expects an integer from 1 to 1048576; got about 10^30",
    ),
    ("--guide mixture components=2.5", "--guide mixture: components = '2.5': expected an integer"),
    ("--guide mixture components=", "--guide mixture: components = '': expected an integer"),
    (
        "--guide flow transforms=1000000",
        "--guide flow: transforms expects an integer from 1 to 32; got 1000000",
    ),
    (
        "--prior flow hidden=1048576",
        "--prior flow: hidden expects an integer from 1 to 1024; got 1048576",
    ),
    (
        "--prior mixture covariance=banded",
        "--prior mixture: covariance = 'banded': expected one of diagonal, full",
    ),
    (
        "--guide flow --latent-dim 1",
        "--guide flow expects --latent-dim of 2 to 1024; got 1",
    ),
    (
        "--guide full --objective free-bits",
        "--objective free-bits expects --guide diagonal, since it bounds the KL of each "
        "independent latent; got full. Use --objective trace",
    ),
    (
        "--guide full --model ae",
        "--guide has no effect on --model ae; drop it",
    ),
]


@pytest.mark.parametrize(("text", "line"), WRONG)
def test_a_mistake_of_the_families_is_one_line(text, line, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda given: 0)  # a mistake that is missed
    assert train.main([*text.split(), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "run").exists()


def test_a_number_of_many_digits_is_one_line(capsys):
    assert train.main(["--guide", "mixture", "components=" + "9" * 5000]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --guide mixture: components = '999")
    assert error.count("\n") == 1
    assert len(error) < 200


def test_help_names_each_family_and_its_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "--guide {diagonal,full,flow,mixture} [OPTION=VALUE ...]",
        "--prior {normal,mixture,vamp,flow} [OPTION=VALUE ...]",
        "(default: diagonal)",
        "(default: normal)",
        *("transforms=4 hidden=64", "components=5", "transforms=3 hidden=128", "components=100"),
    ):
        assert part in text, part


# --- the KL, closed forms and copies --------------------------------------------------------------


def test_elbo_terms_are_those_of_svi():
    """Where the KL has no closed form, at the same draw; else within the noise of the draws."""
    for guide, prior in PAIRS:
        vae, x = model(guide, prior)
        torch.manual_seed(1)
        loss = pyro_vae.objective("trace", max_plate_nesting=1).loss(vae.model, vae.guide, x)
        torch.manual_seed(1)
        reconstruction, divergence = vae.elbo_terms(x)
        assert reconstruction.shape == divergence.shape == (5,)
        if prior == "normal" and guide in ("diagonal", "full"):
            assert torch.equal(divergence, kl_divergence(vae.posterior(x), vae.prior()))
        else:
            terms = (reconstruction - divergence).sum().item()
            assert terms == pytest.approx(-loss, rel=1e-9), (guide, prior)
        # of several draws, their mean
        with torch.no_grad():
            q, p = vae.posterior(x), vae.prior()
            z = q.sample((50,))
            several = kl(q, p, z)
            draws = q.log_prob(z) - p.log_prob(z)
        bound = SIGMAS * draws.std(0) / 50**0.5
        assert ((several - draws.mean(0)).abs() < bound).all()
        assert (several > -bound).all()


def test_kl_of_a_full_gaussian_and_n_0_i():
    vae, x = model("full", "normal")
    q, p = vae.posterior(x), vae.prior()
    closed = kl_divergence(q, p)
    reference = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    torch.testing.assert_close(closed, kl_divergence(q, reference), rtol=1e-12, atol=1e-12)
    # with a mean and scales of its own, which each latent has others of
    loc, scale = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    other = pyro.distributions.Normal(loc, scale).to_event(1)
    expected = kl_divergence(q, MultivariateNormal(loc, scale.square().diag()))
    torch.testing.assert_close(kl_divergence(q, other), expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(0)
    z = q.sample((10_000,))
    terms = q.log_prob(z) - p.log_prob(z)
    assert ((terms.mean(0) - closed).abs() < SIGMAS * terms.std(0) / 100).all()


@pytest.mark.parametrize("guide", ["diagonal", "full"])
def test_a_vamp_prior_as_a_mixture_has_the_same_density(guide):
    for dtype in (torch.float32, torch.float64):
        vae = randomized(build(config(guide, "vamp"), rows("gaussian"))).to(dtype)
        z = torch.randn(50, 2, dtype=dtype)
        state = torch.get_rng_state()
        mixture = vae.prior_module.as_mixture(vae.encoder, vae.family)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(mixture().log_prob(z), vae.prior().log_prob(z))
        before = mixture().log_prob(z)
        randomized(vae.encoder, seed=1)
        assert torch.equal(mixture().log_prob(z), before)  # it does not follow the encoder
        assert not torch.allclose(vae.prior().log_prob(z), before, atol=1e-3)


def test_pseudo_inputs_start_at_training_rows():
    for name in ("gaussian", "binomial", "bernoulli"):
        splits = rows(name)
        vae = build(config("diagonal", "vamp", likelihood=name), splits)
        units = {"bernoulli": "unit"}.get(name, LIKELIHOODS[name].units)
        there = splits.train.take(torch.arange(len(splits.train)), units)
        inputs = vae.prior_module.pseudo_inputs.detach()
        away = (inputs.unsqueeze(1) - there).abs().flatten(2).amax(-1)  # (3, N)
        assert (away.amin(1) < 1e-5 * there.abs().max()).all()
        assert len(np.unique(inputs.numpy(), axis=0)) == 3
