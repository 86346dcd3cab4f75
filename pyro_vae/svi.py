"""Stochastic variational inference: the training loop.

    for record in fit(vae, splits, FitConfig(epochs=20)):
        print(record.epoch, record.validation_elbo)

The loop writes no files and prints nothing. It leaves Pyro's parameter store and torch's global
random state as it found them, between any two records too, so the consumer of the records may draw
what it likes without changing the training. `record.state()` is all that a later call needs to
continue with exactly the numbers of an uninterrupted run.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor
from torch.distributions import kl_divergence

from . import distributed
from .autoencoder import Autoencoder
from .capture import CapturedSVI, Mode, Observer, capture
from .config import KL_WEIGHTED, FitConfig, InputError, resolve_epochs
from .data import Split, Splits
from .objectives import objective
from .optimizer import OneOptimizer
from .randomness import derive, random_states
from .records import Diverged, Progress, Record
from .vae import VAE

__all__ = ["Diverged", "Progress", "Record", "elbo_terms", "fit"]

# Objectives that are no sum over images.
WHOLE_BATCH = ("free-bits", "beta-tc", "mmd")

# Steps from which capturing the ELBO pays for itself.
CAPTURE_FROM = 500

# What compiling the graph costs, and what it saves: in each step, and for each value of x that is
# decoded in it. Seconds, on two cores; a rule rather than a measurement, so that a run is compiled
# or not by its settings alone.
COMPILE_SECONDS = 20.0
SAVED_BY_STEP = 2e-3
SAVED_BY_VALUE = 8e-9


def fit(
    vae: VAE | Autoencoder,
    splits: Splits,
    config: FitConfig = FitConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    state: dict[str, Any] | None = None,
    on_step: Callable[[Progress], bool | None] | None = None,
) -> Iterator[Record]:
    """Train `vae` in place and yield a record after each epoch.

    Args:
        vae: the model, on the device on which `splits` deliver their batches.
        splits: training and validation rows; the test split is not touched.
        config: objective, schedule and length.
        seed: of the order of the images and all draws.
        state: of an earlier `Record.state()` or `Progress.state()`, with the weights of that moment
            in `vae`: the run continues from there.
        on_step: called after every step; a true answer ends the training there.

    Where torch.distributed has been set up, this is one rank of a training by all of them: each
    takes its part of every batch, and draws its own random numbers, from the first rank's weights.
    All of them yield the same records but for their own speed, and stop a step after `on_step` has
    asked for it in one. Buffers that change, such as running means, are each rank's own.

    Raises:
        Diverged: the loss, its gradient or the validation ELBO is not finite.
        LostRank: another rank is gone. The state before this step is kept.
        InputError: the batch is larger than the training set, or the objective needs the whole
            batch in one process.
    """
    training = _Training(vae, splits, config, seed)
    if state is not None:
        training.load(state)
    try:
        while training.epoch < training.epochs and not training.is_stale():
            for _ in training.epoch_steps():
                wish = on_step is not None and bool(on_step(training.progress()))
                if training.is_to_stop(wish):
                    return
            yield training.end_epoch()
    finally:
        vae.eval()


def elbo_terms(
    vae: VAE | Autoencoder, split: Split, seed: int = 0, num_images: int | None = None
) -> tuple[float, float | None]:
    """Mean reconstruction and KL over a split, nats per image, one draw of z an image.

    Draws and binarization are fixed by `seed`; torch's global random state is left as it was.
    The KL of an `Autoencoder` is None.
    """
    reconstruction, kl, count = 0.0, 0.0, 0
    with random_states(_device(vae), derive(seed, "posterior")):
        for x in split.fixed(vae.likelihood_module.units, seed, num_images):
            reconstructions, kls = vae.elbo_terms(x)
            reconstruction += reconstructions.double().sum().item()
            kl += 0.0 if kls is None else kls.double().sum().item()
            count += len(x)
    return reconstruction / count, kl / count if isinstance(vae, VAE) else None


def run_mode(config: FitConfig, train: Split) -> Mode:
    """How a run evaluates its ELBO. The same in every part of a resumed one."""
    if config.compile != "auto":
        return "compiled" if config.compile == "on" else "eager"
    epochs = resolve_epochs(config, len(train))
    num_steps = epochs * math.ceil(len(train) / config.batch_size)
    num_values = epochs * len(train) * math.prod(train.spec.shape) * config.num_particles
    if num_steps * SAVED_BY_STEP + num_values * SAVED_BY_VALUE >= COMPILE_SECONDS:
        return "compiled"
    return "graph" if num_steps >= CAPTURE_FROM else "eager"


@contextmanager
def _precision(precision: str, device: torch.device) -> Iterator[None]:
    """Of products within; see `FitConfig.precision`."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _no_nan_warning() -> Iterator[None]:
    """Pyro warns of a loss that is not finite; here it is an error, with its likely causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


class _Terms(Observer):
    """The ELBO's two terms, summed over the images of a step, whatever is maximized.

    Every ELBO of Pyro runs the guide first, so "z" is kept with q(z|x), and "x" with p(x|z).
    """

    def __init__(self, vae: VAE | Autoencoder, num_particles: int) -> None:
        super().__init__()
        self.vae = vae
        self.num_particles = num_particles
        self.sites: dict[str, tuple[Any, Tensor]] = {}

    def __enter__(self) -> Any:
        self.sites = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.sites.setdefault(msg["name"], (msg["fn"], msg["value"]))

    def observed(self) -> tuple[Tensor, ...]:
        """Reconstruction and, of a VAE, KL: ()."""
        likelihood, x = self.sites["x"]
        if self.num_particles > 1:  # one of them tells enough
            likelihood = self.vae.likelihood(self.sites["z"][1][:1])
        reconstruction = likelihood.log_prob(x).sum()
        if isinstance(self.vae, Autoencoder):
            return (reconstruction,)
        q = self.sites["z"][0]
        kl = kl_divergence(q, self.vae.prior()).reshape(-1, len(x))
        return reconstruction, kl.mean(0).sum()


class _Training:
    """The state of a run, and its two moves: a step and the end of an epoch."""

    def __init__(
        self, vae: VAE | Autoencoder, splits: Splits, config: FitConfig, seed: int
    ) -> None:
        self.vae, self.splits, self.config, self.seed = vae, splits, config, seed
        num_train = len(splits.train)
        self.device = _device(vae)
        self.units = vae.likelihood_module.units
        self.steps_per_epoch = math.ceil(num_train / config.batch_size)
        self.epochs = resolve_epochs(config, num_train)
        self.num_steps = self.epochs * self.steps_per_epoch
        self.optimizer = OneOptimizer(
            torch.optim.Adam(vae.parameters(), lr=config.learning_rate, fused=True)
        )
        self.elbo = objective(
            config.objective,
            config.num_particles,
            max_plate_nesting=1,
            **config.objective_options(),
        )
        # The last batch of an epoch, of another size, is not worth compiling for.
        mode = run_mode(config, splits.train)
        rest: Mode = "graph" if mode == "compiled" else mode
        self.losses = [
            capture(self.elbo, m, _Terms(vae, config.num_particles)) for m in (mode, rest)
        ]
        self.loss = self.losses[0]
        # A graph of the whole step leaves no place for the ranks' exchange, and pays if compiled.
        whole = mode == "compiled" and distributed.world() == 1
        self.svis = [
            kind(vae.model, vae.guide, self.optimizer, loss)
            for kind, loss in zip((CapturedSVI if whole else SVI, SVI), self.losses, strict=True)
        ]
        self.epoch = 0  # complete ones
        self.step = 0
        self.seconds = 0.0
        self.best = -math.inf
        self.stale_epochs = 0
        self.random: dict[str, Tensor] | None = None
        self.wish = False
        self.told: Tensor | None = None  # by all ranks, where there are several
        if distributed.world() > 1:
            if config.objective in WHOLE_BATCH:
                raise InputError(
                    f"--objective {config.objective} looks at the batch as a whole, which several "
                    f"processes do not have; run it in one, or choose another objective"
                )
            self.optimizer.before = self._sum_over_ranks
            distributed.share([*vae.parameters(), *vae.buffers()])
        self.store: Any = None  # Pyro's, of this training
        # of what is observed; of an autoencoder there is no KL
        self.terms = ("reconstruction", "kl") if isinstance(vae, VAE) else ("reconstruction",)
        self._clear_sums()

    def _clear_sums(self) -> None:
        self.sums = {"images": 0.0, "seconds": 0.0, "reconstruction": 0.0, "kl": 0.0}

    def state(self) -> dict[str, Any]:
        """All but the weights; its tensors are live, valid until the next step."""
        names = ("epoch", "step", "seconds", "best", "stale_epochs", "random")
        return {
            **{name: getattr(self, name) for name in names},
            "sums": dict(self.sums),
            "optimizer": self.optimizer.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        if set(state) != set(self.state()):
            raise InputError(
                f"a training's state expects {', '.join(self.state())}; got {', '.join(state)}"
            )
        state = dict(state)
        self.optimizer.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, dict(value) if name == "sums" else value)

    def is_stale(self) -> bool:
        return self.config.patience is not None and self.stale_epochs >= self.config.patience

    def epoch_steps(self) -> Iterator[None]:
        """The steps of one epoch, or what is left of it."""
        self.vae.train()
        order = torch.from_numpy(
            np.random.default_rng([self.seed, self.epoch]).permutation(len(self.splits.train))
        )
        first = self.step - self.epoch * self.steps_per_epoch
        for index in order.split(self.config.batch_size)[first:]:
            started = time.perf_counter()
            self._one_step(index)
            elapsed = time.perf_counter() - started
            self.seconds += elapsed
            self.sums["seconds"] += elapsed
            yield

    def _one_step(self, index: Tensor) -> None:
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.max_norm = self.config.gradient_clip * len(index)
        if self.config.objective in KL_WEIGHTED:
            self.elbo.kl_weight = self._kl_weight()
        size = 0 if len(index) == self.config.batch_size else 1
        rows, self.loss = distributed.part(index), self.losses[size]
        with self._randomness(), pyro.get_param_store().scope(self.store) as self.store:
            # Pyro's checks of shapes and supports, once: they cost a tenth of a step.
            with (
                pyro.validation_enabled(self.step == 0),
                _precision(self.config.precision, self.device),
                _no_nan_warning(),
            ):
                try:
                    if len(rows) > 0:
                        loss = self.svis[size].step(self.splits.train.take(rows, self.units))
                    else:  # the ranks outnumber the images of a last batch
                        loss, self.loss.observed = 0.0, ()
                        self.optimizer(self.optimizer.parameters)
                except ValueError as error:  # of the checks of the first step
                    reason = str(error).splitlines()[0]
                    raise InputError(f"model and data do not fit together: {reason}") from None
                except RuntimeError as error:
                    if "non-finite" not in str(error):
                        raise
                    raise self._diverged("gradient") from None
            if not math.isfinite(loss):
                raise self._diverged("loss")
        told = self.loss.observed if self.told is None else self.told[:-1]
        for name, value in zip(self.terms, told, strict=True):
            self.sums[name] += value.item()
        if self.told is not None and not math.isfinite(self.told.sum()):  # of any rank
            raise self._diverged("loss")
        self.sums["images"] += len(index)
        self.step += 1

    def _tell(self) -> Tensor:
        """The sums of this rank's images, and whether it wants to stop."""
        told = torch.zeros(len(self.terms) + 1, device=self.device)
        for i, value in enumerate(self.loss.observed):
            told[i] = value
        told[-1] = float(self.wish)
        return told

    def _sum_over_ranks(self) -> None:
        """Before the optimizer's step: gradients, and what there is to tell, in one message."""
        for parameter in self.optimizer.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.told = self._tell()
        gradients = [p.grad for p in self.optimizer.parameters if p.grad is not None]
        distributed.sum_tensors([*gradients, self.told])

    def is_to_stop(self, wish: bool) -> bool:
        """Whether any rank wants to. The others hear of it with the next step's gradients."""
        self.wish = wish
        return wish if self.told is None else bool(self.told[-1] > 0)

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"the {what} is not finite in epoch {self.epoch + 1}, step {self.step + 1}. Likely "
            f"causes: --learning-rate {self.config.learning_rate:g} is too high, "
            f"--learning-rate-warmup or --kl-warmup too short, --gradient-clip too loose, or the "
            f"data hold extreme values"
        )

    def _learning_rate(self) -> float:
        """Linear warm-up, then constant or half a cosine down to zero."""
        warmup = self.config.learning_rate_warmup * self.num_steps
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / (warmup + 1)
        if self.config.schedule == "constant":
            return self.config.learning_rate
        part = (self.step - warmup) / (self.num_steps - warmup)
        return self.config.learning_rate * (1 + math.cos(math.pi * part)) / 2

    def _kl_weight(self) -> float:
        warmup = self.config.kl_warmup * self.num_steps
        return self.config.kl_weight * min(1.0, (self.step + 1) / (warmup + 1))

    def _train_terms(self) -> tuple[float | None, float, float | None]:
        """ELBO, reconstruction and KL of this epoch so far, nats per image."""
        reconstruction = self.sums["reconstruction"] / self.sums["images"]
        if isinstance(self.vae, Autoencoder):
            return None, reconstruction, None
        kl = self.sums["kl"] / self.sums["images"]
        return reconstruction - kl, reconstruction, kl

    def progress(self) -> Progress:
        elbo, reconstruction, kl = self._train_terms()
        return Progress(
            epoch=self.epoch + 1,
            step=self.step,
            epochs=self.epochs,
            steps_per_epoch=self.steps_per_epoch,
            elbo=elbo,
            reconstruction=reconstruction,
            kl=kl,
            images_per_second=self.sums["images"] / max(self.sums["seconds"], 1e-9),
            state=self.state,
        )

    def end_epoch(self) -> Record:
        """Validate and report."""
        started = time.perf_counter()
        self.vae.eval()
        found = None
        if distributed.rank() == 0:
            terms = elbo_terms(self.vae, self.splits.validation, self.seed)
            found = (*terms, self.seconds + time.perf_counter() - started)
        # Once, before anything changes here: a rank may be lost on the way.
        reconstruction, kl, seconds = distributed.agree(found)
        elbo = None if kl is None else reconstruction - kl
        score = reconstruction if elbo is None else elbo
        if not math.isfinite(score):
            raise self._diverged("validation ELBO")
        is_best = score > self.best
        self.best = max(score, self.best)
        self.stale_epochs = 0 if is_best else self.stale_epochs + 1
        self.epoch += 1
        self.seconds = seconds
        progress = self.progress()
        self._clear_sums()
        return Record(
            epoch=self.epoch,
            step=self.step,
            seconds=self.seconds,
            train_elbo=progress.elbo,
            validation_elbo=elbo,
            reconstruction=progress.reconstruction,
            kl=progress.kl,
            validation_reconstruction=reconstruction,
            validation_kl=kl,
            learning_rate=self.optimizer.optimizer.param_groups[0]["lr"],
            images_per_second=progress.images_per_second,
            is_best=is_best,
            state=self.state,
        )

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Torch's global random state is this training's own within, the caller's without."""
        with random_states(self.device) as states:
            if self.random is None:
                states.seed(derive(self.seed, "training"))
            else:
                states.set(self.random)
            if distributed.world() > 1:  # so that a resumed run draws the same
                states.seed(derive(self.seed, f"training {distributed.rank()} {self.step}"))
            yield
            self.random = states.get()


def _device(vae: VAE | Autoencoder) -> torch.device:
    return next(vae.parameters()).device
