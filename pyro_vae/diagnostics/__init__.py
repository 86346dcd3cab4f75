"""Diagnostics: checks of q(z|x).

Each module computes one kind of check: simulation-based calibration (`sbc`), guides refined per row
(`refinement`), NUTS (`nuts`), a classifier (`local`), draws by the method that each row needs
(`draws`), recalibrated intervals (`recalibration`), the aggregate posterior, predictive checks, use
of the latents, and the gradients of objectives. `findings` compares the sizes of errors with
limits; `suite` runs all checks for the command `diagnose`.
"""

from __future__ import annotations

from .draws import posterior_draws
from .gradients import measure_gradients
from .latents import latent_use
from .local import local_test
from .nuts import compare_with_nuts
from .predictive import predictive_check
from .recalibration import recalibrate
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
    "posterior_draws",
    "predictive_check",
    "recalibrate",
    "refine",
    "simulate",
]
