"""The wiring of a training, by sentinel data: each split's rows lie in a range of their own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI
from torch.distributions import kl_divergence

import pyro_vae
from pyro_vae import FitConfig
from pyro_vae.capture.captured import CapturedSVI
from pyro_vae.capture.optimizer import NonFiniteGradient
from pyro_vae.data.splits import DataSpec, Split, Splits
from pyro_vae.evidence.evaluation import elbo_terms
from pyro_vae.runtime.randomness import OwnState, RandomStates, derive, random_states
from pyro_vae.training import loop, modes, schedules
from pyro_vae.training.loop import fit, iterate
from pyro_vae.training.records import Diverged, Position, Record, Sums, pack, unpack

CPU = torch.device("cpu")
# Ranges of the values of each split
RANGES = {"train": (0.0, 1.0), "validation": (10.0, 11.0), "test": (20.0, 21.0)}
SIZES = {"train": 50, "validation": 12, "test": 8}


def sentinels() -> Splits:
    """Rows of three values, in the order test, train, validation."""
    random, spec = np.random.default_rng(0), DataSpec((3,), None, discrete=False)
    names = ("test", "train", "validation")
    parts = [random.uniform(*RANGES[name], size=(SIZES[name], 3)) for name in names]
    values = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    rows = dict(zip(names, torch.arange(70).split([SIZES[name] for name in names]), strict=True))
    splits = {name: Split(values, rows[name], spec) for name in names}
    return Splits("sentinels", **splits, spec=spec, likelihood="gaussian", class_names=(), low=0.0,
                  high=21.0, integral=False, fingerprint="0")  # fmt: skip


def split_of(x: torch.Tensor) -> str:
    """The split from which all rows of x come."""
    (name,) = (n for n, (low, high) in RANGES.items() if low <= x.min() and x.max() <= high)
    return name


def small(**settings: Any):
    config = pyro_vae.ModelConfig(latent_dim=2, hidden=(4,), likelihood="gaussian", **settings)
    splits = sentinels()
    return pyro_vae.build(config, splits), splits


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_training_rows_train_and_validation_rows_validate(kind):
    """In training mode and in evaluation mode; test rows are not seen at all."""
    vae, splits = small(kind=kind)
    vae.eval()  # as it is in the check before the first step
    seen: list[tuple[str, bool, int]] = []
    vae.encoder.register_forward_pre_hook(
        lambda module, x: seen.append((split_of(x[0]), module.training, len(x[0])))
    )
    records = iterate(vae, splits, FitConfig(epochs=2, batch_size=20, compile="off"))
    for epoch in range(2):
        seen.clear()
        next(records)
        if epoch == 0:
            seen = seen[[training for _, training, _ in seen].index(True) :]
        assert seen == [("train", True, count) for count in (20, 20, 10)] + [
            ("validation", False, 12)
        ]
        assert not vae.training
    assert list(records) == []


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_a_record_is_that_of_its_splits(kind):
    """Validation by `elbo_terms` of the validation rows at the run's seed."""
    vae, splits = small(kind=kind)
    for record in iterate(vae, splits, FitConfig(epochs=3, batch_size=20), seed=5):
        reconstruction, kl = elbo_terms(vae, splits.validation, 5)
        assert (record.validation_reconstruction, record.validation_kl) == (reconstruction, kl)
        assert record.validation_elbo == (None if kl is None else reconstruction - kl)
        assert (record.train_elbo is None) == (record.kl is None) == (kind == "ae")
        if kind == "vae":
            assert record.train_elbo == pytest.approx(record.reconstruction - record.kl)


def test_means_of_an_epoch_weigh_rows_and_not_steps():
    """50 rows in batches of 20, 20 and 10: without a step, the mean is that of all rows."""
    vae, splits = small(kind="ae")
    seen = []
    config = FitConfig(epochs=1, batch_size=20, learning_rate=1e-30)
    (record,) = fit(vae, splits, config, on_step=seen.append)
    whole = elbo_terms(vae, splits.train)[0]
    assert record.reconstruction == pytest.approx(whole, rel=1e-5)
    assert [p.step for p in seen] == [1, 2, 3]
    assert seen[2].reconstruction == record.reconstruction != seen[0].reconstruction
    assert {(p.epoch, p.epochs, p.steps_per_epoch) for p in seen} == {(1, 1, 3)}


def scripted(monkeypatch, scores: list[float]) -> None:
    """Validation returns these ELBOs, one after each epoch, with a KL that rises."""
    calls = iter([(score + 4.0 * i, 4.0 * i) for i, score in enumerate(scores)])
    monkeypatch.setattr(loop, "elbo_terms", lambda *_, note: next(calls))


# Best epochs 1, 2 and 5; an equal score is not better. Without one for three epochs, it stops.
SCORES = [-5.0, -3.0, -4.0, -3.0, -2.0, -2.0, -9.0, -2.5, 7.0]
BEST = [True, True, False, False, True, False, False, False]


def test_early_stopping_counts_epochs_since_the_best(monkeypatch):
    scripted(monkeypatch, SCORES)
    vae, splits = small()
    records = fit(vae, splits, FitConfig(epochs=9, batch_size=50, patience=3))
    assert [record.is_best for record in records] == BEST
    assert [record.validation_elbo for record in records] == SCORES[:8]


@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 6, 7, 8])
def test_early_stopping_continues_after_a_resume(epoch, monkeypatch):
    scripted(monkeypatch, SCORES)
    vae, splits = small()
    config = FitConfig(epochs=9, batch_size=50, patience=3)
    records = iterate(vae, splits, config)
    head = [next(records) for _ in range(epoch)]
    tail = fit(vae, splits, config, state=head[-1].state())
    assert [record.is_best for record in [*head, *tail]] == BEST


def test_an_autoencoder_is_judged_by_its_reconstruction(monkeypatch):
    calls = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(loop, "elbo_terms", lambda *_, note: (next(calls), None))
    vae, splits = small(kind="ae")
    records = fit(vae, splits, FitConfig(epochs=3, batch_size=50))
    assert [record.is_best for record in records] == [True, True, False]


def test_a_stopped_training_leaves_the_model_in_evaluation_mode():
    vae, splits = small()
    assert fit(vae, splits, FitConfig(epochs=2, batch_size=20), on_step=lambda p: p.step == 2) == []
    assert not vae.training


def test_the_draws_of_a_training_have_their_own_seed():
    vae, splits = small()
    states = []
    vae.eval().encoder.register_forward_pre_hook(
        lambda module, _: states.append((module.training, torch.get_rng_state())) or None
    )
    fit(vae, splits, FitConfig(epochs=1, batch_size=50, compile="off"), seed=3)
    first = next(state for training, state in states if training)
    assert torch.equal(first, OwnState(CPU, derive(3, "training")).random["cpu"])


def test_weights_that_overflow_are_told_by_the_validation():
    vae, splits = small()
    config = FitConfig(epochs=1, batch_size=50, learning_rate=1e38, learning_rate_warmup=0.0)
    with pytest.raises(Diverged, match="the validation ELBO is not finite in epoch 1"):
        fit(vae, splits, config)


def test_a_loss_that_is_not_finite_is_told(monkeypatch):
    monkeypatch.setattr(SVI, "step", lambda *_, **__: (math.nan, 1.0, 1.0))
    vae, splits = small()
    with pytest.raises(Diverged, match="the loss is not finite in epoch 1, step 1"):
        fit(vae, splits, FitConfig(epochs=1, batch_size=50))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_the_step_that_is_not_finite_is_named_among_those_made_together(fault, monkeypatch):
    def steps(self: Any, calls: Any) -> Any:
        for step, _ in enumerate(calls):
            if step == 2 and fault == "gradient":
                raise NonFiniteGradient
            yield math.nan if step == 2 else 1.0, 1.0, 1.0

    monkeypatch.setattr(CapturedSVI, "steps", steps)
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0)
    vae, splits = small()
    config = FitConfig(epochs=1, batch_size=10)
    with pytest.raises(Diverged, match=f"the {fault} is not finite in epoch 1, step 3"):
        fit(vae, splits, config)


def expected_rate(step: int) -> float:
    """12 steps, 3 of warm-up; then half a cosine from the maximum at step 3 to 0 at step 12."""
    if step < 3:
        return 0.01 * (step + 1) / 4
    return 0.01 * (1 + math.cos(math.pi * (step - 3) / 9)) / 2


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "stop_at", [1, 4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3, 7))]
)
def test_rate_weight_and_clip_of_each_step_also_after_a_resume(stop_at, captured, monkeypatch):
    """Captured, the first two steps of an epoch are made together."""
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0 if captured else 10**9)
    monkeypatch.setattr(modes, "ROWS_AT_ONCE", {"cpu": 40})
    made: list[tuple[float, float, float]] = []
    vae, splits = small()
    original = loop._set_schedules

    def record(run, step, num_rows):
        weights = original(run, step, num_rows)
        (group,) = run.optimizer.optimizer.param_groups
        made.append((group["lr"], weights["kl_weight"].item(), run.optimizer.max_norm))
        return weights

    monkeypatch.setattr(loop, "_set_schedules", record)
    config = FitConfig(
        epochs=4, batch_size=20, learning_rate=0.01, learning_rate_warmup=0.25, kl_warmup=0.5,
        beta=3.0, gradient_clip=2.0,
    )  # fmt: skip
    states = []
    records = fit(
        vae, splits, config, on_step=lambda p: p.step >= stop_at and not states.append(p.state())
    )
    assert states[0]["step"] == (stop_at + (captured and stop_at in (1, 4, 7)))
    records += fit(vae, splits, config, state=states[0])
    rates, weights, norms = zip(*made, strict=True)
    assert rates == pytest.approx([expected_rate(step) for step in range(12)])
    assert weights == pytest.approx([3.0 * min(1.0, (step + 1) / 7) for step in range(12)])
    assert norms == (40.0, 40.0, 20.0) * 4
    ends = [expected_rate(step) for step in (2, 5, 8, 11)]
    assert [record.learning_rate for record in records] == pytest.approx(ends)
    assert [record.step for record in records] == [3, 6, 9, 12]


def test_schedules_without_warmup():
    config = FitConfig(learning_rate_warmup=0.0, schedule="constant", beta=2.0)
    assert [schedules.learning_rate(config, step, 3) for step in range(3)] == [2e-3] * 3
    assert [schedules.kl_weight(config, step, 3) for step in range(3)] == [2.0] * 3


def test_a_resumed_training_adds_to_its_seconds():
    vae, splits = small()
    config = FitConfig(epochs=2, batch_size=50)
    records = iterate(vae, splits, config)
    state = next(records).state()
    (record,) = fit(vae, splits, config, state={**state, "seconds": 1000.0})
    assert 1000.0 < record.seconds < 1060.0
    assert record.images_per_second * 60 > 50  # of this epoch alone


def test_a_state_is_restored_entry_by_entry():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    adam = torch.optim.Adam(parameters)
    parameters[0].grad = torch.ones(2)
    adam.step()
    position, sums = Position(1, 2, 3.0, 4.0, 5), Sums(6.0, 7.0, 8.0, 9.0)
    random = RandomStates(CPU).get()
    found = unpack(pack(position, sums, random, adam), parameters)
    assert found == (position, sums, random, adam.state_dict()["state"])
    assert position.after_steps(1, 0.5) == Position(1, 3, 3.5, 4.0, 5)
    assert position.after_epoch(4.5, 9.0) == Position(2, 2, 9.0, 4.5, 0)
    assert position.after_epoch(4.0, 9.0) == Position(2, 2, 9.0, 4.0, 6)
    assert sums.after_steps(10, 1.0, [2.0, 3.0]) == Sums(16.0, 8.0, 10.0, 12.0)
    assert sums.after_steps(10, 1.0, [2.0]) == Sums(16.0, 8.0, 10.0)
    assert sums.means(True) == (8 / 6 - 9 / 6, 8 / 6, 9 / 6)
    assert sums.means(False) == (None, 8 / 6, None)
    assert sums.rate == 6 / 7


def test_a_line_of_the_metrics():
    values = {field.name: i for i, field in enumerate(dataclasses.fields(Record))}
    assert Record(**values).metrics() == {
        name: value for name, value in values.items() if name not in ("is_best", "state")
    }


@pytest.mark.parametrize("particles", [1, 4])
def test_terms_of_a_step(particles, monkeypatch):
    """Of the first particle, at the posterior of the weights before the step."""
    vae, splits = small()
    seen: dict[str, Any] = {}
    original = pyro_vae.VAE.guide

    def guide(self, x):
        original(self, x)
        seen.update(x=x, posterior=self.posterior(x))

    monkeypatch.setattr(pyro_vae.VAE, "guide", guide)
    config = FitConfig(
        epochs=1, batch_size=50, num_particles=particles, compile="off", learning_rate=1e-30
    )
    (record,) = fit(vae, splits, config)
    with torch.no_grad():
        kl = kl_divergence(seen["posterior"], vae.prior()).mean().item()
    assert record.kl == pytest.approx(kl, rel=1e-5)
    draws = torch.tensor([elbo_terms(vae, splits.train, seed)[0] for seed in range(200)])
    # A normal deviate is beyond 4 once in 15,800 times.
    assert abs(record.reconstruction - draws.mean()) < 4 * draws.std() * math.sqrt(1 + 1 / 200)


# --- randomness -----------------------------------------------------------------------------------


def test_each_seed_and_purpose_has_a_seed_of_its_own():
    purposes = ("weights", "training", "posterior", "rows", "training 0 1", "training 1 0", "")
    seeds = {derive(seed, purpose) for seed in range(20) for purpose in purposes}
    assert len(seeds) == 20 * len(purposes)
    assert derive(3, "weights") == derive(3, "weights")


def test_random_states_are_restored_and_seeded():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with random_states(CPU, 7):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)
    torch.set_rng_state(before)
    with pytest.raises(KeyError), random_states(CPU):
        raise KeyError(torch.rand(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_state_goes_on_where_it_was():
    own, states = OwnState(CPU, 7), []
    torch.manual_seed(7)
    expected = torch.rand(4)
    before = torch.get_rng_state()
    for _ in range(2):
        with own.active():
            states.append(torch.rand(2))
            pyro.param("mine", torch.zeros(()))
        assert torch.equal(torch.get_rng_state(), before)
        assert not list(pyro.get_param_store())
    assert torch.equal(torch.cat(states), expected)
    unchanged = own.random["cpu"].clone()
    with pytest.raises(KeyError, match="mine"), own.active():
        raise KeyError(torch.rand(1), [*pyro.get_param_store()])
    assert torch.equal(own.random["cpu"], unchanged)
    with own.active():
        own.seed("a purpose", 3)
        drawn = torch.rand(2)
    torch.manual_seed(derive(3, "a purpose"))
    assert torch.equal(torch.rand(2), drawn)
