"""Models with labels, against the exact evidence of a mixture of linear Gaussians.

With an exact guide, log w does not depend on the draw of z: the ELBO with labels summed out has no
variance, and equals −log p(x) to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch
from conftest import SIGMAS, all_likelihoods, batch, example_vae
from pyro.distributions import Categorical
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_vae
from pyro_vae import InputError, ModelConfig
from pyro_vae.config.families import RefinedGuide
from pyro_vae.models import labels as module
from pyro_vae.models.build import _assemble, build, new_guide
from pyro_vae.models.discrete_gaussian import DiscreteGaussian
from pyro_vae.models.labels import (
    ConditionalVAE,
    SemiSupervisedVAE,
    at_rows,
    class_number,
    one_hot,
)
from pyro_vae.models.log_weights import log_weights

SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LOSS = TraceEnum_ELBO(max_plate_nesting=1)


def oracle(**faults):
    """A model of 3 classes with an exact guide, 12 rows and their labels; in float64."""
    torch.manual_seed(3)
    weight = torch.randn(4, 2, dtype=torch.float64)
    loc = 1.5 * torch.randn(3, 4, dtype=torch.float64)
    vae = DiscreteGaussian(weight, loc, 0.7, SHARES, **faults)
    y = torch.tensor([0, 1, 2] * 4)
    x = vae.likelihood(vae.prior().sample((12,)), y).sample().detach()
    return vae, x, y


UNKNOWN = torch.full((12,), -1)
SOME = torch.tensor([0, -1, 2, -1, -1, 2, 0, 1, -1, 0, 1, -1])


def exact(vae, x, y):
    """log p(x) of rows without a label, log p(x, y) of the others, summed."""
    joint = vae.exact_log_joint(x)
    known = joint.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(y < 0, joint.logsumexp(-1), known).sum().item()


@pytest.mark.parametrize("labels", [UNKNOWN, SOME], ids=["none known", "some known"])
def test_the_enumerated_elbo_of_an_exact_guide_is_the_evidence(labels):
    vae, x, _ = oracle()
    for _ in range(3):  # at any draw of z
        loss = LOSS.loss(vae.model, vae.guide, x, labels)
        assert loss == pytest.approx(-exact(vae, x, labels), abs=1e-10)


def test_the_exact_log_joint_is_that_of_quadrature():
    """The oracle's own closed form, by a fine grid over z."""
    torch.manual_seed(0)
    weight, loc = torch.randn(2, 1, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    vae = DiscreteGaussian(weight, loc, 0.7, SHARES)
    x = torch.randn(5, 2, dtype=torch.float64)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None, None]
    for k in range(3):
        values = vae.likelihood(z, torch.tensor(k)).log_prob(x) + vae.prior().log_prob(z)
        integral = values.logsumexp(0) + (z[1] - z[0]).log().squeeze()
        expected = vae.exact_log_joint(x)[:, k] - SHARES[k].log()
        assert torch.allclose(integral, expected, atol=1e-10)


FAULTS = {
    "p(y) forgotten": lambda m: m.setattr(
        DiscreteGaussian, "label_prior", lambda self: Categorical(logits=torch.zeros(3).double())
    ),
    "labels shifted by one in p(x|z, y)": lambda m: m.setattr(
        DiscreteGaussian,
        "likelihood",
        lambda self, z, y: ConditionalVAE.likelihood(self, z, (y + 1) % 3),
    ),
    "q(z|x, y) at the wrong label": lambda m: m.setattr(
        DiscreteGaussian,
        "posterior",
        lambda self, x, y: ConditionalVAE.posterior(self, x, (y + 1) % 3),
    ),
    "known labels not used": lambda m: m.setattr(
        DiscreteGaussian,
        "label_posterior",
        lambda self, x, y=None: SemiSupervisedVAE.label_posterior(self, x),
    ),
    "unknown labels used": lambda m: m.setattr(
        DiscreteGaussian,
        "label_posterior",
        lambda self, x, y=None: SemiSupervisedVAE.label_posterior(self, x, y.clamp_min(0)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_the_elbo(fault, monkeypatch):
    vae, x, _ = oracle()
    FAULTS[fault](monkeypatch)
    loss = LOSS.loss(vae.model, vae.guide, x, SOME)
    assert abs(loss + exact(oracle()[0], x, SOME)) > 0.01


@pytest.mark.parametrize(
    "faults", [{"temperature": 2.0}, {"order": torch.tensor([1, 0, 2])}], ids=str
)
def test_another_classifier_lowers_the_elbo_by_its_divergence(faults):
    """By KL(q(y|x) ‖ p(y|x)) exactly: the guide of z is exact at each label."""
    vae, x, _ = oracle(**faults)
    joint = vae.exact_log_joint(x)
    log_p = joint.log_softmax(-1)
    log_q = vae.label_posterior(x).logits
    divergence = (log_q.exp() * (log_q - log_p)).sum()
    loss = LOSS.loss(vae.model, vae.guide, x, UNKNOWN)
    assert loss == pytest.approx(-(exact(vae, x, UNKNOWN) - divergence.item()), abs=1e-9)
    assert divergence > 0.01


def test_the_gradient_of_the_enumerated_elbo_is_that_of_the_evidence():
    """On average over draws of z. The classifier's own is 0 at each draw, as q(y|x) is exact.

    33 comparisons at four standard errors.
    """
    vae, x, _ = oracle()
    shared = {n: p for n, p in vae.named_parameters() if n.split(".")[0] in ("decoder",)}
    shared["log_scale"] = vae.likelihood_module.log_scale
    evidence = vae.exact_log_evidence(x).sum()
    expected = torch.autograd.grad(-evidence, shared.values())
    classifier = list(vae.classifier.parameters())
    found = []
    for _ in range(150):
        loss = LOSS.differentiable_loss(vae.model, vae.guide, x, UNKNOWN)
        gradients = torch.autograd.grad(loss, [*shared.values(), *classifier])
        found.append(torch.cat([g.flatten() for g in gradients[: len(shared)]]))
        for gradient in gradients[len(shared) :]:
            assert gradient.abs().max() < 1e-9
    draws, target = torch.stack(found), torch.cat([g.flatten() for g in expected])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - target).abs() < SIGMAS * error + 1e-9).all()
    assert (error < 0.2 * target.abs().max()).all()  # enough draws to see a fault


def test_elbo_terms_average_to_the_enumerated_elbo():
    vae, x, _ = oracle()
    draws = []
    for _ in range(500):
        reconstruction, kl = vae.elbo_terms(x, SOME)
        assert (kl > 0).all()
        draws.append((reconstruction - kl).sum())
    draws = torch.stack(draws)
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact(vae, x, SOME)) < SIGMAS * error
    assert error < 1


def test_at_a_label_it_is_an_ordinary_vae():
    """Its importance weights are p(x|y) exactly, at one label or one for each row."""
    vae, x, y = oracle()
    joint = vae.exact_log_joint(x) - vae.label_logits
    for label, expected in [(1, joint[:, 1]), (y, joint.gather(-1, y[:, None]).squeeze(-1))]:
        given = vae.given(label)
        assert isinstance(given, pyro_vae.VAE)
        q = given.posterior(x)
        _, log_w = log_weights(given, q, x, q.sample((5,)))
        assert torch.allclose(log_w, expected.expand(5, -1), atol=1e-10)


def test_it_shares_its_modules_with_the_model_at_a_label():
    vae, *_ = oracle()
    given = vae.given(2)
    before = given.likelihood(torch.zeros(1, 2).double()).mean
    with torch.no_grad():
        vae.decoder.loc += 1.0
    assert torch.allclose(given.likelihood(torch.zeros(1, 2).double()).mean, before + 1)
    assert {id(p) for p in given.parameters()} <= {id(p) for p in vae.parameters()}


def test_a_known_label_has_probability_one_and_finite_gradients():
    vae, x, y = oracle()
    with torch.no_grad():
        vae.classifier.log_shares += torch.tensor([0.0, 500.0, -500.0]).double()  # very sure
    for dtype in (torch.float32, torch.float64):
        vae, x = vae.to(dtype), x.to(dtype)
        q = vae.label_posterior(x, y)
        assert torch.equal(q.probs, one_hot(y, q.probs))
        loss = LOSS.differentiable_loss(vae.model, vae.guide, x, SOME)
        gradients = torch.autograd.grad(loss, list(vae.parameters()))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients)


def test_the_classification_term_adds_log_q_of_the_known_labels():
    vae, x, y = oracle(temperature=2.0)
    plain = LOSS.loss(vae.model, vae.guide, x, UNKNOWN)
    rows, labels = x[:5], y[:5]
    more = LOSS.loss(vae.model, vae.guide, x, UNKNOWN, rows, labels, classification_weight=7.0)
    q = vae.label_posterior(rows).log_prob(labels).sum().item()
    assert more - plain == pytest.approx(-7 * q, abs=1e-9)
    assert -q > 0.01


@cache
def digits(labelled=None):
    return pyro_vae.load_data("digits", labelled=labelled)


def small(condition, **settings):
    splits = digits(100 if condition == "partial" else None)
    settings = {"latent_dim": 3, "hidden": (8,), "condition": condition, **settings}
    return build(ModelConfig(**settings), splits), splits


@pytest.mark.parametrize("condition", ["label", "partial"])
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_every_parameter_has_a_gradient(condition, architecture):
    vae, splits = small(condition, architecture=architecture)
    x = next(splits.train.fixed("count", 0, 20))
    y = splits.train.labels[:20]
    elbo = LOSS if condition == "partial" else Trace_ELBO()
    elbo.differentiable_loss(vae.model, vae.guide, x, y).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("guide", ["diagonal", "full", "flow", "mixture"])
@pytest.mark.parametrize("prior", ["normal", "mixture", "flow"])
def test_every_family_works_assemble(guide, prior):
    vae, splits = small("partial", guide={"family": guide}, prior={"family": prior})
    x, y = next(splits.train.fixed("count", 0, 6)), splits.train.labels[:6]
    assert torch.tensor(LOSS.loss(vae.model, vae.guide, x, y)).isfinite()
    reconstruction, kl = vae.elbo_terms(x, y)
    assert reconstruction.shape == kl.shape == (6,)
    assert vae.posterior(x, y.clamp_min(0)).sample().shape == (6, 3)


@all_likelihoods
def test_svi_maximizes_the_elbo_of_the_three_distributions(name, tmp_path, monkeypatch):
    """The loss of a conditional model, from `prior`, `likelihood` and `posterior` by hand."""
    plain, splits = example_vae(name, tmp_path)
    x = batch(splits, name)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    likelihood = plain.likelihood_module
    spec = dataclasses.replace(likelihood.spec, classes=("a", "b", "c"))
    monkeypatch.setattr(likelihood, "spec", spec)
    config = ModelConfig(latent_dim=3, hidden=(16,), likelihood=name, condition="label")
    vae = _assemble(config, likelihood).double()
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x, y)
    torch.manual_seed(1)
    q = vae.posterior(x, y)
    z = q.rsample()
    log_w = vae.likelihood(z, y).log_prob(x) + vae.prior().log_prob(z) - q.log_prob(z)
    assert loss == pytest.approx(-log_w.sum().item(), rel=1e-9)
    torch.manual_seed(1)
    given = vae.given(y)  # the same at the labels
    assert Trace_ELBO().loss(given.model, given.guide, x) == pytest.approx(loss, rel=1e-12)


def test_the_label_changes_encoder_and_decoder():
    """At new weights already, and in interaction with x and z."""
    vae, splits = small("label")
    x = next(splits.train.fixed("count", 0, 4))
    means = [vae.given(k).posterior(x).mean for k in range(3)]
    assert (means[0] - means[1]).abs().max() > 1e-4
    assert ((means[0] - means[1]).std(0) > 1e-6).any()  # not the same shift for each x
    z = torch.zeros(1, 3)
    assert (vae.given(0).likelihood(z).mean - vae.given(1).likelihood(z).mean).abs().max() > 1e-4


def test_a_model_for_rows_takes_their_labels_or_the_most_probable():
    vae, x, _ = oracle()
    at = at_rows(vae, x, None).encoder.label.argmax(-1)
    assert torch.equal(at, vae.classifier(x).argmax(-1))
    conditional, splits = small("label")
    rows, labels = next(splits.test.fixed("count", 0, 4)), splits.test.labels[:4]
    assert torch.equal(at_rows(conditional, rows, labels).encoder.label.argmax(-1), labels)
    plain = pyro_vae.build(ModelConfig(latent_dim=2, hidden=(4,)), digits())
    assert at_rows(plain, rows, labels) is plain
    for missing in (None, torch.tensor([1, -1, 2, 3])):
        with pytest.raises(InputError, match="the label of each row"):
            at_rows(conditional, rows, missing)


@pytest.mark.parametrize(
    ("label", "names", "expected"),
    [
        (1, ("3", "7"), 1),
        ("7", ("3", "7"), 1),
        ("cat", ("cat", "dog"), 0),
        ("1", ("cat", "dog"), 1),
        (-1, ("3", "7"), "expects one of 3, 7, or a number from 0 to 1; got -1"),
        (2, ("3", "7"), "got 2"),
        ("1", ("3", "7"), "expects one of 3, 7; got '1'"),
        ("cow", ("cat", "dog"), "expects one of cat, dog, or a number from 0 to 1; got 'cow'"),
        ("", ("cat", "dog"), "got ''"),
    ],
)
def test_a_class_is_a_number_or_a_name(label, names, expected):
    if isinstance(expected, int):
        assert class_number(label, names) == expected
    else:
        with pytest.raises(InputError, match=expected):
            class_number(label, names)


def test_a_copy_in_float64_keeps_its_label():
    vae, _ = small("label")
    given = copy.deepcopy(vae.given("3")).double()
    z = torch.randn(2, 3, dtype=torch.float64)
    expected = vae.given(3).likelihood(z.float()).mean
    assert torch.allclose(given.likelihood(z).mean.float(), expected, atol=1e-4)


def test_a_refined_posterior_is_found_class_by_class():
    vae, splits = small("label")
    new = new_guide(vae, RefinedGuide(newton=2, sweeps=1), None)
    x, y = next(splits.test.fixed("count", 0, 9)), splits.test.labels[:9]
    together = new.posterior(x, y)
    for k in y.unique().tolist():
        own = new.given(k).posterior(x[y == k])
        assert torch.allclose(together.loc[y == k], own.loc, atol=1e-5)
        assert torch.allclose(together.scale_tril[y == k], own.scale_tril, atol=1e-5)
    with pytest.raises(InputError, match="expects --guide refined"):
        new_guide(vae, pyro_vae.ModelConfig().guide, None)
    with pytest.raises(InputError, match="labels that are given"):
        new_guide(small("partial")[0], RefinedGuide(), None)


def test_settings_that_do_not_go_together_are_refused():
    for settings, expected in [
        ({"condition": "label", "kind": "ae"}, "no effect on --model ae"),
        ({"condition": "label", "prior": {"family": "vamp"}}, "pseudo-inputs have no label"),
    ]:
        with pytest.raises(InputError, match=expected):
            ModelConfig(**settings)
    config, data, fit = pyro_vae.Config, pyro_vae.DataConfig, pyro_vae.FitConfig
    assert config(data=data(labelled=50)).model.condition == "partial"
    with pytest.raises(InputError, match="drop --labelled"):
        config(data=data(labelled=50), model=ModelConfig(condition="label"))
    with pytest.raises(InputError, match="no effect on --model ae"):
        config(data=data(labelled=50), model=ModelConfig(kind="ae"))
    with pytest.raises(InputError, match="--classification-weight has no effect"):
        config(fit=fit(classification_weight=3.0))
    for changed in ({"objective": "iwae"}, {"num_particles": 3}, {"beta": 2.0}, {"kl_warmup": 0.5}):
        with pytest.raises(InputError, match="--condition partial sums over the labels"):
            config(data=data(labelled=50), fit=fit(**changed))
    with pytest.raises(InputError, match="--refit on expects labels that are given"):
        config(data=data(labelled=50), refit="on")


def test_the_constant_of_a_known_label_is_far_enough():
    """0 · log 0 must not arise, and other labels must have no share, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([0.0, module.NEVER], dtype=dtype)
        q = Categorical(logits=logits)
        assert q.probs[1] == 0
        assert (q.probs * q.logits).sum() == 0


@pytest.mark.parametrize("condition", ["none", "label"])
def test_a_refined_guide_starts_from_draws_of_the_prior(condition):
    """At SIGMAS standard errors of the mean of the starts."""
    splits = pyro_vae.load_data("digits")
    vae = build(ModelConfig(latent_dim=2, hidden=(4,), condition=condition), splits)
    vae.prior_module.loc.fill_(7.0)
    one, again, other = (new_guide(vae, RefinedGuide(), None, k).family.starts for k in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (abs(one.mean(0) - 7) < SIGMAS / len(one) ** 0.5).all()
    assert len(one.unique(dim=0)) == len(one)


def test_labels_of_other_rows_are_refused():
    """Which would be broadcast, or fail somewhere in a network."""
    vae, splits = small("label")
    x, y = next(splits.train.fixed("count", 0, 6)), torch.arange(6)
    assert vae.given(y).posterior(x[:6]).mean.shape[0] == 6
    for rows in (x[:1], x[:4]):
        with pytest.raises(ValueError, match=f"labels of 6 rows; got {len(rows)} rows"):
            vae.given(y).posterior(rows)
