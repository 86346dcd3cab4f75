"""What a graph takes for granted: if it changes between two calls, the captured result follows.

Each change is made between two steps of a captured ELBO, and of a `CapturedSVI`. The result must
equal the uncaptured one, and differ from that before the change.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_vae.capture.captured import CapturedSVI, Observer, capture
from pyro_vae.capture.optimizer import OneOptimizer

SCALE = 1.0
TENSOR = torch.tensor(1.0)
SETTINGS = {"scale": 1.0}


class Base(nn.Module):
    """z ~ N(0, I), x ~ N(decoder(z), 1), with factors from all places that Python can read."""

    class_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)
        self.numbers = [1.0, 1.0]
        self.by_name = {"scale": {"inner": 1.0}}
        self.array = np.ones(2)
        self.options = SimpleNamespace(scale=1.0, more=SimpleNamespace(scale=1.0))
        self.function: Callable[..., Any] = torch.tanh
        self.tensors = [torch.ones(())]
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("nothing", None)

    def factor(self) -> Any:
        return (
            self.class_scale
            * self.numbers[0]
            * self.by_name["scale"]["inner"]
            * float(self.array[0])
            * self.options.scale
            * self.options.more.scale
            * self.tensors[0]
        )

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        scale = SCALE * SETTINGS["scale"] * TENSOR * self.factor()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.function(self.decoder(z)) * scale + self.offset + torch.zeros(4)
            if self.nothing is not None:
                loc = loc + self.nothing
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Other(Base):
    def factor(self) -> Any:
        return 2.0


def program() -> Base:
    torch.manual_seed(0)
    return type("Program", (Base,), {})()  # changes of the class stay with this test


def rows() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


def step(elbo: Any, toy: Base) -> tuple[Any, ...]:
    """Loss, gradients and the next random number."""
    pyro.clear_param_store()
    for p in toy.parameters():
        p.grad = None
    torch.manual_seed(1)
    loss = elbo.loss_and_grads(toy.model, toy.guide, rows().to(toy.offset.dtype))
    return loss, [p.grad for p in toy.parameters()], torch.rand(())


def as_double(x: Any) -> Tensor:
    return torch.as_tensor(x).detach().double()


def close(one: Any, other: Any, tolerance: float = 1e-5) -> bool:
    pairs = zip([one[0], *one[1], one[2]], [other[0], *other[1], other[2]], strict=True)
    return all(
        (a is None) == (b is None)
        and (a is None or torch.allclose(as_double(a), as_double(b), rtol=tolerance))
        for a, b in pairs
    )


def put(path: str, value: Any) -> Callable[[Base], None]:
    """Set an attribute of an attribute, an item of a list or of a dictionary."""
    *names, last = path.split(".")

    def change(toy: Base) -> None:
        owner: Any = toy
        for name in names:
            owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        if isinstance(owner, dict):
            owner[last] = value
        elif last.isdigit():
            owner[int(last)] = value
        else:
            setattr(owner, last, value)

    return change


def double_output(module: Any, args: Any, output: Any) -> Any:
    return 2 * output


def double_gradient(parameter: Tensor) -> None:
    parameter.grad.mul_(2)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@torch.no_grad()
def move_buffer(toy: Base) -> None:
    toy.offset += 1.0


def override_forward(toy: Base) -> None:
    toy.decoder.forward = lambda z: 2 * z @ toy.decoder.weight.t()


def override_method(toy: Base) -> None:
    toy.factor = MethodType(lambda self: 3.0, toy)


CHANGES: dict[str, Callable[[Base], Any]] = {
    "number in a list": put("numbers.0", 2.0),
    "list replaced": put("numbers", [2.0, 1.0]),
    "number in nested dictionaries": put("by_name.scale.inner", 2.0),
    "element of an array": put("array.0", 2.0),
    "array replaced": put("array", np.full(2, 2.0)),
    "attribute of an object": put("options.scale", 2.0),
    "attribute of an object in an object": put("options.more.scale", 2.0),
    "object replaced": put("options", SimpleNamespace(scale=2.0, more=SimpleNamespace(scale=1.0))),
    "function replaced": put("function", torch.sin),
    "tensor in a list replaced": put("tensors.0", torch.tensor(2.0)),
    "tensor in a list changed in place": lambda toy: toy.tensors[0].mul_(2),
    "attribute of the class": lambda toy: setattr(type(toy), "class_scale", 2.0),
    "method of the class": lambda toy: setattr(type(toy), "factor", lambda self: 2.0),
    "attribute in place of that of the class": put("class_scale", 2.0),
    "method of the object": override_method,
    "class replaced": lambda toy: setattr(toy, "__class__", Other),
    "class of a part replaced": lambda toy: setattr(
        toy.decoder,
        "__class__",
        type("Twice", (nn.Linear,), {"forward": lambda self, z: 2 * nn.Linear.forward(self, z)}),
    ),
    "forward of the object": override_forward,
    "buffer replaced": put("offset", torch.ones(4)),
    "buffer in place of None": put("nothing", torch.ones(4)),
    "buffer changed in place": move_buffer,
    "parameter replaced": put("decoder.bias", nn.Parameter(torch.ones(4))),
    "parametrization": lambda toy: parametrize.register_parametrization(
        toy.decoder, "weight", Doubled()
    ),
    "requires_grad": lambda toy: toy.decoder.weight.requires_grad_(False),
    "dtype": lambda toy: toy.double(),
    "global variable": lambda toy: globals().update(SCALE=2.0),
    "item of a global variable": lambda toy: SETTINGS.update(scale=2.0),
    "global tensor": lambda toy: globals().update(TENSOR=torch.tensor(2.0)),
    "forward hook": lambda toy: toy.decoder.register_forward_hook(double_output),
    "forward pre-hook": lambda toy: toy.decoder.register_forward_pre_hook(lambda m, x: 2 * x[0]),
    "backward hook": lambda toy: toy.decoder.register_full_backward_hook(
        lambda m, given, out: (2 * given[0],)
    ),
    "backward pre-hook": lambda toy: toy.decoder.register_full_backward_pre_hook(
        lambda m, out: (2 * out[0],)
    ),
    "hook of a parameter": lambda toy: toy.decoder.weight.register_hook(lambda g: 2 * g),
    "hook after a gradient": lambda toy: toy.decoder.weight.register_post_accumulate_grad_hook(
        double_gradient
    ),
}


@pytest.fixture(autouse=True)
def _globals_stay():
    yield
    globals().update(SCALE=1.0, TENSOR=torch.tensor(1.0))
    SETTINGS.update(scale=1.0)


@pytest.mark.filterwarnings("ignore:.*(runs uncaptured|not registered in the param store)")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed(name):
    toy, captured = program(), capture(Trace_ELBO(), "graph")
    before = step(captured, toy)
    assert close(before, step(captured, toy))
    assert captured.captures == 1
    CHANGES[name](toy)
    after = step(captured, toy)
    assert close(after, step(Trace_ELBO(), toy))
    assert not close(after, before) or after[1][0].dtype != before[1][0].dtype


@pytest.mark.filterwarnings("ignore:.*(runs uncaptured|not registered in the param store)")
@pytest.mark.parametrize("name", ["number in a list", "forward hook", "hook of a parameter"])
def test_a_change_is_followed_by_a_step(name):
    """The update in the graph uses the same guards."""
    outcomes = []
    for kind in (CapturedSVI, SVI):
        pyro.clear_param_store()
        toy = program()
        optimizer = OneOptimizer(torch.optim.Adam(toy.parameters(), lr=0.1))
        svi = kind(toy.model, toy.guide, optimizer, loss=capture(Trace_ELBO(), "graph"))
        torch.manual_seed(1)
        losses = [svi.step(rows())]
        CHANGES[name](toy)
        losses += [svi.step(rows()) for _ in range(2)]
        outcomes.append((losses, [p.detach().clone() for p in toy.parameters()], 0.0))
    assert close((0.0, *outcomes[0][1:]), (0.0, *outcomes[1][1:]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-5)


def test_hooks_run_at_every_step():
    """Python code of a hook is no part of a graph, so the step is not captured."""
    toy, captured, calls = program(), capture(Trace_ELBO(), "graph"), []
    toy.decoder.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="runs uncaptured: a module or a parameter has hooks"):
        step(captured, toy)
    count = len(calls)
    step(captured, toy)
    assert len(calls) == count + 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    toy, captured = program(), capture(Trace_ELBO(), "graph")
    try:
        with pytest.warns(UserWarning, match="has hooks"):
            step(captured, toy)
    finally:
        handle.remove()


class Plain:
    """Model and guide that are methods of an object that is no module."""

    def __init__(self) -> None:
        self.scale, self.weight = 1.0, torch.ones(4, requires_grad=True)

    def model(self, x: Tensor) -> None:
        weight = pyro.param("weight", self.weight)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.scale * z.unsqueeze(-1) * weight
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sum(-1), 1.0))


def loss_of(elbo: Any, model: Any, guide: Any) -> float:
    torch.manual_seed(1)
    return elbo.loss(model, guide, rows())


def test_attributes_of_an_object_that_is_no_module():
    plain, captured = Plain(), capture(Trace_ELBO(), "graph")
    before = loss_of(captured, plain.model, plain.guide)
    plain.scale = 2.0
    after = loss_of(captured, plain.model, plain.guide)
    assert after == pytest.approx(loss_of(Trace_ELBO(), plain.model, plain.guide), rel=1e-6)
    assert abs(after - before) > 0.1


@pytest.mark.parametrize("kind", ["number", "list"])
def test_variables_of_a_closure(kind):
    plain, captured = Plain(), capture(Trace_ELBO(), "graph")
    scale: Any = 1.0 if kind == "number" else [1.0]

    def model(x: Tensor) -> None:
        with pyro.poutine.scale(scale=scale if kind == "number" else scale[0]):
            plain.model(x)

    losses = []
    for value in (1.0, 2.0):
        if kind == "number":
            scale = value
        else:
            scale[0] = value
        losses.append(loss_of(captured, model, plain.guide))
        assert losses[-1] == pytest.approx(loss_of(Trace_ELBO(), model, plain.guide), rel=1e-6)
    assert abs(losses[1] - losses[0]) > 0.1


def test_an_elbo_in_place_of_another():
    toy, captured = program(), capture(Trace_ELBO(), "graph")
    before = step(captured, toy)
    captured.elbo = TraceMeanField_ELBO()
    after = step(captured, toy)
    assert close(after, step(TraceMeanField_ELBO(), toy))
    assert not close(after, before)


class Total(Observer):
    """The sum of the values of z, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == "z":
            self.z = msg["value"]

    def observed(self) -> tuple[Tensor, ...]:
        return (self.factor * self.z.sum(),)


def test_an_observer_that_changes():
    toy, captured = program(), capture(Trace_ELBO(), "graph", Total(1.0))
    _, first = step(captured, toy)[0]
    captured.observer.factor = 2.0
    _, second = step(captured, toy)[0]
    captured.observer = Total(3.0)
    _, third = step(captured, toy)[0]
    assert captured.captures == 3
    torch.testing.assert_close(torch.stack([second, third]), torch.stack([2 * first, 3 * first]))


SETTINGS_OF_TORCH: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", SETTINGS_OF_TORCH)
def test_settings_of_torch(name):
    toy, captured, losses = program(), capture(Trace_ELBO(), "graph"), []
    for context in (nullcontext, SETTINGS_OF_TORCH[name], nullcontext):
        for elbo in (captured, Trace_ELBO()):
            with context():
                losses.append(loss_of(elbo, toy.model, toy.guide))
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-6)
    assert (losses[2] != losses[0]) == (name == "autocast")
    step(captured, toy)  # gradients may be changed in place afterwards
    toy.decoder.weight.grad.mul_(2)


def test_default_dtype_and_device():
    """The model makes a tensor of zeros without saying which."""
    toy, captured = program(), capture(Trace_ELBO(), "graph")
    before = step(captured, toy)
    torch.set_default_dtype(torch.float64)
    try:
        assert close(step(captured, toy), step(Trace_ELBO(), toy))
    finally:
        torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for elbo in (captured, Trace_ELBO()):
            with torch.device("meta"), pytest.raises((RuntimeError, NotImplementedError)):
                step(elbo, toy)
    assert close(step(captured, toy), before)


def test_hooks_of_an_optimizer():
    """They would not run in a graph that contains the update."""
    outcomes = []
    for kind in (CapturedSVI, SVI):
        pyro.clear_param_store()
        toy, calls = program(), []
        adam = torch.optim.Adam(toy.parameters(), lr=0.1)
        elbo = capture(Trace_ELBO(), "graph")
        svi = kind(toy.model, toy.guide, OneOptimizer(adam), loss=elbo)
        torch.manual_seed(1)
        svi.step(rows())
        adam.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        svi.step(rows())
        assert len(calls) == 1
        adam.step = partial(calls.append, 2)
        svi.step(rows())
        assert calls == [1, 2]
        outcomes.append(copy.deepcopy([*toy.parameters()]))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
