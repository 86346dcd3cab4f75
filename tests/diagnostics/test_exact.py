"""Use of latents, predictive checks and the aggregate posterior on a few rows, by hand."""

from __future__ import annotations

import itertools
import math
import types

import numpy as np
import pytest
import sklearn.model_selection
import torch
from conftest import SIGMAS
from pyro.distributions import Normal

from pyro_vae.diagnostics import nuts
from pyro_vae.diagnostics.aggregate import (
    aggregate_posterior,
    energy_coefficient,
    energy_test,
    holes,
)
from pyro_vae.diagnostics.gradients import Gradient
from pyro_vae.diagnostics.latents import LatentUse, latent_use
from pyro_vae.diagnostics.predictive import PredictiveCheck, predictive_check
from pyro_vae.runtime import memory

LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])


def model() -> types.SimpleNamespace:
    """A prior that is not standard, q(z|x) of mean x and deviation 0.3, and x ~ N(z, 1)."""
    return types.SimpleNamespace(
        prior=lambda: Normal(LOC, SCALE).to_event(1),
        posterior=lambda x: Normal(x, torch.full_like(x, 0.3)).to_event(1),
        likelihood=lambda z: Normal(z, torch.ones_like(z)).to_event(1),
    )


@pytest.fixture(params=["at once", "row by row"])
def chunked(request, monkeypatch):
    if request.param == "row by row":
        monkeypatch.setattr(memory, "CACHE_VALUES", 1)


@pytest.mark.usefixtures("chunked")
def test_use_of_latents_by_hand():
    """The KL to the prior as it is, over all rows, and the variance of the means by N − 1."""
    x = torch.tensor([[0.0, 1.0], [1.0, 5.0], [5.0, 3.0], [0.5, 0.0]])
    use = latent_use(model(), x)
    kl = (SCALE / 0.3).log() + (0.3**2 + (x - LOC) ** 2) / (2 * SCALE**2) - 0.5
    np.testing.assert_allclose(use.kl, kl.mean(0), rtol=1e-5)
    np.testing.assert_allclose(use.mean_variance, np.var(x.numpy(), axis=0, ddof=1), rtol=1e-6)


def test_limits_of_active_and_collapsed_latents():
    use = LatentUse(np.array([0.0099, 0.0101]), np.array([0.0101, 0.0099]))
    assert use.collapsed.tolist() == [True, False]
    assert use.active.tolist() == [True, False]


@pytest.mark.usefixtures("chunked")
def test_replicates_of_every_row():
    """x' has the variance 0.3² + 1 about x; its mean has half of it. At four standard errors."""
    x, draws = torch.arange(10.0).reshape(5, 2), 400
    check = predictive_check(model(), x, {"first": lambda x, z: x[..., 0]}, num_draws=draws)
    np.testing.assert_allclose(check.observed[:, 0], x[:, 0])
    error = math.sqrt(1.09 / draws)
    assert (abs(check.replicated_mean[:, 0] - x[:, 0].numpy()) < SIGMAS * error).all()
    assert (abs(check.replicated_scale - math.sqrt(1.09)) < SIGMAS * error / math.sqrt(2)).all()


def test_effects_are_in_deviations_of_the_replicates():
    seven, three = np.full((2, 1), 7.0), np.full((2, 1), 3.0)
    check = PredictiveCheck(("a",), seven, three, np.array([[2.0], [0.5]]), seven)
    assert check.effects.tolist() == [[2.0], [8.0]]
    same = PredictiveCheck(("a",), seven, seven, np.zeros((2, 1)), seven)
    assert same.effects.tolist() == [[0.0], [0.0]]


@pytest.mark.usefixtures("chunked")
def test_one_draw_for_each_row():
    """About x, with the posterior's deviation 0.3, at four standard errors."""
    torch.manual_seed(0)
    x = torch.arange(400.0).reshape(200, 2)
    off = aggregate_posterior(model(), x) - x.numpy()
    assert off.shape == (200, 2)
    assert abs(off.mean()) < SIGMAS * 0.3 / 20
    assert abs(off.std() - 0.3) < SIGMAS * 0.3 / math.sqrt(800)


def test_energy_coefficient_by_loops():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(4, 2)), 0.3 + random.normal(size=(7, 2))

    def mean(pairs) -> float:
        return float(np.mean([math.dist(a, b) for a, b in pairs]))

    between = mean(itertools.product(first, second))
    within = sum(mean(itertools.permutations(sample, 2)) for sample in (first, second))
    for a, b in ((first, second), (second, first)):
        assert energy_coefficient(a, b) == pytest.approx(1 - within / (2 * between))


def test_the_seed_of_the_permutations():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(9, 1)), random.normal(size=(8, 1))
    p_values = [energy_test(first, second, 99, seed).p_value for seed in (0, 0, 1, 2, 3)]
    assert p_values[0] == p_values[1]
    assert len(set(p_values)) > 1


def test_chains_that_never_move_count_as_one_draw():
    """Whether all chains stand at one place or each at its own; a latent that moves is sampled."""
    draws = np.random.default_rng(2).normal(size=(2, 8, 1, 3))
    draws[..., 0] = 0.7
    draws[0, ..., 1], draws[1, ..., 1] = 1.0, 2.0
    r_hat, size = nuts.convergence(draws)
    assert np.isinf(r_hat).tolist() == [[True, True, False]]
    assert size[0, :2].tolist() == [1.0, 1.0]
    assert size[0, 2] > 1


def test_rounding_is_no_noise():
    """A variance of 3e-14 of the squared gradient is rounding error; one of 1e-9 is noise."""
    mean = torch.full((4,), 0.3, dtype=torch.float64)
    for share, noiseless in ((3e-14, True), (1e-9, False)):
        squares = torch.full((20,), 4 * 0.09 * (1 + share), dtype=torch.float64)
        gradient = Gradient(40, mean, 0 * mean, mean.expand(20, 4), squares)
        assert gradient.variance.estimate > 0
        assert math.isinf(gradient.signal_to_noise.estimate) == noiseless


def test_holes_are_where_the_ratio_of_densities_is_small(monkeypatch):
    """Chances c of the aggregate mean a density ratio c / (1 − c): 1/11 is a ratio of 0.1."""
    aggregate, prior = np.arange(12.0).reshape(6, 2), -np.arange(12.0).reshape(6, 2)
    chances = np.array([0.01, 0.0908, 0.0911, 0.3, 0.5, 0.9])
    seen = {}

    def predict(classifier, features, labels, cv, method):
        seen.update(features=features, labels=labels, cv=cv)
        assert method == "predict_proba"
        chance = np.r_[np.zeros(6), chances]  # of the aggregate's own draws, none counts
        return np.stack([1 - chance, chance], axis=1)

    monkeypatch.setattr(sklearn.model_selection, "cross_val_predict", predict)
    assert holes(aggregate, prior, seed=7) == pytest.approx(2 / 6)
    assert holes(aggregate, prior, ratio=0.5) == pytest.approx(4 / 6)  # 0.3 is below 1/3
    assert (seen["cv"].n_splits, seen["cv"].shuffle, seen["cv"].random_state) == (5, True, 0)
    assert seen["labels"].tolist() == [True] * 6 + [False] * 6
    z = np.concatenate([aggregate, prior])
    np.testing.assert_array_equal(seen["features"], np.c_[z, (z**2).sum(1)])
    holes(aggregate, prior, seed=7)
    assert seen["cv"].random_state == 7
