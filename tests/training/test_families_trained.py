"""Models of every family: captured, resumed, saved, copied, in other precisions, by commands."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from family_models import PAIRS, SHAPE, config, model, randomized, rows
from pyro.infer import SVI

import pyro_vae
from pyro_vae import FitConfig, InputError, diagnose, encode, evaluate, generate, report, train
from pyro_vae.capture.captured import CapturedSVI, capture
from pyro_vae.capture.optimizer import OneOptimizer
from pyro_vae.config import Config, resolve
from pyro_vae.diagnostics import suite
from pyro_vae.models.build import build, build_blank
from pyro_vae.training import checkpoint
from pyro_vae.training.checkpoint import load_checkpoint, serialize
from pyro_vae.training.terms import ElboTerms

# Each family that is not the default, once
SOME = [("flow", "mixture"), ("mixture", "flow"), ("full", "vamp")]


def pairs(*chosen: tuple[str, str], slow: list[tuple[str, str]]) -> Any:
    others = [pytest.param(*pair, marks=pytest.mark.slow) for pair in slow]
    return pytest.mark.parametrize(("guide", "prior"), [*chosen, *others])


def fresh(guide: str, prior: str, dtype: torch.dtype = torch.float64) -> tuple[Any, torch.Tensor]:
    vae, x = model(guide, prior)
    return copy.deepcopy(vae).to(dtype), x.to(dtype)


def result(elbo: Any, vae: Any, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    for parameter in vae.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    loss = elbo.loss_and_grads(vae.model, vae.guide, x)
    return loss, [p.grad.clone() for p in vae.parameters() if p.grad is not None]


# --- capture --------------------------------------------------------------------------------------


@pairs(("mixture", "mixture"), slow=[("mixture", "flow"), ("flow", "normal"), ("full", "vamp")])
def test_a_captured_objective_is_the_objective(guide, prior):
    """Loss, gradient, reconstruction and KL; again at other weights."""
    check_capture("trace", 1, guide, prior)


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "prior"), [("mixture", "normal")])
def test_a_captured_objective_of_several_particles_is_the_objective(guide, prior):
    check_capture("dreg", 4, guide, prior)


def check_capture(objective: str, particles: int, guide: str, prior: str) -> None:
    vae, x = fresh(guide, prior)
    elbo = pyro_vae.objective(objective, particles, max_plate_nesting=1)
    terms = [ElboTerms(vae, particles) for _ in range(2)]
    graph, eager = capture(elbo, "graph", terms[0]), capture(elbo, "eager", terms[1])
    for seed in range(2):
        with torch.no_grad():
            randomized(vae, seed)
        (one, ours), (other, theirs) = result(graph, vae, x), result(eager, vae, x)
        assert [float(v) for v in one] == pytest.approx([float(v) for v in other], rel=1e-9)
        assert len(ours) == len(theirs) == len(list(vae.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    (found,) = graph.graphs.graphs.values()
    assert found is not None  # a graph, not the eager step


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "prior"), [("flow", "mixture")])
def test_captured_svi_trains_equally(guide, prior):
    ends = []
    for kind, mode in ((SVI, "eager"), (CapturedSVI, "graph")):
        pyro.clear_param_store()
        vae, x = fresh(guide, prior)
        optimizer = OneOptimizer(torch.optim.Adam(vae.parameters(), lr=0.01, fused=True))
        elbo = capture(pyro_vae.objective("trace", max_plate_nesting=1), mode)
        svi = kind(vae.model, vae.guide, optimizer, loss=elbo)
        torch.manual_seed(2)
        losses = [svi.step(x) for _ in range(4)]
        ends.append((losses, vae.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-7)
    start = fresh(guide, prior)[0].state_dict()
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-6, atol=1e-7)
        if name in dict(vae.named_parameters()):
            assert not torch.equal(value, start[name]), f"{name} was not trained"


# --- resuming and files ---------------------------------------------------------------------------


def settings(guide: str, prior: str, **fit: Any) -> Config:
    run = Config(model=config(guide, prior), fit=FitConfig(**fit))
    return resolve(run, "gaussian", 1000)


def metrics(records: list[Any]) -> list[dict[str, Any]]:
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in r.metrics().items() if k not in timings} for r in records]


@pairs(*SOME, slow=[("flow", "flow"), ("mixture", "mixture")])
def test_a_resumed_run_equals_the_uninterrupted_one(guide, prior, tmp_path):
    """Through a file, to the last bit."""
    run = settings(guide, prior, epochs=3, batch_size=10, learning_rate=1e-2)
    splits = rows("gaussian")
    vae = build(run.model, splits)
    whole = metrics(pyro_vae.fit(vae, splits, run.fit))
    weights = vae.state_dict()
    assert all(np.isfinite(v) for line in whole for v in line.values() if v is not None)

    vae = build(run.model, splits)

    def on_step(progress: Any) -> bool:
        if progress.step == 5:
            (tmp_path / "a.pt").write_bytes(serialize(vae, run, splits, [], progress.state()))
        return progress.step == 5

    head = metrics(pyro_vae.fit(vae, splits, run.fit, on_step=on_step))
    loaded = load_checkpoint(tmp_path / "a.pt")
    torch.manual_seed(99)
    tail = metrics(pyro_vae.fit(loaded.vae, splits, run.fit, state=loaded.training))
    assert head + tail == whole
    for name, value in loaded.vae.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(("guide", "prior"), PAIRS)
def test_a_checkpoint_restores_the_model(guide, prior, tmp_path):
    """Its three distributions, to the last bit. A file with other options is refused."""
    splits, run = rows("gaussian"), settings(guide, prior)
    vae = randomized(build(run.model, splits)).eval()
    (tmp_path / "a.pt").write_bytes(serialize(vae, run, splits, []))
    loaded = pyro_vae.load(tmp_path / "a.pt")
    x = next(splits.train.fixed("real", seed=0, num_images=5))
    z = torch.randn(5, 2)
    assert torch.equal(loaded.prior().log_prob(z), vae.prior().log_prob(z))
    assert torch.equal(loaded.posterior(x).log_prob(z), vae.posterior(x).log_prob(z))
    assert torch.equal(loaded.posterior(x).mean, vae.posterior(x).mean)
    for role, family, option in (
        ("guide", run.model.guide, "components"),
        ("prior", run.model.prior, "components"),
        ("guide", run.model.guide, "transforms"),
        ("prior", run.model.prior, "hidden"),
    ):
        if hasattr(family, option):
            with pytest.raises(InputError, match=r"b\.pt is inconsistent|do not suit the config"):
                load_checkpoint(changed(tmp_path / "a.pt", role, option, 5))


def changed(file: Path, role: str, option: str, value: Any) -> Path:
    """A copy of a checkpoint whose family has another option, with right digests."""
    content = torch.load(file, weights_only=True)
    content["config"]["model"][role][option] = value
    del content["digests"]
    content["digests"] = checkpoint._digests(checkpoint._leaves(content))
    torch.save(content, file.with_name("b.pt"))
    return file.with_name("b.pt")


@pytest.mark.parametrize(
    ("role", "family", "option", "value"),
    [
        ("guide", "flow", "transforms", 10**6),
        ("guide", "flow", "hidden", 2**20),
        ("guide", "flow", "transforms", 32),
        ("guide", "mixture", "components", 2**20),
        ("prior", "mixture", "components", 2**20),
        ("prior", "vamp", "components", 2**20),
        ("prior", "flow", "hidden", 2**20),
        ("prior", "flow", "hidden", 1024),
        ("prior", "flow", "transforms", -1),
        ("prior", "flow", "transforms", True),
        ("prior", "mixture", "covariance", ["full"]),
        ("prior", "mixture", "family", "none"),
        ("prior", "mixture", "family", ["mixture"]),
        ("guide", "diagonal", "components", 3),
    ],
)
def test_a_hostile_option_is_refused_before_memory_is_taken(role, family, option, value, tmp_path):
    pair = (family, "normal") if role == "guide" else ("diagonal", family)
    splits, run = rows("gaussian"), settings(*pair)
    vae = build(run.model, splits)
    (tmp_path / "a.pt").write_bytes(serialize(vae, run, splits, []))
    load_checkpoint(tmp_path / "a.pt")  # whose first call imports modules
    file = changed(tmp_path / "a.pt", role, option, value)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError, match=r"b\.pt") as refused:
        load_checkpoint(file)
    assert "\n" not in str(refused.value)
    grown = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 100e6
    assert time.process_time() - started < 2


@pytest.mark.parametrize(("guide", "prior"), PAIRS)
def test_the_names_of_the_weights_are_stable(guide, prior):
    """A checkpoint of this version must load in the next."""
    names = set(build(config(guide, prior), rows("gaussian")).state_dict())
    own = {name for name in names if not name.startswith(("encoder.", "decoder.", "likelihood"))}
    network = [
        f"hyper.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias", "mask")
    ]
    flow = {f"transform.transforms.{i}.{part}" for i in range(2) for part in ["order", *network]}
    expected = {
        "normal": set(),
        "mixture": {"prior_module.logits", "prior_module.features"},
        "vamp": {f"prior_module.{name}" for name in ("logits", "rows", "mean", "std")},
        "flow": {f"prior_module.{name}" for name in flow},
    }[prior]
    assert own == expected | ({f"family.{name}" for name in flow} if guide == "flow" else set())


# --- devices, precisions, copies ------------------------------------------------------------------


@pytest.mark.parametrize(("guide", "prior"), PAIRS)
def test_a_model_without_memory_has_the_same_weights(guide, prior):
    """On the device "meta", to which a checkpoint is compared."""
    splits = rows("gaussian")
    whole = build(config(guide, prior, likelihood="gaussian"), splits).state_dict()
    blank = build_blank(config(guide, prior, likelihood="gaussian"), splits.spec, "meta")
    shapes = {name: (v.shape, v.dtype) for name, v in blank.state_dict().items()}
    assert shapes == {name: (v.shape, v.dtype) for name, v in whole.items()}


@pytest.mark.parametrize(("guide", "prior"), PAIRS)
def test_float64_is_float32_with_more_digits(guide, prior):
    vae, x = fresh(guide, prior)
    z = torch.randn(3, 5, 2).double()
    exact = vae.posterior(x).log_prob(z), vae.prior().log_prob(z)
    vae, x = fresh(guide, prior, torch.float32)
    single = vae.posterior(x).log_prob(z.float()), vae.prior().log_prob(z.float())
    for a, b in zip(single, exact, strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("guide", "prior"), PAIRS)
def test_densities_keep_their_digits_under_autocast(guide, prior):
    """Networks compute in bfloat16, the densities of their outputs do not."""
    vae, x = fresh(guide, prior, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = vae.posterior(x)
        p = vae.prior()
        torch.manual_seed(0)
        z = q.rsample()
        inside = q.log_prob(z), p.log_prob(z)
    assert z.dtype == torch.float32
    for a, b in zip(inside, (q.log_prob(z), p.log_prob(z)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    torch.testing.assert_close(q.rsample(), z, rtol=1e-2, atol=1e-2)


def test_training_in_bfloat16(tmp_path):
    for guide, prior in SOME:
        vae = build(config(guide, prior), rows("gaussian"))
        (record,) = pyro_vae.fit(
            vae, rows("gaussian"), FitConfig(epochs=1, batch_size=16, precision="bf16")
        )
        assert np.isfinite(record.validation_elbo)
        assert {p.dtype for p in vae.parameters()} == {torch.float32}


def test_the_vamp_prior_of_a_copy_follows_the_copys_encoder():
    vae, _ = fresh("full", "vamp")
    z = torch.randn(4, 2).double()
    before = vae.prior().log_prob(z)
    other = copy.deepcopy(vae)
    assert torch.equal(other.prior().log_prob(z), before)
    randomized(other.encoder, seed=3)
    assert torch.equal(vae.prior().log_prob(z), before)
    assert not torch.allclose(other.prior().log_prob(z), before, atol=1e-3)


@pytest.mark.parametrize(("guide", "prior"), SOME)
def test_a_copy_has_weights_of_its_own(guide, prior):
    vae, x = fresh(guide, prior)
    z = torch.randn(5, 2).double()
    before = vae.posterior(x).log_prob(z), vae.prior().log_prob(z)
    randomized(copy.deepcopy(vae), seed=3)
    assert torch.equal(vae.posterior(x).log_prob(z), before[0])
    assert torch.equal(vae.prior().log_prob(z), before[1])


# --- commands -------------------------------------------------------------------------------------


def call(main: Any, *arguments: Any) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def trained(guide: str, prior: str, tmp_path: Path) -> Path:
    """A run folder of two epochs."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, *SHAPE)))
    families, words = config(guide, prior), []
    for flag, family in (("--guide", families.guide), ("--prior", families.prior)):
        options = [f"{name}={v}" for name, v in vars(family).items() if name != "family"]
        words += [flag, family.family, *options]
    arguments = [*words, "--latent-dim", 2, "--hidden", 4, "--epochs", 2]
    call(train.main, "--data", tmp_path / "x.npy", *arguments, "--out", tmp_path / "run")
    return tmp_path / "run"


def test_commands_take_any_family(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_summarize", lambda run: None)
    monkeypatch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)
    run = trained("flow", "mixture", tmp_path)
    results = json.loads(call(evaluate.main, run, "--num-samples", 30, "--json"))
    assert results["elbo"] == pytest.approx(results["reconstruction"] - results["kl"])
    call(encode.main, run, "--out", tmp_path / "codes.npz")
    with np.load(tmp_path / "codes.npz") as codes:
        assert np.isfinite(codes["mean"]).all()
        assert (codes["standard_deviation"] > 0).all()
    call(generate.main, run, "--num", 5, "--out", tmp_path / "new.npy")
    assert np.isfinite(np.load(tmp_path / "new.npy")).all()


LEAST = dataclasses.replace(
    suite.QUICK,
    held_out=20,
    importance_samples=50,
    refined=4,
    refine_steps=5,
    simulations=60,
    annealed=2,
    anneal_steps=5,
    anneal_chains=2,
    chain_rows=2,
    chain_warmup=5,
    chain_draws=10,
)


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "prior"), [("flow", "mixture")])
def test_diagnose_and_report_take_any_family(guide, prior, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "QUICK", LEAST)
    run = trained(guide, prior, tmp_path)
    assert (run / "figures" / "manifold.png").exists()
    found = json.loads(call(diagnose.main, run, "--quick", "--json"))
    assert found["complete"]
    call(report.main, run)
    text = (run / "report.html").read_text()
    assert all(f"{family} " in text for family in (guide, prior))
