"""Training by several processes, started by torchrun, on one machine or more.

All ranks have the same model and iterate over the same batches; each rank takes its part of every
batch. The loss is a sum over rows, so the gradients of the ranks add up to the gradient of the
whole batch. In a single process these functions do nothing.

DistributedDataParallel is not used: it wraps a module's forward and averages gradients. Here the
gradient is the output of a captured graph, and one message per step sums gradients, ELBO terms and
the request to stop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pyro.infer import SVI
from torch import Tensor

from . import stop as stops

# Number of terms summed over the rows of a step: loss, reconstruction and KL.
TERMS = 3

# Seconds to wait for the other ranks: for their part of a step; for the work of a single rank, such
# as a download, the validation or a file; and after a request to stop.
STEP_SECONDS = 120.0
WORK_SECONDS = 1800.0
STOP_SECONDS = 10.0


class LostRank(ConnectionError):
    """Another process of the training has failed or does not answer."""


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process, alone or among those of torchrun, is the first. Before they join."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the process group if torchrun started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or world() > 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _others():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    # Not after an error: it would wait for messages to a rank that does not answer.
    dist.destroy_process_group()


def part(index: Tensor) -> Tensor:
    """This rank's part of a batch. Parts differ in size by at most one, and may be empty."""
    return index.tensor_split(world())[rank()]


def step(svi: SVI, args: tuple[Tensor, ...], stop: bool, **kwargs: Any) -> tuple[list[float], bool]:
    """Make one step of `svi` on the rows of all ranks.

    Gradients, the values of the loss, and the request to stop are summed over the ranks in one
    message.

    Args:
        svi: its loss returns a tuple of at most `TERMS` numbers, its optimizer is a `OneOptimizer`.
        args: this rank's rows, perhaps none: x, and labels of a model that has them.
        stop: whether this rank requests to stop.
        kwargs: further arguments of the loss.

    Returns:
        The `TERMS` numbers summed over the ranks, 0 for those that the loss does not return;
        whether any rank requests to stop.

    Raises:
        LostRank: another rank has failed.
        NonFiniteGradient: the summed gradient is not finite; raised in all ranks.
    """
    optimizer = svi.optim
    x = args[0]
    found = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs) if len(x) else ()
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
    """Replace each tensor by its sum over the ranks, in one message.

    Raises:
        LostRank: another rank has failed.
    """
    flat = torch.cat([t.flatten() for t in tensors])
    with _others():
        _wait(dist.all_reduce(flat, async_op=True), STEP_SECONDS)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def agree(value: Any) -> Any:
    """Return the first rank's `value` in every rank.

    Raises:
        LostRank: another rank has failed.
    """
    values = [value]
    if world() > 1:
        meet()
        with _others():
            dist.broadcast_object_list(values)
    return values[0]


def anyone(flag: bool) -> bool:
    """Whether `flag` is true in any rank.

    Raises:
        LostRank: another rank has failed.
    """
    flags = [flag] * world()
    if world() > 1:
        meet()
        with _others():
            dist.all_gather_object(flags, flag)
    return any(flags)


@torch.no_grad()
def share(tensors: list[Tensor]) -> None:
    """Replace each tensor by the first rank's values.

    Raises:
        LostRank: another rank has failed.
    """
    meet()
    with _others():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@contextmanager
def first_here() -> Iterator[None]:
    """Run the block in one process per machine first; the others then find its files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if world() > 1 and not first:
        meet()
    yield
    if world() > 1 and first:
        meet()


def meet() -> None:
    """Wait for all ranks.

    Raises:
        LostRank: another rank has failed.
    """
    with _others():
        _wait(dist.barrier(async_op=True), WORK_SECONDS)


def _wait(work: dist.Work, seconds: float) -> None:
    """Wait for a message. Handlers of signals run meanwhile, about once a second."""
    if dist.get_backend() != "gloo":  # NCCL has a watchdog of its own
        work.wait()
        return
    until, is_stopping = time.monotonic() + seconds, False
    while not _arrives(work):
        if stops.requested() and not is_stopping:
            until, is_stopping = min(until, time.monotonic() + STOP_SECONDS), True
        if time.monotonic() > until:
            raise LostRank("another process of this training does not answer")


def _arrives(work: dist.Work) -> bool:
    """Whether a message arrives within a second."""
    try:
        work.wait(timedelta(seconds=1))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # raises if the message has failed, rather than been late
    return True


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the type of torch.distributed's errors, of every backend
        raise LostRank("another process of this training has failed; see its output") from error
