"""Figures of a run, and the style that all figures share: arrays in, matplotlib Figure out.

`save`, `save_all` and `svg` write a figure. Figures are made and drawn with matplotlib's defaults
and `STYLE`. The user's matplotlibrc and style have no effect: they may need LaTeX or fonts that are
missing, or turn images upside down.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style as style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runtime.files import printable

STYLE: Any = {
    "font.size": 9,
    "figure.labelsize": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "pyro_vae",
}
TRAIN, VALIDATION = "#2a6f97", "#d1495b"
GREY = "0.72"
GUIDE: Any = {"color": "0.35", "linewidth": 0.7}
DOTS: Any = {"alpha": 0.5, "linewidths": 0}
MOST_PANELS = 24

# The terms of an ELBO, by their names in metrics.jsonl.
TERMS = {
    "elbo": "ELBO",
    "reconstruction": "reconstruction  $E_q[\\log p(x|z)]$",
    "kl": "KL$(q(z|x)\\,\\|\\,p(z))$",
}

styled = style.context(STYLE, after_reset=True)  # decorates a function that draws

Curve = tuple[str, Any, Sequence[dict[str, Any]], str]


class StyledFigure(Figure):
    """A figure that keeps its style when it is drawn, which makes more ticks and finds fonts."""

    draw = styled(Figure.draw)
    savefig = styled(Figure.savefig)


def save_all(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write figures as FOLDER/NAME.png.

    A figure that cannot be written, since the disk is full or a font damaged, is left out with a
    warning. An earlier file of its name is removed, which would show something else.
    """
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        try:
            save(figure, path)
        except (OSError, MemoryError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"the picture {path} is missing: {reason}", stacklevel=2)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def svg(figure: Figure) -> str:
    """A figure as SVG text for a page, with the page's background, colour and font.

    Figures on one page share the identifiers of equal parts.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font may have it
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub("(stroke|fill): #(?:000000|666666)", r"\1: currentColor", text)
    return re.sub('<g id="[^"]*"', "<g", text[text.index("<svg") :])


def plain(text: str) -> str:
    """Escape user-supplied text: matplotlib parses `$` as mathematics and hides labels in `_`."""
    return (" " if text.startswith("_") else "") + printable(text).replace("$", r"\$")


def short(text: str, most: int) -> str:
    """At most `most` characters of user-supplied text, escaped."""
    return plain(text if len(text) <= most else f"{text[: most - 1]}…")


def new_figure(
    width: float, height: float, title: str = "", shown: int = 0, count: int = 0
) -> Figure:
    """An empty figure, size in inches. The title states how many of `count` things are shown."""
    figure = StyledFigure(figsize=(width, height), layout="constrained")
    if shown < count:
        title = f"{title} ({shown} of {count} shown)".strip()
    lines = textwrap.wrap(title, int(12 * width), break_long_words=False, break_on_hyphens=False)
    figure.suptitle("\n".join(lines))
    return figure


def panels(
    names: Sequence[str],
    title: str,
    xlabel: str,
    ylabel: str,
    notes: Sequence[str] = (),
    most: int = MOST_PANELS,
    columns: int = 6,
    width: float = 2.2,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Panels of at most `width` inches for the first `most` names, each titled by name and note."""
    shown = min(len(names), most)
    rows = math.ceil(shown / columns)
    columns = math.ceil(shown / rows)
    whole = min(7.2, max(3.6, width * columns))
    height = min(0.85 * whole / columns, 3.1 if rows < 3 else 1.5) + (0.35 if notes else 0.2)
    figure = new_figure(whole, rows * height + 0.5, title, shown, len(names))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for i, axes in enumerate(grid.flat):
        if i >= shown:
            axes.remove()
            continue
        lines = [short(names[i], int(14 * whole / columns)), *notes[i : i + 1]]
        axes.set_title("\n".join(lines), fontsize=8)
        axes.locator_params(nbins=3 if columns > 3 else 5)
        # Only panels with none below them show the labels of the shared axis.
        axes.tick_params(labelsize=7, labelbottom=not sharex or i + columns >= shown)
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel)
    return figure, list(grid.flat)[:shown]


def dot_size(count: int) -> float:
    """Size of the dots of a scatter plot."""
    return float(np.clip(3000 / count, 2, 12))


@styled
def elbo_curves(history: Sequence[dict[str, Any]], title: str = "", row: str = "row") -> Figure:
    """ELBO, reconstruction and KL over epochs, for train and validation.

    Args:
        history: lines of metrics.jsonl. Without an ELBO, for an autoencoder, only the
            reconstruction is drawn.
        row: the word for a datum.
    """
    keys = {"elbo": "train_elbo", "reconstruction": "reconstruction", "kl": "kl"}
    terms = [term for term in TERMS if history[-1][keys[term]] is not None]
    figure = new_figure(3.3 * len(terms) + 0.2, 3.0, title)
    for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        train = ("train", TRAIN, history, keys[term])
        validation = ("validation", VALIDATION, history, f"validation_{term}")
        _draw_curves(axes, term, row, [train, validation])
    figure.axes[0].legend(loc="lower right")
    return figure


@styled
def compare_curves(histories: Mapping[str, Sequence[dict[str, Any]]], row: str = "row") -> Figure:
    """Validation ELBO, reconstruction and KL over epochs, a line for each run.

    Args:
        histories: lines of metrics.jsonl by the run's name.
        row: the word for a datum.
    """
    count = len(histories)
    figure = new_figure(10.1, min(3.0 + 0.2 * math.ceil(count / 4), 10.0))
    many = matplotlib.colormaps["turbo"]
    colours = [f"C{k}" if count <= 10 else many(k / (count - 1)) for k in range(count)]
    for axes, term in zip(figure.subplots(1, len(TERMS)), TERMS, strict=True):
        runs = zip(histories.items(), colours, strict=True)
        curves = [(short(run, 40), c, lines, f"validation_{term}") for (run, lines), c in runs]
        _draw_curves(axes, term, row, curves)
    handles = figure.axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, count))
    return figure


def _draw_curves(axes: Axes, term: str, row: str, curves: Sequence[Curve]) -> None:
    """Curves (label, colour, lines of metrics.jsonl, key) of a term over epochs."""
    shown: list[float] = []
    for label, colour, history, key in curves:
        lines = [line for line in history if line[key] is not None]
        values = [line[key] for line in lines]
        marker = "o" if len(lines) == 1 else None
        epochs = [line["epoch"] for line in lines]
        axes.plot(epochs, values, color=colour, label=label, marker=marker)
        shown += values
    axes.set(title=TERMS[term], xlabel="epoch", ylabel=f"nats per {row}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if term != "kl" and shown:
        # The first epochs are cut off if they would flatten the others.
        low, high = np.percentile(shown, [10, 100])
        if min(shown) < low - 3 * (high - low):
            axes.set_ylim(low - 0.6 * (high - low), high + 0.08 * (high - low))


@dataclass(frozen=True)
class Plane:
    """Points (N, 2) in a plane, and the names of its two axes."""

    points: np.ndarray
    first: str
    second: str


@styled
def latent_scatter(
    planes: Sequence[Plane], labels: np.ndarray | None, class_names: Sequence[str], title: str = ""
) -> Figure:
    """Latent means, the same points in one or more planes.

    Args:
        planes: the points' coordinates.
        labels: (N,) indices into `class_names`, or None.
        class_names: one for each label.
    """
    figure = new_figure(5.2 * len(planes) + 1.2, 5.2, title)
    dots: Any = {"alpha": 0.8, "linewidths": 0}
    dots["s"] = float(np.clip(8000 / len(planes[0].points), 3, 18))
    few = labels is not None and len(class_names) <= 20
    colours = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    for axes, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
        axes.set(xlabel=plane.first, ylabel=plane.second)
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(alpha=0.2)
        if labels is None:
            axes.scatter(*plane.points.T, color=TRAIN, **dots)
        elif few:
            for k, name in enumerate(class_names):
                axes.scatter(*plane.points[labels == k].T, color=colours(k), label=name, **dots)
        else:
            drawn = axes.scatter(*plane.points.T, c=labels, cmap="turbo", **dots)
    if few:
        handles = figure.axes[0].get_legend_handles_labels()
        legend = figure.legend(*handles, loc="outside right center")
        for handle in legend.legend_handles:
            handle.set_sizes([30.0])  # type: ignore[union-attr]
    elif labels is not None:
        figure.colorbar(drawn, ax=figure.axes, label=f"label (of {len(class_names)})")
    return figure
