"""Sequences and volumes: each value at its place, each channel on its own scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae import evaluate, generate, train
from pyro_vae.data.splits import DataSpec, moments
from pyro_vae.diagnostics.predictive import predictive_check
from pyro_vae.page.explorer import tiles
from pyro_vae.plots.from_model import to_display

RANDOM = np.random.default_rng(0)


def stored(x: np.ndarray, **options) -> np.ndarray:
    """The stored rows of data, in their order."""
    splits = pyro_vae.load_data(x, **options)
    return splits.train.values.numpy()


def waves(count: int = 60) -> np.ndarray:
    """(N, 24, 2): a temperature and a pressure."""
    phase = RANDOM.uniform(0, 6.28, size=(count, 1))
    time = np.linspace(0, 6.28, 24)
    return np.stack([np.sin(time + phase), 1e5 + 3e3 * np.cos(time + phase)], axis=-1)


def balls(count: int = 40) -> np.ndarray:
    """(N, 9, 10, 8) of 8 bits."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (9, 10, 8)], indexing="ij"))
    centres = RANDOM.uniform(-0.5, 0.5, size=(count, 3, 1, 1, 1))
    distance = np.sqrt(((grid - centres) ** 2).sum(1))
    return (255 / (1 + np.exp(10 * (distance - 0.5)))).astype(np.uint8)


def test_sequences_have_their_channels_first():
    x = RANDOM.normal(size=(20, 9, 4))
    np.testing.assert_array_equal(stored(x, layout="sequences"), x.swapaxes(1, 2).astype("f4"))
    first = x[..., 0]
    np.testing.assert_array_equal(stored(first, layout="sequences")[:, 0], first.astype("f4"))
    assert stored(x).shape == (20, 1, 9, 4)  # grey images


def test_volumes_have_their_channels_first():
    x = RANDOM.normal(size=(20, 4, 5, 6)).astype("f4")
    np.testing.assert_array_equal(stored(x)[:, 0], x)
    colour = RANDOM.normal(size=(20, 4, 5, 6, 3)).astype("f4")
    np.testing.assert_array_equal(stored(colour), np.moveaxis(colour, 4, 1))
    first = np.ascontiguousarray(np.moveaxis(colour, 4, 1))
    np.testing.assert_array_equal(stored(first), first)
    thin = x[:, :3]
    assert stored(thin).shape == (20, 3, 5, 6)  # images of three channels
    np.testing.assert_array_equal(stored(thin, layout="volumes")[:, 0], thin)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((9, 4, 4, 4, 4), {}, "volumes (N, D, H, W)"),
        ((9, 4, 4, 4, 4, 4), {}, "volumes (N, D, H, W)"),
        ((9, 4, 4, 4), {"layout": "sequences"}, "expected sequences (N, T) or (N, T, C)"),
        ((9, 4, 4), {"layout": "volumes"}, "expected volumes (N, D, H, W)"),
        ((9, 16), {"layout": "sequences", "image_size": (4, 4)}, "without --image-size"),
        ((9, 4, 4, 4), {"image_size": (4, 4)}, "expected rows"),
    ],
)
def test_other_shapes_are_errors(shape, options, message):
    with pytest.raises(pyro_vae.InputError) as error:
        pyro_vae.load_data(np.ones(shape), **options)
    assert message in str(error.value)


def test_each_channel_of_a_sequence_has_its_own_scale():
    x = waves(400)
    splits = pyro_vae.load_data(x, layout="sequences")
    mean, std = moments(splits.train, "real")
    rows = x[splits.train.rows.numpy()].swapaxes(1, 2)
    assert mean.shape == (2, 24)
    assert std.shape == (2, 1)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(std[:, 0], rows.std((0, 2)), rtol=1e-4)
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits)
    scale = vae.likelihood(torch.zeros(2)).base_dist.scale
    assert (scale[1] > 1000 * scale[0]).all()  # p(x|z) starts at the data's spread


def test_channels_that_float32_would_lose_have_an_offset():
    x = np.stack([RANDOM.normal(size=(50, 6)), 1e12 + RANDOM.normal(size=(50, 6))], axis=-1)
    spec = (splits := pyro_vae.load_data(x, layout="sequences")).spec
    assert spec.offset[0] == 0
    assert abs(spec.offset[1] - 1e12) < 10
    row = splits.train.take(torch.arange(1), "real")
    back = spec.from_units(row, "real").numpy()
    expected = x[splits.train.rows[0]].T
    np.testing.assert_allclose(back[0], expected, atol=1e-3)
    assert "channel 1: offset 1e+12" in spec.describe_units()


def test_the_density_of_the_values_counts_the_scale_of_each_time():
    spec = DataSpec((2, 5), None, discrete=False, offset=(0.0, 0.0), scale=(1.0, 10.0))
    assert spec.log_scale == pytest.approx(5 * np.log(10))


def test_neighbours_are_compared_along_every_axis_but_channels():
    splits = pyro_vae.load_data(balls())
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits)
    x = torch.zeros(1, 1, 9, 10, 8)
    x[:, :, ::2] = 1.0  # stripes along the first axis
    check = predictive_check(vae, x, num_draws=2)
    assert check.observed[0, check.names.index("roughness")] == pytest.approx(1.0)


def test_displays_are_curves_and_middle_slices():
    volumes, sequences = balls(), waves()
    splits = pyro_vae.load_data(volumes)
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits)
    x = torch.as_tensor(volumes[:, None], dtype=torch.float32)
    np.testing.assert_allclose(to_display(vae, x), volumes[:, None, 4] / 255, rtol=1e-6)
    assert tiles(vae, x).shape == (40, 10, 8)

    splits = pyro_vae.load_data(sequences, layout="sequences")
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits)
    x = next(splits.test.fixed("real", 0))
    shown = to_display(vae, x)
    assert shown.shape == (6, 2, 24)
    assert abs(shown).max() < 5
    span = (shown.min(), shown.max())
    strips = tiles(vae, x, span).astype(float) / 255
    assert strips.shape == (6, 2, 24)
    np.testing.assert_allclose(strips, (shown - span[0]) / (span[1] - span[0]), atol=1 / 255)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "flags", "row", "shape"),
    [
        (waves(), ["--layout", "sequences", "--hidden", "4", "8"], "sequences", (5, 2, 24)),
        (balls(), ["--hidden", "4"], "volumes", (5, 1, 9, 10, 8)),
    ],
    ids=["sequences", "volumes"],
)
def test_convolutions_in_one_and_three_dimensions(x, flags, row, shape, tmp_path, capsys):
    np.save(tmp_path / "x.npy", x)
    out = str(tmp_path / "run")
    data = ["--data", str(tmp_path / "x.npy"), "--architecture", "conv", *flags]
    assert train.main([*data, "--latent-dim", "2", "--epochs", "2", "--out", out]) == 0
    run = pyro_vae.load(out)
    assert len(run.encoder.layers[0].kernel_size) == len(shape) - 2
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"test {row}" in page or f"validation {row}" in page
    assert generate.main([out, "--num", "5", "--draw", "--out", str(tmp_path / "g.npy")]) == 0
    assert np.load(tmp_path / "g.npy").shape == shape
    np.save(tmp_path / "other.npy", x[:30])
    assert evaluate.main([out, "--data", str(tmp_path / "other.npy"), "--num-samples", "30"]) == 0
    assert "30 test rows" in capsys.readouterr().out


def test_too_short_for_convolutions_is_one_line(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((9, 6)) * np.arange(9)[:, None])
    data = ["--data", str(tmp_path / "x.npy"), "--architecture", "conv"]
    assert train.main([*data, "--out", str(tmp_path / "run")]) == 2
    assert "or --layout sequences" in capsys.readouterr().err
    assert train.main([*data, "--layout", "sequences", "--out", str(tmp_path / "run")]) == 2
    assert "expects sequences of at least 8 values; got 6" in capsys.readouterr().err
