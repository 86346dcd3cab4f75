"""Kinds of columns: found from the values, stated, refused; tables are read and written alike."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae import DataConfig, InputError, ModelConfig, build, load_data
from pyro_vae.config import Config
from pyro_vae.config.columns import KINDS, ColumnKind, check_columns, read_columns
from pyro_vae.data.columns import describe_columns
from pyro_vae.data.export import table_text
from pyro_vae.data.loading import load_foreign
from pyro_vae.data.splits import DataSpec, Splits

COUNT = 400
RANDOM = np.random.default_rng(5)
NORMAL = RANDOM.standard_normal(COUNT)
TEXT = RANDOM.choice(["Rome", "Oslo", "Bern"], COUNT)
COLUMNS: dict[str, tuple[Any, str]] = {
    "normal": (NORMAL, "gaussian"),
    "tails": (RANDOM.standard_t(1.5, COUNT), "student-t"),
    "income": (np.exp(9 + NORMAL), "log-normal"),
    "visits": (RANDOM.negative_binomial(1, 0.2, COUNT), "negative-binomial"),
    "rare": (RANDOM.poisson(np.exp(NORMAL)), "negative-binomial"),
    "from one": (1 + RANDOM.geometric(0.2, COUNT), "negative-binomial"),
    "year": (RANDOM.integers(1950, 2020, COUNT), "gaussian"),
    "age": (RANDOM.normal(50, 10, COUNT).round(), "gaussian"),
    "flag": (RANDOM.integers(0, 2, COUNT), "bernoulli"),
    "sex": (RANDOM.integers(1, 3, COUNT), "bernoulli"),
    "answer": (RANDOM.choice(["no", "yes"], COUNT), "bernoulli"),
    "likert": (RANDOM.integers(1, 6, COUNT), "ordinal"),
    "middling": (RANDOM.choice([1, 2, 3], COUNT, p=[0.1, 0.8, 0.1]), "categorical"),
    "town": (TEXT, "categorical"),
    "id": (np.arange(COUNT), "drop"),
    "case_id": (RANDOM.permutation(COUNT) + 1000, "drop"),
    "name": ([f"p{i}" for i in range(COUNT)], "drop"),
    "note": (RANDOM.choice([f"n{i}" for i in range(350)], COUNT), "drop"),
    "day": ([f"2020-01-{1 + i % 28:02d}" for i in range(COUNT)], "drop"),
    "seen": ([f"{1 + i % 28}.3.2021" for i in range(COUNT)], "drop"),
}


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.writer(file, **options)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def mixed(tmp_path: Path, *names: str) -> Path:
    return write(tmp_path / "mixed.csv", {name: COLUMNS[name][0] for name in names})


def kinds_of(splits: Splits) -> dict[str, str]:
    kinds = (kind.name for kind in splits.spec.kinds)
    return dict(zip(splits.spec.columns, kinds, strict=True))


@pytest.fixture(params=["csv", "pandas", "polars"])
def everything(request, tmp_path) -> Splits:
    columns = {name: values for name, (values, _) in COLUMNS.items()}
    if request.param == "csv":
        return load_data(write(tmp_path / "all.csv", columns))
    return load_data(pytest.importorskip(request.param).DataFrame(columns))


# Found


def test_the_kind_of_each_column_is_found(everything):
    """By type, values and number of different values; identifiers and dates are named."""
    expected = {name: kind for name, (_, kind) in COLUMNS.items() if kind != "drop"}
    assert kinds_of(everything) == expected
    assert everything.likelihood == "columns"
    assert everything.found.endswith(
        "left out: id (identifiers), case_id (identifiers), name (identifiers), note (text of "
        f"{len(set(COLUMNS['note'][0]))} different values), day (dates), seen (dates)"
    )
    rows = everything.whole().values
    kinds = dict(zip(everything.spec.columns, everything.spec.kinds, strict=True))
    for j, name in enumerate(everything.spec.columns):
        column, texts = rows[:, j].numpy(), kinds[name].categories
        if texts:
            assert [texts[int(code)] for code in column] == [str(v) for v in COLUMNS[name][0]]
        else:
            np.testing.assert_allclose(column, np.float32(COLUMNS[name][0]), rtol=1e-6)
    assert kinds["town"].categories == ("Bern", "Oslo", "Rome")
    assert kinds["sex"].categories == ("1", "2")


def test_the_table_that_is_shown_before_training(tmp_path):
    lines = describe_columns(load_data(mixed(tmp_path, "visits", "town", "normal")))
    assert [line.split()[:2] for line in lines] == [
        ["visits", "negative-binomial"],
        ["town", "categorical"],
        ["normal", "gaussian"],
    ]
    assert lines[0].endswith(f"0 to {COLUMNS['visits'][0].max()}")
    assert lines[1].endswith("Bern, Oslo, Rome")
    assert describe_columns(load_data("digits")) == []


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["normal", "income"], False),  # real numbers only, as before
        (["visits", "likert"], False),  # integers only
        (["normal", "year"], False),  # integers like real numbers
        (["normal", "flag"], True),
        (["normal", "visits"], True),
        (["normal", "town"], True),
        (["answer", "town"], True),
    ],
)
def test_kinds_are_for_text_and_for_unlike_columns_only(names, kinds, tmp_path):
    splits = load_data(mixed(tmp_path, *names))
    assert bool(splits.spec.kinds) is kinds
    assert (splits.likelihood == "columns") is kinds
    values = {name: COLUMNS[name][0] for name in names}
    assert bool(load_data(pytest.importorskip("pandas").DataFrame(values)).spec.kinds) is kinds


def test_arrays_and_tables_without_names_have_no_kinds(tmp_path):
    array = np.column_stack([NORMAL, COLUMNS["flag"][0]])
    assert not load_data(array).spec.kinds
    np.savetxt(tmp_path / "bare.csv", array, delimiter=",")
    assert load_data(tmp_path / "bare.csv").likelihood == "gaussian"


def test_another_likelihood_takes_the_numbers_as_they_are(tmp_path):
    path = mixed(tmp_path, "normal", "sex")
    splits = load_data(path, likelihood="gaussian")
    assert not splits.spec.kinds
    assert set(splits.train.values[:, 1].tolist()) == {1.0, 2.0}
    with pytest.raises(InputError, match=r"--likelihood gaussian .* use --likelihood columns"):
        build(ModelConfig(likelihood="gaussian"), load_data(path))
    with pytest.raises(InputError, match=r"--likelihood columns expects a table with names"):
        build(ModelConfig(likelihood="columns"), splits)
    assert load_data(mixed(tmp_path, "normal", "year"), likelihood="columns").spec.kinds
    with pytest.raises(InputError, match="column town of mixed holds text, like 'Bern'"):
        load_data(mixed(tmp_path, "normal", "town"), likelihood="gaussian")


def test_types_of_frames(tmp_path):
    pandas = pytest.importorskip("pandas")
    grades = pandas.Categorical(RANDOM.choice(["low", "mid", "high"], 60), ["low", "mid", "high"])
    frame = pandas.DataFrame(
        {
            "grade": grades.as_ordered(),
            "team": grades.as_unordered(),
            "on": RANDOM.random(60) < 0.5,
            "when": pandas.date_range("2020-01-01", periods=60),
        }
    )
    splits = load_data(frame)
    assert kinds_of(splits) == {"grade": "ordinal", "team": "categorical", "on": "bernoulli"}
    assert [kind.categories[0] for kind in splits.spec.kinds] == ["low", "high", "0"]
    assert splits.found.endswith("left out: when (dates)")


# Stated


def test_stated_kinds(tmp_path):
    path = mixed(tmp_path, "normal", "rare", "likert", "id")
    stated = {
        "rare": "zero-inflated-poisson",
        "likert": {"kind": "categorical", "categories": [1, 2, 3, 4, 5, 6]},
        "normal": "drop",
        "id": "gaussian",
    }
    (tmp_path / "kinds.json").write_text(json.dumps(stated))
    toml = (
        'rare = "zero-inflated-poisson"\nnormal = "drop"\nid = "gaussian"\n'
        '[likert]\nkind = "categorical"\ncategories = [1, 2, 3, 4, 5, 6]\n'
    )
    (tmp_path / "kinds.toml").write_text(toml)
    expected = {"rare": "zero-inflated-poisson", "likert": "categorical", "id": "gaussian"}
    for columns in (stated, str(tmp_path / "kinds.json"), tmp_path / "kinds.toml"):
        splits = load_data(path, columns=columns)
        assert kinds_of(splits) == expected
        assert splits.spec.kinds[1].categories == ("1", "2", "3", "4", "5", "6")
        assert "left out: normal (stated)" in splits.found
    config = Config(DataConfig(str(path), columns=tmp_path / "kinds.toml"))
    assert Config.from_dict(config.to_dict()) == config  # the content, not the place of the file
    assert json.loads(json.dumps(config.to_dict()))["data"]["columns"]["rare"] == stated["rare"]


def test_a_column_of_labels_is_one_of_the_data_if_its_kind_is_stated(tmp_path):
    columns = {"a": NORMAL, "class": TEXT}
    path = write(tmp_path / "a.csv", columns)
    assert load_data(path).class_names == ("Bern", "Oslo", "Rome")
    splits = load_data(path, columns={"class": "categorical"})
    assert splits.class_names == ()
    assert kinds_of(splits) == {"a": "gaussian", "class": "categorical"}


def test_levels_that_do_not_occur_count_in_an_ordinal_column(tmp_path):
    path = write(tmp_path / "a.csv", {"x": NORMAL, "g": RANDOM.choice([1, 2, 5], COUNT)})
    splits = load_data(path, columns={"g": "ordinal"})
    assert splits.spec.kinds[1].categories == ("1", "2", "3", "4", "5")
    assert set(splits.whole().values[:, 1].tolist()) == {0.0, 1.0, 4.0}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"weight": "gaussian"}, "mixed has no column weight; it has normal, visits, town, many"),
        ({"visits": "poison"}, "column visits expects one of gaussian, .*; got 'poison'"),
        ({"visits": 3}, "expects one of gaussian, .*; got 3"),
        ({"visits": {"kind": "ordinal", "levels": [1, 2]}}, "has no option 'levels'"),
        ({"visits": {"kind": "poisson", "categories": [1, 2]}}, "poisson has no categories"),
        ({"town": {"kind": "ordinal", "categories": ["a"]}}, "list of two categories or more"),
        ({"town": {"kind": "ordinal", "categories": ["a", "a"]}}, "different categories"),
        ({"town": {"kind": "bernoulli", "categories": ["a", "b", "c"]}}, "two categories; got 3"),
        ([], "expects the names of columns"),
        ({"normal": "poisson"}, r"column normal of mixed holds -.*; poisson expects counts"),
        ({"normal": "log-normal"}, "log-normal expects values above 0"),
        ({"town": "poisson"}, "column town of mixed holds text, like 'Bern'; poisson expects"),
        ({"town": "bernoulli"}, "has 3 different values; bernoulli expects at most 2"),
        ({"many": "categorical"}, "has 1,500 different values; categorical expects at most 1,000"),
        ({"many": "ordinal"}, "has 1,500 different values; ordinal expects at most 65"),
        ({"town": "ordinal"}, "text, whose order is not known: state it"),
        ({"town": {"kind": "ordinal", "categories": ["Bern", "Oslo"]}}, "'Rome', not one of its"),
        ({"one": "gaussian"}, r"column one of mixed has no variance: all its values are '7'"),
        ({"one": "categorical"}, 'no variance.*--columns FILE with "one" = "drop"'),
        (dict.fromkeys(["normal", "visits", "town", "many", "one"], "drop"), "no column left"),
    ],
)
def test_bad_kinds_are_refused(stated, message, tmp_path):
    random = np.random.default_rng(0)
    columns = {
        "normal": random.standard_normal(1500),
        "visits": random.negative_binomial(1, 0.2, 1500),
        "town": random.choice(["Rome", "Oslo", "Bern"], 1500),
        "many": random.permutation(1500) * 1.5,
        "one": np.full(1500, 7),
    }
    path = write(tmp_path / "mixed.csv", columns)
    rest: Any = {"one": "drop"} if isinstance(stated, dict) and "one" not in stated else {}
    with pytest.raises(InputError, match=message) as caught:
        load_data(path, columns={**stated, **rest} if isinstance(stated, dict) else stated)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "a: b", "expects a .toml or .json file"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"a": "poisson", "a": "drop"}', "it names 'a' twice"),
        ("a.json", "[1]", "expects the names of columns"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.toml", "a = ", "is not TOML"),
        ("a.toml", "[a.b]\nc = 1", "expects one of"),
        ("a.json", " " * 2**20 + "{}", "over a megabyte"),
    ],
)
def test_bad_files_of_kinds(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_columns(tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        read_columns(tmp_path / "none.toml")


def test_kinds_by_column_as_plain_values():
    kinds = {"a": ColumnKind("poisson"), "b": ColumnKind("bernoulli", ("0", "1"))}
    plain = {"a": "poisson", "b": {"kind": "bernoulli", "categories": ["0", "1"]}}
    assert check_columns(kinds) == check_columns(plain) == plain
    with pytest.raises(ValueError, match="categories"):
        ColumnKind("categorical")
    with pytest.raises(ValueError, match="a kind expects"):
        ColumnKind("normal")
    assert set(KINDS) > {"gaussian", "ordinal"}


def test_a_column_without_variance_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", {"x": NORMAL, "town": ["Rome"] * COUNT})
    with pytest.raises(InputError, match="column town of a has no variance: all its values are 'R"):
        load_data(path)
    assert load_data(path, columns={"town": "drop"}).spec.columns == ("x",)


def test_other_settings_that_do_not_go_with_kinds(tmp_path):
    path = mixed(tmp_path, "normal", "town")
    with pytest.raises(InputError, match="--max-value has no effect on mixed"):
        load_data(path, max_value=5)
    with pytest.raises(InputError, match="--image-size and --layout expect a table of numbers"):
        load_data(path, image_size=(1, 2))
    with pytest.raises(InputError, match="--columns has no effect on --likelihood gaussian"):
        Config(DataConfig("a.csv", columns={"a": "poisson"}), ModelConfig(likelihood="gaussian"))
    with pytest.raises(InputError, match="--columns expects a table with a different name"):
        load_data(np.ones((9, 2)), columns={"a": "poisson"})


def test_precision_of_real_columns_only(tmp_path):
    columns = {"far": 1e9 + NORMAL, "small": 1e-20 * np.exp(NORMAL), "n": COLUMNS["visits"][0]}
    stated = {"far": "gaussian", "small": "log-normal", "n": "poisson"}
    splits = load_data(write(tmp_path / "a.csv", columns), columns=stated)
    assert splits.spec.offset == pytest.approx((1e9, 0, 0), abs=1)
    assert splits.spec.scale is not None
    assert splits.spec.scale[0] == splits.spec.scale[2] == 1
    x = splits.train.take(torch.arange(50), "real")
    np.testing.assert_allclose(
        x[:, 0], (1e9 + NORMAL - splits.spec.offset[0])[splits.train.rows][:50], atol=1e-4
    )
    assert x[:, 1].min() > 1e-3


# Other data


def test_other_tables_are_coded_as_in_the_training(tmp_path):
    path = mixed(tmp_path, "normal", "town", "likert", "id")
    splits = load_data(path)
    spec = splits.spec
    rows = [("Rome", 2, 0.5), ("Bern", 5, -1.0), ("Rome", 2, 0.25)]
    names = ("town", "likert", "normal")
    other = write(tmp_path / "other.csv", dict(zip(names, zip(*rows, strict=True), strict=True)))
    found = load_foreign(DataConfig(str(other)), spec, "real").test
    assert found.values.tolist() == [[0.5, 2, 1], [-1.0, 0, 4], [0.25, 2, 1]]
    # its own data again
    again = load_data(path, spec=spec)
    assert again.fingerprint == splits.fingerprint
    assert again.spec == spec


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"town": ["Rome", "Lima"]}, "column town of other holds 'Lima', unseen in the training"),
        ({"likert": [2, 6]}, "column likert of other holds '6', unseen in the training data; exp"),
        ({"visits": [1, -2]}, "column visits of other holds -2; negative-binomial expects counts"),
        ({"visits": ["a", "b"]}, "column visits of other holds text, like 'a'; negative-binomial"),
        ({"normal": None}, "expects columns normal, .*; other has .* and lacks normal"),
    ],
)
def test_other_tables_that_do_not_fit(columns, message, tmp_path):
    spec = load_data(mixed(tmp_path, "normal", "town", "likert", "visits")).spec
    given = {"normal": [0.5, 1.5], "town": ["Rome", "Oslo"], "likert": [1, 2], "visits": [0, 3]}
    given = {k: v for k, v in {**given, **columns}.items() if v is not None}
    other = write(tmp_path / "other.csv", given)
    with pytest.raises(InputError, match=message):
        load_foreign(DataConfig(str(other)), spec, "real")


def test_columns_of_kinds_are_never_matched_by_position(tmp_path):
    spec = load_data(mixed(tmp_path, "normal", "flag")).spec
    np.savetxt(tmp_path / "bare.csv", np.ones((5, 2)), delimiter=",")
    np.save(tmp_path / "bare.npy", np.ones((5, 2)))
    for name in ("bare.csv", "bare.npy"):
        with pytest.raises(InputError, match=r"matched by name; bare has no names of columns"):
            load_foreign(DataConfig(str(tmp_path / name)), spec, "real")


def test_numeric_models_ignore_columns_of_text_that_they_do_not_know(tmp_path):
    spec = load_data(mixed(tmp_path, "normal", "income")).spec
    assert not spec.kinds
    with pytest.warns(UserWarning, match="ignored: town"):
        found = load_foreign(
            DataConfig(str(mixed(tmp_path, "town", "income", "normal"))), spec, "real"
        )
    np.testing.assert_allclose(found.test.values[:, 0], np.float32(NORMAL))
    other = write(tmp_path / "other.csv", {"normal": TEXT, "income": NORMAL})
    with pytest.raises(InputError, match="expects numbers; column normal of other holds text"):
        load_foreign(DataConfig(str(other)), spec, "real")


# Written


def test_a_table_that_is_read_and_written_is_the_same(tmp_path):
    names = ["town", "visits", "flag", "sex", "answer", "likert", "middling"]
    columns: dict[str, Any] = {name: COLUMNS[name][0] for name in names}
    columns["real"] = np.float32(NORMAL)
    columns['a "quoted", name'] = RANDOM.choice(['x, "y"', "ü; z", "-"], COUNT)
    path = write(tmp_path / "a.csv", columns, lineterminator="\n")
    splits = load_data(path)
    assert splits.spec.kinds
    x = torch.cat(list(splits.whole().fixed("real", 0)))
    (tmp_path / "b.csv").write_text(table_text(splits.spec, x.numpy()))
    with path.open() as one, (tmp_path / "b.csv").open() as other:
        first, second = list(csv.reader(one)), list(csv.reader(other))
    assert [row[:7] + row[8:] for row in first] == [row[:7] + row[8:] for row in second]
    for a, b in zip(first[1:], second[1:], strict=True):
        assert np.float32(a[7]) == np.float32(b[7])
    again = load_data(tmp_path / "b.csv", spec=splits.spec)
    assert again.whole().values.equal(splits.whole().values)
    assert load_data(tmp_path / "b.csv").fingerprint == splits.fingerprint


def test_missing_values_means_and_numbers_are_written(tmp_path):
    kinds = (ColumnKind("poisson"), ColumnKind("categorical", ("a", "b")), ColumnKind("gaussian"))
    spec = DataSpec((3,), None, False, ("n", "c", "x"), kinds=kinds)
    x = torch.tensor([[2.6, 1.0, 1e-20], [float("nan"), 7.0, -0.1], [0.2, 0.4, 123456.0]])
    lines = table_text(spec, x.numpy(), ["p", "q", "r"]).splitlines()
    assert lines == ["n,c,x,label", "3,b,1e-20,p", ",b,-0.1,q", "0,a,123456,r"]
    plain = DataSpec((2,), None, False, offset=(1e9, 0.0), scale=(1.0, 1.0))
    values = plain.from_units(torch.tensor([[0.5, 2.0]]), "real").numpy()
    assert table_text(plain, values) == "1000000000.5,2\n"
    counts = DataSpec((2,), 16, True, columns=("p", "q"))
    assert table_text(counts, np.array([[7.6, 16.0]])) == "p,q\n8,16\n"


# Missing values


@pytest.mark.parametrize("library", ["csv", "pandas", "polars"])
def test_blanks_are_missing_values_of_any_kind(library, tmp_path):
    """NaN in x; kinds and categories are those of the others."""
    names = ["normal", "visits", "town", "answer", "likert", "income"]
    columns: dict[str, Any] = {name: list(COLUMNS[name][0]) for name in names}
    hidden = RANDOM.random((COUNT, len(names))) < 0.2
    hidden[:, 0] &= ~hidden.all(1)
    marks = ["", "NA", "nan", "null", "N/A", "None"]
    for j, name in enumerate(names):
        for i in np.flatnonzero(hidden[:, j]):
            columns[name][i] = marks[i % 6] if library == "csv" else None
    if library == "csv":
        data: Any = write(tmp_path / "a.csv", columns)
    elif library == "pandas":
        data = pytest.importorskip("pandas").DataFrame(columns)
    else:
        data = pytest.importorskip("polars").DataFrame(columns, strict=False)
    with pytest.raises(InputError, match=r"impute missing values, or model them by --missing mod"):
        load_data(data)
    splits = load_data(data, missing="model")
    assert kinds_of(splits) == {name: COLUMNS[name][1] for name in names}
    assert splits.spec.kinds[2].categories == ("Bern", "Oslo", "Rome")
    rows = splits.whole().values.numpy()
    assert np.array_equal(np.isnan(rows), hidden)
    for j, name in enumerate(names):
        codes, kind = rows[~hidden[:, j], j], splits.spec.kinds[j]
        expected = np.asarray(COLUMNS[name][0])[~hidden[:, j]]
        if kind.categories:
            assert [kind.categories[int(code)] for code in codes] == expected.astype(str).tolist()
        else:
            np.testing.assert_allclose(codes, expected.astype(np.float32), rtol=1e-6)
    assert "missing at random" in splits.describe()
    again = load_data(data, spec=splits.spec)
    assert again.fingerprint == splits.fingerprint


@pytest.mark.filterwarnings("ignore:--missing model")
def test_a_mark_of_missing_values_may_be_a_category_that_is_stated(tmp_path):
    values = RANDOM.choice(["None", "mild", "severe"], COUNT)
    path = write(tmp_path / "a.csv", {"x": NORMAL, "pain": values})
    with pytest.raises(InputError, match="impute missing values"):
        load_data(path)
    order = ["None", "mild", "severe"]
    for missing in ("refuse", "model"):
        stated = {"pain": {"kind": "ordinal", "categories": order}}
        splits = load_data(path, columns=stated, missing=missing)
        assert splits.spec.kinds[1].categories == tuple(order)
        assert not splits.whole().values.isnan().any()
