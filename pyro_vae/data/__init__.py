"""Data: rows from a name, a file or memory, split into training, validation and test rows.

`load_data` reads any supported source and returns `Splits`. A `Split` gathers batches in the units
that a likelihood observes (`DataSpec`).
"""

from __future__ import annotations

from .loading import load_data
from .splits import DataSpec, Split, Splits

__all__ = ["DataSpec", "Split", "Splits", "load_data"]
