"""Figures of a trained model, computed here and drawn by `plots.run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pyro.distributions import Distribution, Independent, Normal
from torch import Tensor

from ..data.splits import Splits
from ..models.labels import ConditionalVAE, Model, at_rows, labels_at
from ..models.vae import VAE
from ..runtime.memory import rows_at_once
from ..runtime.randomness import one_thread, random_states
from . import run as figures
from . import tiles
from .codes import Codes, first_rows

MOST_PIXELS = 200**2  # of an image, more than a tile shows
QUANTILE_DRAWS = 10_000  # from a prior without quantiles in closed form


def to_display(vae: Model, x: Tensor) -> np.ndarray:
    """x in the likelihood's units → intensities in [0, 1], or standardized tables and sequences.

    Of a volume, the middle slice.
    """
    likelihood = vae.likelihood_module
    spec = likelihood.spec
    if spec.kinds:
        x = likelihood.deviations(x)
    elif spec.scale_shape:
        x = (x - likelihood.mean) / likelihood.std
    elif likelihood.units == "count":
        x = x / spec.bound
    elif spec.max_value is None:
        mean, reach = likelihood.mean.mean(), 3 * likelihood.std
        x = ((x - mean + reach) / (2 * reach)).clamp(0, 1)
    if len(spec.shape) == 4:
        x = x.select(-3, spec.shape[1] // 2)
    return x.cpu().numpy()


@one_thread()
@torch.no_grad()
def _decoded(vae: Any, z: Tensor, draw: bool = False) -> np.ndarray:
    """z (..., Z) → means of p(x|z), or draws, for display, a few rows at once.

    Large images are reduced.
    """
    rows = rows_at_once(math.prod(vae.likelihood_module.spec.shape), z.device)
    parts = z.flatten(0, -2).split(rows)
    likelihoods = (vae.likelihood(part) for part in parts)
    values = (p.sample() if draw else p.mean for p in likelihoods)
    means = np.concatenate([_reduced(to_display(vae, x)) for x in values])
    return means.reshape(*z.shape[:-1], *means.shape[1:])


def _reduced(values: np.ndarray) -> np.ndarray:
    """Images (N, C, H, W) at the size of a tile; tables and sequences as they are."""
    return tiles.reduced(values, MOST_PIXELS) if values.ndim == 4 else values


@torch.no_grad()
def generate_images(
    vae: VAE | ConditionalVAE, count: int, draw: bool = False, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of data from the prior.

    Args:
        count: number of rows.
        draw: draw x from p(x|z) instead of taking its mean.
        labels: (count,) labels of the rows, for a model with labels.

    Returns:
        x (count, *data_shape) in the likelihood's units; z (count, Z).
    """
    z = vae.prior().sample((count,))
    rows = rows_at_once(math.prod(vae.likelihood_module.spec.shape), z.device)
    parts = [z.split(rows)] if labels is None else [z.split(rows), labels.split(rows)]
    likelihoods = [vae.likelihood(*part) for part in zip(*parts, strict=True)]
    return torch.cat([p.sample() if draw else p.mean for p in likelihoods]), z


def draw_reconstructions(
    vae: Model, splits: Splits, folder: Path, name: str, epoch: int, seed: int
) -> None:
    """Write the figure of `reconstructions` as FOLDER/NAME.png."""
    figures.save_all({name: reconstructions(vae, splits, epoch, seed)}, folder)


def draw_run(
    vae: Model,
    splits: Splits,
    history: Sequence[dict[str, Any]],
    folder: Path,
    seed: int,
    codes: Codes,
) -> None:
    """Write all figures of a run except the reconstructions, as FOLDER/*.png."""
    drawn = run_figures(vae, splits, history, seed)
    names = [figures.short(name, 24) for name in codes.class_names]
    title = _title(splits, codes.title)
    drawn["latent"] = figures.latent_scatter(codes.planes, codes.labels, names, title)
    if isinstance(vae, VAE) and vae.prior().event_shape[0] == 2:
        drawn["manifold"] = _manifold(vae, splits)
    figures.save_all(drawn, folder)


def reconstructions(vae: Model, splits: Splits, epoch: int, seed: int) -> Figure:
    """Validation rows beside their reconstructions; the same rows at every call."""
    units = vae.likelihood_module.units
    x, y = next(splits.validation.fixed_with_labels(units, seed, 24))
    title = f"validation {splits.spec.row}s and reconstructions after epoch {epoch}"
    originals, decoded = to_display(vae, x), to_display(vae, at_rows(vae, x, y).reconstruct(x))
    return tiles.reconstructions(originals, decoded, _title(splits, title))


def run_figures(
    vae: Model, splits: Splits, history: Sequence[dict[str, Any]], seed: int
) -> dict[str, Figure]:
    """Curves, interpolations and samples; an `Autoencoder` has no samples.

    Draws are fixed by `seed`; torch's global random state is restored.
    """
    with random_states(next(vae.parameters()).device, seed):
        curves = figures.elbo_curves(history, _title(splits, "training"), splits.spec.row)
        drawn = {"elbo": curves, "interpolations": _interpolations(vae, splits, seed)}
        if isinstance(vae, VAE):
            z = vae.prior().sample((24 if splits.spec.scale_shape else 100,))
            title = _title(splits, "means of p(x|z) at draws of z from the prior")
            drawn["samples"] = tiles.image_grid(tiles.in_rows(_decoded(vae, z)), title)
        elif isinstance(vae, ConditionalVAE):
            title = _title(splits, "means of p(x|z, y), a class in each row, a z in each column")
            names = [figures.short(name, 12) for name in vae.class_names[:10]]
            drawn["samples"] = tiles.image_grid(class_samples(vae), title, names)
    return drawn


def class_samples(
    vae: ConditionalVAE, columns: int = 10, rows: int = 10, draw: bool = False
) -> np.ndarray:
    """Means of p(x|z, y), or draws from it, for display, (rows, columns, ...): a class in each row.

    The columns share draws of z from the prior. Of more classes than `rows`, the first are shown.
    """
    z = vae.prior().sample((columns,))
    models = [vae.given(k) for k in range(min(rows, vae.num_classes))]
    return np.stack([_decoded(model, z, draw) for model in models])


@torch.no_grad()
def _interpolations(vae: Model, splits: Splits, seed: int) -> Figure:
    """Straight lines between the posterior means of test rows, decoded at even steps."""
    rows, steps = max(1, min(6, len(splits.test) // 2)), 7 if splits.spec.scale_shape else 11
    if isinstance(vae, ConditionalVAE):
        x, labels = _pairs_of_a_class(vae, splits, rows, seed)
        rows, means = len(x) // 2, vae.posterior(x, labels).mean
        models: list[Any] = [vae.given(label) for label in labels[::2]]
    else:
        x = first_rows(splits.test, vae, 2 * rows, seed)
        x = x.expand(2 * rows, *splits.spec.shape)  # for a single test row, the line is a point
        means, models = vae.posterior(x).mean, [vae]
    weights = torch.linspace(0, 1, steps, device=x.device)[:, None]
    lines = torch.stack(
        [torch.lerp(a, b, weights) for a, b in zip(means[::2], means[1::2], strict=True)]
    )
    parts = zip(models, lines.chunk(len(models)), strict=True)
    decoded = np.concatenate([_decoded(one, part) for one, part in parts])
    ends = _reduced(to_display(vae, x))
    ends = ends.reshape(rows, 2, *ends.shape[1:])
    values = np.concatenate([ends[:, :1], decoded, ends[:, 1:]], axis=1)
    title = f"test {splits.spec.row}s and the decoded lines between their means"
    return tiles.image_grid(values, _title(splits, title))


def _pairs_of_a_class(
    vae: ConditionalVAE, splits: Splits, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """At most `count` pairs of test rows, each of a class, one after the other; and their labels.

    If no two of the first rows have the same label, a row is paired with itself.
    """
    x, y = next(splits.test.fixed_with_labels(vae.likelihood_module.units, seed))
    labels = labels_at(vae, x, y)
    rows = [(labels == k).nonzero().flatten()[:2] for k in range(vae.num_classes)]
    pairs = [pair for pair in rows if len(pair) == 2][:count]
    index = torch.cat(pairs) if pairs else torch.zeros(2, dtype=torch.int64, device=x.device)
    return x[index], labels[index]


@torch.no_grad()
def _manifold(vae: VAE, splits: Splits) -> Figure:
    """The decoder's means on a grid of quantiles of the two latents under the prior."""
    side = 6 if splits.spec.scale_shape else 16
    quantiles = (torch.arange(side) + 0.5) / side
    lines = _quantiles(vae.prior(), quantiles.to(next(vae.parameters()).device))
    second, first = torch.meshgrid(lines[1], lines[0], indexing="ij")
    decoded = _decoded(vae, torch.stack([first, second], dim=-1))
    title = _title(splits, "means of p(x|z) over the latent plane")
    return tiles.manifold(decoded, quantiles.numpy(), title)


def _quantiles(prior: Distribution, levels: Tensor) -> Tensor:
    """Quantiles (Z, n) of each latent at levels (n,), from draws if there is no closed form."""
    if isinstance(prior, Independent) and isinstance(prior.base_dist, Normal):
        return prior.base_dist.icdf(levels.unsqueeze(-1)).T
    with random_states(levels.device, seed=0):
        return torch.quantile(prior.sample((QUANTILE_DRAWS,)), levels, dim=0).T


def _title(splits: Splits, text: str) -> str:
    return f"{figures.short(splits.name, 40)}: {text}"
