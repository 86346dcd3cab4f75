"""A captured ELBO is the ELBO: the same loss, gradient and random state at the same seed.

Shown for every objective, likelihood and architecture and for Pyro's own ELBOs, before and after
anything that a graph takes for granted changes. What cannot be captured says so once and runs as it
is; since every warning is an error here, a test that expects none shows that the graph was used.
The broad sweeps run graphs uncompiled. Tests of compiled ones are slow, but for one of
a training in test_loop.py.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import random
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_likelihoods, batch, diagonal, example_vae, without_a_compiler
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.util import torch_item
from torch import Tensor, nn

import pyro_vae
from pyro_vae.capture.captured import Captured, CapturedFunction, Observer, capture
from pyro_vae.capture.optimizer import OneOptimizer
from pyro_vae.config.options import KL_WEIGHTED, Objective
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.objectives import importance_weighted as weighted
from pyro_vae.objectives.registry import objective
from pyro_vae.runtime import memory

build = importlib.import_module("pyro_vae.capture.build")
capturing = importlib.import_module("pyro_vae.capture.captured")

ROWS = 6


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


# --- programs, steps and their comparison ---------------------------------------------------------


class Toy(nn.Module):
    """z ~ N(0, I), x ~ N(decoder(z) + offset, noise²), and a linear guide."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 5), *between, nn.Linear(5, 4))
        self.noise = 1.0
        self.register_buffer("offset", torch.zeros(4))
        self.shift = torch.zeros(4)  # neither parameter nor buffer

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + self.offset + self.shift
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Functions(NamedTuple):
    """Programs that keep their parameters in Pyro's store alone."""

    model: Callable[..., Any]
    guide: Callable[..., Any]

    def parameters(self) -> list[Tensor]:
        return [value.unconstrained() for value in pyro.get_param_store().values()]


class Factor(nn.Module):
    """A loss without any draw, to be given by `loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, 5.0))

    def model(self, *args: Any, **kwargs: Any) -> None:
        pyro.module("factor", self)
        pyro.factor("loss", -self.loss(*args, **kwargs))

    def guide(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is latent."""

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


def toy(*between: nn.Module, kind: type[Toy] = Toy) -> Toy:
    torch.manual_seed(0)
    return kind(*between)


def rows(count: int = ROWS, seed: int = 5) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


class Step(NamedTuple):
    """A loss and its gradients, the next random number, and what an observer returns."""

    loss: float
    gradients: list[Tensor | None]
    next: Tensor
    observed: tuple[Tensor, ...]


def step(elbo: Any, program: Any, *args: Any, seed: int = 1, **kwargs: Any) -> Step:
    for p in program.parameters():
        p.grad = None
    torch.manual_seed(seed)
    loss, *observed = with_observed(
        elbo.loss_and_grads(program.model, program.guide, *args, **kwargs)
    )
    parameters = list(program.parameters())
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    return Step(loss, gradients, torch.rand((), device=parameters[0].device), tuple(observed))


def with_observed(value: Any) -> tuple[Any, ...]:
    """A loss in a tuple, as it comes with an observer."""
    return value if isinstance(value, tuple) else (value,)


def weight(value: float) -> Tensor:
    """The KL weight of a step."""
    return torch.tensor(value, dtype=torch.float64)


def same(one: Step, other: Step, tolerance: float = 1e-5) -> None:
    assert one.loss == pytest.approx(other.loss, rel=tolerance), "loss"
    assert any(g is not None for g in other.gradients)
    sizes = [0.0 if g is None else g.abs().max().item() for g in other.gradients]
    for a, b, size in zip(one.gradients, other.gradients, sizes, strict=True):
        assert (a is None) == (b is None), "which parameters have a gradient"
        if a is not None:
            assert a.dtype == b.dtype
            # Some are zero but for rounding, such as that of a bias before a normalization.
            allowed = tolerance * (size + max(sizes) / 10)
            assert (a - b).abs().max() <= allowed, "gradient"
    assert torch.equal(one.next, other.next), "random state"


def check(
    elbo: Any, program: Any, *args: Any, mode: Any = "graph", tolerance: float = 1e-5, **kwargs: Any
) -> Captured:
    """Captured as uncaptured, at the step that captures and at a later one of other draws."""
    captured = capture(elbo, mode)
    for seed in (1, 2):
        found = step(captured, program, *args, seed=seed, **kwargs)
        same(found, step(elbo, program, *args, seed=seed, **kwargs), tolerance)
    assert captured.captures == 1
    return captured


def check_falls_back(elbo: Any, program: Any, *args: Any, reason: str) -> Captured:
    """As uncaptured, with one warning over all steps."""
    captured = capture(elbo, "graph")
    with pytest.warns(
        UserWarning, match=f"{type(elbo).__name__} runs uncaptured: {reason}"
    ) as all_:
        found = step(captured, program, *args)
    assert len(all_) == 1
    same(found, step(elbo, program, *args), 1e-6)
    same(step(captured, program, *args, seed=2), step(elbo, program, *args, seed=2), 1e-6)
    return captured


def small_vae(tmp_path, name: str = "bernoulli", **settings: Any):
    """A VAE, or an autoencoder, in float32, and x."""
    vae, splits = example_vae(name, tmp_path, **settings)
    return vae.float(), batch(splits, name).float()


def digits_vae(digits: pyro_vae.Splits, **settings: Any):
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=3, hidden=(8,), **settings), digits)
    return vae, next(digits.train.fixed(vae.likelihood_module.units, seed=0, num_images=16))


# --- equal to the ELBO itself ---------------------------------------------------------------------

ALONE = ("trace", "beta", "mean-field")


@pytest.mark.parametrize(
    ("name", "count"),
    [(n, 1 if n in ALONE else 8) for n in typing.get_args(Objective)] + [("trace", 8)],
)
def test_every_objective(name, count, digits):
    vae, x = digits_vae(digits)
    check(objective(name, count, max_plate_nesting=1), vae, x)


@all_likelihoods
def test_every_likelihood(name, tmp_path):
    check(objective("trace", 1, 1), *small_vae(tmp_path, name))


@pytest.mark.parametrize("kind", ["vae", "ae"])
@pytest.mark.parametrize(("architecture", "hidden"), [("mlp", (8,)), ("conv", (4,))])
def test_every_architecture(kind, architecture, hidden, tmp_path):
    settings = {"kind": kind, "architecture": architecture, "hidden": hidden}
    check(objective("trace", 1, 1), *small_vae(tmp_path, shape=(1, 8, 8), **settings))


@pytest.mark.parametrize("guide", ["exact", "diagonal"])
def test_linear_gaussian(guide):
    torch.manual_seed(0)
    vae = LinearGaussian(torch.randn(4, 2), torch.randn(4), 0.7, guide, scale_factor=1.2, shift=0.4)
    check(objective("dreg", 8, 1), vae, rows())


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
    ],
    ids=["Trace", "Trace-3", "Trace-vectorized", "TraceMeanField"],
)
def test_elbos_of_pyro(elbo):
    check(elbo, toy(), rows())


def test_found_plate_nesting():
    """Pyro's vectorized particles look for it at their first run."""
    captured = capture(Trace_ELBO(num_particles=3, vectorize_particles=True), "graph")
    known = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    program = toy()
    for seed in (1, 2):
        same(step(captured, program, rows(), seed=seed), step(known, program, rows(), seed=seed))
    assert captured.captures == 1


class Discrete(Toy):
    """With a score in the gradient."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)[:, :2]).to_event(1))


class Positive(Toy):
    """With a gradient through draws that are rejected and drawn again."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            shape, rate = self.encoder(x).exp().chunk(2, -1)
            pyro.sample("z", dist.Gamma(shape, rate).to_event(1))


class Subsampled(Toy):
    """Each step takes other rows."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), subsample_size=3, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x[index])

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), subsample_size=3, dim=-1) as index:
            loc, log_scale = self.encoder(x[index]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("kind", [Discrete, Positive, Subsampled])
def test_programs_with_draws_of_other_kinds(kind):
    check(Trace_ELBO(), toy(kind=kind), rows())


@pytest.mark.slow
def test_compiled_particles_and_convolutions(tmp_path):
    settings = {"architecture": "conv", "shape": (1, 8, 8), "hidden": (4,)}
    check(objective("dreg", 8, 1), *small_vae(tmp_path, **settings), mode="compiled")


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15),
    reason="compiled by torch 2.11 and earlier, a graph with several kinds of draws has other ones",
)
def test_compiled_dropout_and_batch_normalization():
    """Draws in the networks and from the prior, and buffers that the graph writes to."""
    elbo = objective("mmd", 1, 1, mmd_weight=1.0)
    program = toy(nn.BatchNorm1d(5), nn.Dropout(0.4))
    x = rows()
    start = copy.deepcopy(program.state_dict())
    ends, found = [], []
    for loss in (capture(elbo, "compiled"), elbo):
        program.load_state_dict(start)
        found.append([step(loss, program, x, seed=seed) for seed in range(3)])
        ends.append(copy.deepcopy(program.state_dict()))
    for one, other in zip(*found, strict=True):
        same(one, other)
    assert ends[1]["decoder.1.num_batches_tracked"] == 3
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_step_within_training(digits):
    """One graph: fresh draws, an observer, weights that move, and a KL weight that does."""
    vae, x = digits_vae(digits)
    elbo = objective("trace", 1, 1)
    captured = capture(elbo, "compiled", Totals())
    same(step(captured, vae, x, kl_weight=weight(1)), step(elbo, vae, x))
    check_draws(captured, vae, x, kl_weight=weight(1))
    check_observed(captured, vae, x, kl_weight=weight(1))
    for value in (1.0, 0.25):
        kl_weight = {"kl_weight": weight(value)}
        check_training(elbo, captured, vae, x, one_optimizer, 1e-4, **kl_weight)
    assert captured.captures == 1


# --- draws ----------------------------------------------------------------------------------------


def check_draws(captured: Captured, program: Any, x: Tensor, **kwargs: Any) -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        values = [
            captured.loss_and_grads(program.model, program.guide, x, **kwargs) for _ in range(5)
        ]
        return [with_observed(value)[0] for value in values]

    first = losses(3)
    assert len(set(first)) == 5
    assert losses(3) == first
    assert not set(losses(4)) & set(first)


def test_draws_are_fresh_and_follow_the_seed(digits):
    check_draws(capture(objective("trace", 1, 1), "graph"), *digits_vae(digits))


# --- training -------------------------------------------------------------------------------------


def one_optimizer(program: Any) -> Any:
    return OneOptimizer(torch.optim.Adam(program.parameters(), lr=0.01))


def pyro_optimizer(program: Any) -> Any:
    return pyro.optim.Adam({"lr": 0.01})


def trained(elbo: Any, program: Any, x: Tensor, optimizer: Callable[..., Any], **kwargs: Any):
    """Losses, all values and the store's names, after 20 steps."""
    pyro.clear_param_store()
    svi = SVI(program.model, program.guide, optimizer(program), elbo)
    torch.manual_seed(2)
    losses = [with_observed(svi.step(x, **kwargs))[0] for _ in range(20)]
    return losses, copy.deepcopy(program.state_dict()), set(pyro.get_param_store().keys())


def check_training(
    elbo: Any,
    captured: Captured,
    program: nn.Module,
    x: Tensor,
    optimizer: Callable[..., Any],
    tolerance: float,
    **kwargs: Any,
) -> None:
    start = copy.deepcopy(program.state_dict())
    runs = []
    for loss in (elbo, captured):
        program.load_state_dict(start)
        for p in program.parameters():
            p.grad = None
        runs.append(trained(loss, program, x, optimizer, **kwargs))
    program.load_state_dict(start)
    (losses, values, names), (captured_losses, captured_values, captured_names) = runs
    assert captured_losses == pytest.approx(losses, rel=tolerance)
    assert captured_names == names
    assert len(names) == len(list(program.parameters()))
    for name, p in program.named_parameters():
        torch.testing.assert_close(captured_values[name], values[name], rtol=0, atol=tolerance)
        assert (values[name] - p).abs().max() > 0.05, f"{name} was not trained"


def test_training_with_one_optimizer(digits):
    elbo = objective("trace", 1, 1)
    check_training(elbo, capture(elbo, "graph"), *digits_vae(digits), one_optimizer, 1e-6)


def test_training_with_the_optimizer_of_pyro(digits):
    elbo = objective("trace", 1, 1)
    check_training(elbo, capture(elbo, "graph"), *digits_vae(digits), pyro_optimizer, 1e-6)


def test_training_with_the_optimizer_of_pyro_once_captured(digits):
    elbo = objective("trace", 1, 1)
    captured = capture(elbo, "graph")
    vae, x = digits_vae(digits)
    step(captured, vae, x)
    check_training(elbo, captured, vae, x, pyro_optimizer, 1e-6)


def test_parameters_are_seen_at_every_step():
    """At the step that captures, and at the later ones; by whoever traces them."""
    captured, program = capture(Trace_ELBO(), "graph"), toy()
    for _ in range(2):
        with poutine.trace(param_only=True) as seen:
            captured.loss_and_grads(program.model, program.guide, rows())
        values = {id(site["value"].unconstrained()) for site in seen.trace.nodes.values()}
        assert values == {id(p) for p in program.parameters()}


def test_store_cleared_between_steps():
    """The parameters of modules come back under their names."""
    program, x = toy(), rows()
    captured = capture(Trace_ELBO(), "graph")
    step(captured, program, x)
    step(Trace_ELBO(), program, x)
    names = dict(pyro.get_param_store().named_parameters())
    pyro.clear_param_store()
    found = step(captured, program, x, seed=2)
    again = dict(pyro.get_param_store().named_parameters())
    assert captured.captures == 1
    assert list(again) == list(names)
    assert all(again[name] is names[name] for name in names)
    same(found, step(Trace_ELBO(), program, x, seed=2))
    with poutine.trace(param_only=True) as seen:
        captured.loss_and_grads(program.model, program.guide, x)
    assert set(seen.trace.nodes) == set(names)


def test_store_cleared_of_plain_parameters():
    """New ones are drawn, and the gradient reaches them and not the old."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(4))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    program, x = Functions(model, lambda x: None), rows()
    captured = capture(Trace_ELBO(), "graph")
    step(captured, program, x)
    (old,) = program.parameters()
    old.grad = None
    pyro.clear_param_store()
    torch.manual_seed(7)
    captured.loss_and_grads(program.model, program.guide, x)
    (new,) = program.parameters()
    assert not torch.equal(new, old)
    assert old.grad is None
    assert new.grad is not None
    same(step(captured, program, x), step(Trace_ELBO(), program, x))
    assert captured.captures == 2


def test_random_state_where_plain_parameters_are_new():
    """Their start is no draw, so that the first step's draws could be those of the ELBO itself."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(4))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    found = []
    for elbo in (capture(Trace_ELBO(), "graph"), Trace_ELBO()):
        pyro.clear_param_store()
        found.append(step(elbo, Functions(model, guide), rows()))
    same(*found)


# --- automatic guides, and parameters with constraints --------------------------------------------


def regression(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def by_hand(x: Tensor) -> None:
    loc = pyro.param("q_loc", torch.full((4,), 0.1))
    scale = pyro.param("q_scale", torch.full((4,), 0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale).to_event(1))
    pyro.sample("scale", dist.LogNormal(pyro.param("q_log", torch.tensor(0.2)), 0.3))


def guided(kind: Any) -> Functions:
    torch.manual_seed(0)
    guide = by_hand if kind is by_hand else kind(regression)
    guide(rows())
    return Functions(regression, guide)


every_guide = pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, by_hand])


@every_guide
def test_guides_that_make_their_own_parameters(kind):
    check(Trace_ELBO(num_particles=2), guided(kind), rows())


@every_guide
def test_training_of_guides_that_make_their_own_parameters(kind):
    runs = []
    for elbo in (Trace_ELBO(), capture(Trace_ELBO(), "graph")):
        pyro.clear_param_store()
        program = guided(kind)
        svi = SVI(program.model, program.guide, one_optimizer(program), elbo)
        before = [p.detach().clone() for p in program.parameters()]
        losses = [svi.step(rows()) for _ in range(20)]
        store = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
        moved = [(p - b).abs().max() for p, b in zip(program.parameters(), before, strict=True)]
        assert min(moved) > 0.02
        runs.append((losses, store))
    (losses, store), (captured_losses, captured_store) = runs
    assert captured_losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(captured_store, store, rtol=0, atol=1e-6)


def test_store_cleared_of_an_automatic_guide():
    captured, program, x = capture(Trace_ELBO(), "graph"), guided(AutoNormal), rows()
    step(captured, program, x)
    pyro.clear_param_store()
    captured.loss_and_grads(program.model, program.guide, x)
    assert (pyro.param("AutoNormal.scales.loc") > 0).all()
    same(step(captured, program, x), step(Trace_ELBO(), program, x))


# --- never stale ----------------------------------------------------------------------------------


def test_other_batch_sizes_are_captured_anew_and_kept():
    captured, program = capture(Trace_ELBO(), "graph"), toy()
    for count, expected in ((6, 1), (3, 2), (6, 2), (1, 3), (3, 3)):
        found = step(captured, program, rows(count), seed=count)
        same(found, step(Trace_ELBO(), program, rows(count), seed=count))
        assert captured.captures == expected


def test_batches_of_other_values_and_layout():
    captured, program = capture(Trace_ELBO(), "graph"), toy()
    turned = rows(4).T  # the same shape as rows(4), column by column
    for x, expected in ((rows(4), 1), (rows(4, seed=6), 1), (turned, 2), (turned + 1.0, 2)):
        same(step(captured, program, x), step(Trace_ELBO(), program, x))
        assert captured.captures == expected


def decoder_weight(program: Toy) -> nn.Parameter:
    return program.decoder[0].weight


def set_attribute(owner: Callable[[Toy], Any], name: str, value: Any) -> Callable[[Toy], None]:
    return lambda program: setattr(owner(program), name, value)


def first(program: Toy) -> nn.Linear:
    return program.decoder[0]


def itself(program: Toy) -> Toy:
    return program


@torch.no_grad()
def move_weights(program: Toy) -> None:
    for p in program.parameters():
        p.mul_(1.3).add_(0.1)


def load_weights(program: Toy) -> None:
    program.load_state_dict({k: v + 0.2 for k, v in program.state_dict().items()})


def new_data(program: Toy) -> None:
    decoder_weight(program).data = torch.full((5, 2), 0.3)


def replace_layer(program: Toy) -> None:
    program.decoder = copy.deepcopy(program.decoder)
    move_weights(program)


def insert_layer(program: Toy) -> None:
    program.decoder.append(nn.Tanh())


CHANGES = {
    "weights moved in place": (move_weights, False),
    "weights loaded": (load_weights, False),
    "data of a parameter replaced": (new_data, False),
    "buffer moved in place": (lambda p: p.offset.add_(0.5), False),
    "buffer replaced": (set_attribute(itself, "offset", torch.ones(4)), True),
    "parameter replaced": (
        set_attribute(first, "weight", nn.Parameter(torch.full((5, 2), 0.3))),
        True,
    ),
    "parameter taken away": (set_attribute(first, "bias", None), True),
    "evaluation mode": (lambda p: p.eval(), True),
    "dropout changed": (lambda p: setattr(p.decoder[1], "p", 0.9), True),
    "attribute changed": (set_attribute(itself, "noise", 2.0), True),
}
STALE = {
    "layer replaced": replace_layer,
    "layer inserted": insert_layer,
    "parameter in place of None": lambda p: setattr(p.encoder, "bias", nn.Parameter(torch.ones(4))),
    "tensor attribute replaced": set_attribute(itself, "shift", torch.ones(4)),
}


def check_change(change: Callable[[Toy], Any], anew: bool | None) -> None:
    program, x = toy(nn.Dropout(0.4)), rows()
    program.encoder.bias = None
    captured = capture(Trace_ELBO(), "graph")
    before = step(captured, program, x)
    change(program)
    pyro.clear_param_store()  # Pyro would put its own parameters back into the modules
    after = step(captured, program, x)
    assert abs(after.loss - before.loss) > 1e-3  # so that the change would be missed
    same(after, step(Trace_ELBO(), program, x))
    if anew is not None:
        assert captured.captures == 1 + anew


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seen(name):
    """Captured anew where the graph is no longer right, and only there."""
    check_change(*CHANGES[name])


@pytest.mark.parametrize("name", STALE)
def test_change_is_seen_in_what_a_module_is_made_of(name):
    check_change(STALE[name], None)


def test_training_and_evaluation_by_turns():
    """More often than graphs are kept, as in a loop that validates without its gradient."""
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(nn.Dropout(0.5)), rows()
    for _ in range(3):
        program.train()
        same(step(captured, program, x), step(Trace_ELBO(), program, x))
        program.eval()
        torch.manual_seed(3)
        found = captured.loss(program.model, program.guide, x)
        torch.manual_seed(3)
        assert found == pytest.approx(Trace_ELBO().loss(program.model, program.guide, x), rel=1e-6)
    assert captured.captures == 2


def test_other_dtype():
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    step(captured, program, x)
    program.double()
    program.shift = program.shift.double()
    pyro.clear_param_store()
    found = step(captured, program, x.double())
    assert found.gradients[0].dtype == torch.float64
    same(found, step(Trace_ELBO(), program, x.double()), 1e-12)
    assert captured.captures == 2


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_parameter_held_fixed_and_freed():
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    for free in (True, False, True):
        pyro.clear_param_store()
        decoder_weight(program).requires_grad_(free)
        found = step(captured, program, x)
        held = [p is decoder_weight(program) and not free for p in program.parameters()]
        assert [g is None for g in found.gradients] == held
        same(found, step(Trace_ELBO(), program, x))


def test_autocast_and_the_weights_of_now():
    """Autocast keeps copies of weights; they must not become part of the graph."""
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    same(step(captured, program, x), step(Trace_ELBO(), program, x))
    for _ in range(2):
        found = []
        for elbo in (captured, Trace_ELBO()):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(step(elbo, program, x))
        same(*found)
        move_weights(program)
    assert captured.captures == 2


@pytest.mark.parametrize("name", [n for n in KL_WEIGHTED if n != "beta"])
def test_kl_weight_is_an_input(name):
    elbo, program, x = objective(name, 1, 1), toy(), rows()
    captured = capture(elbo, "graph")
    losses = set()
    for value in (1, 0.3, 0.0, 2, 1.0):
        found = step(captured, program, x, kl_weight=weight(value))
        same(found, step(elbo, program, x, kl_weight=weight(value)))
        losses.add(found.loss)
    assert len(losses) == 4
    assert elbo.kl_weight == 1
    assert captured.captures == 1


@pytest.mark.parametrize("name", [n for n in KL_WEIGHTED if n != "beta"])
def test_kl_weight_that_is_a_number_is_part_of_the_graph(name):
    """As an argument and as an attribute of the ELBO, which holds where a step gives none."""
    elbo, program, x = objective(name, 1, 1), toy(), rows()
    captured = capture(elbo, "graph")
    losses = set()
    for value, expected in ((1, 1), (0.3, 2), (0.0, 3), (0.3, 3)):
        found = step(captured, program, x, kl_weight=value)
        same(found, step(elbo, program, x, kl_weight=weight(value)))
        losses.add(found.loss)
        assert captured.captures == expected
    for value, expected in ((1, 4), (0.3, 5), (0.0, 6), (0.3, 6)):
        elbo.kl_weight = value
        found = step(captured, program, x)
        same(found, step(objective(name, 1, 1), program, x, kl_weight=weight(value)))
        losses.add(found.loss)
        assert captured.captures == expected
    assert len(losses) == 3


@pytest.mark.parametrize("as_argument", [True, False])
def test_kl_weight_in_double_precision(as_argument):
    elbo, program, x = objective("trace", 1, 1), toy().double(), rows().double()
    program.shift = program.shift.double()
    kwargs = {"kl_weight": weight(0.3)} if as_argument else {}
    elbo.kl_weight = 1.0 if as_argument else 0.3
    check(elbo, program, x, tolerance=1e-12, **kwargs)


@pytest.mark.parametrize(
    ("elbo", "attribute", "value"),
    [
        (Trace_ELBO(), "num_particles", 3),
        (objective("free-bits", 1, 1), "free_bits", 2.0),
        (objective("beta-tc", 1, 1), "beta", 3.0),
        (objective("mmd", 1, 1), "mmd_weight", 7.0),
        (objective("iwae", 4, 1), "num_particles", 6),
        (objective("dreg", 4, 1), "route", "total"),
        pytest.param(
            objective("iwae", 4, 1),
            "rule",
            weighted.stl,
        ),
    ],
)
def test_attribute_of_the_elbo_changed(elbo, attribute, value):
    elbo, program, x = copy.copy(elbo), toy(), rows()
    captured = capture(elbo, "graph")
    before = step(captured, program, x)
    setattr(elbo, attribute, value)
    after = step(captured, program, x)
    same(after, step(elbo, program, x))
    if attribute != "route":  # which changes the gradient alone
        assert before.loss != pytest.approx(after.loss, rel=1e-4)


def test_other_model_of_the_same_shape():
    captured, one = capture(Trace_ELBO(), "graph"), toy()
    other = copy.deepcopy(one)
    move_weights(other)
    for program in (one, other, one):
        pyro.clear_param_store()
        same(step(captured, program, rows()), step(Trace_ELBO(), program, rows()))
    assert captured.captures == 2


class Weighted(Factor):
    """Takes arguments of every kind."""

    def loss(
        self,
        x: Tensor,
        power: int = 1,
        half: bool = False,
        name: str = "sum",
        parts: Any = (),
        extra: Tensor | None = None,
    ) -> Tensor:
        value = getattr((self.w * x).abs() ** power, name)()
        if half:
            value = value / 2
        for part in parts:
            value = value + part["scale"] * (part["x"] * self.w).exp().sum()
        return value if extra is None else value + (extra * self.w).sum() ** 2


CALLS = [
    ((), {}),
    ((2,), {}),
    ((2.0,), {}),
    ((1,), {"half": True}),
    ((), {"half": True}),
    ((), {"name": "mean"}),
    ((), {"extra": torch.ones(4)}),
    ((), {"extra": torch.full((4,), 2.0)}),
    ((), {"parts": [{"x": torch.ones(4), "scale": 1.0}]}),
    ((), {"parts": [{"x": torch.ones(4), "scale": 0.5}]}),
    ((), {"parts": [{"x": torch.zeros(4), "scale": 0.5}]}),
    ((), {"parts": ({"x": torch.zeros(4), "scale": torch.tensor(3.0)},) * 2}),
]


def test_arguments_of_every_kind():
    captured, program, x = capture(Trace_ELBO(), "graph"), Weighted(), rows()
    for args, kwargs in CALLS * 2:
        found = step(captured, program, x, *args, **kwargs)
        same(found, step(Trace_ELBO(), program, x, *args, **kwargs))
    assert captured.captures == len(CALLS) - 2  # as many as differ in more than tensors' values


class Difference(Factor):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.full((4,), 0.5))

    def loss(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.w * (one + 2 * other - self.middle)).square().sum()


def test_one_tensor_given_twice_and_then_two():
    captured, program, x = capture(Trace_ELBO(), "graph"), Difference(), rows()
    for other in (x, x + 1.0):
        found = step(captured, program, x, other)
        same(found, step(Trace_ELBO(), program, x, other))


def test_a_buffer_given_as_argument():
    captured, program = capture(Trace_ELBO(), "graph"), Difference()
    for one in (program.middle, torch.ones(4)):
        found = step(captured, program, one, torch.zeros(4))
        same(found, step(Trace_ELBO(), program, one, torch.zeros(4)))


class Signed(Factor):
    def loss(self, sign: float) -> Tensor:
        return math.copysign(1.0, sign) * self.w.square().sum()


def test_zero_with_a_sign():
    captured, program = capture(Trace_ELBO(), "graph"), Signed()
    for sign in (0.0, -0.0):
        same(step(captured, program, sign), step(Trace_ELBO(), program, sign))


class Box:
    """An argument that is no container to torch, with a tensor in it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Boxed(Factor):
    def loss(self, box: Box) -> Tensor:
        return (self.w * box.x).square().sum()


def test_argument_whose_change_could_not_be_seen():
    reason = "changes inside an argument cannot be seen: Box"
    check_falls_back(Trace_ELBO(), Boxed(), Box(rows()), reason=reason)


@pytest.mark.slow
def test_compiled_graphs_are_not_taken_for_one_another():
    """Torch's own guards are off: that each call finds its graph is up to us."""
    elbo = Trace_ELBO()
    captured = capture(elbo, "compiled")
    programs = [toy(nn.Dropout(0.5)), toy(nn.Dropout(0.5))]
    with torch.no_grad():
        for p in programs[1].parameters():
            p.mul_(1.5)
    for turn in range(2):
        for program in programs:
            for x in (rows(), rows(3), rows().double().float()):
                same(step(captured, program, x, seed=turn), step(elbo, program, x, seed=turn))
                losses = []
                for loss in (captured, elbo):
                    torch.manual_seed(turn)
                    losses.append(loss.loss(program.model, program.guide, x))
                assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert captured.captures == 8
    programs[0].eval()
    same(step(captured, programs[0], rows()), step(elbo, programs[0], rows()))
    programs[0].train()
    same(step(captured, programs[0], rows()), step(elbo, programs[0], rows()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        same(step(captured, programs[0], rows()), step(elbo, programs[0], rows()))
        torch.use_deterministic_algorithms(True)
        same(step(captured, programs[0], rows()), step(elbo, programs[0], rows()))
        with torch.inference_mode():
            torch.manual_seed(1)
            assert math.isfinite(captured.loss(programs[0].model, programs[0].guide, rows()))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


# --- buffers --------------------------------------------------------------------------------------


def test_running_means_count_every_step_once():
    """What capturing runs besides must not count."""
    program = toy(nn.BatchNorm1d(5))
    start = copy.deepcopy(program.state_dict())
    ends = []
    for elbo in (Trace_ELBO(), capture(Trace_ELBO(), "graph")):
        program.load_state_dict(start)
        torch.manual_seed(3)
        for seed in range(5):
            elbo.loss_and_grads(program.model, program.guide, rows(seed=seed))
        ends.append(copy.deepcopy(program.state_dict()))
    assert ends[0]["decoder.1.num_batches_tracked"] == 5
    assert ends[0]["decoder.1.running_mean"].abs().max() > 0.1
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


# --- what cannot be captured ----------------------------------------------------------------------


class OnDraw(Toy):
    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = 1.0 if z.sum() > 0 else 2.0
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)


class OnParameter(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def model(self, x: Tensor) -> None:
        with poutine.scale(scale=1.0 if self.gain.item() > 0 else 2.0):
            super().model(x)


class OnPartOfParameter(Toy):
    def model(self, x: Tensor) -> None:
        with poutine.scale(scale=1.0 if decoder_weight(self)[0, 0] > 0 else 2.0):
            super().model(x)


class OnArgument(Toy):
    def model(self, x: Tensor) -> None:
        with poutine.scale(scale=1.0 if bool(x.sum() > 0) else 2.0):
            super().model(x)


class Masked(Factor):
    def loss(self, x: Tensor) -> Tensor:
        return (self.w.expand_as(x)[x > 0] * x[x > 0]).square().sum()


class OnList(Factor):
    def loss(self, x: Tensor) -> Tensor:
        return self.w.square().sum() * sum(x[0].tolist())


class OnArray(Factor):
    def loss(self, x: Tensor) -> Tensor:
        return self.w.square().sum() * float(np.asarray(x).sum())


class OnNumbers(Factor):
    def loss(self, x: Tensor) -> Tensor:
        return self.w.square().sum() * float(x.numpy()[0].sum())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (OnDraw, ".*value"),
        (OnParameter, "its control flow depends on the values of a tensor"),
        (OnPartOfParameter, ".*value"),
        (OnArgument, ".*value"),
        (Masked, "a shape in it depends on the values of a tensor"),
        (OnList, "it reads the values of a tensor, in Tensor.tolist"),
        (OnArray, "it reads the values of a tensor, in Tensor.(numpy|__array__)"),
        (OnNumbers, "it reads the values of a tensor, in Tensor.numpy"),
    ],
)
def test_control_flow_that_depends_on_values(program, reason):
    torch.manual_seed(0)
    check_falls_back(Trace_ELBO(), program(), rows(), reason=reason)


def test_unhashable_argument():
    class Chosen(Factor):
        def loss(self, x: Tensor, columns: set[int]) -> Tensor:
            return sum(((self.w * x)[:, i].square().sum() for i in columns), torch.zeros(()))

    reason = "changes inside an argument cannot be seen: set"
    check_falls_back(Trace_ELBO(), Chosen(), rows(), {0, 2}, reason=reason)


@pytest.mark.parametrize("kind", [RenyiELBO, TraceGraph_ELBO])
def test_elbo_that_cannot_be_differentiated(kind):
    """TraceGraph_ELBO has a gradient, but no loss that it is the gradient of."""
    options = {"alpha": 0.5, "num_particles": 2} if kind is RenyiELBO else {}
    elbo = kind(**options)
    if hasattr(elbo, "differentiable_loss"):
        check(elbo, toy(), rows())
    else:
        check_falls_back(elbo, toy(), rows(), reason="it has no differentiable_loss")


def test_enumerated_sites():
    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    program, x = Functions(model, lambda x: None), rows()[:, 0]
    with poutine.block():
        model(x)  # which fills the store
    check_falls_back(TraceEnum_ELBO(max_plate_nesting=1), program, x, reason="")


def test_outer_handler():
    """Only as long as it is there."""
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    with poutine.scale(scale=2.0):
        with pytest.warns(UserWarning, match="within other handlers: ScaleMessenger") as all_:
            scaled = step(captured, program, x)
        assert len(all_) == 1
        same(scaled, step(Trace_ELBO(), program, x))
    plain = step(captured, program, x)
    same(plain, step(Trace_ELBO(), program, x))
    assert captured.captures == 1
    assert scaled.loss == pytest.approx(2 * plain.loss, rel=1e-5)


def test_outer_handler_that_only_hides():
    """A block, as around Pyro's MCMC, changes nothing; what is around the block still does."""
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    with poutine.block():
        hidden = step(captured, program, x)
    same(hidden, step(Trace_ELBO(), program, x))
    assert captured.captures == 1
    with (
        poutine.scale(scale=2.0),
        poutine.block(),
        pytest.warns(UserWarning, match="other handlers: ScaleMessenger"),
    ):
        same(step(captured, program, x), step(Trace_ELBO(), program, x))


@pytest.mark.filterwarnings("ignore:Trace_ELBO runs uncaptured. it runs within other handlers")
def test_outer_handler_around_a_later_step():
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    step(captured, program, x)
    with poutine.scale(scale=2.0):
        same(step(captured, program, x), step(Trace_ELBO(), program, x))


def test_program_that_is_not_the_same_at_each_run():
    class Restless(Toy):
        def model(self, x: Tensor) -> None:
            with poutine.scale(scale=1 + random.random()):
                super().model(x)

    captured, program, x = capture(Trace_ELBO(), "graph"), toy(kind=Restless), rows()
    state = random.getstate()
    try:
        random.seed(0)
        with pytest.warns(UserWarning, match="a program differs between runs") as all_:
            step(captured, program, x)
        assert len(all_) == 1
        found = []
        for elbo in (captured, Trace_ELBO()):
            random.seed(1)
            found.append(step(elbo, program, x))
        same(*found)
    finally:
        random.setstate(state)


def test_argument_that_takes_a_gradient():
    program, x = toy(), rows().requires_grad_()
    check_falls_back(Trace_ELBO(), program, x, reason="an argument requires a gradient")
    x.grad = None
    captured = capture(Trace_ELBO(), "eager")
    captured.differentiable_loss(program.model, program.guide, x).backward()
    assert x.grad is not None


def test_more_shapes_than_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(capturing, "MAX_GRAPHS", 2)
    captured, program = capture(Trace_ELBO(), "graph"), toy()
    for count in (2, 3):
        step(captured, program, rows(count))
    with pytest.warns(UserWarning, match="it was captured 2 times") as all_:
        step(captured, program, rows(4))
    assert len(all_) == 1
    for count in (4, 5, 2, 3):
        same(step(captured, program, rows(count)), step(Trace_ELBO(), program, rows(count)))
    assert captured.captures == 2


def test_particles_in_chunks(monkeypatch):
    """Those that are drawn once more, with the random state set back, cannot be captured."""
    monkeypatch.setattr(memory, "MEMORY_VALUES", 2 * rows().numel())
    check(objective("trace", 3, 1), toy(), rows())
    check_falls_back(objective("iwae", 3, 1), toy(), rows(), reason="its graph gives another")


def test_errors_of_the_program_are_its_own():
    class Broken(Toy):
        def guide(self, x: Tensor) -> None:
            if len(x) == 1:
                raise ValueError("one row is not enough")
            super().guide(x)

    captured, program = capture(Trace_ELBO(), "graph"), toy(kind=Broken)
    for _ in range(2):
        with pytest.raises(ValueError, match="one row is not enough"):
            step(captured, program, rows(1))
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            step(captured, program, rows()[:, :3])
    same(step(captured, program, rows()), step(Trace_ELBO(), program, rows()))


def test_errors_in_the_capturing_need_no_words(monkeypatch):
    def refuse(run: Any, inputs: list[Tensor]) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(build, "trace_graph", refuse)
    check_falls_back(Trace_ELBO(), toy(), rows(), reason="NotImplementedError")


@pytest.mark.parametrize(
    ("fault", "step_of_capture"),
    diagonal(
        [TypeError, KeyError, AttributeError, AssertionError],
        ["trace_graph", "_own_result", "_find_copied", "Guards", "compile_graph"],
    ),
)
def test_fault_of_ours_is_raised(fault, step_of_capture, monkeypatch):
    """In any step of a capture, rather than turned into a warning; random state is restored."""
    program, x = toy(nn.BatchNorm1d(5)), rows()
    mode = "compiled" if step_of_capture == "compile_graph" else "graph"
    captured = capture(Trace_ELBO(), mode)
    before = copy.deepcopy(program.state_dict())

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise fault("planted")

    with monkeypatch.context() as patched:
        patched.setattr(build, step_of_capture, raises)
        torch.manual_seed(1)
        with pytest.raises(fault, match="planted"):
            captured.loss_and_grads(program.model, program.guide, x)
        after = torch.rand(())
        torch.manual_seed(1)
        assert torch.equal(after, torch.rand(()))
    assert all(torch.equal(before[key], value) for key, value in program.state_dict().items())
    captured.graphs.mode = "graph"
    same(step(captured, program, x), step(Trace_ELBO(), program, x))


def test_more_memory_than_there_is(monkeypatch):
    """Capturing holds two sets of gradients, a step one."""

    def exhausted(*args: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(build, "_own_result", exhausted)
    check_falls_back(Trace_ELBO(), toy(), rows(), reason="out of memory")


@pytest.mark.filterwarnings("ignore:Trace_ELBO runs uncaptured")
def test_new_parameters_of_a_program_that_cannot_be_captured():
    """They are drawn by the eager run, as if nothing had been drawn before."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(4))
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        scale = 2.0 if z.sum() > 0 else 1.0
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("q", lambda: torch.randn(4))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    found = []
    for elbo in (capture(Trace_ELBO(), "graph"), Trace_ELBO()):
        pyro.clear_param_store()
        torch.manual_seed(1)
        loss = torch.tensor(elbo.loss_and_grads(model, guide, rows()))
        found.append((pyro.param("loc").clone(), pyro.param("q").clone(), torch.rand(()), loss))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_unhashable_model():
    class Called:
        __hash__ = None

        def __init__(self, program: Any) -> None:
            self.program = program

        def __call__(self, x: Tensor) -> None:
            self.program(x)

    own = toy()
    program = Functions(Called(own.model), Called(own.guide))
    step(Trace_ELBO(), program, rows())  # which fills the store
    check_falls_back(Trace_ELBO(), program, rows(), reason="model and guide must be hashable")


def test_elbos_that_use_torch_jit():
    program = toy()
    for kind in (JitTrace_ELBO, JitTraceMeanField_ELBO):
        captured = capture(kind(), "graph")
        call = captured.call(program.model, program.guide, (rows(),), {})
        with pytest.warns(UserWarning, match="it uses torch.jit"):
            graph = captured.graphs.find(call)
        assert graph is None


NO_COMPILER = """
import warnings, torch, sys
sys.path[:0] = ["tests", "tests/capture"]
from test_captured import *
elbo, program, x = Trace_ELBO(), toy(), rows()
captured = capture(elbo, "compiled")
with warnings.catch_warnings(record=True) as all_:
    warnings.simplefilter("always")
    for seed in (1, 2):
        same(step(captured, program, x, seed=seed), step(elbo, program, x, seed=seed))
found = [str(w.message) for w in all_ if "captured" in str(w.message)]
assert len(found) == 1 and found[0].startswith("the captured graph runs uncompiled: "), found
assert captured.captures == 1
print("uncompiled")
"""


@pytest.mark.slow
def test_machine_without_a_compiler(tmp_path):
    assert "uncompiled" in without_a_compiler(NO_COMPILER, tmp_path)


# --- the ways to ask for it -----------------------------------------------------------------------


def test_loss_without_gradient():
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    found = []
    for elbo in (captured, captured, Trace_ELBO()):
        torch.manual_seed(4)
        value = elbo.loss(program.model, program.guide, x)
        assert isinstance(value, float)
        found.append((value, torch.rand(()).item()))
    assert found[0] == found[1]
    assert found[1] == pytest.approx(found[2], rel=1e-6)
    assert all(p.grad is None for p in program.parameters())
    same(step(captured, program, x), step(Trace_ELBO(), program, x))  # nor does it keep others from
    svi = SVI(program.model, program.guide, pyro.optim.Adam({}), captured)
    torch.manual_seed(4)
    assert svi.evaluate_loss(x) == found[0][0]


def test_differentiable_loss_is_scaled_from_outside():
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    expected = step(Trace_ELBO(), program, x)
    module = captured(program.model, program.guide)
    for call in (lambda: captured.differentiable_loss(program.model, program.guide, x), module):
        for p in program.parameters():
            p.grad = None
        torch.manual_seed(1)
        loss = call() if call is not module else call(x)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
        (loss * 3 / 2).backward()
        for p, gradient in zip(program.parameters(), expected.gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient * 3 / 2, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert not captured.differentiable_loss(program.model, program.guide, x).requires_grad


def test_gradients_add_up():
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    one, other = (step(Trace_ELBO(), program, x, seed=seed) for seed in (1, 2))
    for p in program.parameters():
        p.grad = None
    for seed in (1, 2):
        torch.manual_seed(seed)
        captured.loss_and_grads(program.model, program.guide, x)
    for p, a, b in zip(program.parameters(), one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-5, atol=1e-4)


class TwoBiases(Factor):
    """Both have the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(4))

    def loss(self, x: Tensor) -> Tensor:
        return (self.w + self.v - x).square().sum()


class Sum(Factor):
    """Its gradient is a single number, expanded."""

    def loss(self, x: Tensor) -> Tensor:
        return x.sum() - self.w.sum()


@pytest.mark.parametrize("kind", [TwoBiases, Sum])
def test_gradients_may_be_clipped_in_place(kind):
    """As after a backward pass: each parameter has one of its own."""
    captured, program, x = capture(Trace_ELBO(), "graph"), kind(), rows(1)
    for _ in range(2):
        for p in program.parameters():
            p.grad = None
        captured.loss_and_grads(program.model, program.guide, x)
        nn.utils.clip_grad_norm_(program.parameters(), 1.0)
        total = torch.cat([p.grad for p in program.parameters()]).norm()
        assert total.item() == pytest.approx(1.0, rel=1e-4)


def test_wrong_values_are_reported_at_first_sight():
    class Coin(Factor):
        def model(self, x: Tensor) -> None:
            pyro.module("coin", self)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Bernoulli(logits=self.w).to_event(1), obs=x)

    captured, program = capture(Trace_ELBO(), "graph"), Coin()
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="support"):
            step(captured, program, rows())
        step(captured, program, (rows() > 0).float())
        # Which capturing leaves as it is.
        assert pyro.infer.util.is_validation_enabled()
        with pytest.raises(ValueError, match="constraint"):
            dist.Normal(0.0, -torch.ones(()))
    with pyro.validation_enabled(False):
        step(captured, program, (rows(3) > 0).float())
        assert not pyro.infer.util.is_validation_enabled()


def test_eager_is_the_elbo_itself():
    captured, program, x = capture(Trace_ELBO(), "eager"), toy(), rows()
    same(step(captured, program, x), step(Trace_ELBO(), program, x), 0.0)
    assert captured.captures == 0


# --- observers ------------------------------------------------------------------------------------


class Sites(Observer):
    """The guide's draw and the model's reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Any] = {}

    def __enter__(self) -> Any:
        self.sites = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.sites.setdefault(msg["name"], (msg["fn"], msg["value"]))

    def observed(self) -> tuple[Tensor, ...]:
        q, z = self.sites["z"]
        p, x = self.sites["x"]
        return z.detach(), q.entropy().sum(), p.log_prob(x).sum()


class Totals(Sites):
    """Numbers, as `SVI.step` expects."""

    def observed(self) -> tuple[Tensor, ...]:
        return tuple(value.sum() for value in super().observed())


def check_observed(captured: Captured, program: Any, x: Tensor, **kwargs: Any) -> None:
    eager = capture(captured.elbo, "eager", type(captured.observer)())
    draws = []
    for seed in (1, 2):
        found, expected = (
            step(elbo, program, x, seed=seed, **kwargs).observed for elbo in (captured, eager)
        )
        assert len(found) == 3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not any(o.requires_grad for o in found)
        draws.append(found[0])
    assert not torch.equal(*draws)  # nor does a later step write over what was observed


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_every_method_returns_what_is_observed(mode):
    """Behind the loss, in a tuple; without an observer the loss comes alone."""
    program, x = toy(), rows()
    for method in ("loss", "loss_and_grads", "differentiable_loss"):
        values = []
        for observer in (Sites(), None):
            captured = capture(Trace_ELBO(), mode, observer)
            torch.manual_seed(1)
            values.append(getattr(captured, method)(program.model, program.guide, x))
        (loss, z, entropy, log_likelihood), alone = values
        assert type(loss) is type(alone) is (Tensor if method == "differentiable_loss" else float)
        assert torch_item(loss) == torch_item(alone)
        assert z.shape == (ROWS, 2)
        assert entropy.shape == log_likelihood.shape == ()


def test_observed_is_that_of_the_step(digits):
    vae, x = digits_vae(digits)
    check_observed(capture(objective("trace", 1, 1), "graph", Sites()), vae, x)
    captured = capture(objective("mean-field", 1, 1), "graph", Sites())
    assert len(captured.loss(vae.model, vae.guide, x)) == 4
    check_observed(captured, vae, x)


def test_observed_of_what_cannot_be_captured():
    captured, program = capture(Trace_ELBO(), "graph", Sites()), toy(kind=OnDraw)
    with pytest.warns(UserWarning, match="runs uncaptured"):
        step(captured, program, rows())
    check_observed(captured, program, rows())


def test_observed_takes_no_gradient():
    class Draw(Sites):
        def observed(self) -> tuple[Tensor, ...]:
            return (self.sites["z"][1],)

    captured, program = capture(Trace_ELBO(), "eager", Draw()), toy()
    (z,) = step(captured, program, rows()).observed
    assert z.shape == (ROWS, 2)
    assert not z.requires_grad


# --- the guard ------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, alter: Callable[..., Any]) -> None:
    """Graphs whose loss, gradients and observed are altered."""
    traced = build.trace_graph

    def faulty(run: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graph = traced(run, inputs)
        return lambda *tensors: alter(*graph(*tensors))

    monkeypatch.setattr(build, "trace_graph", faulty)


def last_times(factor: float) -> Callable[[Iterable[Tensor]], tuple[Tensor, ...]]:
    return lambda parts: (*list(parts)[:-1], list(parts)[-1] * factor)


FAULTS = {
    "loss": lambda f: lambda loss, gradients, seen: (loss * f, gradients, seen),
    "gradient": lambda f: lambda loss, gradients, seen: (loss, last_times(f)(gradients), seen),
    "observed": lambda f: lambda loss, gradients, seen: (loss, gradients, last_times(f)(seen)),
}


@pytest.mark.parametrize("where", FAULTS)
def test_graph_that_is_wrong_is_refused(where, monkeypatch):
    plant(monkeypatch, FAULTS[where](1.01))
    captured, program, x = capture(Trace_ELBO(), "graph", Sites()), toy(), rows()
    with pytest.warns(UserWarning, match="its graph gives another loss or gradient"):
        found = step(captured, program, x)
    same(found, step(Trace_ELBO(), program, x), 1e-6)


@pytest.mark.parametrize("where", FAULTS)
def test_graph_that_is_rounded_otherwise_is_not(where, monkeypatch):
    plant(monkeypatch, FAULTS[where](1 + 1e-6))
    captured, program = capture(Trace_ELBO(), "graph", Sites()), toy()
    step(captured, program, rows())  # without a warning


def test_graph_of_infinite_gradients_is_held_against_the_rest():
    """A tolerance in terms of the largest element is none where that is infinite."""
    expected, wrong = torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 2.0])
    build._verify((expected,), (expected,))
    with pytest.raises(build.CannotCapture):
        build._verify((expected,), (wrong,))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_gradient_that_is_no_number_at_first():
    """Which is no reason to do without a graph from then on."""
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    start = copy.deepcopy(program.state_dict())
    with torch.no_grad(), pyro.validation_enabled(False):
        decoder_weight(program).fill_(math.nan)
        assert math.isnan(step(captured, program, x).loss)
    program.load_state_dict(start)
    same(step(captured, program, x), step(Trace_ELBO(), program, x))


# --- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elbo_terms", "reconstruct"])
def test_function_is_captured_as_an_elbo_is(name, digits):
    vae, x = digits_vae(digits)
    function = getattr(vae, name)
    captured = CapturedFunction(function, "graph")
    results = []
    for seed, count in ((1, 16), (2, 16), (1, 5), (3, 16)):
        found = []
        for run in (captured, function):
            torch.manual_seed(seed)
            found.append((run(x[:count]), torch.rand(())))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        results.append(found[0][0])
        move_weights(vae)
    assert captured.graphs.captures == 2
    assert not any(part.requires_grad for result in results for part in result)


def test_function_that_cannot_be_captured():
    def positive(x: Tensor) -> Tensor:
        return x[x > 0]

    captured = CapturedFunction(positive, "graph")
    with pytest.warns(UserWarning, match="positive runs uncaptured: a shape in it") as all_:
        assert torch.equal(captured(rows()), positive(rows()))
    assert len(all_) == 1
    assert torch.equal(captured(rows(seed=6)), positive(rows(seed=6)))


@pytest.mark.parametrize("value", [3, "three", dist.Normal(0.0, 1.0)])
def test_function_that_returns_more_than_tensors(value):
    captured = CapturedFunction(lambda x: (x + 1, value), "graph")
    name = type(value).__name__
    with pytest.warns(UserWarning, match=f"runs uncaptured: it returns a value of type {name}"):
        found = captured(rows())
    assert torch.equal(found[0], rows() + 1)
    assert found[1] is value


LAYOUTS = {
    "expanded rows": lambda: rows()[:1].expand(5, -1),
    "an expanded number": lambda: torch.tensor(2.0).expand(4, 6),
    "some columns": lambda: torch.randn(5, 9)[:, 1:7],
    "every other row": lambda: torch.randn(10, 6)[::2],
    "transposed": lambda: torch.randn(6, 5).T,
    "no rows": lambda: torch.randn(0, 6).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_argument_of_another_layout(layout):
    """A graph that is traced on a copy of other strides has views that the argument does not."""

    def function(x: Tensor) -> Tensor:
        return x.reshape(-1).cumsum(0) + x.flatten().sin()

    torch.manual_seed(0)
    x, captured = LAYOUTS[layout](), CapturedFunction(function, "graph")
    torch.testing.assert_close(captured(x), function(x))
    (graph,) = captured.graphs.graphs.values()
    assert graph is not None
    torch.testing.assert_close(captured(2 * x), function(2 * x))


# --- on a GPU -------------------------------------------------------------------------------------


def on_gpu(program: Toy) -> Toy:
    program.to("cuda")
    program.shift = program.shift.cuda()
    return program


@needs_cuda
def test_gpu_equal_and_fresh():
    """As a CUDA graph: replays draw anew, follow the seed and see the weights of now."""
    program, x = on_gpu(toy(nn.Dropout(0.3))), rows().cuda()
    captured = check(Trace_ELBO(), program, x, mode="compiled", tolerance=1e-4)
    check_draws(captured, program, x)
    move_weights(program)
    for seed in (3, 4):
        one = step(captured, program, x + seed, seed=seed)
        same(one, step(Trace_ELBO(), program, x + seed, seed=seed), 1e-4)
    assert captured.captures == 1


@needs_cuda
def test_gpu_keeps_what_earlier_steps_gave():
    program, x = on_gpu(toy()), rows().cuda()
    captured = capture(Trace_ELBO(), "compiled", Sites())
    check_observed(captured, program, x)
    torch.manual_seed(0)
    losses = [captured.differentiable_loss(program.model, program.guide, x)[0] for _ in range(2)]
    for p in program.parameters():
        p.grad = None
    losses[0].backward()
    first = {p: p.grad.clone() for p in program.parameters()}
    expected = step(Trace_ELBO(), program, x, seed=0)
    assert losses[0].item() == pytest.approx(expected.loss, rel=1e-4)
    for p, gradient in zip(program.parameters(), expected.gradients, strict=True):
        torch.testing.assert_close(first[p], gradient, rtol=1e-4, atol=1e-3)
    same(step(captured, program, x, seed=0), expected, 1e-4)


@needs_cuda
def test_gpu_kl_weight_given_as_integer():
    """What a CUDA graph takes is copied to inputs of the type at its capture."""
    elbo, program, x = objective("trace", 1, 1), on_gpu(toy()), rows().cuda()
    captured = capture(elbo, "compiled")
    for value in (torch.tensor(1), weight(0.3), weight(0.6)):
        value = value.cuda()
        same(
            step(captured, program, x, kl_weight=value),
            step(elbo, program, x, kl_weight=value),
            1e-4,
        )


@needs_cuda
def test_gpu_kl_weight_on_the_cpu():
    """Which a CUDA graph would take for a constant."""
    elbo, program, x = objective("trace", 1, 1), on_gpu(toy()), rows().cuda()
    captured = capture(elbo, "compiled")
    for value in (weight(1.0), weight(0.3)):
        expected = step(elbo, program, x, kl_weight=value)
        same(step(captured, program, x, kl_weight=value), expected, 1e-4)
    assert captured.captures == 1


@needs_cuda
@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_gpu_after_cpu(mode):
    captured, program, x = capture(Trace_ELBO(), "graph"), toy(), rows()
    captured.graphs.mode = "graph"
    step(captured, program, x)
    captured.graphs.mode = mode
    on_gpu(program)
    pyro.clear_param_store()
    for seed in (1, 2):
        found = step(captured, program, x.cuda(), seed=seed)
        same(found, step(Trace_ELBO(), program, x.cuda(), seed=seed), 1e-4)
    assert captured.captures == 2


@needs_cuda
def test_gpu_operation_that_no_cuda_graph_records():
    """The random state stays usable, also that of an earlier graph."""
    program, x = on_gpu(toy()), rows().cuda()
    earlier = capture(Trace_ELBO(), "compiled")
    step(earlier, program, x)

    class ThroughTheCpu(Toy):
        def model(self, x: Tensor) -> None:
            super().model(x.cpu().cuda())

    other = on_gpu(toy())
    other.__class__ = ThroughTheCpu
    captured = capture(Trace_ELBO(), "compiled")
    with pytest.warns(UserWarning, match="Trace_ELBO runs uncaptured: "):
        found = step(captured, other, x)
    same(found, step(Trace_ELBO(), other, x), 1e-4)
    for seed in (1, 2):
        same(step(earlier, program, x, seed=seed), step(Trace_ELBO(), program, x, seed=seed), 1e-4)
    assert earlier.captures == 1


@needs_cuda
def test_gpu_constants_of_a_graph_stay_in_memory():
    """Otherwise, the memory is given to later tensors, whose values the graph then reads."""

    class WithConstant(Toy):
        def model(self, x: Tensor) -> None:
            super().model(x + torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda"))

    program, x = on_gpu(toy()), rows().cuda()
    program.__class__ = WithConstant
    captured = capture(Trace_ELBO(), "compiled")
    step(captured, program, x)
    gc.collect()
    later = [torch.full((4,), torch.nan, device="cuda") for _ in range(10_000)]
    same(step(captured, program, x), step(Trace_ELBO(), program, x), 1e-4)
    assert captured.captures == 1
    assert len(later) == 10_000


@needs_cuda
def test_gpu_weights_at_another_address():
    captured, program, x = capture(Trace_ELBO(), "compiled"), on_gpu(toy()), rows().cuda()
    step(captured, program, x)
    kept = decoder_weight(program).data  # so that its memory is not given to the new one
    decoder_weight(program).data = torch.full_like(kept, 0.3)
    same(step(captured, program, x), step(Trace_ELBO(), program, x), 1e-4)
    assert captured.captures == 2


def test_step_of_an_elbo_that_is_not_the_gradient_of_its_loss():
    """As that of JitTrace_ELBO, whose `differentiable_loss` has twice the gradient of its step."""

    class Halved(Trace_ELBO):
        def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
            (loss / 2).backward()
            return loss.item()

    check_falls_back(Halved(), toy(), rows(), reason="its graph gives another loss or gradient")
