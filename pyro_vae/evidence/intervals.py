"""Estimates with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval."""

    estimate: float
    low: float
    high: float

    def sqrt(self) -> Interval:
        """Interval of the square root. Ends below 0, which noise can cause, count as 0."""
        ends = (self.estimate, self.low, self.high)
        return Interval(*(math.sqrt(max(end, 0.0)) for end in ends))


def interval(values: np.ndarray, alpha: float = 0.05) -> Interval:
    """Mean of independent values (N,) with Student's confidence interval of level 1 − α."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    quantile = float(stats.t.isf(alpha / 2, len(values) - 1))
    error = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - error, mean + error)


def share_interval(inside: np.ndarray) -> Interval:
    """Share of true values (N,) with Clopper and Pearson's 95% confidence interval."""
    result = stats.binomtest(int(inside.sum()), len(inside)).proportion_ci(method="exact")
    return Interval(float(inside.mean()), float(result.low), float(result.high))
