"""What a model does with its latents and with data: use, predictive checks, aggregate posterior.

Each function computes on given rows x; what the numbers are worth is judged in `verdicts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pyro.distributions import Normal
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.distributions import kl_divergence

from .interface import LatentModel

__all__ = [
    "ACTIVE_VARIANCE",
    "LatentUse",
    "PredictiveCheck",
    "TwoSampleTest",
    "aggregate_posterior",
    "energy_coefficient",
    "energy_test",
    "holes",
    "latent_use",
    "predictive_check",
]

# Rows that go through the model at once.
ROWS = 256

# A latent counts as active where the variance over images of its posterior mean exceeds this
# ("Importance weighted autoencoders", arXiv 1509.00519).
ACTIVE_VARIANCE = 0.01

# A latent counts as collapsed where its KL is below this, in nats.
COLLAPSED_KL = 0.01

Statistic = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LatentUse:
    """What each latent carries, over N images.

    Attributes:
        kl: (Z,) mean of KL(N(m, s²) ‖ N(m₀, s₀²)), nats, with mean and variance of each latent
            under q(z|x) and p(z). These are the terms of the KL where the latents of both are
            independent and normal.
        mean_variance: (Z,) variance over images of the posterior mean.
    """

    kl: np.ndarray
    mean_variance: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """(Z,) whether the posterior mean moves with x."""
        return self.mean_variance > ACTIVE_VARIANCE

    @property
    def collapsed(self) -> np.ndarray:
        """(Z,) whether q(z|x) has become the prior, so that the latent says nothing of x."""
        return self.kl < COLLAPSED_KL


@torch.no_grad()
def latent_use(vae: LatentModel, x: Tensor) -> LatentUse:
    """KL and activity of each latent, for x (N, *data_shape).

    Raises:
        ValueError: fewer than two images.
    """
    if len(x) < 2:
        raise ValueError(f"the variance over images expects at least 2; got {len(x)}")
    prior = vae.prior()
    marginal = Normal(prior.mean, prior.variance.sqrt())
    posteriors = [vae.posterior(part) for part in x.split(ROWS)]
    mean = torch.cat([q.mean for q in posteriors])
    scale = torch.cat([q.variance for q in posteriors]).sqrt()
    kl = kl_divergence(Normal(mean, scale), marginal)
    return LatentUse(
        kl=kl.double().mean(0).cpu().numpy(),
        mean_variance=mean.double().var(0).cpu().numpy(),
    )


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of B images beside those of what the model would draw in their place.

    Attributes:
        names: of the T statistics.
        observed: (B, T) of x, averaged over z ~ q(z|x).
        replicated_mean, replicated_scale: (B, T) of x' ~ p(x|z) over the same z.
        p_values: (B, T) share of draws in which the replicate's statistic is the larger one, ties
            counted half.
    """

    names: tuple[str, ...]
    observed: np.ndarray
    replicated_mean: np.ndarray
    replicated_scale: np.ndarray
    p_values: np.ndarray

    @property
    def effects(self) -> np.ndarray:
        """(B, T): by how many standard deviations of the replicates x lies above their mean."""
        return (self.observed - self.replicated_mean) / np.maximum(self.replicated_scale, 1e-12)


@torch.no_grad()
def predictive_check(
    vae: LatentModel,
    x: Tensor,
    statistics: Mapping[str, Statistic] | None = None,
    num_draws: int = 200,
) -> PredictiveCheck:
    """Posterior-predictive check: do draws x' ~ p(x|z), z ~ q(z|x), look like x?

    On held-out x it judges the model, given the guide. Draws come from torch's global random state.

    Source: "Posterior predictive assessment of model fitness via realized discrepancies",
    Statistica Sinica 6 (1996).

    Args:
        vae: anything with `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape).
        statistics: name → f(x (S, B, *data_shape), z (S, B, Z)) → (S, B). By default mean, standard
            deviation and log p(x|z), and of images the roughness, the mean absolute difference of
            neighbouring pixels.
        num_draws: S, at least 2.

    Raises:
        ValueError: too few draws, or a statistic of the wrong shape.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws expects at least 2; got {num_draws}")
    if statistics is None:
        statistics = _statistics(vae, image=x.dim() == 4)
    parts = []
    rows = max(1, 2**23 // (num_draws * x[0].numel()))
    for part in x.split(rows):
        z = vae.posterior(part).sample((num_draws,))
        replicated = vae.likelihood(z).sample()
        same = part.expand(replicated.shape)
        columns = []
        for name, statistic in statistics.items():
            here, there = statistic(same, z).double(), statistic(replicated, z).double()
            if here.shape != z.shape[:2]:
                raise ValueError(
                    f"statistic {name!r} expects shape {tuple(z.shape[:2])}; got "
                    f"{tuple(here.shape)}"
                )
            larger = (there > here).double() + (there == here).double() / 2
            columns.append(torch.stack([here.mean(0), there.mean(0), there.std(0), larger.mean(0)]))
        parts.append(torch.stack(columns, dim=-1))  # (4, rows, T)
    observed, mean, scale, p_values = torch.cat(parts, dim=1).cpu().numpy()
    return PredictiveCheck(tuple(statistics), observed, mean, scale, p_values)


def _statistics(vae: LatentModel, image: bool) -> dict[str, Statistic]:
    statistics: dict[str, Statistic] = {
        "mean": lambda x, z: x.flatten(2).mean(-1),
        "standard deviation": lambda x, z: x.flatten(2).std(-1),
        "log p(x|z)": lambda x, z: vae.likelihood(z).log_prob(x),
    }
    if image:
        statistics["roughness"] = lambda x, z: (
            x.diff(dim=-1).abs().flatten(2).mean(-1) + x.diff(dim=-2).abs().flatten(2).mean(-1)
        )
    return statistics


@torch.no_grad()
def aggregate_posterior(vae: LatentModel, x: Tensor) -> np.ndarray:
    """Draws (N, Z) from the aggregate posterior: one z ~ q(z|x) for each x (N, *data_shape).

    Of x simulated from the model, an exact guide's aggregate is the prior. Of real x it is not
    unless the model is that of the data, so there the difference is no error of inference.
    """
    return torch.cat([vae.posterior(part).sample() for part in x.split(ROWS)]).cpu().numpy()


def energy_coefficient(first: np.ndarray, second: np.ndarray) -> float:
    """Distance between the distributions of two samples (N, Z) and (M, Z), 0 (equal) to 1.

    (2 E|X − Y| − E|X − X'| − E|Y − Y'|) / 2 E|X − Y|, each over all pairs of different draws, so
    that samples of one distribution have expectation 0 in the numerator and may come out below.

    Source: "Energy statistics: a class of statistics based on distances", doi
    10.1016/j.jspi.2013.03.018.
    """
    distances, mine = _pairs(first, second)
    return float(_coefficients(distances, mine[:, None])[0])


@dataclass(frozen=True)
class TwoSampleTest:
    """Whether two samples are of one distribution.

    Attributes:
        coefficient: `energy_coefficient` of the two.
        p_value: share of random relabellings, the given one among them, with a coefficient at least
            as large: at most α with probability at most α, exactly.
    """

    coefficient: float
    p_value: float


def energy_test(
    first: np.ndarray, second: np.ndarray, num_permutations: int = 999, seed: int = 0
) -> TwoSampleTest:
    """Permutation test of two independent samples (N, Z) and (M, Z) by their energy coefficient."""
    distances, mine = _pairs(first, second)
    random = np.random.default_rng(seed)
    labels = np.stack([mine, *(random.permutation(mine) for _ in range(num_permutations))], axis=1)
    coefficients = _coefficients(distances, labels)
    # The sums' order varies with the labels: equal coefficients may differ in their last digits.
    larger = coefficients >= coefficients[0] - 1e-12
    return TwoSampleTest(float(coefficients[0]), float(larger.mean()))


def _pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All distances (N + M, N + M), and whether each draw is of the first sample (N + M,)."""
    both = np.concatenate([first, second]).astype(np.float64)
    return cdist(both, both), np.arange(len(both)) < len(first)


def _coefficients(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Energy coefficients (P,) of labellings (N + M, P)."""
    if not distances.any():  # one point alone
        return np.zeros(labels.shape[1])
    mine, other = labels.astype(np.float64), (~labels).astype(np.float64)
    n, m = mine.sum(0), other.sum(0)
    to_mine = distances @ mine  # (N + M, P)
    to_other = distances.sum(1, keepdims=True) - to_mine
    between = (other * to_mine).sum(0) / (n * m)
    within = (mine * to_mine).sum(0) / (n * (n - 1)) + (other * to_other).sum(0) / (m * (m - 1))
    return 1 - within / (2 * between)


def holes(aggregate: np.ndarray, prior: np.ndarray, ratio: float = 0.1, seed: int = 0) -> float:
    """Share of the prior's mass in holes, where the aggregate posterior is thin.

    A hole is where the aggregate's density is below `ratio` times the prior's. The density ratio is
    that of a cross-validated classifier between the two samples, gradient-boosted trees on z and
    |z|²: what the classifier cannot see counts as no hole, so this is about a lower bound.

    Args:
        aggregate, prior: (N, Z) draws of each, equally many.
        ratio: below 1.
        seed: of the folds.

    Raises:
        ValueError: the samples differ in size.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if aggregate.shape != prior.shape:
        raise ValueError(f"expected samples of one shape; got {aggregate.shape} and {prior.shape}")
    z = np.concatenate([aggregate, prior])
    features = np.concatenate([z, (z**2).sum(1, keepdims=True)], axis=1)
    is_aggregate = np.arange(len(z)) < len(aggregate)
    chance = cross_val_predict(
        HistGradientBoostingClassifier(max_iter=60, learning_rate=0.1, max_leaf_nodes=8),
        features,
        is_aggregate,
        cv=StratifiedKFold(5, shuffle=True, random_state=seed),
        method="predict_proba",
    )[:, 1]
    return float((chance[~is_aggregate] < ratio / (1 + ratio)).mean())
