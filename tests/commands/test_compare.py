"""python -m pyro_vae.compare: which runs are compared on which rows, and what is written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import pyro_vae
from pyro_vae import compare, report, train
from pyro_vae.cli import load_run_data
from pyro_vae.config.families import FullGuide
from pyro_vae.evidence.evaluation import evaluate
from pyro_vae.page import comparison as words
from pyro_vae.training.checkpoint import load_checkpoint

MINUS = "\N{MINUS SIGN}"
TINY = ["--epochs", "1", "--hidden", "8", "--batch-size", "16", "--refit", "off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods with two seeds each, on data with a test split of their own; and other runs."""
    folder = tmp_path_factory.mktemp("compare")
    random = np.random.default_rng(0)
    level = random.random((260, 1, 1))
    values = np.rint(15 * (0.5 * level + 0.5 * random.random((260, 4, 4)))).astype(np.uint8)
    np.savez(folder / "own.npz", x_train=values[:160], x_test=values[160:])
    np.save(folder / "whole.npy", values)
    np.save(folder / "other.npy", values[::-1][:70])
    for name, data, flags in (
        ("a0", "own.npz", ["--latent-dim", "2"]),
        ("a1", "own.npz", ["--latent-dim", "2", "--seed", "1"]),
        ("b0", "own.npz", ["--latent-dim", "3", "--learning-rate", "0.03"]),
        ("b1", "own.npz", ["--latent-dim", "3", "--learning-rate", "0.03", "--seed", "1"]),
        ("w0", "whole.npy", ["--latent-dim", "2"]),
        ("w1", "whole.npy", ["--latent-dim", "2", "--seed", "1"]),
        ("v0", "other.npy", ["--latent-dim", "2"]),
        ("grey", "own.npz", ["--latent-dim", "2", "--likelihood", "bernoulli"]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "_summarize", lambda *_: None)
            place = ["--data", str(folder / data), "--out", str(folder / name), "--max-value", "15"]
            assert train.main([*place, *TINY, *flags]) == 0
    return folder


def run(folder: Path, names: str, *flags: str) -> int:
    line = [str(folder / name) for name in names.split()]
    return compare.main([*line, "--num-samples", "30", *map(str, flags)])


def numbers(folder: Path, capsys, names: str, *flags: str) -> dict:
    assert run(folder, names, "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_are_those_of_the_models_on_their_test_rows(folder, capsys):
    found = numbers(folder, capsys, "a0 a1 b0 b1", "--seed", 3)
    splits = pyro_vae.load_data(str(folder / "own.npz"), max_value=15)
    for name in ("a0", "b1"):
        result = evaluate(pyro_vae.load(folder / name), splits.test, 30, seed=3)
        measures = found["measures"]
        assert measures["elbo"]["means"][name] == pytest.approx(result.elbo)
        assert measures["log_evidence"]["means"][name] == pytest.approx(result.log_evidence)
        assert found["monte_carlo_error"][name] == pytest.approx(result.monte_carlo_error)
    assert found["num_rows"] == dict.fromkeys(["a0", "a1", "b0", "b1"], 100)
    assert found["methods"] == {
        "method 1": {"0": "a0", "1": "a1"},
        "method 2": {"0": "b0", "1": "b1"},
    }
    assert found["settings"] == {
        "--latent-dim": {"a0": "2", "a1": "2", "b0": "3", "b1": "3"},
        "--learning-rate": {"a0": "0.002", "a1": "0.002", "b0": "0.03", "b1": "0.03"},
        "--seed": {"a0": "0", "a1": "1", "b0": "0", "b1": "1"},
    }
    assert found["runs"]["a1"] == str(folder / "a1" / "checkpoints" / "best.pt")
    (seeds,) = found["measures"]["elbo"]["over_seeds"]
    means = found["measures"]["elbo"]["means"]
    expected = (means["a0"] + means["a1"] - means["b0"] - means["b1"]) / 2
    assert seeds["estimate"] == pytest.approx(expected)
    assert len(found["measures"]["elbo"]["differences"]) == 6


def test_the_table_says_what_was_compared(folder, capsys):
    assert run(folder, "a0 a1 b0 b1") == 0
    out = capsys.readouterr().out
    first, *lines = out.splitlines()
    assert first == (
        "100 test rows of each run, 100 of them test rows of all; 30 samples of z per row; 95% "
        "intervals, simultaneous for all pairs of a measure"
    )
    cells = [line.split() for line in lines]
    assert ["--latent-dim", "2", "2", "3", "3"] in cells
    assert "method 1: a0, a1 (seeds 0, 1)" in lines
    (elbo,) = [line for line in lines if line.split()[:4] == ["ELBO", "a0", MINUS, "b0"]]
    assert elbo.endswith("b0 is higher")
    assert "100 rows" in elbo
    (ranking,) = [line for line in lines if line.split()[:2] == ["ELBO", "1."]]
    assert ranking.split()[2].startswith("b")
    assert "note: 2 seeds are few: intervals over so few are wide" in lines
    assert out.index("over seeds") < out.index("over rows")


def test_flags_change_the_numbers(folder, capsys):
    own = numbers(folder, capsys, "a0 b0")
    assert own == numbers(folder, capsys, "a0 b0", "--seed", 0)
    assert own != numbers(folder, capsys, "a0 b0", "--seed", 1)
    assert numbers(folder, capsys, "a0 b0", "--num-rows", 40)["num_rows"] == {"a0": 40, "b0": 40}
    other = numbers(folder, capsys, "a0 w0", "--data", folder / "other.npy", "--max-value", 15)
    assert (other["num_rows"], other["common"]) == ({"a0": 70, "w0": 70}, 70)
    assert run(folder, "a0 b0", "--device", "cuda:99") == 2
    assert own["num_samples"] == 30
    few = compare.main([str(folder / "a0"), str(folder / "b0"), "--num-samples", "4", "--json"])
    assert few == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 4


def test_runs_of_other_seeds_share_few_rows(folder, capsys):
    """Of 26 test rows each; their own data as --data keep their splits."""
    for flags in ((), ("--data", folder / "whole.npy")):
        assert run(folder, "w0 w1", *flags) == 2
        assert "of 26 in w0, 26 in w1, fewer are common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        ("a0", (), "expected two runs or more, each once; got"),
        ("a0 a0", (), "expected two runs or more, each once; got"),
        ("a0 none", (), "no .*none exists"),
        ("a0 v0", (), "the rows of v0 are not those of a0"),
        ("a0 grey", (), "grey has probabilities of values binarized"),
        ("a0 b0", ("--num-rows", "20"), "of 20 in a0, 20 in b0, fewer are common"),
        ("a0 b0", ("--out", "x.pdf"), "ending in .html"),
        ("a0 b0", ("--overwrite",), "give --out"),
        ("a0 b0/checkpoints/best.pt", ("--out", "x.html"), "--out shows run folders"),
        ("a0 b0", ("--max-value", "7"), "give --data"),
        ("a0 b0", ("--num-samples", "0"), "at least 1; got 0"),
        ("a0 b0", ("--seed", "-1"), "at least 0; got -1"),
        ("a0 b0", ("--num-rows", "0"), "at least 1; got 0"),
    ],
)
def test_mistakes_are_answered_in_one_line(folder, capsys, names, flags, message, tmp_path):
    assert run(folder, names, *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err)
    assert (err.count("\n"), out) == (1, "")
    assert not (tmp_path / "x.html").exists()


@pytest.fixture
def undrawn(monkeypatch):
    """The other pictures take most of the time, and are no part of what is tested."""
    figures = {"elbo": Figure()}
    monkeypatch.setattr("pyro_vae.plots.from_model.run_figures", lambda *_: figures)
    monkeypatch.setattr("pyro_vae.plots.from_model.reconstructions", lambda *_: Figure())


@pytest.mark.usefixtures("undrawn")
def test_the_page_holds_the_comparison(folder, capsys, tmp_path):
    out = tmp_path / "comparison.html"
    out.write_text("mine")
    assert run(folder, "a0 a1 b0 b1", "--out", out) == 2
    assert out.read_text() == "mine"
    capsys.readouterr()
    assert run(folder, "a0 a1 b0 b1", "--out", out, "--overwrite", "--json") == 0
    text, err = capsys.readouterr()
    found = json.loads(text)["measures"]["log_evidence"]["over_seeds"][0]
    assert err.splitlines()[-1] == str(out)
    page = out.read_text(encoding="utf-8")
    section = page[page.index('<section id="comparison"') : page.index('<section id="trust"')]
    assert '<a href="#comparison">' in page
    assert f"<td>a0 {MINUS} b0</td>" in section
    assert "b0 is higher" in section
    assert f"<td>method 1 {MINUS} method 2</td>" in section
    low, high = (f"{found[end]:.3f}".replace("-", MINUS) for end in ("low", "high"))
    assert f"[{low}, {high}]</td><td>2 seeds</td>" in section
    assert section.count("<svg") == 1  # that of the intervals


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_several_runs_compares_their_elbos(folder, tmp_path, capsys):
    line = [str(folder / name) for name in ("a0", "b0")]
    assert report.main([*line, "--out", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="comparison"') : page.index('<section id="trust"')]
    assert f"<td>a0 {MINUS} b0</td>" in section
    assert "one draw of z per row" in section
    assert '"row">log p(x)' not in section


def test_a_report_says_why_runs_are_not_compared(folder):
    opened = []
    for name in ("a0", "grey"):
        checkpoint = load_checkpoint(folder / name)
        opened.append((name, checkpoint, load_run_data(checkpoint, None, None).test))
    shown = words.quick_view(opened)
    assert shown.reason.startswith("expected models whose densities have the same unit")
    assert (shown.rows, shown.picture) == ((), None)


def test_runs_of_the_same_settings_and_seed_are_two_methods(folder, tmp_path):
    """A refitted guide also makes another method; a moved run does not."""
    checkpoints = {}
    for name in ("a0", "a1", "b0"):
        shutil.copytree(folder / name, tmp_path / name)
        checkpoints[name] = load_checkpoint(tmp_path / name)
    test = pyro_vae.load_data(str(folder / "own.npz"), max_value=15).test
    names = ["a0", "a1", "b0", "a0"]
    found = words.candidates((f"{k}", checkpoints[n], test) for k, n in enumerate(names))
    assert [c.method for c in found] == ["method 1", "method 1", "method 2", "method 3"]
    assert [c.seed for c in found] == [0, 1, 0, 0]
    trained = checkpoints["a0"]
    full = dataclasses.replace(trained.model, guide=FullGuide())
    refitted = dataclasses.replace(trained, model=full)
    moved = dataclasses.replace(
        trained.config.data, source="elsewhere.npz", root=tmp_path / "elsewhere"
    )
    config = dataclasses.replace(checkpoints["a1"].config, data=moved)
    other = dataclasses.replace(checkpoints["a1"], config=config)
    three = [("a", trained, test), ("b", refitted, test), ("c", other, test)]
    assert [c.method for c in words.candidates(three)] == ["method 1", "method 2", "method 1"]
    found = words.differing_settings({"a": trained, "b": refitted})
    assert found == {"--guide": {"a": "diagonal", "b": "full"}}
