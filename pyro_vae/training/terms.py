"""The ELBO's two terms, read from the sites of a training step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..capture.captured import Observer
from ..models.autoencoder import Autoencoder
from ..models.labels import ConditionalVAE, Model, SemiSupervisedVAE
from ..models.posteriors import kl


class ElboTerms(Observer):
    """Reconstruction and KL, summed over the rows of a step, for any objective.

    ELBOs run the guide before the model: "z" is recorded with q(z|x), and "x" with p(x|z). Labels
    that are inferred, "y", are summed out.
    """

    def __init__(self, vae: Model, num_particles: int) -> None:
        super().__init__()
        self.vae = vae
        self.num_particles = num_particles
        self.sites: dict[str, tuple[Any, Tensor]] = {}

    def __enter__(self) -> Any:
        self.sites = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.sites.setdefault(msg["name"], (msg["fn"], msg["value"]))

    def observed(self) -> tuple[Tensor, ...]:
        """Reconstruction and, for a VAE, KL: ()."""
        likelihood, x = self.sites["x"]
        if isinstance(self.vae, ConditionalVAE):
            return self._with_labels(self.vae)
        if self.num_particles > 1:  # one particle suffices for monitoring
            likelihood = self.vae.likelihood(self.sites["z"][1][:1])
        reconstruction = likelihood.log_prob(x).sum()
        if isinstance(self.vae, Autoencoder):
            return (reconstruction,)
        q, z = self.sites["z"]
        # With particles, the batch of q is (K, B).
        divergence = kl(q, self.vae.prior(), z.unsqueeze(0)).reshape(-1, len(x))
        return reconstruction, divergence.mean(0).sum()

    def _with_labels(self, vae: ConditionalVAE) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL, (), means over all particles."""
        (likelihood, x), (q, z) = self.sites["x"], self.sites["z"]
        log_likelihood = likelihood.log_prob(x).reshape(-1, len(x))
        divergence = kl(q, vae.prior(), z.unsqueeze(0)).reshape(-1, len(x))
        if isinstance(vae, SemiSupervisedVAE):  # both of each label, (C, B)
            terms = vae.summed_out(self.sites["y"][0], log_likelihood, divergence)
        else:
            terms = log_likelihood.mean(0), divergence.mean(0)
        return terms[0].sum(), terms[1].sum()
