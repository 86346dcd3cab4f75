"""Intervals of paired differences: coverage with known truth, and power against planted faults.

Coverage is compared with 95% at `SIGMAS` standard errors (a false alarm once in 15,800 times).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import SIGMAS
from scipy import stats

from pyro_vae import InputError, compare_rows
from pyro_vae.evidence import differences as module
from pyro_vae.evidence.differences import (
    Difference,
    compare_seeds,
    compare_shares,
    shown_above,
    tiers,
)
from pyro_vae.evidence.intervals import interval

REPEATS = 400
MARGIN = SIGMAS * math.sqrt(0.95 * 0.05 / REPEATS)  # 0.044


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 1000)


def of(estimate, low, high, names=("a", "b")):
    return Difference(*names, estimate, low, high, 100)


# --- over rows ------------------------------------------------------------------------------------


def models(random: np.random.Generator, count: int = 150) -> tuple[dict, dict]:
    """Values of four models that share most of their variance over rows, and their true means.

    The differences are skewed with heavy tails: they are log-normal.
    """
    shared = 50 * random.standard_normal(count)
    names, means = "abcd", {"a": 0.0, "b": 0.0, "c": 0.5, "d": -1.0}
    noise = random.lognormal(sigma=0.8, size=(4, count)) - math.exp(0.32)
    return {n: shared + means[n] + noise[k] for k, n in enumerate(names)}, means


def covered(found: list[Difference], means: dict) -> list[bool]:
    return [d.low <= means[d.first] - means[d.second] <= d.high for d in found]


def test_all_intervals_of_heavy_tailed_differences_hold_together_in_95_percent(few_resamples):
    random = np.random.default_rng(0)
    together, alone, unpaired = [], [], []
    for k in range(REPEATS):
        values, means = models(random)
        inside = covered(compare_rows(values, seed=k), means)
        assert len(inside) == 6
        together.append(all(inside))
        # planted: pairs one by one, which do not hold together
        names = [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]
        each = [interval(values[x] - values[y]) for x, y in names]
        truths = [means[x] - means[y] for x, y in names]
        alone.append(all(i.low <= t <= i.high for i, t in zip(each, truths, strict=True)))
        # planted: rows out of order, so that nothing is paired
        shuffled = {n: random.permutation(v) for n, v in values.items()}
        unpaired += [d.high - d.low for d in compare_rows(shuffled, seed=k)] if k < 3 else []
    assert abs(np.mean(together) - 0.95) <= MARGIN
    assert np.mean(alone) < 0.95 - MARGIN
    widths = [d.high - d.low for d in compare_rows(models(random)[0])]
    assert min(unpaired) > 10 * max(widths)


def test_skewed_differences_are_covered_better_than_by_students_interval(few_resamples):
    """Log-normal differences of 179 rows: 94% by simulation, and 92% with Student's quantile."""
    random, truth, repeats = np.random.default_rng(1), math.exp(0.5), 1500
    student, own = [], []
    for k in range(repeats):
        d = random.lognormal(size=179)
        (found,) = compare_rows({"a": d, "b": np.zeros(179)}, seed=k)
        own.append(found.low <= truth <= found.high)
        student.append(abs(d.mean() - truth) <= interval(d).high - d.mean())
    assert abs(np.mean(own) - 0.937) <= SIGMAS * math.sqrt(0.937 * 0.063 / repeats)
    assert np.mean(own) > np.mean(student) + 0.005


def test_normal_differences_have_about_students_interval():
    d = np.random.default_rng(2).standard_normal(300)
    (found,) = compare_rows({"a": d, "b": np.zeros(300)})
    expected = interval(d)
    assert found.estimate == pytest.approx(d.mean())
    assert found.high - found.estimate == pytest.approx(expected.high - expected.estimate, rel=0.05)
    assert found.estimate - found.low == pytest.approx(found.high - found.estimate)
    assert found.count == 300


def test_a_true_difference_is_found_with_its_sign():
    values, _ = models(np.random.default_rng(3), 2000)
    signs = {(d.first, d.second): d.sign for d in compare_rows(values)}
    assert signs["a", "b"] == 0
    assert (signs["a", "d"], signs["c", "d"], signs["a", "c"]) == (1, 1, -1)
    backwards = compare_rows({name: values[name] for name in "dcba"})
    assert {(d.second, d.first): -d.sign for d in backwards} == signs


def test_only_rows_of_both_models_count():
    """Rows that one model was trained on hold values far off, and NaN for the other."""
    random = np.random.default_rng(4)
    values = {name: random.standard_normal(200) for name in "abc"}
    values["a"][:90], values["b"][:90] = 1e6, np.nan
    values["c"][:175] = np.nan  # 25 rows are too few
    (found,) = compare_rows(values)
    assert (found.first, found.second, found.count) == ("a", "b", 110)
    same = compare_rows({name: values[name][90:] for name in "ab"})[0]
    assert found.estimate == pytest.approx(same.estimate)
    assert found.high == pytest.approx(same.high, rel=0.1)  # other resamples


def test_equal_models_are_not_distinguished_and_a_constant_difference_is():
    values = np.random.default_rng(5).standard_normal(50)
    same, apart, _ = compare_rows({"a": values, "b": values.copy(), "c": values + 0.25})
    assert (same.low, same.estimate, same.high, same.sign) == (0, 0, 0, 0)
    assert apart.sign == -1
    assert apart.high == pytest.approx(-0.25)


def test_chunks_of_resamples_do_not_matter(monkeypatch):
    values, _ = models(np.random.default_rng(6), 60)
    whole = compare_rows(values, seed=3)
    assert whole == compare_rows(values, seed=3)
    assert whole != compare_rows(values, seed=4)
    sizes = []
    monkeypatch.setattr(module, "CHUNK", 60 * 700)
    original = np.bincount
    monkeypatch.setattr(np, "bincount", lambda *a, **k: sizes.append(k) or original(*a, **k))
    found = compare_rows(values, seed=3)
    assert [size["minlength"] for size in sizes] == [60 * 700] * 7 + [60 * 100]
    np.testing.assert_allclose([d.high for d in found], [d.high for d in whole], rtol=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": np.zeros(40)}, "for two models"),
        ({"a": np.zeros(40), "b": np.zeros(41)}, "same rows for two models"),
        ({"a": np.zeros((40, 2)), "b": np.zeros((40, 2))}, "same rows for two models"),
        ({"a": np.zeros(40), "b": np.full(40, -np.inf)}, "40 infinite ones for b"),
    ],
)
def test_values_that_cannot_be_compared(values, message):
    with pytest.raises(InputError, match=message):
        compare_rows(values)


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("discordant", [(0.02, 0.02), (0.08, 0.01), (0.3, 0.2)])
def test_intervals_of_paired_shares_hold_in_95_percent(discordant):
    """Of 200 rows: exactly, by a sum over all tables, not by simulation."""
    wins, losses = discordant
    count, share = 200, 0.0
    for b in range(count + 1):
        at_b = stats.binom.pmf(b, count, wins)
        if at_b < 1e-9:
            continue
        for c in range(count - b + 1):
            weight = at_b * stats.binom.pmf(c, count - b, losses / (1 - wins))
            if weight > 1e-9:
                d = np.repeat([1.0, -1.0, 0.0], [b, c, count - b - c])
                inside = module._share_interval(d, 0.05)
                share += weight * (inside.low <= wins - losses <= inside.high)
    assert 0.94 <= share <= 0.985
    # planted: independent shares would have intervals that always hold
    assert share < 0.999


def test_shares_have_bonferronis_level_and_leave_out_rows_without_a_label():
    random = np.random.default_rng(7)
    right = {name: (random.random(500) < 0.7).astype(float) for name in "abc"}
    right["a"][:100] = np.nan
    found = compare_shares(right)
    assert [d.count for d in found] == [400, 400, 500]
    assert found[0].estimate == pytest.approx(right["a"][100:].mean() - right["b"][100:].mean())
    (alone,) = compare_shares({name: right[name] for name in "bc"})
    factor = stats.norm.isf(0.025 / 3) / stats.norm.isf(0.025)
    ratio = (found[2].high - found[2].low) / (alone.high - alone.low)
    assert ratio == pytest.approx(factor)


# --- over seeds -----------------------------------------------------------------------------------


def trained_again(random: np.random.Generator, seeds: dict[str, list[int]], gap: float):
    """Values of models whose means vary by the seed, and which see a part of the rows each."""
    shared, by_seed = 30 * random.standard_normal(400), {}
    values, methods = {}, {}
    for method, own in seeds.items():
        methods[method] = {}
        for seed in own:
            part = by_seed.setdefault(seed, random.random(400) < 0.3)
            mean = (gap if method == "b" else 0.0) + random.normal()
            row = shared + mean + random.standard_normal(400)
            values[f"{method}{seed}"] = np.where(part, row, np.nan)
            methods[method][seed] = f"{method}{seed}"
    return values, methods


@pytest.mark.parametrize("seeds", [[0, 1, 2], [0, 1]])
def test_intervals_over_seeds_hold_in_95_percent(seeds):
    """Methods differ by 0.5, and the models of one method by a standard deviation of 1."""
    random = np.random.default_rng(8)
    inside, of_rows = [], []
    for _ in range(REPEATS):
        values, methods = trained_again(random, {"a": seeds, "b": seeds}, gap=0.5)
        (found,) = compare_seeds(values, methods)
        assert (found.first, found.second, found.count) == ("a", "b", len(seeds))
        inside.append(found.low <= -0.5 <= found.high)
        d = values["a0"] - values["b0"]
        rows = interval(d[~np.isnan(d)])
        of_rows.append(rows.low <= -0.5 <= rows.high)
    assert abs(np.mean(inside) - 0.95) <= MARGIN
    assert np.mean(of_rows) < 0.5  # planted: an interval over rows does not know of the seeds


def test_methods_without_common_seeds_have_welchs_interval():
    random = np.random.default_rng(9)
    values, methods = trained_again(random, {"a": [0, 1, 2], "b": [3, 4, 5, 6]}, gap=0.5)
    (found,) = compare_seeds(values, methods)
    means = [[np.nanmean(values[run]) for run in methods[m].values()] for m in "ab"]
    expected = stats.ttest_ind(*means, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.count == 3


def test_paired_seeds_are_matched_by_the_seed_and_not_by_their_order():
    values, methods = trained_again(np.random.default_rng(10), {"a": [0, 1], "b": [0, 1]}, 0.0)
    methods["b"] = dict(reversed(methods["b"].items()))
    (found,) = compare_seeds(values, methods)
    d = [np.nanmean(values[f"a{s}"] - values[f"b{s}"]) for s in (0, 1)]
    expected = interval(np.array(d))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_is_none_and_three_methods_have_bonferronis_level():
    seeds = {"a": [0, 1], "b": [0, 1], "c": [0], "d": [0, 1]}
    values, methods = trained_again(np.random.default_rng(11), seeds, 0.0)
    found = compare_seeds(values, methods)
    assert [(d.first, d.second) for d in found] == [("a", "b"), ("a", "d"), ("b", "d")]
    d = np.array([np.nanmean(values[f"a{s}"] - values[f"b{s}"]) for s in (0, 1)])
    assert found[0].high == pytest.approx(interval(d, 0.05 / 3).high)


# --- ranks ----------------------------------------------------------------------------------------


def test_tiers_are_cut_only_where_all_pairs_are_shown():
    def above(*pairs):
        return lambda high, low: high + low in pairs

    assert tiers("abc", above("ab", "ac", "bc")) == [["a"], ["b"], ["c"]]
    assert tiers("abc", above("ab", "ac")) == [["a"], ["b", "c"]]
    assert tiers("abc", above("ac", "bc")) == [["a", "b"], ["c"]]
    assert tiers("abc", above("ac")) == [["a", "b", "c"]]  # b is apart from neither
    assert tiers("abc", above("ab", "bc")) == [["a", "b", "c"]]  # a and c are not apart
    assert tiers("ab", above("ba")) == [["a", "b"]]
    assert tiers("a", above()) == [["a"]]


def test_a_model_is_above_another_only_if_the_interval_excludes_0():
    found = [of(1, 0.5, 2), of(-1, -2, -0.5, ("a", "c")), of(1, -0.1, 2, ("b", "c"))]
    above = shown_above(found)
    assert above("a", "b")
    assert above("c", "a")
    assert not any(above(*pair) for pair in (("b", "a"), ("a", "c"), ("b", "c"), ("c", "b")))
    assert [of(1, 0.0, 2).sign, of(-1, -2, 0.0).sign] == [0, 0]
