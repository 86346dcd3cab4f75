"""One pass over all values, and the range and precision of the data that follow from it.

scan        range, type, fingerprint; infinities are errors, and NaN unless values may be missing
spec        largest possible value, or offset and scale of unbounded data, from the training rows
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import InputError
from .missing import REMEDY, check_columns_observed, check_observed, without_missing
from .precision import column_name, offset_and_scale
from .source import Source
from .splits import CHUNK, DataSpec, interval

# The largest integer up to which float32 holds all, and a value that no float64 column may exceed,
# since differences must be finite.
MAX_COUNT = 2**24
MAX_VALUE = 1e307
FLOAT32_MAX = float(np.finfo(np.float32).max)

# A value this many times as far from the median as three quarters of all is noted.
EXTREME = 1e6

# Values read at most to choose offset and scale.
SAMPLED_VALUES = 2**22

# Data whose values all are below this may be real values of a small unit, not parts of 1.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Scan:
    """The results of one pass over all values, as attributes of `Splits`."""

    low: float
    high: float
    integral: bool
    fingerprint: str
    missing: float = 0.0

    def describe(self) -> str:
        """Type and range of the values, for example "integers from 0 to 16"."""
        kind = "integers" if self.integral else "real values"
        return f"{kind} from {interval(self.low, self.high)}"


def scan_values(source: Source, missing: bool = False) -> Scan:
    """Scan all values.

    Args:
        missing: whether NaN marks a missing value, which is left out. Each row must then hold an
            observed one.

    Raises:
        InputError: a value is not finite or missing, or a row holds none.
    """
    low, high, integral, bad, absent = np.inf, -np.inf, True, 0, 0
    first: tuple[int, ...] = ()
    digest = hashlib.blake2b(repr((source.values.shape, str(source.values.dtype))).encode())
    if missing:
        check_observed(source)
    for start, chunk in _chunks(source.values):
        digest.update(chunk.tobytes())
        if chunk.dtype.kind == "f":
            wrong = ~(np.abs(chunk) <= min(MAX_VALUE, float(np.finfo(chunk.dtype).max)))
            unknown = np.isnan(chunk) & missing
            absent += int(unknown.sum())
            wrong &= ~unknown
            if wrong.any():
                first = first or _place(wrong, start)
                bad += int(wrong.sum())
                continue
            chunk = chunk[~unknown] if unknown.any() else chunk
            integral = integral and bool((chunk == np.rint(chunk)).all())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    if bad:
        raise _not_usable(source, bad, first, "1e307", missing)
    if source.values.dtype.kind == "f" and max(-low, high) > 2**53:
        integral = False  # all numbers of this size are integers in float64
    return Scan(low, high, integral, digest.hexdigest(), absent / source.values.size)


def _chunks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The rows in order, and the index of the first row of each chunk."""
    for start in range(0, len(values), 4 * CHUNK):
        yield start, np.ascontiguousarray(values[start : start + 4 * CHUNK])


def _place(wrong: np.ndarray, start: int) -> tuple[int, ...]:
    """Index of the first true value, whose row is counted from `start`."""
    row, *place = np.argwhere(wrong)[0].tolist()
    return (start + row, *place)


def _not_usable(
    source: Source, count: int, first: tuple[int, ...], limit: str, missing: bool
) -> InputError:
    column = f", {column_name(source.columns, first[1])}" if source.columns else ""
    arrays = " (of all arrays in order)" if source.num_test or source.num_validation else ""
    place = f"row {first[0]}{arrays} at {first[1:]}"
    axes = " (channel, row, column of pixels)" if len(first) == 4 else ""
    return InputError(
        f"{source.name} holds {count} value{'s' * (count > 1)} that are {'NaN, ' * (not missing)}"
        f"infinite or beyond {limit}, the first in {place}{axes}{column} (counted from 0); "
        f"remove them, or {'make them NaN if they are missing' if missing else REMEDY}"
    )


def check_float32(source: Source, spec: DataSpec) -> None:
    """Check that x is finite in float32.

    Raises:
        InputError: a value is too far from the others.
    """
    bad = 0
    first: tuple[int, ...] = ()
    for start, chunk in _chunks(source.values):
        x = spec.to_units(torch.from_numpy(chunk.astype(np.float64)), "real")
        wrong = ~torch.isfinite(x).numpy() & ~np.isnan(chunk)
        if wrong.any():
            first = first or _place(wrong, start)
            bad += int(wrong.sum())
    if bad:
        beyond = "3e38" if spec.offset is None else "3e38 times the scale of their column"
        raise _not_usable(source, bad, first, beyond, spec.missing)


def choose_spec(
    source: Source, max_value: int | None, scan: Scan, train: Tensor, missing: bool = False
) -> DataSpec:
    """Shape, range, offset and scale of the data, the latter two from the training rows.

    `missing`: whether values may be missing, now or in other data for the model.
    """
    if missing:
        _check_missing(source, scan, train)
    if source.kinds:
        return _spec_of_kinds(source, max_value, train, missing)
    low, high, integral = scan.low, scan.high, scan.integral
    limit = max_value or source.max_value
    if limit is not None and not 0 <= low <= high <= limit:
        raise InputError(
            f"--max-value {limit} expects values from 0 to {limit}; {source.name} ranges from "
            f"{interval(low, high)}"
        )
    if limit is not None and limit > MAX_COUNT:
        raise InputError(
            f"--max-value expects at most {MAX_COUNT}, up to which float32 holds all integers; got "
            f"{limit}. Drop it: the data are then real values"
        )
    if limit is None and integral and low >= 0 and 1 < high <= 255:
        # uint8 is the type of 8-bit images, even if their largest value is below 255.
        limit = 255 if source.values.dtype == np.uint8 else int(high)
    if limit is None and integral and low >= 0 and high <= 1:
        limit = 1
    shares = limit is None and low >= 0 and LEAST_SHARE < high <= 1
    units, sample = None, np.empty((0, 0))
    if not integral or limit is None:
        sample = _sample(source, train)
        units = offset_and_scale(sample, source.columns, source.name)
    # Values that float32 would lose are no shares, but a column with a small spread may be one.
    if shares and (units is None or not any(units[0])):
        limit, units = 1, None
    if limit is not None and units is not None and any(units[0]):
        column = int(np.flatnonzero(units[0])[0])
        where = column_name(source.columns, column) + " of " if source.values.ndim == 2 else ""
        raise InputError(
            f"--max-value {limit}: float32 loses the spread of {where}{source.name} in a range of "
            f"0 to {limit}; drop the flag"
        )
    offset, scale = (None, None) if limit is not None or units is None else units
    if limit is None:
        _note_extreme(sample, source)
    return DataSpec(
        tuple(source.values.shape[1:]),
        limit,
        discrete=integral and limit is not None,
        columns=source.columns,
        offset=offset,
        scale=scale,
        missing=missing,
    )


def _check_missing(source: Source, scan: Scan, train: Tensor) -> None:
    """Check that each column has values in the training rows; note that no value is missing."""
    check_columns_observed(source, train)
    if not scan.missing:
        warnings.warn(
            f"--missing model: no value of {source.name} is missing. The encoder learns from "
            f"complete rows only; other numbers that mark missing values must be made NaN",
            stacklevel=4,
        )


def _spec_of_kinds(source: Source, max_value: int | None, train: Tensor, missing: bool) -> DataSpec:
    """Of a table with a kind for each column. Only real columns have an offset or a scale."""
    if max_value is not None:
        raise InputError(
            f"--max-value has no effect on {source.name}, whose columns have a kind each; drop it"
        )
    found = offset_and_scale(_sample(source, train), source.columns, source.name)
    offset, scale = ([0.0] * len(source.kinds), [1.0] * len(source.kinds))
    for j, kind in enumerate(source.kinds if found else ()):
        if kind.name in ("gaussian", "student-t"):
            offset[j] = found[0][j]  # type: ignore[index]
        if not kind.is_discrete:
            scale[j] = found[1][j]  # type: ignore[index]
    needed = any(offset) or set(scale) != {1.0}
    return DataSpec(
        tuple(source.values.shape[1:]),
        None,
        discrete=False,
        columns=source.columns,
        offset=tuple(offset) if needed else None,
        scale=tuple(scale) if needed else None,
        missing=missing,
        kinds=source.kinds,
    )


def _note_extreme(sample: np.ndarray, source: Source) -> None:
    """Warn of values so far out that they decide the standard deviation of their column."""
    values = sample.astype(np.float64)
    distance = np.abs(values - np.median(values, axis=0))
    usual = np.quantile(distance, 0.75, axis=0)
    with np.errstate(over="ignore"):  # infinite is far as well
        ratio = (distance / np.where(usual > 0, usual, np.inf)).max(0)
    column = int(ratio.argmax())
    if not ratio[column] > EXTREME:
        return
    value = values[distance[:, column].argmax(), column]
    found = ((chunk == value, start) for start, chunk in _chunks(source.values))
    place = next(_place(equal, start) for equal, start in found if equal.any())
    where = column_name(source.columns, column) if source.values.ndim == 2 else f"at {place[1:]}"
    warnings.warn(
        f"row {place[0]} of {source.name} (counted from 0) holds {value:g} in {where}, "
        f"{ratio[column]:.0e} times as far from the median as most values. Such values decide "
        f"the standard deviation, by which the model scales its input: check them",
        stacklevel=4,
    )


def _sample(source: Source, train: Tensor) -> np.ndarray:
    """Training rows at even distances, as columns (M, D), or (M, 1) for images.

    Each channel of a sequence is a column.
    """
    step = max(1, len(train) * math.prod(source.values.shape[1:]) // SAMPLED_VALUES)
    rows = source.values[train[::step].numpy()]
    if rows.ndim == 3:
        rows = rows.swapaxes(1, 2).reshape(-1, rows.shape[1])
    rows = rows.reshape(-1, 1) if rows.ndim > 3 else rows
    if rows.dtype.kind != "f" or not np.isnan(rows).any():
        return rows
    return without_missing(rows, source.values, train.numpy())
