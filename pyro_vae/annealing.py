"""log p(x) by annealed importance sampling, from below and, on simulated data, from above.

    π_t(z) ∝ p(z) p(x|z)^β_t,   0 = β₀ < β₁ < … < β_T = 1

    forward    z₀ ~ p(z), z_t from z_{t−1} by Hamiltonian Monte Carlo on π_t:
               log w = Σ_t (β_t − β_{t−1}) log p(x|z_{t−1}),     E[w] = p(x)
    reverse    the same chain backwards, from the z* that generated x:
                                                                 E[1/w] = 1/p(x)

so log-means of w lie below log p(x) in expectation, and minus log-means of 1/w above it. Both close
in as 1/T. Neither uses the guide but for the lengths of its steps, so they judge it from outside.

The step sizes are tuned, for each image and each β, by a pilot run of the forward chain and then
held fixed: a kernel that still adapts would no longer leave π_t invariant, and the bounds would be
none.

Source: "Annealed importance sampling", arXiv physics/9803008; "Sandwiching the marginal likelihood
using bidirectional Monte Carlo", arXiv 1511.02543.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from .evidence import samples_at_once
from .interface import LatentModel

__all__ = ["Annealed", "anneal"]

# Acceptance rate that the step sizes are tuned to. The optimum of HMC is 0.65, and a lower rate
# costs more than a higher one ("Optimal tuning of the hybrid Monte Carlo algorithm", arXiv
# 1001.4460).
ACCEPTANCE = 0.8
LEAPFROG_STEPS = 5
FIRST_STEP = 0.5


@dataclass(frozen=True)
class Annealed:
    """Annealed evidence of B images, float64, nats.

    Attributes:
        lower: (B,) log-mean of the forward weights over the chains: its expectation is at most
            log p(x).
        upper: (B,) minus log-mean of the reverse chains' inverse weights, at least log p(x) in
            expectation; None unless the z that generated x were given.
        standard_error: (B,) of `lower`, from the weights' variance; NaN for one chain.
        acceptance: (B,) mean acceptance rate of the forward chains.
    """

    lower: Tensor
    upper: Tensor | None
    standard_error: Tensor
    acceptance: Tensor


def anneal(
    vae: LatentModel,
    x: Tensor,
    num_steps: int = 500,
    num_chains: int = 8,
    z: Tensor | None = None,
    on_step: Callable[[int], object] | None = None,
) -> Annealed:
    """Annealed estimates of log p(x) for each image.

    Draws come from torch's global random state.

    Args:
        vae: anything with `prior()`, `posterior(x)` and a `likelihood(z)` differentiable in z.
        x: (B, *data_shape), in the likelihood's units.
        num_steps: T, the number of intermediate distributions.
        num_chains: chains for each image.
        z: (B, Z), which generated x, for the reverse chains.
        on_step: called with the number of (image, chain) pairs that have made a step.

    Raises:
        ValueError: a number is not positive.
    """
    if num_steps < 1 or num_chains < 1:
        raise ValueError(
            f"num_steps and num_chains expect at least 1; got {num_steps} and {num_chains}"
        )
    parts, start = [], 0
    for part in x.split(max(1, samples_at_once(x[:1]) // num_chains)):
        target = _Target(vae, part, num_steps, num_chains, on_step)
        parts.append(target.run(None if z is None else z[start : start + len(part)]))
        start += len(part)
    return Annealed(
        lower=torch.cat([p.lower for p in parts]),
        upper=None if z is None else torch.cat([p.upper for p in parts if p.upper is not None]),
        standard_error=torch.cat([p.standard_error for p in parts]),
        acceptance=torch.cat([p.acceptance for p in parts]),
    )


class _Target:
    """The annealed posteriors of some images, and chains on them."""

    def __init__(
        self,
        vae: LatentModel,
        x: Tensor,
        num_steps: int,
        num_chains: int,
        on_step: Callable[[int], object] | None,
    ) -> None:
        self.vae, self.x, self.num_chains, self.on_step = vae, x, num_chains, on_step
        self.prior = vae.prior()
        # A sigmoid: the schedule moves slowly at both ends, where the distributions change fastest.
        line = torch.linspace(-4, 4, num_steps + 1, dtype=torch.float64).sigmoid()
        self.betas = ((line - line[0]) / (line[-1] - line[0])).tolist()
        with torch.no_grad():
            draws = self.prior.sample((1000,))
            self.prior_precision = 1 / draws.var(0)  # (Z,)
            # Of the guide only the widths are used, to bring all latents to one scale.
            self.guide_precision = 1 / vae.posterior(x).sample((200,)).var(0).clamp_min(1e-12)
        # (T, 1, B, 1), filled by the pilot run
        self.step_sizes = torch.full((num_steps, 1, len(x), 1), FIRST_STEP).to(draws)

    def run(self, z: Tensor | None) -> Annealed:
        start = self.prior.sample((self.num_chains, len(self.x)))
        with torch.no_grad():
            self.vae.likelihood(start).log_prob(self.x)  # checks the support of x
        self._chain(start, reverse=False, pilot=True)
        start = self.prior.sample((self.num_chains, len(self.x)))
        log_weights, acceptance = self._chain(start, reverse=False)
        lower = log_weights.logsumexp(0) - math.log(self.num_chains)
        spread = (log_weights - lower).exp().std(0) if self.num_chains > 1 else torch.nan
        upper = None
        if z is not None:
            inverse = -self._chain(z.expand(start.shape), reverse=True)[0]
            upper = math.log(self.num_chains) - inverse.logsumexp(0)
        return Annealed(
            lower=lower,
            upper=upper,
            standard_error=spread / math.sqrt(self.num_chains) * torch.ones_like(lower),
            acceptance=acceptance,
        )

    def _chain(self, z: Tensor, reverse: bool, pilot: bool = False) -> tuple[Tensor, Tensor]:
        """log w (C, B) and the mean acceptance rate (B,), from z (C, B, Z)."""
        num_steps = len(self.betas) - 1
        log_weights = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
        acceptance = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
        point = self._point(z)
        for t in reversed(range(num_steps)) if reverse else range(num_steps):
            log_weights += (self.betas[t + 1] - self.betas[t]) * point.log_likelihood.double()
            k = t if reverse else t + 1  # the chain moves on to β_k
            if 0 < k < num_steps:
                if pilot:
                    self.step_sizes[k] = self.step_sizes[k - 1]
                point, probability = self._move(point, k)
                if pilot:
                    excess = probability.mean(0) - ACCEPTANCE
                    self.step_sizes[k] *= (0.2 * excess).exp()[None, :, None].to(z)
                acceptance += probability.mean(0) / (num_steps - 1)
            if self.on_step is not None:
                self.on_step(log_weights.numel())
        return log_weights, acceptance

    def _move(self, start: _Point, k: int) -> tuple[_Point, Tensor]:
        """A step of Hamiltonian Monte Carlo on π_k, and its acceptance probability (C, B)."""
        beta = self.betas[k]
        width = ((1 - beta) * self.prior_precision + beta * self.guide_precision).rsqrt()  # (B, Z)
        # Lengths that vary do not fall in with the periods of the motion.
        jitter = 0.8 + 0.4 * torch.rand_like(self.step_sizes[k])
        size = self.step_sizes[k] * jitter
        # Position and momentum are those of z / width, where all latents have about one scale.
        momentum = torch.randn_like(start.z)
        end, pushed = start, momentum + size / 2 * width * start.slope(beta)
        for i in range(LEAPFROG_STEPS):
            end = self._point(end.z + size * width * pushed)
            last = i == LEAPFROG_STEPS - 1
            pushed = pushed + size / (2 if last else 1) * width * end.slope(beta)
        gain = end.log_density(beta) - start.log_density(beta)
        gain = gain - (pushed.square() - momentum.square()).sum(-1) / 2
        probability = gain.double().exp().clamp_max(1).nan_to_num(0)
        taken = torch.rand_like(probability) < probability
        return end.where(taken, start), probability

    def _point(self, z: Tensor) -> _Point:
        # Without validation: where a leapfrog diverges, NaN is a rejected step and not an error.
        with torch.enable_grad(), pyro.validation_enabled(False):
            z = z.detach().requires_grad_()
            log_prior = self.prior.log_prob(z)
            log_likelihood = self.vae.likelihood(z).log_prob(self.x)
            (prior_slope,) = torch.autograd.grad(log_prior.sum(), z)
            (likelihood_slope,) = torch.autograd.grad(log_likelihood.sum(), z)
        return _Point(
            z.detach(), log_likelihood.detach(), log_prior.detach(), likelihood_slope, prior_slope
        )


class _Point(NamedTuple):
    """Positions z (C, B, Z) with log p(x|z) and log p(z) (C, B), and their gradients in z."""

    z: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    likelihood_slope: Tensor
    prior_slope: Tensor

    def log_density(self, beta: float) -> Tensor:
        return self.log_prior + beta * self.log_likelihood

    def slope(self, beta: float) -> Tensor:
        return self.prior_slope + beta * self.likelihood_slope

    def where(self, chosen: Tensor, other: _Point) -> _Point:
        """These points where chosen (C, B), the other's elsewhere."""
        return _Point(
            *(
                torch.where(chosen.reshape(chosen.shape + (1,) * (a.dim() - 2)), a, b)
                for a, b in zip(self, other, strict=True)
            )
        )
