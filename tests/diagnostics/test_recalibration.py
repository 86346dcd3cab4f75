"""Factors of posterior standard deviations against the oracle, where each has a known distribution.

A guide whose standard deviation is c times the posterior's needs the factor 1 / c. Of n scores
|N(0, 1)| / c, the share of the population below the r-th smallest has the distribution
Beta(r, n + 1 − r), and the number of test rows inside, given the factor, is binomial.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_faults import Fault, plant

from pyro_vae.diagnostics import recalibration as home
from pyro_vae.diagnostics.sbc import simulate
from pyro_vae.models.linear_gaussian import LinearGaussian

FALSE_ALARM = 1e-4
COUNT = 2000


def oracle(scales=(1.0, 1.0, 1.0), shift: float = 0.0) -> LinearGaussian:
    """Three latents, independent also in the posterior; the guide's sds are `scales` times its."""
    weight = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 0.5], [0, 0, 0]]).double()
    vae = LinearGaussian(weight, torch.zeros(4).double(), 0.7, "diagonal", shift=shift)
    vae.encoder.log_scale.data += torch.tensor(scales).double().log()
    return vae


def p_value(found, scales, level: float = 0.9) -> float:
    """Of factors and coverage, if the exact factors are 1 / `scales`; Bonferroni's correction."""
    learned, tested = COUNT // 2, COUNT - COUNT // 2
    normal = stats.norm.isf((1 - level) / 2)
    # shares of all rows that the intervals hold, with and without the factors
    before, after = (
        1 - 2 * stats.norm.sf(normal * f * np.array(scales)) for f in (1, found.factors)
    )
    rank = math.ceil((learned + 1) * level)
    below = stats.beta.cdf(after, rank, learned + 1 - rank)
    values = [2 * np.minimum(below, 1 - below)]
    for shares, intervals in ((before, found.before), (after, found.after)):
        inside = np.array([i.estimate * tested for i in intervals]).round().astype(int)
        tails = stats.binom.cdf(inside, tested, shares), stats.binom.sf(inside - 1, tested, shares)
        values.append(2 * np.minimum(*tails))
    return float(np.min(values) * np.size(values))


def check_known_factors():
    torch.manual_seed(0)
    for scales in ((1.0, 1.0, 1.0), (0.5, 1.0, 1.6)):
        found = home.recalibrate(oracle(scales), COUNT)
        assert found.factors.shape == (3,)
        assert p_value(found, scales) > FALSE_ALARM
        assert (
            found.mean_after.low
            < np.mean([i.estimate for i in found.after])
            < found.mean_after.high
        )
        assert found.mean_before.estimate == pytest.approx(
            np.mean([i.estimate for i in found.before])
        )
        # if learned and tested on the same rows, each share would be rank / n
        shares = {i.estimate for i in found.after}
        assert shares != {math.ceil(1001 * 0.9) / 1000}


def test_factors_and_coverage_have_their_exact_distribution():
    check_known_factors()
    # power: other factors, and the same for all latents
    torch.manual_seed(0)
    found = home.recalibrate(oracle((0.5, 1.0, 1.6)), COUNT)
    for wrong in ((2.0, 1.0, 1 / 1.6), (1.0, 1.0, 1.0), (0.5, 1.15, 1.6), (1.6, 1.0, 0.5)):
        assert p_value(found, wrong) < 1e-6


@pytest.mark.parametrize(("level", "other"), [(0.5, 0.4), (0.95, 0.9)])
def test_other_levels(level, other):
    torch.manual_seed(1)
    found = home.recalibrate(oracle((0.5, 1.0, 1.6)), COUNT, level)
    assert found.level == level
    assert p_value(found, (0.5, 1.0, 1.6), level) > FALSE_ALARM
    assert p_value(found, (0.5, 1.0, 1.6), other) < 1e-5


def test_a_bias_widens_the_intervals_until_they_cover():
    torch.manual_seed(2)
    found = home.recalibrate(oracle(shift=1.5), COUNT)
    # P(|N(1.5, 1)| ≤ 1.645 f) = 0.9 at f = 1.69
    assert np.abs(found.factors - 1.69).max() < 0.15
    for before, after in zip(found.before, found.after, strict=True):
        assert before.high < 0.7
        assert 0.85 < after.low < after.estimate < 0.95


def test_rows_are_those_of_the_seed_and_halves_are_not_mixed():
    """The first half of the rows gives the factors, the second the coverage, by hand."""
    vae = oracle((0.5, 1.0, 1.6))
    done: list[int] = []
    torch.manual_seed(3)
    found = home.recalibrate(vae, 101, on_chunk=done.append)
    assert sum(done) == 101
    torch.manual_seed(3)
    rows = simulate(vae, 101, 1)
    scores = np.abs(rows.z - rows.mean) / rows.scale
    for latent in range(3):
        factor = sorted(scores[:50, latent])[45] / 1.6448536269514722  # the 46th of 50
        assert found.factors[latent] == pytest.approx(factor)
        test = scores[50:, latent]
        assert found.before[latent].estimate == np.mean(test <= 1.6448536269514722)
        assert found.after[latent].estimate == np.mean(test <= 1.6448536269514722 * factor)


def test_bad_arguments():
    for level in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="level expects a probability between 0 and 1; got"):
            home.recalibrate(oracle(), 100, level)
    with pytest.raises(ValueError, match=r"at least 18 for intervals of 0\.9; got 17"):
        home.recalibrate(oracle(), 17)
    assert np.isfinite(home.recalibrate(oracle(), 18).factors).all()


# fmt: off
FAULTS = [
    ("inverse factor", "[rank - 1] / normal", "[rank - 1] ** -1 * normal"),
    ("learned from the test rows", "scores[learned:]", "scores[:learned]"),
    ("one factor for all", "np.sort(scores[:learned], axis=0)[rank - 1]",
     "np.sort(scores[:learned].ravel())[3 * rank - 1] * np.ones(3)"),
    ("wrong axis", "scores[:learned], axis=0)", "scores[:learned], axis=1)"),
    ("one-sided quantile", "(1 - level) / 2", "1 - level"),
    ("signs kept", "np.abs(", "np.asarray("),
    ("root mean square", "np.sort(scores[:learned], axis=0)[rank - 1]",
     "normal * np.sqrt(1.4 * np.mean(scores[:learned] ** 2, axis=0))"),
    ("coverage without the factor", "test <= normal * factors", "test <= normal + 0 * factors"),
]
# fmt: on


@pytest.mark.parametrize(("name", "old", "new"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_planted_faults_are_caught(name, old, new, monkeypatch):
    plant(Fault(name, "diagnostics.recalibration.recalibrate", old, new), monkeypatch)
    with pytest.raises(AssertionError):
        check_known_factors()
