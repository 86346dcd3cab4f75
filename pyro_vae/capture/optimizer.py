"""One torch optimizer behind the interface that `pyro.infer.SVI` asks for."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.optim import PyroOptim


class NonFiniteGradient(ArithmeticError):
    """The norm of the gradient is not finite. Parameters and moments are unchanged."""

    def __init__(self) -> None:
        super().__init__("the norm of the gradient is not finite; no step was made")


class OneOptimizer(PyroOptim):
    """One torch optimizer over all parameters, behind the interface that SVI asks for.

    Pyro's own interface makes an optimizer for each parameter, which costs more than the arithmetic
    of a small network. Gradients are clipped by their global norm before the step.

    Args:
        optimizer: over every parameter that model and guide register.

    Attributes:
        max_norm: largest norm of the gradient; inf for no clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.max_norm = math.inf

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Make a step and set the gradients to None.

        Args:
            params: the parameters that took part in the loss.

        Raises:
            NonFiniteGradient: no step was made.
            RuntimeError: a parameter does not belong to the optimizer.
        """
        if not {id(p) for p in params} <= {id(p) for p in self.parameters}:
            # Pyro copies a parameter that is not contiguous, and would train the copy.
            raise RuntimeError("model or guide registered a parameter that the optimizer lacks")
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm):
            raise NonFiniteGradient
        if norm > self.max_norm:  # clipping costs a pass over all gradients
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
