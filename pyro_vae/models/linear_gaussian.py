"""The linear-Gaussian VAE, whose posterior and evidence are known exactly.

    z ~ N(0, I),  x ~ N(W z + μ, σ² I)

    posterior   p(z|x) = N(Λ⁻¹ Wᵀ (x − μ) / σ², Λ⁻¹),  Λ = I + Wᵀ W / σ²
    evidence    p(x)   = N(μ, W Wᵀ + σ² I)

The best Gaussian guide with diagonal covariance has the posterior's mean and variances 1 / Λⱼⱼ. Its
ELBO is below log p(x) by ½ (Σ log Λⱼⱼ − log |Λ|), the approximation gap, for every x. Probabilistic
principal component analysis maximizes the likelihood over W, μ, σ² in closed form.

Source: "Probabilistic principal component analysis", doi 10.1111/1467-9868.00196.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pyro.distributions import Distribution, MultivariateNormal, Normal
from torch import Tensor, nn

from ..data.splits import DataSpec
from .likelihoods import Likelihood
from .priors import StandardNormal
from .vae import VAE

Guide = Literal["exact", "diagonal", "collapsed"]


class LinearGaussian(VAE):
    """A linear VAE with Gaussian noise, and its closed forms.

    `prior`, `posterior`, `likelihood`, `model` and `guide` are those of `VAE`, and all parameters
    can be trained. The guide is initialized for the given W, μ, σ and does not follow them later.

    Args:
        weight: W (D, Z).
        loc: μ (D,).
        noise_scale: σ, above 0.
        guide: exact: the posterior, with its full covariance. diagonal: the best Gaussian with
            independent latents. collapsed: the prior, for every x.
        scale_factor: factor of the guide's standard deviations, to plant a fault.
        shift: added to the guide's means, in its standard deviations, to plant a fault.
    """

    encoder: _LinearGuide
    decoder: nn.Linear
    likelihood_module: _Noise

    def __init__(
        self,
        weight: Tensor,
        loc: Tensor,
        noise_scale: float,
        guide: Guide = "exact",
        scale_factor: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        data_dim, latent_dim = weight.shape
        super().__init__(
            StandardNormal(latent_dim, weight.device, weight.dtype),
            _LinearGuide(data_dim, latent_dim, weight.device).to(weight),
            nn.Linear(latent_dim, data_dim, device=weight.device, dtype=torch.float32).to(weight),
            _Noise(DataSpec((data_dim,), None, discrete=False), noise_scale, like=weight),
        )
        precision = _precision(weight, noise_scale)
        covariance = torch.linalg.inv(precision)
        to_mean = covariance @ weight.T / noise_scale**2
        if guide == "exact":
            scale_tril = torch.linalg.cholesky(covariance)
        elif guide == "diagonal":
            scale_tril = precision.diagonal().rsqrt().diag()
        else:
            scale_tril, to_mean = _identity(latent_dim, weight), torch.zeros_like(to_mean)
        deviations = scale_tril.square().sum(1).sqrt()
        with torch.no_grad():
            self.decoder.weight.copy_(weight)
            self.decoder.bias.copy_(loc)
            self.encoder.weight.copy_(to_mean)
            self.encoder.bias.copy_(shift * deviations - to_mean @ loc)
        self.encoder.log_scale = nn.Parameter((scale_factor * scale_tril.diagonal()).log())
        if guide == "exact":
            self.encoder.lower = nn.Parameter(scale_factor * scale_tril.tril(-1))

    @property
    def weight(self) -> Tensor:
        """W (D, Z)."""
        return self.decoder.weight

    @property
    def loc(self) -> Tensor:
        """μ (D,)."""
        return self.decoder.bias

    @property
    def noise_scale(self) -> Tensor:
        """σ ()."""
        return self.likelihood_module.log_scale.exp()

    def posterior(self, x: Tensor) -> Distribution:
        """q(z|x) of the guide: x (..., D) → batch (...), event (Z,)."""
        loc, scale = self.encoder(x), self.encoder.log_scale.exp()
        if self.encoder.lower is None:
            return Normal(loc, scale.expand(loc.shape)).to_event(1)
        return MultivariateNormal(loc, scale_tril=self.encoder.lower.tril(-1) + scale.diag())

    @property
    def posterior_precision(self) -> Tensor:
        """Λ (Z, Z), the same for every x."""
        return _precision(self.weight, self.noise_scale)

    def exact_posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z|x): x (..., D) → batch (...), event (Z,)."""
        precision = self.posterior_precision
        projected = (x - self.loc) @ self.weight / self.noise_scale**2
        loc = torch.linalg.solve(precision, projected.unsqueeze(-1)).squeeze(-1)
        return MultivariateNormal(loc, precision_matrix=precision)

    def exact_log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) (...), nats, for x (..., D)."""
        noise = self.noise_scale**2 * _identity(len(self.loc), self.loc)
        marginal = MultivariateNormal(self.loc, self.weight @ self.weight.T + noise)
        return marginal.log_prob(x)

    @property
    def approximation_gap(self) -> Tensor:
        """log p(x) − ELBO of the best guide with diagonal covariance (), nats, for every x."""
        precision = self.posterior_precision
        return (precision.diagonal().log().sum() - torch.logdet(precision)) / 2


def probabilistic_pca(x: Tensor, latent_dim: int) -> LinearGaussian:
    """The maximum-likelihood `LinearGaussian` of data, with the exact guide.

    Args:
        x: (N, D).
        latent_dim: Z, below D.

    Raises:
        ValueError: Z is not below D, or the data have fewer than Z + 1 directions of variance.
    """
    if not 0 < latent_dim < x.shape[1]:
        raise ValueError(
            f"latent_dim expects 1 to {x.shape[1] - 1}, below the dimension of x; got {latent_dim}"
        )
    centred = x - x.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(x))
    variances, directions = variances.flip(0), directions.flip(1)
    noise = variances[latent_dim:].mean()
    if not noise > 0:
        raise ValueError(f"x expects variance beyond {latent_dim} directions; got none")
    kept = variances[:latent_dim]
    weight = directions[:, :latent_dim] * (kept - noise).clamp_min(0).sqrt()
    return LinearGaussian(weight, x.mean(0), math.sqrt(noise.item()))


class _LinearGuide(nn.Linear):
    """Means linear in x, and one covariance for every x.

    Attributes:
        log_scale: (Z,) logarithm of the diagonal of the covariance's Cholesky factor.
        lower: (Z, Z) the factor below its diagonal, or None for independent latents.
    """

    def __init__(self, data_dim: int, latent_dim: int, device: torch.device) -> None:
        super().__init__(data_dim, latent_dim, device=device, dtype=torch.float32)
        self.log_scale = nn.Parameter(torch.zeros_like(self.bias))
        self.lower: nn.Parameter | None = None


class _Noise(Likelihood):
    """N(·, σ² I) around the decoder's output."""

    units = "real"

    def __init__(self, spec: DataSpec, scale: float, like: Tensor) -> None:
        super().__init__(spec, like.new_zeros(spec.shape), like.new_ones(()))
        self.log_scale = nn.Parameter(like.new_tensor(math.log(scale)))

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(Normal(raw, self.log_scale.exp().expand(raw.shape)))


def _precision(weight: Tensor, noise_scale: Tensor | float) -> Tensor:
    return _identity(weight.shape[1], weight) + weight.T @ weight / noise_scale**2


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
