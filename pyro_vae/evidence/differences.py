"""Paired differences between models, with intervals over rows and over seeds.

    dᵢ = aᵢ − bᵢ                of each row i that neither model was trained on
    over rows    d̄ ± q s / √n   is this trained model better than that one?
    over seeds   Student's t    is one method of training better than another?

q is the 1 − α quantile of the largest |d̄* − d̄| √n / s* of all pairs in resamples of the rows, the
studentized bootstrap. All intervals of a measure hold together with probability 1 − α, without the
assumption that dᵢ is normal. Differences of accuracies, which are 0 in most rows, have Agresti and
Min's interval, with α divided by the number of pairs.

A model is ranked above another only if these intervals exclude 0.

Source: "Exact and approximate stepdown methods for multiple hypothesis testing" (quantiles of the
largest statistic), doi 10.1198/016214504000000539; "Simple improved confidence intervals for
comparing matched proportions", doi 10.1002/sim.1781.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from ..config import InputError
from .intervals import Interval, interval

RESAMPLES = 5_000
# Fewer rows in common do not show the distribution of the differences.
MIN_ROWS = 30
# Numbers of a chunk of resamples
CHUNK = 2**22


@dataclass(frozen=True)
class Difference:
    """The mean of first − second, with a simultaneous confidence interval.

    Attributes:
        first, second: the names of both.
        estimate, low, high: of the mean.
        count: number of rows, or of seeds, that the interval is based on.
    """

    first: str
    second: str
    estimate: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or −1 if the interval is above or below 0, else 0: the two are not distinguished."""
        return int(self.low > 0) - int(self.high < 0)


def compare_rows(
    values: Mapping[str, np.ndarray], alpha: float = 0.05, seed: int = 0
) -> list[Difference]:
    """Mean differences over rows between each two models, with simultaneous intervals.

        a, b = (pyro_vae.log_evidence(vae, x).numpy() for vae in (first, second))
        pyro_vae.compare_rows({"first": a, "second": b})

    Args:
        values: of each model, (N,) values of the same rows, such as log p(x). NaN where a row must
            not be used for a model, since it was trained on it: a pair is compared on the rows that
            both have.
        alpha: probability that any of the intervals misses its mean.
        seed: of the resamples.

    Returns:
        A difference for each pair with at least `MIN_ROWS` rows in common.

    Raises:
        InputError: fewer than two models, other shapes, or a value is infinite.
    """
    pairs = _pairs(values)
    if not pairs:
        return []
    d = np.stack([difference for _, _, difference in pairs], axis=1)
    count = (~np.isnan(d)).sum(0)
    mean, error = np.nanmean(d, 0), np.nanstd(d, 0, ddof=1) / np.sqrt(count)
    largest = _largest_t(d - mean, np.random.default_rng(seed))
    width = float(np.quantile(largest, 1 - alpha, method="higher")) * error
    return [
        Difference(first, second, float(m), float(m - w), float(m + w), int(n))
        for (first, second, _), m, w, n in zip(pairs, mean, width, count, strict=True)
    ]


def compare_shares(right: Mapping[str, np.ndarray], alpha: float = 0.05) -> list[Difference]:
    """Differences between shares of rows, such as accuracies: as `compare_rows`.

    Args:
        right: of each model, (N,) 1 or 0, or NaN if the row does not count.
        alpha: probability, at most, that any of the intervals misses its difference.
    """
    pairs = _pairs(right)
    each = alpha / max(len(pairs), 1)
    found = []
    for first, second, d in pairs:
        known = d[~np.isnan(d)]
        inside = _share_interval(known, each)
        ends = inside.estimate, inside.low, inside.high
        found.append(Difference(first, second, *ends, len(known)))
    return found


def compare_seeds(
    values: Mapping[str, np.ndarray],
    methods: Mapping[str, Mapping[int, str]],
    alpha: float = 0.05,
) -> list[Difference]:
    """Mean differences between methods, each trained with several seeds.

    Two methods with two seeds in common are paired: a seed contributes the mean difference of its
    two models on the rows that both have, and the interval is Student's over these. Others are
    compared by Welch's interval of the means of their models. α is divided by the number of pairs.

    Args:
        values: of each model, as in `compare_rows`.
        methods: of each method, the name of its model for each seed.
        alpha: probability, at most, that any of the intervals misses its mean.
    """
    several = {name: dict(seeds) for name, seeds in methods.items() if len(seeds) > 1}
    pairs = list(combinations(several, 2))
    found = []
    for first, second in pairs:
        a, b = several[first], several[second]
        paired = [values[a[s]] - values[b[s]] for s in sorted(a.keys() & b.keys())]
        d = np.array([np.nanmean(x) for x in paired if not np.isnan(x).all()])
        if len(d) > 1:
            inside, count = interval(d, alpha / len(pairs)), len(d)
        else:
            means = [np.array([np.nanmean(values[run]) for run in x.values()]) for x in (a, b)]
            inside = _welch(means[0], means[1], alpha / len(pairs))
            count = min(len(a), len(b))
        found.append(Difference(first, second, inside.estimate, inside.low, inside.high, count))
    return found


def tiers(order: Sequence[str], above: Callable[[str, str], bool]) -> list[list[str]]:
    """Models in tiers, the best first: each is shown to be above every one of the lower tiers.

    Args:
        order: the models, the best first.
        above: whether the first is shown to be above the second.
    """
    found: list[list[str]] = [[]]
    for k, name in enumerate(order):
        if k and all(above(high, low) for high in order[:k] for low in order[k:]):
            found.append([])
        found[-1].append(name)
    return found


def shown_above(differences: Sequence[Difference]) -> Callable[[str, str], bool]:
    """Whether differences show that one model is above another, as a function of both names."""
    found = {(d.first, d.second) for d in differences if d.sign > 0}
    found |= {(d.second, d.first) for d in differences if d.sign < 0}
    return lambda high, low: (high, low) in found


def _pairs(values: Mapping[str, np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    """Names and differences (N,) of the pairs with enough rows in common.

    Raises:
        InputError: see `compare_rows`.
    """
    shapes = {name: np.shape(value) for name, value in values.items()}
    if len(values) < 2 or len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 1:
        raise InputError(f"expected values (N,) of the same rows for two models; got {shapes}")
    for name, value in values.items():
        if np.isinf(value).any():
            raise InputError(
                f"expected finite values, or NaN for rows to leave out; got "
                f"{np.isinf(value).sum()} infinite ones for {name}"
            )
    pairs = ((a, b, values[a] - values[b]) for a, b in combinations(values, 2))
    return [pair for pair in pairs if (~np.isnan(pair[2])).sum() >= MIN_ROWS]


def _largest_t(centred: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The largest |t| over pairs in each resample of the rows: (N, P), NaN is missing → (R,)."""
    known, d = (~np.isnan(centred)).astype(float), np.nan_to_num(centred)
    rows, squares = len(d), np.square(d)
    parts, done, size = [], 0, max(1, CHUNK // rows)
    while done < RESAMPLES:
        size = min(size, RESAMPLES - done)
        drawn = random.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        weights = (
            np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(float)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            count = weights @ known
            mean = weights @ d / count
            variance = (weights @ squares / count - np.square(mean)) / (count - 1)
            t = np.abs(mean) / np.sqrt(variance.clip(0))
        # Without spread a resample says nothing, unless all differences are equal.
        t[~(variance > 0)] = math.inf
        t[mean == 0] = 0.0
        parts.append(t.max(1))
        done += size
    return np.concatenate(parts)


def _share_interval(d: np.ndarray, alpha: float) -> Interval:
    """Agresti and Min's interval of the mean of d (N,), which is 1, 0 or −1 in each row."""
    wins, losses, count = (d > 0).sum() + 0.5, (d < 0).sum() + 0.5, len(d) + 2
    middle = float(wins - losses) / count
    variance = (float(wins + losses) / count - middle**2) / count
    width = float(stats.norm.isf(alpha / 2)) * math.sqrt(variance)
    return Interval(float(d.mean()), max(middle - width, -1.0), min(middle + width, 1.0))


def _welch(a: np.ndarray, b: np.ndarray, alpha: float) -> Interval:
    """Welch's interval of the difference of the means of independent a (N,) and b (M,)."""
    parts = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])
    freedom = parts.sum() ** 2 / max((parts**2 / [len(a) - 1, len(b) - 1]).sum(), 1e-300)
    middle = float(a.mean() - b.mean())
    width = float(stats.t.isf(alpha / 2, max(freedom, 1.0)) * math.sqrt(parts.sum()))
    return Interval(middle, middle - width, middle + width)
