"""A local test of q(z|x): whether it is right at this x, rather than on average over x.

    z* ~ p(z),  x ~ p(x|z*),  z ~ q(z|x)

If q(z|x) = p(z|x), no classifier that sees x tells z* from z. One is trained to do so on simulated
pairs; d(z, x) is its estimate of the probability that z is the truth. The statistic of a row,

    t(x) = E_q(z|x) (d(z, x) − ½)²

is compared with those of classifiers that were trained with the labels swapped in half of the
pairs, chosen at random. For an exact guide, z* and z have the same distribution given x, and the
p-value at any x is at most α with probability at most α. The classifiers do not depend on the row
that is tested, and serve all rows; the p-values of different rows are therefore not independent.

The classifier is a ridge regression of the labels ±½, linear in u and the products uᵢ uⱼ, where u
is z in units of q(z|x), and in the products of u and u² with features of x. It sees means, scales
and correlations that are wrong for some x only. Simulation-based calibration averages over x:
errors of one sign for some x and of the other sign for others can cancel there.

Source: "L-C2ST: Local diagnostics for posterior approximations in simulation-based inference",
arXiv 2306.03580.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pyro.distributions import Distribution
from torch import Tensor

from ..data.missing import hidden_at_random
from ..models.interface import LatentModel
from ..runtime.memory import Callback, ignore, rows_at_once
from ..runtime.randomness import one_thread

COMPONENTS = 8  # principal ones of x, and as many of the posterior means: the features of x
MOST_LATENTS = 32  # with products, those whose means vary most
FITTED_ROWS = 1000  # rows of the model, for the principal components
REACH = 5.0  # u is limited to ±, so that no truth far outside decides the regression
PENALTY = 1.0  # of the ridge regression, for each simulated z

Features = Callable[[Distribution, Tensor, Tensor], np.ndarray]


@dataclass(frozen=True)
class LocalTest:
    """Results of the local test.

    Attributes:
        correct: (N,) whether the classifier prefers the truth to the draw, for pairs that it was
            not trained on. The probability is ½ for an exact guide.
        statistic: (B,) t(x) of each row, 0 to ¼.
        p_value: (B,) share of labellings, the given one included, with a t(x) at least as large.
    """

    correct: np.ndarray
    statistic: np.ndarray
    p_value: np.ndarray


@one_thread()
@torch.no_grad()
def local_test(
    vae: LatentModel,
    x_observed: Tensor,
    num_pairs: int = 8000,
    num_draws: int = 100,
    num_permutations: int = 999,
    seed: int = 0,
    on_chunk: Callback = ignore,
) -> LocalTest:
    """Test q(z|x) at each row. Draws come from torch's global random state.

    Args:
        vae: model with `prior()`, `posterior(x)`, with mean and variance, and `likelihood(z)`.
        x_observed: (B, *data_shape), the rows. Simulated rows lack the values that one of them
            lacks, chosen at random, as in `simulate`.
        num_pairs: N, simulated pairs to train on, and as many others to measure `correct`.
        num_draws: draws from q(z|x) of each row.
        num_permutations: number of random labellings.
        seed: of the labellings.
        on_chunk: called with the number of pairs just simulated, of 2 N.

    Raises:
        ValueError: a number is not positive.
    """
    if min(num_pairs, num_draws, num_permutations) < 1:
        raise ValueError(
            f"num_pairs, num_draws and num_permutations expect at least 1; got {num_pairs}, "
            f"{num_draws}, {num_permutations}"
        )
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    features = _features(vae, x_observed)
    truths, draws = _pairs(vae, num_pairs, features, x_observed, on_chunk)
    shape = (num_pairs, num_permutations + 1)
    label = np.random.default_rng(seed).integers(0, 2, shape, np.int8).astype(np.float32) - 0.5
    label[:, 0] = 0.5  # the truth is the truth
    labels = np.concatenate([label, -label])
    values = np.concatenate([truths, draws])
    scaler = StandardScaler().fit(values)
    ridge = Ridge(PENALTY * len(labels), solver="cholesky").fit(scaler.transform(values), labels)

    table = []
    for row in x_observed.split(1):
        posterior = vae.posterior(row)
        z = posterior.sample((num_draws,)).squeeze(1)
        margins = ridge.predict(scaler.transform(features(posterior, row, z)))  # d − ½
        table.append((margins.clip(-0.5, 0.5) ** 2).mean(0))
    statistics = np.stack(table)

    truths, draws = _pairs(vae, num_pairs, features, x_observed, on_chunk)
    preferred = (scaler.transform(truths) - scaler.transform(draws)) @ ridge.coef_[0] > 0
    return LocalTest(preferred, statistics[:, 0], (statistics >= statistics[:, :1]).mean(1))


def _pairs(
    vae: LatentModel, count: int, features: Features, like: Tensor, on_chunk: Callback
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) of the true z, and of one draw from q(z|x), for N rows of the model."""
    parts = []
    z = vae.prior().sample((count,))
    size = vae.likelihood(z[:1]).event_shape.numel()
    for truth in z.split(rows_at_once(size, z.device)):
        x = hidden_at_random(vae.likelihood(truth).sample(), like)
        posterior = vae.posterior(x)
        parts.append([features(posterior, x, z) for z in (truth, posterior.sample())])
        on_chunk(len(x))
    truths, draws = (np.concatenate(part) for part in zip(*parts, strict=True))
    return truths, draws


def _features(vae: LatentModel, like: Tensor | None = None) -> Features:
    """The features (B, F) of z (B, Z), given q(z|x) and x (B or 1, *data_shape)."""
    from sklearn.decomposition import PCA

    x = vae.likelihood(vae.prior().sample((FITTED_ROWS,))).sample()
    centre = x.mean(0)  # stands for missing values
    x = hidden_at_random(x, like)
    means = vae.posterior(x).mean
    x = torch.where(x.isnan(), centre, x)
    values = [v.flatten(1).cpu().numpy() for v in (x, means)]
    with np.errstate(invalid="ignore"):  # shares of no variance, if x or the means are constant
        components = [
            PCA(min(COMPONENTS, v.shape[1]), whiten=True, random_state=0).fit(v) for v in values
        ]
    kept = means.var(0).argsort(descending=True)[:MOST_LATENTS].cpu().numpy()
    first, second = np.triu_indices(len(kept), 1)

    def features(posterior: Distribution, x: Tensor, z: Tensor) -> np.ndarray:
        u = _units(posterior, z)
        x = torch.where(x.isnan(), centre, x)
        values = (v.flatten(1).cpu().numpy() for v in (x, posterior.mean))
        c = [pca.transform(v) for pca, v in zip(components, values, strict=True)]
        context = np.concatenate(c, axis=1).clip(-REACH, REACH)[:, None]  # (B, 1, C)
        k = u[:, kept]
        products = [(power[:, :, None] * context).reshape(len(u), -1) for power in (k, k**2)]
        parts = [u, u**2, k[:, first] * k[:, second], *products]
        return np.concatenate(parts, axis=1).astype(np.float32)

    return features


def _units(posterior: Distribution, z: Tensor) -> np.ndarray:
    """z (B, Z) in units of q(z|x): N(0, I) for a Gaussian guide."""
    away, scale = z - posterior.mean, getattr(posterior, "scale_tril", None)
    if scale is not None:
        u = torch.linalg.solve_triangular(scale, away.unsqueeze(-1), upper=False).squeeze(-1)
    else:
        u = away / posterior.variance.sqrt()
    return u.clamp(-REACH, REACH).cpu().numpy()
