"""Names, files and arrays → `Source`: one array of rows, as they are stored.

    digits, mnist, …       included in scikit-learn; torchvision's data sets
    folder of images       (N, C, H, W); nested folders are labels
    .npy, .npz, .csv       (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), perhaps with labels

`from_array` checks and orders the values of a file, a folder or an object in memory
(`in_memory.py`). Nothing is scaled, binarized or split here, and nothing is unpickled: arrays are
read with `allow_pickle=False`.
"""

from __future__ import annotations

import csv
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..config import TORCHVISION_CLASSES, DataConfig, InputError

LABEL_COLUMNS = ("label", "labels", "class", "target", "targets")
LABEL_NAMES = (*LABEL_COLUMNS, "y")  # a table may have a coordinate called y
VALUE_NAMES = ("x", "data", "images")

# pillow's exceptions for damaged files and files that are not images.
UNREADABLE = (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Source:
    """Rows as they are stored.

    Attributes:
        name: name of the data in titles and messages.
        values: (N, *shape), numbers; images are (N, C, H, W).
        labels: (N,) int64, or None.
        class_names: the name of each label, or empty.
        num_test: the last `num_test` rows are the data's own test split; 0 if they have none.
        max_value: the largest possible value, if the source defines one.
        likelihood: the usual likelihood of the data, if there is one.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    num_test: int = 0
    max_value: int | None = None
    likelihood: str | None = None


def read(config: DataConfig) -> Source:
    """Read the data that `config` names.

    Raises:
        InputError: the data are missing, damaged or of an unsupported shape.
    """
    if config.source == "digits":
        return _digits(config)
    if config.source in TORCHVISION_CLASSES:
        return _torchvision(config)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _folder(path, config)
    if not path.exists():
        raise InputError(
            f"--data expects digits, {', '.join(TORCHVISION_CLASSES)}, or the path of a folder of "
            f"images, a .npy, .npz or .csv file; {config.source!r} is not one of these, and no "
            f"such path exists"
        )
    readers = {".npy": _npy, ".npz": _npz, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"--data expects a folder of images, a .npy, .npz or .csv file; got {path}. "
            f"Put single images into a folder"
        )
    return readers[path.suffix.lower()](path, config)


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


def _digits(config: DataConfig) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = digits.images.astype(np.uint8)
    source = from_array(values, digits.target, config, "digits", "digits")
    return replace(source, max_value=16)  # each pixel counts the inked cells of a 4x4 block


def _torchvision(config: DataConfig) -> Source:
    """MNIST and similar data: 60,000 or more grey 28x28 images and a test split."""
    name, root = config.source, config.root
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"--data {name} needs a torchvision that fits the installed torch ({error}); install "
            f"both from the same index, or use --data digits"
        ) from None
    dataset_class: Any = getattr(datasets, TORCHVISION_CLASSES[name])
    folder = root / TORCHVISION_CLASSES[name]
    options: dict[str, Any] = {"split": "balanced"} if name == "emnist" else {}
    prefixes = [f"emnist-balanced-{part}" for part in ("train", "test")]
    prefixes = prefixes if name == "emnist" else ["train", "t10k"]
    files = [f"{p}-{kind}" for p in prefixes for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    # Early releases of torchvision stored the data in a folder called processed.
    present = (folder / "processed").is_dir() or all((folder / "raw" / f).is_file() for f in files)
    try:  # downloads only what is missing
        parts = [dataset_class(root, train=t, download=True, **options) for t in (True, False)]
    except (RuntimeError, OSError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if present:
            raise InputError(
                f"{name} under {root} is damaged ({reason}); delete {folder} or repair it"
            ) from None
        raise InputError(
            f"{name} is not under {root} and cannot be downloaded ({reason}). Put {files[0]}, "
            f"{', '.join(files[1:])}, unpacked, under {folder / 'raw'} or name another folder by "
            f"--data-root; --data digits needs neither network nor files"
        ) from None
    values = np.concatenate([part.data.numpy() for part in parts])
    if name == "emnist":  # stored with rows and columns exchanged
        values = values.swapaxes(1, 2)
    return replace(
        from_array(values, None, config, name, name),
        labels=np.concatenate([part.targets.numpy() for part in parts]).astype(np.int64),
        class_names=tuple(parts[0].classes),
        num_test=len(parts[1].data),
        max_value=255,
        likelihood="bernoulli",
    )


def _folder(path: Path, config: DataConfig) -> Source:
    """A folder of images. The folder of an image, relative to `path`, is its label."""
    files = _image_files(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow warns about unusual metadata
        modes = [_read_image(path, file, pixel_mode) for file in files]  # reads the headers only
        mode = next(m for m in ("F", "RGB", "L", "1") if m in modes)
        if mode == "F" and len(set(modes)) > 1:
            other = files[next(i for i, m in enumerate(modes) if m != "F")]
            raise InputError(f"{path} mixes float or 16-bit images with 8-bit ones, like {other}")
        convert = partial(pixels, mode=mode, image_size=config.image_size)
        first = _read_image(path, files[0], convert)
        values = np.empty((len(files), *first.shape), first.dtype)
        for row, file in zip(values, files, strict=True):
            image = _read_image(path, file, convert)
            if image.shape != first.shape:
                sizes = ["x".join(map(str, p.shape[:2])) for p in (first, image)]
                raise InputError(
                    f"{path} holds images of mixed size: {files[0].name} is {sizes[0]} (height x "
                    f"width), {file} is {sizes[1]}; give one size for all by --image-size H W"
                )
            row[...] = image
    names = np.array([str(file.parent.relative_to(path)) for file in files])
    labels = names if len(set(names)) > 1 else None
    return from_array(values, labels, config, path.resolve().name, path)


def _image_files(path: Path) -> list[Path]:
    """The files of a folder and all folders below it, without hidden ones, in order."""
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(place)
        files += [Path(folder, n) for n in names if not n.startswith(".") and n != "Thumbs.db"]
    if not files:
        raise InputError(f"--data expects a folder with images; {path} holds none")
    return sorted(files)


def _read_image(folder: Path, file: Path, function: Callable[[Image.Image], Any]) -> Any:
    """`function` of the opened image.

    Raises:
        InputError: the file is not an image; the message names it.
    """
    try:
        with Image.open(file) as image:
            return function(image)
    except UNREADABLE as error:
        raise InputError(
            f"{file} is not an image or is damaged ({error}); repair it or remove it from {folder}"
        ) from None


def pixel_mode(image: Image.Image) -> str:
    """The pillow mode that holds the image without loss, among 1, L, RGB and F."""
    if image.mode in ("1", "L", "F"):
        return image.mode
    if image.mode.startswith("I"):
        return "F"
    return "L" if image.mode in ("LA", "La") else "RGB"


def pixels(image: Image.Image, mode: str, image_size: tuple[int, int] | None) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3) as uint8, or as float32 if the mode is F."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit images become intensities in [0, 1]; pillow resizes floats, not 16-bit integers.
        image = Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode != mode:
        image = image.convert(mode)
    if image_size:
        if mode == "1":
            image = image.convert("L")
        image = image.resize((image_size[1], image_size[0]), Image.Resampling.LANCZOS)
    values = np.asarray(image)
    return values.astype(np.uint8) if values.dtype == bool else values


def _npy(path: Path, config: DataConfig) -> Source:
    try:
        # Copy on write: torch needs writable memory; the file is never changed.
        values = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a whole .npy file of numbers: {error}") from None
    if not isinstance(values, np.ndarray):
        values.close()
        raise InputError(f"{path} is a .npz archive by its content; rename it")
    return from_array(values, None, config, path.stem, path)


def _npz(path: Path, config: DataConfig) -> Source:
    """Arrays named x and y, or x_train, y_train, x_test and y_test."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key.lower(): archive[key] for key in archive.files}
    except TypeError:
        raise InputError(f"{path} is a single array by its content; name it .npy") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a whole .npz file of numbers: {error}") from None

    def one_of(names: tuple[str, ...], suffix: str = "") -> np.ndarray | None:
        return next((arrays[name + suffix] for name in names if name + suffix in arrays), None)

    num_test = 0
    values, labels = one_of(VALUE_NAMES, "_train"), one_of(LABEL_NAMES, "_train")
    if values is None:
        values, labels = one_of(VALUE_NAMES), one_of(LABEL_NAMES)
        rest = [a for key, a in arrays.items() if key not in LABEL_NAMES]
        if values is None and len(rest) != 1:
            raise InputError(
                f"{path} expects one array named x (or data, images), or x_train and x_test; got "
                f"{', '.join(arrays) or 'no array'}"
            )
        values = rest[0] if values is None else values
    elif (test := one_of(VALUE_NAMES, "_test")) is not None:
        test_labels = one_of(LABEL_NAMES, "_test")
        if test.shape[1:] != values.shape[1:]:
            raise InputError(f"{path}: train rows are {values.shape[1:]}, test {test.shape[1:]}")
        values, num_test = np.concatenate([values, test]), len(test)
        if labels is not None and test_labels is not None:
            labels = np.concatenate([labels, test_labels])
    return replace(from_array(values, labels, config, path.stem, path), num_test=num_test)


def _csv(path: Path, config: DataConfig) -> Source:
    """A table of numbers; a first line of names is skipped; a column named label gives labels."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as text: {error}") from None
    if not first:
        raise InputError(f"{path} expects a table of numbers; its first line is empty")
    delimiter = max(",;\t", key=first.count)
    cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    header = not any(map(_is_number, cells)) and any(cells)
    column = None
    if header:
        column = next((i for i, cell in enumerate(cells) if cell.lower() in LABEL_COLUMNS), None)
    columns = [i for i in range(len(cells)) if i != column]
    options: dict[str, Any] = {
        "delimiter": delimiter,
        "skiprows": int(header),
        "ndmin": 2,
        "encoding": "utf-8-sig",
        "comments": None,
        "quotechar": '"',
    }
    labels: np.ndarray | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty table is an error below
            values = np.loadtxt(path, usecols=columns, **options)
            if column is not None:
                labels = np.loadtxt(path, usecols=[column], dtype=str, **options)[:, 0]
    except ValueError as error:
        raise InputError(
            f"{path} expects numbers in every cell: {error} (counted from 0"
            f"{', below the names' if header else ''})"
        ) from None
    return from_array(values, labels, config, path.stem, path)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
