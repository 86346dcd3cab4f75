"""Figures of a run, and the style that all figures share: arrays in, matplotlib Figure out.

Images come as arrays (..., C, H, W) of intensities in [0, 1]; rows of tables as (..., D), drawn as
profiles. `save` and `svg` write a figure.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE: Any = {
    "font.size": 9,
    "figure.labelsize": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "legend.frameon": False,
    "savefig.dpi": 200,
}
# Without interpolation an SVG holds the pixels unchanged.
TILES: Any = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "none"}
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

styled = matplotlib.rc_context(STYLE)  # decorates a function that draws

Curve = tuple[str, str, Sequence[dict[str, Any]], str]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def svg(figure: Figure) -> str:
    """A figure as SVG text for a page, with the page's background, colour and font.

    Figures on one page share the identifiers of equal parts.
    """
    buffer = io.StringIO()
    style = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": "pyro_vae"}
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font may have it
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub("(stroke|fill): #(?:000000|666666)", r"\1: currentColor", text)
    return re.sub('<g id="[^"]*"', "<g", text[text.index("<svg") :])


def plain(text: str) -> str:
    """Escape user-supplied text: matplotlib parses `$` as mathematics and hides labels in `_`."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def short(text: str, most: int) -> str:
    """At most `most` characters of user-supplied text, escaped."""
    return plain(text if len(text) <= most else f"{text[: most - 1]}…")


def new_figure(
    width: float, height: float, title: str = "", shown: int = 0, count: int = 0
) -> Figure:
    """An empty figure, size in inches. The title states how many of `count` things are shown."""
    figure = Figure(figsize=(width, height), layout="constrained")
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


def image_grid(values: np.ndarray, title: str = "") -> Figure:
    """A grid of images or profiles: (rows, columns, *shape)."""
    rows, columns = values.shape[:2]
    figure = new_figure(0.65 * columns + 0.4, 0.65 * rows * _aspect(values) + 0.6, title)
    _draw_tiles(figure, values)
    return figure


def reconstructions(originals: np.ndarray, decoded: np.ndarray, title: str = "") -> Figure:
    """Originals (N, *shape) in odd rows, each with its reconstruction below it."""
    columns = min(len(originals), 12 if originals.ndim == 4 else 6)
    pairs = np.stack([in_rows(originals, columns), in_rows(decoded, columns)], axis=1)
    values = pairs.reshape(-1, *pairs.shape[2:])
    labels = ["original", "decoded"] * len(pairs)
    height = 0.65 * len(values) * _aspect(values) + 0.6
    figure = new_figure(0.65 * columns + 1.2, height, title)
    _draw_tiles(figure, values, labels)
    return figure


def manifold(values: np.ndarray, quantiles: np.ndarray, title: str = "") -> Figure:
    """Decoded grid of a 2-D latent space.

    Args:
        values: (n, n, *shape): rows follow the second latent, upwards; columns the first.
        quantiles: (n,) of the prior, the points of the grid.
    """
    side = len(quantiles)
    if values.ndim != 5:
        return image_grid(values[::-1], title)
    figure = new_figure(6.5, 6.5 * _aspect(values) + 0.5)
    axes = figure.add_subplot()
    axes.set_title(title)
    mosaic = _mosaic(values[::-1], gap=1)
    axes.imshow(mosaic, **TILES, extent=(0, side, 0, side), aspect="auto")
    ticks = np.unique(np.linspace(0, side - 1, 5).round().astype(int))
    for axis, name in ((axes.xaxis, "$z_1$"), (axes.yaxis, "$z_2$")):
        axis.set_ticks(ticks + 0.5, [f"{quantiles[i]:.2f}" for i in ticks])
        axis.set_label_text(f"{name}, quantile of the prior")
    return figure


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
    figure = new_figure(10.1, 3.2)
    for axes, term in zip(figure.subplots(1, len(TERMS)), TERMS, strict=True):
        runs = enumerate(histories.items())
        curves = [(plain(run), f"C{k}", lines, f"validation_{term}") for k, (run, lines) in runs]
        _draw_curves(axes, term, row, curves)
    handles = figure.axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, len(histories)))
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


def in_rows(values: np.ndarray, columns: int = 0) -> np.ndarray:
    """(N, *shape) → (rows, columns, *shape), padded with NaN, which is not drawn.

    By default there are about as many rows as columns.
    """
    columns = columns or math.ceil(math.sqrt(len(values)))
    rows = -(-len(values) // columns)
    filled = np.full((rows * columns, *values.shape[1:]), np.nan, dtype=np.float32)
    filled[: len(values)] = values
    return filled.reshape(rows, columns, *values.shape[1:])


def _aspect(values: np.ndarray) -> float:
    """Height over width of one tile."""
    return values.shape[-2] / values.shape[-1] if values.ndim == 5 else 1.0


def _mosaic(values: np.ndarray, gap: int) -> np.ndarray:
    """(rows, columns, C, H, W) → one image: (height, width), NaN in the gaps, or RGBA."""
    rows, _, channels, height, _ = values.shape
    room = [(0, 0)] * 3 + [(0, gap)] * 2
    padded = np.pad(values.astype(float), room, constant_values=np.nan)
    sheet = padded.transpose(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    sheet = sheet[:-gap, :-gap]
    if channels == 1:
        return sheet[..., 0]
    opaque = np.isfinite(sheet[..., :1]).astype(float)
    return np.concatenate([np.nan_to_num(sheet).clip(0, 1), opaque], axis=-1)


def _draw_tiles(figure: Figure, values: np.ndarray, row_labels: Sequence[str] = ()) -> None:
    rows, columns = values.shape[:2]
    if values.ndim == 5:
        height, width = values.shape[-2:]
        gap = max(1, round(min(height, width) / 14))
        axes = figure.add_subplot()
        axes.imshow(_mosaic(values, gap), **TILES)
        axes.set_xticks([])
        centres = [i * (height + gap) + height / 2 - 0.5 for i in range(rows)] if row_labels else []
        axes.set_yticks(centres, row_labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    for i in range(rows):
        for j in range(columns):
            axes = figure.add_subplot(rows, columns, i * columns + j + 1)
            axes.plot(values[i, j], color=TRAIN, linewidth=0.8)
            axes.set_ylim(low, high + 1e-9)
            axes.set_xticks([])
            axes.set_yticks([])
            if row_labels and j == 0:
                axes.set_ylabel(row_labels[i], fontsize=7)
