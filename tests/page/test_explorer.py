"""The latent explorer's sheets hold what the decoder makes of each point, and fit their budget."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from conftest import example_vae
from masked import missing_vae
from PIL import Image
from torch import nn

from pyro_vae.data.splits import DataSpec
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.vae import VAE
from pyro_vae.page.explorer import PLANS, WHOLE, explore, sheet, tiles
from pyro_vae.plots.codes import Codes
from pyro_vae.plots.tiles import MISSING

PLENTY = 1 << 30


def codes_of(x: torch.Tensor, means: np.ndarray, labels: list[int] | None = None) -> Codes:
    return Codes(x, means, None if labels is None else np.array(labels), [], "codes")


def random_codes(splits, units: str, latent_dim: int, labels: list[int] | None = None) -> Codes:
    """Ten rows of the data with codes that have nothing to do with them."""
    x = next(splits.train.fixed(units, 0, 10)).double()
    spread = np.linspace(1, 2, latent_dim)
    means = spread * np.random.default_rng(3).standard_normal((10, latent_dim))
    return codes_of(x, means, labels)


def vivid(vae, factor: float = 3.0):
    """With larger weights the decoder of an untrained model leaves its mean image."""
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.mul_(factor)
    return vae


def opened(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def at(found, codes: Codes, key: tuple[int, int, int]) -> torch.Tensor:
    """(rows, columns, Z): the point that each tile of a sheet is to show."""
    anchor, a, b = key
    z = np.tile(
        codes.means[found.anchors[anchor]],
        (1 if a == b else found.grid.shape[1], found.grid.shape[1], 1),
    )
    for j, i in np.ndindex(z.shape[:2]):
        if a != b:
            z[j, i, found.latents[b]] = found.grid[b, j]
        z[j, i, found.latents[a]] = found.grid[a, i]
    return torch.from_numpy(z)


@pytest.mark.parametrize(
    ("name", "shape", "scale"),
    [
        ("bernoulli", (1, 4, 5), 1),
        ("continuous-bernoulli", (3, 4, 5), 1),
        ("binomial", (1, 6, 2), 16),
        ("discretized-logistic", (3, 2, 4), 255),
    ],
)
@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@torch.no_grad()
def test_every_tile_is_the_decoder_at_its_point(name, shape, scale, latent_dim, tmp_path):
    """Each against the mean of p(x|z) at z put together here, to the rounding of 8 bits."""
    vae, splits = example_vae(name, tmp_path, shape, latent_dim=latent_dim)
    codes = random_codes(splits, LIKELIHOODS[name].units, latent_dim, [0, 1, 2, 3, 4] * 2)
    found = explore(vivid(vae), codes, 30_000)
    channels, height, width = shape
    assert found.tile == (height, width, channels)
    assert not found.reduced
    pairs = list(itertools.combinations(range(len(found.latents)), 2)) or [(0, 0)]
    assert set(found.sheets) == {(m, *pair) for m in range(len(found.anchors)) for pair in pairs}
    seen = set()
    for key, content in found.sheets.items():
        z = at(found, codes, key)
        mean = vae.likelihood(z).mean / scale  # (rows, columns, C, H, W)
        wanted = 255 * mean.permute(0, 3, 1, 4, 2).reshape(
            z.shape[0] * height, z.shape[1] * width, channels
        )
        sheet = opened(content)
        sheet = sheet[..., None] if sheet.ndim == 2 else sheet
        assert sheet.shape == wanted.shape
        assert np.abs(sheet - wanted.numpy()).max() <= 0.5 + 1e-3
        assert np.ptp(sheet, axis=(0, 1)).max() > 25, "too dull to notice a mistake"
        seen.add(content)
    assert len(seen) == len(found.sheets)


@pytest.mark.parametrize("latent_dim", [1, 3])
@torch.no_grad()
def test_rows_of_tables_share_one_scale(latent_dim, tmp_path):
    """Standardized columns; black and white are the least and largest value of all planes."""
    vae, splits = example_vae("gaussian", tmp_path, (5,), latent_dim=latent_dim)
    codes = random_codes(splits, "real", latent_dim)
    found = explore(vivid(vae), codes, PLENTY)
    assert found.tile == (1, 5, 1)
    module = vae.likelihood_module
    shown = {
        key: (vae.likelihood(at(found, codes, key)).mean - module.mean) / module.std
        for key in found.sheets
    }
    low = min(float(values.min()) for values in shown.values())
    high = max(float(values.max()) for values in shown.values())
    assert found.span == pytest.approx((low, high), rel=1e-6)
    for key, values in shown.items():
        wanted = (255 * (values - low) / (high - low)).flatten(1).numpy()
        assert np.abs(opened(found.sheets[key]) - wanted).max() <= 0.5 + 1e-3


def test_the_most_varied_latents_are_offered(tmp_path):
    vae, splits = example_vae("bernoulli", tmp_path, latent_dim=6)
    codes = random_codes(splits, "binary", 6)
    scale = np.array([0.1, 2, 0.01, 3, 1, 1.5])
    codes = codes_of(codes.x, scale * codes.means / codes.means.std(0))
    found = explore(vae, codes, PLENTY)
    assert set(found.latents) == {1, 3, 4, 5}
    assert len(found.sheets) == 4 * 6


def test_the_most_used_latent_comes_first(tmp_path):
    """As `Explorer` documents; the page opens on the plane of the first two."""
    vae, splits = example_vae("bernoulli", tmp_path, latent_dim=3)
    codes = random_codes(splits, "binary", 3)
    found = explore(vae, codes, PLENTY)
    assert found.latents == np.argsort(-codes.means.std(0)).tolist()


@pytest.mark.parametrize(
    ("labels", "anchors"),
    [
        ([4, 4, 2, 4, 0, 2, 1, 1, 3, 0], [0, 2, 4, 6]),
        ([7, 7, 7, 7, 7, 7, 7, 7, 7, 1], [0, 9]),
        (None, [0, 1, 2, 3]),
    ],
    ids=["many", "two", "unlabelled"],
)
def test_anchors_are_of_several_classes(labels, anchors, tmp_path):
    vae, splits = example_vae("bernoulli", tmp_path)
    found = explore(vae, random_codes(splits, "binary", 3, labels), PLENTY)
    assert found.anchors == anchors
    assert {m for m, _, _ in found.sheets} == set(range(len(anchors)))


@pytest.mark.parametrize("latent_dim", [1, 2, 7])
def test_plans_shrink_with_the_budget(latent_dim, tmp_path):
    """The first plan where there is room, the last where there is none, and what fits between."""
    vae, splits = example_vae("bernoulli", tmp_path, latent_dim=latent_dim)
    codes = random_codes(splits, "binary", latent_dim)
    vivid(vae)
    plans = PLANS if latent_dim > 2 else WHOLE
    sides = []
    for budget in (PLENTY, 30_000, 8_000, 1):
        found = explore(vae, codes, budget)
        side = found.grid.shape[1]
        sides.append(side)
        if side != plans[-1][2]:
            assert sum(map(len, found.sheets.values())) <= budget
    assert sides[0] == plans[0][2]
    assert sides[-1] == plans[-1][2]
    assert sides == sorted(sides, reverse=True)


class OneDullPlane(nn.Module):
    """An image of noise that moves with the third latent, and a black one where it is 0."""

    def forward(self, z):
        pixels = torch.arange(1.0, 145.0, dtype=z.dtype)
        weights = torch.tensor([1.0, 1.3, 1.7], dtype=z.dtype)
        noise = 2 * torch.sin(1e3 * ((z * weights).sum(-1, keepdim=True) + 7) * pixels.sqrt())
        return (noise * (z[..., 2:3] != 0) - 30 * (z[..., 2:3] == 0)).unflatten(-1, (1, 1, 12, 12))


def test_no_plane_escapes_the_budget():
    """Also where the first sheet is the smallest: a page of many of the others is to stay small."""
    spec = DataSpec((1, 12, 12), 1, discrete=True)
    likelihood = LIKELIHOODS["bernoulli"](spec, torch.full(spec.shape, 0.5), torch.tensor(1.0))
    vae = VAE(StandardNormal(3), nn.Linear(144, 6), OneDullPlane(), likelihood)
    means = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    means[0] = 0
    found = explore(vae, codes_of(torch.rand(10, 1, 12, 12), means), 100_000)
    assert sum(map(len, found.sheets.values())) <= 100_000


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_grids(latent_dim, tmp_path):
    """A VAE's run from −3 to 3, or as far as most of the codes go; an autoencoder's over 98%."""
    vae, splits = example_vae("bernoulli", tmp_path, latent_dim=latent_dim)
    codes = random_codes(splits, "binary", latent_dim)
    for factor in (0.1, 10):
        means = factor * codes.means
        reach = max(3, np.abs(np.percentile(means, [1, 99], axis=0)).max())
        grid = explore(vae, codes_of(codes.x, means), PLENTY).grid
        assert len(grid) == latent_dim
        np.testing.assert_allclose(grid[:, 0], -reach, rtol=1e-6)
        np.testing.assert_allclose(grid[:, -1], reach, rtol=1e-6)
    assert reach > 3
    plain = Autoencoder(vae.encoder, vae.decoder, vae.likelihood_module)
    found = explore(plain, codes, PLENTY)
    for latent, line in zip(found.latents, found.grid, strict=True):
        ordered = np.sort(codes.means[:, latent])  # of 10 codes the 1st percentile is 0.09 steps in
        ends = ordered[0] + 0.09 * np.ptp(ordered[:2]), ordered[-1] - 0.09 * np.ptp(ordered[-2:])
        assert (line[0], line[-1]) == pytest.approx(ends, rel=1e-5)
        np.testing.assert_allclose(np.diff(line), (line[-1] - line[0]) / (len(line) - 1), rtol=1e-4)


def test_collapsed_latents_have_a_plane_all_the_same(tmp_path):
    """Where all codes are equal, and an autoencoder's grid is one point."""
    vae, splits = example_vae("bernoulli", tmp_path)
    codes = random_codes(splits, "binary", 3)
    codes = codes_of(codes.x, np.zeros_like(codes.means))
    for model in (vae, Autoencoder(vae.encoder, vae.decoder, vae.likelihood_module)):
        found = explore(model, codes, 10_000)
        assert np.isfinite(found.grid).all()
        assert np.isfinite(found.span).all()


def test_large_images_are_reduced_by_averages(tmp_path):
    """To 64 pixels the longer side; of whole blocks the mean, to the rounding of 8 bits."""
    vae, _ = example_vae("continuous-bernoulli", tmp_path, (3, 128, 16), hidden=(2,))
    x = torch.rand(2, 3, 128, 16, generator=torch.Generator().manual_seed(0))
    small = tiles(vae, x)
    assert small.shape == (2, 64, 8, 3)
    wanted = 255 * x.unflatten(2, (64, 2)).unflatten(4, (8, 2)).mean((3, 5)).permute(0, 2, 3, 1)
    assert np.abs(small - wanted.numpy()).max() <= 0.5 + 1e-3
    assert tiles(vae, x, largest=128).shape == (2, 128, 16, 3)
    found = explore(vae.float(), codes_of(x, np.zeros((2, 3), np.float32)), 1)
    assert (found.tile, found.reduced) == ((64, 8, 3), True)


def test_a_flat_table_is_drawn_without_a_division_by_zero(tmp_path):
    vae, _ = example_vae("gaussian", tmp_path, (4,))
    x = vae.likelihood_module.mean.expand(3, 4)
    np.testing.assert_array_equal(tiles(vae, x, (0.0, 0.0)), np.zeros((3, 1, 4)))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)])
def test_png_is_lossless(shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(opened(sheet(values[None], 1)), values)


def test_missing_pixels_of_thumbnails_are_red():
    """Also of reduced ones, in which they do not count; and cells of tables."""
    vae, splits = missing_vae("gaussian", (1, 4, 6))
    x = torch.cat(list(splits.test.fixed("real", 0)))
    red = np.rint(255 * np.array(MISSING)).astype(np.uint8)
    found = tiles(vae, x)
    assert found.shape == (len(x), 4, 6, 3)
    gone = x.isnan()[:, 0].numpy()
    assert (found[gone] == red).all()
    plain = tiles(vae, x.nan_to_num(0.0))
    assert plain.ndim == 3
    assert (found[~gone] == plain[~gone][:, None]).all()
    x[:, :, :2, :2] = torch.nan
    small = tiles(vae, x, largest=3)
    assert small.shape == (len(x), 2, 3, 3)
    assert (small[:, 0, 0] == red).all()
    means = np.random.default_rng(0).normal(size=(len(x), 3)).astype(np.float32)
    assert explore(vae, codes_of(x, means), PLENTY).tile == (4, 6, 1)
    table, splits = missing_vae("gaussian", (5,))
    rows = torch.cat(list(splits.test.fixed("real", 0)))
    cells = tiles(table, rows, (-2.0, 2.0))
    assert (cells[:, 0][rows.isnan().numpy()] == red).all()
