"""Distributions of single values of a table, batch shape (..., D), event shape ().

    log-normal              log x ~ N(μ, s²)
    poisson                 p(x) = e^(x η − e^η) / x!                      mean m = e^η
    negative binomial       p(x) = Γ(x + r) / (Γ(r) x!) · σ(d)^x σ(−d)^r   mean m = e^η,
                                                                           variance m + m² / r
    zero-inflated           p(0) = π + (1 − π) p₀(0), p(x) = (1 − π) p₀(x) above, π = σ(g)
    categorical             p(x) = e^(lₓ) / Σₖ e^(lₖ), x in {0, …, K − 1}, K that of the column

Counts are scored in float64, since the logarithms of factorials lose digits in float32, and the
value is returned in the dtype of the parameters. Normal, Student, Bernoulli and binomial
distributions are Pyro's.

with d = η − log r. Source: "Handling incomplete heterogeneous data using VAEs", arXiv 1807.03653.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

# Logit of the categories that a column of fewer categories does not have
ABSENT = -1e9
TINY = 1e-37  # a draw of a log-normal value is above 0 also where float32 would round it to 0


class _Elementwise(TorchDistribution):
    """A distribution of single values, made from its parameters by position."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's convention)

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = torch.broadcast_tensors(*parameters)
        super().__init__(self.parameters[0].shape)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TorchDistribution:
        return type(self)(*(p.expand(batch_shape) for p in self.parameters))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) (..., D), nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


class LogNormal(_Elementwise):
    """x > 0 with log x ~ N(μ, s²): parameters loc, scale (..., D)."""

    support = constraints.positive

    def _log_prob(self, value: Tensor) -> Tensor:
        loc, scale = self.parameters
        log = value.log()
        standardized = (log - loc) / scale
        return -standardized.square() / 2 - scale.log() - math.log(2 * math.pi) / 2 - log

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        loc, scale = self.parameters
        normals = torch.randn(
            self._extended_shape(sample_shape), dtype=loc.dtype, device=loc.device
        )
        return (loc + scale * normals).exp().clamp_min(TINY)

    @property
    def mean(self) -> Tensor:
        loc, scale = self.parameters
        return (loc + scale.square() / 2).exp()

    @property
    def variance(self) -> Tensor:
        return self.mean.square() * torch.expm1(self.parameters[1].square())


class Poisson(_Elementwise):
    """Counts: parameter log_rate (..., D)."""

    support = constraints.nonnegative_integer

    def _log_prob(self, value: Tensor) -> Tensor:
        (log_rate,) = self.parameters
        x, log = value.double(), log_rate.double()
        return (x * log - log.exp() - torch.lgamma(x + 1)).to(log_rate.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.poisson(self.mean.expand(self._extended_shape(sample_shape)))

    @property
    def mean(self) -> Tensor:
        return self.parameters[0].exp()

    @property
    def variance(self) -> Tensor:
        return self.mean


class NegativeBinomial(_Elementwise):
    """Counts with a variance above their mean: parameters log_mean, log_count (..., D)."""

    support = constraints.nonnegative_integer

    def _log_prob(self, value: Tensor) -> Tensor:
        log_mean, log_count = (p.double() for p in self.parameters)
        x, count, difference = value.double(), log_count.exp(), log_mean - log_count
        log_ways = torch.lgamma(x + count) - torch.lgamma(count) - torch.lgamma(x + 1)
        log_mass = log_ways + x * F.logsigmoid(difference) + count * F.logsigmoid(-difference)
        return log_mass.to(self.parameters[0].dtype)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Poisson draws whose rates are draws of a gamma distribution."""
        shape = self._extended_shape(sample_shape)
        log_mean, log_count = (p.expand(shape) for p in self.parameters)
        gammas = torch._standard_gamma(log_count.exp())
        return torch.poisson(gammas * (log_mean - log_count).exp())

    @property
    def mean(self) -> Tensor:
        return self.parameters[0].exp()

    @property
    def variance(self) -> Tensor:
        log_mean, log_count = self.parameters
        return self.mean + (2 * log_mean - log_count).exp()


class ZeroInflated(TorchDistribution):
    """Counts that are 0 with probability π = σ(g), and else those of `counts`.

    Args:
        counts: a `Poisson` or a `NegativeBinomial`, batch (..., D).
        gate: g (..., D).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's convention)
    support = constraints.nonnegative_integer

    def __init__(self, counts: _Elementwise, gate: Tensor) -> None:
        self.counts, self.gate = counts, gate
        super().__init__(counts.batch_shape)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TorchDistribution:
        return ZeroInflated(self.counts.expand(batch_shape), self.gate.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) (..., D), nats."""
        if self._validate_args:
            self._validate_sample(value)
        counted = self.counts._log_prob(value) + F.logsigmoid(-self.gate)
        return torch.where(value == 0, torch.logaddexp(F.logsigmoid(self.gate), counted), counted)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        counts = self.counts.sample(sample_shape)
        return torch.where(torch.rand_like(counts) < torch.sigmoid(self.gate), 0.0, counts)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.gate) * self.counts.mean

    @property
    def variance(self) -> Tensor:
        share, mean = torch.sigmoid(self.gate), self.counts.mean
        return (1 - share) * (self.counts.variance + share * mean.square())


class Categorical(TorchDistribution):
    """Codes 0, …, K − 1 of categories.

    Args:
        logits: (..., D, most), `ABSENT` from K on, K that of each column.
        sizes: (D,) K.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's convention)

    def __init__(self, logits: Tensor, sizes: Tensor) -> None:
        self.logits, self.sizes = logits, sizes
        super().__init__(logits.shape[:-1])

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(torch.zeros_like(self.sizes), self.sizes - 1)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TorchDistribution:
        return Categorical(self.logits.expand(*batch_shape, self.logits.shape[-1]), self.sizes)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) (..., D), nats."""
        if self._validate_args:
            self._validate_sample(value)
        logits, codes = torch.broadcast_tensors(self.logits, value.unsqueeze(-1))
        chosen = logits.gather(-1, codes[..., :1].long()).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """The largest logit, with Gumbel noise added to each."""
        shape = (*self._extended_shape(sample_shape), self.logits.shape[-1])
        noise = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        gumbel = -(-noise.clamp_min(TINY).log()).clamp_min(TINY).log()
        return (self.logits + gumbel).argmax(-1).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """The most probable code: codes have no mean."""
        return self.logits.argmax(-1).to(self.logits.dtype)
