"""Kinds of the columns of a table: the likelihood of each, and a file that states them.

    {"age": "negative-binomial", "grade": {"kind": "ordinal", "categories": ["low", "high"]}}

The same in TOML: `age = "negative-binomial"`. A column that is not named has the kind that its
values suggest (`data.columns`). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_file
from .options import InputError, shown

# Name → the values of such a column.
KINDS = {
    "gaussian": "real values",
    "student-t": "real values with outliers",
    "log-normal": "values above 0",
    "poisson": "counts",
    "zero-inflated-poisson": "counts, many of them 0",
    "negative-binomial": "counts",
    "zero-inflated-negative-binomial": "counts, many of them 0",
    "bernoulli": "two values",
    "categorical": "few values without an order",
    "ordinal": "few values in order",
}
REAL = ("gaussian", "student-t", "log-normal")
COUNTS = tuple(name for name, values in KINDS.items() if values.startswith("counts"))
WITH_CATEGORIES = ("bernoulli", "categorical", "ordinal")
DROP = "drop"  # in the place of a kind: the column is left out


@dataclass(frozen=True)
class ColumnKind:
    """The kind of a column, as a model knows it.

    Attributes:
        name: one of `KINDS`.
        categories: the values of a bernoulli, categorical or ordinal column as text, the value of
            code k in place k; else empty.
    """

    name: str
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        if self.name not in KINDS:
            raise ValueError(f"a kind expects one of {', '.join(KINDS)}; got {shown(self.name)}")
        if (self.name in WITH_CATEGORIES) != (len(self.categories) > 1):
            raise ValueError(f"{self.name} has {len(self.categories)} categories")

    @property
    def is_discrete(self) -> bool:
        """Whether its likelihood is a mass function."""
        return self.name not in REAL


def read_columns(path: Path) -> dict[str, Any]:
    """The kinds in a file, see the top of this module.

    Raises:
        InputError: the file cannot be read, or does not hold kinds by column.
    """
    values = read_file(path, "columns", "kinds of columns")
    return check_columns(values, f"--columns {path}")


def check_columns(values: Any, where: str = "columns") -> dict[str, Any]:
    """Validate kinds by column; returns them as plain values, as config.json holds them.

    Raises:
        InputError: they are of another form, or a kind is unknown.
    """
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{where} expects the names of columns with their kinds; got {values!r}")
    return {name: _checked(value, f"{where}: column {name[:40]}") for name, value in values.items()}


def _checked(value: Any, where: str) -> Any:
    if isinstance(value, ColumnKind):
        value = {"kind": value.name, "categories": list(value.categories)}
        value = value if value["categories"] else value["kind"]
    options = value if isinstance(value, dict) else {"kind": value}
    kind, categories = options.get("kind"), options.get("categories")
    if not isinstance(kind, str) or kind not in (*KINDS, DROP):
        raise InputError(f"{where} expects one of {', '.join(KINDS)}, {DROP}; got {shown(kind)}")
    unknown = sorted(set(options) - {"kind", "categories"}, key=str)
    if unknown:
        raise InputError(f"{where} has no option {shown(unknown[0])}; it has kind and categories")
    if categories is None:
        return kind
    if kind not in WITH_CATEGORIES:
        raise InputError(f"{where}: {kind} has no categories; {', '.join(WITH_CATEGORIES)} have")
    if not isinstance(categories, list | tuple) or len(categories) < 2:
        raise InputError(f"{where} expects a list of two categories or more; got {categories!r}")
    texts = [category_text(category) for category in categories]
    if len(set(texts)) < len(texts) or "" in texts:
        raise InputError(f"{where} expects different categories, none empty; got {shown(texts)}")
    if kind == "bernoulli" and len(texts) != 2:
        raise InputError(f"{where}: bernoulli expects two categories; got {len(texts)}")
    return {"kind": kind, "categories": texts}


def category_text(value: Any) -> str:
    """A category as text: numbers in their shortest form, 2 for 2.0; text without outer spaces."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).strip()
    return str(int(value)) if float(value).is_integer() else repr(float(value))
