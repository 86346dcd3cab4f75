"""Trainings that are killed, at any moment and by any signal, and what is left of them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import wait_for_epoch
from forks import Fork, Forks

from pyro_vae import train
from pyro_vae.training.checkpoint import load_checkpoint

KILLS = 30
EPOCHS = 20
PHASES = ("start", "training", "training", "training", "figures")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIMINGS = ("seconds", "images_per_second")
# Checkpoints so often that a killed training goes on from many places, also within an epoch.
OFTEN = {"pyro_vae.training.run:SAVE_EVERY": 0.05}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "counts.npy"
    np.save(path, np.random.default_rng(0).integers(0, 5, (80, 6)).astype(np.uint8))
    return [
        *("--data", str(path), "--max-value", "16", "--hidden", "8", "--latent-dim", "2"),
        *("--batch-size", "16", "--compile", "off", "--epochs", str(EPOCHS)),
    ]


def result(run: Path) -> dict:
    """The metrics without the timings, and the weights of both checkpoints."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    weights = {}
    for name in ("best.pt", "last.pt"):
        content = torch.load(run / "checkpoints" / name, weights_only=True)
        weights[name] = {k: v.tolist() for k, v in content["weights"].items()}
    return {"metrics": metrics, **weights, "config": (run / "config.json").read_text()}


def log_of(run: Path) -> str:
    return (run.parent / "log").read_text()


def begun(forks: Forks, run: Path, *flags: str, epochs: int = 4000, **options) -> Fork:
    """A long training that has completed two epochs, and saved the first."""
    process = forks.start(
        *("--out", run, *flags, "--epochs", epochs), log=run.parent / "log", **options
    )
    wait_for_epoch(run, 2)
    return process


def wait_for_more(run: Path) -> None:
    """Wait for two epochs more than there are."""
    wait_for_epoch(run, len((run / "metrics.jsonl").read_text().splitlines()) + 2)


def state(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


# --- one process ----------------------------------------------------------------------------------


def test_a_run_in_use_is_left_alone_and_free_after_a_kill(forks, flags, tmp_path, capsys):
    run = tmp_path / "run"
    process = begun(forks, run, *flags)
    process.kill(signal.SIGSTOP)
    before = state(run)
    for command in (["--resume", str(run)], ["--out", str(run), *flags, "--overwrite"]):
        assert train.main([*command, "--epochs", "3"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run} is in use by process {process.pid} on {socket.gethostname()}" in line
    assert state(run) == before
    process.kill(signal.SIGKILL)
    assert process.wait() == -9
    assert (run / ".lock").exists()
    assert len(load_checkpoint(run, "last").history) == 1  # saved though not yet due
    resumed = forks.start("--resume", run, log=tmp_path / "log2")
    wait_for_more(run)
    resumed.kill(signal.SIGTERM)
    assert resumed.wait() == 128 + signal.SIGTERM
    assert not (run / ".lock").exists()


def test_a_hang_up_is_a_request_to_stop(forks, flags, tmp_path):
    run = tmp_path / "run"
    process = begun(forks, run, *flags)
    process.kill(signal.SIGHUP)
    assert process.wait() == 128 + signal.SIGHUP
    assert f"continue with: python -m pyro_vae.train --resume {run}" in log_of(run)
    last = load_checkpoint(run, "last")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(last.history) == len(lines)
    assert last.training["step"] >= 5 * len(lines)  # 64 rows in batches of 16; this one's too


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number, forks, flags, tmp_path):
    """As under nohup, or in the background of a script."""
    run = tmp_path / "run"
    process = begun(forks, run, *flags, ignored=[number])
    process.kill(number)
    wait_for_more(run)
    process.kill(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


# --- two processes --------------------------------------------------------------------------------


def test_a_rank_that_hangs_ends_the_run_with_its_last_step_kept(forks, flags, tmp_path):
    run = tmp_path / "run"
    # The second is in a step or, at the end of an epoch, on its way to the first one.
    module = "pyro_vae.training.distributed"
    short = {f"{module}:STEP_SECONDS": 3, f"{module}:WORK_SECONDS": 30}
    command = ["--out", run, *flags, "--epochs", 4000]
    first, second = forks.ranks(*command, logs=tmp_path, patch=short)
    wait_for_epoch(run, 2)
    second.kill(signal.SIGSTOP)
    started = time.monotonic()
    try:
        assert first.wait() == 1, first.text()
        assert time.monotonic() - started > 2
    finally:
        second.kill(signal.SIGKILL)
    (line,) = [line for line in first.text().splitlines() if "error" in line]
    assert "does not answer" in line
    assert f"continue with the same command and --resume {run}" in line
    assert load_checkpoint(run, "last").training["step"] >= 2 * 5
    assert second.wait() == -9
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_signal_stops_a_rank_whose_fellow_hangs(stuck, forks, flags, tmp_path):
    run = tmp_path / "run"
    short = {"pyro_vae.training.distributed:STOP_SECONDS": 1}
    both = forks.ranks("--out", run, *flags, "--epochs", 4000, logs=tmp_path, patch=short)
    wait_for_epoch(run, 2)
    both[stuck].kill(signal.SIGSTOP)
    time.sleep(0.5)
    other = both[1 - stuck]
    other.kill(signal.SIGTERM)
    try:
        status = other.wait(30)
    finally:
        both[stuck].kill(signal.SIGKILL)
    assert status == 1
    (line,) = [line for line in other.text().splitlines() if "error" in line]
    if stuck == 1:
        assert line.endswith(f"continue with the same command and --resume {run}")
        assert load_checkpoint(run, "last").training["step"] >= 2 * 5
    else:
        assert line == "error: rank 1: another process of this training does not answer"
    assert "Traceback" not in other.text()


def test_a_signal_that_comes_twice_is_one(forks, flags, tmp_path):
    """Ctrl-C reaches a rank from the terminal and from torchrun, perhaps much later."""
    run = tmp_path / "run"
    slow = {"pyro_vae.training.run:SAVE_EVERY": 0}
    both = forks.ranks("--out", run, *flags, "--epochs", 4000, logs=tmp_path, patch=slow)
    wait_for_epoch(run, 2)
    for _ in range(20):
        for process in both:
            process.kill(signal.SIGINT)
        time.sleep(0.002)
    assert [process.wait() for process in both] == [128 + signal.SIGINT, 0], both[0].text()
    assert "error" not in both[0].text() + both[1].text()


def test_ranks_end_when_their_launcher_does(forks, flags, tmp_path):
    run = tmp_path / "run"
    both = forks.ranks("--out", run, *flags, "--epochs", 4000, logs=tmp_path, launched=True)
    wait_for_epoch(run, 2)
    os.kill(both[0].launcher, signal.SIGKILL)
    os.kill(both[1].launcher, signal.SIGKILL)
    assert both[0].wait() == 128 + signal.SIGTERM
    assert both[1].wait() == 0
    assert f"--resume {run}" in both[0].text()
    steps = load_checkpoint(run, "last").training["step"]
    assert steps >= 5 * len((run / "metrics.jsonl").read_text().splitlines())


def test_a_single_process_outlives_its_parent(forks, flags, tmp_path):
    """A shell that is closed, as under nohup."""
    run = tmp_path / "run"
    process = begun(forks, run, *flags, launched=True)
    os.kill(process.launcher, signal.SIGKILL)
    wait_for_more(run)
    process.kill(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


# --- thirty kills ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_thirty_kills_change_no_number(forks, flags, tmp_path):
    """At the start, within --overwrite, in training and while the last figures are drawn.

    The next command is a user's: --resume if the run can be resumed, else the same again.
    """
    draw, run, log = random.Random(15), tmp_path / "run", tmp_path / "log"
    for _ in range(2):  # the first one pays for what is done once
        started = time.monotonic()
        flags_of_whole = ["--out", tmp_path / "whole", "--overwrite", *flags]
        assert forks.start(*flags_of_whole, log=log, patch=OFTEN).wait() == 0
        training = time.monotonic() - started
    expected = result(tmp_path / "whole")

    again, kills = False, []
    while len(kills) < KILLS or again:
        number, phase = SIGNALS[len(kills) % 4], PHASES[len(kills) % len(PHASES)]
        command = ["--resume", run] if again else ["--out", run, "--overwrite", *flags]
        log = tmp_path / f"log{len(kills)}"
        process = forks.start(*command, log=log, pictures=phase == "figures", patch=OFTEN)
        if len(kills) < KILLS:
            if phase == "figures":
                wait_for_epoch(run, EPOCHS)
            longest = {"start": training / 8, "training": training, "figures": 1.0}[phase]
            process.wait_at_most(draw.uniform(0, longest))
            process.kill(number)
        status = process.wait()
        if status in (-number, 128 + number):
            kills.append((phase, number))
        else:
            assert status == 0, process.text()
            assert result(run) == expected
        # A complete run is replaced by the next.
        again = status != 0 and (run / "checkpoints" / "last.pt").is_file()
    assert {phase for phase, _ in kills} == set(PHASES)
    assert not (run / ".lock").exists()
