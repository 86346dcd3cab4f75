"""Families of guides q(z|x) and priors p(z): names, options, and what works together.

Imports no torch. `models.posteriors` and `models.priors` hold the distributions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import tyro

from .options import InputError, Typed, check_integer, check_number, hints_of, shown

# Largest values of the options. A flow is built for real before a checkpoint's weights are
# compared with it, so its size has a limit that takes little memory and time.
MAX_OPTION, LIMITS = 2**20, {"transforms": 32, "hidden": 1024}
MAX_FLOW_LATENTS = 1024

# Families of guide and prior that an objective expects, and why; others take all.
OBJECTIVE_FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "mean-field": (("diagonal", "full"), ("normal",), "its KL has a closed form there only"),
    "free-bits": (("diagonal",), ("normal",), "it bounds the KL of each independent latent"),
    "beta-tc": (
        ("diagonal",),
        ("normal", "mixture", "vamp", "flow"),
        "it needs the density of each independent latent",
    ),
    "mmd": (
        ("diagonal", "full", "flow", "mixture"),
        ("normal", "flow"),
        "it trains the prior through draws from it",
    ),
}


@dataclass(frozen=True)
class Family(Typed):
    """A family of distributions and its options.

    Attributes:
        family: its name.
    """

    family: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            limit = LIMITS.get(name, MAX_OPTION)
            if isinstance(value, int) and not 1 <= value <= limit:
                raise InputError(f"{name} expects an integer from 1 to {limit}; got {shown(value)}")


@dataclass(frozen=True)
class DiagonalGuide(Family):
    """A Gaussian with independent latents."""

    family: Literal["diagonal"] = "diagonal"


@dataclass(frozen=True)
class FullGuide(Family):
    """A Gaussian with full covariance."""

    family: Literal["full"] = "full"


@dataclass(frozen=True)
class FlowGuide(Family):
    """A normalizing flow after a Gaussian with full covariance.

    Attributes:
        transforms: number of coupling layers.
        hidden: units of each of the two hidden layers of their networks.
    """

    family: Literal["flow"] = "flow"
    transforms: int = 4
    hidden: int = 64


@dataclass(frozen=True)
class MixtureGuide(Family):
    """A mixture of Gaussians with independent latents.

    Attributes:
        components: number of Gaussians.
    """

    family: Literal["mixture"] = "mixture"
    components: int = 5


@dataclass(frozen=True)
class RefinedGuide(Family):
    """A Gaussian found for each row by Newton steps from the encoder's guess; for `refit`.

    Attributes:
        newton: number of steps to the Laplace approximation.
        sweeps: number of steps from there to the Gaussian of the highest ELBO.
    """

    family: Literal["refined"] = "refined"
    newton: int = 3
    sweeps: int = 3


@dataclass(frozen=True)
class NormalPrior(Family):
    """N(0, I)."""

    family: Literal["normal"] = "normal"


@dataclass(frozen=True)
class MixturePrior(Family):
    """A mixture of Gaussians.

    Attributes:
        components: number of Gaussians.
        covariance: diagonal or full, that of each Gaussian.
    """

    family: Literal["mixture"] = "mixture"
    components: int = 100
    covariance: Literal["diagonal", "full"] = "diagonal"


@dataclass(frozen=True)
class VampPrior(Family):
    """A mixture of posteriors of pseudo-inputs.

    Attributes:
        components: number of pseudo-inputs.
    """

    family: Literal["vamp"] = "vamp"
    components: int = 100


@dataclass(frozen=True)
class FlowPrior(Family):
    """A masked autoregressive flow.

    Attributes:
        transforms: number of autoregressive layers.
        hidden: units of each of the two hidden layers of their networks.
    """

    family: Literal["flow"] = "flow"
    transforms: int = 3
    hidden: int = 128


TrainedGuide = DiagonalGuide | FullGuide | FlowGuide | MixtureGuide  # with the model
Guide = TrainedGuide | RefinedGuide
Prior = NormalPrior | MixturePrior | VampPrior | FlowPrior


@dataclass(frozen=True)
class RefitConfig(Typed):
    """A new guide for a trained model, which is held fixed.

    Attributes:
        guide: q(z|x). refined (newton=3 sweeps=3): a Gaussian found for each row by Newton steps
            from the encoder's guess, with tails fitted to simulated rows; it needs no training.
            diagonal, full, flow, mixture: as in train; they are trained as below.
        encoder_hidden: Sizes of the hidden layers of a new encoder. By default, the trained encoder
            goes on, with a new last layer.
        simulated: Weight of log q(z*|x*) over rows simulated from the model, 0 to 1. The rest is
            the ELBO over training rows.
        steps: Number of steps.
        batch_size: Number of rows of each kind per step.
        learning_rate: Maximum learning rate of Adam.
    """

    guide: Annotated[Guide, family_flag(Guide, "--guide")] = RefinedGuide()
    encoder_hidden: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(metavar="INT ...", help_behavior_hint="(default: the trained encoder)"),
    ] = None
    simulated: float = 0.5
    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "guide", family_of(self.guide, Guide, "--guide"))
        super().__post_init__()
        for name in ("steps", "batch_size"):
            check_integer(name.replace("_", "-"), getattr(self, name))
        for size in self.encoder_hidden or ():
            check_integer("encoder-hidden", size)
        check_number("learning-rate", self.learning_rate)
        if isinstance(self.guide, RefinedGuide):
            for name in ("encoder_hidden", "simulated", "steps", "batch_size", "learning_rate"):
                if getattr(self, name) != getattr(RefitConfig, name):
                    flag = name.replace("_", "-")
                    raise InputError(
                        f"--{flag} has no effect on --guide refined, which is not trained; drop "
                        f"it, or give another --guide"
                    )
        if not 0 <= self.simulated <= 1:
            raise InputError(f"--simulated expects 0 to 1; got {self.simulated}")


def families_of(hint: Any) -> dict[str, type[Family]]:
    """The families in a union of them, by name; none if it is another type."""
    options = get_args(hint)
    if not all(isinstance(option, type) and issubclass(option, Family) for option in options):
        return {}
    return {option.family: option for option in options}


def family_of(value: Any, hint: Any, where: str) -> Family:
    """A family: as it is, by its name, or by a dictionary of its name and options.

    Raises:
        InputError: there is no such family, or it has no such option.
    """
    if isinstance(value, Family):
        return value
    options = dict(value) if isinstance(value, dict) else {"family": value}
    known = families_of(hint)
    name = options.get("family")
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{where} expects one of {', '.join(known)}; got {shown(name)}")
    cls: Any = known[name]
    own = [option for option in hints_of(cls) if option != "family"]
    for option in options:
        if option not in hints_of(cls):
            has = f"it has {' and '.join(own)}" if own else "it has no options"
            raise InputError(f"{where} {name} has no option {shown(option)}; {has}")
    try:
        return cls(**options)
    except InputError as error:
        raise InputError(f"{where} {name}: {error}") from None


def check_pair(guide: Guide, prior: Prior, latent_dim: int) -> None:
    """Check that guide and prior work together, with this number of latents.

    Raises:
        InputError: they do not.
    """
    for flag, family in (("guide", guide), ("prior", prior)):
        if family.family == "flow" and not 2 <= latent_dim <= MAX_FLOW_LATENTS:
            raise InputError(
                f"--{flag} flow expects --latent-dim of 2 to {MAX_FLOW_LATENTS}; got {latent_dim}"
            )
    if prior.family == "vamp" and guide.family not in ("diagonal", "full"):
        raise InputError(
            f"--prior vamp expects --guide diagonal or full, whose posteriors are its components; "
            f"got {guide.family}. Use --prior mixture"
        )


def check_objective_families(objective: str, guide: str | None, prior: str | None) -> None:
    """Check that an objective works with these families; None for a module of the user's own.

    Raises:
        InputError: it does not.
    """
    guides, priors, reason = OBJECTIVE_FAMILIES.get(objective, ((), (), ""))
    for flag, family, allowed in (("guide", guide, guides), ("prior", prior, priors)):
        if family is not None and allowed and family not in allowed:
            raise InputError(
                f"--objective {objective} expects --{flag} {' or '.join(allowed)}, since "
                f"{reason}; got {family}. Use --objective trace"
            )


def family_flag(hint: Any, flag: str) -> Any:
    """Flag of a family: its name, and options as NAME=VALUE."""

    def text(value: Any) -> list[str]:
        options = dataclasses.asdict(value)
        return [options.pop("family"), *(f"{name}={v}" for name, v in options.items())]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{{{','.join(families_of(hint))}}} [OPTION=VALUE ...]",
        instance_from_str=lambda texts: family_of(_options(texts, flag), hint, flag),
        is_instance=lambda value: True,
        str_from_instance=text,
    )


def _options(texts: list[str], flag: str) -> dict[str, Any]:
    """The words after a flag as a dictionary."""
    options: dict[str, Any] = {"family": texts[0] if texts else None}
    for text in texts[1:]:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{flag} {texts[0]} expects OPTION=VALUE; got {shown(text)}")
        if name in options:
            raise InputError(f"{flag} {texts[0]} expects each option once; got {shown(name)} again")
        try:
            options[name] = int(value)
        except ValueError:
            options[name] = value
    return options
