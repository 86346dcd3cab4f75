"""Who competes in `speed.py`, and the process in which each of them runs.

A contender is made from a `Job`, runs one epoch when told to, and gives its weights as arrays. All
of them train the same network from the same weights, `Job.weights`, by name:

    x (B, 784) → (x - mean) / std → encoder.0 → softplus → encoder.2 → means and log sds of q(z|x)
    z (B, 50)  → decoder.0 → softplus → decoder.2 → logits of p(x|z)

The libraries are imported in the process that needs them, so none disturbs another.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyro_vae.cli import share_cores

LATENTS, HIDDEN, LEARNING_RATE = 50, 400, 1e-3

Weights = dict[str, np.ndarray]

# Name → module, class and what it is. Those in torch take a precision: name@medium, name@bf16.
CONTENDERS = {
    "ours": ("in_torch", "Ours", "pyro_vae.fit, compile on"),
    "ours-eager": ("in_torch", "OursEager", "pyro_vae.fit, compile off"),
    "pyro": ("in_torch", "InPyro", "Pyro's SVI as in its VAE tutorial; RenyiELBO for particles"),
    "pyro-jit": ("in_torch", "InPyroJit", "the same with JitTrace_ELBO"),
    "torch": ("in_torch", "InTorch", "a loop by hand, with fused Adam"),
    "torch-compile": ("in_torch", "InTorchCompiled", "the same, its loss under torch.compile"),
    "numpyro": ("in_jax", "InNumPyro", "NumPyro's SVI, the epoch one jitted scan"),
    "floor": ("in_torch", "Floor", "the matrix products of forward and backward alone"),
    "data": ("in_torch", "OursData", "pyro_vae's shuffling, gathering and binarizing alone"),
    "evidence": ("in_torch", "Evidence", "pyro_vae.log_evidence"),
    "evidence-floor": ("in_torch", "EvidenceFloor", "its decoder's matrix products alone"),
}


@dataclass(frozen=True)
class Job:
    """What a contender has to do.

    Attributes:
        contender: name, or name@precision.
        data: .npz of x_train (N + 1, 1, 28, 28) and x_test, uint8. The last row but N is
            pyro_vae's validation split.
        weights: .npz of the initial weights; does not exist yet for who makes them.
        batch_size, particles: of a step; for evidence the number of images and of samples.
        epochs: how many there will be, the first one included.
        threads: of each process.
        device: cpu or cuda.
    """

    contender: str
    data: Path
    weights: Path
    batch_size: int
    particles: int
    epochs: int
    threads: int
    device: str

    @property
    def name(self) -> str:
        return self.contender.partition("@")[0]

    @property
    def precision(self) -> str:
        return self.contender.partition("@")[2] or "highest"

    def images(self) -> np.ndarray:
        """(N, 784), float32, grey in [0, 1]."""
        with np.load(self.data) as arrays:
            grey = arrays["x_train"][:-1]
        return grey.reshape(len(grey), -1).astype(np.float32) / 255

    def initial(self) -> Weights:
        with np.load(self.weights) as arrays:
            return dict(arrays)


class Contender(Protocol):
    def __init__(self, job: Job) -> None: ...

    def epoch(self) -> None:
        """One pass; returns when all is computed."""

    def weights(self) -> Weights | None:
        """As they are now; None where nothing is trained."""


def work(connection: Connection, job: Job, cache: Path) -> None:
    """A process: makes its contender, then does what it is told, one answer a command.

    Answers are (seconds, CPU seconds since the last answer), weights, or the text of an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(job.threads)
    if job.name.startswith(("ours", "evidence")):
        share_cores()  # as the commands do
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # nobody finds what another has compiled
    if hasattr(os, "sched_setaffinity"):  # all that XLA goes by
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    try:
        module, kind, _ = CONTENDERS[job.name]
        contender: Contender = getattr(importlib.import_module(module), kind)(job)
        connection.send(None)
        rested = time.process_time()
        while (command := connection.recv()) != "end":
            idle = time.process_time() - rested
            answer: Any
            if command == "epoch":
                started = time.perf_counter()
                contender.epoch()
                answer = time.perf_counter() - started, idle
            else:
                answer = contender.weights()
            connection.send(answer)
            rested = time.process_time()
    except EOFError:
        pass
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        connection.send(f"{type(error).__name__}: {text.splitlines()[0]}")
