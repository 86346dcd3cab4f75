"""What a captured graph takes for granted, to be looked at before each use.

The modules that took part: of which parts they are made, where their tensors are, what their plain
attributes say; and the parameters under their names in Pyro's store.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import ref

import pyro
import torch
from torch import Tensor, nn

__all__ = ["Granted", "Used", "is_plain", "place", "token"]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Granted:
    """How things are at its making.

    Args:
        leaves: tensors that the loss has gradients of.
        params: of Pyro's store: name, unconstrained value, and whether that is a module's parameter
            as it stands.
        modules: those that take part.
        parts: dictionaries that must hold the same object under a name.
    """

    def __init__(
        self,
        leaves: list[Tensor],
        params: list[tuple[str, Tensor, bool]],
        modules: list[nn.Module],
        parts: list[tuple[dict[Any, Any], Any, Any]],
    ) -> None:
        self._params = params
        # What is looked at before each use: what must be the same object, what must be equal, of
        # how many entries, and where each tensor is.
        made_of = [part for m in modules for part in _parts(m)]
        self._sizes = [(part, len(part)) for part in made_of]
        self._same = [*parts, *((part, k, v) for part in made_of for k, v in part.items())]
        self._same += [
            (vars(m), k, v) for m in modules for k, v in vars(m).items() if isinstance(v, Tensor)
        ]
        self._equal = [(vars(m), k, v) for m in modules for k, v in vars(m).items() if is_plain(v)]
        tensors = [*leaves, *(v for _, _, v in self._same if isinstance(v, Tensor))]
        self._places = [(t, place(t)) for t in {id(t): t for t in tensors}.values()]

    def is_current(self) -> bool:
        """Whether all is as it was. The parameters are registered in Pyro's store on the way."""
        # Plain loops: this is done at every step.
        for part, size in self._sizes:
            if len(part) != size:
                return False
        for part, name, value in self._same:
            if part.get(name) is not value:
                return False
        for part, name, value in self._equal:
            now = part.get(name)
            if now is not value and now != value:
                return False
        for tensor, was in self._places:
            if place(tensor) != was:
                return False
        return self.register()

    def register(self) -> bool:
        """As model and guide would, for whoever traces them, and for what `SVI` optimizes.

        Returns:
            False where the store has another parameter of that name, or has lost one that it alone
            knows how to make.
        """
        store = pyro.get_param_store()
        for name, leaf, plain in self._params:
            if name in store:
                value = pyro.param(name)
            elif plain:
                value = pyro.param(name, leaf)
            else:
                return False
            if value.unconstrained() is not leaf:
                return False
        return True


class Used:
    """The modules of the programs and all called within, and how they were before.

    Attributes:
        modules: in the order of their first use.
    """

    def __init__(self, *programs: Any) -> None:
        self.modules: list[nn.Module] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for program in programs:
            for value in (program, *_closed_over(program)):
                owner = getattr(value, "__self__", value)
                if isinstance(owner, nn.Module):
                    self._see(owner)

    def __enter__(self) -> None:
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._see)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _see(self, module: nn.Module, args: Any = ()) -> None:
        for part in module.modules():
            if not any(part is other for other in self.modules):
                self.modules.append(part)
                self._buffers += [(b, b.detach().clone()) for b in part.buffers(recurse=False)]

    @torch.no_grad()
    def restore(self) -> None:
        """Buffers, such as the running means of a batch normalization."""
        for buffer, value in self._buffers:
            buffer.copy_(value)


def _closed_over(program: Any) -> list[Any]:
    """What a function reads from around it."""
    try:
        variables = inspect.getclosurevars(program)
    except TypeError:  # it is no Python function
        return []
    values = [*variables.nonlocals.values(), *variables.globals.values()]
    return [value() if isinstance(value, ref) else value for value in values]


def _parts(module: nn.Module) -> list[dict[Any, Any]]:
    """What a module is made of."""
    return [
        module._modules,
        module._parameters,
        module._buffers,
        module._forward_hooks,
        module._forward_pre_hooks,
    ]


def is_plain(value: Any) -> bool:
    """Whether a value is compared at a glance, and changes by being replaced alone."""
    if isinstance(value, tuple):
        return all(is_plain(part) for part in value)
    return isinstance(value, _PLAIN)


class _Same:
    """Stands for an object in a key: equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def token(value: Any) -> Any:
    """A value's part of a key. (0.0 equals −0.0, and True equals 1.)"""
    return (type(value), repr(value)) if is_plain(value) else _Same(value)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """All but the values; in CUDA graphs addresses are fixed."""
    address = tensor.data_ptr() if tensor.is_cuda else None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, address
