"""Training of models with labels: rows of a step, capture, hidden labels, checkpoints, refits."""

from __future__ import annotations

import dataclasses
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import SIGMAS

import pyro_vae
from pyro_vae import FitConfig, InputError, ModelConfig
from pyro_vae.config.families import RefinedGuide, RefitConfig
from pyro_vae.config.options import Objective
from pyro_vae.data.labels import hide_labels, with_classes
from pyro_vae.evidence.evaluation import elbo_terms
from pyro_vae.models.build import build
from pyro_vae.models.discrete_gaussian import DiscreteGaussian
from pyro_vae.models.labels import ConditionalVAE
from pyro_vae.training import checks, loop, modes
from pyro_vae.training.checkpoint import load_checkpoint, serialize
from pyro_vae.training.refitting import refit
from pyro_vae.training.rows import classification_weight, step_rows

random = np.random.default_rng(0)
Y = random.integers(0, 3, 150)
X = (2 * np.eye(3)[Y] @ random.normal(size=(3, 4)) + random.normal(size=(150, 4))).astype("f4")
SMALL = {"latent_dim": 2, "hidden": (8,)}


def data(labelled=None):
    return with_classes(pyro_vae.load_data((X, Y), labelled=labelled))


def model(condition, splits, seed=0, **settings):
    return build(ModelConfig(**{**SMALL, "condition": condition, **settings}), splits, seed)


def weights(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compiled", ["graph", "eager"])
def test_a_captured_step_equals_an_eager_one(compiled, monkeypatch):
    """Of a conditional model: the same weights after some steps, to rounding."""
    splits, found = data(), []
    for mode in (compiled, "eager"):
        monkeypatch.setattr(loop, "run_mode", lambda *_, mode=mode: mode)
        vae = model("label", splits)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyro_vae.fit(vae, splits, FitConfig(epochs=2, batch_size=20))
        found.append(weights(vae))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-5), name


def test_labels_are_inputs_of_a_captured_step(monkeypatch):
    """A graph that kept the labels of its capture would train the same weights on others."""
    monkeypatch.setattr(loop, "run_mode", lambda *_: "graph")
    splits, found = data(), []
    for shift in (0, 1):
        vae = model("label", splits)
        labels = splits.train.labels
        train = dataclasses.replace(
            splits.train, labels=torch.cat([labels[:40], (labels[40:] + shift) % 3])
        )
        pyro_vae.fit(vae, dataclasses.replace(splits, train=train), FitConfig(epochs=2))
        found.append(weights(vae))
    assert not same(*found)


def test_the_sum_over_labels_runs_eagerly():
    splits = data(30)
    long = FitConfig(epochs=10_000)
    assert modes.run_mode(long, splits.train, inferred=True) == "eager"
    assert modes.run_mode(long, splits.train) != "eager"


def test_hidden_labels_cannot_leak():
    """Other labels of the hidden rows: bit-equal weights, records and accuracies."""
    whole = with_classes(pyro_vae.load_data((X, Y)))
    hidden = hide_labels(whole, 30, 0)
    where = (hidden.train.labels < 0).nonzero().flatten()
    changed = whole.train.labels.clone()
    changed[where] = (changed[where] + 1) % 3
    others = dataclasses.replace(whole, train=dataclasses.replace(whole.train, labels=changed))
    kept = torch.where(hidden.train.labels < 0, -1, others.train.labels)
    again = dataclasses.replace(others, train=dataclasses.replace(others.train, labels=kept))
    found = []
    for splits in (hidden, again):
        vae = model("partial", splits)
        records = pyro_vae.fit(vae, splits, FitConfig(epochs=3, batch_size=20))
        lines = [{k: v for k, v in r.metrics().items() if "second" not in k} for r in records]
        found.append((weights(vae), lines))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    shown = dataclasses.replace(hidden, train=others.train)  # power: known labels do count
    vae = model("partial", shown)
    pyro_vae.fit(vae, shown, FitConfig(epochs=3, batch_size=20))
    assert not same(found[0][0], weights(vae))


def test_the_rows_of_a_step():
    splits = data(30)
    vae, index = model("partial", splits), torch.arange(40)
    x, y, rows, labels = step_rows(vae, splits.train, index, 7, 3)
    assert torch.equal(y, splits.train.labels[:40])
    assert torch.equal(x, splits.train.take(index, "real"))
    assert (labels >= 0).all()
    everything = splits.train.take(torch.arange(len(splits.train)), "real")
    for row, label in zip(rows, labels, strict=True):
        place = (everything == row).all(1).nonzero().flatten()
        assert splits.train.labels[place] == label
    again = step_rows(vae, splits.train, index, 7, 3)
    assert torch.equal(rows, again[2])
    assert not torch.equal(rows, step_rows(vae, splits.train, index, 7, 4)[2])
    plain = build(ModelConfig(**SMALL), splits)
    assert len(step_rows(plain, splits.train, index, 7, 3)) == 1
    assert len(step_rows(model("label", data()), data().train, index, 7, 3)) == 2


def test_the_classification_term_has_the_expectation_of_its_sum_over_labelled_rows():
    """One comparison at four standard errors."""
    splits, config = data(30), FitConfig(classification_weight=5.0)
    vae = model("partial", splits)
    weight = classification_weight(splits.train, config)
    known = (splits.train.labels >= 0).nonzero().flatten()
    everything = splits.train.take(torch.arange(len(splits.train)), "real")

    def log_q(x, y):
        return vae.label_posterior(x).log_prob(y).sum().item()

    target = 5 * log_q(everything[known], splits.train.labels[known])
    sums, count = [], len(splits.train)
    for epoch in range(200):
        batches = torch.arange(count).split(50)
        parts = [step_rows(vae, splits.train, b, epoch, i)[2:] for i, b in enumerate(batches)]
        sums.append(weight * sum(log_q(*part) for part in parts))
    error = np.std(sums, ddof=1) / 200**0.5
    assert abs(np.mean(sums) - target) < SIGMAS * error
    assert error < 0.05 * abs(target)


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one():
    splits, config = data(30), FitConfig(epochs=3, batch_size=32)
    whole = model("partial", splits)
    pyro_vae.fit(whole, splits, config)
    part, states = model("partial", splits), []

    def stop(progress):
        states.append(progress.state())
        return progress.step == 6

    pyro_vae.fit(part, splits, config, on_step=stop)
    pyro_vae.fit(part, splits, config, state=states[-1])
    assert same(weights(whole), weights(part))


def test_training_recovers_the_classes_of_a_mixture():
    """From 12 labels of 600 rows of well separated classes, and reports it for each epoch."""
    torch.manual_seed(0)
    weight, loc = 0.3 * torch.randn(4, 1), 3 * torch.eye(4)[:3]
    truth = DiscreteGaussian(weight, loc, 0.5, torch.tensor([0.2, 0.5, 0.3]))
    y = truth.label_prior().sample((600,))
    x = truth.likelihood(truth.prior().sample((600,)), y).sample().detach()
    splits = pyro_vae.load_data((x, y), labelled=12)
    vae = model("partial", splits, likelihood="gaussian", latent_dim=1, hidden=(32,))
    records = pyro_vae.fit(vae, splits, FitConfig(epochs=30, batch_size=50))
    assert records[-1].metrics()["validation_accuracy"] > 0.95
    elbo, evidence = elbo_terms(vae, splits.test), truth.exact_log_evidence(x[splits.test.rows])
    assert elbo[0] - elbo[1] > evidence.mean().item() - 2
    plain = pyro_vae.fit(build(ModelConfig(**SMALL), splits), splits, FitConfig(epochs=1))
    assert "validation_accuracy" not in plain[0].metrics()


@pytest.mark.parametrize("objective", get_args(Objective))
def test_every_objective_trains_a_conditional_model(objective):
    splits = data()
    vae = model("label", splits)
    before = weights(vae)
    particles = 1 if objective in ("free-bits", "beta-tc", "mmd", "mean-field") else 8
    config = FitConfig(objective=objective, num_particles=particles, epochs=1)
    (record,) = pyro_vae.fit(vae, splits, config)
    assert np.isfinite(record.validation_elbo)
    assert np.isfinite(record.train_elbo)
    assert not same(before, weights(vae))


def test_reported_terms_are_those_of_the_model():
    """Training's reconstruction and KL, without a change of weights, against `elbo_terms`.

    Four comparisons at four standard errors.
    """
    for condition, labelled in [("label", None), ("partial", 30)]:
        splits = data(labelled)
        vae = model(condition, splits)
        config = FitConfig(epochs=30, learning_rate=1e-12)
        records = pyro_vae.fit(vae, splits, config)
        x = splits.train.take(torch.arange(len(splits.train)), "real")
        draws = [vae.elbo_terms(x, splits.train.labels) for _ in range(60)]
        for i, name in enumerate(("reconstruction", "kl")):
            own = torch.stack([terms[i].mean() for terms in draws]).double()
            found = torch.tensor([getattr(record, name) for record in records]).double()
            error = (own.var() / 60 + found.var() / 30).sqrt()
            assert abs(own.mean() - found.mean()) < SIGMAS * error + 1e-5


def test_a_model_with_labels_needs_them():
    splits = data()
    vae = model("label", splits)
    for change in (None, torch.full_like(splits.train.labels, -1)):
        train = dataclasses.replace(splits.train, labels=change)
        with pytest.raises(InputError, match="training rows without one: --condition partial"):
            pyro_vae.fit(vae, dataclasses.replace(splits, train=train), FitConfig(epochs=1))
    higher = dataclasses.replace(splits.train, labels=splits.train.labels + 1)
    with pytest.raises(InputError, match="labels below 3"):
        pyro_vae.fit(vae, dataclasses.replace(splits, train=higher), FitConfig(epochs=1))
    with pytest.raises(InputError, match="has none"):
        model("label", pyro_vae.load_data(X))
    inferred = model("partial", data(30))
    with pytest.raises(InputError, match="expects the objective trace"):
        checks.check_model(inferred, data(30), FitConfig(objective="iwae"))


@pytest.mark.parametrize(("condition", "labelled"), [("label", None), ("partial", 30)])
def test_a_checkpoint_restores_model_classes_and_shares(condition, labelled, tmp_path):
    splits = data(labelled)
    vae = model(condition, splits)
    config = pyro_vae.Config(
        pyro_vae.DataConfig(labelled=labelled),
        ModelConfig(**SMALL, condition=condition, likelihood="gaussian"),
    )
    path = tmp_path / "model.pt"
    path.write_bytes(serialize(vae, config, splits, []))
    loaded = pyro_vae.load(path)
    assert type(loaded) is type(vae)
    assert loaded.class_names == ("0", "1", "2")
    assert same(weights(vae), weights(loaded))
    shares = torch.bincount(splits.train.labels[splits.train.labels >= 0]).double()
    assert torch.allclose(loaded.label_logits.exp().double(), shares / shares.sum(), atol=1e-6)
    x = torch.tensor(X[:5])
    for label in (2, "2"):
        found = loaded.given(label).posterior(x).mean
        assert torch.equal(found, vae.eval().given(2).posterior(x).mean)
    assert load_checkpoint(path).fingerprint == splits.fingerprint


def test_a_refit_of_a_conditional_model_raises_its_elbo():
    splits = data()
    vae = model("label", splits)
    pyro_vae.fit(vae, splits, FitConfig(epochs=20, batch_size=32))
    config = RefitConfig(guide=RefinedGuide())
    refitted = refit(vae, splits, config)
    assert type(refitted) is ConditionalVAE
    before, after = (np.subtract(*elbo_terms(one, splits.test)).item() for one in (vae, refitted))
    assert after > before
    assert same(weights(vae.decoder), weights(refitted.decoder))
    assert float(refitted.family.width) != 1.0  # tails were fitted to rows of all classes
