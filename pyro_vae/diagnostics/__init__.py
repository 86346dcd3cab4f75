"""Diagnostics: checks of q(z|x).

Each module computes one kind of check: simulation-based calibration (`sbc`), guides refined per row
(`refinement`), NUTS (`nuts`), a classifier (`local`), the aggregate posterior, predictive checks,
use of the latents, and the gradients of objectives. `findings` compares the sizes of errors with
limits; `suite` runs all checks for the command `diagnose`.
"""

from __future__ import annotations

from .gradients import measure_gradients
from .latents import latent_use
from .local import local_test
from .nuts import compare_with_nuts
from .predictive import predictive_check
from .refinement import gaps, refine
from .sbc import check_ranks, coverage, miscalibration, simulate

__all__ = [
    "check_ranks",
    "compare_with_nuts",
    "coverage",
    "gaps",
    "latent_use",
    "local_test",
    "measure_gradients",
    "miscalibration",
    "predictive_check",
    "refine",
    "simulate",
]
