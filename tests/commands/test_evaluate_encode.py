"""Every flag of `evaluate` and `encode` changes what it says it changes; outliers and JSON."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from masked import EFFORT

import pyro_vae
from pyro_vae import diagnose, encode, evaluate, train
from pyro_vae.data import loading
from pyro_vae.diagnostics import suite
from pyro_vae.evidence import evaluation

SEED = 5


def trained(data, folder, *flags):
    """Train for an epoch, without the figures and the page, which take most of the time."""
    small = ["--epochs", "1", "--hidden", "8", "--latent-dim", "2", "--batch-size", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda folder: None)
        assert train.main(["--data", str(data), "--out", str(folder), *small, *flags]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on grey images that a Bernoulli binarizes by the seed, seed 5, with three classes."""
    folder = tmp_path_factory.mktemp("wiring")
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = random.integers(0, 6, (60, 4, 4)) * (labels + 1)[:, None, None]
    np.savez(folder / "grey.npz", images=images.astype(np.uint8), labels=labels)
    np.savez(folder / "other.npz", images=images[:9][::-1].astype(np.uint8))
    flags = ["--likelihood", "bernoulli", "--seed", str(SEED), "--max-value", "15"]
    trained(folder / "grey.npz", folder / "run", *flags)
    return folder / "run"


@pytest.fixture(scope="module")
def parts(run):
    """The model and the data of the run, loaded by the library."""
    config = pyro_vae.DataConfig(str(run.parent / "grey.npz"), max_value=15)
    return pyro_vae.load(run), pyro_vae.load_data(config, seed=SEED)


def refuse(token):
    raise AssertionError(f"{token} is no JSON")


def evaluated(capsys, *flags):
    assert evaluate.main([*map(str, flags), "--num-samples", "30", "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def library(vae, split, seed=SEED, rows=None, samples=30):
    return evaluation.evaluate(vae, split, samples, rows, seed)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_split_is_the_one_that_is_evaluated(run, parts, capsys, split):
    vae, splits = parts
    values = evaluated(capsys, run, "--split", split)
    expected = library(vae, getattr(splits, split))
    assert values["split"] == split
    assert values["likelihood"] == "bernoulli"
    assert values["num_images"] == len(getattr(splits, split))
    for name in ("elbo", "reconstruction", "kl", "log_evidence", "bits_per_dim"):
        assert values[name] == getattr(expected, name)


def test_default_split_is_the_test_split(run, capsys):
    assert evaluated(capsys, run) == evaluated(capsys, run, "--split", "test")
    assert evaluated(capsys, run) != evaluated(capsys, run, "--split", "validation")


@pytest.mark.parametrize("seed", [0, SEED, 7])
def test_seed_of_evaluate_also_zero(run, parts, capsys, seed):
    vae, splits = parts
    values = evaluated(capsys, run, "--seed", seed)
    assert values["elbo"] == library(vae, splits.test, seed).elbo
    assert values["binarization"] == f"fixed, seed {seed}"
    own = evaluated(capsys, run)  # the run's own seed by default
    assert (values == own) is (seed == SEED)


def test_numbers_of_rows_and_samples(run, parts, capsys):
    vae, splits = parts
    few = evaluated(capsys, run, "--num-images", 3)
    assert few["elbo"] == library(vae, splits.test, rows=3).elbo
    assert few["num_images"] == 3
    assert few != evaluated(capsys, run, "--num-images", 4)
    assert evaluate.main([str(run), "--num-samples", "7", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["num_samples"] == 7
    assert values["log_evidence"] == library(vae, splits.test, samples=7).log_evidence


def test_table_shows_the_numbers_of_the_json(run, capsys):
    values = evaluated(capsys, run)
    assert evaluate.main([str(run), "--num-samples", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("best.pt")
    assert lines[1].startswith("6 test rows of grey, binarized once (fixed, seed 5); likelihood b")
    shown = {line[2:22].strip(): line[22:].split()[0] for line in lines[2:]}
    names = {
        "ELBO": "elbo",
        "reconstruction": "reconstruction",
        "KL(q(z|x) ‖ p(z))": "kl",
        "log p(x)": "log_evidence",
        "standard error": "standard_error",
        "Monte Carlo error": "monte_carlo_error",
        "unreliable weights": "unreliable_weights",
        "bits per dimension": "bits_per_dim",
    }
    assert shown == {
        **{label: f"{values[key]:.3f}" for label, key in names.items()},
        "active units": str(values["active_units"]),
    }


def test_data_of_evaluate_are_test_rows_unless_they_are_the_runs_own(run, capsys):
    other, own = run.parent / "other.npz", run.parent / "grey.npz"
    values = evaluated(capsys, run, "--data", other)
    assert (values["num_images"], values["split"]) == (9, "test")
    assert values["elbo"] != evaluated(capsys, run)["elbo"]
    assert evaluated(capsys, run, "--data", own) == evaluated(capsys, run)
    assert evaluate.main([str(run), "--data", str(other), "--split", "train"]) == 2
    assert "--split train is empty" in capsys.readouterr().err


def test_device_of_evaluate_and_encode(run, capsys, tmp_path):
    assert evaluated(capsys, run, "--device", "cpu") == evaluated(capsys, run)
    assert evaluate.main([str(run), "--device", "cuda:99"]) == 2
    assert "--device expects auto or one of cpu" in capsys.readouterr().err
    assert encode.main([str(run), "--out", str(tmp_path / "c.npz"), "--device", "tpu"]) == 2
    assert "--device expects" in capsys.readouterr().err


def encoded(path, *flags):
    assert encode.main([*map(str, flags), "--out", str(path)]) == 0
    with np.load(path) as file:
        return dict(file)


def test_codes_are_those_of_the_posterior_in_the_order_of_the_data(run, parts, tmp_path):
    vae, splits = parts
    arrays = encoded(tmp_path / "codes.npz", run)
    x = torch.cat(list(splits.whole().fixed("binary", SEED)))
    with torch.no_grad():
        posterior = vae.posterior(x)
    np.testing.assert_array_equal(arrays["mean"], posterior.mean.numpy())
    np.testing.assert_array_equal(arrays["standard_deviation"], posterior.variance.sqrt().numpy())
    assert not np.allclose(arrays["mean"][:-1], arrays["mean"][1:])
    np.testing.assert_array_equal(arrays["labels"], np.arange(60) % 3)
    for name in ("train", "validation", "test"):
        rows = getattr(splits, name).rows.numpy()
        np.testing.assert_array_equal(np.flatnonzero(arrays["split"] == name), rows)


def test_seed_of_encode_also_zero(run, parts, tmp_path):
    vae, splits = parts
    codes = {}
    for seed in (0, SEED, None):
        flags = [] if seed is None else ["--seed", seed]
        codes[seed] = encoded(tmp_path / f"{seed}.npz", run, *flags)["mean"]
    np.testing.assert_array_equal(codes[None], codes[SEED])
    assert not np.array_equal(codes[0], codes[SEED])
    x = torch.cat(list(splits.whole().fixed("binary", 0)))
    with torch.no_grad():
        np.testing.assert_array_equal(codes[0], vae.posterior(x).mean.numpy())


def test_out_and_overwrite_of_encode(run, tmp_path, capsys):
    path = tmp_path / "codes.npz"
    encoded(path, run)
    before = path.read_bytes()
    assert encode.main([str(run), "--out", str(path), "--seed", "9"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert encode.main([str(run), "--out", str(path), "--seed", "9", "--overwrite"]) == 0
    assert "60 rows, 2 latents" in capsys.readouterr().out
    assert path.read_bytes() != before
    assert encode.main([str(run), "--out", str(tmp_path / "codes.csv")]) == 2


def test_other_data_of_encode_have_no_split(run, tmp_path):
    arrays = encoded(tmp_path / "other.npz", run, "--data", run.parent / "other.npz")
    assert set(arrays) == {"mean", "standard_deviation"}
    assert arrays["mean"].shape == (9, 2)
    own = encoded(tmp_path / "own.npz", run, "--data", run.parent / "grey.npz")
    assert set(own) == {"mean", "standard_deviation", "split", "labels", "class_names"}


@pytest.mark.parametrize("command", ["evaluate", "encode"])
def test_data_root_is_where_data_sets_are_looked_for(run, command, tmp_path, monkeypatch, capsys):
    def read(config):
        raise pyro_vae.InputError(f"looked in {config.root}")

    monkeypatch.setattr(loading, "read", read)
    flags = [str(run), "--data", "mnist", "--data-root", str(tmp_path / "here")]
    if command == "evaluate":
        assert evaluate.main(flags) == 2
    else:
        assert encode.main([*flags, "--out", str(tmp_path / "codes.npz")]) == 2
    assert f"looked in {tmp_path / 'here'}" in capsys.readouterr().err


# --- Outliers ---


def table(path, far=None):
    """100 rows of 3 columns; a value far out in a row of each split but the first."""
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    np.save(path, x)
    splits = pyro_vae.load_data(str(path))
    rows = {name: int(getattr(splits, name).rows[2]) for name in ("validation", "test")}
    if far is not None:
        for column, row in enumerate(rows.values()):
            x[row, column] = far
        np.save(path, x)
    return rows


# Without this, the tests turn a note into an error.
shown = pytest.mark.filterwarnings("default")


@shown
@pytest.mark.parametrize("far", [1e4, 1e30, -3e38])
def test_outliers_are_trained_evaluated_and_encoded_with_finite_numbers(far, tmp_path, capsys):
    path, folder = tmp_path / "table.npy", tmp_path / "run"
    rows = table(path, far)
    trained(path, folder)
    notes = capsys.readouterr().err
    assert f"note: row {rows['validation']} of the data (counted from 0) alone decides" in notes
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert all(v is not None for v in json.loads(line, parse_constant=refuse).values())
    assert evaluate.main([str(folder), "--num-samples", "30", "--json"]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out, parse_constant=refuse)
    assert {name for name, value in values.items() if value is None} == {"bits_per_dim"}
    assert values["log_evidence"] < -100
    note = f"note: row {rows['test']} of the data (counted from 0) alone decides the mean log p(x)"
    assert note in captured.err
    assert "column 1 (counted from 0) holds" in captured.err
    arrays = encoded(tmp_path / "codes.npz", folder)
    assert all(np.isfinite(arrays[name]).all() for name in ("mean", "standard_deviation"))
    first = min(rows.values())
    assert (
        f"note: 2 of 100 rows hold values further from the mean of the training data than 1,024 "
        f"standard deviations, the first row {first} (counted from 0)"
    ) in capsys.readouterr().err


def test_ordinary_rows_are_not_noted(tmp_path, capsys):
    path, folder = tmp_path / "table.npy", tmp_path / "run"
    table(path)
    trained(path, folder)
    assert evaluate.main([str(folder), "--num-samples", "30"]) == 0
    encoded(tmp_path / "codes.npz", folder)
    assert "note" not in capsys.readouterr().err


@shown
def test_huge_numbers_keep_the_table_narrow(tmp_path, capsys):
    path, folder = tmp_path / "table.npy", tmp_path / "run"
    table(path)
    trained(path, folder)
    far = tmp_path / "far.npy"
    np.save(far, np.full((2, 3), 1e30, np.float32))
    capsys.readouterr()
    assert evaluate.main([str(folder), "--num-samples", "30", "--data", str(far)]) == 0
    out, notes = capsys.readouterr()
    assert "are they in the same unit" in notes
    assert "e+" in out
    assert max(map(len, out.splitlines()[1:])) < 100


@shown
@pytest.mark.slow
def test_diagnose_with_an_outlier_writes_valid_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "QUICK", EFFORT)
    path, folder = tmp_path / "table.npy", tmp_path / "run"
    table(path, 1e10)
    trained(path, folder)
    capsys.readouterr()
    assert diagnose.main([str(folder), "--quick", "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=refuse)
    json.loads((folder / "diagnostics.json").read_text(), parse_constant=refuse)
    shutil.rmtree(folder)
