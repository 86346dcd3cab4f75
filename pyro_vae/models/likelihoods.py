"""Decoder output → p(x|z), a normalized density or mass function.

    bernoulli              x in {0, 1}             p(x) = σ(±l)
    continuous-bernoulli   x in [0, 1]             p(x) = e^(l·x) · l / (e^l − 1)
    binomial               x in {0, …, n}          Binomial(n, σ(l))
    gaussian               x real                  N(μ, s²), with s learned and independent of z
    discretized-logistic   x in {0, …, n}          a logistic, rounded

A likelihood is a module raw (..., P, *data_shape) → Distribution, batch shape (...) and event shape
`data_shape`. Its attributes are the `units` of x (`data.splits`) and P, the number of parameters of
each value; `initial_bias` is the decoder output at which the mean of p(x|z) is that of the data.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import Bernoulli, Binomial, Distribution, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ..data.splits import DataSpec, Units
from .bounds import soft_clamp
from .missing import ObservedPart

# Minimum standard deviation of the Gaussian, in units of the data's. Without it, the density of a
# column that the decoder predicts exactly would be unbounded.
MIN_SCALE = 1e-2

# Minimum log-scale of the logistic, in units of the data's range. A quarter of an 8-bit step puts
# all mass on one value.
MIN_LOG_SCALE = -7.0

# Log-scales of the Gaussian and the logistic, in units of the data's standard deviation and range,
# keep every bit up to this. Two units further is the limit, at which exp is far from overflow.
MAX_LOG_SCALE = 8.0

# Values up to which the mean of a discretized logistic is a sum of as many terms.
MAX_TERMS = 1024

# Binomial counts above this need float64. In float32 the logarithms of the factorials, hundreds of
# nats, lose digits: the masses sum to 1.00007 for n = 255 and to 0.75 for n = 1,000,000.
MAX_FLOAT32_COUNT = 64


class Likelihood(nn.Module):
    """Base class of the likelihoods.

    Args:
        spec: shape and range of the data.
        mean, std: moments of the data in this likelihood's `units`, before any binarization.

    Attributes:
        units: the units of x.
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
        """Whether p(x|z) is a mass function, for which bits per dimension are defined."""
        return self.units in ("binary", "count")

    def initial_bias(self) -> Tensor:
        """(P, *data_shape): the raw output at which the mean of p(x|z) is that of the data."""
        raise NotImplementedError

    def deviations(self, x: Tensor) -> Tensor:
        """x (..., *data_shape) in standard deviations of the data from their mean, float64."""
        return (x.double() - self.mean) / self.std

    def _select(self, raw: Tensor, index: int = 0) -> Tensor:
        """One parameter: (..., P, *data_shape) → (..., *data_shape)."""
        return raw.select(raw.dim() - len(self.spec.shape) - 1, index)

    def _event(self, distribution: TorchDistribution) -> Distribution:
        if not self.spec.missing:
            return distribution.to_event(len(self.spec.shape))
        return ObservedPart(distribution, len(self.spec.shape), self.fill_values())

    def fill_values(self) -> Tensor:
        """(*data_shape) values in the support, which stand for missing ones.

        The data's mean is one, and near the values that the decoder expects.
        """
        return self.mean.round() if self.is_discrete else self.mean


class BernoulliLikelihood(Likelihood):
    """x in {0, 1}, with one logit for each value."""

    units = "binary"

    def initial_bias(self) -> Tensor:
        return torch.logit(self.mean, eps=1e-3).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(_Bernoulli(logits=self._select(raw)))


class _Bernoulli(Bernoulli):
    """Bernoulli with log p(x) = log σ(±l) for x = 1 and 0: two operations in place of torch's four.

    They take most of the time of importance sampling. For x between 0 and 1, which has no mass, the
    value is not the cross entropy.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        signed = self.logits * (2 * value - 1)
        # torch.compile takes no Function with a jvp. Under torch.func a jvp of a jvp would be 0.
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        fast = signed.is_cpu and not transformed
        return _LogSigmoid.apply(signed) if fast else F.logsigmoid(signed)


class _LogSigmoid(torch.autograd.Function):
    """log σ(m) = min(m, 0) + log σ(|m|), on a CPU twice as fast as torch's.

    torch uses log1p, which costs several times a logarithm. The absolute error is below half a unit
    in the last place of 1, and arises only if log σ(|m|) is smaller than that.
    """

    @staticmethod
    def forward(m: Tensor) -> Tensor:
        return m.abs().sigmoid_().log_().add_(m.clamp_max(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return gradient * torch.sigmoid(-m)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return tangent * torch.sigmoid(-m)


class BinomialLikelihood(Likelihood):
    """Counts x in {0, …, max_value}, with one logit for each value."""

    units = "count"

    def initial_bias(self) -> Tensor:
        return torch.logit(self.mean / self.spec.bound, eps=1e-3).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        kind = Binomial if self.spec.bound <= MAX_FLOAT32_COUNT else _LargeBinomial
        return self._event(kind(self.spec.bound, logits=self._select(raw)))


class _LargeBinomial(Binomial):
    """Binomial with log p(x) computed in float64 and returned in the dtype of the logits."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        count, logits = self.total_count.double(), self.logits.double()
        exact = Binomial(count, logits=logits, validate_args=False)
        return exact.log_prob(value.double()).to(self.logits.dtype)


class ContinuousBernoulliLikelihood(Likelihood):
    """x in [0, 1], with one logit for each value."""

    units = "unit"

    def initial_bias(self) -> Tensor:
        """The logit of each mean, by bisection, since the mean has no inverse in closed form."""
        mean = self.mean.clamp(1e-2, 1 - 1e-2)
        low, high = torch.full_like(mean, -200.0), torch.full_like(mean, 200.0)
        for _ in range(40):
            middle = (low + high) / 2
            above = ContinuousBernoulli(middle).mean > mean
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        return self._event(ContinuousBernoulli(self._select(raw)))


class GaussianLikelihood(Likelihood):
    """Real x, with the mean from the decoder and a learned noise scale.

    The scale does not depend on z. It is one number for images and one for each column of a table,
    at least `MIN_SCALE` times the standard deviation of the data, see also `MAX_LOG_SCALE`.
    """

    units = "real"

    def __init__(self, spec: DataSpec, mean: Tensor, std: Tensor) -> None:
        super().__init__(spec, mean, std)
        self.log_scale = nn.Parameter(torch.zeros_like(std))

    def initial_bias(self) -> Tensor:
        return torch.zeros_like(self.mean).unsqueeze(0)

    def forward(self, raw: Tensor) -> Distribution:
        loc = self.mean + self.std * self._select(raw)
        log_scale = soft_clamp(self.log_scale, -math.inf, MAX_LOG_SCALE, width=2.0)
        scale = self.std * (MIN_SCALE + log_scale.exp())
        return self._event(Normal(loc, scale.expand(loc.shape)))


class DiscretizedLogisticLikelihood(Likelihood):
    """Integers x in {0, …, max_value}, such as 8-bit pixels: location and scale for each value."""

    units = "count"
    num_parameters = 2

    def initial_bias(self) -> Tensor:
        # A logistic of scale s has standard deviation s π / √3.
        log_scale = torch.log(self.std * math.sqrt(3) / math.pi / self.spec.bound)
        return torch.stack([torch.zeros_like(self.mean), log_scale.expand(self.spec.shape)])

    def forward(self, raw: Tensor) -> Distribution:
        loc = self.mean + self.std * self._select(raw)
        log_scale = self._select(raw, 1).clamp_min(MIN_LOG_SCALE)
        log_scale = soft_clamp(log_scale, -math.inf, MAX_LOG_SCALE, width=2.0)
        scale = log_scale.exp() * self.spec.bound
        return self._event(DiscretizedLogistic(loc, scale, self.spec.bound))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "continuous-bernoulli": ContinuousBernoulliLikelihood,
    "binomial": BinomialLikelihood,
    "gaussian": GaussianLikelihood,
    "discretized-logistic": DiscretizedLogisticLikelihood,
}


class ContinuousBernoulli(TorchDistribution):
    """p(x) = e^(l·x) · l / (e^l − 1) on [0, 1], with logit l; uniform at l = 0.

    `torch.distributions.ContinuousBernoulli` (2.15) clamps the probability, and beyond |l| ≈ 16 its
    density does not integrate to one (0.40 at l = 40 in fp32). This class computes with l instead.

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

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> ContinuousBernoulli:
        return ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) (...), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        # p(x; l) = p(1 − x; −l) by symmetry: no exponent needs to be positive.
        size = self.logits.abs()
        distance = torch.where(self.logits > 0, 1 - value, value)
        near = size < 1e-2
        small, safe = _apart(size, near)
        # log(l / (1 − e^−l)) = l/2 − l²/24·… around 0: l/2 + l²·(−1/24) + O(l⁴/2880)
        log_norm = torch.where(
            near, small / 2 - small.square() / 24, safe.log() - torch.log(-torch.expm1(-safe))
        )
        return log_norm - size * distance

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """The inverse of the distribution function at uniform draws."""
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        size = self.logits.abs()
        near = size < 1e-3
        _, safe = _apart(size, near)
        # For l < 0: x = log(1 − u·(1 − e^l)) / l, in terms of |l|; for l > 0 by symmetry.
        x = -torch.log1p(uniform * torch.expm1(-safe)) / safe
        x = torch.where(near, uniform, x).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - x, x)

    @property
    def mean(self) -> Tensor:
        size = self.logits.abs()
        near = size < 1e-1
        small, safe = _apart(size, near)
        # E[x] = 1/(1 − e^−l) − 1/l = 1/2 + l/12 − l³/720 + …
        upper = torch.where(
            near, 0.5 + small / 12 - small**3 / 720, -1 / torch.expm1(-safe) - 1 / safe
        )
        return torch.where(self.logits > 0, upper, 1 - upper)


def _apart(size: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes near 0, else 0, for a series; the others, else 1, for the closed form.

    A branch that `torch.where` does not take must be finite, or its gradient is NaN.
    """
    zero, one = torch.zeros_like(size), torch.ones_like(size)
    return torch.where(near, size, zero), torch.where(near, one, size)


class DiscretizedLogistic(TorchDistribution):
    """A logistic, rounded to {0, …, max_value}; the first and last value include the tails.

    P(k) = σ(b) − σ(a) with b = (k + ½ − loc)/scale and a = (k − ½ − loc)/scale, computed as
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

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> DiscretizedLogistic:
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedLogistic(loc, scale, self.max_value, validate_args=False)

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
            # The logits of 0 and 1 are infinite.
            draws = self.loc + self.scale * torch.logit(uniform, eps=1e-7)
            return draws.round().clamp(0, self.max_value)

    @property
    def mean(self) -> Tensor:
        """Σₖ P(X ≥ k), k = 1 … max_value.

        The sum is exact up to `MAX_TERMS` values, and runs term by term to save memory. Above, an
        integral replaces it, with an error below half a value.
        """
        if self.max_value > MAX_TERMS:
            below, above = self.loc / self.scale, (self.loc - self.max_value) / self.scale
            return self.scale * (F.softplus(below) - F.softplus(above))
        total = torch.zeros_like(self.loc)
        for k in range(1, self.max_value + 1):
            total = total + torch.sigmoid((self.loc - (k - 0.5)) / self.scale)
        return total
