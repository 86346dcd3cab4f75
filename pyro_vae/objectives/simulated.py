"""The ELBO over data, mixed with the log-density of the guide over simulated pairs.

    (1 − s) E_q(z|x)[log p(x, z) − log q(z|x)]  +  s log q(z*|x*),   z* ~ p(z), x* ~ p(x|z*)

As functions of q, the first term is −KL(q ‖ p(z|x)) of the rows and the second is −KL(p(z|x) ‖ q),
averaged over rows of the model, up to constants. Pairs can be drawn without limit, so that q cannot
overfit them.

Source: "Reweighted wake-sleep", arXiv 1406.2751; the second term is the loss of neural posterior
estimation, arXiv 1605.06376.
"""

from __future__ import annotations

from typing import Any

from pyro import poutine
from pyro.infer.util import torch_item
from torch import Tensor

from .elbos import Sampled


class WithSimulated(Sampled):
    """`svi.step(x, x_simulated, z)`: rows (B, *data_shape), and pairs of as many rows.

    Args:
        simulated: s, the weight of the pairs, 0 to 1.
        latent: name of the latent site.
    """

    def __init__(self, simulated: float, latent: str = "z", max_plate_nesting: int = 1) -> None:
        super().__init__(max_plate_nesting=max_plate_nesting)
        self.simulated, self.latent = simulated, latent

    def differentiable_loss(
        self, model: Any, guide: Any, x: Tensor, x_simulated: Tensor, z: Tensor
    ) -> Tensor:
        """−objective (), nats, summed over the rows."""
        known = poutine.condition(guide, data={self.latent: z})
        log_q = poutine.trace(known).get_trace(x_simulated).log_prob_sum()
        loss = super().differentiable_loss(model, guide, x)
        return (1 - self.simulated) * loss - self.simulated * log_q

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args)
        loss.backward()
        return torch_item(loss)
