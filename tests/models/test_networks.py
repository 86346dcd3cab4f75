"""Bodies for every shape of data."""

from __future__ import annotations

import pytest
import torch

from pyro_vae import InputError
from pyro_vae.models.networks import Decoder, Encoder


def bodies(architecture, shape, hidden, activation="SiLU", parameters=2):
    encoder = Encoder(
        architecture, shape, hidden, activation, 6, torch.zeros(shape), torch.tensor(2.0)
    )
    decoder = Decoder(architecture, shape, hidden, activation, 3, torch.rand(parameters, *shape))
    return encoder, decoder


@pytest.mark.parametrize(
    ("architecture", "shape", "hidden"),
    [("mlp", (7,), ()), ("mlp", (1, 5, 4), (9,)), ("mlp", (3, 8, 8), (9, 8, 7, 6))]
    + [
        ("conv", (channels, *size), hidden)
        for channels in (1, 3)
        for size in [(8, 8), (9, 8), (28, 28), (17, 31), (33, 8)]
        for hidden in [(4,), (4, 5), (4, 5, 6)]
    ]
    + [
        ("conv", (channels, *size), (4, 5))
        for channels in (1, 2)
        for size in [(8,), (9,), (31,), (8, 9, 10), (11, 8, 8)]
    ],
)
def test_shapes(architecture, shape, hidden):
    encoder, decoder = bodies(architecture, shape, hidden)
    for leading in [(2,), (5, 2), ()]:
        assert encoder(torch.rand(*leading, *shape)).shape == (*leading, 6)
        assert decoder(torch.rand(*leading, 3)).shape == (*leading, 2, *shape)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_leading_dimensions_are_only_a_batch(architecture):
    encoder, decoder = bodies(architecture, (1, 9, 8), (4, 5))
    x, z = torch.rand(5, 2, 1, 9, 8), torch.rand(5, 2, 3)
    torch.testing.assert_close(encoder(x)[3, 1], encoder(x[3, 1]))
    torch.testing.assert_close(decoder(z)[3, 1], decoder(z[3, 1]))


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_every_output_depends_on_every_latent(architecture):
    """A transposed convolution that loses a border row would leave it constant."""
    _, decoder = bodies(architecture, (1, 17, 31), (8, 8), "Tanh", parameters=1)
    spread = decoder(torch.randn(50, 3)).std(0)
    assert (spread > 0).all()


def test_input_is_standardized():
    encoder, _ = bodies("mlp", (4,), ())
    x = torch.rand(5, 4)
    encoder.mean.fill_(3.0)
    shifted = encoder(x + 3.0)
    encoder.mean.fill_(0.0)
    torch.testing.assert_close(shifted, encoder(x))


@pytest.mark.parametrize("name", ["ReLU", "tanh", "Softplus", "gelu", "ELU", "LeakyReLU"])
def test_activations_by_name(name):
    encoder, _ = bodies("mlp", (4,), (5,), name)
    assert type(encoder.layers[2]).__name__.lower() == name.lower()


@pytest.mark.parametrize(
    "name", ["Linear", "nope", "Threshold", "MultiheadAttention", "GLU", "Softmax"]
)
def test_unknown_activations(name):
    with pytest.raises(InputError, match=f"--activation expects .*; got '{name}'"):
        bodies("mlp", (4,), (5,), name)


def test_images_too_small_for_conv():
    with pytest.raises(InputError, match="at least 16x16 pixels; got 15x20"):
        bodies("conv", (1, 15, 20), (4, 4, 4, 4))
    with pytest.raises(InputError, match="at least 8x8 pixels; got 7x20"):
        bodies("conv", (1, 7, 20), (4,))
    with pytest.raises(InputError, match="volumes or sequences; the data are rows of 30 values"):
        bodies("conv", (30,), (4,))
