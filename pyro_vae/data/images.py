"""A folder of images → `Source`, and the pixels of one image."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..config import DataConfig, InputError
from .source import Source, from_array

# pillow's exceptions for damaged files and files that are not images.
UNREADABLE = (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError)


def read_folder(path: Path, config: DataConfig) -> Source:
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
