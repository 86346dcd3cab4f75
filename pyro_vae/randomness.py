"""Torch's global random states, which Pyro draws from, borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor


class RandomStates:
    """Reads and writes the global random states that a model on `device` draws from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device)

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self.accelerator is not None:
            with self.accelerator.device(self.device):
                self.accelerator.manual_seed(seed)

    def get(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.accelerator is not None:
            states["accelerator"] = self.accelerator.get_rng_state(self.device)
        return states

    def set(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        # A run may be resumed on another kind of device, where its draws must differ anyway.
        if self.accelerator is not None and "accelerator" in states:
            self.accelerator.set_rng_state(states["accelerator"], self.device)


def derive(seed: int, purpose: str) -> int:
    """A seed for one purpose.

    Two generators of the same seed draw the same stream, whatever is made of it: with one seed for
    all, the noise of z would follow the binarization of x.
    """
    entropy = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return int(entropy[0])


@contextmanager
def random_states(device: torch.device, seed: int | None = None) -> Iterator[RandomStates]:
    """Within, draws are the block's own; after it the caller's states are as they were.

    Args:
        device: the draws' device; the CPU's state is kept in any case.
        seed: seeds the block's draws, where given.
    """
    states = RandomStates(device)
    outer = states.get()
    try:
        if seed is not None:
            states.seed(seed)
        yield states
    finally:
        states.set(outer)


class OwnState:
    """A random state and a Pyro parameter store that are in place while `active()` runs.

    Torch's global random states and Pyro's store are the caller's again afterwards. Where the block
    raises, the own random state stays what it was before it.

    Attributes:
        random: the random states between two blocks.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        with random_states(device, seed) as states:
            self.random = states.get()
        self._store: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        with (
            random_states(self.device) as states,
            pyro.get_param_store().scope(self._store) as self._store,
        ):
            states.set(self.random)
            yield
            self.random = states.get()

    def seed(self, purpose: str, seed: int) -> None:
        """Within `active()`: go on from the seed of one purpose."""
        RandomStates(self.device).seed(derive(seed, purpose))
