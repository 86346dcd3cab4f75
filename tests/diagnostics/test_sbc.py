"""Ranks, coverage and their tests against enumeration, closed forms and planted faults.

Each statistical test here rejects a true hypothesis at most once in 10,000 times (`FALSE_ALARM`),
however many numbers it looks at: where there are several, Bonferroni shares it among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from pyro.distributions import Normal
from scipy import stats
from torch.distributions import MultivariateNormal

from pyro_vae.diagnostics.sbc import (
    DENSITY,
    HDR,
    LIKELIHOOD,
    MEAN,
    RankTest,
    Simulations,
    check_ranks,
    coverage,
    gamma_band,
    gamma_discrepancy,
    gamma_p_value,
    interval,
    miscalibration,
    simulate,
)
from pyro_vae.models.linear_gaussian import LinearGaussian

FALSE_ALARM = 1e-4

CASES = [(2, 1), (5, 3), (3, 6)]  # D, Z, with more latents than data too

# Faults are judged at this level, from so many simulations of so many draws.
LEVEL, COUNT, DRAWS = 1e-4, 3000, 39


def sigmas(count: int = 1) -> float:
    """How many standard errors `count` normal estimates may be off, with FALSE_ALARM in all."""
    return stats.norm.isf(FALSE_ALARM / 2 / count)


def oracle(data_dim: int, latent_dim: int, seed: int = 1, **settings) -> LinearGaussian:
    torch.manual_seed(seed)
    weight = torch.randn(data_dim, latent_dim, dtype=torch.float64)
    return LinearGaussian(weight, torch.randn(data_dim, dtype=torch.float64), 0.6, **settings)


def with_ranks(ranks: np.ndarray, num_draws: int) -> Simulations:
    """Simulations of Z latents whose ranks are (N, Z + 1), those of `DENSITY` the last."""
    count, columns = ranks.shape
    zeros, ones = np.zeros((count, columns - 1)), np.ones((count, columns - 1))
    names = (*(f"z{j + 1}" for j in range(columns - 1)), DENSITY)
    return Simulations(names, ranks, num_draws, zeros, zeros, ones, ones[0])


# Uniform ranks, exactly


def outcomes(count: int, num_draws: int):
    """Every (how many of `count` ranks are 0, 1, … L), and its probability for uniform ranks."""
    for cuts in itertools.combinations(range(count + num_draws), num_draws):
        ends = (-1, *cuts, count + num_draws)
        counts = [b - a - 1 for a, b in itertools.pairwise(ends)]
        ways = math.factorial(count) // math.prod(map(math.factorial, counts))
        yield counts, Fraction(ways, (num_draws + 1) ** count)


def exact_discrepancies(count: int, num_draws: int):
    """Of every outcome: counts, probability, γ by its definition in fractions."""
    tails = {}
    for i in range(1, num_draws + 1):
        p = Fraction(i, num_draws + 1)
        mass = [
            math.comb(count, r) * p**r * (1 - p) ** (count - r) for r in range(count + 1)
        ]  # of Bin(N, i/(L+1))
        for r in range(count + 1):
            tails[i, r] = min(sum(mass[: r + 1]), sum(mass[r:]))
    found = []
    for counts, probability in outcomes(count, num_draws):
        below = itertools.accumulate(counts[:-1])
        gamma = min(1, 2 * min(tails[i, r] for i, r in enumerate(below, 1)))
        found.append((counts, probability, gamma))
    return found


# N, L. With (2, 4), tails of different i are equal but for their last digit.
TINY = [(1, 1), (2, 1), (2, 2), (2, 4), (4, 2), (3, 5), (8, 3), (6, 4)]


@pytest.mark.parametrize(("count", "num_draws"), TINY)
def test_gamma_p_value_by_enumeration(count, num_draws):
    table = exact_discrepancies(count, num_draws)
    assert sum(probability for _, probability, _ in table) == 1
    for counts, _, gamma in table:
        exact = float(sum(p for _, p, other in table if other <= gamma))
        ranks = np.repeat(np.arange(num_draws + 1), counts)
        assert gamma_discrepancy(ranks, num_draws) == pytest.approx(float(gamma), abs=1e-12)
        p_value = gamma_p_value(gamma_discrepancy(ranks, num_draws), count, num_draws)
        assert p_value == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("count", "num_draws"), TINY)
def test_gamma_band_by_enumeration(count, num_draws, probability):
    """It holds its probability, and no band of a larger γ does."""
    table = exact_discrepancies(count, num_draws)
    low, high = gamma_band(count, num_draws, probability)
    inside = Fraction(0)
    for counts, chance, _ in table:
        share = np.cumsum(counts)[:-1] / count
        inside += chance * bool((low <= share).all() and (share <= high).all())
    # P(Γ ≥ g) for every g that occurs; the band is that of the largest g with enough of it
    kept = [sum(p for _, p, g in table if g >= gamma) for _, _, gamma in table]
    assert float(inside) == pytest.approx(float(min(k for k in kept if k >= probability)))


def stays_within(low: np.ndarray, high: np.ndarray, count: int, chances: np.ndarray) -> float:
    """P(all shares of ranks below i in the band) for ranks of any distribution (L + 1,)."""
    r = np.arange(count + 1)
    state = np.zeros(count + 1)
    state[0] = 1
    for i, chance in enumerate(chances[:-1]):
        step = stats.poisson.pmf(r, count * chance)
        state = np.convolve(state, step[: np.flatnonzero(step)[-1] + 1])[: count + 1]
        state[(r < np.rint(low[i] * count)) | (r > np.rint(high[i] * count))] = 0
    rest = stats.poisson.pmf(count - r, count * chances[-1])
    return (state * rest).sum() / stats.poisson.pmf(count, count)


def test_gamma_band_by_simulation():
    """N = 200, L = 49. The band that holds each i by itself is seen to be too narrow."""
    count, num_draws, runs = 200, 49, 4000
    uniform = np.full(num_draws + 1, 1 / (num_draws + 1))
    low, high = gamma_band(count, num_draws, 0.95)
    exact = stays_within(low, high, count, uniform)
    assert 0.95 <= exact < 0.953
    shares = np.random.default_rng(0).multinomial(count, uniform, runs).cumsum(1)[:, :-1] / count
    # shares and ends of the band are both integers over N
    inside = int(((low <= shares) & (shares <= high)).all(1).sum())
    assert stats.binomtest(inside, runs, exact).pvalue > FALSE_ALARM
    narrow = np.array(stats.binom.interval(0.95, count, uniform.cumsum()[:-1])) / count
    inside = int(((narrow[0] <= shares) & (shares <= narrow[1])).all(1).sum())
    assert stats.binomtest(inside, runs, 0.95).pvalue < 1e-12


def test_gamma_p_value_by_simulation():
    """N = 100, L = 9: γ falls below g as often as the p-value of g says."""
    count, num_draws, runs = 100, 9, 2000
    random = np.random.default_rng(1)
    gammas = np.array(
        [gamma_discrepancy(random.integers(0, 10, count), num_draws) for _ in range(runs)]
    )
    for threshold in (0.001, 0.01, 0.05, 0.2, 0.5):
        expected = gamma_p_value(threshold, count, num_draws)
        below = int((gammas <= threshold).sum())
        assert stats.binomtest(below, runs, expected).pvalue > FALSE_ALARM / 5
        # power: γ itself is no p-value, as the least of L of them
        assert threshold < expected
        if threshold > 0.01:
            assert stats.binomtest(below, runs, threshold).pvalue < 1e-6


def test_gamma_is_the_same_for_reversed_ranks():
    ranks = np.random.default_rng(2).binomial(19, 0.45, 300)
    gamma, reversed_gamma = gamma_discrepancy(ranks, 19), gamma_discrepancy(19 - ranks, 19)
    assert gamma == pytest.approx(reversed_gamma, rel=1e-12)
    assert gamma_p_value(gamma, 300, 19) == pytest.approx(
        gamma_p_value(reversed_gamma, 300, 19), rel=1e-6
    )
    low, high = gamma_band(300, 19)
    np.testing.assert_allclose(low, 1 - high[::-1], atol=1e-12)
    assert (low < high).all()


def test_gamma_p_values_stay_between_1e_12_and_1():
    even = np.repeat(np.arange(20), 10)
    assert gamma_discrepancy(even, 19) == 1
    assert gamma_p_value(1.0, 200, 19) == 1
    none = np.zeros(200, dtype=int)
    assert gamma_discrepancy(none, 19) < 1e-100
    assert gamma_p_value(gamma_discrepancy(none, 19), 200, 19) == 1e-12
    assert gamma_p_value(0.0, 200, 19) == 1e-12


# The simulations


@pytest.mark.parametrize(
    ("data_dim", "latent_dim", "count", "num_draws", "chunks"),
    [(5, 3, 50, 19, [50]), (600, 2, 10, 999, [3, 3, 3, 1])],
)
def test_simulations_are_what_they_say(data_dim, latent_dim, count, num_draws, chunks):
    """Every number again from the z and x that they were made of, in one chunk and in several."""
    vae = oracle(data_dim, latent_dim, scale_factor=0.9, shift=0.1)
    seen, done = [], []

    def keep(z, x):
        seen.append((z, x))
        return z[..., 0] * x[..., 1]

    torch.manual_seed(0)
    s = simulate(vae, count, num_draws, {"mine": keep}, on_chunk=done.append)
    assert done == chunks
    assert s.num_draws == num_draws
    assert s.names == (*(f"z{j + 1}" for j in range(latent_dim)), LIKELIHOOD, DENSITY, "mine")
    z, x = (torch.cat([pair[i] for pair in seen], dim=1 - i) for i in (0, 1))
    assert z.shape == (num_draws + 1, count, latent_dim)
    posterior = vae.posterior(x)
    exact = MultivariateNormal(posterior.mean, posterior.covariance_matrix)
    noise = (x - vae.loc - z @ vae.weight.T) / 0.6
    columns = [*z.unbind(-1), -noise.square().sum(-1), exact.log_prob(z), z[..., 0] * x[:, 1]]
    for ranks, column in zip(s.ranks.T, columns, strict=True):
        np.testing.assert_array_equal(ranks, (column[1:] < column[0]).sum(0).numpy())
    np.testing.assert_array_equal(s.z, z[0].numpy())
    np.testing.assert_allclose(s.mean, exact.mean.detach(), rtol=1e-12)
    np.testing.assert_allclose(s.scale, exact.variance.detach().sqrt(), rtol=1e-12)
    np.testing.assert_array_equal(s.prior_scale, np.ones(latent_dim))
    # x is p(x|z*)'s, z* is p(z)'s and the draws are q(z|x)'s
    inner = torch.linalg.solve_triangular(
        exact.scale_tril, (z[1:] - exact.mean).unsqueeze(-1), upper=False
    )
    for values in (noise[0], z[0], inner):
        size = values.numel()
        assert abs(values.mean().item()) < sigmas(6) / math.sqrt(size)
        assert abs(values.square().mean().item() - 1) < sigmas(6) * math.sqrt(2 / size)


def test_closed_forms_of_the_oracle():
    """Contraction, recovery and z-scores; for a guide that is off, other numbers."""
    vae = oracle(5, 3)
    covariance = torch.linalg.inv(vae.posterior_precision).detach().numpy()
    explained = 1 - covariance.diagonal()  # Cov(z, m) = Cov(m) = I − Σ
    count = 4000
    for factor, shift in [(1.0, 0.0), (0.8, 0.3)]:
        faulty = oracle(5, 3, scale_factor=factor, shift=shift)
        torch.manual_seed(3)
        s = simulate(faulty, count, 1)
        expected = np.tile(1 - factor**2 * (1 - explained), (count, 1))
        np.testing.assert_allclose(s.contraction, expected, rtol=1e-9)
        correlation = np.sqrt(explained)  # a shift does not change it
        error = (1 - explained) / math.sqrt(count)
        assert (np.abs(s.recovery - correlation) < sigmas(12) * error).all()
        # power: the share of variance explained is not the correlation
        assert (np.abs(s.recovery - explained) > sigmas(12) * error).all()
        bias = np.abs(s.z_scores.mean(0) + shift / factor)
        assert (bias < sigmas(12) / factor / math.sqrt(count)).all()
        for scores in s.z_scores.T:
            assert (stats.kstest(scores, "norm").pvalue > FALSE_ALARM / 6) == (factor == 1)


def test_a_guide_that_ignores_x_recovers_nothing():
    vae = oracle(5, 3, guide="collapsed", shift=0.1)
    s = simulate(vae, 100, 3)
    np.testing.assert_allclose(s.contraction, 0, atol=1e-12)
    assert np.abs(s.recovery).max() < 1e-6
    constant = dataclasses.replace(s, mean=np.zeros_like(s.mean))
    np.testing.assert_array_equal(constant.recovery, 0)


def test_contraction_is_relative_to_the_prior():
    ones = np.ones((7, 1))
    s = Simulations((), ones, 1, ones, ones, 0.5 * ones, np.array([2.0]))
    np.testing.assert_allclose(s.contraction, 15 / 16)


def test_the_seed_decides():
    vae = oracle(5, 3)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(simulate(vae, 50, 9))
    for name in ("ranks", "z", "mean", "scale"):
        first, second = getattr(runs[0], name), getattr(runs[1], name)
        np.testing.assert_array_equal(first, second)
    assert (runs[0].z != runs[2].z).all()
    assert (runs[0].ranks != runs[2].ranks).any()
    assert not any(p.grad is not None for p in vae.parameters())


def test_ties_are_broken_at_random():
    """Ranks of a quantity of two values, and of one value, are uniform for an exact guide.

    The ranks that count all ties as above the truth are seen by the same check.
    """
    vae = oracle(5, 3)
    strict = []

    def sign(z, x):
        values = (z[..., 0] > 0).double()
        strict.append((values[1:] < values[0]).sum(0))
        return values

    torch.manual_seed(4)
    s = simulate(vae, COUNT, DRAWS, {"sign": sign, "one": lambda z, x: torch.ones(z.shape[:2])})
    for test in check_ranks(s)[-2:]:
        assert test.p_value > FALSE_ALARM / 2
    ranks = torch.cat(strict)[:, None].expand(-1, 2).numpy()
    assert check_ranks(with_ranks(ranks, DRAWS))[0].p_value < 1e-11


def test_bad_arguments():
    vae = oracle(5, 3)
    for numbers in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="num_simulations and num_draws expect at least 1"):
            simulate(vae, *numbers)
    with pytest.raises(ValueError, match=r"'mine' expects .* shape \(10, 4\); got \(10, 4, 3\)$"):
        simulate(vae, 4, 9, {"mine": lambda z, x: z})
    for bad in (lambda z, x: z[..., 0] * math.nan, lambda z, x: z[..., 0].sqrt()):
        with pytest.raises(ValueError, match=r"'mine' .* NaN among them"):
            simulate(vae, 4, 9, {"mine": bad})
    with pytest.raises(ValueError, match="at least 40 simulations; got 39"):
        check_ranks(simulate(vae, 39, 9))
    assert len(check_ranks(simulate(vae, 40, 9))) == 5
    for level in (0.0, 1.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match="levels expect probabilities between 0 and 1"):
            coverage(simulate(vae, 4, 9), (0.5, level))


# Tests of ranks


def test_the_two_tests_of_ranks():
    """Bins of equally many ranks, 20 simulations or more each; Pearson's statistic by hand."""
    random = np.random.default_rng(5)
    for count, num_draws, bins in [(400, 199, 20), (100, 199, 5), (1000, 99, 50), (70, 20, 3)]:
        ranks = random.integers(0, num_draws + 1, (count, 2))
        test = check_ranks(with_ranks(ranks, num_draws))[1]
        width = (num_draws + 1) // bins
        observed = np.array([((ranks[:, 1] // width) == b).sum() for b in range(bins)])
        statistic = ((observed - count / bins) ** 2).sum() / (count / bins)
        assert test.chi_squared == pytest.approx(statistic)
        assert test.p_chi_squared == pytest.approx(stats.chi2.sf(statistic, bins - 1))
        assert test.gamma == gamma_discrepancy(ranks[:, 1], num_draws)
        assert test.p_gamma == gamma_p_value(test.gamma, count, num_draws)
        assert test.name == DENSITY
    # ranks that never occur count as none
    test = check_ranks(with_ranks(random.integers(0, 100, (400, 1)), 199))[0]
    assert test.p_value < 1e-11
    assert test.chi_squared >= 400
    # 211 ranks, a prime number, have no equal bins
    test = check_ranks(with_ranks(random.integers(0, 211, (1000, 1)), 210))[0]
    assert (test.chi_squared, test.p_chi_squared) == (0, 1)
    assert RankTest("", 0.1, 0.3, 1.0, 0.01).p_value == pytest.approx(0.02)
    assert RankTest("", 0.1, 0.01, 1.0, 0.3).p_value == pytest.approx(0.02)
    assert RankTest("", 0.1, 0.7, 1.0, 0.8).p_value == 1


def rejections(vae, count: int, num_draws: int, repetitions: int, levels=(0.01, 0.05)):
    """(levels, Q): how often each quantity is rejected; and (levels,): any, with Bonferroni."""
    p_values = []
    for _ in range(repetitions):
        tests = check_ranks(simulate(vae, count, num_draws))
        p_values.append([test.p_value for test in tests])
    p_values = np.array(p_values)
    family = p_values.min(1) * p_values.shape[1]
    each = np.array([(p_values <= level).sum(0) for level in levels])
    return each, np.array([(family <= level).sum() for level in levels])


def allowed(repetitions: int, num_counts: int, levels=(0.01, 0.05)) -> np.ndarray:
    """(levels, 1): the most rejections of a true hypothesis, of `num_counts` counts each level."""
    chance = FALSE_ALARM / (num_counts * len(levels))
    return stats.binom.isf(chance, repetitions, np.array(levels))[:, None]


@pytest.mark.parametrize("case", CASES)
def test_exact_guides_are_accepted(case):
    """No more often rejected than the level says; a mean off by half a deviation is."""
    torch.manual_seed(6)
    each, family = rejections(oracle(*case), 120, 19, 200)
    most = allowed(200, each.shape[1] + 1)
    assert (each <= most).all()
    assert (family <= most[:, 0]).all()
    each, family = rejections(oracle(*case, shift=0.5), 120, 19, 40)
    most = allowed(40, each.shape[1] + 1)
    assert (each[:, : case[1]] > most).all()
    assert (family > most[:, 0]).all()


def rank_chances(factor: float, shift: float = 0.0, num_draws: int = DRAWS) -> np.ndarray:
    """(L + 1,): P(rank of z) where q's deviation is `factor` exact ones and its mean `shift` off.

    Given x and z*, the ranks are binomial with chance Φ((ε − shift) / factor), ε standard normal;
    the trapezoidal rule is exact here to rounding.
    """
    nodes = np.linspace(-10, 10, 4001)
    weights = stats.norm.pdf(nodes) / stats.norm.pdf(nodes).sum()
    chance = stats.norm.cdf((nodes - shift) / factor)
    return weights @ stats.binom.pmf(np.arange(num_draws + 1), num_draws, chance[:, None])


def ignored_chances(weight: float, noise: float) -> np.ndarray:
    """(L + 1,): P(rank of log p(x|z)) for D = Z = 1 where the draws are from p(z).

    x = w z* + e, and log p(x|z) < log p(x|z*) where z is outside z* … z* + 2e/w.
    """
    nodes = np.linspace(-8, 8, 401)
    mass = stats.norm.pdf(nodes) / stats.norm.pdf(nodes).sum()
    ends = stats.norm.cdf(nodes[:, None] + 2 * noise / weight * nodes)
    chance = 1 - np.abs(ends - stats.norm.cdf(nodes)[:, None])
    below = stats.binom.pmf(np.arange(DRAWS + 1), DRAWS, chance.reshape(-1, 1))
    return np.outer(mass, mass).ravel() @ below


class VariancesAsScales(LinearGaussian):
    def posterior(self, x):
        exact = super().posterior(x)
        return Normal(exact.mean, exact.variance).to_event(1)


class Permuted(LinearGaussian):
    def posterior(self, x):
        exact = super().posterior(x)
        return Normal(exact.mean.roll(1, -1), exact.stddev.roll(1, -1)).to_event(1)


def small(cls=LinearGaussian, **settings) -> LinearGaussian:
    """One latent with a posterior deviation of 0.51."""
    return cls(torch.ones(1, 1).double(), torch.zeros(1).double(), 0.6, **settings)


def permuted() -> LinearGaussian:
    torch.manual_seed(1)
    return Permuted(torch.randn(5, 3).double(), torch.zeros(5).double(), 0.6)


def permuted_chances() -> np.ndarray:
    """z₁* − m₃ has variance 1 + Cov(m)₃₃ − 2 Cov(m)₁₃, where Cov(m) = I − Σ."""
    covariance = torch.linalg.inv(permuted().posterior_precision).detach().numpy()
    moved = np.eye(3) - covariance
    variance = 1 + moved[2, 2] - 2 * moved[0, 2]
    return rank_chances(math.sqrt(covariance[2, 2] / variance))


SD = 1 / math.sqrt(1 + 1 / 0.36)
FAULTS = {
    "too narrow": (lambda: small(scale_factor=0.8), "z1", lambda: rank_chances(0.8)),
    "too wide": (lambda: small(scale_factor=1.2), "z1", lambda: rank_chances(1.2)),
    "shifted": (lambda: small(shift=0.2), "z1", lambda: rank_chances(1, 0.2)),
    "variances": (lambda: small(VariancesAsScales), "z1", lambda: rank_chances(SD)),
    "permuted": (permuted, "z1", permuted_chances),
    "collapsed": (
        lambda: small(guide="collapsed"),
        LIKELIHOOD,
        lambda: ignored_chances(1, 0.6),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_rejected(fault):
    """Power by theory, and three repetitions that bear it out.

    The ranks' distribution under the fault is known (and held against the simulations'), so the
    chance that the gamma test misses it is known to rounding: that of a path within the band whose
    p-values are above half the level. It is below 1e-5 for each fault, where 1e-3 was asked for.
    """
    make, name, chances = FAULTS[fault]
    chances = chances()
    low, high = gamma_band(COUNT, DRAWS, 1 - LEVEL / 2)
    uniform = np.full(DRAWS + 1, 1 / (DRAWS + 1))
    assert 1 - stays_within(low, high, COUNT, uniform) <= LEVEL / 2
    miss = stays_within(low, high, COUNT, chances)
    assert 3 * miss < FALSE_ALARM / 2
    vae = make()
    torch.manual_seed(7)
    for _ in range(3):
        s = simulate(vae, COUNT, DRAWS)
        test = {t.name: t for t in check_ranks(s)}[name]
        assert test.p_gamma <= LEVEL / 2
        assert test.p_value <= LEVEL
        observed = np.bincount(s.ranks[:, s.names.index(name)], minlength=DRAWS + 1)
        assert stats.chisquare(observed, COUNT * chances).pvalue > FALSE_ALARM / 6


def test_a_guide_that_ignores_x_passes_in_all_but_the_likelihood():
    vae = oracle(5, 3, guide="collapsed")
    torch.manual_seed(8)
    each, _ = rejections(vae, 400, 19, 40)
    blind = [0, 1, 2, 4]  # the latents and log q(z|x), whose ranks are uniform
    assert (each[:, blind] <= allowed(40, 4)).all()
    assert (each[:, 3] == 40).all()


# Coverage


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_coverage_of_exact_guides(latent_dim):
    """Every share is binomial about its nominal level; a narrow guide's shares are not."""
    levels, count = (0.5, 0.8, 0.9, 0.95), 3000
    cells = len(levels) * (latent_dim + 2)
    for factor in (1.0, 0.85):
        torch.manual_seed(9)
        c = coverage(simulate(oracle(5, latent_dim, scale_factor=factor), count, 199), levels)
        assert c.names == (*(f"z{j + 1}" for j in range(latent_dim)), MEAN, HDR)
        np.testing.assert_allclose(c.nominal, levels, atol=1e-12)
        mean = c.names.index(MEAN)
        error = (c.high - c.low)[:, mean] / 2 / stats.t.isf(0.025, count - 1)
        seen = np.abs(c.covered[:, mean] - levels) > sigmas(cells) * error
        for column in {*range(len(c.names))} - {mean}:
            hits = np.rint(count * c.covered[:, column]).astype(int)
            p_values = [
                stats.binomtest(k, count, p).pvalue for k, p in zip(hits, levels, strict=True)
            ]
            seen = np.c_[seen, np.array(p_values) < FALSE_ALARM / cells]
        # 0.8 is 2Φ(0.85 · 1.28) − 1 = 0.72 for the narrow guide, 10 standard errors off, and so on;
        # 0.5 is 0.43, 7 standard errors off, of which 4.5 are allowed
        assert not seen.any() if factor == 1 else seen[1:].all()


@pytest.mark.parametrize("factor", [0.8, 1.25])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_coverage_of_a_wrong_scale_is_the_closed_form(latent_dim, factor):
    """2Φ(c z) − 1 for intervals, P(χ² ≤ c² q) for the HDR, up to what 999 draws can show."""
    vae = oracle(5, latent_dim, scale_factor=factor)
    torch.manual_seed(10)
    count, levels = 2000, (0.5, 0.8, 0.95)
    c = coverage(simulate(vae, count, 999), levels)
    np.testing.assert_allclose(c.nominal, levels, atol=1e-12)
    central = 2 * stats.norm.cdf(factor * stats.norm.isf((1 - np.array(levels)) / 2)) - 1
    chi2 = stats.chi2(latent_dim)
    region = chi2.cdf(factor**2 * chi2.ppf(levels))
    # finite L: exactly known for an interval, and a tenth of the standard error
    chances = rank_chances(factor, 0, 999)
    finite = np.array([chances[k : 1000 - k].sum() for k in (250, 100, 25)])
    error = np.sqrt(central * (1 - central) / count)
    assert (np.abs(finite - central) < error / 10).all()
    limit = sigmas(3 * (latent_dim + 2))
    # latents are dependent: the error of their mean is at most that of one
    assert (np.abs(c.covered[:, :-1] - central[:, None]) < limit * error[:, None]).all()
    assert (np.abs(c.covered[:, -1] - region) < limit * error).all()
    # power: neither the nominal levels nor, for three latents, the formula for one
    assert (np.abs(c.covered - np.array(levels)[:, None]) > limit * error[:, None]).all()
    if latent_dim == 3:
        assert (np.abs(c.covered[:, -1] - central) > limit * error).any()


def test_levels_are_moved_to_what_the_draws_can_show():
    ranks = np.random.default_rng(11).integers(0, 10, (500, 2))
    s = with_ranks(ranks, 9)
    c = coverage(s, (0.5, 0.82, 0.85, 0.95, 0.01))
    np.testing.assert_allclose(c.nominal, [0.6, 0.8, 0.8, 1, 0.2])
    for row, nominal in enumerate(c.nominal):
        out = round((1 - nominal) * 5)
        inside = np.abs(ranks[:, 0] - 4.5) < 5 - out
        assert c.covered[row, 0] == inside.mean()
        assert c.covered[row, 1] == inside.mean()  # of one latent
        assert c.covered[row, 2] == (ranks[:, 1] >= 2 * out).mean()
    np.testing.assert_array_equal(c.covered[3], 1)
    # with one draw there is no region but all
    np.testing.assert_array_equal(coverage(with_ranks(ranks // 5, 1)).nominal, 1)


def test_intervals_of_coverage():
    """Clopper and Pearson's by their formula, which cover; the mean's over simulations."""
    random = np.random.default_rng(12)
    count, columns = 100, 500
    c = coverage(with_ranks(random.integers(0, 40, (count, columns + 1)), 39), (0.95,))
    hits = np.delete(np.rint(count * c.covered[0]), columns)
    low, high = np.delete(c.low[0], columns), np.delete(c.high[0], columns)
    some = hits < count
    np.testing.assert_allclose(low, stats.beta.ppf(0.025, hits, count - hits + 1), rtol=1e-6)
    np.testing.assert_allclose(
        high[some], stats.beta.ppf(0.975, hits + 1, count - hits)[some], rtol=1e-6
    )
    np.testing.assert_array_equal(high[~some], 1)
    most = stats.binom.isf(FALSE_ALARM, columns + 1, 0.05)
    assert ((low > 0.95) | (high < 0.95)).sum() <= most
    # power: the normal interval misses more often here
    share = hits / count
    assert (np.abs(share - 0.95) > 1.96 * np.sqrt(share * (1 - share) / count)).sum() > most
    # latents that are one and the same tell no more than one
    ranks = np.repeat(random.integers(0, 40, (count, 1)), 6, axis=1)
    same = coverage(with_ranks(ranks, 39), (0.5,))
    inside = ((ranks[:, 0] >= 10) & (ranks[:, 0] < 30)).astype(float)
    error = stats.t.isf(0.025, count - 1) * inside.std(ddof=1) / math.sqrt(count)
    column = same.names.index(MEAN)
    assert same.covered[0, column] == pytest.approx(inside.mean())
    assert same.low[0, column] == pytest.approx(inside.mean() - error)
    assert same.high[0, column] == pytest.approx(inside.mean() + error)


# Sizes


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (0.8, 0.3), (1.3, -0.5)])
def test_miscalibration_recovers_planted_faults(factor, shift):
    """z-scores are (ε − shift) / factor: bias −shift / factor, spread 1 / factor."""
    vae = oracle(5, 3, scale_factor=factor, shift=shift)
    torch.manual_seed(13)
    m = miscalibration(simulate(vae, 4000, 1))
    for intervals, truth in ((m.bias, -shift / factor), (m.spread, 1 / factor)):
        assert len(intervals) == 3
        for i in intervals:
            error = (i.high - i.low) / 2 / stats.t.isf(0.025, 3999)
            assert error < 0.03
            assert abs(i.estimate - truth) < sigmas(6) * error
            if factor != 1:  # power: neither sign nor reciprocal is mistaken
                wrong = -truth if intervals is m.bias else factor
                assert abs(i.estimate - wrong) > sigmas(6) * error


def test_intervals_of_miscalibration_cover():
    """About 95 in 100, neither fewer nor more: 1000 repetitions, laid out as latents."""
    random = np.random.default_rng(14)
    z = 0.4 + 1.25 * random.standard_normal((2000, 1000))
    s = Simulations((), z, 1, z, np.zeros_like(z), np.ones_like(z), np.ones(1000))
    m = miscalibration(s)
    for intervals, truth in ((m.bias, 0.4), (m.spread, 1.25)):
        misses = sum(not i.low <= truth <= i.high for i in intervals)
        assert stats.binomtest(misses, 1000, 0.05).pvalue > FALSE_ALARM / 2
        # power: of intervals three quarters as wide
        misses = sum(abs(i.estimate - truth) > 0.375 * (i.high - i.low) for i in intervals)
        assert stats.binomtest(misses, 1000, 0.05).pvalue < 1e-12
    estimates = [i.estimate for i in m.spread]
    np.testing.assert_allclose(estimates, z.std(0))


def test_interval():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    for alpha in (0.05, 0.2):
        i = interval(values, alpha)
        error = stats.t.isf(alpha / 2, 3) * math.sqrt(14 / 3) / 2
        assert (i.estimate, i.low, i.high) == pytest.approx((3, 3 - error, 3 + error))
    assert interval(values) == interval(values, 0.05)
    alone = interval(np.array([2.0]))
    assert (alone.estimate, alone.low, alone.high) == (2, -math.inf, math.inf)
    same = interval(np.full(5, 2.0))
    assert (same.low, same.high) == (2, 2)
