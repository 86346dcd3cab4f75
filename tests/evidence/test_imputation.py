"""Imputed means and draws are those of p(x_missing|x_observed) of the linear Gaussian model.

The guide is wrong: shifted by half a standard deviation and 1.4 times too wide. A check is a
function that holds for the package, and fails for the planted faults below it. It rejects sound
code once in 10,000 seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from masked import exact_conditional, hidden, masked_oracle, missing_splits, missing_vae
from pyro.distributions import MultivariateNormal
from scipy import stats
from test_faults import Fault, each_fault, plant

import pyro_vae
from pyro_vae import InputError
from pyro_vae.evidence import imputation

FALSE_ALARM = 1e-4
COPIES = 40


def wrong_guide(count: int = 12):
    """The oracle with a wrong guide, and rows that lack values."""
    vae, x = masked_oracle(seed=4, count=count)
    exact = type(vae).posterior

    class Wrong(type(vae)):
        def posterior(self, x):
            q = exact(self, x)
            factor = q.scale_tril
            loc = q.loc + 0.5 * factor.diagonal(dim1=-2, dim2=-1)
            return MultivariateNormal(loc, scale_tril=1.4 * factor)

    vae.__class__ = Wrong
    torch.manual_seed(9)
    return vae, x


def zero(values: torch.Tensor, what: str) -> None:
    """The means over the first dimension of independent values (R, ...) are zero."""
    flat = values.reshape(len(values), -1)
    flat = flat[:, ~flat.isnan().any(0)]
    error = flat.std(0) / math.sqrt(len(flat))
    bound = stats.t.isf(FALSE_ALARM / 2 / flat.shape[1], len(flat) - 1)
    assert (flat.mean(0).abs() <= bound * error + 1e-9).all(), what


def check_means() -> None:
    """Of each missing value, over repeated imputations."""
    vae, x = wrong_guide()
    mean, scale = exact_conditional(vae, x)
    found = imputation.impute(vae, x.repeat(COPIES, 1), 0, 2000)
    off = (found.mean.reshape(COPIES, *x.shape) - mean) / scale.where(scale > 0, 1.0)
    zero(off, "mean")
    assert (found.pareto_k < 0.7).all()


def check_draws() -> None:
    """Mean, variance, correlation and independence of a row's draws, over repeated imputations."""
    vae, x = wrong_guide()
    mean, scale = exact_conditional(vae, x)
    # Half as many draws as samples, so that few repeat.
    found = imputation.impute(vae, x.repeat(COPIES, 1), 100, 2000)
    draws = found.draws.reshape(100, COPIES, *x.shape)
    u = ((draws - mean) / scale.where(scale > 0, torch.nan)).transpose(0, 1)
    zero(u.mean(1), "mean")
    zero((u.square() - 1).mean(1), "variance")
    # The means of independent draws have a hundredth of their variance, and a little for the pool.
    assert 100 * u.mean(1).square().nanmean() < 1.5
    first, second = x.isnan().double().topk(2, dim=1).indices.T
    several = x.isnan().sum(1) > 1
    rows = torch.arange(len(x))[several]
    i, j = first[several], second[several]
    products = (draws - mean)[..., rows, i] * (draws - mean)[..., rows, j]
    zero((products - conditional_covariance(vae, x, rows, i, j)).mean(0), "correlation")


def conditional_covariance(vae, x, rows, i, j) -> torch.Tensor:
    """Cov(xᵢ, xⱼ | x_observed) of each row, in closed form."""
    covariance = vae.weight @ vae.weight.T + vae.noise_scale**2 * torch.eye(x.shape[1]).double()
    found = []
    for n, a, b in zip(rows.tolist(), i.tolist(), j.tolist(), strict=True):
        o = ~x[n].isnan()
        gain = torch.linalg.solve(covariance[o][:, o], covariance[o][:, b])
        found.append(covariance[a, b] - covariance[a, o] @ gain)
    return torch.stack(found).detach()


def check_ranks() -> None:
    """The hidden truth has a uniform rank among the draws: intervals of them cover as they say."""
    vae, _ = wrong_guide()
    complete = vae.likelihood(vae.prior().sample((1000,))).sample().detach()
    x = hidden(complete)
    found = imputation.impute(vae, x, 19, 500)
    chosen = x.isnan().double().argmax(1)
    rows = x.isnan().any(1).nonzero()[:, 0]
    truth, draws = complete[rows, chosen[rows]], found.draws[:, rows, chosen[rows]]
    ranks = (draws < truth).sum(0).numpy()
    assert stats.chisquare(np.bincount(ranks, minlength=20)).pvalue > FALSE_ALARM


def check_observed_values_stay() -> None:
    vae, x = wrong_guide()
    found = imputation.impute(vae, x, 5, 100)
    seen = ~x.isnan()
    assert torch.equal(found.mean[seen], x[seen])
    assert torch.equal(found.draws[:, seen], x[seen].expand(5, -1))
    assert not found.mean.isnan().any()
    assert not found.draws.isnan().any()


# fmt: off
TABLE = {
    check_means: [
        Fault("decoder's mean unweighted", "evidence.imputation._mean",
              "weights, means)",                    "torch.ones_like(weights) / 2000, means)"),
        Fault("weights of another order",  "evidence.imputation._mean",
              "z = z.gather(0, order.unsqueeze(-1).expand(z.shape))", "pass"),
        Fault("log q forgotten",           "models.log_weights.log_weights",
              " - posterior.log_prob(z)",           ""),
        Fault("mask inverted",             "models.missing.ObservedPart.log_prob",
              "torch.where(missing, torch.zeros_like(density), density)",
              "torch.where(missing, density, torch.zeros_like(density))"),
        Fault("mask forgotten",            "models.missing.ObservedPart.log_prob",
              "torch.where(missing, torch.zeros_like(density), density)", "density")],
    check_draws: [
        Fault("means for draws",           "evidence.imputation.impute",
              "likelihood(some).sample()",          "likelihood(some).mean"),
        Fault("z unweighted",              "evidence.imputation.impute",
              "multinomial(shares.T,",              "multinomial(torch.ones_like(shares.T),"),
        Fault("one z for all draws",       "evidence.imputation.impute",
              "replacement=True).T[:num_draws]",
              "replacement=True).T[:1].expand(num_draws, -1)")],
    check_ranks: [
        Fault("means for draws",           "evidence.imputation.impute",
              "likelihood(some).sample()",          "likelihood(some).mean"),
        Fault("draws of another row",      "evidence.imputation.impute",
              "_completed(part, drawn)",            "_completed(part, drawn.roll(1, 1))")],
    check_observed_values_stay: [
        Fault("mask inverted",             "evidence.imputation._completed",
              "values.to(x), x)",                   "x, values.to(x))"),
        Fault("all values replaced",       "evidence.imputation._completed",
              "torch.where(x.isnan(), values.to(x), x)", "values.to(x)")],
}
# fmt: on


@pytest.mark.parametrize("check", TABLE)
def test_imputation(check):
    check()


@each_fault(TABLE)
def test_planted_faults_are_caught(check, fault, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    "name", ["bernoulli", "binomial", "continuous-bernoulli", "discretized-logistic", "gaussian"]
)
def test_every_likelihood(name):
    """Draws lie in the support, complete rows are left alone, and seeds repeat."""
    vae, splits = missing_vae(name)
    x = torch.cat(list(splits.test.fixed(vae.likelihood_module.units, 0)))
    x[0] = torch.where(x[0].isnan(), vae.likelihood_module.mean.round(), x[0])
    torch.manual_seed(0)
    found = imputation.impute(vae, x, 7, 50)
    assert found.draws.shape == (7, *x.shape)
    assert vae.likelihood(torch.zeros(3)).support.check(found.draws).all()
    assert torch.equal(found.mean[0], x[0])
    assert found.pareto_k.isnan().tolist() == [True] + [False] * (len(x) - 1)
    torch.manual_seed(0)
    assert torch.equal(imputation.impute(vae, x, 7, 50).draws, found.draws)


def test_means_of_few_and_many_chunks_are_equal(monkeypatch):
    vae, x = wrong_guide()
    torch.manual_seed(0)
    once = imputation.impute(vae, x, 3, 300)
    monkeypatch.setattr("pyro_vae.evidence.imputation.rows_at_once", lambda *_: 4)
    torch.manual_seed(0)
    part = imputation.impute(vae, x[:4], 3, 300)
    assert part.mean.shape == (4, 6)
    # The least weights may be left out.
    shares = torch.rand(300, 12).double()
    shares[5:] *= 1e-12
    shares /= shares.sum(0)
    z = torch.randn(300, 12, 2).double()
    expected = torch.einsum("kb,kbd->bd", shares, vae.likelihood(z).mean)
    torch.testing.assert_close(imputation._mean(vae, z, shares), expected)
    assert once.mean.shape == (12, 6)


def test_weights_that_are_not_finite_are_marked(monkeypatch):
    vae, x = wrong_guide()
    real = imputation.log_weights

    def spoilt(vae, q, x, z):
        _, weights = real(vae, q, x, z)
        weights[:, 0], weights[:, 1], weights[3, 2] = -math.inf, math.nan, -math.inf
        return _, weights

    monkeypatch.setattr(imputation, "log_weights", spoilt)
    found = imputation.impute(vae, x, 3, 100)
    assert found.pareto_k[:2].tolist() == [math.inf, math.inf]
    assert found.pareto_k[2:].isfinite().all()
    assert found.mean.isfinite().all()


def test_mistakes():
    vae, x = wrong_guide()
    for settings, message in (
        ((-1, 100), "num_draws expects"),
        ((5, 24), "num_samples expects 25"),
        ((2**50, 100), "not enough memory"),
    ):
        with pytest.raises(ValueError, match=message):
            imputation.impute(vae, x, *settings)
    splits = pyro_vae.load_data(np.random.default_rng(0).normal(size=(50, 3)))
    plain = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits)
    with pytest.raises(InputError, match="trained without missing values"):
        imputation.impute(plain, torch.tensor([[1.0, math.nan, 2.0]]))
    assert imputation.impute(plain, torch.ones(2, 3), 2).mean.equal(torch.ones(2, 3))


def test_the_share_of_missing_values_is_that_of_the_data():
    values = missing_splits("gaussian").train.values
    assert missing_splits("gaussian").missing == pytest.approx(
        values.isnan().double().mean().item()
    )
