"""What is compiled is what was traced: values, structure, memory, and a log(1 + u) of our own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae.capture import tracing
from pyro_vae.capture.captured import CapturedFunction
from pyro_vae.capture.tracing import compile_graph, trace_graph

slow = pytest.mark.slow

# Relative error of a float32 result: a few units in the last place.
PRECISION = 3e-7


def arguments() -> Tensor:
    """Of every size down to the smallest normal float32, of both signs where log(1 + u) is real."""
    sizes = torch.logspace(-37, 38, 5000, dtype=torch.float64)
    below = torch.linspace(-0.999, -1e-3, 500, dtype=torch.float64)
    return torch.cat([sizes, -sizes[sizes < 0.5], below]).float()


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact) / exact).abs().max().item()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
def test_log1p_is_accurate(compiled):
    edges = torch.tensor([0.0, -0.0, math.inf, -1.0, -2.0, math.nan])
    u = torch.cat([edges, arguments()])
    function: Any = tracing._log1p
    if compiled:
        function = compile_graph(trace_graph(torch.log1p, [u]), [u])
    found, exact = function(u), torch.log1p(u.double())
    assert torch.equal(found[:6].nan_to_num(7.0), torch.log1p(edges).nan_to_num(7.0))
    assert relative_error(found[6:], exact[6:]) < PRECISION
    # power: without the correction, small arguments are lost
    assert relative_error((1 + u).log()[6:], exact[6:]) > 0.5


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
def test_softplus_is_accurate(compiled):
    x = torch.cat([torch.linspace(-80, 120, 4001), torch.tensor([-1e4, 1e4])])
    function: Any = tracing._softplus
    if compiled:
        function = compile_graph(trace_graph(softplus, [x]), [x])
    exact = torch.logaddexp(x.double(), torch.zeros((), dtype=torch.float64))
    part = x > -80  # below, float32 has fewer digits
    assert relative_error(function(x)[part], exact[part]) < PRECISION
    assert function(x).isfinite().all()
    if not compiled:
        torch.testing.assert_close(function(x, 3.0, 5.0), softplus(x, 3.0, 5.0))


@slow
def test_structure_and_attributes_stay():
    """Outputs that are None or nested; tensors from outside are read, and written, at each run."""
    weight, count = torch.ones(3), torch.zeros(())

    def function(x: Tensor) -> Any:
        count.add_(1)
        return x * weight, (None, [x.sum(), (weight * 2,)])

    x = torch.arange(3.0)
    run = compile_graph(trace_graph(function, [x]), [x])
    count.zero_()
    weight.fill_(5.0)
    product, (nothing, (total, (double,))) = run(x)
    assert torch.equal(product, 5 * x)
    assert nothing is None
    assert total == 3
    assert torch.equal(double, torch.full((3,), 10.0))
    assert count == 1


@slow
def test_compiler_is_called_once(tmp_path, monkeypatch):
    """Not for each kernel, nor for a header, nor to try the processor's instructions."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear()
    torch._inductor.cpu_vec_isa.VecAVX512.__bool__.cache_clear()

    def function(x: Tensor) -> Tensor:
        return (x.exp() @ x).sigmoid().sum()  # two kernels around a product

    run = compile_graph(trace_graph(function, [torch.ones(3, 3)]), [torch.ones(3, 3)])
    assert run(torch.zeros(3, 3)) == 9 / 2
    assert [path.suffixes for path in tmp_path.rglob("*.cpp")] == [[".main", ".cpp"]]
    assert not list(tmp_path.rglob("*.gch"))


@slow
def test_draws_are_those_of_torch():
    x = torch.zeros(50, 7)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return torch.randn_like(x), torch.rand_like(x)

    run = compile_graph(trace_graph(function, [x]), [x])
    torch.manual_seed(3)
    expected = function(x)
    torch.manual_seed(3)
    for result, draw in zip(run(x), expected, strict=True):
        assert torch.equal(result, draw)


@pytest.mark.parametrize("mode", ["graph", pytest.param("compiled", marks=slow)])
def test_autocast_does_not_act_again(mode, recwarn):
    """A product that the function computes in float32, and one that autocast makes bfloat16."""
    torch.manual_seed(0)
    w, x = torch.randn(64, 64), torch.randn(8, 64)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            exact = x @ w
        return exact, x @ w

    captured = CapturedFunction(function, mode)
    with torch.autocast("cpu", torch.bfloat16):
        for result, expected in zip(captured(x), function(x), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
    (graph,) = captured.graphs.graphs.values()
    assert graph is not None
    assert not recwarn
