"""Matrix products by oneDNN: the same products, chosen by the processor alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_captured_svi import check_same, program

from pyro_vae.capture import build, products
from pyro_vae.capture.captured import CapturedFunction
from pyro_vae.capture.tracing import compile_graph, trace_graph
from pyro_vae.objectives.registry import objective

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model name\t: any
flags\t\t: fpu sse2 avx2 {flags}

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 26
flags\t\t: avx512f
"""


@pytest.fixture
def onednn(monkeypatch) -> None:
    """As on a processor where it is faster."""
    monkeypatch.setattr(build, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("AuthenticAMD", 26, "avx512f avx512vl", True),
        ("AuthenticAMD", 27, "avx512f", True),
        ("AuthenticAMD", 25, "avx512f", False),
        ("AuthenticAMD", 26, "avx512vl", False),
        ("GenuineIntel", 26, "avx512f", False),
    ],
)
def test_the_choice_follows_from_the_processor(vendor, family, flags, expected, monkeypatch):
    text = CPUINFO.format(vendor=vendor, family=family, flags=flags)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert products.onednn_is_faster.__wrapped__() is expected


@pytest.mark.parametrize("text", ["", "processor : 0\n", None])
def test_a_machine_without_cpuinfo(text, monkeypatch):
    def read(*_: Any, **__: Any) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert products.onednn_is_faster.__wrapped__() is False


def layer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A layer's output and the gradients of both factors: all three layouts of a step."""
    return torch.addmm(bias, x, w.t()), torch.mm(x, w.t()).t() @ x, torch.mm(x, w.t()) @ w


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (20, 7, 3), (64, 100, 30)])
def test_products_are_the_same(shape, compiled):
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    arguments = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    expected = layer(*(x.double() for x in arguments))
    graph = products.by_onednn(trace_graph(layer, arguments))
    code = graph.code
    assert len(re.findall(r"pyro_vae\.product", code)) == 5
    assert not re.search(r"aten\.(add)?mm", code)
    run = compile_graph(graph, arguments) if compiled else graph
    for result, exact in zip(run(*arguments), expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-4)


def test_other_products_stay():
    def others(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scaled = torch.addmm(a, a, b, beta=0.5)
        return a.double() @ b.double(), torch.addmm(a, a, b), scaled, a[:0] @ b

    a = torch.randn(4, 4)
    graph = products.by_onednn(trace_graph(others, [a, a.clone()]))
    assert "pyro_vae" not in graph.code
    for result, expected in zip(graph(a, a), others(a, a), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("mode", ["graph", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "particles"), [("trace", 1), ("iwae", 4), ("stl", 4)])
@pytest.mark.usefixtures("onednn")
def test_steps_are_the_same(name, particles, mode, digits):
    check_same(*program(digits), objective(name, particles, 1), mode=mode)


@pytest.mark.usefixtures("onednn")
def test_a_captured_function_uses_it():
    captured = CapturedFunction(lambda a, b: a @ b, "graph")
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    torch.testing.assert_close(captured(a, b), a @ b)
    (graph,) = captured.graphs.graphs.values()
    assert "pyro_vae.product" in graph.run.code
