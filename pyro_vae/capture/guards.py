"""Guards of a captured graph, rechecked before each replay.

They cover the modules that the graph uses (their parts, the layout of their tensors, their plain
attributes) and the parameters under their names in Pyro's store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ref

import pyro
import torch
from torch import Tensor, nn

# A dictionary, a key, and the object that must stay there.
Entry = tuple[dict[Any, Any], Any, Any]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_properties = attrgetter("shape", "dtype", "device", "requires_grad")
_PARTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class StoredParameter(NamedTuple):
    """A parameter of Pyro's store."""

    name: str
    value: Tensor  # unconstrained
    in_module: bool


class Guards:
    """State recorded at capture time.

    Args:
        leaves: tensors in which the loss has gradients.
        parameters: those that the call registers in Pyro's store.
        modules: those that the graph uses.
        entries: further objects that must stay in their place.
    """

    def __init__(
        self,
        leaves: list[Tensor],
        parameters: list[StoredParameter],
        modules: list[nn.Module],
        entries: list[Entry],
    ) -> None:
        self._parameters = parameters
        parts = [getattr(m, name) for m in modules for name in _PARTS]
        attributes = entries_of(*map(vars, modules))
        self._sizes = [(part, len(part)) for part in parts]
        self._entries = [*entries, *entries_of(*parts)]
        self._entries += [entry for entry in attributes if isinstance(entry[2], Tensor)]
        self._plain = [entry for entry in attributes if is_plain(entry[2])]
        objects = [*leaves, *(x for _, _, x in self._entries)]
        self._tensors = list({id(x): x for x in objects if isinstance(x, Tensor)}.values())
        self._layouts = [*map(_properties, self._tensors)], [*map(Tensor.stride, self._tensors)]
        self._on_gpu = [x for x in self._tensors if x.is_cuda]
        self._addresses = [*map(Tensor.data_ptr, self._on_gpu)]  # which a CUDA graph uses

    def hold(self) -> bool:
        """Whether nothing has changed.

        If so, the parameters are registered in Pyro's store, as model and guide would, for `SVI`
        and other handlers to see.
        """
        # Plain loops and maps, because this runs at every step.
        for part, size in self._sizes:
            if len(part) != size:
                return False
        for part, key, value in self._entries:
            if part.get(key) is not value:
                return False
        for part, key, value in self._plain:
            now = part.get(key)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        layouts = [*map(_properties, self._tensors)], [*map(Tensor.stride, self._tensors)]
        addresses = [*map(Tensor.data_ptr, self._on_gpu)]
        if layouts != self._layouts or addresses != self._addresses:
            return False
        store = pyro.get_param_store()
        for name, value, in_module in self._parameters:
            if name not in store and not in_module:
                return False  # only model and guide can initialize it
            found = pyro.param(name) if name in store else pyro.param(name, value)
            if found.unconstrained() is not value:
                return False
        return True


@contextmanager
def watch_modules(
    functions: Iterable[Any], keep: Callable[[Iterable[Tensor]], object]
) -> Iterator[dict[int, nn.Module]]:
    """Collect the modules of some functions, and all modules that are called in the block.

    Args:
        keep: called with the buffers of each module before its first call in the block.

    Yields:
        The modules by their id.
    """
    modules: dict[int, nn.Module] = {}

    def add(module: nn.Module, args: Any = ()) -> None:
        for part in module.modules():
            if id(part) not in modules:
                modules[id(part)] = part
                keep(part.buffers(recurse=False))

    for function in functions:
        for value in (function, *_closure(function)):
            owner = getattr(value, "__self__", value)
            if isinstance(owner, nn.Module):
                add(owner)
    hook = nn.modules.module.register_module_forward_pre_hook(add)
    try:
        yield modules
    finally:
        hook.remove()


def _closure(function: Any) -> list[Any]:
    """Values that a function reads from its closure and from global variables."""
    try:
        variables = inspect.getclosurevars(function)
    except (TypeError, ValueError):  # not a Python function; a variable without a value
        return []
    values = [*variables.nonlocals.values(), *variables.globals.values()]
    return [value() if isinstance(value, ref) else value for value in values]


def entries_of(*dictionaries: dict[Any, Any]) -> list[Entry]:
    return [(part, key, value) for part in dictionaries for key, value in part.items()]


def is_plain(value: Any) -> bool:
    """Whether a value is immutable and quickly compared."""
    if isinstance(value, tuple):
        return all(is_plain(part) for part in value)
    return isinstance(value, _PLAIN)


class _Identity:
    """Stands for an object in a key, and equals only itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def value_key(value: Any) -> Any:
    """A hashable key of a value: its type and text if it is plain, otherwise its identity.

    The text distinguishes 0.0 from −0.0, the type True from 1.
    """
    return (type(value), repr(value)) if is_plain(value) else _Identity(value)


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor on which a graph depends, without its values."""
    return _properties(tensor), tensor.stride()
