"""Data of the page's interactive views: points, and decoded planes of two latents.

The page has no decoder, so the planes are decoded in advance. On a plane, two latents take the
values of a grid while the others keep those of an anchor, the code of a row of data. The means of
p(x|z) are the tiles of a sheet, one PNG of 8 bits a value for each anchor and pair of latents: the
first latent grows from left to right, the second from top to bottom.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..data.splits import Splits
from ..models.autoencoder import Autoencoder
from ..models.labels import ConditionalVAE, Model
from ..plots.codes import Codes
from ..plots.from_model import to_display
from ..plots.tiles import MISSING
from ..runtime.memory import rows_at_once
from .render import data_url

# Latents, anchors, points per side; the first plan whose sheets fit the budget is used.
PLANS = [(4, 4, 15), (4, 3, 13), (3, 3, 13), (3, 2, 11), (2, 2, 11), (2, 1, 9), (2, 1, 5)]
# With at most two latents, one sheet shows the whole space.
WHOLE = [(2, 1, 41), (2, 1, 33), (2, 1, 25), (2, 1, 17), (2, 1, 9), (2, 1, 5)]

DECODED_VALUES = 2**28  # in all, which takes some seconds
MAX_LABELS = 20  # classes that can be chosen
MAX_PIXELS = 64  # a side of a tile; larger images are reduced
THUMBNAIL_BYTES = 400_000  # of the thumbnails of all runs on a page


@dataclass(frozen=True)
class Explorer:
    """Planes of a latent space with their decoded sheets.

    Attributes:
        latents: (L,) indices of those that vary on some plane, the most used first.
        grid: (L, n) the values that each takes.
        anchors: (M,) indices into `Codes` of the rows whose codes the other latents keep.
        sheets: PNG of each (anchor, first latent, second latent), by positions in `anchors` and
            `latents`; of a single latent, that latent twice. With `labels`, the position of the
            label comes first.
        tile: height, width and channels of a tile; a table's row is one pixel high, a sequence as
            many as it has channels.
        span: the values of black and white.
        reduced: whether the tiles are smaller than the images.
        labels: classes at which a model with labels is decoded, or empty.
    """

    latents: list[int]
    grid: np.ndarray
    anchors: list[int]
    sheets: dict[tuple[int, ...], bytes]
    tile: tuple[int, int, int]
    span: tuple[float, float]
    reduced: bool
    labels: Sequence[int] = ()


def explore(vae: Model, codes: Codes, budget: int) -> Explorer:
    """Decode the planes of the latents whose means vary most, around codes of several classes.

    The latents of a VAE range over 3 standard deviations of the prior to each side of its mean, or
    more widely if the middle 98% of some means do; those of an autoencoder range over the middle
    98% of its codes.

    Args:
        vae: the model.
        codes: of the rows that may be anchors.
        budget: largest number of bytes of all sheets; it limits latents, anchors and points.
    """
    order = np.argsort(-codes.means.std(0), kind="stable").tolist()
    plans = PLANS if len(order) > 2 else WHOLE
    labels = _most_frequent(vae) if isinstance(vae, ConditionalVAE) else []
    for plan in plans:
        num_latents, num_anchors, side = plan
        latents = order[:num_latents]
        anchors = _of_several_classes(codes, num_anchors)
        grid = _grid(vae, codes.means[:, latents], latents, side)
        last = plan == plans[-1]
        num_points = num_anchors * math.comb(num_latents, 2) * side**2 * max(1, len(labels))
        if num_points * codes.x[0].numel() > DECODED_VALUES and not last:
            continue
        most = math.inf if last else budget
        drawn, span = _sheets(vae, codes, latents, grid, anchors, labels, most)
        if drawn:
            break
    height, width, *channels = tiles(vae, codes.x[:1].nan_to_num(0.0), span)[0].shape
    tile = (height, width, channels[0] if channels else 1)
    reduced = _is_picture(vae) and (height, width) != tuple(codes.x.shape[-2:])
    return Explorer(latents, grid, anchors, drawn, tile, span, reduced, labels)


def _most_frequent(vae: ConditionalVAE) -> list[int]:
    """The most frequent classes of the training, at most `MAX_LABELS`, in ascending order."""
    return sorted(vae.label_logits.argsort(descending=True, stable=True)[:MAX_LABELS].tolist())


def tiles(
    vae: Model,
    x: Tensor,
    span: tuple[float, float] = (0, 1),
    largest: int = MAX_PIXELS,
) -> np.ndarray:
    """x (N, *data_shape) → (N, H, W) or (N, H, W, 3) of 8 bits.

    Images, and the middle slices of volumes, with a side of more than `largest` pixels are reduced
    to it. Rows of a table become (N, 1, D) and sequences (N, C, T), `span` being black and white.
    If any value is missing, all tiles are in colour.
    """
    values = torch.as_tensor(to_display(vae, x))
    if not _is_picture(vae):
        values = values.reshape(len(values), 1, -1, values.shape[-1])
        values = (values - span[0]) / (span[1] - span[0] or 1)
    longest = max(values.shape[-2:])
    missing = values.isnan()
    if _is_picture(vae) and longest > largest:
        size = [max(1, round(side * largest / longest)) for side in values.shape[-2:]]
        known = interpolate((~missing).to(values), size, mode="area") if missing.any() else 1.0
        values = interpolate(values.nan_to_num(0.0), size, mode="area") / known
        missing = values.isnan()  # 0 / 0, where all pixels of an area are
    if missing.any():
        colour = torch.tensor(MISSING, dtype=values.dtype)[:, None, None]
        values = torch.where(missing.any(1, keepdim=True), colour, values)
    bits = (255 * values.clamp(0, 1)).round().to(torch.uint8).movedim(1, -1)
    return (bits[..., 0] if bits.shape[-1] == 1 else bits).numpy()


def _is_picture(vae: Model) -> bool:
    """Whether rows are images or volumes, which are shown as pictures."""
    return not vae.likelihood_module.spec.scale_shape


def sheet(parts: np.ndarray, columns: int) -> bytes:
    """PNG of tiles (N, H, W) or (N, H, W, 3), line by line; black if a line is not filled."""
    missing = np.zeros((-len(parts) % columns, *parts.shape[1:]), parts.dtype)
    lines = np.concatenate([parts, missing]).reshape(-1, columns, *parts.shape[1:]).swapaxes(1, 2)
    buffer = io.BytesIO()
    pixels = lines.reshape(-1, columns * parts.shape[2], *parts.shape[3:])
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _of_several_classes(codes: Codes, count: int) -> list[int]:
    """The first rows, each of another class if there are labels."""
    if codes.labels is None:
        return list(range(min(count, len(codes.means))))
    firsts = np.unique(codes.labels, return_index=True)[1]
    return sorted(firsts.tolist())[:count]


@torch.no_grad()
def _grid(vae: Model, means: np.ndarray, latents: list[int], side: int) -> np.ndarray:
    """(L, n) values of each latent, for means (N, L) of these."""
    low, high = np.percentile(means, [1, 99], axis=0)
    if not isinstance(vae, Autoencoder):
        prior = vae.prior()
        moments = (prior.mean, prior.variance.sqrt())
        centre, scale = (v.cpu().numpy()[latents].astype(low.dtype) for v in moments)
        reach = max(3, ((high - centre) / scale).max(), ((centre - low) / scale).max())
        low, high = centre - reach * scale, centre + reach * scale
    high = np.maximum(high, low + 0.01 * (1 + abs(low)))  # of codes that are all equal
    return np.linspace(low, high, side, axis=1).astype(np.float32)


@torch.no_grad()
def _sheets(
    vae: Model,
    codes: Codes,
    latents: list[int],
    grid: np.ndarray,
    anchors: list[int],
    labels: list[int],
    budget: float,
) -> tuple[dict[tuple[int, ...], bytes], tuple[float, float]]:
    """The sheets of all planes, none if they exceed the budget; the values of black and white."""
    device = next(vae.parameters()).device
    side = grid.shape[1]

    models: list[Any] = [vae.given(k) for k in labels] if isinstance(vae, ConditionalVAE) else []

    def decoded(key: tuple[int, ...]) -> Iterator[Tensor]:
        """Means of p(x|z) on a plane, row by row of its second latent, some at once."""
        *label, anchor, first, second = key
        model: Any = models[label[0]] if label else vae
        rows = side if first != second else 1
        z = torch.as_tensor(codes.means[anchors[anchor]]).repeat(rows, side, 1)
        z[..., latents[second]] = torch.as_tensor(grid[second])[:rows, None]
        z[..., latents[first]] = torch.as_tensor(grid[first])
        parts = z.flatten(0, 1).to(device).split(rows_at_once(codes.x[0].numel(), device))
        return (model.likelihood(part).mean for part in parts)

    pairs = list(combinations(range(len(latents)), 2)) or [(0, 0)]
    keys: list[tuple[int, ...]] = [(m, *pair) for m in range(len(anchors)) for pair in pairs]
    if labels:
        keys = [(k, *key) for k in range(len(labels)) for key in keys]
    span = (0.0, 1.0)
    if not _is_picture(vae):  # one scale for all rows of a table
        shown = [to_display(vae, part) for key in keys for part in decoded(key)]
        span = float(min(part.min() for part in shown)), float(max(part.max() for part in shown))
    drawn: dict[tuple[int, ...], bytes] = {}
    for key in keys:
        drawn[key] = sheet(np.concatenate([tiles(vae, p, span) for p in decoded(key)]), side)
        if sum(map(len, drawn.values())) > budget:
            return {}, span
    return drawn, span


def interactive(
    found: Explorer, vae: Model, splits: Splits, codes: Codes, num_runs: int
) -> dict[str, Any]:
    """The data of the page's script as JSON values: points, thumbnails and the explorer."""
    labels = None if codes.labels is None else codes.labels.tolist()
    anchors = tiles(vae, codes.x[found.anchors], found.span)
    return {
        "row": splits.spec.row,
        "classes": [] if labels is None else list(codes.class_names or splits.class_names),
        "labels": labels,
        "planes": [
            {
                "title": plane.second.split(" ")[0] if i else "principal components",
                "names": [_plain(plane.first), _plain(plane.second)],
                "points": _rounded(plane.points),
            }
            for i, plane in enumerate(codes.planes)
        ],
        "thumbnails": _thumbnails(vae, codes, num_runs),
        "explorer": {
            "latents": found.latents,
            "grid": [[float(f"{value:.6g}") for value in line] for line in found.grid],
            "anchors": found.anchors,
            "sheets": {" ".join(map(str, k)): data_url(v) for k, v in found.sheets.items()},
            "images": data_url(sheet(anchors, len(anchors))),
            "tile": found.tile[:2],
            "codes": _rounded(codes.means[:, found.latents]),
            "more": codes.means.shape[1] > 2,
            **_choice_of_label(found, vae, codes),
        },
    }


def _choice_of_label(found: Explorer, vae: Model, codes: Codes) -> dict[str, Any]:
    """Names of the labels that can be chosen, and that of each anchor, by position; or nothing."""
    if not isinstance(vae, ConditionalVAE) or codes.given is None:
        return {}
    own = [codes.given[anchor] for anchor in found.anchors]
    return {
        "labels": [vae.class_names[k] for k in found.labels],
        "own": [list(found.labels).index(k) if k in found.labels else 0 for k in own],
    }


def _thumbnails(vae: Model, codes: Codes, num_runs: int) -> dict[str, Any] | None:
    """The images of the dots on one sheet; None without images, or if the sheet is too large."""
    if not _is_picture(vae):
        return None
    parts = tiles(vae, codes.x, largest=32)
    columns = math.ceil(math.sqrt(len(parts)))
    content = sheet(parts, columns)
    if len(content) > THUMBNAIL_BYTES // num_runs:
        return None
    return {"sheet": data_url(content), "columns": columns, "tile": parts.shape[1:3]}


def _rounded(points: np.ndarray) -> list[list[float]]:
    return np.round(np.asarray(points, dtype=float), 3).tolist()


def _plain(text: str) -> str:
    """An axis' label without its mathematics: $z_1$ → z₁."""
    return text.replace("$z_1$", "z₁").replace("$z_2$", "z₂")
