"""The training loop: exact resumption, honest records, nothing left behind."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyro
import pytest
import torch
from conftest import SIGMAS, all_likelihoods, example_splits

import pyro_vae
from pyro_vae import FitConfig
from pyro_vae.capture.optimizer import OneOptimizer
from pyro_vae.evidence.evaluation import elbo_terms
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.priors import StandardNormal
from pyro_vae.objectives import elbos
from pyro_vae.training import modes
from pyro_vae.training.checkpoint import load_checkpoint, serialize
from pyro_vae.training.loop import fit, iterate
from pyro_vae.training.records import Diverged, summary

TIMINGS = ("seconds", "images_per_second")


def metrics(records) -> list[dict]:
    lines = [record.metrics() for record in records]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def small(name: str, tmp_path, **settings):
    splits = example_splits(name, tmp_path, count=100)
    config = pyro_vae.ModelConfig(**{"latent_dim": 2, "hidden": (16,), **settings})
    return pyro_vae.build(config, splits), splits


@all_likelihoods
@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_training_improves_every_likelihood(name, kind, tmp_path):
    vae, splits = small(name, tmp_path, likelihood=name, kind=kind)
    before = elbo_terms(vae, splits.train)
    config = FitConfig(epochs=60, batch_size=20, learning_rate=1e-2)
    records = fit(vae, splits, config)
    after = elbo_terms(vae, splits.train)
    assert after[0] - (after[1] or 0) > before[0] - (before[1] or 0) + 1
    assert [r.epoch for r in records] == list(range(1, 61))
    assert records[-1].step == 60 * 5


@pytest.mark.parametrize("objective", ["trace", "mean-field", "iwae"])
@pytest.mark.parametrize("particles", [1, 5])
def test_records_are_the_elbo_whatever_is_maximized(objective, particles, tmp_path):
    """With a learning rate near zero the epoch's mean is the ELBO of the initial weights."""
    vae, splits = small("binomial", tmp_path)
    config = FitConfig(
        epochs=1,
        batch_size=16,
        learning_rate=1e-12,
        objective=objective,
        num_particles=particles,
    )
    (record,) = fit(vae, splits, config)
    assert record.train_elbo == pytest.approx(record.reconstruction - record.kl, rel=1e-9)
    # 400 independent evaluations at fixed weights give mean and spread
    terms = [elbo_terms(vae, splits.train, seed) for seed in range(400)]
    recon = torch.tensor([t[0] for t in terms], dtype=torch.float64)
    assert record.kl == pytest.approx(terms[0][1], rel=1e-4)
    assert abs(record.reconstruction - recon.mean()) < SIGMAS * recon.std() * math.sqrt(1 + 1 / 400)


def test_each_epoch_is_a_message_and_nothing_is_printed(tmp_path, caplog, capfd):
    vae, splits = small("gaussian", tmp_path)
    with caplog.at_level("INFO", logger="pyro_vae"):
        records = fit(vae, splits, FitConfig(epochs=3, batch_size=50))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("pyro_vae")]
    assert len(messages) == 3
    for i, (message, record) in enumerate(zip(messages, records, strict=True)):
        assert message.startswith(f"epoch {i + 1}/3 ")
        assert f"validation_elbo {record.validation_elbo:.2f}" in message
    assert capfd.readouterr() == ("", "")
    labelled = {**records[0].metrics(), "validation_accuracy": 0.95264}
    assert summary(labelled, 3).endswith("  validation_accuracy 0.9526")


def test_same_seed_same_numbers_and_other_seed_others(tmp_path):
    config = FitConfig(epochs=4, batch_size=16)
    vae, splits = small("bernoulli", tmp_path)
    first = metrics(fit(vae, splits, config, seed=5))
    vae, splits = small("bernoulli", tmp_path)
    assert metrics(fit(vae, splits, config, seed=5)) == first
    vae, splits = small("bernoulli", tmp_path)
    assert metrics(fit(vae, splits, config, seed=6)) != first


@pytest.mark.parametrize("stop_at", [1, 13, 18, 30])
@pytest.mark.parametrize("name", ["discretized-logistic", "gaussian"])
def test_resumed_run_equals_uninterrupted_one(stop_at, name, tmp_path):
    """Stopped inside an epoch, at its first step, at its end; through a file, to the last bit."""
    config = FitConfig(epochs=6, batch_size=16, learning_rate_warmup=0.5, kl_warmup=0.7, patience=3)
    vae, splits = small(name, tmp_path)
    whole = metrics(fit(vae, splits, config))
    weights = {k: v.clone() for k, v in vae.state_dict().items()}

    vae, splits = small(name, tmp_path)
    run = pyro_vae.config.resolve(
        pyro_vae.Config(model=pyro_vae.ModelConfig(latent_dim=2, hidden=(16,))), name, 1000
    )
    files = []

    def on_step(progress) -> bool:
        if progress.step == stop_at:
            files.append(serialize(vae, run, splits, [], progress.state()))
        return progress.step == stop_at

    head = metrics(fit(vae, splits, config, on_step=on_step))
    (tmp_path / "a.pt").write_bytes(files[0])
    loaded = load_checkpoint(tmp_path / "a.pt")
    torch.manual_seed(99)  # the global state of the new process is another
    tail = metrics(fit(loaded.vae, splits, config, state=loaded.training))
    assert head + tail == whole
    for key, value in loaded.vae.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_resuming_from_the_end_of_an_epoch(tmp_path):
    config = FitConfig(epochs=4, batch_size=16)
    vae, splits = small("binomial", tmp_path)
    whole = metrics(fit(vae, splits, config))
    vae, splits = small("binomial", tmp_path)
    records = iterate(vae, splits, config)
    head = [next(records), next(records)]
    state = head[-1].state()
    assert metrics(head) + metrics(fit(vae, splits, config, state=state)) == whole


def test_consumer_may_draw_and_train_between_records(tmp_path):
    """Neither global random state nor parameter store is shared with the caller's code."""
    config = FitConfig(epochs=3, batch_size=16)
    vae, splits = small("bernoulli", tmp_path)
    quiet = metrics(fit(vae, splits, config))
    vae, splits = small("bernoulli", tmp_path)
    other, _ = small("bernoulli", tmp_path)
    busy = []
    torch.manual_seed(0)
    mine = pyro.param("mine", torch.ones(2))
    for record in iterate(vae, splits, config):
        state = torch.get_rng_state()
        busy.append(record)
        next(iterate(other, splits, config))
        assert torch.equal(torch.get_rng_state(), state)
        assert list(pyro.get_param_store()) == ["mine"]
        assert pyro.param("mine") is not None
        torch.randn(1000)
    assert metrics(busy) == quiet
    assert torch.equal(pyro.param("mine"), mine)


def test_kl_weight_and_warmup(tmp_path, monkeypatch):
    vae, splits = small("binomial", tmp_path)
    weights = []
    original = elbos.Sampled.loss_and_grads

    def keep(self, *args, kl_weight):
        weights.append(kl_weight.item())
        return original(self, *args, kl_weight=kl_weight)

    monkeypatch.setattr(elbos.Sampled, "loss_and_grads", keep)
    config = FitConfig(epochs=4, batch_size=27, beta=2.0, kl_warmup=0.5)
    fit(vae, splits, config)
    assert len(weights) == 12
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(2 / 7)
    assert weights[5] == pytest.approx(12 / 7)
    assert weights[6:] == [2.0] * 6


@pytest.mark.slow
def test_beta_lowers_the_kl(tmp_path):
    kls = {}
    for beta in (0.1, 1.0, 8.0):
        vae, splits = small("binomial", tmp_path)
        config = FitConfig(epochs=60, batch_size=20, learning_rate=1e-2, beta=beta)
        kls[beta] = fit(vae, splits, config)[-1].kl
    assert kls[0.1] > kls[1.0] > kls[8.0]


def test_schedules(tmp_path):
    rates = {}
    for schedule in ("cosine", "constant"):
        vae, splits = small("binomial", tmp_path)
        config = FitConfig(
            epochs=10, batch_size=81, learning_rate=0.1, schedule=schedule, learning_rate_warmup=0.4
        )
        rates[schedule] = [r.learning_rate for r in fit(vae, splits, config)]
    assert rates["constant"] == pytest.approx([0.02, 0.04, 0.06, 0.08] + [0.1] * 6)
    assert rates["cosine"][:5] == rates["constant"][:5]
    falling = [0.05 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates["cosine"][4:] == pytest.approx(falling)


def test_gradient_clipping_bounds_the_step():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = OneOptimizer(torch.optim.SGD([parameter], lr=1.0))
    optimizer.max_norm = 3.0
    parameter.grad = torch.full((4,), 100.0)
    optimizer([parameter])
    assert parameter.detach().norm().item() == pytest.approx(3.0, rel=1e-5)
    assert parameter.grad is None
    with pytest.raises(RuntimeError, match="lacks"):
        optimizer([torch.nn.Parameter(torch.zeros(1))])


def test_gradient_clipping_is_per_image(tmp_path, monkeypatch):
    norms = []
    original = OneOptimizer.__call__

    def recorded(self, parameters):
        norms.append(self.max_norm)
        return original(self, parameters)

    monkeypatch.setattr(OneOptimizer, "__call__", recorded)
    vae, splits = small("binomial", tmp_path)
    fit(vae, splits, FitConfig(epochs=1, batch_size=60, gradient_clip=2.5))
    assert norms == [150.0, 52.5]  # 60 images, and the 21 that are left


def test_validation_is_the_same_after_epochs_that_change_nothing(tmp_path):
    vae, splits = small("bernoulli", tmp_path)
    config = FitConfig(epochs=3, batch_size=81, learning_rate=1e-30)
    assert len({record.validation_elbo for record in fit(vae, splits, config)}) == 1


class Blind(torch.nn.Module):
    """An encoder that gives the prior whatever it sees: z is the noise itself."""

    def forward(self, x):
        return torch.zeros(*x.shape[:-3], 2)


class Square(torch.nn.Module):
    """A decoder whose logit grows with z²."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return (2 * z.square() - 2).reshape(*z.shape[:-1], 1, 1, 1, 1)


def test_the_noise_of_z_does_not_follow_the_binarization(tmp_path):
    """One pixel, one latent: with one seed for both, x would be correlated with z²."""
    values = np.random.default_rng(0).random((40_000, 1, 1, 1)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    splits = pyro_vae.load_data(str(tmp_path / "a.npy"))
    likelihood = LIKELIHOODS["bernoulli"](splits.spec, torch.zeros(1, 1, 1), torch.ones(()))
    vae = pyro_vae.VAE(StandardNormal(1), Blind(), Square(), likelihood)

    def repeated(generator_seeds):
        torch.manual_seed(12345)
        terms = []
        for seed in generator_seeds:
            x = torch.cat(list(splits.train.fixed("binary", seed)))
            terms.append(vae.elbo_terms(x)[0].double().mean().item())
        return np.mean(terms), np.std(terms, ddof=1)

    mean, spread = repeated(range(1000, 1030))
    # thirty repetitions: a t with 29 degrees of freedom is beyond 5 once in 40,000 times
    for seed in (0, 3):
        assert abs(elbo_terms(vae, splits.train, seed)[0] - mean) < 5 * spread
    # power: one stream for both is far off
    terms = []
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    for rows in torch.arange(len(splits.train)).split(512):
        x = splits.train.take(rows, "binary", generator)
        terms.append(vae.elbo_terms(x)[0].double())
    assert abs(torch.cat(terms).mean().item() - mean) > 5 * spread


def test_every_image_once_an_epoch_in_an_order_of_the_seed_and_the_epoch(tmp_path, monkeypatch):
    original = pyro_vae.Split.take

    def orders(seed: int) -> list[list[int]]:
        seen: list[int] = []

        def take(self, index, *arguments):
            seen.extend(index.tolist())
            return original(self, index, *arguments)

        monkeypatch.setattr(pyro_vae.Split, "take", take)
        vae, splits = small("binomial", tmp_path)
        fit(vae, splits, FitConfig(epochs=3, batch_size=20), seed)
        return [seen[i : i + 81] for i in (0, 81, 162)]

    first, again, other = orders(0), orders(0), orders(1)
    assert first == again
    for order in first + other:
        assert sorted(order) == list(range(81))
    assert len({tuple(order) for order in first + other}) == 6


def test_a_state_of_another_kind_is_refused(tmp_path):
    vae, splits = small("binomial", tmp_path)
    with pytest.raises(pyro_vae.InputError, match="a training's state expects epoch, step"):
        next(iterate(vae, splits, FitConfig(batch_size=81), state={"a": 1}))


def test_early_stopping(tmp_path):
    vae, splits = small("binomial", tmp_path)
    config = FitConfig(epochs=400, batch_size=81, learning_rate=0.05, patience=5)
    records = fit(vae, splits, config)
    assert len(records) < 400
    best = max(range(len(records)), key=lambda i: records[i].validation_elbo)
    assert len(records) == best + 1 + 5
    assert [r.is_best for r in records[best:]] == [True] + [False] * 5


def test_divergence_is_told_and_leaves_finite_weights(tmp_path):
    vae, splits = small("gaussian", tmp_path)
    config = FitConfig(
        epochs=50, batch_size=16, learning_rate=1e4, gradient_clip=math.inf, learning_rate_warmup=0
    )
    with pytest.raises(Diverged, match=r"not finite in epoch \d+, step \d+.*--learning-rate 10000"):
        fit(vae, splits, config)
    assert all(value.isfinite().all() for value in vae.state_dict().values())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path):
    vae, splits = small("binomial", tmp_path)
    records = iterate(vae, splits, FitConfig(epochs=3, batch_size=81))
    next(records)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.decoder.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match="gradient is not finite in epoch 2, step 2"):
        next(records)
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_means_of_a_record_are_of_its_own_epoch(tmp_path):
    """An autoencoder draws nothing: one step per epoch has the terms of the weights before it."""
    vae, splits = small("binomial", tmp_path, kind="ae")
    records = iterate(vae, splits, FitConfig(epochs=3, batch_size=81, learning_rate=0.05))
    for _ in range(3):
        expected, _ = elbo_terms(vae, splits.train)
        assert next(records).reconstruction == pytest.approx(expected, rel=1e-6)


def test_every_step_draws_new_numbers(tmp_path):
    vae, splits = small("bernoulli", tmp_path)
    states = []
    vae.eval()  # as it is in the check before the first step, and in validation

    def keep(*_: object) -> None:
        if vae.training:
            states.append(torch.get_rng_state().numpy().tobytes())

    vae.decoder.register_forward_pre_hook(keep)
    fit(vae, splits, FitConfig(epochs=3, batch_size=30))
    assert len(set(states)) == len(states) == 9


def test_data_outside_the_support_are_refused_before_the_first_step(tmp_path):
    vae, _ = small("binomial", tmp_path)  # counts up to 16
    bytes_ = example_splits("discretized-logistic", tmp_path, count=100)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(pyro_vae.InputError, match="model and data do not fit together"):
        fit(vae, bytes_, FitConfig(epochs=1, batch_size=81))
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())


def test_an_error_in_a_step_is_not_taken_for_a_mistake_of_the_user(tmp_path, monkeypatch):
    """Shapes and supports have been checked before the first step."""
    vae, splits = small("binomial", tmp_path)

    def faulty(*_: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(pyro_vae.Split, "take", faulty)
    with pytest.raises(ValueError, match=r"^a fault of ours$") as caught:
        fit(vae, splits, FitConfig(epochs=1, batch_size=81))
    assert not isinstance(caught.value, pyro_vae.InputError)


def test_batch_larger_than_the_training_set(tmp_path):
    vae, splits = small("binomial", tmp_path)
    with pytest.raises(ValueError, match="--batch-size 82 is larger than the training set of 81"):
        next(iterate(vae, splits, FitConfig(batch_size=82)))


def test_validation_uses_the_same_draws_every_time(tmp_path):
    vae, splits = small("bernoulli", tmp_path)
    assert elbo_terms(vae, splits.validation, 3) == elbo_terms(vae, splits.validation, 3)
    assert elbo_terms(vae, splits.validation, 3) != elbo_terms(vae, splits.validation, 4)


def test_the_test_split_is_never_read(tmp_path):
    """Training on data whose test rows cannot be gathered works all the same."""
    vae, splits = small("binomial", tmp_path)
    broken = dataclasses.replace(splits.test, rows=torch.tensor([10**9]))
    fit(vae, dataclasses.replace(splits, test=broken), FitConfig(epochs=1, batch_size=81))


def steps_of(mode: str, tmp_path, monkeypatch, **settings):
    """Records of a short run whose length is taken to ask for `mode`."""
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0 if mode == "graph" else 10**9)
    monkeypatch.setattr(modes, "COMPILE_SECONDS", math.inf)
    vae, splits = small("binomial", tmp_path)
    compile = {"eager": "off", "graph": "auto", "compiled": "on"}[mode]
    config = FitConfig(epochs=3, batch_size=30, compile=compile, **settings)
    assert modes.run_mode(config, splits.train) == mode
    metrics = [record.metrics() for record in fit(vae, splits, config)]
    return metrics, [p.detach().clone() for p in vae.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_warmup": 1.0},
        {"objective": "dreg", "num_particles": 4},
        {"objective": "mean-field", "beta": 2.0},
    ],
    ids=str,
)
def test_a_captured_run_is_the_uncaptured_one(settings, tmp_path, monkeypatch):
    """81 rows in batches of 30: a last one of 21, that has a graph of its own."""
    runs = {m: steps_of(m, tmp_path, monkeypatch, **settings) for m in ("eager", "graph")}
    for first, second in zip(runs["eager"][0], runs["graph"][0], strict=True):
        for name in set(first) - set(TIMINGS):
            assert second[name] == pytest.approx(first[name], rel=1e-6), name
    for a, b in zip(runs["eager"][1], runs["graph"][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_run_is_the_uncaptured_one(tmp_path, monkeypatch):
    eager, compiled = (steps_of(m, tmp_path, monkeypatch) for m in ("eager", "compiled"))
    assert eager[0][-1]["train_elbo"] == pytest.approx(compiled[0][-1]["train_elbo"], rel=1e-4)
    for a, b in zip(eager[1], compiled[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_captured_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    """What is captured is captured without a trace: a run repeats wherever it is resumed.

    Five steps of an epoch are made three at a time, and a smaller one.
    """
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0)
    monkeypatch.setattr(modes, "ROWS_AT_ONCE", {"cpu": 50})
    config = FitConfig(epochs=3, batch_size=16)
    vae, splits = small("bernoulli", tmp_path)
    whole = [record.metrics() for record in fit(vae, splits, config)]
    again, splits = small("bernoulli", tmp_path)
    states = []
    for _ in fit(
        again, splits, config, on_step=lambda p: p.step > 6 and not states.append(p.state())
    ):
        pass
    assert states[0]["step"] % 6 == 3
    rest = [record.metrics() for record in fit(again, splits, config, state=states[0])]
    for name in set(whole[-1]) - set(TIMINGS):
        assert rest[-1][name] == whole[-1][name], name
    for a, b in zip(vae.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_short_runs_are_not_captured_and_long_ones_compiled(digits):
    """1,457 images of 64 values: 6 steps an epoch, of 256."""

    def mode(**settings):
        return modes.run_mode(FitConfig(**settings), digits.train)

    assert mode(epochs=1) == "eager"
    assert mode() == "graph"  # by default about 2,500 steps
    assert mode(epochs=5000) == "compiled"
    assert mode(num_particles=1000) == "compiled"
    assert mode(epochs=5000, compile="off") == "eager"
    assert mode(epochs=1, compile="on") == "compiled"


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True])
def test_precision(captured, tmp_path, monkeypatch):
    """bf16 rounds products to three digits, and no sum; afterwards all is as it was."""
    monkeypatch.setattr(modes, "CAPTURE_FROM", 0 if captured else 10**9)
    elbos = {}
    for precision in ("highest", "medium", "bf16"):
        vae, splits = small("binomial", tmp_path)
        config = FitConfig(epochs=2, batch_size=30, precision=precision)
        elbos[precision] = fit(vae, splits, config)[-1].train_elbo
        assert {p.dtype for p in vae.parameters()} == {torch.float32}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.is_autocast_enabled("cpu")
    assert elbos["medium"] == pytest.approx(elbos["highest"], rel=1e-2)
    assert elbos["bf16"] == pytest.approx(elbos["highest"], rel=1e-2)
    assert elbos["bf16"] != elbos["highest"]
