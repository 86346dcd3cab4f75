"""Labels of a model that knows classes: their names, and which of them a training may see.

The classes of a model are those of its training data. Labels of other data are matched by the names
of their classes, never by position. The label −1 is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..config import InputError
from ..runtime.randomness import derive
from .source import listed
from .splits import Split, Splits

PARTS = ("train", "validation", "test")


def with_classes(splits: Splits, classes: Sequence[str] = ()) -> Splits:
    """The splits for a model that knows classes: they are in `spec`, and labels count in them.

    The fingerprint becomes that of values and labels.

    Args:
        splits: any; with classes already in `spec`, they are returned as they are.
        classes: the names of the classes that a model knows. By default those of the splits, for a
            new model.

    Raises:
        InputError: a class is not among those of the model. For a new model: the data have no
            labels, or a class has no training rows.
    """
    if splits.spec.classes:
        return splits
    labels = splits.whole().labels
    if not classes:
        classes = splits.class_names
        _check_new(splits, classes)
    unknown = [name for name in splits.class_names if name not in classes]
    if unknown:
        raise InputError(
            f"the model knows the classes {listed(classes)}; {splits.name} also has "
            f"{listed(unknown)}: drop these rows, or name the classes as in the training data"
        )
    spec = dataclasses.replace(splits.spec, classes=tuple(classes))
    changed: dict[str, Any] = {"spec": spec, "class_names": tuple(classes)}
    numbers = torch.tensor([*map(classes.index, splits.class_names), -1], device="cpu")
    for name in PARTS:
        part: Split = getattr(splits, name)
        own = None if part.labels is None else numbers[part.labels]
        changed[name] = dataclasses.replace(part, spec=spec, labels=own)
    if labels is not None:
        digest = blake2b(f"{splits.fingerprint} {classes!r}".encode(), digest_size=32)
        digest.update(numbers[labels].numpy().tobytes())
        changed["fingerprint"] = digest.hexdigest()
    return dataclasses.replace(splits, **changed)


def _check_new(splits: Splits, classes: Sequence[str]) -> None:
    if not classes or splits.train.labels is None:
        raise InputError(
            f"--condition and --labelled expect data with labels; {splits.name} has none"
        )
    shares = class_shares(splits.train, len(classes))
    missing = [name for name, share in zip(classes, shares, strict=True) if not share]
    if missing:
        raise InputError(
            f"each class expects training rows with its label; {splits.name} has none of "
            f"{listed(missing)}: add some, or drop all rows of this class"
        )
    if len(classes) < 2:
        raise InputError(
            f"--condition and --labelled expect at least two classes; {splits.name} has "
            f"{listed(classes)} only"
        )


def hide_labels(splits: Splits, labelled: int, seed: int) -> Splits:
    """The splits with the labels of `labelled` training rows; those of the others are −1.

    The rows are drawn by the seed, of each class in proportion to its number of rows, at least one.

    Raises:
        InputError: there are fewer rows with labels, or more classes.
    """
    labels, count = splits.train.labels, len(splits.spec.classes)
    assert labels is not None
    known = len(splits.train.labelled)
    if not count <= labelled <= known:
        raise InputError(
            f"--labelled expects {count}, the number of classes, to {known}, the number of "
            f"training rows with a label; got {labelled}"
        )
    random = torch.Generator().manual_seed(derive(seed, "labelled"))
    order = torch.randperm(len(labels), generator=random)
    kept = torch.full_like(labels, -1)
    for k, size in enumerate(_proportional(class_shares(splits.train, count), labelled)):
        rows = order[labels[order] == k][:size]
        kept[rows] = k
    return dataclasses.replace(splits, train=dataclasses.replace(splits.train, labels=kept))


def _proportional(shares: Tensor, total: int) -> list[int]:
    """Integers of at least 1 with the sum `total`, proportional to the shares (largest remainder).

    No class has more than its rows, since `total` is at most the number of all rows.
    """
    sizes = (shares * total).floor().clamp_min(1).long()
    while sizes.sum() < total:
        sizes[(shares * total - sizes).argmax()] += 1
    while sizes.sum() > total:  # of small classes, which have one row each
        sizes[torch.where(sizes > 1, sizes - shares * total, -torch.inf).argmax()] -= 1
    return sizes.tolist()


def class_shares(train: Split, count: int) -> Tensor:
    """The share of each of `count` classes (count,) among the rows with a label, float64."""
    assert train.labels is not None
    counts = torch.bincount(train.labels[train.labelled], minlength=count).double()
    return counts / counts.sum().clamp_min(1)
