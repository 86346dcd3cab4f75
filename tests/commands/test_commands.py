"""Each command end to end, in the process where that is enough, as a process where it is not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import wait_for_epoch

import pyro_vae
from pyro_vae import encode, evaluate, generate, train
from pyro_vae.__main__ import COMMANDS
from pyro_vae.capture import captured as capture
from pyro_vae.cli import run_command
from pyro_vae.evidence import evaluation
from pyro_vae.runtime.randomness import derive
from pyro_vae.training.checkpoint import load_checkpoint

KEYS = {
    "epoch",
    "step",
    "seconds",
    "train_elbo",
    "validation_elbo",
    "reconstruction",
    "kl",
    "learning_rate",
    "images_per_second",
}
PICTURES = {
    "reconstructions_first_epoch",
    "reconstructions_last_epoch",
    "samples",
    "elbo",
    "latent",
    "interpolations",
}
QUICK = ["--epochs", "6", "--latent-dim", "2", "--hidden", "16"]


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without the timings."""
    text = (run / "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    for line in parsed:
        del line["seconds"], line["images_per_second"]
    return parsed


def same_weights(first: Path, second: Path, name: str) -> bool:
    a, b = (torch.load(p / "checkpoints" / name, weights_only=True) for p in (first, second))
    return all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "_summarize", lambda run: None)
    patch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of so short a run. For tests of other things."""
    _draw_nothing(monkeypatch)


def test_a_run_is_complete(run, capsys):
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "figures",
        "report.html",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.pt", "last.pt"}
    assert {p.stem for p in (run / "figures").glob("*.png")} == PICTURES | {"manifold"}
    for path in (run / "figures").glob("*.png"):
        picture = matplotlib.image.imread(path)
        assert picture.std() > 0.02, f"{path} is blank"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first) >= KEYS
    for line in lines(run):
        assert line["kl"] >= 0
        assert line["train_elbo"] == pytest.approx(line["reconstruction"] - line["kl"])
        assert line["validation_elbo"] == pytest.approx(
            line["validation_reconstruction"] - line["validation_kl"]
        )
    assert isinstance(pyro_vae.load(run), pyro_vae.VAE)
    best = max(lines(run), key=lambda line: line["validation_elbo"])
    assert load_checkpoint(run).history[-1]["epoch"] == best["epoch"]
    assert len(load_checkpoint(run, "last").history) == 12


def test_train_says_where_everything_is(tmp_path, capsys):
    assert train.main(["--out", str(tmp_path / "run"), *QUICK]) == 0
    out = capsys.readouterr().out
    for part in ("digits: 1,457 training, 161 validation, 179 test", "likelihood binomial"):
        assert part in out
    for part in ("figures", "metrics.jsonl", "python -m pyro_vae.evaluate", "best epoch"):
        assert part in out


@pytest.mark.usefixtures("no_pictures")
def test_default_folder_is_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main(["--epochs", "1", "--hidden", "8", "--latent-dim", "2"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["digits", "digits-2"]


@pytest.mark.usefixtures("no_pictures")
def test_same_seed_same_metrics(tmp_path):
    for name, seed in [("a", "3"), ("b", "3"), ("c", "4")]:
        assert train.main(["--out", str(tmp_path / name), "--seed", seed, *QUICK]) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


@pytest.mark.usefixtures("no_pictures")
def test_config_is_read_back_and_flags_beside_it_win(run, tmp_path):
    config = str(run / "config.json")
    assert train.main(["--config", config, "--out", str(tmp_path / "same")]) == 0
    assert lines(tmp_path / "same") == lines(run)
    arguments = ["--config", config, "--epochs", "2", "--out", str(tmp_path / "short")]
    assert train.main(arguments) == 0
    assert len(lines(tmp_path / "short")) == 2
    assert load_checkpoint(tmp_path / "short").config.model.latent_dim == 2


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian"])
def test_other_likelihoods_and_conv(likelihood, tmp_path, capsys):
    path = tmp_path / "images.npy"
    values = np.random.default_rng(0).random((60, 9, 11, 3)).astype(np.float32)
    np.save(path, values)
    run = tmp_path / "run"
    arguments = ["--data", str(path), "--out", str(run), "--likelihood", likelihood]
    arguments += ["--architecture", "conv", "--hidden", "4", "--epochs", "2", "--batch-size", "16"]
    assert train.main(arguments) == 0
    capsys.readouterr()
    assert evaluate.main([str(run), "--num-samples", "20", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["likelihood"] == likelihood
    assert (results["bits_per_dim"] is None) == (likelihood != "bernoulli")
    binarized = likelihood == "bernoulli"
    assert results["binarization"] == ("fixed, seed 0" if binarized else "none")


def test_table_with_labels(tmp_path):
    path = tmp_path / "table.csv"
    random = np.random.default_rng(0)
    rows = [
        f"{a:.3f},{1000 * b:.1f},{'xy'[int(a > 0)]}" for a, b in random.standard_normal((80, 2))
    ]
    path.write_text("\n".join(["a,b,label", *rows]))
    run = tmp_path / "run"
    arguments = ["--data", str(path), "--out", str(run), "--batch-size", "32", *QUICK]
    assert train.main(arguments) == 0
    assert {p.stem for p in (run / "figures").glob("*.png")} == PICTURES | {"manifold"}
    out = tmp_path / "codes.npz"
    assert encode.main([str(run), "--out", str(out)]) == 0
    with np.load(out) as codes:
        assert codes["mean"].shape == codes["standard_deviation"].shape == (80, 2)
        labels = [codes["class_names"][i] for i in codes["labels"]]
        assert labels == [row[-1] for row in rows]
        assert sorted(set(codes["split"])) == ["test", "train", "validation"]


def test_evaluate(run, capsys):
    assert evaluate.main([str(run), "--num-samples", "50", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["elbo"] == pytest.approx(results["reconstruction"] - results["kl"])
    assert results["log_evidence"] > results["elbo"]
    assert results["bits_per_dim"] == pytest.approx(-results["log_evidence"] / 64 / np.log(2))
    assert (results["num_images"], results["num_samples"], results["split"]) == (179, 50, "test")
    assert results["likelihood"] == "binomial"
    assert 0 <= results["active_units"] <= 2
    assert results["standard_error"] > results["monte_carlo_error"] > 0
    # the same numbers from the Python interface, image by image
    vae, splits = pyro_vae.load(run), pyro_vae.load_data("digits")
    x = next(splits.test.fixed("count", 0))
    torch.manual_seed(derive(0, "posterior"))
    evidence = pyro_vae.importance_sample(vae, x, num_samples=50)
    values = evidence.log_evidence
    assert values.mean().item() == pytest.approx(results["log_evidence"], rel=1e-9)
    monte_carlo = evidence.standard_error.square().sum().sqrt().item() / len(values)
    assert monte_carlo == pytest.approx(results["monte_carlo_error"], rel=1e-9)
    error = (values.std() / len(values) ** 0.5).item()
    assert error == pytest.approx(results["standard_error"], rel=1e-9)
    assert evaluate.main([str(run), "--num-samples", "50", "--num-images", "7"]) == 0
    out = capsys.readouterr().out
    assert "7 test rows of digits; likelihood binomial; nats per row" in out
    assert "50 importance samples" in out


@pytest.mark.usefixtures("no_pictures")
def test_evaluate_finds_relative_data_from_another_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    np.save("a.npy", np.random.default_rng(0).random((40, 5)))
    assert train.main(["--data", "a.npy", "--batch-size", "8", "--out", "run", *QUICK]) == 0
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["here/run", "--num-samples", "5"]) == 0
    # the data change behind the run's back
    np.save("here/a.npy", np.random.default_rng(1).random((40, 5)))
    capsys.readouterr()
    assert evaluate.main(["here/run", "--num-samples", "5"]) == 2
    assert "are not the data that" in capsys.readouterr().err
    assert evaluate.main(["here/run", "--num-samples", "5", "--data", "here/a.npy"]) == 0


@pytest.mark.usefixtures("no_pictures")
def test_other_data_are_read_on_the_terms_of_the_training(tmp_path):
    """A model of real values meets bytes: they are not images of 8 bits to it."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "real.npy", random.normal(100, 30, (60, 4)))
    other = random.integers(0, 200, (30, 4), dtype=np.uint8)
    np.save(tmp_path / "bytes.npy", other)
    arguments = ["--data", str(tmp_path / "real.npy"), "--batch-size", "16", *QUICK]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out, data = str(tmp_path / "codes.npz"), str(tmp_path / "bytes.npy")
    assert encode.main([str(tmp_path / "run"), "--data", data, "--out", out]) == 0
    posterior = pyro_vae.load(tmp_path / "run").posterior(torch.from_numpy(other).float())
    with np.load(out) as codes:
        np.testing.assert_allclose(codes["mean"], posterior.mean.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_pictures")
def test_generated_data_are_on_the_scale_of_the_training_data(tmp_path):
    """Draws of a Bernoulli on the digits are 0 or 16, and encoding them recovers their latents."""
    run = tmp_path / "run"
    arguments = ["--likelihood", "bernoulli", "--latent-dim", "2", "--hidden", "64"]
    assert train.main([*arguments, "--epochs", "30", "--out", str(run)]) == 0
    out = str(tmp_path / "draws.npz")
    assert generate.main([str(run), "--num", "300", "--draw", "--out", out]) == 0
    with np.load(out) as archive:
        x, z = archive["x"], archive["z"]
    assert set(np.unique(x)) == {0, 16}
    np.save(tmp_path / "draws.npy", x)
    out = str(tmp_path / "codes.npz")
    assert encode.main([str(run), "--data", str(tmp_path / "draws.npy"), "--out", out]) == 0
    with np.load(out) as codes:
        assert "split" not in codes
        posterior = pyro_vae.load(run).posterior(torch.from_numpy(x) / 16)
        np.testing.assert_allclose(codes["mean"], posterior.mean.detach(), rtol=1e-4, atol=1e-5)
        assert np.corrcoef(codes["mean"].T, z.T)[:2, 2:].max() > 0.7


def test_one_row_can_be_encoded_and_evaluated(run, tmp_path, capsys):
    np.save(tmp_path / "one.npy", pyro_vae.load_data("digits").train.values[:1].numpy())
    data = ["--data", str(tmp_path / "one.npy")]
    assert encode.main([str(run), *data, "--out", str(tmp_path / "codes.npz")]) == 0
    with np.load(tmp_path / "codes.npz") as codes:
        assert codes["mean"].shape == (1, 2)
    capsys.readouterr()
    assert evaluate.main([str(run), *data, "--num-samples", "5", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["num_images"] == 1
    assert results["standard_error"] is results["active_units"] is None
    refused(evaluate.main, [str(run), *data, "--split", "train"], "is empty", capsys)
    # the run's own data by name keep their splits
    assert evaluate.main([str(run), "--data", "digits", "--num-samples", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 179


def test_active_units_are_told_by_the_variance(run):
    """A latent whose means have the sd 0.05, variance 0.0025, is not active."""
    vae, splits = pyro_vae.load(run), pyro_vae.load_data("digits")
    assert evaluation.evaluate(vae, splits.test, 2).active_units == 2
    x = next(splits.test.fixed("count", 0))
    head = vae.encoder.layers[-1]
    with torch.no_grad():
        factor = 0.05 / vae.posterior(x).mean[:, 0].std()
        head.weight[0] *= factor
        head.bias[0] *= factor
    assert evaluation.evaluate(vae, splits.test, 2).active_units == 1


def test_generate(run, tmp_path):
    for name in ("a.png", "a.npy", "a.npz"):
        assert generate.main([str(run), "--num", "10", "--out", str(tmp_path / name)]) == 0
    means = np.load(tmp_path / "a.npy")
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["x"], means)
        z = torch.from_numpy(archive["z"])
    decoded = pyro_vae.load(run).likelihood(z).mean.detach().numpy()
    np.testing.assert_allclose(means, decoded, rtol=1e-5)
    arguments = [str(run), "--draw", "--num", "10", "--out", str(tmp_path / "b.npy")]
    assert generate.main(arguments) == 0
    draws = np.load(tmp_path / "b.npy")
    assert np.array_equal(draws, np.rint(draws))
    assert draws.shape == (10, 1, 8, 8)
    for seed, same in [("0", True), ("1", False)]:
        again = tmp_path / f"seed{seed}.npy"
        arguments = [str(run), "--num", "10", "--seed", seed, "--out", str(again)]
        assert generate.main(arguments) == 0
        assert np.array_equal(np.load(again), means) == same
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.02


def test_encode(run, tmp_path):
    out = tmp_path / "codes.npz"
    assert encode.main([str(run), "--out", str(out)]) == 0
    splits = pyro_vae.load_data("digits")
    with np.load(out) as codes:
        posterior = pyro_vae.load(run).posterior(splits.whole().take(torch.arange(1797), "count"))
        np.testing.assert_allclose(codes["mean"], posterior.mean.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            codes["standard_deviation"], posterior.stddev.detach(), rtol=1e-4
        )
        assert np.array_equal(codes["labels"], splits.whole().labels)
        assert (codes["split"] == "test").sum() == 179
        assert (codes["split"][splits.test.rows] == "test").all()


def test_autoencoder(tmp_path, capsys):
    run = tmp_path / "ae"
    assert train.main(["--model", "ae", "--out", str(run), *QUICK]) == 0
    assert all(line["kl"] is line["train_elbo"] is None for line in lines(run))
    assert {p.stem for p in (run / "figures").glob("*.png")} == PICTURES - {"samples"}
    capsys.readouterr()
    assert evaluate.main([str(run), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["elbo"] is results["log_evidence"] is results["kl"] is None
    assert results["reconstruction"] < 0
    assert encode.main([str(run), "--out", str(tmp_path / "codes.npz")]) == 0
    with np.load(tmp_path / "codes.npz") as codes:
        assert (codes["standard_deviation"] == 0).all()
    assert generate.main([str(run), "--out", str(tmp_path / "a.png")]) == 2
    assert "has no prior to draw from" in capsys.readouterr().err


LONGER = ["--epochs", "60", "--latent-dim", "2", "--hidden", "16", "--batch-size", "64"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        _draw_nothing(patch)
        assert train.main(["--out", str(run), *LONGER]) == 0
    return run


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_resumes_to_the_same_numbers(number, whole, tmp_path):
    part = tmp_path / "part"
    process = start("pyro_vae.train", "--out", str(part), *LONGER)
    wait_for_epoch(part, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number, (out, err)
        assert f"continue with: python -m pyro_vae.train --resume {part}" in out
        assert err == ""
    assert len(lines(part)) < 60, "the run was over before it could be stopped"
    assert train.main(["--resume", str(part)]) == 0
    assert lines(part) == lines(whole)
    for name in ("best.pt", "last.pt"):
        assert same_weights(part, whole, name)


@pytest.mark.slow
def test_resume_of_a_complete_run_and_beyond(tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(["--out", str(run), *QUICK]) == 0
    capsys.readouterr()
    before = lines(run)
    for picture in (run / "figures").iterdir():
        picture.unlink()  # as if the run had been stopped while they were drawn
    assert train.main(["--resume", str(run)]) == 0
    assert "complete with 6 epochs" in capsys.readouterr().out
    assert {p.stem for p in (run / "figures").iterdir()} >= PICTURES - {
        "reconstructions_first_epoch"
    }
    assert lines(run) == before
    assert train.main(["--resume", str(run), "--epochs", "3"]) == 2
    assert train.main(["--resume", str(run / "checkpoints" / "last.pt"), "--epochs", "8"]) == 2
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--latent-dim", "5", "--epochs", "8"]) == 2
    assert "own settings" in capsys.readouterr().err
    assert train.main(["--resume", str(run), "--out", str(run)]) == 2
    assert train.main(["--resume", str(run), "--epochs", "8"]) == 0
    assert [line["epoch"] for line in lines(run)] == list(range(1, 9))
    assert json.loads((run / "config.json").read_text())["fit"]["epochs"] == 8


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    run = tmp_path / "run"
    assert train.main(["--out", str(run), *QUICK]) == 0
    earlier = {p: p.read_bytes() for p in (run / "checkpoints").iterdir()}
    limit = min(map(len, earlier.values())) // 2

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ["pyro_vae.train", "--resume", str(run), "--epochs", "9"]
    process = start(*arguments, preexec_fn=no_large_files)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in (run / "checkpoints").iterdir()} == earlier
    assert train.main(["--resume", str(run), "--epochs", "9"]) == 0


@pytest.mark.usefixtures("no_pictures")
def test_early_stopping_leaves_the_last_epoch(tmp_path):
    run = tmp_path / "run"
    arguments = ["--out", str(run), "--patience", "3", "--learning-rate", "0.05", "--epochs", "300"]
    assert train.main([*arguments, "--hidden", "64", "--latent-dim", "2"]) == 0
    history = load_checkpoint(run, "last").history
    assert len(history) < 300
    assert history[-1]["epoch"] == lines(run)[-1]["epoch"]
    assert load_checkpoint(run).history[-1]["epoch"] == len(history) - 3


@pytest.mark.usefixtures("no_pictures")
def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--out", str(run), "--epochs", "1", "--hidden", "8", "--latent-dim", "2"]
    assert train.main(arguments) == 0
    (run / "notes.txt").write_text("mine")
    assert train.main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert train.main([*arguments, "--overwrite"]) == 0
    assert (run / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert train.main(["--out", str(foreign), "--epochs", "1", "--overwrite"]) == 2
    assert "replaces runs only" in capsys.readouterr().err
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]
    (foreign / "config.json").write_text('{"model_type": "another program"}')
    assert train.main(["--out", str(foreign), "--epochs", "1", "--overwrite"]) == 2
    assert (foreign / "thesis.txt").exists()


@pytest.mark.parametrize(
    "mistake",
    [["--activation", "GLU"], ["--activation", "Softmax"], ["--tensorboard"], ["--seed", "-1"]],
)
def test_a_mistake_beside_overwrite_leaves_the_old_run(mistake, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    try:
        status = train.main(["--out", str(copy), "--overwrite", *mistake])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_diverged_run_keeps_the_last_good_state(tmp_path, capsys):
    run = tmp_path / "run"
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((64, 5)))
    arguments = ["--data", str(tmp_path / "a.npy"), "--out", str(run), "--learning-rate", "1e4"]
    arguments += ["--gradient-clip", "inf", "--learning-rate-warmup", "0.9", "--batch-size", "8"]
    assert train.main(arguments) == 1
    err = capsys.readouterr().err
    assert "not finite in epoch" in err
    assert "keeps the last good state" in err
    weights = load_checkpoint(run, "last").vae.state_dict()
    assert all(value.isfinite().all() for value in weights.values())


def test_a_run_that_diverges_keeps_its_best_model(tmp_path, capsys, monkeypatch):
    """Though it was not yet due to be written."""
    run = tmp_path / "run"
    from pyro_vae.training import loop as svi

    original = svi._epoch

    def epoch(run, position, sums, on_step):
        if position.epoch == 5:
            raise svi.diverged("loss", run.config, position)
        return original(run, position, sums, on_step)

    monkeypatch.setattr(svi, "_epoch", epoch)
    assert train.main(["--out", str(run), *QUICK]) == 1
    assert load_checkpoint(run).history[-1]["epoch"] == 5


@pytest.mark.parametrize(
    "values",
    [
        np.tile(np.arange(5.0) / 7, (60, 1)),
        1.7e9 + 1e4 * np.random.default_rng(0).standard_normal((60, 2)),
        np.zeros((60, 3)),
        np.random.default_rng(0).random((60, 1)),
    ],
    ids=["all rows the same", "timestamps", "zeros", "one column"],
)
def test_odd_tables_train(values, tmp_path):
    np.save(tmp_path / "a.npy", values)
    arguments = ["--data", str(tmp_path / "a.npy"), "--out", str(tmp_path / "run")]
    arguments += ["--epochs", "2", "--hidden", "8", "--latent-dim", "4", "--batch-size", "16"]
    assert train.main(arguments) == 0


@pytest.mark.filterwarnings("always:row 21 of a")
def test_values_whose_squares_are_too_large(tmp_path, capsys):
    """In some rows only: data that are all large are scaled."""
    values = np.random.default_rng(0).standard_normal((60, 2))
    values[::7] *= 1e30
    np.save(tmp_path / "a.npy", values)
    arguments = ["--data", str(tmp_path / "a.npy"), "--out", str(tmp_path / "run")]
    assert train.main([*arguments, "--batch-size", "8", *QUICK]) == 1
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("note: row 21 of a (counted from 0) holds 1.34588e+30 in column 0")
    assert "or the data hold extreme values" in error


def test_names_with_mathematics_in_them(tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    for label in ("$^$", "_hidden"):
        folder = tmp_path / "dollar$x_{$" / label
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = ["--data", str(tmp_path / "dollar$x_{$"), "--out", str(tmp_path / "run")]
    assert train.main([*arguments, "--batch-size", "8", *QUICK]) == 0


def test_tensorboard_is_an_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main(["--out", str(tmp_path / "run"), "--tensorboard", *QUICK]) == 2
    assert "pip install 'pyro-vae[tensorboard]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_installed_command(run):
    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "pyro_vae", *arguments], capture_output=True, text=True
        )

    assert "pyro-vae train" in call().stdout
    assert call("--version").stdout.strip() == pyro_vae.__version__
    assert call("nonsense").returncode == 2
    done = call("evaluate", str(run), "--num-samples", "2", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["num_samples"] == 2
    assert done.stderr == ""


def test_a_reader_that_leaves_early_is_no_error(run):
    command = f"{sys.executable} -m pyro_vae.evaluate {run} --num-samples 2 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


BAD = {
    "missing path": (["--data", "nowhere.npy"], "no such path exists"),
    "unknown name": (["--data", "mnits"], "expects digits, mnist"),
    "latent dimension 0": (["--latent-dim", "0"], "--latent-dim expects"),
    "batch too large": (["--batch-size", "5000"], "larger than the training set of 1457 rows"),
    "unknown device": (["--device", "tpu9"], "--device expects auto or one of cpu"),
    "absent device": (["--device", "cuda:7"], "--device expects auto or one of cpu"),
    "unknown flag": (["--colour", "3"], "colour"),
    "not a number": (["--epochs", "many"], "--epochs"),
    "unknown choice": (["--likelihood", "poisson"], "poisson"),
    "unknown activation": (["--activation", "magic"], "--activation expects"),
    "conv too deep": (["--architecture", "conv", "--hidden", "4", "4", "4", "4"], "at least 16x16"),
    "resize of digits": (["--image-size", "16", "16"], "resizes folders of images only"),
    "values above the largest": (["--max-value", "3"], "ranges from 0 to 16"),
    "no such run": (["--resume", "nowhere"], "expected a run folder"),
    "no such config": (["--config", "nowhere.json"], "cannot read the config"),
    "unwritable folder": (["--out", "/proc/nowhere/run"], "cannot write to the run folder"),
    "file in the way": (["--out", "file.txt/run"], "cannot write to the run folder"),
    "foreign file in the data": (["--data", ".", "--out", "run"], "is not an image"),
    "too large": (["--hidden", "3000000000"], "not enough memory"),
    "much too large": (["--latent-dim", "100000000000000000"], "not enough memory"),
    "seed too large": (["--seed", "99999999999999999999"], "--seed expects"),
    "no name": (["--data", ""], "--data expects the name"),
    "folder is a file": (["--out", "file.txt"], "is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, tmp_path, monkeypatch, capsys):
    if case == "absent device" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has it")
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("in the way")
    refused(train.main, arguments, message, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def refused(main, arguments, message, capsys) -> None:
    """Status 2, the message on stderr, no traceback, nothing on stdout."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("likelihood", "values", "mend"),
    [
        ("bernoulli", [[0.0, 7.3], [1, 2.5], [3, -1]], "--likelihood gaussian"),
        ("binomial", [[0.0, 0.3], [1, 0.5], [0.2, 0]], "--likelihood continuous-bernoulli"),
        ("discretized-logistic", [[0.0, 7.3], [1, 2.5], [3, 2]], "--likelihood gaussian"),
        ("continuous-bernoulli", [[0.0, 7.3], [1, 2.5], [3, 2]], "--likelihood gaussian"),
    ],
)
def test_impossible_likelihoods(likelihood, values, mend, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array(values * 5))
    arguments = ["--data", str(tmp_path / "a.npy"), "--likelihood", likelihood]
    arguments += ["--batch-size", "4", "--out", str(tmp_path / "run")]
    refused(train.main, arguments, mend, capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_inside_its_data_is_refused(tmp_path, capsys):
    from PIL import Image

    for i in range(9):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--batch-size", "2"]
    refused(train.main, arguments, "lies in the data folder", capsys)


def test_bad_data_by_command(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "one.npy", np.zeros((1, 4)))
    np.save(tmp_path / "nan.npy", np.array([[0, np.nan]] * 9))
    for name, message in [("empty", "holds none"), ("one.npy", "1 row"), ("nan.npy", "9 values")]:
        arguments = ["--data", str(tmp_path / name), "--out", str(tmp_path / "run")]
        refused(train.main, arguments, message, capsys)
    assert not (tmp_path / "run").exists()


def test_bad_arguments_of_the_other_commands(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.npz").write_text("mine")
    Path("broken.pt").write_bytes((run / "checkpoints" / "best.pt").read_bytes()[:-500])
    np.save("other.npy", np.zeros((9, 3)))
    np.save("large.npy", np.full((9, 8, 8), 17))
    path = str(run)
    for main, arguments, message in [
        (evaluate.main, ["nowhere"], "expected a run folder"),
        (evaluate.main, ["broken.pt"], "broken.pt is not a checkpoint"),
        (evaluate.main, [path, "--num-samples", "0"], "--num-samples expects an integer of"),
        (evaluate.main, [path, "--num-images", "9999"], "at most 179"),
        (evaluate.main, [path, "--split", "holdout"], "holdout"),
        (evaluate.main, [path, "--data", "other.npy"], "of shape (1, 8, 8); other holds"),
        (evaluate.main, [path, "--device", "cuda:9"], "--device expects"),
        (generate.main, [path, "--out", "there.npz"], "exists; give another --out"),
        (generate.main, [path, "--out", "a.jpg"], "ending in .png or .npy or .npz"),
        (generate.main, [path, "--out", "nowhere/a.png"], "expects an existing folder"),
        (generate.main, [path, "--out", "a.png", "--num", "0"], "--num expects an integer of"),
        (generate.main, ["nowhere", "--out", "a.png"], "expected a run folder"),
        (encode.main, [path, "--out", "there.npz"], "exists; give another --out"),
        (encode.main, [path, "--out", "a.npy"], "ending in .npz"),
        (encode.main, [path, "--data", "other.npy", "--out", "a.npz"], "of shape (1, 8, 8)"),
        (encode.main, [path, "--data", "large.npy", "--out", "a.npz"], "integers from 0 to 16"),
        (encode.main, [path, "--seed", "-5", "--out", "a.npz"], "--seed expects"),
        (generate.main, [path, "--seed", "-5", "--out", "a.png"], "--seed expects"),
    ]:
        refused(main, arguments, message, capsys)
    assert Path("there.npz").read_text() == "mine"
    assert not {"a.png", "a.npz"} & set(os.listdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_commands_on_cuda(tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(["--device", "cuda", "--out", str(run), *QUICK]) == 0
    assert train.main(["--resume", str(run), "--device", "cuda", "--epochs", "8"]) == 0
    assert evaluate.main([str(run), "--num-samples", "10", "--device", "cuda"]) == 0
    assert generate.main([str(run), "--out", str(tmp_path / "a.png"), "--device", "cuda"]) == 0
    assert encode.main([str(run), "--out", str(tmp_path / "a.npz"), "--device", "cuda"]) == 0


# --- objectives and presets -----------------------------------------------------------------------

BRIEF = ["--epochs", "1", "--batch-size", "500"]


@pytest.mark.usefixtures("no_pictures")
def test_an_objective_with_particles(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--objective", "dreg", "--num-particles", "8", "--latent-dim", "2"]
    assert train.main(["--out", str(run), "--hidden", "16", *arguments, *BRIEF]) == 0
    (line,) = lines(run)
    assert line["train_elbo"] == pytest.approx(line["reconstruction"] - line["kl"])
    fit = json.loads((run / "config.json").read_text())["fit"]
    assert (fit["objective"], fit["num_particles"]) == ("dreg", 8)
    assert load_checkpoint(run).config.fit.objective == "dreg"
    capsys.readouterr()
    assert evaluate.main([str(run), "--num-samples", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 5


@pytest.mark.usefixtures("no_pictures")
def test_options_of_an_objective_are_flags_and_survive_a_resume(tmp_path):
    run = tmp_path / "run"
    arguments = ["--objective", "piwae", "--num-particles", "6", "--groups", "3", *BRIEF]
    assert train.main(["--out", str(run), "--hidden", "8", "--latent-dim", "2", *arguments]) == 0
    assert load_checkpoint(run).config.fit.objective_options() == {"groups": 3}
    assert train.main(["--resume", str(run), "--epochs", "2"]) == 0
    assert len(lines(run)) == 2
    assert load_checkpoint(run, "last").config.fit.objective_options() == {"groups": 3}


@pytest.mark.usefixtures("no_pictures")
def test_flags_beside_a_preset_win(tmp_path):
    """Its data would have to be downloaded; its network does for the digits as well."""
    run = tmp_path / "run"
    arguments = ["--preset", "iwae-mnist", "--data", "digits", "--objective", "iwae"]
    assert train.main(["--out", str(run), *arguments, "--num-particles", "3", *BRIEF]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["source"] == "digits"
    model, fit = config["model"], config["fit"]
    assert (model["hidden"], model["activation"], model["latent_dim"]) == ([200, 200], "Tanh", 50)
    assert model["likelihood"] == "bernoulli"
    assert (fit["objective"], fit["num_particles"], fit["epochs"]) == ("iwae", 3, 1)
    assert fit["batch_size"] == 500
    assert fit["learning_rate"] == pyro_vae.config.PRESETS["iwae-mnist"].fit.learning_rate
    weights = load_checkpoint(run).vae.encoder.state_dict()
    assert [w.shape[0] for key, w in weights.items() if key.endswith("weight")] == [200, 200, 100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "iwae-mnist", "--resume", "RUN"], "drop --config and --preset"),
        (["--preset=iwae-mnist", "--resume=RUN"], "drop --config and --preset"),
        (["--preset", "iwae-mnist", "--config", "RUN/config.json"], "drop one"),
        (["--preset", "vae-1312"], "vae-1312"),
        (["--objective", "miwae"], "--objective miwae: the objective miwae expects a number of"),
        (["--objective", "score-baseline"], "--objective score-baseline: "),
        (["--objective", "iwae", "--alpha", "0.5"], "has no option alpha; it belongs to renyi"),
        (["--objective", "renyi", "--alpha", "1"], "--objective renyi: alpha expects"),
        (["--objective", "dreg", "--kl-warmup", "0.2"], "--kl-warmup expects an objective"),
        (["--objective", "sleep"], "sleep"),
    ],
)
def test_objectives_and_presets_that_cannot_be_meant(
    arguments, message, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    before = (run / "config.json").read_bytes()
    refused(train.main, arguments, message, capsys)
    assert not list(tmp_path.iterdir())
    assert (run / "config.json").read_bytes() == before


def test_one_message_for_too_few_particles(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(train.main(["--objective", "miwae", "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("a multiple of its 8 groups; got 1") == 1
    assert err.count("--objective miwae") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_to_a_reader_that_has_gone(command, unbuffered):
    """As in `--help | head`: no traceback. Buffered output is written when the command ends."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", f"pyro_vae.{command}", "--help"]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


def test_warnings_of_the_package_are_a_line_and_others_as_ever(capsys):
    def work() -> int:
        warnings.simplefilter("always")
        warnings.warn_explicit("of ours", UserWarning, capture.__file__, 1)
        warnings.warn_explicit("of others", UserWarning, "elsewhere.py", 7)
        return 0

    assert run_command(work) == 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "note: of ours"
    assert rest[0] == "elsewhere.py:7: UserWarning: of others"
