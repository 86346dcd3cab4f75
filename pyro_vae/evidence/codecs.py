"""Files of compressed rows, and the sizes that usual compressors need for the same rows."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, features

from ..config import InputError

MAGIC = b"pyro_vae bits-back 1\n"
MAX_HEADER_BYTES = 4096


@dataclass(frozen=True)
class Packed:
    """The header of a file of compressed rows.

    Attributes:
        count: number of rows.
        shape: of one row.
        seed: of the first bits of the stack.
        model: `Coder.fingerprint` of the model.
        digest: of the rows.
    """

    count: int
    shape: tuple[int, ...]
    seed: int
    model: str
    digest: str


def pack(header: Packed, stack: np.ndarray) -> bytes:
    """The content of a file."""
    text = json.dumps(asdict(header)).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + stack.astype("<u4").tobytes()


def unpack(path: Path) -> tuple[Packed, np.ndarray]:
    """The header and the stack in a file.

    Raises:
        InputError: the file cannot be read, or is of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    start = len(MAGIC) + 4
    if not content.startswith(MAGIC) or len(content) < start:
        raise InputError(f"{path} is not a file of pyro_vae.compress")
    (size,) = struct.unpack("<I", content[len(MAGIC) : start])
    try:
        if size > MAX_HEADER_BYTES:
            raise ValueError
        values = json.loads(content[start : start + size])
        numbers = [values["count"], values["seed"], *values["shape"]]
        texts = [values["model"], values["digest"]]
        valid = all(type(n) is int and n >= 0 for n in numbers)
        if not valid or not all(isinstance(text, str) for text in texts):
            raise ValueError
        if values.keys() != {field.name for field in fields(Packed)}:
            raise ValueError
        stack = np.frombuffer(content[start + size :], "<u4")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged: its header cannot be read") from None
    return Packed(**{**values, "shape": tuple(values["shape"])}), stack.astype(np.uint32)


def digest_of(values: np.ndarray) -> str:
    """A digest of integers, of any type."""
    return hashlib.blake2b(values.astype("<i4").tobytes(), digest_size=16).hexdigest()


def smallest(values: np.ndarray, bound: int) -> np.ndarray:
    """Integers 0 … bound as the smallest unsigned type."""
    return values.astype(np.min_scalar_type(bound))


def usual_sizes(values: np.ndarray, bound: int) -> dict[str, float]:
    """Bits per row of usual lossless compressors.

    gzip compresses all rows together, in one bit a value if they are binary. PNG and WebP, for grey
    and colour images of at most 8 bits, write a file for each row.

    Args:
        values: (N, *shape), integers 0 … bound.
        bound: the largest possible value.
    """
    values = smallest(values, bound)
    raw = np.packbits(values) if bound == 1 else values
    found = {"gzip": 8 * len(gzip.compress(raw.tobytes(), 9)) / len(values)}
    if values.ndim == 4 and values.shape[1] in (1, 3) and bound <= 255:
        scale = 255 // bound if bound == 1 else 1
        images = [_image(row * scale, bound) for row in values]
        found["PNG"] = sum(_size(image, "png", optimize=True) for image in images) / len(values)
        if features.check("webp"):
            coloured = [image.convert("RGB") for image in images]
            options = {"lossless": True, "quality": 100, "method": 6}
            sizes = [_size(image, "webp", **options) for image in coloured]
            found["WebP lossless"] = sum(sizes) / len(values)
    return found


def _image(row: np.ndarray, bound: int) -> Image.Image:
    pixels = np.moveaxis(row, 0, -1)
    image = Image.fromarray(pixels[..., 0] if len(row) == 1 else pixels)
    return image.convert("1") if bound == 1 and len(row) == 1 else image


def _size(image: Image.Image, kind: str, **options: object) -> int:
    """Bits of an image in a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return 8 * buffer.tell()


def uncoded(shape: tuple[int, ...], bound: int) -> float:
    """Bits of a row without a code: those of its number of possible values."""
    return math.prod(shape) * math.log2(bound + 1)
