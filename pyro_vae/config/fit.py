"""`FitConfig`: training by stochastic variational inference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .options import (
    KL_WEIGHTED,
    OBJECTIVE_OPTIONS,
    InputError,
    Objective,
    Typed,
    auto,
    check_integer,
    check_number,
    check_objective,
)

# Weight of log q(y|x) of a row with a label, see docs/guide/labels.md for measurements.
LABEL_WEIGHT = 500.0


@dataclass(frozen=True)
class FitConfig(Typed):
    """Training by stochastic variational inference.

    Attributes:
        objective: Objective to maximize. The ELBO: trace (sampled), mean-field (KL in closed form),
            stl (lower variance near the posterior), score-function and score-baseline (without
            reparameterization). Importance-weighted bounds of --num-particles samples: iwae, dreg
            (lower variance for the encoder), miwae, ciwae and piwae (between ELBO and iwae), renyi,
            wake-sleep (encoder trained by KL(p ‖ q)). Others: beta (weighted KL), free-bits
            (minimum KL per latent), beta-tc (independent latents), mmd (q(z) close to the prior).
        num_particles: Number of samples of z per row and step (K).
        beta: Weight of the KL term in training (the beta-VAE's β), or of the total correlation in
            beta-tc. Reported ELBOs have weight 1.
        alpha: Order of the renyi bound. 0 gives iwae; the limit 1 is the ELBO.
        groups: Number of groups of samples in miwae and piwae.
        elbo_weight: Weight of the ELBO in ciwae, 0 to 1.
        free_bits: Minimum KL of each latent in free-bits, in nats.
        mmd_weight: Weight of the discrepancy in mmd, in nats.
        classification_weight: Weight of log q(y|x) of each row with a label, in training with
            --condition partial.
        epochs: Number of passes over the training data.
        batch_size: Number of rows per step. The default means all training rows if they are fewer.
        learning_rate: Maximum learning rate of Adam.
        schedule: Learning rate after the warm-up: cosine (decays to zero) or constant.
        learning_rate_warmup: Fraction of all steps, 0 to 1, over which the learning rate rises
            linearly from zero.
        gradient_clip: Maximum norm of the gradient of the loss per row, in nats; inf disables
            clipping.
        kl_warmup: Fraction of all steps, 0 to 1, over which the weight of the KL term rises
            linearly from zero to --beta.
        patience: Stop after this number of epochs without a better validation ELBO.
        compile: Whether to capture the ELBO as a graph and compile it, which takes about ten
            seconds before the first step. auto: if the run is long enough to save time.
        precision: Precision of matrix products. highest: float32. high, medium: TF32 or bfloat16
            factors where torch and the processor support them (GPUs, CPUs with AMX). bf16: compute
            in bfloat16 where possible; parameters and sums stay in float32.
    """

    objective: Objective = "trace"
    num_particles: int = 1
    beta: Annotated[float | None, auto("FLOAT", "1; 4 for beta, 6 for beta-tc")] = None
    alpha: Annotated[float | None, auto("FLOAT", "0.5, for renyi")] = None
    groups: Annotated[int | None, auto("INT", "8, for miwae and piwae")] = None
    elbo_weight: Annotated[float | None, auto("FLOAT", "0.05, for ciwae")] = None
    free_bits: Annotated[float | None, auto("FLOAT", "0.1, for free-bits")] = None
    mmd_weight: Annotated[float | None, auto("FLOAT", "100, for mmd")] = None
    classification_weight: Annotated[float | None, auto("FLOAT", "500, if labels are inferred")] = (
        None
    )
    epochs: Annotated[int | None, auto("INT", "about 2500 steps")] = None
    batch_size: int = 256
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    learning_rate_warmup: float = 0.05
    gradient_clip: float = 100.0
    kl_warmup: float = 0.0
    patience: Annotated[int | None, auto("INT", "no early stopping")] = None
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["highest", "high", "medium", "bf16"] = "highest"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_particles", "epochs", "batch_size", "patience"):
            check_integer(name.replace("_", "-"), getattr(self, name))
        check_number("learning-rate", self.learning_rate)
        check_number("beta", self.beta)
        if self.classification_weight:  # 0 leaves the term out
            check_number("classification-weight", self.classification_weight)
        check_number("gradient-clip", self.gradient_clip, finite=False)
        for flag, part in [
            ("learning-rate-warmup", self.learning_rate_warmup),
            ("kl-warmup", self.kl_warmup),
        ]:
            if not 0 <= part <= 1:
                raise InputError(f"--{flag} expects a fraction of the run, 0 to 1; got {part}")
        try:
            check_objective(self.objective, self.num_particles, self.objective_options())
        except ValueError as error:
            raise InputError(f"--objective {self.objective}: {error}") from None
        if self.objective == "mmd" and self.batch_size < 2:
            raise InputError("--objective mmd expects a --batch-size of at least 2; got 1")
        if self.objective not in KL_WEIGHTED and self.kl_warmup > 0:
            raise InputError(
                f"--kl-warmup expects an objective whose KL term can be weighted "
                f"({', '.join(KL_WEIGHTED)}); got --objective {self.objective}"
            )

    def objective_options(self) -> dict[str, Any]:
        """The options of `objective` that are set."""
        given = {n: getattr(self, n) for n in option_names() if getattr(self, n) is not None}
        if self.objective in KL_WEIGHTED and self.objective != "beta":
            given.pop("beta", None)  # the KL weight, an argument of each step
        return given

    @property
    def label_weight(self) -> float:
        """The weight of log q(y|x) of each row with a label, in semi-supervised training."""
        return LABEL_WEIGHT if self.classification_weight is None else self.classification_weight

    def of_bounds(self) -> dict[str, Any]:
        """The settings of an objective with posterior and KL that are not the defaults."""
        names = ("objective", "num_particles", "kl_warmup", *option_names())
        values = {name: getattr(self, name) for name in names}
        return {n: value for n, value in values.items() if value != getattr(FitConfig, n)}

    @property
    def kl_weight(self) -> float:
        """The KL term's weight after its warm-up."""
        if self.objective not in KL_WEIGHTED:
            return 1.0
        default = OBJECTIVE_OPTIONS.get(self.objective, {}).get("beta", 1.0)
        return default if self.beta is None else self.beta


def option_names() -> list[str]:
    return sorted({name for options in OBJECTIVE_OPTIONS.values() for name in options})


def resolve_epochs(config: FitConfig, num_train: int) -> int:
    """Number of epochs: as given, or about 2500 steps.

    Raises:
        InputError: the batch is larger than the training set, and not the default.
    """
    if config.batch_size > num_train and config.batch_size != FitConfig.batch_size:
        raise InputError(
            f"--batch-size {config.batch_size} is larger than the training set of {num_train} "
            f"rows; lower it"
        )
    return config.epochs or max(1, round(2500 / math.ceil(num_train / config.batch_size)))
