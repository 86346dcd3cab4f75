"""log p(x) by annealed importance sampling, from below and, on simulated data, from above.

    π_t(z) ∝ p(z) p(x|z)^β_t,   0 = β₀ < β₁ < … < β_T = 1

    forward    z₀ ~ p(z), z_t from z_{t−1} by Hamiltonian Monte Carlo on π_t:
               log w = Σ_t (β_t − β_{t−1}) log p(x|z_{t−1}),     E[w] = p(x)
    reverse    the same chain backwards, from the z* that generated x:
                                                                 E[1/w] = 1/p(x)

In expectation, log-means of w lie below log p(x), and minus log-means of 1/w lie above it. Both
gaps shrink as 1/T. The guide only scales the steps of the kernel for each latent; the bounds hold
for any guide.

A pilot run of the forward chain tunes the step size for each row and each β. The chains that enter
the bounds hold them fixed: a kernel that still adapts does not leave π_t invariant.

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
from pyro.distributions import Distribution
from torch import Tensor, nn

from ..capture.captured import CapturedFunction, Mode
from ..models.interface import LatentModel
from ..models.log_weights import with_slope
from ..runtime.memory import Callback, check_memory, concatenate, ignore, rows_at_once
from ..runtime.randomness import one_thread

# Acceptance rate to which the step sizes are tuned. The optimum for HMC is 0.65, and a lower rate
# costs more than a higher one ("Optimal tuning of the hybrid Monte Carlo algorithm", arXiv
# 1001.4460).
ACCEPTANCE = 0.8
LEAPFROG_STEPS = 5
FIRST_STEP = 0.5
# Number of evaluations of the gradient for some rows from which compiling it pays.
COMPILE_FROM = 10_000

# (x, z) → log p(x|z) and its gradient in z
Likelihood = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Annealed:
    """Annealed evidence of B rows, float64, nats.

    Attributes:
        lower: (B,) log-mean of the forward weights over the chains; its expectation is at most
            log p(x).
        upper: (B,) minus log-mean of the reverse chains' inverse weights, at least log p(x) in
            expectation; None unless the z that generated x were given.
        standard_error: (B,) of `lower`, from the variance of the weights; NaN for one chain,
            infinite if `lower` is −∞.
        acceptance: (B,) mean acceptance rate of the forward chains.
    """

    lower: Tensor
    upper: Tensor | None
    standard_error: Tensor
    acceptance: Tensor


@one_thread()
def anneal(
    vae: LatentModel,
    x: Tensor,
    num_steps: int = 500,
    num_chains: int = 8,
    z: Tensor | None = None,
    on_step: Callback = ignore,
    mode: Mode | None = None,
) -> Annealed:
    """Annealed estimates of log p(x) for each row.

    Draws come from torch's global random state.

    Args:
        vae: model with `prior()`, `posterior(x)` and a `likelihood(z)` differentiable in z.
        x: (B, *data_shape), in the likelihood's units.
        num_steps: T, the number of intermediate distributions.
        num_chains: chains for each row.
        z: (B, Z), which generated x, for the reverse chains.
        on_step: called with the number of (row, chain) pairs that have made a step.
        mode: whether to capture and compile log p(x|z) with its gradient, see `capture.Mode`; by
            default compiled if `vae` is a module and there are many steps.

    Raises:
        ValueError: a number is not positive, x lies outside the likelihood's support, or the
            chains exceed the memory (`InputError`).
    """
    if num_steps < 1 or num_chains < 1:
        raise ValueError(
            f"num_steps and num_chains expect at least 1; got {num_steps} and {num_chains}"
        )
    # A step size for each row and β, and a state of each chain with its gradients
    values = num_steps * len(x) + 10 * num_chains * x[:1].numel()
    what = f"{num_steps:,} steps of {num_chains:,} chains"
    check_memory(values, what, "lower num_steps or num_chains")
    if not isinstance(vae, nn.Module):
        mode = "eager"  # changes of other objects cannot be detected
    elif mode is None:
        evaluations = (2 if z is None else 3) * num_steps * LEAPFROG_STEPS
        mode = "compiled" if evaluations >= COMPILE_FROM else "eager"
    likelihood = CapturedFunction(_likelihood(vae), mode)
    betas = _schedule(num_steps)
    rows = x.split(rows_at_once(num_chains * x[:1].numel(), x.device))
    starts = [None] * len(rows) if z is None else z.split(len(rows[0]))
    return concatenate(
        [
            _bounds(_target(vae, likelihood, part, betas), start, num_chains, on_step)
            for part, start in zip(rows, starts, strict=True)
        ]
    )


def _schedule(num_steps: int) -> list[float]:
    """β₀ … β_T along a sigmoid: slow at both ends, where the distributions change fastest."""
    line = torch.linspace(-4, 4, num_steps + 1, dtype=torch.float64, device="cpu").sigmoid()
    return ((line - line[0]) / (line[-1] - line[0])).tolist()


class _State(NamedTuple):
    """Positions z (C, B, Z) with log p(x|z) and log p(z) (C, B), and their gradients in z."""

    z: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    likelihood_slope: Tensor
    prior_slope: Tensor

    def log_density(self, beta: float) -> Tensor:
        """log p(z) + β log p(x|z), (C, B)."""
        return self.log_prior + beta * self.log_likelihood

    def slope(self, beta: float) -> Tensor:
        """Gradient of `log_density` in z, (C, B, Z)."""
        return self.prior_slope + beta * self.likelihood_slope


class _Target(NamedTuple):
    """The distributions π_t of some rows x (B, *data_shape)."""

    vae: LatentModel
    prior: Distribution
    likelihood: Likelihood
    x: Tensor
    betas: list[float]
    prior_precision: Tensor  # (Z,)
    guide_precision: Tensor  # (B, Z)

    def width(self, beta: float) -> Tensor:
        """Rough standard deviations of the latents (B, Z), which scale the steps."""
        return ((1 - beta) * self.prior_precision + beta * self.guide_precision).rsqrt()

    def evaluate(self, z: Tensor) -> _State:
        """The densities and their gradients at z (C, B, Z)."""
        # Without validation: NaN in a leapfrog that diverges is a rejected step, not an error.
        with pyro.validation_enabled(False):
            log_prior, prior_slope = with_slope(self.prior.log_prob, z)
            log_likelihood, likelihood_slope = self.likelihood(self.x, z)
        return _State(z.detach(), log_likelihood, log_prior, likelihood_slope, prior_slope)


def _likelihood(vae: LatentModel) -> Likelihood:
    """log p(x|z) (C, B) of x (B, *data_shape) and z (C, B, Z), and its gradient in z (C, B, Z)."""

    def likelihood(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return with_slope(lambda z: vae.likelihood(z).log_prob(x), z)

    return likelihood


@torch.no_grad()
def _target(vae: LatentModel, likelihood: Likelihood, x: Tensor, betas: list[float]) -> _Target:
    prior = vae.prior()
    prior_precision = 1 / prior.sample((1000,)).var(0)
    guide_precision = 1 / vae.posterior(x).sample((200,)).var(0).clamp_min(1e-12)
    return _Target(vae, prior, likelihood, x, betas, prior_precision, guide_precision)


def _hmc(target: _Target, start: _State, beta: float, step_size: Tensor) -> tuple[_State, Tensor]:
    """A step of Hamiltonian Monte Carlo on π at β, and its acceptance probability (C, B).

    `step_size` (1, B, 1) is in units of `target.width`.
    """
    width = target.width(beta)
    # Random lengths avoid resonance with the periods of the motion.
    size = step_size * (0.8 + 0.4 * torch.rand_like(step_size))
    # Position and momentum are those of z / width, where all latents have about one scale.
    momentum = torch.randn_like(start.z)
    end, pushed = start, momentum + size / 2 * width * start.slope(beta)
    for i in range(LEAPFROG_STEPS):
        end = target.evaluate(end.z + size * width * pushed)
        last = i == LEAPFROG_STEPS - 1
        pushed = pushed + size / (2 if last else 1) * width * end.slope(beta)
    gain = end.log_density(beta) - start.log_density(beta)
    gain = gain - (pushed.square() - momentum.square()).sum(-1) / 2
    probability = gain.double().exp().clamp_max(1).nan_to_num(0)
    taken = torch.rand_like(probability) < probability
    return _choose(taken, end, start), probability


def _choose(chosen: Tensor, first: _State, second: _State) -> _State:
    """The first positions where chosen (C, B), the second elsewhere."""
    shapes = [chosen.shape + (1,) * (part.dim() - 2) for part in first]
    parts = zip(shapes, first, second, strict=True)
    return _State(*(torch.where(chosen.reshape(shape), a, b) for shape, a, b in parts))


def _adapt(step_size: Tensor, probability: Tensor) -> Tensor:
    """The step size (1, B, 1) after a step with these acceptance probabilities (C, B)."""
    excess = probability.mean(0) - ACCEPTANCE
    return step_size * (0.2 * excess).exp()[None, :, None].to(step_size)


def _tune(target: _Target, z: Tensor, on_step: Callback) -> list[Tensor]:
    """Step sizes (1, B, 1) for β₀ … β_{T−1}, from a forward chain that starts at z (C, B, Z)."""
    state, sizes = target.evaluate(z), [z.new_full((1, z.shape[1], 1), FIRST_STEP)]
    on_step(z[..., 0].numel())
    for beta in target.betas[1:-1]:
        state, probability = _hmc(target, state, beta, sizes[-1])
        sizes.append(_adapt(sizes[-1], probability))
        on_step(z[..., 0].numel())
    return sizes


def _chain(
    target: _Target, z: Tensor, step_sizes: list[Tensor], on_step: Callback, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """log w (C, B) and the mean acceptance rate (B,) of chains that start at z (C, B, Z)."""
    betas, num_steps = target.betas, len(target.betas) - 1
    log_weights = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
    acceptance = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    state = target.evaluate(z)
    for t in reversed(range(num_steps)) if reverse else range(num_steps):
        log_weights += (betas[t + 1] - betas[t]) * state.log_likelihood.double()
        k = t if reverse else t + 1  # the chain moves on to β_k
        if 0 < k < num_steps:
            state, probability = _hmc(target, state, betas[k], step_sizes[k])
            acceptance += probability.mean(0) / (num_steps - 1)
        on_step(log_weights.numel())
    return log_weights, acceptance


def _bounds(target: _Target, z: Tensor | None, num_chains: int, on_step: Callback) -> Annealed:
    """`anneal` for the rows of a target."""
    start = target.prior.sample((num_chains, len(target.x)))
    with torch.no_grad():
        target.vae.likelihood(start).log_prob(target.x)  # checks the support of x
    step_sizes = _tune(target, start, on_step)
    start = target.prior.sample(start.shape[:2])
    log_weights, acceptance = _chain(target, start, step_sizes, on_step)
    lower = log_weights.logsumexp(0) - math.log(num_chains)
    spread = (log_weights - lower).exp().std(0) if num_chains > 1 else torch.nan
    if num_chains > 1:  # weights that are all zero have no spread to judge by
        spread = torch.where(lower == -math.inf, math.inf, spread)
    upper = None
    if z is not None:
        start = z.expand(start.shape).contiguous()  # the layout that is captured already
        inverse = -_chain(target, start, step_sizes, on_step, reverse=True)[0]
        upper = math.log(num_chains) - inverse.logsumexp(0)
    standard_error = spread / math.sqrt(num_chains) * torch.ones_like(lower)
    return Annealed(lower, upper, standard_error, acceptance)
