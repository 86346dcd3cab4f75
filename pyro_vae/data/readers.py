"""Names, files and arrays → `Source`: one array of rows, as they are stored.

    digits, mnist, …       included in scikit-learn; torchvision's data sets
    folder of images       (N, C, H, W); nested folders are labels
    .npy, .npz, .csv       (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), perhaps with labels
    .parquet, .arrow       a table, read by polars; .feather is Arrow too

`source.from_array` checks and orders the values of a file, a folder (`images.py`), a table
(`tables.py`) or an object in memory (`in_memory.py`). Nothing is scaled, binarized or split here,
and nothing is unpickled: arrays are read with `allow_pickle=False`.
"""

from __future__ import annotations

import errno
import lzma
import math
import pickle
import struct
import tokenize
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TORCHVISION_CLASSES, DataConfig, InputError
from ..runtime.memory import check_memory
from ..runtime.packages import of_extra
from .images import read_folder
from .in_memory import read_frame
from .source import LABEL_NAMES, Source, from_array, one_hot
from .tables import read_table

VALUE_NAMES = ("x", "data", "images")
# The splits in the order of their rows, and the words for them in the names of arrays.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}

Names = dict[str, str]  # split → name of an array

# What zipfile, its decompressors and numpy raise for damaged files.
DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
)


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
            f"images, a .npy, .npz, .csv, .parquet or .arrow file; {config.source!r} is not one of "
            f"these, and no such path exists"
        )
    readers = {".npy": _npy, ".npz": _npz, ".csv": read_table}
    readers |= dict.fromkeys((".parquet", ".arrow", ".feather"), _arrow)
    if path.suffix.lower() not in readers:
        raise InputError(
            f"--data expects a folder of images, a .npy, .npz, .csv, .parquet or .arrow file; got "
            f"{path}. "
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


def _arrow(path: Path, config: DataConfig) -> Source:
    """A table in a Parquet or an Arrow file."""
    polars = of_extra("polars", "tables", f"{path.suffix} files require a package")
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        table = (polars.scan_parquet if is_parquet else polars.scan_ipc)(path)
        width = len(table.collect_schema())
        count = table.select(polars.len()).collect().item()  # from the file's metadata
        check_memory(4 * width * count, f"{width * count:,} cells of {path}", "use fewer rows")
        frame = table.collect()
    except InputError:
        raise
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, *DAMAGED) as error:
        raise InputError(f"{path} is not a whole table: {_reason(error)}") from None
    return read_frame(frame, config, path.stem)


def _npy(path: Path, config: DataConfig) -> Source:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers in the style of Python 2
            if file.read(4) == b"PK\x03\x04":
                raise InputError(f"{path} is a .npz archive by its content; rename it")
            file.seek(0)
            shape, dtype = _header(file)
            expected = file.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and expected != path.stat().st_size:
                raise ValueError(f"it should have {expected} bytes, not {path.stat().st_size}")
            values = _mapped(path)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path} is not a whole .npy file of numbers: {_reason(error)}") from None
    return from_array(values, None, config, path.stem, path)


def _mapped(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped into memory. The file is never changed."""
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)  # torch needs writable memory
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    # The system counts writable pages as memory in use, and refuses more than there is.
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array in an open .npy file, whose position is then behind them."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read_header:
        raise ValueError(f"format {version} of .npy is for structured types")
    shape, _, dtype = read_header[version](file)
    if any(size < 0 for size in shape):
        raise ValueError(f"the shape is {shape}")
    return shape, dtype


def _npz(path: Path, config: DataConfig) -> Source:
    """Rows x and labels y, perhaps divided into training, validation and test rows."""
    parts, labels, unused, arrays = _load(path)
    values = [arrays[key] for key in parts.values()]
    if len({value.shape[1:] for value in values}) > 1 or any(v.ndim == 0 for v in values):
        shapes = ", ".join(f"{key} {arrays[key].shape}" for key in parts.values())
        raise InputError(f"{path} expects rows of one shape in its arrays; got {shapes}")
    found, target = f"rows from {', '.join(parts.values())}", None
    targets = [arrays[key] for key in labels.values()]
    whole = len(targets) == len(parts) and all(t.ndim for t in targets)
    if whole and len({t.shape[1:] for t in targets}) == 1:
        target = np.concatenate(targets)
    if target is not None and target.ndim == 2 and target.shape[1] > 1 and not one_hot(target):
        target = None
    if target is not None:
        found += f"; labels from {', '.join(labels.values())}"
    elif labels:
        warnings.warn(
            f"the labels {', '.join(labels.values())} of {path} are left out: expected one for "
            f"each row of {', '.join(parts.values())}",
            stacklevel=2,
        )
    if unused:
        found += f"; not used: {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''}"
    joined = values[0] if len(values) == 1 else np.concatenate(values)
    return replace(
        from_array(joined, target, config, path.stem, path),
        num_validation=len(arrays[parts["val"]]) if "val" in parts else 0,
        num_test=len(arrays[parts["test"]]) if "test" in parts else 0,
        found=found,
    )


def _load(path: Path) -> tuple[Names, Names, list[str], dict[str, np.ndarray]]:
    """The names of the arrays of rows, labels and others in an archive, and the arrays in use.

    Of the others, only the headers are read.
    """
    with path.open("rb") as start:
        if start.read(6) == b"\x93NUMPY":
            raise InputError(f"{path} is a single array by its content; name it .npy")
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            headers = {}
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    with archive.open(member) as content:
                        headers[member.filename[:-4]] = (*_header(content), member, content.tell())
        parts, labels, unused = _choose(path, {key.lower(): key for key in headers})
        # Only unpickling could read labels that are objects.
        unused += [key for key in labels.values() if headers[key][1].hasobject]
        labels = {name: key for name, key in labels.items() if key not in unused}
        total = 0
        for key in (*parts.values(), *labels.values()):
            shape, dtype, member, offset = headers[key]
            if dtype.hasobject:
                raise InputError(f"expected numbers in {key} of {path}; got an array of objects")
            if offset + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"the size of {key} is not that of its shape {shape}")
            total += math.prod(shape) * (dtype.itemsize + 4) // 4  # as stored, and in float32
        check_memory(total, f"the arrays in {path}", "use fewer rows")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return (
                parts,
                labels,
                unused,
                {k: archive[k] for k in {*parts.values(), *labels.values()}},
            )
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path} is not a whole .npz file of numbers: {_reason(error)}") from None


def _choose(path: Path, keys: dict[str, str]) -> tuple[Names, Names, list[str]]:
    """The names of the arrays of rows and of labels for train, val and test, and the others."""

    def find(names: tuple[str, ...], split: str) -> str | None:
        forms = [form for name in names for form in (f"{name}_{split}", f"{split}_{name}")]
        return next((keys[form] for form in forms if form in keys), None)

    def first(names: tuple[str, ...]) -> str | None:
        return next((keys[name] for name in names if name in keys), None)

    if {"format", "shape", "data"} <= keys.keys():
        raise InputError(
            f"{path} holds a sparse matrix of scipy; a dense array is expected. Convert it: "
            f"numpy.save('x.npy', scipy.sparse.load_npz({str(path)!r}).toarray())"
        )
    parts, labels = {}, {}
    for split, words in SPLIT_NAMES.items():
        for word in words:
            if split not in parts and (key := find(VALUE_NAMES, word)):
                parts[split] = key
                if label := find(LABEL_NAMES, word):
                    labels[split] = label
    if "train" not in parts:
        others = [key for low, key in keys.items() if low not in LABEL_NAMES]
        key = first(VALUE_NAMES) or (others[0] if len(others) == 1 else None)
        if key is None:
            raise InputError(
                f"{path} expects one array named x (or data, images), or x_train and x_test; got "
                f"{', '.join(keys.values()) or 'no array'}"
            )
        parts = {"train": key, **parts}
        if label := first(LABEL_NAMES):
            labels = {"train": label, **labels}
    used = {*parts.values(), *labels.values()}
    return parts, labels, [key for key in keys.values() if key not in used]
