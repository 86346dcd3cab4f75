"""A call of a function of tensors, the key of its graph, and the graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .guards import Guards, is_plain, layout, value_key
from .optimizer import OneOptimizer
from .tracing import replaying
from .update import AdamUpdate, adam_settings, in_layout_of

Mode = Literal["compiled", "graph", "eager"]

# An attribute that every ELBO sets at its first run.
_SET_AT_FIRST_RUN = "max_plate_nesting"


class Observer(Messenger):
    """Sees the sites of guide and model, and computes tensors from them in the same graph."""

    def observed(self) -> tuple[Tensor, ...]:
        """Tensors that a step returns beside its loss; called once after it, without gradient."""
        raise NotImplementedError


def observe(
    observer: Observer | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    """Call a function. Returns its value and the observer's tensors."""
    with observer or nullcontext():
        value = function(*args, **kwargs)
    with torch.no_grad():
        observed = () if observer is None else observer.observed()
        return value, tuple(x.detach() for x in observed)


def signature(leaves: list[Any]) -> tuple[Any, ...]:
    """The layouts of arguments that are tensors; values or identities of others."""
    return tuple(layout(x) if isinstance(x, Tensor) else value_key(x) for x in leaves)


@dataclass(frozen=True)
class GraphKey:
    """Properties of a call that select its graph; `Guards` check the rest."""

    programs: tuple[Any, ...]  # model and guide
    structure: str  # containers and names of the arguments
    arguments: tuple[Any, ...]  # see `signature`
    attributes: tuple[Any, ...]  # of the ELBO and the observer
    optimizer: tuple[float, float, float] | None  # constants of an update in the graph
    autocast: tuple[torch.dtype | None, ...]  # on the CPU and on CUDA; None if off
    settings: tuple[Any, ...]  # other settings of torch


@dataclass
class Call:
    """A function and its arguments."""

    owner: Any  # the ELBO whose method the function is, or the function itself
    function: Any  # None if the ELBO lacks the method
    programs: tuple[Any, ...]  # the first arguments: model and guide
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    observer: Observer | None = None
    optimizer: OneOptimizer | None = None  # whose update becomes part of the graph

    def __post_init__(self) -> None:
        self.leaves, self.structure = tree_flatten((self.args, self.kwargs))
        self.inputs = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def key(self) -> GraphKey:
        owner, observer = (getattr(x, "__dict__", {}) for x in (self.owner, self.observer))
        attributes = [value_key(v) for k, v in owner.items() if k != _SET_AT_FIRST_RUN]
        # The observer's own state, such as sites that it has seen, is not plain.
        attributes += [value_key(v) for v in observer.values() if is_plain(v)]
        return GraphKey(
            self.programs,
            repr(self.structure),  # older versions of torch cannot hash it
            signature(self.leaves),
            (type(self.owner), value_key(self.observer), *attributes),
            None if self.optimizer is None else adam_settings(self.optimizer),
            tuple(
                torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None
                for d in ("cpu", "cuda")
            ),
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.get_default_dtype(),
                torch.get_default_device(),
                torch.get_float32_matmul_precision(),
            ),
        )

    def run(self, parameters: list[Tensor], *inputs: Tensor) -> tuple[Any, Any, Any]:
        """Call the function with `inputs` in place of its tensors.

        Returns:
            Its value, the gradients of `parameters`, and the observer's tensors.
        """
        tensors = iter(inputs)
        leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        value, observed = observe(self.observer, self.function, *self.programs, *args, **kwargs)
        if not parameters:
            return value, (), observed
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return value.detach(), gradients, observed


@dataclass(frozen=True)
class Graph:
    """A captured graph, which returns value, gradients of the leaves, and observed tensors.

    With an update, it returns loss, norm of the gradient and observed numbers in one tensor, since
    each value read from an accelerator takes time.
    """

    run: Callable[..., Any]
    leaves: list[Tensor]  # tensors with a gradient
    guards: Guards  # checked before each run
    update: AdamUpdate | None
    # Gradients to copy: callers may change them in place, but they share memory with another
    # tensor; or optimizers expect the layout of their leaf.
    copied: tuple[int, ...]

    @replaying()
    def __call__(self, inputs: list[Tensor]) -> Any:
        if self.update is not None:
            return self.run(*inputs, self.update.scalars())
        value, gradients, observed = self.run(*inputs)
        if self.copied:
            gradients = list(gradients)
            for i in self.copied:
                gradients[i] = in_layout_of(self.leaves[i], gradients[i])
        return value, gradients, observed
