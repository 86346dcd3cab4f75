"""Name or path → one array of rows, as they are stored.

Every reader returns a `Source`: values (N, *shape), images with the channel first, labels where
there are any. Nothing is scaled, binarized or split here (`data.py` does that), and nothing is
unpickled: arrays are read with `allow_pickle=False`.
"""

from __future__ import annotations

import csv
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .config import TORCHVISION_CLASSES, DataConfig, InputError

__all__ = ["Source", "read"]

LABEL_COLUMNS = ("label", "labels", "class", "target", "targets")
LABEL_NAMES = (*LABEL_COLUMNS, "y")  # in a table y may well be a coordinate
VALUE_NAMES = ("x", "data", "images")


@dataclass(frozen=True)
class Source:
    """Rows as they are stored.

    Attributes:
        name: how to call the data in titles and messages.
        values: (N, *shape), numbers; images are (N, C, H, W).
        labels: (N,) int64, or None.
        class_names: the name of each label, or empty.
        num_test: the last `num_test` rows are the data's own test split; 0 where it has none.
        max_value: the largest possible value where the source defines one.
        likelihood: the customary likelihood of this data, where there is one.
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
        InputError: the data are missing, damaged or of a shape that nothing here can use.
    """
    if config.source == "digits":
        return _fixed_size(_digits(), config)
    if config.source in TORCHVISION_CLASSES:
        source = _torchvision(config.source, TORCHVISION_CLASSES[config.source], config.root)
        return _fixed_size(source, config)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _folder(path, config.image_size)
    if not path.exists():
        raise InputError(
            f"--data expects digits, {', '.join(TORCHVISION_CLASSES)}, or the path of a folder of "
            f"images, a .npy, .npz or .csv file; {config.source!r} is none of these names and no "
            f"such path exists"
        )
    readers: dict[str, Callable[[Path, DataConfig], Source]] = {
        ".npy": _npy,
        ".npz": _npz,
        ".csv": _csv,
    }
    if path.suffix.lower() not in readers:
        raise InputError(
            f"--data expects a folder of images, a .npy, .npz or .csv file; got {path}. "
            f"Put single images into a folder"
        )
    return readers[path.suffix.lower()](path, config)


def _fixed_size(source: Source, config: DataConfig) -> Source:
    """Refuse to resize images that are not a folder's."""
    size = source.values.shape[-2:]
    if config.image_size and tuple(config.image_size) != size:
        raise InputError(
            f"--image-size resizes folders of images only; {source.name} has images of "
            f"{size[0]}x{size[1]}, --image-size asks for {'x'.join(map(str, config.image_size))}"
        )
    return source


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Source(
        name="digits",
        values=digits.images.astype(np.uint8)[:, None],
        labels=digits.target.astype(np.int64),
        class_names=tuple(str(name) for name in digits.target_names),
        max_value=16,  # each pixel counts the inked cells of a 4x4 block
    )


def _torchvision(name: str, class_name: str, root: Path) -> Source:
    """MNIST and its relatives: 60,000 or more grey 28x28 images and their own test split."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"--data {name} needs a torchvision that fits the installed torch ({error}); install "
            f"both from the same index, or use --data digits"
        ) from None
    dataset_class: Any = getattr(datasets, class_name)
    options = {"split": "balanced"} if name == "emnist" else {}
    try:
        parts = [dataset_class(root, train=train, **options) for train in (True, False)]
    except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        if "not found" not in str(error).lower():
            raise InputError(
                f"{name} under {root} is damaged ({error}); delete {root / class_name} or mend it"
            ) from None
        try:
            parts = [
                dataset_class(root, train=train, download=True, **options)
                for train in (True, False)
            ]
        except (RuntimeError, OSError) as failure:
            stem = "emnist-balanced-" if name == "emnist" else ""
            last_line = str(failure).strip().splitlines()[-1]
            raise InputError(
                f"{name} is not under {root} and cannot be downloaded ({last_line}). Put "
                f"{stem}train-images-idx3-ubyte and -labels-idx1-ubyte, and the same of "
                f"{'emnist-balanced-test' if stem else 't10k'}, unpacked, under "
                f"{root / class_name / 'raw'} or name another folder by --data-root; --data digits "
                f"needs neither network nor files"
            ) from None
    values = np.concatenate([part.data.numpy() for part in parts])[:, None]
    if name == "emnist":  # stored with rows and columns exchanged
        values = np.ascontiguousarray(values.swapaxes(-1, -2))
    return Source(
        name=name,
        values=values,
        labels=np.concatenate([part.targets.numpy() for part in parts]).astype(np.int64),
        class_names=tuple(parts[0].classes),
        num_test=len(parts[1].data),
        max_value=255,
        likelihood="bernoulli",
    )


def _folder(path: Path, image_size: tuple[int, int] | None) -> Source:
    """A folder of images; the folder that an image lies in, below `path`, is its label."""
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(place)
        files += [Path(folder, n) for n in names if not n.startswith(".") and n != "Thumbs.db"]
    files.sort()
    if not files:
        raise InputError(f"--data expects a folder with images; {path} holds none")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow's notes on odd metadata
        modes = [_read_image(path, file, _mode) for file in files]  # reads the headers only
        mode = next(m for m in ("F", "RGB", "L", "1") if m in modes)
        if mode == "F" and len(set(modes)) > 1:
            other = files[next(i for i, m in enumerate(modes) if m != "F")]
            raise InputError(f"{path} mixes float or 16-bit images with 8-bit ones, as {other}")
        convert = partial(_pixels, mode=mode, image_size=image_size)
        first = _read_image(path, files[0], convert)
        values = np.empty((len(files), *first.shape), first.dtype)
        for row, file in zip(values, files, strict=True):
            pixels = _read_image(path, file, convert)
            if pixels.shape != first.shape:
                sizes = ["x".join(map(str, p.shape[:2])) for p in (first, pixels)]
                raise InputError(
                    f"{path} holds images of mixed size: {files[0].name} is {sizes[0]} (height x "
                    f"width), {file} is {sizes[1]}; give one size for all by --image-size H W"
                )
            row[...] = pixels
    values = (
        values[:, None] if values.ndim == 3 else np.ascontiguousarray(np.moveaxis(values, 3, 1))
    )
    names = [str(file.parent.relative_to(path)) for file in files]
    classes = tuple(sorted(set(names)))
    labels = np.array([classes.index(name) for name in names]) if len(classes) > 1 else None
    return Source(
        name=path.resolve().name,
        values=values,
        labels=labels,
        class_names=classes if labels is not None else (),
        max_value=None if mode == "F" else 255 if values.max() > 1 else None,
    )


def _read_image(folder: Path, file: Path, function: Callable[[Any], Any]) -> Any:
    """`function` of the opened image; an error that names the file where it is none."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return function(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        NotImplementedError,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(
            f"{file} is not an image or is damaged ({error}); mend it or remove it from {folder}"
        ) from None


def _mode(image: Any) -> str:
    """The pillow mode that holds the image without loss, among 1, L, RGB and F."""
    if image.mode in ("1", "L", "F"):
        return image.mode
    if image.mode.startswith("I"):
        return "F"
    return "L" if image.mode in ("LA", "La") else "RGB"


def _pixels(image: Any, mode: str, image_size: tuple[int, int] | None) -> np.ndarray:
    """(H, W) or (H, W, 3): uint8, or float32 where the mode is F."""
    from PIL import Image, ImageOps

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
        # Copy on write: torch wants writable memory, the file stays as it is.
        values = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a whole .npy file of numbers: {error}") from None
    if not isinstance(values, np.ndarray):
        values.close()
        raise InputError(f"{path} is a .npz archive by its content; name it so")
    return Source(path.stem, _rows(values, path, config))


def _npz(path: Path, config: DataConfig) -> Source:
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
    train, labels = one_of(VALUE_NAMES, "_train"), one_of(LABEL_NAMES, "_train")
    if train is not None:
        test, test_labels = one_of(VALUE_NAMES, "_test"), one_of(LABEL_NAMES, "_test")
        values = train
        if test is not None:
            if test.shape[1:] != train.shape[1:]:
                raise InputError(f"{path}: train rows are {train.shape[1:]}, test {test.shape[1:]}")
            values, num_test = np.concatenate([train, test]), len(test)
            if labels is not None and test_labels is not None:
                labels = np.concatenate([labels, test_labels])
    else:
        labels = one_of(LABEL_NAMES)
        rest = [a for key, a in arrays.items() if key not in LABEL_NAMES]
        found = one_of(VALUE_NAMES)
        if found is None and len(rest) != 1:
            raise InputError(
                f"{path} expects one array named x (or data, images), or x_train and x_test; got "
                f"{', '.join(arrays) or 'no array'}"
            )
        values = rest[0] if found is None else found
    rows = _rows(values, path, config)
    classes: tuple[str, ...] = ()
    if labels is not None:
        if labels.shape != (len(rows),):
            raise InputError(
                f"{path} expects one label a row, ({len(rows)},); got labels of {labels.shape}"
            )
        classes, labels = _classes(labels)
    return Source(path.stem, rows, labels, classes, num_test)


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
    classes: tuple[str, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty table is refused below
            values = np.loadtxt(path, usecols=columns, **options)
            if column is not None:
                texts = np.loadtxt(path, usecols=[column], dtype=str, **options)
                classes, labels = _classes(texts[:, 0])
    except ValueError as error:
        raise InputError(
            f"{path} expects numbers in every cell: {error} (counted from 0"
            f"{', below the names' if header else ''})"
        ) from None
    return Source(path.stem, _rows(values, path, config), labels, classes)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _classes(labels: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    names, codes = np.unique(labels, return_inverse=True)
    return tuple(str(name) for name in names), codes.astype(np.int64)


def _rows(values: np.ndarray, path: Path, config: DataConfig) -> np.ndarray:
    """Check dtype and rank; bring images to (N, C, H, W) without copying."""
    if values.dtype.kind not in "biuf":
        raise InputError(f"{path} expects numbers; got an array of dtype {values.dtype}")
    if values.size == 0:
        raise InputError(f"{path} expects rows of numbers; got an empty array {values.shape}")
    if values.ndim == 2 and config.image_size:
        height, width = config.image_size
        if values.shape[1] != height * width:
            raise InputError(
                f"--image-size {height} {width} expects rows of {height * width} values; {path} "
                f"has {values.shape[1]}"
            )
        return values.reshape(len(values), 1, height, width)
    if values.ndim == 2:
        return values
    if values.ndim == 3:
        images = values[:, None]
    elif values.ndim == 4 and values.shape[3] in (1, 3):
        images = np.moveaxis(values, 3, 1)
    elif values.ndim == 4 and values.shape[1] in (1, 3):
        images = values
    else:
        raise InputError(
            f"{path} expects an array of rows (N, D), grey images (N, H, W) or images of 1 or 3 "
            f"channels (N, H, W, C) or (N, C, H, W); got {values.shape}"
        )
    return _fixed_size(Source(path.name, images), config).values
