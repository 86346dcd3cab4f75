"""The interface of models: three distributions, and a Pyro model and guide made from them.

    prior()          p(z):   batch (), event (Z,)
    posterior(x)     q(z|x): x (B, *data_shape) → batch (B,), event (Z,)
    likelihood(z)    p(x|z): z (..., Z) → batch (...), event data_shape

Evidence, calibration and diagnostics need a `LatentModel`; SVI and NUTS need a `PyroModel`.
`register` names modules uniquely in Pyro's parameter store; `held_fixed` restores the store.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pyro
from pyro.distributions import Distribution
from torch import Tensor, nn

from ..runtime.randomness import one_thread

# Pyro's warning about a parameter that requires no gradient.
UNREGISTERED = ".* was not registered in the param store"

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)


class LatentModel(Protocol):
    """Any model that provides its three distributions."""

    def prior(self) -> Distribution:
        """p(z): batch (), event (Z,)."""

    def posterior(self, x: Tensor) -> Distribution:
        """q(z|x): x (B, *data_shape) → batch (B,), event (Z,)."""

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x|z): z (..., Z) → batch (...), event `data_shape`."""


class PyroModel(LatentModel, Protocol):
    """A `LatentModel` that is a Pyro model with trainable parameters.

    Attributes:
        latent: name of the latent site.
    """

    latent: str

    def model(self, x: Tensor) -> Any:
        """p(x, z), with x (B, *data_shape) observed, both sites in one plate "data" of B rows."""

    def parameters(self) -> Iterable[Tensor]:
        """All trainable parameters of model and guide."""


def register(name: str, module: nn.Module) -> None:
    """Call `pyro.module` under a name that is unique to this module object.

    Pyro's parameter store is global and keeps the first parameters registered under a name. Under
    a fixed name a second model, or a copy of the first, would silently stay untrained.
    """
    if module not in _names:
        _names[module] = f"{name}{next(_numbers)}"
    pyro.module(_names[module], module)


def uncompiled(vae: Any) -> Any:
    """The model in `torch.compile(model)`: a wrapper of another type, without any effect.

    Only `forward` is compiled, and a model has none. Compile `vae.posterior` or `vae.likelihood`.
    """
    return getattr(vae, "_orig_mod", vae)


@contextmanager
def held_fixed(vae: PyroModel) -> Iterator[None]:
    """Freeze all parameters within the context; restore them and Pyro's store afterwards."""
    store = pyro.get_param_store()
    with one_thread(), warnings.catch_warnings():
        # Pyro warns about modules in training mode whose parameters require no gradient.
        warnings.filterwarnings("ignore", message=UNREGISTERED)
        free = [p for p in vae.parameters() if p.requires_grad]
        try:
            for parameter in free:
                parameter.requires_grad_(False)
            with store.scope(store.get_state()):
                yield
        finally:
            for parameter in free:
                parameter.requires_grad_(True)
