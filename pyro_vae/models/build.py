"""Build a model from a `ModelConfig` and data, with new weights."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from ..config import DEFAULT_HIDDEN, InputError, ModelConfig
from ..data.splits import DataSpec, Splits, moments
from ..memory import check_memory
from ..randomness import derive, random_states, usual_settings
from .autoencoder import Autoencoder
from .likelihoods import LIKELIHOODS, Likelihood
from .networks import Decoder, Encoder
from .priors import StandardNormal
from .vae import VAE


def build(config: ModelConfig, splits: Splits, seed: int = 0) -> VAE | Autoencoder:
    """Make a model for the data, with new weights.

    Args:
        config: architecture, latents, likelihood.
        splits: the data. The moments of the training split standardize the encoder's input and set
            the decoder's output bias.
        seed: seed of the initial weights. Torch's global random state does not change.

    Raises:
        InputError: the data do not suit the likelihood or the architecture.
    """
    name = splits.likelihood if config.likelihood == "auto" else config.likelihood
    units = LIKELIHOODS[name].units
    _check(name, splits)
    with usual_settings():
        mean, std = moments(splits.train, units)
        likelihood = LIKELIHOODS[name](splits.spec, mean, std)
        with random_states(torch.device("cpu"), derive(seed, "weights")):
            return _assemble(config, likelihood)


def build_blank(config: ModelConfig, spec: DataSpec, device: str = "cpu") -> VAE | Autoencoder:
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
        std = torch.ones(() if spec.is_image else spec.shape)
        return _assemble(config, LIKELIHOODS[config.likelihood](spec, mean, std))


def _assemble(config: ModelConfig, likelihood: Likelihood) -> VAE | Autoencoder:
    hidden = DEFAULT_HIDDEN[config.architecture] if config.hidden is None else config.hidden
    shape, is_conv = likelihood.spec.shape, config.architecture == "conv"
    sizes = [shape[0] if is_conv else math.prod(shape), *hidden, config.latent_dim]
    count = 2 * sum(below * above for below, above in pairwise(sizes))
    check_memory(count, f"{count:,} weights", "lower --hidden or --latent-dim")
    network = (config.architecture, shape, hidden, config.activation)
    num_features = config.latent_dim * (1 if config.kind == "ae" else 2)
    bounded = likelihood.units != "real"
    encoder = Encoder(*network, num_features, likelihood.mean, likelihood.std, bounded)
    decoder = Decoder(*network, config.latent_dim, likelihood.initial_bias())
    if config.kind == "ae":
        return Autoencoder(encoder, decoder, likelihood)
    return VAE(StandardNormal(config.latent_dim), encoder, decoder, likelihood)


def _check(likelihood: str, splits: Splits) -> None:
    """Check that the data lie in the support of the likelihood."""
    units, spec = LIKELIHOODS[likelihood].units, splits.spec
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
