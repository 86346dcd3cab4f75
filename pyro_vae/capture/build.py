"""Capture the graph of a call: trace it, verify it, compile it.

The function first runs once eagerly, to find the modules and parameters that take part. The graph
is then verified against the ELBO's own step, and an update in it against the optimizer's, at the
same random numbers. Afterwards, all state is restored, except new parameters in Pyro's store.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ..runtime.randomness import RandomStates
from .graph import Call, Graph, Mode, observe
from .guards import (
    Guards,
    StoredParameter,
    find_variables,
    has_hooks,
    is_plain,
    watch_modules,
)
from .optimizer import OneOptimizer
from .products import by_onednn, onednn_is_faster
from .tracing import (
    CannotCapture,
    CudaGraph,
    compile_graph,
    errors_of_torch,
    replaying,
    trace_graph,
)
from .update import AdamUpdate, in_layout_of

# Largest difference between a gradient and the graph's, relative to the gradient's largest element.
# Both come from the same operations in the same order: a larger difference shows a wrong graph.
TOLERANCE = 1e-4
# The same after compilation, if factors of products have 8 or 11 bits: the compiler rounds to them
# less often. Gradients of a convolutional network in bfloat16 differed by 0.01.
TOLERANCE_IN_LOW_PRECISION = 0.05


class Snapshot:
    """State before a capture: random states, and the tensors given to `keep`.

    A `with` block begins in this state, with no gradient in any of the tensors. At its end, random
    states, values and gradients are restored.
    """

    def __init__(self, device: torch.device) -> None:
        self.random_states = RandomStates(device)
        self._random = self.random_states.get()
        self._store = set(pyro.get_param_store().keys())
        self._kept: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def keep(self, tensors: Iterable[Tensor]) -> None:
        self._kept += [(x, x.detach().clone(), x.grad if x.is_leaf else None) for x in tensors]

    def __enter__(self) -> None:
        for x, _, _ in self._kept:
            x.grad = None

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for x, value, gradient in self._kept:
            x.copy_(value)
            x.grad = gradient
        self.random_states.set(self._random)

    def new_names(self) -> set[str]:
        """Names that Pyro's store has gained."""
        return set(pyro.get_param_store().keys()) - self._store


def build(call: Call, mode: Mode) -> Graph:
    """Capture the graph of a call.

    Raises:
        CannotCapture: the call has no graph. Pyro's store is also restored.
    """
    _check(call)
    devices = [x.device for x in call.inputs] or [torch.get_default_device()]
    snapshot = Snapshot(next((d for d in devices if d.type != "cpu"), devices[0]))
    try:
        with poutine.block():
            return _build(call, mode, snapshot)
    except (CannotCapture, torch.OutOfMemoryError) as error:
        for name in snapshot.new_names():  # the eager run draws them again
            del pyro.get_param_store()[name]
        raise CannotCapture(str(error)) from error


def _check(call: Call) -> None:
    """Raise CannotCapture if the arguments or the ELBO rule out a graph."""
    if any(x.requires_grad for x in call.inputs):
        raise CannotCapture("an argument requires a gradient")
    for leaf in call.leaves:
        if not (isinstance(leaf, Tensor) or is_plain(leaf)):
            raise CannotCapture(f"changes inside an argument cannot be seen: {type(leaf).__name__}")
    for name in ("differentiable_loss", "loss_and_grads"):
        if not (call.owner is call.function or hasattr(call.owner, name)):
            raise CannotCapture(f"it has no {name}")
    if isinstance(call.owner, (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO)):
        raise CannotCapture("it uses torch.jit")


def _build(call: Call, mode: Mode, snapshot: Snapshot) -> Graph:
    with snapshot:
        value, modules, parameters = _run_eagerly(call, snapshot)
        after = snapshot.random_states.get()
    leaves = find_leaves(value) if torch.is_grad_enabled() else []
    if has_hooks(modules, leaves):
        raise CannotCapture("a module or a parameter has hooks, which run in Python")
    variables = find_variables(modules, (*call.programs, call.function))
    snapshot.keep(leaves)
    with snapshot, errors_of_torch():
        graph = trace_graph(partial(call.run, leaves), call.inputs)
        if onednn_is_faster():
            graph = by_onednn(graph)
    with snapshot, replaying():
        result = graph(*call.inputs)
    with snapshot:
        expected = _own_result(call, leaves)
    _verify(expected, result)
    inputs, update = call.inputs, None
    run: Callable[..., Any] = graph
    if mode == "compiled":
        with snapshot:
            run = _compile(graph, inputs)
        with snapshot, replaying():
            result = run(*inputs)
        is_low = any(call.key().autocast) or torch.get_float32_matmul_precision() != "highest"
        _verify(expected, result, TOLERANCE_IN_LOW_PRECISION if is_low else TOLERANCE)
    if call.optimizer is not None:
        is_compiled = run is not graph  # it is not where the machine has no compiler
        run, update = _add_update(
            run, result[1], leaves, inputs, call.optimizer, snapshot, is_compiled
        )
        inputs = [*inputs, update.scalars()]
    if mode == "compiled" and inputs and all(x.is_cuda for x in inputs):
        with snapshot:
            run = CudaGraph(run, inputs)
    with snapshot, replaying():
        copied = () if update else _find_copied(run(*inputs), inputs, leaves)
    # If a new parameter was drawn, a later run gives another value. The next step then continues
    # from the random state after the first run, as without a capture.
    drawn = {p.name for p in parameters if not p.in_module} & snapshot.new_names()
    if drawn and not _is_close(value, expected[0]):
        snapshot.random_states.set(after)
    guards = Guards(leaves, parameters, modules, variables, update.entries() if update else [])
    return Graph(run, leaves, guards, update, copied)


def _run_eagerly(call: Call, snapshot: Snapshot) -> tuple[Any, list[Any], list[StoredParameter]]:
    """Run the function once. Returns its value, and the modules and parameters that took part."""
    watched = watch_modules((*call.programs, call.function), snapshot.keep)
    with watched as modules, poutine.trace(param_only=True) as registered:
        value, _, observed = call.run([], *call.inputs)
    for result in tree_leaves((value, observed)):
        if not (result is None or isinstance(result, Tensor)):
            raise CannotCapture(f"it returns a value of type {type(result).__name__}")
    parameters = []
    for name, site in registered.trace.nodes.items():
        leaf = site["value"].unconstrained()
        in_module = leaf is site["value"] and isinstance(leaf, nn.Parameter)
        parameters.append(StoredParameter(name, leaf, in_module))
    return value, [*modules.values()], parameters


def _own_result(call: Call, leaves: list[Tensor]) -> tuple[Any, ...]:
    """The expected result of the graph, by the ELBO's own `loss_and_grads` or the function."""
    function = call.owner.loss_and_grads if leaves else call.function
    value, observed = observe(call.observer, function, *call.programs, *call.args, **call.kwargs)
    if leaves:
        value = torch.as_tensor(torch_item(value), device=leaves[0].device)
    return value, tuple(leaf.grad for leaf in leaves), observed


def _verify(expected: Any, result: Any, tolerance: float = TOLERANCE) -> None:
    """Raise CannotCapture if a graph's results differ from those expected."""
    if not _is_close(expected, result, tolerance):
        raise CannotCapture(
            "its graph gives another loss or gradient at the same random numbers, for example "
            "because particles are drawn in chunks, or a program differs between runs"
        )


def _add_update(
    graph: Callable[..., Any],
    gradients: tuple[Any, ...],
    leaves: list[Tensor],
    inputs: list[Tensor],
    optimizer: OneOptimizer,
    snapshot: Snapshot,
    compiled: bool,
) -> tuple[Callable[..., Any], AdamUpdate]:
    """Append the optimizer's update of the leaves that have a gradient, and verify it.

    Args:
        compiled: whether the graph is, and the update should be.

    Returns:
        The step (*inputs, scalars) → loss, norm of the gradient and observed, in one tensor; and
        the update.
    """
    trained = [i for i, gradient in enumerate(gradients) if gradient is not None]
    update = AdamUpdate(optimizer, [leaves[i] for i in trained], compiled)
    snapshot.keep([*optimizer.parameters, *update.changes])

    def step(*inputs: Tensor) -> Tensor:
        loss, gradients, observed = graph(*inputs[:-1])
        norm = update([gradients[i] for i in trained], inputs[-1])
        return torch.stack([loss, norm, *observed])

    # Adam's first step divides a gradient by its size, rounding errors included: both updates must
    # be of the same gradients to the last bit.
    with snapshot, replaying():
        step(*inputs, update.scalars())
        result = [x.clone() for x in update.changes]
    with snapshot, torch.no_grad():
        for i in trained:
            leaves[i].grad = in_layout_of(leaves[i], gradients[i])
        optimizer(update.parameters)
        _verify(update.changes, result)
    return step, update


def _compile(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph. Without a compiler, it runs uncompiled."""
    try:
        return compile_graph(graph, inputs)
    except CannotCapture as reason:
        warnings.warn(f"the captured graph runs uncompiled: {reason}", stacklevel=2)
        return graph


def _find_copied(
    result: tuple[Any, ...], inputs: list[Tensor], leaves: list[Tensor]
) -> tuple[int, ...]:
    """The positions of gradients that share memory with another tensor, or within themselves, or
    whose layout is not that of their leaf."""
    _, gradients, observed = result
    taken = {x.untyped_storage().data_ptr() for x in (*inputs, *leaves, *observed)}
    copied = []
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            storage = gradient.untyped_storage()
            is_whole = storage.nbytes() >= gradient.nbytes
            is_like = gradient.stride() == leaves[i].stride()
            if storage.data_ptr() in taken or not (is_whole and is_like):
                copied.append(i)
            taken.add(storage.data_ptr())
    return tuple(copied)


def find_leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor in which a backward pass would leave a gradient."""
    found: list[Tensor] = []
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found


def _is_close(expected: Any, result: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two structures hold the same tensors up to rounding."""
    pairs = zip(tree_leaves(expected), tree_leaves(result), strict=True)
    return all(_is_close_tensor(one, other, tolerance) for one, other in pairs)


def _is_close_tensor(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return one is other
    one, other = one.float(), other.float()
    largest = one.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if one.numel() else 0.0
    return torch.allclose(other, one, rtol=0.0, atol=tolerance * largest, equal_nan=True)
