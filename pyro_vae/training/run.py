"""The run folder of a training, and the signals that stop it."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Config, InputError, read_config
from ..data.splits import Splits
from ..files import to_json, write_atomically
from ..models.autoencoder import Autoencoder
from ..models.vae import VAE
from .checkpoint import serialize
from .records import Record

# Seconds between checkpoints: a killed run loses no more than these.
SAVE_EVERY = 15.0

RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "figures",
    "diagnostics.json",
    "report.html",
    "tensorboard",
)


def choose_folder(out: Path | None, name: str, source: Path | None, overwrite: bool) -> Path:
    """Create the folder of a new run.

    Args:
        out: the folder; None for runs/NAME, numbered if it exists.
        name: of the data.
        source: the folder of the data, which must not contain the run.
        overwrite: remove the files of an earlier run in it.

    Raises:
        InputError: the folder has other content, lies in the data, or cannot be written.
    """
    folder = out or Path("runs", name)
    number = 2
    while out is None and not overwrite and folder.exists() and any(folder.iterdir()):
        folder = Path("runs", f"{name}-{number}")
        number += 1
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out expects a folder; {folder} is a file")
    if source is not None and folder.resolve().is_relative_to(source.resolve()):
        raise InputError(f"--out {folder} lies in the data folder {source}; give another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise InputError(
                f"--out {folder} exists and is not empty; continue it by --resume {folder}, "
                f"replace it by --overwrite, or give another --out"
            )
        _remove_run(folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the run folder {folder}: {error.strerror}") from None
    return folder


def _remove_run(folder: Path) -> None:
    try:
        read_config(folder / "config.json")
    except InputError as error:
        raise InputError(f"--overwrite replaces runs only, not {folder}: {error}") from None
    for entry in RUN_FILES:
        path = folder / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class RunFolder:
    """metrics.jsonl and the checkpoints of a run while it trains.

    Attributes:
        history: the lines of metrics.jsonl.
        saved_epoch: number of complete epochs in last.pt.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        vae: VAE | Autoencoder,
        splits: Splits,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.config, self.vae, self.splits = path, config, vae, splits
        self.history = list(history or [])
        self.saved_epoch = len(self.history)
        self._saved_at = time.monotonic()
        self._state: Callable[[], dict[str, Any]] | None = None  # not yet in last.pt
        self._best: bytes | None = None  # not yet in best.pt
        for name in ("checkpoints", "figures"):
            (path / name).mkdir(parents=True, exist_ok=True)
        # After a kill, the file may have lines of epochs that will be repeated.
        self.write("metrics.jsonl", "".join(to_json(line) + "\n" for line in self.history))
        if history is None:  # from here on the folder can be resumed
            self._write_last(None)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self._write_best()  # however the training ended

    def write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text.encode())

    def reached(self, state: Callable[[], dict[str, Any]], save: bool = False) -> None:
        """Keep a state of the training; write it if requested or due."""
        self._state = state
        if save or time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def add(self, record: Record) -> dict[str, Any]:
        """Append a line to metrics.jsonl and keep the best model; returns the line."""
        line = record.metrics()
        self.history.append(line)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
        if record.is_best:
            self._best = serialize(self.vae, self.config, self.splits, self.history)
        self.reached(record.state, save=record.epoch == 1)
        return line

    def save(self) -> None:
        """Write the latest state, unless it is in last.pt."""
        if self._state is not None:
            self._write_last(self._state())

    def _write_last(self, training: dict[str, Any] | None) -> None:
        self._write_best()  # first, so that it is never older than last.pt
        content = serialize(self.vae, self.config, self.splits, self.history, training)
        write_atomically(self.path / "checkpoints" / "last.pt", content)
        self._saved_at, self._state = time.monotonic(), None
        self.saved_epoch = len(self.history)

    def _write_best(self) -> None:
        if self._best is not None:
            write_atomically(self.path / "checkpoints" / "best.pt", self._best)
            self._best = None


class StopSignals:
    """Record SIGINT and SIGTERM in a `with` block; a second one raises KeyboardInterrupt.

    Attributes:
        received: number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self._handlers = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
