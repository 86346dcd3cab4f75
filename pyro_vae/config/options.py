"""Types and ranges of settings; names and options of the objectives. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

MAX_NUMBER = 3.4e38  # about the largest in float32

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

# Objectives whose KL term has a weight, which may change from step to step.
KL_WEIGHTED = ("trace", "mean-field", "score-function", "beta", "free-bits")


class InputError(ValueError):
    """Invalid input from the user: a flag, a file, an array.

    The message says what was expected, what was given and how to fix it. The commands print it
    without a traceback and exit with status 2.
    """


def check_integer(flag: str, value: int | None, least: int = 1) -> None:
    """Check that an integer setting, if given, is at least `least` and at most 2^63 - 1.

    Raises:
        InputError: it is not.
    """
    if value is not None and not least <= value < 2**63:
        expected = f"of at least {least}" if value < least else f"from {least} to 2^63 - 1"
        raise InputError(f"--{flag} expects an integer {expected}; got {shown(value)}")


def check_number(flag: str, value: float | None, finite: bool = True) -> None:
    """Check that a setting, if given, is above 0 and within the range of float32.

    Raises:
        InputError: it is not.
    """
    if value is None or 0 < value <= MAX_NUMBER or (value == math.inf and not finite):
        return
    expected = f"a finite number, at most {MAX_NUMBER:g}" if value > 0 else "a number above 0"
    raise InputError(f"--{flag} expects {expected}; got {value}")


def check_path(flag: str, path: str) -> None:
    """Check that the operating system can represent a path.

    Raises:
        InputError: it cannot.
    """
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise InputError(f"--{flag} expects a path; got {shown(path)}")


def shown(value: Any) -> str:
    """The value in a message: a long one is shortened."""
    if isinstance(value, int) and abs(value) >= 2**64:  # Python refuses to print very long ones
        return f"about {'-' * (value < 0)}10^{math.log10(abs(value)):.0f}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} … {text[-10:]}, {len(text):,} characters"


def without_none(hint: Any) -> Any:
    """The type X of a setting X | None."""
    options = [option for option in get_args(hint) if option is not NoneType]
    return options[0] if len(options) < len(get_args(hint)) else hint


def expected(hint: Any) -> str:
    """What a setting of this type expects, in a message."""
    hint = without_none(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    names = {int: "an integer", float: "a number", str: "text", Path: "a path"}
    names |= {tuple[int, int]: "one or two integers, as in 28 or 28 32"}
    names |= {tuple[int, ...]: "integers, as in 512 256"}
    return names.get(hint, str(hint))


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`. One integer is a square, an integer is a float too.

    Numbers of other libraries become Python's, since config.json holds no others.

    Raises:
        InputError: it has another type, or is an integer that no float holds.
    """
    try:
        # By default, typeguard checks the first element of a list only.
        return check_type(
            _plain(value, without_none(hint)),
            hint,
            collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS,
        )
    except (TypeCheckError, TypeError, OverflowError):
        raise InputError(f"{where} = {shown(value)}: expected {expected(hint)}") from None


def _plain(value: Any, kind: Any) -> Any:
    if isinstance(value, bool):  # an int to Python
        if kind is bool:
            return value
        raise TypeError("a bool is not a number")
    if isinstance(value, list | tuple):
        return tuple(_plain(item, int) for item in value)
    if isinstance(value, Integral) and kind is not float:
        return (int(value),) * 2 if kind == tuple[int, int] else int(value)
    if isinstance(value, Real):
        return float(value)
    return Path(value) if kind is Path and isinstance(value, str) else value


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return get_type_hints(cls)


class Typed:
    """Each field has the type that it declares, also if it comes from Python code or a file."""

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, typed(getattr(self, name), hint, name))


def structure(cls: type, values: Any, where: str = "") -> Any:
    """A dataclass from nested dictionaries. Missing settings take their defaults.

    Args:
        where: prefix of the settings' names in messages.

    Raises:
        InputError: an unknown setting, or a value of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where or 'the config'} expects settings by name; got {values!r}")
    hints = hints_of(cls)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise InputError(
            f"unknown setting {where}{unknown[0]}; it was written by another version of pyro_vae "
            f"or by hand"
        )
    settings = {}
    for name, value in values.items():
        hint = hints[name]
        if all(map(dataclasses.is_dataclass, get_args(hint) or [int])):
            settings[name] = value  # of a union, which the class itself resolves
        elif dataclasses.is_dataclass(hint):
            settings[name] = structure(hint, value, f"{where}{name}.")  # type: ignore[arg-type]
        else:
            settings[name] = typed(value, hint, f"{where}{name}")
    return cls(**settings)


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
            f"{shown(groups)} groups; got {num_particles}"
        )
    alpha = values.get("alpha", 0.0)
    if not abs(alpha) <= MAX_NUMBER or alpha == 1:
        raise ValueError(
            f"alpha expects a finite number other than 1, at which the bound is the ELBO (trace), "
            f"of at most {MAX_NUMBER:g} in absolute value; got {alpha}"
        )
    if not 0 <= values.get("elbo_weight", 0) <= 1:
        raise ValueError(f"elbo_weight expects 0 to 1; got {values['elbo_weight']}")
    for option in ("beta", "free_bits", "mmd_weight"):
        value = values.get(option, 1.0)
        if not 0 < value <= MAX_NUMBER:
            limit = f", at most {MAX_NUMBER:g}" if MAX_NUMBER < value < math.inf else ""
            raise ValueError(f"{option} expects a finite number above 0{limit}; got {value}")


def auto(metavar: str | None, meaning: str) -> Any:
    """Flag metadata: the help shows `meaning` as the default instead of None or auto."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {meaning})")
