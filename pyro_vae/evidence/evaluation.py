"""Evaluate a model on a split: ELBO, log p(x), bits per dimension, active units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ..data.splits import Split
from ..memory import Callback, ignore
from ..models.autoencoder import Autoencoder
from ..models.vae import VAE
from ..randomness import derive, random_states
from .importance import MIN_TAIL_SAMPLES, Evidence, choose_mode, importance_sample, reliable_k

# A latent is active if the variance over rows of its posterior mean exceeds this ("Importance
# weighted autoencoders", arXiv 1509.00519).
ACTIVE_VARIANCE = 0.01


def elbo_terms(
    vae: VAE | Autoencoder, split: Split, seed: int = 0, num_images: int | None = None
) -> tuple[float, float | None]:
    """Mean reconstruction and KL over a split, nats per row, with one draw of z per row.

    `seed` fixes draws and binarization; torch's global random state does not change. The KL of an
    `Autoencoder` is None.
    """
    reconstruction, kl, count = 0.0, 0.0, 0
    with random_states(split.device, derive(seed, "posterior")):
        for x in split.fixed(vae.likelihood_module.units, seed, num_images):
            reconstructions, kls = vae.elbo_terms(x)
            reconstruction += reconstructions.double().sum().item()
            kl += 0.0 if kls is None else kls.double().sum().item()
            count += len(x)
    return reconstruction / count, None if isinstance(vae, Autoencoder) else kl / count


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over rows, in nats per row; None if the model or likelihood has no such number.

    Attributes:
        elbo: reconstruction − kl.
        reconstruction: E_q[log p(x|z)] over `num_samples` draws of z; for an autoencoder log p(x|z)
            at the code of x.
        kl: KL(q(z|x) ‖ p(z)), in closed form.
        log_evidence: importance-sampled log p(x).
        standard_error: of the mean log p(x), with the rows as a sample of their population.
        monte_carlo_error: of the mean log p(x) of these rows, from the importance weights.
        unreliable_weights: share of rows whose weights have too heavy a tail to rely on log p(x)
            and on the Monte Carlo error (`evidence.reliable_k`).
        bits_per_dim: −log p(x) / (D log 2), of discrete data.
        active_units: number of latents whose posterior mean varies over rows by `ACTIVE_VARIANCE`.
        num_images: number of rows.
        num_samples: importance samples per row.
        binarization: "fixed" with its seed if grey values are binarized, else "none".
    """

    elbo: float | None = None
    reconstruction: float
    kl: float | None = None
    log_evidence: float | None = None
    standard_error: float | None = None
    monte_carlo_error: float | None = None
    unreliable_weights: float | None = None
    bits_per_dim: float | None = None
    active_units: int | None = None
    num_images: int
    num_samples: int | None = None
    binarization: str


@torch.no_grad()
def evaluate(
    vae: VAE | Autoencoder,
    split: Split,
    num_samples: int = 5000,
    num_rows: int | None = None,
    seed: int = 0,
    on_chunk: Callback = ignore,
    on_batch: Callable[[float, float], object] | None = None,
) -> Evaluation:
    """Measure a model on a split, and restore torch's global random state.

    Args:
        vae: the model, on the split's device.
        split: the rows.
        num_samples: importance samples of z per row.
        num_rows: number of rows, from the beginning of the split; by default all.
        seed: of the samples and of the binarization.
        on_chunk: called with the number of (row, sample) pairs just done.
        on_batch: called after each batch with the mean ELBO and log p(x) of all rows so far.
    """
    likelihood, count = vae.likelihood_module, min(len(split), num_rows or len(split))
    binarized = split.spec.binarizes(likelihood.units)
    binarization = f"fixed, seed {seed}" if binarized else "none"
    batches = split.fixed(likelihood.units, seed, count)
    if isinstance(vae, Autoencoder):
        mean, _ = elbo_terms(vae, split, seed, count)
        return Evaluation(reconstruction=mean, num_images=count, binarization=binarization)

    size = math.prod(split.spec.shape)
    mode, with_tail = choose_mode(count * num_samples * size), num_samples >= MIN_TAIL_SAMPLES
    parts: list[tuple[Tensor, ...]] = []
    with random_states(split.device, derive(seed, "posterior")):
        for x in batches:
            evidence = importance_sample(vae, x, num_samples, on_chunk, with_tail, mode=mode)
            parts.append(_terms(vae, x, evidence))
            if on_batch is not None:
                log_evidence, reconstruction, kl, *_ = _joined(parts)
                on_batch((reconstruction - kl).mean().item(), log_evidence.mean().item())
    log_evidence, reconstruction, kl, errors, tails, means = _joined(parts)

    density, deviation = log_evidence.mean().item(), errors.square().sum().sqrt().item()
    unreliable = (tails > reliable_k(num_samples)).double().mean().item()
    several = count > 1
    return Evaluation(
        elbo=reconstruction.mean().item() - kl.mean().item(),
        reconstruction=reconstruction.mean().item(),
        kl=kl.mean().item(),
        log_evidence=density,
        standard_error=log_evidence.std().item() / math.sqrt(count) if several else None,
        monte_carlo_error=deviation / count if num_samples > 1 else None,
        unreliable_weights=unreliable if with_tail else None,
        bits_per_dim=-density / (size * math.log(2)) if likelihood.is_discrete else None,
        active_units=int((means.var(0) > ACTIVE_VARIANCE).sum()) if several else None,
        num_images=count,
        num_samples=num_samples,
        binarization=binarization,
    )


def _terms(vae: VAE, x: Tensor, evidence: Evidence) -> tuple[Tensor, ...]:
    """log p(x), log p(x|z), KL, error, k̂ (if missing, KL), (B,) each; posterior mean (B, Z)."""
    posterior = vae.posterior(x)
    kl = kl_divergence(posterior, vae.prior()).double()
    tail = kl if evidence.pareto_k is None else evidence.pareto_k
    terms = (evidence.log_evidence, evidence.reconstruction, kl, evidence.standard_error, tail)
    return (*terms, posterior.mean.double())


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The terms of all batches, concatenated over rows."""
    return [torch.cat(column) for column in zip(*parts, strict=True)]
