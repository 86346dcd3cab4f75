"""A folder of images → `Source`, and the pixels of one image.

A file is one row. Pixels keep the values of the file: whole numbers up to 1, 255 or 65535 in 1-bit,
8-bit and 16-bit images; 32-bit integers and floats as they are.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..config import DataConfig, InputError
from ..runtime.files import printable
from ..runtime.memory import check_memory
from .source import Source, from_array

# Pillow's modes that hold an image without loss, the widest first, and their largest values.
MAX_VALUES = {"F": None, "I": None, "I;16": 65535, "RGB": 255, "L": 255, "1": 1}
DTYPES = {"F": np.float32, "I": np.int64, "I;16": np.uint16}  # uint8 for the others
DEEP = tuple(DTYPES)

# Exceptions of pillow's readers for damaged files and files that are not images.
UNREADABLE = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# Folders of splits: 0 training, 1 validation, 2 test.
SPLITS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}

ONE_PAGE = ("MPO", "PSD")  # photos with previews, layers: the first page is the image
NO_IMAGES = ("Thumbs.db", "desktop.ini", "__MACOSX")


def read_folder(path: Path, config: DataConfig) -> Source:
    """A folder of images. The folder of an image, relative to `path`, is its label.

    Folders train, val and test directly below `path` are the data's own splits. Hidden files and
    folders are left out.

    Raises:
        InputError: a file is no image, is damaged or holds several pages; images differ in size or
            depth; the folders are splits and classes at once. The message names the file.
    """
    files, sizes = _divide(path, _image_files(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow warns about unusual metadata
        mode = _mode(path, files)
        values = _values(path, files, mode, config.image_size)
    max_value = 255 if mode == "1" and config.image_size else MAX_VALUES[mode]
    if max_value == 255 and values.max() <= 1:
        max_value = 1  # masks
    elif max_value == 65535 and config.max_value is None and (high := values.max()) < 2**14:
        bits = int(high).bit_length()
        warnings.warn(
            f"{path} holds 16-bit images whose largest value is {high} of 65535; if they are "
            f"{bits}-bit data, give --max-value {2**bits - 1}",
            stacklevel=2,
        )
    above = [file.relative_to(path).parts[bool(sizes) : -1] for file in files]
    names = np.array([printable("/".join(parts)) for parts in above])
    labels = names if len(set(names)) > 1 else None
    source = from_array(values, labels, config, printable(path.resolve().name), path)
    _, num_validation, num_test = sizes or (0, 0, 0)
    return replace(source, max_value=max_value, num_validation=num_validation, num_test=num_test)


def _image_files(path: Path) -> list[Path]:
    """The files of a folder and all folders below it, without hidden ones, in order."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"cannot read the folder {error.filename} ({error.strerror})") from None

    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        if (place := os.path.realpath(folder)) in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not _hidden(name)]
        files += [Path(folder, name) for name in names if not _hidden(name)]
    if not files:
        raise InputError(f"--data expects a folder with images; {path} holds none")
    for file in files:
        if not os.path.isfile(file):  # opening a pipe would wait for its writer
            raise InputError(
                f"{file} is a broken link, a pipe, a socket or a device; remove it from {path}"
            )
    return sorted(files)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in NO_IMAGES


def _divide(path: Path, files: list[Path]) -> tuple[list[Path], tuple[int, ...]]:
    """Order files by split: training, validation, test.

    Returns:
        the files; the number in each split, or () if the folders are no splits.

    Raises:
        InputError: folders of splits stand beside other images, or there is none for training.
    """
    kinds = [_kind(file.relative_to(path)) for file in files]
    found = set(kinds) - {-1}
    if len(found) < 2:  # a class may be called train
        return files, ()
    if -1 in kinds:
        raise InputError(
            f"{path} holds folders of splits beside other images, like {files[kinds.index(-1)]}: "
            f"expected only splits (train, val, test), each perhaps with a folder for each class, "
            f"or only classes; move or rename the others"
        )
    if 0 not in found:
        raise InputError(
            f"{path} holds validation and test images but no folder train; give one of its folders "
            f"as --data, or rename them if they are classes"
        )
    order = sorted(range(len(files)), key=kinds.__getitem__)
    return [files[i] for i in order], tuple(kinds.count(kind) for kind in range(3))


def _kind(file: Path) -> int:
    """The split (0, 1 or 2; −1 none) of a file, by its path relative to the data."""
    return SPLITS.get(file.parts[0].lower(), -1) if len(file.parts) > 1 else -1


def _mode(path: Path, files: Sequence[Path]) -> str:
    """The mode that holds all images without loss, from their headers."""
    modes: dict[str, Path] = {}  # with its first file
    for file in files:
        with _opened(path, file) as image:
            if image.format not in ONE_PAGE and (pages := getattr(image, "n_frames", 1)) > 1:
                raise InputError(
                    f"{file} holds {pages} pages, and each file of a folder is one row. Save each "
                    f"page as a file of its own, or the pages as an array: numpy.save('x.npy', "
                    f"[numpy.array(page) for page in PIL.ImageSequence.Iterator(image)])"
                )
            if _loses_depth(image):
                raise InputError(
                    f"{file} holds 16 bits for each colour, or 16 bits of which 0 is white, which "
                    f"pillow cannot read without loss; convert it to 8 bits or to plain grey, or "
                    f"save the images as an array (N, H, W, C) in a .npy file"
                )
            modes.setdefault(pixel_mode(image), file)
    mode = next(mode for mode in MAX_VALUES if mode in modes)
    if mode in DEEP and len(modes) > 1:
        other = next(name for name in modes if name != mode)
        raise InputError(
            f"{path} mixes images of different depth: {modes[mode]} holds float, 32-bit or 16-bit "
            f"values, {modes[other]} others; convert them to one kind"
        )
    return mode


def _values(
    path: Path, files: Sequence[Path], mode: str, image_size: tuple[int, int] | None
) -> np.ndarray:
    """The pixels of all files, (N, H, W) or (N, H, W, 3)."""
    values = np.empty(0)
    for i, file in enumerate(files):
        with _opened(path, file) as image:
            row = pixels(image, mode, image_size)
        if i == 0:
            # Values other than bytes are copied once more, as float32.
            size = row.itemsize if row.itemsize == 1 else row.itemsize + 4
            count = len(files) * row.size * size // 4
            check_memory(count, f"{len(files):,} images of {path}", "give a smaller --image-size")
            values = np.empty((len(files), *row.shape), row.dtype)
        if row.shape != values.shape[1:]:
            sizes = ["x".join(map(str, shape[:2])) for shape in (values.shape[1:], row.shape)]
            raise InputError(
                f"{path} holds images of mixed size: {files[0].name} is {sizes[0]} (height x "
                f"width), {file} is {sizes[1]}; give one size for all by --image-size H W"
            )
        if mode == "F" and not np.isfinite(row).all():
            raise InputError(f"{file} holds NaN or infinite values; repair it or remove it")
        values[i] = row
    return values


@contextmanager
def _opened(folder: Path, file: Path) -> Iterator[ImageFile.ImageFile]:
    """An opened image.

    Raises:
        InputError: the file is not an image, or is damaged; the message names it.
    """
    try:
        with Image.open(file) as image:
            image.filename = ""  # else pillow 13 maps an uncompressed, turned TIFF in a wrong shape
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(
            f"{file} has more than {most:,} pixels, or says so; make it smaller, or remove it from "
            f"{folder}"
        ) from None
    except UNREADABLE as error:
        raise InputError(
            f"{file} is not an image or is damaged ({error}); repair it or remove it from {folder}"
        ) from None


def _loses_depth(image: ImageFile.ImageFile) -> bool:
    """Whether pillow cuts the colours of an opened file to 8 bits, or inverts its greys."""
    if not image.tile:
        return False
    layout = image.tile[0].args
    raw, *rest = layout if isinstance(layout, tuple) else (layout,)
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        return tags.get(262) == 0  # white is zero
    if image.mode in ("1", "L", "P", "I", "F"):
        return False
    if image.format == "PPM":
        return bool(rest) and rest[0] > 255
    if image.format == "JPEG2000" and image.fp is not None:
        image.fp.seek(0)
        _, _, header = image.fp.read(4096).partition(b"\xff\x4f\xff\x51")
        return any(byte & 0x7F > 7 for byte in header[38:39])  # the bits of the first colour, − 1
    return ";16" in str(raw) or max(tags.get(258, (8,))) > 8


def pixel_mode(image: Image.Image) -> str:
    """The mode that holds the image without loss, among those of `MAX_VALUES`."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return "I;16"
    if image.mode in MAX_VALUES:
        return image.mode
    if image.mode.startswith("I;16"):
        return "I;16"
    return "L" if image.mode in ("LA", "La") else "RGB"


def pixels(image: Image.Image, mode: str, image_size: tuple[int, int] | None) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3): uint8, or in the modes I;16, I, F uint16, int64, float32."""
    unsigned = image.mode == "I" and getattr(image, "tag_v2", {}).get(339, (2,))[0] == 1
    image = ImageOps.exif_transpose(image)
    if mode in DEEP:
        return _deep_pixels(image, mode, image_size, unsigned)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode != mode:
        image = image.convert(mode)
    if image_size:
        if mode == "1":
            image = image.convert("L")
        image = image.resize((image_size[1], image_size[0]), Image.Resampling.LANCZOS)
    return np.asarray(image).astype(np.uint8)


def _deep_pixels(
    image: Image.Image, mode: str, image_size: tuple[int, int] | None, unsigned: bool
) -> np.ndarray:
    """Pixels of more than 8 bits (H, W). Resizing keeps them in the range of the image."""
    values = np.asarray(image).astype(DTYPES[mode])
    if unsigned:  # pillow holds them as signed integers
        values &= 2**32 - 1
    transparent = image.info.get("transparency")
    if mode == "I;16" and isinstance(transparent, int):
        values[values == transparent] = 65535
    if image_size:
        size = (image_size[1], image_size[0])
        floats = Image.fromarray(values.astype(np.float32))  # pillow resizes no 16-bit integers
        resized = np.asarray(floats.resize(size, Image.Resampling.LANCZOS))
        resized = resized.clip(values.min(), values.max())
        values = (resized if mode == "F" else resized.round()).astype(values.dtype)
    return values
