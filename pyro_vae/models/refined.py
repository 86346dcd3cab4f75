"""A Gaussian found for each row by Newton steps from the encoder's guess, with fitted tails.

    μ, σ ← encoder(x); μ ← one of some draws from p(z) if log p(x, z) is higher there
    μ ← μ + P⁻¹ ∇,  P = Λ + Jᵀ W J               Gauss–Newton steps; then B Bᵀ = P⁻¹ at μ
    μ, B ← encoder(x) if the ELBO is higher there
    B ← −E[∇∇ᵀ log p(x, z)] = (B Bᵀ)⁻¹
    μ ← μ + B Bᵀ E[∇]                            sweeps, with E over N(μ, B Bᵀ)
    q(z|x) = t(ν, μ, c B)

∇ is the gradient of log p(x, z) by z, J the Jacobian of the decoder, W the curvature of −log p(x|z)
in the decoder's output, Λ the prior's precision. The first steps find the Laplace approximation,
the sweeps the Gaussian of the highest ELBO, at which E[∇] = 0 and −E[∇∇ᵀ log p(x, z)] is the
precision. t is the multivariate Student distribution with ν degrees of freedom and width c, which
are the same for all rows.

The encoder only gives places to start from: such a posterior has almost no amortization gap, and
costs as much as some hundred draws from p(x|z). It cannot be trained together with the model. Where
a prior that is not Gaussian is steep, Newton steps overshoot, and the encoder's Gaussian is better.

Source: "The variational Gaussian approximation revisited", doi 10.1162/neco.2008.08-07-592;
"Variational Laplace autoencoders", PMLR 97; "Semi-amortized variational autoencoders", arXiv
1802.02550.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyro.distributions import Distribution, MultivariateStudentT
from scipy.optimize import minimize
from scipy.special import gammaln
from torch import Tensor, nn

from ..runtime.memory import rows_at_once
from .flows import products
from .log_weights import with_slope
from .posteriors import scale_of

if TYPE_CHECKING:
    from .vae import VAE

# Draws from the prior to start from. With a few latents, they may lead to the higher of two modes.
STARTS = 128
# Step of the decoder's derivatives, in standard deviations of the prior.
DIFFERENCE = 0.01
# Length of a Newton step in posterior standard deviations, at most.
LONGEST_STEP = 3.0
# Factor by which a sweep changes a precision, at most.
MOST_CHANGE = 10.0
# Degrees of freedom before `Refined.set_tail`, and at most: nearly a Gaussian.
MAX_DF = 1000.0


class Refined(nn.Module):
    """Features (..., 2Z), x (..., *data_shape) and the model → q(z|x), batch (...), event (Z,).

    The features are those of a `DiagonalGaussian`, the guess.

    Args:
        latent_dim: Z.
        newton: number of Gauss–Newton steps.
        sweeps: number of sweeps.

    Attributes:
        df, width: ν and c, see `set_tail`.
        starts: (`STARTS`, Z), draws from the prior.
    """

    df: Tensor
    width: Tensor
    starts: Tensor

    def __init__(self, latent_dim: int, newton: int, sweeps: int) -> None:
        super().__init__()
        self.latent_dim, self.newton, self.sweeps = latent_dim, newton, sweeps
        self.register_buffer("df", torch.tensor(MAX_DF))
        self.register_buffer("width", torch.tensor(1.0))
        self.register_buffer("starts", torch.zeros(STARTS, latent_dim))

    @torch.no_grad()
    def forward(self, features: Tensor, x: Tensor, vae: VAE) -> Distribution:
        guess, log_scale = features.chunk(2, dim=-1)
        shape = vae.likelihood_module.spec.shape
        most = max(STARTS, 2 * self.latent_dim)
        rows = rows_at_once(most * math.prod(shape), x.device, num_chunks=4)
        scale = scale_of(log_scale)
        variance = vae.prior().variance  # once: that of a flow takes thousands of products
        flat = [v.reshape(-1, self.latent_dim) for v in (guess, scale)]
        parts = zip(*(v.split(rows) for v in (x.reshape(-1, *shape), *flat)), strict=True)
        found = [self._gaussian(vae, variance, *part) for part in parts]
        loc, factor = (torch.cat(values) for values in zip(*found, strict=True))
        loc, factor = loc.reshape(guess.shape), factor.reshape(*guess.shape, -1)
        return StudentT(self.df.to(loc), loc, self.width.to(loc) * factor)

    def _gaussian(
        self, vae: VAE, variance: Tensor, x: Tensor, guess: Tensor, scale: Tensor
    ) -> list[Tensor]:
        """μ (B, Z) and B (B, Z, Z) of the iterate with the highest ELBO."""
        loc = self._start(vae, x, guess)
        for _ in range(self.newton):
            loc = loc + newton_step(*local_shape(vae, variance, x, loc))
        _, factor = local_shape(vae, variance, x, loc)
        best = [guess, scale.diag_embed()]
        highest, *following = sweep(vae, x, *best)
        elbo, *after = sweep(vae, x, loc, factor)
        better = elbo > highest
        following = choose(better, after, following)
        highest, *best = choose(better, [elbo, loc, factor], [highest, *best])
        for _ in range(self.sweeps):
            loc, factor = following
            elbo, *following = sweep(vae, x, loc, factor)
            highest, *best = choose(elbo > highest, [elbo, loc, factor], [highest, *best])
        return best

    def _start(self, vae: VAE, x: Tensor, guess: Tensor) -> Tensor:
        """The guess or, if log p(x, z) is higher there, the best of `starts`, (B, Z)."""
        starts = self.starts.to(guess)
        others = vae.likelihood(starts.unsqueeze(1)).log_prob(x)  # (S, B)
        highest, best = (others + vae.prior().log_prob(starts).unsqueeze(1)).max(0)
        own = vae.likelihood(guess).log_prob(x) + vae.prior().log_prob(guess)
        return torch.where((own >= highest).unsqueeze(-1), guess, starts[best])

    def set_tail(self, radii: np.ndarray) -> None:
        """Set ν and c by maximum likelihood.

        A Gaussian has lighter tails than most posteriors. Heavier ones keep the importance weights
        bounded, and let regions of high density contain the truth as often as they claim.

        Args:
            radii: (N,) lengths of B⁻¹ (z* − μ) of pairs z*, x* simulated from the model.
        """
        size = self.latent_dim

        def loss(logs: np.ndarray) -> float:
            width, df = np.exp(logs[0]), 2 + np.exp(logs[1])
            tail = (df + size) / 2 * np.log1p((radii / width) ** 2 / df).mean()
            scale = gammaln((df + size) / 2) - gammaln(df / 2) - size / 2 * np.log(df)
            return tail - scale + size * logs[0]

        best = minimize(loss, [0.0, np.log(30.0)], method="Nelder-Mead")
        self.width.fill_(float(np.exp(best.x[0])))
        self.df.fill_(min(2 + float(np.exp(best.x[1])), MAX_DF))


class StudentT(MultivariateStudentT):
    """Pyro's distribution, with products that do not copy the matrix of a row for each draw."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        normals = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        widths = torch.rsqrt(self._chi2.rsample(torch.Size(sample_shape)) / self.df)
        return self.loc + products(self.scale_tril, normals * widths.unsqueeze(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size, df = self.event_shape.numel(), self.df
        identity = torch.eye(size, dtype=value.dtype, device=value.device)
        inverse = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
        square = products(inverse, value - self.loc).square().sum(-1)
        log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = torch.lgamma((df + size) / 2) - torch.lgamma(df / 2)
        constant = constant - size / 2 * (df * math.pi).log() - log_scale
        return constant - (df + size) / 2 * torch.log1p(square / df)


def choose(mask: Tensor, these: list[Tensor], those: list[Tensor]) -> list[Tensor]:
    """The rows of these tensors (B, ...) where the mask (B,) is true, of those elsewhere."""
    pairs = zip(these, those, strict=True)
    return [torch.where(mask.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs]


def sweep(vae: VAE, x: Tensor, loc: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step towards the Gaussian of the highest ELBO.

    Expectations are means over the points μ ± √Z B eⱼ, exact for polynomials of degree three. By
    Stein's identity, that of the second derivatives follows from ∇ at opposite points.

    Returns:
        The ELBO of N(μ, B Bᵀ), up to a constant (B,); the next μ (B, Z) and B (B, Z, Z).
    """
    size = loc.shape[-1]
    away = math.sqrt(size) * factor.movedim(-1, 0)  # (Z, B, Z)
    log_joint, slopes = _slopes(vae, x, torch.cat([loc + away, loc - away]))
    elbo = log_joint.mean(0) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    elbo = torch.nan_to_num(elbo, nan=-math.inf)  # which no other is below
    above, below = slopes.chunk(2)
    precision = torch.einsum("bij,kbi->bjk", factor, below - above) / (2 * math.sqrt(size))
    values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)  # in units of B
    values = values.clamp(1 / MOST_CHANGE, MOST_CHANGE)
    covariance = vectors @ (values.reciprocal().unsqueeze(-1) * vectors.mT)
    factor = factor @ torch.linalg.cholesky(covariance)
    return elbo, loc + newton_step(slopes.mean(0), factor), factor


def newton_step(slope: Tensor, factor: Tensor) -> Tensor:
    """B Bᵀ ∇ (B, Z), of at most `LONGEST_STEP` posterior standard deviations."""
    whitened = _apply(factor.mT, slope)
    length = whitened.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-9)
    return _apply(factor, whitened * (LONGEST_STEP / length).clamp_max(1.0))


def local_shape(vae: VAE, variance: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """∇ (B, Z) and B (B, Z, Z), lower triangular with B Bᵀ = P⁻¹, at z (B, Z).

    The curvature of the prior is that of a Gaussian with its `variance` (Z,). Of a likelihood with
    several parameters for each value, only the first counts in W.
    """
    shape = vae.likelihood_module.spec.shape
    with torch.enable_grad():
        output = vae.decoder(z).detach().requires_grad_()
        log_likelihood = vae.likelihood_module(output).log_prob(x).sum()
        (slope,) = torch.autograd.grad(log_likelihood, output, create_graph=True)
        (curvature,) = torch.autograd.grad(_first(slope, 1, shape).sum(), output)
    weight = -_first(curvature, 1, shape).flatten(1)
    weight = torch.nan_to_num(weight).clamp_min(0)
    columns = _first(_jacobian(vae, variance, z), 2, shape).flatten(2)  # (Z, B, D)
    precision = torch.einsum("ibd,bd,jbd->bij", columns, weight, columns)
    precision = precision + variance.reciprocal().diag()
    # The Cholesky factor U of the reversed matrix, reversed, is upper triangular: B = U⁻ᵀ.
    upper = torch.linalg.cholesky(precision.flip(-1, -2)).flip(-1, -2)
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand_as(upper)
    _, slopes = _slopes(vae, x, z)
    return slopes, torch.linalg.solve_triangular(upper.mT, identity, upper=False)


def _slopes(vae: VAE, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, z) (..., B) and ∇ (..., B, Z), for z (..., B, Z)."""
    log_joint, slopes = with_slope(
        lambda z: vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z), z
    )
    return log_joint, torch.nan_to_num(slopes)


def _jacobian(vae: VAE, variance: Tensor, z: Tensor) -> Tensor:
    """Derivatives (Z, B, P, *data_shape) of the decoder's output by each latent.

    By differences, which take half the time of forward differentiation and are accurate enough: any
    q(z|x) that follows from them is a valid one.
    """
    size = DIFFERENCE * variance.sqrt()
    output = vae.decoder(torch.cat([z + size.diag().unsqueeze(1), z.unsqueeze(0)]))
    return (output[:-1] - output[-1]) / size.reshape(-1, *[1] * (output.dim() - 1))


def _first(raw: Tensor, num_batch: int, shape: tuple[int, ...]) -> Tensor:
    """The first parameter of each value, of (..., P, *shape) or (..., *shape)."""
    return raw.select(num_batch, 0) if raw.dim() > num_batch + len(shape) else raw


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
