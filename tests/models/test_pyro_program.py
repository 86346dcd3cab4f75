"""Users' Pyro models and guides, seen through `Program`, against the VAE's own and closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import pyro
import pytest
import torch
from conftest import SIGMAS, all_likelihoods, batch, example_vae
from pyro.distributions import Bernoulli, MultivariateNormal, Normal, constraints
from torch import nn

from pyro_vae.evidence.annealing import anneal
from pyro_vae.evidence.importance import importance_sample, upper_bound
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.models.pyro_program import Program

# (a) a VAE as a program: the same distributions


@all_likelihoods
def test_distributions_are_those_of_the_vae(name, tmp_path):
    vae, splits = example_vae(name, tmp_path)
    x = batch(splits, name, 6)
    program = Program(vae.model, vae.guide, x)
    torch.manual_seed(0)
    z = vae.prior().sample((4, 6))  # (S, B, Z)
    assert (program.prior().batch_shape, program.prior().event_shape) == ((), (3,))
    torch.testing.assert_close(program.prior().log_prob(z), vae.prior().log_prob(z))
    torch.testing.assert_close(program.prior().mean, vae.prior().mean)
    torch.testing.assert_close(program.prior().variance, vae.prior().variance)
    assert program.prior().sample().shape == (3,)
    assert program.prior().sample((4, 6)).shape == (4, 6, 3)

    assert (program.posterior(x).batch_shape, program.posterior(x).event_shape) == ((6,), (3,))
    torch.testing.assert_close(program.posterior(x).log_prob(z), vae.posterior(x).log_prob(z))
    torch.testing.assert_close(program.posterior(x).mean, vae.posterior(x).mean)

    for part in (z, z[0], z[:, :1], z[:1], z[0, 0], z[:, None], z[:2, :3, None]):
        ours, theirs = program.likelihood(part), vae.likelihood(part)
        assert ours.batch_shape == theirs.batch_shape == part.shape[:-1]
        assert ours.event_shape == theirs.event_shape == x.shape[1:]
        torch.testing.assert_close(ours.mean, theirs.mean)
        if name in ("bernoulli", "binomial", "gaussian"):
            torch.testing.assert_close(ours.variance, theirs.variance)
        assert ours.sample().shape == part.shape[:-1] + x.shape[1:]
        assert ours.sample((2,)).shape == (2, *part.shape[:-1], *x.shape[1:])
        # x for every sample, also where z is one for all images
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
        values = ours.sample((2,))
        torch.testing.assert_close(ours.log_prob(values), theirs.log_prob(values))


def test_draws_of_the_likelihood_stay_with_their_z():
    """Every row has its own z, far from the others', and every draw lies near its own."""
    program, _, _ = users_own(noise=1e-3)
    z = 10 * torch.arange(6).double().reshape(2, 3, 1).expand(2, 3, 2)
    values = program.likelihood(z).sample((5,))
    expected = program.likelihood(z).mean.expand(values.shape)
    assert (values - expected).abs().max() < 0.01
    assert (expected[0, 0, 0] - expected[0, 0, 1]).abs().max() > 1, "power"
    assert values.std(0).min() > 0


# (b) a program of one's own: a linear Gaussian model in disguise, so that p(x) is known


def users_own(noise: float = 0.7, rows: int = 12):
    """A model and a guide with other names and constrained parameters, some x, and log p(x)."""
    torch.manual_seed(1)
    weight = torch.randn(4, 2, dtype=torch.float64)
    covariance = weight @ weight.T + noise**2 * torch.eye(4).double()
    marginal = MultivariateNormal(torch.zeros(4).double(), covariance)
    x = marginal.sample((rows,))
    precision = torch.eye(2).double() + weight.T @ weight / noise**2
    to_mean = torch.linalg.inv(precision) @ weight.T / noise**2

    def model(pixels):
        weight_ = pyro.param("weight", weight)
        scale = pyro.param("noise", torch.tensor(noise).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(pixels)):
            code = pyro.sample("code", Normal(torch.zeros(2).double(), 1.0).to_event(1))
            mean = (code.unsqueeze(-2) @ weight_.T).squeeze(-2)
            pyro.sample("pixels", Normal(mean, scale).to_event(1), obs=pixels)

    def guide(pixels):
        # 1.2 times the posterior's deviations, had its latents no covariance
        scale = pyro.param(
            "scale", 1.2 * precision.diagonal().rsqrt(), constraint=constraints.positive
        )
        with pyro.plate("rows", len(pixels)):
            pyro.sample("code", Normal(pixels @ to_mean.T, scale).to_event(1))

    return Program(model, guide, x, "code", "pixels"), x, marginal.log_prob(x)


def agree(estimate, error, exact) -> bool:
    """Whether estimates are within their errors: the largest, and the mean."""
    off = estimate - exact
    widest = NormalDist().inv_cdf(1 - NormalDist().cdf(-SIGMAS) / len(off))
    mean = off.sum().abs() < SIGMAS * error.square().sum().sqrt()
    return bool((off / error).abs().max() < widest and mean)


def test_importance_sampling_annealing_and_quadrature_reach_its_evidence():
    program, x, exact = users_own()
    torch.manual_seed(2)
    sampled = importance_sample(program, x, 20_000)
    assert sampled.standard_error.max() < 0.02, "errors small enough to matter"
    assert agree(sampled.log_evidence, sampled.standard_error, exact)
    annealed = anneal(program, x, 50, 100)
    assert annealed.standard_error.max() < 0.2
    assert agree(annealed.lower, annealed.standard_error, exact)
    truth = quadrature(program, x, 101)
    torch.testing.assert_close(truth.log_evidence, exact)
    z = truth.sample(1)[0]
    assert (upper_bound(program, x, z, 20_000) - exact).abs().max() < 0.1
    # power: a parameter off by 5%
    with torch.no_grad():
        pyro.get_param_store().get_state()["params"]["weight"].mul_(1.05)
    wrong = importance_sample(program, x, 20_000)
    assert not agree(wrong.log_evidence, wrong.standard_error, exact)


def test_parameters_are_the_unconstrained_ones_of_the_store():
    program, _, _ = users_own()
    found = program.parameters()
    state = pyro.get_param_store().get_state()["params"]
    assert {id(parameter) for parameter in found} == {id(p) for p in state.values()}
    assert len(found) == 3
    assert all(parameter.requires_grad for parameter in found)


def test_a_decoder_that_takes_one_batch_dimension_only():
    """Convolutions, (N, Z) → (N, 1, 8, 8), in one latent, against quadrature."""
    torch.manual_seed(3)
    decoder = nn.Sequential(
        nn.Linear(1, 8), nn.Tanh(), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 4, 4)
    ).double()
    decoder[0].weight.data *= 3

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x), 1).double(), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", Bernoulli(logits=decoder(z)).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(torch.zeros(len(x), 1).double(), 1.1).to_event(1))

    x = torch.bernoulli(torch.full((10, 1, 8, 8), 0.5, dtype=torch.float64))
    program = Program(model, guide, x)
    truth = quadrature(program, x)
    assert truth.error.max() < 1e-6
    sampled = importance_sample(program, x, 5000)
    assert sampled.standard_error.max() < 0.05
    assert agree(sampled.log_evidence, sampled.standard_error, truth.log_evidence)
    annealed = anneal(program, x, 30, 50)
    assert annealed.standard_error.max() < 0.2
    assert agree(annealed.lower, annealed.standard_error, truth.log_evidence)
    # power: images in another order
    assert not agree(sampled.log_evidence.roll(1), sampled.standard_error, truth.log_evidence)
    with pytest.raises(ValueError, match="support"):
        importance_sample(program, x + 0.5, 10)


# (c) errors, and what is left behind


def test_clear_errors():
    program, x, _ = users_own()
    model, guide = program.model, program.guide
    with pytest.raises(ValueError, match=r"expected a sample site 'z'; got code, pixels$"):
        Program(model, guide, x, observed="pixels")
    with pytest.raises(ValueError, match=r"expected a sample site 'x'; got code, pixels$"):
        Program(model, guide, x, latent="code")
    with pytest.raises(ValueError, match=r"expected a sample site 'rows'; got code, pixels$"):
        Program(model, guide, x, "rows", "pixels")
    with pytest.raises(ValueError, match=r"expected a sample site 'code'; got none$"):
        Program(model, lambda x: None, x, "code", "pixels")
    with pytest.raises(ValueError, match="expected a sample site 'noise'"):  # a parameter
        Program(model, guide, x, "noise", "pixels")


@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("where", ["prior", "likelihood", "guide"])
def test_a_forgotten_to_event(where, latent_dim):
    """Seen when the program is made, also with one latent or value, which broadcast silently."""

    def normal(name, loc):
        distribution = Normal(loc, 1.0)
        return distribution if name == where else distribution.to_event(1)

    def model(x):
        z = pyro.sample("z", normal("prior", torch.zeros(len(x), latent_dim)))
        pyro.sample("x", normal("likelihood", z), obs=x)

    def guide(x):
        pyro.sample("z", normal("guide", x / 2))

    with pytest.raises(ValueError, match=r"site '[xz]' expects batch shape \(1,\).*to_event"):
        Program(model, guide, torch.randn(5, latent_dim))


def test_a_latent_without_an_event_dimension():
    """One latent a row as a number: batch (B,), event () is not batch (B,), event (1,)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x[:, 0] / 2, 0.7))

    with pytest.raises(ValueError, match=r"site 'z' expects.*event shape \(\).*to_event"):
        Program(model, guide, torch.randn(5, 1))


def test_nothing_is_left_in_the_store():
    program, x, _ = users_own(rows=3)
    store = pyro.get_param_store()
    # all that was there before: the program's own parameters, and a stranger's
    pyro.param("stranger", torch.ones(2), constraint=constraints.positive)
    before = {name: value.detach().clone() for name, value in store.items()}
    assert set(before) == {"weight", "noise", "scale", "stranger"}
    for use in (
        lambda: Program(program.model, program.guide, x, "code", "pixels"),
        program.parameters,
        lambda: importance_sample(program, x, 10),
        lambda: anneal(program, x, 3, 2),
        lambda: quadrature(program, x, 11),
        lambda: upper_bound(program, x, torch.zeros(3, 2).double(), 3),
    ):
        use()
        assert set(store.keys()) == set(before)
        for name, value in store.items():
            assert torch.equal(value, before[name])
            assert value.unconstrained().grad is None


def test_any_number_of_rows_makes_a_program():
    program, x, exact = users_own()
    one = Program(program.model, program.guide, x[:1], "code", "pixels")
    torch.manual_seed(4)
    result = importance_sample(one, x, 5000)
    assert agree(result.log_evidence, result.standard_error, exact)
    assert math.isfinite(result.log_evidence.sum())
