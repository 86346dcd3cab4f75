"""A table of numbers in a text file → `Source`."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig, InputError
from .source import LABEL_COLUMNS, Source, from_array


def read_table(path: Path, config: DataConfig) -> Source:
    """A table of numbers; a first line of names is skipped; a column named label gives labels."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as text: {error}") from None
    if not first:
        raise InputError(f"{path} expects a table of numbers; its first line is empty")
    delimiter = max(",;\t", key=first.count)
    cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    header = not any(map(_is_number, cells)) and any(cells)
    column = None
    if header:
        column = next((i for i, cell in enumerate(cells) if cell.lower() in LABEL_COLUMNS), None)
    columns = [i for i in range(len(cells)) if i != column]
    options: dict[str, Any] = {
        "delimiter": delimiter,
        "skiprows": int(header),
        "ndmin": 2,
        "encoding": "utf-8-sig",
        "comments": None,
        "quotechar": '"',
    }
    labels: np.ndarray | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty table is an error below
            values = np.loadtxt(path, usecols=columns, **options)
            if column is not None:
                labels = np.loadtxt(path, usecols=[column], dtype=str, **options)[:, 0]
    except ValueError as error:
        raise InputError(
            f"{path} expects numbers in every cell: {error} (counted from 0"
            f"{', below the names' if header else ''})"
        ) from None
    return from_array(values, labels, config, path.stem, path)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
