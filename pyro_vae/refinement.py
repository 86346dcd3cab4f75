"""Where log p(x) − ELBO is lost: guides refined for each image by SVI.

    log p(x) − ELBO(encoder) = [log p(x) − ELBO(full)]           beyond any Gaussian
                             + [ELBO(full) − ELBO(diagonal)]     latents held independent
                             + [ELBO(diagonal) − ELBO(encoder)]  amortization: the encoder's error

where ELBO(full) and ELBO(diagonal) are the best that a Gaussian with full and with diagonal
covariance reaches, fitted to each image by itself, the model held fixed. The first two together are
the approximation gap of the family that the encoder predicts.

Source: "Inference suboptimality in variational autoencoders", arXiv 1801.03558.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution, MultivariateNormal, Normal
from pyro.infer import SVI
from torch import Tensor, nn

from .evidence import Evidence, importance_sample, samples_at_once
from .interface import LatentModel, PyroModel, held_fixed, register
from .objectives import objective
from .optimizer import OneOptimizer

__all__ = ["Gaps", "PerImageGuide", "elbo", "gaps", "refine"]

PARTICLES = 8
LEARNING_RATE = 0.05
# The share of the steps, the last ones, whose iterates are averaged: that takes their noise out.
AVERAGED = 0.25


class PerImageGuide(nn.Module):
    """A Gaussian q(z) for each of B images, with parameters of its own.

    Args:
        loc, scale: (B, Z), where it starts.
        full: whether the covariance is full, rather than diagonal.
        latent: name of the latent site.
    """

    def __init__(self, loc: Tensor, scale: Tensor, full: bool, latent: str = "z") -> None:
        super().__init__()
        self.latent = latent
        self.full = full
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(scale.log())
        # Below the diagonal, in units of the row's scale; unused where the latents are independent.
        lower = torch.zeros(*loc.shape, loc.shape[-1]).to(loc)
        self.lower = nn.Parameter(lower, requires_grad=full)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z) of each image: batch (B,), event (Z,), for the x (B, …) that it was made for."""
        scale = self.log_scale.exp()
        if not self.full:
            return Normal(self.loc, scale).to_event(1)
        factor = torch.eye(scale.shape[-1]).to(scale) + self.lower.tril(-1)
        return MultivariateNormal(self.loc, scale_tril=scale.unsqueeze(-1) * factor)

    def guide(self, x: Tensor) -> None:
        """q(z) as a Pyro guide."""
        register("per_image", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(self.latent, self.posterior(x))


def refine(
    vae: PyroModel,
    x: Tensor,
    full: bool = False,
    num_steps: int = 500,
    start: PerImageGuide | None = None,
    on_step: Callable[[int], object] | None = None,
) -> PerImageGuide:
    """Fit a Gaussian to each image's posterior by SVI, the model held fixed.

    Adam at a learning rate that falls to zero, eight particles; the iterates of the last quarter
    are averaged. The optimum is approached from below, so what is taken from it is a lower bound
    on the amortization gap and an upper bound on the rest.

    Args:
        vae: with a `model(x)` whose latents may take any real value, and whose decoder takes
            z (S, B, Z), or (B, Z) inside a plate of S.
        x: (B, *data_shape).
        full: whether the covariance is full.
        num_steps: of SVI.
        start: a guide to start from, rather than the encoder's posterior.
        on_step: called with 1 after each step.

    Raises:
        ValueError: `num_steps` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps expects an integer of at least 1; got {num_steps}")
    posterior = vae.posterior(x) if start is None else start.posterior(x)
    loc, scale = posterior.mean.detach(), posterior.variance.sqrt().detach()
    guide = PerImageGuide(loc, scale, full, vae.latent)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    # All images in one optimizer: Adam scales each parameter by itself, so none disturbs another.
    optimizer = OneOptimizer(torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99)))
    model = poutine.block(
        vae.model, hide_types=["param"]
    )  # whose parameters are not SVI's business
    svi = SVI(model, guide.guide, optimizer, loss=objective("trace", PARTICLES))
    averages = [torch.zeros_like(p) for p in parameters]
    num_averaged = max(1, round(AVERAGED * num_steps))
    with held_fixed(vae), pyro.validation_enabled(False):
        for step in range(num_steps):
            part = step / num_steps
            optimizer.optimizer.param_groups[0]["lr"] = (
                LEARNING_RATE * (1 + math.cos(math.pi * part)) / 2
            )
            svi.step(x)
            if step >= num_steps - num_averaged:
                for average, parameter in zip(averages, parameters, strict=True):
                    average += parameter.detach() / num_averaged
            if on_step is not None:
                on_step(1)
    with torch.no_grad():
        for average, parameter in zip(averages, parameters, strict=True):
            parameter.copy_(average)
    return guide.requires_grad_(False)


@torch.no_grad()
def elbo(vae: LatentModel, posterior: Distribution, x: Tensor, num_samples: int = 1000) -> Tensor:
    """ELBO (B,) of any posterior (batch (B,), event (Z,)), float64, nats, by sampling.

    Raises:
        ValueError: `num_samples` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples expects an integer of at least 1; got {num_samples}")
    prior, total = vae.prior(), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    chunk = samples_at_once(x)
    for done in range(0, num_samples, chunk):
        z = posterior.sample((min(chunk, num_samples - done),))
        log_weights = vae.likelihood(z).log_prob(x) + prior.log_prob(z) - posterior.log_prob(z)
        total += log_weights.double().sum(0) / num_samples
    return total


@dataclass(frozen=True)
class Gaps:
    """The inference gaps of B images, (B,) float64, nats; noise of sampling can make them negative.

    Attributes:
        amortization: ELBO(diagonal) − ELBO(encoder).
        correlation: ELBO(full) − ELBO(diagonal).
        remainder: log p(x) − ELBO(full).
        evidence: log p(x), with the refined full Gaussian as proposal, which makes it more accurate
            than the encoder's.
    """

    amortization: Tensor
    correlation: Tensor
    remainder: Tensor
    evidence: Evidence

    @property
    def approximation(self) -> Tensor:
        """log p(x) − ELBO(diagonal)."""
        return self.correlation + self.remainder


def gaps(
    vae: PyroModel,
    x: Tensor,
    num_steps: int = 500,
    num_samples: int = 1000,
    on_step: Callable[[int], object] | None = None,
) -> Gaps:
    """Split log p(x) − ELBO of each image into its parts.

    Draws come from torch's global random state.

    Args:
        vae: as of `refine`, with a guide of independent Gaussian latents.
        x: (B, *data_shape).
        num_steps: of SVI, for each of the two refined guides.
        num_samples: of z, for each ELBO and for log p(x).
        on_step: called with 1 after each step of SVI.
    """
    diagonal = refine(vae, x, False, num_steps, on_step=on_step)
    full = refine(vae, x, True, num_steps, start=diagonal, on_step=on_step)
    with torch.no_grad():
        posteriors = [vae.posterior(x), diagonal.posterior(x), full.posterior(x)]
    encoder_elbo, diagonal_elbo, full_elbo = (elbo(vae, q, x, num_samples) for q in posteriors)
    evidence = importance_sample(vae, x, num_samples, with_pareto_k=True, proposal=posteriors[2])
    return Gaps(
        amortization=diagonal_elbo - encoder_elbo,
        correlation=full_elbo - diagonal_elbo,
        remainder=evidence.log_evidence - full_elbo,
        evidence=evidence,
    )
