"""Outliers have finite posteriors and log-densities, and ordinary data keep every bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import example_spec, example_splits

import pyro_vae
from pyro_vae.models.bounds import soft_clamp
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.networks import Encoder
from pyro_vae.models.vae import VAE


def test_soft_clamp_keeps_values_and_gradients_inside_bit_for_bit():
    torch.manual_seed(0)
    inside = torch.cat([torch.linspace(-12, 12, 4001), torch.randn(4000)])
    weight = torch.randn_like(inside)
    gradients = []
    for bound in (lambda v: v, lambda v: soft_clamp(v, -12.0, 12.0, 2.0)):
        value = inside.clone().requires_grad_()
        bounded = bound(value)
        assert torch.equal(bounded, inside)
        (bounded.exp() * weight).sum().backward()
        gradients.append(value.grad)
    assert torch.equal(*gradients)


def test_soft_clamp_is_the_formula_outside_with_a_slope_that_neither_jumps_nor_vanishes():
    value = torch.tensor([-1e15, -20.0, -12.5, 4.5, 6.0, 1e15], dtype=torch.float64)
    excess = torch.tensor([1e15, 8.0, 0.5, 0.5, 2.0, 1e15], dtype=torch.float64) / 2
    side = torch.tensor([-1.0, -1, -1, 1, 1, 1], dtype=torch.float64)
    edge = torch.tensor([-12.0, -12, -12, 4, 4, 4], dtype=torch.float64)
    expected = edge + side * 2 * excess / (1 + excess)
    torch.testing.assert_close(soft_clamp(value, -12.0, 4.0, 2.0), expected)
    single = value.float().requires_grad_()
    soft_clamp(single, -12.0, 4.0, 2.0).sum().backward()
    torch.testing.assert_close(single.grad.double(), 1 / (1 + excess) ** 2)
    assert (single.grad > 0).all()
    for end, step in ((-12.0, -1e-6), (4.0, 1e-6)):
        near = torch.tensor([end, end + step], dtype=torch.float64, requires_grad=True)
        soft_clamp(near, -12.0, 4.0, 2.0).sum().backward()
        torch.testing.assert_close(near.grad, torch.ones(2, dtype=torch.float64), atol=2e-6, rtol=0)


def test_soft_clamp_of_infinity_is_its_limit_and_nan_stays():
    value = torch.tensor([-math.inf, math.inf, math.nan])
    bounded = soft_clamp(value, -12.0, 4.0, 2.0)
    torch.testing.assert_close(bounded, torch.tensor([-14.0, 6.0, math.nan]), equal_nan=True)


class Fixed(torch.nn.Module):
    """An encoder whose output does not depend on x."""

    def __init__(self, loc: torch.Tensor, log_scale: torch.Tensor) -> None:
        super().__init__()
        self.output = torch.cat([loc, log_scale], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output.expand(*x.shape[:-1], -1)


def test_posterior_scales_are_exp_inside_and_bounded_outside():
    log_scale = torch.tensor([-1e30, -12.0, -0.3, 2.0, 12.0, 1e30])
    vae = VAE(None, Fixed(torch.arange(6.0), log_scale), None, None)
    posterior = vae.posterior(torch.zeros(3, 2))
    assert torch.equal(posterior.mean, torch.arange(6.0).expand(3, 6))
    scale = posterior.variance.sqrt()[0]
    torch.testing.assert_close(scale[1:5], log_scale[1:5].exp())
    torch.testing.assert_close(scale[0].item(), math.exp(-12 - 2))
    torch.testing.assert_close(scale[5].item(), math.exp(12 + 2))


def make_encoder(bounded: bool) -> Encoder:
    torch.manual_seed(0)
    mean, std = torch.tensor([5.0, -3.0]), torch.tensor([0.5, 2.0])
    return Encoder("mlp", (2,), (4,), "SiLU", 3, mean, std, bounded)


def test_encoder_inputs_keep_every_bit_up_to_the_limit_and_are_bounded_beyond():
    open_, bounded = make_encoder(False), make_encoder(True)
    seen = []
    open_.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.tensor([[5.0 + 0.499 * 1024, -3.1], [4.2, -3 - 1.99 * 1024]])
    assert torch.equal(open_(x), bounded(x))
    assert torch.equal(seen[0], (x - open_.mean) / open_.std)
    far = torch.tensor([[3e38, -3e38], [1e30, -1e5]])
    assert torch.isfinite(open_(far)).all()
    assert seen[1].abs().max() <= 2 * 1024
    # Data with a bounded range have no outliers, and pay nothing.
    assert not torch.isfinite(bounded(far)).all()


@pytest.mark.parametrize(("name", "expected"), [("gaussian", False), ("binomial", True)])
def test_build_bounds_the_inputs_of_unbounded_units(name, expected, tmp_path):
    vae = pyro_vae.build(pyro_vae.ModelConfig(hidden=(4,)), example_splits(name, tmp_path))
    assert vae.encoder.bounded is expected


@pytest.mark.parametrize("raw", [-1e15, -300.0, -83.0, 83.0, 300.0, 1e15])
@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_log_densities_and_gradients_are_finite_in_float32(name, raw):
    """At every combination of location and log-scale, and at both ends of the data."""
    spec = example_spec(name, (1,))
    likelihood = LIKELIHOODS[name](spec, torch.full((1,), 0.5), torch.ones(1))
    count = likelihood.num_parameters
    for other in (raw, 0.0, -raw):
        for x in (0.0, float(spec.max_value or 1)):
            inputs = torch.tensor([raw, other][:count]).reshape(1, count, 1).requires_grad_()
            if name == "gaussian":
                likelihood.log_scale.data.fill_(other)
            log_prob = likelihood(inputs).log_prob(torch.full((1, 1), x))
            assert torch.isfinite(log_prob).all()
            gradients = torch.autograd.grad(log_prob.sum(), [inputs, *likelihood.parameters()])
            assert all(torch.isfinite(g).all() for g in gradients)
            mean = likelihood(inputs).mean
            assert torch.isfinite(mean).all()
            assert torch.isfinite(torch.autograd.grad(mean.sum(), inputs)[0]).all()


def test_learned_scales_are_exp_up_to_the_ceiling_and_bounded_above():
    gaussian = LIKELIHOODS["gaussian"](
        example_spec("gaussian", (2,)), torch.zeros(2), torch.tensor([1.0, 50.0])
    )
    for log_scale, expected in ((-1.0, math.exp(-1)), (8.0, math.exp(8)), (1e9, math.exp(10))):
        gaussian.log_scale.data.fill_(log_scale)
        scale = gaussian(torch.zeros(1, 1, 2)).stddev[0]
        torch.testing.assert_close(scale, (0.01 + expected) * torch.tensor([1.0, 50.0]))
    logistic = LIKELIHOODS["discretized-logistic"](
        example_spec("discretized-logistic", (1,)), torch.zeros(1), torch.ones(())
    )
    for log_scale, expected in ((-9.0, -7.0), (-7.0, -7.0), (-1.0, -1.0), (8.0, 8.0), (1e9, 10.0)):
        scale = logistic(torch.tensor([[[0.0], [log_scale]]])).base_dist.scale.item()
        assert scale == pytest.approx(255 * math.exp(expected), rel=1e-6)


def test_heavy_tails_fifty_deviations_away_are_data(tmp_path):
    """Their codes are those of the network without any bound."""
    x = np.random.default_rng(0).standard_t(1.5, size=(2000, 3)).astype(np.float32)
    splits = pyro_vae.load_data(x)
    vae = pyro_vae.build(pyro_vae.ModelConfig(hidden=(8,), latent_dim=2), splits)
    rows = torch.from_numpy(x)
    away = ((rows - vae.encoder.mean) / vae.encoder.std).abs()
    assert away.max() > 30
    plain = vae.encoder.layers((rows - vae.encoder.mean) / vae.encoder.std)
    assert torch.equal(torch.cat([vae.posterior(rows).mean, plain[:, 2:]], 1), plain)


def test_deviations_are_in_standard_deviations_from_the_mean():
    likelihood = LIKELIHOODS["gaussian"](
        example_spec("gaussian", (2,)), torch.tensor([5.0, -3.0]), torch.tensor([0.5, 2.0])
    )
    deviations = likelihood.deviations(torch.tensor([[6.0, -3.0], [3e38, -7.0]]))
    expected = torch.tensor([[2.0, 0.0], [6e38, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(deviations, expected)
