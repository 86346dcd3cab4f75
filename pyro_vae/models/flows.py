"""Normalizing flows by zuko, as Pyro distributions.

    z = μ + L u,  u = T⁻¹(ε),  ε ~ N(0, I)
    log q(z) = log N(T(u); 0, I) + log |det ∂T(u)/∂u| − log |det L|

T is a composition of autoregressive transforms. It begins as the identity, so that a new flow is
the Gaussian N(μ, L Lᵀ).

Source: "Density estimation using Real NVP", arXiv 1605.08803; "Masked autoregressive flow for
density estimation", arXiv 1705.07057.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

# Draws for the moments, from a sequence that covers the unit cube evenly
MOMENT_DRAWS = 512


def coupling_flow(latent_dim: int, context: int, transforms: int, hidden: int) -> nn.Module:
    """context (..., H) → T, a composition of affine maps of each half of the latents, in turn.

    The map of the second half depends on the first: a density takes one pass through each network,
    a draw two. Splines would take seven times as long on a CPU.
    """
    sizes = (hidden, hidden)
    return _new("MAF", latent_dim, context, passes=2, transforms=transforms, hidden_features=sizes)


def autoregressive_flow(latent_dim: int, transforms: int, hidden: int) -> nn.Module:
    """None → T, a composition of affine maps of each latent, given those before it.

    A density takes one pass through each network, a draw as many as there are latents.
    """
    return _new("MAF", latent_dim, transforms=transforms, hidden_features=(hidden, hidden))


def even_normals(latent_dim: int) -> Tensor:
    """Draws (`MOMENT_DRAWS`, Z) from N(0, I) that cover it evenly; the same at every call."""
    engine = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=0)
    with torch.device("cpu"):
        uniform = engine.draw(MOMENT_DRAWS, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float()


class FlowDistribution(TorchDistribution):
    """The distribution of z: batch shape that of loc (..., Z), event shape (Z,).

    Args:
        transform: T, from u to ε, a transform of zuko.
        loc: μ (..., Z).
        scale_tril: L (..., Z, Z), lower triangular; None for the identity.
        normals: (S, Z), draws from N(0, I), of which `mean` and `variance` are computed.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        transform: Any,
        loc: Tensor,
        scale_tril: Tensor | None,
        normals: Tensor,
        batch_shape: torch.Size | None = None,
    ) -> None:
        self.transform, self.loc, self.scale_tril = transform, loc, scale_tril
        self.normals = normals
        batch_shape = loc.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> FlowDistribution:
        parts = self.transform, self.loc, self.scale_tril, self.normals
        return FlowDistribution(*parts, torch.Size(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.from_normals(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        u, log_scale = value - self.loc, value.new_zeros(())
        with torch.autocast(u.device.type, enabled=False):
            if self.scale_tril is not None:
                identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
                # The inverse once for each row costs less than a solution for each draw.
                inverse = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
                u = products(inverse, u)
                log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            normals, log_det = self.transform.call_and_ladj(u)
        log_normal = -(normals.square() + math.log(2 * math.pi)).sum(-1) / 2
        log_prob = log_normal + log_det - log_scale
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """Mean (..., Z) of the draws from `normals`."""
        return self._moment_draws().mean(0).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance (..., Z) of the draws from `normals`."""
        return self._moment_draws().var(0).expand(self.batch_shape + self.event_shape)

    def _moment_draws(self) -> Tensor:
        size = self.loc.dim() - 1
        normals = self.normals.reshape(len(self.normals), *[1] * size, -1).to(self.loc.dtype)
        return self.from_normals(normals.expand(len(normals), *self.loc.shape))

    def from_normals(self, normals: Tensor) -> Tensor:
        with torch.autocast(normals.device.type, enabled=False):
            u = self.transform.inv(normals)
            return self.loc + (u if self.scale_tril is None else products(self.scale_tril, u))


def products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products of (*batch, Z, Z) with (*sample, *batch, Z), without copies of the matrices."""
    batch = matrices.shape[:-2]
    if vectors.shape[:-1] == batch:
        return torch.einsum("...ij,...j->...i", matrices, vectors)
    lead = vectors.dim() - 1 - len(batch)
    flat = vectors.reshape(-1, *vectors.shape[lead:])
    return torch.einsum("...ij,s...j->s...i", matrices, flat).reshape(vectors.shape)


def _new(kind: str, *args: Any, **kwargs: Any) -> nn.Module:
    """The transform of one of zuko's flows, which begins as the identity."""
    with torch.device("cpu"):  # zuko computes with the masks of its networks
        transform = getattr(_zuko().flows, kind)(*args, **kwargs).transform
    for layer in transform.transforms:
        for parameter in layer.hyper[-1].parameters():
            nn.init.zeros_(parameter)
    return transform.to(torch.get_default_device())


def _zuko() -> Any:
    """The package zuko, without its changes of torch.

    Its import switches off the validation of all distributions and removes their constraints.
    """
    before = Distribution._validate_args, Distribution.arg_constraints
    try:
        import zuko
    finally:
        Distribution._validate_args, Distribution.arg_constraints = before  # type: ignore[method-assign]
    return zuko
