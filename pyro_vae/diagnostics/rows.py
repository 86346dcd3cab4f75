"""Studies that name rows or columns: the local test of each row, those whose posterior is worst,
and the distribution of each column of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evidence.importance import reliable_k
from ..models.vae import VAE
from ..plots import columns as column_figures
from ..plots import posterior as posterior_figures
from ..plots.from_model import to_display
from . import findings as verdicts
from .columns import about_columns, check_columns
from .local import local_test
from .study import Effort, Study

MOST_ROWS = 8  # named as the worst by each size


def local_study(
    vae: VAE, x: Tensor, numbers: Tensor, effort: Effort, on_chunk: Callable[[int], object]
) -> Study:
    result = local_test(vae, x, 2 * effort.simulations, on_chunk=on_chunk)

    details = {
        "local": {
            "rows": numbers[: len(x)].tolist(),
            "statistic": result.statistic.tolist(),
            "p_value": result.p_value.tolist(),
        }
    }
    return Study([verdicts.about_local(result.correct)], details, {})


def columns_study(vae: VAE, x: Tensor) -> Study:
    check = check_columns(vae, x)

    sizes = (check.distance, check.excess, check.p_values)
    keys = ("distance", "beyond_chance", "p_value")
    lines = [dict(zip(keys, map(float, line), strict=True)) for line in zip(*sizes, strict=True)]
    kinds = [{"kind": kind.name} for kind in check.kinds]
    details = {n: k | line for n, k, line in zip(check.names, kinds, lines, strict=True)}
    pairs = zip(check.kinds, check.distance, strict=True)
    notes = [f"{kind.name[:24]}\n{distance:.2f} apart" for kind, distance in pairs]
    figure = column_figures.column_distributions(
        check.observed,
        check.replicated,
        check.names,
        [kind.categories for kind in check.kinds],
        notes,
        "Columns in held-out rows, and in draws from the model",
    )
    return Study([about_columns(check)], {"columns": details}, {"columns": figure})


def worst_rows(
    vae: VAE, x: Tensor, numbers: Tensor, rows: dict[str, np.ndarray], effort: Effort
) -> Study:
    """The rows with unreliable weights or a gap that is not small, at most `MOST_ROWS` of each."""
    k, log_evidence, gap = rows["k"], rows["log_evidence"].copy(), np.full(len(x), np.nan)
    gap[: len(rows["gap"])] = rows["gap"]
    log_evidence[: len(rows["gap"])] = rows["refined_log_evidence"]
    tail = np.where(np.isnan(k), np.inf, k)  # no finite weight
    by_k, by_gap = np.argsort(-tail)[:MOST_ROWS], np.argsort(-gap)[:MOST_ROWS]  # NaN comes last
    by_k = by_k[tail[by_k] > reliable_k(effort.importance_samples)]
    by_gap = by_gap[gap[by_gap] > verdicts.AMORTIZATION.limits[0]]
    lists = {"pareto_k": by_k, "amortization_gap": by_gap}
    found = np.unique(np.concatenate([by_k, by_gap]))
    found = found[np.argsort(-tail[found], kind="stable")]

    worst: list[dict[str, Any]] = [
        {
            "row": int(numbers[i]),
            "split": "test",
            "pareto_k": float(k[i]),
            "amortization_gap": float(gap[i]),
            "log_evidence": float(log_evidence[i]),
            "worst_by": [name for name, chosen in lists.items() if i in chosen],
        }
        for i in found
    ]
    figures = {}
    if worst:
        images = x[torch.as_tensor(found, device=x.device)]
        figures["worst_rows"] = posterior_figures.worst_rows(
            to_display(vae, images),
            to_display(vae, vae.reconstruct(images)),
            [line["row"] for line in worst],
            k[found],
            gap[found],
            "Worst held-out rows, and their reconstructions",
        )
    return Study([], {"worst_rows": worst}, figures)
