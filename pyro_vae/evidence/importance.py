"""log p(x), the evidence, by importance sampling from the posterior.

    zₖ ~ q(z|x),  log wₖ = log p(x|zₖ) + log p(zₖ) − log q(zₖ|x),  k = 1 … K
    log p(x) ≈ log ⅟K Σₖ wₖ

The expectation of the estimate is a lower bound that rises to log p(x) with K; at K = 1 it is the
ELBO. The standard error follows from the relative variance of the weights. Where the weights have a
heavy tail, neither the estimate nor its error is reliable; `pareto_k` measures the tail.

If x was simulated from the model together with z*, then z* is an exact draw from the posterior.
With z* as one of the K draws the mean gives an upper bound, `upper_bound`.

Source: "Importance weighted autoencoders", arXiv 1509.00519; "Pareto smoothed importance sampling",
arXiv 1507.02646.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import pyro
import torch
from pyro.distributions import Distribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ..capture.captured import CapturedFunction, Mode
from ..models.interface import LatentModel
from ..models.log_weights import log_likelihood, log_weights
from ..models.refined import Refined
from ..runtime.memory import Callback, check_memory, concatenate, ignore, rows_at_once
from ..runtime.randomness import one_thread

# Draws of z for each row in a chunk, at least: the decoder then takes most of the time.
MIN_CHUNK_DRAWS = 64
# A refined posterior is found once for all chunks, and in less time for many rows together: for so
# many, if a chunk holds so many draws of each.
REFINED_ROWS, REFINED_DRAWS = 64, 8
# Chunks whose z are drawn, or whose weights are added, together, in fewer calls.
CHUNKS_PER_BLOCK = 8
# Number of decoded values from which compiling the decoder pays.
COMPILE_FROM = 5e9
# Fewer weights do not show the shape of their tail.
MIN_TAIL_SAMPLES = 25


@dataclass(frozen=True)
class Evidence:
    """Importance-sampled evidence of B rows, float64, nats.

    Attributes:
        log_evidence: (B,) estimates of log p(x); −∞ if all weights are zero, with an infinite
            `standard_error` and `pareto_k` and an `effective_sample_size` of 0.
        standard_error: (B,) of each estimate, from the variance of the weights; NaN for one sample.
        elbo: (B,) means of log w.
        reconstruction: (B,) means of log p(x|z).
        effective_sample_size: (B,) (Σ w)² / Σ w², 1 to `num_samples`.
        num_samples: K.
        pareto_k: (B,) shape of the weights' upper tail, see `pareto_k`; None unless requested.
        kl: (B,) KL(q(z|x) ‖ p(z)), in closed form, or over the same draws if there is none; None
            unless requested.
        mean: (B, Z) of q(z|x); None unless requested.
    """

    log_evidence: Tensor
    standard_error: Tensor
    elbo: Tensor
    reconstruction: Tensor
    effective_sample_size: Tensor
    num_samples: int
    pareto_k: Tensor | None = None
    kl: Tensor | None = None
    mean: Tensor | None = None


def log_evidence(vae: LatentModel, x: Tensor, num_samples: int = 5000) -> Tensor:
    """Estimates of log p(x) (B,), nats, for x (B, *data_shape). See `importance_sample`."""
    return importance_sample(vae, x, num_samples).log_evidence


@one_thread()
@torch.no_grad()
def importance_sample(
    vae: LatentModel,
    x: Tensor,
    num_samples: int = 5000,
    on_chunk: Callback = ignore,
    with_pareto_k: bool = False,
    proposal: Distribution | None = None,
    mode: Mode | None = None,
    with_posterior: bool = False,
) -> Evidence:
    """Importance-sampled log p(x) with its standard error, for each row.

    Only sums are kept: memory does not grow with K unless `with_pareto_k` is set. Draws come from
    torch's global random state. Rows whose weights overflow float32, such as outliers, are repeated
    by a copy of the module in float64.

    Args:
        vae: model with `prior()`, `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape), in the likelihood's units.
        num_samples: K, the number of draws for each row.
        on_chunk: called with the number of (row, sample) pairs just done.
        with_pareto_k: keep the weights of a chunk of rows and fit their tail.
        proposal: distribution to draw z from in place of q(z|x), batch (B,), event (Z,). All rows
            are then decoded together, a few samples at a time.
        mode: whether to capture and compile the sampling, see `capture.Mode`; by default compiled
            if `vae` is a module and there are many values to decode. Compiled code is kept for
            later calls with this `vae`. Draws from a proposal or a refined guide are not captured.
        with_posterior: keep KL and mean of q, of which the mean of a flow takes many draws.

    Raises:
        ValueError: `num_samples` is not positive, x lies outside the likelihood's support, or the
            weights to keep exceed the memory (`InputError`).
    """
    if num_samples < 1:
        raise ValueError(f"num_samples expects an integer of at least 1; got {num_samples}")
    if not isinstance(vae, nn.Module):
        mode = "eager"  # changes of other objects cannot be detected
    elif mode is None:
        mode = choose_mode(x.numel() * num_samples)
    rows = _rows_together(vae, x)
    if with_pareto_k:  # two copies of the weights, in float64
        kept = min(rows, len(x))
        what = f"the weights of {num_samples:,} samples for {kept} rows"
        check_memory(4 * kept * num_samples, what, "lower --num-samples")
    parts = []
    for part in x.split(rows) if proposal is None else [x]:
        q = vae.posterior(part) if proposal is None else proposal
        sample = _sampler(vae, mode, part, q, given=proposal is not None)
        blocks = _blocks(vae, q, part, num_samples, sample)
        found = _estimate(blocks, x.device, num_samples, on_chunk, with_pareto_k)
        if with_posterior:
            found = replace(found, kl=_kl(q, vae.prior(), found), mean=q.mean.double())
        parts.append(found)
    evidence = concatenate(parts)
    if proposal is None and isinstance(vae, nn.Module) and x.dtype != torch.float64:
        _repeat_beyond_float32(evidence, vae, x, on_chunk)
    return evidence


def _rows_together(vae: Any, x: Tensor) -> int:
    """Number of rows in a part of x, a power of two: it divides the batches of a split."""
    size = x[:1].numel()
    rows = rows_at_once(MIN_CHUNK_DRAWS * size, x.device)
    if _is_refined(vae):
        rows = max(rows, min(REFINED_ROWS, rows_at_once(REFINED_DRAWS * size, x.device)))
    return 2 ** (rows.bit_length() - 1)


def _repeat_beyond_float32(evidence: Evidence, vae: Any, x: Tensor, on_chunk: Callback) -> None:
    """Sample the rows whose log p(x) is not finite again, by a copy of the model in float64."""
    beyond = ~evidence.log_evidence.isfinite()
    if not beyond.any():
        return
    repeated = importance_sample(
        copy.deepcopy(vae).double(),
        x[beyond].double(),
        evidence.num_samples,
        on_chunk,
        evidence.pareto_k is not None,
        mode="eager",
        with_posterior=evidence.kl is not None,
    )
    for name, value in vars(repeated).items():
        if isinstance(value, Tensor):
            getattr(evidence, name)[beyond] = value


@one_thread()
@torch.no_grad()
def upper_bound(vae: LatentModel, x: Tensor, z: Tensor, num_samples: int = 5000) -> Tensor:
    """A stochastic upper bound on log p(x) (B,), nats, for simulated x.

    log ⅟K (w(z*) + Σₖ w(zₖ)), zₖ ~ q(z|x), k = 2 … K. Its expectation is at least log p(x) and
    falls to it with K.

    Args:
        vae: model with `prior()`, `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape), drawn from p(x|z).
        z: (B, Z), z* ~ p(z), which generated x.
        num_samples: K; z* is one of them.

    Raises:
        ValueError: `num_samples` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples expects an integer of at least 1; got {num_samples}")
    _, (own,) = log_weights(vae, vae.posterior(x), x, z.unsqueeze(0))
    if num_samples > 1:
        others = log_evidence(vae, x, num_samples - 1) + math.log(num_samples - 1)
        own = torch.logaddexp(own, others)
    return own - math.log(num_samples)


def pareto_k(log_weights: Tensor) -> Tensor:
    """The Pareto shape k̂ of the upper tail of importance weights (K, B) → (B,), float64.

    Sums of the weights are reliable where k̂ is below `reliable_k(K)`. Above it the error decreases
    slower with K than its estimate says, and above 1 the weights have no finite mean. Equal weights
    have no tail and give −∞. Weights that are all zero, or NaN, give ∞.

    Raises:
        ValueError: K is below `MIN_TAIL_SAMPLES`.
    """
    _check_tail(len(log_weights))
    tails = [_smoothed(weights)[1] for weights in log_weights.double().cpu().numpy().T]
    return torch.tensor(tails, dtype=torch.float64, device=log_weights.device)


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed log-weights (K, B) of log-weights (K, B), and their `pareto_k` (B,), float64.

    The largest weights are replaced by quantiles of the generalized Pareto distribution fitted to
    them. Log-weights whose tail cannot be fitted stay as they are.

    Raises:
        ValueError: K is below `MIN_TAIL_SAMPLES`.
    """
    _check_tail(len(log_weights))
    pairs = [_smoothed(weights) for weights in log_weights.double().cpu().numpy().T]
    smoothed, tails = (np.stack(values, axis=-1) for values in zip(*pairs, strict=True))
    return torch.as_tensor(smoothed).to(log_weights.device), torch.as_tensor(tails).to(
        log_weights.device
    )


def _check_tail(count: int) -> None:
    if count < MIN_TAIL_SAMPLES:
        raise ValueError(
            f"the tail of the weights expects at least {MIN_TAIL_SAMPLES} samples; got {count}"
        )


def _smoothed(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed log-weights (K,) of log-weights (K,), and k̂."""
    from arviz_stats.base import array_stats

    count = len(weights)
    # Size of the tail, as psislw chooses it
    size = int(3 * math.sqrt(count)) if count > 225 else count // 5
    highest = np.sort(weights)[-size - 1 :]
    if not np.isfinite(highest[-1]):
        return weights, math.inf
    cutoff, *tail = np.exp(highest - highest[-1])
    if np.ptp(weights) < 1e-3:
        return weights, -math.inf
    if tail[int(size / 4 + 0.5) - 1] - cutoff < 1e-290:
        return weights, math.inf  # a few weights exceed the others beyond the range of floats
    smoothed, k = array_stats.psislw(-weights)  # takes the inverse weights
    return smoothed, float(k)


def reliable_k(num_samples: int) -> float:
    """The largest k̂ at which sums of K weights are reliable: min(1 − 1/log₁₀ K, 0.7)."""
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def choose_mode(num_values: float) -> Mode:
    """The mode in which to decode so many values: compiled if that pays."""
    return "compiled" if num_values >= COMPILE_FROM else "eager"


# S → `log_weights` (S, B) of S draws of z for each row
Sampler = Callable[[int], tuple[Tensor, Tensor]]
# Compiled functions of each model, kept while the model exists
_compiled: WeakKeyDictionary[nn.Module, dict[Any, CapturedFunction]] = WeakKeyDictionary()


def _captured(vae: Any, mode: Mode, draws: bool = True) -> CapturedFunction:
    """(x (B, *data_shape), S) → `log_weights` (S, B) of S draws from q(z|x), captured.

    Without `draws`: (x, z (S, B, Z)) → log p(x|z), float64, and log p(z), (S, B) each.
    """
    reference = ref(vae)  # the compiled function must not keep the model alive

    def sample(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        vae: Any = reference()
        posterior = vae.posterior(x)
        # Without gradients rsample equals sample, and Normal.rsample is faster.
        z = posterior.rsample((size,)) if posterior.has_rsample else posterior.sample((size,))
        return log_weights(vae, posterior, x, z)

    def decode(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        vae: Any = reference()
        return log_likelihood(vae, x, z).double(), vae.prior().log_prob(z)

    functions = _compiled.setdefault(vae, {})
    if (mode, draws) not in functions:
        functions[mode, draws] = CapturedFunction(sample if draws else decode, mode)
    return functions[mode, draws]


def _is_refined(vae: Any) -> bool:
    return isinstance(getattr(vae, "family", None), Refined)


def _sampler(vae: Any, mode: Mode, x: Tensor, q: Distribution, given: bool) -> Sampler | None:
    """The captured sampling of x (B, *data_shape) from q; None for the mode eager.

    The draws from q are part of the graph unless q is given, or refined, which costs as much as
    many draws: then it is found once for all of them.
    """
    if mode == "eager":
        return None
    if not (given or _is_refined(vae)):
        return partial(_captured(vae, mode), x)
    decode = _captured(vae, mode, draws=False)

    def sample(size: int) -> tuple[Tensor, Tensor]:
        z = q.sample((size,))
        reconstruction, log_prior = decode(x, z)
        return reconstruction, reconstruction + (log_prior - q.log_prob(z))

    return sample


def _blocks(
    vae: LatentModel, q: Distribution, x: Tensor, num_samples: int, sample: Sampler | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """log p(x|z) and log w (S, B) of blocks of draws from q, `num_samples` for each row in all."""
    chunk = rows_at_once(x.numel(), x.device)
    for done in range(0, num_samples, CHUNKS_PER_BLOCK * chunk):
        size = min(CHUNKS_PER_BLOCK * chunk, num_samples - done)
        parts = []
        if sample is not None:  # in chunks of one size, for which it is captured
            parts = [sample(chunk) for _ in range(size // chunk)]
            size %= chunk
        if size > 0:
            z = q.sample((size,))
            with pyro.validation_enabled(done == 0):  # the first block checks the support of x
                parts.append(log_weights(vae, q, x, z))
        log_likelihoods, weights = zip(*parts, strict=True)
        yield torch.cat(log_likelihoods), torch.cat(weights)


def _estimate(
    blocks: Iterator[tuple[Tensor, Tensor]],
    device: torch.device,
    count: int,
    on_chunk: Callback,
    with_pareto_k: bool,
) -> Evidence:
    """The evidence from blocks of log p(x|z) and log w (S, B)."""
    log_sum = log_sum_squares = torch.tensor(-math.inf, dtype=torch.float64, device=device)
    elbo = reconstruction = torch.zeros((), dtype=torch.float64, device=device)
    kept = []
    for reconstructions, log_w in blocks:
        log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_w).logsumexp(0))
        elbo = elbo + log_w.sum(0) / count
        reconstruction = reconstruction + reconstructions.sum(0) / count
        if with_pareto_k:
            kept.append(log_w)
        on_chunk(log_w.numel())
    # Σw²/(Σw)² is between 1/K and 1; times K it is 1 + the relative variance of the weights. It
    # counts as infinite if all weights are zero.
    concentration = torch.exp(log_sum_squares - 2 * log_sum)
    concentration = torch.where(log_sum == -math.inf, math.inf, concentration)
    relative_variance = (count * concentration - 1).clamp_min(0)
    spread = torch.sqrt(relative_variance / (count - 1)) if count > 1 else torch.nan
    return Evidence(
        log_evidence=log_sum - math.log(count),
        standard_error=spread * torch.ones_like(log_sum),
        elbo=elbo,
        reconstruction=reconstruction,
        effective_sample_size=1 / concentration,
        num_samples=count,
        pareto_k=pareto_k(torch.cat(kept)) if kept else None,
    )


def _kl(q: Distribution, prior: Distribution, evidence: Evidence) -> Tensor:
    """KL(q(z|x) ‖ p(z)) (B,), float64, nats: in closed form, or over the draws of `evidence`."""
    try:
        return kl_divergence(q, prior).double()
    except NotImplementedError:
        return evidence.reconstruction - evidence.elbo
