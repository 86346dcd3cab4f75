"""Every verdict on both sides of both limits, with the words that name the direction.

Sizes, limits and words are written out here. The interval of constant values is the value itself,
so that each side of a limit is met exactly; intervals that have a width are Student's or Clopper
and Pearson's, from scipy.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyro.distributions import Normal
from scipy import stats

from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics.advice import remedies
from pyro_vae.diagnostics.findings import Finding, number
from pyro_vae.diagnostics.latents import LatentUse
from pyro_vae.diagnostics.nuts import Comparison
from pyro_vae.diagnostics.predictive import PredictiveCheck
from pyro_vae.diagnostics.refinement import Gaps
from pyro_vae.diagnostics.sbc import (
    DENSITY,
    HDR,
    LIKELIHOOD,
    MEAN,
    Coverage,
    Simulations,
    coverage,
    simulate,
)
from pyro_vae.evidence.annealing import Annealed
from pyro_vae.evidence.importance import Evidence
from pyro_vae.evidence.intervals import Interval, interval, share_interval
from pyro_vae.models.linear_gaussian import LinearGaussian

# Check, ideal, limits, words of a size below the ideal, words of a size above it
ADDITIVE = {
    "WEIGHTS": (0, 0.1, 0.5, "", "q(z|x) lacks mass that p(z|x) has, and log p(x) is under"),
    "BOUNDS": (0, 0.2, 2.0, "", "`evaluate` underestimates log p(x) by at most this much"),
    "AMORTIZATION": (0, 1, 5, "", "fitted to each row alone is better than the encoder's"),
    "APPROXIMATION": (0, 1, 5, "", "no Gaussian with independent latents comes closer"),
    "BIAS": (0, 0.2, 0.5, "of this latent is too high by", "of this latent is too low by"),
    "INTERVALS": (0.9, 0.03, 0.1, "the truth less often than", "the truth more often than"),
    "REGIONS": (0.9, 0.05, 0.2, "the truth less often than", "the truth more often than"),
    "LIKELIHOOD_RANKS": (0.5, 0.05, 0.2, "explain x better than", "explain x worse than"),
    "COLLAPSE": (0, 0.5, 0.99, "", "their posterior is the prior"),
    "FULL_COLLAPSE": (0, 0.5, 0.99, "", "every latent ignores x"),
    "CHAIN_MEANS": (0, 0.3, 1.0, "", "is this far from that of the same row's posterior"),
    "PREDICTIONS": (0, 0.5, 2.0, "differ from the rows", "differ from the rows"),
    "LOCAL": (0.5, 0.05, 0.15, "given x, q(z|x) differs", "given x, q(z|x) differs from p(z|x)"),
    "AGGREGATE": (0, 0.02, 0.1, "", "q(z|x) does not equal p(z)"),
}
RATIOS = {
    "WIDTH": (1.1, 1.5, "too wide: the guide is under", "too narrow: the guide is overconf"),
    "CHAIN_WIDTHS": (1.2, 2.0, "q(z|x) is narrower than", "q(z|x) is wider than"),
}


def judged(name: str, size: float) -> dict:
    check = getattr(verdicts, name)
    return Finding(check, Interval(size, size, size)).as_dict()


@pytest.mark.parametrize("name", ADDITIVE)
def test_both_sides_of_both_limits(name):
    ideal, small, large, below, above = ADDITIVE[name]
    for sign, words in ((-1, below), (1, above)):
        for distance, verdict in (
            (0.0, "sound"),
            (small - 1e-6, "sound"),
            (small + 1e-6, "doubtful"),
            (large - 1e-6, "doubtful"),
            (large + 1e-6, "wrong"),
            (10 * large, "wrong"),
        ):
            found = judged(name, ideal + sign * distance)
            assert found["verdict"] == verdict, (sign, distance)
            assert distance == 0 or words in found["meaning"]
    assert found["ideal"] == ideal
    assert found["limits"] == (small, large)


@pytest.mark.parametrize("name", RATIOS)
def test_both_sides_of_both_ratios(name):
    small, large, below, above = RATIOS[name]
    for ratio, verdict in (
        (1.0, "sound"),
        (small - 1e-6, "sound"),
        (small + 1e-6, "doubtful"),
        (large - 1e-6, "doubtful"),
        (large + 1e-6, "wrong"),
    ):
        for size, words in ((1 / ratio, below), (ratio, above)):
            found = judged(name, size)
            assert found["verdict"] == verdict, size
            assert ratio == 1 or words in found["meaning"]
    assert judged(name, 0.0)["verdict"] == "wrong"
    assert found["ideal"] == 1
    assert found["limits"] == (small, large)


def test_ratios_are_to_the_ideal():
    check = replace(verdicts.WIDTH, ideal=4.0)
    for size, verdict in ((4.3, "sound"), (4 / 1.09, "sound"), (5.9, "doubtful"), (6.1, "wrong")):
        assert Finding(check, Interval(size, size, size)).verdict == verdict


def test_an_interval_about_the_ideal_is_never_wrong():
    for name in (*ADDITIVE, *RATIOS):
        check = getattr(verdicts, name)
        size = Interval(check.ideal, check.ideal - 9, check.ideal + 9)
        assert Finding(check, size).verdict == "doubtful"


def test_no_hole_is_wrong():
    for share, verdict in ((0.0999, "sound"), (0.1001, "doubtful"), (1.0, "doubtful")):
        assert judged("HOLES", share)["verdict"] == verdict
    assert "not trained on z from there" in judged("HOLES", 1.0)["meaning"]


def test_advice_points_the_same_way():
    """A factor above 1 says that deviations are too small, a ratio above 1 that q is too wide."""
    width = judged("WIDTH", 2.0)
    assert width["effect"].startswith("factor by which posterior sds are too small")
    assert width["advice"].startswith("multiply the standard deviations by this factor")
    assert "multiply their widths by the factor" in judged("INTERVALS", 0.5)["advice"]
    chains = judged("CHAIN_WIDTHS", 2.0)
    assert chains["effect"] == "geometric mean of sd of q(z|x) / sd of NUTS"
    assert chains["advice"].endswith("divide the sds by this ratio")
    ranks = judged("LIKELIHOOD_RANKS", 0.9)["advice"]
    assert ranks.startswith("above ½: use --kl-warmup and more capacity against collapse")
    assert ranks.endswith("below ½: the guide is too narrow, see `posterior width`")


@pytest.mark.parametrize("name", [*ADDITIVE, *RATIOS, "HOLES"])
def test_nan_is_neither_sound_nor_wrong(name):
    check = getattr(verdicts, name)
    for size in (
        Interval(math.nan, math.nan, math.nan),
        Interval(check.ideal, check.ideal, math.nan),
        Interval(check.ideal, math.nan, check.ideal),
        Interval(9.0, 9.0, math.nan),
        Interval(9.0, math.nan, 9.0),
    ):
        assert Finding(check, size).verdict == "doubtful"
    for bad in (math.nan, math.inf, -math.inf):
        meaning = Finding(check, Interval(bad, math.nan, math.nan)).as_dict()["meaning"]
        assert meaning == "this size is not a finite number: densities or draws overflow"


def test_numbers_have_three_decimals_below_one():
    shown = {0.1234: "0.123", -0.1234: "-0.123", 1.0: "1.00", -1.234: "-1.23", 95.678: "95.68"}
    assert {value: number(value) for value in shown} == shown
    assert number(math.nan) == "nan"


def test_an_entry_of_the_file():
    entry = Finding(verdicts.BIAS, Interval(-0.3, -0.4, -0.2), "z7").as_dict()
    assert entry == {
        "check": "posterior bias",
        "verdict": "doubtful",
        "effect": "mean z-score of z7, the worst latent, in posterior sds",
        "estimate": -0.3,
        "low": -0.4,
        "high": -0.2,
        "ideal": 0.0,
        "limits": (0.2, 0.5),
        "meaning": "on simulated rows, the posterior mean of this latent is too high by this much",
        "advice": verdicts.BIAS.advice.format(**remedies()).strip(),
    }
    check = replace(verdicts.CHAIN_MEANS, effect="at {ideal:.0%} of {subject}", ideal=0.8)
    entry = Finding(check, Interval(0.0, 0.0, 0.0), "all", reliable=False).as_dict()
    assert entry["effect"] == "at 80% of all"
    assert entry["meaning"].startswith("the chains disagree (R-hat above 1.05), run them longer; ")
    sound = Finding(check, Interval(0.8, 0.8, 0.8)).as_dict()
    assert sound["meaning"].startswith("the centre")


# From numbers to findings


def near(size: Interval, *expected: float) -> None:
    assert (size.estimate, size.low, size.high) == pytest.approx(expected, abs=1e-9)


def student(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval, by scipy."""
    low, high = stats.t.interval(level, len(values) - 1, values.mean(), stats.sem(values))
    return values.mean(), low, high


def about(mean: float, spread: float = 0.1, count: int = 30) -> np.ndarray:
    """Skewed values with this mean, so that a median is seen."""
    values = np.random.default_rng(0).gamma(1.0, size=count)
    return mean + spread * (values - values.mean())


def test_intervals_by_scipy():
    values = about(2.0, 3.0)
    near(interval(values), *student(values))
    near(interval(values, 0.2), *student(values, 0.8))
    near(Interval(4.0, -1.0, 9.0).sqrt(), 2.0, 0.0, 3.0)
    near(Interval(-4.0, -1.0, math.inf).sqrt(), 0.0, 0.0, math.inf)
    share = share_interval(np.arange(30) < 3)
    near(share, 0.1, stats.beta.ppf(0.025, 3, 28), stats.beta.ppf(0.975, 4, 27))


def test_about_weights():
    for bad, verdict in ((0, "sound"), (30, "sound"), (60, "doubtful"), (300, "wrong")):
        found = verdicts.about_weights(np.arange(500) < bad)
        assert (found.size.estimate, found.verdict) == (bad / 500, verdict)
    near(verdicts.about_weights(np.arange(30) < 3).size, 0.1, *share_ends(3, 30))


def share_ends(count: int, of: int) -> tuple[float, float]:
    return stats.beta.ppf(0.025, count, of - count + 1), stats.beta.ppf(
        0.975, count + 1, of - count
    )


def annealed(short: np.ndarray, between: float) -> tuple[Annealed, np.ndarray]:
    """Bounds this far apart, whose upper one is `short` above importance-sampled log p(x)."""
    importance = -100 + np.arange(len(short), dtype=float)
    upper = torch.as_tensor(importance + short)
    return Annealed(upper - between, upper, upper * 0, upper * 0 + 0.8), importance


def test_about_bounds():
    """Reliable if the annealed bounds are closer than 0.2 nats, or than half the error."""
    values = about(3.0)
    near(verdicts.about_bounds(*annealed(values, 0.1)).size, *student(values))
    near(verdicts.about_bounds(*annealed(-values, 0.1)).size, *student(-values))
    for size, between, reliable in (
        (0.01, 0.19, True),
        (0.01, 0.21, False),
        (3.0, 1.49, True),
        (3.0, 1.51, False),
        (-3.0, 0.21, False),
        (3.0, math.nan, False),
    ):
        found = verdicts.about_bounds(*annealed(np.full(9, size), between))
        assert found.reliable is reliable, (size, between)
        assert found.verdict == ("doubtful" if not reliable else "wrong" if size == 3 else "sound")


def a_gap(sizes: tuple[float, float, float], ess: np.ndarray) -> Gaps:
    parts = [torch.as_tensor(about(size, 0.1, len(ess))) for size in sizes]
    none = torch.zeros(len(ess))
    return Gaps(*parts, Evidence(none, none, none, none, torch.as_tensor(ess), 100))


def test_about_gaps():
    good = np.full(20, 50.0)
    gaps = a_gap((7.0, 0.5, 0.2), good)
    amortization, approximation = verdicts.about_gaps(gaps)
    near(amortization.size, *student(gaps.amortization.numpy()))
    near(approximation.size, *student((gaps.correlation + gaps.remainder).numpy()))
    assert (amortization.check.name, approximation.check.name) == (
        "amortization gap",
        "approximation gap",
    )
    assert (amortization.verdict, approximation.verdict) == ("wrong", "sound")
    amortization, approximation = verdicts.about_gaps(a_gap((0.1, 6.0, 0.5), good))
    assert (amortization.verdict, approximation.verdict) == ("sound", "wrong")
    # more than half of the rows need more than ten effective samples
    for enough, ess, reliable in ((11, 10.5, True), (10, 99.0, False), (20, 10.0, False)):
        found = verdicts.about_gaps(
            a_gap((0.1, 0.1, 0.1), np.where(np.arange(20) < enough, ess, 1.0))
        )
        assert [f.reliable for f in found] == [True, reliable]
        assert [f.verdict for f in found] == ["sound", "sound" if reliable else "doubtful"]
    (_, unknown) = verdicts.about_gaps(a_gap((0.1, 0.1, 0.1), np.full(20, math.nan)))
    assert not unknown.reliable


def scored(scores: np.ndarray, ranks: np.ndarray | None = None, draws: int = 9) -> Simulations:
    """Simulations with these z-scores (N, Z), of a guide with mean 5 and deviation 2."""
    count, latents = scores.shape
    names = (*(f"z{j + 1}" for j in range(latents)), LIKELIHOOD, DENSITY)
    if ranks is None:
        ranks = np.zeros((count, latents + 2), int)
    five, two = np.full_like(scores, 5.0), np.full_like(scores, 2.0)
    return Simulations(names, ranks, draws, five + 2 * scores, five, two, np.ones(latents))


SIGNS = np.where(np.arange(400) % 2, 1.0, -1.0)[:, None]


def test_about_spread():
    """The root mean square about each latent's own mean, of all latents together."""
    for factor, verdict in ((1.0, "sound"), (1.3, "doubtful"), (2.0, "wrong"), (0.5, "wrong")):
        scores = np.array([3.0, -1.0]) + factor * SIGNS * [1.4, 0.2]
        found = verdicts.about_spread(scored(scores))
        near(found.size, *[factor] * 3)
        assert found.verdict == verdict
    random = np.random.default_rng(0).gamma(2.0, size=(50, 3))
    squares = ((random - random.mean(0)) ** 2).mean(1)
    near(verdicts.about_spread(scored(random)).size, *np.sqrt(student(squares)))


def test_about_bias():
    """The worst latent of either sign, with Bonferroni's correction over latents."""
    for sign, words in ((1, "too low"), (-1, "too high")):
        for size, verdict in ((0.1, "sound"), (0.35, "doubtful"), (0.7, "wrong")):
            scores = 1e-3 * SIGNS + sign * np.array([0.01, size, -size / 2])
            found = verdicts.about_bias(scored(scores))
            assert found.size.estimate == pytest.approx(sign * size)
            assert found.verdict == verdict
            entry = found.as_dict()
            assert words in entry["meaning"]
            assert "z2, the worst latent" in entry["effect"]
    scores = about(0.3, 1.0, 60)[:, None] * [0.5, 1.0, -0.7, 0.2]
    near(verdicts.about_bias(scored(scores)).size, *student(scores[:, 1], 1 - 0.05 / 4))


def covered(nominal, mean: float, hdr: float) -> Coverage:
    """Coverage with these shares at `nominal`[2], and quite other ones at other levels."""
    shares = np.full((len(nominal), 3), 0.123)
    shares[2] = [0.77, mean, hdr]
    return Coverage(("z1", MEAN, HDR), np.array(nominal), shares, shares - 0.004, shares + 0.006)


def test_about_coverage():
    """Intervals are judged by 0.03 and 0.1, regions by 0.05 and 0.2 about the nominal level."""
    for mean, hdr, expected, words in (
        (0.91, 0.93, ["sound", "sound"], "more"),
        (0.94, 0.96, ["doubtful", "doubtful"], "more"),
        (0.875, 0.86, ["sound", "sound"], "less"),
        (0.86, 0.84, ["doubtful", "doubtful"], "less"),
        (0.81, 0.71, ["doubtful", "doubtful"], "less"),
        (0.79, 0.69, ["wrong", "wrong"], "less"),
        (0.79, 0.79, ["wrong", "doubtful"], "less"),
    ):
        for nominal in (0.9, 0.88):
            offset = nominal - 0.9
            levels = [0.5, 0.8, nominal, 0.95]
            found = verdicts.about_coverage(covered(levels, mean + offset, hdr + offset))
            assert [f.verdict for f in found] == expected, (mean, hdr)
            for finding, share in zip(found, (mean + offset, hdr + offset), strict=True):
                near(finding.size, share, share - 0.004, share + 0.006)
                entry = finding.as_dict()
                assert f"the truth {words} often than they claim" in entry["meaning"]
                assert entry["ideal"] == nominal
                assert f"{nominal:.0%}" in entry["effect"]
            assert "single latents" in found[0].as_dict()["effect"]
            assert "joint highest-density" in found[1].as_dict()["effect"]
    found = verdicts.about_coverage(covered([0.9, 0.95, 0.5, 0.8], 0.52, 0.49), level=0.5)
    assert [f.verdict for f in found] == ["sound", "sound"]


def test_about_likelihood_ranks():
    """Cells of 10 ranks have the midpoints 0.05 … 0.95; other columns say the opposite."""
    for rank, words, verdict in (
        (0, "better", "wrong"),
        (3, "better", "doubtful"),
        (6, "worse", "doubtful"),
        (9, "worse", "wrong"),
    ):
        ranks = np.full((60, 4), 9 - rank)
        ranks[:, 2] = rank
        found = verdicts.about_likelihood_ranks(scored(np.zeros((60, 2)), ranks))
        near(found.size, *[(rank + 0.5) / 10] * 3)
        assert found.verdict == verdict
        assert f"explain x {words} than" in found.as_dict()["meaning"]
    ranks = np.zeros((6000, 3), int)
    ranks[:, 1] = np.arange(6000) % 10
    uniform = verdicts.about_likelihood_ranks(scored(np.zeros((6000, 1)), ranks))
    assert uniform.size.estimate == pytest.approx(0.5)
    assert uniform.verdict == "sound"


def test_about_collapse():
    """Half of the latents may be of no use; all of them may not."""
    for unused, verdict in ((0, "sound"), (2, "sound"), (3, "doubtful"), (4, "wrong")):
        kl = np.where(np.arange(4) < unused, 0.0099, 0.0101)
        found = verdicts.about_collapse(LatentUse(kl, np.ones(4)))
        near(found.size, *[unused / 4] * 3)
        assert found.verdict == verdict
        entry = found.as_dict()
        assert entry["effect"] == "share of the 4 latents with a KL below 0.01 nats"
        assert ("every latent ignores x" in entry["meaning"]) == (unused == 4)
        assert ("--kl-warmup" in entry["advice"]) == (unused == 4)


def chains(difference: float, ratio: np.ndarray, ess: float = 1e12, r_hat: float = 1.0):
    """Four rows of two latents; R-hat of one of them is given."""
    shape = (4, 2)
    hats = np.ones(shape)
    hats[3, 0] = r_hat
    return Comparison(
        np.zeros((2, 4, *shape)),
        hats,
        np.full(shape, ess),
        0,
        difference * np.where(np.arange(8).reshape(shape) % 2, 1, -1),
        np.broadcast_to(ratio, shape),
        np.zeros(4),
        np.zeros(4),
    )


def test_about_chains():
    one = np.ones(2)
    for difference, verdict in (
        (0.29, "sound"),
        (0.31, "doubtful"),
        (-0.99, "doubtful"),
        (-1.01, "wrong"),
    ):
        means, widths = verdicts.about_chains(chains(difference, one))
        near(means.size, *[abs(difference)] * 3)
        assert (means.check.name, means.verdict) == ("means against NUTS", verdict)
        assert (widths.check.name, widths.verdict) == ("widths against NUTS", "sound")
    for ratio, verdict, words in (
        (1.19, "sound", "wider"),
        (1.21, "doubtful", "wider"),
        (2.01, "wrong", "wider"),
        (1 / 1.19, "sound", "narrower"),
        (1 / 1.21, "doubtful", "narrower"),
        (1 / 2.01, "wrong", "narrower"),
    ):
        widths = verdicts.about_chains(chains(0.0, ratio * one))[1]
        near(widths.size, *[ratio] * 3)
        assert widths.verdict == verdict
        assert f"q(z|x) is {words} than the posterior" in widths.as_dict()["meaning"]
    # ½ and 2 have the geometric mean 1
    near(verdicts.about_chains(chains(0.0, np.array([0.5, 2.0])))[1].size, 1, 1, 1)
    # the chains' own variance 1/16 is part of the mean square ¼
    near(verdicts.about_chains(chains(0.5, one, ess=16.0))[0].size, *[math.sqrt(3) / 4] * 3)
    near(verdicts.about_chains(chains(0.1, one, ess=16.0))[0].size, 0, 0, 0)
    for r_hat, agree in ((1.049, True), (1.051, False), (math.inf, False), (math.nan, False)):
        found = verdicts.about_chains(chains(3.0, 3 * one, r_hat=r_hat))
        assert [f.reliable for f in found] == [agree, agree]
        assert [f.verdict for f in found] == ["wrong" if agree else "doubtful"] * 2
        assert all(("chains disagree" in f.as_dict()["meaning"]) != agree for f in found)


def test_intervals_of_chains_are_over_rows():
    random = np.random.default_rng(0)
    shape, ess = (12, 3), 50.0
    difference, ratio = random.uniform(1, 2, size=shape), np.exp(random.normal(size=shape))
    result = replace(chains(0.0, np.ones(2), ess), mean_difference=difference, scale_ratio=ratio)
    result = replace(result, effective_sample_size=np.full(shape, ess))
    means, widths = verdicts.about_chains(result)
    near(means.size, *np.sqrt(student((difference**2).mean(1) - 1 / ess)))
    near(widths.size, *np.exp(student(np.log(ratio).mean(1))))


def test_about_predictions():
    """The statistic that is furthest off, in the replicates' deviations, of either sign."""
    for sign in (1, -1):
        for size, verdict in ((0.4, "sound"), (1.0, "doubtful"), (2.5, "wrong")):
            effects = 1e-3 * SIGNS + sign * np.array([0.1, -size / 2, size])
            check = PredictiveCheck(
                ("mean", "spread", "roughness"),
                7 + 2 * effects,
                np.full((400, 3), 7.0),
                np.full((400, 3), 2.0),
                np.tile([0.0, 0.5, 0.5], (400, 1)),
            )
            found = verdicts.about_predictions(check)
            assert found.size.estimate == pytest.approx(sign * size)
            assert found.verdict == verdict
            assert found.as_dict()["effect"].startswith("roughness of held-out rows minus")
    effects = about(1.0, 1.0, 50)[:, None] * [0.3, 1.0, 0.1]
    zero, one = np.zeros((50, 3)), np.ones((50, 3))
    check = PredictiveCheck(("a", "b", "c"), effects, zero, one, one)
    near(verdicts.about_predictions(check).size, *student(effects[:, 1], 1 - 0.05 / 3))


def test_about_aggregate_and_holes():
    blocks = about(0.05, 0.01, 10)
    near(verdicts.about_aggregate(blocks).size, *student(blocks))
    near(verdicts.about_holes(np.full(8, 0.05), 50).size, 0.05, *share_ends(20, 400))
    near(verdicts.about_holes(np.ones(2), 5).size, 1.0, stats.beta.ppf(0.025, 10, 1), 1.0)
    for share, verdict in ((0.06, "sound"), (0.1, "doubtful"), (0.9, "doubtful")):
        assert verdicts.about_holes(np.full(8, share), 50).verdict == verdict
    assert verdicts.about_holes(np.full(5, 0.06), 10).verdict == "doubtful", "too few to know"
    shares = about(0.05, 0.02, 8)
    near(verdicts.about_holes(shares, 2000).size, *student(shares))
    assert verdicts.about_holes(shares * [0, 0, 0, 0, 0, 0, 0, 1], 2000).size.low == 0


def test_interval_of_holes_covers_what_varies_more_than_the_draws():
    """95% of intervals contain the mean; those that count the draws alone do not.

    The shares vary as measured for a run of digits, 0.05 ± 0.017 at 1457 draws.
    False alarm: below 1e-4, for coverage of at least 95%.
    """
    random, repetitions = np.random.default_rng(11), 200
    true = random.beta(0.05 * 164, 0.95 * 164, size=(repetitions, 8))
    shares = random.binomial(1457, true) / 1457

    def coverage(sizes):
        return np.mean([size.low <= 0.05 <= size.high for size in sizes])

    least = stats.binom.ppf(1e-4, repetitions, 0.95) / repetitions
    assert coverage(verdicts.about_holes(row, 1457).size for row in shares) >= least
    drawn = (verdicts.share_interval(np.arange(1457) < round(row[0] * 1457)) for row in shares)
    assert coverage(drawn) < least, "power"


def test_a_statistic_that_is_nan_is_not_passed_over():
    effects = np.tile([0.0, math.nan, 3.0], (400, 1)) + 1e-3 * SIGNS
    check = PredictiveCheck(("a", "b", "c"), effects, 0 * effects, 0 * effects + 1, effects)
    found = verdicts.about_predictions(replace(check, replicated_mean=np.zeros((400, 3))))
    assert (found.subject, found.verdict) == ("b", "doubtful")


# From a model with an exact posterior to verdicts and words

SIMULATIONS, DRAWS = 4000, 39


class Moved(LinearGaussian):
    """The means of the exact posterior, turned by a matrix (Z, Z)."""

    turn: torch.Tensor

    def posterior(self, x):
        exact = super().posterior(x)
        return Normal(exact.mean @ self.turn.T, exact.variance.sqrt()).to_event(1)


def oracle(guide="exact", scale_factor=1.0, shift=0.0, turn=None):
    """Two independent latents with posterior deviations of ½."""
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(6, 2).double()).Q * math.sqrt(3)
    cls = LinearGaussian if turn is None else Moved
    vae = cls(weight, torch.zeros(6).double(), 1.0, guide, scale_factor, shift)
    if turn is not None:
        vae.turn = torch.tensor(turn).double()
    return vae


def found_for(vae) -> dict[str, tuple[str, float, str]]:
    torch.manual_seed(1)
    simulations = simulate(vae, SIMULATIONS, DRAWS)
    return {
        f.check.name: (f.verdict, f.size.estimate, f.as_dict()["meaning"])
        for f in (
            verdicts.about_spread(simulations),
            verdicts.about_bias(simulations),
            *verdicts.about_coverage(coverage(simulations)),
            verdicts.about_likelihood_ranks(simulations),
        )
    }


def test_the_exact_guide_is_sound():
    """Each size stays within its limit by 4.4 standard errors: false alarms below 1e-4 in all."""
    assert {name: found[0] for name, found in found_for(oracle()).items()} == dict.fromkeys(
        (
            "posterior width",
            "posterior bias",
            "coverage, intervals",
            "coverage, regions",
            "use of the data",
        ),
        "sound",
    )


def central(factor: float) -> float:
    return 2 * stats.norm.cdf(factor * stats.norm.isf(0.05)) - 1


def joint(factor: float) -> float:
    return stats.chi2.cdf(factor**2 * stats.chi2.ppf(0.9, 2), 2)


# Fault → check → verdict, size by its closed form (None: not known), words. Sizes are met to 0.06,
# at least four standard errors.
PLANTED = {
    "half": (
        {"scale_factor": 0.5},
        {
            "posterior width": ("wrong", 2.0, "too narrow: the guide is overconfident"),
            "posterior bias": ("sound", 0.0, ""),
            "coverage, intervals": ("wrong", central(0.5), "truth less often"),
            "coverage, regions": ("wrong", joint(0.5), "truth less often"),
            "use of the data": ("wrong", None, "explain x better"),
        },
    ),
    "double": (
        {"scale_factor": 2.0},
        {
            "posterior width": ("wrong", 0.5, "too wide: the guide is underconfident"),
            "posterior bias": ("sound", 0.0, ""),
            "coverage, intervals": ("doubtful", central(2), "truth more often"),
            "coverage, regions": ("doubtful", joint(2), "truth more often"),
            "use of the data": ("wrong", None, "explain x worse"),
        },
    ),
    "0.8": (
        {"scale_factor": 0.8},
        {
            "posterior width": ("doubtful", 1.25, "too narrow: the guide is overconfident"),
            "coverage, intervals": ("doubtful", central(0.8), "truth less often"),
            "coverage, regions": ("doubtful", joint(0.8), "truth less often"),
        },
    ),
    "up": (
        {"shift": 1.0},
        {
            "posterior width": ("sound", 1.0, ""),
            "posterior bias": ("wrong", -1.0, "too high by this much"),
        },
    ),
    "down": (
        {"shift": -0.35},
        {
            "posterior width": ("sound", 1.0, ""),
            "posterior bias": ("doubtful", 0.35, "too low by this much"),
        },
    ),
    # z + m has the variance 1 + ¾ + 2 · ¾, and the posterior ¼
    "reversed": (
        {"turn": [[-1.0, 0.0], [0.0, -1.0]]},
        {
            "posterior width": ("wrong", math.sqrt(13), "too narrow: the guide is overconfident"),
            "posterior bias": ("sound", 0.0, ""),
            "coverage, intervals": ("wrong", central(1 / math.sqrt(13)), "truth less often"),
            "use of the data": ("wrong", None, "explain x worse"),
        },
    ),
    # a quarter turn: z₁ + m₂ has the variance 1 + ¾
    "rotated": (
        {"turn": [[0.0, -1.0], [1.0, 0.0]]},
        {
            "posterior width": ("wrong", math.sqrt(7), "too narrow: the guide is overconfident"),
            "coverage, regions": ("wrong", joint(1 / math.sqrt(7)), "truth less often"),
            "use of the data": ("wrong", None, "explain x worse"),
        },
    ),
    "collapsed": (
        {"guide": "collapsed"},
        {
            "posterior width": ("sound", 1.0, ""),
            "posterior bias": ("sound", 0.0, ""),
            "coverage, intervals": ("sound", 0.9, ""),
            "coverage, regions": ("sound", 0.9, ""),
            "use of the data": ("wrong", None, "explain x worse"),
        },
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_have_their_size_verdict_and_words(fault):
    settings, expected = PLANTED[fault]
    found = found_for(oracle(**settings))
    for name, (verdict, size, words) in expected.items():
        assert found[name][0] == verdict, (name, found[name])
        assert size is None or found[name][1] == pytest.approx(size, abs=0.06 * max(1, size))
        assert words in found[name][2], name
