"""Bounds that leave ordinary values as they are.

    soft_clamp(v) = v                                          in [low, high]
                  = high + w (1 − 1 / (1 + t)),  t = (v − high) / w,   above, and likewise below

The slope is one at both ends and positive beyond, so that a gradient neither jumps nor vanishes.
An outlier of the data then has a finite posterior.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_clamp(value: Tensor, low: float, high: float, width: float) -> Tensor:
    """Bound values (...) to low − width … high + width.

    Values in [low, high], and their gradients, keep every bit.
    """
    above, below = F.relu(value - high), F.relu(low - value)
    # The slope of clamp would be zero at an end.
    inner = torch.where(above > 0, high, torch.where(below > 0, low, value))
    return inner + _saturate(above, width) - _saturate(below, width)


def _saturate(excess: Tensor, width: float) -> Tensor:
    """w t / (1 + t), in a form whose slope does not cancel for large t."""
    return width * (1 - 1 / (1 + excess / width))
