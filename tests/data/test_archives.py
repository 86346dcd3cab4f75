"""Arrays in .npy and .npz files: which are used, what is read of the others, damage."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from pyro_vae import DataConfig, InputError, load_data
from pyro_vae.data import readers
from pyro_vae.data.readers import read

RANDOM = np.random.default_rng(0)


def save(tmp_path, **arrays) -> DataConfig:
    np.savez(tmp_path / "a.npz", **arrays)
    return DataConfig(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "name", ["x_{}", "images_{}", "{}_images", "{}_x", "data_{}", "X_{}", "{}_data"]
)
@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_splits_of_an_archive(name, validation, tmp_path):
    """MedMNIST's names among others; the validation rows are the archive's own."""
    images = RANDOM.integers(0, 256, (30, 5, 6), dtype=np.uint8)
    labels = np.arange(30) % 3
    parts = {"train": slice(0, 18), validation: slice(18, 24), "test": slice(24, 30)}
    arrays = {name.format(split): images[rows] for split, rows in parts.items()}
    target = "{}_labels" if name.startswith("{}") else "y_{}"
    arrays |= {target.format(split): labels[rows, None] for split, rows in parts.items()}
    splits = load_data(save(tmp_path, **arrays))
    assert splits.train.rows.tolist() == list(range(18))
    assert splits.validation.rows.tolist() == list(range(18, 24))
    assert splits.test.rows.tolist() == list(range(24, 30))
    assert np.array_equal(splits.train.values[:, 0].numpy(), images)
    assert splits.whole().labels is not None
    assert splits.whole().labels.tolist() == labels.tolist()
    assert "not used" not in splits.found
    with pytest.raises(InputError, match=r"--validation-size has no effect on a, .* of 6 rows"):
        load_data(DataConfig(str(tmp_path / "a.npz"), validation_size=3))


def test_some_of_the_splits(tmp_path):
    x = RANDOM.random((30, 4))
    splits = load_data(save(tmp_path, x_train=x[:20], x_val=x[20:]))
    assert splits.validation.rows.tolist() == list(range(20, 30))
    assert len(splits.test) == 3  # drawn from the training rows
    assert splits.test.rows.max() < 20
    with pytest.raises(InputError, match="leave none to train on"):
        load_data(DataConfig(str(tmp_path / "a.npz"), test_size=20))
    splits = load_data(save(tmp_path, x=x[:20], x_test=x[20:], extra=np.zeros(3)))
    assert splits.test.rows.tolist() == list(range(20, 30))
    assert splits.found == "rows from x, x_test; not used: extra"
    with pytest.raises(InputError, match=r"one shape .* x_train \(20, 4\), x_val \(10, 3\)"):
        read(save(tmp_path, x_train=x[:20], x_val=x[20:, :3]))
    with pytest.warns(UserWarning, match=r"labels y_train of .* left out: .* each row of x_t"):
        assert read(save(tmp_path, x_train=x, y_train=x[:, 0] > 0.5, x_test=x)).labels is None
    one_hot = read(save(tmp_path, x=x, y=np.eye(3)[np.arange(30) % 3]))
    assert one_hot.labels is not None
    assert one_hot.labels.tolist() == [0, 1, 2] * 10
    with pytest.warns(
        UserWarning, match=r"labels y of .* are left out: expected one for each row of x"
    ):
        assert read(save(tmp_path, x=x, y=(x > 0.5).astype(int))).labels is None


def test_unused_arrays_are_not_read(tmp_path, monkeypatch):
    """Only their headers: no memory for a bomb, no unpickling of objects."""
    x = RANDOM.random((30, 4))
    config = save(tmp_path, x=x, meta=np.array([{"a": 1}], object), bomb=np.zeros((10, 10)))
    loaded = []
    original = np.lib.npyio.NpzFile.__getitem__

    def count(archive, key):
        loaded.append(key)
        return original(archive, key)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", count)
    source = read(config)
    assert np.array_equal(source.values, x)
    assert loaded == ["x"]
    assert source.found == "rows from x; not used: meta, bomb"
    with pytest.raises(InputError, match=r"numbers in x of .*; got an array of objects"):
        read(save(tmp_path, x=np.array([[{}]] * 4, object)))
    source = read(save(tmp_path, x=x, y=np.array(["a", None] * 15, object)))
    assert (source.labels, source.found) == (None, "rows from x; not used: y")


def bomb(shape: tuple[int, ...], content: int) -> bytes:
    """An archive whose array x claims a shape and holds `content` zero bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(content))
    return out.getvalue()


def test_sizes_are_checked_before_the_values_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    for shape in ((10**9, 10**6), (10**30, 4), (4, 4)):
        path.write_bytes(bomb(shape, 1000))
        with pytest.raises(InputError, match="the size of x is not that of its shape"):
            read(DataConfig(str(path)))
    seen = []
    monkeypatch.setattr(readers, "check_memory", lambda count, *text: seen.append(count))
    path.write_bytes(bomb((50, 4), 1600))
    read(DataConfig(str(path)))
    assert seen == [200 * (8 + 4) / 4]
    np.save(tmp_path / "b.npy", np.zeros((5, 2)))
    with (tmp_path / "b.npy").open("ab") as file:
        np.save(file, np.ones((5, 2)))
    with pytest.raises(InputError, match=r"b\.npy is not a whole .npy file .* 208 bytes, not 416"):
        read(DataConfig(str(tmp_path / "b.npy")))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.float64(3)}, r"x \(\)"),
        ({"x": np.zeros((4, 2)), "x_test": np.float64(3)}, "rows of one shape"),
        ({"a": np.zeros((4, 2)), "b": np.zeros((4, 2))}, "one array named x"),
        ({"x": np.array(["a", "b", "c"])}, "numbers"),
        ({"x": np.zeros((4, 2), complex)}, "numbers"),
        ({"x": np.zeros(4, [("a", "<f8"), ("b", "<i4")])}, "numbers"),
        ({"x": np.zeros((0, 2))}, "empty array"),
    ],
)
def test_arrays_that_are_no_rows(arrays, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(save(tmp_path, **arrays))


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "dia", "bsr"])
def test_sparse_matrices_are_recognized(kind, tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.random(30, 5, 0.3, format=kind, random_state=0)
    sparse.save_npz(tmp_path / "a.npz", matrix)
    with pytest.raises(InputError, match=r"sparse matrix of scipy; .*load_npz\(.*\.toarray\(\)"):
        read(DataConfig(str(tmp_path / "a.npz")))
    with pytest.raises(InputError, match=r"dense array; got a sparse .*toarray\(\)"):
        load_data(matrix)


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Some flipped bits, or the beginning, of a file; half of the flips are near its ends."""
    kind = random.integers(4)
    if kind == 0:
        return content[: random.integers(len(content))]
    broken = bytearray(content)
    for _ in range(random.integers(1, 8)):
        place = random.integers(len(broken))
        if kind == 1:
            place = random.integers(min(200, len(broken)))
        elif kind == 2:
            place = len(broken) - 1 - random.integers(min(300, len(broken)))
        broken[place] ^= 1 << random.integers(8)
    return bytes(broken)


def originals(tmp_path) -> dict[str, bytes]:
    x = RANDOM.random((20, 3))
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "plain.npz", x=x, y=np.arange(20))
    np.savez_compressed(tmp_path / "a.npz", x_train=x, y_train=np.arange(20), x_test=x)
    files = [tmp_path / name for name in ("a.npy", "plain.npz", "a.npz")]
    return {path.suffix: path.read_bytes() for path in files} | {
        "plain.npz": (tmp_path / "plain.npz").read_bytes()
    }


def outcomes(tmp_path, count: int, seed: int) -> dict[str, int]:
    """Read damaged files: rows, or an InputError that names the file; all else is raised."""
    random, found = np.random.default_rng(seed), {"read": 0, "refused": 0}
    files = originals(tmp_path)
    for i in range(count):
        name, content = list(files.items())[i % len(files)]
        path = tmp_path / f"damaged{name}"
        path.write_bytes(damaged(content, random))
        try:
            read(DataConfig(str(path)))
            message = None
        except InputError as error:
            message = str(error)
        assert message is None or path.name in message or "damaged" in message
        found["read" if message is None else "refused"] += 1
    return found


@pytest.mark.filterwarnings("ignore:.*labels:UserWarning")
def test_damaged_files_are_refused_by_name(tmp_path):
    found = outcomes(tmp_path, 300, seed=0)
    assert found["refused"] > 150
    assert found["read"] > 10  # a flipped bit of a value in a .npy cannot be seen
