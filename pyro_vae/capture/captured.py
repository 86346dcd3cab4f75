"""An ELBO, or a whole step of SVI, captured as a graph of tensor operations.

    svi = SVI(vae.model, vae.guide, optimizer, loss=capture(Trace_ELBO()))

Pyro runs model and guide in Python at every step; at small batches that costs more than the
arithmetic. A `Captured` ELBO runs them when it first sees arguments of some shape, traces loss and
gradient as one graph, random draws included, verifies the graph against the ELBO at the same random
numbers, and compiles it. In a `CapturedSVI` the graph includes the optimizer's update.

The ELBO is captured again if the shape of an argument, a parameter, a buffer, an attribute of a
module (training mode, the p of a dropout) or a variable that model or guide reads has changed.
Variables of other functions keep their value at capture time. Hooks rule out a graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .build import build
from .graph import Call, Graph, GraphKey, Mode, Observer, observe, signature
from .optimizer import NonFiniteGradient, OneOptimizer
from .tracing import CannotCapture

# Maximum number of captures of one ELBO. A program that needs more (a new function at every step,
# batches of any size) is faster without.
MAX_GRAPHS = 32


def capture(elbo: ELBO, mode: Mode = "compiled", observer: Observer | None = None) -> Captured:
    """An ELBO of the same value and gradient that runs as a graph.

    Args:
        elbo: one with a `differentiable_loss`: the objectives of this package and most of Pyro's.
            If an attribute of it changes, it is captured again. Give a value that changes from step
            to step as a tensor argument, such as `kl_weight` of `elbos.Sampled`.
        mode: compiled, by Inductor, which takes about 10 seconds for each shape of the
            arguments; graph: captured but not compiled, a fraction of a second; eager: neither.
        observer: a messenger around guide and model. With one, the loss comes in a tuple, followed
            by the tensors of `Observer.observed`, as Pyro's `SVI.step` allows.

    Enumerated sites and data-dependent control flow cannot be captured. They run eagerly, after one
    warning that gives the reason. Without a compiler, compiled is the same as graph.
    """
    return Captured(elbo, mode, observer)


class Captured(ELBO):
    """See `capture`. Pyro checks shapes and supports when a shape is first seen.

    Attributes:
        elbo: the ELBO that is captured.
    """

    def __init__(self, elbo: ELBO, mode: Mode, observer: Observer | None) -> None:
        super().__init__(num_particles=elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting)
        self.elbo = elbo
        self.observer = observer
        self.graphs = _Graphs(mode)

    @property
    def captures(self) -> int:
        """Number of captures so far."""
        return self.graphs.captures

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, from new draws; with an observer, a tuple."""
        with torch.no_grad():
            _, loss, _, observed = self._run("loss", model, guide, args, kwargs)
        return self.with_observed(_number(loss), observed)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss. Adds its gradient to that of the parameters. With an observer, a tuple."""
        with torch.enable_grad():
            leaves, loss, gradients, observed = self._run(
                "loss_and_grads", model, guide, args, kwargs
            )
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return self.with_observed(_number(loss), observed)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, (), which can be differentiated once; with an observer, a tuple."""
        leaves, loss, gradients, observed = self._run(
            "differentiable_loss", model, guide, args, kwargs
        )
        if leaves:
            loss = KnownGradient.apply(loss, gradients, *leaves)
        return self.with_observed(loss, observed)

    def call(
        self, model: Any, guide: Any, args: Any, kwargs: Any, optimizer: OneOptimizer | None = None
    ) -> Call:
        """The call that is captured, for these arguments."""
        function = getattr(self.elbo, "differentiable_loss", None)
        return Call(self.elbo, function, (model, guide), args, kwargs, self.observer, optimizer)

    def with_observed(self, loss: Any, observed: tuple[Any, ...]) -> Any:
        return loss if self.observer is None else (loss, *observed)

    def _run(
        self, method: str, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> tuple[list[Tensor], Any, Any, tuple[Tensor, ...]]:
        """Leaves, loss, gradients and observed of a graph; without one, a method of the ELBO."""
        call = self.call(model, guide, args, kwargs)
        graph = self.graphs.find(call)
        if graph is not None:
            return graph.leaves, *graph(call.inputs)
        function = getattr(self.elbo, method)
        loss, observed = observe(self.observer, function, model, guide, *args, **kwargs)
        return [], loss, (), observed

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("a captured ELBO has no trace")


class CapturedFunction:
    """A function of tensors, without gradients, captured as an ELBO is.

    Args:
        function: (*tensors) → a tensor or a tuple of tensors; a method of a module, or a function
            that calls modules.
    """

    def __init__(self, function: Callable[..., Any], mode: Mode = "compiled") -> None:
        self.function = function
        self.graphs = _Graphs(mode)

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        call = Call(self.function, self.function, (), args, {})
        graph = self.graphs.find(call)
        return self.function(*args) if graph is None else graph(call.inputs)[0]


class CapturedSVI(SVI):
    """`pyro.infer.SVI` whose whole step is one graph: loss, gradient and the optimizer's update.

    At capture time, the graph is verified against the ELBO's gradient and the optimizer's own step.
    The update is Adam's. With another optimizer, or if a parameter already has a gradient or the
    step cannot be captured, the step is SVI's, with only the ELBO captured if possible.

    Args:
        model, guide: see `pyro.infer.SVI`.
        optim: an optimizer over all parameters.
        loss: the ELBO.
    """

    def __init__(self, model: Any, guide: Any, optim: OneOptimizer, loss: Captured) -> None:
        super().__init__(model, guide, optim, loss)
        self.captured = loss
        self.graphs = _Graphs(loss.graphs.mode, warns=False)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step.

        Returns:
            The loss; with an observer, a tuple of numbers that begins with it.

        Raises:
            NonFiniteGradient: parameters and moments are unchanged.
        """
        return next(self.steps([(args, kwargs)]))

    def steps(self, calls: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[Any]:
        """Make a step for each of some arguments, when the first result is asked for.

        A graph's guards are checked once, before the first step, and its numbers are read once,
        after the last: meanwhile, an accelerator computes while Python prepares the next step.

        Args:
            calls: arguments and keyword arguments of `step`, the tensors of the same layouts, taken
                one at a time, each before its step: learning rate and clip norm may be set between.

        Yields:
            What `step` returns, for each step.

        Raises:
            NonFiniteGradient: in place of the result of a step, which has changed no parameter.
            ValueError: arguments differ from the first ones in more than the values of tensors.
        """
        calls = iter(calls)
        first = next(calls, None)
        if first is None:
            return
        graph = self._graph(*first)
        calls = chain([first], calls)
        if graph is None:
            for args, kwargs in calls:
                yield super().step(*args, **kwargs)
            return
        expected = signature(tree_leaves(first))
        numbers = []
        for call in calls:
            leaves = tree_leaves(call)
            if signature(leaves) != expected:  # a compiled graph would read beyond a tensor's end
                raise ValueError(
                    "steps expects tensors of the same layouts and equal other values; use step "
                    "where they differ"
                )
            numbers.append(graph([x for x in leaves if isinstance(x, Tensor)]))
        for loss, norm, *observed in torch.stack(numbers).tolist():
            if not math.isfinite(norm):
                raise NonFiniteGradient
            warn_if_nan(loss, "loss")
            yield self.captured.with_observed(loss, tuple(observed))

    def _graph(self, args: Any, kwargs: Any) -> Graph | None:
        """The graph of a step; None if SVI has to make it."""
        with torch.enable_grad():
            call = self.captured.call(self.model, self.guide, args, kwargs, self.optim)
            graph = self.graphs.find(call)
        if graph is None or any(leaf.grad is not None for leaf in graph.leaves):
            return None
        return graph


class KnownGradient(torch.autograd.Function):
    """A number whose gradients in some leaves are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Any, *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        return None, None, *(None if g is None else outer * g for g in ctx.gradients)


def _number(loss: Tensor | float) -> float:
    """The loss of a graph as a number. An eager ELBO returns a number and warns itself."""
    if not isinstance(loss, Tensor):
        return loss
    number = loss.item()
    warn_if_nan(number, "loss")
    return number


class _Graphs:
    """The graphs of one function, for arguments of several shapes."""

    def __init__(self, mode: Mode, warns: bool = True) -> None:
        self.mode = mode
        self.captures = 0  # so far
        self.graphs: dict[GraphKey, Graph | None] = {}  # None: cannot be captured
        self._warns = warns  # once, if a call has no graph

    def find(self, call: Call) -> Graph | None:
        """The graph of a call, captured if necessary; None if the call must run eagerly."""
        if self.mode == "eager":
            return None
        handlers = [type(h).__name__ for h in _PYRO_STACK if not _only_records(h)]
        if handlers:  # a graph would ignore them, or keep them after their end
            return self._warn(call, f"it runs within other handlers: {', '.join(handlers)}")
        try:
            hash(call.programs)
        except TypeError as error:
            return self._warn(call, f"model and guide must be hashable: {error}")
        key = call.key()
        graph = self.graphs.get(key)
        if graph is not None and graph.guards.hold():
            return graph
        if graph is None and key in self.graphs:
            return None
        if self.captures >= MAX_GRAPHS:
            return self._warn(
                call, f"it was captured {MAX_GRAPHS} times, for other arguments or programs"
            )
        try:
            graph = build(call, self.mode)
            graph.guards.hold()  # which registers the parameters
        except CannotCapture as reason:
            graph = self._warn(call, str(reason))
        self.captures += 1
        self.graphs[key] = graph
        return graph

    def _warn(self, call: Call, reason: str) -> Graph | None:
        """Warn at the first call. Returns None."""
        if self._warns:
            name = getattr(call.owner, "__name__", type(call.owner).__name__)
            warnings.warn(f"{name} runs uncaptured: {reason}", stacklevel=4)
            self._warns = False
        return None


def _only_records(handler: Messenger) -> bool:
    """Whether a handler changes nothing: it notes parameters, or hides sites from outer ones."""
    records = isinstance(handler, TraceMessenger) and handler.param_only
    return records or isinstance(handler, BlockMessenger)
