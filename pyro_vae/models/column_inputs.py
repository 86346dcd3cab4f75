"""Columns of several kinds as the encoder sees them, and their statistics.

real           (x − mean) / sd; median and quartiles for student-t
log-normal     the same of log x
counts         the same of log(1 + x)
bernoulli, ordinal     the same of codes
categorical    one number for each category, 1 for that of the row and else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.columns import COUNTS, ColumnKind
from ..data.splits import Split
from .column_families import TINY

# Rows that are read for the first values, about
SAMPLED_ROWS = 50_000


@dataclass(frozen=True)
class Statistics:
    """Of the training rows, each (D,), float64; 0 where a kind has no such number.

    Attributes:
        centre, spread: mean and standard deviation in the encoder's input, see `transformed`.
            Median and quartiles for student-t.
        mean, variance: of x.
        zeros: share of values 0.
        shares: (K,) of the categories of each column, or empty.
    """

    centre: Tensor
    spread: Tensor
    mean: Tensor
    variance: Tensor
    zeros: Tensor
    shares: list[Tensor]

    @classmethod
    def of(cls, train: Split) -> Statistics:
        """Of a training split, without values that are NaN."""
        kinds, step = train.spec.kinds, max(1, len(train) // SAMPLED_ROWS)
        index = torch.arange(0, len(train), step)
        rows = train.take(index, "real").cpu().double()
        numbers, shares = [], []
        for column, kind in zip(transformed(rows, masks(kinds)).T, kinds, strict=True):
            present = column[~column.isnan()]
            middle, spread = present.mean(), present.std(correction=0)
            if kind.name == "student-t":
                low, middle, high = present.quantile(present.new_tensor([0.25, 0.5, 0.75]))
                spread = (high - low) / 1.35 if high > low else spread
            numbers.append((middle, spread if spread > 0 else torch.ones_like(spread)))
            counts = present.new_zeros(len(kind.categories))
            if kind.categories:
                counts = torch.bincount(present.long(), minlength=len(kind.categories)).double()
            shares.append((counts + 0.5) / (counts.sum() + counts.numel() / 2))
        centre, spread = torch.tensor(numbers, dtype=torch.float64).T
        mean = rows.nanmean(0)
        variance = (rows - mean).square().nanmean(0)
        zeros = (rows == 0).sum(0) / (~rows.isnan()).sum(0)
        return cls(centre, spread, mean, variance, zeros.double(), shares)

    @classmethod
    def blank(cls, kinds: Sequence[ColumnKind]) -> Statistics:
        """Placeholders, for a model whose weights are loaded."""
        with torch.device("cpu"):  # their values are read
            half = torch.full((len(kinds),), 0.5)
            shares = [torch.ones(len(kind.categories)) for kind in kinds]
        return cls(half, half, half, half, half, shares)


def masks(kinds: Sequence[ColumnKind]) -> Tensor:
    """(2, D) which columns are log-normal, and which are counts."""
    logs = [kind.name == "log-normal" for kind in kinds]
    return torch.tensor([logs, [kind.name in COUNTS for kind in kinds]])


def transformed(x: Tensor, masks: Tensor) -> Tensor:
    """x (..., D) as it enters the encoder, before it is standardized: x, log x or log(1 + x)."""
    is_log, is_count = masks
    # The branches that are not taken must be finite, or their gradients are NaN.
    log = torch.where(is_log, x, 1.0).clamp_min(TINY).log()
    log_count = torch.log1p(torch.where(is_count, x, 0.0).clamp_min(0.0))
    return torch.where(is_log, log, torch.where(is_count, log_count, x))


class ColumnInputs(nn.Module):
    """x (..., D) → the encoder's input (..., F), of about unit size.

    One number for each column, and for each category of a categorical column. Codes between two
    categories, which pseudo-inputs of a prior may have, are shares of both.
    """

    centre: Tensor
    spread: Tensor
    masks: Tensor
    others: Tensor
    columns: Tensor
    codes: Tensor

    def __init__(self, kinds: Sequence[ColumnKind], centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("masks", masks(kinds), persistent=False)
        self.register_buffer("centre", centre.clone())
        self.register_buffer("spread", spread.clone())
        columns = [j for j, kind in enumerate(kinds) if kind.name == "categorical"]
        pairs = [(j, k) for j in columns for k in range(len(kinds[j].categories))]
        others = [j for j in range(len(kinds)) if j not in columns]
        self.size = len(others) + len(pairs)
        self._index("others", others)
        self._index("columns", [j for j, _ in pairs])
        self._index("codes", [k for _, k in pairs])

    def _index(self, name: str, values: list[int]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        standardized = (transformed(x, self.masks) - self.centre) / self.spread
        one_hot = F.relu(1 - (x[..., self.columns] - self.codes).abs())
        return torch.cat([standardized[..., self.others], one_hot], dim=-1)
