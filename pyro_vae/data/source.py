"""`Source`: one array of rows, as they are stored, checked by `from_array`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DataConfig, InputError

LABEL_COLUMNS = ("label", "labels", "class", "target", "targets")
LABEL_NAMES = (*LABEL_COLUMNS, "y")  # a table may have a coordinate called y


@dataclass(frozen=True)
class Source:
    """Rows as they are stored.

    Attributes:
        name: name of the data in titles and messages.
        values: (N, *shape), numbers; images are (N, C, H, W).
        labels: (N,) int64, or None.
        class_names: the name of each label, or empty.
        num_test: the last `num_test` rows are the data's own test split; 0 if they have none.
        num_validation: the `num_validation` rows before these are their own validation split.
        max_value: the largest possible value, if the source defines one.
        likelihood: the usual likelihood of the data, if there is one.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    num_test: int = 0
    num_validation: int = 0
    max_value: int | None = None
    likelihood: str | None = None


def from_array(
    values: np.ndarray,
    labels: np.ndarray | None,
    config: DataConfig,
    name: str,
    origin: Path | str,
) -> Source:
    """Check the type and shape of an array; view images as (N, C, H, W), without a copy.

    Args:
        values: (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3.
        labels: (N,), of one sortable type, or None. The sorted distinct labels are the classes.
        config: for `image_size`, which turns (N, D) into images.
        name: name of the data.
        origin: name of the data in error messages.

    Raises:
        InputError: the values are not rows of numbers, or a row lacks a label.
    """
    if values.dtype.kind not in "biuf":
        raise InputError(f"expected numbers in {origin}; got an array of dtype {values.dtype}")
    if values.size == 0:
        raise InputError(f"expected rows of numbers in {origin}; got an empty array {values.shape}")
    size = config.image_size
    if values.ndim == 2 and size:
        if values.shape[1] != size[0] * size[1]:
            raise InputError(
                f"--image-size {size[0]} {size[1]} expects rows of {size[0] * size[1]} values; "
                f"{origin} has {values.shape[1]}"
            )
        values = values.reshape(len(values), 1, *size)
    elif values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and values.shape[3] in (1, 3):
        values = np.moveaxis(values, 3, 1)
    elif values.ndim != 2 and not (values.ndim == 4 and values.shape[1] in (1, 3)):
        raise InputError(
            f"expected rows (N, D), grey images (N, H, W) or images of 1 or 3 channels "
            f"(N, H, W, C) or (N, C, H, W) in {origin}; got an array {values.shape}"
        )
    classes: tuple[str, ...] = ()
    if labels is not None:
        if labels.shape != (len(values),):
            raise InputError(
                f"expected one label per row, ({len(values)},), in {origin}; got labels of shape "
                f"{labels.shape}"
            )
        distinct, labels = np.unique(labels, return_inverse=True)
        classes, labels = tuple(map(str, distinct)), labels.astype(np.int64)
    if size and size != values.shape[2:]:
        raise InputError(
            f"--image-size resizes folders of images only; {name} has images of "
            f"{'x'.join(map(str, values.shape[2:]))}, --image-size asks for {size[0]}x{size[1]}"
        )
    return Source(name, values, labels, classes)
