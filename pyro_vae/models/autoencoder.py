"""The deterministic autoencoder, a baseline for the VAE.

    z = encoder(x),  maximize log p(x|z)

It has the networks and likelihoods of the VAE. The code z is computed, not drawn: the Pyro model
has no latent site, the guide is empty, and Trace_ELBO is the reconstruction term. Without a prior,
samples and evidence are not defined.
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import Delta, Distribution
from torch import Tensor, nn

from .interface import register
from .likelihoods import Likelihood


class Autoencoder(nn.Module):
    """A deterministic autoencoder: a `VAE` without prior and noise in z.

    Args:
        encoder: module x (..., *data_shape) → z (..., Z).
        decoder, likelihood: as in `VAE`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood_module = likelihood

    def posterior(self, x: Tensor) -> Distribution:
        """A point mass at the code of x (..., *data_shape): batch (...), event (Z,)."""
        return Delta(self.encoder(x), event_dim=1)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x|z): z (..., Z) → batch (...), event `data_shape`, in the likelihood's units."""
        return self.likelihood_module(self.decoder(z))

    def model(self, x: Tensor) -> None:
        """p(x|z) at the code z of x (B, *data_shape), which is observed."""
        register("encoder", self.encoder)
        register("decoder", self.decoder)
        register("likelihood", self.likelihood_module)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.likelihood(self.encoder(x)), obs=x)

    def guide(self, x: Tensor) -> None:
        """Empty: there is no latent site."""

    @torch.no_grad()
    def elbo_terms(self, x: Tensor) -> tuple[Tensor, None]:
        """log p(x|z) (B,) at the code of x, nats; no KL, since z is not drawn."""
        return self.likelihood(self.encoder(x)).log_prob(x), None

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at the code of x: (B, *data_shape)."""
        return self.likelihood(self.encoder(x)).mean
