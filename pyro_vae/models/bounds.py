"""Bounds that leave ordinary values as they are.

    soft_clamp(v) = v                                     in [low, high]
                  = high + w t / (1 + t),  t = (v − high) / w,   above, and likewise below

The slope is one at both ends and positive beyond, so that a gradient neither jumps nor vanishes.
An outlier of the data then has a finite posterior.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Excess at which a value counts as infinite: beyond, the slope is below the range of float32.
_FAR = 1e18


def soft_clamp(value: Tensor, low: float, high: float, width: float) -> Tensor:
    """Bound values (...) to low − width … high + width. In [low, high] they keep every bit.

    Args:
        width: a power of two, so that gradients in [low, high] keep every bit too.
    """
    inner = value.clamp(low, high)
    excess = (value - inner).clamp(-_FAR, _FAR)
    return inner + width * F.softsign(excess / width)
