"""Factors that give the standard deviations of q(z|x) the right coverage, on average over rows.

    z* ~ p(z),  x ~ p(x|z*),  score |z*_j − mean_j(x)| / sd_j(x)
    factor_j = level-quantile of the scores / standard normal quantile of (1 + level) / 2

The interval mean ± 1.645 · factor · sd then holds the truth with probability 0.9. The factor is
that of the interval, not the root mean square of the scores: a few rows far off decide the latter,
and would make the intervals of all others too wide.

One half of the simulated rows gives the factors, with the rank ⌈(N + 1) · level⌉ of split conformal
prediction; the other half tests them. What is right on average need not be right for each row. The
mean stays as it is: a bias makes the intervals wider, not better placed.

Source: "Approximate posterior recalibration", arXiv 2603.20068; "A gentle introduction to conformal
prediction", arXiv 2107.07511.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from ..evidence.intervals import Interval, interval, share_interval
from ..models.interface import LatentModel
from ..runtime.memory import Callback, ignore
from .sbc import simulate


@dataclass(frozen=True)
class Recalibration:
    """Factors of posterior standard deviations, and the coverage of central intervals.

    Attributes:
        factors: (Z,) above 1 where q(z|x) is overconfident.
        level: probability of the intervals that the factors are for.
        before, after: for each latent, the share of test rows whose truth lies inside mean ± t · sd
            and mean ± t · factor · sd, where t is the standard normal quantile.
        mean_before, mean_after: their means over the latents.
    """

    factors: np.ndarray
    level: float
    before: list[Interval]
    after: list[Interval]
    mean_before: Interval
    mean_after: Interval


def recalibrate(
    vae: LatentModel,
    num_simulations: int = 4000,
    level: float = 0.9,
    on_chunk: Callback = ignore,
    like: Tensor | None = None,
) -> Recalibration:
    """Learn the factors on rows simulated from the model, and test them on others.

    Draws come from torch's global random state.

    Args:
        vae: model with `prior()`, `posterior(x)`, with mean and variance, and `likelihood(z)`.
        num_simulations: number of rows, one half to learn from and one to test.
        level: probability of the intervals.
        on_chunk: called with the number of simulations just done.
        like: rows of data whose missing values simulated rows lack, see `simulate`.

    Raises:
        ValueError: `level` is not between 0 and 1, or there are too few simulations for it.
    """
    if not 0 < level < 1:
        raise ValueError(f"level expects a probability between 0 and 1; got {level}")
    learned = num_simulations // 2
    rank = math.ceil((learned + 1) * level)
    if not 0 < rank <= learned:
        least = 2 * math.ceil(level / (1 - level) - 1e-9)  # without the rounding of 0.9 / 0.1
        raise ValueError(
            f"num_simulations expects at least {least} for intervals of {level:g}; got "
            f"{num_simulations}"
        )
    found = simulate(vae, num_simulations, num_draws=1, on_chunk=on_chunk, like=like)
    scores = np.abs(found.z_scores)
    normal = stats.norm.isf((1 - level) / 2)
    factors = np.sort(scores[:learned], axis=0)[rank - 1] / normal
    test = scores[learned:]
    before, after = test <= normal, test <= normal * factors
    return Recalibration(
        factors,
        level,
        before=[share_interval(inside) for inside in before.T],
        after=[share_interval(inside) for inside in after.T],
        mean_before=interval(before.mean(1)),
        mean_after=interval(after.mean(1)),
    )
