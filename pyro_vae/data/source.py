"""`Source`: one array of rows, as they are stored, checked by `from_array`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DataConfig, InputError
from ..config.columns import ColumnKind

LABEL_COLUMNS = ("label", "labels", "class", "target", "targets")
LABEL_NAMES = (*LABEL_COLUMNS, "y")  # a table may have a coordinate called y

CHANNELS = (1, 3)  # of images and volumes

# More different labels that are not whole numbers are no classes.
MAX_REAL_CLASSES = 20


@dataclass(frozen=True)
class Texts:
    """The texts of a column of a table, which is stored as their codes.

    Attributes:
        values: the different texts, that of code k in place k, sorted or in the order of the type.
        ordered: whether the type of the column states their order.
    """

    values: tuple[str, ...]
    ordered: bool = False


@dataclass(frozen=True)
class Source:
    """Rows as they are stored.

    Attributes:
        name: name of the data in titles and messages.
        values: (N, *shape), numbers; images are (N, C, H, W).
        labels: (N,) int64, −1 if not known; or None.
        class_names: the name of each label, or empty.
        num_test: the last `num_test` rows are the data's own test split; 0 if they have none.
        num_validation: the rows before them are the data's own validation split; 0 if none.
        max_value: the largest possible value, if the source defines one.
        likelihood: the usual likelihood of the data, if there is one.
        columns: the names of the columns of a table (N, D), or empty.
        found: how columns or arrays were read, in words, or empty.
        texts: of the columns of a table, each None for numbers; empty if there is no text.
        kinds: of the columns of a table, as in `DataSpec`.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    num_test: int = 0
    num_validation: int = 0
    max_value: int | None = None
    likelihood: str | None = None
    columns: tuple[str, ...] = ()
    found: str = ""
    texts: tuple[Texts | None, ...] = ()
    kinds: tuple[ColumnKind, ...] = ()


def from_array(
    values: np.ndarray,
    labels: np.ndarray | None,
    config: DataConfig,
    name: str,
    origin: Path | str,
) -> Source:
    """Check the type and shape of an array; view it with its channels first, without a copy.

    Args:
        values: (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), (N, D, H, W), (N, D, H, W, C) or
            (N, C, D, H, W), C 1 or 3; as sequences (N, T) or (N, T, C).
        labels: (N,) or (N, 1), of one sortable type, or one-hot (N, K), or None. The classes
            are the distinct labels, sorted; empty text and NaN are no label.
        config: for `image_size`, which turns (N, D) into images, and `layout`.
        name: name of the data.
        origin: name of the data in error messages.

    Raises:
        InputError: the values are not rows of numbers, or there are more or fewer labels.
    """
    if values.dtype.kind not in "biuf":
        raise InputError(f"expected numbers in {origin}; got an array of dtype {values.dtype}")
    if values.size == 0:
        raise InputError(f"expected rows of numbers in {origin}; got an empty array {values.shape}")
    size, values = config.image_size, _arranged(values, config, origin)
    codes, classes = (None, ()) if labels is None else _classes(labels, len(values), origin)
    if size and size != values.shape[2:]:
        if values.ndim != 4:
            raise InputError(f"--image-size has no effect on {name}, which has no images; drop it")
        raise InputError(
            f"--image-size resizes folders of images only; {name} has images of "
            f"{'x'.join(map(str, values.shape[2:]))}, --image-size asks for {size[0]}x{size[1]}"
        )
    return Source(name, values, codes, classes)


def _arranged(values: np.ndarray, config: DataConfig, origin: Path | str) -> np.ndarray:
    """Rows (N, D), sequences (N, C, T), images (N, C, H, W) or volumes (N, C, D, H, W)."""
    size, layout, dims = config.image_size, config.layout, values.ndim
    if layout == "auto" and dims == 2:
        return values if size is None else _as_images(values, size, origin)
    last = dims > 2 and (values.shape[-1] in CHANNELS or layout == "sequences")
    first = dims > 2 and values.shape[1] in CHANNELS
    # Number of axes of a row, without that of the channels
    places = {3: 2, 4: 2 if first or last else 3, 5: 3}.get(dims, 0)
    places = {"sequences": 1, "volumes": 3}.get(layout, places)
    if places and (size is None or (layout == "auto" and places == 2)):
        if dims == places + 1:
            return values[:, None]
        if dims == places + 2 and (first or last):
            return np.moveaxis(values, -1, 1) if last else values
    shapes = {
        "auto": "rows (N, D), grey images (N, H, W), images of 1 or 3 channels (N, H, W, C) or "
        "(N, C, H, W), or volumes (N, D, H, W), perhaps with 1 or 3 channels",
        "sequences": "sequences (N, T) or (N, T, C), without --image-size,",
        "volumes": "volumes (N, D, H, W), perhaps with 1 or 3 channels, without --image-size,",
    }
    raise InputError(f"expected {shapes[layout]} in {origin}; got an array {values.shape}")


def _as_images(values: np.ndarray, size: tuple[int, int], origin: Path | str) -> np.ndarray:
    """Rows (N, D) as grey images (N, 1, H, W)."""
    if values.shape[1] != size[0] * size[1]:
        raise InputError(
            f"--image-size {size[0]} {size[1]} expects rows of {size[0] * size[1]} values; "
            f"{origin} has {values.shape[1]}"
        )
    return values.reshape(len(values), 1, *size)


def _classes(
    labels: np.ndarray, count: int, origin: Path | str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The class of each row, (N,) int64, and the names of the classes, sorted by number or name.

    An empty cell or NaN is a label that is not known, −1. Many different real numbers are a
    quantity to predict, not classes: they are left out.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.size and one_hot(labels):
        labels = labels.argmax(1)
    if labels.shape != (count,):
        raise InputError(
            f"expected one label per row, ({count},), in {origin}; got labels of shape "
            f"{labels.shape}"
        )
    known = np.ones(count, dtype=bool)
    if labels.dtype.kind in "fU":
        known = ~np.isnan(labels) if labels.dtype.kind == "f" else np.char.strip(labels) != ""
    distinct, codes = np.unique(labels[known], return_inverse=True)
    names = [str(name) for name in distinct]
    if all(map(is_number, names)) and all(map(math.isfinite, map(float, names))):
        numbers = [float(name) for name in names]
        whole = all(number.is_integer() for number in numbers)
        if not whole and len(numbers) > MAX_REAL_CLASSES:
            warnings.warn(
                f"the labels of {origin} are {len(numbers)} different real numbers, not classes: "
                f"they are left out",
                stacklevel=2,
            )
            return None, ()
        order = np.argsort(numbers, kind="stable")  # text sorts 10 before 2
        names = [names[i].removesuffix(".0") if whole else names[i] for i in order]
        codes = np.argsort(order)[codes]
    if not names:
        return None, ()
    every = np.full(count, -1, dtype=np.int64)
    every[known] = codes
    return every, tuple(names)


def one_hot(labels: np.ndarray) -> bool:
    """Whether labels (N, K) have a single 1 in each row, the column of its class, and else 0."""
    if labels.ndim != 2 or labels.dtype.kind not in "biuf":
        return False
    return bool(((labels != 0).sum(1) == 1).all() and ((labels == 1).sum(1) == 1).all())


def listed(names: Sequence[str]) -> str:
    """Names of columns or classes in a message: the first of many, shortened."""
    return ", ".join(name[:40] for name in names[:8]) + (", ..." if len(names) > 8 else "")


def is_number(text: str) -> bool:
    """Whether a cell of a table is a number. Python also reads 1_000 as one."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
