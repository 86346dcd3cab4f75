"""`Splits`: training, validation and test rows, from which batches are gathered.

A likelihood observes x in certain *units*. A batch is gathered from the one stored tensor, then
scaled and, if the units ask for it, binarized as a whole:

    binary   x ~ Bernoulli(value / max_value), drawn at each access
    unit     value / max_value, in [0, 1]
    count    the value itself, an integer from 0 to max_value
    real     value / max_value if the data are bounded, else the value itself, or
             (value - offset) / scale where float32 would lose the spread of a column

Evaluation uses one binarization, fixed by a seed (`Split.fixed`) and the same on every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config.columns import ColumnKind
from .missing import hidden_as
from .precision import column_name

Units = Literal["binary", "unit", "count", "real"]

# Rows that `Split.fixed` reads at once. The draws of a seeded binarization depend on this number.
CHUNK = 512


@dataclass(frozen=True)
class DataSpec:
    """Shape and range of the data of a model.

    Attributes:
        shape: shape of one row: (D,) for tables, (C, T) for sequences, (C, H, W) for images,
            (C, D, H, W) for volumes.
        max_value: the largest value that the data can take, or None for unbounded data.
        discrete: whether the values are integers from 0 to `max_value`.
        columns: the names of the columns of a table, or empty.
        offset, scale: of each column of a table or channel of a sequence, or one of each for images
            and volumes, see `precision`. None if float32 keeps the values. Bounded data have none.
        missing: whether values may be missing, which NaN marks, in stored values and in x.
        classes: the names of the labels that a model with labels knows, or empty.
        kinds: of each column, if each has a likelihood of its own; else empty. Values with
            categories are stored as codes 0, 1, …
    """

    shape: tuple[int, ...]
    max_value: int | None
    discrete: bool
    columns: tuple[str, ...] = ()
    offset: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    missing: bool = False
    classes: tuple[str, ...] = ()
    kinds: tuple[ColumnKind, ...] = ()

    def __post_init__(self) -> None:
        if self.kinds and not len(self.kinds) == len(self.columns) == math.prod(self.shape):
            raise ValueError(f"expected kinds and names of {math.prod(self.shape)} columns")
        if self.offset is not None or self.scale is not None:
            size = math.prod(self.scale_shape)
            if not (len(self.offset or ()) == len(self.scale or ()) == size):
                raise ValueError(f"expected {size} offsets and scales")

    @property
    def is_table(self) -> bool:
        return len(self.shape) == 1

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def row(self) -> str:
        """The word for a datum in titles and messages."""
        return {2: "sequence", 3: "image", 4: "volume"}.get(len(self.shape), "row")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the standard deviations, which broadcasts against `shape`.

        (D,) for tables and (C, 1) for sequences, whose columns and channels may differ in units;
        else ().
        """
        if self.is_table:
            return self.shape
        return (self.shape[0], 1) if len(self.shape) == 2 else ()

    @property
    def bound(self) -> int:
        """`max_value` of bounded data.

        Raises:
            ValueError: the data are unbounded.
        """
        if self.max_value is None:
            raise ValueError(f"expected bounded data; got {self}")
        return self.max_value

    @property
    def is_binary(self) -> bool:
        return self.discrete and self.max_value == 1

    def binarizes(self, units: Units) -> bool:
        """Whether x in `units` is drawn at random from the stored values."""
        return units == "binary" and not self.is_binary

    def to_units(
        self, values: Tensor, units: Units, generator: torch.Generator | None = None
    ) -> Tensor:
        """Stored values (B, *shape) → x (B, *shape), float32, in `units`."""
        if units == "real" and self.offset is not None:
            offset, scale = self._offset_and_scale(values.device)
            return ((values.to(torch.float64) - offset) / scale).to(torch.float32)
        x = values.to(torch.float32)
        if units != "count" and self.max_value not in (None, 1):
            x = x / self.bound
        if self.binarizes(units):
            # Twice as fast as torch.bernoulli, which draws doubles.
            uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            drawn = torch.gt(x, uniform, out=uniform)  # 1.0 or 0.0, without a boolean tensor
            x = hidden_as(drawn, x) if self.missing else drawn
        return x

    def from_units(self, x: Tensor, units: Units) -> Tensor:
        """x in `units` → stored values: the inverse of `to_units`.

        They are float64 if the data have an offset and a scale, else of the type of x.
        """
        if units == "real" and self.offset is not None:
            offset, scale = self._offset_and_scale(x.device)
            return x.to(torch.float64) * scale + offset
        return x if units == "count" or self.max_value is None else x * self.max_value

    def _offset_and_scale(self, device: torch.device) -> Tensor:
        pair = torch.tensor([self.offset, self.scale], dtype=torch.float64, device=device)
        return pair.reshape(2, *self.scale_shape)

    @property
    def log_scale(self) -> float:
        """log p(x) - log p(value) of a row, in nats: the sum of the logarithms of the scales."""
        repeats = math.prod(self.shape) // math.prod(self.scale_shape)
        return repeats * sum(map(math.log, self.scale or ()))

    def describe_units(self) -> str:
        """How x follows from the values, and log p(x) from that of the values; or nothing."""
        if self.offset is None or self.scale is None:
            return ""
        pairs = list(zip(self.offset, self.scale, strict=True))
        shown = [i for i, pair in enumerate(pairs) if pair != (0.0, 1.0)]
        parts = [f"offset {pairs[i][0]:.6g}, scale {pairs[i][1]:g}" for i in shown[:3]]
        if len(self.shape) == 2:
            parts = [f"channel {i}: {part}" for i, part in zip(shown, parts, strict=False)]
        if self.is_table:
            names = [column_name(self.columns, i) for i in shown]
            parts = [f"{name}: {part}" for name, part in zip(names, parts, strict=False)]
        rest = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
        density = "log p(x) is also that of the values"
        if self.log_scale:
            density = f"add {-self.log_scale:.6g} nats per row to log p(x) for that of the values"
        return f"x = (value - offset) / scale ({'; '.join(parts)}{rest}); {density}"


def binarize(values: Tensor, max_value: int) -> Tensor:
    """x ~ Bernoulli(value / max_value), float32, for values (uint8), by one random byte each.

    With q = ⌊256 / max_value⌋ and b uniform over the bytes below q · max_value,
    P(b < q · value) = value / max_value exactly. Other bytes are drawn again. Draws from torch's
    global generator, a quarter of the bits of a float32 each.
    """
    repeats = 256 // max_value
    limit = repeats * max_value
    draws = random_bytes(values.numel())
    rejected = np.flatnonzero(draws >= limit)
    while len(rejected):
        again = random_bytes(len(rejected))
        draws[rejected] = again
        rejected = rejected[again >= limit]
    if repeats > 1:  # in place of a multiple of the value, which may exceed a byte
        draws //= repeats
    x = torch.empty(values.shape, dtype=torch.float32, device="cpu")
    return torch.lt(torch.from_numpy(draws).view(values.shape), values, out=x)


def random_bytes(count: int) -> np.ndarray:
    """Uniform bytes (count,), uint8, on the CPU, from torch's global generator."""
    words = torch.empty(-(-count // 8), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return words.view(torch.uint8)[:count].numpy()


@dataclass(frozen=True)
class Split:
    """Some rows of the data.

    Attributes:
        values: (M, *shape), all stored rows, shared by the splits.
        rows: (N,) int64, the indices of this split's rows.
        spec: shape and range of the values.
        labels: (N,) int64, −1 if a row has none; or None.
        device: device of the batches.
    """

    values: Tensor
    rows: Tensor
    spec: DataSpec
    labels: Tensor | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, units: Units, generator: torch.Generator | None = None) -> Tensor:
        """Gather the rows `index` (B,) of this split as x (B, *shape) on `device`.

        Binarization draws from `generator`, or from torch's global generator.
        """
        rows = self.rows[index].to(self.values.device)
        values = self.values.index_select(0, rows).to(self.device)
        of_bytes = values.dtype == torch.uint8 and values.device.type == "cpu"
        if of_bytes and generator is None and self.spec.binarizes(units) and self.spec.bound < 256:
            return binarize(values, self.spec.bound)
        return self.spec.to_units(values, units, generator)

    @cached_property
    def labelled(self) -> Tensor:
        """The rows of this split whose label is known: their indices, int64."""
        if self.labels is None:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        return (self.labels >= 0).nonzero().flatten()

    def labels_of(self, index: Tensor | slice) -> Tensor | None:
        """The labels of the rows `index` (B,) on `device`, or None."""
        return None if self.labels is None else self.labels[index].to(self.device)

    def fixed(self, units: Units, seed: int, num_images: int | None = None) -> Iterator[Tensor]:
        """Iterate over all rows, or the first `num_images`, in order: x (≤ CHUNK, *shape).

        The draws of a binarization depend on `seed` alone.
        """
        generator = torch.Generator().manual_seed(seed)
        for rows in self.rows[:num_images].split(CHUNK):
            values = self.values[rows.to(self.values.device)].cpu()
            yield self.spec.to_units(values, units, generator).to(self.device)

    def fixed_with_labels(
        self, units: Units, seed: int, num_images: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`fixed`, and the labels of the same rows: (≤ CHUNK,) on `device`, or None."""
        done = 0
        for x in self.fixed(units, seed, num_images):
            yield x, self.labels_of(slice(done, done + len(x)))
            done += len(x)


@dataclass(frozen=True)
class Splits:
    """Train, validation and test split of one data set.

    Attributes:
        name: name of the data.
        spec: shape and range of the values.
        likelihood: name of the default likelihood.
        class_names: the name of each label, or empty.
        low, high: the smallest and the largest value.
        integral: whether all values are integers.
        fingerprint: a digest of all values, which identifies the data.
        missing: share of the values that are missing.
        found: how the columns of a table or the arrays of a file were read, or empty.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    spec: DataSpec
    likelihood: str
    class_names: tuple[str, ...]
    low: float
    high: float
    integral: bool
    fingerprint: str
    missing: float = 0.0
    found: str = ""

    def describe(self) -> str:
        """Type and range of the values, for example "integers from 0 to 16"."""
        share = f", {100 * self.missing:.3g}% missing, assumed missing at random"
        share = share if self.missing else ""
        if self.spec.kinds:
            names = [kind.name for kind in self.spec.kinds]
            counts = [f"{names.count(name)} {name}" for name in dict.fromkeys(names)]
            return ", ".join(counts) + share
        kind = "integers" if self.integral else "real values"
        return f"{kind} from {interval(self.low, self.high)}{share}"

    def whole(self) -> Split:
        """All rows in the order of the data, as one split."""
        parts = (self.train, self.validation, self.test)
        rows, order = torch.cat([part.rows for part in parts]).sort()
        labels = None
        if self.train.labels is not None:
            labels = torch.cat([part.labels for part in parts if part.labels is not None])[order]
        return dataclasses.replace(self.train, rows=rows, labels=labels)

    def to(self, device: torch.device | str) -> Splits:
        """The same splits with batches on `device`.

        The stored rows move there too, unless they are larger than 2 GiB.
        """
        device = torch.device(device)
        values = self.train.values
        if values.nbytes <= 2 * 1024**3:
            values = values.to(device)
        parts: dict[str, Any] = {
            name: dataclasses.replace(getattr(self, name), values=values, device=device)
            for name in ("train", "validation", "test")
        }
        return dataclasses.replace(self, **parts)


def interval(low: float, high: float) -> str:
    """ "0.00019 to 1.0000001": with as many digits as tell both apart, and from integers."""
    pair = (low, high)
    for digits in (6, 9, 12, 17):
        texts = [f"{value:.{digits}g}" for value in pair]
        whole = [float(text).is_integer() for text in texts]
        if whole == [value.is_integer() for value in pair] and (
            low == high or texts[0] != texts[1]
        ):
            break
    return " to ".join(texts)


def moments(split: Split, units: Units, num_images: int = 50_000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a split's x, before any binarization.

    Args:
        split: the training split.
        units: the units of x.
        num_images: number of rows to read, at least. From a split of twice as many or more, evenly
            spaced rows are read.

    Returns:
        mean (*shape); standard deviation (*scale_shape), 1 for a constant column. Missing values do
        not count. A pixel that is never observed has the mean of the others.
    """
    lacking = split.spec.missing
    step = 1 if lacking else max(1, len(split) // num_images)
    sample = dataclasses.replace(split, rows=split.rows[::step], device=torch.device("cpu"))
    intensity: Units = "unit" if units == "binary" else units

    def average(function: Callable[[Tensor], Tensor]) -> Tensor:
        total = count = torch.zeros((), dtype=torch.float64, device="cpu")
        for x in sample.fixed(intensity, seed=0):
            values = function(x.to(torch.float64))
            total = total + (values.nan_to_num(0.0) if lacking else values).sum(0)
            if lacking:
                count = count + (~x.isnan()).sum(0)
        return total / (count if lacking else len(sample))  # NaN if never observed

    size = split.spec.scale_shape

    def over_places(values: Tensor) -> Tensor:
        """Means over the places of an image, volume or channel."""
        if split.spec.is_table:
            return values
        flat = values.reshape(*size, -1)
        return (flat.nanmean(-1) if lacking else flat.mean(-1)).reshape(size)

    mean = average(lambda x: x)
    # A second pass, because the difference of two large sums would lose a small variance.
    centre = over_places(mean)
    variance = over_places(average(lambda x: (x - centre).square()))
    mean = torch.where(mean.isnan(), centre, mean) if lacking else mean
    # A constant column has a variance below the rounding error of float32.
    varies = variance > 1e-14 * centre.square()
    std = torch.where(varies, variance.sqrt(), torch.ones_like(variance))
    return mean.to(torch.float32), std.to(torch.float32)
