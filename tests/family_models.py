"""Small models of every pair of guide and prior, shared by the tests of the families."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from conftest import example_spec, example_values
from torch import Tensor, nn

import pyro_vae
from pyro_vae import ModelConfig
from pyro_vae.models.build import build
from pyro_vae.models.likelihoods import LIKELIHOODS

GUIDES: dict[str, dict[str, Any]] = {
    "diagonal": {},
    "full": {},
    "flow": {"transforms": 2, "hidden": 4},
    "mixture": {"components": 3},
}
PRIORS: dict[str, dict[str, Any]] = {
    "normal": {},
    "mixture": {"components": 3, "covariance": "full"},
    "vamp": {"components": 3},
    "flow": {"transforms": 2, "hidden": 4},
}
PAIRS = [
    (guide, prior)
    for guide, prior in itertools.product(GUIDES, PRIORS)
    if prior != "vamp" or guide in ("diagonal", "full")
]
SHAPE = (1, 2, 3)


def config(guide: str, prior: str, **settings: Any) -> ModelConfig:
    settings = {"latent_dim": 2, "hidden": (4,), **settings}
    families = [{"family": g, **table[g]} for g, table in ((guide, GUIDES), (prior, PRIORS))]
    return ModelConfig(guide=families[0], prior=families[1], **settings)


@cache
def rows(name: str) -> pyro_vae.Splits:
    spec = example_spec(name, SHAPE)
    largest = {} if spec.max_value is None or not spec.discrete else {"max_value": spec.max_value}
    return pyro_vae.load_data(example_values(name, 40, SHAPE), **largest)


def randomized(vae: nn.Module, seed: int = 0) -> Any:
    """The model with weights that are not those of a start, where flows are the identity."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vae.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(0.3 * noise.to(parameter))
    return vae


@cache
def model(guide: str, prior: str, name: str = "gaussian") -> tuple[Any, Tensor]:
    """A model in float64 and five rows. No test may change it."""
    vae = build(config(guide, prior, likelihood=name), rows(name))
    x = next(rows(name).train.fixed(LIKELIHOODS[name].units, seed=0, num_images=5))
    return randomized(vae).double(), x.double()
