"""Draws from p(z|x), for each row by the cheapest method that can be relied on.

    1. importance    K draws from q(z|x), of which N are resampled with Pareto-smoothed weights
    2. refined       the same, half of the K from a full Gaussian r(z) fitted to the row
    3. nuts          chains of the No-U-Turn sampler that agree

A row goes on to the next method where Pareto k̂ of its weights is above `reliable_k(K)`, or their
effective sample size (Σ w)² / Σ w² below 100. The weights are those of a mixture,

    log w = log p(x, z) − log (0.9 q(z|x) + 0.1 p(z)),             in step 1
    log w = log p(x, z) − log (0.45 q(z|x) + 0.45 r(z) + 0.1 p(z)) in step 2

since weights of draws from a narrow q alone do not show a mode that q misses. There, a few draws
from the prior hold most of the weight. With many latents, draws from the prior rarely reach a
posterior: no number here then shows a mode that neither q(z|x), r(z) nor a chain reaches.

Source: "Amortized Bayesian workflow", arXiv 2409.04332; "Pareto smoothed importance sampling",
arXiv 1507.02646; "Weighted average importance sampling and defensive mixture distributions", doi
10.1080/00401706.1995.10484303.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.distributions import Distribution, MultivariateNormal
from torch import Tensor
from torch.distributions import biject_to

from ..evidence.importance import pareto_smoothed, reliable_k
from ..models.interface import LatentModel
from ..models.log_weights import log_weights
from ..runtime.memory import check_memory, rows_at_once
from ..runtime.randomness import one_thread
from .nuts import chains, convergence
from .recalibration import Recalibration
from .refinement import PARTICLES, refine

METHODS = ("importance", "refined", "nuts", "recalibrated", "not converged", "unreliable")
IMPORTANCE, REFINED, NUTS, RECALIBRATED, NOT_CONVERGED, UNRELIABLE = METHODS
NAMES = np.array(METHODS).dtype
# Numbers of each row in the results
PER_ROW = ("pareto_k", "effective_draws", "r_hat")

# The least effective sample size of weights to resample with
MIN_SIZE = 100
# The largest error of log w by rounding, nats
MAX_ROUNDING = 0.1
# Share of the K draws from the prior
PRIOR_SHARE = 0.1
# Steps of SVI for a refined Gaussian
REFINE_STEPS = 500
# Chains of NUTS, with so many transitions each of adaptation and, at least, of draws
NUM_CHAINS, WARMUP, CHAIN_DRAWS = 4, 200, 250
# Rows in one chain, which share a step size
CHAIN_ROWS = 32
# The largest R̂ of chains that agree
MAX_R_HAT = 1.05
# torch draws from at most so many categories.
MAX_SAMPLES = 2**24
# Cache-sized chunks of draws to keep
CHUNKS = 16

# Called with the method at work, the number of its items just done, and of all its items
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class PosteriorDraws:
    """N draws of z for each of B rows, and where they are from.

    Attributes:
        draws: (N, B, Z), in random order. Draws may repeat one another.
        method: (B,) names: importance, refined, nuts or recalibrated. "unreliable": draws resampled
            with weights that cannot be relied on. "not converged": draws of chains that
            disagree.
        pareto_k: (B,) float64, k̂ of the weights with which the draws were resampled; NaN if there
            are none, or they exceed the precision of floats, as those of outliers may.
        effective_draws: (B,) float64, 1 to N. Of resampled draws, N² / Σ c², where c counts the
            repeats of each: N if none repeats. Of NUTS, the chains' effective sample size of the
            worst latent, at most N.
        r_hat: (B,) float64, the largest R̂ of the latents for chains; NaN for other methods.
    """

    draws: Tensor
    method: np.ndarray
    pareto_k: Tensor
    effective_draws: Tensor
    r_hat: Tensor


@one_thread()
def posterior_draws(
    vae: LatentModel,
    x: Tensor,
    num_draws: int = 100,
    num_samples: int = 5000,
    recalibration: Recalibration | None = None,
    on_progress: Progress = lambda method, done, total: None,
) -> PosteriorDraws:
    """Draw z from the posterior p(z|x) of each row, by the cheapest reliable method.

    Draws come from torch's global random state. A warning names the rows without reliable draws.

    Args:
        vae: a model with `prior()`, `posterior(x)` and `likelihood(z)`. Refined Gaussians and NUTS
            need a `PyroModel`: rows of other models whose weights have a heavy tail are marked
            "unreliable".
        x: (B, *data_shape), in the likelihood's units.
        num_draws: N.
        num_samples: K, from which the N are resampled.
        recalibration: draw from q(z|x) alone and multiply distances from its mean by the factors,
            in place of all of the above. Single latents then have the right spread on average over
            rows, but neither each row nor the latents together.
        on_progress: called with the method at work, the number of its items (rows, steps or
            transitions) just done, and the number of all its items.

    Raises:
        ValueError: a number is out of range, or the draws exceed the memory (`InputError`).
        InputError: the log-density of a row exceeds float32, see `refine`.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws expects an integer of at least 1; got {num_draws}")
    if not MIN_SIZE <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples expects {MIN_SIZE} to {MAX_SAMPLES:,}; got {num_samples}")
    (latent_dim,) = vae.prior().event_shape
    what = f"{num_draws:,} draws for each of {len(x):,} rows"
    check_memory(2 * num_draws * len(x) * latent_dim, what, "lower the number of draws")
    check_memory(4 * num_samples * latent_dim, f"{num_samples:,} samples", "lower num_samples")
    if recalibration is not None:
        return _widened(vae, x, num_draws, recalibration)
    parts = []
    for rows in x.split(rows_at_once(num_samples * latent_dim, x.device, CHUNKS)):
        parts.append(_resampled(vae, rows, None, num_draws, num_samples))
        on_progress(IMPORTANCE, len(rows), len(x))
    result = _joined(parts)
    is_program = hasattr(vae, "model")
    if is_program and _is_unbounded(vae.prior()):
        _refine_rows(result, vae, x, num_samples, on_progress)
    if is_program:
        _sample_rows(result, vae, x, on_progress)
    _warn(result, is_program)
    return result


@torch.no_grad()
def _resampled(
    vae: LatentModel, x: Tensor, refined: Distribution | None, num_draws: int, num_samples: int
) -> PosteriorDraws:
    """N of K draws from the mixture of q(z|x), p(z) and, if there is one, a refined Gaussian."""
    guides = [vae.posterior(x), *([] if refined is None else [refined])]
    proposal = _Mixture(guides, vae.prior(), len(x))
    z = proposal.sample((num_samples,))
    weights = log_weights(vae, proposal, x, z)[1]
    # Outliers: beyond the range of floats, or so unlikely that rounding makes all weights equal
    usable = weights.amax(0).abs() * torch.finfo(z.dtype).eps < MAX_ROUNDING  # False for NaN
    weights = weights.where(usable, 0.0)
    smoothed, k = pareto_smoothed(weights)
    index = torch.multinomial(smoothed.softmax(0).T, num_draws, replacement=True).T  # (N, B)
    counts = torch.zeros_like(smoothed).scatter_add_(0, index, torch.ones_like(index).double())
    k = k.where(usable, torch.nan)
    # Smoothing hides a few weights far above the others; their own effective size does not.
    size = 1 / weights.softmax(0).square().sum(0)
    reliable = ((k <= reliable_k(num_samples)) & (size >= MIN_SIZE)).cpu().numpy()
    name = IMPORTANCE if refined is None else REFINED
    return PosteriorDraws(
        draws=z.gather(0, index.unsqueeze(-1).expand(*index.shape, z.shape[-1])),
        method=np.where(reliable, name, UNRELIABLE).astype(NAMES),
        pareto_k=k,
        effective_draws=num_draws**2 / counts.square().sum(0),
        r_hat=torch.full_like(k, torch.nan),
    )


class _Mixture(Distribution):
    """Guides (batch (B,)) in equal parts, and `PRIOR_SHARE` of the prior; exact shares of draws."""

    def __init__(self, guides: list[Distribution], prior: Distribution, num_rows: int) -> None:
        self.guides, self.prior, self.num_rows = guides, prior, num_rows

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.sample(*args, **kwargs)

    def sample(self, sample_shape: tuple[int]) -> Tensor:
        count = sample_shape[0]
        from_prior = round(PRIOR_SHARE * count)
        cuts = [(count - from_prior) * i // len(self.guides) for i in range(len(self.guides) + 1)]
        z = [q.sample((b - a,)) for q, a, b in zip(self.guides, cuts, cuts[1:], strict=False)]
        return torch.cat([*z, self.prior.sample((from_prior, self.num_rows))])

    def log_prob(self, z: Tensor) -> Tensor:
        share = (1 - PRIOR_SHARE) / len(self.guides)
        parts = [q.log_prob(z) + math.log(share) for q in self.guides]
        return torch.stack([*parts, self.prior.log_prob(z) + math.log(PRIOR_SHARE)]).logsumexp(0)


def _refine_rows(
    result: PosteriorDraws, vae: Any, x: Tensor, num_samples: int, on_progress: Progress
) -> None:
    """Replace the draws of unreliable rows by draws with a refined Gaussian in the proposal."""
    num_draws, _, latent_dim = result.draws.shape
    kept = rows_at_once(num_samples * latent_dim, x.device, CHUNKS)
    todo = _unreliable(result)
    parts = todo.split(rows_at_once(PARTICLES * x[:1].numel())) if len(todo) else ()
    for rows in parts:
        step = partial(_report, on_progress, REFINED, len(parts) * REFINE_STEPS)
        gaussian = refine(vae, x[rows], True, REFINE_STEPS, on_step=step).posterior(x[rows])
        for few in torch.arange(len(rows)).split(kept):
            r = MultivariateNormal(gaussian.loc[few], scale_tril=gaussian.scale_tril[few])
            _put(result, rows[few], _resampled(vae, x[rows[few]], r, num_draws, num_samples))


def _sample_rows(result: PosteriorDraws, vae: Any, x: Tensor, on_progress: Progress) -> None:
    """Replace the draws of rows that are still unreliable by those of NUTS."""
    num_draws = len(result.draws)
    length = max(CHAIN_DRAWS, math.ceil(num_draws / NUM_CHAINS))
    todo = _unreliable(result)
    parts = todo.split(CHAIN_ROWS) if len(todo) else ()
    for rows in parts:
        total = len(parts) * NUM_CHAINS * (WARMUP + length)
        step = partial(_report, on_progress, NUTS, total)
        z, _ = chains(vae, x[rows], NUM_CHAINS, length, WARMUP, step)  # (C, S, B, Z)
        r_hat, size = map(torch.as_tensor, convergence(z.cpu().numpy()))
        worst = r_hat.amax(1)
        chosen = torch.randperm(NUM_CHAINS * length, device="cpu")[:num_draws]
        part = PosteriorDraws(
            draws=z.flatten(0, 1)[chosen.to(z.device)].to(result.draws),
            method=np.where(worst.numpy() <= MAX_R_HAT, NUTS, NOT_CONVERGED),
            pareto_k=torch.full_like(worst, torch.nan),
            effective_draws=size.amin(1).clamp(1, num_draws),
            r_hat=worst,
        )
        _put(result, rows, part)


def _report(on_progress: Progress, method: str, total: int, done: int) -> None:
    on_progress(method, done, total)


def _unreliable(result: PosteriorDraws) -> Tensor:
    """Rows for the next method, by k: rows that share chains are then similarly difficult."""
    order = result.pareto_k.argsort()
    waiting = torch.as_tensor(result.method == UNRELIABLE, device=order.device)
    waiting &= ~result.pareto_k.isnan()  # outliers, whose densities no method can use
    return order[waiting[order]]


def _put(result: PosteriorDraws, rows: Tensor, part: PosteriorDraws) -> None:
    """Replace the results of some rows."""
    result.draws[:, rows] = part.draws
    result.method[rows.cpu().numpy()] = part.method
    for name in PER_ROW:
        values = getattr(result, name)
        values[rows] = getattr(part, name).to(values)


def _joined(parts: list[PosteriorDraws]) -> PosteriorDraws:
    values = {name: torch.cat([getattr(part, name) for part in parts], dim=-1) for name in PER_ROW}
    method = np.concatenate([part.method for part in parts])
    return PosteriorDraws(torch.cat([part.draws for part in parts], dim=1), method, **values)


def _is_unbounded(prior: Distribution) -> bool:
    """Whether the latents may take any real value, as the draws of a Gaussian do."""
    points = torch.linspace(-3, 3, prior.event_shape.numel())
    return torch.equal(biject_to(prior.support)(points), points)


@torch.no_grad()
def _widened(
    vae: LatentModel, x: Tensor, num_draws: int, recalibration: Recalibration
) -> PosteriorDraws:
    """Draws from q(z|x), with their distances from its mean multiplied by the factors."""
    q = vae.posterior(x)
    z, mean = q.sample((num_draws,)), q.mean
    none = torch.full((len(x),), torch.nan, dtype=torch.float64)
    return PosteriorDraws(
        draws=mean + torch.as_tensor(recalibration.factors).to(z) * (z - mean),
        method=np.full(len(x), RECALIBRATED, NAMES),
        pareto_k=none,
        effective_draws=torch.full_like(none, num_draws),
        r_hat=none.clone(),
    )


def _warn(result: PosteriorDraws, is_program: bool) -> None:
    """Name the rows whose draws cannot be relied on."""
    kind = str(result.draws.dtype).removeprefix("torch.")
    why = f"their log-densities exceed the precision of {kind}, as those of outliers may"
    if not is_program:
        why = "their importance weights are, and a better method needs a Pyro model(x)"
    reasons = {NOT_CONVERGED: f"chains of NUTS disagree (R-hat above {MAX_R_HAT})", UNRELIABLE: why}
    for method, reason in reasons.items():
        rows = np.flatnonzero(result.method == method)
        if len(rows):
            named = ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")
            warnings.warn(
                f"the draws of {len(rows)} of {len(result.method)} rows are {method}: {reason}. "
                f"Rows (counted from 0): {named}",
                stacklevel=4,
            )
