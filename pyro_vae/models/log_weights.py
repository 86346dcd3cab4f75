"""Importance weights of draws from a posterior.

    log w = log p(x|z) + log p(z) − log q(z|x)

Their mean over z ~ q(z|x) is the ELBO; the log-mean of w estimates log p(x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import Distribution
from torch import Tensor

from ..runtime.memory import rows_at_once
from .interface import LatentModel


def log_weights(
    vae: LatentModel, posterior: Distribution, x: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """log p(x|z) and log w, (S, B) each, float64, nats.

    Args:
        posterior: q, batch (B,), event (Z,); any distribution, not only `vae.posterior(x)`.
        x: (B, *data_shape).
        z: (S, B, Z), draws from q.
    """
    reconstruction = log_likelihood(vae, x, z).double()
    return reconstruction, reconstruction + (vae.prior().log_prob(z) - posterior.log_prob(z))


def log_likelihood(vae: LatentModel, x: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) (S, B), nats, for x (B, *data_shape) and z (S, B, Z) or (S, 1, Z), in chunks."""
    chunks = z.split(rows_at_once(x.numel(), x.device))
    return torch.cat([vae.likelihood(chunk).log_prob(x) for chunk in chunks])


def with_slope(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """A log-density (...) at z (..., Z), and its gradient in z, which has the shape of z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = function(z)
        (slope,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), slope
