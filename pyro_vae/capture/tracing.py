"""Trace a function of tensors to a graph of its operations, and compile it.

make_fx records the operations while the function runs. Tensors that are not arguments, such as
parameters, enter the graph by reference: every run reads their current values. A number that Python
code computes from a tensor would become a constant of the graph, so `CannotCapture` is raised.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.infer.util import torch_item
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary


class CannotCapture(Exception):
    """A call has no graph. The message is the reason."""


@contextmanager
def errors_of_torch() -> Iterator[None]:
    """Turn an error by which make_fx, torch.compile or CUDA reject a function into CannotCapture.

    They raise RuntimeError, of which NotImplementedError and TorchDynamoException are subclasses.
    An exception of any other type is a fault, and is not caught.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        name = type(error).__name__
        raise CannotCapture(f"{name}: {first_line}" if first_line else name) from error


def trace_graph(function: Callable[..., Any], inputs: list[Tensor]) -> GraphModule:
    """Record the graph of a function of tensors.

    Raises:
        CannotCapture: the function reads the values of a tensor.
        RuntimeError: make_fx cannot record the function.
    """

    def watched(*inputs: Tensor) -> Any:
        with _NoExport(), _NoReads():
            return function(*inputs)

    # make_fx knows a tensor by its identity. Without copies, an argument that is given twice, or
    # that a module also holds, would be the same tensor in every later run.
    copies = [_in_own_memory(x) for x in inputs]
    # With a mode of its own for each operation, make_fx takes 1.6 times as long.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with (
        tracing(context),
        _reported_values_stay_tensors(),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        # On a GPU, about the stream of earlier gradients, which no graph uses
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        return make_fx(watched)(*copies)


def _in_own_memory(x: Tensor) -> Tensor:
    """A copy of the same strides, on which views depend; a clone of an expanded x has others."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((size if x.numel() else 0,), (1,)).clone().as_strided(x.shape, x.stride())


@contextmanager
def replaying() -> Iterator[None]:
    """The context in which graphs run: without autocast, whose casts they contain already.

    It would cast once more, also where the traced function had switched it off.
    """
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph with Inductor, the compiler of torch.compile.

    torch.compile itself would first trace the graph once more, which takes seconds, and would check
    at every run what `Guards` check already.

    Raises:
        CannotCapture: the compilation fails, for example because the machine has no compiler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts of the compiler use what torch has deprecated
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx, select_decomp_table
        from torch._inductor.cpu_vec_isa import VecISA

    options: dict[str, Any] = {
        "fallback_random": True,  # the same random numbers as in eager mode
        # All kernels and the calls between them are one file of C++. A file for each kernel takes
        # longer, and so do precompiled headers, from which only a second file would gain.
        "cpp_wrapper": all(x.device.type == "cpu" for x in inputs),
        "cpp_cache_precompile_headers": False,
    }
    module, structure = _flattened(graph)
    # Of which the user needs none: that a CUDA toolkit is installed on a machine without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Programs that test the processor's instructions take a second. A compiler of C++20, which
    # torch requires, knows those instructions that torch has found on the processor.
    no_tests = mock.patch.object(VecISA, "check_build", return_value=True)
    with errors_of_torch(), warnings.catch_warnings(), replaying(), config.patch(options), no_tests:
        warnings.simplefilter("ignore")  # the compiler's, about its own settings
        table: dict[Any, Any] = {**select_decomp_table(), **_DECOMPOSITIONS}
        compiled: Any = compile_fx(module, inputs, decompositions=table)
        compiled(*inputs)
    return lambda *inputs: tree_unflatten(compiled(*inputs), structure)


def _flattened(graph: GraphModule) -> tuple[GraphModule, TreeSpec]:
    """A copy of a graph with a flat tuple of outputs, and their structure."""
    flat = Graph()
    results, structure = tree_flatten(flat.graph_copy(graph.graph, {}))
    flat.output(tuple(results))
    for node in flat.nodes:  # the compiler finds shapes and types itself, and refuses make_fx's
        node.meta.clear()
    return GraphModule(graph, flat), structure


def _log1p(u: Tensor) -> Tensor:
    """log(1 + u) as log(w) · u / (w − 1), w = 1 + u rounded: the rounding error of w cancels.

    W. Kahan's method, in D. Goldberg, "What every computer scientist should know about
    floating-point arithmetic", 1991, Theorem 4. The result is u if w = 1, and for infinite u.
    """
    w = 1 + u
    difference = w - 1
    is_itself = (difference == 0) | (difference == math.inf)
    return torch.where(is_itself, u, w.log() * (u / difference))


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(βx)) / β; x above the threshold of βx."""
    return torch.where(x * beta > threshold, x, _log1p((x * beta).exp()) / beta)


# Inductor calls the vector library's log1p, which takes five times as long as its log.
_DECOMPOSITIONS = {
    torch.ops.aten.log1p.default: _log1p,
    torch.ops.aten.softplus.default: _softplus,
}


class CudaGraph:
    """A graph as a CUDA graph: each run copies the inputs and launches all kernels at once.

    Raises:
        CannotCapture: the graph contains an operation that CUDA cannot record.
    """

    def __init__(self, run: Callable[..., Any], inputs: list[Tensor]) -> None:
        self.inputs = [_in_own_memory(x) for x in inputs]
        with errors_of_torch():  # which reject copies into elements that share memory
            for own, new in zip(self.inputs, inputs, strict=True):
                own.copy_(new)
        self.run = run  # with its constants, whose memory the recording reads
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(2):  # initialization at first use must not be recorded
                run(*self.inputs)
            with errors_of_torch(), _no_waiting():
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # torch.cuda.graph leaves its own stream in use if the capture fails.
        same_stream = torch.cuda.stream(torch.cuda.current_stream())
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.graphsafe_get_state()
        # A random state is unusable after a capture that fails: the first one has a copy of it.
        for attempt in (generator.clone_state(), state):
            self.graph = torch.cuda.CUDAGraph()
            generator.graphsafe_set_state(attempt)
            try:
                with errors_of_torch(), torch.no_grad(), same_stream, torch.cuda.graph(self.graph):
                    self.outputs = run(*self.inputs)
            finally:
                generator.graphsafe_set_state(state)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        # The next replay overwrites the outputs.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.outputs)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError where an operation waits for the GPU, which no CUDA graph can record.

    Torch does not recover from a recording that fails: memory and random states stay reserved.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find all such operations
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _reported_values_stay_tensors() -> Iterator[None]:
    """Keep the loss a tensor where Pyro's ELBOs read it as a number for reports and NaN checks."""
    substitutes: list[tuple[Any, Any]] = [
        (torch_item, lambda x: x.detach() if isinstance(x, Tensor) else x),
        (warn_if_nan, lambda value, *args, **kwargs: value),
        (warn_if_inf, lambda value, *args, **kwargs: value),
    ]
    replaced: list[tuple[Any, Any, Any]] = [
        (module, function, substitute)
        for module in list(sys.modules.values())
        for function, substitute in substitutes
        if getattr(module, "__dict__", {}).get(function.__name__) is function
    ]
    try:
        for module, function, substitute in replaced:
            setattr(module, function.__name__, substitute)
        yield
    finally:
        for module, function, _ in replaced:
            setattr(module, function.__name__, function)


class _NoReads(TorchDispatchMode):
    """Raises CannotCapture if an operation reads the values of a tensor that existed before.

    For tensors made inside, make_fx knows whether they are constants. It does not check parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        old = any(t not in self.made for t in tensors)
        if torch.Tag.data_dependent_output in func.tags and old:
            raise CannotCapture(f"its control flow depends on the values of a tensor, in {func}")
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes(func, tensors):
            raise CannotCapture(f"a shape in it depends on the values of a tensor, in {func}")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made[tensor] = True
        return result


class _NoExport(TorchFunctionMode):
    """Raises CannotCapture if the values of a tensor leave torch, which no operation records."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise CannotCapture(f"it reads the values of a tensor, in Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def _indexes(func: Any, tensors: list[Tensor]) -> bool:
    """Whether an operation selects elements by integer indices, which determine its shape."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8)
    return func is torch.ops.aten.index.Tensor and all(t.dtype in integers for t in tensors[1:])
