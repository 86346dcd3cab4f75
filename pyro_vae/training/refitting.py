"""A new guide for a trained model, which is held fixed.

    svi = SVI(model, vae.guide, optimizer, loss=WithSimulated(…))
    loss = svi.step(x, x_simulated, z)

The guide is trained on the ELBO of rows of data and on pairs drawn from the model. Half of the rows
are training rows x; the others are drawn near them, from p(x'|z) with z ~ q(z|x). The ELBO of a row
needs no label, and there is no limit to such rows, so that the guide overfits the training rows
less.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from ..capture.captured import Mode, capture
from ..capture.optimizer import NonFiniteGradient, OneOptimizer
from ..config import FitConfig, ModelConfig, resolve_epochs
from ..config.families import MixturePrior, RefinedGuide, RefitConfig, VampPrior
from ..data.missing import hidden_as, hidden_at_random
from ..data.splits import Split, Splits
from ..evidence.evaluation import elbo_terms
from ..models.build import new_guide
from ..models.interface import held_fixed, uncompiled
from ..models.labels import ConditionalVAE
from ..models.refined import Refined
from ..models.vae import VAE
from ..objectives.simulated import WithSimulated
from ..runtime.memory import Callback, check_memory, ignore, rows_at_once
from ..runtime.randomness import OwnState, derive, random_states, usual_settings
from .loop import active
from .modes import CAPTURE_FROM
from .records import Diverged

# Share of the rows that are drawn near training rows.
NEAR = 0.5
# Largest norm of the gradient of the loss per row, nats.
CLIP = 20.0
# Share of the steps over which the learning rate rises.
WARMUP = 0.05
NUM_RECORDS = 10
# Validation rows, at most, and simulated pairs for the score of a record
SCORED = 1000
# Simulated pairs for the tails of a refined guide
TAIL_PAIRS = 2000


@dataclass(frozen=True)
class RefitRecord:
    """A refit after some steps. Log-densities are nats per row.

    Attributes:
        step: number of steps.
        seconds: since the beginning.
        validation_elbo: of at most `SCORED` rows, with one draw of z per row, the same at each
            record.
        simulated_log_q: mean of log q(z*|x*) over pairs drawn from the model, the same at each
            record.
        score: (1 − s) validation_elbo + s simulated_log_q, by which the guide is chosen.
    """

    step: int
    seconds: float
    validation_elbo: float
    simulated_log_q: float
    score: float

    def metrics(self) -> dict[str, Any]:
        """A line of refit.jsonl."""
        return asdict(self)


def refit(
    vae: VAE,
    splits: Splits,
    config: RefitConfig = RefitConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    on_step: Callback = ignore,
    on_record: Callable[[RefitRecord], object] = lambda record: None,
) -> VAE:
    """Train a new guide for the model p(z) p(x|z) of `vae`, which stays as it is.

    A refined guide needs no training: its tails are fitted to rows simulated from the model. The
    others are trained by SVI, on training rows and on simulated ones.

    Source: "Reweighted wake-sleep", arXiv 1406.2751, for the simulated rows; see also
    `objectives.simulated` and `models.refined`.

    Args:
        vae: a trained model, on the device on which `splits` deliver their batches. It is not
            changed.
        splits: training and validation rows; the test split is not used.
        config: the family of the new guide, and its training.
        seed: of new weights, the order of the rows and all draws. Torch's global random state does
            not change.
        on_step: called with the number of steps, or of simulated rows, just done; see `work`.
        on_record: called with each record, about `NUM_RECORDS`.

    Returns:
        A model with a copy of p(z) p(x|z) and the new guide, in evaluation mode. Of the guides at
        the records, it is the one with the highest score.

    Raises:
        Diverged: the loss or its gradient is not finite.
        InputError: the model is not a `VAE`, or a `ConditionalVAE` with a refined guide, or a step
            needs more memory than the machine has.
    """
    vae = uncompiled(vae)
    with usual_settings():
        refitted = new_guide(vae, config.guide, config.encoder_hidden, seed).eval()
        started = time.perf_counter()
        if isinstance(refitted.family, Refined):
            like = _examples(splits.train, vae)
            refitted.family.set_tail(_radii(refitted, derive(seed, "refit tail"), on_step, like))
            seconds = time.perf_counter() - started
            on_record(_record(refitted, splits, config, seed, 0, seconds))
            return refitted
        _check_memory(config, splits)
    return _trained(vae, refitted, splits, config, seed, on_step, on_record)


def work(config: RefitConfig) -> tuple[int, str]:
    """How often `refit` calls `on_step` with 1, and the unit."""
    if isinstance(config.guide, RefinedGuide):
        return TAIL_PAIRS, "row"
    return config.steps, "step"


def _trained(
    vae: VAE,
    refitted: VAE,
    splits: Splits,
    config: RefitConfig,
    seed: int,
    on_step: Callback,
    on_record: Callable[[RefitRecord], object],
) -> VAE:
    """Train the guide of `refitted` by SVI; see `refit`."""
    guide = nn.ModuleList([refitted.encoder, refitted.family])
    own = OwnState(next(vae.parameters()).device, derive(seed, "refit"))
    optimizer = OneOptimizer(torch.optim.Adam(guide.parameters(), fused=True))
    optimizer.max_norm = CLIP * config.batch_size
    mode: Mode = "graph" if config.steps >= CAPTURE_FROM else "eager"
    elbo = capture(WithSimulated(config.simulated, vae.latent), mode)
    svi = SVI(refitted.model, refitted.guide, optimizer, loss=elbo)
    best, best_score, started = guide.state_dict(), -math.inf, time.perf_counter()
    with held_fixed(refitted):
        guide.requires_grad_(True)
        for step in range(config.steps):
            for group in optimizer.optimizer.param_groups:
                group["lr"] = _learning_rate(config, step)
            with active(own):
                _step(svi, refitted, vae, splits.train, config)
            on_step(1)
            if step + 1 in _recorded(config.steps):
                seconds = time.perf_counter() - started
                record = _record(refitted, splits, config, seed, step + 1, seconds)
                if record.score > best_score:
                    best, best_score = copy.deepcopy(guide.state_dict()), record.score
                on_record(record)
    guide.load_state_dict(best)
    return refitted


def refitted_config(model: ModelConfig, config: RefitConfig) -> ModelConfig:
    """The settings of a model after `refit`. A vamp prior has become a mixture."""
    prior = model.prior
    if isinstance(prior, VampPrior):
        covariance: Any = "full" if model.guide.family == "full" else "diagonal"
        prior = MixturePrior(components=prior.components, covariance=covariance)
    hidden = config.encoder_hidden or model.encoder_hidden
    return replace(model, guide=config.guide, prior=prior, encoder_hidden=hidden)


def is_cheaper(config: RefitConfig, training: FitConfig, num_train: int, latent_dim: int) -> bool:
    """Whether a refit takes less time than the training, by the number of passes of networks."""
    rows = min(training.batch_size, num_train) * training.num_particles
    num_steps = resolve_epochs(training, num_train) * math.ceil(num_train / training.batch_size)
    trained = 6 * rows * num_steps  # encoder and decoder, forward and backward
    if isinstance(config.guide, RefinedGuide):
        newton, sweeps = config.guide.newton + 1, config.guide.sweeps + 2
        return (TAIL_PAIRS + 2 * SCORED) * latent_dim * (newton + 6 * sweeps) <= trained
    return 6 * (2 + NEAR) * config.batch_size * config.steps <= trained


def _step(svi: SVI, vae: VAE, trained: VAE, train: Split, config: RefitConfig) -> None:
    """A step on training rows, rows near them by the trained guide, and simulated pairs."""
    with torch.no_grad():
        index = torch.randint(len(train), (config.batch_size,), device="cpu")
        x = train.take(index, vae.likelihood_module.units)
        num_near = round(NEAR * len(x))
        near = vae.likelihood(trained.posterior(x[:num_near]).sample()).sample()
        z = vae.prior().sample((len(x),))
        simulated = vae.likelihood(z).sample()
        # They lack the values that rows of data lack, which are in random order.
        near, simulated = hidden_as(near, x[:num_near]), hidden_as(simulated, x)
    try:
        loss = svi.step(torch.cat([near, x[num_near:]]), simulated, z)
    except NonFiniteGradient:
        loss = math.nan
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss of the refit or its gradient is not finite. Likely causes: --learning-rate "
            f"{config.learning_rate:g} is too high, or the data hold extreme values"
        )


@torch.no_grad()
def _radii(
    vae: Any, seed: int, on_row: Callback = ignore, like: Tensor | None = None
) -> np.ndarray:
    """Distances (N,) of simulated z from the mean, in units of the guide's scale."""
    found = []
    for model, x, z in _pairs(vae, TAIL_PAIRS, seed, like):
        on_row(len(z))
        q: Any = model.posterior(x)
        away = (z - q.loc).unsqueeze(-1)
        whitened = torch.linalg.solve_triangular(q.scale_tril, away, upper=False)
        found.append(whitened.squeeze(-1).norm(dim=-1))
    return torch.cat(found).double().cpu().numpy()


def _pairs(
    vae: Any, count: int, seed: int, like: Tensor | None = None
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Model, simulated x (B, *data_shape) and z (B, Z), `count` in all, the same at every call.

    They lack values as the rows of `like` do, see `hidden_at_random`. The model is that at a label,
    if it has labels, which have the shares of the training data.
    """
    device = next(vae.parameters()).device
    rows = rows_at_once(math.prod(vae.likelihood_module.spec.shape), device)
    with random_states(device, seed):
        models = [(vae, count)]
        if isinstance(vae, ConditionalVAE):
            counts = torch.bincount(vae.label_prior().sample((count,)), minlength=vae.num_classes)
            models = [(vae.given(k), size) for k, size in enumerate(counts.tolist()) if size]
        for model, size in models:
            for part in model.prior().sample((size,)).split(rows):
                yield model, hidden_at_random(model.likelihood(part).sample(), like), part


def _examples(train: Split, vae: Any) -> Tensor | None:
    """`SCORED` training rows at even distances, whose missing values simulated rows lack."""
    if not train.spec.missing:
        return None
    rows = train.rows[:: max(1, len(train) // SCORED)]
    return torch.cat(list(replace(train, rows=rows).fixed(vae.likelihood_module.units, seed=0)))


def _record(
    vae: Any, splits: Splits, config: RefitConfig, seed: int, step: int, seconds: float
) -> RefitRecord:
    vae.eval()
    elbo = validation_elbo(vae, splits, seed)
    like = _examples(splits.train, vae)
    pairs = _pairs(vae, SCORED, derive(seed, "refit score"), like)
    with torch.no_grad():
        log_q = [model.posterior(x).log_prob(z) for model, x, z in pairs]
    mean_log_q = torch.cat(log_q).double().mean().item()
    score = (1 - config.simulated) * elbo + config.simulated * mean_log_q
    return RefitRecord(step, seconds, elbo, mean_log_q, score)


def validation_elbo(vae: Any, splits: Splits, seed: int) -> float:
    """ELBO of the first `SCORED` validation rows, nats per row, with one draw of z per row."""
    reconstruction, kl = elbo_terms(vae, splits.validation, seed, num_images=SCORED)
    return reconstruction - (kl or 0.0)


def _recorded(steps: int) -> set[int]:
    """The steps after which there is a record."""
    return {math.ceil(steps * (i + 1) / NUM_RECORDS) for i in range(NUM_RECORDS)}


def _learning_rate(config: RefitConfig, step: int) -> float:
    """Rises linearly, then falls to zero as a cosine."""
    rise = min(1.0, (step + 1) / max(1.0, WARMUP * config.steps))
    return config.learning_rate * rise * (1 + math.cos(math.pi * step / config.steps)) / 2


def _check_memory(config: RefitConfig, splits: Splits) -> None:
    """Check that the rows of a step fit in memory."""
    rows = config.batch_size
    what = f"the {rows:,} rows of a step"
    check_memory(6 * math.prod(splits.spec.shape) * rows, what, "lower --batch-size")
