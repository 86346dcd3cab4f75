"""The variational autoencoder as a Pyro program.

    model   z ~ p(z)                x ~ p(x|z) = likelihood(decoder(z))
    guide   z ~ q(z|x) = N(μ(x), diag σ(x)²),  μ, log σ = encoder(x), or of another family

    log p(x) ≥ ELBO = E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)) = reconstruction − KL

`model` and `guide` consist of the three distributions that `prior`, `likelihood` and `posterior`
return.
"""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import Distribution
from torch import Tensor, nn

from .interface import register
from .likelihoods import Likelihood
from .posteriors import DiagonalGaussian, kl
from .priors import Vamp
from .refined import Refined


class VAE(nn.Module):
    """A generative model p(z) p(x|z) and its amortized posterior q(z|x).

    Source: "Auto-encoding variational Bayes", arXiv 1312.6114.

    Args:
        prior: module without arguments → p(z), batch (), event (Z,), or `priors.Vamp`.
        encoder: module x (..., *data_shape) → features (..., F) of q(z|x).
        decoder: module z (..., Z) → input of `likelihood`.
        likelihood: module decoder output → p(x|z), batch (...), event `data_shape`.
        family: module features (..., F) → q(z|x), batch (...), event (Z,), see `posteriors`. By
            default a diagonal Gaussian, of F = 2Z means and log standard deviations.
    """

    latent = "z"

    def __init__(
        self,
        prior: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        family: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prior_module = prior
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood_module = likelihood
        self.family = DiagonalGaussian() if family is None else family

    def prior(self) -> Distribution:
        """p(z): batch (), event (Z,)."""
        if isinstance(self.prior_module, Vamp):
            return self.prior_module(self.posterior)
        return self.prior_module()

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x|z): z (..., Z) → batch (...), event `data_shape`, in the likelihood's units."""
        return self.likelihood_module(self.decoder(z))

    def posterior(self, x: Tensor) -> Distribution:
        """q(z|x): x (..., *data_shape) → batch (...), event (Z,)."""
        features = self.encoder(x)
        if isinstance(self.family, Refined):
            return self.family(features, x, self)
        return self.family(features)

    def model(self, x: Tensor) -> None:
        """p(x, z), with x (B, *data_shape) observed. Sites "z" and "x" in one plate "data"."""
        register("prior", self.prior_module)
        register("decoder", self.decoder)
        register("likelihood", self.likelihood_module)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z|x), for x (B, *data_shape)."""
        register("encoder", self.encoder)
        register("family", self.family)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))

    @torch.no_grad()
    def elbo_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the ELBO for each row of x (B, *data_shape).

        Returns:
            reconstruction (B,): log p(x|z) at one draw of z from q(z|x), nats.
            kl (B,): KL(q(z|x) ‖ p(z)) in closed form, or at the same draw if there is none, nats.
        """
        posterior = self.posterior(x)
        z = posterior.sample()
        return self.likelihood(z).log_prob(x), kl(posterior, self.prior(), z.unsqueeze(0))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at the posterior mean: (B, *data_shape)."""
        return self.likelihood(self.posterior(x).mean).mean
