"""The columns of other data in the order of a trained model, matched by name.

Tables without names are taken by position only if a model knows numbers alone.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from ..config import InputError
from .columns import as_kind, refuse_text
from .source import Source, listed
from .splits import DataSpec


def match_columns(source: Source, spec: DataSpec) -> Source:
    """The columns of the training data, by their names, in the order of the training.

    Values of categories become codes as in the training. Numbers without names are taken by
    position.

    Raises:
        InputError: a column is missing, or does not suit its kind in the training; a category does
            not occur in the training data; the model knows columns by kind, and these have no name.
    """
    if not spec.columns or not source.columns:
        if spec.kinds:
            raise InputError(
                f"the model expects a table with columns {listed(spec.columns)}, matched by name; "
                f"{source.name} has no names of columns"
            )
        refuse_text(source, "the model expects numbers")
        return source
    missing = [name for name in spec.columns if name not in source.columns]
    if missing:
        raise InputError(
            f"the model expects columns {listed(spec.columns)}; {source.name} has "
            f"{listed(source.columns)} and lacks {listed(missing)}: name its columns as in the "
            f"training data"
        )
    extra = [name for name in source.columns if name not in spec.columns]
    if extra and not spec.kinds:  # those that a model of kinds leaves out are ignored in silence
        warnings.warn(
            f"{source.name} has columns that the model does not know, which are ignored: "
            f"{listed(extra)}",
            stacklevel=3,
        )
    if spec.kinds:
        return _as_trained(source, spec)
    if source.columns == spec.columns and not source.texts:
        return source
    order = [source.columns.index(name) for name in spec.columns]
    texts = tuple(source.texts[j] for j in order) if source.texts else ()
    chosen = replace(source, values=source.values[:, order], columns=spec.columns, texts=texts)
    refuse_text(chosen, "the model expects numbers")
    return replace(chosen, texts=())


def _as_trained(source: Source, spec: DataSpec) -> Source:
    """The columns coded as in the training."""
    values = []
    for name, kind in zip(spec.columns, spec.kinds, strict=True):
        j = source.columns.index(name)
        values.append(as_kind(source, j, kind.name, kind.categories, trained=True)[1])
    return replace(
        source, values=np.column_stack(values), columns=spec.columns, kinds=spec.kinds, texts=()
    )
