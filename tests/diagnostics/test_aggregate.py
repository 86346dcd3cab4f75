"""Use of latents, predictive checks and the aggregate posterior against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SIGMAS
from scipy import stats

from pyro_vae.diagnostics.aggregate import (
    aggregate_posterior,
    energy_coefficient,
    energy_test,
    holes,
)
from pyro_vae.diagnostics.latents import latent_use
from pyro_vae.diagnostics.predictive import predictive_check
from pyro_vae.models.linear_gaussian import LinearGaussian

# Each test against a binomial bound rejects a true hypothesis at most so often.
FALSE_ALARM = 1e-4


def oracle(guide="exact", seed=0, scale_factor=1.0, shift=0.0, widths=(2.0, 0.7, 0.0)):
    """Orthogonal columns, so that the exact posterior is diagonal; the last carries nothing."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    weight = basis * torch.tensor(widths, dtype=torch.float64)
    return LinearGaussian(weight, torch.zeros(6).double(), 0.8, guide, scale_factor, shift)


def simulated(vae, count: int):
    return vae.likelihood(vae.prior().sample((count,))).sample().detach()


def test_use_of_latents_is_the_closed_form():
    """Over the model's own data a latent's KL is −½ log s² and its means vary by 1 − s²."""
    vae = oracle("diagonal")
    use = latent_use(vae, simulated(vae, 20_000))
    variance = (1 / vae.posterior_precision.diagonal()).detach().numpy()
    moved = 1 - variance
    error = moved * math.sqrt(2 / 20_000)  # of a variance of normal values; twice that of the KL
    assert (abs(use.mean_variance - moved) <= SIGMAS * error + 1e-12).all()
    assert (abs(use.kl + np.log(variance) / 2) <= SIGMAS * error / 2 + 1e-12).all()
    assert error.max() < 0.01
    assert use.active.tolist() == [True, True, False]
    assert use.collapsed.tolist() == [False, False, True]
    wrong = latent_use(oracle("diagonal", scale_factor=0.8), simulated(vae, 20_000))
    assert (abs(wrong.kl + np.log(variance) / 2) > SIGMAS * error / 2 + 1e-12).all()


def test_a_collapsed_guide_uses_no_latent():
    vae = oracle("collapsed")
    use = latent_use(vae, simulated(vae, 300))
    assert use.collapsed.all()
    assert not use.active.any()
    with pytest.raises(ValueError, match="at least 2; got 1"):
        latent_use(vae, simulated(vae, 1))


def test_predictive_values_are_half_on_average_for_data_of_the_model():
    """x and its replicate are exchangeable given z ~ p(z|x): E[p] = ½ whatever the statistic."""
    vae = oracle()
    check = predictive_check(vae, simulated(vae, 2000), num_draws=100)
    assert check.names == ("mean", "standard deviation", "log p(x|z)")
    error = check.p_values.std(0) / math.sqrt(2000)
    assert error.max() < 0.01, "errors small enough to matter"
    assert (abs(check.p_values.mean(0) - 0.5) < SIGMAS * error).all()
    # power: the noise of the data is 1.2 times the model's, so they vary more than replicates
    torch.manual_seed(1)
    x = vae.likelihood(vae.prior().sample((2000,))).mean.detach()
    noisy = predictive_check(vae, x + 1.2 * 0.8 * torch.randn_like(x), num_draws=100)
    error = noisy.p_values.std(0) / math.sqrt(2000)
    assert (0.5 - noisy.p_values.mean(0) > SIGMAS * error)[1]
    assert (noisy.p_values.mean(0) - 0.5 > SIGMAS * error)[2]
    assert noisy.effects.mean(0)[1] > 0.1
    assert noisy.effects.mean(0)[2] < -0.1


def test_predictive_statistics_are_those_of_x_and_of_its_replicates():
    vae = oracle()
    x = simulated(vae, 7)
    torch.manual_seed(0)
    check = predictive_check(vae, x, num_draws=20_000)
    np.testing.assert_allclose(check.observed[:, 0], x.mean(1), rtol=1e-9)
    np.testing.assert_allclose(check.observed[:, 1], x.std(1), rtol=1e-9)
    # the replicates' mean pixel: W m + μ on average, variance from noise and posterior
    exact = vae.exact_posterior(x)
    row = vae.weight.mean(0)
    mean = (exact.mean @ row).detach().numpy()
    variance = (row @ exact.covariance_matrix[0] @ row + 0.8**2 / 6).item()
    error = math.sqrt(variance / 20_000)
    assert (abs(check.replicated_mean[:, 0] - mean) < SIGMAS * error).all()
    sd_error = math.sqrt(variance / 2 / 20_000)
    assert (abs(check.replicated_scale[:, 0] - math.sqrt(variance)) < SIGMAS * sd_error).all()
    expected = stats.norm.sf((check.observed[:, 0] - mean) / math.sqrt(variance))
    assert (abs(check.p_values[:, 0] - expected) < SIGMAS * 0.5 / math.sqrt(20_000)).all()


def test_roughness_of_images_and_statistics_of_a_user(run):
    import pyro_vae

    vae = pyro_vae.load(run)
    x = next(pyro_vae.load_data("digits").test.fixed("count", 0, 5))
    check = predictive_check(vae, x, num_draws=10)
    rows, columns = (x[..., 1:] - x[..., :-1]).abs(), (x[:, :, 1:] - x[:, :, :-1]).abs()
    rough = rows.mean((1, 2, 3)) + columns.mean((1, 2, 3))
    np.testing.assert_allclose(check.observed[:, 3], rough, rtol=1e-5)
    own = predictive_check(vae, x, {"ink": lambda x, z: (x > 8).float().mean((2, 3, 4))}, 10)
    np.testing.assert_allclose(own.observed[:, 0], (x > 8).float().mean((1, 2, 3)), rtol=1e-6)
    # equal statistics are ties, counted half
    same = predictive_check(vae, x, {"constant": lambda x, z: torch.ones(z.shape[:2])}, 10)
    assert (same.p_values == 0.5).all()
    with pytest.raises(ValueError, match=r"'flat' expects shape \(10, 5\); got \(5,\)"):
        predictive_check(vae, x, {"flat": lambda x, z: x[0].mean((1, 2, 3))}, 10)
    with pytest.raises(ValueError, match="num_draws expects at least 2; got 1"):
        predictive_check(vae, x, num_draws=1)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_energy_coefficient_of_two_normals(ratio):
    """E|X − Y| of N(0, a²) and N(0, b²) is √(2(a² + b²)/π)."""
    random = np.random.default_rng(0)
    exact = 1 - (1 + ratio) / math.sqrt(2 * (1 + ratio**2))
    estimates = [
        energy_coefficient(random.normal(size=(300, 1)), ratio * random.normal(size=(200, 1)))
        for _ in range(60)
    ]
    error = np.std(estimates) / math.sqrt(60)
    assert error < 0.003
    assert abs(np.mean(estimates) - exact) < SIGMAS * error + 0.002  # a ratio of means, for a mean
    assert energy_coefficient(np.zeros((3, 2)), np.ones((4, 2))) == 1


def test_energy_test_keeps_its_level_and_has_power():
    random = np.random.default_rng(1)
    p_values = [
        energy_test(random.normal(size=(40, 2)), random.normal(size=(30, 2)), 99, seed).p_value
        for seed in range(300)
    ]
    for level in (0.05, 0.2):
        most = stats.binom.isf(FALSE_ALARM, 300, level)
        assert sum(p <= level for p in p_values) <= most
    assert 0.4 < np.mean(p_values) < 0.6, "and are not all large"
    wrong = [
        energy_test(
            random.normal(size=(1000, 2)), 0.8 * random.normal(size=(1000, 2)), 199, seed
        ).p_value
        for seed in range(10)
    ]
    assert max(wrong) < 0.01


def test_aggregate_posterior_of_the_models_own_data_is_the_prior():
    torch.manual_seed(2)
    vae = oracle()
    prior = vae.prior().sample((1500,)).numpy()
    assert energy_test(aggregate_posterior(vae, simulated(vae, 1500)), prior).p_value > FALSE_ALARM
    # power: a guide whose mean is shifted, and one that is too narrow
    for fault in ({"shift": 0.5}, {"scale_factor": 0.5}):
        aggregate = aggregate_posterior(oracle(**fault), simulated(vae, 1500))
        assert energy_test(aggregate, prior).p_value == 0.001


def test_holes_are_found_where_the_aggregate_has_none():
    random = np.random.default_rng(3)
    prior = random.normal(size=(2000, 2))
    assert holes(random.normal(size=(2000, 2)), prior) < 0.01
    many = random.normal(size=(8000, 2))
    outside = many[abs(many[:, 0]) > 0.5][:2000]
    mass = stats.norm.cdf(0.5) - stats.norm.cdf(-0.5)
    # the prior's own draws within the hole vary by √(p(1−p)/N) = 0.011
    assert mass - 0.08 < holes(outside, prior) < mass + SIGMAS * 0.011
    with pytest.raises(ValueError, match="one shape"):
        holes(outside[:10], prior)
