"""Evaluation of models with labels, against the finite sum of a mixture of linear Gaussians.

With an exact guide, all importance weights of a row are equal: the estimates are exact.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae import InputError
from pyro_vae.data import splits as data
from pyro_vae.evidence import labels as module
from pyro_vae.evidence.evaluation import elbo_terms, evaluate, num_pairs
from pyro_vae.evidence.labels import accuracy, measured_with_labels, rows_of_class
from pyro_vae.models.discrete_gaussian import DiscreteGaussian
from pyro_vae.models.labels import ConditionalVAE

SHARES = torch.tensor([0.2, 0.5, 0.3])


@cache
def truth(**faults):
    torch.manual_seed(1)
    weight, loc = torch.randn(4, 2), torch.randn(3, 4)
    return DiscreteGaussian(weight, loc, 0.7, SHARES, **faults)


@cache
def rows(count=130):
    """Test rows drawn from the model, with their labels."""
    torch.manual_seed(2)
    vae = truth()
    y = vae.label_prior().sample((count,))
    x = vae.likelihood(vae.prior().sample((count,)), y).sample().detach()
    splits = pyro_vae.load_data((x, y), test_size=100)
    return splits.test, x[splits.test.rows], y[splits.test.rows]


def conditional(vae):
    parts = vae.prior_module, vae.encoder, vae.decoder, vae.likelihood_module, SHARES, vae.family
    return ConditionalVAE(*parts)


def test_log_p_is_the_sum_over_labels():
    split, x, y = rows()
    result = evaluate(truth(), split, num_samples=40)
    joint = truth().exact_log_joint(x)
    assert result.log_evidence == pytest.approx(joint.logsumexp(-1).mean().item(), abs=1e-4)
    assert result.monte_carlo_error < 1e-5
    assert result.unreliable_weights == 0
    right = (joint.argmax(-1) == y).double().mean().item()
    found = result.accuracies
    assert 0.6 < right < 0.97  # not trivial
    assert found.bayes_accuracy == found.accuracy == right  # q(y|x) is exact
    assert found.accuracy_low < right < found.accuracy_high
    assert found.num_labelled == 100


def test_the_elbo_of_a_wrong_classifier_is_lower_by_its_divergence():
    """The reconstruction's draws have an error; that of the ELBO with a KL in closed form also."""
    split, x, _ = rows()
    vae = truth(temperature=3.0)
    result = evaluate(vae, split, num_samples=4000)
    log_p = truth().exact_log_joint(x).log_softmax(-1)
    q = vae.label_posterior(x)
    divergence = (q.probs * (q.logits - log_p)).sum(-1).mean().item()
    assert divergence > 0.05
    assert result.log_evidence - result.elbo == pytest.approx(divergence, abs=0.02)
    assert result.elbo == pytest.approx(result.reconstruction - result.kl, abs=1e-6)


def test_the_interval_of_an_accuracy_is_clopper_and_pearsons():
    from scipy.stats import binomtest

    split, _, _ = rows()
    found = accuracy(truth(), split)
    right = round(100 * found.estimate)
    interval = binomtest(right, 100).proportion_ci(method="exact")
    assert (found.low, found.high) == (interval.low, interval.high)


def test_rows_without_a_label_do_not_count():
    split, x, y = rows()
    hidden = torch.where(torch.arange(100) % 2 == 0, y, -1)
    part = dataclasses.replace(split, labels=hidden)
    result = evaluate(truth(), part, num_samples=40)
    right = (truth().exact_log_joint(x).argmax(-1) == y)[::2].double().mean().item()
    assert (result.accuracies.accuracy, result.accuracies.num_labelled) == (right, 50)
    assert result.log_evidence == evaluate(truth(), split, num_samples=40).log_evidence
    for none in (None, torch.full((100,), -1)):
        unlabelled = dataclasses.replace(split, labels=none)
        result = evaluate(truth(), unlabelled, num_samples=40)
        assert result.accuracies is None
        assert accuracy(truth(), unlabelled) is None
    assert accuracy(conditional(truth()), split) is None


@pytest.mark.parametrize("chunk", [512, 30])
def test_a_conditional_model_is_evaluated_at_the_label_of_each_row(chunk, monkeypatch):
    """In the order of the rows, whatever the batches, though classes are measured one by one."""
    monkeypatch.setattr(data, "CHUNK", chunk)
    monkeypatch.setattr(module, "CHUNK", chunk)
    split, x, y = rows()
    vae = conditional(truth())
    expected = truth().exact_log_joint(x) - truth().label_logits
    expected = expected.gather(-1, y[:, None]).squeeze(-1)
    result = evaluate(vae, split, num_samples=40)
    assert result.log_evidence == pytest.approx(expected.mean().item(), abs=1e-4)
    assert result.accuracies is None

    def density(given, x):
        z = given.prior().sample((len(x),))
        return (given.likelihood(z).log_prob(x).double(),) * 6 + (x,)

    terms, _ = measured_with_labels(vae, split, 0, 100, density)
    assert torch.equal(terms[6], x)


def test_each_row_is_in_one_batch_of_its_class():
    split, x, y = rows()
    vae = conditional(truth())
    for label in range(3):
        parts = list(rows_of_class(vae, split, label, 0, 90))
        places = torch.cat([place for _, place in parts])
        assert torch.equal(places, (y[:90] == label).nonzero().flatten())
        assert torch.equal(torch.cat([part for part, _ in parts]), x[places])
    every = torch.cat([place for _, place in rows_of_class(truth(), split, 0, 0, 90)])
    assert torch.equal(every, torch.arange(90))


def test_the_fixed_binarization_is_that_of_the_whole_split():
    """Classes that are measured one by one see the same x as all rows together."""
    values = np.random.default_rng(0).integers(0, 256, (900, 1, 2, 2)).astype(np.uint8)
    splits = pyro_vae.load_data((values, np.arange(900) % 3), test_size=700)
    config = pyro_vae.ModelConfig(
        latent_dim=2, hidden=(4,), likelihood="bernoulli", condition="label"
    )
    vae = pyro_vae.build(config, splits)
    whole = torch.cat(list(splits.test.fixed("binary", 3)))
    seen = torch.zeros(700, 1, 2, 2)
    for label in range(3):
        for x, place in rows_of_class(vae, splits.test, label, 3, 700):
            assert len(x) <= data.CHUNK
            seen[place] = x
    assert torch.equal(seen, whole)


FAULTS = {
    "p(y) forgotten": ("label_logits", torch.zeros(3)),
    "labels shifted by one": ("decoder.loc", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_log_p(fault):
    split, x, _ = rows()
    vae = truth.__wrapped__()
    name, value = FAULTS[fault]
    with torch.no_grad():
        target = vae.get_parameter(name) if value is None else vae.get_buffer(name)
        target.copy_(target.roll(1, 0) if value is None else value)
    result = evaluate(vae, split, num_samples=40)
    exact = truth().exact_log_evidence(x).mean().item()
    assert abs(result.log_evidence - exact) > 1e-3  # ten times the error of the exact model


def test_elbo_terms_use_no_label_of_a_semi_supervised_model():
    split, _, y = rows()
    shifted = dataclasses.replace(split, labels=(y + 1) % 3)
    assert elbo_terms(truth(), split) == elbo_terms(truth(), shifted)
    vae = conditional(truth())
    assert elbo_terms(vae, split) != elbo_terms(vae, shifted)
    with pytest.raises(InputError, match="label of each row"):
        elbo_terms(vae, dataclasses.replace(split, labels=None))


def test_the_random_state_is_restored():
    split, _, _ = rows()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = evaluate(truth(), split, 30)
    assert torch.equal(torch.rand(3), expected)
    assert evaluate(truth(), split, 30) == first


@pytest.mark.parametrize("kind", ["no labels", "given", "inferred"])
def test_as_many_samples_are_announced_as_are_done(kind):
    """The length of a progress bar: with inferred labels, each row is sampled at each of them."""
    vae = {"no labels": truth().given(0), "given": conditional(truth()), "inferred": truth()}[kind]
    done = []
    evaluate(vae, rows()[0], 30, 70, on_chunk=done.append)
    assert sum(done) == num_pairs(vae, 70, 30) == 70 * 30 * (3 if kind == "inferred" else 1)
