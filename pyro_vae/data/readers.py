"""Names, files and arrays → `Source`: one array of rows, as they are stored.

    digits, mnist, …       included in scikit-learn; torchvision's data sets
    folder of images       (N, C, H, W); nested folders are labels
    .npy, .npz, .csv       (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), perhaps with labels

`source.from_array` checks and orders the values of a file, a folder (`images.py`), a table
(`tables.py`) or an object in memory (`in_memory.py`). Nothing is scaled, binarized or split here,
and nothing is unpickled: arrays are read with `allow_pickle=False`.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TORCHVISION_CLASSES, DataConfig, InputError
from .images import read_folder
from .source import LABEL_NAMES, Source, from_array
from .tables import read_table

VALUE_NAMES = ("x", "data", "images")


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
        return read_folder(path, config)
    if not path.exists():
        raise InputError(
            f"--data expects digits, {', '.join(TORCHVISION_CLASSES)}, or the path of a folder of "
            f"images, a .npy, .npz or .csv file; {config.source!r} is not one of these, and no "
            f"such path exists"
        )
    readers = {".npy": _npy, ".npz": _npz, ".csv": read_table}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"--data expects a folder of images, a .npy, .npz or .csv file; got {path}. "
            f"Put single images into a folder"
        )
    return readers[path.suffix.lower()](path, config)


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
