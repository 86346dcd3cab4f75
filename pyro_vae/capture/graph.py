"""A call of a function of tensors, and the graph that stands for it.

A call's graph is made when arguments of its kind are first seen: the function runs, to see what
takes part; loss and gradient are recorded, held against the function itself at the same random
numbers, and compiled. An optimizer's update can be part of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..randomness import RandomStates
from .guards import Granted, Used, is_plain, place, token
from .optimizer import OneOptimizer
from .tracing import Replayed, Unfit, compiled, reason, record
from .update import Update, gradients_aside

__all__ = ["Call", "Graph", "Graphs", "Mode", "Observer", "observing"]

Mode = Literal["compiled", "graph", "eager"]

# Graphs that one `Graphs` keeps. A program that needs more (a new function at every step, batches
# of any size) is faster without.
MOST_GRAPHS = 32

# Largest difference of a gradient from its graph's, relative to the gradient's largest element.
# They do the same operations in the same order: a larger one means that they do not.
SAME = 1e-4

# An attribute of every ELBO that its first run fills in.
_FOUND = "max_plate_nesting"


class Observer(Messenger):
    """Sees the sites of guide and model, and computes something of them in the same graph."""

    def observed(self) -> tuple[Tensor, ...]:
        """Tensors that a step returns beside its loss; called once after it, without gradient."""
        raise NotImplementedError


class Graphs:
    """Graphs of one function for arguments of several shapes.

    Args:
        warns: whether to say, once, why a call has no graph.

    Attributes:
        captures: number of graphs captured so far.
    """

    def __init__(self, mode: Mode, warns: bool = True) -> None:
        self.mode = mode
        self.captures = 0
        self._graphs: dict[Any, Graph | None] = {}  # None: cannot be captured
        self._warned = not warns

    def graph_of(self, call: Call) -> Graph | None:
        """The graph of a call; None where there can be none."""
        if self.mode == "eager":
            return None
        if not all(map(_only_watches, _PYRO_STACK)):
            # The graph would do without them, or never again without them.
            handlers = ", ".join(type(h).__name__ for h in _PYRO_STACK if not _only_watches(h))
            self._warn(call, f"it runs within other handlers: {handlers}")
            return None
        try:
            graph = self._graphs[call.key]
            if graph is None or graph.granted.is_current():
                return graph
            del self._graphs[call.key]
        except KeyError:
            pass
        except TypeError as error:
            self._warn(call, f"the arguments, model and guide must be hashable: {error}")
            return None
        if self.captures >= MOST_GRAPHS:
            self._warn(
                call, f"it was captured {MOST_GRAPHS} times, for other arguments or programs"
            )
            return None
        self.captures += 1
        try:
            graph = _capture(call, self.mode)
            graph.granted.register()
        except Unfit as unfit:
            self._warn(call, str(unfit))
            graph = None
        self._graphs[call.key] = graph
        return graph

    def _warn(self, call: Call, reason: str) -> None:
        if not self._warned:
            warnings.warn(f"{call.name} runs uncaptured: {reason}", stacklevel=3)
            self._warned = True


class Call:
    """A function and its arguments, and the key of the graph that stands for them.

    Args:
        owner: the ELBO whose method the function is, or the function.
        programs: the first arguments: model and guide.
        optimizer: whose update is to be a part of the graph.
    """

    def __init__(
        self,
        owner: Any,
        function: Callable[..., Any] | None,
        programs: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observer: Observer | None,
        optimizer: OneOptimizer | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.owner, self.function, self.programs = owner, function, programs
        self.args, self.kwargs, self.observer = args, kwargs, observer
        self.leaves, self.tree = tree_flatten((args, kwargs))
        self.inputs = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.key = (
            programs,
            repr(self.tree),  # which has a hash in newer versions of torch only
            tuple(place(x)[:-1] if isinstance(x, Tensor) else token(x) for x in self.leaves),
            tuple(token(v) for k, v in getattr(owner, "__dict__", {}).items() if k != _FOUND),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_default_dtype(),
            optimizer and optimizer.settings(),
        )

    @property
    def name(self) -> str:
        return getattr(self.owner, "__name__", type(self.owner).__name__)

    def program(self, parameters: list[Tensor]) -> Callable[..., Any]:
        """What is captured: tensors → loss, gradients of `parameters`, what is observed."""

        def run(*inputs: Tensor) -> tuple[Any, ...]:
            tensors = iter(inputs)
            leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.tree)
            value, observed = self.evaluate(*args, **kwargs)
            if not parameters:
                return value, (), observed
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            return value.detach(), gradients, observed

        return run

    def evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """What the function returns, and what is observed."""
        assert self.function is not None
        return observing(self.observer, self.function, *self.programs, *args, **kwargs)


class Graph:
    """A captured graph.

    Attributes:
        leaves: the tensors that the loss has gradients of.
        granted: all that the graph takes for granted.
        update: the optimizer's, where that is a part of the graph.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        leaves: list[Tensor],
        params: list[tuple[str, Tensor, bool]],
        modules: list[nn.Module],
        update: Update | None,
    ) -> None:
        self.run = run
        self.leaves = leaves
        self.update = update
        self.granted = Granted(leaves, params, modules, update.parts() if update else [])
        # Gradients whose memory is not their own alone.
        self._shared: set[int] = set()

    def __call__(self, call: Call) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        """Value, gradients (or None) of the leaves, or after an update their norm, observed."""
        inputs = [*call.inputs]
        if self.update is not None:
            inputs.append(self.update.numbers())
        with torch.no_grad():
            value, gradients, observed = self.run(*inputs)
        if self._shared:
            gradients = tuple(
                g.clone(memory_format=torch.contiguous_format) if i in self._shared else g
                for i, g in enumerate(gradients)
            )
        return value, gradients, observed

    def find_shared(self, call: Call) -> None:
        """Look at a run's gradients: who changes one in place must not change another."""
        inputs = [*call.inputs]
        with torch.no_grad():
            _, gradients, observed = self.run(*inputs)
        taken = {t.untyped_storage().data_ptr() for t in (*inputs, *self.leaves, *observed)}
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            storage = gradient.untyped_storage()
            overlaps = storage.nbytes() < gradient.numel() * gradient.element_size()
            if overlaps or storage.data_ptr() in taken:
                self._shared.add(i)
            taken.add(storage.data_ptr())


def _capture(call: Call, mode: Mode) -> Graph:
    """Run the ELBO to see what takes part, then capture it. The random state is left as it was.

    Raises:
        Unfit: why it cannot be captured.
    """
    if any(x.requires_grad for x in call.inputs):
        raise Unfit("an argument takes a gradient")
    kinds = [type(x).__name__ for x in call.leaves if not (isinstance(x, Tensor) or is_plain(x))]
    if kinds:
        raise Unfit(f"whether an argument has changed cannot be told of a {kinds[0]}")
    if call.function is None:
        raise Unfit("it has no differentiable_loss")
    known = set(pyro.get_param_store().keys())
    states = RandomStates(_device(call))
    before = states.get()
    used = Used(*call.programs, call.function)
    with poutine.block():
        with used, poutine.trace(param_only=True) as registered:
            value, _ = call.evaluate(*call.args, **call.kwargs)
        params = [
            (name, leaf, leaf is site["value"] and isinstance(leaf, nn.Parameter))
            for name, site in registered.trace.nodes.items()
            for leaf in [site["value"].unconstrained()]
        ]
        leaves = _leaves(value) if torch.is_grad_enabled() else []
        run, inputs = call.program(leaves), [*call.inputs]

        update: Update | None = None

        def again(function: Callable[..., Any]) -> Any:
            used.restore()
            if update is not None:
                update.restore()
            states.set(before)
            return function()

        try:
            if any(name not in known and not plain for name, _, plain in params):
                after = states.get()
                repeated = again(lambda: call.evaluate(*call.args, **call.kwargs)[0])
                if not torch.equal(repeated, value):  # new parameters were drawn
                    before = after
            graph = again(lambda: record(run, inputs))
            result = again(lambda: graph(*inputs))
            _check(again(lambda: run(*inputs)), result)
            if leaves:
                _check(again(lambda: _gradients_of(call, leaves)), result[1])
            if call.optimizer is not None:
                update = Update(call.optimizer, graph, leaves, result[1])
                inputs = [*inputs, update.numbers()]
                graph = again(lambda: record(update, inputs))
                own = again(lambda: update.changed(lambda: update.own_step(result[1])))
                _check(own, again(lambda: update.changed(lambda: graph(*inputs))))
            if mode == "compiled":
                try:
                    graph = again(lambda: compiled(graph, inputs))
                except Unfit as unfit:
                    if update is not None:  # the optimizer's own step is faster
                        raise
                    warnings.warn(f"the captured graph runs uncompiled: {unfit}", stacklevel=2)
                if _device(call).type == "cuda":
                    graph = again(lambda: Replayed(graph, inputs))
            captured = Graph(graph, leaves, params, used.modules, update)
            if update is None:
                again(lambda: captured.find_shared(call))
        except Unfit:
            raise
        except Exception as error:
            raise Unfit(reason(error)) from None
        finally:
            again(lambda: None)
            if update is not None:
                update.forget()
    return captured


def observing(
    observer: Observer | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    """What a function returns, and what the observer makes of its run."""
    with observer or nullcontext():
        value = function(*args, **kwargs)
    with torch.no_grad():
        observed = () if observer is None else observer.observed()
        return value, tuple(x.detach() for x in observed)


def _gradients_of(call: Call, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """What the ELBO's own `loss_and_grads` leaves in the parameters."""
    with gradients_aside(leaves):
        call.owner.loss_and_grads(*call.programs, *call.args, **call.kwargs)
        return tuple(leaf.grad for leaf in leaves)


def _check(expected: Any, result: Any) -> None:
    """Loss, gradients and what is observed, of the graph against the ELBO's."""
    for one, other in zip(tree_leaves(expected), tree_leaves(result), strict=True):
        if not _close(one, other):
            raise Unfit(
                "its graph gives another loss or gradient at the same random numbers, as where "
                "particles are taken in chunks, or where a program is not the same at each run"
            )


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    finite = one.isfinite()
    if one.shape != other.shape or not finite.equal(other.isfinite()):
        return False
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return False
    one, other = one[finite], other[finite]
    return one.numel() == 0 or bool((one - other).abs().max() <= SAME * one.abs().max())


def _leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor that a backward pass would leave a gradient in."""
    found: list[Tensor] = []
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found


def _only_watches(handler: Messenger) -> bool:
    return isinstance(handler, TraceMessenger) and handler.param_only


def _device(call: Call) -> torch.device:
    """Of the draws."""
    return call.inputs[0].device if call.inputs else torch.device(torch.get_default_device())
