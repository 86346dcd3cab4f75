"""The commands let torch's waiting threads leave their core to other processes."""

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch  # noqa: F401 (imported before the setting is made)

from pyro_vae.cli import cores, share_cores

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_DISPLAY_ENV")


def openmp(program: str, **variables: str) -> subprocess.CompletedProcess:
    """A program that imports torch, with what GNU OpenMP prints about its settings on stderr."""
    rest = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**rest, "OMP_DISPLAY_ENV": "verbose", **variables},
        capture_output=True,
        text=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch uses another OpenMP than GNU's on this machine")
    return done


COMMAND = "from pyro_vae.evaluate import main; main(['no such run'])"


@pytest.mark.slow
def test_a_command_spins_long():
    assert "GOMP_SPINCOUNT = '100000'" in openmp(COMMAND).stderr


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("GOMP_SPINCOUNT", "77", "GOMP_SPINCOUNT = '77'"),
        ("OMP_WAIT_POLICY", "active", "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
@pytest.mark.slow
def test_a_users_setting_stays(name, value, shown):
    found = openmp(COMMAND, **{name: value}).stderr
    assert shown in found
    assert "'100000'" not in found


def test_a_setting_that_comes_too_late_is_not_made(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_without_records_of_waiting_the_spin_is_short(monkeypatch, tmp_path):
    """As in a container without /proc, or on another system."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.delitem(sys.modules, "torch")
    before = threading.active_count()
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert threading.active_count() == before


# Two cores, whatever the machine has; each program prints numbers.
TWO_CORES = """
import os, subprocess, sys, threading, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from pyro_vae.cli import cores
"""


def numbers(program: str, **variables: str) -> list[float]:
    done = openmp(TWO_CORES + program, OMP_NUM_THREADS="2", **variables)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_processes_that_a_command_starts_spin_briefly():
    program = """
cores.share_cores()
assert os.environ["GOMP_SPINCOUNT"] == "100000"
import torch
end = time.monotonic() + 20
while os.environ["GOMP_SPINCOUNT"] != "1000" and time.monotonic() < end:
    time.sleep(0.01)
print(subprocess.run("echo $GOMP_SPINCOUNT", shell=True, capture_output=True, text=True).stdout)
"""
    assert numbers(program) == [1000]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_idle_threads_shorten_the_spin():
    """A waiting thread spins for a millisecond of CPU time, with idle threads for microseconds."""
    program = """
import torch
x = torch.ones(2 * cores.GRAIN)

def spent():
    start = time.process_time()
    for _ in range(100):
        x.neg_()
        time.sleep(0.005)  # in which the second thread waits for the next operation
    return time.process_time() - start

end = threading.Event()
spent()
print(spent())
cores.add_idle_threads(end)
print(spent())
end.set()
time.sleep(0.5)
print(spent())
"""
    before, meanwhile, after = numbers(program, GOMP_SPINCOUNT="100000")
    assert before > 4 * meanwhile
    assert after > 4 * meanwhile


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
def test_time_without_a_core_is_seen():
    """Of a process that shares its only core with three others, about three quarters."""
    busy = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    program = f"""
import torch  # for OpenMP's settings
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
busy = {busy!r}
command = [sys.executable, "-c", busy.replace("+ 1", "+ 60")]
others = [subprocess.Popen(command) for _ in range(3)]
time.sleep(1)
before = cores.seconds_without_core()
exec(busy)
print(cores.seconds_without_core() - before)
for other in others:
    other.kill()
before = cores.seconds_without_core()
time.sleep(1)
print(cores.seconds_without_core() - before)
"""
    beside, idle = numbers(program)
    assert beside > 0.6
    assert idle < cores.FREE


def test_cores_are_crowded_at_once_and_free_after_a_while():
    shares = [0.0, 0.07, 0.11, 0.07, *[0.01] * 9, 0.06, *[0.01] * 12, 0.2]
    found = list(cores.crowded(shares))
    assert found == [False, False, *[True] * 21, False, False, False, True]
    assert len(found) == len(shares)


def test_idle_threads_come_and_go_with_the_crowd(monkeypatch):
    events = []
    monkeypatch.setattr(cores, "add_idle_threads", events.append)
    seen = []

    def wishes():
        for wish in (False, True, True, False, False, True):
            yield wish
            seen.append([event.is_set() for event in events])

    cores.spin_briefly_while(wishes())
    assert seen == [[], [False], [False], [True], [True], [True, False]]


def test_shares_are_those_of_each_look(monkeypatch):
    waited, clock = iter([1.0, 1.0, 1.5, 1.25]), itertools.count(0, 2.0)
    monkeypatch.setattr(cores, "seconds_without_core", lambda: next(waited))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert list(itertools.islice(cores.shares_without_core(), 3)) == [0, 0.25, -0.125]
