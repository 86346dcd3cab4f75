"""p(z): modules that return the prior when called, batch shape (), event shape (Z,).

    normal    N(0, I)
    mixture   Σₖ πₖ N(μₖ, Σₖ), diagonal or full covariance
    vamp      Σₖ πₖ q(z|uₖ), with the encoder's posterior of pseudo-inputs uₖ
    flow      T⁻¹(ε), ε ~ N(0, I)

The weights, the Gaussians, the uₖ and T are trained with the model. `kind` is the name of the
family, as in `families`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions import (
    Categorical,
    Distribution,
    Normal,
)
from torch import Tensor, nn

from ..config.families import (
    DiagonalGuide,
    FullGuide,
    MixturePrior,
    NormalPrior,
    Prior,
    VampPrior,
)
from ..runtime.randomness import random_states
from .flows import FlowDistribution, autoregressive_flow, even_normals
from .posteriors import FullGaussian, GaussianMixture, num_features, posterior_family

# Variance of the means of a new mixture. Its own is then about 1, as that of N(0, I).
SPREAD = 0.5


class StandardNormal(nn.Module):
    """N(0, I) in `latent_dim` dimensions, on `device` and of `dtype` (torch's defaults).

    Source: "Auto-encoding variational Bayes", arXiv 1312.6114.
    """

    kind = "normal"
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        latent_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Buffers move with the model from device to device.
        loc = torch.zeros(latent_dim, device=device, dtype=dtype)
        self.register_buffer("loc", loc, persistent=False)
        self.register_buffer("scale", torch.ones_like(loc), persistent=False)

    def forward(self) -> Distribution:
        return Normal(self.loc, self.scale).to_event(1)


class Mixture(nn.Module):
    """A mixture of Gaussians, near N(0, I) at first.

    Args:
        latent_dim: Z.
        components: number of Gaussians.
        covariance: that of each, diagonal or full.
    """

    kind = "mixture"

    def __init__(self, latent_dim: int, components: int, covariance: str = "diagonal") -> None:
        super().__init__()
        guide = DiagonalGuide() if covariance == "diagonal" else FullGuide()
        self.family = posterior_family(guide, latent_dim)
        self.logits = nn.Parameter(torch.zeros(components))
        features = torch.zeros(components, num_features(guide, latent_dim))
        features[:, :latent_dim].normal_().mul_(math.sqrt(SPREAD))
        features[:, latent_dim : 2 * latent_dim] = math.log(1 - SPREAD) / 2
        self.features = nn.Parameter(features)

    def forward(self) -> Distribution:
        return _mixture(self.logits, self.family(self.features))


class Vamp(nn.Module):
    """A mixture of the posteriors of pseudo-inputs, which are trained.

    Source: "VAE with a VampPrior", arXiv 1705.07120.

    Args:
        latent_dim: Z.
        rows: (K, *data_shape), standardized: the first values of the pseudo-inputs.
        mean, std: moments of the data.
    """

    kind = "vamp"
    mean: Tensor
    std: Tensor

    def __init__(self, latent_dim: int, rows: Tensor, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        # In standardized units, so that a step of the optimizer is small for data of any scale
        self.rows = nn.Parameter(rows.clone())
        self.logits = nn.Parameter(rows.new_zeros(len(rows)))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, posterior: Callable[[Tensor], Distribution]) -> Distribution:
        """p(z), with `posterior`: x (K, *data_shape) → q(z|x), batch (K,)."""
        return _mixture(self.logits, posterior(self.pseudo_inputs))

    @torch.no_grad()
    def as_mixture(self, encoder: nn.Module, family: nn.Module) -> Mixture:
        """The same prior as Gaussians that do not depend on the encoder any more."""
        features = encoder(self.pseudo_inputs)
        covariance = "full" if isinstance(family, FullGaussian) else "diagonal"
        with random_states(torch.device("cpu")):  # the first values are replaced
            mixture = Mixture(self.latent_dim, len(self.rows), covariance).to(features)
        mixture.features.copy_(features)
        mixture.logits.copy_(self.logits)
        return mixture

    @property
    def pseudo_inputs(self) -> Tensor:
        """(K, *data_shape) in the likelihood's units."""
        return self.mean + self.std * self.rows


class Flow(nn.Module):
    """A masked autoregressive flow, N(0, I) at first.

    Source: "Masked autoregressive flow for density estimation", arXiv 1705.07057.
    """

    kind = "flow"
    loc: Tensor
    normals: Tensor

    def __init__(self, latent_dim: int, transforms: int, hidden: int) -> None:
        super().__init__()
        self.transform = autoregressive_flow(latent_dim, transforms, hidden)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("normals", even_normals(latent_dim), persistent=False)

    def forward(self) -> Distribution:
        return FlowDistribution(self.transform(), self.loc, None, self.normals)


def prior_family(prior: Prior, latent_dim: int, mean: Tensor, std: Tensor) -> nn.Module:
    """The module of a family, with new weights.

    Args:
        mean, std: moments of the data, (*data_shape) and () or (*data_shape). The pseudo-inputs of
            a vamp prior are at the mean.
    """
    if isinstance(prior, NormalPrior):
        return StandardNormal(latent_dim)
    if isinstance(prior, MixturePrior):
        return Mixture(latent_dim, prior.components, prior.covariance)
    if isinstance(prior, VampPrior):
        return Vamp(latent_dim, mean.new_zeros(prior.components, *mean.shape), mean, std)
    return Flow(latent_dim, prior.transforms, prior.hidden)


def _mixture(logits: Tensor, components: Distribution) -> Distribution:
    return GaussianMixture(Categorical(logits=logits), components)
