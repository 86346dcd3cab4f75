"""Names of the objectives, and their options with ranges. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

Objective = Literal[
    "trace",
    "mean-field",
    "stl",
    "score-function",
    "score-baseline",
    "iwae",
    "dreg",
    "renyi",
    "miwae",
    "ciwae",
    "piwae",
    "wake-sleep",
    "beta",
    "free-bits",
    "beta-tc",
    "mmd",
]

# Options and their defaults, for the objectives that have any.
OBJECTIVE_OPTIONS: dict[str, dict[str, float]] = {
    "renyi": {"alpha": 0.5},
    "miwae": {"groups": 8},
    "ciwae": {"elbo_weight": 0.05},
    "piwae": {"groups": 8},
    "beta": {"beta": 4.0},
    "free-bits": {"free_bits": 0.1},
    "beta-tc": {"beta": 6.0},
    "mmd": {"mmd_weight": 100.0},
}

# Largest number in an option: sums of its products with log-densities stay in float32.
MAX_VALUE = 1e30

# Objectives whose KL term has a weight, which may change from step to step.
KL_WEIGHTED = ("trace", "mean-field", "score-function", "beta", "free-bits")


def check_objective(name: str, num_particles: int, options: dict[str, Any]) -> None:
    """Validate an objective and its options.

    Raises:
        ValueError: the name or an option is unknown, or a value is out of range.
    """
    names = get_args(Objective)
    if name not in names:
        raise ValueError(f"objective expects one of {', '.join(names)}; got {name!r}")
    known = OBJECTIVE_OPTIONS.get(name, {})
    for option in options:
        if option not in known:
            owners = [n for n, own in OBJECTIVE_OPTIONS.items() if option in own]
            belongs = f"it belongs to {' and '.join(owners)}" if owners else "no objective has it"
            raise ValueError(f"the objective {name} has no option {option}; {belongs}")
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(
            f"the number of particles expects an integer of at least 1; got {num_particles}"
        )
    if name == "score-baseline" and num_particles < 2:
        raise ValueError(
            "the objective score-baseline expects at least 2 particles, since each is compared "
            "with the others; got 1"
        )
    _check_ranges(name, num_particles, {**known, **options})


def _check_ranges(name: str, num_particles: int, values: dict[str, Any]) -> None:
    groups = values.get("groups", 1)
    if not isinstance(groups, int) or groups < 1 or num_particles % groups:
        raise ValueError(
            f"the objective {name} expects a number of particles that is a multiple of its "
            f"{groups} groups; got {num_particles}"
        )
    alpha = values.get("alpha", 0.0)
    if not abs(alpha) <= MAX_VALUE or alpha == 1:
        raise ValueError(
            f"alpha expects a finite number other than 1, at which the bound is the ELBO (trace); "
            f"got {alpha} (the limit is {MAX_VALUE:g})"
        )
    if not 0 <= values.get("elbo_weight", 0) <= 1:
        raise ValueError(f"elbo_weight expects 0 to 1; got {values['elbo_weight']}")
    for option in ("beta", "free_bits", "mmd_weight"):
        value = values.get(option, 1.0)
        if not 0 < value <= MAX_VALUE:
            raise ValueError(
                f"{option} expects a finite number above 0; got {value} (the limit is "
                f"{MAX_VALUE:g})"
            )
