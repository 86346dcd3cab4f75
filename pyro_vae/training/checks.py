"""Checks of a model before it is trained."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from ..capture.build import find_leaves
from ..config import FitConfig, InputError
from ..config.families import check_objective_families
from ..data.splits import Split, Splits
from ..models.autoencoder import Autoencoder
from ..models.labels import ConditionalVAE, Model, SemiSupervisedVAE, needs_labels
from ..models.refined import Refined
from ..models.vae import VAE
from ..runtime.memory import check_memory

# Decoded values of a step that would take hours, without any progress to show.
MAX_STEP_VALUES = 10**12


def check_model(vae: Model, splits: Splits, config: FitConfig) -> None:
    """Check type, families, dtype and device of a model.

    Raises:
        InputError: it is not a model of this package, does not compute on float32 data, or on the
            device of the batches, or its families do not work with the objective.
    """
    if not isinstance(vae, VAE | Autoencoder | ConditionalVAE):
        raise InputError(f"training expects a VAE or an Autoencoder; got {type(vae).__name__}")
    check_labels(vae, splits)
    if isinstance(vae, SemiSupervisedVAE):
        _check_enumerated(config)
    if isinstance(getattr(vae, "family", None), Refined):
        raise InputError(
            "training expects a guide that can be trained; this model has a refined one: train "
            "with another, and refit"
        )
    if not isinstance(vae, Autoencoder):
        kinds = (getattr(part, "kind", None) for part in (vae.family, vae.prior_module))
        check_objective_families(config.objective, *kinds)
    device = splits.train.device
    for name, value in [*vae.named_parameters(), *vae.named_buffers()]:
        if value.is_inference():
            raise InputError(
                f"{name} was made under torch.inference_mode() and cannot be trained; make the "
                f"model outside of it"
            )
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(
                f"training expects a float32 model; {name} is {str(value.dtype)[6:]}: call "
                f"vae.float(), and set FitConfig.precision for faster products"
            )
        if not value.is_contiguous():
            raise InputError(
                f"{name} is not contiguous, and Pyro would train a copy of it; set its .data to "
                f".data.contiguous()"
            )
        if value.device.type != device.type:
            raise InputError(
                f"model and data are on different devices: {name} on {value.device}, the batches "
                f"on {device}; move one by vae.to(device) or splits.to(device)"
            )


def check_labels(vae: Model, splits: Splits) -> None:
    """Check that there are the labels that a model needs.

    Raises:
        InputError: a row has none, or an unknown one.
    """
    if not isinstance(vae, ConditionalVAE):
        return
    for name, split in (("training", splits.train), ("validation", splits.validation)):
        labels = split.labels
        if labels is None or (needs_labels(vae) and bool((labels < 0).any())):
            raise InputError(
                f"the model expects the label of each row; {splits.name} has {name} rows without "
                f"one: --condition partial infers them"
            )
        if len(labels) and int(labels.max()) >= vae.num_classes:
            raise InputError(f"the model expects labels below {vae.num_classes}; got higher ones")


def _check_enumerated(config: FitConfig) -> None:
    for name, value in config.of_bounds().items():
        raise InputError(
            f"a semi-supervised model expects the objective trace, with one particle and no other "
            f"options; got {name} = {value}"
        )


def check_particles(config: FitConfig, train: Split) -> None:
    """Check that the particles of a step fit in memory, and that it ends within hours.

    Raises:
        InputError: they do not.
    """
    rows, particles = min(config.batch_size, len(train)), config.num_particles
    what = f"--num-particles {particles:,} for {rows:,} rows"
    check_memory(3 * rows * particles, what, "lower it, or --batch-size")
    values = rows * particles * math.prod(train.spec.shape)
    if values > MAX_STEP_VALUES:
        raise InputError(
            f"a step expects at most {MAX_STEP_VALUES:,} decoded values; {rows:,} rows with "
            f"{particles:,} particles have {values:,}. Lower --num-particles or --batch-size"
        )


def check_trained(vae: Model, *args: Tensor) -> None:
    """Check that a step on x (B, *data_shape) would train all parameters; warn about the others.

    `args` are those of `models.labels.arguments`: x, and labels if there are any.

    Raises:
        InputError: none, or one that does not belong to the model.
    """
    elbo: Any = TraceEnum_ELBO if isinstance(vae, SemiSupervisedVAE) else Trace_ELBO
    loss = elbo(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, *args)
    leaves = find_leaves(loss) if isinstance(loss, Tensor) else []
    own = dict(vae.named_parameters())
    known = {id(p) for p in own.values()}
    stored = dict(pyro.get_param_store().named_parameters())
    foreign = [f"pyro.param {name!r}" for name, p in stored.items() if id(p) not in known]
    known |= {id(p) for p in stored.values()}
    foreign += [f"a tensor of shape {tuple(p.shape)}" for p in leaves if id(p) not in known]
    if foreign:
        raise InputError(
            f"training changes vae.parameters() only; model or guide also use "
            f"{', '.join(foreign)}: make it a parameter of a module of the model"
        )
    trained = {id(p) for p in leaves}
    untrained = [name for name, p in own.items() if id(p) not in trained]
    if len(untrained) == len(own):
        raise InputError("no parameter of the model can be trained: requires_grad is False")
    if untrained:
        warnings.warn(
            f"not trained, since requires_grad is False or the objective does not depend on it: "
            f"{', '.join(untrained)}",
            stacklevel=6,
        )
