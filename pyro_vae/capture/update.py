"""An optimizer's step as the end of a graph of loss and gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .optimizer import OneOptimizer
from .tracing import Unfit

__all__ = ["Update", "gradients_aside"]


class Update:
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
        """What a step makes of parameters and moments."""
        step()
        return [x.detach().clone() for x, _ in self._kept]

    def own_step(self, gradients: tuple[Any, ...]) -> None:
        """The optimizer's, by the same gradients."""
        with gradients_aside(self.optimizer.parameters):
            for leaf, i in zip(self.leaves, self.taken, strict=True):
                leaf.grad = gradients[i].clone()
            self.optimizer(self.leaves)


@contextmanager
def gradients_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, the tensors have no gradient; afterwards, the one that they had."""
    kept = [x.grad for x in tensors]
    try:
        for x in tensors:
            x.grad = None
        yield
    finally:
        for x, gradient in zip(tensors, kept, strict=True):
            x.grad = gradient
