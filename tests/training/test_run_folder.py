"""The files of a run while it trains."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import example_splits
from operations import killed_before, watched

import pyro_vae
from pyro_vae import Config, FitConfig, InputError, ModelConfig, iterate
from pyro_vae.config import resolve
from pyro_vae.runtime.files import InUse, locked
from pyro_vae.training.checkpoint import load_checkpoint, serialize
from pyro_vae.training.run import RunFolder, asked_settings, claimed, explained, new_folder


def test_the_best_model_is_written_before_the_last_and_never_behind_it(tmp_path):
    """A kill right after a checkpoint must leave the best model of its history."""
    splits = example_splits("binomial", tmp_path, count=100)
    asked = Config(model=ModelConfig(latent_dim=2, hidden=(16,)))
    config = resolve(asked, "binomial", 300)
    vae = pyro_vae.build(config.model, splits)
    folder = RunFolder(tmp_path / "run", asked, config, vae, splits)
    best = 0
    for record in iterate(vae, splits, FitConfig(epochs=6, batch_size=20, learning_rate=1e-2)):
        folder.add(record)
        best = record.epoch if record.is_best else best
        folder.reached(record.state, save=True)
        file = folder.path / "checkpoints" / "best.pt"  # not the folder, where last.pt may serve
        assert load_checkpoint(file).history[-1]["epoch"] == best
        assert load_checkpoint(folder.path, "last").training["epoch"] == record.epoch
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_best_model_is_that_of_its_epoch_and_encoded_when_it_is_written(tmp_path, monkeypatch):
    """Encoding at every better epoch took longer than the epoch, as the history grew."""
    splits = example_splits("binomial", tmp_path, count=100)
    asked = Config(model=ModelConfig(latent_dim=2, hidden=(16,)))
    config = resolve(asked, "binomial", 300)
    vae = pyro_vae.build(config.model, splits)
    encoded: list[int] = []
    monkeypatch.setattr(
        "pyro_vae.training.run.serialize", lambda *args: encoded.append(1) or serialize(*args)
    )
    monkeypatch.setattr("pyro_vae.training.run.SAVE_EVERY", float("inf"))
    with RunFolder(tmp_path / "run", asked, config, vae, splits) as folder:
        for record in iterate(vae, splits, FitConfig(epochs=6, batch_size=20, learning_rate=1e-2)):
            folder.add(record)
            if record.is_best:
                best = record.epoch
                weights = {name: value.clone() for name, value in vae.state_dict().items()}
        assert best > 2  # so that several epochs were better than all before
        with torch.no_grad():
            for value in vae.parameters():  # a later epoch, which is worse
                value.zero_()
        folder.add(replace(record, epoch=7, is_best=False))
    found = load_checkpoint(folder.path / "checkpoints" / "best.pt")
    assert (found.history[-1]["epoch"], len(found.history)) == (best, best)
    for name, value in found.vae.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert (
        len(encoded) == 4
    )  # the new folder; best and last of the first epoch; the best at the end


# --- one process at a time ------------------------------------------------------------------------


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InUse) as error, locked(tmp_path):
            pass
        for part in (str(os.getpid()), socket.gethostname(), time.strftime("%Y-%m-%d"), "wait for"):
            assert part in str(error.value)
        with pytest.raises(InUse), locked(tmp_path):  # the one refused has released nothing
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_what_a_killed_process_leaves_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_text("process 7 on elsewhere, started long ago, a long line indeed")
    with locked(tmp_path):
        with pytest.raises(InUse, match=f"process {os.getpid()} on") as error, locked(tmp_path):
            pass
        assert "long" not in str(error.value)


def test_threads_hold_a_lock_one_at_a_time(tmp_path):
    """Also in the moment in which its owner removes the file."""
    holders, most = [], []

    def work() -> None:
        taken = 0
        while taken < 40:
            with suppress(InUse), locked(tmp_path):
                holders.append(1)
                most.append(len(holders))
                time.sleep(1e-5)
                holders.pop()
                taken += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 160
    assert max(most) == 1


def test_the_lock_of_a_folder_that_has_taken_the_place_stays(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / ".lock").write_text("another's")
    assert (folder / ".lock").read_text() == "another's"
    with locked(folder):  # or the folder is gone
        shutil.rmtree(folder)


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path):
        pass
    monkeypatch.setattr("pyro_vae.runtime.files.fcntl", None)  # as on Windows
    with locked(tmp_path), locked(tmp_path / ""):
        pass

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(
        "pyro_vae.runtime.files.fcntl", SimpleNamespace(flock=broken, LOCK_EX=2, LOCK_NB=4)
    )
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass


# --- the place of a run ---------------------------------------------------------------------------


def opened(out: Path | None = None, overwrite: bool = False, source: Path | None = None) -> Path:
    with new_folder(out, "digits", source, overwrite) as path:
        return path


def test_default_folders_are_numbered_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, found = threading.Barrier(8, timeout=30), []

    def work() -> None:
        start.wait()
        with new_folder(None, "digits", None, False) as path:
            found.append(path)
            start.wait()  # held by all at once
            (path / "config.json").write_text("{}")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["digits", *(f"digits-{k}" for k in range(2, 9))]
    assert sorted(path.name for path in found) == sorted(names)
    assert opened().name == "digits-9"
    assert opened().name == "digits-9"  # empty, it is taken again
    assert opened(overwrite=True).name == "digits"
    with locked(Path("runs/digits")), pytest.raises(InUse):
        opened(overwrite=True)


def test_a_folder_that_is_written_to_in_the_last_moment_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def watcher(event: str, path: Path) -> None:
        if path == Path("runs/digits/.lock") and event == "open":
            Path("runs/digits/notes.txt").write_text("mine")

    with watched(watcher):
        assert opened().name == "digits-2"
    assert [p.name for p in Path("runs/digits").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["plain/", "in two words", "größe 数", "a'b\"c", "-r", "$(x)", "[1]"]
)
def test_names_of_folders(name, tmp_path):
    path = opened(Path(f"{tmp_path}/deep/{name}"))
    assert path.is_dir()
    with locked(path), pytest.raises(InUse):
        opened(Path(f"{tmp_path}/deep/{name}"))


def test_a_link_to_a_folder(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    with new_folder(tmp_path / "link", "x", None, False), pytest.raises(InUse):
        opened(tmp_path / "place")  # by its other name
    (tmp_path / "place" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        opened(tmp_path / "link")


def test_places_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "data").mkdir()
    for out, message in [
        ("file", "is a file"),
        ("file/below", "Not a directory"),
        ("lost", "is a link to a place that does not exist"),
        ("a\nb", r"without control characters; got '.*a\\nb'"),
        ("a\x1b[2Jb", "without control characters"),
        ("a\0b", "without control characters"),
        ("data/run", "lies in the data folder"),
        ("data", "lies in the data folder"),
    ]:
        with pytest.raises(InputError, match=message):
            opened(tmp_path / out, source=tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file", "lost"]
    assert opened(tmp_path / "data-2", source=tmp_path / "data").is_dir()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_places_that_cannot_be_written(code, tmp_path):
    def watcher(event: str, path: Path) -> None:
        if path.is_relative_to(tmp_path):
            raise OSError(code, os.strerror(code), str(path))

    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with watched(watcher), pytest.raises(InputError) as error:
            opened(tmp_path / name)
        assert f"cannot write to the run folder {tmp_path / name}: {os.strerror(code)}" in str(
            error.value
        )


def test_overwrite_removes_the_runs_own_files_only(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, run / "checkpoints", run / "tensorboard", elsewhere):
        folder.mkdir()
    for name in (
        *("metrics.jsonl", "diagnostics.json", "report.html", "checkpoints/best.pt"),
        *("checkpoints/last.pt", "checkpoints/.last.pt.part", "tensorboard/events"),
        *(".metrics.jsonl.part", ".report.html.part", ".diagnostics.json.part"),
    ):
        (run / name).write_text("old")
    (run / "config.json").write_text("{}")
    mine = ["notes.txt", ".hidden", "metrics.jsonl.bak", "last.pt", "report.pdf"]
    for name in mine:
        (run / name).write_text("mine")
    (elsewhere / "picture.png").write_text("mine")
    (run / "figures").symlink_to(elsewhere)
    assert opened(run, overwrite=True) == run
    assert sorted(p.name for p in run.iterdir()) == sorted([*mine, "config.json"])
    assert (elsewhere / "picture.png").read_text() == "mine"
    for text in ("[]", '{"unknown": 1}', "{"):
        (run / "config.json").write_text(text)
        with pytest.raises(InputError, match="replaces runs only"):
            opened(run, overwrite=True)


# --- a kill after each operation ------------------------------------------------------------------


def example_run(tmp_path: Path) -> tuple:
    splits = example_splits("binomial", tmp_path, count=40)
    asked = Config(model=ModelConfig(latent_dim=2, hidden=(4,)), fit=FitConfig(batch_size=16))
    config = resolve(asked, "binomial", len(splits.train))
    return splits, asked, config, pyro_vae.build(config.model, splits)


def test_a_kill_at_any_operation_leaves_a_run_that_goes_on(tmp_path):
    """Every prefix of the operations is taken by --resume, --overwrite or the same command."""
    splits, asked, config, vae = example_run(tmp_path)
    run = tmp_path / "run"
    record = next(iterate(vae, splits, FitConfig(epochs=1, batch_size=16, compile="off")))

    def write(overwrite: bool) -> None:
        with new_folder(run, "x", None, overwrite) as path:
            folder = RunFolder(path, asked, config, vae, splits)
            folder.add(record)

    def begin(overwrite: bool) -> None:
        shutil.rmtree(run, ignore_errors=True)
        if overwrite:
            write(False)
            (run / "notes.txt").write_text("mine")
            (run / "figures" / "elbo.png").write_text("old")
            (run / "report.html").write_text("old")

    for overwrite in (False, True):
        begin(overwrite)
        with killed_before(None, run) as operations:
            write(overwrite)
        assert len(operations) > (30 if overwrite else 15), operations
        if overwrite:  # no other file of the old run goes while it can be resumed
            assert operations[:3] == ["os.mkdir .", "open .lock", "os.remove checkpoints/last.pt"]
        accepted = {"resume": 0, "overwrite": 0, "again": 0}
        for number in range(len(operations) + 1):
            begin(overwrite)
            with killed_before(number, run) as done:
                write(overwrite)
            assert done == operations[:number]
            with suppress(InputError):
                last = load_checkpoint(run, "last")
                if last.history:  # of which best.pt is the best
                    assert load_checkpoint(run / "checkpoints" / "best.pt").history
                with claimed(run):
                    RunFolder(run, asked, config, last.vae, splits, last)
                accepted["resume"] += 1
            begun = run.is_dir() and any(p.name == "config.json" for p in run.iterdir())
            assert opened(run, overwrite=begun) == run
            accepted["overwrite" if begun else "again"] += 1
            assert (run / "notes.txt").exists() == overwrite
        assert min(accepted["resume"], accepted["overwrite"]) >= 7, accepted
        assert accepted["again"] == (0 if overwrite else 5), accepted


def test_a_line_cut_short_is_repaired(tmp_path):
    splits, asked, config, vae = example_run(tmp_path)
    folder = RunFolder(tmp_path / "run", asked, config, vae, splits)
    for record in iterate(vae, splits, FitConfig(epochs=3, batch_size=16, compile="off")):
        folder.add(record)
    folder.save()
    path = folder.path / "metrics.jsonl"
    whole = path.read_text()
    last = load_checkpoint(folder.path, "last")
    for damaged in (whole[:-30], whole + whole[:40], "", whole + "\0" * 100, whole * 2):
        path.write_text(damaged)
        again = RunFolder(folder.path, asked, config, last.vae, splits, last)
        assert path.read_text() == whole
        assert again.saved_epoch == 3
        assert again.history == last.history


# --- config.json ----------------------------------------------------------------------------------


def test_config_json_stays_as_asked_but_for_what_has_changed(tmp_path):
    splits, asked, config, _ = example_run(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asked.to_dict()))
    assert asked.fit.epochs is None
    assert asked != config
    assert asked_settings(file, config, splits) == asked
    longer = replace(config, fit=replace(config.fit, epochs=config.fit.epochs + 1), device="cpu")
    found = asked_settings(file, longer, splits)
    assert found == replace(
        asked, fit=replace(asked.fit, epochs=config.fit.epochs + 1), device="cpu"
    )
    assert found.model.likelihood == "auto"
    moved = replace(config, data=replace(config.data, source="/new", root=Path("/root")))
    found = asked_settings(file, moved, splits)
    assert (found.data.source, found.data.root) == ("/new", Path("/root"))
    assert found.fit == asked.fit
    file.write_text("{")
    assert asked_settings(file, config, splits) == config
    file.unlink()
    assert asked_settings(file, config, splits) == config


# --- a disk that is full --------------------------------------------------------------------------


def test_other_errors_are_not_explained(tmp_path):
    for error in (OSError(5, "x"), OSError(5, "x", "/elsewhere/a"), BrokenPipeError(32, "x")):
        with pytest.raises(OSError, match="x") as found, explained(tmp_path):
            raise error
        assert found.value is error
