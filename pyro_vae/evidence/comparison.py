"""Evaluate models on the same rows, and compare them by every measure.

Models that differ only in the seed belong to one method: methods are compared over seeds, and all
models over rows, see `differences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..config import InputError
from ..data.splits import Split
from ..models.autoencoder import Autoencoder
from ..models.labels import needs_labels
from ..runtime.memory import Callback, ignore
from .candidates import Candidate, binarized_once, check_comparable, log_jacobian
from .differences import (
    MIN_ROWS,
    Difference,
    compare_rows,
    compare_seeds,
    compare_shares,
    shown_above,
    tiers,
)
from .evaluation import (
    RowValues,
    bound_of_rows,
    deciding,
    decisive_rows,
    evaluate_rows,
    unreliable_share,
)

# Measures and whether more is better: a ranking by reconstruction or KL alone would mean nothing.
MEASURES = {
    "elbo": True,
    "log_evidence": True,
    "reconstruction": False,
    "kl": False,
    "accuracy": True,
    "bayes_accuracy": True,
}
ACCURACIES = ("accuracy", "bayes_accuracy")
# If a larger share of its rows has unreliable weights, the log p(x) of a model is a lower bound and
# has no rank.
MOST_UNRELIABLE = 0.1


@dataclass(frozen=True)
class Measure:
    """A measure of all models that have it.

    Attributes:
        means: of each model, over its test rows.
        differences: of each pair with enough common rows, over these.
        tiers: the models, the best first, see `differences.tiers`; empty if more is not better.
            Models in `Comparison.underestimated` have no rank by log p(x).
        over_seeds: of each pair of methods with several seeds.
    """

    means: dict[str, float]
    differences: list[Difference]
    tiers: list[list[str]]
    over_seeds: list[Difference]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired differences of models.

    Attributes:
        measures: by their names in `MEASURES`, nats per row, or shares of rows with a label.
        methods: of each method, the name of its model for each seed.
        num_rows: test rows of each model.
        common: number of rows that are test rows of all.
        num_samples: importance samples per row; None for one draw of z and no log p(x).
        binarization: "fixed" with its seed if grey values are binarized, else "none".
        given_labels: whether densities are those given the label of each row.
        monte_carlo_error: of the mean log p(x) of each model.
        unreliable_weights: share of rows of each model, see `Evaluation`.
        underestimated: the models of which this share is above `MOST_UNRELIABLE`.
        notes: sentences.
    """

    measures: dict[str, Measure]
    methods: dict[str, dict[int, str]]
    num_rows: dict[str, int]
    common: int
    num_samples: int | None
    binarization: str
    given_labels: bool
    monte_carlo_error: dict[str, float]
    unreliable_weights: dict[str, float]
    underestimated: list[str]
    notes: list[str]


@torch.no_grad()
def compare(
    candidates: Sequence[Candidate],
    num_samples: int | None = 5000,
    num_rows: int | None = None,
    seed: int = 0,
    on_chunk: Callback = ignore,
) -> Comparison:
    """Evaluate models on the same rows and compare them.

    Args:
        candidates: at least two, of the same stored values.
        num_samples: importance samples per row; None for the ELBO only, by one draw of z.
        num_rows: number of test rows of each model, from the beginning; by default all.
        seed: of the draws, the binarization and the resamples.
        on_chunk: called with the number of (row, sample) pairs just done.

    Raises:
        InputError: the models cannot be compared, or have too few rows in common.
    """
    check_comparable(candidates)
    cut = [replace(c, test=_first_rows(c.test, num_rows)) for c in candidates]
    rows = torch.cat([c.test.rows for c in cut]).unique()
    binarizes = cut[0].test.spec.binarizes(cut[0].vae.likelihood_module.units)
    same_x = binarized_once(cut, rows, seed) if binarizes else cut
    found = {c.name: _row_values(c, num_samples, seed, on_chunk) for c in same_x}
    values, notes = _placed(cut, found, rows)
    methods: dict[str, dict[int, str]] = {}
    for c in cut:
        methods.setdefault(c.method, {})[c.seed] = c.name
    unreliable = {
        name: unreliable_share(value.pareto_k, num_samples)
        for name, value in found.items()
        if value.pareto_k is not None and num_samples is not None
    }
    underestimated = [name for name, share in unreliable.items() if share > MOST_UNRELIABLE]
    measures = {
        name: _measured(name, of_models, methods, underestimated, seed)
        for name, of_models in values.items()
    }
    if not any(measure.differences or measure.over_seeds for measure in measures.values()):
        raise InputError(_too_few(cut))
    return Comparison(
        measures=measures,
        methods=methods,
        num_rows={c.name: len(c.test) for c in cut},
        common=int(np.logical_and.reduce([np.isin(rows, c.test.rows) for c in cut]).sum()),
        num_samples=num_samples,
        binarization=f"fixed, seed {seed}" if binarizes else "none",
        given_labels=needs_labels(cut[0].vae),
        monte_carlo_error={n: e for n, v in found.items() if (e := _error(v)) is not None},
        unreliable_weights=unreliable,
        underestimated=underestimated,
        notes=[*notes, *_notes_of_rows(values, measures, rows)],
    )


def _first_rows(split: Split, count: int | None) -> Split:
    labels = None if split.labels is None else split.labels[:count]
    return replace(split, rows=split.rows[:count], labels=labels)


def _row_values(c: Candidate, num_samples: int | None, seed: int, on_chunk: Callback) -> RowValues:
    if num_samples is None or isinstance(c.vae, Autoencoder):
        return bound_of_rows(c.vae, c.test, len(c.test), seed)
    return evaluate_rows(c.vae, c.test, num_samples, len(c.test), seed, on_chunk)


def _error(values: RowValues) -> float | None:
    """Monte Carlo error of the mean log p(x)."""
    errors = values.standard_error
    return None if errors is None else errors.square().sum().sqrt().item() / len(errors)


def _placed(
    candidates: Sequence[Candidate], found: dict[str, RowValues], rows: Tensor
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Of each measure and model, values (U,) of the rows `rows` (U,), NaN where it has none.

    Densities are in the unit of the first model's x. Notes name models with changed units, and
    those that are left out since a value is infinite.
    """
    values: dict[str, dict[str, np.ndarray]] = {}
    notes: list[str] = []
    first = candidates[0]
    for c in candidates:
        own, places = found[c.name], torch.searchsorted(rows, c.test.rows).numpy()
        shift = log_jacobian(c, c.test) - log_jacobian(first, c.test)
        if shift.any():
            notes.append(
                f"densities of {c.name} are in the unit of x of {first.name}, in which they are "
                f"{shift.mean():+.6g} nats per row"
            )
        of_model = {
            "elbo": None if own.elbo is None else own.elbo.cpu() + shift,
            "log_evidence": None if own.log_evidence is None else own.log_evidence.cpu() + shift,
            "reconstruction": own.reconstruction.cpu() + shift,
            "kl": own.kl,
        }
        for measure, value in of_model.items():
            if value is None:
                continue
            infinite = int((~value.isfinite()).sum())
            if infinite:
                notes.append(f"{measure} of {c.name} is infinite in {infinite:,} rows: left out")
                continue
            array = values.setdefault(measure, {})[c.name] = np.full(len(rows), np.nan)
            array[places] = value.cpu().numpy()
        if own.right is not None:
            known = places[own.right.rows.numpy()]
            for measure, right in zip(ACCURACIES, (own.right.guide, own.right.model), strict=True):
                array = values.setdefault(measure, {})[c.name] = np.full(len(rows), np.nan)
                array[known] = right.numpy()
    return {name: values[name] for name in MEASURES if name in values}, notes


def _measured(
    name: str,
    values: dict[str, np.ndarray],
    methods: dict[str, dict[int, str]],
    underestimated: Sequence[str],
    seed: int,
) -> Measure:
    """The differences in one measure, from values (U,) of each model."""
    means = {run: float(np.nanmean(value)) for run, value in values.items()}
    differences: list[Difference] = []
    if len(values) > 1:
        of_rows = compare_shares if name in ACCURACIES else partial(compare_rows, seed=seed)
        differences = of_rows(values)
    known = {
        method: {seed: run for seed, run in runs.items() if run in values}
        for method, runs in methods.items()
    }
    unranked = underestimated if name == "log_evidence" else ()
    order = sorted(means.keys() - set(unranked), key=lambda run: -means[run])
    ranking = tiers(order, shown_above(differences)) if MEASURES[name] else []
    return Measure(means, differences, ranking, compare_seeds(values, known))


def _too_few(candidates: Sequence[Candidate]) -> str:
    sizes = ", ".join(f"{len(c.test):,} in {c.name}" for c in candidates)
    return (
        f"expected {MIN_ROWS} or more rows that are in the test split of two runs; of {sizes}, "
        f"fewer are common, since other seeds give other splits: train on data with a test split "
        f"of their own, with a larger --test-size, or give other data by --data"
    )


def _notes_of_rows(
    values: dict[str, dict[str, np.ndarray]], measures: dict[str, Measure], rows: Tensor
) -> list[str]:
    """Rows that alone decide a mean difference of ELBO or log p(x)."""
    notes = []
    for name in ("elbo", "log_evidence"):
        for d in measures[name].differences if name in measures else ():
            each = torch.from_numpy(values[name][d.first] - values[name][d.second])
            known = (~each.isnan()).nonzero().flatten()
            decisive = rows[known[decisive_rows(each[known])]]
            if len(decisive):
                where = f"the difference of {name} between {d.first} and {d.second}"
                notes.append(f"{deciding(decisive)} {where}")
    return notes
