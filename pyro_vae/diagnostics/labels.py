"""Simulation-based calibration of q(y|x): whether its probabilities of labels are right.

    y* ~ p(y),  z* ~ p(z),  x ~ p(x|z*, y*)
    u = Σ_{k < y*} q(k|x) + U q(y*|x),  U uniform on [0, 1]

If q(y|x) = p(y|x), then u, the randomized probability integral transform, is uniform; for every
class k the mean of q(k|x) (1[y* = k] − q(k|x)) is 0; and the label that is most probable is right
as often as q says. The first test depends on the order of the classes and averages over them. The
other two do not.

Source: "Evaluating count data models: predictive model assessment for count data", doi
10.1111/j.1541-0420.2009.01191.x, for u; "Calibration tests in multi-class classification",
arXiv 1910.11385.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..data.missing import hidden_at_random
from ..models.labels import SemiSupervisedVAE
from ..runtime.memory import Callback, ignore, rows_at_once
from ..runtime.randomness import one_thread


@dataclass(frozen=True)
class LabelSimulations:
    """N rows simulated from the model, with their labels.

    Attributes:
        labels: (N,) y*.
        probabilities: (N, C) q(y|x).
        transform: (N,) u.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    transform: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """(N,) the probability of the most probable label."""
        return self.probabilities.max(1)

    @property
    def correct(self) -> np.ndarray:
        """(N,) whether the most probable label is y*."""
        return self.probabilities.argmax(1) == self.labels

    @property
    def residuals(self) -> np.ndarray:
        """(N, C) 1[y* = k] − q(k|x), of mean 0 given x if q(y|x) is exact."""
        return np.eye(self.probabilities.shape[1])[self.labels] - self.probabilities


@one_thread()
@torch.no_grad()
def simulate_labels(
    vae: SemiSupervisedVAE,
    num_simulations: int = 1000,
    on_chunk: Callback = ignore,
    like: Tensor | None = None,
) -> LabelSimulations:
    """Draw rows with labels from the model, and read q(y|x). Draws are from torch's global state.

    Args:
        vae: the model.
        num_simulations: N.
        on_chunk: called with the number of simulations just done.
        like: (M, *data_shape), rows whose missing values simulated rows lack, as in `sbc.simulate`.

    Raises:
        ValueError: N is not positive.
    """
    if num_simulations < 1:
        raise ValueError(f"num_simulations expects at least 1; got {num_simulations}")
    labels = vae.label_prior().sample((num_simulations,))
    z = vae.prior().sample((num_simulations,))
    size = vae.likelihood(z[:1], labels[:1]).event_shape.numel()
    rows, found = rows_at_once(size, z.device), []
    for part, y in zip(z.split(rows), labels.split(rows), strict=True):
        x = hidden_at_random(vae.likelihood(part, y).sample(), like)
        found.append(vae.label_posterior(x).probs.double())
        on_chunk(len(x))
    q = torch.cat(found)
    own = q.gather(1, labels.unsqueeze(1)).squeeze(1)
    below = q.cumsum(1).gather(1, labels.unsqueeze(1)).squeeze(1) - own
    u = below + torch.rand(own.shape, dtype=own.dtype, device=own.device) * own
    return LabelSimulations(labels.cpu().numpy(), q.cpu().numpy(), u.clamp(0, 1).cpu().numpy())


@dataclass(frozen=True)
class LabelTests:
    """Tests of q(y|x) = p(y|x).

    Attributes:
        p_transform: of the uniformity of u, by Kolmogorov and Smirnov.
        p_classes: of the residuals of all classes, weighted by q, by Bonferroni's correction.
        p_confidence: of confidence against accuracy.
        scores: (C,) the standardized residual of each class, normal if q(y|x) is exact.
    """

    p_transform: float
    p_classes: float
    p_confidence: float
    scores: np.ndarray

    @property
    def p_value(self) -> float:
        """p-value of the three tests together, by Bonferroni's correction."""
        return min(1.0, 3 * min(self.p_transform, self.p_classes, self.p_confidence))


def check_labels(simulations: LabelSimulations) -> LabelTests:
    """Test the labels. For an exact q(y|x), `p_value` is uniform or larger; for N of some hundreds.

    Raises:
        ValueError: fewer than 40 simulations.
    """
    count = len(simulations.labels)
    if count < 40:
        raise ValueError(f"testing labels expects at least 40 simulations; got {count}")
    q, residuals = simulations.probabilities, simulations.residuals
    scores = _standardized((q * residuals).sum(0), (q**2 * q * (1 - q)).sum(0))
    sure = simulations.confidence
    excess = _standardized((simulations.correct - sure).sum(), (sure * (1 - sure)).sum())
    smallest = float(2 * stats.norm.sf(np.abs(scores).max()))
    return LabelTests(
        p_transform=float(stats.kstest(simulations.transform, "uniform").pvalue),
        p_classes=min(1.0, len(scores) * smallest),
        p_confidence=float(2 * stats.norm.sf(abs(excess))),
        scores=scores,
    )


def _standardized(total: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Sums in their standard deviations; infinite if a sum without variance is not 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(total) < 1e-9, 0.0, total / np.sqrt(variance))
