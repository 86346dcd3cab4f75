"""Schedules of learning rate and KL weight, as functions of the step."""

from __future__ import annotations

import math

from ..config import FitConfig


def learning_rate(config: FitConfig, step: int, num_steps: int) -> float:
    """Adam's learning rate: linear warm-up, then constant or half a cosine down to zero.

    Args:
        step: steps made before this one, from 0.
        num_steps: steps of the whole run.
    """
    warmup = config.learning_rate_warmup * num_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    part = (step - warmup) / (num_steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * part)) / 2


def kl_weight(config: FitConfig, step: int, num_steps: int) -> float:
    """The weight of the KL term: linear warm-up, then `config.kl_weight`."""
    warmup = config.kl_warmup * num_steps
    return config.kl_weight * min(1.0, (step + 1) / (warmup + 1))
