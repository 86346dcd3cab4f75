"""Grids of images and of profiles: arrays in, matplotlib Figure out, of bounded size.

Images come as arrays (..., C, H, W) of intensities in [0, 1], sequences as (..., C, T) and rows of
tables as (..., D). Tables are drawn as profiles, curves over the columns, and so are sequences,
with a curve for each channel, and images of at most 3 pixels by many. The values of one-column
tables are the points of a curve along each line of the grid. NaN marks a missing value: a pixel of
the colour `MISSING`, a gap in a profile. A tile of NaN is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run import TRAIN, VALIDATION, new_figure, styled

# Without interpolation an SVG holds the pixels unchanged.
TILES: Any = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "none"}
MISSING = (0.96, 0.7, 0.68)  # light red
CHANNELS = (VALIDATION, "#3a8f4f", TRAIN)

MOST_INCHES = 14.0  # of a grid, in either direction
MOST_ASPECT = 8.0  # of a tile: longer images are drawn shorter
THIN = 3  # pixels across an image that is drawn as curves
DPI = 200


@styled
def image_grid(values: np.ndarray, title: str = "", row_labels: Sequence[str] = ()) -> Figure:
    """A grid of images or profiles: (rows, columns, *shape), with a label for each row."""
    return _grid(values, title, row_labels)


@styled
def reconstructions(originals: np.ndarray, decoded: np.ndarray, title: str = "") -> Figure:
    """Originals (N, *shape) in odd rows, each with its reconstruction below it."""
    most = 12 if originals.ndim == 4 else 6
    columns = len(originals) if _is_column(originals) else min(len(originals), most)
    pairs = np.stack([in_rows(originals, columns), in_rows(decoded, columns)], axis=1)
    labels = ["original", "decoded"] * len(pairs)
    return _grid(pairs.reshape(-1, *pairs.shape[2:]), title, labels)


@styled
def manifold(values: np.ndarray, quantiles: np.ndarray, title: str = "") -> Figure:
    """Decoded grid of a 2-D latent space.

    Args:
        values: (n, n, *shape): rows follow the second latent, upwards; columns the first.
        quantiles: (n,) of the prior, the points of the grid.
    """
    side, images = len(quantiles), _is_images(values)
    scale = _scale(values) if images else 1.0
    width, height = min(6.5, MOST_INCHES / scale), min(max(4.0, 6.5 * scale), MOST_INCHES)
    figure = new_figure(max(4.0, width), height + 0.5, title)
    axes = figure.add_subplot()
    if images:
        small = reduced(values[::-1], int(width * height * (DPI / side) ** 2))
        extent = (0, side, 0, side)
        axes.imshow(_mosaic(small, gap=1), **TILES, extent=extent, aspect="auto")
    else:
        _draw_profiles(axes, values[::-1])
    ticks = np.unique(np.linspace(0, side - 1, 5).round().astype(int))
    upwards = ticks if images else side - 1 - ticks  # profiles count lines downwards
    for axis, name, places in ((axes.xaxis, "$z_1$", ticks), (axes.yaxis, "$z_2$", upwards)):
        axis.set_ticks(places + 0.5, [f"{quantiles[i]:.2f}" for i in ticks])
        axis.set_label_text(f"{name}, quantile of the prior")
    return figure


def in_rows(values: np.ndarray, columns: int = 0) -> np.ndarray:
    """(N, *shape) → (rows, columns, *shape), padded with NaN, which is not drawn.

    By default there are about as many rows as columns, and one row for one-column tables.
    """
    square = math.ceil(math.sqrt(len(values)))
    columns = columns or (len(values) if _is_column(values) else square)
    rows = -(-len(values) // columns)
    filled = np.full((rows * columns, *values.shape[1:]), np.nan, dtype=np.float32)
    filled[: len(values)] = values
    return filled.reshape(rows, columns, *values.shape[1:])


def reduced(values: np.ndarray, most_pixels: int) -> np.ndarray:
    """Images (..., H, W) of about `most_pixels` or fewer, by means of equal blocks.

    Missing pixels do not count; a block is missing if all of its pixels are.
    """
    if np.isnan(values).any():
        known = reduced((~np.isnan(values)).astype(float), most_pixels)
        sums = reduced(np.nan_to_num(values), most_pixels)
        return np.divide(sums, known, out=np.full_like(sums, np.nan), where=known > 0)
    factor = math.sqrt(math.prod(values.shape[-2:]) / most_pixels)
    for axis in (-2, -1) if factor > 1 else ():
        side = values.shape[axis]
        size = side if side <= THIN else max(THIN + 1, round(side / factor))
        starts = np.arange(size) * side // size
        counts = np.diff(starts, append=side).astype(values.dtype)
        sums = np.add.reduceat(values, starts, axis)
        values = sums / (counts if axis == -1 else counts[:, None])
    return values


def _is_column(values: np.ndarray) -> bool:
    """Whether values (N, *shape) are those of a table of one column."""
    return values.shape[1:] == (1,)


def _is_images(values: np.ndarray) -> bool:
    """Whether a grid (rows, columns, *shape) is of images that are no curves."""
    if values.ndim != 5:
        return False
    short, long = sorted(values.shape[-2:])
    return short > THIN or long <= MOST_ASPECT * short


def _scale(values: np.ndarray) -> float:
    """Height over width of the tile of an image."""
    return float(np.clip(values.shape[-2] / values.shape[-1], 1 / MOST_ASPECT, MOST_ASPECT))


def _grid(values: np.ndarray, title: str, row_labels: Sequence[str] = ()) -> Figure:
    """A grid (rows, columns, *shape), with a label for each row."""
    if values.ndim == 3 and values.shape[2] == 1:  # a curve along each row
        values = values.swapaxes(1, 2)
    rows, columns = values.shape[:2]
    images = _is_images(values)
    if images:
        scale, width = _scale(values), 0.65 / math.sqrt(_scale(values))
    else:
        scale, width = (0.25, 4.0) if columns == 1 else (0.65, 1.0)
    width = min(width, MOST_INCHES / columns, MOST_INCHES / (rows * scale))
    figure = new_figure(
        max(columns * width, 2) + (1.2 if row_labels else 0.4), rows * width * scale + 0.6, title
    )
    axes = figure.add_subplot()
    if images:
        if not 1 / MOST_ASPECT <= values.shape[-2] / values.shape[-1] <= MOST_ASPECT:
            pixels = " by ".join(map(str, values.shape[:-3:-1]))
            axes.set_xlabel(f"{pixels} pixels, not to scale", fontsize=8)
        values = reduced(values, int(scale * (DPI * width) ** 2))
        height, across = values.shape[-2:]
        gap = max(1, round(min(height, across) / 14))
        axes.imshow(_mosaic(values, gap), **TILES, aspect=scale * across / height)
        centres = np.arange(rows) * (height + gap) + height / 2 - 0.5
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
    else:
        _draw_profiles(axes, values)
        centres = np.arange(rows) + 0.5
    axes.set_yticks(centres if row_labels else [], row_labels)
    axes.tick_params(length=0)
    return figure


def _mosaic(values: np.ndarray, gap: int) -> np.ndarray:
    """(rows, columns, C, H, W) → one image: (height, width), NaN in the gaps, or RGBA.

    Grey images without missing pixels are drawn in grey.
    """
    rows, _, channels, height, _ = values.shape
    room = [(0, 0)] * 3 + [(0, gap)] * 2
    padded = np.pad(values.astype(float), room, constant_values=np.nan)
    sheet = padded.transpose(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    sheet = sheet[:-gap, :-gap]
    absent = np.isnan(values)
    some = absent.any(2) & ~absent.all((2, 3, 4))[..., None, None]  # pixels; not of empty tiles
    if channels == 1 and not some.any():
        return sheet[..., 0]
    opaque = np.isfinite(sheet[..., :1]).astype(float)
    colours = np.nan_to_num(sheet).clip(0, 1).repeat(3 // channels, axis=-1)
    picture = np.concatenate([colours, opaque], axis=-1)
    marked = np.pad(some, [(0, 0)] * 2 + [(0, gap)] * 2).transpose(0, 2, 1, 3)
    picture[marked.reshape(rows * (height + gap), -1)[:-gap, :-gap]] = (*MISSING, 1.0)
    return picture


def _draw_profiles(axes: Axes, values: np.ndarray) -> None:
    """Curves (rows, columns, D), (…, C, T) or (…, C, H, W), all on one scale, a panel for each.

    The panel of row i and column j is the unit square at (j, i), rows counted downwards.
    """
    rows, columns = values.shape[:2]
    colours = [TRAIN]
    if values.ndim == 4:
        colours = [f"C{i % 10}" for i in range(values.shape[2])]
    elif values.ndim == 5:
        channels, height, width = values.shape[2:]
        values = values.swapaxes(-1, -2) if height > width else values
        colours = [c for c in CHANNELS for _ in range(min(height, width))][: 3 * channels]
        colours = colours if channels == 3 else [TRAIN] * min(height, width)
    curves = values.reshape(rows, columns, len(colours), -1)
    size = curves.shape[-1]
    low, high = float(np.nanmin(curves)), float(np.nanmax(curves))
    heights = (curves - low) / (high - low or 1)
    y = np.arange(rows)[:, None, None, None] + 0.95 - 0.9 * heights
    x = np.arange(columns)[:, None] + (np.linspace(0.05, 0.95, size) if size > 1 else 0.5)
    apart = [(0, 0)] * 3 + [(0, 1)]  # NaN between the curves
    y = np.pad(y, apart, constant_values=np.nan)
    x = np.broadcast_to(np.pad(x, [(0, 0), (0, 1)], mode="edge"), y[:, :, 0].shape)
    for k, colour in enumerate(colours):
        # A value between two missing ones has no line.
        points = size <= 30 or np.isnan(curves).any()
        look: Any = {"linewidth": 0.8, "marker": "o" if points else None, "markersize": 2}
        axes.plot(x.ravel(), y[:, :, k].ravel(), color=colour, **look)
    frame: Any = {"color": "0.85", "linewidth": 0.6, "zorder": 0}
    axes.hlines(np.arange(rows + 1), 0, columns, **frame)
    axes.vlines(np.arange(columns + 1), 0, rows, **frame)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[])
    axes.set_xlabel(f"each panel from {low:.3g} to {high:.3g}", fontsize=8)
    axes.spines[:].set_visible(False)
