"""An ELBO, captured once as a graph of tensor operations, and from then on run as that graph.

    svi = SVI(vae.model, vae.guide, optimizer, loss=capture(Trace_ELBO()))

Pyro runs model and guide in Python at every step; at small batches that costs more than the
arithmetic. A `Captured` ELBO runs them when it first sees arguments of some shape, records loss and
gradient as one graph, random draws included, holds the graph against the ELBO itself at the same
random numbers, and compiles it. In a `CapturedSVI` the graph holds the optimizer's update too.

What a graph takes for granted is looked at before each use: the shapes of the arguments, the
parameters and buffers and where they are, and every plain attribute (training mode, the p of a
dropout) of the modules that took part. Where something has changed, the ELBO is captured anew. What
Python code reads from elsewhere, a global variable or a closure, stays as it was when captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from pyro.infer.util import torch_item
from pyro.util import warn_if_nan
from torch import Tensor

from .graph import Call, Graphs, Mode, Observer, observing
from .optimizer import NonFiniteGradient, OneOptimizer

__all__ = ["Captured", "CapturedFunction", "CapturedSVI", "Mode", "Observer", "capture"]


def capture(elbo: ELBO, mode: Mode = "compiled", observer: Observer | None = None) -> Captured:
    """An ELBO of the same value and gradient that runs as a graph.

    Args:
        elbo: any with a `differentiable_loss`: the objectives of this package and most of Pyro's.
            Where an attribute of it changes, it is captured anew. A value that changes from step to
            step is an argument: a tensor, such as `kl_weight` of `elbos.Sampled`.
        mode: compiled, by torch.compile, which takes some ten seconds for each shape of the
            arguments; graph: captured but not compiled, a fraction of a second; eager: neither.
        observer: a messenger around guide and model. With one, the loss comes in a tuple, followed
            by what the observer makes of the run, as Pyro's `SVI.step` allows.

    Enumerated sites and code whose course depends on the values of tensors cannot be captured. They
    run as they are, after one warning that says why. Without a compiler, compiled is as graph.
    """
    return Captured(elbo, mode, observer)


class Captured(Graphs, ELBO):
    """See `capture`. Pyro's checks of shapes and supports are made when a shape is first seen.

    Attributes:
        elbo: what is captured.
        captures: number of graphs captured so far.
    """

    def __init__(self, elbo: ELBO, mode: Mode, observer: Observer | None) -> None:
        ELBO.__init__(
            self, num_particles=elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting
        )
        Graphs.__init__(self, mode)
        self.elbo = elbo
        self.observer = observer

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, of draws of its own; with an observer, a tuple."""
        with torch.no_grad():
            call = self.call(model, guide, args, kwargs)
            graph = self.graph_of(call)
            if graph is None:
                return self._uncaptured(self.elbo.loss, model, guide, args, kwargs)
            loss, _, observed = graph(call)
        return self._with(_number(loss), observed)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, and its gradient added to that of the parameters; with an observer, a tuple."""
        with torch.enable_grad():
            call = self.call(model, guide, args, kwargs)
            graph = self.graph_of(call)
            if graph is None:
                return self._uncaptured(self.elbo.loss_and_grads, model, guide, args, kwargs)
        loss, gradients, observed = graph(call)
        for leaf, gradient in zip(graph.leaves, gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return self._with(_number(loss), observed)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, (), that may be differentiated once; with an observer, a tuple."""
        call = self.call(model, guide, args, kwargs)
        graph = self.graph_of(call)
        if graph is None:
            return self._uncaptured(self.elbo.differentiable_loss, model, guide, args, kwargs)
        loss, gradients, observed = graph(call)
        value = _Loss.apply(loss, gradients, *graph.leaves) if graph.leaves else loss
        return self._with(value, observed)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("a captured ELBO has no trace")

    def call(
        self,
        model: Any,
        guide: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        optimizer: OneOptimizer | None = None,
    ) -> Call:
        """The ELBO's run with these arguments."""
        function = getattr(self.elbo, "differentiable_loss", None)
        return Call(self.elbo, function, (model, guide), args, kwargs, self.observer, optimizer)

    def _uncaptured(
        self, function: Callable[..., Any], model: Any, guide: Any, args: Any, kwargs: Any
    ) -> Any:
        """The ELBO itself."""
        value, observed = observing(self.observer, function, model, guide, *args, **kwargs)
        return self._with(value, observed)

    def _with(self, loss: Any, observed: tuple[Tensor, ...]) -> Any:
        return loss if self.observer is None else (loss, *observed)


class CapturedFunction(Graphs):
    """A function of tensors, without gradients, captured as an ELBO is.

    Args:
        function: (*tensors) → a tensor or a tuple of them; a method of a module, or a function
            whose modules are called within.
    """

    def __init__(self, function: Callable[..., Any], mode: Mode = "compiled") -> None:
        super().__init__(mode)
        self.function = function

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        call = Call(self.function, self.function, (), args, {}, None)
        graph = self.graph_of(call)
        return self.function(*args) if graph is None else graph(call)[0]


class CapturedSVI(SVI):
    """`pyro.infer.SVI` whose whole step is one graph: loss, gradient and the optimizer's update.

    The graph is held against the ELBO's gradient and the optimizer's own step when it is captured.
    The update is Adam's; with another optimizer, or where a gradient is there already or the ELBO
    cannot be captured, the step is SVI's, of the ELBO captured alone, if it can be.

    Args:
        model, guide: see `pyro.infer.SVI`.
        optim: of all parameters.
        loss: the ELBO.
    """

    def __init__(self, model: Any, guide: Any, optim: OneOptimizer, loss: Captured) -> None:
        super().__init__(model, guide, optim, loss)
        self.captured = loss
        self.graphs = Graphs(loss.mode, warns=False)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step.

        Returns:
            The loss; with an observer, a tuple of numbers that begins with it.

        Raises:
            NonFiniteGradient: parameters and moments are unchanged.
        """
        with torch.enable_grad():
            call = self.captured.call(self.model, self.guide, args, kwargs, self.optim)
            graph = self.graphs.graph_of(call)
        if graph is None or any(leaf.grad is not None for leaf in graph.leaves):
            return super().step(*args, **kwargs)
        loss, norm, observed = graph(call)
        if not math.isfinite(norm.item()):
            raise NonFiniteGradient("the norm of the gradient is not finite; no step was made")
        if self.captured.observer is None:
            return _number(loss)
        return _number(loss), *(x.item() for x in observed)


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


def _number(loss: Tensor) -> float:
    number = torch_item(loss)
    warn_if_nan(number, "loss")
    return number
