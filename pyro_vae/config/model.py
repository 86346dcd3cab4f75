"""`ModelConfig`: prior, likelihood, posterior and their networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from .families import (
    DiagonalGuide,
    Guide,
    NormalPrior,
    Prior,
    TrainedGuide,
    check_pair,
    family_flag,
    family_of,
)
from .options import InputError, Typed, auto, check_integer

Likelihood = Literal[
    "auto",
    "bernoulli",
    "continuous-bernoulli",
    "binomial",
    "gaussian",
    "discretized-logistic",
    "columns",
]

DEFAULT_HIDDEN = {"mlp": (512, 256), "conv": (32, 64)}


@dataclass(frozen=True)
class ModelConfig(Typed):
    """The generative model p(z) p(x|z) and the posterior q(z|x).

    Attributes:
        kind: vae: variational autoencoder. ae: deterministic autoencoder with the same networks
            and the reconstruction loss only, as a baseline.
        architecture: Encoder and decoder networks: mlp for any data; conv (strided) for images,
            volumes and sequences.
        latent_dim: Number of latent dimensions Z.
        guide: q(z|x). diagonal: a Gaussian with independent latents. full: a Gaussian with full
            covariance. flow (transforms=4 hidden=64): a normalizing flow after such a Gaussian.
            mixture (components=5): of Gaussians with independent latents.
        prior: p(z). normal: N(0, I). mixture (components=100): of Gaussians. vamp
            (components=100): of posteriors of pseudo-inputs, arXiv 1705.07120. flow (transforms=3
            hidden=128): a masked autoregressive flow.
        hidden: Sizes of the encoder's hidden layers; the decoder reverses them. Units for mlp;
            channels for conv, where each layer halves every side.
        encoder_hidden: Sizes of the encoder's hidden layers, if they are not those of the decoder.
        activation: Name of an activation in torch.nn: SiLU, ReLU, Tanh, Softplus, GELU, …
        likelihood: p(x|z). bernoulli: binary data; grey images are binarized at random at each
            access. continuous-bernoulli: values in [0, 1]. binomial: counts. gaussian: real values,
            with a learned scale. discretized-logistic: 8-bit images. columns: one for each
            column of a table, see --columns.
        condition: Whether the model knows labels. label: p(x|z, y) and q(z|x, y), at the label y of
            each row. partial: the same, with y a latent of rows without a label (semi-supervised).
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
    condition: Annotated[
        Literal["none", "label", "partial"], auto(None, "none; partial with --labelled")
    ] = "none"

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
        if self.condition != "none":
            self._check_condition()

    def _check_condition(self) -> None:
        if self.kind == "ae":
            raise InputError(
                f"--condition {self.condition} has no effect on --model ae; drop it, or --labelled"
            )
        if self.prior.family == "vamp":
            raise InputError(
                f"--condition {self.condition} expects --prior normal, mixture or flow, since "
                f"pseudo-inputs have no label; got vamp"
            )
