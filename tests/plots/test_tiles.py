"""Grids of images and profiles: each value at its place, for any shape, in a bounded figure.

Fonts, LaTeX, disks and styles of users neither change a picture nor end a training.
"""

from __future__ import annotations

import errno
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import pyro_vae
from pyro_vae import train
from pyro_vae.plots import calibration, posterior, run, tiles
from pyro_vae.plots import from_model as gallery
from pyro_vae.plots.codes import latent_codes

RANDOM = np.random.default_rng(0)


def sheet(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def profiles(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """The drawn curves as (rows, columns, curves, points), from 0 (lowest) to 1 (highest)."""
    (axes,) = figure.axes
    drawn = []
    for line in axes.lines:
        x, y = (
            np.asarray(values, dtype=float).reshape(rows, columns, -1) for values in line.get_data()
        )
        assert np.isnan(y[..., -1]).all()  # the pen is lifted
        x, y = x[..., :-1], y[..., :-1]
        offset = x - np.arange(columns)[:, None]
        assert (np.diff(offset, axis=-1) > 0).all()
        np.testing.assert_allclose(offset, np.broadcast_to(offset[0, 0], x.shape))
        assert 0 < offset.min() <= offset.max() < 1
        drawn.append((np.arange(rows)[:, None, None] + 0.95 - y) / 0.9)
    assert axes.get_ylim() == (rows, 0)
    assert axes.get_xlim() == (0, columns)
    return np.stack(drawn, axis=2)


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - np.nanmin(values)) / (np.nanmax(values) - np.nanmin(values))


# --- profiles -------------------------------------------------------------------------------------


def test_tables_are_profiles_in_order():
    values = RANDOM.standard_normal((2, 3, 7))
    figure = tiles.image_grid(values, "the title")
    np.testing.assert_allclose(profiles(figure, 2, 3)[:, :, 0], scaled(values), atol=1e-12)
    assert figure.get_suptitle() == "the title"
    low, high = values.min(), values.max()
    assert figure.axes[0].get_xlabel() == f"each panel from {low:.3g} to {high:.3g}"


@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_sequences_are_a_curve_for_each_channel(channels):
    values = RANDOM.normal(size=(2, 3, channels, 5))
    drawn = profiles(tiles.image_grid(values), 2, 3)
    np.testing.assert_allclose(drawn, scaled(values))


def test_reconstructed_rows_stand_below_their_originals():
    values = RANDOM.standard_normal((8, 7))
    figure = tiles.reconstructions(values, values + 10)
    drawn = profiles(figure, 4, 6)[:, :, 0]
    both = scaled(np.concatenate([values, values + 10]))
    np.testing.assert_allclose(drawn[0], both[:6], atol=1e-6)
    np.testing.assert_allclose(drawn[1], both[8:14], atol=1e-6)
    np.testing.assert_allclose(drawn[2, :2], both[6:8], atol=1e-6)
    np.testing.assert_allclose(drawn[3, :2], both[14:], atol=1e-6)
    assert np.isnan(drawn[2:, 2:]).all()
    axis = figure.axes[0].yaxis
    assert list(axis.get_ticklocs()) == [0.5, 1.5, 2.5, 3.5]
    labels = [label.get_text() for label in axis.get_ticklabels()]
    assert labels == ["original", "decoded"] * 2


def test_one_column_is_a_curve_along_each_line():
    values = RANDOM.standard_normal((9, 1))
    drawn = profiles(tiles.reconstructions(values, values + 10), 2, 1)
    both = scaled(np.stack([values[:, 0], values[:, 0] + 10]))
    np.testing.assert_allclose(drawn[:, 0, 0], both, atol=1e-6)
    drawn = profiles(tiles.image_grid(tiles.in_rows(values)), 1, 1)
    np.testing.assert_allclose(drawn[0, 0, 0], scaled(values[:, 0]), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 500, 1), (1, 1, 500), (1, 3, 200), (3, 2, 100), (3, 100, 2)])
def test_thin_images_are_a_curve_for_each_line_of_pixels(shape):
    values = RANDOM.random((2, 3, *shape))
    figure = tiles.image_grid(values)
    upright = values if shape[1] <= shape[2] else values.swapaxes(-1, -2)
    expected = scaled(upright.reshape(2, 3, -1, max(shape)))
    np.testing.assert_allclose(profiles(figure, 2, 3), expected, atol=1e-12)
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours == [
        c for c in (tiles.CHANNELS if shape[0] == 3 else [run.TRAIN]) for _ in range(min(shape[1:]))
    ]


def test_equal_values_are_drawn():
    drawn = profiles(tiles.image_grid(np.ones((2, 2, 5))), 2, 2)
    assert (drawn == 0).all()


# --- sizes ----------------------------------------------------------------------------------------


def test_reduced_images_are_means_of_blocks():
    values = RANDOM.random((2, 3, 40, 60)).astype(np.float32)
    small = tiles.reduced(values, 20 * 30)
    assert small.shape == (2, 3, 20, 30)
    np.testing.assert_allclose(small, values.reshape(2, 3, 20, 2, 30, 2).mean((3, 5)), rtol=1e-5)
    uneven = tiles.reduced(np.arange(7.0).reshape(1, 7) * np.ones((7, 1)), 25)
    assert uneven.shape == (5, 5)
    np.testing.assert_allclose(uneven[0], [0, 1, 2.5, 4, 5.5])
    assert tiles.reduced(values, 40 * 60) is values
    assert tiles.reduced(np.ones((3, 100_000)), 40_000).shape[0] == 3
    assert tiles.reduced(np.ones((4, 100_000)), 40_000).shape[0] == 4


SHAPES = [
    (1, 500, 1),
    (1, 1, 500),
    (1, 3, 2000),
    (1, 5, 2000),
    (3, 2000, 30),
    (1, 1, 1),
    (3, 700, 800),
    (1,),
    (2,),
    (5000,),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 9])
def test_every_figure_has_a_bounded_size(shape, count):
    values = RANDOM.random((count, *shape), dtype=np.float32)
    side = math.isqrt(count)
    plane = values[: side**2].reshape(side, side, *shape)
    quantiles = (np.arange(side) + 0.5) / side
    for figure in (
        tiles.image_grid(tiles.in_rows(values)),
        tiles.reconstructions(values, values),
        tiles.manifold(plane, quantiles),
    ):
        width, height = figure.get_size_inches()
        assert 2 < width < 16
        assert 0.6 < height < 16
        for image in figure.axes[0].images:
            assert image.get_array().nbytes < 128 * 2**20


def test_very_many_images_and_long_ones_have_a_bounded_size():
    for values in (
        np.zeros((50, 50, 1, 8, 8)),
        np.zeros((10, 10, 1, 80, 10)),
        np.zeros((50, 50, 3)),
    ):
        assert max(tiles.image_grid(values).get_size_inches()) < 16


def test_long_images_are_shortened_and_say_so():
    figure = tiles.image_grid(RANDOM.random((1, 1, 1, 10, 2000)))
    assert figure.axes[0].get_xlabel() == "2000 by 10 pixels, not to scale"
    width, height = sheet(figure).shape[::-1]
    assert figure.axes[0].get_aspect() * height / width == pytest.approx(1 / 8)
    figure = tiles.image_grid(RANDOM.random((1, 1, 1, 10, 30)))
    assert figure.axes[0].get_xlabel() == ""
    assert figure.axes[0].get_aspect() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 1, 700, 500), (1, 1, 20, 1600)])
def test_manifolds_of_large_images_have_their_second_latent_upwards(shape):
    """Brightness grows with both latents, the second more."""
    steps = np.arange(4)
    values = (0.05 * steps + 0.2 * steps[:, None])[:, :, None, None, None] * np.ones(shape[1:])
    figure = tiles.manifold(values, (steps + 0.5) / 4)
    (axes,) = figure.axes
    picture = sheet(figure)
    left, right, bottom, top = axes.images[0].get_extent()
    for axis, start, stop in ((axes.xaxis, left, right), (axes.yaxis, bottom, top)):
        assert [t.get_text() for t in axis.get_ticklabels()] == ["0.12", "0.38", "0.62", "0.88"]
        assert (start, stop) == (0, 4)
    for i in range(4):
        for j in range(4):
            row = int((1 - (i + 0.5) / 4) * picture.shape[0])
            column = int((j + 0.5) / 4 * picture.shape[1])
            assert picture[row, column] == pytest.approx(0.05 * j + 0.2 * i)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "$z_1$, quantile of the prior",
        "$z_2$, quantile of the prior",
    )


def test_manifolds_of_tables_have_their_second_latent_upwards():
    steps = np.arange(4)
    values = (0.05 * steps + 0.2 * steps[:, None])[:, :, None] * np.ones(6)
    figure = tiles.manifold(values, (steps + 0.5) / 4)
    np.testing.assert_allclose(profiles(figure, 4, 4)[:, :, 0], scaled(values[::-1]), atol=1e-12)
    axis = figure.axes[0].yaxis
    ticks = dict(
        zip((t.get_text() for t in axis.get_ticklabels()), axis.get_ticklocs(), strict=True)
    )
    assert ticks == {"0.12": 3.5, "0.38": 2.5, "0.62": 1.5, "0.88": 0.5}


def test_large_images_are_decoded_a_few_at_once(monkeypatch):
    """And the points of the latent plane, whose pixels are kept, are fewer."""
    x = RANDOM.random((12, 1, 256, 300)).astype(np.float32)
    splits = pyro_vae.load_data(x)
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(4,)), splits)
    counts = []
    likelihood = type(vae).likelihood
    monkeypatch.setattr(
        type(vae),
        "likelihood",
        lambda self, z: counts.append(z.shape[:-1].numel()) or likelihood(self, z),
    )
    picture = sheet(gallery._manifold(vae, splits))
    assert (sum(counts), max(counts)) == (256, 6)
    assert picture.size < 2**22
    monkeypatch.setattr("pyro_vae.plots.codes.MAX_VALUES", 5 * 256 * 300)
    assert len(latent_codes(vae, splits, 0).x) == 5


# --- styles ---------------------------------------------------------------------------------------

USERS = {
    "image.origin": "lower",
    "image.cmap": "hot",
    "text.usetex": True,
    "font.family": "no such font",
    "font.size": 40,
    "mathtext.fontset": "stix",
    "axes.prop_cycle": "cycler('color', ['white'])",
    "axes.formatter.use_locale": True,
    "axes.unicode_minus": False,
    "axes.xmargin": 0.4,
    "figure.facecolor": "red",
    "figure.dpi": 20,
    "figure.constrained_layout.h_pad": 3,
    "lines.linewidth": 20,
    "path.sketch": (5, 100, 2),
    "savefig.bbox": "tight",
    "savefig.format": "pdf",
    "savefig.dpi": 3,
    "savefig.transparent": True,
    "svg.fonttype": "path",
    "xtick.labelsize": 30,
    "ytick.direction": "in",
    "axes.spines.left": False,
    "legend.loc": "center",
    "timezone": "Asia/Tokyo",
    "backend": "svg",
}


def drawings() -> dict[str, Figure]:
    """Of each kind: images, curves, points, bars, error bars."""
    random = np.random.default_rng(1)
    names = ("train_elbo", "validation_elbo", "reconstruction", "validation_reconstruction")
    line = dict.fromkeys(names, -100.5)
    history = [{"epoch": i, "kl": 2.0 * i, "validation_kl": -3.0 * i, **line} for i in (1, 2)]
    points = random.standard_normal((30, 2))
    plane = run.Plane(points, "$z_1$", "b")
    gaps = np.abs(random.standard_normal((3, 10)))
    return {
        "images": tiles.image_grid(random.random((2, 3, 1, 8, 8)), "a title"),
        "curves": run.elbo_curves(history, "a title"),
        "points": run.latent_scatter([plane], np.arange(30) % 3, ["a", "b", "c"]),
        "bars": calibration.rank_histograms(random.integers(0, 20, (50, 1)), 19, ["a"]),
        "gaps": posterior.inference_gaps(*gaps),
    }


def pixels_of(figure: Figure, path: Path) -> np.ndarray:
    run.save(figure, path)
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def plain_pictures(tmp_path_factory) -> dict[str, tuple[np.ndarray, str]]:
    """Pixels and SVG of each drawing under matplotlib's defaults."""
    path = tmp_path_factory.mktemp("plain") / "a.png"
    return {name: (pixels_of(f, path), run.svg(f)) for name, f in drawings().items()}


@pytest.mark.parametrize("when", ["made", "drawn"])
def test_the_users_style_has_no_effect(when, plain_pictures, tmp_path):
    made = drawings() if when == "drawn" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the user's fonts
        with matplotlib.rc_context(USERS):
            before = dict(matplotlib.rcParams)
            made = made or drawings()
            if when != "made":
                shown = {n: (pixels_of(f, tmp_path / "a.png"), run.svg(f)) for n, f in made.items()}
            assert dict(matplotlib.rcParams) == before
        if when == "made":
            shown = {n: (pixels_of(f, tmp_path / "a.png"), run.svg(f)) for n, f in made.items()}
    for name, (pixels, text) in plain_pictures.items():
        np.testing.assert_array_equal(shown[name][0], pixels, err_msg=name)
        assert shown[name][1] == text


def test_a_notebook_shows_figures_in_their_own_style():
    """Drawn by a notebook's canvas, which knows nothing of this package."""
    made = drawings()
    for name in ("images", "points"):
        canvas = FigureCanvasAgg(made[name])
        shown = []
        for style in (USERS, {}):
            with matplotlib.rc_context(style), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                canvas.draw()
            shown.append(np.array(canvas.buffer_rgba()))
        np.testing.assert_array_equal(*shown)


def test_digits_stand_upright_whatever_the_users_origin(digits, tmp_path):
    """The first pixel of the first row of the file is that of the image."""
    image = digits.test.values[digits.test.rows[0], 0].numpy() / 16
    with matplotlib.rc_context({"image.origin": "lower"}):
        figure = tiles.image_grid(image[None, None, None])
        drawn = pixels_of(figure, tmp_path / "a.png")[..., 0] / 255
    (axes,) = figure.axes
    box = axes.get_window_extent()
    height = figure.bbox.height
    scale = drawn.shape[0] / height
    top, left = (height - box.y1) * scale, box.x0 * scale
    step = box.height * scale / 8
    rows = (top + step * (np.arange(8) + 0.5)).astype(int)
    columns = (left + step * (np.arange(8) + 0.5)).astype(int)
    np.testing.assert_allclose(drawn[np.ix_(rows, columns)], image, atol=0.01)


# --- what cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), RuntimeError("latex")],
)
def test_a_picture_that_cannot_be_written_is_left_out_with_a_note(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    good = tiles.image_grid(np.zeros((1, 1, 1, 2, 2)))
    bad = tiles.image_grid(np.zeros((1, 1, 1, 2, 2)))
    monkeypatch.setattr(bad, "savefig", fail)
    (tmp_path / "bad.png").write_bytes(b"of an earlier epoch")
    with pytest.warns(UserWarning, match=r"bad\.png is missing: ") as caught:
        run.save_all({"bad": bad, "good": good}, tmp_path)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert [p.name for p in tmp_path.iterdir()] == ["good.png"]


def test_a_fault_of_ours_is_no_note(tmp_path, monkeypatch):
    figure = tiles.image_grid(np.zeros((1, 1, 1, 2, 2)))
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: np.zeros(2) @ np.zeros(3))
    with pytest.raises(ValueError, match="matmul"):
        run.save_all({"a": figure}, tmp_path)


def test_a_full_disk_ends_no_training(tmp_path, monkeypatch, capsys):
    """Pictures alone do not fit: the rest is there, and a note for each says which and why."""
    np.save(tmp_path / "x.npy", RANDOM.random((30, 3)))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.StyledFigure, "savefig", full)
    # The page draws in memory.
    monkeypatch.setattr("pyro_vae.page.summary._pictures", lambda *_: [])
    monkeypatch.setattr("pyro_vae.page.summary.figures.svg", lambda _: "<svg></svg>")
    out = tmp_path / "run"
    flags = ["--epochs", "1", "--hidden", "4", "--latent-dim", "2", "--batch-size", "8"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert train.main(["--data", str(tmp_path / "x.npy"), "--out", str(out), *flags]) == 0
    names = "reconstructions_first_epoch reconstructions_last_epoch elbo interpolations samples "
    assert capsys.readouterr().err.splitlines() == [
        f"note: the picture {out}/figures/{name}.png is missing: [Errno 28] No space left on device"
        for name in (names + "latent manifold").split()
    ]
    assert list((tmp_path / "run" / "figures").iterdir()) == []
    assert (tmp_path / "run" / "report.html").exists()
    assert pyro_vae.load(tmp_path / "run") is not None


# --- missing values -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_missing_pixels_have_a_colour_of_their_own(channels):
    """Gaps and empty tiles stay transparent; other pixels keep their intensity."""
    values = RANDOM.random((3, channels, 5, 4))
    values[0, 0, 1:3, 2] = np.nan
    values[2, :, :, :2] = np.nan
    picture = sheet(tiles.image_grid(tiles.in_rows(values, 2)))  # a tile is empty
    assert picture.shape == (11, 9, 4)
    places = {(0, 0): values[0], (0, 5): values[1], (6, 0): values[2]}
    for (top, left), image in places.items():
        tile = picture[top : top + 5, left : left + 4]
        gone = np.isnan(image).any(0)
        assert (tile[..., 3] == 1).all()
        np.testing.assert_allclose(tile[gone, :3] - tiles.MISSING, 0)
        seen = np.broadcast_to(image, (3, 5, 4)).transpose(1, 2, 0)[~gone]
        np.testing.assert_allclose(tile[~gone, :3], seen)
    assert (picture[5] == 0).all()
    assert (picture[:, 4] == 0).all()
    assert (picture[6:, 5:] == 0).all()


def test_missing_pixels_do_not_count_in_a_reduced_image():
    values = np.ones((1, 8, 8))
    values[0, 0, 0], values[0, 0, 1], values[0, 6:, 6:] = np.nan, 5.0, np.nan
    expected = np.ones((1, 4, 4))
    expected[0, 0, 0], expected[0, 3, 3] = 7 / 3, np.nan
    np.testing.assert_allclose(tiles.reduced(values, 16), expected)
    np.testing.assert_allclose(tiles.reduced(np.nan_to_num(values), 16)[0, 0, 0], 7 / 4)


def test_values_between_missing_ones_are_points():
    """In a long profile too, where a lone value has no line to its neighbours."""
    values = RANDOM.random((1, 1, 50))
    values[..., 1::2] = np.nan
    figure = tiles.image_grid(values)
    (line,) = figure.axes[0].lines
    assert line.get_marker() == "o"
    values[...] = 0.5
    values[..., 0] = 1.0
    (line,) = tiles.image_grid(values).axes[0].lines
    assert line.get_marker() != "o"
