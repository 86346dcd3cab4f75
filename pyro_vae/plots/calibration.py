"""Figures of calibration: arrays in, matplotlib Figure out.

Z latents, N simulations, L = `num_draws`; `names` are those of the arrays' columns. At most
`MOST_PANELS` quantities get a panel; the title states how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from .run import (
    DOTS,
    GREY,
    GUIDE,
    TRAIN,
    VALIDATION,
    dot_size,
    new_figure,
    panels,
    plain,
    short,
    styled,
)

BOLD: Any = {"markersize": 4, "linewidth": 1.8, "capsize": 2.5}


@styled
def rank_histograms(
    ranks: np.ndarray, num_draws: int, names: Sequence[str], title: str = ""
) -> Figure:
    """Ranks of the truth among draws from q(z|x): uniform if q is right.

    ∪ means that q is too narrow, ∩ too wide, a slope that it is shifted. If q is right, each bar
    ends in the grey band with probability 99%.

    Args:
        ranks: (N, Q) integers 0 … L.
    """
    num_ranks = num_draws + 1
    # About 20 bins of equally many ranks; if L + 1 has no such divisor, their sizes differ by 1.
    divisors = [b for b in range(10, 31) if num_ranks % b == 0]
    bins = min(divisors, key=lambda b: abs(b - 20), default=min(20, num_ranks))
    edges = np.ceil(np.arange(bins + 1) * num_ranks / bins) - 0.5
    low, high = stats.binom.interval(0.99, len(ranks), np.diff(edges) / num_ranks)
    labels = (f"rank of the truth among {num_draws} draws", "simulations")
    figure, grid = panels(names, title, *labels, sharex=True)
    for j, axes in enumerate(grid):
        counts = np.histogram(ranks[:, j], edges)[0]
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=TRAIN, alpha=0.75)
        axes.stairs(high, edges, baseline=low, fill=True, color="0.5", alpha=0.4, zorder=3)
        axes.set_xticks([0, num_draws])
    return figure


@styled
def ecdf_differences(
    ranks: np.ndarray,
    num_draws: int,
    names: Sequence[str],
    lower: np.ndarray,
    upper: np.ndarray,
    title: str = "",
) -> Figure:
    """The ranks' distribution function minus the uniform one, in red if it leaves the band.

    Args:
        ranks: (N, Q) integers 0 … L.
        lower, upper: (L,) simultaneous band of the share of ranks below i = 1 … L.
    """
    uniform = np.arange(1, num_draws + 1) / (num_draws + 1)
    labels = ("$i\\,/\\,(L+1)$", "share below $i$, minus uniform")
    figure, grid = panels(names, title, *labels, sharex=True, sharey=True)
    for j, axes in enumerate(grid):
        below = np.bincount(ranks[:, j], minlength=num_draws + 1).cumsum()[:-1] / len(ranks)
        outside = bool(((below < lower) | (below > upper)).any())
        axes.fill_between(uniform, lower - uniform, upper - uniform, color="0.85", linewidth=0)
        axes.axhline(0, **GUIDE)
        axes.plot(uniform, below - uniform, color=VALIDATION if outside else TRAIN, linewidth=1.2)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    return figure


@styled
def coverage_curve(
    nominal: np.ndarray,
    covered: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Share of truths inside regions of q(z|x), against their nominal probability.

    Args:
        nominal: (M,) probabilities under q.
        covered: (M, R) shares of simulations; the last two of the R regions are drawn bold, the
            others, one for each latent, thin.
        low, high: (M, R) ends of the confidence intervals.
    """
    figure = new_figure(4.2, 4.4, title)
    axes = figure.add_subplot()
    note: Any = {"color": "0.6", "fontsize": 11, "style": "italic", "zorder": 0}
    axes.text(0.04, 0.94, "too wide", **note)
    axes.text(0.96, 0.03, "too narrow", ha="right", **note)
    axes.axline((0, 0), slope=1, linestyle="--", **GUIDE)
    for j in range(len(names) - 2):
        label = "each latent" if j == 0 else None
        axes.plot(nominal, covered[:, j], color=GREY, linewidth=0.7, label=label)
    for j, colour, marker in ((-2, TRAIN, "o"), (-1, VALIDATION, "s")):
        middle = covered[:, j]
        errors = np.abs([middle - low[:, j].clip(0, 1), high[:, j].clip(0, 1) - middle])
        look: Any = {"color": colour, "marker": marker, **BOLD}
        axes.errorbar(nominal, middle, errors, label=plain(names[j]), **look)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="nominal coverage", ylabel="share of simulations covered")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def recovery(z: np.ndarray, mean: np.ndarray, names: Sequence[str], title: str = "") -> Figure:
    """The truth against the posterior mean, with their correlation r, 0 if either is constant.

    The points of an exact posterior scatter about the diagonal, even if x carries little
    information on z.

    Args:
        z: (N, Z) truths.
        mean: (N, Z) means of q(z|x).
    """
    varied = (np.ptp(z, axis=0) > 0) & (np.ptp(mean, axis=0) > 0)
    r = [np.corrcoef(z[:, j], mean[:, j])[0, 1] if varied[j] else 0.0 for j in range(len(names))]
    notes = [f"$r = {value:.2f}$" for value in r]
    labels = ("posterior mean", "truth")
    figure, grid = panels(names, title, *labels, notes=notes, sharex=True, sharey=True)
    reach = 1.05 * max(np.abs(z).max(), np.abs(mean).max())
    for j, axes in enumerate(grid):
        axes.scatter(mean[:, j], z[:, j], s=dot_size(len(z)), color=TRAIN, **DOTS)
        axes.axline((0, 0), slope=1, linestyle="--", **GUIDE)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    return figure


@styled
def contraction_and_z(
    contraction: np.ndarray, z_scores: np.ndarray, names: Sequence[str], title: str = ""
) -> Figure:
    """Posterior contraction of each latent, and z-scores of the truth.

    Up to ten latents share one panel, a colour each.

    Args:
        contraction: (N, Z) 1 − posterior variance / prior variance.
        z_scores: (N, Z) (truth − mean) / standard deviation of q(z|x).
    """
    many = len(names) > 10
    labels = ("posterior contraction", "z-score of the truth")
    shape: Any = {"width": 2.2 if many else 5.0, "sharex": True, "sharey": True}
    figure, grid = panels(names if many else [""], title, *labels, **shape)
    for axes in grid:
        for height, line in ((0, "-"), (-2, ":"), (2, ":")):
            axes.axhline(height, linestyle=line, **GUIDE)
    for j in range(len(grid) if many else len(names)):
        colour = TRAIN if many else matplotlib.colormaps["tab10"](j)
        look: Any = {"color": colour, "s": dot_size(len(z_scores)), **DOTS}
        axes = grid[j if many else 0]
        axes.scatter(contraction[:, j], z_scores[:, j], label=short(names[j], 20), **look)
    if not many:
        figure.legend(loc="outside right center", markerscale=2)
    return figure
