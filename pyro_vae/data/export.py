"""x of a table → a CSV file like the data: names, units, categories as text, counts as integers.

The inverse of reading: a table that is read and written has the same cells, up to the spelling of
numbers (2.0 is written as 2).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..config.columns import COUNTS
from ..files import write_atomically
from .splits import DataSpec, Units


def table_rows(spec: DataSpec, x: Tensor, units: Units) -> list[list[str]]:
    """The cells of a table, without its names.

    Args:
        spec: of the data, a table.
        x: (N, D) in `units`; NaN is written as an empty cell. A mean of codes or counts is rounded
            to the nearest.
        units: of the likelihood.
    """
    values = spec.from_units(x, units).cpu().numpy()
    columns = []
    for j in range(values.shape[1]):
        write = _writer(spec, j, values.dtype)
        columns.append(["" if np.isnan(value) else write(value) for value in values[:, j]])
    return [list(row) for row in zip(*columns, strict=True)]


def write_table(spec: DataSpec, x: Tensor, units: Units, path: Path) -> None:
    """Write x (N, D) as a CSV file with the names of the columns, if it has them. See `table_rows`.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if spec.columns:
        writer.writerow(spec.columns)
    writer.writerows(table_rows(spec, x, units))
    write_atomically(path, text.getvalue().encode())


def _writer(spec: DataSpec, column: int, dtype: np.dtype) -> Callable[[float], str]:
    """The text of a value of a column."""
    kind = spec.kinds[column] if spec.kinds else None
    if kind is not None and kind.categories:
        categories: Sequence[str] = kind.categories
        return lambda code: categories[int(min(max(np.rint(code), 0), len(categories) - 1))]
    if spec.discrete or (kind is not None and kind.name in COUNTS):
        return lambda value: str(int(np.rint(value)))

    def shortest(value: float) -> str:
        """As few digits as tell the value from others of its type."""
        text = np.format_float_positional(value, trim="-")
        return text if len(text) <= 16 else np.format_float_scientific(value, trim="-")

    return shortest
