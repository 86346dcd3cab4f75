"""The wiring of `suite`: what each study computes from which rows, and where its numbers go.

The functions that a study calls are watched: their arguments say which rows and sizes they were
given, and their results have to be found under the right name. Rows carry their origin in their
values: x of held-out rows is above 40, of training rows below −40, of simulated rows between. All
sizes differ. The two slow computations are replaced by results that are written out.
"""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
from conftest import SIGMAS, example_spec
from matplotlib.figure import Figure

from pyro_vae.data.splits import DataSpec, Split
from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics import rows, suite
from pyro_vae.diagnostics.gradients import measure_gradients
from pyro_vae.diagnostics.latents import LatentUse
from pyro_vae.diagnostics.nuts import Comparison
from pyro_vae.diagnostics.predictive import PredictiveCheck, predictive_check
from pyro_vae.diagnostics.refinement import Gaps, PerRowGuide
from pyro_vae.diagnostics.sbc import check_ranks, coverage, gamma_band, miscalibration, simulate
from pyro_vae.evidence.importance import Evidence, upper_bound
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.objectives.registry import objective

EFFORT = suite.Effort(
    held_out=999,  # rows are chosen by `diagnose`
    importance_samples=40,
    refined=5,
    refine_steps=7,
    simulations=60,
    draws=19,
    annealed=24,
    anneal_steps=11,
    anneal_chains=3,
    chain_rows=4,
    chains=2,
    chain_warmup=6,
    chain_draws=8,
    aggregate=30,
)
D, Z = 6, 2
NUMBERS = torch.arange(1000, 1012)  # of the held-out rows in the data
WATCHED = ["importance_sample", "upper_bound", "anneal", "latent_use", "predictive_check"]
WATCHED += ["simulate", "aggregate_posterior", "energy_coefficient", "energy_test", "holes"]


def model(factor: float = 1.4) -> LinearGaussian:
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(D, Z)).Q * torch.tensor([1.5, 0.7])
    return LinearGaussian(weight, torch.zeros(D), 1.2, "diagonal", factor, 0.3)


class Calls(dict):
    """Name → calls, each the arguments by name and the result."""

    def only(self, name: str) -> tuple[dict, object]:
        (call,) = self[name]
        return call


def watch(patch: pytest.MonkeyPatch, calls: Calls, module, name: str, stub=None) -> None:
    real, calls[name] = getattr(module, name), []

    def watched(*args, **settings):
        bound = inspect.signature(real).bind(*args, **settings)
        bound.apply_defaults()
        result = (stub or real)(*args, **settings)
        calls[name].append((bound.arguments, result))
        return result

    patch.setattr(module, name, watched)


def known_gaps(vae, x, *_):
    size = len(x)
    ramp = torch.arange(size).double()
    k = torch.full((size,), 0.3).double()
    k[0], k[1] = -math.inf, 0.9
    evidence = Evidence(-50 - ramp, ramp, -80 - ramp, -30 - ramp, ramp + 20, 40, k)
    return Gaps(4 + ramp**2, 2 + ramp**2, 1 + ramp**2, evidence)


def known_comparison(vae, x, *_):
    table = 1 + np.arange(len(x) * Z).reshape(-1, Z) / 10
    draws = np.random.default_rng(0).gamma(1.0, size=(2, 8, len(x), Z))
    return Comparison(draws, table, 10 * table, 7, 2 * table, 3 * table, table[:, 0], table[:, 1])


@pytest.fixture(scope="module")
def made():
    """The studies of a model, the calls and figures that they made, and what they reported."""
    vae, calls, drawn, done = model(), Calls(), Calls(), []
    held_out, training = 50 + torch.randn(12, D), -50 + torch.randn(47, D)
    with pytest.MonkeyPatch.context() as patch:
        for name in WATCHED:
            watch(patch, calls, suite, name)
        watch(patch, calls, suite, "gaps", known_gaps)
        watch(patch, calls, rows, "local_test")
        watch(patch, calls, suite, "compare_with_nuts", known_comparison)
        for module in (suite.posterior_figures, suite.calibration_figures):
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and not name.startswith("_"):
                    watch(patch, drawn, module, name, lambda *_, **__: Figure())
        torch.manual_seed(1)
        studies = list(suite.studies(vae, held_out, training, EFFORT, done.append, NUMBERS))
    return vae, held_out, training, studies, calls, drawn, done


def summary(values: np.ndarray) -> dict[str, float]:
    values = np.asarray(values)
    numbers = (values.mean(), np.median(values), values.min(), values.max())
    return dict(zip(("mean", "median", "least", "largest"), numbers, strict=True))


def same(found, expected) -> None:
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def simulated(vae, x, z) -> None:
    """x was drawn from p(x|z): the residuals have the variance of the noise, at 4 errors."""
    assert x.abs().max() < 20, "no rows of the data"
    square = ((x - z @ vae.weight.T) / vae.noise_scale).square().mean().item()
    assert abs(square - 1) < SIGMAS * math.sqrt(2 / x.numel())


def test_progress_is_the_share_of_all_work(made):
    *_, done = made
    assert all(step >= 0 for step in done)
    # of 100, but for the two computations that are replaced
    assert sum(done) == pytest.approx(100 - 13 - 18, abs=1e-6)


def test_weights(made):
    vae, held_out, _, studies, calls, drawn, _ = made
    asked, result = calls["importance_sample"][0]
    assert asked["vae"] is vae
    same(asked["x"], held_out)
    assert (asked["num_samples"], asked["with_pareto_k"]) == (40, True)
    study = studies[0]
    posterior = vae.posterior(held_out)
    mean, scale = posterior.mean.detach(), posterior.variance.sqrt().detach()
    kl = ((mean**2 + scale**2 - 1) / 2 - scale.log()).sum(1)
    elbo = (result.reconstruction - kl).mean().item()
    assert study.details["elbo"] == pytest.approx(elbo, rel=1e-5)
    assert study.details["log_evidence"] == result.log_evidence.mean().item()
    assert study.details["importance_samples"] == 40
    assert study.details["effective_sample_size"] == summary(result.effective_sample_size)
    limit = 1 - 1 / math.log10(40)
    k = result.pareto_k.numpy()
    assert study.details["pareto_k"] == {"limit": pytest.approx(limit), **summary(k)}
    (finding,) = study.findings
    assert finding.size.estimate == (k > limit).mean()
    shown, _ = drawn.only("weight_tails")
    same(shown["pareto_k"], k)
    same(shown["effective_sample_size"], result.effective_sample_size)
    assert (shown["num_samples"], shown["threshold"]) == (40, pytest.approx(limit))


def test_latents_and_predictions(made):
    vae, held_out, _, studies, calls, drawn, _ = made
    for name in ("latent_use", "predictive_check"):
        asked, _ = calls.only(name)
        assert asked["vae"] is vae
        same(asked["x"], held_out)
    use, check = calls.only("latent_use")[1], calls.only("predictive_check")[1]
    details = studies[1].details
    assert details["latent_kl"] == use.kl.tolist()
    assert details["latent_mean_variance"] == use.mean_variance.tolist()
    assert details["active_units"] == 2
    effects = dict(zip(check.names, check.effects.mean(0), strict=True))
    assert details["predictive_effects"] == effects
    outside = ((check.p_values < 0.025) | (check.p_values > 0.975)).mean(0)
    same(list(details["predictive_p_values_beyond_95%"].values()), outside)
    assert [f.check.name for f in studies[1].findings] == ["collapsed latents", "predictive check"]
    assert studies[1].findings[1].size == verdicts.about_predictions(check).size
    shown, _ = drawn.only("latent_use")
    same(shown["kl"], use.kl)
    same(shown["mean_variance"], use.mean_variance)
    same(shown["active"], [True, True])
    assert shown["names"] == ["z1", "z2"]
    shown, _ = drawn.only("predictive_checks")
    for name in ("observed", "replicated_mean", "replicated_scale", "names"):
        same(shown[name], getattr(check, name))


def test_active_units_are_counted(monkeypatch):
    use = LatentUse(np.array([0.001, 0.002, 5.0]), np.array([0.0, 0.5, 0.5]))
    monkeypatch.setattr(suite, "latent_use", lambda *_: use)
    p_values = np.array([[0.02, 0.5], [0.03, 0.98], [0.97, 0.99], [0.976, 0.04]])
    none, one = np.zeros((4, 2)), np.ones((4, 2))
    check = PredictiveCheck(("mean", "log p(x|z)"), none, none, one, p_values)
    monkeypatch.setattr(suite, "predictive_check", lambda *_: check)
    details = suite._latents(model(), torch.randn(9, D)).details
    assert details["active_units"] == 2
    outside = details["predictive_p_values_beyond_95%"]
    assert outside == {"mean": 0.5, "log p(x|z)": 0.5}


def test_contraction_is_the_mean_over_simulations(monkeypatch):
    """Of a guide whose deviations vary with x."""
    result = simulate(model(), 60, 19)
    scale = np.random.default_rng(0).gamma(2.0, 0.2, size=result.scale.shape)
    result = dataclasses.replace(result, scale=scale)
    monkeypatch.setattr(suite, "simulate", lambda *_, **__: result)
    monkeypatch.setattr(suite, "_calibration_figures", lambda *_: {})
    details = suite._calibration(model(), EFFORT, id).details
    same(list(details["contraction"].values()), (1 - scale**2).mean(0))


def test_gaps(made):
    vae, held_out, _, studies, calls, drawn, _ = made
    asked, result = calls.only("gaps")
    assert asked["vae"] is vae
    same(asked["x"], held_out[:5])
    assert (asked["num_steps"], asked["num_samples"]) == (7, 40)
    details, parts = studies[2].details, (result.amortization, result.correlation, result.remainder)
    names = ("amortization_gap", "correlation_gap", "remaining_gap")
    assert [details[name] for name in names] == [summary(values) for values in parts]
    assert details["refined_log_evidence"] == summary(result.evidence.log_evidence)
    assert details["refined_pareto_k"] == summary(result.evidence.pareto_k[1:])  # the first is −∞
    sizes = [f.size.estimate for f in studies[2].findings]
    assert sizes == pytest.approx([4 + 6, 3 + 12])  # means of ramp² are 6
    shown, _ = drawn.only("inference_gaps")
    for name, values in zip(("amortization", "correlation", "remainder"), parts, strict=True):
        same(shown[name], values)


def test_calibration(made):
    vae, _, _, studies, calls, drawn, _ = made
    asked, result = calls.only("simulate")
    assert asked["vae"] is vae
    assert (asked["num_simulations"], asked["num_draws"]) == (60, 19)
    study = studies[3]
    expected = [
        verdicts.about_spread(result),
        verdicts.about_bias(result),
        *verdicts.about_coverage(coverage(result)),
        verdicts.about_likelihood_ranks(result),
    ]
    assert study.findings == expected
    details, sizes, table = study.details, miscalibration(result), coverage(result)
    for test in check_ranks(result):
        kept = ("gamma", "p_gamma", "p_chi_squared")
        assert details["rank_tests"][test.name] == {name: getattr(test, name) for name in kept}
    for j, name in enumerate(("z1", "z2")):
        for key, intervals in (("bias", sizes.bias), ("spread", sizes.spread)):
            assert details[key][name] == dataclasses.astuple(intervals[j])
        same(details["coverage"][name], table.covered[:, j])
        assert details["contraction"][name] == result.contraction.mean(0)[j]
        assert details["recovery"][name] == result.recovery[j]
    assert details["coverage"]["nominal"] == table.nominal.tolist()
    order = [2, 3, 0, 1]  # the joint quantities first
    for name in ("rank_histograms", "ecdf_differences"):
        shown, _ = drawn.only(name)
        same(shown["ranks"], result.ranks[:, order])
        assert list(shown["names"]) == [result.names[i] for i in order]
        assert shown["num_draws"] == 19
    same([shown["lower"], shown["upper"]], gamma_band(60, 19, 0.95))
    shown, _ = drawn.only("coverage_curve")
    curve = coverage(result, tuple(np.linspace(0.1, 0.95, 18)))
    for name in ("nominal", "covered", "low", "high", "names"):
        same(shown[name], getattr(curve, name))
    shown, _ = drawn.only("recovery")
    same(shown["z"], result.z)
    same(shown["mean"], result.mean)
    shown, _ = drawn.only("contraction_and_z")
    same(shown["contraction"], result.contraction)
    same(shown["z_scores"], result.z_scores)


def test_bounds(made):
    """On rows drawn from the model, whose z enter both upper bounds."""
    vae, _, _, studies, calls, drawn, _ = made
    (_, (sampled, importance)), (asked_free, free) = (
        calls["importance_sample"],
        calls.only("upper_bound"),
    )
    asked, annealed = calls.only("anneal")
    z = asked["z"]
    assert z.shape == (24, Z)
    simulated(vae, asked["x"], z)
    same(asked_free["z"], z)
    for other in (sampled, asked_free):
        assert other["vae"] is vae
        same(other["x"], asked["x"])
        assert other["num_samples"] == 40
    assert (asked["num_steps"], asked["num_chains"]) == (11, 3)
    values = {
        "importance sampling": (importance.log_evidence, "lower"),
        "annealing, forward": (annealed.lower, "lower"),
        "annealing, reverse": (annealed.upper, "upper"),
        "importance sampling with the true z": (free, "upper"),
    }
    study = studies[4]
    assert study.details["bounds"] == {name: summary(v) for name, (v, _) in values.items()}
    between = (annealed.upper - annealed.lower).numpy()
    assert study.details["annealing_gap"] == summary(between)
    assert study.details["acceptance"] == annealed.acceptance.mean().item()
    (finding,) = study.findings
    short = (annealed.upper - importance.log_evidence).numpy()
    assert finding.size == verdicts.interval(short)
    ((estimators, _),) = [call[0].values() for call in drawn["sandwich"]]
    assert [name for name, *_ in estimators] == list(values)
    for name, mean, error, kind in estimators:
        difference = (values[name][0] - annealed.upper).numpy()
        assert mean == pytest.approx(difference.mean())
        assert error == pytest.approx(difference.std(ddof=1) / math.sqrt(24))
        assert kind == values[name][1]
    # in closed form: each bound on its side of log p(x), by what a wide guide makes of 40 samples
    exact = vae.exact_log_evidence(asked["x"]).detach().numpy()
    for name, (v, kind) in values.items():
        off = (v.numpy() - exact) * (1 if kind == "upper" else -1)
        assert off.mean() > -SIGMAS * off.std(ddof=1) / math.sqrt(24), name
    torch.manual_seed(2)
    again = upper_bound(vae, asked["x"], z, 40).numpy() - exact
    for bound in (again, free.numpy() - exact):  # the true z is one of the 40, and counts as 1/40
        assert abs(bound.mean()) < 0.3


def test_chains(made):
    vae, held_out, _, studies, calls, drawn, _ = made
    asked, result = calls.only("compare_with_nuts")
    assert asked["vae"] is vae
    same(asked["x"], held_out[:4])
    assert [asked[name] for name in ("num_chains", "num_samples", "num_warmup")] == [2, 8, 6]
    details = studies[5].details["nuts"]
    assert details == {
        "rows": 4,
        "r_hat": summary(result.r_hat),
        "effective_sample_size": summary(result.effective_sample_size),
        "divergences": 7,
        "mean_difference": result.mean_difference.tolist(),
        "scale_ratio": result.scale_ratio.tolist(),
        "energy_coefficient": result.distance.tolist(),
        "energy_coefficient_of_halves": result.null_distance.tolist(),
    }
    assert studies[5].findings == verdicts.about_chains(result)
    shown, _ = drawn.only("chains_against_guide")
    posterior = vae.posterior(held_out[:4])
    same(shown["guide_mean"], posterior.mean.detach())
    same(shown["guide_scale"], posterior.variance.sqrt().detach())
    same(shown["chain_mean"], result.draws.mean((0, 1)))
    same(shown["chain_scale"], result.draws.std((0, 1)))


def test_aggregate(made):
    """Simulated rows against the prior; training rows against the prior for the holes only."""
    vae, _, training, studies, calls, drawn, _ = made
    (asked, simulated_draws), *for_holes = calls["aggregate_posterior"]
    assert asked["vae"] is vae
    for asked_seen, _ in for_holes:
        assert asked_seen["vae"] is vae
        same(asked_seen["x"], training[:30])
    seen = for_holes[0][1]
    x = asked["x"]
    assert x.shape == (30, D)
    assert x.abs().max() < 20
    # drawn, not decoded: two independent directions hold noise alone
    square = (x @ torch.linalg.svd(vae.weight.T).Vh[Z:].T / vae.noise_scale).square().mean().item()
    assert abs(square - 1) < SIGMAS * math.sqrt(2 / (30 * (D - Z)))
    asked, test = calls.only("energy_test")
    same(asked["first"], simulated_draws)
    prior = asked["second"]
    assert prior.shape == (30, Z)
    assert abs(prior).max() < 6
    searches = calls["holes"]
    assert len(searches) == len(for_holes) == suite.HOLE_REPETITIONS
    for (asked, _), (_, draws) in zip(searches, for_holes, strict=True):
        same(asked["aggregate"], draws)
        assert asked["prior"].shape == (30, Z)
    for name in ("aggregate", "prior"):
        firsts = {asked[name][0, 0] for asked, _ in searches}
        assert len(firsts) == len(searches), "each search has draws of its own"
    shares = np.array([share for _, share in searches])
    study = studies[6]
    *blocks, (pair, between) = calls["energy_coefficient"]
    same(pair["first"], seen)
    same(pair["second"], prior)
    assert study.details["aggregate"] == {
        "simulated": {"energy_coefficient": test.coefficient, "p_value": test.p_value},
        "training": {"energy_coefficient": between, "holes": shares.tolist()},
    }
    assert len(blocks) == 10
    same(np.concatenate([call["first"] for call, _ in blocks]), simulated_draws)
    same(np.concatenate([call["second"] for call, _ in blocks]), prior)
    coefficients = np.array([value for _, value in blocks])
    assert study.findings == [
        verdicts.about_aggregate(coefficients),
        verdicts.about_holes(shares, 30),
    ]
    shown, _ = drawn.only("aggregate_posterior")
    same(shown["prior_draws"], prior)
    same(shown["aggregate_draws"], seen)


def test_local(made):
    """The refined rows, four times as many pairs as simulations, and the numbers of the rows."""
    vae, held_out, _, studies, calls, _, _ = made
    asked, result = calls.only("local_test")
    assert asked["vae"] is vae
    same(asked["x_observed"], held_out[:5])
    assert asked["num_pairs"] == 2 * 60  # to train on, and as many to test
    assert studies[7].findings == [verdicts.about_local(result.correct)]
    assert studies[7].details["local"] == {
        "rows": [1000, 1001, 1002, 1003, 1004],
        "statistic": result.statistic.tolist(),
        "p_value": result.p_value.tolist(),
    }


def test_worst_rows_come_from_both_studies(made):
    """k and log p(x) of all rows; the gap, and a better log p(x), of those that were refined."""
    _, held_out, _, studies, calls, drawn, _ = made
    evidence, fitted = calls["importance_sample"][0][1], calls.only("gaps")[1]
    worst = studies[8].details["worst_rows"]
    assert studies[8].findings == []
    gaps = {line["row"]: line["amortization_gap"] for line in worst}
    assert {1000, 1001, 1002, 1003, 1004} <= set(gaps)  # gaps of 4 nats and more
    for line in worst:
        i = line["row"] - 1000
        assert line["pareto_k"] == evidence.pareto_k[i]
        if i < 5:
            assert line["amortization_gap"] == fitted.amortization[i]
            assert line["log_evidence"] == fitted.evidence.log_evidence[i]
        else:
            assert math.isnan(line["amortization_gap"])
            assert line["log_evidence"] == evidence.log_evidence[i]
    shown, _ = drawn.only("worst_rows")
    same(shown["originals"], held_out[[row - 1000 for row in gaps]])
    assert shown["rows"] == list(gaps)
    same(shown["pareto_k"], [line["pareto_k"] for line in worst])
    same(shown["gap"], list(gaps.values()))


def test_holes_of_few_training_rows(monkeypatch):
    """As many draws of the prior as rows, and an interval of as many."""
    calls = Calls()
    watch(monkeypatch, calls, suite, "holes", lambda aggregate, prior: 0.25)
    study = suite._aggregate(model(), torch.randn(8, D), EFFORT)
    for asked, _ in calls["holes"]:
        assert asked["aggregate"].shape == asked["prior"].shape == (8, Z)
    shares = np.full(suite.HOLE_REPETITIONS, 0.25)
    assert study.findings[1] == verdicts.about_holes(shares, 8)


def test_sizes_of_the_two_efforts():
    full = (1000, 5000, 128, 1000, 4000, 199, 64, 1000, 8, 8, 4, 200, 300, 2000)
    quick = (200, 1000, 32, 200, 500, 199, 16, 200, 4, 4, 2, 50, 50, 500)
    assert dataclasses.astuple(suite.FULL) == full
    assert dataclasses.astuple(suite.QUICK) == quick


# Rows


def sentinel(count: int, first: int, spec: DataSpec) -> Split:
    """`count` rows of 100 stored ones, from `first` on, whose values are their number."""
    values = torch.arange(100.0)[:, None].expand(100, 3).contiguous()
    return Split(values, torch.arange(first, first + count), spec)


def test_random_rows_are_rows_of_their_split():
    split = sentinel(40, 50, DataSpec((3,), None, discrete=False))
    rows = suite.random_rows(split, "real", 15, 3)
    numbers = rows[:, 0].tolist()
    assert rows.shape == (15, 3)
    assert len(set(numbers)) == 15
    assert set(numbers) <= set(range(50, 90))
    assert numbers != sorted(numbers)
    same(rows, suite.random_rows(split, "real", 15, 3))
    assert numbers != suite.random_rows(split, "real", 15, 4)[:, 0].tolist()
    everything = suite.random_rows(split, "real", 99, 3)[:, 0].tolist()
    assert sorted(everything) == list(range(50, 90))
    # over seeds, every row comes about as often: 15 in 40, at 4.7 standard errors of 40 counts
    counts = np.bincount(
        np.concatenate([suite.random_rows(split, "real", 15, s)[:, 0] for s in range(400)]).astype(
            int
        ),
        minlength=100,
    )[50:90]
    assert abs(counts - 150).max() < 4.7 * math.sqrt(150 * 25 / 40)


def test_binarization_of_random_rows_follows_the_seed():
    split = Split(torch.full((64, 30), 100.0), torch.arange(64), DataSpec((30,), 200, True))
    first, again, other = (suite.random_rows(split, "binary", 64, seed) for seed in (1, 1, 2))
    same(first, again)
    assert 0.3 < (first != other).float().mean() < 0.7


# Values that are no numbers


def test_weights_that_are_no_numbers_are_unreliable(monkeypatch):
    """k is NaN, or infinite, if no weight of a row is above zero; equal weights have no tail."""
    k = torch.tensor([math.nan, math.nan, math.inf, -math.inf, 0.25]).double()
    zero = torch.full((5,), -math.inf).double()
    evidence = Evidence(zero, zero, zero, zero, k, 40, k, torch.ones(5))
    monkeypatch.setattr(suite, "importance_sample", lambda *_, **__: evidence)
    study = suite._weights(model(), torch.randn(5, D), EFFORT, id)
    assert study.findings[0].size.estimate == 3 / 5
    assert study.details["elbo"] == study.details["log_evidence"] == -math.inf
    assert study.details["pareto_k"] == {
        "limit": pytest.approx(0.3758, abs=1e-4),
        **summary([0.25]),
    }
    (dots, *_) = study.figures["weights"].axes[0].collections
    heights = dots.get_offsets()[:, 1]
    assert heights[0] < 0 < 0.25 == heights[1] < 1 < heights[2] == heights[4], "∞ is above all"
    labels = [label.get_text() for label in study.figures["weights"].axes[0].get_yticklabels()]
    assert (labels[0], labels[-1]) == ("$-\\infty$", "$\\infty$")
    nothing = Evidence(*[zero[:3]] * 4, k[:3], 40, k[:3], torch.ones(3))
    monkeypatch.setattr(suite, "importance_sample", lambda *_, **__: nothing)
    study = suite._weights(model(), torch.randn(3, D), EFFORT, id)
    assert study.findings[0].size.estimate == 1
    numbers = [study.details["pareto_k"][name] for name in ("mean", "median", "least", "largest")]
    assert numbers == [None] * 4


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1,), ["mean", "log p(x|z)"]),
        ((4,), ["mean", "standard deviation", "log p(x|z)"]),
        ((1, 1, 1), ["mean", "log p(x|z)"]),
        ((1, 1, 9), ["mean", "standard deviation", "log p(x|z)", "roughness"]),
        ((1, 9, 1), ["mean", "standard deviation", "log p(x|z)", "roughness"]),
        ((3, 4, 5), ["mean", "standard deviation", "log p(x|z)", "roughness"]),
    ],
)
def test_statistics_of_rows_of_any_shape_are_numbers(shape, names):
    """One value has no deviation, and an image one pixel wide has neighbours on one side only."""
    from pyro_vae.models.priors import StandardNormal
    from pyro_vae.models.vae import VAE

    torch.manual_seed(4)
    size = math.prod(shape)
    likelihood = LIKELIHOODS["gaussian"](
        dataclasses.replace(example_spec("gaussian"), shape=shape),
        torch.zeros(shape),
        torch.ones(()),
    )
    flat, back = torch.nn.Flatten(1), torch.nn.Unflatten(-1, (1, *shape))
    encoder = torch.nn.Sequential(flat, torch.nn.Linear(size, 2))
    decoder = torch.nn.Sequential(torch.nn.Linear(1, size), back)
    vae = VAE(StandardNormal(1), encoder, decoder, likelihood)
    x = torch.randn(7, *shape)
    check = predictive_check(vae, x, num_draws=20)
    assert list(check.names) == names
    assert np.isfinite(check.effects).all()
    if "roughness" in names:
        steps = [x.diff(dim=side).abs().flatten(1).mean(1) for side in (2, 3) if x.shape[side] > 1]
        np.testing.assert_allclose(check.observed[:, -1], sum(steps), rtol=1e-5)


# A default dtype or device of the user's


def numbers_of(vae, x) -> list:
    torch.manual_seed(5)
    ranks = simulate(vae, 40, 9)
    guide = PerRowGuide(x[:3, :Z], x[:3, :Z].exp(), True)
    guide.lower.data += 0.5
    groups = {"decoder": list(vae.decoder.parameters())}
    step = measure_gradients(objective("trace", 1, 1), vae.model, vae.guide, x, groups, 40)
    check = predictive_check(vae, x, num_draws=20)
    split = sentinel(40, 50, DataSpec((3,), None, discrete=False))
    return [
        ranks.ranks,
        ranks.z_scores,
        guide.posterior(x).covariance_matrix.detach(),
        step.gradients["decoder"].mean,
        np.array(dataclasses.astuple(step.gradients["decoder"].signal_to_noise)),
        check.effects,
        suite.latent_use(vae, x).kl,
        suite.aggregate_posterior(vae, x),
        suite.random_rows(split, "real", 9, 1),
    ]


def test_a_default_dtype_changes_nothing():
    vae, x = model(), torch.randn(9, D)
    before = numbers_of(vae, x)
    torch.set_default_dtype(torch.float64)
    try:
        after = numbers_of(vae, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for first, second in zip(before, after, strict=True):
        same(first, second)
        assert first.dtype == second.dtype


def test_a_default_device_is_not_used():
    """Tensors of the device "meta" hold no values, as tensors on a GPU do not mix with a CPU's."""
    split = sentinel(40, 50, DataSpec((3,), None, discrete=False))
    loc, scale = torch.zeros(3, Z), torch.ones(3, Z)
    blocks = torch.randn(20, 5).double()
    from pyro_vae.diagnostics.gradients import Gradient

    with torch.device("meta"):
        guide = PerRowGuide(loc, scale, True)
        covariance = guide.posterior(loc).covariance_matrix
        gradient = Gradient(40, blocks.mean(0), blocks[0], blocks, blocks.square().sum(1))
        assert math.isfinite(gradient.variance.estimate)
        rows = suite.random_rows(split, "real", 9, 1)
    same(rows, suite.random_rows(split, "real", 9, 1))
    same(covariance.detach(), torch.eye(Z).expand(3, Z, Z))
