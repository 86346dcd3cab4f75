"""The deterministic autoencoder: the baseline that the VAE mends.

    z = encoder(x),  maximize log p(x|z)

Same bodies and likelihoods as the VAE. The code z is computed, not drawn: as a Pyro program the
model has no latent site and the guide is empty, so that Trace_ELBO is the reconstruction alone.
There is no prior, hence nothing to sample from and no evidence.
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import Delta, Distribution
from torch import Tensor, nn

from .interface import register
from .likelihoods import Likelihood

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """A deterministic autoencoder, with the parts of a `VAE` but for the prior.

    Args:
        encoder: module x (..., *data_shape) → z (..., Z).
        decoder, likelihood: as of `VAE`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood_module = likelihood

    def posterior(self, x: Tensor) -> Distribution:
        """All mass on the code of x (..., *data_shape): batch (...), event (Z,)."""
        return Delta(self.encoder(x), event_dim=1)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x|z): z (..., Z) → batch (...), event `data_shape`, in the likelihood's units."""
        return self.likelihood_module(self.decoder(z))

    def model(self, x: Tensor) -> None:
        """x (B, *data_shape) observed under the likelihood at its own code."""
        register("encoder", self.encoder)
        register("decoder", self.decoder)
        register("likelihood", self.likelihood_module)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.likelihood(self.encoder(x)), obs=x)

    def guide(self, x: Tensor) -> None:
        """Empty: nothing is latent."""

    @torch.no_grad()
    def elbo_terms(self, x: Tensor) -> tuple[Tensor, None]:
        """log p(x|z) at the code of x (B,), nats; no KL, since nothing is drawn."""
        return self.likelihood(self.encoder(x)).log_prob(x), None

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at the code of x: (B, *data_shape)."""
        return self.likelihood(self.encoder(x)).mean
