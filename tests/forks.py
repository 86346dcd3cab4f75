"""Processes that train, made by a fork of one that has imported torch: in milliseconds.

A test kills them as it likes: they are processes of their own, with the signals' usual handlers.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

WAIT = 100  # seconds, after which a process that should have ended is a hang


class Forks:
    """The server of the forks, as a context manager."""

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.wait(WAIT)
        self._server.stdout.close()

    def start(self, *argv: Any, log: Path, **options: Any) -> Fork:
        """Start `train` with these flags. Its output goes to `log`.

        Args:
            env: variables of the environment.
            patch: "module:name" → constant.
            ignored: signals that it ignores from its beginning, as under nohup.
            launched: start it by a process in between, whose number is `Fork.launcher`.
            pause: after this epoch, wait for a signal.
            pictures: draw; by default, nothing is drawn.
        """
        request = {"argv": [str(a) for a in argv], "log": str(log), **options}
        pid, launcher = self.ask(request)
        return Fork(self, pid, launcher, log)

    def ranks(self, *argv: Any, logs: Path, **options: Any) -> list[Fork]:
        """Two ranks as torchrun starts them, to see how each of them ends. Logs: rank0, rank1."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        return [
            self.start(
                *argv,
                log=logs / f"rank{i}",
                env={**shared, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"},
                **options,
            )
            for i in (0, 1)
        ]

    def ask(self, request: dict[str, Any]) -> Any:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


class Fork:
    def __init__(self, forks: Forks, pid: int, launcher: int, log: Path) -> None:
        self._forks, self.pid, self.launcher, self.log = forks, pid, launcher, log
        self.status: int | None = None

    def kill(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None."""
        if self.status is None:
            self.status = self._forks.ask({"wait": self.pid})
        return self.status

    def wait_at_most(self, seconds: float) -> None:
        """Wait for its end or until the time has passed."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)

    def wait(self, seconds: float = WAIT) -> int:
        """Wait for its end, and return its status."""
        self.wait_at_most(seconds)
        if self.status is None:
            self.kill(9)
            raise TimeoutError(self.text())
        return self.status

    def text(self) -> str:
        return self.log.read_text()


# --- the server -----------------------------------------------------------------------------------


def _serve() -> None:
    import ctypes
    import signal

    # The orphans of a killed launcher are this process's, which can tell how they end.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    _warm()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            try:
                done, status = os.waitpid(request["wait"], os.WNOHANG)
            except ChildProcessError:  # its launcher is still there
                done = 0
            answer = os.waitstatus_to_exitcode(status) if done else None
        elif request.get("launched"):
            answer = _launch(request)
        else:
            answer = [os.fork(), 0]
            if answer[0] == 0:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    if number in request.get("ignored", []):
                        signal.signal(number, signal.SIG_IGN)
                _train(request)
        print(json.dumps(answer), flush=True)


def _warm() -> None:
    """Import all and go through a run but for its steps: autograd does not survive a fork."""
    import numpy as np

    from pyro_vae import train
    from pyro_vae.training import loop
    from pyro_vae.training.records import Diverged

    for name in ("plots.from_model", "plots.codes", "page.write"):
        importlib.import_module(f"pyro_vae.{name}")
    epoch = loop._epoch

    def none(*arguments: Any) -> Any:
        raise Diverged("no step")

    loop._epoch = none
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as silence,
        redirect_stdout(silence),
        redirect_stderr(silence),
    ):
        np.save(f"{folder}/a.npy", np.arange(200.0).reshape(40, 5))
        train.main(["--data", f"{folder}/a.npy", "--out", f"{folder}/run", "--batch-size", "8"])
    loop._epoch = epoch


def _launch(request: dict[str, Any]) -> list[int]:
    """The numbers of the process and of its launcher, which sleeps."""
    read, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        pid = os.fork()
        if pid == 0:
            _train(request)
        os.write(write, str(pid).encode())
        time.sleep(WAIT)
        os._exit(0)
    pid = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    return [pid, launcher]


def _train(request: dict[str, Any]) -> None:
    status = 70
    try:
        descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request.get("env", {}))
        for place, value in request.get("patch", {}).items():
            module, name = place.split(":")
            setattr(importlib.import_module(module), name, value)
        from pyro_vae import train

        if not request.get("pictures"):
            train._summarize = lambda run: None
            sys.modules["pyro_vae.plots.from_model"].draw_reconstructions = lambda *a: None
        if "pause" in request:
            _pause_after(request["pause"])
        try:
            status = train.main(request["argv"])
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the command has begun
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _pause_after(epoch: int) -> None:
    from pyro_vae.training import stop
    from pyro_vae.training.run import RunFolder

    add = RunFolder.add

    def add_and_wait(self: Any, record: Any) -> Any:
        line = add(self, record)
        while record.epoch == epoch and not stop.requested():
            time.sleep(0.01)
        return line

    RunFolder.add = add_and_wait


if __name__ == "__main__":
    _serve()
