"""Rows → `Splits`: train, validation and test, ready to be gathered by the batch.

A likelihood observes x in certain *units*; a batch is gathered from the one stored tensor,
scaled and, where need be, binarized as a whole:

    binary   x ~ Bernoulli(value / max_value), drawn afresh at each access
    unit     value / max_value, in [0, 1]
    count    the value itself, an integer from 0 to max_value
    real     value / max_value where the data are bounded, else the value itself

Evaluation uses one binarization, fixed by a seed (`Split.fixed`), on every device the same. The
test split is carved off first and serves no choice; validation is carved from the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, InputError
from .sources import Source, read

__all__ = ["DataSpec", "Split", "Splits", "Units", "load_data", "load_foreign", "moments"]

Units = Literal["binary", "unit", "count", "real"]

# Rows handled at once where a whole split is read. Fixed, because the draws of a seeded
# binarization depend on it.
CHUNK = 512


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know of its data.

    Attributes:
        shape: shape of one row: (C, H, W) for images, (D,) for tables.
        max_value: the largest value that the data can take; None where they are unbounded.
        discrete: whether the values are the integers from 0 to `max_value`.
    """

    shape: tuple[int, ...]
    max_value: int | None
    discrete: bool

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def row(self) -> str:
        """The word for a datum in titles and messages."""
        return "image" if self.is_image else "row"

    @property
    def bound(self) -> int:
        """`max_value`, where the data are bounded.

        Raises:
            ValueError: they are not.
        """
        if self.max_value is None:
            raise ValueError(f"expected bounded data; got {self}")
        return self.max_value

    @property
    def is_binary(self) -> bool:
        return self.discrete and self.max_value == 1

    def binarizes(self, units: Units) -> bool:
        """Whether x in `units` is drawn from the values rather than computed."""
        return units == "binary" and not self.is_binary

    def to_units(
        self, values: Tensor, units: Units, generator: torch.Generator | None = None
    ) -> Tensor:
        """Stored values (B, *shape) → x (B, *shape), float32, in `units`; binarized where asked."""
        x = values.to(torch.float32)
        if units != "count" and self.max_value not in (None, 1):
            x = x / self.bound
        if self.binarizes(units):
            # Comparing uniforms takes half the time of torch.bernoulli, which draws doubles.
            uniform = torch.rand(x.shape, generator=generator, device=x.device)
            x = torch.gt(x, uniform, out=uniform)  # 1.0 or 0.0, in one pass
        return x

    def from_units(self, x: Tensor, units: Units) -> Tensor:
        """x in `units` → values as they are stored: the inverse of `to_units`."""
        return x if units == "count" or self.max_value is None else x * self.max_value


@dataclass(frozen=True)
class Split:
    """Some rows of the data.

    Attributes:
        values: (M, *shape), the stored rows, shared by all splits.
        rows: (N,) int64, which of them are this split's.
        spec: what the values mean.
        labels: (N,) int64, or None.
        device: where batches are delivered.
    """

    values: Tensor
    rows: Tensor
    spec: DataSpec
    labels: Tensor | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, units: Units, generator: torch.Generator | None = None) -> Tensor:
        """The rows `index` (B,) of this split as x (B, *shape) on `device`.

        Binarization draws from `generator`, or from torch's global one.
        """
        values = self.values[self.rows[index].to(self.values.device)]
        return self.spec.to_units(values.to(self.device), units, generator)

    def fixed(self, units: Units, seed: int, num_images: int | None = None) -> Iterator[Tensor]:
        """All rows, or the first `num_images`, in order, as batches x (≤ CHUNK, *shape).

        Where they are binarized, the draws are fixed by `seed` alone.
        """
        generator = torch.Generator().manual_seed(seed)
        for rows in self.rows[:num_images].split(CHUNK):
            values = self.values[rows.to(self.values.device)].cpu()
            yield self.spec.to_units(values, units, generator).to(self.device)


@dataclass(frozen=True)
class Splits:
    """Train, validation and test split of one data set.

    Attributes:
        name: how to call the data.
        spec: what the values mean.
        likelihood: name of the default likelihood.
        class_names: the name of each label, or empty.
        low, high: the least and the largest value.
        integral: whether all values are integers.
        fingerprint: a digest of all rows, to recognize the data by.
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

    def describe(self) -> str:
        """The values in words, as "integers from 0 to 16"."""
        kind = "integers" if self.integral else "real values"
        return f"{kind} from {self.low:g} to {self.high:g}"

    def whole(self) -> Split:
        """All rows in the order of the data, as one split."""
        parts = (self.train, self.validation, self.test)
        rows, order = torch.cat([part.rows for part in parts]).sort()
        labels = None
        if self.train.labels is not None:
            labels = torch.cat([part.labels for part in parts if part.labels is not None])[order]
        return dataclasses.replace(self.train, rows=rows, labels=labels)

    def to(self, device: torch.device | str) -> Splits:
        """The same splits, delivering batches on `device`.

        The stored rows move there too, unless they are larger than 2 GiB, as a memory-mapped file
        may be.
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


def load_data(config: DataConfig | str = DataConfig(), seed: int = 0) -> Splits:  # noqa: B008
    """Read data and carve their splits.

    Args:
        config: which data; a plain name or path stands for `DataConfig(source=...)`.
        seed: chooses the rows of the validation split, and of the test split where the data
            have none of their own.

    Raises:
        InputError: the data are missing, damaged, hold values that are not finite, or are too few.
    """
    if isinstance(config, str):
        config = DataConfig(source=config)
    source = read(config)
    scan = _scan(source)
    spec = _spec(source, config.max_value, scan)
    total = len(source.values)
    if total < 3:
        raise InputError(
            f"{source.name} has {total} row{'s' * (total > 1)}; training, validation and test need "
            f"one each at least"
        )
    shuffle = torch.Generator().manual_seed(seed)
    if source.num_test:
        test = torch.arange(total - source.num_test, total)
        rest = torch.randperm(total - source.num_test, generator=shuffle)
        if config.test_size is not None:
            raise InputError(
                f"--test-size has no effect on {source.name}, which brings its own test split of "
                f"{source.num_test} rows; drop it"
            )
    else:
        order = torch.randperm(total, generator=shuffle)
        size = config.test_size or max(1, total // 10)
        test, rest = order[:size].sort().values, order[size:]
    size = config.validation_size or min(5000, max(1, len(rest) // 10))
    if size >= len(rest):
        raise InputError(
            f"{source.name} has {total} rows, {len(test)} of them for testing: {size} rows for "
            f"validation leave none to train on; lower --validation-size or --test-size"
        )
    train, validation = rest[size:].sort().values, rest[:size].sort().values
    return _splits(source, scan, spec, train, validation, test)


def load_foreign(config: DataConfig, spec: DataSpec, units: Units) -> Splits:
    """Read data for a model that was trained on others: every row is a test row.

    Args:
        config: which data.
        spec: of the data that the model was trained on, on whose terms these are read.
        units: the units in which the model observes x.

    Raises:
        InputError: the data are missing, damaged, or not of the kind that the model expects.
    """
    source = read(config)
    scan = _scan(source)
    none = torch.arange(0)
    splits = _splits(source, scan, spec, none, none, torch.arange(len(source.values)))
    bounded = spec.max_value is not None and units != "real"
    if (
        source.values.shape[1:] != spec.shape
        or (bounded and not 0 <= scan.low <= scan.high <= spec.bound)
        or (spec.discrete and units == "count" and not scan.integral)
    ):
        kind = "integers" if spec.discrete else "values"
        limits = f" from 0 to {spec.max_value}" if bounded else ""
        raise InputError(
            f"the model expects {kind}{limits} of shape {spec.shape}; {source.name} holds "
            f"{splits.describe()} of shape {source.values.shape[1:]}"
        )
    return splits


def _splits(
    source: Source, scan: _Scan, spec: DataSpec, train: Tensor, validation: Tensor, test: Tensor
) -> Splits:
    values = _tensor(source.values)
    labels = None if source.labels is None else torch.from_numpy(source.labels)

    def split(rows: Tensor) -> Split:
        return Split(values, rows, spec, None if labels is None else labels[rows])

    return Splits(
        name=source.name,
        train=split(train),
        validation=split(validation),
        test=split(test),
        spec=spec,
        likelihood=source.likelihood or _default_likelihood(spec),
        class_names=source.class_names,
        low=scan.low,
        high=scan.high,
        integral=scan.integral,
        fingerprint=scan.digest,
    )


def moments(split: Split, units: Units, num_images: int = 50_000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the split's data, before any binarization.

    Args:
        split: the training split.
        units: the units in which x is observed.
        num_images: of longer splits evenly spaced rows are read, at least so many and fewer than
            twice as many.

    Returns:
        mean (*shape); standard deviation (): one number for images; (D,) for tables, whose columns
        may have units of their own. Where nothing varies it is 1.
    """
    step = max(1, len(split) // num_images)
    sample = dataclasses.replace(split, rows=split.rows[::step], device=torch.device("cpu"))
    intensity: Units = "unit" if units == "binary" else units

    def average(function: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x in sample.fixed(intensity, seed=0):
            total = total + function(x.to(torch.float64)).sum(0)
        return total / len(sample)

    mean = average(lambda x: x)
    # Around the mean, in a second pass: the difference of two large sums would lose a small spread.
    centre = mean.mean() if split.spec.is_image else mean
    variance = average(lambda x: (x - centre).square())
    if split.spec.is_image:
        variance = variance.mean()
    # Less than the rounding of a float32: the column is constant.
    varies = variance > 1e-14 * centre.square()
    std = torch.where(varies, variance.sqrt(), torch.ones_like(variance))
    return mean.to(torch.float32), std.to(torch.float32)


@dataclass(frozen=True)
class _Scan:
    """What one pass over all values tells."""

    low: float
    high: float
    integral: bool
    digest: str


def _scan(source: Source) -> _Scan:
    low, high, integral, bad = np.inf, -np.inf, True, 0
    first: tuple[int, ...] = ()
    digest = hashlib.blake2b(repr((source.values.shape, str(source.values.dtype))).encode())
    for start in range(0, len(source.values), 4 * CHUNK):
        chunk = np.ascontiguousarray(source.values[start : start + 4 * CHUNK])
        digest.update(chunk.tobytes())
        if chunk.dtype.kind == "f":
            with np.errstate(over="ignore"):  # models compute in single precision
                wrong = ~np.isfinite(chunk.astype(np.float32))
            if wrong.any():
                if not bad:
                    row, *place = np.argwhere(wrong)[0].tolist()
                    first = (start + row, *place)
                bad += int(wrong.sum())
                continue
            integral = integral and bool((chunk == np.rint(chunk)).all())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    if bad:
        raise InputError(
            f"{source.name} holds {bad} value{'s' * (bad > 1)} that are NaN, infinite or beyond "
            f"3e38, the first in row {first[0]} at {first[1:]} (counted from 0); remove or impute "
            f"them"
        )
    return _Scan(low, high, integral, digest.hexdigest())


def _spec(source: Source, max_value: int | None, scan: _Scan) -> DataSpec:
    low, high, integral = scan.low, scan.high, scan.integral
    limit = max_value or source.max_value
    if limit is not None and not 0 <= low <= high <= limit:
        raise InputError(
            f"--max-value {limit} expects values from 0 to {limit}; {source.name} ranges from "
            f"{low:g} to {high:g}"
        )
    if limit is None and integral and low >= 0 and 1 < high <= 255:
        # uint8 is the type of 8-bit images, whatever the largest value that happens to occur.
        limit = 255 if source.values.dtype == np.uint8 else int(high)
    if limit is None and low >= 0 and high <= 1:
        limit = 1
    return DataSpec(tuple(source.values.shape[1:]), limit, discrete=integral and limit is not None)


def _default_likelihood(spec: DataSpec) -> str:
    if spec.max_value is None:
        return "gaussian"
    if not spec.discrete:
        return "continuous-bernoulli"
    if spec.max_value == 1:
        return "bernoulli"
    return "binomial" if spec.max_value < 255 else "discretized-logistic"


def _tensor(values: np.ndarray) -> Tensor:
    """One uint8 or float tensor over the same memory where torch can index the type."""
    if values.dtype == bool:
        values = values.view(np.uint8)
    if isinstance(values, np.memmap) and values.dtype in (np.uint8, np.float32, np.float64):
        return torch.from_numpy(values)
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.uint8))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
