"""The local test: exact where the guide is, and it sees faults that cancel over x."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIGMAS
from pyro.distributions import MultivariateNormal, Normal
from scipy import stats

from pyro_vae.diagnostics import local
from pyro_vae.diagnostics.findings import about_bias, about_local
from pyro_vae.diagnostics.local import local_test
from pyro_vae.diagnostics.sbc import simulate
from pyro_vae.models.linear_gaussian import LinearGaussian

FALSE_ALARM = 1e-4
# The smallest p-value, 1 / 10,001, is below it.
LABELLINGS, PAIRS = 10_000, 1500


def guided(change=None, guide: str = "exact") -> SimpleNamespace:
    """An oracle whose guide is `change`(x (B, D), q(z|x))."""
    torch.manual_seed(0)
    vae = LinearGaussian(torch.randn(5, 2), torch.zeros(5), 1.0, guide)
    posterior = vae.posterior if change is None else (lambda x: change(x, vae.posterior(x)))
    return SimpleNamespace(prior=vae.prior, likelihood=vae.likelihood, posterior=posterior)


def sides(x: torch.Tensor) -> torch.Tensor:
    """±1 (B, 1): which half of the x a row belongs to."""
    return x[:, :1].sign()


def up_and_down(x, q):
    """Shifted up by a standard deviation for half of the x, down for the other half."""
    return MultivariateNormal(q.mean + 1.0 * sides(x) * q.stddev, scale_tril=q.scale_tril)


def wide_and_narrow(x, q):
    scale = (0.7 * sides(x)).exp().unsqueeze(-1)
    return MultivariateNormal(q.mean, scale_tril=scale * q.scale_tril)


def rows(vae, count: int) -> torch.Tensor:
    with torch.no_grad():
        return vae.likelihood(vae.prior().sample((count,))).sample()


def test_an_exact_guide_is_accepted_and_one_wrong_for_each_half_is_not():
    """At 1e-4: p-values of a row of each half, and the share of pairs that are told apart."""
    exact, faulty = guided(), guided(up_and_down)
    torch.manual_seed(1)
    x = rows(exact, 50)
    x = torch.stack([x[x[:, 0] > 1][0], x[x[:, 0] < -1][0]])
    result = local_test(exact, x[:1], PAIRS, 50, LABELLINGS)
    assert result.p_value[0] > FALSE_ALARM
    assert stats.binomtest(int(result.correct.sum()), PAIRS).pvalue > FALSE_ALARM
    wrong = local_test(faulty, x, PAIRS, 50, LABELLINGS)
    assert wrong.statistic.shape == wrong.p_value.shape == (2,)
    assert (wrong.p_value < FALSE_ALARM).all()
    hits = int(wrong.correct.sum())
    assert stats.binomtest(hits, PAIRS, alternative="greater").pvalue < FALSE_ALARM
    # the size has the verdict
    assert about_local(wrong.correct).verdict == "wrong"
    assert about_local(np.arange(4000) % 2 == 0).verdict == "sound"


def test_calibration_over_all_x_is_blind_to_it():
    """What the local test is for: the mean z-score of each latent is 0, and no rank is uneven."""
    torch.manual_seed(2)
    simulations = simulate(guided(up_and_down), 2000, 19)
    bias = about_bias(simulations).size
    assert bias.low < 0 < bias.high
    # One sign throughout is seen.
    always = guided(lambda x, q: MultivariateNormal(q.mean + q.stddev, scale_tril=q.scale_tril))
    assert about_bias(simulate(always, 2000, 19)).verdict == "wrong"


def test_widths_that_are_wrong_for_some_x_are_seen():
    """Twice as wide for half of the x, half as wide for the others: their row is rejected."""
    vae = guided(wide_and_narrow)
    torch.manual_seed(3)
    x = rows(vae, 30)
    result = local_test(vae, x[x[:, 0] > 1][:1], 2 * PAIRS, 50, LABELLINGS)
    assert result.p_value[0] < FALSE_ALARM


def test_correlations_are_seen():
    """A diagonal guide of the right widths, where the posterior's latents are correlated."""
    torch.manual_seed(4)
    weight = torch.tensor([[1.5, 1.2], [0.2, 0.4]])
    vae = LinearGaussian(weight, torch.zeros(2), 0.5)

    def independent(x):
        q = vae.posterior(x)
        return Normal(q.mean, q.stddev).to_event(1)

    mean_field = SimpleNamespace(prior=vae.prior, likelihood=vae.likelihood, posterior=independent)
    x = rows(vae, 1)
    assert local_test(mean_field, x, PAIRS, 50, LABELLINGS).p_value[0] < FALSE_ALARM


def test_the_p_value_of_an_exact_guide_is_uniform():
    """Over repetitions, at a fixed x: Kolmogorov and Smirnov's test at 1e-4."""
    vae, x = guided(), torch.ones(1, 5)
    torch.manual_seed(5)
    values = [local_test(vae, x, 60, 20, 99, seed).p_value[0] for seed in range(40)]
    random = np.random.default_rng(0)
    spread = np.array(values) - random.random(40) / 100  # one of 100 steps, made continuous
    assert stats.kstest(spread, "uniform").pvalue > FALSE_ALARM
    # power: the p-values of a fault
    wrong = [local_test(guided(up_and_down), x, 500, 20, 99, s).p_value[0] for s in range(10)]
    assert stats.kstest(wrong, "uniform").pvalue < FALSE_ALARM


def test_preferences_are_measured_on_pairs_that_are_new(monkeypatch):
    """Few pairs and no penalty: the pairs of the training would be told apart nearly always."""
    monkeypatch.setattr(local, "PENALTY", 1e-3)
    torch.manual_seed(6)
    result = local_test(guided(), torch.ones(1, 5), 40, 5, 1)
    assert abs(result.correct.mean() - 0.5) < SIGMAS * 0.5 / math.sqrt(40)


def test_units_of_a_full_gaussian_are_independent():
    torch.manual_seed(7)
    factor = torch.tensor([[1.0, 0.0], [0.9, 0.2]])
    q = MultivariateNormal(torch.tensor([[3.0, -2.0]]), scale_tril=factor[None])
    u = local._units(q, q.sample((20_000,))[:, 0])
    assert np.abs(np.cov(u.T) - np.eye(2)).max() < 2 * SIGMAS / math.sqrt(20_000)
    far = local._units(q, q.mean + 1000)
    assert np.abs(far).max() == local.REACH


def test_units_of_a_diagonal_gaussian_are_standard_deviations():
    q = Normal(torch.tensor([[3.0, -2.0]]), torch.tensor([[0.1, 4.0]])).to_event(1)
    u = local._units(q, torch.tensor([[3.2, -6.0]]))
    np.testing.assert_allclose(u, [[2.0, -1.0]], rtol=1e-4)


def test_features_do_not_depend_on_the_order_of_rows():
    """Each row has the features of its own x."""
    vae = guided()
    torch.manual_seed(8)
    x = rows(vae, 9)
    with torch.no_grad():
        features, q = local._features(vae), vae.posterior(x)
        z = q.sample()
        forward = features(q, x, z)
        back = features(vae.posterior(x.flip(0)), x.flip(0), z.flip(0))[::-1]
    np.testing.assert_allclose(forward, back, atol=1e-4)
    assert forward.shape == (9, 2 + 2 + 1 + 2 * 2 * (5 + 2))


def test_many_latents_and_large_rows_have_few_features():
    torch.manual_seed(9)
    vae = LinearGaussian(torch.randn(300, 50) / 10, torch.zeros(300), 1.0, "diagonal")
    x = torch.zeros(1, 300)
    with torch.no_grad():
        q = vae.posterior(x)
        size = local._features(vae)(q, x, q.sample()).shape[1]
    kept, context = local.MOST_LATENTS, 2 * local.COMPONENTS
    assert size == 100 + kept * (kept - 1) // 2 + 2 * kept * context


def test_a_collapsed_guide_of_a_model_without_information():
    """q(z|x) = p(z) is exact if x does not depend on z: constant means, and no false alarm."""
    vae = LinearGaussian(torch.zeros(3, 2), torch.zeros(3), 1.0, "collapsed")
    torch.manual_seed(10)
    result = local_test(vae, torch.zeros(1, 3), 200, 20, 999)
    assert np.isfinite(result.statistic).all()
    assert result.p_value[0] > 0.001


def test_arguments():
    for settings in ({"num_pairs": 0}, {"num_draws": 0}, {"num_permutations": 0}):
        with pytest.raises(ValueError, match="expect at least 1; got"):
            local_test(guided(), torch.zeros(1, 5), **{"num_pairs": 50, **settings})


def test_progress_counts_every_pair():
    done = []
    local_test(guided(), torch.zeros(1, 5), 60, 2, 1, on_chunk=done.append)
    assert sum(done) == 120
