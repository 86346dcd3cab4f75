"""Tables in text files: their structure is found and told, or refused; columns match by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from pyro_vae import DataConfig, InputError, encode, load, load_data, train
from pyro_vae.data.loading import load_foreign
from pyro_vae.data.readers import read
from pyro_vae.data.source import Source

QUICK = ["--batch-size", "16", "--epochs", "1", "--hidden", "8", "--latent-dim", "2"]
ROWS = [[1.5, 2.25], [3.0, 4.5], [5.5, 6.125]]


def table(tmp_path, text: str, name: str = "a.csv", **options) -> Source:
    (tmp_path / name).write_bytes(text.encode(**options))
    return read(DataConfig(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("1.5,2.25\n3,4.5\n5.5,6.125\n", ()),
        ("x,y\n1.5,2.25\n3,4.5\n5.5,6.125\n", ("x", "y")),
        ("x,y\r\n1.5,2.25\r\n3,4.5\r\n5.5,6.125\r\n", ("x", "y")),
        ('\ufeff"x";"y"\n1.5;2.25\n3;4.5\n5.5;6.125', ("x", "y")),
        ("x\ty\n1.5\t2.25\n3\t4.5\n5.5\t6.125\n", ("x", "y")),
        ("  1.5   2.25\n  3.0   4.5 \n  5.5   6.125\n", ()),
        ("x, y\n1.5, 2.25\n3, 4.5\n5.5, 6.125\n", ("x", "y")),
        ("x,y,\n1.5,2.25,\n3,4.5,\n5.5,6.125,\n", ("x", "y")),
        ("x,y\n1.5,2.25,\n3,4.5,\n5.5,6.125,\n", ("x", "y")),
        ("x,y,\n1.5,2.25\n3,4.5\n5.5,6.125\n", ("x", "y")),
        ("1.5,2.25,\n3,4.5,\n5.5,6.125,\n", ()),
        ("x,y\n\n1.5,2.25\n  \n3,4.5\n\n5.5,6.125\n\n\n", ("x", "y")),
        ("# made today\nx,y\n1.5,2.25\n# a note\n3,4.5\n5.5,6.125\n", ("x", "y")),
        ("# x,y\n1.5,2.25\n3,4.5\n5.5,6.125\n", ("x", "y")),
        ("# no names here\n1.5,2.25\n3,4.5\n5.5,6.125\n", ()),
        (',x,y\n0,1.5,2.25\n1,3,4.5\n2,5.5,6.125\n"', ("x", "y")),
        (",x,y\n17,1.5,2.25\n4,3,4.5\n9,5.5,6.125\n", ("x", "y")),
        ("Unnamed: 0,x,y\n0,1.5,2.25\n1,3,4.5\n2,5.5,6.125\n", ("x", "y")),
        ('"x" "y"\n"1" 1.5 2.25\n"2" 3 4.5\n"3" 5.5 6.125\n', ("x", "y")),
        ('"x","y"\n"Mazda RX4",1.5,2.25\n"Fiat",3,4.5\n"Duster",5.5,6.125\n', ("x", "y")),
        (",0,1\n0,1.5,2.25\n1,3,4.5\n2,5.5,6.125\n", ("0", "1")),
        (",2019,2020\n0,1.5,2.25\n1,3,4.5\n2,5.5,6.125\n", ("2019", "2020")),
        ("x,x\n1.5,2.25\n3,4.5\n5.5,6.125\n", ()),
    ],
)
def test_the_same_rows_in_many_structures(text, columns, tmp_path):
    source = table(tmp_path, text.removesuffix('"') if text.endswith('\n"') else text)
    assert source.values.tolist() == ROWS
    assert source.columns == columns
    assert source.labels is None


def test_what_was_found_is_told(tmp_path):
    text = ",a,b,species\n0,1.5,2,x\n1,3,4,y\n2,5,6,x\n"
    source = table(tmp_path, text.replace("species", "class"))
    assert source.found == (
        "2 columns a, b; first column without a name dropped (an index); labels in column class"
    )
    assert (source.class_names, source.values.tolist()) == (("x", "y"), [[1.5, 2], [3, 4], [5, 6]])
    assert load_data(tmp_path / "a.csv").found == source.found
    assert table(tmp_path, "1.5,2\n3,4\n").found == ""


@pytest.mark.parametrize(
    ("first", "rows", "names"),
    [
        ("0,1,2", ["0.5,1.25,2.5", "1.5,2.5,3.5"], True),
        ("0,1,2,3,4,5,6,7,8,9", ["7,0,0,3,4,9,1,1,2,5"] * 2, True),
        ("1990,1991,1992", ["0.5,1.25,2.5", "1.5,2.5,3.5"], True),
        ("1990,2000,2010", ["0.5,1.25,2.5", "1.5,2.5,3.5"], True),
        ("0,1,2,label", ["0.5,1.25,2.5,7", "1.5,2.5,3.5,8"], True),
        ("0,1,2,label", ["0.5,1.25,2.5,dog", "1.5,2.5,3.5,cat"], True),
        # rows: no sequence, or one that goes on
        ("5.1,3.5,1.4", ["4.9,3.0,1.4", "4.7,3.2,1.3"], False),
        ("3,1,2", ["0.5,1.25,2.5"], False),
        ("0,1,2", ["3,4,5", "6,7,8"], False),
        ("1,2", ["3,4"], False),
        ("0", ["1", "3"], False),
        ("2019,2020", ["2020,2021", "2021,2022"], False),
        ("5,9", ["4,3", "1,1"], False),
        ("0,0,1", ["1,0,0"], False),
    ],
)
def test_numbers_as_names(first, rows, names, tmp_path):
    source = table(tmp_path, "\n".join([first, *rows]))
    assert len(source.values) == len(rows) + (not names)
    expected = tuple(n for n in first.split(",") if n != "label") if names else ()
    assert source.columns == expected


@pytest.mark.parametrize(
    "text",
    [
        "0,1,2\n3,7,2\n4,1,1\n",
        "1,2,3\n7,7,2\n",
        "0,1\n1,0\n1,1\n",
        "0,1\n0.5,0.25\n",
        "0\n0.5\n0.25\n",
        "1990,2000\n812,977\n",
    ],
)
def test_a_first_line_that_may_be_either_is_refused_with_both_remedies(text, tmp_path):
    with pytest.raises(InputError, match=r"begin with a letter; if it is a row, add a line of nam"):
        table(tmp_path, text)
    # either remedy is taken
    first, rest = text.split("\n", 1)
    letters = ",".join("abc"[: first.count(",") + 1])
    assert len(table(tmp_path, f"{letters}\n{text}").values) == text.count("\n")
    named = ",".join(f"c{cell}" for cell in first.split(","))
    assert len(table(tmp_path, f"{named}\n{rest}").values) == rest.count("\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,4,5\n", r"line 3 has 3 cells, the table has 2 columns"),
        ("1,2\n3,4\n\n5\n", r"line 4 has 1 cell, the table has 2 columns"),
        ("# note\na,b\n1,2\n\n3,x\n", r"'x' to a number in line 5, column 2 \(b\)"),
        ("a;b\n1,5;2,5\n3.5;4,5\n", r"'1,5' .* line 2, column 1 \(a\); write decimal points or"),
        ("a;b\n1,5;2,5\n3,5;1.004,5\n", r"'1.004,5' .* line 3, column 2 \(b\); write decimal"),
        ("a;b\n1,500;2\n3,250;4\n", r"the comma in 1,500 may be that of decimals or of thousands"),
        ("a,b\n1,\n3,4\n", r"string '' .* line 2, column 2 \(b\); impute"),
        ("a,b\n1,NA\n3,4\n", r"string 'NA' .* line 2, column 2 \(b\)"),
        ("a,b\n1_000,2\n3,4\n", r"string '1_000'"),
        (",a,b\n0.5,1,2\n1.5,3,4\n", "may be an index or data; name it"),
        ("5.1,3.5,setosa\n4.9,3.0,setosa\n", r"'setosa' .* call it label in a first line of names"),
        ("a,b\n1,2\n3,nan\n4,5\n6,7\n", r"NaN.* row 1 at \(1,\), column b \(counted"),
        ("x" * 200_000 + ",b\n1,2\n", r"a\.csv is not a table of numbers: field larger"),
        ("a\x00b,c\n1,2\n", "."),
    ],
)
def test_broken_tables(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_data(tmp_path / "a.csv")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("x;ü\n1,5;2,25\n3;4,5\n5,5;6,125\n", ("x", "ü")),
        ("1,5;2,25\n3;4,5\n5,5;6,125\n", ()),
        ('"x","ü"\n"1,5","2,25"\n"3","4,5"\n"5,5","6,125"\n', ("x", "ü")),
        (";x;ü\n1;1,5;2,25\n2;3;4,5\n3;5,5;6,125\n", ("x", "ü")),
        ("x\tü\n1,5\t2,25\n3\t4,5\n5,5\t0,6125e1\n", ("x", "ü")),
    ],
)
def test_decimal_commas_and_encodings(text, columns, encoding, tmp_path):
    source = table(tmp_path, text, encoding=encoding)
    assert source.values.tolist() == ROWS
    assert source.columns == columns


def test_other_encodings_are_refused(tmp_path):
    for encoding in ("utf-16-le", "latin-1", "utf-32"):
        with pytest.raises(InputError, match=r"UTF-8|repair the line"):
            table(tmp_path, "a,ü\n1,2\n3,4\n", encoding=encoding)


# Text


def test_text_is_stored_as_codes_in_alphabetical_order(tmp_path):
    text = "name;height;answer\n b ;1,5;yes\na;2,25;no\n b;3;yes\nc;4;yes\n"
    source = table(tmp_path, text)
    assert source.values.tolist() == [[1, 1.5, 1], [0, 2.25, 0], [1, 3, 1], [2, 4, 1]]
    assert [texts and texts.values for texts in source.texts] == [
        ("a", "b", "c"),
        None,
        ("no", "yes"),
    ]


def test_a_number_that_is_misspelled_does_not_make_a_column_text(tmp_path):
    rows = "".join(f"{i}.5,{i % 3}\n" for i in range(30))
    with pytest.raises(InputError, match=r"'1.5x' to a number in line 32, column 1 \(a\); repair"):
        table(tmp_path, f"a,b\n{rows}1.5x,2\n")
    (tmp_path / "b.csv").write_text(f"a,b\n{rows}1.5x,2\n")
    for kind in ("categorical", "drop"):
        read(DataConfig(str(tmp_path / "b.csv"), columns={"a": kind}))
    with pytest.raises(InputError, match=r"string '' .* line 3, column 1 \(a\); impute"):
        table(tmp_path, "a,b\nx,1\n,2\ny,3\n")


def test_a_table_that_the_machine_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 64)  # 4,096 bytes in all
    with pytest.raises(InputError, match=r"not enough memory: about 2,... cells of .*a\.csv"):
        table(tmp_path, "a,b\n" + "12,34\n" * 1000)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_parquet_and_arrow(ending, tmp_path, monkeypatch):
    """The same rows, types and texts as in the DataFrame."""
    polars = pytest.importorskip("polars")
    random = np.random.default_rng(0)
    frame = polars.DataFrame(
        {
            "a": random.standard_normal(60),
            "n": random.integers(0, 9, 60),
            "town": polars.Series(random.choice(["x", "y", "z"], 60), dtype=polars.Categorical),
            "target": random.integers(0, 3, 60),
        }
    )
    path = tmp_path / f"t.{ending}"
    frame.write_parquet(path) if ending == "parquet" else frame.write_ipc(path)
    source, expected = read(DataConfig(str(path))), load_data(frame)
    splits = load_data(path)
    assert (source.name, splits.class_names) == ("t", ("0", "1", "2"))
    assert splits.fingerprint == expected.fingerprint
    assert splits.spec == expected.spec
    for damaged in (path.read_bytes()[:100], b"", b"x" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a whole table"):
            read(DataConfig(str(path)))
    frame.write_parquet(path) if ending == "parquet" else frame.write_ipc(path)
    with monkeypatch.context() as patch:
        patch.setattr("os.sysconf", lambda name: 8)
        with pytest.raises(InputError, match="not enough memory: 240 cells"):
            read(DataConfig(str(path)))
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(InputError, match=r"pip install 'pyro-vae\[tables\]'"):
        read(DataConfig(str(path)))


def test_digits_that_float64_cannot_keep_are_refused_by_column(tmp_path):
    rows = "\n".join(f"{i},1000000000000000000{i}" for i in range(5, 9))
    with pytest.raises(InputError, match=r"column id holds numbers that float64 cannot tell apart"):
        table(tmp_path, f"a,id\n{rows}")
    rows = "\n".join(f"{i},{'1e3' if i % 2 else '1000.0'}" for i in range(5, 9))
    assert table(tmp_path, f"a,id\n{rows}").values[:, 1].tolist() == [1000] * 4


# Labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "2", "0", "11", "1"], ("0", "1", "2", "10", "11")),
        (["-1", "3", "-10", "3", "2"], ("-10", "-1", "2", "3")),
        (["2.0", "10.0", "2.0", "1.0", "3.0"], ("1", "2", "3", "10")),
        (["01", "10", "02", "01", "9"], ("01", "02", "9", "10")),
        (["b10", "b9", "a", "a", "c"], ("a", "b10", "b9", "c")),
        (["0.5", "1.5", "0.5", "10.5", "9.5"], ("0.5", "1.5", "9.5", "10.5")),
    ],
)
def test_classes_are_sorted_as_numbers_if_they_are(labels, names, tmp_path):
    """The code of a row gives its name."""
    text = "x,label\n" + "\n".join(f"{i}.5,{label}" for i, label in enumerate(labels))
    source = table(tmp_path, text)
    assert source.class_names == names
    assert source.labels is not None
    assert [names[code] for code in source.labels] == [n.removesuffix(".0") for n in labels]
    if names == ("0", "1", "2", "10", "11"):
        assert source.labels.tolist() == [3, 2, 0, 4, 1]
        images = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4)
        assert load_data((images, labels)).class_names == names


def test_a_real_quantity_is_no_label(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.random((50, 2)), random.random(50)
    lines = ["a,target,b"] + [f"{a},{t},{b}" for (a, b), t in zip(x, y, strict=True)]
    with pytest.warns(UserWarning, match="50 different real numbers, not classes"):
        source = table(tmp_path, "\n".join(lines))
    assert source.labels is None
    assert source.class_names == ()
    assert np.array_equal(source.values, x)
    assert source.found == "2 columns a, b"
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.warns(UserWarning, match="not classes"):
        assert read(DataConfig(str(tmp_path / "a.npz"))).labels is None
    pandas = pytest.importorskip("pandas")
    with pytest.warns(UserWarning, match="not classes"):
        assert load_data(pandas.DataFrame({"a": x[:, 0], "target": y})).class_names == ()


def test_labels_as_a_column_or_one_hot():
    x, y = np.random.default_rng(0).random((30, 4)), np.arange(30) % 3
    expected = load_data((x, y))
    for labels in (y[:, None], np.eye(3, dtype=int)[y], np.eye(3, dtype=bool)[y]):
        splits = load_data((x, labels))
        assert splits.class_names == expected.class_names
        assert splits.train.labels is not None
        assert splits.train.labels.equal(expected.train.labels)
    two = np.eye(3, dtype=int)[y]
    two[5] = [1, 1, 0]
    with pytest.raises(InputError, match="one label per row"):
        load_data((x, two))


# Names of columns


def test_columns_of_other_data_are_matched_by_name(tmp_path):
    random = np.random.default_rng(0)
    values = random.standard_normal((40, 3)) * [1, 10, 100]
    np.savetxt(tmp_path / "a.csv", values, delimiter=",", header="a,b,c", comments="")
    spec = load_data(tmp_path / "a.csv").spec
    assert spec.columns == ("a", "b", "c")

    def other(header: str, order: list[int]) -> DataConfig:
        path = tmp_path / "other.csv"
        text = values[5:25][:, order]
        np.savetxt(path, text, delimiter=",", header=header, comments="")
        return DataConfig(str(path))

    def rows(config: DataConfig) -> np.ndarray:
        return load_foreign(config, spec, "real").test.values.numpy()

    expected = values[5:25].astype(np.float32)
    assert np.array_equal(rows(other("a,b,c", [0, 1, 2])), expected)
    assert np.array_equal(rows(other("c,a,b", [2, 0, 1])), expected)
    with pytest.warns(UserWarning, match="does not know, which are ignored: d$"):
        assert np.array_equal(rows(other("c,d,a,b", [2, 0, 0, 1])), expected)
    with pytest.raises(InputError, match=r"expects columns a, b, c; other has a, b, d and lacks c"):
        rows(other("a,b,d", [0, 1, 2]))
    np.savetxt(tmp_path / "bare.csv", values[5:25], delimiter=",")
    assert np.array_equal(rows(DataConfig(str(tmp_path / "bare.csv"))), expected)
    # the same data in another order are the training data
    splits = load_data(tmp_path / "a.csv", spec=spec)
    np.savetxt(tmp_path / "c.csv", values[:, [2, 0, 1]], delimiter=",", header="c,a,b", comments="")
    again = load_data(tmp_path / "c.csv", spec=spec)
    assert again.fingerprint == splits.fingerprint
    assert again.train.values.equal(splits.train.values)


def test_frames_are_matched_by_name():
    pandas = pytest.importorskip("pandas")
    values = np.random.default_rng(0).standard_normal((40, 2))
    frame = pandas.DataFrame(values, columns=["a", "b"], index=np.arange(40) * 7 % 40)
    splits = load_data(frame)
    assert (splits.spec.columns, splits.found) == (("a", "b"), "2 columns a, b")
    again = load_data(frame[["b", "a"]], spec=splits.spec)
    assert again.train.values.equal(splits.train.values)
    with pytest.raises(InputError, match="lacks b"):
        load_data(frame[["a"]], spec=splits.spec)
    frame.insert(0, "Unnamed: 0", range(40))
    assert load_data(frame).fingerprint == splits.fingerprint
    assert "first column without a name dropped" in load_data(frame).found
    frame["Unnamed: 0"] = np.linspace(0, 1, 40)
    assert load_data(frame).spec.columns == ("Unnamed: 0", "a", "b")
    assert load_data(pandas.DataFrame(values)).spec.columns == ("0", "1")


def test_frames_of_integers_that_float64_cannot_keep():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.linspace(0, 9, 40), "id": 10**17 + np.arange(40)})
    with pytest.raises(InputError, match=r"column id of the DataFrame .* float64 cannot hold"):
        load_data(frame)


def test_encode_matches_columns_by_name(tmp_path, monkeypatch):
    """In the commands too, by the names in the checkpoint."""
    for name in ("draw_reconstructions", "draw_run"):
        monkeypatch.setattr(f"pyro_vae.plots.from_model.{name}", lambda *a, **k: None)
    monkeypatch.setattr("pyro_vae.page.write.write_report", lambda run, *a, **k: run)
    values = np.random.default_rng(0).standard_normal((40, 3)) * [1, 10, 100]
    for name, order in (("abc", [0, 1, 2]), ("cab", [2, 0, 1])):
        part = values if name == "abc" else values[:20]
        header = ",".join(name)
        path = tmp_path / f"{name}.csv"
        np.savetxt(path, part[:, order], delimiter=",", header=header, comments="")
    run = str(tmp_path / "run")
    assert train.main(["--data", str(tmp_path / "abc.csv"), "--out", run, *QUICK]) == 0
    codes = []
    for name in ("abc", "cab"):
        out = str(tmp_path / f"{name}.npz")
        assert encode.main([run, "--data", str(tmp_path / f"{name}.csv"), "--out", out]) == 0
        with np.load(out) as archive:
            codes.append(archive["mean"][:20])
    np.testing.assert_allclose(codes[0], codes[1], rtol=1e-4, atol=1e-5)
    assert load(run).likelihood_module.spec.columns == ("a", "b", "c")
