"""Diagnostics and refits of rows that lack values: simulated rows lack values as the data do.

The guide of the linear Gaussian model is exact for each pattern of missing values.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from masked import EFFORT, MaskedOracle, exact_log_evidence, hidden, masked_oracle, missing_splits
from pyro.distributions import MultivariateNormal
from scipy import stats
from test_faults import Fault, each_fault, plant

import pyro_vae
from pyro_vae.config.families import FullGuide, RefinedGuide, RefitConfig
from pyro_vae.diagnostics import local, predictive, recalibration, sbc, suite
from pyro_vae.evidence import annealing
from pyro_vae.evidence.evaluation import evaluate
from pyro_vae.models.build import new_guide
from pyro_vae.training import refitting

FALSE_ALARM = 1e-4


class Watched(MaskedOracle):
    """The oracle; it notes the rows that its guide sees."""

    seen: list[torch.Tensor]

    def posterior(self, x):
        self.seen.append(x)
        return super().posterior(x)


def watched(count: int = 40):
    vae, x = masked_oracle(count=count)
    vae.__class__, vae.seen = Watched, []
    return vae, x


def check_patterns_of_simulated_rows() -> None:
    """Each simulated row lacks the values that some row of data lacks, and all patterns occur."""
    calls = {
        "simulate": lambda vae, x: sbc.simulate(vae, 400, 19, like=x),
        "recalibrate": lambda vae, x: recalibration.recalibrate(vae, 400, like=x),
        "local test": lambda vae, x: local.local_test(vae, x[:6], 300, 5, 9),
        "calibration": lambda vae, x: suite._calibration(vae, EFFORT, id, x),
        "bounds": lambda vae, x: suite._bounds(vae, EFFORT, id, x),
        "aggregate": lambda vae, x: suite._aggregate(vae, x, EFFORT, x),
        "pairs": lambda vae, x: list(refitting._pairs(vae, 300, 0, x)),
    }
    for name, call in calls.items():
        vae, x = watched()
        found = call(vae, x)
        rows = [part for _, part, _ in found] if name == "pairs" else vae.seen
        like = x[:6] if name == "local test" else x
        patterns = {tuple(row) for row in like.isnan().tolist()}
        simulated = {tuple(row) for part in rows for row in part.isnan().tolist()}
        assert simulated <= patterns, name
        assert len(simulated) > len(patterns) / 4, name


def check_exact_guide_is_calibrated() -> None:
    """Ranks are uniform; a guide that is exact for complete rows only would fail."""
    vae, x = masked_oracle()
    torch.manual_seed(1)
    found = sbc.simulate(vae, 600, 19, like=x)
    assert min(test.p_value for test in sbc.check_ranks(found)) > FALSE_ALARM
    assert abs(found.z_scores.mean()) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(1200)


def check_predictive() -> None:
    """Statistics are those of observed values, and replicates lack the same."""
    vae, x = masked_oracle(count=25)
    torch.manual_seed(1)
    seen = []

    def watch(x, z):
        seen.append(x)
        return x.nansum(-1)

    predictive.predictive_check(vae, x, {"sum": watch}, 30)
    assert all(torch.equal(part.isnan(), x.isnan().expand(part.shape)) for part in seen)
    found = predictive.predictive_check(vae, x, num_draws=400)
    assert found.names == ("mean", "standard deviation", "log p(x|z)")
    rows = [row[~np.isnan(row)] for row in x.numpy()]
    means = [row.mean() for row in rows]
    np.testing.assert_allclose(found.observed[:, 0], means)
    spreads = [row.std(ddof=1) if len(row) > 1 else 0.0 for row in rows]
    np.testing.assert_allclose(found.observed[:, 1], spreads)
    assert np.isfinite(found.replicated_mean).all()
    assert abs(found.effects.mean(0)).max() < 0.6  # 25 rows: 0.2 each at one standard error


# fmt: off
TABLE = {
    check_patterns_of_simulated_rows: [
        Fault("complete rows",            "diagnostics.sbc.simulate",
              "hidden_at_random(vae.likelihood(truth).sample(), like)",
              "vae.likelihood(truth).sample()"),
        Fault("mask inverted",            "data.missing.hidden_as",
              "rows.isnan(), torch.nan, x",        "rows.isnan(), x, torch.nan"),
        Fault("values at random",         "data.missing.hidden_at_random",
              "rows[torch.randint(len(rows), (len(x),), device=rows.device)]",
              "torch.where(torch.rand_like(x) < 0.4, torch.nan, x)"),
        Fault("one pattern for all",      "data.missing.hidden_at_random",
              "(len(x),), device",                 "(1,), device")],
    check_exact_guide_is_calibrated: [
        Fault("pattern of another row",   "diagnostics.sbc.simulate",
              "posterior = vae.posterior(x)",
              "posterior = vae.posterior(torch.where(x.roll(1, 0).isnan(), torch.nan, "
              "x.nan_to_num(9.0)))")],
    check_predictive: [
        Fault("complete replicates",      "diagnostics.predictive._compare",
              "replicated = hidden_as(replicated, same)", "pass"),
        Fault("zeros counted",            "diagnostics.predictive._mean",
              "x.nanmean(dim).nan_to_num(0.0)",    "x.nan_to_num(0.0).mean(dim)"),
        Fault("N for N - 1",              "diagnostics.predictive._deviation",
              "(count - 1)",                       "count")],
}
# fmt: on


@pytest.mark.parametrize("check", TABLE)
def test_rows_that_lack_values(check):
    check()


@each_fault(TABLE)
def test_planted_faults_are_caught(check, fault, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_complete_rows_draw_no_patterns():
    """The numbers of models without missing values stay as they were."""
    vae, x = masked_oracle()
    found = []
    for like in (None, x.nan_to_num(0.0)):
        torch.manual_seed(0)
        found.append(sbc.simulate(vae, 50, 9, like=like).ranks)
    assert np.array_equal(*found)


def test_annealing_brackets_the_evidence_of_observed_values():
    vae, _ = masked_oracle()
    torch.manual_seed(0)
    z = vae.prior().sample((20,))
    x = hidden(vae.likelihood(z).sample().detach())
    found = annealing.anneal(vae, x, 100, 4, z)
    exact = exact_log_evidence(vae, x)
    for bound, sign in ((found.lower, 1), (found.upper, -1)):
        gap = sign * (exact - bound)
        assert gap.mean() > -4 * gap.std() / math.sqrt(20)
        assert gap.mean() < 0.3


def linear_vae():
    """A VAE of linear networks for five columns with missing values, and its data."""
    splits = missing_splits("gaussian", (5,))
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=()), splits, seed=3)
    return vae, splits


def exact_posterior(vae, x):
    """p(z|x_observed) of a linear VAE with the Gaussian likelihood."""
    likelihood = vae.likelihood_module
    weight = likelihood.std[:, None] * vae.decoder.layers[0].weight
    loc = likelihood.mean + likelihood.std * vae.decoder.bias[0]
    scale = likelihood.std * (0.01 + likelihood.log_scale.exp())
    found = []
    for row in x:
        o = ~row.isnan()
        seen = weight[o] / scale[o, None]
        precision = torch.eye(2).double() + seen.T @ seen
        mean = torch.linalg.solve(precision, seen.T @ ((row[o] - loc[o]) / scale[o]))
        found.append((mean, torch.linalg.inv(precision)))
    return MultivariateNormal(*(torch.stack(part).detach() for part in zip(*found, strict=True)))


def test_a_refined_guide_is_exact_for_each_pattern():
    vae, splits = linear_vae()
    x = next(splits.test.fixed("real", 0)).double()
    q = new_guide(vae, RefinedGuide(), None).double().posterior(x)
    p = exact_posterior(vae.double(), x)
    torch.testing.assert_close(q.loc, p.mean, rtol=1e-4, atol=1e-5)
    scale = q.scale_tril / q.scale_tril.diagonal(dim1=-2, dim2=-1).mean()
    expected = p.scale_tril / p.scale_tril.diagonal(dim1=-2, dim2=-1).mean()
    torch.testing.assert_close(scale.abs(), expected.abs(), rtol=1e-2, atol=1e-3)


def test_a_trained_refit_comes_near_the_exact_posterior():
    vae, splits = linear_vae()
    config = RefitConfig(guide=FullGuide(), encoder_hidden=(32,), steps=150, batch_size=64)
    refitted = refitting.refit(vae, splits, config)
    x = torch.cat(list(splits.train.fixed("real", 0)))
    p = exact_posterior(vae.double(), x.double())
    away = {}
    for name, model in (("before", vae), ("after", refitted.double())):
        q = model.posterior(x.double())
        away[name] = ((q.mean - p.mean) / p.variance.sqrt()).square().mean().item()
    assert away["after"] < 0.25
    assert away["after"] < away["before"]


def test_a_step_of_a_refit_sees_rows_that_lack_values():
    """Those near training rows, and those from the prior, lack what rows of the data lack."""
    vae, splits = linear_vae()
    seen = []

    class Svi:
        def step(self, *rows):
            seen.append(rows)
            return 0.0

    config = RefitConfig(guide=FullGuide(), steps=1, batch_size=32)
    refitting._step(Svi(), vae, vae, splits.train, config)
    ((x, simulated, z),) = seen
    assert (len(x), len(z)) == (32, 32)
    patterns = {tuple(row) for row in splits.train.values[splits.train.rows].isnan().tolist()}
    assert {tuple(row) for row in x.isnan().tolist()} <= patterns
    assert torch.equal(simulated.isnan(), x.isnan())
    assert x[:16].isnan().any()
    assert x[16:].isnan().any()


def test_bits_per_dimension_count_observed_values():
    splits = missing_splits("binomial")
    model = pyro_vae.ModelConfig(latent_dim=2, hidden=(8,))
    vae = pyro_vae.build(model, splits)
    found = evaluate(vae, splits.test, 50)
    x = torch.cat(list(splits.test.fixed("count", 0)))
    values = (~x.isnan()).sum().item()
    expected = -found.log_evidence * len(x) / (values * math.log(2))
    assert found.bits_per_dim == pytest.approx(expected)
    assert 0 < found.bits_per_dim < 5  # of 17 values: log₂ 17 = 4.09 if uniform
