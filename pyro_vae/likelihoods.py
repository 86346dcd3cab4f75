"""Decoder output → p(x|z), a normalized density or mass function for its kind of data.

A likelihood is a module `raw (..., P, *data_shape) → Distribution` with batch shape (...) and
event shape `data_shape`. It says in which `units` it observes x (see `data.py`), how many
parameters P it takes for each value, and the decoder's output bias at which its mean is the
data's mean.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import Bernoulli, Binomial, Distribution, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from .data import DataSpec, Units

__all__ = ["LIKELIHOODS", "ContinuousBernoulli", "DiscretizedLogistic", "Likelihood"]

# The Gaussian's least standard deviation, in units of the data's: a column that the decoder can
# predict exactly would otherwise send the density to infinity.
MIN_SCALE = 1e-2

# The logistic's least log-scale, in units of the data's range: a width of a quarter of an 8-bit
# step puts all mass on one value already.
MIN_LOG_SCALE = -7.0


class Likelihood(nn.Module):
    """Base of the likelihoods.

    Args:
        spec: shape and range of the data.
        mean, std: of the data, in this likelihood's `units` (before any binarization).

    Attributes:
        units: the units in which x is observed.
        num_parameters: P.
    """

    units: ClassVar[Units]
    num_parameters: ClassVar[int] = 1
    mean: Tensor
    std: Tensor

    def __init__(self, spec: DataSpec, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    @property
    def is_discrete(self) -> bool:
        """Whether p(x|z) is a mass function, so that bits per dimension have a meaning."""
        return self.units in ("binary", "count")

    def initial_bias(self) -> Tensor:
        """(P, *data_shape): the raw output at which the mean of p(x|z) is the data's mean."""
        raise NotImplementedError

    def _event(self, distribution: TorchDistribution) -> Distribution:
        return distribution.to_event(len(self.spec.shape))


class BernoulliLikelihood(Likelihood):
    """x in {0, 1}: one logit a value."""

    units = "binary"

    def initial_bias(self) -> Tensor:
        return torch.logit(self.mean, eps=1e-3).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(_Bernoulli(logits=_parameter(raw, self.spec, 0)))


class _Bernoulli(Bernoulli):
    """log p(x) = log σ(±l) for x = 1 and 0: two operations on (S, B, …) in place of torch's four.

    Most of the time of importance sampling goes into them. For x between 0 and 1 it is no cross
    entropy, but there a Bernoulli has no mass.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        signed = self.logits * (2 * value - 1)
        return _LogSigmoid.apply(signed) if signed.is_cpu else F.logsigmoid(signed)


class _LogSigmoid(torch.autograd.Function):
    """log σ(m) = min(m, 0) + log σ(|m|), as exact as torch's in sums, in half its time on a CPU.

    There log1p, which torch takes for it, costs several times a logarithm. What is lost is less
    than half a unit in the last place of 1, for |m| so large that log σ(|m|) is smaller.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(m: Tensor) -> Tensor:
        return m.abs().sigmoid_().log_().add_(m.clamp_max(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return gradient * torch.sigmoid(-m)


class BinomialLikelihood(Likelihood):
    """Counts x in {0, …, max_value}: one logit a value."""

    units = "count"

    def initial_bias(self) -> Tensor:
        return torch.logit(self.mean / self.spec.bound, eps=1e-3).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(
            Binomial(total_count=self.spec.bound, logits=_parameter(raw, self.spec, 0))
        )


class ContinuousBernoulliLikelihood(Likelihood):
    """x in [0, 1]: one logit a value."""

    units = "unit"

    def initial_bias(self) -> Tensor:
        """The logit of each mean, by bisection: the mean has no inverse in closed form."""
        mean = self.mean.clamp(1e-2, 1 - 1e-2)
        low, high = torch.full_like(mean, -200.0), torch.full_like(mean, 200.0)
        for _ in range(40):
            middle = (low + high) / 2
            above = ContinuousBernoulli(middle).mean > mean
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(ContinuousBernoulli(_parameter(raw, self.spec, 0)))


class GaussianLikelihood(Likelihood):
    """Real x: mean from the decoder, learned noise scale.

    The scale does not depend on z: one for images, one a column for tables. It is bounded below by
    `MIN_SCALE` times the data's standard deviation.
    """

    units = "real"

    def __init__(self, spec: DataSpec, mean: Tensor, std: Tensor) -> None:
        super().__init__(spec, mean, std)
        self.log_scale = nn.Parameter(torch.zeros(std.shape))

    def initial_bias(self) -> Tensor:
        return torch.zeros(1, *self.spec.shape)

    def forward(self, raw: Tensor) -> Distribution:
        loc = self.mean + self.std * _parameter(raw, self.spec, 0)
        scale = self.std * (MIN_SCALE + self.log_scale.exp())
        return self._event(Normal(loc, scale.expand(loc.shape)))


class DiscretizedLogisticLikelihood(Likelihood):
    """Integers x in {0, …, max_value}, as 8-bit images: location and scale for each value."""

    units = "count"
    num_parameters = 2

    def initial_bias(self) -> Tensor:
        # A logistic of scale s has the standard deviation s π / √3.
        log_scale = torch.log(self.std * math.sqrt(3) / math.pi / self.spec.bound)
        return torch.stack([torch.zeros(self.spec.shape), log_scale.expand(self.spec.shape)])

    def forward(self, raw: Tensor) -> Distribution:
        loc = self.mean + self.std * _parameter(raw, self.spec, 0)
        log_scale = _parameter(raw, self.spec, 1).clamp_min(MIN_LOG_SCALE)
        return self._event(
            DiscretizedLogistic(loc, log_scale.exp() * self.spec.bound, self.spec.bound)
        )


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "continuous-bernoulli": ContinuousBernoulliLikelihood,
    "binomial": BinomialLikelihood,
    "gaussian": GaussianLikelihood,
    "discretized-logistic": DiscretizedLogisticLikelihood,
}


class ContinuousBernoulli(TorchDistribution):
    """p(x) = e^(l·x) · l / (e^l − 1) on [0, 1], with logit l; uniform at l = 0.

    `torch.distributions.ContinuousBernoulli` (2.15) clamps the probability, so beyond |l| ≈ 16 its
    density does not integrate to one (0.40 at l = 40 in fp32). This one is written in l throughout.

    Source: "The continuous Bernoulli: fixing a pervasive error in variational autoencoders",
    arXiv 1907.06845.

    Args:
        logits: (...), real.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012 (torch's convention)
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(
        self, batch_shape: torch.Size, _instance: ContinuousBernoulli | None = None
    ) -> ContinuousBernoulli:
        return ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) (...), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        # By symmetry p(x; l) = p(1 − x; −l): written so that no exponent is positive.
        size = self.logits.abs()
        distance = torch.where(self.logits > 0, 1 - value, value)
        near = size < 1e-2
        safe = torch.where(near, torch.ones_like(size), size)
        # log(l / (1 − e^−l)) = l/2 − l²/24·… around 0: l/2 + l²·(−1/24) + O(l⁴/2880)
        log_norm = torch.where(
            near, size / 2 - size.square() / 24, safe.log() - torch.log(-torch.expm1(-safe))
        )
        return log_norm - size * distance

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Inverse of the distribution function at uniform draws."""
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        size = self.logits.abs()
        near = size < 1e-3
        safe = torch.where(near, torch.ones_like(size), size)
        # With l < 0: x = log(1 − u·(1 − e^l)) / l, written in |l|; the other sign by symmetry.
        x = -torch.log1p(uniform * torch.expm1(-safe)) / safe
        x = torch.where(near, uniform, x).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - x, x)

    @property
    def mean(self) -> Tensor:
        size = self.logits.abs()
        near = size < 1e-1
        safe = torch.where(near, torch.ones_like(size), size)
        # E[x] = 1/(1 − e^−l) − 1/l = 1/2 + l/12 − l³/720 + …
        upper = torch.where(
            near, 0.5 + size / 12 - size**3 / 720, -1 / torch.expm1(-safe) - 1 / safe
        )
        return torch.where(self.logits > 0, upper, 1 - upper)


class DiscretizedLogistic(TorchDistribution):
    """A logistic, rounded to {0, …, max_value}; the tails belong to the first and last value.

    P(k) = σ((k + ½ − loc)/scale) − σ((k − ½ − loc)/scale), computed as
    log σ(b) + log σ(−a) + log(1 − e^(a−b)), which is exact for any a < b.

    Source: "Improved variational inference with inverse autoregressive flow", arXiv 1606.04934, and
    "PixelCNN++", arXiv 1701.05517.

    Args:
        loc, scale: (...), in units of the values.
        max_value: the largest value.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self, loc: Tensor, scale: Tensor, max_value: int, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.max_value = max_value
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.max_value)

    def expand(
        self, batch_shape: torch.Size, _instance: DiscretizedLogistic | None = None
    ) -> DiscretizedLogistic:
        return DiscretizedLogistic(
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            self.max_value,
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(x) (...), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        centered = (value - self.loc) / self.scale
        half = 0.5 / self.scale
        log_below = F.logsigmoid(centered + half)  # log P(X ≤ k)
        log_above = F.logsigmoid(half - centered)  # log P(X ≥ k)
        log_inner = torch.log(-torch.expm1(-2 * half))
        first, last = value == 0, value == self.max_value
        zero = torch.zeros_like(centered)
        return (
            torch.where(last, zero, log_below)
            + torch.where(first, zero, log_above)
            + torch.where(first | last, zero, log_inner)
        )

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            # 0 and 1 would be infinite logits.
            draws = self.loc + self.scale * torch.logit(uniform, eps=1e-7)
            return draws.round().clamp(0, self.max_value)

    @property
    def mean(self) -> Tensor:
        """Σₖ P(X ≥ k), k = 1 … max_value.

        Exact up to 1,024 values, one after the other to save memory; above, the integral for the
        sum, which is off by less than half a value.
        """
        if self.max_value > 1024:
            below, above = self.loc / self.scale, (self.loc - self.max_value) / self.scale
            return self.scale * (F.softplus(below) - F.softplus(above))
        total = torch.zeros_like(self.loc)
        for k in range(1, self.max_value + 1):
            total = total + torch.sigmoid((self.loc - (k - 0.5)) / self.scale)
        return total


def _parameter(raw: Tensor, spec: DataSpec, index: int) -> Tensor:
    """(..., P, *data_shape) → (..., *data_shape): the parameter `index`."""
    return raw.select(raw.dim() - len(spec.shape) - 1, index)
