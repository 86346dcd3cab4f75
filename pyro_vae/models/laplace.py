"""The guide of the Laplace approximation, with learned corrections.

    μ₀, h = encoder(x)
    μ₁    = μ₀ + P₀⁻¹ ∇₀                    a Newton step, P₀ and ∇₀ at μ₀
    P     = Λ + Jᵀ W J                      precision of the Gauss–Newton approximation at μ₁
    q     = N(μ₁ + δ + B m, (B L)(B L)ᵀ),   B Bᵀ = P⁻¹, B lower triangular

J is the Jacobian of the decoder, W the curvature of −log p(x|z) in the decoder's output, Λ the
prior's precision, ∇ = ∇ log p(x, z) and δ = P⁻¹ ∇, a Newton step of bounded length. A small
network maps μ₁, ∇ at μ₁ and h to the shift m and the lower triangular L. For a linear decoder with
Gaussian noise, q with m = 0 and L = I is the posterior.

The model enters as a constant: the guide is trained with the model held fixed, by
`training.refitting`.

Source: "Variational Laplace autoencoders", PMLR 97; "Iterative amortized inference", arXiv
1807.09356.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from pyro.distributions import Distribution, MultivariateNormal
from torch import Tensor, nn

from .posteriors import FullGaussian

if TYPE_CHECKING:
    from .vae import VAE

# Newton steps from the encoder's guess to the point where the model is approximated.
NEWTON_STEPS = 1
# Length of a Newton step in posterior standard deviations, at most.
LONGEST_STEP = 3.0


class Laplace(nn.Module):
    """Features (..., Z + H), x and the model → q(z|x), batch (...), event (Z,).

    Args:
        latent_dim: Z.
        hidden: H, also the units of the correction's hidden layers.
    """

    def __init__(self, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.gaussian = FullGaussian(latent_dim)
        self.sizes = [latent_dim, hidden]
        self.correction = nn.Sequential(
            nn.Linear(3 * latent_dim + hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, sum(self.gaussian.sizes)),
        )
        with torch.no_grad():  # begins near the Laplace approximation
            for parameter in self.correction[-1].parameters():
                parameter.mul_(0.1)

    def forward(self, features: Tensor, x: Tensor, vae: VAE) -> Distribution:
        loc, context = features.split(self.sizes, dim=-1)
        for _ in range(NEWTON_STEPS):
            loc = loc + newton_step(*local_shape(vae, x, loc.detach()))
        slope, factor = local_shape(vae, x, loc.detach())
        # The slope may have any size, and is shown at two scales.
        known = [loc, torch.asinh(slope), torch.tanh(slope / 10), context]
        shift, scale_tril = self.gaussian.moments(self.correction(torch.cat(known, -1)))
        loc = loc + newton_step(slope, factor) + _apply(factor, shift)
        return MultivariateNormal(loc, scale_tril=factor @ scale_tril)


def newton_step(slope: Tensor, factor: Tensor) -> Tensor:
    """B Bᵀ ∇ (..., Z), of at most `LONGEST_STEP` posterior standard deviations."""
    whitened = _apply(factor.mT, slope)
    length = whitened.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-9)
    return _apply(factor, whitened * (LONGEST_STEP / length).clamp_max(1.0))


@torch.no_grad()
def local_shape(vae: VAE, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Slope of log p(x, z) (..., Z) and B (..., Z, Z), at z (..., Z), without gradients.

    The curvature of the prior is that of a Gaussian with its variances. Of a likelihood with
    several parameters for each value, only the first counts in W.
    """
    shape = vae.likelihood_module.spec.shape
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        raw = vae.decoder(z)
        (prior_slope,) = torch.autograd.grad(vae.prior().log_prob(z).sum(), z)
        output = raw.detach().requires_grad_()
        log_likelihood = vae.likelihood_module(output).log_prob(x).sum()
        (slope,) = torch.autograd.grad(log_likelihood, output, create_graph=True)
        (curvature,) = torch.autograd.grad(_first(slope, z.dim() - 1, shape).sum(), output)
        (likelihood_slope,) = torch.autograd.grad(raw, z, slope.detach())
    z = z.detach()
    columns = _first(_jacobian(vae.decoder, z), z.dim(), shape).flatten(z.dim())  # (Z, ..., D)
    weight = -_first(curvature, z.dim() - 1, shape).flatten(z.dim() - 1)
    weight = torch.nan_to_num(weight).clamp_min(0)
    precision = torch.einsum("i...d,...d,j...d->...ij", columns, weight, columns)
    precision = precision + vae.prior().variance.reciprocal().diag()
    # The Cholesky factor of the reversed matrix, reversed, is upper triangular: P = U Uᵀ, and
    # B = U⁻ᵀ.
    upper = torch.linalg.cholesky(precision.flip(-1, -2)).flip(-1, -2)
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand_as(upper)
    factor = torch.linalg.solve_triangular(upper.mT, identity, upper=False)
    return torch.nan_to_num(prior_slope + likelihood_slope), factor


def _jacobian(decoder: nn.Module, z: Tensor) -> Tensor:
    """Derivatives (Z, ..., P, *data_shape) of the decoder's output by each latent."""
    _load_forward_mode()
    tangents = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)

    def directional(tangent: Tensor) -> Tensor:
        return torch.func.jvp(decoder, (z,), (tangent.expand_as(z),))[1]

    return torch.func.vmap(directional)(tangents)


@cache
def _load_forward_mode() -> None:
    """Load torch's forward mode, which warns of a function of torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        one = torch.ones(())
        torch.func.jvp(torch.sin, (one,), (one,))


def _first(raw: Tensor, num_batch: int, shape: tuple[int, ...]) -> Tensor:
    """The first parameter of each value, of (..., P, *shape) or (..., *shape)."""
    return raw.select(num_batch, 0) if raw.dim() > num_batch + len(shape) else raw


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
