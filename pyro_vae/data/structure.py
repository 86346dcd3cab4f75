"""The structure of a text file with a table, from its first lines.

A structure that can be read in two ways is an error that names both.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from ..config import InputError
from ..runtime.memory import check_memory
from .missing import MARKS
from .source import LABEL_COLUMNS, is_number

# Lines, below the first, that show the structure.
HEAD = 20

# 1,234 may be a thousand and more, or a number with a decimal comma.
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")

Rows = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True)
class Structure:
    """How to read a table.

    Attributes:
        delimiter: between cells.
        header: whether the first line holds names.
        names: of all columns of a row, or empty.
        width: number of cells in a row, without an empty last one.
        trailing: whether each row ends in a delimiter.
        indexed: whether the first column is an index without a name.
        comma: whether numbers have decimal commas.
    """

    delimiter: str
    header: bool
    names: tuple[str, ...]
    width: int
    trailing: bool
    indexed: bool
    comma: bool

    def number(self, cell: str) -> float:
        """The number in a cell; ValueError if there is none. Python also reads 1_000 as one."""
        if "_" in cell or (self.comma and "." in cell):
            raise ValueError
        return float(cell.replace(",", ".") if self.comma else cell)

    def is_number(self, cell: str) -> bool:
        try:
            self.number(cell)
        except ValueError:
            return False
        return True


def find_structure(path: Path) -> Structure:
    """Find the structure in the first lines, and check that the machine holds such a table.

    Raises:
        InputError: it is ambiguous, or the table is too large.
    """
    with path.open(encoding=encoding_of(path), newline="") as file:
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
    first, *rest = [cells for _, cells in rows_of(iter(lines), delimiter)]
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
    count = path.stat().st_size * len(lines) * width // sum(map(len, lines))
    check_memory(4 * count, f"about {count:,} cells of {path}", "use fewer rows")
    comma = _has_decimal_commas(path, below if header else [first, *below])
    return Structure(delimiter, header, tuple(names or ()), width, trailing, indexed, comma)


def encoding_of(path: Path) -> str:
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _has_decimal_commas(path: Path, rows: list[list[str]]) -> bool:
    """Whether numbers have decimal commas.

    Raises:
        InputError: the commas may also be between thousands.
    """
    cells = [cell for row in rows for cell in row]
    commas = [cell for cell in cells if DECIMAL_COMMA.fullmatch(cell) or THOUSANDS.fullmatch(cell)]
    if not commas or any(is_number(cell) and "." in cell for cell in cells):
        return False
    if all(THOUSANDS.fullmatch(cell) for cell in commas):
        raise InputError(
            f"{path}: the comma in {commas[0]} may be that of decimals or of thousands; write "
            f"decimal points, and nothing between thousands"
        )
    return True


def _delimiter(lines: list[str]) -> str:
    """The delimiter that gives the lines equally many cells, most of them numbers."""
    best, score = max(",;\t", key=lines[0].count), 0.0
    for delimiter in "\t;, ":
        rows = [cells for _, cells in rows_of(iter(lines[1:] or lines), delimiter)]
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


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not re.match(r"#N/?A\b", line)  # a mark of a missing value


def rows_of(lines: Iterator[str], delimiter: str) -> Rows:
    """The number of each line, from 1, and its cells, without blank lines and comments."""
    number = 0

    def content() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(lines, 1):  # noqa: B007 (read below)
            if line.strip() and not _is_comment(line):
                yield line.strip(" \r\n") + "\n"

    for cells in csv.reader(content(), delimiter=delimiter, skipinitialspace=True):
        yield number, [cell.strip() for cell in cells]
