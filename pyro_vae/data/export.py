"""Values of a table → the text of a CSV file: names, units, categories, counts as integers.

The inverse of reading: a table that is read and written has the same cells, up to the spelling of
numbers (2.0 is written as 2).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

import numpy as np

from .splits import DataSpec


def table_text(spec: DataSpec, values: np.ndarray, labels: Sequence[str] | None = None) -> str:
    """A table as CSV, with the names of its columns if it has them.

    Args:
        spec: of the data, a table.
        values: (N, D) as they are stored, see `DataSpec.from_units`. NaN is written as an empty
            cell, and codes, counts and integers are rounded: means are none.
        labels: of the rows, for a last column label; None if there are none.
    """
    values = rounded(spec, values)
    writers = [_writer(spec, column) for column in range(values.shape[1])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if spec.columns:
        writer.writerow([*spec.columns, *["label"] * (labels is not None)])
    for i, row in enumerate(values):
        cells = ["" if np.isnan(v) else write(v) for v, write in zip(row, writers, strict=True)]
        writer.writerow(cells if labels is None else [*cells, labels[i]])
    return text.getvalue()


def rounded(spec: DataSpec, values: np.ndarray) -> np.ndarray:
    """Values (..., D) that the data can take: integers where the data are integers."""
    if not spec.kinds:
        return np.rint(values) if spec.discrete else values
    return np.where([kind.is_discrete for kind in spec.kinds], np.rint(values), values)


def _writer(spec: DataSpec, column: int) -> Callable[[np.floating], str]:
    """The text of a value of a column."""
    categories = spec.kinds[column].categories if spec.kinds else ()
    if categories:
        last = len(categories) - 1
        return lambda code: categories[int(np.clip(code, 0, last))]
    return _number


def _number(value: np.floating) -> str:
    """The shortest text from which the same number is read, in float32 if it is one."""
    single = np.float32(value)
    return str(single if single == value else value).removesuffix(".0")
