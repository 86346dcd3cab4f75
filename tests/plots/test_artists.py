"""Every figure, read back from its artists: which numbers, in which order, under which name.

The values of each curve, split, end and axis differ, so that no two can be exchanged unseen.
Further tests of values are in test_posterior.py, test_tiles.py and test_run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import pyro_vae
from pyro_vae.plots import calibration, codes, posterior, run
from pyro_vae.plots import from_model as gallery
from pyro_vae.plots.run import GREY, TRAIN, VALIDATION

RANDOM = np.random.default_rng(0)
TERMS = ("elbo", "reconstruction", "kl")


def history(shift: float = 0.0, epochs: int = 4) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, in which every number differs."""
    names = ("train_elbo", "reconstruction", "kl", *(f"validation_{term}" for term in TERMS))
    return [
        {"epoch": e, **{name: shift - 10 * k - 1 / e for k, name in enumerate(names)}}
        for e in range(1, epochs + 1)
    ]


def labels(axes: Axes) -> tuple[str, str]:
    return axes.get_xlabel(), axes.get_ylabel()


def overall(figure: Figure) -> tuple[str, str]:
    return figure.get_supxlabel(), figure.get_supylabel()


def texts(owner: Any) -> list[str]:
    return [text.get_text() for text in owner.get_texts()]


def column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines]


# --- curves of a run ------------------------------------------------------------------------------


def test_training_and_validation_have_their_own_curves():
    lines = history()
    figure = run.elbo_curves(lines, "the title", "image")
    assert figure.get_suptitle() == "the title"
    assert len(figure.axes) == 3
    for axes, term, name in zip(figure.axes, TERMS, ("ELBO", "reconstruction", "KL"), strict=True):
        assert axes.get_title().startswith(name)
        assert labels(axes) == ("epoch", "nats per image")
        train, validation = axes.lines
        assert (train.get_label(), train.get_color()) == ("train", TRAIN)
        assert (validation.get_label(), validation.get_color()) == ("validation", VALIDATION)
        for line in (train, validation):
            assert list(line.get_xdata()) == [1, 2, 3, 4]
            assert line.get_marker() == "None"
        assert list(train.get_ydata()) == column(lines, "train_elbo" if term == "elbo" else term)
        assert list(validation.get_ydata()) == column(lines, f"validation_{term}")
    assert texts(figure.axes[0].get_legend()) == ["train", "validation"]


def test_one_epoch_is_a_dot_and_an_autoencoder_has_one_curve():
    lines = [{**line, "train_elbo": None, "kl": None} for line in history(epochs=1)]
    (axes,) = run.elbo_curves(lines).axes
    assert axes.get_title().startswith("reconstruction")
    assert [line.get_marker() for line in axes.lines] == ["o", "o"]
    assert list(axes.lines[0].get_ydata()) == column(lines, "reconstruction")


def test_the_first_epochs_are_cut_off_only_if_they_flatten_the_others():
    lines = history(epochs=40)
    low = [axes.get_ylim()[0] for axes in run.elbo_curves(lines).axes]
    assert low[0] < min(column(lines, "train_elbo"))
    for name in ("train_elbo", "validation_elbo"):
        lines[0][name] = -1e6
    cut = [axes.get_ylim() for axes in run.elbo_curves(lines).axes]
    assert -100 < cut[0][0] < min(column(lines[4:], "validation_elbo"))
    assert cut[0][1] > max(column(lines, "train_elbo"))
    assert cut[1][0] == low[1]


@pytest.mark.parametrize("count", [2, 12])
def test_runs_side_by_side_keep_their_curves_and_colours(count):
    runs = {f"run_{k}": history(shift=100.0 * k) for k in range(count)}
    figure = run.compare_curves(runs, "row")
    colours = []
    for axes, term in zip(figure.axes, TERMS, strict=True):
        assert labels(axes) == ("epoch", "nats per row")
        for line, (name, lines) in zip(axes.lines, runs.items(), strict=True):
            assert line.get_label() == name
            assert list(line.get_ydata()) == column(lines, f"validation_{term}")
        colours.append([tuple(np.atleast_1d(line.get_color())) for line in axes.lines])
    assert colours[0] == colours[1] == colours[2]
    assert len(set(colours[0])) == count
    assert texts(figure.legends[0]) == list(runs)
    assert [axes.get_title()[:2] for axes in figure.axes] == ["EL", "re", "KL"]


# --- latent planes --------------------------------------------------------------------------------


def planes(count: int = 12) -> list[run.Plane]:
    points = np.arange(2.0 * count).reshape(count, 2) ** 1.5
    return [run.Plane(points, "across", "up"), run.Plane(-2 * points, "second across", "second up")]


def test_planes_have_their_points_and_names():
    first, second = planes()
    figure = run.latent_scatter([first, second], None, (), "t")
    assert [labels(axes) for axes in figure.axes] == [
        ("across", "up"),
        ("second across", "second up"),
    ]
    for axes, plane in zip(figure.axes, (first, second), strict=True):
        np.testing.assert_allclose(axes.collections[0].get_offsets(), plane.points)
    assert figure.legends == []
    assert figure.get_suptitle() == "t"


@pytest.mark.parametrize("classes", [3, 15])
def test_a_class_has_one_colour_in_the_legend_and_on_every_plane(classes):
    kinds = np.arange(30)[::-1] % classes
    names = [f"class {k}" for k in range(classes)]
    figure = run.latent_scatter(planes(30), kinds, names)
    (legend,) = figure.legends
    assert texts(legend) == names
    for axes, plane in zip(figure.axes, planes(30), strict=True):
        for k, dots in enumerate(axes.collections):
            np.testing.assert_allclose(dots.get_offsets(), plane.points[kinds == k])
            colour = legend.legend_handles[k].get_facecolor()[0]
            assert same_color(dots.get_facecolor()[0][:3], colour[:3])
    colours = {tuple(handle.get_facecolor()[0]) for handle in legend.legend_handles}
    assert len(colours) == classes


def test_many_classes_are_a_scale():
    kinds = np.arange(30)
    figure = run.latent_scatter(planes(30), kinds, [str(k) for k in kinds])
    for axes in figure.axes[:2]:
        assert axes.collections[0].get_array().tolist() == kinds.tolist()
    assert figure.axes[2].get_ylabel() == "label (of 30)"
    assert figure.legends == []


def test_names_of_users_are_plain_text():
    assert run.plain("_a$b$\n\x1b") == r" _a\$b\$\n\x1b"
    assert run.short("abcdefgh", 4) == "abc…"
    assert run.short("abcd", 4) == "abcd"


def test_the_title_counts_what_is_shown():
    assert run.new_figure(4, 3, "a", 2, 5).get_suptitle() == "a (2 of 5 shown)"
    assert run.new_figure(4, 3, "a", 5, 5).get_suptitle() == "a"


# --- figures of a model ---------------------------------------------------------------------------

SIDE = 6


@pytest.fixture(scope="module")
def counted() -> tuple[pyro_vae.VAE, pyro_vae.Splits]:
    """A model of counts up to 16 with a lively decoder; no two rows of data are equal."""
    values = RANDOM.integers(0, 17, (60, SIDE, SIDE)).astype(np.uint8)
    splits = pyro_vae.load_data((values, np.arange(60) % 3), max_value=16)
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits, 0)
    with torch.no_grad():
        for weight in (*vae.decoder.parameters(), *vae.encoder.parameters()):
            weight.mul_(3)
    return vae, splits


def tiles_of(figure: Figure) -> np.ndarray:
    """The images of a grid: (rows, columns, H, W)."""
    sheet = np.asarray(figure.axes[0].images[0].get_array())
    rows, columns = ((size + 1) // (SIDE + 1) for size in sheet.shape)
    padded = np.pad(sheet, [(0, 1), (0, 1)], constant_values=np.nan)
    parts = padded.reshape(rows, SIDE + 1, columns, SIDE + 1).swapaxes(1, 2)
    return parts[:, :, :-1, :-1]


def shown(x: torch.Tensor) -> np.ndarray:
    return (x.detach() / 16).numpy()[..., 0, :, :]


def first(split: pyro_vae.Split, count: int) -> torch.Tensor:
    return next(split.fixed("count", 0))[:count]


def close(drawn: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_validation_rows_stand_above_the_means_of_their_reconstructions(counted):
    vae, splits = counted
    figure = gallery.reconstructions(vae, splits, 7, 0)
    drawn, x = tiles_of(figure), first(splits.validation, 24)
    assert drawn.shape[:2] == (2, len(splits.validation))
    close(drawn[0], shown(x))
    with torch.no_grad():
        close(drawn[1], shown(vae.likelihood(vae.posterior(x).mean).mean))
    words = figure.get_suptitle().replace("\n", " ")
    assert words == "array: validation images and reconstructions after epoch 7"


def test_interpolations_run_from_the_first_row_of_a_pair_to_the_second(counted):
    vae, splits = counted
    figure = gallery.run_figures(vae, splits, history(), 0)["interpolations"]
    drawn, x = tiles_of(figure), first(splits.test, 6)
    assert drawn.shape[:2] == (3, 13)
    with torch.no_grad():
        means = vae.posterior(x).mean
        for row in range(3):
            start, stop = means[2 * row], means[2 * row + 1]
            close(drawn[row, 0], shown(x)[2 * row])
            close(drawn[row, -1], shown(x)[2 * row + 1])
            for k in range(11):
                z = start + k / 10 * (stop - start)
                close(drawn[row, 1 + k], shown(vae.likelihood(z).mean))
    assert "test images" in figure.get_suptitle()


def test_samples_are_means_at_draws_from_the_prior(counted):
    vae, splits = counted
    figure = gallery.run_figures(vae, splits, history(), 5)["samples"]
    drawn = tiles_of(figure)
    assert drawn.shape[:2] == (10, 10)
    again = tiles_of(gallery.run_figures(vae, splits, history(), 5)["samples"])
    np.testing.assert_array_equal(drawn, again)
    # Each is the decoder's mean somewhere: near one of many points of the plane.
    with torch.no_grad():
        z = torch.cartesian_prod(torch.linspace(-4, 4, 161), torch.linspace(-4, 4, 161))
        plane = shown(vae.likelihood(z).mean).reshape(len(z), -1)
    nearest = []
    for tile in drawn.reshape(100, -1)[:30]:
        error = np.abs(plane - tile).max(1)
        assert error.min() < 0.15
        nearest.append(z[error.argmin()].numpy())
    assert np.ptp(nearest, axis=0).min() > 1
    assert "prior" in figure.get_suptitle().replace("\n", " ")


def test_the_latent_figure_has_the_codes_and_labels_of_all_splits(counted, tmp_path, monkeypatch):
    vae, splits = counted
    found = codes.latent_codes(vae, splits, 0)
    seen = {}
    monkeypatch.setattr(run, "save_all", lambda figures, folder: seen.update(figures))
    gallery.draw_run(vae, splits, history(), tmp_path, 0, found)
    assert set(seen) == {"elbo", "interpolations", "samples", "latent", "manifold"}
    (axes,) = seen["latent"].axes
    assert labels(axes) == ("$z_1$", "$z_2$")
    assert [dots.get_label() for dots in axes.collections] == ["0", "1", "2"]
    rows = torch.cat([s.rows for s in (splits.test, splits.validation, splits.train)])
    with torch.no_grad():
        means = vae.posterior(splits.train.values[rows].float()).mean.numpy()
    kinds = rows.numpy() % 3
    for k, dots in enumerate(axes.collections):
        close(np.asarray(dots.get_offsets()), means[kinds == k])
    text = "posterior means of 60 test, validation and training images"
    assert seen["latent"].get_suptitle().replace("\n", " ") == f"array: {text}"
    assert list(seen["elbo"].axes[0].lines[0].get_ydata()) == column(history(), "train_elbo")


def test_one_latent_is_spread_at_random_and_many_are_projected():
    one = RANDOM.standard_normal((30, 1))
    (plane,) = codes._planes(one)
    assert (plane.first, plane.second) == ("$z_1$", "spread at random")
    np.testing.assert_array_equal(plane.points[:, 0], one[:, 0])
    many = RANDOM.standard_normal((40, 4)) * [1, 5, 0.1, 2]
    principal, neighbours = codes._planes(many)
    assert np.abs(np.corrcoef(principal.points[:, 0], many[:, 1])[0, 1]) > 0.999
    assert np.abs(np.corrcoef(principal.points[:, 1], many[:, 3])[0, 1]) > 0.99
    assert principal.first.startswith("principal component 1 (")
    assert principal.second.startswith("principal component 2 (")
    share = principal.points.var(0) / many.var(0).sum()
    assert f"({100 * share[0]:.0f}%" in principal.first
    assert neighbours.first.startswith("t-SNE 1")
    assert neighbours.points.shape == (40, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (lambda x: x, lambda v: v / 16),  # counts up to 16
        (lambda x: x / 16.0, lambda v: v / 16),  # in [0, 1]
        (lambda x: (x > 8).astype(np.uint8), lambda v: v > 8),  # bits
    ],
)
def test_what_is_shown_are_intensities(values: Callable, expected: Callable):
    counts = RANDOM.integers(0, 17, (20, 4, 4))
    counts.flat[:2] = 0, 16
    splits = pyro_vae.load_data(values(counts))
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(4,)), splits)
    x = next(splits.whole().fixed(vae.likelihood_module.units, 0))
    close(gallery.to_display(vae, x)[:, 0], expected(counts).astype(float))


def test_real_images_are_shown_about_their_mean_and_tables_standardized():
    images = 1000 + 5 * RANDOM.standard_normal((30, 4, 4)).astype(np.float32)
    table = images.reshape(30, 16) * np.arange(1, 17, dtype=np.float32)
    for values in (images, table):
        splits = pyro_vae.load_data(values)
        vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(4,)), splits)
        x = next(splits.train.fixed("real", 0))
        display = gallery.to_display(vae, x)
        if values is table:
            np.testing.assert_allclose(display.mean(0), 0, atol=1e-2)
            np.testing.assert_allclose(display.std(0), 1, atol=1e-2)
        else:
            kept = values[splits.train.rows.numpy()]
            expected = 0.5 + (kept - kept.mean()) / (6 * kept.std())
            np.testing.assert_allclose(display[:, 0], expected.clip(0, 1), atol=1e-3)


# --- diagnostics ----------------------------------------------------------------------------------


def names(count: int) -> list[str]:
    return [f"$z_{j + 1}$" for j in range(count)]


def test_the_axes_of_every_diagnostic_figure_are_named():
    ranks, values = RANDOM.integers(0, 20, (40, 3)), RANDOM.standard_normal((40, 3))
    band = np.arange(1, 20) / 20
    quantities = ["a", "b", "c"]
    assert overall(calibration.rank_histograms(ranks, 19, quantities)) == (
        "rank of the truth among 19 draws",
        "simulations",
    )
    ecdf = calibration.ecdf_differences(ranks, 19, quantities, band - 0.1, band + 0.1)
    assert overall(ecdf) == ("$i\\,/\\,(L+1)$", "share below $i$, minus uniform")
    recovery = calibration.recovery(values, 2 * values, quantities)
    assert overall(recovery) == ("posterior mean", "truth")
    contraction = calibration.contraction_and_z(values, values, quantities)
    assert overall(contraction) == ("posterior contraction", "z-score of the truth")
    assert texts(contraction.legends[0]) == quantities
    levels = np.array([0.5, 0.9])
    covered = np.full((2, 3), 0.7)
    (coverage,) = calibration.coverage_curve(levels, covered, covered, covered, quantities).axes
    assert labels(coverage) == ("nominal coverage", "share of simulations covered")
    assert (coverage.get_xlim(), coverage.get_ylim()) == ((0, 1), (0, 1))
    predictive = posterior.predictive_checks(values, values, values**2, quantities)
    assert overall(predictive) == ("replicated", "observed")
    chains = posterior.chains_against_guide(values, values**2, values, values**2)
    assert overall(chains) == ("latent", "mean ± 2 sd")
    for figure in (recovery, ecdf, predictive):
        assert [axes.get_title().split("\n")[0] for axes in figure.axes] == quantities


def test_weights_are_sorted_by_k_and_stand_beside_their_sample_sizes():
    k = np.array([0.9, 0.1, 1.4, 0.3])
    sizes = np.array([50.0, 90, 2, 80])
    left, right = posterior.weight_tails(k, sizes, 100, 0.7).axes
    np.testing.assert_allclose(
        left.collections[-1].get_offsets(), [[1, 0.1], [2, 0.3], [3, 0.9], [4, 1.4]]
    )
    np.testing.assert_allclose(
        right.collections[-1].get_offsets(), np.column_stack([sizes / 100, k])
    )
    assert labels(left) == ("rows, in order of $\\hat k$", "Pareto $\\hat k$")
    assert right.get_xlabel() == "effective sample size / number of samples"
    assert right.get_xscale() == "log"
    counted = texts(left.figure.legends[0])
    assert counted == ["good, below 0.70: 2", "doubtful: 1", "no meaning, above 1: 1"]
    colours = {p.get_label(): p.get_facecolor() for p in left.patches}
    for (name, colour), (low, high) in zip(
        zip(counted, (posterior.GOOD, posterior.DOUBTFUL, posterior.MEANINGLESS), strict=True),
        ((None, 0.7), (0.7, 1), (1, None)),
        strict=True,
    ):
        assert same_color(colours[name], colour)
        patch = next(p for p in left.patches if p.get_label() == name)
        bottom, height = patch.get_y(), patch.get_height()
        assert low is None or bottom == pytest.approx(low)
        assert high is None or bottom + height == pytest.approx(high)


def test_bars_of_the_latents_have_their_names_and_colours():
    kl, variance = np.array([0.0, 3.0, 1.0]), np.array([0.001, 0.9, 0.5])
    figure = posterior.latent_use(kl, variance, variance > 0.01, names(3))
    first_axes, second_axes = figure.axes
    assert [bar.get_height() for bar in first_axes.patches] == [3, 1, 0]
    assert [bar.get_height() for bar in second_axes.patches] == [0.9, 0.5, 0.001]
    assert [t.get_text() for t in second_axes.get_xticklabels()] == [
        run.plain(names(3)[j]) for j in (1, 2, 0)
    ]
    for axes in figure.axes:
        for bar, colour in zip(axes.patches, (TRAIN, TRAIN, GREY), strict=True):
            assert same_color(bar.get_facecolor(), colour)
    assert (first_axes.get_ylabel(), second_axes.get_ylabel()) == (
        "KL, nats",
        "variance of\nposterior means",
    )
    assert texts(figure.legends[0]) == ["active: 2", "inactive: 1"]
    handles = figure.legends[0].legend_handles
    assert [
        same_color(h.get_facecolor(), c) for h, c in zip(handles, (TRAIN, GREY), strict=True)
    ] == [True] * 2


def test_gaps_have_their_names_from_the_top_down():
    above, below = posterior.inference_gaps(*(np.full(5, v) for v in (3.0, 2.0, 1.0))).axes
    ticks = [label.get_text().split("\n")[0] for label in below.get_yticklabels()]
    assert ticks == ["encoder's error", "independent latents", "beyond any Gaussian"]
    colours = [bar.get_facecolor() for bar in above.patches]
    for dots, colour in zip(below.collections[0::2], colours, strict=True):
        assert same_color(dots.get_facecolor()[0][:3], colour[:3])
    assert below.get_xlabel().startswith("nats, each row")


def test_bounds_have_their_axis():
    (axes,) = posterior.sandwich([("a", -2.0, 0.1, "lower"), ("b", -1.0, 0.1, "upper")]).axes
    assert axes.get_xlabel() == "mean, nats, ± 2 standard errors"


def test_the_aggregate_and_the_prior_have_their_names():
    prior, aggregate = RANDOM.standard_normal((20, 2)), 9 + RANDOM.standard_normal((30, 2))
    figure = posterior.aggregate_posterior(prior, aggregate)
    (axes,) = figure.axes
    drawn = {dots.get_label(): dots.get_offsets() for dots in axes.collections}
    np.testing.assert_allclose(drawn["prior $p(z)$"], prior)
    np.testing.assert_allclose(drawn["aggregate posterior"], aggregate)
    assert labels(axes) == ("$z_1$", "$z_2$")
    assert texts(figure.legends[0]) == ["prior $p(z)$", "aggregate posterior"]
    (axes,) = posterior.aggregate_posterior(prior[:, :1], aggregate[:, :1]).axes
    assert labels(axes) == ("$z_1$", "density")
    axes, bars = posterior.aggregate_posterior(
        RANDOM.standard_normal((20, 3)), RANDOM.standard_normal((30, 3)) * [1, 5, 2]
    ).axes
    assert axes.get_xlabel().startswith("principal axis 1 of the aggregate (")
    assert axes.get_ylabel().startswith("principal axis 2 of the aggregate (")
    assert labels(bars) == ("latent", "standard deviation of the aggregate")
    assert np.ptp(axes.collections[1].get_offsets()[:, 0]) > np.ptp(
        axes.collections[1].get_offsets()[:, 1]
    )


def test_figures_keep_to_their_width_for_any_number_of_latents():
    many = np.abs(RANDOM.standard_normal((6, 500)))
    for figure in (
        posterior.chains_against_guide(many, many, many, many),
        posterior.latent_use(many[0], many[1], many[0] > 1, names(500)),
        run.compare_curves({f"a long name of a run {k} " * 5: history() for k in range(60)}),
    ):
        assert max(figure.get_size_inches()) < 16
        assert len(figure.axes) <= run.MOST_PANELS
