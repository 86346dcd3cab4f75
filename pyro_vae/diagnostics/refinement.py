"""The parts of log p(x) − ELBO, from Gaussians fitted to each row by SVI.

    log p(x) − ELBO(encoder) = [log p(x) − ELBO(full)]           the posterior is not Gaussian
                             + [ELBO(full) − ELBO(diagonal)]     the latents are correlated
                             + [ELBO(diagonal) − ELBO(encoder)]  amortization: the encoder's error

where ELBO(full) and ELBO(diagonal) are the highest ELBOs of Gaussians with full and with diagonal
covariance, fitted to each row by itself with the model fixed. The first two terms together are the
approximation gap of a guide with independent latents.

Any other guide is compared with a reference in its own family: for each row the fitted full
Gaussian or the encoder's posterior, whichever has the higher ELBO.

    log p(x) − ELBO(encoder) = [log p(x) − ELBO(reference)]      the approximation gap
                             + [ELBO(reference) − ELBO(encoder)] amortization

A flow or a mixture contains or approximates a full Gaussian. Its own best may be better than the
reference: the amortization gap is then larger, and the approximation gap smaller.

Source: "Inference suboptimality in variational autoencoders", arXiv 1801.03558.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution, MultivariateNormal, Normal
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import Independent
from torch.optim import Adam

from ..capture.optimizer import NonFiniteGradient, OneOptimizer
from ..config import InputError
from ..evidence.importance import Evidence, importance_sample
from ..models.interface import LatentModel, PyroModel, held_fixed, register
from ..models.refined import choose
from ..objectives.registry import objective
from ..runtime.memory import Callback, ignore
from ..runtime.randomness import one_thread

# The references of guides with independent and with correlated latents, and of other families
Reference = Literal[
    "diagonal Gaussian", "full Gaussian", "full Gaussian (or of q(z|x), where that is higher)"
]

PARTICLES = 8
LEARNING_RATE = 0.05
# The iterates of this last share of the steps are averaged, which reduces their noise.
AVERAGED = 0.25


class PerRowGuide(nn.Module):
    """A Gaussian q(z) for each of B rows, with its own parameters.

    Args:
        loc, scale: (B, Z), initial means and standard deviations.
        full: whether the covariance is full, rather than diagonal.
        latent: name of the latent site.
    """

    def __init__(self, loc: Tensor, scale: Tensor, full: bool, latent: str = "z") -> None:
        super().__init__()
        self.latent = latent
        self.full = full
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(scale.log())
        # Below the diagonal of the Cholesky factor, each line in units of its scale
        lower = loc.new_zeros(*loc.shape, loc.shape[-1])
        self.lower = nn.Parameter(lower, requires_grad=full)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z) of each row: batch (B,), event (Z,). The values of x are not used."""
        scale = self.log_scale.exp()
        if not self.full:
            return Normal(self.loc, scale).to_event(1)
        factor = torch.ones_like(scale).diag_embed() + self.lower.tril(-1)
        return MultivariateNormal(self.loc, scale_tril=scale.unsqueeze(-1) * factor)

    def guide(self, x: Tensor) -> None:
        """q(z) as a Pyro guide."""
        register("per_row", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(self.latent, self.posterior(x))


@one_thread()
def refine(
    vae: PyroModel,
    x: Tensor,
    full: bool = False,
    num_steps: int = 500,
    start: PerRowGuide | None = None,
    on_step: Callback = ignore,
) -> PerRowGuide:
    """Fit a Gaussian to the posterior of each row by SVI, with the model fixed.

    Adam with a learning rate that falls to zero; the iterates of the last quarter are averaged. The
    ELBO approaches the optimum from below: it gives a lower bound on the amortization gap and an
    upper bound on the rest.

    Args:
        vae: with a `model(x)` whose latents may take any real value, and whose decoder takes
            z (S, B, Z), or (B, Z) inside a plate of S.
        x: (B, *data_shape).
        full: whether the covariance is full.
        num_steps: number of SVI steps.
        start: a guide to start from; by default the encoder's posterior.
        on_step: called with 1 after each step.

    Raises:
        ValueError: `num_steps` is not positive.
        InputError: the log-density of a row exceeds float32, as an outlier's may.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps expects an integer of at least 1; got {num_steps}")
    posterior = vae.posterior(x) if start is None else start.posterior(x)
    loc, scale = posterior.mean.detach(), posterior.variance.sqrt().detach()
    guide = PerRowGuide(loc, scale, full, vae.latent)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    # One optimizer for all rows: Adam scales each parameter by itself.
    adam = Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))
    # SVI must not see the parameters of the model.
    model = poutine.block(vae.model, hide_types=["param"])
    svi = SVI(model, guide.guide, OneOptimizer(adam), loss=objective("trace", PARTICLES))
    try:
        with held_fixed(vae), pyro.validation_enabled(False):
            _fit(svi, adam, x, num_steps, on_step)
    except NonFiniteGradient:
        row = int(vae.likelihood(loc).log_prob(x).argmin())
        raise InputError(
            f"the posterior of a row cannot be refined: its log-density exceeds float32. The most "
            f"unlikely row is row {row} of these {len(x)} (counted from 0); remove it"
        ) from None
    return guide.requires_grad_(False)


def _fit(svi: SVI, adam: Adam, x: Tensor, num_steps: int, on_step: Callback) -> None:
    """Make the steps, and set the parameters to their averages over the last of them."""
    (group,) = adam.param_groups
    averages = [torch.zeros_like(p) for p in group["params"]]
    num_averaged = max(1, round(AVERAGED * num_steps))
    for step in range(num_steps):
        group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * (step / num_steps))) / 2
        svi.step(x)
        if step >= num_steps - num_averaged:
            for average, parameter in zip(averages, group["params"], strict=True):
                average += parameter.detach() / num_averaged
        on_step(1)
    with torch.no_grad():
        for average, parameter in zip(averages, group["params"], strict=True):
            parameter.copy_(average)


def elbo(vae: LatentModel, posterior: Distribution, x: Tensor, num_samples: int = 1000) -> Tensor:
    """ELBO (B,) of any posterior (batch (B,), event (Z,)), float64, nats, by sampling.

    Raises:
        ValueError: `num_samples` is not positive.
    """
    return importance_sample(vae, x, num_samples, proposal=posterior).elbo


@dataclass(frozen=True)
class Gaps:
    """Inference gaps of B rows, (B,) float64, nats. Sampling noise can make them negative.

    Attributes:
        amortization: ELBO(reference) − ELBO(encoder).
        correlation: ELBO(full) − ELBO(diagonal); 0 for a guide with correlated latents.
        remainder: log p(x) − ELBO(full); log p(x) − ELBO(reference) for correlated latents.
        evidence: log p(x), with the fitted full Gaussian as proposal, which is more accurate than
            with the encoder's posterior; with the reference for a guide with correlated latents.
        reference: what the encoder's posterior is compared with.
    """

    amortization: Tensor
    correlation: Tensor
    remainder: Tensor
    evidence: Evidence
    reference: Reference = "diagonal Gaussian"

    @property
    def approximation(self) -> Tensor:
        """log p(x) − ELBO(reference)."""
        return self.correlation + self.remainder


@one_thread()
def gaps(
    vae: PyroModel,
    x: Tensor,
    num_steps: int = 500,
    num_samples: int = 1000,
    on_step: Callback = ignore,
) -> Gaps:
    """Split log p(x) − ELBO of each row into its parts.

    Draws come from torch's global random state.

    Args:
        vae: as in `refine`. Its posterior has independent latents if it is an `Independent`.
        x: (B, *data_shape).
        num_steps: number of SVI steps for each of the two fits.
        num_samples: draws of z for each ELBO and for log p(x).
        on_step: called with 1 after each step.
    """
    diagonal = refine(vae, x, False, num_steps, on_step=on_step)
    full = refine(vae, x, True, num_steps, start=diagonal, on_step=on_step)
    with torch.no_grad():
        posteriors = [vae.posterior(x), diagonal.posterior(x), full.posterior(x)]
    if not isinstance(posteriors[0], Independent):
        return _gaps_of_full(vae, x, posteriors[0], posteriors[2], num_samples)
    encoder_elbo, diagonal_elbo, full_elbo = (elbo(vae, q, x, num_samples) for q in posteriors)
    evidence = importance_sample(vae, x, num_samples, with_pareto_k=True, proposal=posteriors[2])
    return Gaps(
        amortization=diagonal_elbo - encoder_elbo,
        correlation=full_elbo - diagonal_elbo,
        remainder=evidence.log_evidence - full_elbo,
        evidence=evidence,
    )


def _gaps_of_full(
    vae: PyroModel, x: Tensor, encoder: Distribution, full: Distribution, num_samples: int
) -> Gaps:
    """Gaps of a guide with correlated latents; `full` are the fitted Gaussians."""
    own, fitted = (
        importance_sample(vae, x, num_samples, with_pareto_k=True, proposal=q)
        for q in (encoder, full)
    )
    reference: Reference = "full Gaussian"
    if not isinstance(encoder, MultivariateNormal):
        reference = "full Gaussian (or of q(z|x), where that is higher)"
    better = own.elbo > fitted.elbo
    names = [name for name, value in vars(own).items() if isinstance(value, Tensor)]
    both = ([getattr(evidence, name) for name in names] for evidence in (own, fitted))
    values: dict[str, Any] = dict(zip(names, choose(better, *both), strict=True))
    best = replace(own, **values)
    return Gaps(
        amortization=best.elbo - own.elbo,
        correlation=torch.zeros_like(own.elbo),
        remainder=best.log_evidence - best.elbo,
        evidence=best,
        reference=reference,
    )
