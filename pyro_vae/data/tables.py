"""A table of numbers in a text file → `Source`.

The first lines show the structure: delimiter, a line of names, an index column without a name (as
pandas and R write it), an empty last column. `Source.found` says it in words. A structure that can
be read in two ways is an error that names both.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from ..config import DataConfig, InputError
from .missing import MARKS, REMEDY
from .precision import column_name
from .source import LABEL_COLUMNS, Source, from_array, is_number

# Lines, below the first, that show the structure.
HEAD = 20

Rows = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True)
class _Structure:
    """How to read a table.

    Attributes:
        delimiter: between cells.
        header: whether the first line holds names.
        names: of all columns of a row, or empty.
        width: number of cells in a row, without an empty last one.
        trailing: whether each row ends in a delimiter.
        indexed: whether the first column is an index without a name.
    """

    delimiter: str
    header: bool
    names: tuple[str, ...]
    width: int
    trailing: bool
    indexed: bool


def read_table(path: Path, config: DataConfig) -> Source:
    """A table of numbers, with or without a line of names; a column named label gives labels.

    Raises:
        InputError: the file is no table, or its structure is ambiguous; the message names the line.
    """
    try:
        form = _structure(path)
        low = [name.lower() for name in form.names]
        label = next((i for i, name in enumerate(low) if name in LABEL_COLUMNS), None)
        kept = [i for i in range(form.indexed, form.width) if i != label]
        values, labels = _read(path, form, kept, label, config.missing == "model")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {path} as text: {error}; a table is expected in UTF-8"
        ) from None
    except csv.Error as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from None
    source = from_array(values, labels, config, path.stem, path)
    names = tuple(form.names[i] for i in kept) if form.names else ()
    label_name = None if label is None or source.labels is None else form.names[label]
    return named(source, names, label_name, form.indexed)


def named(
    source: Source, names: tuple[str, ...], label: str | None = None, indexed: bool = False
) -> Source:
    """The rows of a table with the names of their columns, and in words how they were read."""
    if source.values.ndim != 2:  # pixels
        names = ()
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in names[:8]]
    more = ", ..." if len(names) > 8 else ""
    parts = [f"{len(names)} column{'s' * (len(names) > 1)} {', '.join(shown)}{more}"] * bool(names)
    parts += ["first column without a name dropped (an index)"] * indexed
    parts += [f"labels in column {label}"] * (label is not None)
    # Names that are missing or repeated identify no column.
    identify = all(names) and len(set(names)) == len(names)
    return replace(source, columns=names if identify else (), found="; ".join(parts))


def _read(
    path: Path, form: _Structure, kept: list[int], label: int | None, missing: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The values (N, D) and labels (N,). `missing`: whether cells may be `MARKS`, read as NaN."""
    values, labels, marks = array("d"), [], MARKS if missing else ()
    for number, cells in _body(path, form):
        try:
            values.extend([math.nan if cells[i] in marks else _number(cells[i]) for i in kept])
        except ValueError:
            at = next(i for i in kept if not (is_number(cells[i]) or cells[i] in marks))
            raise InputError(_no_number(path, number, at, cells[at], form)) from None
        if label is not None:
            labels.append(cells[label])
    table = np.array(values).reshape(-1, len(kept)) if kept else np.empty((len(labels), 0))
    if len(table):
        _check_constants(path, form, [kept[i] for i in np.flatnonzero((table == table[0]).all(0))])
    return table, None if label is None else np.array(labels, dtype=str)


def _body(path: Path, form: _Structure) -> Rows:
    """The number of each line and its cells, below the names."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, cells in islice(_rows(file, form.delimiter), int(form.header), None):
            if form.trailing and len(cells) == form.width + 1 and not cells[-1]:
                cells.pop()
            if len(cells) != form.width:
                raise InputError(
                    f"{path}: line {number} has {len(cells)} cell{'s' * (len(cells) != 1)}, the "
                    f"table has {form.width} columns; repair the line, or quote text that contains "
                    f"{form.delimiter!r}"
                )
            yield number, cells


def _rows(lines: Iterator[str], delimiter: str) -> Rows:
    """The number of each line, from 1, and its cells, without blank lines and comments."""
    number = 0

    def content() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(lines, 1):  # noqa: B007 (read below)
            if line.strip() and not _is_comment(line):
                yield line.strip(" \r\n") + "\n"

    for cells in csv.reader(content(), delimiter=delimiter, skipinitialspace=True):
        yield number, [cell.strip() for cell in cells]


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not re.match(r"#N/?A\b", line)  # a mark of a missing value


def _number(cell: str) -> float:
    if "_" in cell:
        raise ValueError
    return float(cell)


def _no_number(path: Path, line: int, column: int, cell: str, form: _Structure) -> str:
    """The message for a cell that is not a number."""
    where = f"line {line}, column {column + 1}"
    where += f" ({form.names[column][:40]})" if form.names else ""
    remedy = "drop the column, encode it as numbers, or call it label in a first line of names"
    if cell in MARKS:
        remedy = f"{REMEDY}, or remove the row"
    elif re.fullmatch(r"[+-]?[\d.]*,\d+", cell):
        remedy = "write decimal points, not commas"
    return (
        f"{path} expects numbers in every cell: could not convert string {cell[:60]!r} to a "
        f"number in {where}; {remedy}"
    )


def _check_constants(path: Path, form: _Structure, columns: list[int]) -> None:
    """Check that columns of one value in float64 are constant as text too."""
    first: list[str] | None = None
    for number, cells in _body(path, form) if columns else ():
        first = first or cells
        for i in columns:
            if cells[i] != first[i] and Decimal(cells[i]) != Decimal(first[i]):
                raise InputError(
                    f"{path}: {column_name(form.names, i)} holds numbers that float64 cannot tell "
                    f"apart, like {first[i][:60]} and {cells[i][:60]} (line {number}): subtract "
                    f"one of them from all, or drop the column"
                )


def _structure(path: Path) -> _Structure:
    """Find the structure in the first lines."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines: list[str] = []
        comment = ""
        for line in islice(file, 1000):
            if _is_comment(line):
                comment = comment if lines else line.strip("# \r\n")
            elif line.strip():
                lines.append(line)
            if len(lines) > HEAD:
                break
    if not lines:
        raise InputError(f"{path} expects a table of numbers; its first line is empty")
    delimiter = _delimiter(lines)
    first, *rest = [cells for _, cells in _rows(iter(lines), delimiter)]
    trailing = bool(rest) and len(rest[0]) > 1 and not any(cells[-1] for cells in rest)
    width = len(rest[0]) - trailing if rest else len(first)
    if len(first) == width + 1 and not first[-1]:
        first.pop()
    below = [cells[:width] for cells in rest]
    if rest and len(first) == width - 1 and not any(map(_like_number, first)):
        names: list[str] | None = ["", *first]  # as R writes row names
    elif len(first) != width:
        width, names = len(first), first if not any(map(_like_number, first)) else None
    else:
        names = first if _are_names(first, below, path) else None
    header = names is not None
    if comment and not header:  # as numpy.savetxt writes names
        cells = next(csv.reader([comment], delimiter=delimiter, skipinitialspace=True), [])
        if len(cells) == width > 1 and not any(map(_like_number, cells)):
            names = [cell.strip() for cell in cells]
    indexed = width > 1 and names is not None and names[0] in ("", "Unnamed: 0") and all(names[1:])
    if indexed and any(is_number(cells[0]) and not cells[0].isdecimal() for cells in below):
        raise InputError(
            f"{path}: the first column has no name, and may be an index or data; name it in the "
            f"first line if it is data, else remove it"
        )
    return _Structure(delimiter, header, tuple(names or ()), width, trailing, indexed)


def _delimiter(lines: list[str]) -> str:
    """The delimiter that gives the lines equally many cells, most of them numbers."""
    best, score = max(",;\t", key=lines[0].count), 0.0
    for delimiter in "\t;, ":
        rows = [cells for _, cells in _rows(iter(lines[1:] or lines), delimiter)]
        width = len(rows[0])
        if width < 2 or any(len(cells) != width for cells in rows):
            continue
        cells = [cell for row in rows for cell in row]
        decimal = [cell if delimiter == "," else cell.replace(",", ".") for cell in cells]
        share = sum(not cell or is_number(cell) for cell in decimal) / len(cells)
        if share > score:
            best, score = delimiter, share
    return best


def _are_names(first: list[str], below: list[list[str]], path: Path) -> bool:
    """Whether the first line holds names.

    Raises:
        InputError: it may be names or numbers.
    """
    numeric = list(map(_like_number, first))
    if not any(numeric):
        return any(first)
    if not first[0] and all(numeric[1:]):  # an index without a name, and numbers as names
        return _may_be_names(first[1:])
    if not all(numeric):
        # Text above numbers, or a name of labels.
        return any(cell.lower() in LABEL_COLUMNS for cell in first) or any(
            cell and not is_number(cell) and is_number(row)
            for cell, row in zip(first, below[0] if below else [], strict=False)
        )
    if not _may_be_names(first) or not below or _steps(below[0]) == _steps(first):
        return False
    real = not any(cell.isdecimal() for cells in below for cell in cells)
    if len(first) >= 10 or (len(first) >= 3 and real):
        return True
    if len(first) == 1 and not real:
        return False
    raise InputError(
        f"{path}: the first line, {', '.join(first)}, may be the names of columns or a row. If it "
        f"is names, let them begin with a letter; if it is a row, add a line of names above it"
    )


def _may_be_names(cells: list[str]) -> bool:
    """Whether the cells are 0, 1, 2, ..., 1, 2, 3, ..., or years at equal distances."""
    steps = _steps(cells)
    if steps is None or len(steps) > 1:
        return False
    first, last = int(cells[0]), int(cells[-1])
    counted = steps <= {1} and (first == 0 or (first == 1 and last > 2))
    return counted or (first >= 1800 and first < last <= 2200)


def _steps(cells: list[str]) -> set[int] | None:
    """The differences between neighbours; None if the cells are not integers."""
    if not all(cell.isdecimal() and len(cell) < 9 and str(int(cell)) == cell for cell in cells):
        return None
    return {int(after) - int(before) for before, after in pairwise(cells)}


def _like_number(cell: str) -> bool:
    """Whether a cell is a number, perhaps with a decimal comma, or marks a missing one."""
    return is_number(cell.replace(",", ".", 1)) or (cell != "" and cell in MARKS)
