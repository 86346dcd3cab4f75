"""Training and its run folder by command: data that move, full disks, threads, config.json."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from operations import watched

from pyro_vae import evaluate, report, train
from pyro_vae.training import distributed
from pyro_vae.training.checkpoint import load_checkpoint
from pyro_vae.training.run import RunFolder

SMALL = ["--hidden", "8", "--latent-dim", "2", "--batch-size", "16", "--max-value", "16"]

CONSTANT = ["--schedule", "constant"]
SUMMARIZE = train._summarize


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(train, "_summarize", lambda run: None)
    monkeypatch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)


def counts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9, (60, 6)).astype(np.uint8)


def trained(folder: Path, *flags: str, epochs: int = 2, data: str = "x.npy") -> Path:
    np.save(folder / data, counts())
    run = folder / "run"
    command = ["--data", str(folder / data), "--out", str(run), *SMALL, *flags]
    assert train.main([*command, "--epochs", str(epochs)]) == 0
    return run


def state(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
        for line in lines
    ]


def settings(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def refused(main: Callable, command: list[str], message: str, capsys) -> None:
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# --- config.json and data that move ---------------------------------------------------------------


def test_config_json_holds_what_was_asked_for_also_after_resume(tmp_path):
    run = trained(tmp_path, "--patience", "50", "--learning-rate-warmup", "0", *CONSTANT)
    before = (run / "config.json").read_bytes()
    asked = settings(run)
    assert asked["model"]["likelihood"] == "auto"
    assert asked["fit"]["patience"] == 50
    assert asked["data"]["source"] == str(tmp_path / "x.npy")
    assert train.main(["--resume", str(run)]) == 0
    assert (run / "config.json").read_bytes() == before
    longer = ["--epochs", "3", "--patience", "60", "--device", "cpu"]
    assert train.main(["--resume", str(run), *longer]) == 0
    asked["fit"].update(epochs=3, patience=60)
    assert settings(run) == {**asked, "device": "cpu"}
    assert load_checkpoint(run, "last").config.model.likelihood == "binomial"
    # Also where it was killed at once: the checkpoint has the new settings before the first step.
    assert len(load_checkpoint(run, "last").history) == 3
    assert train.main(["--config", str(run / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again") == metrics(run)


def test_new_settings_of_a_resumed_run_are_kept_at_once(tmp_path, monkeypatch):
    run = trained(tmp_path)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.training.loop._epoch", killed)
    assert train.main(["--resume", str(run), "--epochs", "7"]) == 130
    last = load_checkpoint(run, "last")
    assert last.config.fit.epochs == settings(run)["fit"]["epochs"] == 7
    assert last.training["epoch"] == len(last.history) == 2


def test_data_that_have_moved(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path, epochs=1)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    assert train.main(["--resume", str(whole), "--epochs", "3"]) == 0
    (tmp_path / "x.npy").rename(tmp_path / "moved.npy")
    np.save(tmp_path / "other.npy", counts(1))
    monkeypatch.chdir(tmp_path)
    before = state(run)
    resume = ["--resume", str(run), "--epochs", "3"]
    refused(train.main, resume, f"data are not at {tmp_path / 'x.npy'}", capsys)
    refused(train.main, resume, "If they have moved, give their new place by --data", capsys)
    refused(train.main, [*resume, "--data", "nowhere.npy"], "no such path exists", capsys)
    wrong = f"the data {tmp_path / 'other.npy'} are not those that the run began with"
    refused(train.main, [*resume, "--data", "other.npy"], wrong, capsys)
    refused(
        train.main, [*resume, "--data", "digits"], "the model expects rows of shape (6,)", capsys
    )
    refused(train.main, [*resume, "--max-value", "99"], "own settings; only", capsys)
    assert state(run) == before

    assert train.main([*resume, "--data", "moved.npy"]) == 0
    assert metrics(run) == metrics(whole)
    for name in ("best", "last"):
        config = load_checkpoint(run, name).config
        assert config.data.source == str(tmp_path / "moved.npy")
        weights = [load_checkpoint(r, name).vae.state_dict() for r in (run, whole)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert settings(run)["data"]["source"] == str(tmp_path / "moved.npy")
    assert settings(run)["model"]["likelihood"] == "auto"
    assert evaluate.main([str(run), "--num-samples", "2", "--num-images", "3"]) == 0


def test_the_best_model_of_moved_data_is_the_same(tmp_path):
    """A resumed run that finds no better one."""
    run = trained(tmp_path)
    file = run / "checkpoints" / "best.pt"
    earlier = file.read_bytes()
    assert train.main(["--resume", str(run), "--epochs", "4"]) == 0
    file.write_bytes(earlier)  # as if epochs 3 and 4 had been worse
    best = load_checkpoint(run)
    assert len(best.history) == 2
    (tmp_path / "x.npy").rename(tmp_path / "moved.npy")
    command = ["--resume", str(run), "--data", str(tmp_path / "moved.npy")]
    assert train.main([*command, "--data-root", str(tmp_path)]) == 0
    moved = load_checkpoint(run)
    assert moved.history == best.history
    assert moved.config.data.source == str(tmp_path / "moved.npy")
    assert moved.config.data.root == tmp_path
    assert moved.config.fit == best.config.fit
    first, second = best.vae.state_dict(), moved.vae.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_report_on_data_that_have_moved(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path, epochs=1)
    (tmp_path / "x.npy").rename(tmp_path / "moved.npy")
    np.save(tmp_path / "other.npy", counts(1))
    monkeypatch.chdir(tmp_path)
    refused(report.main, [str(run)], "give their new place by --data", capsys)
    refused(report.main, [str(run), "--data", "other.npy"], "are not the data that", capsys)
    seen = []

    def overview(path, checkpoint, splits, codes, count):
        same = splits.fingerprint == checkpoint.fingerprint
        seen.append((path, same, len(splits.train), count))

    monkeypatch.setattr("pyro_vae.page.summary.overview", overview)
    monkeypatch.setattr("pyro_vae.page.write.write_page", lambda out, *_: seen.append(out))
    assert report.main([str(run), "--data", "moved.npy", "--out", "a.html"]) == 0
    assert seen == [(run, True, 49, 1), Path("a.html")]
    seen.clear()
    assert report.main([str(run), str(run), "--data", "moved.npy"]) == 0
    assert seen == [(run, True, 49, 2), (run, True, 49, 2), Path("comparison.html")]


def test_the_root_of_a_reports_data(tmp_path, monkeypatch):
    run = trained(tmp_path, epochs=1)
    seen = []

    class Seen(Exception):
        pass

    def load(checkpoint, source, root):
        seen.append((checkpoint.path, source, root))
        raise Seen

    monkeypatch.setattr(report, "load_run_data", load)
    for flags, root in (([], None), (["--data-root", "sets"], Path("sets"))):
        with pytest.raises(Seen):
            report.main([str(run), *flags])
        assert seen.pop() == (run / "checkpoints" / "best.pt", None, root)


# --- files that cannot be written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("config.json", errno.ENOSPC),
        ("metrics.jsonl", errno.EDQUOT),
        ("checkpoints/last.pt", errno.EROFS),
        ("checkpoints/best.pt", errno.EACCES),
        ("figures", errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_that_cannot_be_written_is_named(name, code, resumed, tmp_path, capsys):
    if name == "figures" and resumed:
        pytest.skip("the folder exists")
    run, final = tmp_path / "run", tmp_path / "run" / name
    np.save(tmp_path / "x.npy", counts())
    command = ["--data", str(tmp_path / "x.npy"), "--out", str(run), *SMALL, "--epochs", "2"]
    if resumed:
        assert train.main(command) == 0
        command = ["--resume", str(run), "--epochs", "30"]
        command += ["--learning-rate-warmup", "0.05"]  # its own

    def watcher(event: str, path: Path) -> None:
        if path in (final, final.with_name(f".{final.name}.part")):
            raise OSError(code, os.strerror(code), str(path))

    with watched(watcher):
        refused(train.main, command, f"cannot write {final}: {os.strerror(code)}.", capsys)
    begun = (run / "checkpoints" / "last.pt").exists()
    assert begun == (resumed or name == "checkpoints/best.pt")
    with watched(watcher):
        again = f"then continue with --resume {run}" if begun else "then start the training again"
        if not resumed and not begun:
            command.append("--overwrite")
        elif not resumed:
            command = ["--resume", str(run)]
        refused(train.main, command, again, capsys)
    assert train.main(command) == 0  # there is space again
    assert [line["epoch"] for line in metrics(run)] == list(range(1, len(metrics(run)) + 1))


def test_a_disk_that_is_full_in_the_middle(tmp_path, monkeypatch, capsys):
    """A write that fails, rather than the opening of the file. What was cut short is repaired."""
    whole = trained(tmp_path, epochs=4)
    run = tmp_path / "part run"
    add = RunFolder.add

    def full(self, record):
        if record.epoch == 3:
            (self.path / "metrics.jsonl").rename(tmp_path / "kept")
            (self.path / "metrics.jsonl").symlink_to("/dev/full")
        return add(self, record)

    monkeypatch.setattr(RunFolder, "add", full)
    command = ["--data", str(tmp_path / "x.npy"), "--out", str(run), *SMALL, "--epochs", "4"]
    message = f"cannot write {run / 'metrics.jsonl'}: {os.strerror(errno.ENOSPC)}. Free space"
    refused(train.main, command, message, capsys)
    monkeypatch.undo()
    monkeypatch.setattr(train, "_summarize", lambda run: None)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").write_text((tmp_path / "kept").read_text()[:-20])
    assert train.main(["--resume", str(run)]) == 0
    assert metrics(run) == metrics(whole)


def test_a_folder_that_is_removed_meanwhile(tmp_path, monkeypatch, capsys):
    add = RunFolder.add

    def removed(self, record):
        shutil.rmtree(self.path)
        return add(self, record)

    monkeypatch.setattr(RunFolder, "add", removed)
    np.save(tmp_path / "x.npy", counts())
    command = ["--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *SMALL]
    command += ["--epochs", "2"]
    refused(train.main, command, "metrics.jsonl: No such file or directory", capsys)
    refused(train.main, command, "then start the training again", capsys)


def test_figures_and_page_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def full(run):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.path / "report.html"))

    monkeypatch.setattr(train, "_summarize", full)
    np.save(tmp_path / "x.npy", counts())
    run = tmp_path / "in two words"
    command = ["--data", str(tmp_path / "x.npy"), "--out", str(run), *SMALL, "--epochs", "1"]
    refused(train.main, command, f"cannot write {run / 'report.html'}: No space left", capsys)
    assert not (run / ".lock").exists()
    refused(train.main, ["--resume", str(run)], f"continue with --resume '{run}'", capsys)


def test_a_run_that_cannot_be_written_is_not_resumed(tmp_path, capsys):
    run = trained(tmp_path)

    def watcher(event: str, path: Path) -> None:
        if path == run / ".lock":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with watched(watcher):
        message = f"cannot write to the run folder {run}: Read-only"
        refused(train.main, ["--resume", str(run)], message, capsys)
    refused(train.main, ["--resume", str(tmp_path / "none")], "expected a run folder", capsys)
    refused(train.main, ["--resume", str(tmp_path)], "holds no checkpoints/last.pt", capsys)
    assert not (tmp_path / ".lock").exists()


# --- threads and processes ------------------------------------------------------------------------


def test_training_in_a_thread(tmp_path):
    """Where no handlers of signals can be set."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    found = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path)))
    thread.start()
    thread.join()
    assert found == [tmp_path / "run"]
    assert len(metrics(found[0])) == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step_and_a_second_at_once(number, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(number)
    add, steps = RunFolder.add, []

    def signalled(self, record):
        steps.append(record.step)
        signal.raise_signal(number)
        return add(self, record)

    monkeypatch.setattr(RunFolder, "add", signalled)
    np.save(tmp_path / "x.npy", counts())
    run = tmp_path / "run"
    command = ["--data", str(tmp_path / "x.npy"), "--out", str(run), *SMALL, "--epochs", "9"]
    assert train.main(command) == 128 + number
    assert signal.getsignal(number) == before
    assert f"--resume {run}" in capsys.readouterr().out
    assert load_checkpoint(run, "last").training["step"] == steps[0] + 1

    def twice(self, record):
        signal.raise_signal(number)
        signal.raise_signal(number)
        raise AssertionError("the second is not heard")

    monkeypatch.setattr(RunFolder, "add", twice)
    assert train.main(["--resume", str(run)]) == 130
    assert signal.getsignal(number) == before
    monkeypatch.setattr(RunFolder, "add", add)
    assert train.main(["--resume", str(run)]) == 0
    assert len(metrics(run)) == 9


def test_processes_that_resume_another_state_are_refused(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path)
    monkeypatch.setattr(distributed, "agree", lambda value: (value[0], value[1][:-1]))
    refused(train.main, ["--resume", str(run)], "not the same for all processes", capsys)


# --- other flags ----------------------------------------------------------------------------------


def test_tensorboard_has_the_lines_of_the_metrics(tmp_path, monkeypatch):
    events, folders = [], []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            folders.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *error: object) -> None:
            events.append("closed")

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            events.append((name, value, epoch))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = trained(tmp_path, "--tensorboard")
    assert folders == [str(run / "tensorboard")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (name, value, line["epoch"])
        for line in lines
        for name, value in line.items()
        if name not in ("epoch", "step")
    ]
    assert events == [*expected, "closed"]
    assert len(expected) == 18


def test_what_is_printed_of_each_epoch(tmp_path, capsys):
    run = trained(tmp_path, epochs=45)
    out = capsys.readouterr().out
    shown = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in shown] == [f"{e}/45" for e in (1, *range(2, 46, 2))]
    line = metrics(run)[43]
    terms = "  ".join(
        f"{n} {line[n]:.2f}" for n in ("train_elbo", "validation_elbo", "reconstruction", "kl")
    )
    assert shown[-1] == f"epoch 44/45  {terms}"


def test_the_summary_is_of_the_best_epoch_and_names_the_last(tmp_path, monkeypatch, capsys):
    """Figures and page take the best model; only the last reconstructions are the last one's."""
    run = trained(tmp_path)
    file = run / "checkpoints" / "best.pt"
    earlier = file.read_bytes()
    assert train.main(["--resume", str(run), "--epochs", "4"]) == 0
    file.write_bytes(earlier)  # as if epochs 3 and 4 had been worse
    best, last = (load_checkpoint(run, name).vae.state_dict() for name in ("best", "last"))
    drawn = {}

    def note(name: str, vae, *rest: object) -> None:
        drawn[name] = (vae.state_dict(), rest)

    gallery = "pyro_vae.plots.from_model."
    monkeypatch.setattr(gallery + "draw_reconstructions", lambda *a: note(a[3], a[0], a[4]))
    monkeypatch.setattr("pyro_vae.page.write.draw_run", lambda *a: note("run", a[0], len(a[2])))
    monkeypatch.setattr(
        "pyro_vae.page.write.write_report",
        lambda run, checkpoint, *rest: note("page", checkpoint.vae, len(checkpoint.history)),
    )
    monkeypatch.setattr(train, "_summarize", SUMMARIZE)
    capsys.readouterr()
    assert train.main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "best epoch 2 of 4" in out
    line = metrics(run)[1]
    assert (
        f"validation: ELBO {line['validation_elbo']:.2f}, reconstruction "
        f"{line['validation_reconstruction']:.2f}, KL {line['validation_kl']:.2f}" in out
    )
    for name, weights, rest in [
        ("reconstructions_last_epoch", last, (4,)),
        ("run", best, (4,)),
        ("page", best, (2,)),
    ]:
        assert drawn[name][1] == rest
        assert all(torch.equal(drawn[name][0][key], weights[key]) for key in weights)
    assert not all(torch.equal(best[key], last[key]) for key in best)
