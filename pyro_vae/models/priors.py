"""p(z): modules that return the prior when called, batch shape (), event shape (Z,)."""

from __future__ import annotations

import torch
from pyro.distributions import Distribution, Normal
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """N(0, I) in `latent_dim` dimensions, on `device` and of `dtype` (torch's defaults).

    Source: "Auto-encoding variational Bayes", arXiv 1312.6114.
    """

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
