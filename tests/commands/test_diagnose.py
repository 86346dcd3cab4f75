"""python -m pyro_vae.diagnose: the table, the files, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from pyro_vae import diagnose, train
from pyro_vae.diagnostics import suite as studies
from pyro_vae.plots import run as figures
from pyro_vae.runtime.files import to_json

NAMES = [
    "importance weights",
    "collapsed latents",
    "predictive check",
    "amortization gap",
    "approximation gap",
    "posterior width",
    "posterior bias",
    "coverage, intervals",
    "coverage, regions",
    "use of the data",
    "log p(x), bounded",
    "means against NUTS",
    "widths against NUTS",
    "aggregate posterior",
    "holes in the prior",
    "local test",
]

DRAWN = ["weights", "latents", "predictive", "gaps", "ranks", "ecdf", "coverage", "recovery"]
DRAWN += ["contraction", "bounds", "nuts", "aggregate", "worst_rows"]


@pytest.fixture(autouse=True)
def _little_effort(monkeypatch):
    """The same studies with few draws: these tests are about the command."""
    little = dataclasses.replace(
        studies.QUICK,
        held_out=20,
        importance_samples=100,
        refined=6,
        refine_steps=20,
        simulations=60,
        annealed=4,
        anneal_steps=10,
        chain_rows=2,
        chain_warmup=5,
        chain_draws=5,
        aggregate=60,
    )
    monkeypatch.setattr(studies, "QUICK", little)


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes most of the time."""
    monkeypatch.setattr(figures, "save", lambda figure, path: None)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_table_and_files(copy, capsys):
    before = {path.name for path in (copy / "figures").iterdir()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert diagnose.main([str(copy), "--quick"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    table = capsys.readouterr().out
    report = json.loads((copy / "diagnostics.json").read_text())
    assert [finding["check"] for finding in report["findings"]] == NAMES
    assert report["complete"] is True
    for finding in report["findings"]:
        assert f"{finding['verdict']:<9} {finding['check']}" in table
        assert finding["low"] <= finding["estimate"] <= finding["high"]
        assert (finding["advice"].split()[0] in table) or finding["verdict"] == "sound"
    assert report["held_out"] == 20
    assert report["details"]["elbo"] < report["details"]["log_evidence"]
    drawn = {path.name for path in (copy / "figures").iterdir()} - before
    assert drawn == {f"diagnose_{name}.png" for name in DRAWN}


@pytest.mark.slow
def test_same_seed_same_numbers(copy, capsys, undrawn):
    results = []
    for seed in ("3", "3", "4"):
        assert diagnose.main([str(copy), "--quick", "--json", "--seed", seed]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert results[0]["findings"] != results[2]["findings"]


@pytest.mark.slow
def test_strict_fails_where_something_is_wrong(copy, capsys, monkeypatch, undrawn):
    status = diagnose.main([str(copy), "--quick", "--strict", "--json"])
    report = json.loads(capsys.readouterr().out)
    wrong = any(finding["verdict"] == "wrong" for finding in report["findings"])
    assert status == int(wrong)
    # a guide that is far too narrow is wrong in any case
    from pyro_vae.models.vae import VAE

    sound = VAE.posterior
    monkeypatch.setattr(
        VAE,
        "posterior",
        lambda self, x: type(q := sound(self, x))(
            type(q.base_dist)(q.mean, q.variance.sqrt() / 20), 1
        ),
    )
    assert diagnose.main([str(copy), "--quick"]) == 0
    assert diagnose.main([str(copy), "--quick", "--strict"]) == 1
    assert "wrong     posterior width" in capsys.readouterr().out


def test_an_interruption_leaves_what_was_done(copy, capsys, monkeypatch, undrawn):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "compare_with_nuts", interrupt)
    assert diagnose.main([str(copy), "--quick"]) == 130
    output = capsys.readouterr()
    assert "interrupted" in output.err
    assert "interrupted: the remaining studies were not run" in output.out
    report = json.loads((copy / "diagnostics.json").read_text())
    assert report["complete"] is False
    assert [finding["check"] for finding in report["findings"]] == NAMES[:11]


def test_other_data(copy, capsys, tmp_path, undrawn):
    import numpy as np
    from sklearn.datasets import load_digits

    path = tmp_path / "mine.npy"
    np.save(path, load_digits().images[:30, None].astype(np.uint8))
    arguments = [str(copy), "--quick", "--json", "--data", str(path)]
    assert diagnose.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["data"] == "mine"
    np.save(path, load_digits().images[:3, None].astype(np.uint8))
    assert diagnose.main(arguments) == 2
    assert "at least 5 held-out rows; mine has 3" in capsys.readouterr().err


def test_mistakes(copy, capsys, tmp_path):
    for arguments, message in (
        ([str(tmp_path / "nothing")], "expected a run folder"),
        ([str(copy / "checkpoints" / "best.pt")], "expected a run folder"),
        ([str(copy), "--data", "nothing"], "nothing"),
        ([str(copy), "--seed", "-1"], "seed"),
        ([str(copy), "--device", "tpu"], "--device expects"),
    ):
        try:
            status = diagnose.main([*arguments, "--quick"])
        except SystemExit as exit:
            status = exit.code
        assert status == 2, arguments
        output = capsys.readouterr()
        assert message in output.err + output.out
        assert "Traceback" not in output.err


def test_an_autoencoder_has_no_posterior(tmp_path, capsys):
    out = tmp_path / "ae"
    assert train.main(["--out", str(out), "--model", "ae", "--epochs", "1"]) == 0
    assert diagnose.main([str(out)]) == 2
    assert "an autoencoder, which has no posterior" in capsys.readouterr().err


def test_quick_is_less_than_full():
    for field in dataclasses.fields(studies.Effort):
        assert getattr(studies.QUICK, field.name) <= getattr(studies.FULL, field.name)


def test_rows_are_taken_from_everywhere(digits):
    """Folders are read class by class: the first rows would be of one class."""
    parts = [studies.random_rows(digits.train, "count", 60, seed) for seed in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])
    everything = next(iter(digits.train.fixed("count", 0, 100_000))).flatten(1)
    first = {tuple(row) for row in everything[:200].tolist()}
    taken = [tuple(row) in first for row in parts[0].flatten(1).tolist()]
    assert sum(taken[:30]) < 20
    assert len(studies.random_rows(digits.test, "count", 10_000, 0)) == len(digits.test)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda(copy, capsys):
    """Every study on the device; the same sizes up to other random draws."""
    assert diagnose.main([str(copy), "--quick", "--json", "--device", "cuda"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in report["findings"]] == NAMES
    assert diagnose.main([str(copy), "--quick", "--json", "--device", "cpu"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert report["details"]["elbo"] == pytest.approx(other["details"]["elbo"], abs=2.0)
    assert report["details"]["latent_kl"] == pytest.approx(other["details"]["latent_kl"], rel=1e-3)


def test_json_has_no_number_that_is_none():
    values = {"a": [1.0, float("nan")], "b": {"c": (float("inf"), 2, "x", True)}}
    assert json.loads(to_json(values)) == {"a": [1.0, None], "b": {"c": [None, 2, "x", True]}}
