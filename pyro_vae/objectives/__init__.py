"""Objectives: ELBOs, importance-weighted bounds and their gradient estimators for `SVI`.

`objective(name)` returns a `pyro.infer.ELBO`. The objectives work for any Pyro model and guide.
"""

from __future__ import annotations

from .registry import objective

__all__ = ["objective"]
