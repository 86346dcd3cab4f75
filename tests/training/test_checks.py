"""A model that a training would not change as its user expects is told before the first step."""

from __future__ import annotations

import copy
import warnings

import pyro
import pytest
import torch
from conftest import example_splits
from torch import nn

import pyro_vae
from pyro_vae import FitConfig, InputError
from pyro_vae.evidence.evaluation import elbo_terms, evaluate
from pyro_vae.training import modes
from pyro_vae.training.loop import fit

CONFIG = FitConfig(epochs=2, batch_size=40, learning_rate=1e-2)


@pytest.fixture
def splits(tmp_path):
    return example_splits("binomial", tmp_path, count=100)


def small(splits, **settings):
    return pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,), **settings), splits)


def changed(vae, before) -> set[str]:
    return {n for n, p in vae.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize(
    "mode", ["eager", "graph", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_frozen_parameters_are_named_and_stay(mode, splits, monkeypatch):
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0 if mode == "graph" else 10**9)
    vae = small(splits)
    frozen = ["encoder.layers.1.weight", "decoder.bias"]
    for name in frozen:
        vae.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(vae.state_dict())
    config = FitConfig(epochs=2, batch_size=81, compile="on" if mode == "compiled" else "auto")
    with pytest.warns(UserWarning, match=f"not trained, .*: {', '.join(frozen)}$") as caught:
        fit(vae, splits, config)
    assert len(caught) == 1
    names = {name for name, _ in vae.named_parameters()}
    assert changed(vae, before) == names - {*frozen}
    assert [n for n, p in vae.named_parameters() if not p.requires_grad] == frozen


def test_a_model_that_is_wholly_frozen_is_refused(splits):
    vae = small(splits).requires_grad_(False)
    with pytest.raises(InputError, match=r"no parameter .* requires_grad is False"):
        fit(vae, splits, CONFIG)


def test_a_parameter_without_effect_is_named(splits):
    vae = small(splits)
    vae.unused = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="the objective does not depend on it: unused$"):
        fit(vae, splits, CONFIG)


class Shift(nn.Module):
    """A decoder plus a shift that is no parameter of it."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.hidden = [nn.Parameter(torch.zeros(1, 1, 4, 5))]

    def forward(self, z):
        return self.decoder(z) + self.hidden[0]


def test_a_parameter_that_is_not_the_models_is_refused(splits):
    vae = small(splits)
    vae.decoder = Shift(vae.decoder)
    with pytest.raises(InputError, match=r"also use a tensor of shape \(1, 1, 4, 5\): make it"):
        fit(vae, splits, CONFIG)


class Learned(pyro_vae.VAE):
    """A model with a parameter of Pyro's store."""

    def model(self, x):
        scale = pyro.param("scale", torch.ones(2))
        with pyro.poutine.scale(scale=scale.mean()):
            super().model(x)


def test_a_parameter_of_pyros_store_is_refused(splits):
    vae = small(splits)
    vae.__class__ = Learned
    with pytest.raises(InputError, match=r"also use pyro\.param 'scale': make it a parameter"):
        fit(vae, splits, CONFIG)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("capture", [False, True])
def test_a_parameter_of_two_names_is_trained_once(capture, splits, monkeypatch):
    """Tied weights take the same steps as in plain torch."""
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0 if capture else 10**9)
    vae = small(splits, kind="ae")
    vae.decoder.layers[0].bias = vae.encoder.layers[1].bias
    plain = copy.deepcopy(vae)
    assert plain.decoder.layers[0].bias is plain.encoder.layers[1].bias
    settings = {"learning_rate": 1e-2, "schedule": "constant", "learning_rate_warmup": 0.0}
    fit(vae, splits, FitConfig(epochs=5, batch_size=81, gradient_clip=1e9, **settings))
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    x = torch.cat([*splits.train.fixed("count", 0)])
    for _ in range(5):
        adam.zero_grad()
        (-plain.likelihood(plain.encoder(x)).log_prob(x).sum()).backward()
        adam.step()
    assert vae.decoder.layers[0].bias is vae.encoder.layers[1].bias
    for a, b in zip(vae.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_in_evaluation_mode_is_trained_all_the_same(splits):
    outcomes = []
    for mode in (True, False):
        vae = small(splits).train(mode)
        fit(vae, splits, CONFIG)
        outcomes.append([p.tolist() for p in vae.parameters()])
        assert not vae.training
    assert outcomes[0] == outcomes[1]


def strided(vae):
    vae.decoder.bias = nn.Parameter(vae.decoder.bias.mT.contiguous().mT)
    return vae


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: vae.double(), r"float32 model; .* is float64: call vae\.float"),
        (lambda vae: vae.half(), "float32 model; .* is float16"),
        (lambda vae: vae.to(torch.bfloat16), "float32 model; .* is bfloat16"),
        (lambda vae: vae.encoder.double() and vae, r"encoder\.\S* is float64"),
        (lambda vae: vae.likelihood_module.double() and vae, r"likelihood_module\.\S* is float64"),
        (lambda vae: vae.to("meta"), "different devices: .* on meta, the batches on cpu"),
        (strided, r"decoder\.bias is not contiguous"),
        (lambda vae: vae.encoder, "expects a VAE or an Autoencoder; got Encoder"),
    ],
    ids=["double", "half", "bfloat16", "part", "buffer", "device", "strides", "type"],
)
def test_models_of_other_kinds_are_refused(change, message, splits):
    vae = change(small(splits))
    with pytest.raises(InputError, match=message):
        fit(vae, splits, CONFIG)


def test_a_compiled_model_is_evaluated_as_the_model(splits):
    vae = small(splits)
    compiled = torch.compile(vae)
    assert elbo_terms(compiled, splits.test) == elbo_terms(vae, splits.test)
    assert evaluate(compiled, splits.test, 50) == evaluate(vae, splits.test, 50)
    x = next(splits.test.fixed("count", 0))
    found = []
    for model in (vae, compiled):
        torch.manual_seed(0)
        found.append(pyro_vae.log_evidence(model, x, 50))
    assert torch.equal(*found)


def test_an_ordinary_model_passes_without_a_word(splits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small(splits), splits, CONFIG)
        fit(small(splits, kind="ae"), splits, CONFIG)
