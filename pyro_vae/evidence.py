"""log p(x), the evidence, by importance sampling from the posterior.

    zₖ ~ q(z|x),  log wₖ = log p(x|zₖ) + log p(zₖ) − log q(zₖ|x),  k = 1 … K
    log p(x) ≈ log ⅟K Σₖ wₖ

The estimate's expectation is a lower bound that rises to log p(x) with K; at K = 1 it is the ELBO.
Its standard error follows from the weights' relative variance. Where that is large, the error is
itself not to be trusted: see the effective sample size.

Source: "Importance weighted autoencoders", arXiv 1509.00519.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from .vae import VAE

__all__ = ["Evidence", "importance_sample", "log_evidence"]

# Values of x that are decoded at once: 2^22 floats are 16 MiB, a few times that in the decoder.
CHUNK_VALUES = 2**22


@dataclass(frozen=True)
class Evidence:
    """Importance-sampled evidence of B images, float64, nats.

    Attributes:
        log_evidence: (B,) estimates of log p(x).
        standard_error: (B,) of each estimate, from the weights' variance; NaN for one sample.
        reconstruction: (B,) means of log p(x|z) over the same samples.
        effective_sample_size: (B,) (Σ w)² / Σ w², 1 to `num_samples`.
        num_samples: K.
    """

    log_evidence: Tensor
    standard_error: Tensor
    reconstruction: Tensor
    effective_sample_size: Tensor
    num_samples: int


def log_evidence(vae: VAE, x: Tensor, num_samples: int = 5000) -> Tensor:
    """Estimates of log p(x) (B,), nats, for x (B, *data_shape). See `importance_sample`."""
    return importance_sample(vae, x, num_samples).log_evidence


@torch.no_grad()
def importance_sample(
    vae: VAE,
    x: Tensor,
    num_samples: int = 5000,
    on_chunk: Callable[[int], object] | None = None,
) -> Evidence:
    """Importance-sampled log p(x) with its standard error, for each image.

    Memory is bounded whatever the number of samples: images and samples go through the decoder in
    chunks, and only sums are kept. Draws come from torch's global random state.

    Args:
        vae: anything with `prior()`, `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape), in the likelihood's units.
        num_samples: K, the number of draws for each image; exactly so many enter the mean.
        on_chunk: called with the number of (image, sample) pairs just done.

    Raises:
        ValueError: `num_samples` is not positive, or x lies outside the likelihood's support.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples expects an integer of at least 1; got {num_samples}")
    size = max(1, x[0].numel())
    num_images = max(1, min(len(x), CHUNK_VALUES // size))
    parts = [
        _importance_sample(
            vae, part, num_samples, max(1, CHUNK_VALUES // (size * len(part))), on_chunk
        )
        for part in x.split(num_images)
    ]
    log_sum, log_sum_squares, reconstruction = (
        torch.cat(terms) for terms in zip(*parts, strict=True)
    )
    # Σw²/(Σw)² is between 1/K and 1; times K it is 1 + the relative variance of the weights.
    concentration = torch.exp(log_sum_squares - 2 * log_sum)
    relative_variance = (num_samples * concentration - 1).clamp_min(0)
    spread = torch.sqrt(relative_variance / (num_samples - 1)) if num_samples > 1 else torch.nan
    return Evidence(
        log_evidence=log_sum - math.log(num_samples),
        standard_error=spread * torch.ones_like(log_sum),
        reconstruction=reconstruction,
        effective_sample_size=1 / concentration,
        num_samples=num_samples,
    )


def _importance_sample(
    vae: VAE,
    x: Tensor,
    num_samples: int,
    chunk: int,
    on_chunk: Callable[[int], object] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ w, log Σ w² and mean log p(x|z), each (B,), float64."""
    prior, posterior = vae.prior(), vae.posterior(x)
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    log_sum_squares = log_sum.clone()
    reconstruction = torch.zeros_like(log_sum)
    for done in range(0, num_samples, chunk):
        z = posterior.sample((min(chunk, num_samples - done),))  # (S, B, Z)
        # Supports are checked on the first samples; the others have the same x.
        with pyro.validation_enabled(done == 0):
            log_likelihood = vae.likelihood(z).log_prob(x).double()  # (S, B)
        log_weights = log_likelihood + prior.log_prob(z) - posterior.log_prob(z)
        log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_weights).logsumexp(0))
        reconstruction += log_likelihood.sum(0) / num_samples
        if on_chunk is not None:
            on_chunk(log_weights.numel())
    return log_sum, log_sum_squares, reconstruction
