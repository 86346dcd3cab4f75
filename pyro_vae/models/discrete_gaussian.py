"""A semi-supervised VAE whose evidence is a finite sum, with an exact posterior.

    y ~ Categorical(π),  z ~ N(0, I),  x ~ N(W z + b_y, σ² I)

    evidence    p(x|y) = N(b_y, W Wᵀ + σ² I),  p(x) = Σ_y π_y p(x|y)
    posterior   p(y|x) = π_y p(x|y) / p(x),  p(z|x, y) = N(Λ⁻¹ Wᵀ (x − b_y) / σ², Λ⁻¹)

with Λ = I + Wᵀ W / σ², as in `LinearGaussian`.
"""

from __future__ import annotations

import torch
from pyro.distributions import Distribution, MultivariateNormal, Normal
from torch import Tensor, nn

from ..data.splits import DataSpec
from .labels import SemiSupervisedVAE
from .likelihoods import Likelihood
from .priors import StandardNormal


class DiscreteGaussian(SemiSupervisedVAE):
    """A mixture of linear Gaussian models with known evidence, for tests.

    All parameters can be trained. The guide is exact for the given W, b, σ, π and does not follow
    them later.

    Args:
        weight: W (D, Z).
        loc: b (C, D), the mean of each class.
        noise_scale: σ, above 0.
        shares: π (C,).
        temperature: divides the logits of q(y|x), to plant a fault.
        order: (C,) the class whose probability q(y|x) gives to each class, to plant a fault.
    """

    encoder: _Encoder
    decoder: _Decoder
    likelihood_module: _Noise

    def __init__(
        self,
        weight: Tensor,
        loc: Tensor,
        noise_scale: float,
        shares: Tensor,
        temperature: float = 1.0,
        order: Tensor | None = None,
    ) -> None:
        latent_dim, data_dim = weight.shape[1], weight.shape[0]
        precision = torch.eye(latent_dim).to(weight) + weight.T @ weight / noise_scale**2
        covariance = torch.linalg.inv(precision)
        marginal = weight @ weight.T + noise_scale**2 * torch.eye(data_dim).to(weight)
        spec = DataSpec((data_dim,), None, discrete=False)
        super().__init__(
            StandardNormal(latent_dim, weight.device, weight.dtype),
            _Encoder(covariance @ weight.T / noise_scale**2, loc),
            _Decoder(weight, loc),
            _Noise(spec, weight.new_zeros(data_dim), weight.new_ones(()), noise_scale),
            shares.to(weight),
            _Classifier(marginal, loc, shares.to(weight), temperature, order),
            _Covariance(torch.linalg.cholesky(covariance)),
        )

    def exact_log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) of every class (..., C), nats, for x (..., D)."""
        weight, scale = self.decoder.weight, self.likelihood_module.log_scale.exp()
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        marginal = MultivariateNormal(self.decoder.loc, weight @ weight.T + scale**2 * identity)
        return self.label_prior().logits + marginal.log_prob(x.unsqueeze(-2))

    def exact_log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) (...), nats, for x (..., D)."""
        return self.exact_log_joint(x).logsumexp(-1)


class _Encoder(nn.Module):
    """K (x − b_y), the mean of q(z|x, y)."""

    def __init__(self, gain: Tensor, loc: Tensor) -> None:
        super().__init__()
        self.gain, self.loc = nn.Parameter(gain.clone()), nn.Parameter(loc.clone())

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return (x - label @ self.loc) @ self.gain.T


class _Covariance(nn.Module):
    """Means (..., Z) → a Gaussian with one covariance."""

    def __init__(self, scale_tril: Tensor) -> None:
        super().__init__()
        self.scale_tril = nn.Parameter(scale_tril.clone())

    def forward(self, mean: Tensor) -> Distribution:
        return MultivariateNormal(mean, scale_tril=self.scale_tril.tril())


class _Decoder(nn.Module):
    """W z + b_y."""

    def __init__(self, weight: Tensor, loc: Tensor) -> None:
        super().__init__()
        self.weight, self.loc = nn.Parameter(weight.clone()), nn.Parameter(loc.clone())

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return z @ self.weight.T + label @ self.loc


class _Noise(Likelihood):
    """N(·, σ² I) around the decoder's output."""

    units = "real"

    def __init__(self, spec: DataSpec, mean: Tensor, std: Tensor, scale: float) -> None:
        super().__init__(spec, mean, std)
        self.log_scale = nn.Parameter(std.new_tensor(scale).log())

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(Normal(raw, self.log_scale.exp().expand(raw.shape)))


class _Classifier(nn.Module):
    """log p(x, y) of every class, the logits of p(y|x), with faults on demand."""

    order: Tensor

    def __init__(
        self,
        marginal: Tensor,
        loc: Tensor,
        shares: Tensor,
        temperature: float,
        order: Tensor | None,
    ) -> None:
        super().__init__()
        inverse = torch.linalg.inv(torch.linalg.cholesky(marginal))
        self.inverse, self.loc = nn.Parameter(inverse), nn.Parameter(loc.clone())
        self.log_shares = nn.Parameter(shares.log())
        self.temperature = temperature
        self.register_buffer("order", torch.arange(len(loc)) if order is None else order)

    def forward(self, x: Tensor) -> Tensor:
        distances = ((x.unsqueeze(-2) - self.loc) @ self.inverse.T).square().sum(-1)
        return (self.log_shares - distances / 2)[..., self.order] / self.temperature
