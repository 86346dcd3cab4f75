"""Matrix products of a captured graph by the faster library.

torch.mm calls Intel's MKL, which uses AVX2 on the processors of other vendors. oneDNN, which is
also a part of torch, uses AVX-512 on all. GFLOP/s of the float32 products of a training step of
784-400-50, two threads:

    batch                  20    256   1,024
    Zen 5    MKL          145    220     222
             oneDNN       207    428     441
    Zen 4    MKL           93    187     182
             oneDNN        78    187     191

Zen 4 computes AVX-512 in two halves and gains nothing. The choice follows from the processor alone,
so that a resumed run makes the same products.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

# First family of AMD's processors that computes AVX-512 in one piece: Zen 5.
ZEN_5 = 26

# The compiler must neither look inside nor change the memory layout of the arguments: it would copy
# transposed ones, which costs what is gained.
_library = torch.library.Library("pyro_vae", "DEF")
_library.define(
    "product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (N, K) · b (K, M) + bias (M,), float32, on the CPU, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _shape_of_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_library.impl("product", _product, "CPU")
_library.impl("product", _shape_of_product, "Meta")


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than torch.mm on this processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    first = text.split("\n\n")[0]
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", first, re.MULTILINE))
    has_avx512 = "avx512f" in fields.get("flags", "").split()
    is_recent = int(fields.get("cpu family", 0)) >= ZEN_5
    is_amd = fields.get("vendor_id") == "AuthenticAMD"
    return is_amd and is_recent and has_avx512 and torch.backends.mkldnn.is_available()


def by_onednn(graph: GraphModule) -> GraphModule:
    """The graph with its float32 products on the CPU by oneDNN; changed in place."""
    for node in graph.graph.nodes:
        arguments = _factors(node)
        if arguments is not None and all(map(_is_float32_matrix, arguments[:2])):
            node.target = torch.ops.pyro_vae.product.default
            node.args, node.kwargs = arguments, {}
    graph.recompile()
    return graph


def _factors(node: Any) -> tuple[Any, ...] | None:
    """a, b and perhaps a bias of a node a · b (+ bias); None for other nodes."""
    if node.target is torch.ops.aten.mm.default:
        return node.args
    if node.target is torch.ops.aten.addmm.default and not node.kwargs:
        bias, *factors = node.args
        if bias.meta["val"].dim() == 1:
            return (*factors, bias)
    return None


def _is_float32_matrix(node: Any) -> bool:
    value = node.meta["val"]
    return value.dtype == torch.float32 and value.device.type == "cpu" and value.numel() > 0
