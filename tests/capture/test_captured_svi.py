"""A step of `CapturedSVI` is a step of `pyro.infer.SVI`: the same loss, parameters and moments.

Held against SVI with the ELBO itself and torch's own Adam, at the same random numbers. Graphs run
uncompiled but in the tests that say otherwise; every warning is an error, and each test says of how
many graphs it knows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import example_splits, without_a_compiler
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae
from pyro_vae.capture import build
from pyro_vae.capture.captured import CapturedSVI, Observer, capture
from pyro_vae.capture.graph import Mode
from pyro_vae.capture.optimizer import NonFiniteGradient, OneOptimizer
from pyro_vae.capture.update import AdamUpdate
from pyro_vae.objectives.registry import objective
from pyro_vae.training import loop as fitting

STEPS = 12

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def program(digits: pyro_vae.Splits, **settings: Any) -> tuple[Any, Tensor]:
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=3, hidden=(8,), **settings), digits)
    return vae, next(digits.train.fixed(vae.likelihood_module.units, seed=0, num_images=16))


def adam(vae: nn.Module, **settings: Any) -> OneOptimizer:
    return OneOptimizer(
        torch.optim.Adam(vae.parameters(), **{"lr": 0.01, "fused": True} | settings)
    )


def captured_svi(
    vae: Any, optimizer: OneOptimizer, elbo: Any = None, mode: Mode = "graph"
) -> CapturedSVI:
    return CapturedSVI(
        vae.model, vae.guide, optimizer, capture(elbo or objective("trace", 1, 1), mode)
    )


def everything(vae: nn.Module, optimizer: OneOptimizer) -> list[Tensor]:
    """Parameters, buffers, moments and counts."""
    states = [optimizer.optimizer.state[p] for p in optimizer.parameters]
    moments = [s[name] for s in states for name in ("step", "exp_avg", "exp_avg_sq") if s]
    return [x.detach().clone() for x in (*vae.state_dict().values(), *moments)]


def steps(svi: SVI, x: Tensor, count: int = STEPS, seed: int = 2) -> list[float]:
    torch.manual_seed(seed)
    return [svi.step(x) for _ in range(count)]


def both(
    vae: nn.Module,
    play: Callable[[Any, OneOptimizer], Any],
    elbo: Any = None,
    mode: Mode = "graph",
    graphs: int = 1,
    **settings: Any,
) -> float:
    """Play with SVI and with CapturedSVI, from the same start: they must end alike.

    Args:
        play: (svi, optimizer) → losses, or anything else that must be the same too.
        graphs: how many of the step CapturedSVI must have captured.

    Returns:
        The least of the largest changes that any parameter met.
    """
    elbo = elbo or objective("trace", 1, 1)
    ends: list[Any] = []
    for kind in (SVI, CapturedSVI):
        pyro.clear_param_store()
        own = copy.deepcopy(vae)
        optimizer = adam(own, **settings)
        svi: Any = kind(
            own.model, own.guide, optimizer, capture(elbo, mode if kind is CapturedSVI else "eager")
        )
        result = play(svi, optimizer)
        names = {name.partition("$$$")[2] for name in pyro.get_param_store()}
        ends.append((result, everything(own, optimizer), names, torch.rand(())))
    assert sum(graph is not None for graph in svi.graphs.graphs.values()) == graphs
    assert svi.graphs.captures == max(graphs, 1)
    (result, values, names, following), (other, other_values, other_names, other_following) = ends
    assert other == pytest.approx(result, rel=1e-5)
    assert other_names == names
    assert other_following == following, "random state"
    assert len(values) == len(other_values)
    for a, b in zip(values, other_values, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)
    moved = zip(vae.parameters(), own.parameters(), strict=True)
    return min((p - q).abs().max().item() for p, q in moved)


def check_same(vae: Any, x: Tensor, elbo: Any = None, **settings: Any) -> None:
    """A dozen steps of each."""
    assert both(vae, lambda svi, _: steps(svi, x), elbo, **settings) > 0.02, "hardly trained"


class Normalized(nn.Module):
    """A program with running means, a dropout, and a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 4))
        self.decoder = nn.Linear(2, 64)
        self.decoder.unused = nn.Parameter(torch.ones(3))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


# --- the same as SVI ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "particles"),
    [
        ("trace", 1),
        ("mean-field", 1),
        ("beta", 1),
        ("free-bits", 1),
        ("iwae", 4),
        ("dreg", 4),
        ("stl", 4),
        ("score-baseline", 4),
        ("wake-sleep", 4),
    ],
)
def test_objectives(name, particles, digits):
    check_same(*program(digits), objective(name, particles, 1))


def test_likelihood_with_a_learned_scale(tmp_path):
    splits = example_splits("gaussian", tmp_path)
    config = pyro_vae.ModelConfig(latent_dim=2, hidden=(8,), likelihood="gaussian")
    vae = pyro_vae.build(config, splits)
    check_same(vae, next(splits.train.fixed("real", 0, 16)))


def test_autoencoder(digits):
    check_same(*program(digits, kind="ae"))


def test_running_means_dropout_and_a_parameter_without_gradient(digits):
    x = program(digits)[1].flatten(1)
    assert both(Normalized(), lambda svi, _: steps(svi, x), Trace_ELBO()) == 0  # of the unused


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_steps_made_together(mode, digits):
    """As one by one: their losses in order, and what is set before each takes effect in it."""
    vae, x = program(digits)
    ends: list[Any] = []

    def calls(optimizer: OneOptimizer) -> Iterator[tuple[Any, dict[str, Any]]]:
        for i in range(STEPS):
            optimizer.optimizer.param_groups[0]["lr"] = 0.01 * (i + 1)
            optimizer.max_norm = 20.0 * (i + 1)
            yield (x.roll(i, 0),), {"kl_weight": torch.tensor(i / STEPS, dtype=torch.float64)}

    for together in (True, False):
        pyro.clear_param_store()
        own = copy.deepcopy(vae)
        optimizer = adam(own)
        svi = captured_svi(own, optimizer, mode=mode)
        torch.manual_seed(3)
        if together:
            losses = list(svi.steps(calls(optimizer)))
        else:
            losses = [svi.step(*args, **kwargs) for args, kwargs in calls(optimizer)]
        ends.append((losses, everything(own, optimizer), torch.rand(())))
    (losses, values, following), (other_losses, other_values, other_following) = ends
    assert len(losses) == STEPS
    assert losses == other_losses
    assert following == other_following
    assert all(torch.equal(a, b) for a, b in zip(values, other_values, strict=True))


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_no_steps(mode, digits):
    vae, _ = program(digits)
    assert list(captured_svi(vae, adam(vae), mode=mode).steps([])) == []


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x[:7],), {}),
        lambda x: ((x[:1],), {}),
        lambda x: ((x.double(),), {}),
        lambda x: ((x,), {"kl_weight": 0.5}),
    ],
    ids=["fewer rows", "one row", "float64", "another argument"],
)
def test_steps_of_other_arguments_are_refused(other, digits):
    """The graph of the first would read beyond the end of a smaller batch."""
    vae, x = program(digits)
    svi = captured_svi(vae, adam(vae))
    with pytest.raises(ValueError, match="steps expects tensors of the same layouts"):
        list(svi.steps([((x,), {}), other(x)]))


class Transposed(nn.Module):
    """A loss whose gradient has another layout in memory than its parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 16))

    def model(self, x: Tensor) -> None:
        pyro.module("transposed", self)
        twice = torch.cat([self.w.t(), self.w.t()]) * x.flatten(1)[:, :3].repeat(2, 1)
        pyro.factor("loss", -(twice - 1).square().sum())

    def guide(self, x: Tensor) -> None:
        pyro.module("transposed", self)


def test_gradient_of_another_layout(digits):
    model, x = Transposed(), program(digits)[1] + 1
    loss = Trace_ELBO().differentiable_loss(model.model, model.guide, x)
    assert torch.autograd.grad(loss, model.w)[0].stride() != model.w.stride()
    check_same(model, x, Trace_ELBO())
    ends = []  # also where the update is not captured: torch's fused Adam needs that layout
    for mode in ("eager", "graph"):
        own = copy.deepcopy(model)
        pyro.clear_param_store()
        steps(SVI(own.model, own.guide, adam(own), capture(Trace_ELBO(), mode)), x)
        ends.append(own.w.detach())
    torch.testing.assert_close(*ends)


def test_clipped_gradients(digits):
    vae, x = program(digits)

    def play(svi: Any, optimizer: OneOptimizer) -> list[float]:
        optimizer.max_norm = 30.0
        return steps(svi, x)

    both(vae, play)


def test_other_settings_of_adam(digits):
    check_same(*program(digits), betas=(0.8, 0.9), eps=1e-3)
    check_same(*program(digits), fused=False)


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
def test_adam_with_more_to_it_is_left_to_torch(settings, digits):
    check_same(*program(digits), graphs=0, **settings)


def test_optimizer_that_is_not_adam(digits):
    vae, x = program(digits)
    svi = captured_svi(vae, OneOptimizer(torch.optim.SGD(vae.parameters(), lr=1e-4)))
    other = copy.deepcopy(vae)
    expected = SVI(
        other.model,
        other.guide,
        OneOptimizer(torch.optim.SGD(other.parameters(), lr=1e-4)),
        objective("trace", 1, 1),
    )
    assert steps(svi, x) == pytest.approx(steps(expected, x), rel=1e-6)
    assert list(svi.graphs.graphs.values()) == [None]
    assert svi.captured.captures == 1  # the gradient is captured alone


@pytest.mark.slow
def test_compiled(digits):
    check_same(*program(digits), mode="compiled")


@pytest.mark.parametrize(
    ("bf16", "error", "graphs"),
    [(False, 1e-6, 1), (False, 1e-2, 0), (True, 1e-2, 1), (True, 0.2, 0)],
)
def test_compiled_gradients_differ_only_by_rounding(bf16, error, graphs, digits, monkeypatch):
    """Adam's first step is as long for a gradient that is all rounding error as for any other."""

    def compile_with_error(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        def compiled(*inputs: Tensor) -> Any:
            loss, gradients, observed = graph(*inputs)
            return loss, tuple(g + error * g.abs().max() for g in gradients), observed

        return compiled

    monkeypatch.setattr(build, "_compile", compile_with_error)
    vae, x = program(digits)
    svi = captured_svi(vae, adam(vae), mode="compiled")
    warning = pytest.warns(UserWarning, match="another loss or gradient")
    with nullcontext() if graphs else warning, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        svi.step(x)
    assert sum(graph is not None for graph in svi.graphs.graphs.values()) == graphs


@needs_cuda
def test_on_cuda(digits):
    vae, x = program(digits)
    check_same(vae.cuda(), x.cuda(), mode="compiled")


# --- nothing stale --------------------------------------------------------------------------------


def test_rate_norm_and_weight_change_without_another_graph(digits):
    vae, x = program(digits)

    def play(svi: Any, optimizer: OneOptimizer) -> list[float]:
        torch.manual_seed(3)
        losses = []
        for i in range(STEPS):
            optimizer.optimizer.param_groups[0]["lr"] = 0.01 / (i + 1)
            optimizer.max_norm = 20.0 * (i + 1)
            losses.append(svi.step(x, kl_weight=torch.tensor(i / STEPS, dtype=torch.float64)))
        return losses

    both(vae, play)


def test_betas_that_change_are_captured_anew(digits):
    vae, x = program(digits)

    def play(svi: Any, optimizer: OneOptimizer) -> list[float]:
        losses = steps(svi, x, 3)
        optimizer.optimizer.param_groups[0]["betas"] = (0.5, 0.6)
        return losses + steps(svi, x, 3)

    both(vae, play, graphs=2)


def test_moments_that_are_loaded_take_effect(digits):
    """From a file, into other tensors than those that the graph has known."""
    vae, x = program(digits)
    optimizer = adam(vae)
    svi = captured_svi(vae, optimizer)
    steps(svi, x, 3)
    kept = copy.deepcopy((vae.state_dict(), optimizer.optimizer.state_dict()))
    steps(svi, x, 4, seed=5)
    expected = everything(vae, optimizer)
    vae.load_state_dict(kept[0])
    optimizer.optimizer.load_state_dict(copy.deepcopy(kept[1]))
    steps(svi, x, 4, seed=5)
    for a, b in zip(expected, everything(vae, optimizer), strict=True):
        assert torch.equal(a, b)
    assert svi.graphs.captures == 2


def test_its_moments_are_those_of_torch(digits):
    """Another process goes on from them with torch's own step, and the other way round."""
    vae, x = program(digits)
    ends = []
    for order in ((SVI, SVI), (CapturedSVI, SVI), (SVI, CapturedSVI)):
        own = copy.deepcopy(vae)
        state = None
        for seed, kind in enumerate(order):
            optimizer = adam(own)
            if state is not None:
                optimizer.optimizer.load_state_dict(state)
            loss = capture(objective("trace", 1, 1), "graph" if kind is CapturedSVI else "eager")
            steps(kind(own.model, own.guide, optimizer, loss), x, 4, seed)
            state = copy.deepcopy(optimizer.optimizer.state_dict())
        ends.append(everything(own, optimizer))
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_of_both_kinds_take_turns(digits):
    """As in an epoch, whose last batch is smaller."""
    vae, x = program(digits)

    def play(svi: Any, optimizer: OneOptimizer) -> list[float]:
        other = SVI(svi.model, svi.guide, optimizer, objective("trace", 1, 1))
        torch.manual_seed(1)
        losses = [other.step(x[:7]) if i % 3 == 2 else svi.step(x) for i in range(9)]
        assert optimizer.optimizer.state[optimizer.parameters[0]]["step"] == 9
        return losses

    both(vae, play)


def test_parameters_that_were_updated_at_different_counts(digits):
    """One correction of the moments holds for all; where they differ, torch knows each."""
    vae, x = program(digits)

    def play(svi: Any, optimizer: OneOptimizer) -> list[float]:
        AdamUpdate(optimizer, optimizer.parameters).moments[0]["step"] += 5
        return steps(svi, x, 3)

    both(vae, play, graphs=0)


def test_gradient_that_is_there_already_counts(digits):
    vae, x = program(digits)

    def play(svi: Any, optimizer: OneOptimizer) -> list[float]:
        losses = steps(svi, x, 2)
        for p in optimizer.parameters:
            p.grad = torch.full_like(p, 50.0)
        losses += steps(svi, x, 2)
        assert all(p.grad is None for p in optimizer.parameters)
        return losses

    both(vae, play)


# --- faults ---------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """A loss of finite value and infinite gradient where the argument is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    def model(self, x: Tensor) -> None:
        pyro.module("fragile", self)
        pyro.factor("loss", -(self.w.square() + x).sqrt().sum() - self.v.sum())

    def guide(self, x: Tensor) -> None:
        pyro.module("fragile", self)


def test_gradient_that_is_not_finite_changes_nothing():
    fragile = Fragile()
    optimizer = adam(fragile)
    svi = captured_svi(fragile, optimizer, Trace_ELBO())
    good, bad = torch.ones(3), torch.tensor([1.0, 0.0, 1.0])
    steps(svi, good, 2)
    before = everything(fragile, optimizer)
    with pytest.raises(NonFiniteGradient):
        svi.step(bad)
    assert svi.graphs.captures == 1
    for a, b in zip(before, everything(fragile, optimizer), strict=True):
        assert torch.equal(a, b)
    svi.step(good)
    assert not torch.equal(before[1], fragile.v)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_gradient_that_is_not_finite_among_steps_made_together(mode):
    """The steps before it count; it is told in its own place, and changes nothing."""
    good, bad = torch.ones(3), torch.tensor([1.0, 0.0, 1.0])
    ends, found = [], []
    for arguments in ([good, good], [good, good, bad]):
        pyro.clear_param_store()
        fragile = Fragile()
        optimizer = adam(fragile)
        results = captured_svi(fragile, optimizer, Trace_ELBO(), mode).steps(
            ((x,), {}) for x in arguments
        )
        found.append([next(results), next(results)])
        with pytest.raises(StopIteration if len(arguments) == 2 else NonFiniteGradient):
            next(results)
        ends.append(everything(fragile, optimizer))
    assert found[0] == found[1]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_first_gradient_that_is_not_finite_changes_nothing():
    fragile = Fragile()
    optimizer = adam(fragile)
    svi = captured_svi(fragile, optimizer, Trace_ELBO())
    before = copy.deepcopy(fragile.state_dict())
    for _ in range(2):
        with pytest.raises(NonFiniteGradient):
            svi.step(torch.tensor([1.0, 0.0, 1.0]))
        assert all(torch.equal(before[k], v) for k, v in fragile.state_dict().items())
    steps(svi, torch.ones(3), 2)
    assert sum(graph is not None for graph in svi.graphs.graphs.values()) == 1
    assert not torch.equal(before["v"], fragile.v)


@pytest.mark.parametrize("fault", [TypeError, KeyError, AttributeError, AssertionError])
def test_fault_of_ours_is_raised(fault, digits, monkeypatch):
    """In the update, which is traced by itself."""

    def update(self: AdamUpdate, gradients: Any, scalars: Tensor) -> Tensor:
        raise fault("planted")

    monkeypatch.setattr(AdamUpdate, "__call__", update)
    vae, x = program(digits)
    with pytest.raises(fault, match="planted"):
        captured_svi(vae, adam(vae)).step(x)


@pytest.mark.parametrize(
    "fault",
    [
        lambda step, p: 1.01 * step,
        lambda step, p: -step,
        lambda step, p: step * (torch.arange(p.numel()).reshape(p.shape) > 0),
    ],
    ids=["size", "sign", "an element"],
)
def test_update_that_is_not_the_optimizers_is_refused(fault, digits, monkeypatch):
    """The step is SVI's then; the true update, by the same detour, is not refused."""
    true = AdamUpdate.__call__

    def planted(change: Any) -> Any:
        def update(self: AdamUpdate, gradients: Any, scalars: Tensor) -> Tensor:
            before = [p.detach().clone() for p in self.parameters]
            norm = true(self, gradients, scalars)
            with torch.no_grad():
                for p, old in zip(self.parameters, before, strict=True):
                    p.copy_(old + change(p - old, p))
            return norm

        return update

    vae, x = program(digits)
    for change, graphs in ((lambda step, p: step, 1), (fault, 0)):
        monkeypatch.setattr(AdamUpdate, "__call__", planted(change))
        check_same(vae, x, graphs=graphs)


def test_capturing_changes_nothing(digits):
    vae, x = program(digits)
    optimizer = adam(vae)
    svi = captured_svi(vae, optimizer)
    start = [p.detach().clone() for p in vae.parameters()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.enable_grad():
        call = svi.captured.call(vae.model, vae.guide, (x,), {}, optimizer)
        assert svi.graphs.find(call) is not None
    assert torch.equal(torch.get_rng_state(), state)
    for p, old in zip(vae.parameters(), start, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
        moments = optimizer.optimizer.state[p]
        assert not any(x.any() for x in moments.values())


NO_COMPILER = """
import sys, warnings
import torch
sys.path[:0] = ["tests", "tests/capture"]
import pyro_vae
from test_captured_svi import check_same, program
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    check_same(*program(pyro_vae.load_data("digits")), mode="compiled")
found = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
assert len(found) == 1 and found[0].startswith("the captured graph runs uncompiled: "), found
print("uncompiled")
"""


@pytest.mark.slow
def test_machine_without_a_compiler(tmp_path):
    assert "uncompiled" in without_a_compiler(NO_COMPILER, tmp_path)


# --- in a training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compile", "modes"), [("on", ["compiled", "graph"]), ("off", ["eager", "eager"])]
)
def test_what_fit_uses(compile, modes, digits):
    vae, _ = program(digits)
    config = pyro_vae.FitConfig(epochs=1, batch_size=100, compile=compile)
    run = fitting._setup(vae, digits, config, 0)
    assert [svi.graphs.mode for svi in (run.svi, run.svi_of_rest)] == modes


class Draws(Observer):
    """The sum of the guide's draws and the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.z = torch.zeros(())

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == "z":
            self.z = msg["value"]

    def observed(self) -> tuple[Tensor, ...]:
        return self.z.sum(), torch.full((), float(len(self.z)))


def test_step_returns_what_is_observed(digits):
    """Numbers behind the loss, as SVI's own step returns them, whether it is captured or not."""
    vae, x = program(digits)
    found = []
    for kind, mode in ((SVI, "eager"), (SVI, "graph"), (CapturedSVI, "graph")):
        pyro.clear_param_store()
        own = copy.deepcopy(vae)
        loss = capture(objective("trace", 1, 1), mode, Draws())
        svi = kind(own.model, own.guide, adam(own), loss)
        torch.manual_seed(2)
        found.append([svi.step(x) for _ in range(3)])
    assert svi.graphs.captures == 1
    for results in zip(*found, strict=True):
        for loss, total, count in results:
            assert {type(value) for value in (loss, total, count)} == {float}
            assert count == len(x)
            assert total == pytest.approx(results[0][1], rel=1e-4)
            assert loss == pytest.approx(results[0][0], rel=1e-4)
    assert len({results[0][1] for results in zip(*found, strict=True)}) == 3
