"""log p(x) and p(z|x) under a mixture prior, whose closed form is known; NUTS in its own space.

z ~ Σₖ πₖ N(μₖ, Σₖ),  x ~ N(W z + b, σ² I):  p(x) = Σₖ πₖ N(x; W μₖ + b, W Σₖ Wᵀ + σ² I)
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import SIGMAS
from family_models import model
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.diagnostics.latents import latent_use
from pyro_vae.diagnostics.nuts import compare_with_nuts
from pyro_vae.diagnostics.sbc import simulate
from pyro_vae.evidence.annealing import anneal
from pyro_vae.evidence.importance import importance_sample, upper_bound
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.models.interface import held_fixed
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.priors import Mixture
from pyro_vae.models.pyro_program import Program
from pyro_vae.page.explorer import _grid
from pyro_vae.plots.from_model import _quantiles

NOISE = 0.7


def oracle(means: list[list[float]], scales: list[float], weights: list[float]) -> LinearGaussian:
    """A linear model with a mixture prior, in float64."""
    torch.manual_seed(0)
    latents = len(means[0])
    weight = torch.randn(3, latents, dtype=torch.float64)
    vae = LinearGaussian(weight, torch.tensor([0.2, -0.4, 1.0]).double(), NOISE)
    prior = Mixture(latents, len(means), "full").double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor(weights).double().log())
        prior.features[:, :latents] = torch.tensor(means).double()
        prior.features[:, latents : 2 * latents] = torch.tensor(scales).double().log()[:, None]
        if latents == 2:
            prior.features[:, 4] = torch.linspace(-0.5, 0.8, len(means)).double()
    vae.prior_module = prior
    return vae


def exact(vae: LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) (B,) and the mean of p(z|x) (B, Z)."""
    parts = vae.prior().component_distribution
    log_pi = vae.prior().mixture_distribution.logits
    w, covariance = vae.weight, parts.covariance_matrix
    noise = NOISE**2 * torch.eye(3).double()
    marginal = MultivariateNormal(parts.loc @ w.T + vae.loc, w @ covariance @ w.T + noise)
    log_each = log_pi + marginal.log_prob(x.unsqueeze(1))  # (B, K)
    gain = covariance @ w.T @ torch.linalg.inv(w @ covariance @ w.T + noise)  # (K, Z, 3)
    away = x.unsqueeze(1) - marginal.loc
    means = parts.loc + torch.einsum("kzd,bkd->bkz", gain, away)
    mean = (log_each.softmax(1).unsqueeze(-1) * means).sum(1)
    return log_each.logsumexp(1).detach(), mean.detach()


NEAR = ([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], [0.6, 0.9, 0.5], [0.5, 0.3, 0.2])
FAR = ([[0.0, 0.0], [60.0, -40.0]], [1.0, 1.5], [0.999, 0.001])


def drawn(vae: LinearGaussian, component: int, count: int = 3) -> Tensor:
    torch.manual_seed(1)
    z = vae.prior().component_distribution.sample((count,))[:, component]
    return vae.likelihood(z).sample().detach()


@pytest.mark.parametrize("component", [0, 1])
@pytest.mark.parametrize("parts", [NEAR, FAR])
def test_quadrature_reaches_each_component(parts, component):
    """Also one that is far, and so rare that the prior's standard deviations do not reach it."""
    vae = oracle(*parts)
    x = drawn(vae, component)
    found, (log_evidence, mean) = quadrature(vae, x), exact(vae, x)
    torch.testing.assert_close(found.log_evidence, log_evidence, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-7)
    assert (found.error < 1e-2).all()


def test_the_error_of_quadrature_tells_of_a_component_that_falls_between_the_nodes():
    vae = oracle([[0.0], [40.0]], [1.0, 0.001], [0.5, 0.5])
    x = drawn(vae, 1)
    found = quadrature(vae, x, 101)
    off = (found.log_evidence - exact(vae, x)[0]).abs()
    assert (off > 0.1).all()
    assert (found.error > 0.1).all()


def test_the_error_of_quadrature_tells_of_a_prior_that_exceeds_the_grid():
    """A thousandth of this prior lies further out than eight standard deviations."""
    vae = oracle([[0.0]], [1.0], [1.0])
    zero = torch.zeros(1, dtype=torch.float64)
    vae.prior = lambda: dist.StudentT(2.5 + zero, zero, 1 + zero).to_event(1)
    found = quadrature(vae, drawn(oracle([[0.0]], [1.0], [1.0]), 0))
    assert ((found.error > 2e-4) & (found.error < 5e-3)).all()


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(NEAR, marks=pytest.mark.slow),
        ([[-6.0, 0.0], [6.0, 3.0]], [0.5, 0.7], [0.7, 0.3]),
    ],
)
def test_annealing_brackets_the_evidence_under_a_mixture_prior(parts):
    """Chains start at the prior's draws, so each component has its share of them."""
    vae = oracle(*parts)
    torch.manual_seed(2)
    z = vae.prior().sample((3,))
    x = vae.likelihood(z).sample().detach()
    found, (log_evidence, _) = anneal(vae, x, 40, 100, z), exact(vae, x)
    # E[w] = p(x): the estimate is a mean of 100 weights
    assert ((found.lower - log_evidence).abs() < SIGMAS * found.standard_error + 1e-3).all()
    assert (found.upper > log_evidence - 0.3).all()
    # A reverse chain stays in the component of its z, at the price of its log-weight.
    assert (found.upper - found.lower < 1 - math.log(0.2)).all()


def test_importance_sampling_under_a_mixture_prior():
    vae = oracle(*NEAR)
    x = drawn(vae, 0)
    torch.manual_seed(3)
    found, (log_evidence, _) = importance_sample(vae, x, 4000, with_posterior=True), exact(vae, x)
    assert ((found.log_evidence - log_evidence).abs() < SIGMAS * found.standard_error).all()
    # The KL has no closed form: it is that of the same draws.
    assert torch.equal(found.kl, found.reconstruction - found.elbo)
    assert (found.kl > 0).all()
    z = vae.prior().sample((3,))
    bound = upper_bound(vae, vae.likelihood(z).sample(), z, 50)
    assert bound.isfinite().all()


def test_quantiles_of_the_latents():
    levels = torch.tensor([0.1, 0.5, 0.9]).double()
    normal, _ = model("diagonal", "normal")
    torch.testing.assert_close(
        _quantiles(normal.prior(), levels), torch.special.ndtri(levels).expand(2, 3)
    )
    vae = oracle([[-3.0, 1.0], [3.0, 1.0]], [1.0, 1.0], [0.5, 0.5])
    found = _quantiles(vae.prior(), levels)
    parts, weights = vae.prior().component_distribution, vae.prior().mixture_distribution.probs
    scales = parts.variance.sqrt()
    reached = torch.special.ndtr((found.unsqueeze(-1) - parts.loc.T[:, None]) / scales.T[:, None])
    cdf = (weights * reached).sum(-1)
    # Standard errors of the share of 10,000 draws below a quantile
    error = (levels * (1 - levels) / 10_000).sqrt()
    assert ((cdf - levels).abs() < SIGMAS * error).all()


def test_the_explorer_covers_the_components_of_a_prior():
    vae = oracle([[-8.0, 1.0], [8.0, 1.0]], [0.5, 0.5], [0.5, 0.5])
    grid = _grid(vae, torch.randn(50, 2).numpy(), [1, 0], 9)
    assert grid.shape == (2, 9)
    assert grid[1, 0] < -9  # of latent 0
    assert grid[1, -1] > 9
    assert grid[0, 0] > -9  # of latent 1, which has a mean of 1
    assert grid[0].mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("family", ["diagonal", "full", "flow", "mixture"])
def test_latents_and_simulations_of_each_guide(family):
    """KL of each latent by its moments, and z-scores by the guide's moments."""
    vae, x = model(family, "mixture")
    use = latent_use(vae, x)
    prior, q = vae.prior(), vae.posterior(x)
    with torch.no_grad():
        ratio = q.variance / prior.variance
        shift = (q.mean - prior.mean).square() / prior.variance
        expected = (ratio + shift - 1 - ratio.log()).mean(0) / 2
    torch.testing.assert_close(torch.from_numpy(use.kl), expected)
    torch.manual_seed(0)
    found = simulate(vae, 30, 19)
    assert found.ranks.min() >= 0
    assert found.ranks.max() <= 19
    torch.testing.assert_close(
        torch.from_numpy(found.prior_scale), prior.variance.sqrt().detach().double()
    )


def positive(x: Tensor) -> Any:
    """z ~ LogNormal(0, 1), x ~ N(log z, 1), whose posterior is LogNormal(x / 2, 1 / 2)."""
    one = torch.ones(1, dtype=torch.float64)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0 * one, one).to_event(1))
            pyro.sample("x", dist.Normal(z.log(), one).to_event(1), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x / 2, one / math.sqrt(2)).to_event(1))

    return Program(prior, posterior, x)


def test_chains_start_at_draws_from_the_prior_in_its_unconstrained_space(monkeypatch):
    starts = []

    class Stop(Exception):
        pass

    def caught(kernel: Any, initial_params: dict[str, Tensor], **kwargs: Any) -> None:
        starts.append(initial_params["z"])
        raise Stop

    monkeypatch.setattr("pyro_vae.diagnostics.nuts.MCMC", caught)
    monkeypatch.setattr("pyro_vae.diagnostics.nuts._sampler", lambda *_: lambda: None)
    x = torch.tensor([[-1.0], [0.8]]).double()
    vae = positive(x)
    torch.manual_seed(5)
    with pytest.raises(Stop):
        compare_with_nuts(vae, x)
    torch.manual_seed(5)
    with held_fixed(vae):  # a Program draws to read its distributions
        expected = vae.prior().sample((2,)).log()
    torch.testing.assert_close(starts[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["mixture", "positive"])
def test_nuts_samples_in_the_space_of_the_prior(space):
    """From chains that started at the prior's draws, in its unconstrained space."""
    if space == "positive":
        x = torch.tensor([[0.8]]).double()
        vae = positive(x)
        mean = (x / 2 + 0.25).exp()
    else:
        vae = oracle([[-0.8, 0.0], [0.8, 0.5]], [0.6, 0.9], [0.5, 0.5])
        x = drawn(vae, 0, 1)
        mean = exact(vae, x)[1]
    torch.manual_seed(4)
    found = compare_with_nuts(vae, x, 2, 100, 40)
    draws = torch.from_numpy(found.draws)
    assert found.r_hat.max() < 1.1
    if space == "positive":
        assert (draws > 0).all()
        assert found.distance.max() < 0.05
    error = draws.std((0, 1)) / torch.from_numpy(found.effective_sample_size).sqrt()
    assert ((draws.mean((0, 1)) - mean).abs() < SIGMAS * error).all()
