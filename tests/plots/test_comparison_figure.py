"""The picture of paired differences shows what the intervals say."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_hex

from pyro_vae.plots.comparison import MOST_PAIRS, difference_intervals
from pyro_vae.plots.run import GREY, TRAIN, VALIDATION


def test_intervals_stand_at_their_pairs_in_the_colour_of_their_verdict():
    numbers = np.array([[2.0, 1.0, 3.0], [0.5, -1.0, 2.0], [np.nan] * 3, [-2.0, -3.0, -1.0]])
    names = ["a - b", "a - $c$", "b - c", "method 1 - method 2"]
    figure = difference_intervals(names, {"ELBO": numbers}, [False, False, False, True])
    (axes,) = figure.axes
    figure.canvas.draw()
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["a - b", r"a - \$c\$", "b - c", "method 1 - method 2"]
    assert axes.get_ylim() == (3.5, -0.5)  # the first on top
    lines = axes.get_lines()[:-1]
    colours = [to_hex(line.get_color()) for line in lines[::2]]
    assert [colours[0], colours[1], colours[3]] == [TRAIN, to_hex(GREY), VALIDATION]
    for k in (0, 1, 3):
        assert list(lines[2 * k].get_xdata()) == [numbers[k, 1], numbers[k, 2]]
        assert list(lines[2 * k].get_ydata()) == [k, k]
        assert list(lines[2 * k + 1].get_xdata()) == [numbers[k, 0]]
    assert [line.get_marker() for line in lines[1::2]] == ["o", "o", "o", "s"]


def test_many_pairs_are_cut_and_said():
    count = MOST_PAIRS + 5
    figure = difference_intervals(["pair"] * count, {"KL": np.ones((count, 3))}, [False] * count)
    assert f"{MOST_PAIRS} of {count} shown" in figure.get_suptitle()
    assert len(figure.axes[0].get_yticks()) == MOST_PAIRS
