"""Comparisons of models whose log p(x) is known, and of runs that cannot be compared.

With an exact guide all importance weights of a row are equal: log p(x) is exact for each row, and
so are its differences. Each planted fault must change a number that a test compares.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIGMAS

import pyro_vae
from pyro_vae import InputError
from pyro_vae.config.columns import ColumnKind
from pyro_vae.data.splits import DataSpec, Split
from pyro_vae.evidence import comparison
from pyro_vae.evidence.candidates import Candidate, log_jacobian, same_values
from pyro_vae.evidence.comparison import compare
from pyro_vae.evidence.evaluation import evaluate
from pyro_vae.models.discrete_gaussian import DiscreteGaussian
from pyro_vae.models.labels import ConditionalVAE
from pyro_vae.models.linear_gaussian import LinearGaussian

D, Z = 4, 2


def linear(shift: float = 0.0, noise: float = 0.6, tilt: float = 0.2, **settings) -> LinearGaussian:
    """`tilt`: makes the latents dependent given x, so that a diagonal guide is worse."""
    torch.manual_seed(0)
    weight, loc = tilt * torch.randn(D, 1) + torch.randn(D, Z), torch.randn(D)
    return LinearGaussian(weight, loc + shift, noise, **settings)


def rows_of(count: int = 900) -> np.ndarray:
    torch.manual_seed(1)
    vae = linear()
    return vae.likelihood(vae.prior().sample((count,))).sample().detach().numpy()


X = rows_of()


def splits_of(seed: int = 0, test_size: int = 300) -> pyro_vae.Splits:
    return pyro_vae.load_data(X, seed=seed, test_size=test_size)


def candidate(name: str, vae, split=None, method: str | None = None, seed: int = 0) -> Candidate:
    split = splits_of().test if split is None else split
    return Candidate(name, vae, split, method or f"method {name}", seed)


def exact(vae: LinearGaussian, split: Split) -> np.ndarray:
    return vae.exact_log_evidence(torch.from_numpy(X[split.rows])).detach().double().numpy()


# --- over rows ------------------------------------------------------------------------------------


def test_differences_of_log_p_are_exact():
    models = {"true": linear(), "shifted": linear(0.3), "noisy": linear(noise=1.2)}
    found = compare([candidate(name, vae) for name, vae in models.items()], num_samples=30)
    measure, split = found.measures["log_evidence"], splits_of().test
    log_p = {name: exact(vae, split) for name, vae in models.items()}
    assert len(measure.differences) == 3
    for d in measure.differences:
        each = log_p[d.first] - log_p[d.second]
        assert d.estimate == pytest.approx(each.mean(), abs=1e-4)
        error = each.std(ddof=1) / math.sqrt(300)
        # 2.24 to 2.5 standard errors: simultaneous for three pairs with heavy tails
        assert 2.1 < (d.high - d.estimate) / error < 2.8
        assert d.count == 300
        # power: rows out of order have an interval more than 1.3 times as wide
        shuffled = log_p[d.first] - np.roll(log_p[d.second], 1)
        assert shuffled.std() > 1.3 * each.std()
    order = sorted(log_p, key=lambda name: -log_p[name].mean())
    assert measure.tiers == [[name] for name in order]
    assert order[0] == "true"
    assert measure.means == pytest.approx({n: v.mean() for n, v in log_p.items()}, abs=1e-4)
    assert max(found.monte_carlo_error.values()) < 1e-5
    assert found.underestimated == []
    assert (found.common, found.num_rows["true"], found.binarization) == (300, 300, "none")


def test_a_difference_of_guides_is_one_of_the_elbo_and_not_of_log_p():
    """The best diagonal guide loses the approximation gap in each row."""
    models = {"exact": linear(), "diagonal": linear(guide="diagonal")}
    gap = models["diagonal"].approximation_gap.item()
    found = compare([candidate(name, vae) for name, vae in models.items()], num_samples=3000)
    (elbo,) = found.measures["elbo"].differences
    assert elbo.low <= gap <= elbo.high
    assert elbo.high - elbo.low < 0.2 * gap
    assert found.measures["elbo"].tiers == [["exact"], ["diagonal"]]
    (density,) = found.measures["log_evidence"].differences
    assert abs(density.estimate) <= SIGMAS * found.monte_carlo_error["diagonal"]
    (kl,) = found.measures["kl"].differences
    (reconstruction,) = found.measures["reconstruction"].differences
    assert elbo.estimate == pytest.approx(reconstruction.estimate - kl.estimate, abs=1e-9)
    assert found.measures["kl"].tiers == found.measures["reconstruction"].tiers == []


def test_numbers_are_those_of_evaluate():
    vae, other, split = linear(guide="diagonal"), linear(0.2), splits_of().test
    found = compare([candidate("a", vae), candidate("b", other)], 40, num_rows=120, seed=3)
    for name, model in (("a", vae), ("b", other)):
        result = evaluate(model, split, 40, 120, seed=3)
        assert found.measures["log_evidence"].means[name] == pytest.approx(result.log_evidence)
        assert found.measures["elbo"].means[name] == pytest.approx(result.elbo)
        assert found.monte_carlo_error[name] == result.monte_carlo_error
        assert found.unreliable_weights[name] == result.unreliable_weights
    assert found.num_rows == {"a": 120, "b": 120}


def test_the_quick_comparison_has_no_log_p():
    found = compare([candidate("a", linear()), candidate("b", linear(0.5))], num_samples=None)
    assert set(found.measures) == {"elbo", "reconstruction", "kl"}
    assert found.monte_carlo_error == found.unreliable_weights == {}
    split = splits_of().test
    expected = (exact(linear(), split) - exact(linear(0.5), split)).mean()  # exact guides
    assert found.measures["elbo"].differences[0].low <= expected
    assert found.measures["elbo"].differences[0].high >= expected


def test_a_lower_bound_is_not_taken_for_a_lower_log_p():
    """One model with two guides: the weights of one are so bad that its interval excludes 0."""
    models = {"exact": linear(tilt=0.4), "diagonal": linear(tilt=0.4, guide="diagonal")}
    found = compare([candidate(name, vae) for name, vae in models.items()], num_samples=300)
    (d,) = found.measures["log_evidence"].differences
    assert d.sign == 1
    assert found.underestimated == ["diagonal"]
    assert found.measures["log_evidence"].tiers == [["exact"]]


def test_underestimated_models_have_no_rank():
    """A guide that is half as wide as the posterior has heavy-tailed weights."""
    models = {"a": linear(), "narrow": linear(scale_factor=0.4), "b": linear(0.5)}
    found = compare([candidate(name, vae) for name, vae in models.items()], num_samples=200)
    assert found.underestimated == ["narrow"]
    assert found.measures["log_evidence"].tiers == [["a"], ["b"]]
    assert {name for tier in found.measures["elbo"].tiers for name in tier} == set(models)


def test_a_row_that_alone_decides_is_named():
    values = X.copy()
    split = splits_of().test
    row = int(split.rows[17])
    values[row] = 1e4
    split = replace(split, values=torch.from_numpy(values))
    models = [candidate("a", linear(), split), candidate("b", linear(noise=0.9), split)]
    found = compare(models, num_samples=30)
    assert f"row {row} of the data (counted from 0) alone decides" in " ".join(found.notes)
    assert found.measures["log_evidence"].differences[0].sign == 0


def test_a_model_with_an_infinite_value_is_left_out_and_named(monkeypatch):
    original = comparison.evaluate_rows

    def evaluated(vae, *arguments):
        values = original(vae, *arguments)
        if vae is models[1].vae:
            values.log_evidence[5] = -torch.inf
        return values

    monkeypatch.setattr(comparison, "evaluate_rows", evaluated)
    models = [candidate(name, linear(shift)) for name, shift in (("a", 0), ("b", 0.2), ("c", 0.4))]
    found = compare(models, 30)
    assert set(found.measures["log_evidence"].means) == {"a", "c"}
    assert len(found.measures["elbo"].differences) == 3
    assert found.notes == ["log_evidence of b is infinite in 1 rows: left out"]


# --- splits ---------------------------------------------------------------------------------------


def test_only_rows_in_both_test_splits_are_compared():
    """Of other seeds. Each model is far worse on the rows that it was not trained on."""
    tests = [splits_of(seed).test for seed in (0, 1)]
    common = np.intersect1d(*(test.rows.numpy() for test in tests))
    assert 60 < len(common) < 140
    models = [linear(), linear(0.5)]
    both = [candidate(name, vae, test) for name, vae, test in zip("ab", models, tests, strict=True)]
    found = compare(both, num_samples=30)
    (d,) = found.measures["log_evidence"].differences
    log_p = [vae.exact_log_evidence(torch.from_numpy(X[common])) for vae in models]
    expected = (log_p[0] - log_p[1]).mean().item()
    assert (d.count, found.common) == (len(common), len(common))
    assert d.estimate == pytest.approx(expected, abs=1e-4)
    # power: the same number of rows by position, or all rows of both
    wrong = exact(models[0], tests[0])[: len(common)] - exact(models[1], tests[1])[: len(common)]
    assert abs(wrong.mean() - expected) > 1e-3
    every = found.measures["log_evidence"].means
    assert abs(every["a"] - every["b"] - expected) > 1e-3


def test_too_few_common_rows_are_refused():
    tests = [splits_of(seed, 60).test for seed in (0, 1)]
    both = [candidate(name, linear(), test) for name, test in zip("ab", tests, strict=True)]
    with pytest.raises(InputError, match=r"of 60 in a, 60 in b, fewer are common"):
        compare(both, num_samples=30)


def test_seeds_are_compared_where_rows_are_too_few():
    """Two methods with two seeds each; the runs of one seed share their split."""
    models = []
    for method, shift in (("first", 0.0), ("second", 0.4)):
        for seed in (0, 1):
            split = splits_of(seed, 60).test
            vae = linear(shift + 0.1 * seed)
            models.append(candidate(f"{method}{seed}", vae, split, method, seed))
    found = compare(models, num_samples=30)
    assert found.methods == {m: {0: f"{m}0", 1: f"{m}1"} for m in ("first", "second")}
    measure = found.measures["log_evidence"]
    assert {(d.first, d.second) for d in measure.differences} == {
        ("first0", "second0"),
        ("first1", "second1"),
    }
    (d,) = measure.over_seeds
    each = [
        (exact(models[s].vae, models[s].test) - exact(models[s + 2].vae, models[s].test)).mean()
        for s in (0, 1)
    ]
    assert d.estimate == pytest.approx(np.mean(each), abs=1e-4)
    assert (d.first, d.second, d.count) == ("first", "second", 2)
    assert (d.high - d.low) / 2 == pytest.approx(12.706 * abs(each[0] - each[1]) / 2, rel=1e-3)


def test_other_values_are_refused_and_equal_ones_are_shared():
    first, second = candidate("a", linear()), splits_of(1).test
    values = first.test.values
    shared = same_values(first, "b", replace(second, values=values.clone()))
    assert shared.values is values
    assert shared.rows is second.rows
    missing = values.clone()
    missing[0, 0] = torch.nan
    holes = replace(first, test=replace(first.test, values=missing))
    assert same_values(holes, "b", replace(second, values=missing.clone())).values is missing
    for other in (values + 1e-6, values[:-1], values.double(), missing):
        with pytest.raises(InputError, match="rows of b are not those of a"):
            same_values(first, "b", replace(second, values=other))


# --- x and its units ------------------------------------------------------------------------------


def grey(seed: int, likelihood: str = "bernoulli", **settings):
    """A model of images that a Bernoulli binarizes, and its splits by a seed."""
    images = np.random.default_rng(0).integers(0, 256, (900, 3, 3)).astype(np.uint8)
    splits = pyro_vae.load_data(images, seed=seed, test_size=400)
    config = pyro_vae.ModelConfig(latent_dim=2, hidden=(8,), likelihood=likelihood, **settings)
    torch.manual_seed(0)
    return pyro_vae.build(config, splits), splits


def test_the_binarization_of_a_row_is_the_same_for_all_models():
    """The KL of one model depends on x only: its differences are 0 in each common row."""
    vae, splits = grey(0)
    tests = [splits.test, grey(1)[1].test]
    both = [candidate(name, vae, test) for name, test in zip("ab", tests, strict=True)]
    found = compare(both, num_samples=None, seed=5)
    (kl,) = found.measures["kl"].differences
    assert kl.count > 100
    assert abs(kl.low) + abs(kl.high) < 1e-6
    assert found.binarization == "fixed, seed 5"
    # power: by the order of the own split, rows would be binarized differently
    own = [torch.cat(list(test.fixed("binary", 5))) for test in tests]
    places = [np.isin(a.rows, b.rows) for a, b in (tests, tests[::-1])]
    assert (own[0][places[0]] != own[1][places[1]]).any()
    other = compare(both, num_samples=None, seed=6)
    assert other.measures["kl"].means != found.measures["kl"].means


def test_with_one_split_the_binarization_is_that_of_evaluate():
    vae, splits = grey(0)
    found = compare(
        [candidate("a", vae, splits.test), candidate("b", vae, splits.test)], 30, seed=4
    )
    result = evaluate(vae, splits.test, 30, seed=4)
    assert found.measures["log_evidence"].means["a"] == pytest.approx(result.log_evidence)
    assert found.measures["kl"].means["a"] == pytest.approx(result.kl, rel=1e-6)


def test_densities_in_other_units_are_converted():
    """The same density of the values, by models of the value and of (value − offset) / scale."""
    scale, offset = 5.0, 2.0
    vae = linear()
    moved = LinearGaussian(
        vae.weight.detach() / scale, (vae.loc.detach() - offset) / scale, 0.6 / scale
    )
    split = splits_of().test
    spec = replace(split.spec, offset=(offset,) * D, scale=(scale,) * D)
    scaled = replace(split, spec=spec)
    found = compare([candidate("plain", vae), candidate("scaled", moved, scaled)], num_samples=30)
    for name in ("log_evidence", "elbo", "reconstruction"):
        assert abs(found.measures[name].differences[0].estimate) < 0.05, name
    assert abs(found.measures["log_evidence"].differences[0].estimate) < 1e-4
    assert f"in which they are {-D * math.log(scale):+.6g} nats per row" in found.notes[0]
    # power: without the conversion, log p(x) is higher by D log 5
    raw = evaluate(moved, scaled, 30).log_evidence - evaluate(vae, split, 30).log_evidence
    assert raw == pytest.approx(D * math.log(scale), abs=1e-3)


def test_only_observed_values_have_a_unit():
    vae, split = linear(), splits_of().test
    values = split.values.clone()
    values[split.rows[0], 1:] = torch.nan
    spec = replace(split.spec, offset=(0.0,) * D, scale=(2.0, 3.0, 4.0, 5.0), missing=True)
    found = log_jacobian(candidate("a", vae, replace(split, values=values, spec=spec)), split)
    assert found[1].item() == pytest.approx(-math.log(120))
    whole = replace(split, values=values)
    found = log_jacobian(candidate("a", vae, replace(split, values=values, spec=spec)), whole)
    assert found[0].item() == pytest.approx(-math.log(2))
    assert found[1].item() == pytest.approx(-math.log(120))


@pytest.mark.parametrize("likelihood", ["gaussian", "continuous-bernoulli"])
def test_bounded_values_are_converted_by_their_range(likelihood):
    vae, splits = grey(0, likelihood)
    c = candidate("a", vae, splits.test)
    assert log_jacobian(c, c.test)[0].item() == pytest.approx(-9 * math.log(255))
    counted, _ = grey(0, "discretized-logistic")
    assert not log_jacobian(candidate("a", counted, splits.test), c.test).any()


UNITS = {
    ("bernoulli", "binomial"): "probabilities of values binarized by --max-value 255",
    ("binomial", "gaussian"): "densities of the values",
    ("discretized-logistic", "continuous-bernoulli"): "densities of the values",
    ("bernoulli", "gaussian"): "densities of the values",
}


@pytest.mark.parametrize("pair", UNITS, ids="-".join)
def test_probabilities_and_densities_are_not_compared(pair):
    both = [candidate(name, *unpacked(name)) for name in pair]
    with pytest.raises(InputError, match=f"{UNITS[pair]}.*compare models of one kind"):
        compare(both, num_samples=30)


def unpacked(likelihood):
    vae, splits = grey(0, likelihood)
    return vae, splits.test


@pytest.mark.parametrize("pair", [("binomial", "discretized-logistic"), ("gaussian", "gaussian")])
def test_likelihoods_of_one_kind_are_compared(pair):
    both = [candidate(f"{k}", *unpacked(name)) for k, name in enumerate(pair)]
    assert len(compare(both, num_samples=None).measures["elbo"].differences) == 1


def test_columns_of_both_kinds_are_not_compared_with_densities_of_all():
    from pyro_vae.evidence.candidates import _unit_of

    kinds = (ColumnKind("gaussian"), ColumnKind("poisson"))
    spec = DataSpec((2,), None, discrete=False, columns=("age", "visits"), kinds=kinds)
    split = replace(splits_of().test, spec=spec)
    assert _unit_of(candidate("a", linear(), split)) == (
        "densities of the columns age and probabilities of the others"
    )
    both = replace(spec, kinds=(kinds[0], kinds[0]))
    split = replace(split, spec=both)
    assert _unit_of(candidate("a", linear(), split)) == "densities of the values"


def test_an_autoencoder_is_compared_by_its_reconstruction_only():
    vae, splits = grey(0, "binomial")
    ae, _ = grey(0, "binomial", kind="ae")
    found = compare([candidate("vae", vae, splits.test), candidate("ae", ae, splits.test)], 30)
    (d,) = found.measures["reconstruction"].differences
    assert (d.first, d.second, d.count) == ("vae", "ae", 400)
    assert found.measures["reconstruction"].means["ae"] == pytest.approx(
        evaluate(ae, splits.test).reconstruction
    )
    assert found.measures["elbo"].differences == []
    assert set(found.measures["log_evidence"].means) == {"vae"}


# --- labels ---------------------------------------------------------------------------------------


def labelled(**faults) -> DiscreteGaussian:
    torch.manual_seed(1)
    weight, loc = torch.randn(4, 2), torch.randn(3, 4)
    return DiscreteGaussian(weight, loc, 0.7, torch.tensor([0.2, 0.5, 0.3]), **faults)


@pytest.fixture(scope="module")
def labelled_rows() -> Split:
    torch.manual_seed(2)
    vae = labelled()
    y = vae.label_prior().sample((300,))
    x = vae.likelihood(vae.prior().sample((300,)), y).sample().detach()
    return pyro_vae.load_data((x, y), test_size=200).test


def given(vae: DiscreteGaussian) -> ConditionalVAE:
    parts = vae.prior_module, vae.encoder, vae.decoder, vae.likelihood_module
    return ConditionalVAE(*parts, vae.label_logits.exp(), vae.family)


def test_accuracies_are_paired_row_by_row(labelled_rows):
    """A guide that takes classes 1 and 2 for each other, beside an exact one."""
    wrong = labelled(order=torch.tensor([0, 2, 1]))
    hidden = labelled_rows.labels.clone()
    hidden[::4] = -1
    split = replace(labelled_rows, labels=hidden)
    found = compare([candidate("a", labelled(), split), candidate("b", wrong, split)], 30)
    x, y = labelled_rows.values[labelled_rows.rows], labelled_rows.labels
    right = labelled().exact_log_joint(x).argmax(-1)
    mistaken = torch.tensor([0, 2, 1])[right]
    known = hidden >= 0
    expected = ((right == y).double() - (mistaken == y).double())[known].mean().item()
    (d,) = found.measures["accuracy"].differences
    assert (d.estimate, d.count) == (pytest.approx(expected), int(known.sum()))
    assert d.sign == 1
    (bayes,) = found.measures["bayes_accuracy"].differences
    assert (bayes.estimate, bayes.sign) == (0, 0)  # p(y|x) is the same model's
    assert found.measures["accuracy"].tiers == [["a"], ["b"]]
    assert found.given_labels is False


def test_accuracies_of_other_splits_are_paired_by_the_row():
    """Some labels are not known, and each split has rows that the other has not."""
    torch.manual_seed(2)
    vae, wrong = labelled(), labelled(order=torch.tensor([0, 2, 1]))
    y = vae.label_prior().sample((300,))
    x = vae.likelihood(vae.prior().sample((300,)), y).sample().detach()
    hidden = torch.where(torch.arange(300) % 3 == 0, -1, y)
    tests = [pyro_vae.load_data((x, y), seed=seed, test_size=200).test for seed in (0, 1)]
    tests = [replace(test, labels=hidden[test.rows]) for test in tests]
    both = [candidate("a", vae, tests[0]), candidate("b", wrong, tests[1])]
    (d,) = compare(both, 30).measures["accuracy"].differences
    common = np.intersect1d(tests[0].rows, tests[1].rows)
    common = common[common % 3 > 0]
    right = vae.exact_log_joint(x).argmax(-1)
    mistaken = torch.tensor([0, 2, 1])[right]
    expected = ((right == y).double() - (mistaken == y).double())[common].mean().item()
    assert (d.count, d.estimate) == (len(common), pytest.approx(expected))


def test_log_p_given_labels_is_compared_among_conditional_models_only(labelled_rows):
    conditional = candidate("a", given(labelled()), labelled_rows)
    with pytest.raises(InputError, match=r"b has log p\(x\): compare conditional models among"):
        compare([conditional, candidate("b", labelled(), labelled_rows)], 30)
    found = compare([conditional, candidate("b", given(labelled()), labelled_rows)], 30)
    assert found.given_labels is True
    assert found.measures["log_evidence"].differences[0].sign == 0


def test_other_labels_of_the_same_rows_are_refused(labelled_rows):
    shifted = replace(labelled_rows, labels=(labelled_rows.labels + 1) % 3)
    both = [
        candidate("a", given(labelled()), labelled_rows),
        candidate("b", given(labelled()), shifted),
    ]
    with pytest.raises(InputError, match=r"expected the same labels; row \d+ of the data"):
        compare(both, 30)


@pytest.mark.parametrize("num_samples", [30, None])
def test_the_random_state_is_restored(num_samples):
    both = [candidate("a", linear()), candidate("b", linear(0.1))]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = compare(both, num_samples)
    assert torch.equal(torch.rand(3), expected)
    assert compare(both, num_samples) == first
