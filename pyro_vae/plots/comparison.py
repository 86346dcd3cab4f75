"""Figures of paired differences: numbers in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .run import GREY, GUIDE, TRAIN, VALIDATION, new_figure, short, styled

MOST_PAIRS = 30


@styled
def difference_intervals(
    pairs: Sequence[str], measures: Mapping[str, np.ndarray], over_seeds: Sequence[bool]
) -> Figure:
    """A panel for each measure, a line for each pair: mean difference and interval.

    Args:
        pairs: names of the pairs, as in "a − b".
        measures: title of each panel → (P, 3) estimates and ends of the intervals; NaN is missing.
        over_seeds: whether a pair is one of methods, whose interval is over seeds. Of both kinds,
            intervals that include 0 are grey.
    """
    shown = min(len(pairs), MOST_PAIRS)
    figure = new_figure(
        2.2 * len(measures) + 1.6, 0.24 * shown + 1.2, shown=shown, count=len(pairs)
    )
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for each, (title, numbers) in zip(axes, measures.items(), strict=True):
        for k, (estimate, low, high) in enumerate(numbers[:shown]):
            excludes = low > 0 or high < 0
            colour = (VALIDATION if over_seeds[k] else TRAIN) if excludes else GREY
            marker = "s" if over_seeds[k] else "o"
            each.plot([low, high], [k, k], color=colour, linewidth=2)
            each.plot(estimate, k, marker, color=colour, markersize=5)
        each.axvline(0, zorder=0, **GUIDE)
        each.set_title(title)
        each.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(shown), [short(name, 50) for name in pairs[:shown]])
    axes[0].set_ylim(shown - 0.5, -0.5)
    return figure
