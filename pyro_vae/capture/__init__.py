"""Capture: an ELBO, or a whole training step, as one graph of tensor operations.

`capture(elbo)` returns an ELBO of the same value and gradient that runs as a graph, compiled or
not. `CapturedSVI` adds the optimizer's update to the graph. `OneOptimizer` holds one torch
optimizer over all parameters behind Pyro's optimizer interface. All of it works for any Pyro model,
guide and ELBO.
"""

from __future__ import annotations

from .captured import CapturedSVI, capture
from .optimizer import NonFiniteGradient, OneOptimizer

__all__ = ["CapturedSVI", "NonFiniteGradient", "OneOptimizer", "capture"]
