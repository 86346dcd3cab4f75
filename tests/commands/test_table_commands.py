"""Every command on a table with columns of several kinds, and mistakes that people make there."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import mixed_tables
import numpy as np
import pytest
import torch
from masked import EFFORT
from test_output import refusal

import pyro_vae
from pyro_vae import diagnose, encode, evaluate, generate, report, train
from pyro_vae.diagnostics import suite
from pyro_vae.impute import main as impute_main
from pyro_vae.refit import main as refit_main
from pyro_vae.training.checkpoint import load_checkpoint

QUICK = ["--epochs", "6", "--hidden", "8", "--latent-dim", "2", "--batch-size", "40"]
COUNT = 300


def write(path: Path, x: np.ndarray, names=mixed_tables.NAMES) -> Path:
    """A table as a person would export it: an index, text, and numbers."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *names, "case", "day"])
        for i, row in enumerate(x):
            cells = [
                kind.categories[int(v)] if kind.categories else f"{v:.6g}"
                for v, kind in zip(row, mixed_tables.KINDS, strict=True)
            ]
            writer.writerow([i, *cells, f"c{i:04d}", f"2021-03-{1 + i % 28:02d}"])
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    stated = {n: k.name for n, k in zip(mixed_tables.NAMES, mixed_tables.KINDS, strict=True)}
    (folder / "kinds.json").write_text(json.dumps(stated))
    return write(folder / "mixed.csv", mixed_tables.values(COUNT))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run with stated kinds, whose file of kinds is gone."""
    run = tmp_path_factory.mktemp("runs") / "mixed"
    kinds = data.parent / "copy.json"
    kinds.write_bytes((data.parent / "kinds.json").read_bytes())
    arguments = ["--data", data, "--columns", kinds, "--out", run, *QUICK]
    assert train.main([*map(str, arguments)]) == 0
    kinds.unlink()
    return run


def test_train_shows_the_columns(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    arguments = ["--data", str(data), "--out", out, *QUICK, "--epochs", "1", "--refit", "off"]
    assert train.main(arguments) == 0
    text = capsys.readouterr().out
    assert "first column without a name dropped (an index)" in text
    assert "left out: case (identifiers), day (dates)" in text
    assert "likelihood columns" in text
    shown = [line.strip() for line in text.splitlines() if line.startswith("       ")]
    lines = {line.split("  ")[0]: line for line in shown}
    assert lines["categorical 1"].endswith("a, b, c, d")
    assert "ordinal" in lines["ordinal 8"]
    assert lines["zero-inflated-poisson 10"].split("  ", 1)[1].startswith("negative-binomial")


def test_kinds_are_in_the_run(trained):
    spec = pyro_vae.load(trained).likelihood_module.spec
    assert [kind.name for kind in spec.kinds] == [kind.name for kind in mixed_tables.KINDS]
    assert spec.kinds[1].categories == ("a", "b", "c", "d")
    config = json.loads((trained / "config.json").read_text())
    assert config["data"]["columns"]["ordinal 8"] == "ordinal"
    page = (trained / "report.html").read_text()
    assert "ordinal 8=ordinal" in page


@pytest.mark.slow
def test_every_command(trained, tmp_path, capsys):
    run = str(trained)
    assert evaluate.main([run, "--num-samples", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert np.isfinite(found["log_evidence"])
    assert found["bits_per_dim"] is None
    assert (
        encode.main(
            [
                run,
                "--out",
                str(tmp_path / "e.npz"),
            ]
        )
        == 0
    )
    for ending in ("png", "npy", "npz", "csv"):
        for draw in ([], ["--draw"]):
            out = tmp_path / f"g{len(draw)}.{ending}"
            assert generate.main([run, "--out", str(out), "--num", "9", *draw]) == 0
            assert out.stat().st_size > 0
    assert refit_main([run]) == 0
    assert report.main([run]) == 0
    assert "columns" in (trained / "report.html").read_text()


def test_generated_tables_are_like_the_data(trained, data, tmp_path):
    """Names, categories, counts and units; the training reads them again."""
    out = tmp_path / "g.csv"
    assert generate.main([str(trained), "--out", str(out), "--num", "400", "--draw"]) == 0
    with out.open() as file:
        names, *rows = list(csv.reader(file))
    assert tuple(names) == mixed_tables.NAMES
    for j, kind in enumerate(mixed_tables.KINDS):
        cells = [row[j] for row in rows]
        if kind.categories:
            assert set(cells) <= set(kind.categories)
        elif kind.is_discrete:
            assert all(cell.isdecimal() for cell in cells)
    heights = np.array([float(row[0]) for row in rows])
    assert 160 < heights.mean() < 180
    arguments = [str(trained), "--data", str(out), "--num-samples", "20", "--json"]
    assert evaluate.main(arguments) == 0


@pytest.mark.slow
def test_diagnose(trained, monkeypatch, capsys):
    monkeypatch.setattr(suite, "QUICK", EFFORT)
    assert diagnose.main([str(trained), "--quick"]) == 0
    text = capsys.readouterr().out
    assert "columns" in text
    report_ = json.loads((trained / "diagnostics.json").read_text())
    assert set(report_["details"]["columns"]) == set(mixed_tables.NAMES)
    assert (trained / "figures" / "diagnose_columns.png").is_file()


@pytest.mark.slow
def test_a_resumed_run_is_that_of_an_uninterrupted_one(data, trained, tmp_path):
    """Bit for bit, also without the file of kinds."""
    run, kinds = str(tmp_path / "run"), tmp_path / "kinds.json"
    kinds.write_bytes((data.parent / "kinds.json").read_bytes())
    steady = [*QUICK, "--schedule", "constant", "--learning-rate-warmup", "0", "--refit", "off"]
    start = ["--data", data, "--columns", kinds, "--out", run, *steady]
    assert train.main([*map(str, [*start, "--epochs", "3"])]) == 0
    kinds.unlink()
    assert train.main(["--resume", run, "--epochs", "6"]) == 0
    whole = str(tmp_path / "whole")
    again = ["--data", data, "--columns", data.parent / "kinds.json", "--out", whole, *steady]
    assert train.main([*map(str, again)]) == 0
    weights = [load_checkpoint(path, "last").vae.state_dict() for path in (run, whole)]
    assert all(a.equal(b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_checkpoint_of_an_older_version_has_no_kinds(tmp_path):
    """Neither has one of numbers: its bytes differ from those of before by an empty list."""
    x = np.random.default_rng(0).standard_normal((60, 2))
    np.save(tmp_path / "x.npy", x)
    arguments = ["--data", tmp_path / "x.npy", "--out", tmp_path / "run", *QUICK, "--epochs", "1"]
    assert train.main([*map(str, arguments), "--refit", "off"]) == 0
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    content = torch.load(path, weights_only=True)
    assert content["data"].pop("kinds") == []
    del content["config"]["data"]["columns"]
    content["format_version"] = 1  # without digests
    torch.save(content, path)
    assert pyro_vae.load(path).likelihood_module.spec.kinds == ()


def test_a_table_with_blanks(data, tmp_path, capsys):
    """--missing model: every command, and a completed table with the same observed cells."""
    random = np.random.default_rng(0)
    with data.open() as file:
        names, *rows = list(csv.reader(file))
    for row in rows:
        for j in range(1, 13):
            if random.random() < 0.1:
                row[j] = random.choice(["", "NA"])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    run, kinds = str(tmp_path / "run"), str(data.parent / "kinds.json")
    table = ["--data", str(tmp_path / "a.csv"), "--columns", kinds, "--out", run, *QUICK]
    assert "model them by --missing model" in refusal(capsys, train.main, *table)
    assert train.main([*table, "--missing", "model"]) == 0
    assert "missing at random" in capsys.readouterr().out
    assert evaluate.main([run, "--num-samples", "30", "--json"]) == 0
    assert encode.main([run, "--out", str(tmp_path / "e.npz")]) == 0
    assert generate.main([run, "--out", str(tmp_path / "g.csv"), "--draw"]) == 0
    out = tmp_path / "completed.csv"
    assert impute_main([run, "--out", str(out), "--num-samples", "50"]) == 0
    with out.open() as file:
        header, *completed = list(csv.reader(file))
    assert header == names[1:13]
    for row, full in zip(rows, completed, strict=True):
        for j, kind in enumerate(mixed_tables.KINDS):
            cell, given = full[j], row[j + 1]
            assert cell not in ("", "NA", "nan")
            if kind.categories:
                assert cell in kind.categories
            elif kind.is_discrete:
                assert cell.isdecimal()
            if given not in ("", "NA"):
                assert cell == given if kind.categories else float(cell) == np.float32(given)
    assert impute_main([run, "--out", str(tmp_path / "i.npz"), "--num-samples", "50"]) == 0


# Mistakes


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ('{"ordinal 8": "grade"}', "column ordinal 8 expects one of gaussian, "),
        ('{"weight": "gaussian"}', "mixed has no column weight; it has gaussian 0, "),
        ('{"gaussian 0": "bernoulli"}', "different values; bernoulli expects at most 2"),
        ('{"gaussian 9": "poisson"}', "poisson expects counts"),
        ("{", "is not JSON"),
    ],
)
def test_bad_kinds(kinds, message, data, tmp_path, capsys):
    (tmp_path / "k.json").write_text(kinds)
    arguments = ["--data", data, "--columns", tmp_path / "k.json", "--out", tmp_path / "run"]
    assert message in refusal(capsys, train.main, *arguments, *QUICK)
    assert not (tmp_path / "run").exists()


def test_other_mistakes(trained, data, tmp_path, capsys):
    missing = tmp_path / "none.json"
    message = refusal(capsys, train.main, "--data", data, "--columns", missing)
    assert "cannot read" in message
    message = refusal(
        capsys, train.main, "--data", "digits", "--columns", data.parent / "kinds.json"
    )
    assert "--columns expects a table with a different name for each column" in message
    flags = ["--columns", data.parent / "kinds.json", "--likelihood", "gaussian"]
    assert "--columns has no effect" in refusal(capsys, train.main, "--data", data, *flags)
    message = refusal(capsys, train.main, "--data", data, "--likelihood", "gaussian")
    assert "column categorical 1 of mixed holds text, like 'a'" in message
    other = mixed_tables.values(20)
    text = write(tmp_path / "o.csv", other).read_text().replace(",a,", ",zebra,")
    (tmp_path / "o.csv").write_text(text)
    message = refusal(capsys, evaluate.main, trained, "--data", tmp_path / "o.csv")
    assert "column categorical 1 of o holds 'zebra', unseen in the training data" in message
    np.save(tmp_path / "o.npy", other)
    message = refusal(capsys, evaluate.main, trained, "--data", tmp_path / "o.npy")
    assert "matched by name" in message
    rows = "a,b\n" + "".join(f"{i % 7}.5,x\n" for i in range(40))
    (tmp_path / "c.csv").write_text(rows)
    message = refusal(capsys, train.main, "--data", tmp_path / "c.csv", "--out", tmp_path / "run")
    assert "column b of c has no variance" in message
    message = refusal(capsys, generate.main, trained, "--out", tmp_path / "g.xlsx")
    assert "--out expects a file ending in" in message


def test_generate_csv_needs_a_table(run, tmp_path, capsys):
    message = refusal(capsys, generate.main, run, "--out", tmp_path / "g.csv")
    assert "--out .csv expects a run on a table" in message


def test_help_names_the_kinds():
    text = subprocess.run(
        [sys.executable, "-m", "pyro_vae.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = " ".join(text.replace("│", " ").split())
    for name in ("student-t", "zero-inflated-negative-binomial", "ordinal", "--columns FILE"):
        assert name in words
