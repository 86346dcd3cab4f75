"""Figures of evidence, latents and posteriors: arrays in, matplotlib Figure out.

Z latents, B rows of data; `names` are those of the arrays' columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from . import tiles
from .run import (
    DOTS,
    GREY,
    GUIDE,
    TRAIN,
    VALIDATION,
    dot_size,
    new_figure,
    panels,
    short,
    styled,
)

MOST_BARS, MOST_ROWS = 64, 6
THIN: Any = {"markersize": 2, "linewidth": 0.5, "alpha": 0.7}
INTERVAL: Any = {"markersize": 2.5, "linewidth": 1.3}
THIRD = "#cf7f17"
GOOD, DOUBTFUL, MEANINGLESS = "#d9ecd9", "#fcefc9", "#f6d3d3"


@styled
def weight_tails(
    pareto_k: np.ndarray,
    effective_sample_size: np.ndarray,
    num_samples: int,
    threshold: float,
    title: str = "",
) -> Figure:
    """Reliability of importance weights: k̂ and effective sample size of each row.

    Args:
        pareto_k: (B,); −∞ is drawn below all others, ∞ and NaN above.
        effective_sample_size: (B,), 1 to K.
        num_samples: K.
        threshold: k̂ below which K samples are reliable.
    """
    below, above = np.isneginf(pareto_k), ~(pareto_k < np.inf)
    finite = [0.0, threshold, 1.0, *pareto_k[~below & ~above]]
    low, high = min(finite), max(finite)
    margin = 0.08 * (high - low)
    ends = [low - 2 * margin] * bool(below.any()), [high + 2 * margin] * bool(above.any())
    bottom, top = min([low, *ends[0]]) - margin, max([high, *ends[1]]) + margin
    drawn = np.where(below, low - 2 * margin, np.where(above, high + 2 * margin, pareto_k))
    good, meaningless = pareto_k < threshold, ~(pareto_k <= 1)
    regions = (
        (bottom, threshold, GOOD, f"good, below {threshold:.2f}", good),
        (threshold, 1, DOUBTFUL, "doubtful", ~good & ~meaningless),
        (1, top, MEANINGLESS, "no meaning, above 1", meaningless),
    )
    figure = new_figure(7.2, 3.4, title)
    left, right = figure.subplots(1, 2, sharey=True)
    for start, stop, colour, name, inside in regions:
        left.axhspan(start, stop, color=colour, linewidth=0, label=f"{name}: {inside.sum()}")
        right.axhspan(start, stop, color=colour, linewidth=0)
    look: Any = {"s": dot_size(len(drawn)) + 4, "color": TRAIN, **DOTS}
    left.scatter(np.arange(1, len(drawn) + 1), np.sort(drawn), **look)
    right.scatter(effective_sample_size / num_samples, drawn, **look)
    ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
    endings = ["$-\\infty$"] * len(ends[0]), ["$\\infty$"] * len(ends[1])
    labels = [*endings[0], *(f"${t:.4g}$" for t in ticks), *endings[1]]
    left.set_yticks([*ends[0], *ticks, *ends[1]], labels)
    left.set(ylim=(bottom, top), ylabel="Pareto $\\hat k$", xlabel="rows, in order of $\\hat k$")
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    right.set(xscale="log", xlim=(0.8 / num_samples, 1.25))
    right.set_xlabel("effective sample size / number of samples")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def latent_use(
    kl: np.ndarray,
    mean_variance: np.ndarray,
    active: np.ndarray,
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """KL and variance of posterior means of each latent, in order of KL; inactive ones grey.

    Args:
        kl: (Z,) nats, mean over rows.
        mean_variance: (Z,) variance over rows of the posterior means.
        active: (Z,) booleans.
    """
    order = np.argsort(-kl, kind="stable")[:MOST_BARS]
    places, turned = np.arange(len(order)), len(order) > 12 or max(map(len, names)) > 6
    width = min(7.2, max(4.2, 0.16 * len(order) + 1.5))
    figure = new_figure(width, 4.0, title, len(order), len(kl))
    first, second = figure.subplots(2, 1, sharex=True)
    colours = np.where(active[order], TRAIN, GREY)
    first.bar(places, kl[order], color=colours)
    second.bar(places, mean_variance[order], color=colours)
    first.set_ylabel("KL, nats")
    second.set_ylabel("variance of\nposterior means")
    second.set_xticks(places, [short(names[j], 16) for j in order])
    second.tick_params("x", rotation=90 if turned else 0, labelsize=6 if turned else 8)
    second.set_ylim(bottom=0)
    second.set_xlim(-0.8, len(order) - 0.2)
    counts = {f"active: {active.sum()}": TRAIN, f"inactive: {(~active).sum()}": GREY}
    handles = [Patch(color=colour, label=text) for text, colour in counts.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@styled
def inference_gaps(
    amortization: np.ndarray, correlation: np.ndarray, remainder: np.ndarray, title: str = ""
) -> Figure:
    """The parts of log p(x) − ELBO: the mean over rows, and below it each row.

    Args:
        amortization, correlation, remainder: (B,) nats; noise can make them negative.
    """
    values = np.stack([amortization, correlation, remainder])
    means, quartiles = values.mean(1), np.percentile(values, [25, 50, 75], axis=1)
    names = ("encoder's error", "independent latents", "beyond any Gaussian")
    figure = new_figure(6.6, 3.6, title)
    above, below = figure.subplots(2, 1, height_ratios=(1, 3))
    # Deterministic offsets, evenly spread and without a visible pattern
    spread = 0.5 * (np.arange(values.shape[1]) * 0.618034 % 1 - 0.5)
    for i, colour in enumerate((TRAIN, THIRD, VALIDATION)):
        # Negative means are stacked to the left of 0.
        start = sum(m for m in means[:i] if (m > 0) == (means[i] > 0))
        bar = above.barh(0, means[i], left=start, color=colour, height=0.6)
        if abs(means[i]) > 0.1 * np.abs(means).sum():
            above.bar_label(bar, [f"${means[i]:.2f}$"], label_type="center", color="white")
        below.scatter(values[i], i + spread, s=dot_size(len(spread)) + 2, color=colour, **DOTS)
        below.hlines(i, quartiles[0, i], quartiles[2, i], color="0.15", linewidth=2.5)
        below.plot(quartiles[1, i], i, "o", color="white", markeredgecolor="0.15", markersize=6)
    above.set_title(f"mean of $\\log p(x)$ minus ELBO: ${means.sum():.2f}$ nats", fontsize=9)
    above.set(yticks=[], ylim=(-0.45, 0.45))
    above.spines["left"].set_visible(False)
    below.axvline(0, zorder=0, **GUIDE)
    ticks = [f"{name}\nmean ${mean:.2f}$ nats" for name, mean in zip(names, means, strict=True)]
    below.set_yticks(range(3), ticks)
    below.set(ylim=(2.5, -0.5), xlabel="nats, each row (○ median, bar: middle half)")
    return figure


@styled
def worst_rows(
    originals: np.ndarray,
    decoded: np.ndarray,
    rows: Sequence[int],
    pareto_k: np.ndarray,
    gap: np.ndarray,
    title: str = "",
) -> Figure:
    """Rows (N, *shape), each beside its reconstruction, with its number and its errors.

    Args:
        rows: their numbers in the data.
        pareto_k: (N,).
        gap: (N,) amortization gap, nats; NaN if it is unknown.
    """
    sizes = zip(rows, pareto_k, gap, strict=True)
    labels = [
        f"row {row}\nk = {k:.2f}" + ("" if np.isnan(nats) else f", gap {nats:.1f}")
        for row, k, nats in sizes
    ]
    return tiles.image_grid(np.stack([originals, decoded], axis=1), title, labels)


@styled
def sandwich(estimators: Sequence[tuple[str, float, float, str]], title: str = "") -> Figure:
    """Estimates of the mean log p(x) on simulated data from below (▷) and from above (◁).

    Args:
        estimators: (name, mean, standard error, "lower" or "upper"), drawn from the top down.
    """
    figure = new_figure(6.6, 0.32 * len(estimators) + 1.3, title)
    axes = figure.add_subplot()
    colours, labelled = {"lower": TRAIN, "upper": VALIDATION}, set()
    for i, (_, mean, error, kind) in enumerate(estimators):
        label = None if kind in labelled else f"{kind} bounds"
        labelled.add(kind)
        look: Any = {"fmt": ">" if kind == "lower" else "<", "color": colours[kind], "capsize": 3}
        axes.errorbar(mean, i, xerr=2 * error, label=label, **look)
        text = f"${mean:.2f} \\pm {2 * error:.2f}$"
        axes.text(1.02, i, text, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(estimators)), [short(name, 40) for name, *_ in estimators])
    axes.set_ylim(len(estimators) - 0.5, -0.5)
    axes.set_xlabel("mean, nats, ± 2 standard errors")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def chains_against_guide(
    guide_mean: np.ndarray,
    guide_scale: np.ndarray,
    chain_mean: np.ndarray,
    chain_scale: np.ndarray,
    title: str = "",
) -> Figure:
    """Mean ± 2 standard deviations of each latent under q(z|x) and by NUTS, for some rows.

    Args:
        guide_mean, guide_scale, chain_mean, chain_scale: (B, Z).
    """
    count, latent_dim = guide_mean.shape
    columns = 3 if latent_dim <= 8 else 2 if latent_dim <= 20 else 1
    width = max(2.2, 0.3 * latent_dim)
    shape: Any = {"most": MOST_ROWS, "columns": columns, "width": width}
    names, labels = [f"row {i + 1}" for i in range(count)], ("latent", "mean ± 2 sd")
    figure, grid = panels(names, title, *labels, sharex=True, sharey=True, **shape)
    places = np.arange(1, latent_dim + 1)
    for i, axes in enumerate(grid):
        axes.axhline(0, zorder=0, **GUIDE)
        for label, shift, mean, scale, colour, marker in (
            ("guide", -0.17, guide_mean, guide_scale, TRAIN, "o"),
            ("NUTS", 0.17, chain_mean, chain_scale, VALIDATION, "s"),
        ):
            look: Any = {"fmt": marker, "color": colour, **INTERVAL}
            axes.errorbar(places + shift, mean[i], 2 * scale[i], label=label, **look)
        axes.set_xlim(0.4, latent_dim + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center")
    return figure


@styled
def predictive_checks(
    observed: np.ndarray,
    replicated_mean: np.ndarray,
    replicated_scale: np.ndarray,
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Statistics of each row against its replicates ± 2 sd, in red if it lies outside.

    Args:
        observed, replicated_mean, replicated_scale: (B, T).
    """
    inside = np.abs(observed - replicated_mean) <= 2 * replicated_scale
    notes = [f"{100 * share:.0f}% within 2 sd" for share in inside.mean(0)]
    figure, grid = panels(names, title, "replicated", "observed", notes=notes, columns=4)
    for j, axes in enumerate(grid):
        for k, colour in ((inside[:, j], TRAIN), (~inside[:, j], VALIDATION)):
            look: Any = {"fmt": "o", "color": colour, "xerr": 2 * replicated_scale[k, j], **THIN}
            axes.errorbar(replicated_mean[k, j], observed[k, j], **look)
        axes.axline((observed[0, j], observed[0, j]), slope=1, linestyle="--", **GUIDE)
        axes.ticklabel_format(scilimits=(-3, 4))
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_offset_text().set_fontsize(7)
    return figure


@styled
def aggregate_posterior(
    prior_draws: np.ndarray, aggregate_draws: np.ndarray, title: str = ""
) -> Figure:
    """Draws from the aggregate posterior, the mean of q(z|x) over the data, and from p(z).

    More than two latents are projected onto the first two principal axes of the aggregate draws,
    beside the standard deviation of each latent.

    Args:
        prior_draws: (N, Z).
        aggregate_draws: (M, Z).
    """
    latent_dim = prior_draws.shape[1]
    sets = (("prior $p(z)$", prior_draws, "0.55"), ("aggregate posterior", aggregate_draws, TRAIN))
    many = latent_dim > 2
    figure = new_figure(7.2 if many else 4.4, 4.0, title)
    axes, *others = figure.subplots(1, 2 if many else 1, squeeze=False)[0]
    if latent_dim == 1:
        edges = np.histogram_bin_edges(np.concatenate([prior_draws, aggregate_draws]), 40)
        for label, draws, colour in sets:
            axes.hist(draws[:, 0], edges, density=True, color=colour, alpha=0.5, label=label)
        axes.set(xlabel="$z_1$", ylabel="density")
    else:
        centre, directions, names = np.zeros(latent_dim), np.eye(2), ["$z_1$", "$z_2$"]
        if many:
            centre = aggregate_draws.mean(0)
            _, lengths, directions = np.linalg.svd(aggregate_draws - centre, full_matrices=False)
            shares = 100 * lengths**2 / max((lengths**2).sum(), 1e-300)
            names = [f"principal axis {j + 1} of the aggregate ({shares[j]:.0f}%)" for j in (0, 1)]
        for label, draws, colour in sets:
            points = (draws - centre) @ directions[:2].T
            axes.scatter(*points.T, s=dot_size(len(points)) + 1, color=colour, label=label, **DOTS)
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.set_aspect("equal", adjustable="datalim")
    for bars in others:
        bars.bar(np.arange(1, latent_dim + 1), aggregate_draws.std(0), color=TRAIN)
        bars.axhline(1, linestyle="--", **GUIDE)
        bars.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        bars.set(xlim=(0.3, latent_dim + 0.7), xlabel="latent")
        bars.set_ylabel("standard deviation of the aggregate")
    figure.legend(loc="outside lower center", ncols=2, markerscale=2)
    return figure
