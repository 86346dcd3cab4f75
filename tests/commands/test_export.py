"""`export`: a folder that other commands and other software use, and a card of true numbers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import mixed_tables
import numpy as np
import pytest
import torch
from conftest import example_spec

import pyro_vae
from pyro_vae import encode, evaluate, export, generate, report, train
from pyro_vae.data.splits import DataSpec
from pyro_vae.models import programs
from pyro_vae.page.card import describe_x
from pyro_vae.refit import main as refit_main
from pyro_vae.training.checkpoint import digest_of, load_checkpoint

MODEL = {"model.safetensors", "config.json", "README.md"}
PROGRAMS = {"encoder.pt2", "decoder.pt2", "log_likelihood.pt2"}


def made(folder: Path, *flags: str) -> Path:
    out = ["--out", str(folder / "run"), "--epochs", "1", "--latent-dim", "2", "--hidden", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda run: None)
        patch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)
        assert train.main([*out, *flags]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("export"), "--refit", "off")


@pytest.fixture(scope="module")
def out(small) -> Path:
    """The run, exported with programs."""
    assert export.main([str(small), "--out", str(small.parent / "out"), "--license", "MIT"]) == 0
    return small.parent / "out"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def quick(run: Path, out: Path, *flags: str) -> int:
    return export.main([str(run), "--out", str(out), "--weights-only", "--num-images", "5", *flags])


def refused(capsys, message: str, status: int) -> None:
    assert status == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_the_folder_holds_the_model_and_its_programs(small, out):
    assert names(out) == MODEL | PROGRAMS
    one, other = pyro_vae.load(small).state_dict(), pyro_vae.load(out).state_dict()
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    vae, splits = pyro_vae.load(small), pyro_vae.load_data("digits")
    x = next(splits.test.fixed("count", 0))
    loc, _ = torch.export.load(out / "encoder.pt2").module()(x)
    torch.testing.assert_close(loc, vae.posterior(x).mean.detach())


def test_commands_take_the_folder_for_a_run(small, out, tmp_path, capsys):
    for run in (small, out):
        name = str(tmp_path / f"{run.name}.npz")
        assert generate.main([str(run), "--num", "3", "--out", name]) == 0
        assert encode.main([str(run), "--out", str(tmp_path / f"{run.name}-codes.npz")]) == 0
    for ending in (".npz", "-codes.npz"):
        with (
            np.load(tmp_path / f"run{ending}") as one,
            np.load(tmp_path / f"out{ending}") as other,
        ):
            assert {*one} == {*other}
            assert all(np.array_equal(one[key], other[key]) for key in one)
    capsys.readouterr()
    values = []
    for run in (small, out):
        assert evaluate.main([str(run), "--num-samples", "5", "--json"]) == 0
        values.append(json.loads(capsys.readouterr().out))
    assert values[0] == values[1]


def test_a_training_or_refit_says_that_the_folder_is_no_run(out, tmp_path, capsys):
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    for main, arguments in (
        (train.main, ["--resume", str(out)]),
        (refit_main, [str(out)]),
        (refit_main, [str(out), "--out", str(tmp_path / "new")]),
    ):
        refused(capsys, "is an exported model, without the state of a training", main(arguments))
    refused(capsys, "has nothing to report", report.main([str(out)]))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "new").exists()


# --- the card -------------------------------------------------------------------------------------


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_numbers_of_the_card_are_those_of_evaluate(small, out, capsys):
    arguments = [str(small), "--num-samples", "100", "--json"]
    assert evaluate.main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    card = card_of(out)
    for label, key in {
        "ELBO": "elbo",
        "log p(x)": "log_evidence",
        "reconstruction": "reconstruction",
        "bits per dimension": "bits_per_dim",
        "active units": "active_units",
    }.items():
        (found,) = re.findall(rf"^\| {re.escape(label)} \| (\S+) \|", card, re.MULTILINE)
        assert float(found) == float(f"{values[key]:.4g}"), label
    assert "179 of 179 test rows of digits" in card
    assert "1,457 training, 161 validation, 179 test" in card


def test_the_card_names_licence_files_and_differences(out, capsys):
    head, body = card_of(out).split("---\n")[1:3]
    assert "license: mit\nlibrary_name: pyro-vae\n" in head
    assert "in this folder: MIT." in body
    assert "Licence: not stated" in body  # that of the data
    for path in out.iterdir():
        if path.name != "README.md":
            assert f"| `{path.name}` | {path.stat().st_size:,} |" in body
    assert "Not diagnosed" in body


def test_licences_are_never_invented(small, tmp_path):
    assert quick(small, tmp_path / "a") == 0
    assert "license:" not in card_of(tmp_path / "a")
    assert "Not stated. Without a licence" in card_of(tmp_path / "a")
    assert quick(small, tmp_path / "b", "--data-license", "public <b>domain") == 0
    assert r"Licence: public \<b\>domain" in card_of(tmp_path / "b")


def diagnosed(run: Path, **changes: Any) -> None:
    finding = {
        "check": "posterior width",
        "verdict": "wrong",
        "effect": "a | b",
        "estimate": 2.0,
        "low": 1.5,
        "high": 2.5,
        "ideal": 1.0,
        "meaning": "m",
        "advice": "a",
    }
    checkpoint = load_checkpoint(run)
    values = {
        "findings": [finding],
        "details": {"log_evidence": -5.0},
        "step": checkpoint.history[-1]["step"],
        "fingerprint": checkpoint.fingerprint,
        "digest": digest_of(checkpoint.path),
        "effort": {"quick": False},
        "held_out": 12,
        "data": "digits",
        "complete": True,
        **changes,
    }
    (run / "diagnostics.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes", [{}, {"digest": "0" * 32}, {"fingerprint": "other"}, {"findings": 3}]
)
def test_only_verdicts_on_this_model_are_told(changes, small, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(small, run)
    diagnosed(run, **changes)
    for place in (run, run / "checkpoints" / "best.pt"):
        assert quick(place, tmp_path / "out", "--overwrite", "--json") == 0
        values = json.loads(capsys.readouterr().out)
        card = card_of(tmp_path / "out")
        told = r"| posterior width | wrong | 2.00 [1.50, 2.50] | 1 | a \| b |" in card
        assert told is ("Not diagnosed" not in card) is (not changes)
        assert values["verdicts"] == (None if changes else {"posterior width": "wrong"})


@pytest.mark.parametrize(
    ("spec", "units"),
    [
        (example_spec("bernoulli"), "binary"),
        (example_spec("discretized-logistic"), "binary"),
        (example_spec("continuous-bernoulli"), "unit"),
        (example_spec("discretized-logistic"), "unit"),
        (example_spec("binomial"), "count"),
        (example_spec("gaussian"), "real"),
        (example_spec("discretized-logistic"), "real"),
        (DataSpec((2,), None, False, offset=(1e9, 0.0), scale=(1.0, 10.0)), "real"),
        (mixed_tables.spec_of(missing=True), "real"),
    ],
)
def test_x_is_described_as_it_is_computed(spec, units):
    """The words for the units, against `DataSpec.to_units` of a value."""
    text, stored = describe_x(spec, units), torch.full(spec.shape, 1.0).unsqueeze(0)
    x = spec.to_units(stored, units).flatten()
    assert f"(B, {', '.join(map(str, spec.shape))}), float32" in text
    assert ("NaN marks" in text) is spec.missing
    if "drawn with probability" in text:
        assert spec.binarizes(units)
        assert f"value / {spec.max_value} of 1" in text
    elif "value / " in text:
        bound = int(re.findall(r"value / (\d+)", text)[0])
        assert torch.equal(x, torch.full_like(x, 1 / bound))
    elif "(value - offset) / scale" in text:
        assert spec.offset is not None
    else:
        assert torch.equal(x, torch.ones_like(x))
        assert "value itself" in text or "0 or 1" in text


# --- what is written, and what is not -------------------------------------------------------------


def test_overwrite_replaces_an_export_and_nothing_else(small, out, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "notes.txt").write_text("mine")
    (copy / "encoder.onnx").write_text("of an earlier model")
    capsys.readouterr()
    refused(capsys, "exists and is not empty", quick(small, copy))
    assert quick(small, copy, "--overwrite") == 0
    assert names(copy) == MODEL | {"notes.txt"}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("years of work")
    capsys.readouterr()
    status = quick(small, tmp_path / "thesis", "--overwrite")
    refused(capsys, "replaces exported models only", status)
    refused(capsys, "replaces exported models only", quick(small, small, "--overwrite"))
    refused(capsys, "is a file", quick(small, tmp_path / "thesis" / "a.txt"))
    assert names(tmp_path / "thesis") == {"a.txt"}


def test_a_program_that_differs_stops_the_export(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "TOLERANCE", -1.0)
    status = export.main([str(small), "--out", str(tmp_path / "out")])
    refused(capsys, r"encoder\.pt2 would differ from the model by", status)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--license", "my own"], "--license expects an SPDX identifier"),
        (["--license", "mit\nx: y"], "--license expects an SPDX identifier"),
        (["--onnx"], "--onnx has no effect on --weights-only"),
        (["--num-images", "999"], "--num-images expects at most 179"),
        (["--num-samples", "0"], "--num-samples expects an integer"),
        (["--data", "nowhere.npy"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(flags, message, small, tmp_path, capsys):
    arguments = [str(small), "--out", str(tmp_path / "out"), "--weights-only"]
    refused(capsys, message, export.main([*arguments, *flags]))
    assert not (tmp_path / "out").exists()


def test_other_data_are_refused(small, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((20, 8, 8), np.uint8))
    status = quick(small, tmp_path / "out", "--data", str(tmp_path / "x.npy"))
    refused(capsys, "--data expects the data of the run", status)
    assert quick(tmp_path / "none", tmp_path / "out") == 2


def test_without_the_extra_the_line_says_how_to_install_it(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status = export.main([str(small), "--out", str(tmp_path / "out"), "--onnx"])
    refused(capsys, r"pip install 'pyro-vae\[onnx\]'", status)


def test_data_that_have_moved(tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.save(tmp_path / "here.npy", values)
    run = made(tmp_path, "--data", str(tmp_path / "here.npy"), "--refit", "off")
    (tmp_path / "here.npy").rename(tmp_path / "there.npy")
    capsys.readouterr()
    assert quick(run, tmp_path / "out") == 2
    assert quick(run, tmp_path / "out", "--data", str(tmp_path / "there.npy")) == 0
    for name in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


@pytest.mark.slow
def test_onnx_of_a_default_run_by_another_runtime(run, tmp_path, capsys):
    """The shared run: the trained encoder, and the refitted one, which has no program."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install '.[onnx]'")
    best, out = run / "checkpoints" / "best.pt", tmp_path / "out"
    assert export.main([str(best), "--out", str(out), "--onnx", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    files = {
        f"{name}.{end}"
        for name in ("encoder", "decoder", "log_likelihood")
        for end in ("pt2", "onnx")
    }
    assert set(values["differences"]) == files
    assert max(values["differences"].values()) < 1e-5
    assert names(out) == MODEL | files
    session = onnxruntime.InferenceSession(out / "encoder.onnx")
    x = next(pyro_vae.load_data("digits").test.fixed("count", 0)).numpy()
    loc, scale = session.run(["loc", "scale"], {"x": x})
    q = pyro_vae.load(best).posterior(torch.from_numpy(x))
    np.testing.assert_allclose(loc, q.mean.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale, q.stddev.detach(), rtol=1e-4, atol=1e-5)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert refit_main([str(copy)]) == 0
    capsys.readouterr()
    assert export.main([str(copy), "--out", str(out), "--overwrite", "--num-images", "20"]) == 0
    assert "no encoder program: the guide is refined" in capsys.readouterr().out
    assert names(out) == MODEL | {"decoder.pt2", "log_likelihood.pt2"}
    assert "There is no encoder program" in card_of(out)
    x = torch.from_numpy(x[:9])
    same = (pyro_vae.load(path).posterior(x).mean for path in (copy, out))
    assert torch.equal(*same)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--condition", "label"], "Labels y, with their shares: 0: 0 (0.0"),
        (["--labelled", "100"], "accuracy of q(y"),
        (["--model", "ae"], "An autoencoder has no posterior"),
        (["--prior", "vamp", "components=5"], "pseudo-inputs of the prior started as training"),
        (["--likelihood", "bernoulli"], "drawn with probability value / 16 of 1"),
    ],
)
def test_cards_of_other_models(flags, told, tmp_path):
    run = made(tmp_path, *flags)
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--num-samples", "5"]) == 0
    assert told in card_of(tmp_path / "out")
