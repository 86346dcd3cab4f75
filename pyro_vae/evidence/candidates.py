"""Values of each row under several models that can be compared: same rows, same x, same units.

A row counts for a model if it is in its test split, and for a pair if it is in the test splits of
both. Binarized values are drawn once for all models, by the row. Densities of scaled values are
converted to the unit of the first model's x:

    log p(value) = log p(x) + Σ log |dx / dvalue|      over the observed values of a row

Probabilities and densities are never compared, nor log p(x|y) with log p(x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import InputError
from ..data.splits import Split
from ..models.labels import ConditionalVAE, Model, needs_labels


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        name: unique.
        vae: the model, on the split's device.
        test: the rows that it was not trained on.
        method, seed: models of one method differ only in the seed.
    """

    name: str
    vae: Model
    test: Split
    method: str
    seed: int


def same_values(first: Candidate, name: str, test: Split) -> Split:
    """The test rows of the run `name`, with the stored values of `first`, which must be equal.

    Memory then holds them once.

    Raises:
        InputError: they are other values.
    """
    a, b = first.test.values, test.values
    if a.shape == b.shape and a.dtype == b.dtype:
        arrays = a.cpu().numpy(), b.cpu().numpy()
        if np.array_equal(*arrays, equal_nan=a.dtype.is_floating_point):
            return replace(test, values=a)
    raise InputError(
        f"expected runs of the same data; the rows of {name} are not those of {first.name}: give "
        f"other data for all runs by --data"
    )


def binarized_once(candidates: Sequence[Candidate], rows: Tensor, seed: int) -> list[Candidate]:
    """The same models, with `rows` of their data binarized: stored values are 0 or the largest."""
    test = candidates[0].test
    x = torch.cat(list(replace(test, rows=rows, labels=None).fixed("binary", seed)))
    values = x * test.spec.bound
    return [
        replace(c, test=replace(c.test, values=values, rows=torch.searchsorted(rows, c.test.rows)))
        for c in candidates
    ]


def _unit_of(c: Candidate) -> str:
    """The unit of p(x), in which values of two models must agree."""
    likelihood, spec = c.vae.likelihood_module, c.test.spec
    if spec.binarizes(likelihood.units):
        return f"probabilities of values binarized by --max-value {spec.bound}"
    kinds = [kind.is_discrete for kind in spec.kinds] or [likelihood.is_discrete]
    if len(set(kinds)) > 1:
        names = [name for name, whole in zip(spec.columns, kinds, strict=True) if not whole]
        return f"densities of the columns {', '.join(names)} and probabilities of the others"
    return "probabilities of the values" if kinds[0] else "densities of the values"


def check_comparable(candidates: Sequence[Candidate]) -> None:
    """Check that values of the models have one unit, and that labels of a row agree.

    Raises:
        InputError: they do not.
    """
    first = candidates[0]
    for c in candidates[1:]:
        for unit, remedy in (
            (_unit_of, "compare models of one kind of likelihood"),
            (_condition_of, "compare conditional models among themselves"),
        ):
            if unit(first) != unit(c):
                raise InputError(
                    f"expected models whose densities have the same unit; {first.name} has "
                    f"{unit(first)}, {c.name} has {unit(c)}: {remedy}"
                )
    _check_labels(candidates)


def _condition_of(c: Candidate) -> str:
    return "log p(x|y), given labels" if needs_labels(c.vae) else "log p(x)"


def _check_labels(candidates: Sequence[Candidate]) -> None:
    """Check that models with labels have the same label for each row that two of them have.

    Raises:
        InputError: they do not.
    """
    known: dict[int, tuple[str, str]] = {}
    for c in candidates:
        if not isinstance(c.vae, ConditionalVAE) or c.test.labels is None:
            continue
        names = (*c.vae.class_names, "")  # −1 is not known
        for row, label in zip(c.test.rows.tolist(), c.test.labels.tolist(), strict=True):
            other, name = known.setdefault(row, (c.name, names[label]))
            if name != names[label]:
                raise InputError(
                    f"expected the same labels; row {row} of the data (counted from 0) has "
                    f"{name!r} for {other} and {names[label]!r} for {c.name}"
                )


def log_jacobian(c: Candidate, test: Split) -> Tensor:
    """Σ log |dx / dvalue| (N,) over the observed values of the rows of `test`, float64.

    x is that of the model `c`.
    """
    spec, units = c.test.spec, c.vae.likelihood_module.units
    logs = torch.zeros(spec.shape, dtype=torch.float64)
    if units == "real" and spec.scale is not None:
        scale = torch.tensor(spec.scale, dtype=torch.float64).reshape(spec.scale_shape)
        logs = scale.log().expand(spec.shape)
    elif units in ("real", "unit") and spec.max_value is not None:
        logs = logs + math.log(spec.max_value)
    if not logs.any():
        return torch.zeros(len(test), dtype=torch.float64)
    stored = test.values[test.rows.to(test.values.device)].cpu()
    return -(~stored.isnan() * logs).flatten(1).sum(1)
