"""`Config`: all settings of a run, their presets and files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .data import DataConfig
from .families import FlowPrior, check_objective_families
from .fit import FitConfig, resolve_epochs
from .model import DEFAULT_HIDDEN, ModelConfig
from .options import InputError, Typed, check_integer, structure

MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Config(Typed):
    """All settings of a run.

    Raises:
        InputError: a setting is out of range, or has no effect on the chosen model.

    Attributes:
        seed: Seed of the splits, the initial weights and all random draws.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
        refit: Whether to end with a refit of the guide, the model held fixed. auto: if it takes
            less time than the training; it is kept if it raises the validation ELBO.
    """

    data: DataConfig = DataConfig()  # noqa: RUF009 (frozen)
    model: ModelConfig = ModelConfig()  # noqa: RUF009 (frozen)
    fit: FitConfig = FitConfig()  # noqa: RUF009 (frozen)
    seed: int = 0
    device: str = "auto"
    refit: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0)
        if self.data.labelled is not None and self.model.condition == "none":
            object.__setattr__(self, "model", replace(self.model, condition="partial"))
        model = self.model
        _check_labels(self)
        check_objective_families(self.fit.objective, model.guide.family, model.prior.family)
        if self.data.columns is not None and model.likelihood not in ("auto", "columns"):
            raise InputError(
                f"--columns has no effect on --likelihood {model.likelihood}, which is that of all "
                f"columns; drop one"
            )
        if self.model.kind == "ae":
            if self.refit == "on":
                raise InputError("--refit has no effect on --model ae; drop it")
            for name in ("guide", "prior"):
                if getattr(model, name) != getattr(ModelConfig, name):
                    raise InputError(f"--{name} has no effect on --model ae; drop it")
            for name in self.fit.of_bounds():
                raise InputError(
                    f"--{name.replace('_', '-')} has no effect on --model ae, which has neither "
                    f"posterior nor KL; drop it or train --model vae"
                )

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Inverse of `to_dict`. Missing settings take their defaults.

        Raises:
            InputError: an unknown setting, or a value of the wrong type or out of range.
        """
        return structure(cls, values)


def _check_labels(config: Config) -> None:
    """Check the settings that depend on whether labels are given or inferred.

    Raises:
        InputError: a setting has no effect, or is not supported.
    """
    condition, fit = config.model.condition, config.fit
    if condition == "label" and config.data.labelled is not None:
        raise InputError(
            "--condition label uses the label of each row; drop --labelled, or give --condition "
            "partial, with which the other labels are inferred"
        )
    if condition != "partial" and fit.classification_weight is not None:
        raise InputError(
            f"--classification-weight has no effect on --condition {condition}; drop it, or give "
            f"--labelled or --condition partial"
        )
    if condition == "partial":
        if config.refit == "on":
            raise InputError("--refit on expects labels that are given, not inferred; drop it")
        for name in fit.of_bounds():
            raise InputError(
                f"--condition partial sums over the labels in --objective trace, with one "
                f"particle and no other options; drop --{name.replace('_', '-')}"
            )


# Named settings, for --preset.
PRESETS = {
    # Network and learning rate of "Importance weighted autoencoders", arXiv 1509.00519.
    "iwae-mnist": Config(
        DataConfig(source="mnist"),
        ModelConfig(latent_dim=50, hidden=(200, 200), activation="Tanh", likelihood="bernoulli"),
        FitConfig(batch_size=100, learning_rate=1e-3, epochs=700),
    ),
    # The highest log p(x) of ten minutes on two cores, see docs/results.md.
    "mnist": Config(
        DataConfig(source="mnist"),
        ModelConfig(latent_dim=40, hidden=(500, 500), prior=FlowPrior(), likelihood="bernoulli"),
        FitConfig(objective="dreg", num_particles=2, batch_size=128, learning_rate=1e-3, epochs=72),
        refit="off",
    ),
}


def read_config(path: Path) -> Config:
    """Read a run's `config.json`.

    Raises:
        InputError: the file is missing, not JSON, or has settings unknown to this version.
    """
    values = read_json(path)
    try:
        return Config.from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_json(path: Path, most: int = MAX_CONFIG_BYTES) -> Any:
    """The values in a `config.json` of at most `most` bytes.

    Raises:
        InputError: the file is missing, too large or not JSON.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe might wait for ever
            raise InputError(f"{path} is not a config.json: it is not a regular file")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise InputError(
                f"{path} is not a config.json: it has more than {most / 2**20:.0f} MiB"
            )
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path} is not a config.json: its brackets nest too deep") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not a config.json: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(n for n in names if names.count(n) > 1)} twice")
    return values


def resolve(config: Config, likelihood: Any, num_train: int) -> Config:
    """Fill in the defaults that depend on the data.

    Args:
        config: the settings as given.
        likelihood: the default likelihood of the data.
        num_train: number of training rows.

    Raises:
        InputError: the batch is larger than the training set, and not the default.
    """
    model = config.model
    hidden = DEFAULT_HIDDEN[model.architecture] if model.hidden is None else model.hidden
    likelihood = likelihood if model.likelihood == "auto" else model.likelihood
    model = dataclasses.replace(model, hidden=hidden, likelihood=likelihood)
    epochs = resolve_epochs(config.fit, num_train)
    size = min(config.fit.batch_size, num_train)
    fit = dataclasses.replace(config.fit, epochs=epochs, batch_size=size)
    return dataclasses.replace(config, model=model, fit=fit)
