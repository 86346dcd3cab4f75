"""p(x|z) of a table whose columns have a kind each: log p(x|z) = Σⱼ log pⱼ(xⱼ|z).

    gaussian            N(μ, s²)                          μ
    student-t           μ + s t, t of ν degrees           μ
    log-normal          log x ~ N(μ, s²)                  μ
    poisson             mean m                            log m
    negative-binomial   mean m, variance m + m² / r       log m
    zero-inflated-…     0 with probability σ(g)           log m, g
    bernoulli           P(1) = σ(l)                       l
    categorical         P(k) = e^(lₖ) / Σ e^(l)           l₀ … l_(K−1)
    ordinal             Binomial(K − 1, σ(l))             l

The last column is what the decoder gives for each row, K numbers for a categorical column. s, ν and
r are learned for each column and do not depend on z. Locations and logarithms of means are in units
of the data: μ = centre + spread · output. The encoder's input is standardized by the same numbers,
see `column_inputs`.

Source: "Handling incomplete heterogeneous data using VAEs", arXiv 1807.03653.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import (
    Bernoulli,
    Binomial,
    Distribution,
    Normal,
    StudentT,
    TorchDistribution,
)
from torch import Tensor, nn
from torch.distributions import constraints

from ..config.columns import COUNTS, KINDS, REAL, ColumnKind
from ..data.splits import DataSpec
from .bounds import soft_clamp
from .column_families import (
    ABSENT,
    Categorical,
    LogNormal,
    NegativeBinomial,
    Poisson,
    ZeroInflated,
)
from .column_inputs import ColumnInputs, Statistics, masks, transformed
from .likelihoods import MAX_LOG_SCALE, MIN_SCALE, Likelihood

# Logarithms of means, and locations of log-normal columns, keep every bit within these.
LOG_MEAN = (-15.0, 18.0)
LOG_LOCATION = (-75.0, 75.0)
# Logarithms of r and of ν − 2. The variance of a Student column is thus finite.
LOG_COUNT = (-4.0, 8.0)
LOG_DF = (-2.0, 4.0)
FIRST_LOG_DF = 2.0  # ν = 9.4
LEAST_SHARE = 1e-3


class Columns(TorchDistribution):
    """Values of columns of several kinds: batch (..., D), event ().

    Args:
        parts: distributions of the columns of one kind each, batch (..., Dᵢ).
        places: (Dᵢ,) their columns.
        order: (D,) the place of each column in the concatenated parts.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's convention)

    def __init__(
        self, parts: Sequence[TorchDistribution], places: Sequence[Tensor], order: Tensor
    ) -> None:
        self.parts, self.places, self.order = parts, places, order
        super().__init__(torch.Size([*parts[0].batch_shape[:-1], len(order)]))

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _Supports(self)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TorchDistribution:
        sizes = [torch.Size([*batch_shape[:-1], len(place)]) for place in self.places]
        parts = [part.expand(size) for part, size in zip(self.parts, sizes, strict=True)]
        return Columns(parts, self.places, self.order)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the parts (..., Dᵢ) in the order of the columns (..., D)."""
        return torch.cat(list(values), dim=-1).index_select(-1, self.order)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(xⱼ) (..., D), nats."""
        if self._validate_args:
            self._validate_sample(value)
        pairs = zip(self.parts, self.places, strict=True)
        return self.joined([part.log_prob(value[..., place]) for part, place in pairs])

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.joined([part.sample(torch.Size(sample_shape)) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """Means; of categorical columns the most probable code."""
        return self.joined([part.mean for part in self.parts])


class _Supports(constraints.Constraint):
    """The support of each column."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        columns = self.columns
        value = value.expand(torch.broadcast_shapes(value.shape, columns.batch_shape))
        pairs = zip(columns.parts, columns.places, strict=True)
        return columns.joined([p.support.check(value[..., place]) for p, place in pairs])


class ColumnsLikelihood(Likelihood):
    """A likelihood for each column, as at the top of this module.

    Args:
        spec: with the kinds of the columns.
        mean, std: moments of x.
        statistics: of the training rows; None if the weights are loaded.
    """

    units = "real"
    centre: Tensor
    spread: Tensor
    masks: Tensor
    whole: Tensor
    order: Tensor
    sizes: Tensor
    absent: Tensor
    logit_index: Tensor
    columns_categorical: Tensor

    def __init__(
        self, spec: DataSpec, mean: Tensor, std: Tensor, statistics: Statistics | None = None
    ) -> None:
        super().__init__(spec, mean, std)
        self.kinds = spec.kinds
        self.statistics = Statistics.blank(spec.kinds) if statistics is None else statistics
        self.register_buffer("centre", self.statistics.centre.to(mean).clone())
        self.register_buffer("spread", self.statistics.spread.to(mean).clone())
        self.names = [name for name in KINDS if any(kind.name == name for kind in self.kinds)]
        places = [self._columns(name) for name in self.names]
        for name, place in zip(self.names, places, strict=True):
            self.register_buffer(f"columns_{name}", torch.tensor(place), persistent=False)
        columns = [j for place in places for j in place]
        order = torch.tensor([columns.index(j) for j in range(len(columns))])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("masks", masks(self.kinds), persistent=False)
        whole = torch.tensor([kind.is_discrete for kind in self.kinds])
        self.register_buffer("whole", whole, persistent=False)
        self._register_categories()
        self.log_scale = nn.Parameter(self._first_scales(mean))

    def _columns(self, name: str) -> list[int]:
        return [j for j, kind in enumerate(self.kinds) if kind.name == name]

    def _register_categories(self) -> None:
        """Numbers of categories, and where the logits of categorical columns are in the output."""
        sizes = torch.tensor([max(1, len(kind.categories)) for kind in self.kinds])
        self.register_buffer("sizes", sizes, persistent=False)
        own = [len(self.kinds[j].categories) for j in self._columns("categorical")]
        most = max(own, default=0)
        starts = [sum(own[:i]) for i in range(len(own))]
        index = [[s + min(k, n - 1) for k in range(most)] for s, n in zip(starts, own, strict=True)]
        absent = [[k >= n for k in range(most)] for n in own]
        self.register_buffer("logit_index", torch.tensor(index, dtype=torch.long), persistent=False)
        self.register_buffer("absent", torch.tensor(absent, dtype=torch.bool), persistent=False)
        counts = {name: len(self._columns(name)) * (1 + _is_inflated(name)) for name in self.names}
        self.outputs = list((counts | {"categorical": sum(own)} if own else counts).values())

    def _first_scales(self, like: Tensor) -> Tensor:
        """(2, D): log s, or log r of counts; log(ν − 2). Marginal moments are those of the data."""
        first = torch.zeros(2, len(self.kinds), device="cpu")
        first[1] = FIRST_LOG_DF
        for j, kind in enumerate(self.kinds):
            if kind.name == "student-t":
                first[0, j] = -math.log1p(2 * math.exp(-FIRST_LOG_DF)) / 2
            elif kind.name.endswith("negative-binomial"):
                first[0, j] = _log_count(self.statistics, j, kind.name)
        return first.to(like)

    @property
    def is_discrete(self) -> bool:
        return all(kind.is_discrete for kind in self.kinds)

    def fill_values(self) -> Tensor:
        return torch.where(self.whole, torch.round(self.mean), self.mean)

    def inputs(self) -> ColumnInputs:
        """The encoder's first module: x → numbers of about unit size."""
        return ColumnInputs(self.kinds, self.centre, self.spread)

    def deviations(self, x: Tensor) -> Tensor:
        """x (..., D) in standard deviations from the mean, as it enters the encoder, float64."""
        return (transformed(x.double(), self.masks) - self.centre) / self.spread

    def initial_bias(self) -> Tensor:
        """(ΣP,) the output at which the means and shares of p(x|z) are those of the data."""
        found = self.statistics
        parts: list[Tensor] = []
        for name in self.names:
            columns = self._columns(name)
            first, gate = found.mean.new_zeros(len(columns)), found.mean.new_zeros(len(columns))
            for i, j in enumerate(columns):
                first[i], gate[i] = _first_output(found, j, self.kinds[j])
            if name == "categorical":
                first = torch.cat([found.shares[j].log() for j in columns])
            parts += [first, gate] if _is_inflated(name) else [first]
        return torch.cat(parts).to(self.mean)

    def forward(self, raw: Tensor) -> Distribution:
        """Decoder output (..., ΣP) → p(x|z), batch (...), event (D,)."""
        return self._event(self.each(raw))

    def each(self, raw: Tensor) -> Columns:
        """Decoder output (..., ΣP) → the distributions of the columns, batch (..., D), event ()."""
        places = [getattr(self, f"columns_{name}") for name in self.names]
        outputs = raw.split(self.outputs, dim=-1)
        parts = [self._part(*args) for args in zip(self.names, places, outputs, strict=True)]
        return Columns(parts, places, self.order)

    def expected(self, p: Any) -> Tensor:
        """Means of p(x|z), and probabilities of all categories: (..., D + D_c · K).

        Averaged over z, they are those of the mixture. `summary` makes values of x of them.
        """
        columns = p.base_dist
        parts = [columns.mean]
        if "categorical" in self.names:
            part = columns.parts[self.names.index("categorical")]
            parts.append(part.logits.softmax(-1).flatten(-2))
        return torch.cat(parts, dim=-1)

    def summary(self, expected: Tensor) -> Tensor:
        """Means, and the most probable categories (..., D), of `expected` values."""
        mean = expected[..., : len(self.kinds)].clone()
        if "categorical" in self.names:
            place = self.columns_categorical
            shares = expected[..., len(self.kinds) :].unflatten(-1, (len(place), -1))
            mean[..., place] = shares.argmax(-1).to(mean)
        return mean

    def _part(self, name: str, place: Tensor, raw: Tensor) -> TorchDistribution:
        """The distribution of all columns of one kind, batch (..., Dᵢ)."""
        if name == "categorical":
            logits = torch.where(self.absent, ABSENT, raw[..., self.logit_index])
            return Categorical(logits, self.sizes[place])
        if name == "bernoulli":
            return Bernoulli(logits=raw)
        if name == "ordinal":
            return Binomial(self.sizes[place].to(raw) - 1, logits=raw)
        raw, *gate = raw.chunk(1 + _is_inflated(name), dim=-1)
        centre, spread = self.centre[place], self.spread[place]
        log_scale, log_df = self.log_scale[:, place]
        loc = centre + spread * raw
        if name in REAL:
            bounded = soft_clamp(log_scale, -math.inf, MAX_LOG_SCALE, width=2.0)
            scale = (spread * (MIN_SCALE + bounded.exp())).expand(loc.shape)
            if name == "gaussian":
                return Normal(loc, scale)
            if name == "log-normal":
                return LogNormal(soft_clamp(loc, *LOG_LOCATION, width=2.0), scale)
            df = 2 + soft_clamp(log_df, *LOG_DF, width=1.0).exp()
            return StudentT(df.expand(loc.shape), loc, scale)
        log_mean = soft_clamp(loc, *LOG_MEAN, width=2.0)
        counts: Poisson | NegativeBinomial = Poisson(log_mean)
        if name.endswith("negative-binomial"):
            log_count = soft_clamp(log_scale, *LOG_COUNT, width=1.0)
            counts = NegativeBinomial(log_mean, log_count)
        return ZeroInflated(counts, *gate) if gate else counts


def _is_inflated(name: str) -> bool:
    return name.startswith("zero-inflated")


def _first_output(found: Statistics, column: int, kind: ColumnKind) -> tuple[float, float]:
    """The first parameter of a column, and the gate of zeros, at the moments of the data."""
    mean = float(found.mean[column])
    if kind.name in ("bernoulli", "ordinal"):
        share = mean / (len(kind.categories) - 1)
        return math.log(share + LEAST_SHARE) - math.log(1 - share + LEAST_SHARE), 0.0
    if kind.name not in COUNTS:
        return 0.0, 0.0
    share = _zero_share(found, column) if _is_inflated(kind.name) else 0.0
    log_mean = math.log(max(mean, LEAST_SHARE) / (1 - share))
    first = (log_mean - float(found.centre[column])) / float(found.spread[column])
    return first, math.log(share / (1 - share)) if share else 0.0


def _zero_share(found: Statistics, column: int) -> float:
    """π at the first: half of the zeros that a Poisson distribution of this mean lacks."""
    excess = float(found.zeros[column]) - math.exp(-float(found.mean[column]))
    return min(max(excess / 2, 0.01), 0.9)


def _log_count(found: Statistics, column: int, name: str) -> float:
    """log r at which the variance is that of the data, within bounds."""
    share = _zero_share(found, column) if _is_inflated(name) else 0.0
    mean = max(float(found.mean[column]), LEAST_SHARE) / (1 - share)
    # variance = (1 − π) (m + m² / r + π m²)
    above = float(found.variance[column]) / (1 - share) - mean - share * mean**2
    ratio = mean**2 / above if above > 0 else math.inf
    return min(max(math.log(ratio), LOG_COUNT[0]), LOG_COUNT[1])
