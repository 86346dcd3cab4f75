"""Offset and scale of the columns whose spread float32 would lose.

    x = (value - offset) / scale, computed in float64

The median of a column is its offset if it is more than `FAR` times the spread away from zero. Its
scale is a power of ten if the spread is not within 1/`WIDE` and `WIDE`, where squares leave the
range of float32. All other columns keep offset 0 and scale 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ..config import InputError

# Rounding to float32 moves a value by at most 6e-8 of its size: here by 6e-4 of the spread.
FAR = 1e4
WIDE = 1e12

# Distinct values that a spread must hold beyond the largest exact integer of the data's type.
STEPS = 100

Numbers = tuple[float, ...]


def offset_and_scale(
    sample: np.ndarray, columns: Sequence[str], name: str
) -> tuple[Numbers, Numbers] | None:
    """Offset and scale of each column.

    Args:
        sample: (M, K), rows in the type in which the data are stored.
        columns: the names of the K columns, or empty.
        name: name of the data in messages.

    Returns:
        K offsets and K scales; None if no column needs them.

    Raises:
        InputError: the type of the data, or float64, cannot hold the spread of a column.
    """
    quarter = len(sample) // 4
    ranks = [quarter, len(sample) // 2, len(sample) - 1 - quarter]
    lower, middle, upper = np.partition(sample, ranks, axis=0)[ranks]
    whole = _difference(sample.max(0), sample.min(0))
    centre = middle.astype(np.float64)
    spread = _difference(upper, lower) / 1.35  # the standard deviation of a normal distribution
    for missing in (_deviation(sample, centre), whole):
        spread = np.where(spread > 0, spread, missing)
    small = sample.dtype.kind == "f" and sample.dtype.itemsize <= 8
    dtype = sample.dtype if small else np.dtype(np.float64)
    step = np.spacing(np.abs(centre).astype(dtype)).astype(np.float64)
    size, constant = np.abs(centre), whole == 0
    exact = size < 2.0 ** (np.finfo(dtype).nmant + 1)
    lost = ~constant & ~exact & (spread < STEPS * step)
    if lost.any():
        column = int(lost.argmax())
        raise InputError(
            f"{column_name(columns, column)} of {name} varies by {spread[column]:.2g} around "
            f"{centre[column]:.17g}, which {dtype.name} cannot hold: subtract its first value from "
            f"it where it is still exact, or drop it"
        )
    # A computed constant, such as a sum of shares, differs in its last bits.
    rounding = ~constant & exact & (whole <= 8 * step) & (sample.dtype.kind == "f")
    rounding = rounding & (sample != np.rint(sample)).any(0) if rounding.any() else rounding
    if rounding.any():
        where = column_name(columns, int(rounding.argmax()))
        message = f"{where} of {name} is read as constant: it varies by rounding errors only"
        warnings.warn(message, stacklevel=2)
    offset = np.where(
        np.where(constant, (size > FAR) | (size < 1 / WIDE), size / FAR > spread) & ~rounding,
        centre,
        0.0,
    )
    unit = np.where(constant | (rounding & (size == 0)), 1.0, np.where(rounding, size, spread))
    ordinary = (unit >= 1 / WIDE) & (unit <= WIDE)
    exponent = np.floor(np.log10(np.where(ordinary, 1.0, unit)))
    scale = np.where(ordinary, 1.0, np.power(10.0, exponent))
    if not offset.any() and (scale == 1).all():
        return None
    return tuple(offset.tolist()), tuple(scale.tolist())


def _difference(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """upper - lower ≥ 0, without overflow of integers, as float64."""
    if upper.dtype.kind in "iu":  # exact modulo 2^64
        return (upper.astype(np.uint64) - lower.astype(np.uint64)).astype(np.float64)
    wide = np.promote_types(upper.dtype, np.float64)
    return (upper.astype(wide) - lower.astype(wide)).astype(np.float64)


def _deviation(sample: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Root of the mean square deviation from `centre`, without overflow of squares."""
    deviation = np.abs(sample.astype(np.float64) - centre)
    largest = deviation.max(0)
    size = np.where(largest > 0, largest, 1.0)
    return largest * np.sqrt(np.mean((deviation / size) ** 2, axis=0))


def column_name(columns: Sequence[str], index: int) -> str:
    """A column in messages: its name, or its position."""
    if not columns:
        return f"column {index} (counted from 0)"
    name = columns[index]
    return f"column {name if len(name) <= 40 else name[:37] + '...'}"
