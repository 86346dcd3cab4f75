"""Families of q(z|x): modules features (..., F) → distribution, batch (...), event (Z,).

    diagonal   N(μ, diag σ²)                     F = 2 Z
    full       N(μ, L Lᵀ), L lower triangular     F = 2 Z + Z (Z − 1) / 2
    flow       μ + L T⁻¹(ε; h), ε ~ N(0, I)      F = 2 Z + Z (Z − 1) / 2 + H
    mixture    Σₖ πₖ N(μₖ, diag σₖ²)             F = K (2 Z + 1)

The encoder computes the features. L = diag σ · (I + lower). Each σ is bounded
smoothly, see `scale_of`. `kind` is the name of the family, as in `families`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyro.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence, register_kl

from ..config.families import DiagonalGuide, FlowGuide, FullGuide, Guide, MixtureGuide, RefinedGuide
from .bounds import soft_clamp
from .flows import FlowDistribution, coupling_flow, even_normals

# log σ(x) keeps every bit between ± this. Two units further is the limit: at e^−14, a draw of z in
# float32 is a few roundings from its mean, and at e^14, p(x|z) of an outlier is finite.
LOG_SCALE = 12.0
# Density of a draw of one latent, below which its gradient would overflow float32.
LEAST_DENSITY = 1e-18


class DiagonalGaussian(nn.Module):
    """N(μ, diag σ²): independent latents.

    Source: "Auto-encoding variational Bayes", arXiv 1312.6114.
    """

    kind = "diagonal"

    def forward(self, features: Tensor) -> Distribution:
        loc, log_scale = features.chunk(2, dim=-1)
        return Normal(loc, scale_of(log_scale)).to_event(1)


class FullGaussian(nn.Module):
    """N(μ, L Lᵀ): correlated latents."""

    kind = "full"
    place: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        num_lower = latent_dim * (latent_dim - 1) // 2
        self.sizes = [latent_dim, latent_dim, num_lower]
        # Entry (i, j) of L is the feature of this number; the last one is 0.
        place = torch.full((latent_dim, latent_dim), num_lower)
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1, device=place.device)
        place[rows, columns] = torch.arange(num_lower, device=place.device)
        self.register_buffer("place", place, persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        loc, scale_tril = self.moments(features)
        return MultivariateNormal(loc, scale_tril=scale_tril)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., Z) and Cholesky factor of the covariance (..., Z, Z)."""
        loc, log_scale, lower = features.split(self.sizes, dim=-1)
        entries = F.pad(lower, (0, 1))[..., self.place]
        factor = entries + torch.ones_like(loc).diag_embed()
        return loc, scale_of(log_scale).unsqueeze(-1) * factor


class Flow(nn.Module):
    """A coupling flow after a Gaussian with full covariance, which it is at first.

    Source: "Density estimation using Real NVP", arXiv 1605.08803.
    """

    kind = "flow"
    normals: Tensor

    def __init__(self, latent_dim: int, transforms: int, hidden: int) -> None:
        super().__init__()
        self.gaussian = FullGaussian(latent_dim)
        self.sizes = [sum(self.gaussian.sizes), hidden]
        self.transform = coupling_flow(latent_dim, hidden, transforms, hidden)
        self.register_buffer("normals", even_normals(latent_dim), persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        gaussian, context = features.split(self.sizes, dim=-1)
        transform = self.transform(context)
        return FlowDistribution(transform, *self.gaussian.moments(gaussian), self.normals)


class Mixture(nn.Module):
    """Σₖ πₖ N(μₖ, diag σₖ²): several modes, or correlated latents."""

    kind = "mixture"

    def __init__(self, components: int) -> None:
        super().__init__()
        self.components = components

    def forward(self, features: Tensor) -> Distribution:
        logits = features[..., : self.components]
        parts = features[..., self.components :].unflatten(-1, (self.components, -1))
        loc, log_scale = parts.chunk(2, dim=-1)
        normals = Normal(loc, scale_of(log_scale)).to_event(1)
        return ReparameterizedMixture(Categorical(logits=logits), normals)


class GaussianMixture(MixtureSameFamily):
    """A mixture of Gaussians with the support of a Gaussian, which NUTS can transform."""

    support = constraints.real_vector


class ReparameterizedMixture(GaussianMixture):
    """A mixture of normals with independent latents, whose draws have pathwise gradients.

    Fⱼ(z; φ), the distribution function of zⱼ given the latents before it, is uniform at a draw.
    Held fixed, it defines z as a function of φ: dz = −(∂F/∂z)⁻¹ ∂F/∂φ dφ, where ∂F/∂z is lower
    triangular.

    Pyro's `MixtureOfDiagNormals` (1.9.2) has wrong gradients of the logits unless the smallest
    scale is 1, and NaN in float32 with tens of latents.

    Source: "Implicit reparameterization gradients", arXiv 1805.08498.
    """

    has_rsample = True

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        z = self.sample(torch.Size(sample_shape))
        if not torch.is_grad_enabled():
            return z
        normals, logits = self.component_distribution.base_dist, self.mixture_distribution.logits
        with torch.autocast(z.device.type, enabled=False):
            value = z.unsqueeze(-2)  # (..., 1, Z), and (..., K, Z) below
            t, log_density = (value - normals.loc) / normals.scale, normals.log_prob(value)
            before = F.pad(log_density[..., :-1], (1, 0)).cumsum(-1)
            weights = (logits.unsqueeze(-1) + before).softmax(-2)
            # The tail on the side of z has more digits than 1 minus the other.
            side = torch.where((weights * t).sum(-2, keepdim=True) > 0, -1.0, 1.0).to(z)
            tail = torch.special.ndtr(side * t)
            uniform = (weights * tail).sum(-2)  # F or 1 − F, (..., Z)
            with torch.no_grad():
                density = (weights * log_density.exp()).sum(-2)
                # Where it underflows, the draw has no path.
                usable = density > LEAST_DENSITY
                inverse = torch.where(usable, side.squeeze(-2) / density, 0.0)
                excess = weights * (tail - uniform.unsqueeze(-2))
                slopes = torch.einsum("...ki,...kj->...ij", excess, -t / normals.scale)
                slopes = inverse.unsqueeze(-1) * slopes.tril(-1)
            change = inverse * (uniform - uniform.detach())
            return z - torch.linalg.solve_triangular(
                slopes, change.unsqueeze(-1), upper=False, unitriangular=True
            ).squeeze(-1)


def num_features(guide: Guide, latent_dim: int) -> int:
    """Number of features F of a family."""
    if isinstance(guide, MixtureGuide):
        return guide.components * (2 * latent_dim + 1)
    if isinstance(guide, RefinedGuide):
        return 2 * latent_dim
    lower = 0 if isinstance(guide, DiagonalGuide) else latent_dim * (latent_dim - 1) // 2
    return 2 * latent_dim + lower + (guide.hidden if isinstance(guide, FlowGuide) else 0)


def posterior_family(guide: Guide, latent_dim: int) -> nn.Module:
    """The module of a family, with new weights."""
    if isinstance(guide, FullGuide):
        return FullGaussian(latent_dim)
    if isinstance(guide, FlowGuide):
        return Flow(latent_dim, guide.transforms, guide.hidden)
    return Mixture(guide.components) if isinstance(guide, MixtureGuide) else DiagonalGaussian()


def scale_of(log_scale: Tensor) -> Tensor:
    """Standard deviations, bounded smoothly to e^±14."""
    return soft_clamp(log_scale, -LOG_SCALE, LOG_SCALE, width=2.0).exp()


def kl(q: Distribution, p: Distribution, z: Tensor) -> Tensor:
    """KL(q ‖ p) of each row (...), nats: in closed form if there is one, else its mean over draws.

    Args:
        q: batch (...).
        p: batch () or (...).
        z: (S, ..., Z), draws from q.
    """
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return (q.log_prob(z) - p.log_prob(z)).mean(0)


@register_kl(MultivariateNormal, Independent)
def _kl_full_independent(q: MultivariateNormal, p: Independent) -> Tensor:
    """KL(N(m, L Lᵀ) ‖ Πⱼ N(μⱼ, sⱼ²))."""
    base = p.base_dist
    if not isinstance(base, Normal) or p.event_shape != q.event_shape or base.event_shape:
        raise NotImplementedError
    # With L in units of s, the covariance of p is the identity.
    factor = q.scale_tril / base.scale.unsqueeze(-1)
    away = (q.loc - base.loc) / base.scale
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    size = q.event_shape.numel()
    return (factor.square().sum((-2, -1)) + away.square().sum(-1) - size) / 2 - log_det
