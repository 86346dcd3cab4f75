"""Guards of a captured graph, rechecked before each replay.

They cover the modules that the graph uses, the objects whose methods model and guide are, and the
variables that model and guide read: parts, layouts of tensors, types, and values in attributes,
also within lists, dictionaries and plain objects. They also cover the parameters under their names
in Pyro's store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import pyro
import torch
from torch import Tensor, nn

# A dictionary, a key, and the object that must stay there.
Entry = tuple[Mapping[Any, Any], Any, Any]

# Number of elements of a container up to which changes inside are noticed, and depth.
MAX_ELEMENTS, MAX_DEPTH = 1000, 6

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_properties = attrgetter("shape", "dtype", "device", "requires_grad")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_modules", "_parameters", "_buffers")
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


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
        modules: those that the graph uses, and other objects that own model or guide.
        variables: those of an earlier run. Any that each run replaces, such as caches, are not
            guarded.
        entries: further objects that must stay in their place.
    """

    def __init__(
        self,
        leaves: list[Tensor],
        parameters: list[StoredParameter],
        modules: list[Any],
        variables: Variables,
        entries: list[Entry],
    ) -> None:
        self._parameters = parameters
        parts = [getattr(m, name) for m in modules if isinstance(m, nn.Module) for name in _PARTS]
        self._owners, self._types = modules, [*map(type, modules)]
        self._counted = [*parts, *map(vars, modules), *_classes(modules)]
        self._sizes = [*map(len, self._counted)]
        self._hooks = _hooks(modules)
        attributes = [*_attributes(modules), *variables.globals]
        self._plain = [entry for entry in attributes if is_plain(entry[2])]
        self._entries = [*entries, *entries_of(*parts)]
        self._entries += [entry for entry in attributes if isinstance(entry[2], Tensor)]
        self._entries += [(p, key, x) for p, key, x in variables.objects if p.get(key) is x]
        self._cells = [(c, state) for c, state in variables.cells if _is_in(c, state)]
        self._states = [
            (part, key, state)
            for part, key, state in variables.states
            if state_of(part.get(key)) == state
        ]
        self._leaves = leaves
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
        if [*map(len, self._counted)] != self._sizes or [*map(type, self._owners)] != self._types:
            return False
        if any(self._hooks) or any(map(_hooks_of_tensor, self._leaves)):
            return False
        for part, key, value in self._entries:
            if part.get(key) is not value:
                return False
        for cell, state in self._cells:
            if not _is_in(cell, state):
                return False
        for part, key, state in self._states:
            if state_of(part.get(key)) != state:
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
) -> Iterator[dict[int, Any]]:
    """Collect the owners of some functions, and all modules that are called in the block.

    Args:
        keep: called with the buffers of each module before its first call in the block.

    Yields:
        Modules, and other objects of which a function is a method, by their id.
    """
    modules: dict[int, Any] = {}

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
            elif owner is not value and _is_record(owner):
                modules[id(owner)] = owner
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


class Variables(NamedTuple):
    """Variables of modules and functions, as they are after a run."""

    globals: list[Entry]  # that the functions read
    cells: list[tuple[Any, Any]]  # of their closures, and the states of their contents
    objects: list[Entry]  # values that are neither plain nor tensors, compared by identity
    states: list[Entry]  # of containers and objects of data: a dictionary, a key, the state


def find_variables(modules: list[Any], functions: Iterable[Any]) -> Variables:
    """The variables on which a graph may depend."""
    found: list[Entry] = []
    cells = []
    for function in functions:
        function = getattr(function, "__func__", function)
        try:
            names = inspect.getclosurevars(function).globals
        except (TypeError, ValueError):
            continue
        found += [(function.__globals__, name, value) for name, value in names.items()]
        cells += [(cell, state_of(cell.cell_contents)) for cell in function.__closure__ or ()]
    others = [
        entry
        for entry in [*_attributes(modules), *found]
        if not (is_plain(entry[2]) or isinstance(entry[2], Tensor))
    ]
    states = [(part, key, state_of(value)) for part, key, value in others if _has_state(value)]
    objects = [entry for entry in others if not _has_state(entry[2])]
    return Variables(found, cells, objects, states)


def _is_in(cell: Any, state: Any) -> bool:
    return state_of(cell.cell_contents) == state


def _attributes(modules: list[Any]) -> list[Entry]:
    """Attributes of modules and their classes."""
    entries = entries_of(*map(vars, modules), *_classes(modules))
    return [e for e in entries if e[1] not in _INTERNAL and not e[1].startswith("__")]


def _classes(owners: list[Any]) -> list[Mapping[str, Any]]:
    """Dictionaries of the classes of some objects, without those of torch, Pyro and Python."""
    classes = {cls for owner in owners for cls in type(owner).__mro__}
    known = ("torch", "pyro", "builtins", "typing", "abc")
    return [vars(cls) for cls in classes if cls.__module__.partition(".")[0] not in known]


def has_hooks(modules: Iterable[Any], tensors: Iterable[Tensor]) -> bool:
    """Whether Python code would run at each call of a module, or each gradient of a tensor."""
    return any(_hooks(modules)) or any(map(_hooks_of_tensor, tensors))


def _hooks(modules: Iterable[Any]) -> list[dict[int, Any]]:
    owners = [m for m in modules if isinstance(m, nn.Module)]
    return [*_GLOBAL_HOOKS, *(getattr(m, name) for m in owners for name in _HOOKS)]


def _hooks_of_tensor(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def state_of(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A value to compare with that of a later time, if its content may change."""
    if is_plain(value):
        return value_key(value)
    if isinstance(value, np.ndarray) and value.size <= MAX_ELEMENTS:
        return value.dtype, value.shape, value.tobytes()
    if depth and _is_record(value):
        return _Identity(value), state_of(vars(value), depth - 1)
    if not (depth and _has_state(value)) or len(value) > MAX_ELEMENTS:
        return _Identity(value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return type(value), [state_of(part, depth - 1) for part in parts]


def _has_state(value: Any) -> bool:
    return isinstance(value, list | tuple | dict | set) or _is_record(value)


def _is_record(value: Any) -> bool:
    """Whether a value is an array, or an object whose attributes are data."""
    known = (Tensor, nn.Module, type, ModuleType)
    if isinstance(value, known) or callable(value):
        return False
    return isinstance(value, np.ndarray) or hasattr(value, "__dict__")


def entries_of(*dictionaries: Mapping[Any, Any]) -> list[Entry]:
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
