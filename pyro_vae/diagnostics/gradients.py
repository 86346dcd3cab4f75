"""Bias, variance and signal-to-noise ratio of an objective's gradient; time and memory of a step.

    g = gradient of the objective from one set of random numbers, a vector over the parameters

    bias              |E g − exact|
    variance          tr Cov g
    signal-to-noise   |E g| / √tr Cov g

for all parameters of a group together, |·| the Euclidean norm. The mean of n draws has the expected
square |E g|² + tr Cov g / n; the second term is subtracted. Intervals are those of the squares,
jackknifed over blocks of draws.

Source: "Tighter variational bounds are not necessarily better", arXiv 1802.04537.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..evidence.intervals import Interval
from ..runtime.memory import Callback, ignore
from ..runtime.randomness import one_thread

BLOCKS = 20  # of the jackknife
STUDENT = float(stats.t.isf(0.025, BLOCKS - 1))
# A total variance below this share of |E g|² is rounding error: the gradient has no noise.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Gradient:
    """n draws of the gradient (P,) of an objective, which is maximized.

    Attributes:
        num_draws: n.
        mean: (P,) float64.
        standard_error: (P,) of the mean.
        block_means: (blocks, P) means over equal parts of the draws.
        block_squares: (blocks,) means of |g|² over the same parts.
    """

    num_draws: int
    mean: Tensor
    standard_error: Tensor
    block_means: Tensor
    block_squares: Tensor

    @property
    def variance(self) -> Interval:
        """tr Cov g of one draw."""
        return self._jackknife(lambda mean, variance, n: variance)

    @property
    def signal_to_noise(self) -> Interval:
        """|E g| / √tr Cov g of one draw; 0 if the signal is within the noise."""
        if self.variance.estimate <= ROUNDING * _square(self.mean):
            return Interval(math.inf, math.inf, math.inf)
        square = self._jackknife(lambda mean, variance, n: _square(mean) / variance - 1 / n)
        return square.sqrt()

    def bias(self, exact: Tensor) -> Interval:
        """|E g − exact| / |exact| for the exact gradient (P,); 0 if within the noise.

        Raises:
            ValueError: the exact gradient has another size, or is 0.
        """
        if exact.shape != self.mean.shape or not exact.any():
            raise ValueError(
                f"exact expects the shape {tuple(self.mean.shape)} and a value other than 0; got "
                f"{tuple(exact.shape)}"
            )
        exact = exact.detach().double().cpu()
        size = _square(exact)
        square = self._jackknife(
            lambda mean, variance, n: (_square(mean - exact) - variance / n) / size
        )
        return square.sqrt()

    def _jackknife(self, statistic: Callable[[Tensor, float, float], float]) -> Interval:
        """Interval of a statistic of mean, total variance and number of draws."""

        def value(keep: Tensor) -> float:
            n = self.num_draws * int(keep.sum()) / BLOCKS
            mean, square = self.block_means[keep].mean(0), self.block_squares[keep].mean().item()
            return statistic(mean, max(0.0, square - _square(mean)) * n / (n - 1), n)

        one = torch.eye(BLOCKS, dtype=torch.bool, device="cpu")
        estimate, without_one = value(one.any(0)), [value(~block) for block in one]
        width = STUDENT * math.sqrt((BLOCKS - 1) * float(np.var(without_one)))
        return Interval(estimate, estimate - width, estimate + width)


@dataclass(frozen=True)
class Step:
    """Gradient and cost of one evaluation of an objective.

    Attributes:
        gradients: of each group of parameters.
        seconds: median time of loss and gradient.
        memory: peak of the bytes held by tensors that the step makes.
    """

    gradients: dict[str, Gradient]
    seconds: float
    memory: int


@one_thread()
def measure_gradients(
    objective: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    groups: Mapping[str, Iterable[Tensor]],
    num_draws: int = 1000,
    on_draw: Callback = ignore,
) -> Step:
    """Draw the gradient of an objective many times, with the same parameters and batch.

    Draws come from torch's global random state. The parameters' own gradients and Pyro's store are
    restored afterwards.

    Args:
        objective: any `pyro.infer.ELBO`.
        model, guide: Pyro programs of the batch x.
        groups: parameters by name, such as {"encoder": vae.encoder.parameters(), …}.
        num_draws: n, at least 40; rounded down to a multiple of 20.
        on_draw: called with 1 after each draw.

    Raises:
        ValueError: too few draws, or a group without parameters.
    """
    per_block = num_draws // BLOCKS
    if per_block < 2:
        raise ValueError(f"num_draws expects at least {2 * BLOCKS}; got {num_draws}")
    parameters = {name: list(group) for name, group in groups.items()}
    for name, group in parameters.items():
        if not group:
            raise ValueError(f"the group {name!r} expects parameters; got none")
    sites = _site_parameters(objective, model, guide, x)
    # Gradients reach the parameters of all groups, and parameters outside any group.
    every = list({id(p): p for p in itertools.chain(*parameters.values(), sites)}.values())
    sums = {
        n: torch.zeros(2, BLOCKS, sum(map(Tensor.numel, g)), dtype=torch.float64, device="cpu")
        for n, g in parameters.items()
    }

    def step() -> None:
        for parameter in every:
            parameter.grad = None
        objective.loss_and_grads(model, guide, x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    store, seconds = pyro.get_param_store(), []
    with _gradients_kept(every), store.scope(store.get_state()):
        memory = _memory(step, x.device)  # with Pyro's validation as it is set
        with pyro.validation_enabled(False):
            for draw in range(BLOCKS * per_block):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
                for name, group in parameters.items():
                    gradient = _uphill(group)
                    sums[name][:, draw // per_block] += torch.stack([gradient, gradient.square()])
                on_draw(1)
    gradients = {name: _summary(both, per_block) for name, both in sums.items()}
    return Step(gradients, float(np.median(seconds)), memory)


def slope(x: Sequence[float], y: Sequence[Interval]) -> Interval:
    """Slope of log y over log x, by least squares weighted with the intervals of y.

    Raises:
        ValueError: fewer than two different x, or a y whose estimate is not above 0.
    """
    if len(set(x)) < 2 or len(x) != len(y) or not all(v.estimate > 0 for v in y):
        raise ValueError("a slope expects at least two different x, and every y above 0")
    log_x, log_y = np.log(x), np.log([v.estimate for v in y])
    errors = np.array([(v.high - v.low) / 2 / STUDENT / v.estimate for v in y])
    weights = 1 / np.maximum(errors, 1e-12) ** 2
    centred = log_x - np.average(log_x, weights=weights)
    information = (weights * centred**2).sum()
    estimate = float((weights * centred * log_y).sum() / information)
    width = float(stats.norm.isf(0.025) / math.sqrt(information))
    return Interval(estimate, estimate - width, estimate + width)


def _site_parameters(
    objective: ELBO, model: Callable[..., Any], guide: Callable[..., Any], x: Tensor
) -> list[Tensor]:
    """The unconstrained parameters that model and guide ask Pyro's store for."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()), poutine.trace(param_only=True) as capture:
        objective.loss(model, guide, x)
        return [site["value"].unconstrained() for site in capture.trace.nodes.values()]


def _square(vector: Tensor) -> float:
    return vector.square().sum().item()


def _uphill(parameters: list[Tensor]) -> Tensor:
    """The gradient (P,) of the objective, whose loss is minimized, float64."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return -torch.cat([part.flatten() for part in parts]).double().cpu()


def _summary(totals: Tensor, per_block: int) -> Gradient:
    """From the sums of the gradients and of their squares in each block, (2, blocks, P)."""
    (sums, squares), count = totals, BLOCKS * per_block
    mean = sums.sum(0) / count
    variance = (squares.sum(0) / count - mean.square()) * count / (count - 1)
    error = (variance.clamp_min(0) / count).sqrt()
    return Gradient(count, mean, error, sums / per_block, squares.sum(1) / per_block)


def _memory(step: Callable[[], None], device: torch.device) -> int:
    """Peak of the bytes held by new tensors during a step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as allocations:
        step()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Tracks the bytes of storages from the operation that returns them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage.data_ptr() not in known and storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _gradients_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Set the gradients of tensors to None in the block, and restore them afterwards."""
    kept = [x.grad for x in tensors]
    try:
        for x in tensors:
            x.grad = None
        yield
    finally:
        for x, gradient in zip(tensors, kept, strict=True):
            x.grad = gradient
