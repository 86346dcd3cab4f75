"""A function of tensors → the graph of its operations, compiled or not.

The graph is recorded by make_fx while the function runs. What Python makes of tensors' values would
be a constant of it, so that reading them is refused, but for what Pyro's ELBOs read only to report
it. Tensors that are no arguments, such as parameters, are taken by reference: the graph sees their
values of the moment.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.util import torch_item
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Replayed", "Unfit", "compiled", "reason", "record"]


class Unfit(Exception):
    """Why something cannot be captured."""


def record(run: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph of a function of tensors."""

    def watched(*inputs: Tensor) -> Any:
        with _Fresh():
            return run(*inputs)

    # Of their own, since make_fx knows a tensor by its identity: one that is given twice, or that a
    # module holds too, would be taken for the same in all later calls.
    own = [x.clone() for x in inputs]
    with _items_stay_tensors(), pyro.validation_enabled(False):
        return make_fx(watched)(*own)


def compiled(graph: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph compiled.

    Raises:
        Unfit: it cannot be, as where the machine has no compiler.
    """
    options: dict[str, Any] = {"fallback_random": True}  # random numbers as eager torch draws them
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):  # whoever calls it looks for changes
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    compiled = torch.compile(graph, dynamic=False, options=options)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler, on how it goes about it
            compiled(*inputs)
    except Exception as error:
        raise Unfit(reason(error)) from None
    return compiled


@contextmanager
def _items_stay_tensors() -> Iterator[None]:
    """Pyro's ELBOs take the loss's value as a number, and look whether it is one."""
    substitutes: dict[Any, Any] = {
        torch_item: lambda x: x.detach() if isinstance(x, Tensor) else x,
        warn_if_nan: lambda value, *args, **kwargs: value,
        warn_if_inf: lambda value, *args, **kwargs: value,
    }
    names = {function.__name__: function for function in substitutes}
    replaced = [
        (module, name, function)
        for module in list(sys.modules.values())
        for name, function in names.items()
        if getattr(module, "__dict__", {}).get(name) is function
    ]
    try:
        for module, name, function in replaced:
            setattr(module, name, substitutes[function])
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


class _Fresh(TorchDispatchMode):
    """Refuses to read, into Python, a tensor that was there before.

    Of a tensor made within, make_fx knows whether it is a constant. Of parameters it does not ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if torch.Tag.data_dependent_output in func.tags and any(
            t not in self.made for t in tensors
        ):
            raise Unfit(f"its course depends on the values of a tensor, through {func}")
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes(func, tensors):
            raise Unfit(f"a shape in it depends on the values of a tensor, through {func}")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made[tensor] = True
        return result


class Replayed:
    """A graph as a CUDA graph: the inputs are copied to its own, and one launch does it all."""

    def __init__(self, run: Callable[..., Any], inputs: list[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # what is set up at first use must not be captured
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.outputs = run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        # The next replay writes over them.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.outputs)


def _indexes(func: Any, tensors: list[Tensor]) -> bool:
    """Whether an operation takes elements by their numbers, whose shape is that of the numbers."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8)
    return func is torch.ops.aten.index.Tensor and all(t.dtype in integers for t in tensors[1:])


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
