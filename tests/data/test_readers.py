"""Names and paths → rows; every kind of image and array, and every way in which they are broken."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA
from PIL import Image

from pyro_vae import DataConfig, InputError, load_data
from pyro_vae.config import TORCHVISION_CLASSES
from pyro_vae.data.loading import _tensor
from pyro_vae.data.readers import read

RANDOM = np.random.default_rng(0)


def save_images(folder: Path, arrays: dict[str, np.ndarray], **options) -> Path:
    for name, array in arrays.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, **options)
    return folder


def grey(count: int = 6, height: int = 9, width: int = 13) -> list[np.ndarray]:
    return list(RANDOM.integers(0, 256, (count, height, width), dtype=np.uint8))


def test_digits_are_counts_of_16():
    source = read(DataConfig("digits"))
    assert source.values.shape == (1797, 1, 8, 8)
    assert (source.values.dtype, source.values.max(), source.max_value) == (np.uint8, 16, 16)
    assert len(source.class_names) == 10


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no MNIST at {SHARED_DATA}")
def test_mnist_keeps_its_own_test_split():
    splits = load_data(DataConfig("mnist", root=SHARED_DATA))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [55000, 5000, 10000]
    assert splits.test.labels is not None
    assert splits.test.labels[:5].tolist() == [7, 2, 1, 0, 4]  # as everybody knows them
    assert splits.spec.shape == (1, 28, 28)
    assert splits.likelihood == "bernoulli"
    # validation is carved from the training file and shares no row with training
    assert not set(splits.train.rows.tolist()) & set(splits.validation.rows.tolist())
    assert splits.validation.rows.max() < 60000 <= splits.test.rows.min()


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder", "prefixes"),
    [
        ("mnist", "MNIST", ("train", "t10k")),
        ("fashion-mnist", "FashionMNIST", ("train", "t10k")),
        ("kmnist", "KMNIST", ("train", "t10k")),
        ("emnist", "EMNIST", ("emnist-balanced-train", "emnist-balanced-test")),
    ],
)
def test_torchvision_files_already_there(name, folder, prefixes, tmp_path):
    images = RANDOM.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for prefix in prefixes:
        raw = tmp_path / folder / "raw"
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(12, dtype=np.uint8) % 10)
    source = read(DataConfig(name, root=tmp_path))
    assert source.num_test == 12
    # EMNIST's files hold rows and columns exchanged
    expected = images.swapaxes(1, 2) if name == "emnist" else images
    assert np.array_equal(source.values[:12, 0], expected)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "emnist"])
def test_without_network_the_error_says_what_to_do(name, tmp_path, monkeypatch):
    from urllib.error import URLError

    from torchvision.datasets import utils

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(utils, "_urlretrieve", offline)
    raw = tmp_path / "data" / TORCHVISION_CLASSES[name] / "raw"
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            read(DataConfig(name, root=tmp_path / "data"))
        for part in (name, str(raw), "cannot be downloaded", "idx3-ubyte", "--data digits"):
            assert part in str(caught.value)
        # again with one file of four
        write_idx(raw / "train-labels-idx1-ubyte", np.zeros(4, np.uint8))


def test_damaged_torchvision_file(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.zeros(4, np.uint8))
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"mnist under .* is damaged"):
        read(DataConfig("mnist", root=tmp_path))


def test_nested_folders_are_labels_and_images_need_not_be_square(tmp_path):
    images = {f"{label}/{i}.png": a for label in ("cat", "dog") for i, a in enumerate(grey(4))}
    source = read(DataConfig(str(save_images(tmp_path, images))))
    assert source.values.shape == (8, 1, 9, 13)
    assert source.class_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(source.values[5, 0], images["dog/1.png"])


def test_colour_images_are_channel_first(tmp_path):
    colour = RANDOM.integers(0, 256, (5, 9, 13, 3), dtype=np.uint8)
    save_images(tmp_path, {f"{i}.png": a for i, a in enumerate(colour)})
    splits = load_data(str(tmp_path))
    assert splits.spec.shape == (3, 9, 13)
    assert (splits.spec.max_value, splits.likelihood) == (255, "discretized-logistic")
    assert np.array_equal(splits.train.values.numpy(), colour.transpose(0, 3, 1, 2))


def test_grey_and_colour_together_become_colour(tmp_path):
    save_images(tmp_path, {"a.png": grey(1)[0], "b.png": np.stack([grey(1)[0]] * 3, -1)})
    assert read(DataConfig(str(tmp_path))).values.shape == (2, 3, 9, 13)


def test_one_bit_images(tmp_path):
    for i in range(4):
        Image.fromarray(RANDOM.random((8, 10)) > 0.5).save(tmp_path / f"{i}.png")
    splits = load_data(str(tmp_path))
    assert splits.spec.is_binary
    assert splits.likelihood == "bernoulli"
    assert set(splits.train.values.unique().tolist()) == {0, 1}


def test_float_and_16_bit_images(tmp_path):
    values = RANDOM.standard_normal((4, 8, 10)).astype(np.float32)
    save_images(tmp_path / "float", {f"{i}.tiff": a for i, a in enumerate(values)})
    splits = load_data(str(tmp_path / "float"))
    assert (splits.spec.max_value, splits.likelihood) == (None, "gaussian")
    np.testing.assert_array_equal(splits.train.values[:, 0].numpy(), values)
    deep = RANDOM.integers(0, 65536, (4, 8, 10)).astype(np.uint16)
    save_images(tmp_path / "deep", {f"{i}.png": a for i, a in enumerate(deep)})
    splits = load_data(str(tmp_path / "deep"))
    assert (splits.spec.max_value, splits.likelihood) == (65535, "discretized-logistic")
    np.testing.assert_array_equal(splits.train.values[:, 0].numpy(), deep)


@pytest.mark.parametrize("bits", [1, 8])
def test_image_size_resizes_and_mends_mixed_sizes(bits, tmp_path):
    for i, size in enumerate([(9, 13), (20, 11), (8, 8)]):
        array = RANDOM.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(array > 127 if bits == 1 else array).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"mixed size: 0\.png is 9x13 .*1\.png is 20x11.*image-si"):
        read(DataConfig(str(tmp_path)))
    assert read(DataConfig(str(tmp_path), image_size=(6, 7))).values.shape == (3, 1, 6, 7)


def test_camera_orientation_is_applied(tmp_path):
    image = Image.fromarray(grey(1, 9, 13)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    for i in range(3):
        image.save(tmp_path / f"{i}.jpg", exif=exif)
    assert read(DataConfig(str(tmp_path))).values.shape == (3, 1, 13, 9)


def test_broken_and_foreign_files_are_named(tmp_path):
    save_images(tmp_path, {f"{i}.png": a for i, a in enumerate(grey())})
    (tmp_path / ".DS_Store").write_text("hidden files are passed over")
    assert len(read(DataConfig(str(tmp_path))).values) == 6
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(InputError, match=r"notes\.txt is not an image"):
        read(DataConfig(str(tmp_path)))
    (tmp_path / "notes.txt").unlink()
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"3\.png is not an image or is damaged"):
        read(DataConfig(str(tmp_path)))


def test_empty_and_missing_paths(tmp_path):
    with pytest.raises(InputError, match="holds none"):
        read(DataConfig(str(tmp_path)))
    with pytest.raises(InputError, match="no such path exists"):
        read(DataConfig(str(tmp_path / "nowhere")))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="Put single images into a folder"):
        read(DataConfig(str(tmp_path / "a.png")))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 7), (7,)),
        ((20, 9, 8), (1, 9, 8)),
        ((20, 9, 8, 3), (3, 9, 8)),
        ((20, 9, 8, 1), (1, 9, 8)),
        ((20, 3, 9, 8), (3, 9, 8)),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int64", "bool", ">f4", "uint16"])
def test_arrays_of_every_shape_and_type(shape, expected, dtype, tmp_path):
    values = (RANDOM.random(shape) * 1.99).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    splits = load_data(str(tmp_path / "a.npy"))
    assert splits.spec.shape == expected
    assert splits.train.values.dtype in (torch.uint8, torch.float32, torch.float64)
    moved = np.moveaxis(values, 3, 1) if values.ndim == 4 and shape[3] in (1, 3) else values
    np.testing.assert_allclose(
        splits.whole().take(torch.arange(20), "real").reshape(20, -1).numpy()
        * splits_scale(splits),
        moved.reshape(20, -1).astype("float32"),
        rtol=1e-6,
    )


def splits_scale(splits) -> float:
    return float(splits.spec.max_value or 1)


def test_npy_is_memory_mapped_and_left_alone(tmp_path):
    path = tmp_path / "big.npy"
    values = RANDOM.integers(0, 256, (50, 9, 8), dtype=np.uint8)
    np.save(path, values)
    source = read(DataConfig(str(path)))
    assert isinstance(source.values, np.memmap)
    assert _tensor(source.values).data_ptr() == source.values.ctypes.data, "no copy in memory"
    splits = load_data(str(path))
    x = splits.train.take(torch.tensor([3, 1]), "count")
    rows = splits.train.rows[[3, 1]].numpy()
    np.testing.assert_array_equal(x[:, 0].numpy(), values[rows])
    assert np.array_equal(np.load(path), values)


def test_a_file_larger_than_the_memory_is_mapped_read_only(tmp_path, monkeypatch):
    """The system refuses to map more writable pages than there is memory."""
    path, load = tmp_path / "big.npy", np.load
    values = RANDOM.integers(0, 256, (50, 9, 8), dtype=np.uint8)
    np.save(path, values)

    def limited(*args, mmap_mode, **options):
        if mmap_mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(*args, mmap_mode=mmap_mode, **options)

    monkeypatch.setattr(np, "load", limited)
    splits = load_data(str(path))
    assert not read(DataConfig(str(path))).values.flags.writeable
    x = splits.train.take(torch.tensor([3, 1]), "count")
    np.testing.assert_array_equal(x[:, 0].numpy(), values[splits.train.rows[[3, 1]].numpy()])


@pytest.mark.parametrize("shape", [(5,), (), (5, 9, 8, 4, 4), (2, 4, 4, 5, 6), (0, 4), (4, 0)])
def test_arrays_of_wrong_shape(shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(InputError, match="expected"):
        read(DataConfig(str(tmp_path / "a.npy")))


@pytest.mark.parametrize(
    "array", [np.array([["a", "b"]] * 4), np.zeros((4, 2), complex), np.array([[object()]])]
)
def test_arrays_of_wrong_type(array, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match="numbers"):
        read(DataConfig(str(tmp_path / "a.npy")))


def test_truncated_and_foreign_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((50, 20)))
    content = (tmp_path / "a.npy").read_bytes()
    np.savez(tmp_path / "a.npz", x=np.zeros((50, 20)))
    archive = (tmp_path / "a.npz").read_bytes()
    for name, broken in [
        ("cut.npy", content[:-900]),
        ("text.npy", b"hello"),
        ("empty.npy", b""),
        ("cut.npz", archive[:-900]),
        ("text.npz", b"hello"),
        ("empty.npz", b""),
        ("array.npz", content),
        ("archive.npy", archive),
    ]:
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read(DataConfig(str(tmp_path / name)))


def test_npz_with_labels_and_its_own_test_split(tmp_path):
    x = RANDOM.random((30, 4))
    y = np.array(["b", "a", "c"] * 10)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    source = read(DataConfig(str(tmp_path / "a.npz")))
    assert source.class_names == ("a", "b", "c")
    assert source.labels is not None
    assert source.labels[:3].tolist() == [1, 0, 2]
    np.savez(tmp_path / "b.npz", x_train=x[:25], y_train=y[:25], x_test=x[25:], y_test=y[25:])
    splits = load_data(str(tmp_path / "b.npz"))
    assert splits.test.rows.tolist() == list(range(25, 30))
    np.savez(tmp_path / "c.npz", x=x, y=y[:3])
    with pytest.raises(InputError, match="one label per row"):
        read(DataConfig(str(tmp_path / "c.npz")))
    np.savez(tmp_path / "d.npz", first=x, second=x)
    with pytest.raises(InputError, match="one array named x"):
        read(DataConfig(str(tmp_path / "d.npz")))


def test_csv_with_and_without_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("1,2.5\n3,4.5\n5,6\n")
    assert read(DataConfig(str(path))).values.tolist() == [[1, 2.5], [3, 4.5], [5, 6]]
    path.write_text('\ufeff"height";"label";"width"\n1;x;2\n3;y;4\n5;x;6\n', encoding="utf-8")
    source = read(DataConfig(str(path)))
    assert source.values.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert source.labels is not None
    assert (source.class_names, source.labels.tolist()) == (("x", "y"), [0, 1, 0])


def test_names_of_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"a, m","y",z\n1,2,3\n4,5,6\n')
    source = read(DataConfig(str(path)))  # y is a coordinate here, not a label
    assert source.labels is None
    assert source.values.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_keys_of_npz_in_any_case(tmp_path):
    np.savez(tmp_path / "a.npz", X_train=np.eye(4), Y_train=np.arange(4))
    source = read(DataConfig(str(tmp_path / "a.npz")))
    assert source.labels is not None
    assert source.values.shape == (4, 4)


def test_linked_folders_once(tmp_path):
    save_images(tmp_path / "there", {f"{i}.png": a for i, a in enumerate(grey())})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "loop").symlink_to(tmp_path / "data")
    assert len(read(DataConfig(str(tmp_path / "data"))).values) == 6


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (255, 0, 0, 255)
    save_images(tmp_path, {f"{i}.png": pixels for i in range(3)})
    values = read(DataConfig(str(tmp_path))).values
    assert values[0, :, 0, 0].tolist() == [255, 0, 0]
    assert values[0, :, 7, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line is empty"),
        ("1,,3\n4,5,6\n", "could not convert string ''"),
        ("a,b\n", "empty array"),
        ("1,2\n3,four\n", "could not convert string 'four' to a number in line 2, column 2"),
        ("1,2\n3\n", "columns"),
        ("1,2\n,3\n", "could not convert string ''"),
    ],
)
def test_broken_csv(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read(DataConfig(str(tmp_path / "a.csv")))


def test_flat_rows_become_images(tmp_path):
    np.save(tmp_path / "a.npy", RANDOM.random((10, 72)))
    config = DataConfig(str(tmp_path / "a.npy"), image_size=(9, 8))
    assert read(config).values.shape == (10, 1, 9, 8)
    with pytest.raises(InputError, match="expects rows of 64 values"):
        read(DataConfig(str(tmp_path / "a.npy"), image_size=(8, 8)))
    np.save(tmp_path / "b.npy", RANDOM.random((10, 9, 8)))
    with pytest.raises(InputError, match="resizes folders of images only"):
        read(DataConfig(str(tmp_path / "b.npy"), image_size=(8, 8)))
