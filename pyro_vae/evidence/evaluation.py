"""Evaluate a model on a split: ELBO, log p(x), bits per dimension, active units.

An outlier may lie so far out that log p(x|z) overflows float32. Such a row is evaluated in float64,
in which the square of any float32 is finite. Rows that alone decide a mean are named in a warning.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.precision import column_name
from ..data.splits import Split
from ..models.autoencoder import Autoencoder
from ..models.interface import uncompiled
from ..models.labels import ConditionalVAE, Model, SemiSupervisedVAE, arguments, needs_labels
from ..models.vae import VAE
from ..runtime.memory import Callback, ignore
from ..runtime.randomness import derive, random_states
from .importance import MIN_TAIL_SAMPLES, Evidence, choose_mode, importance_sample, reliable_k
from .labels import Accuracies, RightLabels, accuracies, measured_with_labels, right_labels

# A latent is active if the variance over rows of its posterior mean exceeds this ("Importance
# weighted autoencoders", arXiv 1509.00519).
ACTIVE_VARIANCE = 0.01
# Rows that alone decide a mean are this many times as far from the median as all nearer rows
# together. Fewer than `MIN_ROWS` do not show what is ordinary: of 8 rows with values from a
# chi-square distribution, which is that of a Gaussian log-density, one in a hundred has such a row.
DECISIVE = 10
MIN_ROWS = 8


def elbo_terms(
    vae: Model,
    split: Split,
    seed: int = 0,
    num_images: int | None = None,
    note: bool = False,
) -> tuple[float, float | None]:
    """Mean reconstruction and KL over a split, nats per row, with one draw of z per row.

    `seed` fixes draws and binarization; torch's global random state does not change. The KL of an
    `Autoencoder` is None. A semi-supervised model infers all labels. `note`: see `note_outlier`.
    """
    parts = _bounds(vae, split, seed, num_images)
    if note:
        reconstruction, kl = _joined(parts)
        note_outlier(vae, split, reconstruction - kl, "ELBO")
    count = sum(len(part[0]) for part in parts)
    means = [sum(part[i].sum().item() for part in parts) / count for i in (0, 1)]
    return means[0], None if isinstance(vae, Autoencoder) else means[1]


def _bounds(
    vae: Model, split: Split, seed: int, num_images: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Reconstruction and KL (B,) of the rows in batches, with one draw of z for each."""
    vae = uncompiled(vae)
    with random_states(split.device, derive(seed, "posterior")):
        return [_row_terms(vae, *rows) for rows in evaluated_rows(vae, split, seed, num_images)]


def evaluated_rows(
    vae: Any, split: Split, seed: int, num_images: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """The arguments of the model in batches, x (B, *data_shape) and perhaps labels y (B,).

    A semi-supervised model knows none of the labels.
    """
    for x, y in split.fixed_with_labels(vae.likelihood_module.units, seed, num_images):
        if isinstance(vae, SemiSupervisedVAE):
            y = torch.full((len(x),), -1, device=x.device)
        yield arguments(vae, x, y)


def decisive_rows(values: Tensor) -> Tensor:
    """The rows that alone decide the mean of values (N,), see `DECISIVE`, the farthest last."""
    distances, order = (values - values.median()).abs().sort()
    nearer = distances.cumsum(0) - distances
    ordinary = len(values) // 2  # half of the rows at least
    found = (distances > DECISIVE * nearer)[ordinary:].nonzero()
    return (
        order[ordinary + int(found[0]) :] if len(found) and len(values) >= MIN_ROWS else order[:0]
    )


def deciding(rows: Tensor) -> str:
    """The beginning of a sentence about `decisive_rows`, by their numbers in the data."""
    others = len(rows) - 1
    verb = f"and {others} more decide" if others else "alone decides"
    return f"row {rows[-1]} of the data (counted from 0) {verb}"


def note_outlier(vae: Model, split: Split, values: Tensor, what: str) -> None:
    """Warn of rows that alone decide a mean, see `DECISIVE`; they may be several.

    Args:
        values: (N,) nats, of the first N rows of the split.
        what: name of their mean.
    """
    decisive = decisive_rows(values)
    if not len(decisive):
        return
    row = int(decisive[-1])
    text = (
        f"{deciding(split.rows[decisive.to(split.rows.device)])} the mean {what} of {len(values)} "
        f"rows: it has {values[row]:.5g} nats, the median is {values.median():.5g}"
    )
    likelihood = vae.likelihood_module
    if likelihood.units == "real" and split.spec.is_table:
        x = split.take(torch.tensor([row], device="cpu"), "real")[0]
        away = likelihood.deviations(x)
        column = int(away.abs().nan_to_num(0.0).argmax())
        text += (
            f". Its {column_name(split.spec.columns, column)} holds {x[column]:.5g}, "
            f"{away[column]:.3g} standard deviations from the mean of the training data"
        )
    warnings.warn(f"{text}. Check this row", stacklevel=2)


def _row_terms(vae: Any, x: Tensor, *y: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of each row (B,), float64; a KL of zero for an autoencoder."""
    terms = vae.elbo_terms(x, *y)
    reconstruction = terms[0].double()
    kl = torch.zeros_like(reconstruction) if terms[1] is None else terms[1].double()
    beyond = ~(reconstruction - kl).isfinite()
    if beyond.any() and x.dtype != torch.float64:
        labels = [part[beyond] for part in y]
        exact = _row_terms(copy.deepcopy(vae).double(), x[beyond].double(), *labels)
        reconstruction[beyond], kl[beyond] = exact
    return reconstruction, kl


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over rows, in nats per row; None if the model or likelihood has no such number.

    Attributes:
        elbo: reconstruction − kl.
        reconstruction: E_q[log p(x|z)] over `num_samples` draws of z; for an autoencoder log p(x|z)
            at the code of x.
        kl: KL(q(z|x) ‖ p(z)), in closed form, or over the same draws if there is none.
        log_evidence: importance-sampled log p(x).
        standard_error: of the mean log p(x), with the rows as a sample of their population.
        monte_carlo_error: of the mean log p(x) of these rows, from the importance weights.
        unreliable_weights: share of rows whose weights have too heavy a tail to rely on log p(x)
            and on the Monte Carlo error (`evidence.reliable_k`).
        bits_per_dim: −log p(x) / (D log 2), of discrete data; D is the mean number of observed
            values of a row.
        active_units: number of latents whose posterior mean varies over rows by `ACTIVE_VARIANCE`.
        num_images: number of rows.
        num_samples: importance samples per row.
        binarization: "fixed" with its seed if grey values are binarized, else "none".
        accuracies: of a semi-supervised model, on rows with a label.

    The densities of a conditional model are those given the label of each row, log p(x|y).
    """

    elbo: float | None = None
    reconstruction: float
    kl: float | None = None
    log_evidence: float | None = None
    standard_error: float | None = None
    monte_carlo_error: float | None = None
    unreliable_weights: float | None = None
    bits_per_dim: float | None = None
    active_units: int | None = None
    num_images: int
    num_samples: int | None = None
    binarization: str
    accuracies: Accuracies | None = None


@dataclass(frozen=True)
class RowValues:
    """The measures of each of N rows, nats, float64; None if the model has none.

    Attributes:
        reconstruction, kl, log_evidence: (N,) as in `Evaluation`.
        standard_error: (N,) Monte Carlo error of log p(x); NaN for one sample.
        pareto_k: (N,) of the importance weights; None for few samples.
        observed: (N,) number of observed values.
        means: (N, Z) of q(z|x).
        right: of a semi-supervised model, whether the labels are right.
    """

    reconstruction: Tensor
    kl: Tensor | None = None
    log_evidence: Tensor | None = None
    standard_error: Tensor | None = None
    pareto_k: Tensor | None = None
    observed: Tensor | None = None
    means: Tensor | None = None
    right: RightLabels | None = None

    @property
    def elbo(self) -> Tensor | None:
        """(N,) reconstruction − kl."""
        return None if self.kl is None else self.reconstruction - self.kl


def num_pairs(vae: Model, num_rows: int, num_samples: int) -> int:
    """Number of (row, sample) pairs of `evaluate`; 0 for an autoencoder."""
    if isinstance(vae, Autoencoder):
        return 0
    return num_rows * num_samples * (vae.num_classes if isinstance(vae, SemiSupervisedVAE) else 1)


@torch.no_grad()
def evaluate(
    vae: Model,
    split: Split,
    num_samples: int = 5000,
    num_rows: int | None = None,
    seed: int = 0,
    on_chunk: Callback = ignore,
    on_batch: Callable[[float, float], object] | None = None,
) -> Evaluation:
    """Measure a model on a split, and restore torch's global random state. See `note_outlier`.

    Args:
        vae: the model, on the split's device.
        split: the rows.
        num_samples: importance samples of z per row.
        num_rows: number of rows, from the beginning of the split; by default all.
        seed: of the samples and of the binarization.
        on_chunk: called with the number of (row, sample) pairs just done.
        on_batch: called after each batch with the mean ELBO and log p(x) of all rows so far; not
            of a model with labels, which is measured class by class.
    """
    likelihood, count = vae.likelihood_module, min(len(split), num_rows or len(split))
    binarization = f"fixed, seed {seed}" if split.spec.binarizes(likelihood.units) else "none"
    if isinstance(vae, Autoencoder):
        mean, _ = elbo_terms(vae, split, seed, count, note=True)
        return Evaluation(reconstruction=mean, num_images=count, binarization=binarization)
    values = evaluate_rows(vae, split, num_samples, count, seed, on_chunk, on_batch)
    assert values.log_evidence is not None
    note_outlier(vae, split, values.log_evidence, "log p(x)")
    found = _means(values, num_samples, likelihood.is_discrete)
    shares = None if values.right is None else accuracies(values.right)
    return Evaluation(**found, binarization=binarization, accuracies=shares)


@torch.no_grad()
def evaluate_rows(
    vae: VAE | ConditionalVAE,
    split: Split,
    num_samples: int,
    count: int,
    seed: int = 0,
    on_chunk: Callback = ignore,
    on_batch: Callable[[float, float], object] | None = None,
) -> RowValues:
    """The measures of the first `count` rows of a split, as `evaluate` averages them.

    The arguments are those of `evaluate`.
    """
    vae = uncompiled(vae)
    values, with_tail = math.prod(split.spec.shape), num_samples >= MIN_TAIL_SAMPLES
    classes = getattr(vae, "num_classes", 1) if needs_labels(vae) else 1  # each has its own graph
    mode = choose_mode(count * num_samples * values / classes)

    def measure(vae: VAE, x: Tensor) -> tuple[Tensor, ...]:
        evidence = importance_sample(
            vae, x, num_samples, on_chunk, with_tail, mode=mode, with_posterior=True
        )
        return _terms(x, evidence)

    right: RightLabels | None = None
    with random_states(split.device, derive(seed, "posterior")):
        if isinstance(vae, ConditionalVAE):
            terms, log_joint = measured_with_labels(vae, split, seed, count, measure)
            right = right_labels(vae, split, seed, log_joint)
        else:
            batches = split.fixed(vae.likelihood_module.units, seed, count)
            terms = _measured(vae, batches, measure, on_batch)
    log_evidence, reconstruction, kl, errors, tails, observed, means = terms
    tail = tails if with_tail else None
    return RowValues(reconstruction, kl, log_evidence, errors, tail, observed, means, right)


@torch.no_grad()
def bound_of_rows(vae: Model, split: Split, count: int, seed: int = 0) -> RowValues:
    """Reconstruction and KL of the first `count` rows of a split, with one draw of z for each."""
    reconstruction, kl = _joined(_bounds(vae, split, seed, count))
    return RowValues(reconstruction, None if isinstance(vae, Autoencoder) else kl)


def _means(values: Any, num_samples: int, is_discrete: bool) -> dict[str, Any]:
    """The numbers of an `Evaluation` from `RowValues`."""
    log_evidence, tails = values.log_evidence, values.pareto_k
    count = len(log_evidence)
    density = log_evidence.mean().item()
    deviation = values.standard_error.square().sum().sqrt().item()
    several, size = count > 1, values.observed.mean().item()
    return {
        "elbo": values.reconstruction.mean().item() - values.kl.mean().item(),
        "reconstruction": values.reconstruction.mean().item(),
        "kl": values.kl.mean().item(),
        "log_evidence": density,
        "standard_error": log_evidence.std().item() / math.sqrt(count) if several else None,
        "monte_carlo_error": deviation / count if num_samples > 1 else None,
        "unreliable_weights": None if tails is None else unreliable_share(tails, num_samples),
        "bits_per_dim": -density / (size * math.log(2)) if is_discrete else None,
        "active_units": int((values.means.var(0) > ACTIVE_VARIANCE).sum()) if several else None,
        "num_images": count,
        "num_samples": num_samples,
    }


def unreliable_share(pareto_k: Tensor, num_samples: int) -> float:
    """Share of rows whose weights have too heavy a tail, see `reliable_k`, from their k̂ (N,)."""
    return (pareto_k > reliable_k(num_samples)).double().mean().item()


def _measured(
    vae: VAE,
    batches: Iterator[Tensor],
    measure: Callable[[VAE, Tensor], tuple[Tensor, ...]],
    on_batch: Callable[[float, float], object] | None,
) -> list[Tensor]:
    """The measures of all rows of a model without labels."""
    parts: list[tuple[Tensor, ...]] = []
    for x in batches:
        parts.append(measure(vae, x))
        if on_batch is not None:
            log_evidence, reconstruction, kl, *_ = _joined(parts)
            on_batch((reconstruction - kl).mean().item(), log_evidence.mean().item())
    return _joined(parts)


def _terms(x: Tensor, evidence: Evidence) -> tuple[Tensor, ...]:
    """log p(x), log p(x|z), KL, error, k̂ (if missing, KL), number of observed values, (B,) each.

    And the posterior mean (B, Z).
    """
    kl, mean = evidence.kl, evidence.mean
    assert kl is not None
    assert mean is not None
    tail = kl if evidence.pareto_k is None else evidence.pareto_k
    observed = (~x.isnan()).flatten(1).sum(1).double()
    terms = (evidence.log_evidence, evidence.reconstruction, kl, evidence.standard_error, tail)
    return (*terms, observed, mean)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The terms of all batches, concatenated over rows."""
    return [torch.cat(column) for column in zip(*parts, strict=True)]
