"""Chunk sizes for rows, draws and particles, and a check of the available memory.

On a CPU a chunk stays in the cache from one operation to the next. With 400 hidden units and 784
pixels, chunks of 2^17 to 2^20 values of x decode equally fast; 2^22 takes 15% longer and 2^23 takes
50% longer. On an accelerator, large chunks are faster, and only its memory limits them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from ..config import InputError

CACHE_VALUES = 2**19
# A network keeps about ten times as many values for the gradient: one or two gigabytes in all.
MEMORY_VALUES = 2**25

# glibc returns what is freed at the end of the heap to the system, beyond twice the largest block
# that was ever freed, and every page of it costs again at its next use: up to a quarter of the time
# of importance sampling. One block, which is never written to, of almost the largest size that
# counts (32 MiB, mallopt(3)) keeps the memory of the chunks.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")

Result = TypeVar("Result")
Callback = Callable[[int], object]  # called with the number of items just done


def ignore(count: int) -> None:
    """The default `Callback`."""


def rows_at_once(
    values_per_row: int, device: torch.device | None = None, num_chunks: int = 1
) -> int:
    """Number of rows to process together, at least 1.

    Args:
        values_per_row: values of x of one row; with S draws of z, S times the dimension of x.
        device: device of the values; None for the memory limit, as in training.
        num_chunks: number of cache-sized chunks to process together on a CPU.
    """
    cached = device is not None and device.type == "cpu"
    limit = num_chunks * CACHE_VALUES if cached else MEMORY_VALUES
    return max(1, limit // max(1, values_per_row))


def check_memory(num_values: int, what: str, remedy: str) -> None:
    """Check that the machine has the memory for float32 values, before they are allocated.

    For a failed allocation on the CPU, torch raises a plain RuntimeError.

    Raises:
        InputError: the values need more than the machine's physical memory.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    needed, there = 4 * num_values, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"not enough memory: {what} need {needed / 2**30:,.0f} GiB, this machine has "
            f"{there / 2**30:,.0f} GiB; {remedy}"
        )


def concatenate(parts: list[Result]) -> Result:
    """One dataclass with the rows of all parts: tensors (B, …) concatenated, other fields kept."""
    first, values = parts[0], {}
    for name in (field.name for field in fields(first)):  # type: ignore[arg-type]
        value = getattr(first, name)
        joined = isinstance(value, Tensor)
        values[name] = torch.cat([getattr(part, name) for part in parts]) if joined else value
    return type(first)(**values)
