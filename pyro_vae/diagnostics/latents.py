"""Use of the latents: KL and activity of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import kl_divergence

from ..evidence.evaluation import ACTIVE_VARIANCE
from ..models.interface import LatentModel
from ..runtime.memory import rows_at_once

# A latent is collapsed if its KL is below this, in nats.
COLLAPSED_KL = 0.01


@dataclass(frozen=True)
class LatentUse:
    """Information in each latent, over N rows.

    Attributes:
        kl: (Z,) mean of KL(N(m, s²) ‖ N(m₀, s₀²)), nats, with mean and variance of each latent
            under q(z|x) and p(z). These are the terms of the KL if the latents of both are
            independent and normal.
        mean_variance: (Z,) variance over rows of the posterior mean.
    """

    kl: np.ndarray
    mean_variance: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """(Z,) whether the posterior mean moves with x."""
        return self.mean_variance > ACTIVE_VARIANCE

    @property
    def collapsed(self) -> np.ndarray:
        """(Z,) whether q(z|x) equals the prior: the latent has no information on x."""
        return self.kl < COLLAPSED_KL


@torch.no_grad()
def latent_use(vae: LatentModel, x: Tensor) -> LatentUse:
    """KL and activity of each latent.

    Args:
        vae: model with `prior()` and `posterior(x)`, both with means and variances.
        x: (N, *data_shape).

    Raises:
        ValueError: fewer than two rows.
    """
    if len(x) < 2:
        raise ValueError(f"the variance over rows expects at least 2; got {len(x)}")
    prior = vae.prior()
    marginal = Normal(prior.mean, prior.variance.sqrt())
    rows = rows_at_once(x[0].numel(), x.device)
    posteriors = [vae.posterior(part) for part in x.split(rows)]
    mean = torch.cat([q.mean for q in posteriors])
    scale = torch.cat([q.variance for q in posteriors]).sqrt()
    kl = kl_divergence(Normal(mean, scale), marginal)
    return LatentUse(
        kl=kl.double().mean(0).cpu().numpy(), mean_variance=mean.double().var(0).cpu().numpy()
    )
