"""An ELBO, captured once as a graph of tensor operations, and from then on run as that graph.

    svi = SVI(vae.model, vae.guide, optimizer, loss=capture(Trace_ELBO()))

Pyro runs model and guide in Python at every step; at small batches that costs more than the
arithmetic. A `Captured` ELBO runs them when it first sees arguments of some shape, records loss and
gradient as one graph, random draws included, holds the graph against the ELBO itself at the same
random numbers, and compiles it.

What a graph takes for granted is looked at before each use: the shapes of the arguments, the
parameters and buffers and where they are, and every plain attribute (training mode, the p of a
dropout) of the modules that took part. Where something has changed, the ELBO is captured anew. What
Python code reads from elsewhere, a global variable or a closure, stays as it was when captured.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from .randomness import RandomStates

__all__ = ["Captured", "CapturedFunction", "Mode", "Observer", "capture"]

Mode = Literal["compiled", "graph", "eager"]

# Graphs that one `Captured` keeps. A program that needs more (a new function at every step, batches
# of any size) is faster without.
MOST_GRAPHS = 32

# Largest difference of a gradient from its graph's, relative to the gradient's largest element.
# They do the same operations in the same order: a larger one means that they do not.
SAME = 1e-4

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


# An attribute of every ELBO that its first run fills in.
_FOUND = "max_plate_nesting"


class Observer(Messenger):
    """Sees the sites of guide and model, and computes something of them in the same graph."""

    def observed(self) -> tuple[Tensor, ...]:
        """What becomes `Captured.observed`; called once after the loss, without gradient."""
        raise NotImplementedError


def capture(elbo: ELBO, mode: Mode = "compiled", observer: Observer | None = None) -> Captured:
    """An ELBO of the same value and gradient that runs as a graph.

    Args:
        elbo: any with a `differentiable_loss`: the objectives of this package and most of Pyro's.
            Attributes that it names in `schedules` are inputs of the graph, and may change between
            steps; where any other changes, it is captured anew.
        mode: compiled, by torch.compile, which takes some ten seconds for each shape of the
            arguments; graph: captured but not compiled, a fraction of a second; eager: neither.
        observer: a messenger around guide and model.

    Enumerated sites and code whose course depends on the values of tensors cannot be captured. They
    run as they are, after one warning that says why. Without a compiler, compiled is as graph.
    """
    return Captured(elbo, mode, observer)


class _Graphs:
    """Graphs of one function for arguments of several shapes.

    Attributes:
        observed: what the observer made of the last run.
        captures: number of graphs captured so far.
    """

    def __init__(self, mode: Mode, observer: Observer | None) -> None:
        self.mode = mode
        self.observer = observer
        self.observed: tuple[Tensor, ...] = ()
        self.captures = 0
        self._graphs: dict[Any, _Graph | None] = {}  # None: cannot be captured
        self._warned = False

    def _graph(self, call: _Call) -> _Graph | None:
        """The graph of a call; None where there can be none."""
        if self.mode == "eager":
            return None
        if not all(map(_only_watches, _PYRO_STACK)):
            # The graph would do without them, or never again without them.
            handlers = ", ".join(type(h).__name__ for h in _PYRO_STACK if not _only_watches(h))
            self._warn(call, f"it runs within other handlers: {handlers}")
            return None
        try:
            graph = self._graphs[call.key]
            if graph is None or graph.is_current():
                return graph
            del self._graphs[call.key]
        except KeyError:
            pass
        except TypeError as error:
            self._warn(call, f"the arguments, model and guide must be hashable: {error}")
            return None
        if self.captures >= MOST_GRAPHS:
            self._warn(
                call, f"it was captured {MOST_GRAPHS} times, for other arguments or programs"
            )
            return None
        self.captures += 1
        try:
            graph = _capture(call, self.mode)
            graph.register()
        except _Unfit as unfit:
            self._warn(call, str(unfit))
            graph = None
        self._graphs[call.key] = graph
        return graph

    def _warn(self, call: _Call, reason: str) -> None:
        if not self._warned:
            warnings.warn(f"{call.name} runs uncaptured: {reason}", stacklevel=3)
            self._warned = True


class Captured(_Graphs, ELBO):
    """See `capture`. Pyro's checks of shapes and supports are made when a shape is first seen.

    Attributes:
        elbo: what is captured.
        observed, captures: see `_Graphs`.
    """

    def __init__(self, elbo: ELBO, mode: Mode, observer: Observer | None) -> None:
        ELBO.__init__(
            self, num_particles=elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting
        )
        _Graphs.__init__(self, mode, observer)
        self.elbo = elbo

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, of draws of its own."""
        with torch.no_grad():
            call = self._call(model, guide, args, kwargs)
            graph = self._graph(call)
            if graph is None:
                return self._observing(self.elbo.loss, model, guide, args, kwargs)
            loss, _, self.observed = graph(call)
        return _number(loss)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, and its gradient added to that of the parameters."""
        with torch.enable_grad():
            call = self._call(model, guide, args, kwargs)
            graph = self._graph(call)
            if graph is None:
                return self._observing(self.elbo.loss_and_grads, model, guide, args, kwargs)
        loss, gradients, self.observed = graph(call)
        for leaf, gradient in zip(graph.leaves, gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return _number(loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, (), that may be differentiated once."""
        call = self._call(model, guide, args, kwargs)
        graph = self._graph(call)
        if graph is None:
            return self._observing(self.elbo.differentiable_loss, model, guide, args, kwargs)
        loss, gradients, self.observed = graph(call)
        return _Loss.apply(loss, gradients, *graph.leaves) if graph.leaves else loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("a captured ELBO has no trace")

    def _call(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any) -> _Call:
        function = getattr(self.elbo, "differentiable_loss", None)
        return _Call(self.elbo, function, (model, guide), args, kwargs, self.observer)

    def _observing(
        self, function: Callable[..., Any], model: Any, guide: Any, args: Any, kwargs: Any
    ) -> Any:
        """The ELBO itself."""
        if self.observer is None:
            return function(model, guide, *args, **kwargs)
        with self.observer:
            value = function(model, guide, *args, **kwargs)
        with torch.no_grad():
            self.observed = tuple(x.detach() for x in self.observer.observed())
        return value


class CapturedFunction(_Graphs):
    """A function of tensors, without gradients, captured as an ELBO is.

    Args:
        function: (*tensors) → a tensor or a tuple of them; a method of a module, or a function
            whose modules are called within.
    """

    def __init__(self, function: Callable[..., Any], mode: Mode = "compiled") -> None:
        super().__init__(mode, None)
        self.function = function

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        call = _Call(self.function, self.function, (), args, {}, None)
        graph = self._graph(call)
        return self.function(*args) if graph is None else graph(call)[0]


class _Unfit(Exception):
    """Why something cannot be captured."""


class _Call:
    """A function and its arguments, and the key of the graph that stands for them.

    Args:
        owner: the ELBO whose method the function is, or the function.
        programs: the first arguments: model and guide.
    """

    def __init__(
        self,
        owner: Any,
        function: Callable[..., Any] | None,
        programs: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observer: Observer | None,
    ) -> None:
        self.owner, self.function, self.programs = owner, function, programs
        self.args, self.kwargs, self.observer = args, kwargs, observer
        self.leaves, self.tree = tree_flatten((args, kwargs))
        self.inputs = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.schedules: tuple[str, ...] = getattr(owner, "schedules", ())
        found = (*self.schedules, _FOUND)
        self.key = (
            programs,
            self.tree,
            tuple(_place(x)[:-1] if isinstance(x, Tensor) else _token(x) for x in self.leaves),
            tuple(_token(v) for k, v in getattr(owner, "__dict__", {}).items() if k not in found),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_default_dtype(),
        )

    @property
    def name(self) -> str:
        return getattr(self.owner, "__name__", type(self.owner).__name__)

    def graph_inputs(self) -> list[Tensor]:
        """The arguments' tensors, then the scheduled attributes."""
        if not self.schedules:
            return self.inputs
        device = self.inputs[0].device if self.inputs else None
        return [
            *self.inputs,
            *(
                torch.full((), getattr(self.owner, name), dtype=torch.float64, device=device)
                for name in self.schedules
            ),
        ]

    def program(self, parameters: list[Tensor]) -> Callable[..., Any]:
        """What is captured: tensors → loss, gradients of `parameters`, what is observed."""

        def run(*inputs: Tensor) -> tuple[Any, ...]:
            tensors = iter(inputs)
            leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.tree)
            before = {name: getattr(self.owner, name) for name in self.schedules}
            try:
                for name, value in zip(self.schedules, tensors, strict=True):
                    setattr(self.owner, name, value)
                value, observed = self.evaluate(*args, **kwargs)
            finally:
                for name, number in before.items():
                    setattr(self.owner, name, number)
            if not parameters:
                return value, (), observed
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            return value.detach(), gradients, observed

        return run

    def evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """What the function returns, and what is observed."""
        assert self.function is not None
        with self.observer or nullcontext():
            value = self.function(*self.programs, *args, **kwargs)
        with torch.no_grad():
            observed = () if self.observer is None else self.observer.observed()
            return value, tuple(x.detach() for x in observed)


class _Graph:
    """A captured graph, and all that it takes for granted.

    Attributes:
        leaves: the tensors that the loss has gradients of.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        leaves: list[Tensor],
        params: list[tuple[str, Tensor, bool]],
        modules: list[nn.Module],
    ) -> None:
        self.run = run
        self.leaves = leaves
        self._params = params
        # What is looked at before each use: what must be the same object, what must be equal, of
        # how many entries, and where each tensor is.
        parts = [part for m in modules for part in _parts(m)]
        self._sizes = [(part, len(part)) for part in parts]
        self._same = [(part, k, v) for part in parts for k, v in part.items()]
        self._same += [
            (vars(m), k, v) for m in modules for k, v in vars(m).items() if isinstance(v, Tensor)
        ]
        self._equal = [(vars(m), k, v) for m in modules for k, v in vars(m).items() if _is_plain(v)]
        tensors = [*leaves, *(v for _, _, v in self._same if isinstance(v, Tensor))]
        self._places = [(t, _place(t)) for t in {id(t): t for t in tensors}.values()]
        # Gradients whose memory is not their own alone.
        self._shared: set[int] = set()

    def is_current(self) -> bool:
        """Whether all is as it was. The parameters are registered in Pyro's store on the way."""
        # Plain loops: this is done at every step.
        for part, size in self._sizes:
            if len(part) != size:
                return False
        for part, name, value in self._same:
            if part.get(name) is not value:
                return False
        for part, name, value in self._equal:
            now = part.get(name)
            if now is not value and now != value:
                return False
        for tensor, place in self._places:
            if _place(tensor) != place:
                return False
        return self.register()

    def __call__(self, call: _Call) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        with torch.no_grad():
            value, gradients, observed = self.run(*call.graph_inputs())
        if self._shared:
            gradients = tuple(
                g.clone(memory_format=torch.contiguous_format) if i in self._shared else g
                for i, g in enumerate(gradients)
            )
        return value, gradients, observed

    def find_shared(self, call: _Call) -> None:
        """Look at a run's gradients: who changes one in place must not change another."""
        inputs = call.graph_inputs()
        with torch.no_grad():
            _, gradients, observed = self.run(*inputs)
        taken = {t.untyped_storage().data_ptr() for t in (*inputs, *self.leaves, *observed)}
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            storage = gradient.untyped_storage()
            overlaps = storage.nbytes() < gradient.numel() * gradient.element_size()
            if overlaps or storage.data_ptr() in taken:
                self._shared.add(i)
            taken.add(storage.data_ptr())

    def register(self) -> bool:
        """As model and guide would, for whoever traces them, and for what `SVI` optimizes.

        Returns:
            False where the store has another parameter of that name, or has lost one that it alone
            knows how to make.
        """
        store = pyro.get_param_store()
        for name, leaf, plain in self._params:
            if name in store:
                value = pyro.param(name)
            elif plain:
                value = pyro.param(name, leaf)
            else:
                return False
            if value.unconstrained() is not leaf:
                return False
        return True


def _capture(call: _Call, mode: Mode) -> _Graph:
    """Run the ELBO to see what takes part, then capture it. The random state is left as it was.

    Raises:
        _Unfit: why it cannot be captured.
    """
    if any(x.requires_grad for x in call.inputs):
        raise _Unfit("an argument takes a gradient")
    kinds = [type(x).__name__ for x in call.leaves if not (isinstance(x, Tensor) or _is_plain(x))]
    if kinds:
        raise _Unfit(f"whether an argument has changed cannot be told of a {kinds[0]}")
    if call.function is None:
        raise _Unfit("it has no differentiable_loss")
    known = set(pyro.get_param_store().keys())
    states = RandomStates(_device(call))
    before = states.get()
    used = _Used(*call.programs, call.function)
    with poutine.block():
        with used, poutine.trace(param_only=True) as registered:
            value, _ = call.evaluate(*call.args, **call.kwargs)
        params = [
            (name, leaf, leaf is site["value"] and isinstance(leaf, nn.Parameter))
            for name, site in registered.trace.nodes.items()
            for leaf in [site["value"].unconstrained()]
        ]
        leaves = _leaves(value) if torch.is_grad_enabled() else []
        run, inputs = call.program(leaves), call.graph_inputs()

        def again(function: Callable[..., Any]) -> Any:
            used.restore()
            states.set(before)
            return function()

        try:
            if any(name not in known and not plain for name, _, plain in params):
                after = states.get()
                repeated = again(lambda: call.evaluate(*call.args, **call.kwargs)[0])
                if not torch.equal(repeated, value):  # new parameters were drawn
                    before = after
            graph = again(lambda: _recorded(run, inputs))
            result = again(lambda: graph(*inputs))
            _check(again(lambda: run(*inputs)), result)
            if leaves:
                _check(again(lambda: _gradients_of(call, leaves)), result[1])
            if mode == "compiled":
                graph = again(lambda: _compiled(graph, inputs))
                if _device(call).type == "cuda":
                    graph = again(lambda: _Replayed(graph, inputs))
            captured = _Graph(graph, leaves, params, used.modules)
            again(lambda: captured.find_shared(call))
        except _Unfit:
            raise
        except Exception as error:
            raise _Unfit(_reason(error)) from None
        finally:
            used.restore()
            states.set(before)
    return captured


def _gradients_of(call: _Call, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """What the ELBO's own `loss_and_grads` leaves in the parameters."""
    kept = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        call.owner.loss_and_grads(*call.programs, *call.args, **call.kwargs)
        return tuple(leaf.grad for leaf in leaves)
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient


class _Used:
    """The modules of the programs and all called within, and how they were before.

    Attributes:
        modules: in the order of their first use.
    """

    def __init__(self, *programs: Any) -> None:
        self.modules: list[nn.Module] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for program in programs:
            for value in (program, *_closed_over(program)):
                owner = getattr(value, "__self__", value)
                if isinstance(owner, nn.Module):
                    self._see(owner)

    def __enter__(self) -> None:
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._see)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _see(self, module: nn.Module, args: Any = ()) -> None:
        for part in module.modules():
            if not any(part is other for other in self.modules):
                self.modules.append(part)
                self._buffers += [(b, b.detach().clone()) for b in part.buffers(recurse=False)]

    @torch.no_grad()
    def restore(self) -> None:
        """Buffers, such as the running means of a batch normalization."""
        for buffer, value in self._buffers:
            buffer.copy_(value)


def _closed_over(program: Any) -> list[Any]:
    """What a function reads from around it."""
    try:
        variables = inspect.getclosurevars(program)
    except TypeError:  # it is no Python function
        return []
    return [*variables.nonlocals.values(), *variables.globals.values()]


def _parts(module: nn.Module) -> list[dict[Any, Any]]:
    """What a module is made of."""
    return [
        module._modules,
        module._parameters,
        module._buffers,
        module._forward_hooks,
        module._forward_pre_hooks,
    ]


class _Fresh(TorchDispatchMode):
    """Refuses to read, into Python, a tensor that was there before.

    Of a tensor made within, make_fx knows whether it is a constant. Of parameters it does not ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if torch.Tag.data_dependent_output in func.tags and any(
            t not in self.made for t in tensors
        ):
            raise _Unfit(f"its course depends on the values of a tensor, through {func}")
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes(func, tensors):
            raise _Unfit(f"a shape in it depends on the values of a tensor, through {func}")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made[tensor] = True
        return result


class _Replayed:
    """A graph as a CUDA graph: the inputs are copied to its own, and one launch does it all."""

    def __init__(self, run: Callable[..., Any], inputs: list[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # what is set up at first use must not be captured
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.outputs = run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        # The next replay writes over them.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.outputs)


class _Loss(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Any, *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        return None, None, *(None if g is None else outer * g for g in ctx.gradients)


def _recorded(run: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph of a function of tensors."""

    def watched(*inputs: Tensor) -> Any:
        with _Fresh():
            return run(*inputs)

    # Of their own, since make_fx knows a tensor by its identity: one that is given twice, or that a
    # module holds too, would be taken for the same in all later calls.
    own = [x.clone() for x in inputs]
    with _items_stay_tensors(), pyro.validation_enabled(False):
        return make_fx(watched)(*own)


def _compiled(graph: Callable[..., Any], inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph compiled; the graph itself, with a warning, where the machine has no compiler."""
    # Random numbers as eager torch draws them.
    compiled = torch.compile(graph, dynamic=False, options={"fallback_random": True})
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler, on how it goes about it
            compiled(*inputs)
    except Exception as error:
        warnings.warn(f"the captured graph runs uncompiled: {_reason(error)}", stacklevel=2)
        return graph
    return compiled


@contextmanager
def _items_stay_tensors() -> Iterator[None]:
    """Pyro's ELBOs take the loss's value as a number, and look whether it is one."""
    substitutes: dict[Any, Any] = {
        torch_item: lambda x: x.detach() if isinstance(x, Tensor) else x,
        warn_if_nan: lambda value, *args, **kwargs: value,
        warn_if_inf: lambda value, *args, **kwargs: value,
    }
    names = {function.__name__: function for function in substitutes}
    replaced = [
        (module, name, function)
        for module in list(sys.modules.values())
        for name, function in names.items()
        if getattr(module, "__dict__", {}).get(name) is function
    ]
    try:
        for module, name, function in replaced:
            setattr(module, name, substitutes[function])
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _check(expected: Any, result: Any) -> None:
    """Loss, gradients and what is observed, of the graph against the ELBO's."""
    for one, other in zip(tree_leaves(expected), tree_leaves(result), strict=True):
        if not _close(one, other):
            raise _Unfit(
                "its graph gives another loss or gradient at the same random numbers, as where "
                "particles are taken in chunks, or where a program is not the same at each run"
            )


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    finite = one.isfinite()
    if one.shape != other.shape or not finite.equal(other.isfinite()):
        return False
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return False
    one, other = one[finite], other[finite]
    return one.numel() == 0 or bool((one - other).abs().max() <= SAME * one.abs().max())


def _leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor that a backward pass would leave a gradient in."""
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


def _indexes(func: Any, tensors: list[Tensor]) -> bool:
    """Whether an operation takes elements by their numbers, whose shape is that of the numbers."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8)
    return func is torch.ops.aten.index.Tensor and all(t.dtype in integers for t in tensors[1:])


def _is_plain(value: Any) -> bool:
    """Whether a value is compared at a glance, and changes by being replaced alone."""
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN)


class _Same:
    """Stands for an object in a key: equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _token(value: Any) -> Any:
    """A value's part of a key. (0.0 equals −0.0, and True equals 1.)"""
    return (type(value), repr(value)) if _is_plain(value) else _Same(value)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _only_watches(handler: Messenger) -> bool:
    return isinstance(handler, TraceMessenger) and handler.param_only


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """All but the values; in CUDA graphs addresses are fixed."""
    address = tensor.data_ptr() if tensor.is_cuda else None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, address


def _device(call: _Call) -> torch.device:
    """Of the draws."""
    return call.inputs[0].device if call.inputs else torch.device(torch.get_default_device())


def _number(loss: Tensor) -> float:
    number = torch_item(loss)
    warn_if_nan(number, "loss")
    return number
