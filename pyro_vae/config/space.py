"""A search space: ranges and choices of settings, for `tune`. Imports no torch.

    latent_dim = { low = 2, high = 64, log = true }
    learning_rate = { low = 3e-4, high = 1e-2, log = true }
    hidden = { choices = [[256], [512, 256]] }
    guide = { choices = ["diagonal", { family = "flow", transforms = 2 }] }

The same in JSON. A range has both ends, integers for integers; with log, equal factors are equally
probable. All trials of a search are compared by the validation ELBO of the model, so a setting
that changes what this number measures cannot be searched (`REFUSED`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import DataConfig
from .files import read_file
from .fit import FitConfig
from .model import ModelConfig
from .options import InputError, check_integer, hints_of, shown, typed, without_none
from .run import Config

# A range {low, high, log} or {choices} for each setting; the values are those of config.json.
Space = dict[str, dict[str, Any]]

_MEASURE = "trials would be compared by densities of other things"
_SPEED = "it changes the time of a training, not the model; give it as a flag"
_BUDGET = "all trials have the same, so that they can be compared epoch by epoch; give it as a flag"
REFUSED = {
    **dict.fromkeys(("data", "likelihood", "condition"), _MEASURE),
    "model": "an autoencoder has no ELBO",
    "kind": "an autoencoder has no ELBO",
    "seed": "it selects the splits and the draws, on which all trials are compared",
    "refit": "it follows a training; refit the best run by python -m pyro_vae.refit",
    **dict.fromkeys(("epochs", "patience"), _BUDGET),
    **dict.fromkeys(("compile", "precision", "device"), _SPEED),
}

SECTIONS: dict[str, type] = {"model": ModelConfig, "fit": FitConfig}
SEARCHED = {
    field.name: section
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
    if field.name not in REFUSED
}

# Choices of --hidden by default: for tables, for other rows, and for --architecture conv.
TABLE_HIDDEN = [[64], [128, 64], [256, 128], [512, 256]]
MLP_HIDDEN = [[256], [512, 256], [1024, 512]]
CONV_HIDDEN = [[16, 32], [32, 64], [64, 128]]


def read_space(path: Path, base: Config) -> Space:
    """The search space in a file, see the top of this module.

    Raises:
        InputError: the file cannot be read, or see `check_space`.
    """
    return check_space(read_file(path, "space", "ranges of settings"), base, f"--space {path}")


def default_space(base: Config, size: int, is_table: bool, fixed: set[str]) -> Space:
    """Numbers of latents, hidden layers and learning rates, except for the settings in `fixed`.

    Args:
        base: the other settings.
        size: number of values of a row, the limit of the number of latents.
        is_table: whether rows are those of a table.

    Raises:
        InputError: nothing is left to search.
    """
    hidden = TABLE_HIDDEN if is_table else MLP_HIDDEN
    space: Space = {
        "latent_dim": {"low": 2, "high": min(64, size), "log": True},
        "hidden": {"choices": CONV_HIDDEN if base.model.architecture == "conv" else hidden},
        "learning_rate": {"low": 3e-4, "high": 1e-2, "log": True},
    }
    left = {name: value for name, value in space.items() if name not in fixed}
    if size <= 2:
        left.pop("latent_dim", None)
    if not left:
        raise InputError(f"--{' and --'.join(sorted(fixed))} leave nothing to search; give --space")
    return check_space(left, base, "the default space")


def check_space(values: Any, base: Config, where: str = "space") -> Space:
    """Validate a search space; returns it with values as in config.json.

    Args:
        values: ranges and choices by the names of settings, or of their flags.
        base: the other settings, with which each end and each choice must be valid.
        where: begins the messages.

    Raises:
        InputError: a setting is unknown or cannot be searched, or a value is invalid.
    """
    if not isinstance(values, dict) or not values:
        raise InputError(f"{where} expects settings with their ranges or choices; got {values!r}")
    space: Space = {}
    for given, entry in values.items():
        name = str(given).removeprefix("--").replace("-", "_")
        if name in space:
            raise InputError(f"{where} names {name} twice")
        if name in REFUSED or name in hints_of(DataConfig):
            reason = REFUSED.get(name, REFUSED["data"])
            raise InputError(f"{where}: {name} cannot be searched: {reason}")
        if name not in SEARCHED:
            raise InputError(f"{where}: unknown setting {given}; known are {', '.join(SEARCHED)}")
        space[name] = _checked(name, entry, base, f"{where}: {name}")
    return space


def _checked(name: str, entry: Any, base: Config, where: str) -> dict[str, Any]:
    names = set(entry) if isinstance(entry, dict) else set()
    if names == {"choices"}:
        choices = entry["choices"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise InputError(f"{where} expects two choices or more; got {shown(choices)}")
        found = [_valid(name, choice, base, where) for choice in choices]
        if len({json.dumps(choice) for choice in found}) < len(found):
            raise InputError(f"{where} expects different choices; got {shown(choices)}")
        return {"choices": found}
    if not {"low", "high"} <= names <= {"low", "high", "log"}:
        got = ", ".join(map(str, entry)) if isinstance(entry, dict) else shown(entry)
        raise InputError(f"{where} expects low and high, and perhaps log, or choices; got {got}")
    if without_none(hints_of(SECTIONS[SEARCHED[name]])[name]) not in (int, float):
        raise InputError(f"{where} is not a number, so it has no range; give choices")
    low, high = (_valid(name, entry[end], base, where) for end in ("low", "high"))
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise InputError(f"{where} expects log = true or false; got {shown(log)}")
    if None in (low, high) or not low < high or high - low == float("inf"):
        raise InputError(f"{where} expects low < high, both finite; got {low} and {high}")
    if log and not low > 0:
        raise InputError(f"{where} expects low above 0 with log; got {low}")
    return {"low": low, "high": high, "log": log}


def _valid(name: str, value: Any, base: Config, where: str) -> Any:
    """The value as in config.json.

    Raises:
        InputError: it is invalid.
    """
    try:
        return setting(with_values(base, {name: value}), name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def setting(config: Config, name: str) -> Any:
    """The value of a setting as in config.json."""
    return config.to_dict()[SEARCHED[name]][name]


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The config with other values of some settings.

    Raises:
        InputError: a value is invalid, or they do not work together.
    """
    changed: dict[str, Any] = {}
    for section in SECTIONS:
        own = {name: value for name, value in values.items() if SEARCHED[name] == section}
        changed[section] = dataclasses.replace(getattr(config, section), **own)
    return dataclasses.replace(config, **changed)


def value_text(value: Any) -> str:
    """A value as its flag takes it: 512 256, or flow transforms=2 hidden=64."""
    if isinstance(value, dict):
        options = {name: v for name, v in value.items() if name != "family"}
        return " ".join([str(value["family"]), *(f"{name}={v}" for name, v in options.items())])
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(space: Space) -> list[str]:
    """A line for each setting of a search space."""
    lines = []
    for name, entry in space.items():
        if "choices" in entry:
            text = " | ".join(map(value_text, entry["choices"]))
        else:
            text = f"{value_text(entry['low'])} to {value_text(entry['high'])}"
            text += ", logarithmic" * entry["log"]
        lines.append(f"{name:<14} {text}")
    return lines


@dataclass(frozen=True)
class Search:
    """What defines a search: its first trials are the same wherever it runs.

    Attributes:
        base: the settings that all trials share; the number of epochs is set.
        space: the settings that are searched.
        num_trials: number of trials, the pruned ones included.
        fingerprint: digest of the data, see `Splits`.
    """

    base: Config
    space: Space
    num_trials: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of JSON values, for search.json."""
        return {**vars(self), "base": self.base.to_dict()}


def read_search(folder: Path) -> Search:
    """The search in a folder's search.json.

    Raises:
        InputError: the file is missing, damaged, or of another version.
    """
    path = folder / "search.json"
    values = read_file(path, "resume", "a search")
    names = [field.name for field in dataclasses.fields(Search)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise InputError(f"{path} expects {', '.join(names)}; it is not a search of pyro_vae")
    try:
        base = Config.from_dict(values["base"])
        space = check_space(values["space"], base)
        count = typed(values["num_trials"], int, "num_trials")
        check_integer("trials", count)
        return Search(base, space, count, typed(values["fingerprint"], str, "fingerprint"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
