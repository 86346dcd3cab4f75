"""Folders of images: the right value of every kind of pixel, the right split of every folder."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

from pyro_vae import DataConfig, InputError, load_data
from pyro_vae.data.readers import read
from pyro_vae.data.source import Source
from pyro_vae.runtime.files import printable

RANDOM = np.random.default_rng(0)


def folder_of(folder: Path, images: dict[str, Any], **options: Any) -> Path:
    """Save arrays and pillow images, or write bytes, under these names."""
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
            continue
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(path, **options)
    return folder


def source_of(folder: Path, **settings: Any) -> Source:
    return read(DataConfig(str(folder), **settings))


def grey(value: int | None = None) -> np.ndarray:
    if value is not None:
        return np.full((5, 4), value, np.uint8)
    return RANDOM.integers(0, 256, (5, 4), dtype=np.uint8)


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiff", "gif", "webp", "png"])
def test_pages_are_never_dropped_in_silence(kind, tmp_path):
    pages = [Image.fromarray(grey()) for _ in range(3)]
    folder_of(tmp_path, {f"a.{kind}": pages[0]}, save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=rf"a\.{kind} holds 3 pages.* Save each page as a file"):
        source_of(tmp_path)


def test_the_advice_on_pages_is_right(tmp_path):
    pages = [grey() for _ in range(12)]
    images = [Image.fromarray(page) for page in pages]
    folder_of(tmp_path, {"a.tiff": images[0]}, save_all=True, append_images=images[1:])
    import PIL.ImageSequence

    with Image.open(tmp_path / "a.tiff") as image:
        np.save(tmp_path / "x.npy", [np.array(page) for page in PIL.ImageSequence.Iterator(image)])
    np.testing.assert_array_equal(source_of(tmp_path / "x.npy").values[:, 0], pages)


def test_a_photo_with_a_preview_is_one_image(tmp_path):
    """Cameras write JPEGs with a second picture (MPO)."""
    first, second = (Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (200, 10))
    folder_of(tmp_path, {"a.mpo": first}, save_all=True, append_images=[second])
    values = source_of(tmp_path).values
    assert values.shape == (1, 3, 16, 16)
    assert np.abs(values.astype(int) - 200).max() <= 2


# --- folders --------------------------------------------------------------------------------------


def test_hidden_folders_hold_no_data(tmp_path):
    names = ["cat/a.png", "dog/a.png", "cat/desktop.ini"]
    hidden = [".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", ".git/a", "cat/.DS_Store"]
    folder_of(tmp_path / ".root", dict.fromkeys(names[:2], grey()))
    folder_of(tmp_path / ".root", dict.fromkeys([names[2], *hidden], b"nothing"))
    source = source_of(tmp_path / ".root")
    assert source.class_names == ("cat", "dog")
    assert len(source.values) == 2


def test_folders_of_splits_are_the_splits(tmp_path):
    """Each image holds its own number, by which the rows of the splits are recognized."""
    rows = {"train": range(12), "val": range(50, 53), "test": range(100, 105)}
    images = {
        f"{split}/{'cat' if i % 2 else 'dog'}/{i:03}.png": grey(i)
        for split, numbers in rows.items()
        for i in numbers
    }
    splits = load_data(str(folder_of(tmp_path, images)))
    assert splits.class_names == ("cat", "dog")
    parts = {"train": splits.train, "val": splits.validation, "test": splits.test}
    for name, part in parts.items():
        found = part.values[part.rows][:, 0, 0, 0].tolist()
        assert sorted(found) == list(rows[name])
        assert part.labels is not None
        assert part.labels.tolist() == [(i + 1) % 2 for i in found]
    assert splits.spec.max_value == 255


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "TEST"), ("train", "testing")])
def test_without_a_validation_folder_training_images_validate(names, tmp_path):
    images = {f"{names[0]}/{i:02}.png": grey(i) for i in range(20)}
    images |= {f"{names[1]}/{i}.png": grey(i) for i in range(100, 104)}
    splits = load_data(str(folder_of(tmp_path, images)), validation_size=6)
    sizes = [len(part) for part in (splits.train, splits.validation, splits.test)]
    assert sizes == [14, 6, 4]
    assert splits.test.values[splits.test.rows][:, 0, 0, 0].tolist() == [100, 101, 102, 103]
    assert splits.class_names == ()
    with pytest.raises(InputError, match=r"--test-size has no effect .* of 4 rows"):
        load_data(str(tmp_path), test_size=2)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_without_a_test_folder_training_images_test(name, tmp_path):
    images = {f"train/{i:02}.png": grey(i) for i in range(20)}
    images |= {f"{name}/{i}.png": grey(i) for i in range(100, 104)}
    splits = load_data(str(folder_of(tmp_path, images)), test_size=5)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [15, 4, 5]
    validation = splits.validation.values[splits.validation.rows][:, 0, 0, 0]
    assert validation.tolist() == [100, 101, 102, 103]
    with pytest.raises(InputError, match=r"--validation-size has no effect .* of 4 rows"):
        load_data(str(tmp_path), validation_size=2)


def test_one_class_may_be_called_train(tmp_path):
    source = source_of(folder_of(tmp_path, {f"{n}/a.png": grey() for n in ("car", "train")}))
    assert (source.class_names, source.num_test, source.num_validation) == (("car", "train"), 0, 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a", "test/a", "other/a"), r"splits beside other images, like .*other.a\.png"),
        (("train/a", "test/a", "b"), r"splits beside other images, like .*b\.png"),
        (("val/a", "test/a"), "no folder train"),
    ],
)
def test_splits_and_classes_do_not_mix(names, message, tmp_path):
    folder_of(tmp_path, {f"{name}.png": grey() for name in names})
    with pytest.raises(InputError, match=message):
        source_of(tmp_path)


def test_only_regular_files_are_opened(tmp_path):
    folder_of(tmp_path, {"a.png": grey()})
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png is a broken link, a pipe"):
        source_of(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(InputError, match=r"b\.png is a broken link"):
        source_of(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert len(source_of(tmp_path).values) == 2


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder_of(tmp_path, {"a/a.png": grey(), "b/a.png": grey()})
    real = os.scandir

    def scandir(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"cannot read the folder .*b \(Permission denied\)"):
        source_of(tmp_path)


def test_names_that_are_not_text_are_escaped(tmp_path):
    for name in (b"caf\xe9", b"a\nb", "größe".encode()):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        folder_of(Path(os.fsdecode(folder)), {"a.png": grey()})
    assert source_of(tmp_path).class_names == (r"a\nb", r"caf\xe9", "größe")
    assert printable("\x1b[31m\u202e x") == r"\x1b[31m\u202e x"


def test_more_images_than_memory_holds(tmp_path, monkeypatch):
    folder_of(tmp_path, {f"{i}.png": grey() for i in range(3)})
    monkeypatch.setattr(os, "sysconf", lambda name: 7)
    with pytest.raises(InputError, match=r"not enough memory: 3 images of .* --image-size"):
        source_of(tmp_path)


def test_an_image_of_very_many_pixels_is_named(tmp_path):
    header = b"P5\n100000 100000\n255\n"
    folder_of(tmp_path, {"a.pgm": header + bytes(100)})
    with pytest.raises(InputError, match=r"a\.pgm has more than [0-9,]+ pixels"):
        source_of(tmp_path)


# --- pixels ---------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png16(values: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, which pillow does not write: (H, W, C)."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def tiff(values: np.ndarray, order: str = "<", white_is_zero: bool = False) -> bytes:
    """An uncompressed TIFF of integers (H, W) or (H, W, 3), in a byte order."""
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    kind = values.dtype.newbyteorder(order)
    data = values.astype(kind).tobytes()
    bits, form = 8 * kind.itemsize, 2 if kind.kind == "i" else 1
    photometric = 2 if channels else 1 - white_is_zero
    start = 8 + 2 + 12 * 10 + 4
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, start + 12),
        (277, count),
        (278, height),
        (279, len(data)),
        (339, form),
    ]
    entries = b""
    for tag, value in tags:
        if tag in (258, 339) and count == 3:
            entries += struct.pack(order + "HHII", tag, 3, 3, start + 6 * (tag == 339))
        else:
            entries += struct.pack(order + "HHII", tag, 4, 1, value)
    extra = struct.pack(order + "6H", bits, bits, bits, form, form, form)
    mark = b"II" if order == "<" else b"MM"
    directory = struct.pack(order + "HIH", 42, 8, len(tags)) + entries + struct.pack(order + "I", 0)
    return mark + directory + extra + data


DEEP = RANDOM.integers(0, 65536, (5, 4, 3)).astype(np.uint16)
DEEP[0, 0], DEEP[0, 1] = 0, 65535


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rgb.png", png16(DEEP, 2)),
        ("rgba.png", png16(DEEP[:, :, [0, 1, 2, 0]], 6)),
        ("la.png", png16(DEEP[:, :, :2], 4)),
        ("rgb.tiff", tiff(DEEP)),
        ("rgb-big.tiff", tiff(DEEP, ">")),
        ("white.tiff", tiff(DEEP[:, :, 0], white_is_zero=True)),
        ("rgb.ppm", b"P6\n4 5\n65535\n" + DEEP.astype(">u2").tobytes()),
    ],
)
def test_colours_of_16_bits_are_never_cut(name, content, tmp_path):
    folder_of(tmp_path, {name: content})
    with pytest.raises(InputError, match=rf"{name} holds 16 bits .*convert it to 8 bits"):
        source_of(tmp_path)


def test_jpeg_2000_of_16_bits_is_never_cut(tmp_path):
    content = encoded(Image.new("RGB", (8, 8)), "jpeg2000")
    assert source_of(folder_of(tmp_path, {"a.jp2": content})).values.shape == (1, 3, 8, 8)
    bits = content.index(b"\xff\x4f\xff\x51") + 42
    assert content[bits] == 7
    deep = content[:bits] + bytes([15]) + content[bits + 1 :]
    folder_of(tmp_path, {"a.jp2": deep})
    with pytest.raises(InputError, match=r"a\.jp2 holds 16 bits"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", png16(DEEP[:, :, 0], 0)),
        ("a.tiff", tiff(DEEP[:, :, 0])),
        ("big.tiff", tiff(DEEP[:, :, 0], ">")),
        ("a.pgm", b"P5\n4 5\n65535\n" + DEEP[:, :, 0].astype(">u2").tobytes()),
        ("a.jp2", encoded(Image.fromarray(DEEP[:, :, 0]), "jpeg2000")),
    ],
)
def test_16_bit_greys_are_whole_numbers(name, content, tmp_path):
    folder_of(tmp_path, {f"{i}{name}": content for i in range(3)})
    source = source_of(tmp_path)
    assert (source.values.dtype, source.max_value) == (np.uint16, 65535)
    np.testing.assert_array_equal(source.values[1, 0], DEEP[:, :, 0])
    splits = load_data(str(tmp_path))
    assert (splits.spec.max_value, splits.likelihood) == (65535, "discretized-logistic")
    np.testing.assert_array_equal(splits.train.values[0, 0], DEEP[:, :, 0])


def test_12_bits_in_16_are_divided_once(tmp_path):
    values = np.array([[0, 4095], [100, 2048]], np.uint16)
    folder_of(tmp_path, {f"{i}.png": values for i in range(3)})
    splits = load_data(str(tmp_path), max_value=4095)
    x = next(splits.train.fixed("unit", 0))
    np.testing.assert_allclose(x[0, 0], values / 4095, rtol=1e-6)
    with pytest.warns(UserWarning, match="12-bit data, give --max-value 4095"):
        assert load_data(str(tmp_path)).spec.max_value == 65535
    with pytest.raises(InputError, match="--max-value 4000 expects values from 0 to 4000"):
        load_data(str(tmp_path), max_value=4000)


def test_integers_of_32_bits_keep_their_signs(tmp_path):
    signed = np.array([[-9000, 2**31 - 1]] * 3, np.int32)
    unsigned = np.array([[0, 2**32 - 1]] * 3, np.uint32)
    for name, values in (("signed", signed), ("unsigned", unsigned)):
        folder = folder_of(tmp_path / name, {"a.tiff": tiff(values)})
        source = source_of(folder)
        assert source.max_value is None
        np.testing.assert_array_equal(source.values[0, 0], values)
    folder_of(folder, {"b.png": grey()})
    with pytest.raises(InputError, match=r"mixes images of different depth: .*a\.tiff holds"):
        source_of(folder)


@pytest.mark.parametrize("kind", ["16", "float"])
def test_resizing_stays_in_the_range_of_the_image(kind, tmp_path):
    """Lanczos rings: at an edge it goes beyond black and white."""
    edge = np.zeros((40, 40), np.uint16)
    edge[:, 20:] = 65535
    image = edge if kind == "16" else (edge / 65535 * 3 - 1).astype(np.float32)
    folder_of(tmp_path, {"a.tiff": image})
    values = source_of(tmp_path, image_size=(13, 13)).values
    assert (values.min(), values.max()) == ((0, 65535) if kind == "16" else (-1, 2))
    assert values.dtype == (np.uint16 if kind == "16" else np.float32)
    line = (values[0, 0, 0].astype(float) - values.min()) / np.ptp(values)
    assert line[:6].max() < 0.2 < 0.3 < line[6] < 0.7 < 0.8 < line[7:].min()


def test_resized_16_bit_values_are_rounded(tmp_path):
    values = RANDOM.integers(0, 1000, (9, 9)).astype(np.uint16)
    image = Image.fromarray(values.astype(np.float32))
    exact = np.asarray(image.resize((4, 4), Image.Resampling.LANCZOS))
    folder_of(tmp_path, {"a.png": values})
    found = source_of(tmp_path, image_size=(4, 4), max_value=4095).values[0, 0]
    assert np.abs(found - exact.clip(values.min(), values.max())).max() <= 0.5


def test_depth_defines_the_maximum(tmp_path):
    dark = np.minimum(grey(), 100)
    for name, image, bound in [
        ("one", Image.fromarray(grey() > 127), 1),
        ("eight", dark, 255),
        ("colour", np.stack([dark] * 3, -1), 255),
        ("mask", (grey() > 127).astype(np.uint8), 1),
    ]:
        source = source_of(folder_of(tmp_path / name, {"a.png": image}))
        assert source.max_value == bound
    assert source_of(tmp_path / "one", image_size=(3, 3)).max_value == 255


def on_white(value: float, alpha: int) -> float:
    return 255 - alpha / 255 * (255 - value)


def test_every_mode_has_its_value(tmp_path):
    """One colour, (200, 100, 50) or grey 100, as each mode stores it."""
    rgb, size = (200, 100, 50), (4, 5)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, *rgb])
    clear = palette.copy()
    clear.info["transparency"] = 1
    cases = {
        "p.png": (palette, rgb, 0),
        "clear.png": (clear, (255, 255, 255), 0),
        "rgba.png": (Image.new("RGBA", size, (*rgb, 51)), [on_white(v, 51) for v in rgb], 1),
        "la.png": (Image.new("LA", size, (100, 51)), [on_white(100, 51)], 1),
        "cmyk.tiff": (Image.new("CMYK", size, (55, 155, 205, 0)), rgb, 1),
        "cmyk.jpg": (Image.new("CMYK", size, (55, 155, 205, 0)), rgb, 4),
        "ycbcr.jpg": (Image.new("RGB", size, rgb).convert("YCbCr"), rgb, 4),
        "l.gif": (Image.new("L", size, 100), [100], 0),
    }
    for name, (image, expected, tolerance) in cases.items():
        values = source_of(folder_of(tmp_path / name, {name: image})).values
        found = values[0, :, 2, 2].astype(float)
        if len(found) == 3 and len(expected) == 1:
            expected = expected * 3
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=name)


def test_a_transparent_16_bit_grey_is_white(tmp_path):
    values = np.array([[7, 300], [65535, 7]], np.uint16)
    content = png16(values, 0, chunk(b"tRNS", struct.pack(">H", 7)))
    source = source_of(folder_of(tmp_path, {"a.png": content}))
    assert source.values[0, 0].tolist() == [[65535, 300], [65535, 65535]]


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_a_turned_image_is_turned_back_once(kind, tmp_path):
    values = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
    image = Image.fromarray(values if kind != "webp" else np.stack([values] * 3, -1))
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: to be shown turned by 90 degrees, clockwise
    options = {"lossless": True} if kind == "webp" else {}
    folder_of(tmp_path, {f"a.{kind}": image}, exif=exif, **options)
    np.testing.assert_array_equal(source_of(tmp_path).values[0, 0], np.rot90(values, -1))


def test_a_turned_16_bit_image_is_turned_back(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    folder_of(tmp_path, {"a.png": DEEP[:, :, 0]}, exif=exif)
    np.testing.assert_array_equal(source_of(tmp_path).values[0, 0], np.rot90(DEEP[:, :, 0], -1))


def test_floats_keep_their_values(tmp_path):
    values = np.array([[-3.5, 0.25], [1e6, 2]], np.float32)
    folder_of(tmp_path, {f"{i}.tiff": values for i in range(3)})
    np.testing.assert_array_equal(source_of(tmp_path).values[2, 0], values)
    values[0, 0] = np.nan
    folder_of(tmp_path, {"3.tiff": values})
    with pytest.raises(InputError, match=r"3\.tiff holds NaN"):
        source_of(tmp_path)


class Deep(Dataset):
    """16-bit images of pillow in memory."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(DEEP[:, :, 0])


def test_16_bit_images_of_a_dataset_are_those_of_a_folder(tmp_path):
    folder_of(tmp_path, {f"{i}.png": DEEP[:, :, 0] for i in range(4)})
    inside, stored = load_data(Deep()), load_data(str(tmp_path))
    assert (inside.spec, inside.likelihood) == (stored.spec, stored.likelihood)
    np.testing.assert_array_equal(inside.train.values, stored.train.values)


# --- damage ---------------------------------------------------------------------------------------


def test_damaged_files_are_named(tmp_path):
    """Bit flips, truncations and random bytes: an image, or an InputError that names the file."""
    draw = random.Random(3)
    grey_image, colour = Image.fromarray(grey()), Image.fromarray(np.stack([grey()] * 3, -1))
    kinds = ["png", "jpeg", "tiff", "gif", "bmp", "webp", "jpeg2000", "ppm", "avif", "tga", "ico"]
    originals = [encoded(colour, kind) for kind in kinds]
    originals += [encoded(grey_image, "tiff", compression="tiff_lzw"), png16(DEEP[:, :, 0], 0)]
    refused = []
    for i in range(300):
        content = bytearray(draw.choice(originals))
        if draw.random() < 0.3:
            content = content[: draw.randrange(len(content))]
        for _ in range(draw.choice([0, 1, 2, 20]) if len(content) else 0):
            content[draw.randrange(min(len(content), draw.choice([60, 10**6])))] = draw.randrange(
                256
            )
        folder_of(tmp_path, {"some.image": bytes(content)})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source_of(tmp_path, image_size=(4, 4) if i % 2 else None)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 100
    for message in refused:
        assert re.search(r"some\.image (is not an image|has more|holds)", message)
