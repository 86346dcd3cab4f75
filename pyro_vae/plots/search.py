"""Figures of a search: numbers in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .run import GREY, TRAIN, VALIDATION, new_figure, panels, short, styled

# Of the figures, from the highest ELBO down: this many times its distance to the median.
REACH = 4.0


@styled
def search_history(
    numbers: Sequence[int], elbos: Sequence[float], complete: Sequence[bool], row: str = "row"
) -> Figure:
    """Validation ELBO by trial, and the best one so far.

    Args:
        numbers: of the trials, ascending.
        elbos: the best validation ELBO of each, nats per row.
        complete: whether it was trained to the end. Only such a trial can be the best.
        row: the word for a datum.
    """
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    values, done = np.asarray(elbos), np.asarray(complete, bool)
    best = np.fmax.accumulate(np.where(done, values, np.nan))
    axes.step(numbers, best, where="post", color=VALIDATION, label="best so far")
    below = _draw_trials(axes, np.asarray(numbers, float), values, done)
    axes.set(xlabel="trial", ylabel=f"validation ELBO, nats per {row}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes, below)
    return figure


@styled
def search_settings(
    settings: Mapping[str, Sequence[Any]],
    choices: Mapping[str, Sequence[str]],
    log: Sequence[str],
    elbos: Sequence[float],
    complete: Sequence[bool],
    row: str = "row",
) -> Figure:
    """Validation ELBO by the value of each searched setting.

    Args:
        settings: values by name, one for each trial: numbers, or texts of choices.
        choices: those texts in their order, of settings that are no numbers.
        log: names of the settings on a logarithmic axis.
        elbos, complete, row: see `search_history`.
    """
    figure, grid = panels([*settings], "", "", f"ELBO, nats per {row}", columns=3, sharey=True)
    values, done = np.asarray(elbos), np.asarray(complete, bool)
    below = False
    for axes, (name, column) in zip(grid, settings.items(), strict=False):
        texts = choices.get(name)
        if texts is not None:
            column = [texts.index(text) for text in column]
            axes.set_xticks(range(len(texts)), [short(t, 14) for t in texts], rotation=20)
            axes.set_xlim(-0.5, len(texts) - 0.5)
        elif name in log:
            axes.set_xscale("log")
            ticks = np.geomspace(min(column), max(column), 3)
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.minorticks_off()
        below = _draw_trials(axes, np.asarray(column, float), values, done)
    _legend(figure, grid[0], below)
    return figure


@styled
def search_curves(
    curves: Sequence[Sequence[float]], complete: Sequence[bool], row: str = "row"
) -> Figure:
    """Validation ELBO by epoch, a line for each trial; that of the best in another colour.

    Args:
        curves: validation ELBO of each epoch, nats per row, of each trial.
        complete, row: see `search_history`.
    """
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    done = np.asarray(complete, bool)
    best = max(
        (i for i in range(len(curves)) if done[i]), key=lambda i: max(curves[i]), default=None
    )
    for i, curve in enumerate(curves):
        style: Any = {"color": TRAIN if done[i] else GREY, "linewidth": 0.9, "zorder": 2 + done[i]}
        if i == best:
            style = {"color": VALIDATION, "linewidth": 1.8, "zorder": 4}
        label = "best" if i == best else "complete" if done[i] else "pruned or failed"
        axes.plot(range(1, len(curve) + 1), curve, label=label, **style)
    ends = np.asarray([max(curve) for curve in curves])
    _scale(axes, ends, done)
    axes.set(xlabel="epoch", ylabel=f"validation ELBO, nats per {row}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    one_each = dict(zip(labels, handles, strict=True))
    figure.legend(
        one_each.values(), one_each.keys(), loc="outside lower center", ncols=len(one_each)
    )
    return figure


def _draw_trials(axes: Axes, places: np.ndarray, values: np.ndarray, done: np.ndarray) -> bool:
    """A dot for each trial; one below the axis is a triangle at its lower end.

    Returns:
        Whether any trial is a triangle.
    """
    low = _scale(axes, values, done)
    for chosen, label, face in ((done, "complete", TRAIN), (~done, "pruned or failed", "none")):
        style: Any = {"facecolors": face, "edgecolors": TRAIN, "linewidths": 0.8, "zorder": 3}
        inside, below = chosen & (values >= low), chosen & (values < low)
        axes.scatter(places[inside], values[inside], s=16, label=label, **style)
        axes.scatter(places[below], np.full(below.sum(), low), s=16, marker="v", **style)
    return bool((values < low).any())


def _legend(figure: Figure, axes: Axes, below: bool) -> None:
    """The legend of a figure of trials; `below`: whether some are triangles."""
    handles, labels = axes.get_legend_handles_labels()
    if below:
        handles.append(Line2D([], [], color=GREY, marker="v", markersize=4, linestyle=""))
        labels.append("below the axis")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _scale(axes: Axes, values: np.ndarray, done: np.ndarray) -> float:
    """Limit the axis of ELBOs so that poor trials do not flatten the others; its lower end."""
    shown = values[done] if done.any() else values
    high, middle = shown.max(), np.median(shown)
    reach = max(REACH * (high - middle), 1e-3 * abs(high), 1e-6)
    low = max(values.min(), high - reach)
    margin = 0.06 * max(high - low, reach / REACH)
    axes.set_ylim(low - margin, high + margin)
    axes.grid(alpha=0.25)
    return float(low)
