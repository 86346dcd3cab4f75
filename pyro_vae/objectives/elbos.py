"""Objectives derived from Pyro's ELBOs: weighted KL, score-function gradient, and other penalties.

    trace, beta       E_q[log p(x|z)] − β E_q[log q(z|x) − log p(z)]
    mean-field        E_q[log p(x|z)] − β KL(q(z|x) ‖ p(z)), the KL in closed form
    free-bits         E_q[log p(x|z)] − Σⱼ max(λ, mean over the batch of KLⱼ)
    beta-tc           ELBO − (β − 1) TC,  TC = KL(q(z) ‖ Πⱼ q(zⱼ))
    mmd               E_q[log p(x|z)] − λ MMD²(q(z), p(z))

where q(z), the aggregate posterior, is the mean of q(z|x) over the batch, and j runs over the
latent dimensions. Each latent site has its own term. Sums over rows have the scale of their plate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from .particles import (
    Detached,
    check_reparameterized,
    chunk_sizes,
    common_plates,
    in_particles,
    is_latent,
    know_plate_nesting,
    latent_sites,
    sample_sites,
)


class Sampled(Trace_ELBO):
    """trace, beta: the ELBO by sampling, with a KL weight, and particles in chunks.

    `svi.step(x, kl_weight=...)` sets the KL weight of one step; model and guide do not receive it.
    As a tensor, (), it is an input of a captured step (see `capture`).

    Attributes:
        kl_weight: β of steps that give none. It scales the latent sites of both model and guide;
            scaling those of one only would give a wrong value.
    """

    def __init__(
        self, num_particles: int = 1, max_plate_nesting: float = math.inf, kl_weight: float = 1.0
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=num_particles > 1,
        )
        self.kl_weight = kl_weight

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        kwargs = dict(kwargs)
        with _ScaledLatents(kwargs.pop("kl_weight", self.kl_weight)):
            return super()._get_trace(model, guide, args, kwargs)

    def _get_traces(
        self, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> Iterator[tuple[Trace, Trace]]:
        """Draw the particles in chunks that fit in memory; Pyro draws all at once."""
        if self.num_particles == 1:
            yield self._get_trace(model, guide, args, kwargs)
            return
        own = {name: value for name, value in kwargs.items() if name != "kl_weight"}
        know_plate_nesting(self, model, guide, args, own)
        for size in chunk_sizes(self.num_particles, args, own):
            nesting = int(self.max_plate_nesting) - 1  # without the particles' plate
            model_size, guide_size = (in_particles(f, size, nesting) for f in (model, guide))
            yield self._get_trace(model_size, guide_size, args, kwargs)


class MeanField(Sampled, TraceMeanField_ELBO):
    """mean-field: the ELBO, with the KL in closed form."""

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[float, Tensor]:
        latents = latent_sites(guide_trace)
        check_reparameterized(latents)
        if any(isinstance(_base(site["fn"]), Delta) for site in latents.values()):
            # Pyro's KL of a Delta omits its density, in an automatic guide the Jacobian.
            return Trace_ELBO._differentiable_loss_particle(self, model_trace, guide_trace)
        return super()._differentiable_loss_particle(model_trace, guide_trace)


class ScoreFunction(Sampled):
    """score-function: the ELBO with the score-function gradient, for any guide."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with Detached():  # outside the trace, which then records the detached draws
            traces = super()._get_trace(model, guide, args, kwargs)
        for site in latent_sites(traces[1]).values():
            # as in Pyro for a distribution without reparameterization
            site["score_parts"] = ScoreParts(site["log_prob"], site["unscaled_log_prob"], 0)
        return traces


class _Replaced(MeanField):
    """Base of the objectives that replace the KL of each latent site by a penalty."""

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[float, Tensor]:
        sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
        check_reparameterized(latent_sites(guide_trace))
        plates = common_plates([*sites.values(), *guide_sites.values()])
        data = plates[0].dim if len(plates) == 1 else None
        objective: Any = 0.0
        for name, site in sites.items():
            if site["is_observed"]:
                objective = objective + site["log_prob_sum"]
                continue
            q = guide_sites.pop(name)
            weights = q["value"].new_ones(q["fn"].batch_shape)
            weights = scale_and_mask(weights, q["scale"], q["mask"])
            if _counts(q, weights):
                penalty = self.penalty(site["fn"], q["fn"], q["value"], weights, data)
                objective = objective - penalty
        if guide_sites:
            raise ValueError(
                f"this objective expects a guide with the model's latent sites and no others; got "
                f"{', '.join(guide_sites)}"
            )
        return -torch_item(objective), -objective

    def penalty(
        self, p: Distribution, q: Distribution, z: Tensor, weights: Tensor, data: int | None
    ) -> Tensor:
        """Penalty of a latent site, summed over the batch: (), nats.

        Args:
            p, q: its distributions in model and guide, batch (…), event (…).
            z: (…, …) drawn from q.
            weights: (…) of the elements of the batch: the plate's scale, 0 where masked.
            data: the batch dimension of the rows, counted from the end; None if no single plate
                contains all sites.
        """
        raise NotImplementedError


class FreeBits(_Replaced):
    """free-bits: at least λ nats for each latent dimension.

    Args:
        free_bits: λ, in nats.
    """

    def __init__(self, free_bits: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.free_bits = free_bits

    def penalty(
        self, p: Distribution, q: Distribution, z: Tensor, weights: Tensor, data: int | None
    ) -> Tensor:
        parts = [d.base_dist for d in (q, p) if isinstance(d, Independent)]
        if len(parts) == 2 and not any(part.event_shape for part in parts):
            q, p = parts  # of one latent dimension each
        try:
            kl = kl_divergence(q, p)
        except NotImplementedError:
            kl = q.log_prob(z) - p.log_prob(z)
        kl = kl.reshape(weights.numel(), -1)  # (batch, latent dimensions)
        total = weights.sum()
        mean = (weights.reshape(-1, 1) * kl).sum(0) / total.clamp_min(torch.finfo(kl.dtype).tiny)
        return total * mean.clamp_min(self.free_bits).sum()


class BetaTC(_Replaced):
    """beta-tc: the ELBO with a weighted total correlation.

    q(z) is the mean of q(z|x) over the batch. Its total correlation differs from the paper's
    minibatch-weighted estimate by a constant only; the gradients are the same.

    Args:
        beta: β, the weight of the total correlation.
    """

    def __init__(self, beta: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta

    def penalty(
        self, p: Distribution, q: Distribution, z: Tensor, weights: Tensor, data: int | None
    ) -> Tensor:
        if not isinstance(q, Independent) or q.event_shape != z.shape[-1:]:
            raise ValueError(
                f"beta-tc expects a guide with independent latents, such as "
                f"Normal(…).to_event(1); got {type(q).__name__} with event shape "
                f"{tuple(q.event_shape)}"
            )
        data = _in_one_plate("beta-tc", data)
        share = (weights / weights.sum(data, keepdim=True)).log()  # of each row in q(z)
        # [n, …, m, …, j] = log q(zⱼ of row n | row m)
        densities = q.base_dist.log_prob(z.movedim(data - 1, 0).unsqueeze(data - 1))
        log_each = (densities + share.unsqueeze(-1)).logsumexp(data - 1)  # (n, …, Z)
        log_joint = (densities.sum(-1) + share).logsumexp(data)  # (n, …)
        total_correlation = (log_joint - log_each.sum(-1)).movedim(0, data)
        log_ratio = q.log_prob(z) - p.log_prob(z)
        return (weights * (log_ratio + (self.beta - 1) * total_correlation)).sum()


class MaximumMeanDiscrepancy(_Replaced):
    """mmd: the maximum mean discrepancy in place of the KL.

    The unbiased estimate of MMD² between the batch's draws and as many from the prior, under a sum
    of inverse multiquadratic kernels c/(c + d²), c = s · (E d² of two draws from the prior). It is
    0 for a single row.

    Args:
        mmd_weight: λ, nats.
    """

    SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __init__(self, mmd_weight: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mmd_weight = mmd_weight

    def penalty(
        self, p: Distribution, q: Distribution, z: Tensor, weights: Tensor, data: int | None
    ) -> Tensor:
        data = _in_one_plate("mmd", data)
        draws = p.rsample() if p.has_rsample else p.sample()
        own, prior = (
            v.reshape(*q.batch_shape, -1).movedim(data - 1, -2) for v in (z, draws.expand(z.shape))
        )  # (…, B, D)
        weights = weights.movedim(data, -1)
        share = weights / weights.sum(-1, keepdim=True)  # of each row in q(z)
        pairs = share.unsqueeze(-1) * share.unsqueeze(-2)
        identity = torch.eye(pairs.shape[-1], dtype=pairs.dtype, device=pairs.device)
        others = pairs * (1 - identity)
        count = others.sum((-2, -1))
        spread = 2 * p.variance.reshape(*p.batch_shape, -1).sum(-1).mean().detach()
        between = (pairs * self._kernel(own, prior, spread)).sum((-2, -1))
        within = [(others * self._kernel(v, v, spread)).sum((-2, -1)) for v in (own, prior)]
        within_both = (within[0] + within[1]) / count.clamp_min(torch.finfo(count.dtype).tiny)
        discrepancy = torch.where(count > 0, within_both - 2 * between, 0.0)  # (…)
        return self.mmd_weight * (weights.sum(-1) * discrepancy).sum()

    def _kernel(self, a: Tensor, b: Tensor, spread: Tensor) -> Tensor:
        """(…, B, D), (…, B', D) → (…, B, B')."""
        distances = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        scales = [s * spread for s in self.SCALES]
        return sum((c / (c + distances) for c in scales), distances.new_zeros(()))


class _ScaledLatents(Messenger):
    """Multiplies the scale of every latent site."""

    def __init__(self, factor: float | Tensor) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_latent(msg):
            msg["scale"] = msg["scale"] * self.factor


def _counts(site: dict[str, Any], weights: Tensor) -> bool:
    """Whether a site has any weight. Reads the values of tensors only if it has a mask."""
    if isinstance(site["mask"], Tensor):
        return bool(weights.any())
    scale = site["scale"]
    return site["mask"] is not False and (isinstance(scale, Tensor) or scale != 0)


def _in_one_plate(name: str, data: int | None) -> int:
    if data is None:
        raise ValueError(
            f"{name} expects one plate that holds all sites of model and guide, whose rows make up "
            f"q(z); got none, or several"
        )
    return data


def _base(distribution: Distribution) -> Distribution:
    """The distribution inside `Independent`."""
    return distribution.base_dist if isinstance(distribution, Independent) else distribution
