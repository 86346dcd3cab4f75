"""`impute`: its files, printed lines and mistakes; every command on a run with missing values."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from masked import EFFORT, missing_values

import pyro_vae
from pyro_vae import diagnose, encode, evaluate, generate, report, train
from pyro_vae.diagnostics import suite
from pyro_vae.evidence import imputation
from pyro_vae.impute import main as impute
from pyro_vae.refit import main as refit
from pyro_vae.runtime.randomness import derive, random_states
from pyro_vae.training import refitting

NAN = float("nan")
SMALL = ["--epochs", "2", "--hidden", "8", "--latent-dim", "2", "--batch-size", "16"]


def table(count: int = 60) -> np.ndarray:
    """Three columns of ten digits, one of them constant but for missing values."""
    random = np.random.default_rng(0)
    values = random.normal([20_000_000, 0, 0], size=(count, 3)).round(2)
    values[:, 2] = 0.125
    values[random.random((count, 3)) < 0.3] = NAN
    values[np.isnan(values).all(1), 1] = 1.5
    return values


def written(path, values: np.ndarray, labels: bool = True) -> str:
    random = np.random.default_rng(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["large", "small, quoted", "same", *(["class"] if labels else [])])
        for row in values:
            cells = ["" if np.isnan(v) else repr(float(v)) for v in row]
            writer.writerow([*cells, *([random.choice(["a", "b"])] if labels else [])])
    return str(path)


def trained(folder, data, *flags, name="run"):
    """A run without figures and page."""
    arguments = ["--data", data, "--out", folder / name, "--missing", "model", *SMALL, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda folder: None)
        assert train.main(list(map(str, arguments))) == 0
    return folder / name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impute")
    return trained(folder, written(folder / "rows.csv", table()))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    values = missing_values("binomial", 60, (8, 8))
    values[np.isnan(values).all((1, 2)), 0, 0] = 0
    np.save(folder / "images.npy", values)
    return trained(folder, folder / "images.npy", "--max-value", "16")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences")
    np.save(folder / "sequences.npy", np.swapaxes(missing_values("gaussian", 60, (2, 9)), 1, 2))
    conv = ["--layout", "sequences", "--architecture", "conv", "--hidden", "4"]
    return trained(folder, folder / "sequences.npy", *conv)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    np.save(folder / "volumes.npy", missing_values("gaussian", 60, (8, 8, 8)))
    return trained(folder, folder / "volumes.npy", "--architecture", "conv", "--hidden", "4")


def called(main, *arguments) -> int:
    return main([str(argument) for argument in arguments])


def loaded(run, out, *flags):
    assert called(impute, run, "--out", out, *flags) == 0
    if out.suffix == ".npy":
        return np.load(out)
    with np.load(out) as file:
        return dict(file)


# --- files ----------------------------------------------------------------------------------------


def test_arrays_are_those_of_the_library(run, tmp_path, capsys):
    arrays = loaded(run, tmp_path / "a.npz", "--draws", 7, "--num-samples", 50)
    vae = pyro_vae.load(run)
    spec = vae.likelihood_module.spec
    splits = pyro_vae.load_data(str(run.parent / "rows.csv"), spec=spec)
    x = torch.cat(list(splits.whole().fixed("real", 0)))
    with random_states(x.device, derive(0, "impute")):
        found = imputation.impute(vae, x, 7, 50)
    values, missing = table(), np.isnan(table())
    assert np.array_equal(arrays["missing"], missing)
    assert arrays["draws"].shape == (60, 7, 3)
    np.testing.assert_array_equal(arrays["mean"][~missing], values[~missing])
    np.testing.assert_array_equal(
        arrays["mean"][missing], spec.from_units(found.mean, "real").numpy()[missing]
    )
    draws = spec.from_units(found.draws, "real").numpy().swapaxes(0, 1)
    np.testing.assert_allclose(arrays["draws"], draws, rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(arrays["pareto_k"], found.pareto_k)
    assert abs(arrays["mean"][:, 0] - 20_000_000).max() < 10
    share = 100 * missing.mean()
    bad = int((found.pareto_k > 1 - 1 / np.log10(50)).sum())
    assert capsys.readouterr().out == (
        f"{tmp_path / 'a.npz'}: 60 rows of rows, {missing.any(1).sum()} of them with missing "
        f"values ({share:.1f}% of all), imputed by their means and 7 draws; Pareto k above 0.41 in "
        f"{bad} rows\n"
    )


def test_a_completed_table(run, tmp_path):
    """Observed cells keep their text, the others hold the means; names and labels are kept."""
    means = loaded(run, tmp_path / "a.npz", "--num-samples", 100)["mean"]
    assert called(impute, run, "--out", tmp_path / "a.csv", "--num-samples", 100) == 0
    with (tmp_path / "a.csv").open(newline="") as new, (run.parent / "rows.csv").open() as old:
        rows, before = list(csv.reader(new)), list(csv.reader(old))
    assert rows[0] == ["large", "small, quoted", "same", "label"]
    for row, known, mean in zip(rows[1:], before[1:], means, strict=True):
        assert row[3] == known[3]
        for j in range(3):
            if known[j]:
                assert float(row[j]) == float(known[j])
            else:
                assert float(row[j]) == pytest.approx(mean[j], rel=1e-6)
    again = pyro_vae.load_data(tmp_path / "a.csv")
    assert not again.train.values.isnan().any()
    assert again.class_names == ("a", "b")
    assert again.spec.columns == ("large", "small, quoted", "same")


def test_means_of_integers_are_rounded_in_a_completed_array(images, tmp_path):
    exact = loaded(images, tmp_path / "a.npz", "--draws", 3, "--num-samples", 30)
    whole = loaded(images, tmp_path / "a.npy", "--num-samples", 30)
    stored = missing_values("binomial", 60, (8, 8))
    assert whole.shape == exact["mean"].shape == (60, 1, 8, 8)
    assert (exact["mean"] != np.rint(exact["mean"])).any()
    assert ((whole >= 0) & (whole <= 16) & (whole == np.rint(whole))).all()
    seen = ~exact["missing"]
    np.testing.assert_array_equal(whole[seen], stored.reshape(whole.shape)[seen])
    draws = exact["draws"]
    assert draws.shape == (60, 3, 1, 8, 8)
    assert set(np.unique(draws)) <= set(range(17))


def test_grey_values_that_are_binarized_are_kept(tmp_path):
    np.save(tmp_path / "grey.npy", missing_values("continuous-bernoulli", 40, (4, 5)))
    run = trained(tmp_path, tmp_path / "grey.npy", "--likelihood", "bernoulli")
    stored = missing_values("continuous-bernoulli", 40, (4, 5)).reshape(40, 1, 4, 5)
    arrays = loaded(run, tmp_path / "a.npz", "--draws", 2, "--num-samples", 30)
    seen = ~arrays["missing"]
    np.testing.assert_array_equal(arrays["mean"][seen], stored[seen])
    assert set(np.unique(arrays["draws"].swapaxes(0, 1)[:, ~seen])) <= {0.0, 1.0}


@pytest.mark.filterwarnings("default")
def test_other_data(run, tmp_path, capsys):
    """Columns by name; complete rows are written as they are, with a note."""
    values = table(12)[:, [1, 0]]
    (tmp_path / "b.csv").write_text(
        'same,"small, quoted",large\n'
        + "".join(f"NA,{'' if np.isnan(a) else a},{'' if np.isnan(b) else b}\n" for a, b in values)
    )
    done = loaded(run, tmp_path / "b.npy", "--data", tmp_path / "b.csv", "--num-samples", 50)
    assert done.shape == (12, 3)
    assert np.isfinite(done).all()
    seen = ~np.isnan(values)
    np.testing.assert_array_equal(done[:, [1, 0]][seen], values[seen])
    np.save(tmp_path / "c.npy", done)
    capsys.readouterr()
    same = loaded(run, tmp_path / "d.npy", "--data", tmp_path / "c.npy", "--num-samples", 50)
    np.testing.assert_array_equal(same, done)
    assert "no value of c is missing" in capsys.readouterr().err


# --- mistakes -------------------------------------------------------------------------------------


def refusal(capsys, main, *arguments) -> str:
    capsys.readouterr()
    assert called(main, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_mistakes_are_one_line(run, images, tmp_path, capsys):
    out = tmp_path / "a.npz"
    out.touch()
    for flags, message in (
        (["--out", out], "exists; give another --out"),
        (["--out", tmp_path / "a.txt"], "ending in .npz or .npy or .csv"),
        (["--out", tmp_path / "no" / "a.npz"], "existing folder"),
        (["--out", tmp_path / "a.csv", "--draws", 3], "--draws are written to a .npz only"),
        (["--out", tmp_path / "b.npz", "--draws", 0], "--draws expects an integer of at least 1"),
        (["--out", tmp_path / "b.npz", "--num-samples", 3], "--num-samples expects"),
        (["--out", tmp_path / "b.npz", "--draws", 2**45], "not enough memory"),
        ([], "--out"),
    ):
        assert message in refusal(capsys, impute, run, *flags)
    message = refusal(capsys, impute, images, "--out", tmp_path / "a.csv")
    assert ".npz or .npy for images" in message


def test_runs_that_cannot_impute(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(40, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda folder: None)
        plain = ["--data", tmp_path / "rows.npy", "--out", tmp_path / "plain", *SMALL]
        assert called(train.main, *plain) == 0
    out = ["--out", tmp_path / "a.npz"]
    found = refusal(capsys, impute, tmp_path / "plain", *out)
    assert "was trained without missing values" in found
    assert "train with --missing model" in found
    np.save(tmp_path / "holes.npy", table())
    data = ["--data", tmp_path / "holes.npy"]
    found = refusal(capsys, encode.main, tmp_path / "plain", *out, *data)
    assert "--missing model" in found
    ae = trained(tmp_path, tmp_path / "holes.npy", "--model", "ae", name="ae")
    assert "is an autoencoder" in refusal(capsys, impute, ae, *out)
    assert called(encode.main, ae, "--out", tmp_path / "codes.npz") == 0


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda v: v, [], "--missing model"),
        (lambda v: v.__setitem__(7, NAN), ["--missing", "model"], "the first is row 7"),
        (
            lambda v: v.__setitem__((slice(None), slice(2)), [1, NAN]),
            ["--missing", "model"],
            "column 1",
        ),
        (lambda v: v.__setitem__((3, 1), np.inf), ["--missing", "model"], "infinite"),
        (lambda v: v, ["--missing", "guess"], "--missing"),
    ],
)
def test_bad_data_of_train_are_one_line(change, flags, message, tmp_path, capsys):
    values = table()
    change(values)
    np.save(tmp_path / "rows.npy", values)
    arguments = ["--data", tmp_path / "rows.npy", "--out", tmp_path / "run", *SMALL, *flags]
    assert message in refusal(capsys, train.main, *arguments)
    assert not (tmp_path / "run").exists()


# --- every command --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "kind",
    ["run", *(pytest.param(k, marks=pytest.mark.slow) for k in ("images", "sequences", "volumes"))],
)
def test_every_command(kind, request, tmp_path, monkeypatch, capsys):
    """On a copy: what each prints and writes is finite."""
    source = request.getfixturevalue(kind)
    run = tmp_path / "run"
    shutil.copytree(source, run)
    (run / "figures").mkdir(exist_ok=True)
    monkeypatch.setattr(suite, "QUICK", EFFORT)
    monkeypatch.setattr(refitting, "TAIL_PAIRS", 60)
    monkeypatch.setattr(refitting, "SCORED", 60)
    capsys.readouterr()
    assert called(evaluate.main, run, "--num-samples", 30, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["log_evidence"] is not None
    assert np.isfinite([v for v in values.values() if isinstance(v, float)]).all()
    assert called(generate.main, run, "--out", tmp_path / "g.npy", "--draw") == 0
    assert np.isfinite(np.load(tmp_path / "g.npy")).all()
    codes = ["--out", tmp_path / "codes.npz", "--recalibrate"]
    draws = ["--draws", 5] if kind == "run" else []  # those of untrained images need chains
    assert called(encode.main, run, *codes, *draws) == 0
    with np.load(tmp_path / "codes.npz") as file:
        names = ["mean", "factors", *(["draws"] if draws else [])]
        assert all(np.isfinite(file[name]).all() for name in names)
    assert called(refit, run) == 0
    assert called(diagnose.main, run, "--quick") == 0
    assert json.loads((run / "diagnostics.json").read_text())["complete"]
    assert called(report.main, run) == 0
    assert not re.search(r"[\[,:] ?NaN", (run / "report.html").read_text())
    assert called(impute, run, "--out", tmp_path / "i.npy", "--num-samples", 60) == 0


def test_the_share_is_said_before_the_training(tmp_path, capsys):
    data = written(tmp_path / "rows.csv", table())
    trained(tmp_path, data)
    share = f"{100 * np.isnan(table()).mean():.3g}"
    out = capsys.readouterr().out
    assert f", {share}% missing, assumed missing at random, 2 classes\n" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["missing"] == "model"
