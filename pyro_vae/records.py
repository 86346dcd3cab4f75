"""What a training tells: where it is after a step, how it stands after an epoch, or diverged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Diverged", "Progress", "Record"]


@dataclass(frozen=True)
class Progress:
    """Where the training is, after a step. ELBO terms are nats per image, of this epoch so far.

    Attributes:
        epoch, step: counted from 1, `step` over the whole run.
        epochs, steps_per_epoch: how many there are.
        elbo, kl: None for an `Autoencoder`.
        state: makes the state to resume from; to be called before the loop goes on.
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
    """One epoch. ELBO terms are nats per image at KL weight 1, elbo = reconstruction − kl.

    Attributes:
        epoch, step: counted from 1, `step` over the whole run.
        seconds: spent in `fit` since the run's beginning.
        train_elbo, reconstruction, kl: means over the epoch, while the parameters moved. For an
            `Autoencoder` ELBO and KL are None.
        validation_elbo, validation_reconstruction, validation_kl: after the epoch, one draw of z an
            image, the draws and any binarization the same after every epoch.
        learning_rate: of the epoch's last step.
        images_per_second: training speed of the epoch.
        is_best: whether validation has never been better.
        state: makes the state to resume from; to be called before the loop goes on.
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
