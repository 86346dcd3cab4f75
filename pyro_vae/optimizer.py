"""One torch optimizer behind the interface that `pyro.infer.SVI` asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim

__all__ = ["OneOptimizer"]


class OneOptimizer(PyroOptim):
    """One torch optimizer over all parameters, behind the interface that SVI asks for.

    Pyro's own makes an optimizer for each parameter, which costs more than the arithmetic of a
    small network. Gradients are clipped by their global norm before the step.

    Args:
        optimizer: over every parameter that model and guide register.

    Attributes:
        max_norm: largest norm of the gradient; inf for no clipping.
        before: called before the gradients are used, to change them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.max_norm = math.inf
        self.before: Callable[[], None] | None = None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Step, given the parameters that took part in the loss.

        Raises:
            RuntimeError: a gradient is not finite, or a parameter is not the optimizer's.
        """
        if not {id(p) for p in params} <= {id(p) for p in self.parameters}:
            # Pyro copies a parameter that is not contiguous, and would train the copy.
            raise RuntimeError("model or guide registered a parameter that the optimizer lacks")
        if self.before is not None:
            self.before()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=True)
        if norm > self.max_norm:  # clipping costs a pass over all of them
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
