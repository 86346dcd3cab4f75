"""Figures of a search, read back from their artists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import same_color

from pyro_vae.plots.run import GREY, TRAIN, VALIDATION
from pyro_vae.plots.search import search_curves, search_history, search_settings

NUMBERS = [0, 1, 3, 4, 6]
ELBOS = [-90.0, -85.0, -80.0, -83.0, -5000.0]
COMPLETE = [True, True, False, True, False]


def dots(axes: Any) -> dict[str, list]:
    """Places and values of the dots by their kind. Those below the axis are triangles."""
    names = ("complete", "below, complete", "pruned or failed", "below")
    assert [c.get_label() for c in axes.collections][::2] == [names[0], names[2]]
    return {
        name: [tuple(map(float, point)) for point in c.get_offsets()]
        for name, c in zip(names, axes.collections, strict=True)
    }


def test_history_shows_each_trial_and_the_best_complete_one():
    figure = search_history(NUMBERS, ELBOS, COMPLETE, "image")
    (axes,) = figure.axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == NUMBERS
    assert list(line.get_ydata()) == [-90, -85, -85, -83, -83]
    low = axes.get_ylim()[0]
    found = dots(axes)
    assert found["complete"] == [(0, -90), (1, -85), (4, -83)]
    assert found["pruned or failed"] == [(3, -80)]
    ((place, end),) = found["below"]
    assert place == 6
    assert low < end < -90
    assert found["below, complete"] == []
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["best so far", "complete", "pruned or failed", "below the axis"]
    assert axes.get_xlabel() == "trial"
    assert axes.get_ylabel() == "validation ELBO, nats per image"
    assert len(axes.collections[0].get_facecolor()) == 1
    assert len(axes.collections[2].get_facecolor()) == 0, "hollow"
    others = search_history(NUMBERS[:-1], ELBOS[:-1], COMPLETE[:-1]).legends[0].get_texts()
    assert [text.get_text() for text in others] == shown[:-1]


def test_settings_have_a_panel_each():
    settings = {"rate": [0.1, 0.01, 0.2, 0.001, 1.0], "hidden": ["9 8", "7", "9 8", "7", "9 8"]}
    figure = search_settings(settings, {"hidden": ["5", "9 8", "7"]}, ["rate"], ELBOS, COMPLETE)
    rate, hidden = figure.axes
    assert [axes.get_title() for axes in (rate, hidden)] == ["rate", "hidden"]
    assert (rate.get_xscale(), hidden.get_xscale()) == ("log", "linear")
    np.testing.assert_allclose(rate.get_xticks(), [0.001, np.sqrt(0.001), 1.0])
    assert dots(rate)["complete"] == [(0.1, -90), (0.01, -85), (0.001, -83)]
    assert dots(rate)["pruned or failed"] == [(0.2, -80)]
    assert dots(hidden)["complete"] == [(1, -90), (2, -85), (2, -83)]
    assert [text.get_text() for text in hidden.get_xticklabels()] == ["5", "9 8", "7"]
    assert figure.get_supylabel() == "ELBO, nats per row"


@pytest.mark.parametrize("complete", [[True, True, False], [False, False, False]])
def test_curves_mark_the_best_complete_trial(complete):
    curves = [[-9.0, -6.0, -7.0], [-8.0, -6.5], [-5.0]]
    figure = search_curves(curves, complete)
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == curves
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3], [1, 2], [1]]
    colours = [VALIDATION, TRAIN, GREY] if complete[0] else [GREY] * 3
    for line, colour in zip(axes.lines, colours, strict=True):
        assert same_color(line.get_color(), colour)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == (["best", "complete"] if complete[0] else []) + ["pruned or failed"]
