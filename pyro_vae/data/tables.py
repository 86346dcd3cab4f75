"""A table in a text file → `Source`.

The first lines show the structure: delimiter, a line of names, decimal commas, an index column
without a name (as pandas and R write it), an empty last column. `Source.found` says it in words. A
structure that can be read in two ways is an error that names both. The file is in UTF-8, or in
UTF-16 with its mark.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig, InputError
from ..config.columns import DROP, WITH_CATEGORIES
from .missing import MARKS, REMEDY
from .precision import column_name
from .source import LABEL_COLUMNS, Source, Texts, from_array
from .structure import DECIMAL_COMMA, Rows, Structure, encoding_of, find_structure, rows_of


def read_table(path: Path, config: DataConfig) -> Source:
    """A table, with or without a line of names; a column named label gives labels.

    Only a table with names may hold text, see `columns`.

    Raises:
        InputError: the file is no table, or its structure is ambiguous; the message names the line.
    """
    try:
        form = find_structure(path)
        label = label_column(form.names, config)
        kept = [i for i in range(form.indexed, form.width) if i != label]
        values, labels, texts = _read(path, form, kept, label, config)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"cannot read {path} as text: {error}; a table is expected in UTF-8, or in UTF-16 with "
            f"a byte order mark"
        ) from None
    except csv.Error as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from None
    source = from_array(values, labels, config, path.stem, path)
    names = tuple(form.names[i] for i in kept) if form.names else ()
    label_name = None if label is None or source.labels is None else form.names[label]
    return named(source, names, label_name, form.indexed, texts)


def label_column(names: Sequence[str], config: DataConfig) -> int | None:
    """The column of labels, unless its kind is stated, which makes it one of the data."""
    stated: Any = config.columns or {}
    places = [i for i, name in enumerate(names) if name.lower() in LABEL_COLUMNS]
    return next((i for i in places if names[i] not in stated), None)


def named(
    source: Source,
    names: tuple[str, ...],
    label: str | None = None,
    indexed: bool = False,
    texts: tuple[Texts | None, ...] = (),
) -> Source:
    """The rows of a table with the names of their columns, and in words how they were read."""
    if source.values.ndim != 2:  # pixels
        if texts:
            raise InputError(
                f"--image-size and --layout expect a table of numbers; {source.name} holds text"
            )
        names = ()
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in names[:8]]
    more = ", ..." if len(names) > 8 else ""
    parts = [f"{len(names)} column{'s' * (len(names) > 1)} {', '.join(shown)}{more}"] * bool(names)
    parts += ["first column without a name dropped (an index)"] * indexed
    parts += [f"labels in column {label}"] * (label is not None)
    # Names that are missing or repeated identify no column.
    identify = all(names) and len(set(names)) == len(names)
    columns = names if identify else ()
    return replace(source, columns=columns, found="; ".join(parts), texts=texts)


def _read(
    path: Path, form: Structure, kept: list[int], label: int | None, config: DataConfig
) -> tuple[np.ndarray, np.ndarray | None, tuple[Texts | None, ...]]:
    """The values (N, D), labels (N,), and texts of the columns, empty if all are numbers.

    With `--missing model`, cells may be `MARKS`, which are read as NaN.
    """
    lacking = config.missing == "model"
    marks = _marks(form, kept, config)
    try:
        values, labels, _ = _cells(path, form, kept, label, [], marks if lacking else {})
        textual = []
    except (InputError, UnicodeError):
        raise
    except ValueError:
        textual = _textual(path, form, marks, config)
        values, labels, codes = _cells(path, form, kept, label, textual, marks)
    numbers = [n for n, i in enumerate(kept) if i not in textual]
    if len(values) and numbers:
        same = np.flatnonzero((values[:, numbers] == values[0, numbers]).all(0))
        _check_constants(path, form, [kept[numbers[n]] for n in same])
    if not textual:
        return values, labels, ()
    texts: list[Texts | None] = [None] * len(kept)
    for n, i in enumerate(kept):
        if i in textual:
            found = Texts(tuple(sorted(codes[i])))
            places = np.array([found.values.index(text) for text in codes[i]])
            present = ~np.isnan(values[:, n])
            values[present, n] = places[values[present, n].astype(np.int64)]
            texts[n] = found
    return values, labels, tuple(texts)


def _stated(form: Structure, column: int, config: DataConfig) -> dict[str, Any]:
    """The kind and the categories that are stated for a column."""
    stated: Any = config.columns or {}
    options = stated.get(form.names[column]) if form.names else None
    return options if isinstance(options, dict) else {"kind": options}


def _marks(form: Structure, kept: list[int], config: DataConfig) -> dict[int, set[str]]:
    """The cells of each column that mark missing values: not those that are stated categories."""
    return {i: MARKS - set(_stated(form, i, config).get("categories", ())) for i in kept}


def _cells(
    path: Path,
    form: Structure,
    kept: list[int],
    label: int | None,
    textual: list[int],
    marks: dict[int, set[str]],
) -> tuple[np.ndarray, np.ndarray | None, dict[int, dict[str, int]]]:
    """The values (N, D) and labels (N,); the codes of the texts of each column of text.

    Raises:
        ValueError: a cell of the other columns is neither a number nor one of its `marks`.
    """
    values, labels = array("d"), []
    codes: dict[int, dict[str, int]] = {i: {} for i in textual}
    columns = [(i, marks.get(i, ()), codes.get(i)) for i in kept]
    for _, cells in _body(path, form):
        if marks or codes:
            for i, own_marks, own in columns:
                cell = cells[i]
                if cell in own_marks:
                    values.append(math.nan)
                else:
                    values.append(
                        form.number(cell) if own is None else own.setdefault(cell, len(own))
                    )
        else:
            values.extend([form.number(cells[i]) for i in kept])
        if label is not None:
            labels.append(cells[label])
    table = np.array(values).reshape(-1, len(kept)) if kept else np.empty((len(labels), 0))
    return table, None if label is None else np.array(labels, dtype=str), codes


def _textual(
    path: Path, form: Structure, marks: dict[int, set[str]], config: DataConfig
) -> list[int]:
    """The columns of text: those whose cells mostly are no numbers, or that are stated to be so.

    Raises:
        InputError: a column of numbers holds a cell that is none; a value is missing, unless
            `--missing model`; the table has no names.
    """
    count, numbers = dict.fromkeys(marks, 0), dict.fromkeys(marks, 0)
    bad: dict[int, tuple[int, str]] = {}  # line and text of the first cell that is no number
    for line, cells in _body(path, form):
        for i in marks:
            if cells[i] in marks[i]:
                if config.missing != "model":
                    raise InputError(_no_number(path, line, i, cells[i], form))
                continue
            count[i] += 1
            if form.is_number(cells[i]):
                numbers[i] += 1
            else:
                bad.setdefault(i, (line, cells[i]))
    for i, (line, cell) in bad.items():
        kind = _stated(form, i, config)["kind"]
        if not form.names or (2 * numbers[i] >= count[i] and kind not in (*WITH_CATEGORIES, DROP)):
            raise InputError(_no_number(path, line, i, cell, form))
    return sorted(bad)


def _body(path: Path, form: Structure) -> Rows:
    """The number of each line and its cells, below the names."""
    with path.open(encoding=encoding_of(path), newline="") as file:
        for number, cells in islice(rows_of(file, form.delimiter), int(form.header), None):
            if form.trailing and len(cells) == form.width + 1 and not cells[-1]:
                cells.pop()
            if len(cells) != form.width:
                raise InputError(
                    f"{path}: line {number} has {len(cells)} cell{'s' * (len(cells) != 1)}, the "
                    f"table has {form.width} columns; repair the line, or quote text that contains "
                    f"{form.delimiter!r}"
                )
            yield number, cells


def _no_number(path: Path, line: int, column: int, cell: str, form: Structure) -> str:
    """The message for a cell that is not a number."""
    where = f"line {line}, column {column + 1}"
    where += f" ({form.names[column][:40]})" if form.names else ""
    remedy = "drop the column, encode it as numbers, or call it label in a first line of names"
    if form.names:
        name = form.names[column][:40]
        remedy = f"repair it, or state that the column is text: --columns FILE with {name!r}"
        remedy += ' = "categorical" or "drop"'
    if cell in MARKS:
        remedy = f"{REMEDY}, or remove the row"
    elif DECIMAL_COMMA.fullmatch(cell.replace(".", "")):
        remedy = "write decimal points or commas in all cells, and nothing between thousands"
    return (
        f"{path} expects numbers in every cell: could not convert string {cell[:60]!r} to a "
        f"number in {where}; {remedy}"
    )


def _check_constants(path: Path, form: Structure, columns: list[int]) -> None:
    """Check that columns of one value in float64 are constant as text too."""
    first: list[str] | None = None
    for number, cells in _body(path, form) if columns else ():
        first = first or cells
        for i in columns:
            one, other = (text.replace(",", ".") for text in (cells[i], first[i]))
            if one != other and Decimal(one) != Decimal(other):
                raise InputError(
                    f"{path}: {column_name(form.names, i)} holds numbers that float64 cannot tell "
                    f"apart, like {first[i][:60]} and {cells[i][:60]} (line {number}): subtract "
                    f"one of them from all, or drop the column"
                )
