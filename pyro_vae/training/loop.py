"""Stochastic variational inference: the training loop.

    svi = SVI(vae.model, vae.guide, optimizer, loss=elbo)
    for x in batches:
        loss = svi.step(x)

`fit` trains to the end, `iterate` yields a record after each epoch. The loop writes no files and
prints nothing; it logs each epoch. It leaves Pyro's parameter store and torch's global random state
as it found them, also between two steps, so the caller may draw and train other models without
changing this training. A run continued from `record.state()` has exactly the numbers of an
uninterrupted run.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor

from ..capture.captured import CapturedSVI, capture
from ..capture.optimizer import NonFiniteGradient, OneOptimizer
from ..config import FitConfig, InputError, resolve_epochs
from ..config.options import KL_WEIGHTED
from ..data.splits import Splits
from ..evidence.evaluation import elbo_terms
from ..evidence.labels import accuracy
from ..models.autoencoder import Autoencoder
from ..models.interface import UNREGISTERED, uncompiled
from ..models.labels import Model, SemiSupervisedVAE, arguments, at_rows
from ..objectives.registry import objective
from ..runtime.randomness import OwnState, derive, usual_settings
from . import distributed, schedules
from .checks import check_model, check_particles, check_trained
from .modes import run_mode, steps_at_once
from .records import Position, Progress, Record, Sums, diverged, pack, summary, unpack
from .rows import classification_weight, step_rows
from .terms import ElboTerms

LOG = logging.getLogger(__name__)

# Objectives that are not sums over rows.
WHOLE_BATCH = ("free-bits", "beta-tc", "mmd")

# Rows on which model, guide and objective are checked before the first step.
CHECKED_ROWS = 8


def fit(
    vae: Model,
    splits: Splits,
    config: FitConfig = FitConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    state: dict[str, Any] | None = None,
    on_step: Callable[[Progress], bool | None] | None = None,
) -> list[Record]:
    """Train `vae` in place to the end of the run.

    See `iterate` for the arguments and errors.

    Returns:
        A record for each epoch.
    """
    return list(iterate(vae, splits, config, seed, state, on_step))


def iterate(
    vae: Model,
    splits: Splits,
    config: FitConfig = FitConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    state: dict[str, Any] | None = None,
    on_step: Callable[[Progress], bool | None] | None = None,
) -> Iterator[Record]:
    """Train `vae` in place and yield a record after each epoch.

    In a torch.distributed process group, this is one rank of a common training. It starts from the
    first rank's weights, takes its part of every batch and draws its own random numbers. All ranks
    yield the same records, except for timings, and stop one step after `on_step` has requested it
    in one of them. Buffers such as running means are not shared.

    Args:
        vae: the model, on the device on which `splits` deliver their batches.
        splits: training and validation rows; the test split is not used.
        config: objective, schedules and length.
        seed: of the order of the rows and all draws.
        state: result of an earlier `Record.state()` or `Progress.state()`, from which the run
            continues; `vae` must have the weights of the same moment.
        on_step: called after every step, or after every few small steps of a captured run; if it
            returns true, the training stops.

    Raises:
        Diverged: the loss, its gradient or the validation ELBO is not finite.
        LostRank: another rank has failed. The state is that before this step.
        InputError: the batch is larger than the training set, the model does not fit the data, or
            the objective needs the whole batch in one process.
    """
    vae = uncompiled(vae)
    with usual_settings():
        run = _setup(vae, splits, config, seed)
        position, sums = Position(), Sums()
        if state is not None:
            adam = run.optimizer.optimizer
            position, sums, run.own.random, moments = unpack(state, run.optimizer.parameters)
            adam.load_state_dict({**adam.state_dict(), "state": moments})
    try:
        while position.epoch < run.epochs and not _is_stale(position, config):
            position, sums, stopped = _epoch(run, position, sums, on_step)
            if stopped:
                return
            position, record = _end_of_epoch(run, position, sums)
            sums = Sums()
            LOG.info("%s", summary(record.metrics(), run.epochs))
            yield record
    finally:
        vae.eval()


@dataclass(frozen=True)
class _Run:
    """The constants of a training, and two mutable objects: `own` and `optimizer`."""

    vae: Model
    splits: Splits
    config: FitConfig
    seed: int
    epochs: int
    steps_per_epoch: int
    optimizer: OneOptimizer
    svi: CapturedSVI
    svi_of_rest: CapturedSVI  # for the last batch of an epoch, which is smaller
    steps_at_once: int  # see `modes`
    own: OwnState

    @property
    def device(self) -> torch.device:
        return self.own.device


def _setup(vae: Model, splits: Splits, config: FitConfig, seed: int) -> _Run:
    epochs = resolve_epochs(config, len(splits.train))
    check_particles(config, splits.train)
    alone = distributed.world() == 1
    if not alone and config.objective in WHOLE_BATCH:
        raise InputError(
            f"--objective {config.objective} needs the whole batch in one process; run a "
            f"single process, or choose another objective"
        )
    check_model(vae, splits, config)
    optimizer = OneOptimizer(
        torch.optim.Adam(vae.parameters(), lr=config.learning_rate, fused=True)
    )
    loss = _objective(vae, config)
    mode = run_mode(config, splits.train, isinstance(vae, SemiSupervisedVAE))
    _check(vae, splits, loss)
    elbo = capture(loss, mode, ElboTerms(vae, config.num_particles))
    # The last batch of an epoch is smaller, and too rare to compile for.
    rest = capture(
        loss, "graph" if mode == "compiled" else mode, ElboTerms(vae, config.num_particles)
    )
    if not alone:
        distributed.share([*vae.parameters(), *vae.buffers()])
    return _Run(
        vae,
        splits,
        config,
        seed,
        epochs,
        steps_per_epoch=math.ceil(len(splits.train) / config.batch_size),
        optimizer=optimizer,
        svi=CapturedSVI(vae.model, vae.guide, optimizer, loss=elbo),
        svi_of_rest=CapturedSVI(vae.model, vae.guide, optimizer, loss=rest),
        steps_at_once=steps_at_once(config, _device(vae)) if alone and mode != "eager" else 1,
        own=OwnState(_device(vae), derive(seed, "training")),
    )


def _objective(vae: Model, config: FitConfig) -> ELBO:
    if isinstance(vae, SemiSupervisedVAE):  # labels are summed out
        return TraceEnum_ELBO(max_plate_nesting=1)
    options = config.objective_options()
    return objective(config.objective, config.num_particles, max_plate_nesting=1, **options)


def _check(vae: Model, splits: Splits, loss: ELBO) -> None:
    """Evaluate the objective once with Pyro's checks of shapes and supports.

    Raises:
        InputError: a check fails.
    """
    own = OwnState(_device(vae), seed=0)
    x = next(splits.train.fixed(vae.likelihood_module.units, 0, CHECKED_ROWS))
    args = arguments(vae, x, splits.train.labels_of(slice(len(x))))
    try:
        with active(own, validate=True):
            loss.loss(vae.model, vae.guide, *args)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model and data do not fit together: {reason}") from None
    with active(own):
        check_trained(vae, *args)


def _epoch(
    run: _Run,
    position: Position,
    sums: Sums,
    on_step: Callable[[Progress], bool | None] | None,
) -> tuple[Position, Sums, bool]:
    """Make the remaining steps of an epoch.

    Returns:
        Position and sums after the last step, and whether `on_step` requested to stop.
    """
    alone, wish = distributed.world() == 1, False
    run.vae.train()
    for batches in _batches(run, position):
        started = time.perf_counter()
        with active(run.own, run.config.precision):
            terms, stop = _steps(run, position, batches, wish)
        elapsed = time.perf_counter() - started
        position = position.after_steps(len(batches), elapsed)
        sums = sums.after_steps(sum(map(len, batches)), elapsed, terms)
        wish = on_step is not None and bool(on_step(_progress(run, position, sums)))
        if stop or (wish and alone):
            return position, sums, True
    return position, sums, False


def _batches(run: _Run, position: Position) -> list[tuple[Tensor, ...]]:
    """Row indices of the remaining steps of an epoch, shuffled by seed and epoch.

    Steps that are made together, on batches of equal size, are in one tuple.
    """
    order = np.random.default_rng([run.seed, position.epoch]).permutation(len(run.splits.train))
    size, done = run.config.batch_size, position.step - position.epoch * run.steps_per_epoch
    batches = torch.from_numpy(order).split(size)[done:]
    whole = max(0, len(order) // size - done)  # but for a smaller last one
    starts = [*range(0, whole, run.steps_at_once), whole, len(batches)]
    return [batches[i:j] for i, j in pairwise(starts) if i < j]


def _steps(
    run: _Run, position: Position, batches: Sequence[Tensor], wish: bool
) -> tuple[list[float], bool]:
    """Make a step for each batch. Of several ranks, each takes its part of the one batch.

    Returns:
        The terms, summed over steps and ranks, and whether any rank requests to stop.
    """
    config, size, alone = run.config, len(batches[0]), distributed.world() == 1
    svi = run.svi if size == config.batch_size else run.svi_of_rest
    if not alone:
        run.own.seed(f"training {distributed.rank()} {position.step}", run.seed)
        batches = [distributed.part(batches[0])]
    # x or, of a model with labels, x, y and perhaps more
    rows = step_rows(run.vae, run.splits.train, torch.cat([*batches]), run.seed, position.step)
    sizes = [len(batch) for batch in batches]
    calls = (
        (args, _set_schedules(run, position.step + i, size))
        for i, args in enumerate(zip(*(values.split(sizes) for values in rows), strict=True))
    )
    found: list[list[float]] = []
    stop = False
    try:
        if alone:
            results = svi.steps(calls)
        else:  # with the update in the graph, ranks could not sum their gradients
            args, weights = next(calls)
            numbers, stop = distributed.step(svi, args, wish, **weights)
            results = iter([numbers])
        for loss, *terms in results:
            if not math.isfinite(loss):
                raise diverged("loss", config, position.after_steps(len(found), 0.0))
            found.append(terms)
    except NonFiniteGradient:
        raise diverged("gradient", config, position.after_steps(len(found), 0.0)) from None
    return [sum(column) for column in zip(*found, strict=True)], stop


def _set_schedules(run: _Run, step: int, num_rows: int) -> dict[str, Tensor | float]:
    """Set learning rate and clip norm; return the weights that are arguments of the step."""
    config, num_steps = run.config, run.epochs * run.steps_per_epoch
    rate = schedules.learning_rate(config, step, num_steps)
    for group in run.optimizer.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.max_norm = config.gradient_clip * num_rows
    if isinstance(run.vae, SemiSupervisedVAE):
        return {"classification_weight": classification_weight(run.splits.train, config)}
    if config.objective not in KL_WEIGHTED:
        return {}
    weight = schedules.kl_weight(config, step, num_steps)
    value = torch.tensor(weight, dtype=torch.float64)
    return {"kl_weight": value.to(run.device, non_blocking=True)}


def _end_of_epoch(run: _Run, position: Position, sums: Sums) -> tuple[Position, Record]:
    """Validate (in the first rank) and make the record of the epoch."""
    started = time.perf_counter()
    run.vae.eval()
    found = None
    if distributed.rank() == 0:
        terms = _validate(run, note=position.epoch == 0)
        share = accuracy(run.vae, run.splits.validation, run.seed)
        found = (*terms, share, position.seconds + time.perf_counter() - started)
    reconstruction, kl, share, seconds = distributed.agree(found)
    elbo = None if kl is None else reconstruction - kl
    score = reconstruction if elbo is None else elbo
    if not math.isfinite(score):
        raise diverged("validation ELBO", run.config, position)
    is_best = score > position.best
    position = position.after_epoch(score, seconds)
    train_elbo, train_reconstruction, train_kl = sums.means(not isinstance(run.vae, Autoencoder))
    return position, Record(
        epoch=position.epoch,
        step=position.step,
        seconds=seconds,
        train_elbo=train_elbo,
        validation_elbo=elbo,
        reconstruction=train_reconstruction,
        kl=train_kl,
        validation_reconstruction=reconstruction,
        validation_kl=kl,
        learning_rate=schedules.learning_rate(
            run.config, position.step - 1, run.epochs * run.steps_per_epoch
        ),
        images_per_second=sums.rate,
        is_best=is_best,
        state=_state(run, position, Sums()),
        validation_accuracy=None if share is None else share.estimate,
    )


def _validate(run: _Run, note: bool) -> tuple[float, float | None]:
    """Mean reconstruction and KL of the validation rows, nats; NaN if the model overflows.

    `note`: see `elbo_terms`.
    """
    vae, split = run.vae, run.splits.validation
    try:
        with usual_settings(run.device):
            return elbo_terms(vae, split, run.seed, note=note)
    except ValueError:  # Pyro rejects parameters of a distribution that are not finite
        with usual_settings(run.device, validate=False):
            rows = split.fixed_with_labels(vae.likelihood_module.units, run.seed)
            if all(at_rows(vae, *row).reconstruct(row[0]).isfinite().all() for row in rows):
                raise
        return math.nan, None if isinstance(vae, Autoencoder) else math.nan


def _progress(run: _Run, position: Position, sums: Sums) -> Progress:
    elbo, reconstruction, kl = sums.means(not isinstance(run.vae, Autoencoder))
    return Progress(
        epoch=position.epoch + 1,
        step=position.step,
        epochs=run.epochs,
        steps_per_epoch=run.steps_per_epoch,
        elbo=elbo,
        reconstruction=reconstruction,
        kl=kl,
        images_per_second=sums.rate,
        state=_state(run, position, sums),
    )


def _state(run: _Run, position: Position, sums: Sums) -> Callable[[], dict[str, Any]]:
    return partial(pack, position, sums, run.own.random, run.optimizer.optimizer)


def _is_stale(position: Position, config: FitConfig) -> bool:
    return config.patience is not None and position.stale_epochs >= config.patience


@contextmanager
def active(own: OwnState, precision: str = "highest", validate: bool = False) -> Iterator[None]:
    """The context of a step. Other threads wait until its end.

    Pyro's validation of shapes and supports takes a tenth of a step, so `_check` runs it once. Its
    warning about a loss that is not finite is replaced by the error `Diverged`, that about frozen
    parameters by one of `check_trained`.
    """
    with usual_settings(own.device, precision, validate), own.active(), warnings.catch_warnings():
        for message in ("Encountered NaN", UNREGISTERED):
            warnings.filterwarnings("ignore", message=message)
        yield


def _device(vae: Model) -> torch.device:
    return next(vae.parameters()).device
