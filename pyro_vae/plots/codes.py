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
from ..models.labels import ConditionalVAE, Model, at_rows, labels_at
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
        class_names: of the labels; the last is that of rows without a label, if there are any.
        given: (N,) the labels at which a model with labels was taken, see `labels_at`; or None.
    """

    x: Tensor
    means: np.ndarray
    labels: np.ndarray | None
    planes: Sequence[Plane]
    title: str
    class_names: tuple[str, ...] = ()
    given: np.ndarray | None = None


@torch.no_grad()
def latent_codes(vae: Model, splits: Splits, seed: int) -> Codes:
    """Latent means of the test rows and, if these are fewer than 1,000, of the other splits."""
    used = [splits.test]
    if len(splits.test) < 1000:
        used += [splits.validation, splits.train]
    units = vae.likelihood_module.units
    first = next(splits.test.fixed_with_labels(units, seed, 1))
    latent_dim = at_rows(vae, *first).posterior(first[0]).mean.shape[-1]
    most = MAX_POINTS if latent_dim <= 2 else MAX_TSNE_POINTS
    most = max(2, min(most, MAX_VALUES // math.prod(splits.spec.shape)))
    batches = [row for split in used for row in split.fixed_with_labels(units, seed, most)]
    parts = [at_rows(vae, *row).posterior(row[0]).mean for row in batches]
    means = torch.cat(parts)[:most].cpu().numpy()
    labels, given, names = None, None, splits.class_names
    if splits.test.labels is not None:
        labels = torch.cat([y for _, y in batches if y is not None])[:most].cpu().numpy()
        if (labels < 0).any():
            labels, names = np.where(labels < 0, len(names), labels), (*names, "no label")
    if isinstance(vae, ConditionalVAE):
        given = torch.cat([labels_at(vae, *row) for row in batches])[:most].cpu().numpy()
    kind = "codes" if isinstance(vae, Autoencoder) else "posterior means"
    which = "test" if len(used) == 1 else "test, validation and training"
    title = f"{kind} of {len(means)} {which} {splits.spec.row}s"
    x = torch.cat([x for x, _ in batches])[:most]
    return Codes(x, means, labels, _planes(means), title, names, given)


def first_rows(split: Split, vae: Model, count: int, seed: int) -> Tensor:
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
