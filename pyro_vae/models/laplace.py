"""The guide of the Laplace approximation, with learned corrections.

    μ₀, h = encoder(x)
    μ₁    = μ₀ + P₀⁻¹ ∇₀                    a Newton step, P₀ and ∇₀ at μ₀
    P     = Λ + Jᵀ W J                      precision of the Gauss–Newton approximation at μ₁
    q     = t(ν, μ₁ + δ + B m, c B L),      B Bᵀ = P⁻¹, B lower triangular

J is the Jacobian of the decoder, W the curvature of −log p(x|z) in the decoder's output, Λ the
prior's precision, ∇ = ∇ log p(x, z) and δ = P⁻¹ ∇, a Newton step of bounded length. A small
network maps μ₁, ∇ at μ₁ and h to the shift m and the lower triangular L. t is the multivariate
Student distribution with ν degrees of freedom and width c, which are the same for all x. For a
linear decoder with Gaussian noise, q with m = 0, L = I, c = 1 and ν = ∞ is the posterior.

The model enters as a constant: the guide is trained with the model held fixed, by
`training.refitting`.

Source: "Variational Laplace autoencoders", PMLR 97; "Iterative amortized inference", arXiv
1807.09356.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pyro.distributions import Distribution, MultivariateStudentT
from scipy.optimize import minimize
from scipy.special import gammaln
from torch import Tensor, nn

from .posteriors import FullGaussian

if TYPE_CHECKING:
    from .vae import VAE

# Newton steps from the encoder's guess to the point where the model is approximated.
NEWTON_STEPS = 1
# Degrees of freedom of a new guide, and at most: nearly a Gaussian.
MAX_DF = 1000.0
# Step of the decoder's derivatives.
DIFFERENCE = 0.01
# Length of a Newton step in posterior standard deviations, at most.
LONGEST_STEP = 3.0


class Laplace(nn.Module):
    """Features (..., Z + H), x and the model → q(z|x), batch (...), event (Z,).

    Args:
        latent_dim: Z.
        hidden: H, also the units of the correction's hidden layers.

    Attributes:
        df, width: ν and c. They are not parameters of SVI; see `set_tail`.
    """

    df: Tensor
    width: Tensor

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
        self.register_buffer("df", torch.tensor(MAX_DF))
        self.register_buffer("width", torch.tensor(1.0))
        with torch.no_grad():  # begins near the Laplace approximation
            for parameter in self.correction[-1].parameters():
                parameter.mul_(0.1)

    @torch.no_grad()
    def set_tail(self, radii: np.ndarray) -> None:
        """Set ν and c by maximum likelihood.

        A Gaussian's tails are lighter than those of posteriors. Heavier ones keep importance
        weights bounded, and make regions of high density contain the truth as often as they claim.

        Args:
            radii: (N,) lengths of (B L)⁻¹ (z* − mean) of simulated pairs.
        """
        size = self.sizes[0]

        def loss(logs: np.ndarray) -> float:
            width, df = np.exp(logs[0]), 2 + np.exp(logs[1])
            tail = (df + size) / 2 * np.log1p((radii / width) ** 2 / df).mean()
            scale = gammaln((df + size) / 2) - gammaln(df / 2) - size / 2 * np.log(df)
            return tail - scale + size * logs[0]

        best = minimize(loss, [0.0, np.log(30.0)], method="Nelder-Mead")
        self.width.fill_(float(np.exp(best.x[0])))
        self.df.fill_(min(2 + float(np.exp(best.x[1])), MAX_DF))

    def forward(self, features: Tensor, x: Tensor, vae: VAE) -> Distribution:
        loc, context = features.split(self.sizes, dim=-1)
        for _ in range(NEWTON_STEPS):
            loc = loc + newton_step(*local_shape(vae, x, loc.detach()))
        slope, factor = local_shape(vae, x, loc.detach())
        # The slope may have any size, and is shown at two scales.
        known = [loc, torch.asinh(slope), torch.tanh(slope / 10), context]
        shift, scale_tril = self.gaussian.moments(self.correction(torch.cat(known, -1)))
        loc = loc + newton_step(slope, factor) + _apply(factor, shift)
        return MultivariateStudentT(self.df, loc, self.width * factor @ scale_tril)


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
    columns = _first(_jacobian(vae, z), z.dim(), shape).flatten(z.dim())  # (Z, ..., D)
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


def _jacobian(vae: VAE, z: Tensor) -> Tensor:
    """Derivatives (Z, ..., P, *data_shape) of the decoder's output by each latent.

    By differences over `DIFFERENCE` prior standard deviations, which take half the time of forward
    differentiation. Any q(z|x) that they give is a valid one.
    """
    size = DIFFERENCE * vae.prior().variance.sqrt()
    lead = [1] * (z.dim() - 1)
    moved = z + size.diag().reshape(len(size), *lead, -1)
    output = vae.decoder(torch.cat([moved, z.unsqueeze(0)]))
    difference = output[:-1] - output[-1]
    return difference / size.reshape(-1, *[1] * (output.dim() - 1))


def _first(raw: Tensor, num_batch: int, shape: tuple[int, ...]) -> Tensor:
    """The first parameter of each value, of (..., P, *shape) or (..., *shape)."""
    return raw.select(num_batch, 0) if raw.dim() > num_batch + len(shape) else raw


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
