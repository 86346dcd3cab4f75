"""Checks of a model before it is trained."""

from __future__ import annotations

import math
import warnings

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from ..capture.build import find_leaves
from ..config import FitConfig, InputError
from ..config.families import check_objective_families
from ..data.splits import Split, Splits
from ..memory import check_memory
from ..models.autoencoder import Autoencoder
from ..models.refined import Refined
from ..models.vae import VAE

# Decoded values of a step that would take hours, without any progress to show.
MAX_STEP_VALUES = 10**12


def check_model(vae: VAE | Autoencoder, splits: Splits, objective: str) -> None:
    """Check type, families, dtype and device of a model.

    Raises:
        InputError: it is not a model of this package, does not compute on float32 data, or on the
            device of the batches, or its families do not work with the objective.
    """
    if not isinstance(vae, VAE | Autoencoder):
        raise InputError(f"training expects a VAE or an Autoencoder; got {type(vae).__name__}")
    if isinstance(getattr(vae, "family", None), Refined):
        raise InputError(
            "training expects a guide that can be trained; this model has a refined one: train "
            "with another, and refit"
        )
    if isinstance(vae, VAE):
        kinds = (getattr(part, "kind", None) for part in (vae.family, vae.prior_module))
        check_objective_families(objective, *kinds)
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


def check_trained(vae: VAE | Autoencoder, x: Tensor) -> None:
    """Check that a step on x (B, *data_shape) would train all parameters; warn about the others.

    Raises:
        InputError: none, or one that does not belong to the model.
    """
    loss = Trace_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, x)
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
