"""Adam's update, to be part of a captured step.

    g ← g · min(1, max_norm / ‖g‖)
    m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
    θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

"Adam: A Method for Stochastic Optimization" (arXiv:1412.6980), after clipping by the global norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel
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

    Args:
        optimizer: of all parameters.
        parameters: those to update.
        compiled: whether to update by `kernel`, where it can, in place of torch's own kernels.

    Attributes:
        moments: t, m and v of each parameter, as torch names them: `step`, `exp_avg` and
            `exp_avg_sq`; initialized as Adam would, if missing.
        changes: all tensors that the update changes.

    Raises:
        CannotCapture: the update would not equal the optimizer's step.
    """

    def __init__(
        self, optimizer: OneOptimizer, parameters: list[Tensor], compiled: bool = False
    ) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        known = {id(p) for p in optimizer.parameters}
        settings = adam_settings(optimizer)
        if settings is None or not {id(p) for p in parameters} <= known:
            raise CannotCapture("its optimizer is not plain Adam over all parameters")
        self._settings = settings
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
        self._steps, self._means, self._squares = (
            [moments[name] for moments in self.moments]
            for name in ("step", "exp_avg", "exp_avg_sq")
        )
        if any(t.device != p.device for t, p in zip(self._steps, parameters, strict=True)):
            raise CannotCapture("the optimizer keeps its counts of steps on another device")
        if len({moments["step"].item() for moments in self.moments}) != 1:
            raise CannotCapture("some of its parameters have been updated more often than others")
        self.changes = [*parameters, *(x for moments in self.moments for x in moments.values())]
        is_supported = all(map(kernel.supports, self.changes))
        self.compiled = compiled and is_supported and kernel.is_available()

    def entries(self) -> list[Entry]:
        """Where the optimizer holds these tensors, for `Guards`."""
        adam = self.optimizer.optimizer
        return [(vars(adam), "state", adam.state), *entries_of(adam.state, *self.moments)]

    def scalars(self) -> Tensor:
        """Learning rate and largest norm, (2,): an input, because they change between steps."""
        rate = self.optimizer.optimizer.param_groups[0]["lr"]
        device = self.parameters[0].device
        kind = torch.float32 if device.type == "cuda" else torch.float64  # that its kernel reads
        scalars = torch.tensor([rate, self.optimizer.max_norm], dtype=kind)
        return scalars.to(device, non_blocking=True)  # without waiting for earlier steps

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor], scalars: Tensor) -> Tensor:
        """Update parameters and moments in place, unless the norm of the gradient is not finite.

        Returns:
            The norm of the gradient before clipping, ().
        """
        # A kernel reads all tensors of a parameter in the same order of memory.
        pairs = zip(gradients, self.parameters, strict=True)
        gradients = [g if g.stride() == p.stride() else in_layout_of(p, g) for g, p in pairs]
        if not self.compiled:
            return self._by_torch(gradients, scalars)
        tensors = self.parameters, gradients, self._means, self._squares, self._steps
        rate, max_norm = scalars.tolist()
        beta1, beta2, eps = self._settings
        return torch.tensor(kernel.update(*tensors, rate, max_norm, beta1, beta2, eps))

    def _by_torch(self, gradients: list[Tensor], scalars: Tensor) -> Tensor:
        rate, max_norm = scalars.unbind()
        beta1, beta2, eps = self._settings
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        clip = (max_norm / (norm + 1e-6)).clamp(max=1)
        if norm.is_cuda or clip < 1:  # a pass over all gradients; a CUDA graph cannot choose
            gradients = list(torch._foreach_mul(gradients, clip))
        is_finite = norm.isfinite().float()  # the type that the kernel reads
        # A list: the same with a single tensor reads its value, which a CUDA graph cannot.
        torch._foreach_add_(self._steps, [is_finite] * len(self._steps))
        torch._fused_adam_(
            self.parameters,
            gradients,
            self._means,
            self._squares,
            [],
            self._steps,
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=1 - is_finite,
        )
        return norm


def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A copy of a gradient in the memory layout of its parameter.

    The backward pass would leave it there. Torch's fused optimizers are wrong with any other.
    """
    return torch.empty_like(parameter).copy_(gradient)
