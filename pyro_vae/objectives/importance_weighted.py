"""Importance-weighted objectives: a bound for each row, and the weights of its gradients.

    log wₖ = log p(x, zₖ; θ) − log q(zₖ|x; φ),  zₖ = z(εₖ; φ),  k = 1 … K

Each estimator here is a bound L(log w) and three sets of weights for the K terms of its gradient:

    Σₖ aₖ ∂θ log p(x, zₖ)  +  Σₖ bₖ (∂φ z) ∂z [log p − log q](zₖ)  +  Σₖ cₖ ∂φ log q(z)|z=zₖ
       decoder                   encoder, through the draws           encoder, the score

With w̃ₖ = wₖ / Σⱼ wⱼ:

                      bound                             a             b              c
    iwae              log ⅟K Σ w                        w̃             w̃              −w̃
    renyi             log(⅟K Σ w^(1−α)) / (1−α)         ∝ w^(1−α)     a              −a
    ciwae             β·ELBO + (1−β)·iwae               β/K+(1−β)w̃    a              −a
    miwae             mean of M bounds iwae of K/M      w̃ in group/M  a              −a
    piwae             iwae                              w̃             as miwae       −b
    stl               ELBO = ⅟K Σ log w                 1/K           1/K            0
    dreg              iwae                              w̃             w̃²             0
    wake-sleep        iwae                              w̃             0              w̃
    score-baseline    ELBO                              1/K           0              see below

With b = a and c = −a the gradient is that of the bound. Under equal weights the score has
expectation zero, and stl drops it. Under the weights of iwae its expectation is not zero; dreg
drops it and changes b to w̃², which keeps the gradient unbiased. The c of score-baseline is log wₖ
minus its mean over the other particles, divided by K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .particles import (
    chunk_sizes,
    draw_path,
    draw_score,
    draw_total,
    in_particles,
    know_plate_nesting,
)

# Smallest share of a group in `piwae`. Smaller shares do not change the digits of a float32, but
# the gradient is divided by the share.
MIN_SHARE = 1e-12


@dataclass(frozen=True)
class Particles:
    """Bound and weights of an estimator at log w (K, N); a, b and c as above.

    Attributes:
        bound: (N,).
        decoder: (K, N) a.
        score: (K, N) c.
        path: (K, N) b / a; None if it is 1.
    """

    bound: Tensor
    decoder: Tensor
    score: Tensor
    path: Tensor | None = None


Route = Literal["total", "path", "score"]
Rule = Callable[[Tensor], Particles]


class WeightedELBO(ELBO):
    """A `pyro.infer.ELBO` defined by a rule. Each row has its own weights, see `particles`.

    Particles that exceed the memory limit are drawn in chunks, and drawn again with the same random
    numbers for the gradient.

    Args:
        rule: log w (K, N) → bound and weights.
        route: gradient in the guide's parameters. total: c = −a and b = a. path: any b and c.
            score: b = 0; for any guide, with z held fixed.
        num_particles: K.
        max_plate_nesting: as in Pyro's ELBOs; found by running model and guide if not given.
    """

    def __init__(
        self, rule: Rule, route: Route, num_particles: int = 1, max_plate_nesting: float = math.inf
    ) -> None:
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self.rule = rule
        self.route = route

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """−Σ scale · bound, (): its gradient is the estimator's."""
        weights: list[Particles] = []
        log_p, log_q, log_q_fixed, scale = self._draws(model, guide, args, kwargs, weights)
        with torch.no_grad():
            weights.append(self.rule(log_p - log_q))
        particles = weights[0]
        value = -(scale * particles.bound).sum()
        if not torch.is_grad_enabled():
            return value
        a, c = particles.decoder, particles.score
        if self.route == "score":
            surrogate = a * log_p + c * log_q_fixed
        else:
            surrogate = a * (log_p - log_q)
            if self.route == "path":  # −a ∂φ log q in the line above becomes c ∂φ log q
                surrogate = surrogate + (a + c) * log_q_fixed
        surrogate = -(scale * surrogate).sum()
        return value + (surrogate - surrogate.detach())

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−Σ scale · bound."""
        loss = torch_item(self.differentiable_loss(model, guide, *args, **kwargs))
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−Σ scale · bound, and its gradient added to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return torch_item(loss)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("a WeightedELBO has no single trace")

    def _draws(
        self, model: Any, guide: Any, args: Any, kwargs: Any, weights: list[Particles]
    ) -> tuple[Tensor, ...]:
        """log p, log q, log q at fixed z, each (K, N), and the scale.

        `weights` holds the rule's result by the time of the backward pass.
        """
        know_plate_nesting(self, model, guide, args, kwargs)
        nesting = int(self.max_plate_nesting)
        subsamples: list[Trace] = []

        def path_weight(first: int, size: int) -> Tensor | None:
            path = weights[0].path
            return None if path is None else path[first : first + size]

        # `checkpoint` keeps the random state of the device of its arguments.
        def chunk(first: int, size: int, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
            run, propose = (in_particles(program, size, nesting) for program in (model, guide))
            if first:  # all chunks share the subsample that the plates draw for the first
                propose = poutine.replay(propose, trace=subsamples[0])
            programs = run, propose, args, kwargs, nesting
            if self.route == "path":
                draws = draw_path(*programs, partial(path_weight, first, size))
            else:
                draws = (draw_total if self.route == "total" else draw_score)(*programs)
            subsamples.append(draws.subsample)
            return draws.log_p, draws.log_q, draws.log_q_fixed, draws.scale

        sizes = chunk_sizes(self.num_particles, args, kwargs)
        if len(sizes) == 1:
            return chunk(0, self.num_particles, args, kwargs)
        keep = partial(checkpoint, chunk, use_reentrant=False)
        run = keep if torch.is_grad_enabled() else chunk
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [run(first, size, args, kwargs) for first, size in zip(firsts, sizes, strict=True)]
        log_p, log_q, log_q_fixed = (torch.cat([part[i] for part in parts]) for i in range(3))
        return log_p, log_q, log_q_fixed, parts[0][3]


def stl(log_w: Tensor) -> Particles:
    equal = torch.full_like(log_w, 1 / len(log_w))
    return Particles(log_w.mean(0), equal, torch.zeros_like(log_w))


def iwae(log_w: Tensor) -> Particles:
    weights = log_w.softmax(0)
    return Particles(_bound(log_w), weights, -weights)


def dreg(log_w: Tensor) -> Particles:
    weights = log_w.softmax(0)
    return Particles(_bound(log_w), weights, torch.zeros_like(log_w), path=weights)


def renyi(log_w: Tensor, alpha: float) -> Particles:
    powers = (1 - alpha) * log_w
    weights = powers.softmax(0)
    return Particles(_bound(powers) / (1 - alpha), weights, -weights)


def ciwae(log_w: Tensor, elbo_weight: float) -> Particles:
    bound = elbo_weight * log_w.mean(0) + (1 - elbo_weight) * _bound(log_w)
    weights = elbo_weight / len(log_w) + (1 - elbo_weight) * log_w.softmax(0)
    return Particles(bound, weights, -weights)


def miwae(log_w: Tensor, groups: int) -> Particles:
    grouped = log_w.reshape(groups, -1, log_w.shape[-1])  # (M, K/M, N)
    weights = grouped.softmax(1).reshape(log_w.shape) / groups
    return Particles(_bound(grouped, 1).mean(0), weights, -weights)


def piwae(log_w: Tensor, groups: int) -> Particles:
    encoder = miwae(log_w, groups).decoder
    sums = log_w.reshape(groups, -1, log_w.shape[-1]).logsumexp(1)  # (M, N)
    shares = sums.softmax(0).clamp_min(MIN_SHARE).repeat_interleave(len(log_w) // groups, 0)
    ratio = 1 / (groups * shares)
    return Particles(_bound(log_w), encoder / ratio, -encoder, path=ratio)


def wake_sleep(log_w: Tensor) -> Particles:
    weights = log_w.softmax(0)
    return Particles(_bound(log_w), weights, weights)


def score_baseline(log_w: Tensor) -> Particles:
    count = len(log_w)
    # log wₖ − mean of the others = (log wₖ − mean of all) · K / (K − 1)
    score = (log_w - log_w.mean(0)) / max(1, count - 1)
    return Particles(log_w.mean(0), torch.full_like(log_w, 1 / count), score)


def _bound(log_w: Tensor, dim: int = 0) -> Tensor:
    return log_w.logsumexp(dim) - math.log(log_w.shape[dim])
