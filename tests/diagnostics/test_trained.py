"""A model trained on the digits: what its guide is worth, by methods that do not know each other.

No trained guide is exact, so nothing is tested against zero: sizes have to lie within stated limits
with their whole 95% interval. The limits hold for this seed, and leave room of at least four
standard errors to what was measured.
"""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics.aggregate import aggregate_posterior, energy_coefficient
from pyro_vae.diagnostics.nuts import compare_with_nuts
from pyro_vae.diagnostics.refinement import gaps, refine
from pyro_vae.diagnostics.sbc import coverage, simulate
from pyro_vae.evidence.annealing import anneal
from pyro_vae.evidence.importance import importance_sample, reliable_k

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(digits):
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=20), digits)
    best = None
    for record in pyro_vae.iterate(vae, digits, pyro_vae.FitConfig(epochs=120)):
        if record.is_best:
            best = copy.deepcopy(vae.state_dict())
    vae.load_state_dict(best)
    return vae


@pytest.fixture(scope="module")
def x(digits):
    return torch.cat(list(digits.test.fixed("count", seed=0)))


def test_sizes_of_miscalibration(trained):
    """The guide is overconfident by a third, and hardly ever covers all latents at once."""
    torch.manual_seed(0)
    simulations = simulate(trained, 2000)
    width = verdicts.about_spread(simulations).size
    assert 1.25 < width.low < width.high < 1.5
    intervals, regions = (f.size for f in verdicts.about_coverage(coverage(simulations)))
    assert 0.72 < intervals.low < intervals.high < 0.85
    assert 0.1 < regions.low < regions.high < 0.45
    assert verdicts.about_likelihood_ranks(simulations).size.low > 0.85
    # what is right: averaged over data, the guide gives the prior back
    prior = trained.prior().sample((2000,))
    with torch.no_grad():
        simulated = trained.likelihood(trained.prior().sample((2000,))).sample()
    aggregate = aggregate_posterior(trained, simulated)
    assert abs(energy_coefficient(aggregate, prior.numpy())) < 0.01


def test_weights_of_the_encoder_and_of_refined_guides(trained, x):
    """Most images' weights are of no use under the encoder's guide, and reliable once refined."""
    torch.manual_seed(1)
    images, limit = x[:64], reliable_k(2000)
    encoder = importance_sample(trained, images, 2000, with_pareto_k=True)
    result = gaps(trained, images, num_steps=300, num_samples=2000)
    assert (encoder.pareto_k < limit).double().mean() < 0.2
    assert (result.evidence.pareto_k < limit).double().mean() > 0.7
    short = (result.evidence.log_evidence - encoder.log_evidence).numpy()
    assert 0.2 < short.mean() < 2.0, "nats that the encoder's estimate of log p(x) lacks"
    # the three gaps add up to log p(x) − ELBO, and none is negative on average
    for gap, low, high in (
        (result.amortization, 2.0, 6.0),
        (result.correlation, 0.8, 2.5),
        (result.remainder, 0.1, 0.8),
    ):
        size = verdicts.interval(gap.numpy())
        assert low < size.low < size.high < high


def test_annealing_and_refined_guides_agree_on_simulated_images(trained):
    """Two lower bounds and an upper one by different routes: within a few tenths of a nat."""
    torch.manual_seed(2)
    with torch.no_grad():
        z = trained.prior().sample((24,))
        simulated = trained.likelihood(z).sample()
    annealed = anneal(trained, simulated, num_steps=300, num_chains=4, z=z)
    refined = refine(trained, simulated, full=True, num_steps=400)
    importance = importance_sample(
        trained, simulated, 4000, proposal=refined.posterior(simulated)
    ).log_evidence
    above, below = annealed.upper - importance, importance - annealed.lower
    assert -0.3 < above.mean() < 0.8
    assert -0.3 < below.mean() < 1.8


def test_nuts_agrees_with_refined_guides_and_not_with_the_encoder(trained, x):
    torch.manual_seed(3)
    images = x[:2]
    refined = refine(trained, images, full=True, num_steps=400)
    judged = types.SimpleNamespace(
        model=trained.model,
        prior=trained.prior,
        parameters=trained.parameters,
        latent=trained.latent,
        posterior=refined.posterior,
    )
    good = compare_with_nuts(judged, images, num_chains=2, num_samples=150, num_warmup=100)
    assert good.r_hat.max() < 1.05, "the chains agree"
    assert good.effective_sample_size.min() > 60
    assert good.divergences == 0
    noise = 1 / np.sqrt(good.effective_sample_size)
    assert abs(good.mean_difference).mean() < 2 * noise.mean() + 0.1
    assert 0.85 < np.exp(np.log(good.scale_ratio).mean()) < 1.1
    # the encoder's, against the same draws
    posterior = trained.posterior(images)
    mean, scale = good.draws.mean((0, 1)), good.draws.std((0, 1))
    difference = abs(posterior.mean.detach().numpy() - mean) / scale
    assert difference.mean() > 2 * abs(good.mean_difference).mean()
    assert good.distance.max() < 0.03
