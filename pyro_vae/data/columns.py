"""Kinds of the columns of a table: found from the values, or stated; values → x.

    two values                              bernoulli
    text of few values                      categorical; ordinal if its type states an order
    integers from 0, or skewed near 0       negative-binomial
    integers of few values                  ordinal, if a binomial distribution may spread so far,
                                            else categorical
    values above 0, nearly symmetric as logarithms and not as they are     log-normal
    tails far heavier than a normal distribution's                         student-t
    all other numbers                                                      gaussian

Kinds are found if the table holds text, or beside real numbers a column of counts, codes or two
values. Identifiers, dates and text of many values are left out, and named. A column of one value
has no distribution, and is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import InputError
from ..config.columns import COUNTS, DROP, KINDS, WITH_CATEGORIES, ColumnKind, category_text
from ..config.options import shown
from .precision import column_name
from .scan import MAX_COUNT
from .source import Source, is_number
from .splits import Splits

# Different values of text that are few, of integers that are, and of all that may be categories
MOST_TEXTS, MOST_LEVELS, MOST_CATEGORIES = 100, 10, 1000
MOST_ORDINAL = 65  # levels; float32 holds the logarithms of factorials up to 64
# Kinds are found in numbers only where each value occurs some times.
FEWEST_ROWS = 20
SKEWED = 1.0
# Distance between the quantiles 0.005 and 0.995 in quartile distances: 3.8 for a normal
# distribution, 7.6 for Student's with 3 degrees of freedom.
HEAVY = 6.5

DATE = re.compile(r"\d{4}-\d\d?-\d\d?([ T]\d.*)?|\d\d?[./]\d\d?[./]\d{2,4}( \d.*)?")
IDENTIFIER = re.compile(r"(.*[_ .-])?(id|uuid|guid|key)", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """What the values of a column suggest.

    Attributes:
        kind: one of `KINDS`, or "drop".
        reason: why it is left out, in words.
    """

    kind: str
    reason: str = ""


def with_kinds(source: Source, stated: dict[str, Any] | None, likelihood: str = "auto") -> Source:
    """The table with a kind for each column, if it needs them; else as it is.

    Args:
        source: a table, perhaps with text.
        stated: kinds by column, as in `DataConfig.columns`; None if none are.
        likelihood: that of the model. Kinds are for auto, if the table needs them, and columns.

    Raises:
        InputError: a column does not exist, does not suit its kind, or has one value only; the
            table has text and no names, or another likelihood.
    """
    asked = stated is not None or likelihood == "columns"
    if likelihood not in ("auto", "columns"):
        refuse_text(source, f"--likelihood {likelihood} expects numbers")
        return source
    if not source.columns:
        refuse_text(source, "a table with text expects a first line of different names")
        if asked:
            raise InputError(
                f"{'--columns' if stated is not None else '--likelihood columns'} expects a table "
                f"with a different name for each column; {source.name} has no such names"
            )
        return source
    if not (asked or _needs_kinds(source)):
        return source
    stated = stated or {}
    unknown = [name for name in stated if name not in source.columns]
    if unknown:
        raise InputError(
            f"columns: {source.name} has no column {unknown[0][:40]}; it has "
            f"{', '.join(name[:40] for name in source.columns[:12])}"
            f"{', ...' if len(source.columns) > 12 else ''}"
        )
    kept, values, kinds, left = [], [], [], []
    for j, name in enumerate(source.columns):
        options = stated.get(name)
        options = options if isinstance(options, dict) else {"kind": options}
        found = _found(source, j) if options["kind"] is None else Found(options["kind"], "stated")
        if found.kind == DROP:
            left.append(f"{name[:40]} ({found.reason})")
            continue
        kind, column = as_kind(source, j, found.kind, options.get("categories"))
        kept.append(name)
        kinds.append(kind)
        values.append(column)
    if not kept:
        raise InputError(f"{source.name} has no column left: {', '.join(left)}")
    parts = [source.found, f"left out: {', '.join(left)}" if left else ""]
    return replace(
        source,
        values=np.column_stack(values),
        columns=tuple(kept),
        kinds=tuple(kinds),
        texts=(),
        found="; ".join(filter(None, parts)),
    )


def refuse_text(source: Source, expected: str) -> None:
    """Check that a table holds numbers only.

    Raises:
        InputError: it does not; the message begins with what is `expected`.
    """
    for j, texts in enumerate(source.texts):
        if texts is not None:
            raise InputError(
                f"{expected}; {column_name(source.columns, j)} of {source.name} holds text, like "
                f"{shown(texts.values[0])}"
            )


def _needs_kinds(source: Source) -> bool:
    """Whether there is text, or a column of few whole values or counts beside real numbers."""
    if any(texts is not None for texts in source.texts):
        return True
    values = source.values
    if values.ndim != 2 or len(values) < FEWEST_ROWS or values.dtype.kind != "f":
        return False
    known = np.where(np.isnan(values), np.rint(np.nanmin(values)), values)
    if not np.isfinite(known).all() or (known.min() >= 0 and known.max() <= 1):
        return False  # shares of 1
    whole = (known == np.rint(known)).all(0)
    varying = np.flatnonzero(whole & (known != known[0]).any(0))
    if whole.all():
        return False
    return any(_found(source, int(j)).kind not in ("gaussian", DROP) for j in varying)


def _found(source: Source, column: int) -> Found:
    """The kind that the values of a column suggest."""
    name, values = source.columns[column], source.values[:, column]
    texts = source.texts[column] if source.texts else None
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    distinct = np.unique(values)
    if texts is not None:
        return _found_text(texts.values, texts.ordered, len(values))
    whole = bool((distinct == np.rint(distinct)).all())
    if whole and len(distinct) == len(values) >= FEWEST_ROWS:
        steps = np.diff(values)
        if (steps == 1).all() or IDENTIFIER.fullmatch(name):
            return Found(DROP, "identifiers")
    if len(distinct) == 2:
        return Found("bernoulli")
    values = values.astype(np.float64)
    return Found(_found_whole(values, distinct) if whole else _found_real(values))


def _found_text(values: Sequence[str], ordered: bool, count: int) -> Found:
    if all(map(DATE.fullmatch, values)):
        return Found(DROP, "dates")
    if len(values) <= 2:
        return Found("bernoulli")
    if len(values) <= MOST_TEXTS and (len(values) <= count / 2 or ordered):
        return Found("ordinal" if ordered and len(values) <= MOST_ORDINAL else "categorical")
    if len(values) == count:
        return Found(DROP, "identifiers")
    return Found(DROP, f"text of {len(values):,} different values")


def _found_whole(values: np.ndarray, distinct: np.ndarray) -> str:
    """The kind of integers, of three different values or more."""
    low, high, mean, variance = values.min(), values.max(), values.mean(), values.var()
    levels = int(high - low) + 1
    near_zero = low == 0 or mean < 2 * variance**0.5
    if low >= 0 and near_zero and variance >= mean and high <= MAX_COUNT:
        return "negative-binomial"
    if levels <= MOST_LEVELS and levels == len(distinct):
        share = (mean - low) / (levels - 1)
        # A mixture of binomial distributions over z spreads at least as far as one of its mean.
        return "ordinal" if variance >= (levels - 1) * share * (1 - share) else "categorical"
    return "gaussian"


def _found_real(values: np.ndarray) -> str:
    skewness = _skewness(values)
    if values.min() > 0 and skewness > SKEWED and abs(_skewness(np.log(values))) < skewness / 2:
        return "log-normal"
    edges = np.quantile(values, [0.005, 0.25, 0.75, 0.995])
    heavy = edges[3] - edges[0] > HEAVY * (edges[2] - edges[1])
    return "student-t" if heavy and len(values) >= 10 * FEWEST_ROWS else "gaussian"


def _skewness(values: np.ndarray) -> float:
    deviations = values - values.mean()
    scale = np.abs(deviations).max() or 1.0
    cube, square = ((deviations / scale) ** 3).mean(), ((deviations / scale) ** 2).mean()
    return float(cube / square**1.5) if square else 0.0


def as_kind(
    source: Source, column: int, kind: str, stated: Sequence[str] | None, *, trained: bool = False
) -> tuple[ColumnKind, np.ndarray]:
    """The kind of a column, and its values (N,) as x: codes of categories, or numbers."""
    where = f"{column_name(source.columns, column)} of {source.name}"
    values = source.values[:, column].astype(np.float64)
    texts = source.texts[column] if source.texts else None
    present = values[~np.isnan(values)]
    distinct = np.unique(present)
    if len(distinct) < 2 and not trained:
        one = texts.values[0] if texts is not None else f"{distinct[0]:g}" if len(distinct) else ""
        raise InputError(
            f"{where} has no variance: all its values are {shown(one)}. Leave it out: --columns "
            f'FILE with "{source.columns[column][:40]}" = "{DROP}"'
        )
    if kind in WITH_CATEGORIES:
        return _coded(where, values, distinct, texts, kind, stated, trained)
    if texts is not None:
        raise InputError(
            f"{where} holds text, like {shown(texts.values[0])}; {kind} expects {KINDS[kind]}"
        )
    wrong = np.zeros(len(distinct), bool)
    if kind == "log-normal":
        wrong = distinct <= 0
    elif kind in COUNTS:
        wrong = (distinct < 0) | (distinct != np.rint(distinct)) | (distinct > MAX_COUNT)
    if wrong.any():
        limit = f", whole numbers from 0 to {MAX_COUNT:,}" if kind in COUNTS else ""
        raise InputError(
            f"{where} holds {distinct[wrong][0]:g}; {kind} expects {KINDS[kind]}{limit}"
        )
    return ColumnKind(kind), values


def _coded(
    where: str,
    values: np.ndarray,
    distinct: np.ndarray,
    texts: Any,
    kind: str,
    stated: Sequence[str] | None,
    trained: bool,
) -> tuple[ColumnKind, np.ndarray]:
    """A kind with its categories, and the code of each value."""
    numbers = texts is None
    names = [category_text(v) for v in distinct.tolist()]
    if not numbers:
        names = [texts.values[int(v)] for v in distinct]
    categories = tuple(stated or _categories(where, names, distinct, texts, kind))
    most = {"bernoulli": 2, "ordinal": MOST_ORDINAL}.get(kind, MOST_CATEGORIES)
    if len(categories) > most or (kind == "bernoulli" and len(categories) < 2):
        raise InputError(
            f"{where} has {len(categories):,} different values; {kind} expects at most {most:,}"
        )
    places = {name: k for k, name in enumerate(categories)}
    as_numbers = {_as_number(name): k for name, k in places.items()}  # 2.0 is 2
    found = [places.get(name, as_numbers.get(_as_number(name), -1)) for name in names]
    codes = np.array(found, dtype=np.float64)
    if (codes < 0).any():
        unseen = names[int((codes < 0).argmax())]
        known = ", ".join(name[:20] for name in categories[:10])
        known += ", ..." if len(categories) > 10 else ""
        lacking = "unseen in the training data" if trained else "not one of its stated categories"
        raise InputError(f"{where} holds {shown(unseen)}, {lacking}; expected one of {known}")
    coded = np.full(len(values), np.nan)
    present = ~np.isnan(values)
    coded[present] = codes[np.searchsorted(distinct, values[present])]
    return ColumnKind(kind, categories), coded


def _categories(
    where: str, names: list[str], distinct: np.ndarray, texts: Any, kind: str
) -> list[str]:
    """The categories of a column in order: of numbers by size, of text by name or as its type."""
    if texts is not None and texts.ordered:
        return list(texts.values)
    if kind != "ordinal":
        return names
    if texts is not None:
        raise InputError(
            f"{where} holds text, whose order is not known: state it, as in "
            f'{{"kind": "ordinal", "categories": {names[:3]}}}'
        )
    whole = (distinct == np.rint(distinct)).all()
    if whole and distinct[-1] - distinct[0] < MOST_ORDINAL:  # levels that do not occur count too
        return [str(level) for level in range(int(distinct[0]), int(distinct[-1]) + 1)]
    return names


def _as_number(text: str) -> Any:
    """The number that a text is, else the text."""
    return float(text) if is_number(text) and np.isfinite(float(text)) else text


def describe_columns(splits: Splits) -> list[str]:
    """Lines that show the columns before a training: name, kind, and range or categories.

    There is none for data without a kind for each column.
    """
    spec, rows = splits.spec, []
    for j, (name, kind) in enumerate(zip(spec.columns, spec.kinds, strict=False)):
        if kind.categories:
            words = ", ".join(c if len(c) <= 20 else c[:17] + "..." for c in kind.categories[:8])
            more = f", ... ({len(kind.categories)} in all)" if len(kind.categories) > 8 else ""
            rows.append((name, kind.name, words + more))
        else:
            values = splits.train.values[:, j]
            values = values[~values.isnan()]
            rows.append((name, kind.name, f"{values.min():g} to {values.max():g}"))
    names = [name if len(name) <= 24 else name[:21] + "..." for name, *_ in rows]
    width = max(map(len, names), default=0)
    wide = max((len(kind.name) for kind in spec.kinds), default=0)
    return [f"{n:{width}}  {k:{wide}}  {r}" for n, (_, k, r) in zip(names, rows, strict=True)]
