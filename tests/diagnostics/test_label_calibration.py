"""Calibration of q(y|x): null distribution with an exact q, power against planted faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae.diagnostics.label_study import about_labels, label_study
from pyro_vae.diagnostics.labels import LabelSimulations, check_labels, simulate_labels
from pyro_vae.models.discrete_gaussian import DiscreteGaussian

SHARES = torch.tensor([0.2, 0.5, 0.3])
FALSE_ALARM = 1e-4  # of each test of an exact q(y|x)


def model(**faults):
    torch.manual_seed(0)
    weight, loc = torch.randn(3, 2), torch.randn(3, 3)
    return DiscreteGaussian(weight, loc, 0.8, SHARES, **faults)


def simulated(vae, count=2000, seed=0):
    torch.manual_seed(seed)
    return simulate_labels(vae, count)


def test_an_exact_posterior_passes():
    tests = check_labels(simulated(model()))
    assert tests.p_value > FALSE_ALARM


def test_p_values_are_uniform_for_an_exact_posterior():
    """300 simulations of 200 labels each, by the test of Kolmogorov and Smirnov.

    The p-value of the classes is conservative by Bonferroni's correction: only its small values
    are counted, by a binomial test. False alarms: 4e-4 in all.
    """
    vae = model()
    found = [check_labels(simulated(vae, 200, seed)) for seed in range(300)]
    for name in ("p_transform", "p_confidence"):
        values = [getattr(tests, name) for tests in found]
        assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM
    for name in ("p_classes", "p_value"):
        small = sum(getattr(tests, name) < 0.1 for tests in found)
        assert stats.binomtest(small, 300, 0.1, alternative="greater").pvalue > FALSE_ALARM


def test_the_transform_is_uniform_for_an_exact_posterior():
    u = simulated(model(), 20_000).transform
    assert stats.kstest(u, "uniform").pvalue > FALSE_ALARM
    assert (u >= 0).all()
    assert (u <= 1).all()


FAULTS = {
    "too sure": {"temperature": 0.5},
    "not sure enough": {"temperature": 2.0},
    "two classes swapped": {"order": torch.tensor([1, 0, 2])},
    "all classes shifted": {"order": torch.tensor([1, 2, 0])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    tests = check_labels(simulated(model(**FAULTS[fault])))
    assert tests.p_value < 1e-6
    assert max(abs(tests.scores)) > 5


def test_the_prior_alone_passes_the_transform_but_not_the_confidence_of_a_finding():
    """q(y|x) = p(y) is calibrated: like a collapsed q(z|x), it passes tests of calibration."""
    vae = model(temperature=1e9)
    with torch.no_grad():
        vae.classifier.log_shares.copy_(1e9 * SHARES.log())
        vae.classifier.inverse.zero_()
    tests = check_labels(simulated(vae))
    assert tests.p_value > FALSE_ALARM
    assert stats.kstest(simulated(vae).transform, "uniform").pvalue > FALSE_ALARM


def test_a_forgotten_prior_is_found():
    vae = model()
    with torch.no_grad():
        vae.classifier.log_shares.zero_()
    assert check_labels(simulated(vae)).p_value < 1e-6


def test_the_transform_depends_on_the_order_of_the_classes_the_scores_do_not():
    """A fault that u averages away: probabilities moved among classes of equal rank and sign."""
    random = np.random.default_rng(0)
    count = 4000
    labels = random.integers(0, 2, count)
    sure = np.where(random.random(count) < 0.5, 0.9, 0.1)  # of class 1, right only half the time
    probabilities = np.stack([1 - sure, sure], axis=1)
    own = probabilities[np.arange(count), labels]
    u = np.where(labels == 0, 0, 1 - sure) + random.random(count) * own
    # With label 0 the transform u · (1 − sure), with label 1 the mirror image: uniform in the mean
    tests = check_labels(LabelSimulations(labels, probabilities, u))
    assert tests.p_confidence < 1e-6
    assert tests.p_classes < 1e-6


def test_findings_have_sizes_with_intervals():
    sound = about_labels(simulated(model(), 8000), ("a", "b", "c"))
    assert [finding.verdict for finding in sound] == ["sound", "sound"]
    sure, _ = about_labels(simulated(model(temperature=0.25), 4000), ("a", "b", "c"))
    assert sure.size.low > 0.03
    assert "too sure" in sure.as_dict()["meaning"]
    _, shares = about_labels(simulated(model(order=torch.tensor([2, 1, 0])), 4000), ("a", "b", "c"))
    excess = 0.3 - 0.2  # the probabilities of a and c have changed places
    assert abs(abs(shares.size.estimate) - excess) < 0.03
    assert shares.size.low * shares.size.high > 0
    text = shares.as_dict()["effect"]
    assert ("label a" in text) or ("label c" in text)


def test_the_study_of_diagnose():
    torch.manual_seed(0)
    study = label_study(model(order=torch.tensor([1, 0, 2])), 500)
    assert [finding.verdict for finding in study.findings] == ["wrong", "wrong"]
    assert set(study.details["label_tests"]) == {"p_transform", "p_classes", "p_confidence"}
    assert set(study.figures) == {"labels"}


def test_numbers_of_simulations_are_checked():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        simulate_labels(model(), 0)
    with pytest.raises(ValueError, match="at least 40 simulations; got 20"):
        check_labels(simulated(model(), 20))
