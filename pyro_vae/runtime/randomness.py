"""Save, seed and restore torch's global random states, from which Pyro draws.

Random states, default settings, and Pyro's parameter store and handlers belong to the process, not
to a thread. `one_thread` lets one thread at a time use them; all contexts here hold it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

_in_use = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let no other thread draw or use Pyro during the block; also a decorator.

    Other threads wait where they enter such a block.
    """
    with _in_use:
        yield


@contextmanager
def usual_settings(
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    precision: str = "highest",
    validate: bool = True,
) -> Iterator[None]:
    """Use Pyro's and torch's own settings within the block, whatever the caller has set.

    Gradients are enabled; new tensors are float32 and on the CPU.

    Args:
        device: device of the computation.
        precision: of matrix products, see `FitConfig`.
        validate: whether Pyro checks shapes and supports.
    """
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(pyro.validation_enabled(validate))
        is_bf16 = precision == "bf16"
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=is_bf16))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest" if is_bf16 else precision)
        if torch.get_default_device().type != "cpu":  # the context costs time in every operation
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield


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

    Generators with the same seed draw the same numbers: with one seed for all purposes, the noise
    of z would depend on the binarization of x.
    """
    entropy = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return int(entropy[0])


@contextmanager
def random_states(device: torch.device, seed: int | None = None) -> Iterator[RandomStates]:
    """Restore the global random states after the block, which other threads wait for.

    Args:
        device: device of the draws. The state of the CPU is always restored.
        seed: seed of the block's draws, if given.
    """
    states = RandomStates(device)
    with one_thread():
        outer = states.get()
        try:
            if seed is not None:
                states.seed(seed)
            yield states
        finally:
            states.set(outer)


class OwnState:
    """A separate random state and Pyro parameter store, in use within `active()`.

    Torch's global random states and Pyro's store are restored afterwards. If the block raises,
    `random` is unchanged.

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
        """Within `active()`, set the random state by the seed for one purpose."""
        RandomStates(self.device).seed(derive(seed, purpose))
