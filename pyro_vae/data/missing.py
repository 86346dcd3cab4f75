"""Missing values: NaN in arrays, blanks in tables.

With `--missing model`, a row x is a tensor in which NaN marks a missing value. The model observes
the others, and log p(x) is log p(x_observed). This assumes that values are missing at random:
whether one is missing may depend on the observed values, not on the missing ones.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import InputError
from .precision import column_name
from .source import Source

# Cells of a table that mark a missing value, as pandas reads them
MARKS = {"", "#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a"}
MARKS |= {"nan", "null"}

# Rows that are checked together
ROWS = 2048

REMEDY = "impute missing values, or model them by --missing model"


def as_numbers(values: Any) -> np.ndarray:
    """Numbers, None and the missing values of pandas, polars or numpy → float64 with NaN.

    Raises:
        TypeError, ValueError: a value is no number.
    """
    if any(isinstance(value, str) for value in np.asarray(values).flat):
        raise TypeError("expected numbers; got text")
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.filled(values.astype(np.float64), np.nan)
    if hasattr(values, "isna"):  # a pandas Series, whose NA is not None
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.asarray(values, dtype=np.float64)  # None becomes NaN


def check_observed(source: Source) -> None:
    """Check that each row has an observed value.

    Raises:
        InputError: one has none.
    """
    if source.values.dtype.kind != "f":
        return
    parts = (source.values[i : i + ROWS] for i in range(0, len(source.values), ROWS))
    empty = np.flatnonzero(np.concatenate([np.isnan(x).reshape(len(x), -1).all(1) for x in parts]))
    if len(empty):
        arrays = " (of all arrays in order)" if source.num_test or source.num_validation else ""
        raise InputError(
            f"{source.name} holds {len(empty)} row{'s' * (len(empty) > 1)} without any observed "
            f"value, the first is row {empty[0]}{arrays} (counted from 0): drop them"
        )


def check_columns_observed(source: Source, train: Tensor) -> None:
    """Check that the training rows hold values of each column or channel; note unobserved pixels.

    Args:
        train: (N,) the indices of the training rows.

    Raises:
        InputError: a column or channel has no observed value in them.
    """
    if source.values.dtype.kind != "f":
        return
    seen = np.zeros(source.values.shape[1:], bool)
    for rows in train.split(ROWS):
        seen |= ~np.isnan(source.values[rows.numpy()]).all(0)
        if seen.all():
            return
    # Columns of a table, channels of others
    unseen = np.flatnonzero(~seen.reshape(len(seen), -1).any(1))
    if len(unseen):
        where = column_name(source.columns, int(unseen[0]))
        if source.values.ndim > 2:
            where = where.replace("column", "channel")
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise InputError(
            f"{where}{more} of {source.name} has no observed value in the training rows: drop it"
        )
    what = {3: "steps", 4: "pixels"}.get(source.values.ndim, "voxels")
    warnings.warn(
        f"{(~seen).sum()} of {seen.size} {what} of {source.name} have no observed value in the "
        f"training rows: what the model says of them means nothing",
        stacklevel=3,
    )


def without_missing(sample: np.ndarray, values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """A sample (M, D) in which observed values of the same column take the place of NaN.

    They are repeated in their order, so that quantiles and spread are those of observed values.

    Args:
        values: (N, D), or (N, D, *places), all rows.
        train: the indices of the training rows, which hold values of each column.
    """
    filled = sample.copy()
    for column in np.flatnonzero(np.isnan(sample).any(0)):
        known = sample[:, column][~np.isnan(sample[:, column])]
        if not len(known):  # a column that is rarely observed
            known = values[train, column]
            known = known[~np.isnan(known)]
        filled[:, column] = np.resize(known, len(sample))
    return filled


def hidden_as(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, *data_shape) without the values that are missing in rows (B, *data_shape)."""
    return torch.where(rows.isnan(), torch.nan, x)


def hidden_at_random(x: Tensor, rows: Tensor | None) -> Tensor:
    """x (B, *data_shape) in which each row lacks the values that one of `rows` lacks.

    Rows simulated from a model so resemble those of its data. The pattern of a row is drawn from
    `rows` (N, *data_shape), with torch's global random state, and does not depend on x: values are
    then missing completely at random. Without `rows`, or if they lack no value, x is unchanged.
    """
    if rows is None or not rows.isnan().any():
        return x
    return hidden_as(x, rows[torch.randint(len(rows), (len(x),), device=rows.device)])
