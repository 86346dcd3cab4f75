"""Figures of the columns of a table: numbers in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .run import TRAIN, VALIDATION, panels, short, styled

MOST_BARS = 12


@styled
def column_distributions(
    observed: np.ndarray,
    replicated: np.ndarray,
    names: Sequence[str],
    categories: Sequence[Sequence[str]],
    notes: Sequence[str],
    title: str = "",
) -> Figure:
    """The distribution of each column in rows and in draws from the model.

    Args:
        observed, replicated: (B, D); NaN is missing.
        names: of the columns.
        categories: of each column, empty for numbers. The shares of the first are drawn as bars,
            numbers as distribution functions.
        notes: one for each column.
    """
    figure, grid = panels(names, title, "", "share", notes=notes, columns=4)
    sets = (("data", observed, TRAIN, -0.2), ("draws", replicated, VALIDATION, 0.2))
    for j, axes in enumerate(grid):
        for label, values, colour, shift in sets:
            column = values[~np.isnan(values[:, j]), j]
            if categories[j]:
                shown = categories[j][:MOST_BARS]
                shares = [(column == code).mean() for code in range(len(shown))]
                places = np.arange(len(shown))
                axes.bar(places + shift, shares, 0.4, color=colour, label=label)
                axes.set_xticks(places, [short(text, 8) for text in shown], rotation=30, fontsize=6)
            else:
                levels = (np.arange(len(column)) + 1) / len(column)
                axes.step(np.sort(column), levels, color=colour, label=label, where="post")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
