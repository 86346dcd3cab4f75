"""Data of any kind → `Splits`.

read        name, path or object in memory → `Source`, one array of rows
scan        one pass over all values: range, type, fingerprint; NaN and infinities are errors
split       test rows first, which no choice uses; then validation rows from the rest, by a seed
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig, InputError
from .in_memory import read_object
from .readers import read
from .source import Source
from .splits import CHUNK, DataSpec, Split, Splits, Units


def load_data(
    source: Any = "digits",
    seed: int = 0,
    *,
    image_size: tuple[int, int] | None = None,
    max_value: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
) -> Splits:
    """Read data and split them into training, validation and test rows.

        load_data("digits")                          a data set by name: digits, mnist, …
        load_data("photos/", image_size=(32, 32))    a folder of images, a .npy, .npz or .csv file
        load_data(x)                                 a numpy array, torch tensor or DataFrame
        load_data((x, y))                            the same with labels (N,), integers or strings
        load_data(dataset)                           a map-style torch Dataset

    Arrays and tensors hold rows (N, D) or images (N, H, W), (N, H, W, C) or (N, C, H, W) of 1 or 3
    channels. A column of a DataFrame called label, class or target holds its labels. A Dataset
    yields arrays, tensors or PIL images, or pairs of such an item and its label. Each item is read
    once: random transforms are not drawn again for each epoch.

    A contiguous array or tensor of uint8, bool or float32 is used in place, without a copy: do not
    change its values while the splits are in use. Other types are copied.

    Args:
        source: the data, as above, or a `DataConfig` with all settings.
        seed: selects the validation rows, and the test rows if the data have no test split.
        image_size: height and width of images, in pixels. Images of a folder, and PIL images of a
            Dataset, are resized to it; flat rows (N, H·W) are read as grey images.
        max_value: largest value that the data can take, for example 255 for 8-bit images. Default:
            1, 255 or the largest count, as the values suggest.
        validation_size: number of validation rows. Default: a tenth of the training data, at most
            5000.
        test_size: number of test rows. Default: a tenth, or the data's own test split.

    Raises:
        InputError: the data are missing, damaged or of an unsupported kind or shape, hold values
            that are not finite, or have too few rows.
    """
    config = DataConfig(
        image_size=image_size,
        max_value=max_value,
        validation_size=validation_size,
        test_size=test_size,
    )
    if isinstance(source, DataConfig):
        if config != DataConfig():
            raise InputError("expected all settings in the DataConfig; got others as arguments")
        config, data = source, read(source)
    elif isinstance(source, (str, PathLike)):
        config = dataclasses.replace(config, source=str(source))
        data = read(config)
    else:
        data = read_object(source, config)
    scan = _scan(data)
    spec = _spec(data, config.max_value, scan)
    return _splits(data, scan, spec, *_draw_splits(data, config, seed))


def _draw_splits(source: Source, config: DataConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The row indices of training, validation and test split, each in ascending order."""
    total = len(source.values)
    if total < 3:
        raise InputError(
            f"{source.name} has {total} row{'s' * (total > 1)}; training, validation and test need "
            f"at least one each"
        )
    if source.num_test and config.test_size is not None:
        raise InputError(
            f"--test-size has no effect on {source.name}, which has its own test split of "
            f"{source.num_test} rows; drop it"
        )
    if source.num_validation and config.validation_size is not None:
        raise InputError(
            f"--validation-size has no effect on {source.name}, which has its own validation split "
            f"of {source.num_validation} rows; drop it"
        )
    shuffle = torch.Generator().manual_seed(seed)
    drawn = total - source.num_test - source.num_validation
    order = torch.randperm(drawn, generator=shuffle)
    validation = torch.arange(drawn, drawn + source.num_validation)
    if source.num_test:
        test, rest = torch.arange(total - source.num_test, total), order
    else:
        size = config.test_size or max(1, total // 10)
        test, rest = order[:size].sort().values, order[size:]
    if source.num_validation and len(rest):
        return rest.sort().values, validation, test
    size = config.validation_size or min(5000, max(1, len(rest) // 10))
    if size >= len(rest):
        raise InputError(
            f"{source.name} has {total} rows, {len(test)} of them for testing: {size} rows for "
            f"validation leave none to train on; lower --validation-size or --test-size"
        )
    return rest[size:].sort().values, rest[:size].sort().values, test


def load_foreign(config: DataConfig, spec: DataSpec, units: Units) -> Splits:
    """Read data for a model that was trained on other data: every row is a test row.

    Args:
        config: the data.
        spec: shape and range of the data that the model was trained on.
        units: the units in which the model observes x.

    Raises:
        InputError: the data are missing, damaged, or outside the shape and range of `spec`.
    """
    source = read(config)
    scan = _scan(source)
    none = torch.arange(0)
    splits = _splits(source, scan, spec, none, none, torch.arange(len(source.values)))
    bounded = spec.max_value is not None and units != "real"
    if (
        source.values.shape[1:] != spec.shape
        or (bounded and not 0 <= scan.low <= scan.high <= spec.bound)
        or (spec.discrete and units == "count" and not scan.integral)
    ):
        kind = "integers" if spec.discrete else "values"
        limits = f" from 0 to {spec.max_value}" if bounded else ""
        raise InputError(
            f"the model expects {kind}{limits} of shape {spec.shape}; {source.name} holds "
            f"{splits.describe()} of shape {source.values.shape[1:]}"
        )
    return splits


def _splits(source: Source, scan: _Scan, spec: DataSpec, *rows: Tensor) -> Splits:
    """The splits with these rows: training, validation, test."""
    values = _tensor(source.values)
    labels = None if source.labels is None else torch.from_numpy(source.labels)
    train, validation, test = (
        Split(values, part, spec, None if labels is None else labels[part]) for part in rows
    )
    return Splits(
        name=source.name,
        train=train,
        validation=validation,
        test=test,
        spec=spec,
        likelihood=source.likelihood or _default_likelihood(spec),
        class_names=source.class_names,
        **vars(scan),
    )


@dataclass(frozen=True)
class _Scan:
    """The results of one pass over all values, as attributes of `Splits`."""

    low: float
    high: float
    integral: bool
    fingerprint: str


def _scan(source: Source) -> _Scan:
    low, high, integral, bad = np.inf, -np.inf, True, 0
    first: tuple[int, ...] = ()
    digest = hashlib.blake2b(repr((source.values.shape, str(source.values.dtype))).encode())
    for start in range(0, len(source.values), 4 * CHUNK):
        chunk = np.ascontiguousarray(source.values[start : start + 4 * CHUNK])
        digest.update(chunk.tobytes())
        if chunk.dtype.kind == "f":
            with np.errstate(over="ignore"):  # models compute in float32
                wrong = ~np.isfinite(chunk.astype(np.float32))
            if wrong.any():
                if not bad:
                    row, *place = np.argwhere(wrong)[0].tolist()
                    first = (start + row, *place)
                bad += int(wrong.sum())
                continue
            integral = integral and bool((chunk == np.rint(chunk)).all())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    if bad:
        raise InputError(
            f"{source.name} holds {bad} value{'s' * (bad > 1)} that are NaN, infinite or beyond "
            f"3e38, the first in row {first[0]} at {first[1:]} (counted from 0); remove or impute "
            f"them"
        )
    return _Scan(low, high, integral, digest.hexdigest())


def _spec(source: Source, max_value: int | None, scan: _Scan) -> DataSpec:
    low, high, integral = scan.low, scan.high, scan.integral
    limit = max_value or source.max_value
    if limit is not None and not 0 <= low <= high <= limit:
        raise InputError(
            f"--max-value {limit} expects values from 0 to {limit}; {source.name} ranges from "
            f"{low:g} to {high:g}"
        )
    if limit is None and integral and low >= 0 and 1 < high <= 255:
        # uint8 is the type of 8-bit images, even if their largest value is below 255.
        limit = 255 if source.values.dtype == np.uint8 else int(high)
    if limit is None and low >= 0 and high <= 1:
        limit = 1
    return DataSpec(tuple(source.values.shape[1:]), limit, discrete=integral and limit is not None)


def _default_likelihood(spec: DataSpec) -> str:
    if spec.max_value is None:
        return "gaussian"
    if not spec.discrete:
        return "continuous-bernoulli"
    if spec.max_value == 1:
        return "bernoulli"
    return "binomial" if spec.max_value < 255 else "discretized-logistic"


def _tensor(values: np.ndarray) -> Tensor:
    """A tensor of uint8 or float, over the same memory if type and layout allow it."""
    if values.dtype == bool:
        values = values.view(np.uint8)
    if isinstance(values, np.memmap) and values.dtype in (np.uint8, np.float32, np.float64):
        return torch.from_numpy(values)
    byte = values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255
    # torch needs contiguous, writable memory.
    return torch.from_numpy(np.require(values, np.uint8 if byte else np.float32, ["C", "W"]))
