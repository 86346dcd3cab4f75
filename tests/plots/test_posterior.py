"""Figures of the posterior show what they say: right values, right colours, nothing left unsaid."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba
from scipy import stats

from pyro_vae.plots import calibration as calibration_figures
from pyro_vae.plots import posterior as posterior_figures
from pyro_vae.plots.run import TRAIN, VALIDATION, save

RANDOM = np.random.default_rng(0)


def names(count: int, stem: str = "z") -> list[str]:
    return [f"{stem}{j + 1}" for j in range(count)]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def title(figure) -> str:
    return figure.get_suptitle()


def heights(axes) -> list[float]:
    return [bar.get_height() for bar in axes.containers[0]]


def intervals(container) -> np.ndarray:
    """Ends of an error bar container's bars, (points, 2): along x if it has bars there, else y."""
    segments = np.array(container.lines[2][0].get_segments())
    return segments[:, :, 0] if container.has_xerr else segments[:, :, 1]


def middles(container) -> np.ndarray:
    return np.column_stack(container.lines[0].get_data())


def legend(owner) -> list[str]:
    return [text.get_text() for text in owner.get_texts()]


@pytest.mark.parametrize(("num_draws", "bins"), [(199, 20), (99, 20), (63, 16), (100, 20), (3, 4)])
def test_ranks_fill_their_bins(num_draws, bins):
    ranks = RANDOM.integers(0, num_draws + 1, (300, 2))
    ranks[:, 1] = num_draws
    figure = calibration_figures.rank_histograms(ranks, num_draws, ["a", "b"])
    for j, axes in enumerate(figure.axes):
        bars = axes.containers[0]
        assert len(bars) == bins
        assert sum(heights(axes)) == 300
        for bar in bars:
            left, right = bar.get_x(), bar.get_x() + bar.get_width()
            assert bar.get_height() == ((ranks[:, j] > left) & (ranks[:, j] < right)).sum()
    assert heights(figure.axes[1]) == [0] * (bins - 1) + [300]


@pytest.mark.parametrize("num_draws", [199, 100])
def test_band_of_the_ranks_is_that_of_each_bin(num_draws):
    ranks = RANDOM.integers(0, num_draws + 1, (500, 1))
    (axes,) = calibration_figures.rank_histograms(ranks, num_draws, ["a"]).axes
    band = axes.patches[-1].get_data()
    widths = [bar.get_width() for bar in axes.containers[0]]
    assert sum(widths) == num_draws + 1
    for width, low, high in zip(widths, band.baseline, band.values, strict=True):
        inside = stats.binom(500, width / (num_draws + 1))
        assert inside.cdf(high) - inside.cdf(low - 1) >= 0.99
        assert inside.cdf(low - 1) < 0.005
        assert inside.sf(high) <= 0.005


def test_ranks_that_leave_the_band_are_red():
    num_draws = 9
    uniform = np.arange(1, 10) / 10
    lower, upper = uniform - 0.1, uniform + 0.1
    even = np.repeat(np.arange(10), 10)
    low = np.minimum(even, 5)  # at no i beyond 5 is the share of ranks below i less than 1
    high = np.where(even == 0, 1, even)  # exactly at the band's lower end at i = 1: still inside
    ranks = np.stack([even, low, high], axis=1)
    figure = calibration_figures.ecdf_differences(ranks, num_draws, names(3), lower, upper)
    lines = [axes.lines[-1] for axes in figure.axes]
    assert [line.get_color() for line in lines] == [TRAIN, VALIDATION, TRAIN]
    for line in lines:
        np.testing.assert_allclose(line.get_xdata(), uniform)
    np.testing.assert_allclose(lines[0].get_ydata(), 0, atol=1e-12)
    np.testing.assert_allclose(lines[1].get_ydata(), [0] * 5 + [0.4, 0.3, 0.2, 0.1], atol=1e-12)
    np.testing.assert_allclose(lines[2].get_ydata(), [-0.1] + [0] * 8, atol=1e-12)
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [-0.1, 0.1])


def test_coverage_stands_at_its_level_with_its_interval():
    nominal = np.array([0.5, 0.9])
    covered = np.array([[0.1, 0.2, 0.3, 0.4, 0.6], [0.5, 0.6, 0.7, 0.8, 0.95]])
    low, high = covered - 0.05, covered + np.array([[0.02], [0.04]])
    low[0, 3], high[1, 3] = -np.inf, np.inf
    figure = calibration_figures.coverage_curve(
        nominal, covered, low, high, [*names(3), "mean over latents", "HDR"]
    )
    (axes,) = figure.axes
    mean, hdr = axes.containers
    np.testing.assert_allclose(middles(mean), np.column_stack([nominal, covered[:, 3]]))
    np.testing.assert_allclose(middles(hdr), np.column_stack([nominal, covered[:, 4]]))
    np.testing.assert_allclose(intervals(mean), [[0, 0.42], [0.75, 1]])
    np.testing.assert_allclose(intervals(hdr), [[0.55, 0.62], [0.9, 0.99]])
    thin = [line for line in axes.lines if line.get_linewidth() < 1][1:]  # after the diagonal
    assert [list(line.get_ydata()) for line in thin] == covered[:, :3].T.tolist()
    assert legend(figure.legends[0]) == ["each latent", "mean over latents", "HDR"]
    sides = {text.get_text(): np.subtract(*text.get_position()) for text in axes.texts}
    assert sides["too wide"] < 0 < sides["too narrow"]


def test_recovery_has_the_truth_upwards_and_its_correlation():
    z = normal(50, 3)
    mean = np.stack([2 * z[:, 0], -z[:, 1], np.full(50, 0.1)], axis=1)
    figure = calibration_figures.recovery(z, mean, names(3))
    for j, axes in enumerate(figure.axes):
        points = axes.collections[0].get_offsets()
        np.testing.assert_allclose(points, np.column_stack([mean[:, j], z[:, j]]))
        assert axes.get_xlim() == axes.get_ylim()
        assert np.abs(points).max() < axes.get_xlim()[1]
    notes = [axes.get_title() for axes in figure.axes]
    assert notes == ["z1\n$r = 1.00$", "z2\n$r = -1.00$", "z3\n$r = 0.00$"]
    figure = calibration_figures.recovery(z[:1], mean[:1], names(3))
    assert figure.axes[0].get_title().endswith("0.00$")


@pytest.mark.parametrize("latents", [1, 10, 11])
def test_contraction_has_one_panel_or_one_each(latents):
    contraction, scores = RANDOM.uniform(0, 1, (30, latents)), normal(30, latents)
    figure = calibration_figures.contraction_and_z(contraction, scores, names(latents))
    assert len(figure.axes) == (1 if latents <= 10 else latents)
    drawn = [dots for axes in figure.axes for dots in axes.collections]
    assert [dots.get_label() for dots in drawn] == names(latents)
    for j, dots in enumerate(drawn):
        np.testing.assert_allclose(
            dots.get_offsets(), np.column_stack([contraction[:, j], scores[:, j]])
        )
    colours = {to_hex(dots.get_facecolor()[0]) for dots in drawn}
    assert len(colours) == (latents if latents <= 10 else 1)
    for axes in figure.axes:
        assert sorted(line.get_ydata()[0] for line in axes.lines) == [-2, 0, 2]
    assert len(figure.legends) == (latents <= 10)


def test_tails_stand_in_their_regions():
    tails = np.array([0.5, -np.inf, 1.2, 0.65, 0.9, -0.1, 1.0])
    size = np.array([50.0, 100, 1, 20, 10, 80, 5])
    figure = posterior_figures.weight_tails(tails, size, 100, 0.65)
    left, right = figure.axes
    order = np.argsort(tails)
    places, drawn = left.collections[0].get_offsets().T
    assert list(places) == [1, 2, 3, 4, 5, 6, 7]
    assert list(drawn[1:]) == list(tails[order][1:])
    floor = drawn[0]
    assert left.get_ylim()[0] < floor < -0.1
    ticks = zip(left.get_yticks(), left.get_yticklabels(), strict=True)
    assert [tick for tick, label in ticks if label.get_text() == "$-\\infty$"] == [floor]
    shares, heights_ = right.collections[0].get_offsets().T
    np.testing.assert_allclose(shares, size / 100)
    assert list(heights_) == [floor if np.isinf(k) else k for k in tails]
    assert right.get_xscale() == "log"
    for axes in figure.axes:
        regions = [(p.get_y(), p.get_y() + p.get_height()) for p in axes.patches]
        bottom, top = left.get_ylim()
        np.testing.assert_allclose(regions, [(bottom, 0.65), (0.65, 1), (1, top)])
    counts = [text.split(": ")[1] for text in legend(figure.legends[0])]
    assert counts == ["3", "3", "1"]


@pytest.mark.parametrize("tails", [[-np.inf], [0.2], [-np.inf, -np.inf], [3.0]])
def test_tails_of_few_images(tails, tmp_path):
    figure = posterior_figures.weight_tails(np.array(tails), np.full(len(tails), 2.0), 2, -2.3)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ("$-\\infty$" in labels) == np.isinf(tails[0])
    save(figure, tmp_path / "a.png")


def test_latents_are_in_order_of_their_kl():
    kl, variance = np.array([0.5, 3.0, 0.0, 1.0]), np.array([0.1, 0.9, 0.0, 0.5])
    active = np.array([False, True, False, True])
    figure = posterior_figures.latent_use(kl, variance, active, names(4))
    first, second = figure.axes
    assert heights(first) == [3, 1, 0.5, 0]
    assert heights(second) == [0.9, 0.5, 0.1, 0]
    for axes in figure.axes:
        colours = [bar.get_facecolor() == to_rgba(TRAIN) for bar in axes.containers[0]]
        assert colours == [True, True, False, False]
    assert [label.get_text() for label in second.get_xticklabels()] == ["z2", "z4", "z1", "z3"]
    assert legend(figure.legends[0]) == ["active: 2", "inactive: 2"]


def test_a_collapsed_posterior_has_no_variance_below_zero():
    none = np.zeros(2)
    figure = posterior_figures.latent_use(none, none, none > 0, names(2))
    assert heights(figure.axes[1]) == [0, 0]
    assert figure.axes[1].get_ylim()[0] == 0


def test_of_very_many_latents_those_of_largest_kl_are_drawn():
    kl = np.arange(70.0)
    figure = posterior_figures.latent_use(kl, kl, kl > 65, names(70), "use")
    assert heights(figure.axes[0]) == list(range(69, 5, -1))
    assert title(figure) == "use (64 of 70 shown)"
    assert legend(figure.legends[0]) == ["active: 4", "inactive: 66"]


@pytest.mark.parametrize("images", [1, 40])
def test_gaps_are_stacked_to_their_sum(images):
    parts = [np.full(images, mean) + normal(images) for mean in (3.0, -1.0, 0.5)]
    parts = [part - part.mean() + mean for part, mean in zip(parts, (3, -1, 0.5), strict=True)]
    above, below = posterior_figures.inference_gaps(*parts).axes
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for c in above.containers for bar in c]
    np.testing.assert_allclose(ends, [(0, 3), (0, -1), (3, 3.5)], atol=1e-12)
    assert [text.get_text() for text in above.texts] == ["$3.00$", "$-1.00$", "$0.50$"]
    assert "2.50$ nats" in above.get_title()
    points, bars = below.collections[0::2], below.collections[1::2]
    for i, part in enumerate(parts):
        x, y = points[i].get_offsets().T
        np.testing.assert_allclose(x, part)
        assert np.abs(y - i).max() <= 0.25
        np.testing.assert_allclose(
            bars[i].get_segments()[0], [(q, i) for q in np.percentile(part, [25, 75])]
        )
        assert below.lines[i].get_xdata()[0] == pytest.approx(np.median(part))
        label = below.get_yticklabels()[i].get_text()
        assert label.endswith(f"mean ${(3, -1, 0.5)[i]:.2f}$ nats")
    assert below.yaxis_inverted()


def test_a_small_gap_has_no_number_that_would_not_fit():
    above, _ = posterior_figures.inference_gaps(*np.array([[10.0], [0.5], [0.0]])).axes
    assert [text.get_text() for text in above.texts] == ["$10.00$"]


def test_bounds_are_drawn_from_the_top_down(tmp_path):
    estimators = [
        ("a", -90.0, 0.5, "lower"),
        ("b", -80.0, 1.0, "upper"),
        ("c", -85.0, float("nan"), "lower"),
    ]
    figure = posterior_figures.sandwich(estimators)
    (axes,) = figure.axes
    for i, (container, (_, mean, error, kind)) in enumerate(
        zip(axes.containers, estimators, strict=True)
    ):
        assert middles(container).tolist() == [[mean, i]]
        line = container.lines[0]
        assert line.get_color() == (TRAIN if kind == "lower" else VALIDATION)
        assert line.get_marker() == (">" if kind == "lower" else "<")
        if np.isfinite(error):
            np.testing.assert_allclose(intervals(container), [[mean - 2 * error, mean + 2 * error]])
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert legend(figure.legends[0]) == ["lower bounds", "upper bounds"]
    assert axes.texts[1].get_text() == "$-80.00 \\pm 2.00$"
    save(figure, tmp_path / "a.png")


@pytest.mark.parametrize(("images", "latents"), [(1, 1), (10, 3), (2, 15), (2, 64)])
def test_chains_stand_beside_the_guide(images, latents):
    guide, chain = normal(images, latents), normal(images, latents)
    scales = RANDOM.uniform(0.1, 1, (2, images, latents))
    figure = posterior_figures.chains_against_guide(guide, scales[0], chain, scales[1], "t")
    assert len(figure.axes) == min(images, 6)
    assert title(figure) == ("t" if images <= 6 else "t (6 of 10 shown)")
    for i, axes in enumerate(figure.axes):
        assert axes.get_title() == f"row {i + 1}"
        for container, mean, scale in zip(axes.containers, (guide, chain), scales, strict=True):
            places, values = middles(container).T
            assert list(places.round()) == list(range(1, latents + 1))
            np.testing.assert_allclose(values, mean[i])
            np.testing.assert_allclose(
                intervals(container),
                np.column_stack([mean[i] - 2 * scale[i], mean[i] + 2 * scale[i]]),
            )
        assert (middles(axes.containers[0])[:, 0] < middles(axes.containers[1])[:, 0]).all()
    assert legend(figure.legends[0]) == ["guide", "NUTS"]


def test_checks_are_red_where_the_replications_miss():
    observed = np.array([[1.0, 5], [2, 5], [3, 5], [9, 5]])
    mean = np.array([[1.5, 5], [2, 5], [3, 5], [3, 5]])
    scale = np.array([[0.25, 0], [1, 0], [1, 0], [2, 0]])  # the first: 2 sd off, to the digit
    figure = posterior_figures.predictive_checks(observed, mean, scale, ["a", "b"])
    inside, missed = figure.axes[0].containers
    assert middles(inside).tolist() == [[1.5, 1], [2, 2], [3, 3]]
    assert intervals(inside).tolist() == [[1, 2], [0, 4], [1, 5]]
    assert middles(missed).tolist() == [[3, 9]]
    assert intervals(missed).tolist() == [[-1, 7]]
    assert [c.lines[0].get_color() for c in (inside, missed)] == [TRAIN, VALIDATION]
    assert [axes.get_title() for axes in figure.axes] == [
        "a\n75% within 2 sd",
        "b\n100% within 2 sd",
    ]


def test_one_latent_is_two_densities():
    prior, aggregate = normal(300, 1), 3 + normal(200, 1)
    (axes,) = posterior_figures.aggregate_posterior(prior, aggregate).axes
    for bars, draws in zip(axes.containers, (prior, aggregate), strict=True):
        assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)
        centre = sum(b.get_height() * b.get_width() * (b.get_x() + b.get_width() / 2) for b in bars)
        assert centre == pytest.approx(draws.mean(), abs=0.1)


def test_two_latents_are_drawn_as_they_are():
    prior, aggregate = normal(30, 2), normal(20, 2)
    (axes,) = posterior_figures.aggregate_posterior(prior, aggregate).axes
    for dots, draws in zip(axes.collections, (prior, aggregate), strict=True):
        np.testing.assert_allclose(dots.get_offsets(), draws)


def test_more_latents_are_projected_where_the_aggregate_is_widest():
    scale = np.array([0.1, 2.0, 0.0, 1.0])
    prior, aggregate = normal(300, 4), 5 + scale * normal(2000, 4)
    axes, bars = posterior_figures.aggregate_posterior(prior, aggregate).axes
    before, points = (dots.get_offsets() for dots in axes.collections)
    # Up to signs the axes are the second latent and the fourth, about the aggregate's mean.
    np.testing.assert_allclose(
        np.abs(points), np.abs(aggregate - aggregate.mean(0))[:, [1, 3]], atol=0.4
    )
    np.testing.assert_allclose(points.std(0), [2, 1], rtol=0.1)
    np.testing.assert_allclose(np.linalg.norm(before.mean(0)), np.hypot(5, 5), rtol=0.1)
    np.testing.assert_allclose(heights(bars), aggregate.std(0))
    assert bars.lines[0].get_ydata()[0] == 1
    share = aggregate[:, 1].var() / aggregate.var(0).sum()
    assert f"({100 * share:.0f}%)" in axes.get_xlabel()


def test_a_collapsed_aggregate_is_drawn(tmp_path):
    figure = posterior_figures.aggregate_posterior(normal(20, 3), np.zeros((20, 3)))
    assert heights(figure.axes[1]) == [0, 0, 0]
    save(figure, tmp_path / "a.png")


def panelled(count: int, labels: list[str], text: str = ""):
    """Each figure with a panel for each quantity."""
    ranks, values = RANDOM.integers(0, 20, (40, count)), normal(40, count)
    ends = np.arange(1, 20) / 20 - 0.2, np.arange(1, 20) / 20 + 0.2
    yield calibration_figures.rank_histograms(ranks, 19, labels, text)
    yield calibration_figures.ecdf_differences(ranks, 19, labels, *ends, text)
    yield calibration_figures.recovery(values, values, labels, text)
    yield calibration_figures.contraction_and_z(values, values, labels, text)
    yield posterior_figures.predictive_checks(values, values, values**2, labels, text)


def test_the_title_says_how_many_panels_are_shown():
    for figure in panelled(64, names(64), "t"):
        assert title(figure) == "t (24 of 64 shown)"
        assert [axes.get_title().split("\n")[0] for axes in figure.axes] == names(24)
    for figure in panelled(24, names(24), "t"):
        assert title(figure) == "t"
        assert len(figure.axes) == 24
    assert title(next(panelled(25, names(25)))) == "(24 of 25 shown)"


def test_panels_with_nothing_below_have_labels():
    figure = calibration_figures.rank_histograms(RANDOM.integers(0, 20, (40, 8)), 19, names(8))
    shown = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes]
    assert shown == [False] * 4 + [True] * 4
    figure = calibration_figures.rank_histograms(RANDOM.integers(0, 20, (40, 7)), 19, names(7))
    shown = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes]
    assert shown == [False] * 3 + [True] * 4


@pytest.mark.parametrize("count", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (11, 30))])
def test_any_name_can_be_drawn(count, tmp_path):
    """Among them such as would be mathematics, or run into the next panel."""
    labels = [f"_${j}^$ {'long ' * 20}" for j in range(count)]
    for figure in panelled(count, labels, "a title of many words " * 10):
        save(figure, tmp_path / "a.png")
        assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.02
        renderer, frame = FigureCanvasAgg(figure).get_renderer(), figure.bbox
        assert figure._suptitle.get_window_extent(renderer).width <= frame.width
        columns = len({round(axes.get_position().x0, 3) for axes in figure.axes})
        for axes in figure.axes:
            assert axes.title.get_window_extent(renderer).width <= 1.1 * frame.width / columns
