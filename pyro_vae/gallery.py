"""The pictures of a run: what each shows is computed here and drawn by `figures.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import figures
from .autoencoder import Autoencoder
from .chunks import rows_at_once
from .data import Split, Splits
from .randomness import random_states
from .vae import VAE

__all__ = [
    "Codes",
    "draw_reconstructions",
    "draw_run",
    "generate_images",
    "latent_codes",
    "reconstructions",
    "run_figures",
    "square",
    "to_display",
]

# Latent means are drawn for at most so many images: enough to see every cluster, and few enough for
# t-SNE to take seconds.
MAX_POINTS = 2000
MAX_TSNE_POINTS = 1000  # which takes as long as an epoch or two; of 2,000 it would be ten


def to_display(vae: VAE | Autoencoder, x: Tensor) -> np.ndarray:
    """x in the likelihood's units → intensities in [0, 1], or standardized columns of tables."""
    likelihood = vae.likelihood_module
    spec = likelihood.spec
    if not spec.is_image:
        x = (x - likelihood.mean) / likelihood.std
    elif likelihood.units == "count":
        x = x / spec.bound
    elif spec.max_value is None:
        mean, reach = likelihood.mean.mean(), 3 * likelihood.std
        x = ((x - mean + reach) / (2 * reach)).clamp(0, 1)
    return x.cpu().numpy()


@dataclass(frozen=True)
class Codes:
    """Images and their latent means.

    Attributes:
        x: (N, *data_shape), in the likelihood's units.
        means: (N, Z), on the CPU.
        labels: (N,) indices into the class names, or None.
        planes: the means as they are drawn: the latents where Z ≤ 2, else projections.
        title: what they are.
    """

    x: Tensor
    means: np.ndarray
    labels: np.ndarray | None
    planes: Sequence[figures.Plane]
    title: str


def reconstructions(vae: VAE | Autoencoder, splits: Splits, epoch: int, seed: int) -> Figure:
    """Validation images beside their reconstructions; the same images whenever it is called."""
    x = _first(splits.validation, vae, 24, seed)
    return figures.reconstructions(
        to_display(vae, x),
        to_display(vae, vae.reconstruct(x)),
        f"{figures.plain(splits.name)}: validation images and reconstructions after epoch {epoch}",
    )


def draw_reconstructions(
    vae: VAE | Autoencoder, splits: Splits, folder: Path, name: str, epoch: int, seed: int
) -> Path:
    """Write the picture of `reconstructions`; returns the file."""
    path = folder / f"{name}.png"
    figures.save(reconstructions(vae, splits, epoch, seed), path)
    return path


def draw_run(
    vae: VAE | Autoencoder,
    splits: Splits,
    history: Sequence[dict[str, Any]],
    folder: Path,
    seed: int,
    codes: Codes,
) -> list[Path]:
    """All pictures but the reconstructions; returns the files written."""
    drawn = run_figures(vae, splits, history, seed)
    names = [figures.plain(name) for name in splits.class_names]
    title = f"{figures.plain(splits.name)}: {codes.title}"
    drawn["latent"] = figures.latent_scatter(codes.planes, codes.labels, names, title)
    if isinstance(vae, VAE) and vae.prior().event_shape[0] == 2:
        drawn["manifold"] = _manifold(vae, splits)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        figures.save(figure, paths[-1])
    return paths


def run_figures(
    vae: VAE | Autoencoder, splits: Splits, history: Sequence[dict[str, Any]], seed: int
) -> dict[str, Figure]:
    """Curves, interpolations and, of a VAE, samples.

    Drawn from the prior with `seed`; torch's global random state is left as it was.
    """
    with random_states(next(vae.parameters()).device, seed):
        drawn = {"elbo": figures.elbo_curves(history, f"{figures.plain(splits.name)}: training")}
        drawn["interpolations"] = _interpolations(vae, splits, seed)
        if isinstance(vae, VAE):
            count = 100 if splits.spec.is_image else 24
            mean = to_display(vae, generate_images(vae, count)[0])
            title = f"{figures.plain(splits.name)}: means of p(x|z) at draws of z from the prior"
            drawn["samples"] = figures.image_grid(square(mean), title)
    return drawn


@torch.no_grad()
def generate_images(vae: VAE, count: int, draw: bool = False) -> tuple[Tensor, Tensor]:
    """Images from the prior.

    Args:
        count: how many.
        draw: draw x from p(x|z) rather than take its mean.

    Returns:
        x (count, *data_shape) in the likelihood's units; z (count, Z).
    """
    z = vae.prior().sample((count,))
    rows = rows_at_once(math.prod(vae.likelihood_module.spec.shape), z.device)
    likelihoods = [vae.likelihood(part) for part in z.split(rows)]
    return torch.cat([p.sample() if draw else p.mean for p in likelihoods]), z


def _first(split: Split, vae: VAE | Autoencoder, count: int, seed: int) -> Tensor:
    """The first rows of a split, as x."""
    return next(split.fixed(vae.likelihood_module.units, seed, count))


def square(values: np.ndarray) -> np.ndarray:
    """(N, *shape) → (rows, columns, *shape), nearly square; NaN where nothing is left."""
    return figures.in_rows(values, int(np.ceil(np.sqrt(len(values)))))


@torch.no_grad()
def latent_codes(vae: VAE | Autoencoder, splits: Splits, seed: int) -> Codes:
    """Latent means of the test images; of small data, of the other splits' images too."""
    used = [splits.test]
    if len(splits.test) < 1000:
        used += [splits.validation, splits.train]
    units = vae.likelihood_module.units
    latent_dim = vae.posterior(_first(splits.test, vae, 1, seed)).mean.shape[-1]
    most = MAX_POINTS if latent_dim <= 2 else MAX_TSNE_POINTS
    batches = [x for split in used for x in split.fixed(units, seed, most)]
    means = torch.cat([vae.posterior(x).mean for x in batches])[:most].cpu().numpy()
    labels = None
    if splits.test.labels is not None:
        parts = [split.labels[:most] for split in used if split.labels is not None]
        labels = torch.cat(parts)[:most].numpy()
    what = "codes" if isinstance(vae, Autoencoder) else "posterior means"
    which = "test" if len(used) == 1 else "test, validation and training"
    title = f"{what} of {len(means)} {which} images"
    return Codes(torch.cat(batches)[:most], means, labels, _planes(means), title)


def _planes(means: np.ndarray) -> list[figures.Plane]:
    """(N, Z) → the latents themselves where Z ≤ 2, else principal components and t-SNE."""
    if means.shape[1] == 1:
        spread = np.random.default_rng(0).uniform(-0.5, 0.5, size=len(means))
        return [figures.Plane(np.column_stack([means[:, 0], spread]), "$z_1$", "spread at random")]
    # t-SNE divides by the spread of its starting points: collapsed latents have none.
    if means.shape[1] == 2 or len(means) < 10 or means.std(0).max() < 1e-3:
        return [figures.Plane(means[:, :2], "$z_1$", "$z_2$")]
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(n_components=2, svd_solver="full").fit(means)
    shares = 100 * pca.explained_variance_ratio_
    names = [f"principal component {i + 1} ({shares[i]:.0f}% of the variance)" for i in range(2)]
    perplexity = min(30.0, (len(means) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0)
    return [
        figures.Plane(pca.transform(means), *names),
        figures.Plane(
            tsne.fit_transform(means), "t-SNE 1 (neighbours only: distances mean little)", "t-SNE 2"
        ),
    ]


@torch.no_grad()
def _interpolations(vae: VAE | Autoencoder, splits: Splits, seed: int) -> Figure:
    """Straight lines between the posterior means of test images, decoded at even steps."""
    rows, steps = min(6, len(splits.test) // 2), 11 if splits.spec.is_image else 7
    if rows == 0:  # one test image alone: the line is a point
        x = _first(splits.test, vae, 1, seed).expand(2, *splits.spec.shape)
        rows = 1
    else:
        x = _first(splits.test, vae, 2 * rows, seed)
    means = vae.posterior(x).mean
    weights = torch.linspace(0, 1, steps, device=x.device)[:, None]
    lines = torch.stack(
        [torch.lerp(a, b, weights) for a, b in zip(means[::2], means[1::2], strict=True)]
    )
    decoded = to_display(vae, vae.likelihood(lines).mean)
    ends = to_display(vae, x).reshape(rows, 2, *splits.spec.shape)
    values = np.concatenate([ends[:, :1], decoded, ends[:, 1:]], axis=1)
    title = f"{figures.plain(splits.name)}: test images and the decoded lines between their means"
    return figures.interpolations(values, title)


@torch.no_grad()
def _manifold(vae: VAE, splits: Splits) -> Figure:
    """The decoder's means on a grid of quantiles of the standard normal prior."""
    side = 16 if splits.spec.is_image else 6
    quantiles = (torch.arange(side) + 0.5) / side
    line = torch.special.ndtri(quantiles).to(next(vae.parameters()).device)
    second, first = torch.meshgrid(line, line, indexing="ij")
    decoded = vae.likelihood(torch.stack([first, second], dim=-1)).mean
    title = f"{figures.plain(splits.name)}: means of p(x|z) over the latent plane"
    return figures.manifold(to_display(vae, decoded), quantiles.numpy(), title)
