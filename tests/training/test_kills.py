"""Trainings that are killed, at any moment and by any signal, and what is left of them."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import wait_for_epoch
from forks import Forks

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
