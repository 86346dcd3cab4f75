"""Training: stochastic variational inference, its records, checkpoints and processes.

`fit` trains a model to the end; `iterate` yields a record after each epoch. Both run
`pyro.infer.SVI` on an objective. `load` restores a trained model from a run folder.
"""

from __future__ import annotations

from .checkpoint import load
from .loop import fit, iterate
from .records import Record

__all__ = ["Record", "fit", "iterate", "load"]
