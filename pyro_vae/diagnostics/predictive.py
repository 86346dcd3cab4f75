"""Posterior-predictive checks: whether draws from the model look like the data.

    z ~ q(z|x),  x' ~ p(x|z);  compare T(x, z) with T(x', z) for each statistic T

Source: "Posterior predictive assessment of model fitness via realized discrepancies", Statistica
Sinica 6 (1996).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.missing import hidden_as
from ..models.interface import LatentModel
from ..runtime.memory import rows_at_once
from ..runtime.randomness import one_thread

Statistic = Callable[[Tensor, Tensor], Tensor]

# Cache-sized chunks whose draws are made together
CHUNKS_PER_BLOCK = 16


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of B rows and of their replicates, draws from the model.

    Attributes:
        names: of the T statistics.
        observed: (B, T) of x, averaged over z ~ q(z|x).
        replicated_mean, replicated_scale: (B, T) of x' ~ p(x|z) over the same z.
        p_values: (B, T) share of draws in which the statistic of x' is larger; ties count half.
    """

    names: tuple[str, ...]
    observed: np.ndarray
    replicated_mean: np.ndarray
    replicated_scale: np.ndarray
    p_values: np.ndarray

    @property
    def effects(self) -> np.ndarray:
        """(B, T): the statistic of x minus the replicates' mean, in their standard deviations."""
        return (self.observed - self.replicated_mean) / np.maximum(self.replicated_scale, 1e-12)


@one_thread()
@torch.no_grad()
def predictive_check(
    vae: LatentModel,
    x: Tensor,
    statistics: Mapping[str, Statistic] | None = None,
    num_draws: int = 200,
) -> PredictiveCheck:
    """Compare statistics of x with those of draws from the model.

    On held-out x this checks the model, given the guide. Replicates lack the values that x lacks.
    Draws come from torch's global random state.

    Args:
        vae: model with `posterior(x)` and `likelihood(z)`.
        x: (B, *data_shape).
        statistics: name → f(x (S, B, *data_shape), z (S, B, Z)) → (S, B). By default mean, standard
            deviation, log p(x|z) and, but for tables, the mean absolute difference of neighbours,
            as far as a row has more than one value or neighbours; of observed values only. Of a
            table with a kind for each column: log p(x|z), each number, standardized, and whether
            categories are the first.
        num_draws: S, at least 2.

    Raises:
        ValueError: too few draws, or a statistic of the wrong shape.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws expects at least 2; got {num_draws}")
    if statistics is None:
        statistics = _statistics(vae, x)
    rows = rows_at_once(num_draws * x[0].numel(), x.device, CHUNKS_PER_BLOCK)
    parts = [_compare(vae, part, statistics, num_draws) for part in x.split(rows)]
    observed, mean, scale, p_values = torch.cat(parts, dim=1).cpu().numpy()
    return PredictiveCheck(tuple(statistics), observed, mean, scale, p_values)


def _compare(
    vae: LatentModel, x: Tensor, statistics: Mapping[str, Statistic], num_draws: int
) -> Tensor:
    """(4, B, T): mean for x; mean, standard deviation and p-value of the replicates."""
    z = vae.posterior(x).sample((num_draws,))
    replicated = vae.likelihood(z).sample()
    same = x.expand(replicated.shape)
    replicated = hidden_as(replicated, same)
    columns = []
    for name, statistic in statistics.items():
        here, there = statistic(same, z).double(), statistic(replicated, z).double()
        if here.shape != z.shape[:2]:
            raise ValueError(
                f"statistic {name!r} expects shape {tuple(z.shape[:2])}; got {tuple(here.shape)}"
            )
        larger = (there > here).double() + (there == here).double() / 2
        columns.append(torch.stack([here.mean(0), there.mean(0), there.std(0), larger.mean(0)]))
    return torch.stack(columns, dim=-1)


def _statistics(vae: LatentModel, x: Tensor) -> dict[str, Statistic]:
    """The default statistics of rows like x (B, *data_shape) that are numbers, rather than NaN."""
    if has_kinds(vae):
        return _of_columns(vae)
    shape = x.shape[1:]
    lacking = bool(x.isnan().any())
    mean, deviation = (_mean, _deviation) if lacking else (torch.mean, torch.std)
    statistics: dict[str, Statistic] = {"mean": lambda x, z: mean(x.flatten(2), -1)}
    if shape.numel() > 1:
        statistics["standard deviation"] = lambda x, z: deviation(x.flatten(2), -1)
    statistics["log p(x|z)"] = lambda x, z: vae.likelihood(z).log_prob(x)
    sides = [side for side in range(1 - len(shape), 0) if shape[side] > 1]  # not the channels
    if sides:
        statistics["roughness"] = lambda x, z: torch.stack(
            [mean(x.diff(dim=side).abs().flatten(2), -1) for side in sides]
        ).sum(0)
    return statistics


def _mean(x: Tensor, dim: int) -> Tensor:
    """Mean of observed values; 0 if there are none."""
    return x.nanmean(dim).nan_to_num(0.0)


def _deviation(x: Tensor, dim: int) -> Tensor:
    """Standard deviation of observed values; 0 if there is only one."""
    count = (~x.isnan()).sum(dim)
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim)
    return (squares / (count - 1).clamp_min(1)).sqrt()


def _of_columns(vae: Any) -> dict[str, Statistic]:
    """The default statistics of a table with a kind for each column; 0 for missing values."""
    likelihood = vae.likelihood_module
    statistics: dict[str, Statistic] = {
        "log p(x|z)": lambda x, z: vae.likelihood(z).log_prob(x),
    }

    def of(j: int, is_categorical: bool) -> Statistic:
        if is_categorical:
            return lambda x, z: (x[..., j] == 0).double()
        return lambda x, z: likelihood.deviations(x)[..., j].nan_to_num(0.0)

    for j, (name, kind) in enumerate(zip(likelihood.spec.columns, likelihood.kinds, strict=True)):
        first = f" = {kind.categories[0]}" if kind.name == "categorical" else ""
        statistics[name + first] = of(j, bool(first))
    return statistics


def has_kinds(vae: Any) -> bool:
    """Whether a model is of a table with a kind for each column."""
    likelihood = getattr(vae, "likelihood_module", None)
    return bool(getattr(getattr(likelihood, "spec", None), "kinds", ()))
