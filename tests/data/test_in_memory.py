"""`load_data` of objects in memory: the same splits as of a file with the same values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets, transforms

import pyro_vae
from pyro_vae import DataConfig, InputError, load_data

RANDOM = np.random.default_rng(0)
COUNT = 30


def images(*shape: int) -> np.ndarray:
    """Pixels (COUNT, *shape), each value different from its neighbours."""
    return RANDOM.integers(0, 256, (COUNT, *shape), dtype=np.uint8)


def check_rows(splits, values, labels=None) -> None:
    """Every row is in one split, in the order of the channels of `values`, with its own label."""
    rows = torch.cat([s.rows for s in (splits.train, splits.validation, splits.test)])
    assert sorted(rows.tolist()) == list(range(len(values)))
    assert min(len(s) for s in (splits.train, splits.validation, splits.test)) > 0
    for split in (splits.train, splits.validation, splits.test):
        expected = torch.as_tensor(np.ascontiguousarray(values))[split.rows]
        found = split.take(torch.arange(len(split)), "count").to(expected.dtype)
        assert torch.equal(found, expected)
        assert (split.labels is None) == (labels is None)
        if labels is not None:
            names = [splits.class_names[label] for label in split.labels]
            assert names == [str(labels[row]) for row in split.rows]


def assert_equal(ours, theirs) -> None:
    """The same splits, but for the name."""
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.spec, ours.likelihood, ours.class_names) == (
        theirs.spec,
        theirs.likelihood,
        theirs.class_names,
    )
    assert (ours.low, ours.high, ours.integral) == (theirs.low, theirs.high, theirs.integral)
    for name in ("train", "validation", "test"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(a.rows, b.rows)
        index = torch.arange(len(a))
        assert torch.equal(a.take(index, "real"), b.take(index, "real"))
        assert (a.labels is None) == (b.labels is None)
        assert a.labels is None or torch.equal(a.labels, b.labels)


# Arrays and tensors


@pytest.mark.parametrize("shape", [(7,), (9, 8), (9, 8, 3), (9, 8, 1), (3, 9, 8)])
@pytest.mark.parametrize(
    "dtype", ["uint8", "bool", "int64", "int8", "uint16", "float16", "float32", "float64", ">f4"]
)
def test_an_array_is_the_file_of_its_values(shape, dtype, tmp_path):
    values = (RANDOM.random((COUNT, *shape)) * 1.99).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    ours, theirs = load_data(values, seed=3), load_data(tmp_path / "a.npy", seed=3)
    assert_equal(ours, theirs)
    assert (ours.name, theirs.name) == ("array", "a")
    if not dtype.startswith(">"):
        tensor = load_data(torch.from_numpy(values), seed=3)
        assert_equal(tensor, theirs)
        assert tensor.name == "tensor"


def test_channels_come_first():
    pixels = images(9, 8, 3)
    check_rows(load_data(pixels), pixels.transpose(0, 3, 1, 2))
    check_rows(load_data(pixels.transpose(0, 3, 1, 2)), pixels.transpose(0, 3, 1, 2))
    check_rows(load_data(pixels[..., 0]), pixels[:, None, ..., 0])


def test_tensors_of_every_kind():
    values = torch.randn(COUNT, 5)
    base = load_data(values)
    assert_equal(load_data(values.clone().requires_grad_()), base)
    assert_equal(load_data(torch.nn.Parameter(values)), base)
    assert_equal(load_data(values.T.contiguous().T), base)
    half = values.bfloat16()
    assert_equal(load_data(half), load_data(half.float()))


@pytest.mark.parametrize("dtype", ["uint8", "bool", "float32"])
def test_memory_is_shared(dtype):
    values = (RANDOM.random((COUNT, 4, 5)) * 1.99).astype(dtype)
    assert load_data(values).train.values.data_ptr() == values.ctypes.data
    tensor = torch.from_numpy(values)
    assert load_data((tensor, range(COUNT))).test.values.data_ptr() == tensor.data_ptr()


def test_read_only_and_reversed_arrays():
    """torch can use neither in place."""
    values = RANDOM.random((COUNT, 4)).astype(np.float32)
    locked = values.copy()
    locked.flags.writeable = False
    assert_equal(load_data(locked), load_data(values))
    assert_equal(load_data(values[::-1]), load_data(values[::-1].copy()))


# Labels


@pytest.mark.parametrize(
    "labels",
    [
        RANDOM.integers(0, 3, COUNT),
        RANDOM.integers(-3, 0, COUNT).astype(np.int8),
        RANDOM.random(COUNT) > 0.5,
        np.array(["dog", "cat", "ox"])[RANDOM.integers(0, 3, COUNT)],
        np.array(["dog", "cat", "ox"], object)[RANDOM.integers(0, 3, COUNT)],
    ],
    ids=["integers", "negative", "booleans", "strings", "objects"],
)
def test_labels_stay_with_their_rows(labels):
    pixels = images(9, 8)
    expected = pixels[:, None]
    check_rows(load_data((pixels, labels)), expected, labels)
    check_rows(load_data((pixels, labels.tolist())), expected, labels)
    check_rows(load_data((torch.from_numpy(pixels), labels[:, None])), expected, labels)
    if labels.dtype.kind in "biu":
        check_rows(load_data((pixels, torch.from_numpy(labels))), expected, labels.tolist())
    splits = load_data((pixels, labels), seed=7)
    check_rows(splits, expected, labels)
    check_rows(load_data((pixels, None)), expected)
    # power: each fault that an implementation may have is seen
    train = splits.train
    for fault in (
        {"labels": train.labels.roll(1)},
        {"values": train.values.flip(0)},
        {"values": train.values.transpose(2, 3).reshape(train.values.shape)},
        {"rows": train.rows.roll(1)},
        {"rows": torch.cat([train.rows, splits.validation.rows])},
        {"rows": train.rows[:-1], "labels": train.labels[:-1]},
    ):
        broken = dataclasses.replace(splits, train=dataclasses.replace(train, **fault))
        with pytest.raises((AssertionError, IndexError)):
            check_rows(broken, expected, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(COUNT - 1, int), r"one label per row, \(30,\), in the array; got .* \(29,\)"),
        (np.zeros((COUNT, 2), int), r"one label per row, \(30,\), in the array; got .* \(30, 2\)"),
        (np.zeros(COUNT), "integers or strings as labels of the array; got float64"),
        ([None] * COUNT, "integers or strings as labels of the array; got object"),
        (np.array(["a", 1.5] * 15, object), "integers or strings as labels"),
        (7, "one label per row"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(InputError, match=message):
        load_data((images(9, 8), labels))


# DataFrames


@pytest.fixture(params=["pandas", "polars"])
def library(request):
    return pytest.importorskip(request.param)


def test_a_frame_is_the_csv_of_its_values(library, tmp_path):
    columns = {
        "height": RANDOM.random(COUNT),
        "Target": np.array(["dog", "cat"])[RANDOM.integers(0, 2, COUNT)],
        "width": RANDOM.random(COUNT),
        "y": RANDOM.random(COUNT),  # a coordinate
    }
    frame = library.DataFrame(columns)
    lines = [",".join(columns)]
    lines += [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    splits = load_data(frame)
    assert_equal(splits, load_data(tmp_path / "a.csv"))
    assert splits.name == "DataFrame"
    values = np.stack([columns[name] for name in ("height", "width", "y")], 1)
    check_rows(splits, values.astype(np.float32), columns["Target"])


def test_columns_of_several_types(library):
    columns = {
        "a": RANDOM.integers(0, 2, COUNT),
        "b": RANDOM.random(COUNT).astype(np.float32),
        "c": RANDOM.random(COUNT) > 0.5,
    }
    splits = load_data(library.DataFrame(columns))
    expected = np.stack([column.astype(np.float32) for column in columns.values()], 1)
    check_rows(splits, expected)
    rows = library.DataFrame({f"p{i}": column for i, column in enumerate(images(72).T)})
    assert load_data(rows, image_size=(9, 8)).spec.shape == (1, 9, 8)


def test_rows_and_labels_meet_by_position_not_by_index():
    pandas = pytest.importorskip("pandas")
    x = RANDOM.random((COUNT, 3)).astype(np.float32)
    y = RANDOM.integers(0, 5, COUNT)
    order = RANDOM.permutation(COUNT)
    frame = pandas.DataFrame(x, index=order)
    check_rows(load_data((frame, pandas.Series(y, index=order[::-1]))), x, y)
    check_rows(load_data((frame, pandas.DataFrame({"kind": y}))), x, y)
    check_rows(load_data((x, pandas.Series(y).astype("category"))), x, y)
    check_rows(load_data((x, pandas.Series(y).astype("Int64"))), x, y)


def test_bad_frames(library):
    x = RANDOM.random(COUNT)
    with pytest.raises(InputError, match=r"column town of DataFrame has no variance"):
        load_data(library.DataFrame({"a": x, "town": ["Rome"] * COUNT}))
    with pytest.raises(InputError, match=r"numbers or text in every column .* in column 'town'"):
        load_data(library.DataFrame({"a": x, "town": [["Rome"]] * COUNT}))
    with pytest.raises(InputError, match="labels once; got y and labels in the DataFrame"):
        load_data((library.DataFrame({"a": x, "label": [1] * COUNT}), [1] * COUNT))
    with pytest.raises(InputError, match="empty array"):
        load_data(library.DataFrame({"label": [1, 2, 3]}))
    with pytest.raises(InputError, match=r"1 value that are NaN.*row 2 at \(0,\)"):
        load_data(library.DataFrame({"a": [1.0, 2.0, None, 4.0]}))
    with pytest.raises(InputError, match="labels of the DataFrame; got"):
        load_data(library.DataFrame({"a": [1.0, 2.0, 3.0], "label": [[1], [2], [3]]}))


def test_bad_columns_of_pandas():
    pandas = pytest.importorskip("pandas")
    x = RANDOM.random(COUNT)
    day = pandas.date_range("2020-01-01", periods=COUNT)
    assert "left out: day (dates)" in load_data(pandas.DataFrame({"a": x, "day": day})).found
    with pytest.raises(InputError, match="impute"):
        load_data(pandas.DataFrame({"n": pandas.array([1, None, 3], dtype="Int64")}))
    with pytest.raises(InputError, match="columns of different names; got"):
        load_data(pandas.DataFrame(np.ones((4, 2)), columns=["a", "a"]))


# torch Datasets


class Items(Dataset):
    """A list of items, which counts how often each is read."""

    def __init__(self, items):
        self.items = list(items)
        self.reads = [0] * len(self.items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.items[index]


def test_datasets_of_tensors():
    x, y = torch.rand(COUNT, 3, 9, 8), torch.randint(0, 4, (COUNT,))
    splits = load_data(TensorDataset(x, y))
    check_rows(splits, x.numpy(), y.tolist())
    assert splits.name == "TensorDataset"
    check_rows(load_data(TensorDataset(x)), x.numpy())
    check_rows(load_data((TensorDataset(x), y)), x.numpy(), y.tolist())
    assert_equal(splits, load_data((x, y)))
    order = torch.randperm(COUNT)[:20]
    subset = Subset(TensorDataset(x, y), order.tolist())
    check_rows(load_data(subset), x[order].numpy(), y[order].tolist())
    both = ConcatDataset([subset, TensorDataset(x, y)])
    check_rows(load_data(both), torch.cat([x[order], x]).numpy(), [*y[order].tolist(), *y.tolist()])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, Image.fromarray])
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3)])
def test_datasets_of_images(kind, shape):
    pixels = images(*shape)
    expected = pixels[:, None] if len(shape) == 2 else pixels.transpose(0, 3, 1, 2)
    labels = ["cat", "dog", "ox"] * (COUNT // 3)
    items = Items([kind(row) for row in pixels])
    check_rows(load_data(items), expected)
    assert items.reads == [1] * COUNT
    check_rows(load_data(Items(zip(map(kind, pixels), labels, strict=True))), expected, labels)
    pairs = [[kind(row), torch.tensor(i % 4)] for i, row in enumerate(pixels)]
    check_rows(load_data(Items(pairs)), expected, [i % 4 for i in range(COUNT)])


def test_images_of_pillow_are_read_as_those_of_a_folder(tmp_path):
    pixels = images(9, 8, 4)
    rows = [Image.fromarray(row) for row in pixels]
    for i, row in enumerate(rows):
        row.save(tmp_path / f"{i:02}.png")
    for size in (None, (5, 6)):
        ours, theirs = load_data(Items(rows), image_size=size), load_data(tmp_path, image_size=size)
        assert_equal(ours, theirs)
        assert ours.spec.shape == (3, *(size or (9, 8)))


def test_datasets_of_torchvision():
    def fake(transform=None):
        return datasets.FakeData(COUNT, (3, 9, 8), 4, transform)

    labels = [int(fake()[i][1]) for i in range(COUNT)]
    expected = np.stack([np.asarray(fake()[i][0]) for i in range(COUNT)]).transpose(0, 3, 1, 2)
    splits = load_data(fake())
    check_rows(splits, expected, labels)
    assert splits.likelihood == "discretized-logistic"
    scaled = load_data(fake(transforms.ToTensor()))
    check_rows(scaled, expected.astype(np.float32) / np.float32(255), labels)
    assert (scaled.spec.shape, scaled.likelihood) == ((3, 9, 8), "continuous-bernoulli")
    grey = load_data(fake(transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])))
    assert grey.spec.shape == (1, 9, 8)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.rand(5, 3))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "map-style torch Dataset, which has a length; got Stream"),
        (Items([]), "rows of numbers in the Items; got an empty array"),
        (Items([np.zeros(3), np.zeros(4)]), r"one shape .* \(3,\) .* item 0, \(4,\) .* item 1"),
        (Items([np.zeros(3, np.uint8), np.zeros(3)]), "uint8 in item 0, .* float64 in item 1"),
        (Items([(np.zeros(3), 1), np.zeros(3)]), "throughout the Items; got 1 parts in item 1"),
        (Items([np.zeros(3), (np.zeros(3), 1)]), "throughout the Items; got 2 parts in item 1"),
        (Items([(np.zeros(3), 1, 2)] * 4), "throughout the Items; got 3 parts in item 0"),
        (Items([(np.zeros(3), np.zeros(k)) for k in (1, 2, 3)]), "got list"),
        (Items([(np.zeros(3), 0.5)] * 4), "labels of the Items; got float64"),
        (Items([(np.zeros(3), np.zeros(3, int))] * 4), "one label per row"),
        (Items([{"x": 1}] * 4), "numbers in the Items; got an array of dtype object"),
        (Items(["text"] * 4), "numbers in the Items; got an array of dtype <U4"),
        (Items([1.0] * 4), r"expected rows \(N, D\), .* in the Items; got an array \(4,\)"),
        (Items([Image.new("L", (4, 4)), Image.new("RGB", (4, 4))]), "one shape .* item 1"),
    ],
)
def test_bad_datasets(dataset, message):
    with pytest.raises(InputError, match=message):
        load_data(dataset)


# Everything else


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((9, 2), complex), "numbers in the array; got an array of dtype complex128"),
        (np.array([["a", "b"]] * 9), "numbers in the array; got an array of dtype <U1"),
        (np.array([[1, 2]] * 9, object), "numbers in the array; got an array of dtype object"),
        (np.array([["2020-01-01"]] * 9, "M8[D]"), "numbers in the array; got an array of dtype"),
        (torch.zeros(9, 2, dtype=torch.complex64), "numbers in the tensor; got .* complex64"),
        (torch.eye(9).to_sparse(), "an array of numbers; got Tensor"),
        (torch.zeros(9, 2, device="meta"), "an array of numbers; got Tensor"),
        (np.zeros(5), r"rows \(N, D\), .* in the array; got an array \(5,\)"),
        (np.zeros((5, 9, 8, 4, 4)), r"got an array \(5, 9, 8, 4, 4\)"),
        (np.zeros((0, 4)), r"rows of numbers in the array; got an empty array \(0, 4\)"),
        (np.zeros((2, 4)), "array has 2 rows; training, validation and test need at least one"),
        (np.ma.masked_less(np.arange(12.0).reshape(4, 3), 5), "without masked values"),
        (np.array([[0.0], [1.0], [np.nan], [2.0]]), r"1 value .* NaN.* row 2 at \(0,\)"),
        (torch.tensor([[0.0], [1.0], [2.0], [torch.inf]]), r"tensor holds 1 .* row 3 at \(0,\)"),
        ([[1, 2], [3, 4], [5, 6]], r"a pair \(x, y\) as data; got list.*numpy\.asarray"),
        (None, "as data; got NoneType"),
        ((np.zeros((5, 2)),), "as data; got tuple"),
        (("digits", [1, 2]), "as data; got str"),
        (Image.new("L", (4, 4)), "as data; got Image"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(InputError, match=message):
        load_data(source)


def test_settings_by_keyword(tmp_path):
    flat = images(72) // 16
    splits = load_data(flat, image_size=(9, 8), max_value=15, validation_size=5, test_size=6)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [19, 5, 6]
    assert (splits.spec.shape, splits.spec.max_value) == ((1, 9, 8), 15)
    np.save(tmp_path / "a.npy", flat)
    settings = {"image_size": (9, 8), "max_value": 15, "validation_size": 5, "test_size": 6}
    for path in (tmp_path / "a.npy", str(tmp_path / "a.npy")):
        assert_equal(load_data(path, **settings), splits)
    config = DataConfig(str(tmp_path / "a.npy"), **settings)
    assert_equal(load_data(config), splits)
    with pytest.raises(InputError, match="settings in the DataConfig; got others as arguments"):
        load_data(config, test_size=5)
    with pytest.raises(InputError, match="--image-size 8 8 expects rows of 64 values; the array"):
        load_data(flat, image_size=(8, 8))
    with pytest.raises(InputError, match="resizes folders of images only; array has images of 9x8"):
        load_data(images(9, 8), image_size=(8, 8))
    with pytest.raises(InputError, match="expects values from 0 to 10; array ranges from 0 to 15"):
        load_data(flat, max_value=10)
    with pytest.raises(InputError, match="leave none to train on"):
        load_data(flat, validation_size=20, test_size=10)


def test_training_is_that_on_the_file(tmp_path):
    """The same records, number for number, and a model that is ready for use."""
    values = np.concatenate([images(9, 8) // 16] * 4)
    np.save(tmp_path / "a.npy", values)
    model = pyro_vae.ModelConfig(latent_dim=2, hidden=(16,))
    fit = pyro_vae.FitConfig(epochs=2, batch_size=32)
    elbos = []
    for source in ((values, np.arange(len(values)) % 5), tmp_path / "a.npy"):
        splits = load_data(source)
        vae = pyro_vae.build(model, splits)
        elbos.append([record.validation_elbo for record in pyro_vae.fit(vae, splits, fit)])
    assert elbos[0] == elbos[1]
    assert len(elbos[0]) == 2
    x = splits.test.take(torch.arange(3), "count")
    assert torch.isfinite(pyro_vae.log_evidence(vae, x, 10)).all()
