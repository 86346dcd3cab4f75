"""Objects in memory → `Source`: the same rows as from a file of the same values.

    numpy array, torch tensor    (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), as in a .npy file
    pandas or polars DataFrame   columns of numbers or text; a column called label, class or target
                                 holds the labels, as in a .csv file
    pair (x, y)                  one of these, and labels (N,): integers or strings
    torch Dataset                map-style; items are arrays, tensors or PIL images, or pairs of
                                 such an item and its label

Neither pandas nor polars is imported: any object with `to_numpy` and `columns` whose columns are
`frame[name]` is a DataFrame here, and any other object with `__array__` is an array.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..config import DataConfig, InputError
from .images import pixel_mode, pixels
from .missing import REMEDY, as_numbers
from .precision import offset_and_scale
from .source import Source, Texts, from_array
from .tables import label_column, named


def read_object(data: Any, config: DataConfig) -> Source:
    """Read rows from an object in memory.

    Args:
        data: one of the objects above. Its memory is shared, not copied, if possible.
        config: for `image_size`, which turns flat rows into images and resizes PIL images, and
            `missing`.

    Raises:
        InputError: the object is of another kind, or does not hold rows of numbers.
    """
    x, y = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    lacking = config.missing == "model"
    names: list[str] | None = None
    label: str | None = None
    indexed = False
    texts: tuple[Texts | None, ...] = ()
    if isinstance(x, Dataset):
        name = type(x).__name__
        values, labels = _from_dataset(x, config, name)
    elif hasattr(x, "to_numpy") and hasattr(x, "columns"):
        name = "DataFrame"
        values, labels, names, label, indexed, texts = _from_frame(x, config)
    elif isinstance(x, Tensor) or hasattr(x, "__array__"):
        name = "tensor" if isinstance(x, Tensor) else "array"
        values, labels = _array(x, lacking), None
    elif hasattr(x, "toarray"):
        raise InputError(f"expected a dense array; got a sparse {type(x).__name__}: x.toarray()")
    else:
        raise InputError(
            f"expected the name of a data set, a path, a DataConfig, an array, a tensor, a "
            f"DataFrame, a torch Dataset or a pair (x, y) as data; got {type(x).__name__}. Convert "
            f"it, for example by numpy.asarray"
        )
    if y is not None:
        if labels is not None:
            raise InputError(f"expected labels once; got y and labels in the {name}: drop one")
        labels = _labels(_array(y), name, real=False)
    source = from_array(values, labels, config, name, f"the {name}")
    if isinstance(x, Dataset) and values.dtype == np.uint16:  # 16-bit images
        return replace(source, max_value=65535)
    if names is None:
        return source
    return named(source, tuple(names), None if source.labels is None else label, indexed, texts)


def read_frame(frame: Any, config: DataConfig, name: str) -> Source:
    """The rows of a DataFrame from a file called `name`, as those of one in memory."""
    return replace(read_object(frame, config), name=name)


def _from_frame(
    frame: Any, config: DataConfig
) -> tuple[np.ndarray, np.ndarray | None, list[str], str | None, bool, tuple[Texts | None, ...]]:
    """Values (N, D) and labels (N,) of a DataFrame; names of columns and labels; texts."""
    lacking = config.missing == "model"
    names = list(frame.columns)
    # pandas reads its own index as such a column.
    indexed = len(names) > 1 and names[0] == "Unnamed: 0"
    indexed = indexed and _array(frame[names[0]]).dtype.kind != "f"
    names = names[indexed:]
    if len(set(names)) < len(names):
        raise InputError(f"expected DataFrame columns of different names; got {names}")
    place = label_column(list(map(str, names)), config)
    label = None if place is None else names[place]
    columns = {name: _array(frame[name], lacking) for name in names if name != label}
    texts: dict[Any, Texts | None] = dict.fromkeys(columns)
    for name in columns:
        if (found := _texts(frame[name], columns[name], lacking)) is not None:
            columns[name], texts[name] = found
        elif columns[name].dtype.kind not in "biuf":
            raise InputError(
                f"expected numbers or text in every column of the DataFrame; got "
                f"{columns[name].dtype} in column {name!r}: drop it, encode it as numbers, or "
                f"{REMEDY}"
            )
    values = np.column_stack(list(columns.values())) if columns else np.empty((len(frame), 0))
    for name, column in columns.items():
        # Beside a column of real numbers, integers become float64.
        exact = values.dtype.kind in "iu" or column.dtype.kind not in "iu" or column.size == 0
        if not exact and max(abs(int(column.max())), abs(int(column.min()))) > 2**53:
            offset_and_scale(column[:, None], [str(name)], "the DataFrame")
    labels = None if label is None else _labels(_array(frame[label]), "DataFrame", real=True)
    held: Any = tuple(texts.values()) if any(texts.values()) else ()
    label = None if label is None else str(label)
    return values, labels, list(map(str, columns)), label, indexed, held


def _texts(column: Any, values: np.ndarray, lacking: bool) -> tuple[np.ndarray, Texts] | None:
    """Codes (N,) and texts of a column of text or dates; None if it is neither.

    `lacking`: whether values may be missing, whose codes are NaN.
    """
    dtype = getattr(column, "dtype", None)
    if values.dtype.kind not in "OTUMm":
        return None
    is_null = getattr(column, "isna", None) or getattr(column, "is_null", None)
    missing = np.zeros(len(values), bool) if is_null is None else np.asarray(is_null(), bool)
    dates = values.dtype.kind in "Mm"
    known = (values[~missing].astype(str) if dates else values[~missing]).tolist()
    if not known or not all(isinstance(value, str) for value in known):
        return None
    texts = [value.strip() for value in known]
    if "" in texts or (missing.any() and not lacking):
        raise InputError(
            f"expected text in each row of column {getattr(column, 'name', '')!r} of the "
            f"DataFrame; some have none: {REMEDY}"
        )
    ordered = getattr(dtype, "ordered", False) is True
    levels = [str(level).strip() for level in dtype.categories] if ordered else sorted(set(texts))  # type: ignore[union-attr]
    places = {text: code for code, text in enumerate(levels)}
    codes = np.full(len(values), np.nan)
    codes[~missing] = [places[text] for text in texts]
    return codes, Texts(tuple(levels), ordered)


def _from_dataset(
    dataset: Any, config: DataConfig, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The items (N, *shape) and labels (N,) of a torch Dataset, each item read once, in order."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(f"expected a map-style torch Dataset, which has a length; got {name}")
    values, labels = np.empty((0,)), []
    for index in range(len(dataset)):
        item = dataset[index]
        row, *label = item if isinstance(item, (tuple, list)) else (item,)
        if isinstance(row, Image.Image):
            row = pixels(row, pixel_mode(row), config.image_size)
        row = _array(row)
        if index == 0:
            values = np.empty((len(dataset), *row.shape), row.dtype)
        if (row.shape, row.dtype) != (values.shape[1:], values.dtype):
            raise InputError(
                f"expected items of one shape and type in the {name}; got {values.shape[1:]} of "
                f"{values.dtype} in item 0, {row.shape} of {row.dtype} in item {index}: transform "
                f"them first"
            )
        labels += label
        if len(label) > 1 or len(labels) not in (0, index + 1):
            raise InputError(
                f"expected items, or pairs (item, label), throughout the {name}; got "
                f"{1 + len(label)} parts in item {index}"
            )
        values[index] = row
    if not labels:
        return values, None
    return values, _labels(_array([_array(label) for label in labels]), name, real=False)


def _array(data: Any, lacking: bool = False) -> np.ndarray:
    """An object as an array that shares its memory if possible.

    `lacking`: whether values may be missing, which become NaN.
    """
    if isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
        if lacking:
            return as_numbers(data)
        raise InputError(f"expected an array without masked values; got some: {REMEDY}")
    try:
        if isinstance(data, Tensor):
            data = data.detach().cpu()
            data = data.float() if data.dtype == torch.bfloat16 else data
        values = np.asarray(data)
        if lacking and values.dtype == object:
            with contextlib.suppress(TypeError, ValueError):  # text, which the caller refuses
                return as_numbers(data)
        return values
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"expected an array of numbers; got {type(data).__name__}: {error}"
        ) from None


def _labels(labels: np.ndarray, name: str, *, real: bool) -> np.ndarray:
    """Labels, checked to be integers, booleans, strings or, if `real`, real numbers."""
    if labels.dtype.kind in "OT" and any(isinstance(label, str) for label in labels.flat):
        missing = [str(label) in ("None", "nan", "<NA>") for label in labels.flat]
        labels = np.where(np.reshape(missing, labels.shape), "", labels)
    if labels.dtype.kind in "OT" and all(isinstance(label, str) for label in labels.flat):
        labels = labels.astype(str)
    elif labels.dtype == object and all(isinstance(n, (int, np.integer)) for n in labels.flat):
        labels = np.array(labels.tolist())  # int64 if they fit
    if labels.dtype.kind not in ("biufU" if real else "biuU"):
        raise InputError(
            f"expected integers or strings as labels of the {name}; got {labels.dtype}: convert "
            f"them, or leave them out"
        )
    return labels
