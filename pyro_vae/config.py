"""The settings of a run, shared by the flags, `config.json` and the checkpoint.

`Config` is a tree of frozen dataclasses. The description of a field is the help of its flag. Each
class validates its fields on construction: a setting that is out of range, or that the chosen model
would ignore, raises `InputError`. This module imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .families import (
    DiagonalGuide,
    FlowPrior,
    Guide,
    NormalPrior,
    Prior,
    TrainedGuide,
    check_objective_families,
    check_pair,
    family_flag,
    family_of,
)
from .options import (
    KL_WEIGHTED,
    OBJECTIVE_OPTIONS,
    InputError,
    Objective,
    Typed,
    check_integer,
    check_number,
    check_objective,
    check_path,
    structure,
)

VERSION = "0.1.0"

Likelihood = Literal[
    "auto", "bernoulli", "continuous-bernoulli", "binomial", "gaussian", "discretized-logistic"
]
# torchvision's data sets by their names for --data. Write ./name for a folder of such a name.
TORCHVISION_CLASSES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
}

DEFAULT_HIDDEN = {"mlp": (512, 256), "conv": (32, 64)}
MAX_CONFIG_BYTES = 2**20


def auto(metavar: str | None, meaning: str) -> Any:
    """Flag metadata: the help shows `meaning` as the default instead of None or auto."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {meaning})")


@dataclass(frozen=True)
class DataConfig(Typed):
    """The data set and its splits.

    Attributes:
        source: Data set: digits (included, needs no network); mnist, fashion-mnist, kmnist or
            emnist (torchvision, downloaded to --data-root); or the path of a folder of images or of
            a .npy, .npz or .csv file.
        root: Folder of torchvision's data sets. Missing ones are downloaded to it.
        image_size: Image height and width in pixels; one number is a square. Images in a folder
            are resized to it; flat rows of an array or a table are reshaped to it.
        max_value: Largest value that the data can take, for example 255 for 8-bit images.
        validation_size: Number of validation rows, drawn from the training data by the seed.
        test_size: Number of test rows, for data without a test split.
    """

    source: Annotated[str, tyro.conf.arg(name="data", metavar="NAME|PATH")] = "digits"
    root: Annotated[Path, tyro.conf.arg(name="data-root", metavar="DIR")] = Path("data")
    image_size: Annotated[tuple[int, int] | None, auto("H W", "as they are")] = None
    max_value: Annotated[int | None, auto("INT", "1, 255 or the largest count in the data")] = None
    validation_size: Annotated[int | None, auto("INT", "a tenth of the rows, at most 5000")] = None
    test_size: Annotated[int | None, auto("INT", "a tenth, if the data have no test split")] = None

    def absolute(self) -> DataConfig:
        """The same data by absolute paths."""
        root = self.root.expanduser().absolute()
        if self.source == "digits" or self.source in TORCHVISION_CLASSES:
            return dataclasses.replace(self, root=root)
        source = str(Path(self.source).expanduser().absolute())
        return dataclasses.replace(self, root=root, source=source)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise InputError("--data expects the name of a data set or a path; got nothing")
        check_path("data", self.source)
        check_path("data-root", str(self.root))
        check_integer("validation-size", self.validation_size)
        check_integer("test-size", self.test_size)
        check_integer("max-value", self.max_value)
        for side in self.image_size or ():
            check_integer("image-size", side)


@dataclass(frozen=True)
class ModelConfig(Typed):
    """The generative model p(z) p(x|z) and the posterior q(z|x).

    Attributes:
        kind: vae: variational autoencoder. ae: deterministic autoencoder with the same networks
            and the reconstruction loss only, as a baseline.
        architecture: Encoder and decoder networks: mlp for any data, conv (strided) for images.
        latent_dim: Number of latent dimensions Z.
        guide: q(z|x). diagonal: a Gaussian with independent latents. full: a Gaussian with full
            covariance. flow (transforms=4 hidden=64): a normalizing flow after such a Gaussian.
            mixture (components=5): of Gaussians with independent latents.
        prior: p(z). normal: N(0, I). mixture (components=100): of Gaussians. vamp
            (components=100): of posteriors of pseudo-inputs, arXiv 1705.07120. flow (transforms=3
            hidden=128): a masked autoregressive flow.
        hidden: Sizes of the encoder's hidden layers; the decoder reverses them. Units for mlp;
            channels for conv, where each layer halves height and width.
        encoder_hidden: Sizes of the encoder's hidden layers, if they are not those of the decoder.
        activation: Name of an activation in torch.nn: SiLU, ReLU, Tanh, Softplus, GELU, …
        likelihood: p(x|z). bernoulli: binary data; grey images are binarized at random at each
            access. continuous-bernoulli: values in [0, 1]. binomial: counts. gaussian: real values,
            with a learned scale. discretized-logistic: 8-bit images.
    """

    kind: Annotated[Literal["vae", "ae"], tyro.conf.arg(name="model")] = "vae"
    architecture: Literal["mlp", "conv"] = "mlp"
    latent_dim: int = 20
    guide: Annotated[Guide, family_flag(TrainedGuide, "--guide")] = DiagonalGuide()  # noqa: RUF009 (frozen)
    prior: Annotated[Prior, family_flag(Prior, "--prior")] = NormalPrior()  # noqa: RUF009 (frozen)
    hidden: Annotated[
        tuple[int, ...] | None, auto("INT ...", "512 256 for mlp, 32 64 for conv")
    ] = None
    encoder_hidden: Annotated[tuple[int, ...] | None, auto("INT ...", "those of --hidden")] = None
    activation: str = "SiLU"
    likelihood: Annotated[Likelihood, auto(None, "chosen by the data")] = "auto"

    def __post_init__(self) -> None:
        for name, hint in (("guide", Guide), ("prior", Prior)):
            object.__setattr__(self, name, family_of(getattr(self, name), hint, f"--{name}"))
        super().__post_init__()
        check_integer("latent-dim", self.latent_dim)
        check_pair(self.guide, self.prior, self.latent_dim)
        for size in (*(self.hidden or ()), *(self.encoder_hidden or ())):
            check_integer("hidden", size)
        if self.architecture == "conv" and self.hidden == ():
            raise InputError("--architecture conv expects at least one layer in --hidden; got none")


def _option_names() -> list[str]:
    return sorted({name for options in OBJECTIVE_OPTIONS.values() for name in options})


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
        given = {n: getattr(self, n) for n in _option_names() if getattr(self, n) is not None}
        if self.objective in KL_WEIGHTED and self.objective != "beta":
            given.pop("beta", None)  # the KL weight, an argument of each step
        return given

    @property
    def kl_weight(self) -> float:
        """The KL term's weight after its warm-up."""
        if self.objective not in KL_WEIGHTED:
            return 1.0
        default = OBJECTIVE_OPTIONS.get(self.objective, {}).get("beta", 1.0)
        return default if self.beta is None else self.beta


@dataclass(frozen=True)
class Config(Typed):
    """All settings of a run.

    Raises:
        InputError: a setting is out of range, or has no effect on the chosen model.

    Attributes:
        seed: Seed of the splits, the initial weights and all random draws.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
        refit: Whether to end with a refit of the guide, the model held fixed. auto: if it takes
            less time than the training; it is kept if it raises the validation ELBO.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    fit: FitConfig = FitConfig()
    seed: int = 0
    device: str = "auto"
    refit: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0)
        model = self.model
        check_objective_families(self.fit.objective, model.guide.family, model.prior.family)
        if self.model.kind == "ae":
            if self.refit == "on":
                raise InputError("--refit has no effect on --model ae; drop it")
            for name in ("guide", "prior"):
                if getattr(model, name) != getattr(ModelConfig, name):
                    raise InputError(f"--{name} has no effect on --model ae; drop it")
            for name in ("objective", "num_particles", "kl_warmup", *_option_names()):
                if getattr(self.fit, name) != getattr(FitConfig, name):
                    flag = name.replace("_", "-")
                    raise InputError(
                        f"--{flag} has no effect on --model ae, which has neither posterior nor "
                        f"KL; drop it or train --model vae"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Inverse of `to_dict`. Missing settings take their defaults.

        Raises:
            InputError: an unknown setting, or a value of the wrong type or out of range.
        """
        return structure(cls, values)


# Named settings, for --preset.
PRESETS = {
    # Network and learning rate of "Importance weighted autoencoders", arXiv 1509.00519.
    "iwae-mnist": Config(
        DataConfig(source="mnist"),
        ModelConfig(latent_dim=50, hidden=(200, 200), activation="Tanh", likelihood="bernoulli"),
        FitConfig(batch_size=100, learning_rate=1e-3, epochs=700),
    ),
    # The highest log p(x) of ten minutes on two cores, see docs/results.md.
    "mnist": Config(
        DataConfig(source="mnist"),
        ModelConfig(latent_dim=40, hidden=(500, 500), prior=FlowPrior(), likelihood="bernoulli"),
        FitConfig(batch_size=128, learning_rate=1e-3, epochs=90),
        refit="off",
    ),
}


def read_config(path: Path) -> Config:
    """Read a run's `config.json`.

    Raises:
        InputError: the file is missing, not JSON, or has settings unknown to this version.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe might wait for ever
            raise InputError(f"{path} is not a config.json: it is not a regular file")
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise InputError(f"{path} is not a config.json: it has more than a megabyte")
        values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path} is not a config.json: its brackets nest too deep") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not a config.json: {error}") from None
    try:
        return Config.from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(n for n in names if names.count(n) > 1)} twice")
    return values


def resolve(config: Config, likelihood: Any, num_train: int) -> Config:
    """Fill in the defaults that depend on the data.

    Args:
        config: the settings as given.
        likelihood: the default likelihood of the data.
        num_train: number of training rows.

    Raises:
        InputError: the batch is larger than the training set, and not the default.
    """
    model = config.model
    hidden = DEFAULT_HIDDEN[model.architecture] if model.hidden is None else model.hidden
    likelihood = likelihood if model.likelihood == "auto" else model.likelihood
    model = dataclasses.replace(model, hidden=hidden, likelihood=likelihood)
    epochs = resolve_epochs(config.fit, num_train)
    size = min(config.fit.batch_size, num_train)
    fit = dataclasses.replace(config.fit, epochs=epochs, batch_size=size)
    return dataclasses.replace(config, model=model, fit=fit)


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
