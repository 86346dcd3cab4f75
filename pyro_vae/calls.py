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

from .granted import Granted, Used, is_plain, place, token
from .graphs import Replayed, Unfit, compiled, reason, record
from .optimizer import OneOptimizer
from .randomness import RandomStates

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
        """What becomes `Captured.observed`; called once after the loss, without gradient."""
        raise NotImplementedError


class Graphs:
    """Graphs of one function for arguments of several shapes.

    Args:
        warns: whether to say, once, why a call has no graph.

    Attributes:
        observed: what the observer made of the last run.
        captures: number of graphs captured so far.
    """

    def __init__(self, mode: Mode, observer: Observer | None, warns: bool = True) -> None:
        self.mode = mode
        self.observer = observer
        self.observed: tuple[Tensor, ...] = ()
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
        self.schedules: tuple[str, ...] = getattr(owner, "schedules", ())
        found = (*self.schedules, _FOUND)
        self.key = (
            programs,
            repr(self.tree),  # which has a hash in newer versions of torch only
            tuple(place(x)[:-1] if isinstance(x, Tensor) else token(x) for x in self.leaves),
            tuple(token(v) for k, v in getattr(owner, "__dict__", {}).items() if k not in found),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_default_dtype(),
            optimizer and optimizer.settings(),
        )

    @property
    def name(self) -> str:
        return getattr(self.owner, "__name__", type(self.owner).__name__)

    def graph_inputs(self) -> list[Tensor]:
        """The arguments' tensors, then the scheduled attributes."""
        if not self.schedules:
            return [*self.inputs]
        device = self.inputs[0].device if self.inputs else None
        return [
            *self.inputs,
            *(
                torch.full((), getattr(self.owner, name), dtype=torch.float64, device=device)
                for name in self.schedules
            ),
        ]

    def program(self, parameters: list[Tensor]) -> Callable[..., Any]:
        """What is captured: tensors → loss, gradients of `parameters`, what is observed."""

        def run(*inputs: Tensor) -> tuple[Any, ...]:
            tensors = iter(inputs)
            leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.tree)
            before = {name: getattr(self.owner, name) for name in self.schedules}
            try:
                for name, value in zip(self.schedules, tensors, strict=True):
                    setattr(self.owner, name, value)
                value, observed = self.evaluate(*args, **kwargs)
            finally:
                for name, number in before.items():
                    setattr(self.owner, name, number)
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
        update: _Update | None,
    ) -> None:
        self.run = run
        self.leaves = leaves
        self.update = update
        self.granted = Granted(leaves, params, modules, update.parts() if update else [])
        # Gradients whose memory is not their own alone.
        self._shared: set[int] = set()

    def __call__(self, call: Call) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        """Value, gradients (or None) of the leaves, or after an update their norm, observed."""
        inputs = call.graph_inputs()
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
        inputs = call.graph_inputs()
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


class _Update:
    """An optimizer's step behind a graph of loss and gradient, with which it makes one graph.

    Args:
        graph: inputs → loss, gradients of the leaves, what is observed.
        gradients: of a run; None for a leaf that has none.

    Raises:
        Unfit: why the optimizer's step cannot be a part of a graph.
    """

    def __init__(
        self,
        optimizer: OneOptimizer,
        graph: Callable[..., Any],
        leaves: list[Tensor],
        gradients: tuple[Tensor | None, ...],
    ) -> None:
        self.optimizer, self.graph = optimizer, graph
        self.taken = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self.leaves = [leaves[i] for i in self.taken]
        known = {id(p) for p in optimizer.parameters}
        if optimizer.settings() is None or not {id(leaf) for leaf in self.leaves} <= known:
            raise Unfit("its optimizer is not plain Adam over all parameters")
        self.states = optimizer.moments(self.leaves)
        if len({(leaf.dtype, leaf.device) for leaf in self.leaves}) != 1:
            raise Unfit("its parameters are of several types or on several devices")
        if len({state["step"].item() for state in self.states}) != 1:
            raise Unfit("its parameters have been updated some more often than others")
        changed = [*self.leaves, *(x for state in self.states for x in state.values())]
        self._kept = [(x, x.detach().clone()) for x in changed]

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """(*inputs, numbers) → loss, norm of the gradient, what is observed."""
        with torch.no_grad(), torch.autocast(self.leaves[0].device.type, enabled=False):
            value, gradients, observed = self.graph(*inputs[:-1])
            gradients = [gradients[i] for i in self.taken]
            return value, self.optimizer.update(self.leaves, gradients, inputs[-1]), observed

    def numbers(self) -> Tensor:
        return self.optimizer.numbers(self.leaves[0])

    def parts(self) -> list[tuple[dict[Any, Any], Any, Any]]:
        """Where the optimizer holds the tensors that the graph changes."""
        state = self.optimizer.optimizer.state
        places: list[tuple[dict[Any, Any], Any, Any]] = [
            (vars(self.optimizer.optimizer), "state", state)
        ]
        for leaf, part in zip(self.leaves, self.states, strict=True):
            places += [(state, leaf, part), *((part, name, x) for name, x in part.items())]
        return places

    @torch.no_grad()
    def restore(self) -> None:
        for x, value in self._kept:
            x.copy_(value)

    def forget(self) -> None:
        """How things were before, once they are restored: another copy of all parameters."""
        self._kept.clear()

    @torch.no_grad()
    def changed(self, step: Callable[[], Any]) -> list[Tensor]:
        """What a step makes of parameters and moments, which are as before then."""
        self.restore()
        step()
        return [x.detach().clone() for x, _ in self._kept]

    def own_step(self, gradients: tuple[Any, ...]) -> None:
        """The optimizer's, by the same gradients."""
        kept = [p.grad for p in self.optimizer.parameters]
        try:
            for p in self.optimizer.parameters:
                p.grad = None
            for leaf, i in zip(self.leaves, self.taken, strict=True):
                leaf.grad = gradients[i].clone()
            self.optimizer(self.leaves)
        finally:
            for p, gradient in zip(self.optimizer.parameters, kept, strict=True):
                p.grad = gradient


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
        run, inputs = call.program(leaves), call.graph_inputs()

        update: _Update | None = None

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
                update = _Update(call.optimizer, graph, leaves, result[1])
                inputs = [*inputs, update.numbers()]
                graph = again(lambda: record(update, inputs))
                own = update.changed(lambda: update.own_step(result[1]))
                _check(own, update.changed(lambda: again(lambda: graph(*inputs))))
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
    kept = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        call.owner.loss_and_grads(*call.programs, *call.args, **call.kwargs)
        return tuple(leaf.grad for leaf in leaves)
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient


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
