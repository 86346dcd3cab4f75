"""p(x|z) of rows that lack values: a density of the observed ones.

    log p(x_observed|z) = Σ_{j observed} log p(x_j|z)

for a likelihood of independent values. NaN marks a missing value. If whether a value is missing
depends on observed values only (missing at random), maximizing log p(x_observed) is maximum
likelihood, and nothing need be known of how values came to be missing.

Source: "MIWAE: Deep generative modelling and imputation of incomplete data sets", arXiv
1812.02633; "Inference and missing data", doi 10.1093/biomet/63.3.581.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class ObservedPart(Independent):
    """Independent values whose `log_prob` is that of the values that are not NaN.

    Samples, mean and variance are those of all values.

    Args:
        base: a distribution of single values, batch (..., *data_shape).
        num_dims: number of dimensions of `data_shape`.
        fill: (*data_shape) values in the support, which stand for missing ones where `base` is
            evaluated: a branch that `torch.where` does not take must be finite, or its gradient is
            NaN. They do not change the result.
    """

    def __init__(self, base: TorchDistribution, num_dims: int, fill: Tensor) -> None:
        self.fill = fill
        super().__init__(base, num_dims)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> ObservedPart:
        base = self.base_dist.expand(torch.Size(batch_shape) + self.event_shape)
        return ObservedPart(base, len(self.event_shape), self.fill)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x_observed) (...), in nats; 0 if no value is observed."""
        missing = value.isnan()
        density = self.base_dist.log_prob(torch.where(missing, self.fill.to(value), value))
        density = torch.where(missing, torch.zeros_like(density), density)
        return density.flatten(-len(self.event_shape)).sum(-1)

    @property
    def support(self) -> constraints.Constraint:
        return _OrMissing(super().support, self.fill)


class _OrMissing(constraints.Constraint):
    """The support of the observed values, without those that are NaN."""

    def __init__(self, base: constraints.Constraint, fill: Tensor) -> None:
        self.base, self.fill = base, fill
        self.is_discrete, self.event_dim = base.is_discrete, base.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.base.check(torch.where(value.isnan(), self.fill.to(value), value))
