"""Results → matplotlib figures. Nothing here knows a model, draws at random or writes a file.

Images come as arrays (..., C, H, W) of intensities in [0, 1]; rows of tables as (..., D), drawn as
profiles. `save` writes a figure as PNG.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "Plane",
    "compare_curves",
    "elbo_curves",
    "image_grid",
    "in_rows",
    "interpolations",
    "latent_scatter",
    "manifold",
    "plain",
    "reconstructions",
    "save",
    "svg",
]

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "legend.frameon": False,
    "savefig.dpi": 200,
}
# With no interpolation an SVG holds the very pixels.
TILES: Any = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "none"}
TRAIN, VALIDATION = "#2a6f97", "#d1495b"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def svg(figure: Figure) -> str:
    """A figure as SVG text to stand in a page, on its ground and in its ink and font.

    The identifiers in it are made of what they name, so figures may share those of equal things.
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


def image_grid(values: np.ndarray, title: str = "") -> Figure:
    """A grid of images or profiles: (rows, columns, *shape)."""
    rows, columns = values.shape[:2]
    figure = _figure(0.65 * columns + 0.4, 0.65 * rows * _aspect(values) + 0.6)
    figure.suptitle(title)
    _draw_tiles(figure, values)
    return figure


def reconstructions(originals: np.ndarray, decoded: np.ndarray, title: str = "") -> Figure:
    """Originals (N, *shape) in odd rows, each with its reconstruction below it."""
    columns = min(len(originals), 12 if originals.ndim == 4 else 6)
    pairs = np.stack([in_rows(originals, columns), in_rows(decoded, columns)], axis=1)
    values = pairs.reshape(-1, *pairs.shape[2:])
    labels = ["original", "decoded"] * len(pairs)
    figure = _figure(0.65 * columns + 1.2, 0.65 * len(values) * _aspect(values) + 0.6)
    figure.suptitle(title)
    _draw_tiles(figure, values, labels)
    return figure


def interpolations(values: np.ndarray, title: str = "") -> Figure:
    """Rows of decoded points between two images: (rows, steps, *shape), ends included."""
    return image_grid(values, title)


def manifold(values: np.ndarray, quantiles: np.ndarray, title: str = "") -> Figure:
    """Decoded grid of a 2-D latent space.

    Args:
        values: (n, n, *shape): rows follow the second latent, upwards; columns the first.
        quantiles: (n,), the prior's quantiles at which the grid stands.
    """
    side = len(quantiles)
    if values.ndim != 5:
        return image_grid(values[::-1], title)
    figure = _figure(6.5, 6.5 * _aspect(values) + 0.5)
    axes = figure.add_subplot()
    axes.set_title(title)
    mosaic = _mosaic(values[::-1], gap=1)
    axes.imshow(mosaic, **TILES, extent=(0, side, 0, side), aspect="auto")
    ticks = np.unique(np.linspace(0, side - 1, 5).round().astype(int))
    for axis, name in ((axes.xaxis, "$z_1$"), (axes.yaxis, "$z_2$")):
        axis.set_ticks(ticks + 0.5, [f"{quantiles[i]:.2f}" for i in ticks])
        axis.set_label_text(f"{name}, quantile of the prior")
    return figure


def elbo_curves(history: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """ELBO, reconstruction and KL over epochs, for train and validation.

    Args:
        history: lines of metrics.jsonl. An autoencoder's, whose ELBO is None, shows the
            reconstruction alone.
    """
    epochs = [line["epoch"] for line in history]
    panels = [
        ("ELBO", "train_elbo", "validation_elbo"),
        ("reconstruction  $E_q[\\log p(x|z)]$", "reconstruction", "validation_reconstruction"),
        ("KL$(q(z|x)\\,\\|\\,p(z))$", "kl", "validation_kl"),
    ]
    panels = [panel for panel in panels if history[-1][panel[1]] is not None]
    with matplotlib.rc_context(STYLE):
        figure = _figure(3.3 * len(panels) + 0.2, 3.0)
        figure.suptitle(title)
        for i, (name, train, validation) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            marker = "o" if len(epochs) == 1 else None
            for key, colour, label in (
                (train, TRAIN, "train"),
                (validation, VALIDATION, "validation"),
            ):
                axes.plot(
                    epochs,
                    [line[key] for line in history],
                    color=colour,
                    label=label,
                    marker=marker,
                )
            axes.set_title(name)
            axes.set_xlabel("epoch")
            axes.set_ylabel("nats per image")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
            if name.startswith(("ELBO", "rec")):
                _focus(axes, [line[key] for line in history for key in (train, validation)])
        figure.axes[0].legend(loc="lower right")
    return figure


def compare_curves(histories: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Validation ELBO, reconstruction and KL over epochs, a line for each run.

    Args:
        histories: lines of metrics.jsonl by the run's name.
    """
    panels = [
        ("ELBO", "validation_elbo"),
        ("reconstruction  $E_q[\\log p(x|z)]$", "validation_reconstruction"),
        ("KL$(q(z|x)\\,\\|\\,p(z))$", "validation_kl"),
    ]
    with matplotlib.rc_context(STYLE):
        figure = _figure(10.1, 3.2)
        for i, (name, key) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            shown: list[float] = []
            for k, (run, history) in enumerate(histories.items()):
                lines = [line for line in history if line[key] is not None]
                values = [line[key] for line in lines]
                epochs = [line["epoch"] for line in lines]
                marker = "o" if len(epochs) == 1 else None
                axes.plot(epochs, values, color=f"C{k}", label=plain(run), marker=marker)
                shown += values
            axes.set_title(name)
            axes.set_xlabel("epoch")
            axes.set_ylabel("nats per image")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
            if key != "validation_kl" and shown:
                _focus(axes, shown)
        handles = figure.axes[1].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(4, len(histories)))
    return figure


@dataclass(frozen=True)
class Plane:
    """Points (N, 2) in a plane, and what its two axes are."""

    points: np.ndarray
    first: str
    second: str


def latent_scatter(
    planes: Sequence[Plane], labels: np.ndarray | None, class_names: Sequence[str], title: str = ""
) -> Figure:
    """Latent means, the same points in one or more planes.

    Args:
        planes: the points' coordinates.
        labels: (N,) indices into `class_names`, or None.
        class_names: one for each label.
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure(5.2 * len(planes) + 1.2, 5.2)
        figure.suptitle(title)
        few = labels is not None and len(class_names) <= 20
        for i, plane in enumerate(planes):
            axes = figure.add_subplot(1, len(planes), i + 1)
            axes.set_xlabel(plane.first)
            axes.set_ylabel(plane.second)
            axes.set_aspect("equal", adjustable="datalim")
            axes.grid(alpha=0.2)
            style: dict[str, Any] = {
                "s": float(np.clip(8000 / len(plane.points), 3, 18)),
                "alpha": 0.8,
                "linewidths": 0,
            }
            if labels is None:
                axes.scatter(*plane.points.T, color=TRAIN, **style)
            elif few:
                colours = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20"]
                for k, name in enumerate(class_names):
                    chosen = plane.points[labels == k]
                    axes.scatter(*chosen.T, color=colours(k), label=name, **style)
            else:
                drawn = axes.scatter(
                    plane.points[:, 0], plane.points[:, 1], c=labels, cmap="turbo", **style
                )
        if few:
            handles = figure.axes[0].get_legend_handles_labels()
            legend = figure.legend(*handles, loc="outside right center")
            for handle in legend.legend_handles:
                handle.set_sizes([30.0])  # type: ignore[union-attr]
        elif labels is not None:
            figure.colorbar(drawn, ax=figure.axes, label=f"label (of {len(class_names)})")
    return figure


def plain(text: str) -> str:
    """Text of a user's as it stands: no mathematics in it, no underscore that hides a label."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def in_rows(values: np.ndarray, columns: int) -> np.ndarray:
    """(N, *shape) → (rows, columns, *shape), filled up with NaN, which is drawn as nothing."""
    rows = -(-len(values) // columns)
    filled = np.full((rows * columns, *values.shape[1:]), np.nan, dtype=np.float32)
    filled[: len(values)] = values
    return filled.reshape(rows, columns, *values.shape[1:])


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _aspect(values: np.ndarray) -> float:
    """Height over width of one tile."""
    return values.shape[-2] / values.shape[-1] if values.ndim == 5 else 1.0


def _focus(axes: Any, values: Sequence[float]) -> None:
    """Let the first epochs leave the frame where they would flatten all that follows."""
    low, high = np.percentile(values, [10, 100])
    if np.min(values) < low - 3 * (high - low):
        axes.set_ylim(low - 0.6 * (high - low), high + 0.08 * (high - low))


def _mosaic(values: np.ndarray, gap: int) -> np.ndarray:
    """(rows, columns, C, H, W) → one image: (height, width), NaN in the gaps, or RGBA."""
    rows, columns, channels, height, width = values.shape
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    sheet = np.full(shape, np.nan)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = np.moveaxis(values[i, j], 0, -1)
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
