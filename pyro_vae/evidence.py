"""log p(x), the evidence, by importance sampling from the posterior.

    zₖ ~ q(z|x),  log wₖ = log p(x|zₖ) + log p(zₖ) − log q(zₖ|x),  k = 1 … K
    log p(x) ≈ log ⅟K Σₖ wₖ

The estimate's expectation is a lower bound that rises to log p(x) with K; at K = 1 it is the ELBO.
Its standard error follows from the weights' relative variance. Where their tail is heavy the error
is itself not to be trusted: `pareto_k` says where.

On x that was simulated from the model together with z*, z* is an exact draw from the posterior.
With it as one of the K draws the mean has a bound on the other side, for free: `upper_bound`.

Source: "Importance weighted autoencoders", arXiv 1509.00519; "Pareto smoothed importance sampling",
arXiv 1507.02646.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import pyro
import torch
from pyro.distributions import Distribution
from torch import Tensor, nn

from .capture import CapturedFunction, Mode
from .interface import LatentModel

__all__ = [
    "MIN_TAIL_SAMPLES",
    "Evidence",
    "choose_mode",
    "importance_sample",
    "log_evidence",
    "pareto_k",
    "reliable_k",
    "samples_at_once",
    "split_rows",
    "upper_bound",
]

# Values of x that are decoded at once. On a CPU 2^19 floats stay in the cache from one operation to
# the next, which is nearly twice as fast as 2^22; an accelerator has to be kept busy.
CHUNK_VALUES = 2**19
ACCELERATOR_CHUNK_VALUES = 2**25

# All but the decoder is done for so many of these chunks together: little work, in many calls.
CHUNKS_AT_ONCE = 8

# Values to decode from which it pays to compile the decoding.
COMPILE_FROM = 5e9

# Samples of one image that are decoded at once, at least: prior and guide are then little work
# beside the decoder.
CHUNK_SAMPLES = 64

# Fewer weights have no tail whose shape could be told.
MIN_TAIL_SAMPLES = 25


@dataclass(frozen=True)
class Evidence:
    """Importance-sampled evidence of B images, float64, nats.

    Attributes:
        log_evidence: (B,) estimates of log p(x).
        standard_error: (B,) of each estimate, from the weights' variance; NaN for one sample.
        reconstruction: (B,) means of log p(x|z) over the same samples.
        effective_sample_size: (B,) (Σ w)² / Σ w², 1 to `num_samples`.
        num_samples: K.
        pareto_k: (B,) shape of the weights' upper tail, see `pareto_k`; None unless asked for.
    """

    log_evidence: Tensor
    standard_error: Tensor
    reconstruction: Tensor
    effective_sample_size: Tensor
    num_samples: int
    pareto_k: Tensor | None = None


def log_evidence(vae: LatentModel, x: Tensor, num_samples: int = 5000) -> Tensor:
    """Estimates of log p(x) (B,), nats, for x (B, *data_shape). See `importance_sample`."""
    return importance_sample(vae, x, num_samples).log_evidence


@torch.no_grad()
def importance_sample(
    vae: LatentModel,
    x: Tensor,
    num_samples: int = 5000,
    on_chunk: Callable[[int], object] | None = None,
    with_pareto_k: bool = False,
    proposal: Distribution | None = None,
    mode: Mode | None = None,
) -> Evidence:
    """Importance-sampled log p(x) with its standard error, for each image.

    Memory is bounded whatever the number of samples: images and samples go through the decoder in
    chunks, and only sums are kept, unless the tail of the weights is asked for. Draws come from
    torch's global random state.

    Args:
        vae: anything with `prior()`, `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape), in the likelihood's units.
        num_samples: K, the number of draws for each image; exactly so many enter the mean.
        on_chunk: called with the number of (image, sample) pairs just done.
        with_pareto_k: whether to keep the weights of some images at a time for `pareto_k`.
        proposal: draws z from this, batch (B,), event (Z,), in place of q(z|x). The images then go
            through the decoder together, a few samples at a time.
        mode: whether to capture and compile drawing and decoding, see `capture.Mode`; by default
            where there is enough of it and `vae` is a module. What is compiled is kept for later
            calls with this `vae`.

    Raises:
        ValueError: `num_samples` is not positive, or x lies outside the likelihood's support.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples expects an integer of at least 1; got {num_samples}")
    if proposal is not None or not isinstance(vae, nn.Module):
        mode = "eager"  # of other objects it could not be told whether they have changed
    elif mode is None:
        mode = choose_mode(x.numel() * num_samples)
    weigh = _captured(vae, mode) if mode != "eager" else None
    parts = [
        _importance_sample(vae, part, num_samples, chunk, on_chunk, with_pareto_k, proposal, weigh)
        for part, chunk in (split_rows(x) if proposal is None else [(x, samples_at_once(x))])
    ]
    log_sum, log_sum_squares, reconstruction, tails = (
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
        pareto_k=tails if with_pareto_k else None,
    )


@torch.no_grad()
def upper_bound(vae: LatentModel, x: Tensor, z: Tensor, num_samples: int = 5000) -> Tensor:
    """A stochastic upper bound on log p(x) (B,), nats, for simulated x.

        log ⅟K (w(z*) + Σₖ w(zₖ)),  zₖ ~ q(z|x),  k = 2 … K

    Its expectation over z* ~ p(z|x) and the zₖ is at least log p(x), since the sum is then drawn
    in proportion to itself, and it falls to log p(x) with K.

    Args:
        vae: anything with `prior()`, `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape), drawn from p(x|z).
        z: (B, Z), z* ~ p(z), which generated x.
        num_samples: K; z* is one of them.

    Raises:
        ValueError: `num_samples` is not positive.
    """
    log_likelihood = vae.likelihood(z).log_prob(x).double()
    own = log_likelihood + vae.prior().log_prob(z) - vae.posterior(x).log_prob(z)
    if num_samples > 1:
        others = log_evidence(vae, x, num_samples - 1) + math.log(num_samples - 1)
        own = torch.logaddexp(own, others)
    elif num_samples < 1:
        raise ValueError(f"num_samples expects an integer of at least 1; got {num_samples}")
    return own - math.log(num_samples)


def pareto_k(log_weights: Tensor) -> Tensor:
    """The Pareto shape k̂ of the upper tail of importance weights (K, B) → (B,), float64.

    Below `reliable_k(K)` sums of the weights can be relied on; above it the error decreases slower
    with K than it claims, and above 1 the weights have no mean that K draws could show. Equal
    weights, which have no tail, give −∞.

    Raises:
        ValueError: K is below `MIN_TAIL_SAMPLES`.
    """
    if len(log_weights) < MIN_TAIL_SAMPLES:
        raise ValueError(
            f"the tail of the weights expects at least {MIN_TAIL_SAMPLES} samples; got "
            f"{len(log_weights)}"
        )
    from arviz_stats.base import array_stats

    tails = []
    num_samples = len(log_weights)
    # of the tail, as psislw has it
    size = int(3 * math.sqrt(num_samples)) if num_samples > 225 else num_samples // 5
    for weights in log_weights.double().cpu().numpy().T:
        highest = np.sort(weights)[-size - 1 :]
        cutoff, *tail = np.exp(highest - highest[-1])
        if np.ptp(weights) < 1e-3:
            tails.append(-math.inf)
        elif tail[int(size / 4 + 0.5) - 1] - cutoff < 1e-290:
            # More orders of magnitude than floats have: a few weights are all there is.
            tails.append(math.inf)
        else:
            # psislw takes the logarithms of the *inverse* weights.
            tails.append(float(array_stats.psislw(-weights)[1]))
    return torch.tensor(tails, dtype=torch.float64, device=log_weights.device)


def reliable_k(num_samples: int) -> float:
    """The largest k̂ at which K samples can be relied on: min(1 − 1/log₁₀ K, 0.7)."""
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def split_rows(x: Tensor) -> Iterator[tuple[Tensor, int]]:
    """x (B, *data_shape) in parts, and how many samples of z to decode at once for each."""
    for part in x.split(max(1, samples_at_once(x[:1]) // CHUNK_SAMPLES)):
        yield part, samples_at_once(part)


def samples_at_once(x: Tensor) -> int:
    """How many samples of z to decode at once for each of x (B, *data_shape)."""
    values = CHUNK_VALUES if x.device.type == "cpu" else ACCELERATOR_CHUNK_VALUES
    return max(1, values // max(1, x.numel()))


def choose_mode(num_values: float) -> Mode:
    """How to decode so many values: compiled where it pays."""
    return "compiled" if num_values >= COMPILE_FROM else "eager"


# What is compiled for each model, for as long as there is the model.
_compiled: WeakKeyDictionary[nn.Module, dict[Mode, CapturedFunction]] = WeakKeyDictionary()


def _captured(vae: Any, mode: Mode) -> CapturedFunction:
    """(x (B, *data_shape), S) → log p(x|z) and log w (S, B) at draws of its own."""
    reference = ref(vae)

    def weigh(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        vae = reference()  # which the compiled function must not keep alive
        assert vae is not None
        posterior = vae.posterior(x)
        # Under no gradient the same; what Normal.sample does takes longer than the prior's density.
        z = posterior.rsample((size,)) if posterior.has_rsample else posterior.sample((size,))
        log_likelihood = vae.likelihood(z).log_prob(x)
        return log_likelihood, vae.prior().log_prob(z) - posterior.log_prob(z)

    modes = _compiled.setdefault(vae, {})
    if mode not in modes:
        modes[mode] = CapturedFunction(weigh, mode)
    return modes[mode]


def _importance_sample(
    vae: LatentModel,
    x: Tensor,
    num_samples: int,
    chunk: int,
    on_chunk: Callable[[int], object] | None,
    with_pareto_k: bool,
    proposal: Distribution | None,
    weigh: CapturedFunction | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log Σ w, log Σ w², mean log p(x|z) and perhaps k̂, each (B,), float64."""
    prior = vae.prior()
    posterior = vae.posterior(x) if proposal is None else proposal
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    log_sum_squares = log_sum.clone()
    reconstruction = torch.zeros_like(log_sum)
    kept = []
    block = CHUNKS_AT_ONCE * chunk if weigh is None else chunk
    for done in range(0, num_samples, block):
        size = min(block, num_samples - done)  # S
        if weigh is not None and size == block:
            log_likelihood, log_ratio = weigh(x, size)
        else:
            z = posterior.sample((size,))  # (S, B, Z)
            # Supports are checked on the first samples; the others have the same x.
            with pyro.validation_enabled(done == 0):
                parts = [vae.likelihood(part).log_prob(x) for part in z.split(chunk)]
            log_likelihood = torch.cat(parts)  # (S, B)
            log_ratio = prior.log_prob(z) - posterior.log_prob(z)
        log_likelihood = log_likelihood.double()
        log_weights = log_likelihood + log_ratio
        log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_weights).logsumexp(0))
        reconstruction += log_likelihood.sum(0) / num_samples
        if with_pareto_k:
            kept.append(log_weights)
        if on_chunk is not None:
            on_chunk(log_weights.numel())
    tails = pareto_k(torch.cat(kept)) if kept else torch.empty_like(log_sum)
    return log_sum, log_sum_squares, reconstruction, tails
