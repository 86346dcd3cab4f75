"""Build a model from a `ModelConfig` and data, with new weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DEFAULT_HIDDEN, InputError, ModelConfig
from ..config.families import FlowGuide, FlowPrior, Guide, MixturePrior, RefinedGuide, VampPrior
from ..data.labels import class_shares, with_classes
from ..data.splits import DataSpec, Splits, Units, moments
from ..runtime.memory import check_memory
from ..runtime.randomness import derive, random_states, usual_settings
from .autoencoder import Autoencoder
from .column_inputs import ColumnInputs, Statistics
from .columns import ColumnsLikelihood
from .labels import ConditionalVAE, Model, SemiSupervisedVAE
from .likelihoods import LIKELIHOODS, Likelihood
from .networks import JOINED, Decoder, Encoder, LabelledDecoder, LabelledEncoder
from .posteriors import Mixture, num_features, posterior_family
from .priors import Vamp, prior_family
from .refined import Refined
from .vae import VAE


def build(config: ModelConfig, splits: Splits, seed: int = 0) -> Model:
    """Make a model for the data, with new weights.

    Args:
        config: architecture, latents, likelihood.
        splits: the data. The moments of the training split standardize the encoder's input and set
            the decoder's output bias.
        seed: seed of the initial weights. Torch's global random state does not change.

    Raises:
        InputError: the data do not suit the likelihood or the architecture, or lack labels.
    """
    if config.condition != "none":
        splits = with_classes(splits)
    name = splits.likelihood if config.likelihood == "auto" else config.likelihood
    _check(name, splits)
    units = _class(name).units
    with usual_settings():
        mean, std = moments(splits.train, units)
        if splits.spec.kinds:
            statistics = Statistics.of(splits.train)
            likelihood: Likelihood = ColumnsLikelihood(splits.spec, mean, std, statistics)
        else:
            likelihood = LIKELIHOODS[name](splits.spec, mean, std)
        with random_states(torch.device("cpu"), derive(seed, "weights")):
            model = _assemble(config, likelihood)
            if isinstance(model, VAE) and isinstance(model.prior_module, Vamp):
                _start_at_rows(model.prior_module, splits, "unit" if units == "binary" else units)
            if isinstance(model, ConditionalVAE):
                shares = class_shares(splits.train, len(splits.spec.classes))
                model.label_logits.copy_(shares.log())
    return model


def _start_at_rows(prior: Vamp, splits: Splits, units: Units) -> None:
    """Set the pseudo-inputs to training rows, chosen at random."""
    order = torch.randperm(len(splits.train), device="cpu")
    rows = splits.train.take(order[torch.arange(len(prior.rows)) % len(order)], units)
    with torch.no_grad():
        # Pseudo-inputs lack no values: the mean stands for those that the rows lack.
        prior.rows.copy_(((rows.cpu() - prior.mean) / prior.std).nan_to_num(0.0))


def build_blank(config: ModelConfig, spec: DataSpec, device: str = "cpu") -> Model:
    """Make the model that `config` and `spec` describe, to load a state dict into.

    On the device "meta" it takes no memory and shows the shapes of the weights.

    Raises:
        InputError: `config` does not name the likelihood, or does not suit `spec`.
    """
    if config.likelihood == "auto":
        raise InputError("a saved model expects its likelihood by name; got auto")
    with (
        usual_settings(validate=False),  # which would read values
        random_states(torch.device("cpu")),
        torch.device(device),
    ):
        mean = torch.full(spec.shape, 0.5)
        std = torch.ones(spec.scale_shape)
        return _assemble(config, _class(config.likelihood)(spec, mean, std))


def _class(name: str) -> type[Likelihood]:
    return ColumnsLikelihood if name == "columns" else LIKELIHOODS[name]


def new_guide(
    vae: VAE | ConditionalVAE, guide: Guide, encoder_hidden: tuple[int, ...] | None, seed: int = 0
) -> Any:
    """A copy of a model with a new guide.

    Args:
        vae: the model, which is not changed.
        guide: the family of the new guide.
        encoder_hidden: sizes of a new encoder's hidden layers; None for a copy of the old encoder
            with a new last layer, which keeps the weights that both families share.
        seed: seed of new weights. Torch's global random state does not change.

    Raises:
        InputError: the model is no `VAE`, or a subclass with distributions of its own; a model with
            labels gets a refined guide only.
    """
    if isinstance(vae, ConditionalVAE):
        return _refined_with_labels(vae, guide, encoder_hidden, seed)
    if not isinstance(vae, VAE):
        raise InputError(f"a new guide expects a VAE; got {type(vae).__name__}")
    own = [n for n in ("prior", "likelihood", "model") if getattr(type(vae), n) != getattr(VAE, n)]
    if own:
        raise InputError(
            f"a new guide expects the model of VAE; {type(vae).__name__} has its own {own[0]}"
        )
    likelihood, latent_dim = copy.deepcopy(vae.likelihood_module), vae.prior().event_shape[0]
    prior = copy.deepcopy(vae.prior_module)
    if isinstance(prior, Vamp):
        prior = prior.as_mixture(vae.encoder, vae.family)
    with random_states(torch.device("cpu"), derive(seed, "new guide")):
        family = _family(guide, latent_dim)
        if encoder_hidden is None and isinstance(vae.encoder, Encoder):
            encoder: Any = copy.deepcopy(vae.encoder)
            encoder.layers[-1] = _new_head(vae, family, num_features(guide, latent_dim))
        elif isinstance(family, Refined):
            encoder = _Moments(copy.deepcopy(vae))
        else:
            encoder = _new_encoder(vae, encoder_hidden, num_features(guide, latent_dim))
    new = VAE(prior, encoder, copy.deepcopy(vae.decoder), likelihood, family)
    return _with_starts(new.to(likelihood.mean.device), seed)


def _refined_with_labels(
    vae: ConditionalVAE, guide: Guide, encoder_hidden: tuple[int, ...] | None, seed: int
) -> ConditionalVAE:
    """A copy of a conditional model with a refined guide, which starts from its posterior."""
    if isinstance(vae, SemiSupervisedVAE):
        raise InputError("a refit expects labels that are given; this model infers them")
    if not isinstance(guide, RefinedGuide) or encoder_hidden is not None:
        raise InputError(
            "a refit of a model with labels expects --guide refined, and no --encoder-hidden"
        )
    new = copy.deepcopy(vae)
    family: Any = _family(guide, vae.prior().event_shape[0])
    encoder: Any = new.encoder
    encoder.layers[-1] = _new_head(vae, family, num_features(guide, family.latent_dim))
    new.family = family
    return _with_starts(new.to(vae.label_logits.device), seed)


def _with_starts(vae: Any, seed: int) -> Any:
    """The model. A refined guide starts its search from draws of the prior, too."""
    if isinstance(vae.family, Refined):
        device = vae.likelihood_module.mean.device
        with random_states(device, derive(seed, "starts")), torch.no_grad():
            vae.family.starts.copy_(vae.prior().sample((len(vae.family.starts),)))
    return vae


def _new_head(vae: Any, family: nn.Module, size: int) -> nn.Linear:
    """A last layer of the encoder, with the weights of the means and scales that both have."""
    encoder: Any = vae.encoder
    old, latent_dim = encoder.layers[-1], vae.prior().event_shape[0]
    head = nn.Linear(old.in_features, size)
    # The logits of a mixture come first; then the means and scales of one component.
    first = vae.family.components if isinstance(vae.family, Mixture) else 0
    kept = 0 if isinstance(family, Mixture) else 2 * latent_dim
    with torch.no_grad():
        head.weight[:kept] = old.weight[first : first + kept]
        head.bias[:kept] = old.bias[first : first + kept]
    return head


class _Moments(nn.Module):
    """Means and log standard deviations of a posterior, as the guess of a refined guide."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        q: Any = self.vae.posterior(x)
        return torch.cat([q.mean, q.variance.sqrt().log()], dim=-1)


def _new_encoder(vae: VAE, hidden: tuple[int, ...] | None, size: int) -> Encoder:
    """An encoder with new weights, of the same kind as that of the model if it is an `Encoder`."""
    old, likelihood = vae.encoder, vae.likelihood_module
    kind = (old.architecture, old.activation) if isinstance(old, Encoder) else ("mlp", "SiLU")
    hidden = DEFAULT_HIDDEN[kind[0]] if hidden is None else hidden
    moments, bounded = (likelihood.mean, likelihood.std), likelihood.units != "real"
    network, spec = (kind[0], likelihood.spec.shape, hidden, kind[1]), likelihood.spec
    return Encoder(*network, size, *moments, bounded, spec.missing, _inputs(likelihood))


def _inputs(likelihood: Likelihood) -> ColumnInputs | None:
    return likelihood.inputs() if isinstance(likelihood, ColumnsLikelihood) else None


def _family(guide: Guide, latent_dim: int) -> nn.Module:
    if isinstance(guide, RefinedGuide):
        return Refined(latent_dim, guide.newton, guide.sweeps)
    return posterior_family(guide, latent_dim)


def _assemble(config: ModelConfig, likelihood: Likelihood) -> Model:
    hidden = DEFAULT_HIDDEN[config.architecture] if config.hidden is None else config.hidden
    shape, is_conv = likelihood.spec.shape, config.architecture == "conv"
    encoder_hidden = hidden if config.encoder_hidden is None else config.encoder_hidden
    inputs, bias = _inputs(likelihood), likelihood.initial_bias()
    data_dim = shape[0] if is_conv else math.prod(shape)
    data_dim = data_dim if inputs is None else inputs.size
    outputs = 0 if inputs is None else len(bias)
    data_dim = max(data_dim * (1 + likelihood.spec.missing), outputs)
    _check_size(config, data_dim, encoder_hidden, hidden)
    latent_dim, guide = config.latent_dim, config.guide
    moments = (likelihood.mean, likelihood.std)

    def read(num_features: int) -> Encoder:
        network = (config.architecture, shape, encoder_hidden, config.activation)
        bounded, missing = likelihood.units != "real", likelihood.spec.missing
        return Encoder(*network, num_features, *moments, bounded, missing, _inputs(likelihood))

    def write(size: int) -> Decoder:
        return Decoder(config.architecture, shape, hidden, config.activation, size, bias)

    if config.condition != "none":
        return _with_labels(config, likelihood, read, write)
    size = latent_dim if config.kind == "ae" else num_features(guide, latent_dim)
    encoder, decoder = read(size), write(latent_dim)
    if config.kind == "ae":
        return Autoencoder(encoder, decoder, likelihood)
    family = _family(guide, latent_dim)
    prior = prior_family(config.prior, latent_dim, *moments)
    return VAE(prior, encoder, decoder, likelihood, family)


def _with_labels(
    config: ModelConfig,
    likelihood: Likelihood,
    read: Callable[[int], Encoder],
    write: Callable[[int], Decoder],
) -> ConditionalVAE:
    """A model of rows with labels. All classes have the same share.

    Args:
        read: number of features → a new network of x.
        write: size of its input → a new network that gives the likelihood's parameters.
    """
    count, latent_dim = len(likelihood.spec.classes), config.latent_dim
    features = num_features(config.guide, latent_dim)
    parts: dict[str, Any] = {
        "prior": prior_family(config.prior, latent_dim, likelihood.mean, likelihood.std),
        "encoder": LabelledEncoder(read(JOINED), config.activation, count, features),
        "decoder": LabelledDecoder(write(latent_dim + count)),
        "likelihood": likelihood,
        "shares": torch.full((count,), 1 / count),
        "family": _family(config.guide, latent_dim),
    }
    if config.condition == "label":
        return ConditionalVAE(**parts)
    return SemiSupervisedVAE(**parts, classifier=read(count))


def _check_size(
    config: ModelConfig, data_dim: int, encoder_hidden: tuple[int, ...], hidden: tuple[int, ...]
) -> None:
    """Check that the weights fit in memory, before any are made."""
    latent_dim, prior = config.latent_dim, config.prior
    features = num_features(config.guide, latent_dim)
    stacks = [[data_dim, *encoder_hidden, features], [data_dim, *hidden, latent_dim]]
    count = sum(below * above for sizes in stacks for below, above in pairwise(sizes))
    for family in (config.guide, prior):
        if isinstance(family, FlowGuide | FlowPrior):
            widths = [
                2 * max(latent_dim, family.hidden),
                family.hidden,
                family.hidden,
                2 * latent_dim,
            ]
            count += family.transforms * sum(a * b for a, b in pairwise(widths))
    if isinstance(prior, MixturePrior | VampPrior):
        count += prior.components * max(data_dim, latent_dim * (latent_dim + 3) // 2)
    check_memory(
        count,
        f"{count:,} weights",
        "lower --hidden or --latent-dim, or the options of --guide or --prior",
    )


def _check(likelihood: str, splits: Splits) -> None:
    """Check that the data lie in the support of the likelihood."""
    spec = splits.spec
    if (likelihood == "columns") != bool(spec.kinds):
        if spec.kinds:
            raise InputError(
                f"--likelihood {likelihood} is that of all columns, and the columns of "
                f"{splits.name} have a kind each: use --likelihood columns, or in Python "
                f"load_data(..., likelihood={likelihood!r})"
            )
        raise InputError(
            f"--likelihood columns expects a table with names of columns, read with their kinds; "
            f"{splits.name} has none: use --likelihood {splits.likelihood}"
        )
    units = _class(likelihood).units
    if units == "count" and not spec.discrete:
        expected = "integers from 0 to --max-value"
    elif units in ("binary", "unit") and spec.max_value is None:
        expected = "values in [0, 1], or integers from 0 to --max-value"
    else:
        return
    if units == "count" and splits.integral and splits.low >= 0:
        remedy = f"give --max-value {splits.high:.0f} or more"
    else:
        remedy = f"use --likelihood {splits.likelihood}, or rescale the data"
    raise InputError(
        f"--likelihood {likelihood} expects {expected}; {splits.name} holds {splits.describe()}: "
        f"{remedy}"
    )
