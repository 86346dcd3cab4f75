"""The command tune: its files, its flags, interruptions, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from conftest import example_values, wait_for_epoch

from pyro_vae import evaluate, report, train, tune
from pyro_vae.training import run as run_folder
from pyro_vae.training.run import RunFolder

pytest.importorskip("optuna", reason="needs pip install '.[tune]'")

SPACE = """
latent_dim = { low = 1, high = 4 }
learning_rate = { low = 1e-3, high = 1e-1, log = true }
"""
FLAGS = ["--hidden", "8", "--batch-size", "32", "--max-value", "16", "--seed", "3"]


@pytest.fixture
def start(tmp_path, monkeypatch) -> list[str]:
    """The flags of a search on 60 rows, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)
    np.save("x.npy", example_values("binomial", 60))
    Path("space.toml").write_text(SPACE)
    return ["--data", "x.npy", "--space", "space.toml", "--epochs", "2", *FLAGS]


def results(folder: str = "search") -> dict[str, Any]:
    return json.loads((Path(folder) / "results.json").read_text())


def course(folder: str) -> list[tuple]:
    trials = results(folder)["trials"]
    return [(t["state"], t["elbos"], t["settings"]) for t in trials if t["state"] != "interrupted"]


def lines(run: Path) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
        for line in parsed
    ]


def refused(line: list[str], message: str, capsys) -> None:
    capsys.readouterr()
    assert tune.main(line) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error


def test_a_search_is_complete_and_its_best_run_is_one(start, capsys, monkeypatch):
    monkeypatch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)
    monkeypatch.setattr(train, "_summarize", lambda run: None)
    assert tune.main([*start, "--trials", "4", "--out", "search"]) == 0
    out = capsys.readouterr().out
    folder, best = Path("search"), results()["best"]
    names = {"search.json", "journal.log", "results.json", "best", "trials", "figures"}
    assert {path.name for path in folder.iterdir()} == names
    for name in ("history", "settings", "curves"):
        assert matplotlib.image.imread(folder / "figures" / f"{name}.png").std() > 0.02
    trials = results()["trials"]
    assert best["elbo"] == max(trial["elbo"] for trial in trials if trial["state"] == "complete")
    assert best["elbo"] == max(line["validation_elbo"] for line in lines(folder / "best"))
    for text in (
        "data   x: 49 training, 5 validation rows of 1x4x5; the test rows are left out",
        "space  latent_dim     1 to 4\n       learning_rate  0.001 to 0.1, logarithmic",
        "done   4 complete trials",
        "4 trials were compared on the same 5 validation rows, so the highest ELBO",
        "next   python -m pyro_vae.evaluate search/best",
        f"{best['elbo']:.2f}   latent_dim {best['settings']['latent_dim']}, learning_rate",
    ):
        assert text in out
    assert evaluate.main(["search/best", "--num-samples", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 6, "the test split"
    assert report.main(["search/best"]) == 0
    again = ["--config", "search/best/config.json", "--refit", "off", "--out", "again"]
    assert train.main(again) == 0
    assert lines(Path("again")) == lines(folder / "best")
    assert train.main(["--resume", "search/best", "--epochs", "3"]) == 0


def test_the_flags_are_those_of_all_trials(start, monkeypatch):
    seen = []
    plain = RunFolder.__init__

    def watched(self: Any, path: Path, asked: Any, *rest: Any) -> None:
        seen.append(asked)
        plain(self, path, asked, *rest)

    monkeypatch.setattr(RunFolder, "__init__", watched)
    beside = ["--kl-warmup", "0.5", "--activation", "ReLU", "--trials", "3", "--out", "search"]
    assert tune.main([*start, *beside]) == 0
    assert len(seen) == 3
    for config in seen:
        assert (config.fit.epochs, config.fit.kl_warmup, config.seed) == (2, 0.5, 3)
        assert (config.model.activation, config.model.hidden) == ("ReLU", (8,))
        assert Path(config.data.source) == Path("x.npy").absolute()
    assert len({config.fit.learning_rate for config in seen}) == 3


def test_epochs_do_not_depend_on_a_searched_batch_size(start, monkeypatch):
    searches = []
    monkeypatch.setattr(tune, "_run", lambda folder, search, *rest: searches.append(search) or 0)
    Path("space.toml").write_text("batch_size = { choices = [8, 16] }")
    line = [part for part in start if part not in ("--epochs", "2", "--batch-size", "32")]
    assert tune.main([*line, "--out", "search"]) == 0
    assert searches[0].base.fit.epochs == 2500  # one step each with the default batch
    assert searches[0].num_trials == 30


def test_the_default_space_leaves_out_what_is_given(start, monkeypatch):
    searches = []
    monkeypatch.setattr(tune, "_run", lambda folder, search, *rest: searches.append(search) or 0)
    line = [part for part in start if part not in ("--space", "space.toml")]
    for beside, names in [
        ([], ["latent_dim", "learning_rate"]),
        (["--latent-dim", "20"], ["learning_rate"]),
        (["--learning_rate=2e-3"], ["latent_dim"]),
    ]:
        assert tune.main([*line, *beside, "--out", f"search{len(searches)}"]) == 0
        assert list(searches[-1].space) == names
    assert searches[0].space["latent_dim"]["high"] == 20, "of 20 values"


def test_a_search_that_is_interrupted_ends_cleanly_and_continues(start, capsys, monkeypatch):
    assert tune.main([*start, "--trials", "4", "--out", "whole"]) == 0
    add, count = RunFolder.add, []

    def interrupting(self: Any, record: Any) -> Any:
        count.append(record)
        if len(count) == 3:  # the first epoch of the second trial
            signal.raise_signal(signal.SIGINT)
        return add(self, record)

    monkeypatch.setattr(RunFolder, "add", interrupting)
    capsys.readouterr()
    assert tune.main([*start, "--trials", "4", "--out", "search"]) == 130
    out = capsys.readouterr().out
    assert "stopped; continue with: python -m pyro_vae.tune --resume search" in out
    assert "next   python -m pyro_vae.evaluate search/best" in out, "the best so far"
    assert [trial["state"] for trial in results()["trials"]] == ["complete", "interrupted"]
    assert results()["best"]["number"] == 0
    assert tune.main(["--resume", "search", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == results()
    assert "trial 2" in captured.err
    assert course("search") == course("whole")
    assert tune.main(["--resume", "search", "--trials", "5"]) == 0
    assert course("search")[:4] == course("whole")
    assert len(course("search")) == 5
    assert json.loads(Path("search/search.json").read_text())["num_trials"] == 5


def test_figures_show_the_values_of_the_trials(start, monkeypatch):
    from pyro_vae.plots import search as figures

    drawn = {}
    for name in ("history", "settings", "curves"):
        plain = getattr(figures, f"search_{name}")

        def watched(*given: Any, name: str = name, plain: Any = plain) -> Any:
            drawn[name] = given
            return plain(*given)

        monkeypatch.setattr(figures, f"search_{name}", watched)
    Path("space.toml").write_text(SPACE + 'guide = { choices = ["full", "diagonal"] }')
    assert tune.main([*start, "--trials", "3", "--out", "search"]) == 0
    trials = results()["trials"]
    elbos, complete = [t["elbo"] for t in trials], [True] * 3
    assert drawn["history"] == ([0, 1, 2], elbos, complete, "image")
    assert [list(curve) for curve in drawn["curves"][0]] == [t["elbos"] for t in trials]
    columns, choices, log, *rest = drawn["settings"]
    assert columns["latent_dim"] == [t["settings"]["latent_dim"] for t in trials]
    assert columns["guide"] == [t["settings"]["guide"]["family"] for t in trials]
    assert (choices, log) == ({"guide": ["full", "diagonal"]}, ["learning_rate"])
    assert rest == [elbos, complete, "image"]


def test_a_model_that_cannot_be_built_is_refused_before_the_search(start, capsys):
    Path("space.toml").write_text('activation = { choices = ["SiLU", "SiLUU"] }')
    refused([*start, "--out", "search"], "activation = SiLUU: ", capsys)
    assert not Path("search").exists()


def test_a_full_disk_is_reported_and_the_search_continues(start, capsys, monkeypatch):
    write = run_folder.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == "best.pt" and path.parts[-3] == "1":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(run_folder, "write_atomically", full)
    out = ["--trials", "3", "--out", "search"]
    refused([*start, *out], "best.pt: No space left on device. Free space or restore", capsys)
    monkeypatch.setattr(run_folder, "write_atomically", write)
    assert tune.main(["--resume", "search"]) == 0
    assert len(course("search")) == 3


def test_a_search_without_a_complete_trial_is_an_error(start, capsys):
    Path("space.toml").write_text("learning_rate = { low = 1e30, high = 1e31 }")
    refused([*start, "--trials", "2", "--out", "search"], "no trial is complete: trial 0: ", capsys)
    assert {trial["state"] for trial in results()["trials"]} == {"failed"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--space none.toml", "--space: cannot read none.toml"),
        ("--latent-dim 3", "--latent-dim is given, and searched in --space space.toml; drop one"),
        ("--trials 0", "--trials expects an integer of at least 1; got 0"),
        ("--workers 0", "--workers expects an integer of at least 1; got 0"),
        ("--model ae", "--model ae has no ELBO to compare trials by"),
        ("--data none.npy", "none.npy"),
        ("--batch-size 55", "--batch-size 55 is larger than the training set"),
        ("--preset mnist --config c", "--config and --preset both give the settings"),
        ("--tensorboard", "Unrecognized"),
        ("--out x.npy", "--out expects a folder; x.npy is a file"),
        ("--out full", "--out full exists and is not empty; continue it by --resume full"),
        ("--out full --overwrite", "--overwrite replaces searches only, not full: --resume"),
        ("--device cuda:99", "--device expects auto or one of cpu"),
    ],
)
def test_mistakes_have_one_line(start, flags, message, capsys):
    Path("full").mkdir()
    Path("full/config.json").write_text("{}")
    refused([*start, "--out", "search", *flags.split()], message, capsys)
    assert not Path("search").exists()
    assert os.listdir("full") == ["config.json"]


def test_mistakes_with_resume(start, capsys):
    assert tune.main([*start, "--trials", "1", "--out", "search"]) == 0
    kept = {path: path.read_bytes() for path in Path("search").rglob("*") if path.is_file()}
    for line, message in [
        (["--resume", "none"], "--resume expects the folder of a search; got none"),
        (["--resume", "."], "--resume: cannot read search.json"),
        (["--resume", "search", "--epochs", "3"], "may be changed: drop --epochs"),
        (["--resume", "search", "--latent-dim=3"], "may be changed: drop --latent-dim"),
        (["--resume", "search", "--space", "space.toml"], "drop --space"),
    ]:
        refused(line, message, capsys)
    np.save("x.npy", example_values("binomial", 60)[::-1])
    refused(["--resume", "search"], "are not those that the search began with", capsys)
    Path("x.npy").unlink()
    refused(["--resume", "search"], "no such path exists", capsys)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_search_is_replaced_by_overwrite_only(start, capsys):
    assert tune.main([*start, "--trials", "2", "--out", "search"]) == 0
    before = results()
    refused([*start, "--out", "search"], "replace it by --overwrite", capsys)
    refused([*start, "--out", "search", "--overwrite", "--latent-dim", "1"], "is given", capsys)
    assert results() == before
    again = ["--trials", "1", "--seed", "4", "--out", "search", "--overwrite"]
    assert tune.main([*start, *again]) == 0
    assert len(results()["trials"]) == 1
    assert results()["trials"][0]["elbo"] != before["trials"][0]["elbo"]


def test_a_missing_package_is_named_before_the_work(start, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused([*start, "--out", "search"], "pip install 'pyro-vae[tune]'", capsys)
    assert not Path("search").exists()


def test_presets_and_configs_are_the_base(start, monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "_prepared", lambda asked, *rest: seen.append(asked) or _stop())
    Path("c.json").write_text('{"model": {"hidden": [5]}, "fit": {"epochs": 7}}')
    for beside in (["--config", "c.json"], ["--preset", "mnist"]):
        with pytest.raises(InterruptedError):
            tune._main([*beside, "--seed", "9"])
    assert [(c.model.hidden, c.fit.epochs, c.seed) for c in seen] == [
        ((5,), 7, 9),
        ((500, 500), 72, 9),
    ]


def _stop() -> None:
    raise InterruptedError


@pytest.mark.slow
def test_worker_processes(start):
    """Two at a time; one is killed; the search continues; the first one is killed."""
    command = [sys.executable, "-m", "pyro_vae.tune"]
    line = [*command, *start, "--trials", "3", "--workers", "2", "--out", "search"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tune.main([*start, "--trials", "1", "--out", "alone"]) == 0
    first = [results(name)["trials"][0] for name in ("search", "alone")]
    assert first[0]["elbos"] == first[1]["elbos"], "trial 0 is the same here and there"
    assert len(results()["trials"]) == 3
    # At 10,000 epochs, none ends by itself.
    long = [part if part != "2" else "10000" for part in start]
    line = [*command, *long, "--trials", "5", "--workers", "2", "--out", "long"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_trials(0, 1)
    workers = _children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the worker process of trial" in error
    assert "--resume long" in error
    line = [*command, "--resume", "long"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_trials(2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped; continue with" in out


def _wait_for_trials(*numbers: int) -> None:
    """Wait until these trials have completed an epoch."""
    for number in numbers:
        wait_for_epoch(Path("long/trials", str(number)), 1)


def _children(pid: int) -> list[int]:
    """Worker processes of a search."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (path / "stat").read_text(), (path / "cmdline").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid and "spawn_main" in command:
            found.append(int(path.name))
    return found
