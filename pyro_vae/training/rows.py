"""The rows of a training step, as the arguments of model and guide."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import FitConfig
from ..data.splits import Split
from ..models.labels import Model, SemiSupervisedVAE, arguments
from . import distributed


def step_rows(vae: Model, train: Split, index: Tensor, seed: int, step: int) -> tuple[Tensor, ...]:
    """The arguments of `vae.model` and `vae.guide` for the rows `index` (B,) of a split.

    They are x; of a model with labels, x and y; of a semi-supervised one, also as many rows with
    labels, drawn with replacement by seed, step and rank. A batch alone has few such rows, from
    which its classifier would learn as slowly as from a small batch.
    """
    units = vae.likelihood_module.units
    args = arguments(vae, train.take(index, units), train.labels_of(index))
    if not isinstance(vae, SemiSupervisedVAE) or train.labels is None:
        return args
    known = train.labelled
    random = np.random.default_rng([seed, step, distributed.rank()])
    chosen = known[torch.from_numpy(random.integers(len(known), size=len(index)))]
    return (*args, train.take(chosen, units), train.labels[chosen].to(args[0].device))


def classification_weight(train: Split, config: FitConfig) -> float:
    """The weight of log q(y|x) of each row that `step_rows` draws.

    Summed over an epoch, these terms have the expectation of α log q(y|x) summed over the rows with
    a label, with α = `config.label_weight`.
    """
    return config.label_weight * (len(train.labelled) / len(train))
