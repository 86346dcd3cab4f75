"""How torch's waiting threads share the cores with other processes.

GNU OpenMP's threads spin while they wait for each other. On idle cores a long spin is the fastest,
since a thread that sleeps takes tens of microseconds to wake. If another process needs one of the
cores, a spinning thread takes time from the very thread that it waits for, and a step of a few
milliseconds takes up to twenty times as long (docs/guide/speed.md has a table).

If the process has more of OpenMP's threads than there are cores, they spin for some microseconds
only (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). The commands therefore set a
long spin and, while their threads have to wait for a core, keep as many idle threads as that takes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

# Spins before a thread sleeps: about a millisecond, and about ten microseconds.
LONG, SHORT = "100000", "1000"
# Seconds between two looks.
PERIOD = 0.25
# Share of the time that threads wait for a core, summed over threads, from which others need the
# cores; and below which, in so many looks in a row, they do not.
CROWDED, FREE, LOOKS = 0.1, 0.05, 10
# Values for each thread, from which torch uses them all.
GRAIN = 2**15


def share_cores() -> None:
    """Let waiting threads of torch leave their core to other processes, from torch's import on.

    A user's own setting stays. Processes that this one starts spin briefly. Without Linux's records
    of how long threads have waited for a core, this one does, too.
    """
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        return
    os.environ["GOMP_SPINCOUNT"] = SHORT
    if seconds_without_core() is not None:
        os.environ["GOMP_SPINCOUNT"] = LONG
        threading.Thread(target=_watch, name="share_cores", daemon=True).start()


def seconds_without_core() -> float | None:
    """How long the threads of this process have waited for a core, in all; None if not known."""
    waited = []
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited.append(int(path.read_text().split()[1]))
        except (OSError, ValueError, IndexError):  # it has ended, or there is no record
            continue
    return sum(waited) / 1e9 if waited else None


def _watch() -> None:
    while "torch" not in sys.modules:
        time.sleep(PERIOD)
    import torch  # waits until it is imported, and has read the variable

    os.environ["GOMP_SPINCOUNT"] = SHORT
    if torch.get_num_threads() > 1:
        spin_briefly_while(crowded(shares_without_core()))


def shares_without_core() -> Iterable[float]:
    """The share of each `PERIOD` that the threads have waited for a core."""
    waited, then = seconds_without_core() or 0.0, time.perf_counter()
    while True:
        time.sleep(PERIOD)
        before, last = waited, then
        waited, then = seconds_without_core() or 0.0, time.perf_counter()
        yield (waited - before) / (then - last)


def crowded(shares: Iterable[float]) -> Iterable[bool]:
    """Whether other processes need the cores, after each look."""
    is_crowded, quiet = False, 0
    for share in shares:
        quiet = quiet + 1 if share < FREE else 0
        is_crowded = share > CROWDED or (is_crowded and quiet < LOOKS)
        yield is_crowded


def spin_briefly_while(wishes: Iterable[bool]) -> None:
    """Let the threads of torch spin briefly while the last wish is true."""
    end = None
    for wish in wishes:
        if wish and end is None:
            end = threading.Event()
            add_idle_threads(end)
        elif end is not None and not wish:
            end.set()
            end = None


def add_idle_threads(end: threading.Event) -> None:
    """Have more threads of OpenMP than there are cores, until the event is set."""
    import torch

    size = torch.get_num_threads()
    num_cores = len(os.sched_getaffinity(0))
    num_teams = 1 + max(0, num_cores - size) // (size - 1)  # of which each adds size − 1 threads
    started = threading.Barrier(num_teams + 1)

    def work() -> None:
        torch.ones(size * GRAIN).neg_()  # by a team of this thread, which sleeps from then on
        started.wait()
        end.wait()

    for _ in range(num_teams):
        threading.Thread(target=work, daemon=True).start()
    started.wait()
