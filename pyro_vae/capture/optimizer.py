"""One torch optimizer behind the interface that `pyro.infer.SVI` asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

__all__ = ["NonFiniteGradient", "OneOptimizer"]

# Settings of torch.optim.Adam under which `OneOptimizer.update` does what Adam does.
_PLAIN = {
    "weight_decay": 0,
    "decoupled_weight_decay": False,
    "amsgrad": False,
    "maximize": False,
    "differentiable": False,
}


class NonFiniteGradient(ArithmeticError):
    """The norm of the gradient is not finite; parameters and moments are unchanged."""


class OneOptimizer(PyroOptim):
    """One torch optimizer over all parameters, behind the interface that SVI asks for.

    Pyro's own makes an optimizer for each parameter, which costs more than the arithmetic of a
    small network. Gradients are clipped by their global norm before the step.

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
        """Step, given the parameters that took part in the loss.

        Raises:
            NonFiniteGradient: no step was made.
            RuntimeError: a parameter is not the optimizer's.
        """
        if not {id(p) for p in params} <= {id(p) for p in self.parameters}:
            # Pyro copies a parameter that is not contiguous, and would train the copy.
            raise RuntimeError("model or guide registered a parameter that the optimizer lacks")
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm):
            raise NonFiniteGradient("the norm of the gradient is not finite; no step was made")
        if norm > self.max_norm:  # clipping costs a pass over all of them
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settings(self) -> tuple[Any, ...] | None:
        """What `update` takes for constant; None where it cannot stand for the optimizer's step."""
        groups = self.optimizer.param_groups
        if type(self.optimizer) is not torch.optim.Adam or len(groups) > 1:
            return None
        if any(groups[0].get(name, plain) != plain for name, plain in _PLAIN.items()):
            return None
        return (*groups[0]["betas"], groups[0]["eps"])

    def moments(self, parameters: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Adam's state of each parameter, as its own first step would make it where there is none.

        Each holds `step`, how many were made, and `exp_avg` and `exp_avg_sq`, the running means of
        the gradient and of its square.
        """
        group = self.optimizer.param_groups[0]
        on_device = group["capturable"] or group["fused"]
        for p in parameters:
            state = self.optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return [self.optimizer.state[p] for p in parameters]

    def numbers(self, parameter: Tensor) -> Tensor:
        """What `update` takes that changes from step to step, (3,): see there."""
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        steps = self.optimizer.state[parameter]["step"].item() + 1
        size = group["lr"] / (1 - beta1**steps)
        correction = (1 - beta2**steps) ** -0.5
        values = [size, correction, self.max_norm]
        return torch.tensor(values, dtype=parameter.dtype, device=parameter.device)

    @torch.no_grad()
    def update(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], numbers: Tensor
    ) -> Tensor:
        """The step as operations of tensors alone, to be part of a graph.

        Adam as of Kingma and Ba (2015), with the gradient clipped. Where that is not finite,
        nothing changes.

        Args:
            parameters: those that are to change, with their gradients.
            numbers: lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ) and the largest norm.

        Returns:
            The norm of the gradient, ().
        """
        size, correction, max_norm = numbers.unbind()
        group = self.optimizer.param_groups[0]
        (beta1, beta2), eps = group["betas"], group["eps"]
        norms = [torch.linalg.vector_norm(g) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        finite = norm.isfinite()
        clip = torch.where(norm > max_norm, max_norm / (norm + 1e-6), 1.0)
        for p, gradient, state in zip(parameters, gradients, self.moments(parameters), strict=True):
            g = gradient * clip
            mean = state["exp_avg"].lerp(g, 1 - beta1)
            square = (state["exp_avg_sq"] * beta2).addcmul(g, g, value=1 - beta2)
            step = size * mean / (square.sqrt() * correction + eps)
            for old, new in (
                (p, p - step),
                (state["exp_avg"], mean),
                (state["exp_avg_sq"], square),
                (state["step"], state["step"] + 1),
            ):
                old.copy_(torch.where(finite, new, old))
        return norm
