"""Data of any kind → `Splits`.

read        name, path or object in memory → `Source`, one array of rows
scan        one pass over all values: range, type, fingerprint; values must be finite, or missing
split       test rows first, which no choice uses; then validation rows from the rest, by a seed
"""

from __future__ import annotations

import dataclasses
import warnings
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig, InputError
from .columns import with_kinds
from .in_memory import read_object
from .labels import hide_labels, with_classes
from .matching import match_columns
from .precision import column_name
from .readers import read
from .scan import FLOAT32_MAX, SAMPLED_VALUES, Scan, check_float32, choose_spec, scan_values
from .source import Source
from .splits import DataSpec, Split, Splits, Units, interval

# Other data are of another unit, it seems, if they lie this many standard deviations from the
# training data, or if their range is this many times smaller.
FAR_AWAY = 1e3


def load_data(
    source: Any = "digits",
    seed: int = 0,
    *,
    spec: DataSpec | None = None,
    likelihood: str = "auto",
    **settings: Any,
) -> Splits:
    """Read data and split them into training, validation and test rows.

        load_data("digits")                          a data set by name: digits, mnist, …
        load_data("photos/", image_size=(32, 32))    a folder of images, a .npy, .npz or .csv file
        load_data(x)                                 a numpy array, torch tensor or DataFrame
        load_data((x, y))                            the same with labels (N,), integers or strings
        load_data(dataset)                           a map-style torch Dataset

    Arrays and tensors hold rows (N, D), images (N, H, W), (N, H, W, C) or (N, C, H, W), or volumes
    (N, D, H, W), (N, D, H, W, C) or (N, C, D, H, W), of 1 or 3 channels; or sequences, by
    `layout`. A column of a DataFrame called label, class or target holds its labels. A Dataset
    yields arrays, tensors or PIL images, or pairs of such an item and its label. Each item is read
    once: random transforms are not drawn again for each epoch.

    A contiguous array or tensor of uint8, bool or float32 is used in place, without a copy: do not
    change its values while the splits are in use. Other types are copied.

    Args:
        source: the data, as above, or a `DataConfig` with all settings.
        seed: selects the validation rows, and the test rows if the data have no test split.
        spec: that of a trained model, `vae.likelihood_module.spec`, for its own data or others like
            them. Columns and classes are matched by name, and x has the offset and scale of the
            training. Values may be missing if they could be in the training.
        likelihood: that of the model. The columns of a table have a kind each with auto, if it
            holds text or unlike columns, and with columns, for any table with names.
        settings: those of `DataConfig`: `image_size`, `layout`, `max_value`, `validation_size`,
            `test_size`, `missing`, `labelled` and `columns`, a dictionary of kinds or a file. Image
            sizes also apply to the PIL images of a Dataset.

    Raises:
        InputError: the data are missing, damaged or of an unsupported kind or shape, hold values
            that are not finite, have too few rows, or a row or column without observed values.
    """
    config, data = _read(source, DataConfig(**settings), spec)
    if spec is None:
        data = with_kinds(data, config.columns, likelihood)  # type: ignore[arg-type]
    lacking = config.missing == "model"
    rows, scan = _draw_splits(data, config, seed), scan_values(data, lacking)
    if spec is None:
        spec = choose_spec(data, config.max_value, scan, rows[0], lacking)
    splits = _splits(data, scan, spec, *rows)
    if config.labelled is None:
        return splits
    return hide_labels(with_classes(splits), config.labelled, seed)


def _read(source: Any, config: DataConfig, spec: DataSpec | None) -> tuple[DataConfig, Source]:
    """The settings of the data, and their rows as they are stored.

    `spec`: see `load_data`. It decides whether values may be missing, and the order of columns.
    """
    if isinstance(source, DataConfig):
        if config != DataConfig():
            raise InputError("expected all settings in the DataConfig; got others as arguments")
        config = source
    elif isinstance(source, (str, PathLike)):
        config = dataclasses.replace(config, source=str(source))
    if spec is not None:
        config = _as_trained(config, spec)
    in_memory = not isinstance(source, (str, PathLike, DataConfig))
    data = read_object(source, config) if in_memory else read(config)
    return config, data if spec is None else match_columns(data, spec)


def _as_trained(config: DataConfig, spec: DataSpec) -> DataConfig:
    """The settings for data of a trained model, which accepts missing values or not."""
    return dataclasses.replace(config, missing="model" if spec.missing else "refuse")


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
    own = source.num_validation + source.num_test
    order = torch.randperm(total - own, generator=shuffle)
    if source.num_test:
        test, rest = torch.arange(total - source.num_test, total), order
    else:
        size = config.test_size or max(1, total // 10)
        test, rest = order[:size].sort().values, order[size:]
    first, size = total - own, source.num_validation
    if size and len(rest):
        return rest.sort().values, torch.arange(first, first + size), test
    size = size or config.validation_size or min(5000, max(1, len(rest) // 10))
    if size >= len(rest):
        raise InputError(
            f"{source.name} has {total} rows, {len(test)} of them for testing: {size} rows for "
            f"validation leave none to train on; lower --validation-size or --test-size"
        )
    return rest[size:].sort().values, rest[:size].sort().values, test


def load_foreign(
    config: DataConfig,
    spec: DataSpec,
    units: Units,
    max_value: int | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Splits:
    """Read data for a model that was trained on other data: every row is a test row.

    Args:
        config: the data; `max_value` is that of the training.
        spec: shape and range of the data that the model was trained on.
        units: the units in which the model observes x.
        max_value: the largest value that these data can take. They are converted to the range of
            the training data. Default: that of the source, if it defines one.
        moments: mean and standard deviation of the training's x. Data far from it give a warning.

    Raises:
        InputError: the data are missing, damaged, outside the shape and range of `spec`, or in
            units that cannot be told.
    """
    source = match_columns(read(_as_trained(config, spec)), spec)
    scan = scan_values(source, spec.missing)
    fits = source.values.shape[1:] == spec.shape
    if fits:
        source, scan = _convert(source, scan, config.max_value, max_value, spec)
    bounded = spec.max_value is not None and units != "real"
    if (
        not fits
        or (bounded and not 0 <= scan.low <= scan.high <= spec.bound)
        or (spec.max_value is not None and scan.high > 10 * spec.max_value)
        or (spec.discrete and units == "count" and not scan.integral)
        or (spec.is_binary and bounded and not scan.integral)
    ):
        kind = "integers" if spec.discrete else "values"
        limits = f" from 0 to {spec.max_value}" if bounded else ""
        remedy = ": give --max-value, the largest value that these data can take"
        raise InputError(
            f"the model expects {kind}{limits} of shape {spec.shape}; {source.name} holds "
            f"{scan.describe()} of shape {source.values.shape[1:]}"
            f"{remedy if fits else ''}"
        )
    none = torch.arange(0)
    splits = _splits(source, scan, spec, none, none, torch.arange(len(source.values)))
    if moments is not None:
        _note_units(splits, units, *moments)
    return splits


def _convert(
    source: Source, scan: Scan, training: int | None, stated: int | None, spec: DataSpec
) -> tuple[Source, Scan]:
    """Other data in the range of the training data: value · bound / largest possible value.

    Args:
        training: `--max-value` of the training. Data whose type allows more, such as 12 bits in
            16-bit images, then hold the values of the training.
        stated: `--max-value` for these data.

    Raises:
        InputError: the largest possible value is unknown, and cannot be that of the training data.
    """
    if spec.max_value is None:
        if stated:
            raise InputError("--max-value has no effect on a model of unbounded data; drop it")
        return source, scan
    largest = stated or source.max_value
    if not stated and training and largest and largest >= spec.bound:
        largest = spec.bound
    if largest is None:
        _check_range(source, scan, spec)
    if largest in (None, spec.bound):
        return source, scan
    if not 0 <= scan.low <= scan.high <= largest:
        raise InputError(
            f"expected values from 0 to {largest} in {source.name}; got "
            f"{interval(scan.low, scan.high)}: give --max-value, the largest value that they can "
            f"take"
        )
    factor = spec.bound / largest
    values = source.values.astype(np.float64) * factor
    ends = bool(np.isin(values[~np.isnan(values)], (0.0, spec.bound)).all())
    if spec.discrete and (spec.bound > 1 or ends):
        values = np.rint(values)
    bytes_suffice = spec.discrete and 1 < spec.bound <= 255 and not scan.missing
    values = values.astype(np.uint8 if bytes_suffice else np.float32)
    known = values[~np.isnan(values)]
    integral = bool((known == np.rint(known)).all())
    low, high = float(known.min()), float(known.max())
    scan = dataclasses.replace(scan, low=low, high=high, integral=integral)
    return dataclasses.replace(source, values=values), scan


def _check_range(source: Source, scan: Scan, spec: DataSpec) -> None:
    """Check that values of an unknown range can be in that of the training data.

    Raises:
        InputError: they are fractions where the model knows integers, or all far below its pixels.
    """
    fractions = spec.discrete and spec.bound > 1 and not scan.integral and scan.low >= 0
    pixels = spec.discrete and spec.bound >= 255 and scan.integral
    if (fractions and scan.high <= 1) or (pixels and 0 < scan.high <= spec.bound / 16):
        raise InputError(
            f"the model was trained on values from 0 to {spec.bound}; {source.name} holds "
            f"{scan.describe()}, whose unit cannot be told: give --max-value, the largest value "
            f"that these data can take ({spec.bound} if they are in the unit of the training)"
        )


def _note_units(splits: Splits, units: Units, mean: Tensor, std: Tensor) -> None:
    """Warn if most rows are far from the training data, or nearly equal: another unit, perhaps."""
    spec, count = splits.spec, min(len(splits.test), max(1, SAMPLED_VALUES // mean.numel()))
    x = torch.cat(list(splits.test.fixed("unit" if units == "binary" else units, 0, count)))
    z = ((x - mean.to(x)) / std.to(x)).flatten(1)
    # Without missing values; a column of them only has neither.
    far = z.abs().nanmedian(dim=0).values
    extent = z.nan_to_num(-torch.inf).amax(0) - z.nan_to_num(torch.inf).amin(0)
    if not spec.is_table:
        far, extent = z.abs().nanmedian()[None], extent.max()[None]
    narrow = (extent > 0) & (extent < 1 / FAR_AWAY) & (count >= 10)
    for column in ((far > FAR_AWAY) | narrow).nonzero()[:3, 0].tolist():
        where = "" if not spec.is_table else f"{column_name(spec.columns, column)} of "
        size = f"lie {far[column]:.2g} standard deviations of the training data from their mean"
        if not far[column] > FAR_AWAY:
            size = f"vary by {extent[column]:.2g} standard deviations of the training data"
        warnings.warn(
            f"values in {where}{splits.name} {size}: are they in the same unit?", stacklevel=3
        )


def _splits(source: Source, scan: Scan, spec: DataSpec, *rows: Tensor) -> Splits:
    """The splits with these rows: training, validation, test."""
    if source.values.shape[1:] != spec.shape:
        raise InputError(
            f"the model expects rows of shape {spec.shape}; {source.name} holds rows of shape "
            f"{source.values.shape[1:]}"
        )
    if spec.offset is not None or max(abs(scan.low), abs(scan.high)) > FLOAT32_MAX:
        check_float32(source, spec)
    # Observed values are written as they were read, see `impute`.
    wide = spec.offset is not None or (spec.missing and source.values.dtype.kind == "f")
    values = _tensor(source.values, wide=wide)
    labels = None if source.labels is None else torch.from_numpy(source.labels)
    classes, spec = spec.classes, dataclasses.replace(spec, classes=())
    train, validation, test = (
        Split(values, part, spec, None if labels is None else labels[part]) for part in rows
    )
    splits = Splits(
        name=source.name,
        train=train,
        validation=validation,
        test=test,
        spec=spec,
        likelihood=source.likelihood or _default_likelihood(spec),
        class_names=source.class_names,
        found=source.found,
        **vars(scan),
    )
    return with_classes(splits, classes) if classes else splits


def _default_likelihood(spec: DataSpec) -> str:
    if spec.kinds:
        return "columns"
    if spec.max_value is None:
        return "gaussian"
    if not spec.discrete:
        return "continuous-bernoulli"
    if spec.max_value == 1:
        return "bernoulli"
    return "binomial" if spec.max_value < 255 else "discretized-logistic"


def _tensor(values: np.ndarray, *, wide: bool = False) -> Tensor:
    """A tensor of uint8 or float, over the same memory if type and layout allow it.

    `wide`: keep what float32 would lose.
    """
    if values.dtype == bool:
        values = values.view(np.uint8)
    if isinstance(values, np.memmap) and values.dtype in (np.uint8, np.float32, np.float64):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(values)
    if wide and values.dtype != np.float32:
        return torch.from_numpy(np.require(values, np.float64, ["C", "W"]))
    byte = values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255
    # torch needs contiguous, writable memory.
    return torch.from_numpy(np.require(values, np.uint8 if byte else np.float32, ["C", "W"]))
