"""Threads and modes of the caller: the same numbers as without, to the last bit.

Pyro's parameter store and handlers, torch's generator and default settings belong to the process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import example_splits

import pyro_vae
from pyro_vae import FitConfig, InputError
from pyro_vae.evidence.evaluation import evaluate
from pyro_vae.runtime.randomness import random_states, usual_settings
from pyro_vae.training import modes
from pyro_vae.training.checkpoint import load_checkpoint, serialize
from pyro_vae.training.loop import fit, iterate

TIMINGS = ("seconds", "images_per_second")
CPU = torch.device("cpu")
SLOW = pytest.mark.slow


MODEL = pyro_vae.ModelConfig(latent_dim=2, hidden=(8,), likelihood="bernoulli")


def small(tmp_path):
    splits = example_splits("bernoulli", tmp_path, count=100)
    return pyro_vae.build(MODEL, splits), splits


def outcome(vae, records) -> dict[str, Any]:
    """All numbers of a training."""
    lines = [record.metrics() for record in records]
    values = {f"{k} {i}": v for i, line in enumerate(lines) for k, v in line.items()}
    values = {k: v for k, v in values.items() if k.split()[0] not in TIMINGS}
    return values | {k: v.tolist() for k, v in vae.state_dict().items()}


def training(tmp_path, compile: str = "off", **settings) -> Callable[[], dict[str, Any]]:
    _, splits = small(tmp_path)  # the threads share the data

    def run() -> dict[str, Any]:
        vae = pyro_vae.build(MODEL, splits)
        config = FitConfig(epochs=2, batch_size=27, compile=compile, **settings)
        return outcome(vae, fit(vae, splits, config))

    return run


def evaluations(tmp_path) -> dict[str, Callable[[], Any]]:
    vae, splits = small(tmp_path)
    x = next(splits.test.fixed("binary", 0))

    def evidence() -> Any:
        with random_states(CPU, 5):
            return [pyro_vae.log_evidence(vae, x, 200).tolist() for _ in range(4)]

    def calibration() -> Any:
        with random_states(CPU, 6):
            return pyro_vae.simulate(vae, 60, 99).ranks.tolist()

    def refinement() -> Any:
        with random_states(CPU, 7):
            return pyro_vae.refine(vae, x, num_steps=10).loc.tolist()

    return {
        "evidence": evidence,
        "evaluate": lambda: vars(evaluate(vae, splits.test, 100)),
        "simulate": calibration,
        "refine": refinement,
    }


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """What tasks return that run at the same time, each in a thread, which often change."""
    results: list[Any] = [None] * len(tasks)
    start, interval = threading.Barrier(len(tasks)), sys.getswitchinterval()

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = tasks[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return results


@pytest.fixture
def captured(monkeypatch) -> None:
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0)


@pytest.mark.parametrize("mode", ["eager", "graph", pytest.param("compiled", marks=SLOW)])
def test_trainings_in_threads_are_those_alone(mode, tmp_path, request):
    if mode == "graph":
        request.getfixturevalue("captured")
    compile = {"eager": "off", "graph": "auto", "compiled": "on"}[mode]
    tasks = [
        training(tmp_path, compile),
        training(tmp_path, compile, learning_rate=1e-2),
        training(tmp_path, compile, objective="iwae", num_particles=3),
    ]
    expected = [task() for task in tasks]
    state = torch.get_rng_state()
    for _ in range(1 if mode == "compiled" else 2):  # every training compiles its graph again
        assert together(tasks) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_training_beside_evaluations(tmp_path):
    tasks = {"fit": training(tmp_path), **evaluations(tmp_path)}
    expected = [task() for task in tasks.values()]
    for _ in range(2):
        assert together([*tasks.values()]) == expected


def test_no_lock_is_held_while_a_training_waits_for_its_consumer(tmp_path):
    vae, splits = small(tmp_path)
    records = iterate(vae, splits, FitConfig(epochs=2, batch_size=27, compile="off"))
    first = next(records)
    (beside,) = together([training(tmp_path)])
    assert beside == outcome(vae, [first, *records])


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name: str):
    torch.set_default_device(name)
    try:
        yield
        assert torch.get_default_device().type == name
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def low_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad disabled": lambda: torch.set_grad_enabled(False),
    "default dtype": default_dtype,
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "matmul precision": low_precision,
}


@pytest.mark.parametrize(
    ("mode", "capture"),
    [(mode, False) for mode in MODES]
    + [("default dtype", True)]
    + [pytest.param(mode, True, marks=SLOW) for mode in MODES if mode != "default dtype"],
)
def test_a_training_is_the_same_in_any_mode(mode, capture, tmp_path, monkeypatch):
    """Build, fit, save, load and resume within a mode of the caller's."""
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0 if capture else 10**9)
    config = FitConfig(epochs=3, batch_size=27)
    run = pyro_vae.config.resolve(pyro_vae.Config(model=MODEL), "bernoulli", 1000)
    vae, splits = small(tmp_path)
    expected = outcome(vae, fit(vae, splits, config))

    states = []
    with MODES[mode]():
        vae = pyro_vae.build(MODEL, splits)
        head = fit(
            vae,
            splits,
            config,
            on_step=lambda p: p.step >= 5 and not states.append(p.state()),
        )
        path = tmp_path / "a.pt"
        path.write_bytes(serialize(vae, run, splits, [], states[0]))
        loaded = load_checkpoint(path)
        tail = fit(loaded.vae, splits, config, state=loaded.training)
        inside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert outcome(loaded.vae, [*head, *tail]) == expected
    assert inside == (mode not in ("inference mode", "no grad", "grad disabled"), mode[:3] == "inf")


def test_usual_settings_are_left_on_an_error():
    def fail() -> None:
        with usual_settings(precision="medium"):
            assert torch.get_default_dtype() == torch.float32
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError

    with default_dtype(), pytest.raises(KeyError):
        fail()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_model_made_in_inference_mode_is_refused(tmp_path):
    vae, splits = small(tmp_path)
    with torch.inference_mode():
        vae.decoder.bias = torch.nn.Parameter(torch.zeros_like(vae.decoder.bias))
    with pytest.raises(InputError, match=r"decoder\.bias was made under torch\.inference_mode"):
        fit(vae, splits, FitConfig(epochs=1, batch_size=27))
