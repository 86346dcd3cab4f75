"""Objectives by name: `pyro.infer.ELBO`s for `pyro.infer.SVI`, `fit` and `--objective`.

An objective is a sum over rows that training maximizes; the loss is its negative. Most objectives
are lower bounds on log p(x). K is the number of particles, draws of z for each row, and
log w = log p(x, z) − log q(z|x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pyro.infer import ELBO

from ..config.options import OBJECTIVE_OPTIONS, check_objective
from . import elbos
from . import importance_weighted as weighted

_WEIGHTED: dict[str, tuple[Callable[..., weighted.Particles], weighted.Route]] = {
    "stl": (weighted.stl, "path"),
    "score-baseline": (weighted.score_baseline, "score"),
    "iwae": (weighted.iwae, "total"),
    "dreg": (weighted.dreg, "path"),
    "renyi": (weighted.renyi, "total"),
    "miwae": (weighted.miwae, "total"),
    "ciwae": (weighted.ciwae, "total"),
    "piwae": (weighted.piwae, "path"),
    "wake-sleep": (weighted.wake_sleep, "score"),
}

_ELBOS: dict[str, Callable[..., ELBO]] = {
    "trace": elbos.Sampled,
    "mean-field": elbos.MeanField,
    "score-function": elbos.ScoreFunction,
    "free-bits": elbos.FreeBits,
    "beta-tc": elbos.BetaTC,
    "mmd": elbos.MaximumMeanDiscrepancy,
}


def objective(
    name: str = "trace",
    num_particles: int = 1,
    max_plate_nesting: float = math.inf,
    **options: float,
) -> ELBO:
    """Return the objective called `name`. Gradients are unbiased unless stated otherwise.

    The ELBO, E_q[log w]:

    trace: sampled, by reparameterization, or by the score if a site has none. arXiv 1312.6114.
    mean-field: with KL(q(z|x) ‖ p(z)) in closed form if torch has it. arXiv 1312.6114.
    stl: without the score term; zero gradient variance if q is the posterior. arXiv 1703.09194.
    score-function: without reparameterization, at high variance. arXiv 1401.0118.
    score-baseline: the same, with the mean of the other particles as baseline (K ≥ 2), which
        lowers the variance. arXiv 2010.10436.
    beta: trace with the KL times `beta` (4). A bound for β ≥ 1. openreview Sy2fzU9gl.
    free-bits: each latent's KL, averaged over the batch, counts as at least `free_bits` (0.1
        nats), which prevents collapse. A bound. arXiv 1606.04934.
    beta-tc: ELBO − (`beta` (6) − 1) · total correlation of q(z), for independent latents. Biased:
        q(z) is estimated from the batch. A bound for β ≥ 1. arXiv 1802.04942.

    Importance-weighted bounds, between the ELBO and log p(x), with K weights for each row:

    iwae: IWAE_K = E[log ⅟K Σ w]. For the encoder, signal-to-noise falls with K. arXiv 1509.00519.
    dreg: IWAE_K; for the encoder, signal-to-noise rises with K. arXiv 1810.04152.
    renyi: E[log(⅟K Σ w^(1−α)) / (1−α)], `alpha` (0.5): the ELBO for α → 1, IWAE_K for α = 0, no
        bound for α < 0. Biased as an estimate of Rényi's divergence. arXiv 1602.02311.
    miwae: mean of `groups` (8) bounds IWAE_{K/groups}. arXiv 1802.04537.
    ciwae: β ELBO + (1 − β) IWAE_K, β = `elbo_weight` (0.05). arXiv 1802.04537.
    piwae: IWAE_K for the decoder, miwae for the encoder. arXiv 1802.04537.
    wake-sleep: IWAE_K for the decoder, −KL(p(z|x) ‖ q) for the encoder, biased at finite K. For
        discrete latents, and guides that cover the posterior. arXiv 1406.2751.

    Other objectives:

    mmd: E_q[log p(x|z)] − λ MMD²(q(z), p(z)), λ = `mmd_weight` (100 nats), with q(z) from the
        batch. Not a bound. arXiv 1706.02262.

    Args:
        name: one of the above.
        num_particles: K, draws of z per row, in chunks if memory requires it.
        max_plate_nesting: as in Pyro's ELBOs; by default found by running guide and model once.
        options: `alpha`, `beta`, `groups`, `elbo_weight`, `free_bits`, `mmd_weight`, as above.

    Raises:
        ValueError: the name or an option is unknown, or an option is out of range.
    """
    check_objective(name, num_particles, options)
    chosen: dict[str, Any] = {**OBJECTIVE_OPTIONS.get(name, {}), **options}
    size: Any = {"num_particles": num_particles, "max_plate_nesting": max_plate_nesting}
    if name in _WEIGHTED:
        rule, route = _WEIGHTED[name]
        return weighted.WeightedELBO(partial(rule, **chosen), route, **size)
    if name == "beta":
        return elbos.Sampled(kl_weight=chosen["beta"], **size)
    return _ELBOS[name](**chosen, **size)
