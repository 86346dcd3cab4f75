"""How a training computes its steps: uncaptured, captured or compiled, one or several together.

Settings determine it, not timings, so that a resumed run computes in the same way.
"""

from __future__ import annotations

import math

import torch

from ..capture.captured import Mode
from ..config import FitConfig, resolve_epochs
from ..data.splits import Split

# Number of steps from which capturing the ELBO saves time.
CAPTURE_FROM = 500

# Time of a compilation, and time saved per step and per decoded value of x: seconds on two cores.
COMPILE_SECONDS = 10.0
SAVED_BY_STEP = 1.5e-3
SAVED_BY_VALUE = 9e-9

# Number of rows times particles of the steps that are made together, by type of device. An
# accelerator waits for Python between two calls.
ROWS_AT_ONCE = {"cpu": 512, "cuda": 2**14}


def run_mode(config: FitConfig, train: Split, inferred: bool = False) -> Mode:
    """Mode in which a run evaluates its ELBO.

    `inferred`: whether labels are summed out. Pyro's TraceEnum_ELBO leaves out the labels with the
    probability 0, whose number depends on the values of tensors: it cannot be captured.
    """
    if inferred:
        return "eager"
    if config.compile != "auto":
        return "compiled" if config.compile == "on" else "eager"
    epochs = resolve_epochs(config, len(train))
    num_steps = epochs * math.ceil(len(train) / config.batch_size)
    num_values = epochs * len(train) * math.prod(train.spec.shape) * config.num_particles
    if num_steps * SAVED_BY_STEP + num_values * SAVED_BY_VALUE >= COMPILE_SECONDS:
        return "compiled"
    return "graph" if num_steps >= CAPTURE_FROM else "eager"


def steps_at_once(config: FitConfig, device: torch.device) -> int:
    """Number of steps of a captured run between two calls of `on_step`: ten milliseconds or so."""
    rows = ROWS_AT_ONCE[device.type]
    return max(1, min(10, rows // (config.batch_size * config.num_particles)))
