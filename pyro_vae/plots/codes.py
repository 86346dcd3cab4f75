"""Latent codes of a data set, and the planes in which they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.splits import Split, Splits
from ..models.autoencoder import Autoencoder
from ..models.vae import VAE
from .run import Plane

# Points in a figure, enough to see every cluster; fewer with t-SNE, where 1,000 points take as long
# as one or two epochs, and 2,000 as long as ten. Fewer of large images, too: their pixels are kept.
MAX_POINTS = 2000
MAX_TSNE_POINTS = 1000
MAX_VALUES = 2**28


@dataclass(frozen=True)
class Codes:
    """Rows of data and their latent means.

    Attributes:
        x: (N, *data_shape), in the likelihood's units.
        means: (N, Z), on the CPU.
        labels: (N,) indices into the class names, or None.
        planes: coordinates of the means: the latents if Z ≤ 2, else projections.
        title: a description of the points.
    """

    x: Tensor
    means: np.ndarray
    labels: np.ndarray | None
    planes: Sequence[Plane]
    title: str


@torch.no_grad()
def latent_codes(vae: VAE | Autoencoder, splits: Splits, seed: int) -> Codes:
    """Latent means of the test rows and, if these are fewer than 1,000, of the other splits."""
    used = [splits.test]
    if len(splits.test) < 1000:
        used += [splits.validation, splits.train]
    latent_dim = vae.posterior(first_rows(splits.test, vae, 1, seed)).mean.shape[-1]
    most = MAX_POINTS if latent_dim <= 2 else MAX_TSNE_POINTS
    most = max(2, min(most, MAX_VALUES // math.prod(splits.spec.shape)))
    batches = [x for split in used for x in split.fixed(vae.likelihood_module.units, seed, most)]
    means = torch.cat([vae.posterior(x).mean for x in batches])[:most].cpu().numpy()
    labels = None
    if splits.test.labels is not None:
        parts = [split.labels[:most] for split in used if split.labels is not None]
        labels = torch.cat(parts)[:most].numpy()
    kind = "codes" if isinstance(vae, Autoencoder) else "posterior means"
    which = "test" if len(used) == 1 else "test, validation and training"
    title = f"{kind} of {len(means)} {which} {splits.spec.row}s"
    return Codes(torch.cat(batches)[:most], means, labels, _planes(means), title)


def first_rows(split: Split, vae: VAE | Autoencoder, count: int, seed: int) -> Tensor:
    """At most `count` rows of a split, from its beginning, as x."""
    return next(split.fixed(vae.likelihood_module.units, seed, count))


def _planes(means: np.ndarray) -> list[Plane]:
    """(N, Z) → the latents if Z ≤ 2, else principal components and t-SNE."""
    if means.shape[1] == 1:
        spread = np.random.default_rng(0).uniform(-0.5, 0.5, size=len(means))
        return [Plane(np.column_stack([means[:, 0], spread]), "$z_1$", "spread at random")]
    # t-SNE divides by the spread of its starting points: collapsed latents have none.
    if means.shape[1] == 2 or len(means) < 10 or means.std(0).max() < 1e-3:
        return [Plane(means[:, :2], "$z_1$", "$z_2$")]
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(n_components=2, svd_solver="full").fit(means)
    shares = 100 * pca.explained_variance_ratio_
    names = [f"principal component {i + 1} ({shares[i]:.0f}% of the variance)" for i in range(2)]
    perplexity = min(30.0, (len(means) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0)
    tsne_names = ("t-SNE 1 (neighbours only: distances mean little)", "t-SNE 2")
    return [Plane(pca.transform(means), *names), Plane(tsne.fit_transform(means), *tsne_names)]
