"""Adam's update as tensor operations, to be part of a captured step.

    g ← g · min(1, max_norm / ‖g‖)
    m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
    θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

"Adam: A Method for Stochastic Optimization" (arXiv:1412.6980), after clipping by the global norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .guards import Entry, entries_of
from .optimizer import OneOptimizer
from .tracing import CannotCapture

# Settings of torch.optim.Adam that `AdamUpdate` does not support.
_OFF = ("weight_decay", "decoupled_weight_decay", "amsgrad", "maximize", "differentiable")


def adam_settings(optimizer: OneOptimizer) -> tuple[float, float, float] | None:
    """β₁, β₂ and ε, which are constants of a graph; None if `AdamUpdate` would be wrong."""
    adam = optimizer.optimizer
    group, *others = adam.param_groups
    if type(adam) is not torch.optim.Adam or others or "step" in vars(adam):
        return None
    if adam._optimizer_step_pre_hooks or adam._optimizer_step_post_hooks:
        return None
    return None if any(group.get(name) for name in _OFF) else (*group["betas"], group["eps"])


class AdamUpdate:
    """Adam's update of the parameters that have a gradient.

    Attributes:
        moments: t, m and v of each parameter, as torch names them: `step`, `exp_avg` and
            `exp_avg_sq`; initialized as Adam would, if missing.
        changes: all tensors that the update changes.

    Raises:
        CannotCapture: the update would not equal the optimizer's step.
    """

    def __init__(self, optimizer: OneOptimizer, parameters: list[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        known = {id(p) for p in optimizer.parameters}
        if adam_settings(optimizer) is None or not {id(p) for p in parameters} <= known:
            raise CannotCapture("its optimizer is not plain Adam over all parameters")
        if len({(p.dtype, p.device) for p in parameters}) != 1:
            raise CannotCapture("its parameters are of several types or on several devices")
        group, state = optimizer.optimizer.param_groups[0], optimizer.optimizer.state
        for p in parameters:
            if not state[p]:
                device = p.device if group["capturable"] or group["fused"] else "cpu"
                state[p]["step"] = torch.zeros((), device=device)
                state[p]["exp_avg"] = torch.zeros_like(p)
                state[p]["exp_avg_sq"] = torch.zeros_like(p)
        self.moments = [state[p] for p in parameters]
        if len({moments["step"].item() for moments in self.moments}) != 1:
            raise CannotCapture("some of its parameters have been updated more often than others")
        self.changes = [*parameters, *(x for moments in self.moments for x in moments.values())]

    def entries(self) -> list[Entry]:
        """Where the optimizer holds these tensors, for `Guards`."""
        adam = self.optimizer.optimizer
        return [(vars(adam), "state", adam.state), *entries_of(adam.state, *self.moments)]

    def scalars(self) -> Tensor:
        """lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ) and the largest norm, (3,).

        They are an input of the graph: inside, the compiler would repeat them for every element.
        """
        group, p = self.optimizer.optimizer.param_groups[0], self.parameters[0]
        beta1, beta2 = group["betas"]
        t = self.moments[0]["step"].item() + 1
        rate, correction = group["lr"] / (1 - beta1**t), (1 - beta2**t) ** -0.5
        values = [rate, correction, self.optimizer.max_norm]
        return torch.tensor(values, dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor], scalars: Tensor) -> Tensor:
        """Update parameters and moments in place, unless the norm of the gradient is not finite.

        Returns:
            The norm of the gradient before clipping, ().
        """
        rate, correction, max_norm = scalars.unbind()
        group: dict[str, Any] = self.optimizer.optimizer.param_groups[0]
        (beta1, beta2), eps = group["betas"], group["eps"]
        norms = [torch.linalg.vector_norm(g) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        finite = norm.isfinite()
        clip = torch.where(norm > max_norm, max_norm / (norm + 1e-6), 1.0)
        for p, gradient, moments in zip(self.parameters, gradients, self.moments, strict=True):
            g = gradient * clip
            mean = moments["exp_avg"].lerp(g, 1 - beta1)
            square = (moments["exp_avg_sq"] * beta2).addcmul(g, g, value=1 - beta2)
            step = rate * mean / (square.sqrt() * correction + eps)
            for old, new in (
                (p, p - step),
                (moments["exp_avg"], mean),
                (moments["exp_avg_sq"], square),
                (moments["step"], moments["step"] + 1),
            ):
                old.copy_(torch.where(finite, new, old))
        return norm
