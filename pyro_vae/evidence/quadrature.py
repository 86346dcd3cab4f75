"""p(x), p(z|x) and draws from it by quadrature, for decoders with one or two latents.

    p(x) = ∫ p(z) p(x|z) dz ≈ Σₘ h p(zₘ) p(x|zₘ)

by the trapezoidal rule on an even grid of spacing h over the bulk of the prior. For a smooth
integrand that vanishes at the ends the error falls faster than any power of h ("The exponentially
convergent trapezoidal rule", doi 10.1137/130932132). The difference to the grid of every second
node is an upper estimate of the error, if each standard deviation of the posterior holds a node. To
it is added the error of the prior's own integral, 1, which is large if the grid misses a part of
the prior, or a component of a mixture is narrower than the spacing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import MixtureSameFamily

from ..models.interface import LatentModel
from ..models.log_weights import log_likelihood

# The grid reaches this many standard deviations of the prior to either side, or of each component
# of a mixture, whose weight may be small.
REACH = 8.0


@dataclass(frozen=True)
class Quadrature:
    """Evidence and posterior of B rows, in float64.

    Attributes:
        log_evidence: (B,) log p(x), nats; −∞ if p(x|z) is zero at every node, with an infinite
            `error` and NaN for the posterior.
        error: (B,) an upper estimate of the error of `log_evidence`, nats.
        mean: (B, Z) mean of p(z|x).
        covariance: (B, Z, Z) covariance of p(z|x).
        nodes: (M, Z) the grid.
        spacing: (Z,) spacing of the grid.
        masses: (M, B) p(z|x) at the nodes, normalized to sum to one.
    """

    log_evidence: Tensor
    error: Tensor
    mean: Tensor
    covariance: Tensor
    nodes: Tensor
    spacing: Tensor
    masses: Tensor

    def sample(self, num_draws: int) -> Tensor:
        """Draws from p(z|x) (num_draws, B, Z): a node by its mass, then uniform in its cell."""
        index = torch.multinomial(self.masses.T, num_draws, replacement=True).T
        shape = (*index.shape, len(self.spacing))
        jitter = torch.rand(shape, dtype=torch.float32, device=index.device) - 0.5
        return self.nodes[index] + jitter * self.spacing


@torch.no_grad()
def quadrature(vae: LatentModel, x: Tensor, num_nodes: int = 401) -> Quadrature:
    """Compute log p(x) and p(z|x) for z of one or two dimensions.

    Args:
        vae: a model with `prior()` and `likelihood(z)`.
        x: (B, *data_shape).
        num_nodes: number of nodes in each dimension, odd, so that every second node forms a grid.

    Raises:
        ValueError: more than two latents, or `num_nodes` is even or too small.
    """
    prior = vae.prior()
    (latent_dim,) = prior.event_shape
    if latent_dim > 2:
        raise ValueError(f"quadrature expects one or two latents; got {latent_dim}")
    if num_nodes < 3 or num_nodes % 2 == 0:
        raise ValueError(f"num_nodes expects an odd number of at least 3; got {num_nodes}")
    centre, reach = _extent(prior)
    steps = torch.linspace(-1, 1, num_nodes, dtype=reach.dtype, device=reach.device)
    lines = [centre[j] + reach[j] * steps for j in range(latent_dim)]
    nodes = torch.cartesian_prod(*lines).reshape(-1, latent_dim)
    spacing = (2 * reach / (num_nodes - 1)).double()
    log_prior = prior.log_prob(nodes).double() + spacing.log().sum()
    log_joint = log_likelihood(vae, x, nodes.unsqueeze(1)).double() + log_prior[:, None]  # (M, B)
    log_evidence = log_joint.logsumexp(0)
    even = torch.arange(num_nodes, device=x.device) % 2 == 0
    second = torch.cartesian_prod(*[even] * latent_dim).reshape(len(nodes), -1).all(1)
    coarse = (log_joint[second] + latent_dim * math.log(2)).logsumexp(0)
    masses = (log_joint - log_evidence).exp()
    nodes = nodes.double()
    mean = masses.T @ nodes
    second_moment = torch.einsum("mb,mi,mj->bij", masses, nodes, nodes)
    covariance = second_moment - mean.unsqueeze(2) * mean.unsqueeze(1)
    error = (log_evidence - coarse).abs().nan_to_num(math.inf)  # NaN: both are −∞
    error = error + log_prior.logsumexp(0).abs()
    return Quadrature(log_evidence, error, mean, covariance, nodes, spacing, masses)


def _extent(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Middle (Z,) of the grid, and its reach (Z,) to either side."""
    parts = prior.component_distribution if isinstance(prior, MixtureSameFamily) else prior
    reach = REACH * parts.variance.sqrt()
    low, high = (parts.mean + sign * reach for sign in (-1, 1))
    if isinstance(prior, MixtureSameFamily):
        low, high = low.amin(-2), high.amax(-2)
    return (low + high) / 2, (high - low) / 2
