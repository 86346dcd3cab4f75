"""State of a training as plain values, and the records of steps and epochs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import InputError


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

    def after_step(self, seconds: float) -> Position:
        return dataclasses.replace(self, step=self.step + 1, seconds=self.seconds + seconds)

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

    def after_step(self, rows: int, seconds: float, terms: Sequence[float]) -> Sums:
        """`terms`: reconstruction and, for a VAE, KL, summed over the step's rows."""
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


def unpack(state: dict[str, Any]) -> tuple[Position, Sums, Any, dict[str, Any]]:
    """Inverse of `pack`: position, sums, random state, the optimizer's state dict.

    Raises:
        InputError: the state has other entries.
    """
    names = [field.name for field in dataclasses.fields(Position)]
    expected = [*names, "random", "sums", "optimizer"]
    if set(state) != set(expected):
        raise InputError(
            f"a training's state expects {', '.join(expected)}; got {', '.join(state)}"
        )
    position = Position(**{name: state[name] for name in names})
    return position, Sums(**state["sums"]), state["random"], state["optimizer"]


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

    def metrics(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("is_best", "state")}


class Diverged(ArithmeticError):
    """The loss or its gradient is not finite; the parameters still are."""
