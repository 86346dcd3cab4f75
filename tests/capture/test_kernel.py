"""The update in C++ is Adam's: held against torch's own, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from test_captured_svi import check_same, program
from torch import Tensor

from pyro_vae.capture import build, kernel
from pyro_vae.capture.update import AdamUpdate


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    """Without Inductor's tests of the processor's instructions, as in `compile_graph`."""
    from torch._inductor.cpu_vec_isa import VecISA

    with mock.patch.object(VecISA, "check_build", return_value=True):
        if not kernel.is_available():
            pytest.skip("needs a compiler of C++")


# Fewer elements than threads, several vectors and a rest, more than a part of the norm, and none.
SHAPES = [(1,), (3, 5), (100, 101), (2, 3, 4, 4), (0, 2)]
STEPS = 4
RATE, BETA1, BETA2, EPS = 0.02, 0.8, 0.95, 1e-3

# Relative to the largest element: some units in the last place, once for each step.
PRECISION = 2e-6


def start() -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters of several sizes, and their gradients at each step, in the same layouts."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters[3] = parameters[3].contiguous(memory_format=torch.channels_last)
    gradients = [
        [
            torch.empty_like(p).copy_(3.0**i * torch.randn(p.shape, generator=generator))
            for p in parameters
        ]
        for i in range(STEPS)
    ]
    return parameters, gradients


def moments(parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    zeros = [torch.zeros_like(p) for p in parameters]
    return zeros, [torch.zeros_like(p) for p in parameters], [torch.zeros(()) for _ in parameters]


def by_kernel(max_norm: float) -> tuple[list[Tensor], list[float]]:
    """Parameters and moments after all steps, and the norms."""
    parameters, gradients = start()
    state = moments(parameters)
    norms = []
    for step in gradients:
        norms.append(kernel.update(parameters, step, *state, RATE, max_norm, BETA1, BETA2, EPS))
    return [*parameters, *(x for group in state for x in group)], norms


def by_torch(max_norm: float) -> tuple[list[Tensor], list[float]]:
    """The same in double precision by torch's optimizer and torch's clipping."""
    parameters, gradients = start()
    doubles = [p.double().requires_grad_() for p in parameters]
    adam = torch.optim.Adam(doubles, lr=RATE, betas=(BETA1, BETA2), eps=EPS, foreach=False)
    norms = []
    for step in gradients:
        for p, g in zip(doubles, step, strict=True):
            p.grad = g.double()
        norms.append(torch.nn.utils.clip_grad_norm_(doubles, max_norm).item())
        adam.step()
    states = [adam.state[p] for p in doubles]
    names = ("exp_avg", "exp_avg_sq", "step")
    return [p.detach() for p in doubles] + [s[n].double() for n in names for s in states], norms


def is_adam() -> bool:
    """Whether the kernel updates as torch does, with and without clipping."""
    for max_norm in (math.inf, 100.0):  # of norms of 100 to 2,700
        found, norms = by_kernel(max_norm)
        expected, exact_norms = by_torch(max_norm)
        if norms != pytest.approx(exact_norms, rel=1e-6):
            return False
        for x, exact in zip(found, expected, strict=True):
            largest = exact.abs().max().item() if exact.numel() else 0.0
            if not torch.allclose(x.double(), exact, rtol=0.0, atol=PRECISION * largest):
                return False
    return True


@pytest.fixture(params=[1, 2, 3])
def threads(request: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_is_adam(threads):
    assert is_adam()


def test_same_threads_give_the_same_bits(threads):
    first, second = by_kernel(100.0), by_kernel(100.0)
    assert first[1] == second[1]
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b)


FAULTS = {
    "clipping left out of m": ("m[j] += mix1 * (clipped", "m[j] += mix1 * (g[j]"),
    "clipping left out of v": ("mix2 * clipped * clipped", "mix2 * g[j] * g[j]"),
    "norm not clipped at 1": ("std::fmin(max_norm / (own + 1e-6), 1.0)", "max_norm / own"),
    "sign": ("p[j] -= size", "p[j] += size"),
    "beta of m": ("mix1 = 1 - beta1", "mix1 = beta1"),
    "beta of v": ("keep2 = beta2", "keep2 = beta1"),
    "t": ("double(*steps[i]) + 1", "double(*steps[i]) + 2"),
    "correction of m": ("rate / (1 - std::pow(beta1, t))", "rate"),
    "correction of v": ("1 / std::sqrt(1 - std::pow(beta2, t))", "1"),
    "root": ("std::sqrt(v[j])", "v[j]"),
    "eps": ("correction + small", "correction"),
    "a thread's share": ("sizes[i] * (thread + 1) / threads", "sizes[i] / threads"),
    "a thread's sum": ("other < threads", "other < 1"),
    "count": ("*steps[i] += 1", "*steps[i] += 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, threads, monkeypatch):
    old, new = FAULTS[fault]
    assert old in kernel._SOURCE
    monkeypatch.setattr(kernel, "_SOURCE", kernel._SOURCE.replace(old, new))
    assert not is_adam()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_gradient_that_is_not_finite_changes_nothing(value, position, threads):
    parameters, gradients = start()
    state = moments(parameters)
    before = [x.clone() for x in (*parameters, *(x for group in state for x in group))]
    gradients[0][2].view(-1)[position] = value
    norm = kernel.update(parameters, gradients[0], *state, RATE, 1.0, BETA1, BETA2, EPS)
    assert not math.isfinite(norm)
    for old, new in zip(before, (*parameters, *(x for group in state for x in group)), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("make", "supported"),
    [
        (lambda: torch.zeros(3, 4), True),
        (lambda: torch.zeros(()), True),
        (lambda: torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), True),
        (lambda: torch.zeros(3, 4).t(), True),
        (lambda: torch.zeros(3, 4, dtype=torch.float64), False),
        (lambda: torch.zeros(3, 4, dtype=torch.bfloat16), False),
        (lambda: torch.zeros(3, 4)[:, :2], False),
        (lambda: torch.zeros(1).expand(3), False),
        (lambda: torch.zeros(3, device="meta"), False),
    ],
)
def test_supported_tensors(make, supported):
    assert kernel.supports(make()) is supported


def not_compiled(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
    """In place of the compiler: another function than the graph, with the same results."""
    return partial(graph)


def test_compiled_step_updates_by_it(digits, monkeypatch):
    """And is the step of SVI with torch's Adam."""
    update = mock.Mock(wraps=kernel.update)
    monkeypatch.setattr(kernel, "update", update)
    monkeypatch.setattr(build, "_compile", not_compiled)
    check_same(*program(digits), mode="compiled")
    assert update.called
    update.reset_mock()
    check_same(*program(digits), mode="graph")
    assert not update.called


def test_update_by_torch_where_it_cannot_be_compiled(digits, monkeypatch):
    by_torch = mock.Mock(side_effect=AdamUpdate._by_torch)
    monkeypatch.setattr(AdamUpdate, "_by_torch", lambda *args: by_torch(*args))
    monkeypatch.setattr(kernel, "_compiled", mock.Mock(side_effect=RuntimeError("no compiler")))
    monkeypatch.setattr(build, "_compile", not_compiled)
    check_same(*program(digits), mode="compiled")
    assert by_torch.called
