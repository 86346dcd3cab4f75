"""Name → `pyro.infer.ELBO`, for `pyro.infer.SVI`, `fit` and `--objective`.

Every objective is a sum over images that is to be maximized, most of them a lower bound on
log p(x); the loss is its negative. K is the number of particles, draws of z for each image;
log w = log p(x, z) − log q(z|x). "Biased" is said of the gradient, as an estimate of the gradient
of what is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pyro.infer import ELBO

from ..options import OBJECTIVE_OPTIONS, check_objective
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
    """The objective called `name`.

    The ELBO, E_q[log w]:

    trace: sampled, with reparameterized gradients, and the score where the guide has none.
        Unbiased. For any model and guide; the default. arXiv 1312.6114.
    mean-field: the same with KL(q ‖ p(z)) in closed form where torch knows one. Unbiased; less
        noise where the KL's is not the lesser part. arXiv 1312.6114.
    stl: without the score's part of the gradient, whose expectation is zero. Unbiased, and without
        any variance where q is the posterior: for guides that come near it. arXiv 1703.09194.
    score-function: through log q alone, no reparameterization. Unbiased, of large variance: for
        guides that cannot be reparameterized, and for comparison. arXiv 1401.0118.
    score-baseline: the same, each particle held against the mean of the others (K ≥ 2). Unbiased,
        of less variance. arXiv 2010.10436.
    beta: trace with the KL's part times `beta` (4). A bound for β ≥ 1. For more (β < 1) or less
        information in the latents. openreview Sy2fzU9gl.
    free-bits: the KL of each latent, averaged over the batch, counts at least `free_bits` (0.1
        nats), so that none is pressed to nothing. A bound. arXiv 1606.04934.
    beta-tc: ELBO − (`beta` (6) − 1) · total correlation of q(z), for independent latents. Biased,
        since q(z) is taken from the batch. A bound for β ≥ 1. arXiv 1802.04942.

    Bounds between the ELBO and log p(x), log-means of K weights for each image by itself:

    iwae: IWAE_K = E[log ⅟K Σ w]. Unbiased, but with K the encoder's gradient gets lost in its
        noise. For tight bounds at small K. arXiv 1509.00519.
    dreg: the same, without the score's part in the encoder's gradient, which gets clearer with K.
        Unbiased. For tight bounds at any K. arXiv 1810.04152.
    renyi: E[log(⅟K Σ w^(1−α)) / (1−α)], `alpha` (0.5): the ELBO at α → 1, IWAE_K at 0; above it
        for α < 0, where it is no bound. Biased at finite K for Rényi's divergence, unbiased for
        what it says. arXiv 1602.02311.
    miwae: the mean of `groups` (8) bounds IWAE_{K/groups}. Unbiased. arXiv 1802.04537.
    ciwae: β ELBO + (1 − β) IWAE_K, β = `elbo_weight` (0.05). Unbiased. arXiv 1802.04537.
    piwae: the decoder's gradient that of IWAE_K, the encoder's that of miwae. Each unbiased; the
        value is IWAE_K. arXiv 1802.04537.
    wake-sleep: reweighted wake-sleep without its sleep phase. The decoder's gradient is that of
        IWAE_K, the encoder's follows −KL(p(z|x) ‖ q), biased at finite K. For latents of any kind,
        discrete ones too, and for guides that shall cover the posterior. arXiv 1406.2751.

    Others:

    mmd: E_q[log p(x|z)] − λ MMD²(q(z), p(z)), λ = `mmd_weight` (100 nats), q(z) from the batch's
        draws. No bound: q(z|x) may shrink to a point. Unbiased. arXiv 1706.02262.

    A `weighted.WeightedELBO` weighs each datum of the plate by itself, scaled and subsampled plates
    included. Where there are more particles than memory allows at once, they are taken in chunks.
    trace, mean-field, beta, score-function and free-bits take a KL weight with each step,
    `svi.step(x, kl_weight=...)`; without one it is their attribute `kl_weight` (1, or `beta`).

    Args:
        name: one of the above.
        num_particles: K, draws of z for each image; they share one pass.
        max_plate_nesting: as of Pyro's ELBOs: number of plates inside each other, found by running
            the guide and the model once where it is not given.
        options: `alpha`, `beta`, `groups`, `elbo_weight`, `free_bits`, `mmd_weight`, as above.

    Raises:
        ValueError: the name is unknown, an option is not one of this objective or out of range.
    """
    check_objective(name, num_particles, options)
    chosen: dict[str, Any] = {**OBJECTIVE_OPTIONS.get(name, {}), **options}
    size: dict[str, Any] = {
        "num_particles": num_particles,
        "max_plate_nesting": max_plate_nesting,
    }
    if name in _WEIGHTED:
        rule, route = _WEIGHTED[name]
        return weighted.WeightedELBO(partial(rule, **chosen), route, **size)
    if name == "beta":
        return elbos.Sampled(kl_weight=chosen["beta"], **size)
    return _ELBOS[name](**chosen, **size)
