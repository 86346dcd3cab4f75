"""Fixtures, and the false-alarm budget of the statistical tests.

A run of all tests, the slow ones included, makes about 700 comparisons at four standard errors
(6.3e-5 each) and 160 at 1e-4. With new random numbers, at least one of them would fail on sound
code in at most 6% of runs (the sum of the rates). Seeds are fixed: a test that passes once passes
always, until torch or numpy draws other numbers.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# One thread for each process of the tests, and for those that they start: the models here are tiny,
# and pytest-xdist keeps every core busy. Compiled graphs share the cache of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae import train
from pyro_vae.data.splits import DataSpec
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian

# A two-sided test at this many standard errors rejects a true hypothesis once in 15,800 times.
SIGMAS = 4.0

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_trace_left():
    """No test may find or leave a parameter in Pyro's global store."""
    import pyro

    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def digits() -> pyro_vae.Splits:
    return pyro_vae.load_data("digits")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    status = train.main(["--out", str(folder), "--epochs", "12", "--latent-dim", "2"])
    assert status == 0
    return folder


def example_spec(name: str, shape: tuple[int, ...] = (1, 4, 5)) -> DataSpec:
    """Data of the kind that the likelihood `name` is for."""
    return {
        "bernoulli": DataSpec(shape, 1, discrete=True),
        "continuous-bernoulli": DataSpec(shape, 1, discrete=False),
        "binomial": DataSpec(shape, 16, discrete=True),
        "gaussian": DataSpec(shape, None, discrete=False),
        "discretized-logistic": DataSpec(shape, 255, discrete=True),
    }[name]


def example_values(name: str, count: int, shape: tuple[int, ...] = (1, 4, 5)) -> np.ndarray:
    """Stored values (count, *shape) for the likelihood `name`, with some structure to learn."""
    random = np.random.default_rng(7)
    spec = example_spec(name, shape)
    level = 1 / (1 + np.exp(-2 * random.standard_normal((count, *[1] * len(shape)))))
    noise = random.random((count, *shape))
    if name == "gaussian":
        return (7.3 + 5 * level + noise).astype(np.float32)
    if name == "continuous-bernoulli":
        return ((level + noise) / 2).astype(np.float32)
    return np.rint((level + noise) / 2 * spec.bound).astype(np.uint8)


def example_splits(name: str, tmp_path: Path, count: int = 60, shape: tuple[int, ...] = (1, 4, 5)):
    path = tmp_path / f"{name}.npy"
    np.save(path, example_values(name, count, shape))
    config = pyro_vae.DataConfig(str(path), max_value=16 if name == "binomial" else None)
    return pyro_vae.load_data(config)


def example_vae(name: str, tmp_path: Path, shape: tuple[int, ...] = (1, 4, 5), **settings):
    """A small untrained VAE in float64, where sums do not hide small faults, and data for it."""
    splits = example_splits(name, tmp_path, shape=shape)
    settings = {"latent_dim": 3, "hidden": (16,), "likelihood": name, **settings}
    return pyro_vae.build(pyro_vae.ModelConfig(**settings), splits).double(), splits


def batch(splits: pyro_vae.Splits, name: str, count: int = 8) -> torch.Tensor:
    """The first training rows as x, in float64."""
    return next(splits.train.fixed(LIKELIHOODS[name].units, seed=0, num_images=count)).double()


def without_a_compiler(code: str, tmp_path: Path) -> str:
    """What Python code prints, in a process that finds no C++ compiler, in the project's folder."""
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "PATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def diagonal(*factors: list[Any]) -> list[Any]:
    """The product of lists of parameters, all slow but a diagonal in which each value occurs."""
    kept = {tuple(i % len(f) for f in factors) for i in range(max(map(len, factors)))}
    return [
        pytest.param(
            *(f[i] for f, i in zip(factors, index, strict=True)),
            marks=[] if index in kept else [pytest.mark.slow],
        )
        for index in itertools.product(*(range(len(f)) for f in factors))
    ]


all_likelihoods = pytest.mark.parametrize("name", sorted(LIKELIHOODS))


def oracle(data_dim: int, latent_dim: int, seed: int, **settings):
    """An oracle in float64, and 40 draws of x from it."""
    torch.manual_seed(seed)
    weight = torch.randn(data_dim, latent_dim, dtype=torch.float64)
    loc = torch.randn(data_dim, dtype=torch.float64)
    vae = LinearGaussian(weight, loc, 0.6, **settings)
    return vae, vae.likelihood(vae.prior().sample((40,))).sample().detach()


def wait_for_epoch(run: Path, epoch: int) -> None:
    """Wait until a training has completed this number of epochs."""
    for _ in range(2400):  # two minutes
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= epoch:
            return
        time.sleep(0.05)
    raise TimeoutError
