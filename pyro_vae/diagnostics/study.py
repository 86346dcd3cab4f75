"""The form of a study of `diagnose`: its size and its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .findings import Finding


@dataclass(frozen=True)
class Effort:
    """Sizes of the computations.

    Attributes:
        held_out: largest number of rows for weights, latents and predictive checks.
        importance_samples: draws of z for each of these rows and of the annealed ones.
        refined: rows to which guides of two families are fitted, by `refine_steps` of SVI each.
        simulations: for calibration, with `draws` each; the local test has four times as many.
        annealed: simulated rows, by `anneal_steps` on `anneal_chains` chains each.
        chain_rows: rows for NUTS, on `chains` chains of `chain_warmup` and `chain_draws`.
        aggregate: largest number of draws from the aggregate posterior.
    """

    held_out: int = 1000
    importance_samples: int = 5000
    refined: int = 128
    refine_steps: int = 1000
    simulations: int = 4000
    draws: int = 199
    annealed: int = 64
    anneal_steps: int = 1000
    anneal_chains: int = 8
    chain_rows: int = 8
    chains: int = 4
    chain_warmup: int = 200
    chain_draws: int = 300
    aggregate: int = 2000


@dataclass(frozen=True)
class Study:
    """The results of a study.

    Attributes:
        findings: lines of the table.
        details: their numbers, as JSON values.
        figures: name → figure.
        rows: name → (B,) numbers of single held-out rows, the first ones, as `worst_rows` has them.
    """

    findings: list[Finding]
    details: dict[str, Any]
    figures: dict[str, Figure]
    rows: dict[str, np.ndarray] = field(default_factory=dict)
