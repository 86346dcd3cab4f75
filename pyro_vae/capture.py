"""An ELBO, captured once as a graph of tensor operations, and from then on run as that graph.

    svi = SVI(vae.model, vae.guide, optimizer, loss=capture(Trace_ELBO()))

Pyro runs model and guide in Python at every step; at small batches that costs more than the
arithmetic. A `Captured` ELBO runs them when it first sees arguments of some shape, records loss and
gradient as one graph, random draws included, holds the graph against the ELBO itself at the same
random numbers, and compiles it.

What a graph takes for granted is looked at before each use: the shapes of the arguments, the
parameters and buffers and where they are, and every plain attribute (training mode, the p of a
dropout) of the modules that took part. Where something has changed, the ELBO is captured anew. What
Python code reads from elsewhere, a global variable or a closure, stays as it was when captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .granted import Granted, Used, is_plain, place, token
from .graphs import Replayed, Unfit, compiled, reason, record
from .randomness import RandomStates

__all__ = ["Captured", "CapturedFunction", "Mode", "Observer", "capture"]

Mode = Literal["compiled", "graph", "eager"]

# Graphs that one `Captured` keeps. A program that needs more (a new function at every step, batches
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


def capture(elbo: ELBO, mode: Mode = "compiled", observer: Observer | None = None) -> Captured:
    """An ELBO of the same value and gradient that runs as a graph.

    Args:
        elbo: any with a `differentiable_loss`: the objectives of this package and most of Pyro's.
            Attributes that it names in `schedules` are inputs of the graph, and may change between
            steps; where any other changes, it is captured anew.
        mode: compiled, by torch.compile, which takes some ten seconds for each shape of the
            arguments; graph: captured but not compiled, a fraction of a second; eager: neither.
        observer: a messenger around guide and model.

    Enumerated sites and code whose course depends on the values of tensors cannot be captured. They
    run as they are, after one warning that says why. Without a compiler, compiled is as graph.
    """
    return Captured(elbo, mode, observer)


class _Graphs:
    """Graphs of one function for arguments of several shapes.

    Attributes:
        observed: what the observer made of the last run.
        captures: number of graphs captured so far.
    """

    def __init__(self, mode: Mode, observer: Observer | None) -> None:
        self.mode = mode
        self.observer = observer
        self.observed: tuple[Tensor, ...] = ()
        self.captures = 0
        self._graphs: dict[Any, _Graph | None] = {}  # None: cannot be captured
        self._warned = False

    def _graph(self, call: _Call) -> _Graph | None:
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

    def _warn(self, call: _Call, reason: str) -> None:
        if not self._warned:
            warnings.warn(f"{call.name} runs uncaptured: {reason}", stacklevel=3)
            self._warned = True


class Captured(_Graphs, ELBO):
    """See `capture`. Pyro's checks of shapes and supports are made when a shape is first seen.

    Attributes:
        elbo: what is captured.
        observed, captures: see `_Graphs`.
    """

    def __init__(self, elbo: ELBO, mode: Mode, observer: Observer | None) -> None:
        ELBO.__init__(
            self, num_particles=elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting
        )
        _Graphs.__init__(self, mode, observer)
        self.elbo = elbo

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, of draws of its own."""
        with torch.no_grad():
            call = self._call(model, guide, args, kwargs)
            graph = self._graph(call)
            if graph is None:
                return self._observing(self.elbo.loss, model, guide, args, kwargs)
            loss, _, self.observed = graph(call)
        return _number(loss)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, and its gradient added to that of the parameters."""
        with torch.enable_grad():
            call = self._call(model, guide, args, kwargs)
            graph = self._graph(call)
            if graph is None:
                return self._observing(self.elbo.loss_and_grads, model, guide, args, kwargs)
        loss, gradients, self.observed = graph(call)
        for leaf, gradient in zip(graph.leaves, gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return _number(loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, (), that may be differentiated once."""
        call = self._call(model, guide, args, kwargs)
        graph = self._graph(call)
        if graph is None:
            return self._observing(self.elbo.differentiable_loss, model, guide, args, kwargs)
        loss, gradients, self.observed = graph(call)
        return _Loss.apply(loss, gradients, *graph.leaves) if graph.leaves else loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("a captured ELBO has no trace")

    def _call(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any) -> _Call:
        function = getattr(self.elbo, "differentiable_loss", None)
        return _Call(self.elbo, function, (model, guide), args, kwargs, self.observer)

    def _observing(
        self, function: Callable[..., Any], model: Any, guide: Any, args: Any, kwargs: Any
    ) -> Any:
        """The ELBO itself."""
        value, self.observed = _observed(self.observer, function, model, guide, *args, **kwargs)
        return value


class CapturedFunction(_Graphs):
    """A function of tensors, without gradients, captured as an ELBO is.

    Args:
        function: (*tensors) → a tensor or a tuple of them; a method of a module, or a function
            whose modules are called within.
    """

    def __init__(self, function: Callable[..., Any], mode: Mode = "compiled") -> None:
        super().__init__(mode, None)
        self.function = function

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        call = _Call(self.function, self.function, (), args, {}, None)
        graph = self._graph(call)
        return self.function(*args) if graph is None else graph(call)[0]


class _Call:
    """A function and its arguments, and the key of the graph that stands for them.

    Args:
        owner: the ELBO whose method the function is, or the function.
        programs: the first arguments: model and guide.
    """

    def __init__(
        self,
        owner: Any,
        function: Callable[..., Any] | None,
        programs: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observer: Observer | None,
    ) -> None:
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
        )

    @property
    def name(self) -> str:
        return getattr(self.owner, "__name__", type(self.owner).__name__)

    def graph_inputs(self) -> list[Tensor]:
        """The arguments' tensors, then the scheduled attributes."""
        if not self.schedules:
            return self.inputs
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
        return _observed(self.observer, self.function, *self.programs, *args, **kwargs)


class _Graph:
    """A captured graph.

    Attributes:
        leaves: the tensors that the loss has gradients of.
        granted: all that the graph takes for granted.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        leaves: list[Tensor],
        params: list[tuple[str, Tensor, bool]],
        modules: list[nn.Module],
    ) -> None:
        self.run = run
        self.leaves = leaves
        self.granted = Granted(leaves, params, modules)
        # Gradients whose memory is not their own alone.
        self._shared: set[int] = set()

    def __call__(self, call: _Call) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        with torch.no_grad():
            value, gradients, observed = self.run(*call.graph_inputs())
        if self._shared:
            gradients = tuple(
                g.clone(memory_format=torch.contiguous_format) if i in self._shared else g
                for i, g in enumerate(gradients)
            )
        return value, gradients, observed

    def find_shared(self, call: _Call) -> None:
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


def _capture(call: _Call, mode: Mode) -> _Graph:
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

        def again(function: Callable[..., Any]) -> Any:
            used.restore()
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
            if mode == "compiled":
                graph = again(lambda: compiled(graph, inputs))
                if _device(call).type == "cuda":
                    graph = again(lambda: Replayed(graph, inputs))
            captured = _Graph(graph, leaves, params, used.modules)
            again(lambda: captured.find_shared(call))
        except Unfit:
            raise
        except Exception as error:
            raise Unfit(reason(error)) from None
        finally:
            used.restore()
            states.set(before)
    return captured


def _observed(
    observer: Observer | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    """What a function returns, and what the observer makes of its run."""
    with observer or nullcontext():
        value = function(*args, **kwargs)
    with torch.no_grad():
        observed = () if observer is None else observer.observed()
        return value, tuple(x.detach() for x in observed)


def _gradients_of(call: _Call, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
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


class _Loss(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Any, *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        return None, None, *(None if g is None else outer * g for g in ctx.gradients)


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


def _device(call: _Call) -> torch.device:
    """Of the draws."""
    return call.inputs[0].device if call.inputs else torch.device(torch.get_default_device())


def _number(loss: Tensor) -> float:
    number = torch_item(loss)
    warn_if_nan(number, "loss")
    return number
