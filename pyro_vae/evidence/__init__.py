"""Evidence: estimates of log p(x) and bounds on it.

Importance sampling from q(z|x) with its Pareto k, annealed importance sampling from both sides, and
quadrature for one or two latents. `evaluation` measures a model on a split.
"""

from __future__ import annotations

from .annealing import anneal
from .importance import importance_sample, log_evidence, upper_bound

__all__ = ["anneal", "importance_sample", "log_evidence", "upper_bound"]
