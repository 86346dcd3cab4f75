"""Evaluate a model of rows with labels: log p(x|y) of conditional ones, log p(x) of others.

    conditional       ELBO(x, y) ≤ log p(x|y), at the label of each row
    semi-supervised   ELBO(x) ≤ log p(x) = log Σ_y p(y) p(x|y), of rows whose labels are not used

p(x|y) is importance-sampled at each y. With the same numbers, the model's own classifier is
p(y|x) = p(y) p(x|y) / p(x), with which q(y|x) is compared. Accuracies are shares of the rows with a
label, with Clopper and Pearson's 95% intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pyro.distributions import Categorical
from torch import Tensor

from ..data.splits import CHUNK, Split
from ..models.labels import ConditionalVAE, Model, SemiSupervisedVAE
from ..models.vae import VAE
from .intervals import Interval, share_interval

# The tail of the weights counts at the labels that have this probability by p(y|x), at least.
RELEVANT = 0.01

# Measures rows x (B, *data_shape) under p(x|y): (B,) or (B, …) each.
Measure = Callable[[VAE, Tensor], tuple[Tensor, ...]]


@torch.no_grad()
def accuracy(
    vae: Model, split: Split, seed: int = 0, num_rows: int | None = None
) -> Interval | None:
    """Share of the rows with a label whose most probable label by q(y|x) is theirs.

    Args:
        vae: the model; the share is None unless it is semi-supervised.
        split: the rows; the share is None if none has a label.
        seed: of the binarization.
        num_rows: number of rows, from the beginning of the split; by default all.
    """
    found = _right(vae, split, seed, num_rows)
    if found is None or not len(found):
        return None
    return share_interval(found.cpu().numpy())


def _right(vae: Model, split: Split, seed: int, num_rows: int | None) -> Tensor | None:
    """Whether the most probable label by q(y|x) is that of the row, of the rows with a label."""
    if not isinstance(vae, SemiSupervisedVAE) or split.labels is None:
        return None
    found = []
    for x, y in split.fixed_with_labels(vae.likelihood_module.units, seed, num_rows):
        assert y is not None
        found.append((vae.classifier(x).argmax(-1) == y)[y >= 0])
    return torch.cat(found)


def rows_of_class(
    vae: ConditionalVAE, split: Split, label: int, seed: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """x (≤ CHUNK, *data_shape) and the positions (≤ CHUNK,) of the rows of one class.

    Those of a semi-supervised model are all rows. Batches are as large as those of `Split.fixed`,
    so that few shapes are compiled.
    """
    kept: list[Tensor] = []
    places: list[Tensor] = []
    done = 0
    for x, y in split.fixed_with_labels(vae.likelihood_module.units, seed, count):
        index = torch.arange(len(x), device=x.device)
        if not isinstance(vae, SemiSupervisedVAE):
            assert y is not None
            index = index[y == label]
        kept.append(x[index])
        places.append(index + done)
        done += len(x)
        rows, place = torch.cat(kept), torch.cat(places)
        while len(rows) >= CHUNK:
            yield rows[:CHUNK], place[:CHUNK]
            rows, place = rows[CHUNK:], place[CHUNK:]
        kept, places = [rows], [place]
    if len(kept[0]):
        yield kept[0], places[0]


def measured_with_labels(
    vae: ConditionalVAE, split: Split, seed: int, count: int, measure: Measure
) -> tuple[list[Tensor], Tensor]:
    """Measure the first `count` rows of a split under p(x|y), class by class.

    Args:
        measure: returns log p(x|y), reconstruction, KL, standard error, k̂, number of observed
            values (B,), and the posterior mean (B, Z), of rows under the model at one class.

    Returns:
        The same of each row, in order: of a conditional model at the row's label; of a
        semi-supervised one of log p(x), with reconstruction, KL and mean averaged over q(y|x). And
        log p(x, y) (N, C), −∞ if it was not measured.
    """
    found: list[list[Tensor]] = []  # of each class, the measures (N,) or (N, Z), and zeros
    log_joint = torch.full((count, vae.num_classes), -torch.inf, dtype=torch.float64)
    log_joint = log_joint.to(split.device)
    priors = vae.label_prior().logits.double()
    for label in range(vae.num_classes):
        given = vae.given(label)
        kept: list[Tensor] = []
        for x, place in rows_of_class(vae, split, label, seed, count):
            parts = measure(given, x)
            log_joint[place, label] = parts[0] + priors[label]
            kept = kept or [part.new_zeros(count, *part.shape[1:]) for part in parts]
            for whole, part in zip(kept, parts, strict=True):
                whole[place] = part
        found += [kept] if kept else []
    by_class = [torch.stack(column) for column in zip(*found, strict=True)]  # (C, N) or (C, N, Z)
    if not isinstance(vae, SemiSupervisedVAE):  # each row has been measured once
        return [column.sum(0) for column in by_class], log_joint
    return _summed_out(vae, split, seed, by_class, log_joint), log_joint


def _summed_out(
    vae: SemiSupervisedVAE, split: Split, seed: int, by_class: list[Tensor], log_joint: Tensor
) -> list[Tensor]:
    """The measures of rows whose labels are not known, from those at each class."""
    units, count = vae.likelihood_module.units, len(log_joint)
    logits = [vae.label_posterior(x).logits for x in split.fixed(units, seed, count)]
    q = Categorical(logits=torch.cat(logits).double())
    _, reconstruction, kl, errors, tails, observed, means = by_class
    log_evidence = log_joint.logsumexp(-1)
    posterior = (log_joint - log_evidence.unsqueeze(-1)).exp().mT  # p(y|x), (C, N)
    return [
        log_evidence,
        *vae.summed_out(q, reconstruction, kl),
        (posterior * errors).square().sum(0).sqrt(),
        torch.where(posterior > RELEVANT, tails, -torch.inf).amax(0),
        observed[0],
        (q.probs.mT.unsqueeze(-1) * means).sum(0),
    ]


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Shares of rows whose most probable label is theirs, with 95% intervals.

    Attributes:
        accuracy, accuracy_low, accuracy_high: by q(y|x), the classifier of the guide.
        bayes_accuracy, bayes_accuracy_low, bayes_accuracy_high: by p(y|x) of the model.
        num_labelled: number of rows with a label.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    bayes_accuracy: float
    bayes_accuracy_low: float
    bayes_accuracy_high: float
    num_labelled: int


@dataclass(frozen=True)
class RightLabels:
    """Whether the most probable label of each row is its own, for the M rows with a label.

    Attributes:
        rows: (M,) their positions among all rows.
        guide, model: (M,) bool, by q(y|x) and by p(y|x).
    """

    rows: Tensor
    guide: Tensor
    model: Tensor


def right_labels(
    vae: ConditionalVAE, split: Split, seed: int, log_joint: Tensor
) -> RightLabels | None:
    """Right labels of a semi-supervised model on the rows with log p(x, y) (N, C), on the CPU.

    None for other models, or if no row has a label.
    """
    guide = _right(vae, split, seed, len(log_joint))
    if guide is None or split.labels is None or not len(guide):
        return None
    labels = split.labels[: len(log_joint)]
    rows = (labels >= 0).nonzero().flatten()
    return RightLabels(rows, guide.cpu(), (log_joint.argmax(-1).cpu() == labels)[rows])


def accuracies(right: RightLabels) -> Accuracies:
    """Shares of right labels."""
    own, bayes = share_interval(right.guide.numpy()), share_interval(right.model.numpy())
    return Accuracies(
        accuracy=own.estimate,
        accuracy_low=own.low,
        accuracy_high=own.high,
        bayes_accuracy=bayes.estimate,
        bayes_accuracy_low=bayes.low,
        bayes_accuracy_high=bayes.high,
        num_labelled=len(right.rows),
    )
