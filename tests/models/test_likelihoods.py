"""Each likelihood is a normalized density, draws what it scores, and starts at the data's mean."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SIGMAS, all_likelihoods, example_spec, example_values
from scipy import integrate

from pyro_vae.models.likelihoods import (
    LIKELIHOODS,
    MIN_SCALE,
    ContinuousBernoulli,
    DiscretizedLogistic,
)

SHAPE = (1, 1, 1)


def one_pixel(name: str, *raw: float):
    """p(x|z) of one pixel, in float64, whose raw parameters are `raw`."""
    spec = example_spec(name, SHAPE)
    mean = torch.tensor(0.4 * (spec.max_value or 1), dtype=torch.float64).expand(SHAPE)
    likelihood = LIKELIHOODS[name](spec, mean, torch.tensor(0.7, dtype=torch.float64)).double()
    return likelihood(torch.tensor(raw, dtype=torch.float64).reshape(1, len(raw), *SHAPE))


@pytest.mark.parametrize(
    ("name", "raw"),
    [(name, (r,)) for name in ("bernoulli", "binomial") for r in (-40.0, -3.0, 0.0, 0.2, 8.0, 40.0)]
    + [
        ("discretized-logistic", (loc, log_scale))
        for loc in (-900.0, -1.0, 0.0, 0.3, 400.0)
        for log_scale in (-20.0, -7.0, -3.0, 0.0, 5.0)
    ],
)
def test_masses_sum_to_one(name, raw):
    distribution = one_pixel(name, *raw)
    top = example_spec(name).bound
    values = torch.arange(top + 1.0, dtype=torch.float64).reshape(-1, 1, *SHAPE)
    assert distribution.log_prob(values).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("raw", [-60.0, -16.0, -3.0, -0.02, -1e-4, 0.0, 5e-3, 0.5, 16.0, 40.0])
def test_continuous_bernoulli_integrates_to_one(raw):
    distribution = one_pixel("continuous-bernoulli", raw)

    def density(x: float) -> float:
        value = torch.full((1, *SHAPE), x, dtype=torch.float64)
        return distribution.log_prob(value).exp().item()

    edges = [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1]
    total = sum(integrate.quad(density, a, b)[0] for a, b in itertools.pairwise(edges))
    assert total == pytest.approx(1, abs=1e-8)


def test_continuous_bernoulli_is_normalized_in_single_precision_where_torch_is_not():
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    logits = torch.tensor(40.0)
    ours = ContinuousBernoulli(logits).log_prob(grid.float()).double().exp()
    torchs = torch.distributions.ContinuousBernoulli(logits=logits).log_prob(grid.float())
    assert torch.trapezoid(ours, grid).item() == pytest.approx(1, abs=1e-3)
    assert torch.trapezoid(torchs.double().exp(), grid).item() < 0.5


@pytest.mark.parametrize("raw", [-300.0, -1.0, 0.0, 4.0])
def test_gaussian_integrates_to_one(raw):
    distribution = one_pixel("gaussian", raw)
    centre, width = distribution.mean.item(), distribution.stddev.item()

    def density(x: float) -> float:
        return distribution.log_prob(torch.full((1, *SHAPE), x, dtype=torch.float64)).exp().item()

    total = integrate.quad(density, centre - 10 * width, centre + 10 * width, points=[centre])[0]
    assert total == pytest.approx(1, abs=1e-7)


def test_gaussian_scale_is_bounded_below():
    likelihood = LIKELIHOODS["gaussian"](
        example_spec("gaussian", (2,)), torch.zeros(2), torch.tensor([1.0, 50.0])
    )
    likelihood.log_scale.data.fill_(-1e4)
    scale = likelihood(torch.zeros(1, 1, 2)).stddev
    torch.testing.assert_close(scale, MIN_SCALE * torch.tensor([[1.0, 50.0]]))


@pytest.mark.parametrize(
    "distribution",
    [
        ContinuousBernoulli(torch.tensor([-30.0, -2.0, 0.0, 1e-4, 0.3, 12.0]).double()),
        DiscretizedLogistic(
            torch.tensor([-3.0, 0.4, 7.0, 7.5, 15.9]).double(),
            torch.tensor([2.0, 0.1, 1.0, 4.0, 30.0]).double(),
            16,
        ),
    ],
    ids=["continuous-bernoulli", "discretized-logistic"],
)
def test_draws_follow_the_density(distribution):
    """Means of the draws against the mean, and the mean against the density by summation."""
    torch.manual_seed(0)
    draws = distribution.sample((200_000,))
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - distribution.mean).abs() <= SIGMAS * error).all()
    if isinstance(distribution, DiscretizedLogistic):
        values = torch.arange(17.0, dtype=torch.float64)[:, None]
        mean = (values * distribution.log_prob(values).exp()).sum(0)
    else:
        values = torch.linspace(0, 1, 400_001, dtype=torch.float64)[:, None]
        mean = torch.trapezoid(values * distribution.log_prob(values).exp(), values, dim=0)
    torch.testing.assert_close(distribution.mean, mean, atol=1e-6, rtol=1e-6)
    # power: the same check sees a logit or a location that is off by a tenth
    wrong = (
        ContinuousBernoulli(distribution.logits + 0.1)
        if isinstance(distribution, ContinuousBernoulli)
        else DiscretizedLogistic(distribution.loc + 0.1, distribution.scale, 16)
    )
    assert ((draws.mean(0) - wrong.mean).abs() > SIGMAS * error).sum() >= 4


def test_mean_of_many_levels():
    """Above 1,024 levels an integral stands for the sum: off by less than half a level."""
    for loc, scale in [(3.0, 2.0), (30_000.4, 0.05), (65_000.0, 700.0), (-500.0, 300.0)]:
        distribution = DiscretizedLogistic(*torch.tensor([loc, scale]).double(), 65_535)
        values = torch.arange(65_536.0, dtype=torch.float64)
        exact = (values * distribution.log_prob(values).exp()).sum()
        assert abs(distribution.mean - exact) <= 0.5


def test_discretized_logistic_draws_reach_every_tail():
    torch.manual_seed(0)
    spread = DiscretizedLogistic(torch.tensor(8.0), torch.tensor(50.0), 16)
    draws = spread.sample((20_000,))
    for value in (0.0, 8.0, 16.0):
        p = spread.log_prob(torch.tensor(value)).exp().item()
        error = math.sqrt(p * (1 - p) / len(draws))
        assert abs((draws == value).double().mean().item() - p) <= SIGMAS * error


@all_likelihoods
def test_initial_bias_gives_the_mean_of_the_data(name):
    spec = example_spec(name)
    values = torch.from_numpy(example_values(name, 500))
    x = spec.to_units(values, LIKELIHOODS[name].units if name != "bernoulli" else "unit")
    likelihood = LIKELIHOODS[name](spec, x.mean(0), x.std())
    decoded = likelihood(likelihood.initial_bias().unsqueeze(0)).mean[0]
    # the discretized logistic loses a little of its tails at the ends of the range
    tolerance = 0.03 * spec.bound if name == "discretized-logistic" else 1e-4 * (x.max() + 1)
    assert (decoded - x.mean(0)).abs().max() < tolerance


@all_likelihoods
def test_shapes_broadcast_over_particles(name):
    spec = example_spec(name)
    likelihood = LIKELIHOODS[name](spec, torch.full(spec.shape, 0.5), torch.tensor(1.0))
    raw = torch.zeros(6, 3, likelihood.num_parameters, *spec.shape)
    distribution = likelihood(raw)
    assert (distribution.batch_shape, distribution.event_shape) == ((6, 3), spec.shape)
    x = distribution.sample()
    assert distribution.log_prob(x).shape == (6, 3)
    assert distribution.expand((2, 6, 3)).log_prob(x).shape == (2, 6, 3)


@pytest.mark.parametrize(
    ("name", "bad"), [("bernoulli", 0.5), ("binomial", 17.0), ("discretized-logistic", 255.5)]
)
def test_values_outside_the_support_are_refused(name, bad):
    distribution = one_pixel(name, *np.zeros(LIKELIHOODS[name].num_parameters))
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(torch.full((1, *SHAPE), bad, dtype=torch.float64))


@all_likelihoods
def test_gradients_are_finite_at_extreme_outputs(name):
    spec = example_spec(name)
    likelihood = LIKELIHOODS[name](spec, torch.full(spec.shape, 0.5), torch.tensor(1.0))
    raw = torch.tensor([-80.0, 0.0, 80.0]).reshape(3, 1, 1, 1, 1)
    raw = raw.expand(3, likelihood.num_parameters, *spec.shape).clone().requires_grad_()
    x = spec.to_units(
        torch.from_numpy(example_values(name, 3)), LIKELIHOODS[name].units, torch.Generator()
    )
    likelihood(raw).log_prob(x).sum().backward()
    assert torch.isfinite(raw.grad).all()
