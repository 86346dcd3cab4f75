"""Verdicts rest on whole intervals; exact guides are sound, planted faults are wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics.findings import Check, Finding
from pyro_vae.diagnostics.latents import LatentUse
from pyro_vae.diagnostics.nuts import Comparison
from pyro_vae.diagnostics.predictive import PredictiveCheck
from pyro_vae.diagnostics.refinement import gaps
from pyro_vae.diagnostics.sbc import coverage, simulate
from pyro_vae.evidence.annealing import Annealed
from pyro_vae.evidence.importance import importance_sample
from pyro_vae.evidence.intervals import Interval
from pyro_vae.models.linear_gaussian import LinearGaussian


def finding(low, high, ideal=0.0, reliable=True):
    size = Interval((low + high) / 2, low, high)
    check = Check("check", "effect", (0.1, 0.5), "meaning", "advice", ideal)
    return Finding(check, size, reliable=reliable)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.09, "sound"),
        (-0.05, 0.11, "doubtful"),  # may be more than the first limit
        (-0.9, 0.9, "doubtful"),  # too uncertain to say anything
        (0.2, 0.4, "doubtful"),
        (0.4, 0.6, "doubtful"),
        (0.51, 0.6, "wrong"),
        (-0.6, -0.51, "wrong"),
        (-np.inf, np.inf, "doubtful"),
    ],
)
def test_verdicts(low, high, verdict):
    assert finding(low, high).verdict == verdict
    assert finding(low + 3, high + 3, ideal=3.0).verdict == verdict
    assert finding(low, high, reliable=False).verdict == "doubtful"


def test_ratios_are_equally_far_on_both_sides():
    check = Check("c", "e", (1.1, 2.0), "m", "a", ideal=1.0, is_ratio=True)
    for size in (Interval(2.5, 2.1, 2.9), Interval(0.4, 1 / 2.9, 1 / 2.1)):
        assert Finding(check, size).verdict == "wrong"
    for size in (Interval(1.0, 0.95, 1.05), Interval(1.0, 1 / 1.05, 1 / 0.95)):
        assert Finding(check, size).verdict == "sound"


def oracle(guide="exact", scale_factor=1.0, shift=0.0):
    torch.manual_seed(0)
    weight = torch.randn(8, 2, dtype=torch.float64)
    return LinearGaussian(weight, torch.zeros(8).double(), 1.0, guide, scale_factor, shift)


def calibration_findings(vae, count=3000):
    simulations = simulate(vae, count)
    return {
        f.check.name: f.verdict
        for f in (
            verdicts.about_spread(simulations),
            verdicts.about_bias(simulations),
            *verdicts.about_coverage(coverage(simulations)),
            verdicts.about_likelihood_ranks(simulations),
        )
    }


def test_an_exact_guide_is_sound_throughout():
    assert set(calibration_findings(oracle()).values()) == {"sound"}


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ({"scale_factor": 0.5}, ["posterior width", "coverage, intervals", "coverage, regions"]),
        ({"scale_factor": 2.0}, ["posterior width"]),
        ({"shift": 1.0}, ["posterior bias"]),
        ({"guide": "collapsed"}, ["use of the data"]),
    ],
)
def test_planted_faults_are_wrong(fault, wrong):
    found = calibration_findings(oracle(**fault))
    assert [name for name in wrong if found[name] != "wrong"] == []


def test_few_simulations_make_doubts():
    assert "sound" not in {calibration_findings(oracle(), 40)["posterior bias"]}


def test_weights():
    assert verdicts.about_weights(np.zeros(200, bool)).verdict == "sound"
    assert verdicts.about_weights(np.zeros(10, bool)).verdict == "doubtful"  # too few to know
    assert verdicts.about_weights(np.ones(30, bool)).verdict == "wrong"


def test_bounds():
    lower = torch.randn(50).double()

    def annealed(short, own):
        upper = lower + short
        return Annealed(upper - own, upper, torch.zeros(50), torch.ones(50))

    for short, own, verdict in (
        (0.05, 0.1, "sound"),
        (1.0, 0.1, "doubtful"),
        (3.0, 0.1, "wrong"),
        (3.0, 2.0, "doubtful"),  # the bounds themselves are too far apart
    ):
        found = verdicts.about_bounds(annealed(short, own), lower.numpy())
        assert found.verdict == verdict
        assert found.size.estimate == pytest.approx(short)
    with pytest.raises(ValueError, match="reverse chains"):
        verdicts.about_bounds(Annealed(lower, None, lower, lower), lower.numpy())


def test_gaps_of_the_oracle():
    torch.manual_seed(1)
    for fault, verdict in (({}, "sound"), ({"shift": 4.0}, "wrong")):
        vae = oracle("diagonal", **fault)
        x = vae.likelihood(vae.prior().sample((20,))).sample().detach()
        amortization, approximation = verdicts.about_gaps(gaps(vae, x, 300, 300))
        assert amortization.verdict == verdict
        assert approximation.verdict == "sound"  # 0.1 nats here, whatever the guide


def test_approximation_is_doubtful_where_the_weights_are_of_no_use():
    vae = oracle("diagonal")
    x = vae.likelihood(vae.prior().sample((20,))).sample().detach()
    result = gaps(vae, x, 5, 300)
    few = importance_sample(oracle("diagonal", shift=8.0), x, 100)
    assert few.effective_sample_size.median() < 10
    broken = type(result)(result.amortization, result.correlation, result.remainder, few)
    assert verdicts.about_gaps(broken)[1].verdict == "doubtful"


def test_collapse():
    def use(kl):
        return LatentUse(np.array(kl), np.ones(len(kl)))

    assert verdicts.about_collapse(use([1.0, 2.0, 0.001])).verdict == "sound"
    assert verdicts.about_collapse(use([1.0, 0.001, 0.001])).verdict == "doubtful"
    all_collapsed = verdicts.about_collapse(use([0.001, 0.002]))
    assert all_collapsed.verdict == "wrong"
    assert "likelihood without latents" in all_collapsed.as_dict()["meaning"]


def comparison(difference, ratio, r_hat=1.0, ess=400.0):
    random = np.random.default_rng(0)
    shape = (8, 5)
    # what the chains' own uncertainty adds to the differences
    noise = random.normal(size=shape) / np.sqrt(ess)
    return Comparison(
        draws=np.zeros((2, 4, *shape)),
        r_hat=np.full(shape, r_hat),
        effective_sample_size=np.full(shape, ess),
        divergences=0,
        mean_difference=difference + noise,
        scale_ratio=ratio * np.exp(random.normal(size=shape) * 0.02),
        distance=np.zeros(8),
        null_distance=np.zeros(8),
    )


def test_chains():
    for difference, ratio, expected in (
        (0.0, 1.0, ["sound", "sound"]),
        (0.6, 0.7, ["doubtful", "doubtful"]),
        (2.0, 0.3, ["wrong", "wrong"]),
        (2.0, 3.0, ["wrong", "wrong"]),
    ):
        assert [f.verdict for f in verdicts.about_chains(comparison(difference, ratio))] == expected
    disagreeing = verdicts.about_chains(comparison(2.0, 0.3, r_hat=1.2))
    assert [f.verdict for f in disagreeing] == ["doubtful", "doubtful"]
    assert "the chains disagree" in disagreeing[0].as_dict()["meaning"]
    # the chains' own noise is taken out of the difference of means
    noisy = verdicts.about_chains(comparison(0.0, 1.0, ess=30.0))[0]
    assert noisy.size.estimate < 0.5 / np.sqrt(30) * 2


def test_predictions_name_the_worst_statistic():
    def check(effect):
        random = np.random.default_rng(0)
        observed = random.normal(size=(200, 2)) + np.array([0, effect])
        return PredictiveCheck(
            ("fine", "off"), observed, np.zeros((200, 2)), np.ones((200, 2)), observed
        )

    assert verdicts.about_predictions(check(0.1)).verdict == "sound"
    wrong = verdicts.about_predictions(check(-3.0))
    assert wrong.verdict == "wrong"
    assert wrong.as_dict()["effect"].startswith("off of held-out")
    assert wrong.size.estimate == pytest.approx(-3.0, abs=0.3)


def test_aggregate_and_holes():
    assert verdicts.about_aggregate(np.array([0.001, -0.001, 0.002])).verdict == "sound"
    assert verdicts.about_aggregate(np.array([0.3, 0.32, 0.31])).verdict == "wrong"
    assert verdicts.about_holes(np.full(8, 0.01), 500).verdict == "sound"
    # holes are a matter of data and model: no error of inference, however large
    assert verdicts.about_holes(np.full(8, 0.99), 500).verdict == "doubtful"
