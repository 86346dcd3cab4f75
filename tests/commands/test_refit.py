"""The command `refit`, and the refit at the end of `train`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import pyro_vae
from pyro_vae import evaluate, train
from pyro_vae.config import FitConfig
from pyro_vae.config.families import FullGuide, RefitConfig
from pyro_vae.page import write
from pyro_vae.plots import from_model
from pyro_vae.refit import main
from pyro_vae.training import refitting
from pyro_vae.training.checkpoint import load_checkpoint

TRAINED = ["--epochs", "2", "--hidden", "16", "--latent-dim", "3"]


@pytest.fixture(autouse=True)
def _cheap(request, monkeypatch):
    """Few simulated pairs; no figures, but in one test."""
    monkeypatch.setattr(refitting, "TAIL_PAIRS", 100)
    monkeypatch.setattr(refitting, "SCORED", 100)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(write, "redraw", lambda run, *_: run / "report.html")
        monkeypatch.setattr(from_model, "draw_reconstructions", lambda *_: None)


@pytest.fixture
def drawn() -> None:
    """The figures of a test are drawn."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refit") / "run"
    assert train.main([*TRAINED, "--refit", "off", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_refit_becomes_the_model_of_the_run(run, capsys):
    files = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    assert main([str(run)]) == 0
    output = capsys.readouterr().out
    final, best = load_checkpoint(run), load_checkpoint(run, "best")
    assert final.path.name == "refitted.pt"
    assert final.model.guide.family == "refined"
    assert best.model.guide.family == final.config.model.guide.family == "diagonal"
    assert final.refit == lines(run / "refit.jsonl")
    assert final.refit[-1]["validation_elbo"] > best.history[-1]["validation_elbo"]
    before = refitting.validation_elbo(best.vae, pyro_vae.load_data("digits"), 0)
    after = final.refit[-1]["validation_elbo"]
    assert f"validation ELBO {before:.2f} → {after:.2f} nats per row" in output
    assert f"next   python -m pyro_vae.diagnose {run}" in output
    for name, content in files.items():
        assert (run / "checkpoints" / name).read_bytes() == content
    for name, value in best.vae.decoder.state_dict().items():
        assert torch.equal(final.vae.decoder.state_dict()[name], value)
    # The other commands use it; the records of another refit are the same.
    assert evaluate.main([str(run), "--num-samples", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["elbo"] > best.history[-1]["validation_elbo"]
    first = [{**line, "seconds": 0} for line in final.refit]
    assert main([str(run)]) == 0
    assert [{**line, "seconds": 0} for line in load_checkpoint(run).refit] == first


@pytest.mark.filterwarnings("default:the ELBO fell")
@pytest.mark.slow
def test_another_guide_in_another_folder(run, tmp_path, capsys, drawn):
    out = tmp_path / "other"
    flags = ["--guide", "full", "--steps", "3", "--batch-size", "8", "--encoder-hidden", "5"]
    assert main([str(run), "--out", str(out), *flags]) == 0
    assert not (run / "checkpoints" / "refitted.pt").exists()
    checkpoint = load_checkpoint(out)
    assert checkpoint.model.guide == FullGuide()
    assert checkpoint.model.encoder_hidden == (5,)
    assert len(checkpoint.refit) == 3
    assert (out / "config.json").read_bytes() == (run / "config.json").read_bytes()
    assert (out / "report.html").is_file()
    assert main([str(run), "--out", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([str(run), "--out", str(out), "--overwrite"]) == 0
    assert load_checkpoint(out).model.guide.family == "refined"


@pytest.mark.filterwarnings("default:the ELBO fell")
def test_a_refit_that_lowers_the_elbo_says_so(run, capsys):
    flags = ["--guide", "full", "--steps", "1", "--batch-size", "2", "--encoder-hidden", "5"]
    assert main([str(run), *flags]) == 0
    assert "note: the ELBO fell" in capsys.readouterr().err
    assert load_checkpoint(run).path.name == "refitted.pt"


def test_training_on_replaces_the_refit(run, capsys):
    assert main([str(run)]) == 0
    assert train.main(["--resume", str(run)]) == 0
    assert load_checkpoint(run).path.name == "refitted.pt", "a complete run keeps it"
    assert train.main(["--resume", str(run), "--epochs", "3"]) == 0
    assert load_checkpoint(run).path.name == "best.pt"
    assert load_checkpoint(run).history[-1]["epoch"] == 3


def test_training_ends_with_a_refit_on_request(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train.main([*TRAINED, "--out", str(out), "--refit", "on"]) == 0
    assert load_checkpoint(out).path.name == "refitted.pt"
    output = capsys.readouterr().out
    assert output.index("done") < output.index("refit  guide refined") < output.index("see ")
    monkeypatch.setattr(refitting, "TAIL_PAIRS", 2000)
    assert train.main([*TRAINED, "--out", str(out), "--overwrite"]) == 0
    assert load_checkpoint(out).path.name == "best.pt", "too short a training for auto"
    assert not (out / "refit.jsonl").exists()


@pytest.mark.parametrize(("better", "file"), [(True, "refitted.pt"), (False, "best.pt")])
def test_auto_keeps_a_refit_that_raises_the_elbo(better, file, tmp_path, capsys, monkeypatch):
    def worse(vae, *_, on_record=None, **__):
        with torch.no_grad():
            copy = refitting.new_guide(vae, FullGuide(), None)
            copy.encoder.layers[-1].bias.fill_(3.0)
        record = refitting.RefitRecord(1, 0.0, -1e4, 0.0, 0.0)
        _[4](record)
        return copy

    monkeypatch.setattr(refitting, "is_cheaper", lambda *_: True)
    if not better:
        monkeypatch.setattr(refitting, "refit", worse)
    out = tmp_path / "run"
    assert train.main([*TRAINED, "--out", str(out)]) == 0
    assert load_checkpoint(out).path.name == file
    assert ("the trained guide stays" in capsys.readouterr().out) is not better


def test_auto_compares_the_passes_of_the_networks(monkeypatch):
    """After 417 epochs of the digits, but not after 60; particles count."""
    monkeypatch.setattr(refitting, "TAIL_PAIRS", 2000)
    for epochs, particles, expected in ((417, 1, True), (60, 1, False), (60, 8, True)):
        fit = FitConfig(epochs=epochs, num_particles=particles)
        assert refitting.is_cheaper(RefitConfig(), fit, 1457, 20) is expected
    assert not refitting.is_cheaper(RefitConfig(), FitConfig(epochs=417), 1457, 200)
    full = RefitConfig("full")
    assert refitting.is_cheaper(full, FitConfig(epochs=417), 1457, 200)
    assert not refitting.is_cheaper(full, FitConfig(epochs=60), 1457, 200)


def test_mistakes_are_one_line(run, tmp_path, capsys):
    autoencoder = tmp_path / "ae"
    flags = ["--epochs", "1", "--hidden", "4", "--model", "ae", "--out", str(autoencoder)]
    assert train.main(flags) == 0
    capsys.readouterr()
    for arguments, message in [
        ([autoencoder], "is an autoencoder, which has no guide to refit"),
        ([tmp_path / "nowhere"], "expected a run folder; got"),
        ([run / "checkpoints" / "best.pt"], "expected a run folder; got"),
        ([run, "--guide", "fll"], "--guide expects one of diagonal, full, flow, mixture, refined"),
        ([run, "--steps", "9"], "--steps has no effect on --guide refined"),
        ([run, "--guide", "full", "--simulated", "2"], "--simulated expects 0 to 1; got 2.0"),
        ([run, "--overwrite"], "--overwrite replaces the run in --out; give --out"),
        ([run, "--out", run], "lies in the data folder"),
        ([run, "--seed", "-1"], "--seed expects an integer of at least 0"),
        ([], "Missing"),
    ]:
        assert main(list(map(str, arguments))) == 2, arguments
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert train.main([*TRAINED, "--refit", "maybe"]) == 2
    assert train.main(["--model", "ae", "--refit", "on"]) == 2
    assert "--refit has no effect on --model ae" in capsys.readouterr().err


def test_a_refit_waits_for_no_lock_and_leaves_nothing_behind(run, capsys):
    """The folder is in use: one line, and no file is changed."""
    from pyro_vae.training.run import claimed

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with claimed(run):
        assert main([str(run)]) == 2
    assert "in use" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}
    assert not (run / "checkpoints" / "refitted.pt").exists()


def test_load_gives_the_refitted_model(run):
    assert main([str(run)]) == 0
    vae = pyro_vae.load(run)
    x = next(pyro_vae.load_data("digits").test.fixed("count", 0))[:5]
    again = load_checkpoint(run).vae.posterior(x)
    assert torch.equal(vae.posterior(x).mean, again.mean)
    assert torch.equal(vae.posterior(x).variance, again.variance)
