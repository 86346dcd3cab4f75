"""State of a training as plain values, and the records of steps and epochs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FitConfig, InputError


@dataclass(frozen=True)
class Position:
    """Position of a training.

    Attributes:
        epoch, step: numbers of completed epochs and steps.
        seconds: time spent in training and validation.
        best: best validation score so far (the ELBO; an autoencoder's reconstruction), nats.
        stale_epochs: number of epochs since `best`.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    stale_epochs: int = 0

    def after_steps(self, count: int, seconds: float) -> Position:
        return dataclasses.replace(self, step=self.step + count, seconds=self.seconds + seconds)

    def after_epoch(self, score: float, seconds: float) -> Position:
        """`seconds`: the total so far."""
        is_best = score > self.best
        return dataclasses.replace(
            self,
            epoch=self.epoch + 1,
            seconds=seconds,
            best=max(score, self.best),
            stale_epochs=0 if is_best else self.stale_epochs + 1,
        )


@dataclass(frozen=True)
class Sums:
    """Sums over the rows of the current epoch so far. `kl` stays 0 for an `Autoencoder`."""

    images: float = 0.0
    seconds: float = 0.0
    reconstruction: float = 0.0
    kl: float = 0.0

    def after_steps(self, rows: int, seconds: float, terms: Sequence[float]) -> Sums:
        """`terms`: reconstruction and, for a VAE, KL, summed over the rows of the steps."""
        sums = (self.reconstruction, self.kl)[: len(terms)]
        added = [total + term for total, term in zip(sums, terms, strict=True)]
        return Sums(self.images + rows, self.seconds + seconds, *added)

    def means(self, has_kl: bool) -> tuple[float | None, float, float | None]:
        """ELBO, reconstruction and KL, nats per row; without a KL the first and last are None."""
        reconstruction, kl = self.reconstruction / self.images, self.kl / self.images
        return (reconstruction - kl, reconstruction, kl) if has_kl else (None, reconstruction, None)

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.images / max(self.seconds, 1e-9)


def pack(position: Position, sums: Sums, random: Any, optimizer: Any) -> dict[str, Any]:
    """State of a training for a checkpoint, without the weights.

    Args:
        random: the training's random state.
        optimizer: the torch optimizer; its tensors are not copied, and change with the next step.
    """
    return {
        **dataclasses.asdict(position),
        "random": random,
        "sums": dataclasses.asdict(sums),
        "optimizer": optimizer.state_dict(),
    }


def unpack(
    state: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[Position, Sums, dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Inverse of `pack`, for a model with these parameters.

    Returns:
        Position, sums, random states, and the moments of each parameter, by its number.

    Raises:
        InputError: the state has other entries, or a value does not suit the parameters.
    """
    names = [field.name for field in dataclasses.fields(Position)]
    _check_names("a training's state", state, [*names, "random", "sums", "optimizer"])
    _check_names("its sums", state["sums"], [field.name for field in dataclasses.fields(Sums)])
    position, sums = Position(**{name: state[name] for name in names}), Sums(**state["sums"])
    for name, value in (dataclasses.asdict(position) | dataclasses.asdict(sums)).items():
        is_count = isinstance(getattr(Position, name, 0.0), int)
        at_start = name == "best" and value == -math.inf
        if type(value) not in ((int,) if is_count else (int, float)) or not (
            at_start or (math.isfinite(value) and (value >= 0 or not is_count))
        ):
            raise InputError(f"a training's {name} expects a finite number; got {value!r}")
    random = state["random"]
    try:
        torch.Generator().set_state(random["cpu"])
    except (TypeError, KeyError, AttributeError, RuntimeError):
        raise InputError("a training's random state is not one of torch's generator") from None
    return position, sums, random, _moments(state["optimizer"], parameters)


def _moments(optimizer: Any, parameters: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Adam's moments in its state dict; its settings are those of the run."""
    _check_names("the state of an optimizer", optimizer, ["state", "param_groups"])
    moments, numbers = optimizer["state"], list(range(len(parameters)))
    try:
        found = [group["params"] for group in optimizer["param_groups"]]
    except (KeyError, TypeError):
        found = []
    if found != [numbers] or not isinstance(moments, dict) or not {*moments} <= {*numbers}:
        raise InputError(f"the state of an optimizer expects {len(parameters)} parameters")
    for i, values in moments.items():
        _check_names(f"the moments of parameter {i}", values, ["step", "exp_avg", "exp_avg_sq"])
        for name, value in values.items():
            shape = torch.Size() if name == "step" else parameters[i].shape
            check_tensor(f"{name} of parameter {i}", value, shape, torch.float32)
    return moments


def _check_names(what: str, values: Any, expected: Sequence[str]) -> None:
    is_dictionary = isinstance(values, dict)
    if not is_dictionary or set(values) != set(expected):
        found = ", ".join(map(str, values)) if is_dictionary else type(values).__name__
        raise InputError(f"{what} expects {', '.join(expected)}; got {found}")


def check_tensor(name: str, value: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    """Check a tensor that was read from a file.

    Raises:
        InputError: its type, shape or memory layout is another, or a value is not finite.
    """
    expected = f"{name} expects {str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
    if not isinstance(value, Tensor):
        raise InputError(f"{expected}; got {type(value).__name__}")
    if (value.layout, value.dtype, value.shape) != (torch.strided, dtype, shape):
        found = " ".join(str(x).removeprefix("torch.") for x in (value.layout, value.dtype))
        raise InputError(f"{expected}; got {found} of shape {tuple(value.shape)}")
    if value.is_meta or value.nbytes > value.untyped_storage().nbytes():
        raise InputError(f"{expected}; got fewer values than that")
    if not value.isfinite().all():
        raise InputError(f"{name} expects finite values; got NaN or infinity")


@dataclass(frozen=True)
class Progress:
    """The training after a step. ELBO terms are nats per row, means over this epoch so far.

    Attributes:
        epoch, step: counted from 1, `step` over the whole run.
        epochs, steps_per_epoch: numbers of epochs and of steps in each.
        elbo, kl: None for an `Autoencoder`.
        state: returns the state to resume from; call it before the loop continues.
    """

    epoch: int
    step: int
    epochs: int
    steps_per_epoch: int
    elbo: float | None
    reconstruction: float
    kl: float | None
    images_per_second: float
    state: Callable[[], dict[str, Any]] = dataclasses.field(repr=False)


@dataclass(frozen=True)
class Record:
    """One epoch. ELBO terms are nats per row at KL weight 1, elbo = reconstruction − kl.

    Attributes:
        epoch, step: counted from 1, `step` over the whole run.
        seconds: spent in training and validation since the beginning of the run.
        train_elbo, reconstruction, kl: means over the epoch, while the parameters change. For an
            `Autoencoder` ELBO and KL are None.
        validation_elbo, validation_reconstruction, validation_kl: after the epoch, with one draw of
            z per row. Draws and binarization are the same after every epoch.
        validation_accuracy: share of the validation rows with a label whose most probable one by
            q(y|x) is theirs, of a semi-supervised model; else None, and not among the metrics.
        learning_rate: of the epoch's last step.
        images_per_second: training speed of the epoch, rows per second.
        is_best: whether the validation score is the best so far.
        state: returns the state to resume from; call it before the loop continues.
    """

    epoch: int
    step: int
    seconds: float
    train_elbo: float | None
    validation_elbo: float | None
    reconstruction: float
    kl: float | None
    validation_reconstruction: float
    validation_kl: float | None
    learning_rate: float
    images_per_second: float
    is_best: bool
    state: Callable[[], dict[str, Any]] = dataclasses.field(repr=False)
    validation_accuracy: float | None = None

    def metrics(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        names = [field.name for field in dataclasses.fields(self)]
        left_out = ["is_best", "state"]
        left_out += ["validation_accuracy"] * (self.validation_accuracy is None)
        return {name: getattr(self, name) for name in names if name not in left_out}


def summary(metrics: dict[str, Any], epochs: int) -> str:
    """A line of text about an epoch, of a run of so many `epochs`."""
    names = ("train_elbo", "validation_elbo", "reconstruction", "kl")
    terms = "  ".join(f"{n} {metrics[n]:.2f}" for n in names if metrics[n] is not None)
    share = metrics.get("validation_accuracy")
    accuracy = "" if share is None else f"  validation_accuracy {share:.4f}"
    return f"epoch {metrics['epoch']}/{epochs}  {terms}{accuracy}"


class Diverged(ArithmeticError):
    """The loss or its gradient is not finite; the parameters still are."""


def diverged(what: str, config: FitConfig, position: Position) -> Diverged:
    """The error that the loss, its gradient or the validation ELBO, `what`, is not finite."""
    return Diverged(
        f"the {what} is not finite in epoch {position.epoch + 1}, step {position.step + 1}. Likely "
        f"causes: --learning-rate {config.learning_rate:g} is too high, --learning-rate-warmup or "
        f"--kl-warmup too short, --gradient-clip too loose, or the data hold extreme values"
    )
