"""Commands on models with labels: train, evaluate, generate, encode, diagnose, refit, report."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIGMAS
from masked import EFFORT
from PIL import Image
from scipy.stats import chisquare

import pyro_vae
from pyro_vae import diagnose, encode, evaluate, generate, train
from pyro_vae.diagnostics import draws, suite
from pyro_vae.impute import main as impute
from pyro_vae.refit import main as refit
from pyro_vae.training.checkpoint import load_checkpoint

SMALL = ["--latent-dim", "2", "--hidden", "8", "--epochs", "2"]
NAMES = ("cat", "cow", "dog")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of three classes by name: its folder and its contents."""
    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 120)
    x = random.normal(size=(120, 3)) + 2 * np.eye(3)[y]
    frame = pd.DataFrame(x, columns=list("abc")).assign(label=np.array(NAMES)[y])
    frame.to_csv(folder / "animals.csv", index=False)
    return folder, frame


def trained(table, name, *flags):
    out = table[0] / name
    source = ["--data", str(table[0] / "animals.csv"), "--test-size", "40"]
    assert train.main([*source, *flags, "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def conditional(table):
    return trained(table, "conditional", "--condition", "label")


@pytest.fixture(scope="module")
def inferred(table):
    return trained(table, "inferred", "--labelled", "30")


@pytest.fixture(scope="module")
def plain(table):
    return trained(table, "plain")


def splits_of(table, labelled=None):
    source = str(table[0] / "animals.csv")
    return pyro_vae.load_data(source, test_size=40, labelled=labelled)


def test_the_metrics_of_a_run(conditional, inferred):
    def lines(run):
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert all(0 <= line["validation_accuracy"] <= 1 for line in lines(inferred))
    assert all("validation_accuracy" not in line for line in lines(conditional))
    config = json.loads((inferred / "config.json").read_text())
    assert (config["model"]["condition"], config["data"]["labelled"]) == ("partial", 30)


def test_evaluate_reports_the_accuracy_with_its_interval(inferred, conditional, capsys):
    for run, keys in [(inferred, True), (conditional, False)]:
        capsys.readouterr()
        assert evaluate.main([str(run), "--num-samples", "5", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        names = ["accuracy", "accuracy_low", "accuracy_high", "bayes_accuracy", "num_labelled"]
        assert all((name in values) == keys for name in names)
        assert values["elbo"] < values["log_evidence"]
        assert values["condition"] == ("partial" if keys else "label")
    assert evaluate.main([str(inferred), "--num-samples", "5"]) == 0
    assert "of q(y|x), 40 rows with a label" in capsys.readouterr().out
    assert evaluate.main([str(conditional), "--num-samples", "5"]) == 0
    assert "given the label of each row, as log p(x|y)" in capsys.readouterr().out


def test_evaluate_agrees_with_the_model_at_each_label(conditional, table, capsys):
    """The ELBO of the command, against `given` by hand: one comparison at four standard errors."""
    evaluate.main([str(conditional), "--num-samples", "200", "--json"])
    values = json.loads(capsys.readouterr().out)
    vae, test = pyro_vae.load(conditional), splits_of(table).test
    x = next(test.fixed("real", 0))
    torch.manual_seed(0)
    sums = torch.zeros(200)
    for name in NAMES:
        rows = x[test.labels == NAMES.index(name)]
        for i in range(200):
            reconstruction, kl = vae.given(name).elbo_terms(rows)
            sums[i] += (reconstruction - kl).sum()
    means = sums / len(x)
    error = means.std() * (2 / 200) ** 0.5
    assert abs(means.mean() - values["elbo"]) < SIGMAS * error


def test_generate_at_a_label(conditional, inferred, tmp_path, capsys):
    for run in (conditional, inferred):
        out = tmp_path / "x.npz"
        flags = [str(run), "--out", str(out), "--overwrite", "--num", "5", "--seed", "3"]
        for label in ("dog", "2", None):
            assert generate.main([*flags, *(["--label", label] if label else [])]) == 0
            found = np.load(out)
            vae, z = pyro_vae.load(run), torch.tensor(found["z"])
            labels = [2] * 5 if label else found["labels"].tolist()
            spec = vae.likelihood_module.spec
            for k, row, latent in zip(labels, found["x"], z, strict=True):
                mean = vae.given(k).likelihood(latent[None]).mean[0]
                assert np.allclose(row, spec.from_units(mean, "real").detach(), atol=1e-4)
        assert tuple(found["class_names"]) == NAMES
    assert "y as in the training data" in capsys.readouterr().out


def test_generated_labels_have_the_shares_of_the_training(inferred, tmp_path):
    """A chi-squared test at a false-alarm rate of 1e-4."""
    out = tmp_path / "x.npz"
    assert generate.main([str(inferred), "--out", str(out), "--num", "2000"]) == 0
    shares = pyro_vae.load(inferred).label_prior().probs.double()
    counts = np.bincount(np.load(out)["labels"], minlength=3)
    assert chisquare(counts, (2000 * shares / shares.sum()).numpy()).pvalue > 1e-4


def test_the_grid_has_a_row_for_each_class(conditional, tmp_path, capsys):
    for num, columns in [("20", 6), ("1", 1)]:
        out = tmp_path / f"{num}.png"
        assert generate.main([str(conditional), "--out", str(out), "--num", num]) == 0
        words = f"each of 3 rows, a z from the prior in each of {columns} columns"
        assert words in capsys.readouterr().out
        with Image.open(out) as image:
            assert min(image.size) > 100


def test_encode_at_the_labels(conditional, inferred, table, tmp_path):
    whole = splits_of(table).whole()
    x = torch.cat(list(whole.fixed("real", 0)))
    for run in (conditional, inferred):
        out = tmp_path / f"{run.name}.npz"
        assert encode.main([str(run), "--out", str(out)]) == 0
        found, vae = np.load(out), pyro_vae.load(run)
        labels = whole.labels
        if run is inferred:
            with torch.no_grad():
                probabilities = vae.label_posterior(x).probs
            assert np.allclose(found["label_probabilities"], probabilities, atol=1e-5)
            labels = probabilities.argmax(1)
            hidden = len(splits_of(table).train) - 30
            assert (found["labels"] < 0).sum() == hidden
        else:
            assert "label_probabilities" not in found
        mean = vae.posterior(x, labels).mean
        assert np.allclose(found["mean"], mean.detach(), atol=1e-4)


def test_draws_and_recalibrated_deviations_by_label(conditional, table, tmp_path):
    out, frame = tmp_path / "codes.npz", table[1]
    assert encode.main([str(conditional), "--out", str(out), "--draws", "30", "--recalibrate"]) == 0
    found = np.load(out)
    assert found["draws"].shape == (120, 30, 2)
    assert found["factors"].shape == (3, 2)
    labels = found["labels"]
    assert list(found["class_names"][labels]) == list(frame["label"])
    wider = found["standard_deviation"] * found["factors"][labels]
    assert np.allclose(found["recalibrated_standard_deviation"], wider, rtol=1e-5)
    distances = abs(found["draws"].mean(1) - found["mean"]) / found["standard_deviation"]
    assert np.median(distances) < 1  # of their own row


def test_draws_by_label_come_in_the_order_of_the_rows(conditional, table, tmp_path, monkeypatch):
    """With the sum of each row in place of its draws."""

    def sums(vae, x, num_draws, on_progress):
        value, method = x.sum(1).expand(num_draws, 2, len(x)).mT, np.full(len(x), draws.IMPORTANCE)
        return draws.PosteriorDraws(value, method, *[x.sum(1)] * 3)

    monkeypatch.setattr(draws, "posterior_draws", sums)
    out = tmp_path / "codes.npz"
    assert encode.main([str(conditional), "--out", str(out), "--draws", "3"]) == 0
    found = np.load(out)
    expected = torch.cat(list(splits_of(table).whole().fixed("real", 0))).sum(1).numpy()
    for values in (found["draws"][:, 2, 1], found["pareto_k"], found["effective_draws"]):
        assert np.array_equal(values, expected)


def test_the_rows_of_a_diagnosis_have_the_label(conditional, inferred, table):
    """The most frequent one by default; of rows without a label, the inferred one."""
    arguments = diagnose.DiagnoseArguments(run=conditional)
    labels = splits_of(table).test.labels
    for label, number in [("dog", 2), ("1", 1), (None, None)]:
        run, name = diagnose._at_label(diagnose._open(arguments), label)
        if number is None:
            number = int(pyro_vae.load(conditional).label_logits.argmax())
        assert name == NAMES[number]
        expected = splits_of(table).test.rows[labels == number]
        assert torch.equal(run.splits.test.rows, expected)
        assert type(run.vae) is pyro_vae.VAE
    opened = diagnose._open(diagnose.DiagnoseArguments(run=inferred))
    run, _ = diagnose._at_label(opened, "cow")
    x = torch.cat(list(opened.splits.train.fixed("real", 0)))
    known = splits_of(table, 30).train.labels
    found = torch.where(known < 0, opened.vae.classifier(x).argmax(-1), known)
    assert torch.equal(run.splits.train.rows, opened.splits.train.rows[found == 1])


@pytest.mark.slow
def test_every_command_on_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "QUICK", EFFORT)
    flags = ["--latent-dim", "3", "--hidden", "16", "--epochs", "3"]
    shared = [("posterior width", True), ("importance weights", True)]
    for name, asked, tested in [
        ("given", ["--condition", "label"], False),
        ("inferred", ["--labelled", "150"], True),
    ]:
        run = tmp_path / name
        assert train.main([*asked, "--out", str(run), *flags]) == 0
        assert diagnose.main([str(run), "--quick", "--label", "3"]) == 0
        words = "held-out rows of digits with label 3 (another by --label)"
        assert words in capsys.readouterr().out
        content = json.loads((run / "diagnostics.json").read_text())
        labels = pyro_vae.load_data("digits").test.labels
        assert (content["label"], content["held_out"]) == ("3", int((labels == 3).sum()))
        checks = [finding["check"] for finding in content["findings"]]
        for check, expected in [*shared, ("label confidence", tested), ("label shares", tested)]:
            assert (check in checks) == expected
        page = (run / "report.html").read_text()
        assert ("Randomized transform" in page) == tested
        assert generate.main([str(run), "--out", str(tmp_path / f"{name}.png")]) == 0
        assert evaluate.main([str(run), "--num-samples", "5"]) == 0


@pytest.mark.filterwarnings("ignore:the ELBO fell")
def test_a_refit_keeps_the_labels(conditional, tmp_path):
    out = tmp_path / "refitted"
    assert refit([str(conditional), "--out", str(out)]) == 0
    checkpoint = load_checkpoint(out)
    assert checkpoint.model.guide.family == "refined"
    assert checkpoint.vae.class_names == NAMES
    assert evaluate.main([str(out), "--num-samples", "5"]) == 0
    assert encode.main([str(out), "--out", str(tmp_path / "codes.npz")]) == 0


def test_report_and_resume(conditional, inferred):
    for run, words in [
        (conditional, "2 latents and a label of 3 classes, given"),
        (inferred, "and a label of 3 classes, inferred where it is not known"),
    ]:
        page = (run / "report.html").read_text()
        assert words in page
        assert "0 0 0 1" in page  # a sheet of the first label
        assert ("Accuracy, validation" in page) == (run is inferred)
    assert train.main(["--resume", str(inferred), "--epochs", "3"]) == 0
    assert len((inferred / "metrics.jsonl").read_text().splitlines()) == 3


def test_other_data_are_matched_by_name(conditional, table, tmp_path):
    frame = table[1]
    other = tmp_path / "other.csv"
    frame[frame["label"] != "cat"].iloc[::-1].to_csv(other, index=False)
    run = str(conditional)
    assert encode.main([run, "--data", str(other), "--out", str(tmp_path / "b.npz")]) == 0
    assert encode.main([run, "--out", str(tmp_path / "a.npz")]) == 0
    mine, whole = np.load(tmp_path / "b.npz"), np.load(tmp_path / "a.npz")
    kept = (frame["label"] != "cat").to_numpy()
    assert np.allclose(mine["mean"], whole["mean"][kept][::-1], atol=1e-5)


def test_blank_labels_are_inferred_if_asked(table, tmp_path, capsys):
    _, frame = table
    path = tmp_path / "blank.csv"
    blank = np.arange(120) % 3 > 0
    frame.assign(label=frame["label"].where(~blank)).to_csv(path, index=False)
    out = str(tmp_path / "run")
    assert train.main(["--data", str(path), "--condition", "label", "--out", out]) == 2
    assert "--condition partial infers them" in capsys.readouterr().err
    flags = ["--data", str(path), "--condition", "partial", "--out", out]
    assert train.main([*flags, *SMALL]) == 0
    capsys.readouterr()
    assert evaluate.main([out, "--num-samples", "5", "--json"]) == 0
    test = pyro_vae.load_data(str(path)).test.labels
    assert json.loads(capsys.readouterr().out)["num_labelled"] == int((test >= 0).sum()) < 12


@pytest.mark.parametrize("asked", [["--condition", "label"], ["--labelled", "30"]])
def test_rows_that_lack_values_and_labels(asked, table, tmp_path, capsys):
    """Missing values and labels together; a table is completed with its labels, known or not."""
    random, frame = np.random.default_rng(1), table[1].copy()
    holes = random.random((120, 3)) < 0.2
    holes[holes.all(1)] = False
    frame[["a", "b", "c"]] = frame[["a", "b", "c"]].mask(holes)
    path, run, out = tmp_path / "holes.csv", str(tmp_path / "run"), tmp_path / "out.csv"
    frame.to_csv(path, index=False)
    source = ["--data", str(path), "--missing", "model", "--test-size", "40"]
    assert train.main([*source, *asked, "--out", run, *SMALL]) == 0
    capsys.readouterr()
    assert evaluate.main([run, "--num-samples", "30", "--json"]) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["log_evidence"])
    assert impute([run, "--out", str(out), "--num-samples", "100"]) == 0
    completed = pd.read_csv(out, keep_default_na=False)
    assert np.isfinite(completed[["a", "b", "c"]].to_numpy(float)).all()
    kept = completed["label"].where(completed["label"] != "", frame["label"])
    assert (kept == frame["label"]).all()
    hidden = (completed["label"] == "").sum()
    assert hidden == (0 if asked[0] == "--condition" else 72 - 30)
    assert encode.main([run, "--out", str(tmp_path / "codes.npz"), "--recalibrate"]) == 0


def one_line(capsys, status, *words):
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


def test_mistakes_are_answered_in_one_line(conditional, inferred, plain, table, tmp_path, capsys):
    frame = table[1]
    capsys.readouterr()
    foreign = tmp_path / "foreign.csv"
    frame.assign(label=frame["label"].replace("cow", "ant")).to_csv(foreign, index=False)
    unlabelled = tmp_path / "unlabelled.csv"
    frame.drop(columns="label").to_csv(unlabelled, index=False)
    out = str(tmp_path / "out.npz")
    animals, plain = str(conditional), str(plain)
    for main, arguments, words in [
        (generate.main, [animals, "--label", "3", "--out", out], ["from 0 to 2", "'3'"]),
        (generate.main, [animals, "--label", "-1", "--out", out], ["'-1'"]),
        (generate.main, [animals, "--label", "yak", "--out", out], ["cat, cow, dog", "'yak'"]),
        (generate.main, [plain, "--label", "3", "--out", out], ["--condition none"]),
        (diagnose.main, [animals, "--label", "ten"], ["'ten'"]),
        (diagnose.main, [plain, "--label", "3"], ["this one has none"]),
        (encode.main, [animals, "--data", str(foreign), "--out", out], ["also has ant"]),
        (encode.main, [animals, "--data", str(unlabelled), "--out", out], ["120 of 120 rows"]),
        (evaluate.main, [animals, "--data", str(unlabelled)], ["the label of each row"]),
        (refit, [str(inferred)], ["labels that are given"]),
        (refit, [animals, "--guide", "full"], ["expects --guide refined"]),
        (train.main, ["--data", str(unlabelled), "--condition", "label"], ["has none"]),
        (train.main, ["--data", str(unlabelled), "--labelled", "5"], ["has none"]),
        (train.main, ["--model", "ae", "--condition", "label"], ["no effect on --model ae"]),
        (train.main, ["--condition", "label", "--labelled", "50"], ["drop --labelled"]),
        (train.main, ["--labelled", "9"], ["expects 10, the number of classes"]),
        (train.main, ["--labelled", "0"], ["at least 1"]),
        (train.main, ["--labelled", "5000"], ["training rows with a label; got 5000"]),
        (train.main, ["--condition", "label", "--prior", "vamp"], ["pseudo-inputs"]),
        (train.main, ["--labelled", "50", "--objective", "iwae"], ["drop --objective"]),
        (train.main, ["--classification-weight", "3"], ["no effect on --condition none"]),
        (train.main, ["--labelled", "50", "--classification-weight", "-3"], ["above 0"]),
    ]:
        one_line(capsys, main(arguments), *words)


def test_a_run_whose_labels_have_changed_is_not_continued(table, tmp_path, capsys):
    _, frame = table
    path = tmp_path / "animals.csv"
    frame.to_csv(path, index=False)
    out = str(tmp_path / "run")
    flags = ["--data", str(path), "--condition", "label", "--out", out]
    assert train.main([*flags, *SMALL]) == 0
    swapped = frame.assign(label=frame["label"].iloc[::-1].to_numpy())
    swapped.to_csv(path, index=False)
    capsys.readouterr()
    one_line(capsys, train.main(["--resume", out, "--epochs", "5"]), "not those that the run")
    one_line(capsys, evaluate.main([out]), "not the data")
