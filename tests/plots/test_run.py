"""Pictures show what they say: the right value at the right place, the right label on a point."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import pyro_vae
from pyro_vae.data.splits import DataSpec
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.vae import VAE
from pyro_vae.plots import codes, tiles
from pyro_vae.plots import from_model as gallery
from pyro_vae.plots import run as figures

HISTORY = [
    {
        "epoch": i,
        "train_elbo": -100.0 / i,
        "validation_elbo": -110.0 / i,
        "reconstruction": -90.0 / i,
        "validation_reconstruction": -99.0 / i,
        "kl": 10.0 / i,
        "validation_kl": 11.0 / i,
    }
    for i in range(1, 6)
]


def picture(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_grid_keeps_rows_and_columns():
    values = np.arange(6).reshape(2, 3, 1, 1, 1) / 10 * np.ones((1, 4, 4))
    sheet = picture(tiles.image_grid(values))
    assert sheet.shape == (9, 14)
    assert [sheet[0, 0], sheet[0, 5], sheet[0, 10], sheet[5, 0]] == [0.0, 0.1, 0.2, 0.3]


def test_what_does_not_fill_a_row_is_kept():
    values = np.full((7, 1, 4, 4), 0.5)
    rows = tiles.in_rows(values, 3)
    assert rows.shape == (3, 3, 1, 4, 4)
    assert np.isfinite(rows).all(axis=(2, 3, 4)).sum() == 7
    assert (picture(tiles.image_grid(rows)) == 0.5).sum() == 7 * 16
    assert tiles.in_rows(values).shape[:2] == (3, 3)


def test_reconstructions_stand_below_their_originals():
    originals = np.arange(14).reshape(14, 1, 1, 1) / 20 * np.ones((4, 4))
    figure = tiles.reconstructions(originals, originals + 0.3)
    sheet = picture(figure)
    assert sheet[0, 5] == pytest.approx(1 / 20)
    assert sheet[5, 5] == pytest.approx(1 / 20 + 0.3)
    assert sheet[10, 5] == pytest.approx(13 / 20)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["original", "decoded"] * 2


def test_manifold_has_its_first_latent_to_the_right_and_its_second_upwards():
    """Through the gallery: pixel 0 of the decoder is σ(z₁), pixel 1 is σ(z₂)."""
    spec = DataSpec((1, 1, 2), 1, discrete=True)
    likelihood = LIKELIHOODS["bernoulli"](spec, torch.full(spec.shape, 0.5), torch.tensor(1.0))
    vae = VAE(StandardNormal(2), nn.Linear(2, 4), nn.Unflatten(-1, (1, 1, 1, 2)), likelihood)
    vae.register_parameter("device", nn.Parameter(torch.zeros(1)))
    figure = gallery._manifold(vae, pyro_vae.load_data("digits"))
    sheet = picture(figure)
    first, second = sheet[0::2, 0::3], sheet[0::2, 1::3]
    assert first.shape == (16, 16)
    assert (np.diff(first, axis=1) > 0).all()
    assert np.ptp(first, axis=0).max() < 1e-6
    assert (np.diff(second, axis=0) < 0).all()  # rows count downwards
    median = 1 / (1 + np.exp(-torch.special.ndtri(torch.tensor(8.5 / 16)).item()))
    assert first[0, 8] == pytest.approx(median, rel=1e-5)


def test_points_have_their_own_labels():
    points = np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]])
    plane = figures.Plane(points, "a", "b")
    figure = figures.latent_scatter([plane], np.array([1, 0, 1, 0]), ["x", "y"])
    drawn = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    assert drawn == {"x": [[1, 1], [3, 3]], "y": [[0, 0], [2, 2]]}


def test_latent_means_and_labels_belong_together(run):
    """Against the posterior of each image, one by one, over all splits."""
    vae, splits = pyro_vae.load(run), pyro_vae.load_data("digits")
    found = codes.latent_codes(vae, splits, 0)
    points, labels = found.planes[0].points, found.labels
    np.testing.assert_array_equal(points, found.means)
    assert len(found.x) == len(points) == len(labels) == 1797
    for part, offset in [(splits.test, 0), (splits.validation, 179), (splits.train, 179 + 161)]:
        x = part.take(torch.tensor([5]), "count")
        np.testing.assert_allclose(
            points[offset + 5], vae.posterior(x).mean[0].detach(), rtol=1e-4, atol=1e-4
        )
        assert labels[offset + 5] == part.labels[5]


def test_curves_show_the_numbers_of_the_history():
    figure = figures.elbo_curves(HISTORY)
    for axes, name in zip(figure.axes, ["train_elbo", "reconstruction", "kl"], strict=True):
        train = axes.lines[0]
        assert list(train.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(train.get_ydata()) == [line[name] for line in HISTORY]
    without = [{**line, "train_elbo": None, "kl": None} for line in HISTORY]
    assert len(figures.elbo_curves(without).axes) == 1


@pytest.mark.parametrize("classes", [1, 15, 300])
def test_any_number_of_classes(classes, tmp_path):
    random = np.random.default_rng(0)
    plane = figures.Plane(random.standard_normal((400, 2)), "a", "b")
    names = [figures.plain(f"_${i}^$") for i in range(classes)]
    figure = figures.latent_scatter([plane, plane], np.arange(400) % classes, names, "title")
    figures.save(figure, tmp_path / "a.png")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.02
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
