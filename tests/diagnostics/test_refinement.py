"""Guides refined for each image, against the oracle's closed forms and with planted faults."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from conftest import all_likelihoods, batch, example_vae
from scipy import stats
from torch.distributions import kl_divergence

import pyro_vae
from pyro_vae.diagnostics import refinement
from pyro_vae.diagnostics.refinement import elbo, gaps, refine
from pyro_vae.evidence.importance import importance_sample
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.runtime import memory as chunks

# Each test rejects a true hypothesis at most so often, however many images it looks at.
FALSE_ALARM = 1e-4

FACTOR, SHIFT, SAMPLES = 1.4, 0.5, 8000


def sigmas(count: int = 1) -> float:
    """How many standard errors `count` normal estimates may be off, with FALSE_ALARM in all."""
    return stats.norm.isf(FALSE_ALARM / 2 / count)


def oracle(guide="diagonal", count: int = 20, **settings):
    """An oracle with three latents in float64, and draws of x from it."""
    torch.manual_seed(1)
    weight, loc = torch.randn(5, 3).double(), torch.randn(5).double()
    vae = LinearGaussian(weight, loc, 0.6, guide, **settings)
    return vae, vae.likelihood(vae.prior().sample((count,))).sample().detach()


def kl_to_exact(vae, posterior, x) -> torch.Tensor:
    return kl_divergence(posterior, vae.exact_posterior(x)).detach()


def squared_error(vae, posterior, x, count: int = 4000) -> torch.Tensor:
    """(B,): variance of log p(x, z) − log q(z) over draws of z from q."""
    z = posterior.sample((count,))
    log_joint = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z)
    return (log_joint - posterior.log_prob(z)).var(0).detach()


@pytest.fixture(scope="module")
def split():
    """Gaps of a faulty guide, and the two refined guides that they were taken from."""
    vae, x = oracle(scale_factor=FACTOR, shift=SHIFT)
    steps, guides = [], []

    def keep(*args, **settings):
        # the full guide starts where the diagonal one has ended
        assert settings.get("start") is (guides[0] if guides else None)
        guides.append(refine(*args, **settings))
        return guides[-1]

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "refine", keep)
        found = gaps(vae, x, num_samples=SAMPLES, on_step=steps.append)
    assert steps == [1] * 1000
    diagonal, full = guides
    return vae, x, found, diagonal, full


def test_refined_guides_reach_the_best_of_their_family(split):
    """KL(q ‖ p(z|x)) over the smallest there is: below 0.01 nats on average, 0.03 in any image."""
    vae, x, _, diagonal, full = split
    gap = vae.approximation_gap.item()
    for posterior, best in ((diagonal.posterior(x), gap), (full.posterior(x), 0)):
        excess = kl_to_exact(vae, posterior, x) - best
        assert (excess > 0).all()
        assert excess.max() < 0.03
        assert excess.mean() < 0.01
    # power: where they started, where 30 steps end, and the other family's best
    early = refine(vae, x, num_steps=30)
    for posterior in (vae.posterior(x), early.posterior(x)):
        assert (kl_to_exact(vae, posterior, x) - gap).mean() > 0.02
    assert (kl_to_exact(vae, diagonal.posterior(x), x) > gap).all()
    assert gap > 0.2


def test_gaps_are_the_closed_forms(split):
    """What the faults cost, Z (c² − 1 − 2 log c) / 2 + s² Σᵢⱼ Λᵢⱼ / √(Λᵢᵢ Λⱼⱼ) / 2; Λ; nothing."""
    vae, x, found, diagonal, full = split
    precision = vae.posterior_precision.detach()
    correlation = precision / precision.diagonal().outer(precision.diagonal()).sqrt()
    cost = 3 * (FACTOR**2 - 1 - 2 * math.log(FACTOR)) / 2 + SHIFT**2 * correlation.sum() / 2
    gap = vae.approximation_gap.item()
    posteriors = [vae.posterior(x), diagonal.posterior(x), full.posterior(x)]
    # what the refined guides fall short of their optimum is known exactly; the rest is sampling
    exact = [kl_to_exact(vae, q, x) for q in posteriors]
    torch.testing.assert_close(exact[0], (cost + gap).detach().expand(20))
    short = [exact[1] - gap, exact[2]]
    squares = [squared_error(vae, q, x) / SAMPLES for q in posteriors]
    cases = [
        (found.amortization, cost - short[0], squares[0] + squares[1]),
        (found.correlation, gap + short[0] - short[1], squares[1] + squares[2]),
        (found.remainder, short[1], squares[2] + found.evidence.standard_error**2),
        (found.approximation, gap + short[0], squares[1] + found.evidence.standard_error**2),
    ]
    for values, truth, square in cases:
        assert values.shape == (20,)
        assert values.dtype == torch.float64
        assert ((values - truth).abs() < sigmas(80) * square.sqrt()).all()
        # means over the images are sharper: within 0.03 nats, and other numbers are seen
        error = sigmas(4) * square.mean().sqrt() / math.sqrt(20)
        assert error < 0.03
        assert (values - truth).mean().abs() < error
    assert found.amortization.mean() - cost < error
    for wrong in (cost + gap, cost - 3 * (FACTOR**2 - 1 - 2 * math.log(FACTOR)) / 2, gap):
        assert (found.amortization.mean() - wrong).abs() > 5 * error
    errors = found.evidence.standard_error
    exact_evidence = vae.exact_log_evidence(x)
    assert errors.max() < 0.01
    assert ((found.evidence.log_evidence - exact_evidence).abs() < sigmas(20) * errors).all()
    assert found.evidence.num_samples == SAMPLES


def test_the_tail_of_the_weights_is_lighter_than_a_narrow_guides(split):
    """Weights of a guide of half the deviation have k = 3/4; the refined guide's next to none."""
    _, x, found, _, _ = split
    narrow, _ = oracle(scale_factor=0.5)
    torch.manual_seed(2)
    tails = importance_sample(narrow, x, SAMPLES, with_pareto_k=True).pareto_k
    assert found.evidence.pareto_k.shape == (20,)
    assert (found.evidence.pareto_k < tails).all()
    assert found.evidence.pareto_k.max() < 0.5
    assert tails.min() > 0.5


@pytest.mark.parametrize("guide", ["exact", "diagonal", "collapsed"])
def test_elbo_is_log_evidence_less_kl(guide):
    """For any guide, within its standard errors; a tenth of a nat is seen in every image."""
    vae, x = oracle(guide, scale_factor=0.9, shift=0.1)
    torch.manual_seed(3)
    posterior = vae.posterior(x)
    exact = vae.exact_log_evidence(x) - kl_to_exact(vae, posterior, x)
    for count in (2, 20_000):
        estimate = elbo(vae, posterior, x, count)
        error = (squared_error(vae, posterior, x, 20_000) / count).sqrt()
        if guide != "collapsed":  # two heavy-tailed draws are not normal
            assert ((estimate - exact).abs() < sigmas(40) * error).all()
    assert ((estimate - exact).abs() < sigmas(40) * error).all()
    assert estimate.dtype == torch.float64
    assert not estimate.requires_grad
    if guide != "collapsed":
        assert ((estimate - exact - 0.1).abs() > sigmas(40) * error).all()


@pytest.mark.parametrize("chunk_values", [1, 13, 5 * 7, 5 * 20 * 3, 2**23])
def test_every_chunking_uses_all_samples_of_all_images(chunk_values, monkeypatch):
    """Draws of the exact guide all have the evidence as weight, in whatever chunks they come."""
    monkeypatch.setattr(chunks, "CACHE_VALUES", chunk_values)
    vae, x = oracle("exact")
    exact = vae.exact_log_evidence(x).detach()
    torch.testing.assert_close(elbo(vae, vae.posterior(x), x, 23), exact, rtol=1e-9, atol=1e-9)
    found = gaps(vae, x, num_steps=1, num_samples=30)
    assert found.remainder.shape == found.evidence.pareto_k.shape == (20,)
    # one step of Adam from an exact mean and exact marginal deviations stays near: each image has
    # its own proposal, whose weights vary little
    assert (found.evidence.log_evidence - exact).abs().max() < 1


def test_start():
    """Where a guide starts: the encoder's mean and deviations, or another guide's."""
    vae, x = oracle(scale_factor=FACTOR, shift=SHIFT)
    posterior = vae.posterior(x)
    torch.manual_seed(4)
    # Adam's first step is the learning rate, in every number
    step = torch.full((20, 3), 0.05).double()
    first = refine(vae, x, num_steps=1)
    torch.testing.assert_close((first.loc - posterior.mean).abs(), step)
    torch.testing.assert_close((first.log_scale - posterior.stddev.log()).abs(), step)
    assert (first.lower == 0).all()
    other = refine(vae, x, full=True, num_steps=1, start=first)
    torch.testing.assert_close((other.loc - first.loc).abs(), step)
    assert (other.lower.tril(-1).abs().sum((1, 2)) > 0.14).all()
    assert first.full is False
    assert other.full is True


def test_the_last_steps_are_averaged():
    """The share of them that `AVERAGED` says; the learning rate falls to zero as a cosine."""
    vae, x = oracle()
    seen = []

    def keep(_):
        store = pyro.get_param_store()
        name = next(n for n in store.keys() if n.endswith("$$$loc"))  # noqa: SIM118
        seen.append(store[name].detach().clone())

    torch.manual_seed(5)
    guide = refine(vae, x, num_steps=8, on_step=keep)
    assert len(seen) == 8
    last = torch.stack(seen[-round(8 * refinement.AVERAGED) :])
    assert 1 < len(last) < 8
    torch.testing.assert_close(guide.loc.data, last.mean(0))
    # the first eight steps of Adam are at most 1.04 times the learning rate (Cauchy and Schwarz)
    steps = (torch.stack(seen[1:]) - torch.stack(seen[:-1])).abs().amax((1, 2))
    rates = [0.05 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(1, 8)]
    rates = torch.tensor(rates, dtype=torch.float64)
    assert (steps <= 1.04 * rates).all()
    assert (steps > rates / 4).all()


def test_a_full_guide_has_the_covariance_that_it_says(split):
    _, x, _, diagonal, full = split
    posterior = full.posterior(x)
    factor = torch.eye(3).double() + full.lower.tril(-1)
    factor = full.log_scale.exp().unsqueeze(-1) * factor
    torch.testing.assert_close(posterior.covariance_matrix, factor @ factor.mT)
    assert diagonal.posterior(x).batch_shape == posterior.batch_shape == (20,)
    assert not any(p.requires_grad for p in [*diagonal.parameters(), *full.parameters()])


@all_likelihoods
def test_every_likelihood(name, tmp_path):
    """Refining an untrained encoder's posterior helps; nothing else is touched."""
    torch.manual_seed(6)
    vae, splits = example_vae(name, tmp_path)
    x = batch(splits, name, 6)
    frozen = next(vae.decoder.parameters()).requires_grad_(False)
    vae.encoder.eval()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    modes = [m.training for m in vae.modules()]
    pyro.param("mine", torch.ones(2))
    found = gaps(vae, x, num_steps=150, num_samples=500)
    assert found.amortization.mean() > 0.1
    for values in (found.correlation, found.remainder, found.evidence.standard_error):
        assert values.isfinite().all()
    assert list(pyro.get_param_store().keys()) == ["mine"]
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key])
    for parameter in vae.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen)
    assert [m.training for m in vae.modules()] == modes


def test_an_interruption_leaves_all_as_it_was():
    class Stop(Exception):
        pass

    def stop(_):
        assert not any(p.requires_grad for p in vae.parameters())
        raise Stop

    vae, x = oracle()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    with pytest.raises(Stop):
        refine(vae, x, on_step=stop)
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_bad_arguments():
    vae, x = oracle()
    with pytest.raises(ValueError, match="num_steps expects an integer of at least 1; got 0"):
        refine(vae, x, num_steps=0)
    with pytest.raises(ValueError, match="num_samples expects an integer of at least 1; got 0"):
        elbo(vae, vae.posterior(x), x, 0)


def test_a_row_beyond_float32_is_named():
    splits = pyro_vae.load_data(np.random.default_rng(0).normal(size=(40, 3)))
    config = pyro_vae.ModelConfig(hidden=(4,), latent_dim=2, likelihood="gaussian")
    vae = pyro_vae.build(config, splits)
    x = splits.train.take(torch.arange(5), "real")
    refine(vae, x, num_steps=3)
    x[3, 1] = 1e30
    with pytest.raises(pyro_vae.InputError, match=r"row 3 of these 5 \(counted from 0\)"):
        refine(vae, x, num_steps=3)
