"""Training by several processes, as torchrun starts them, on one machine or more.

Every rank has the same model and walks through the same batches, of each of which it takes its own
part: the loss is a sum over images, so that the ranks' gradients add up to that of the whole batch.
In a single process all of this does nothing.

(Not by DistributedDataParallel, which wraps a module's forward and averages: here the gradient
comes out of one captured graph, and one sum over the ranks, in one message with all else that they
have to tell one another, follows it.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pyro.infer import SVI
from torch import Tensor

__all__ = [
    "LostRank",
    "agree",
    "anyone",
    "first_here",
    "part",
    "processes",
    "rank",
    "share",
    "step",
    "sum_tensors",
    "world",
]


# Numbers that a step of training sums over its rows: loss, reconstruction and KL.
TERMS = 3


class LostRank(ConnectionError):
    """Another process of the training has failed."""


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun has started with this one, if it has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or world() > 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _others():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def part(index: Tensor) -> Tensor:
    """This rank's part of a batch; parts differ in size by one at most, and may be empty."""
    return index.tensor_split(world())[rank()]


def step(svi: SVI, x: Tensor, stop: bool, **kwargs: Any) -> tuple[list[float], bool]:
    """A step of `svi` on the rows of all ranks, of which `x` are this one's, perhaps none.

    Gradients, what the loss returns, and the wish to stop are summed over the ranks in one message.

    Args:
        svi: with a loss that returns a tuple of at most `TERMS` numbers, and a `OneOptimizer`.
        stop: whether this rank asks to stop.
        kwargs: of the loss.

    Returns:
        The `TERMS` numbers, summed over the ranks, 0 where the loss returned fewer; whether any
        rank asks to stop.

    Raises:
        LostRank: another rank is gone.
        NonFiniteGradient: in all ranks at once.
    """
    optimizer = svi.optim
    found = svi.loss_and_grads(svi.model, svi.guide, x, **kwargs) if len(x) else ()
    sums = torch.zeros(TERMS + 1, device=x.device)
    for i, value in enumerate(found):
        sums[i] = value
    sums[-1] = float(stop)
    for parameter in optimizer.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_tensors([*(p.grad for p in optimizer.parameters), sums])
    optimizer(optimizer.parameters)
    *terms, wishes = sums.tolist()
    return terms, wishes > 0


def sum_tensors(tensors: list[Tensor]) -> None:
    """Put the sum over all ranks in the place of each tensor, in one message.

    Raises:
        LostRank: another rank is gone.
    """
    flat = torch.cat([t.flatten() for t in tensors])
    with _others():
        dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def agree(value: Any) -> Any:
    """The first rank's `value`, on every rank.

    Raises:
        LostRank: another rank is gone.
    """
    values = [value]
    if world() > 1:
        with _others():
            dist.broadcast_object_list(values)
    return values[0]


def anyone(flag: bool) -> bool:
    """Whether `flag` is true on any rank.

    Raises:
        LostRank: another rank is gone.
    """
    flags = [flag] * world()
    if world() > 1:
        with _others():
            dist.all_gather_object(flags, flag)
    return any(flags)


@torch.no_grad()
def share(tensors: list[Tensor]) -> None:
    """Put the first rank's values in the place of each tensor.

    Raises:
        LostRank: another rank is gone.
    """
    with _others():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@contextmanager
def first_here() -> Iterator[None]:
    """The block is run by one process of each machine, then by its others: they find its files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if world() > 1 and not first:
        _wait()
    yield
    if world() > 1 and first:
        _wait()


def _wait() -> None:
    with _others():
        dist.barrier()


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch.distributed's errors are, of any backend
        raise LostRank("another process of this training is gone; its output says why") from error
