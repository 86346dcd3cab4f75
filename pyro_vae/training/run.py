"""The run folder of a training.

A process holds the folder's lock while it writes there. A kill after any operation leaves a folder
that --resume or --overwrite accepts: config.json is the first file of a run and stays while the run
is replaced.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from ..config import Config, DataConfig, InputError, read_config, resolve
from ..data.splits import Splits
from ..models.labels import Model
from ..runtime.files import LOCK, InUse, append, locked, temporary, to_json, write_atomically
from .checkpoint import Checkpoint, load_checkpoint, serialize
from .records import Record

# Seconds between checkpoints: a killed run loses no more than these.
SAVE_EVERY = 15.0

# The entries that --overwrite removes. last.pt is the first: without it, --resume rejects the rest.
RUN_FILES = (
    "checkpoints/last.pt",
    "checkpoints",
    "metrics.jsonl",
    "refit.jsonl",
    "figures",
    "diagnostics.json",
    "report.html",
    "tensorboard",
)


@contextmanager
def new_folder(
    out: Path | None,
    name: str,
    source: Path | None,
    overwrite: bool,
    remove: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Create the folder of a new run, and hold its lock during the block.

    Args:
        out: the folder; None for runs/NAME, numbered if it exists.
        name: of the data.
        source: the folder of the data, which must not contain the run.
        overwrite: remove the files of an earlier run in it. config.json remains until the new run
            replaces it: it marks the folder as that of a run.
        remove: removes what is in the folder, if that is not a run.

    Raises:
        InputError: the folder has other content, is in use, lies in the data, or cannot be written.
    """
    with ExitStack() as stack:
        if out is not None or overwrite:
            folder = out or Path("runs", name)
            _check_place(folder, source)
            stack.enter_context(claimed(folder))
            if _content(folder):
                if not overwrite:
                    raise InputError(
                        f"--out {folder} exists and is not empty; continue it by --resume "
                        f"{folder}, replace it by --overwrite, or give another --out"
                    )
                with explained(folder):
                    (remove or _remove_run)(folder)
        else:
            folder = _first_free(stack, name, source)
        yield folder


def _first_free(stack: ExitStack, name: str, source: Path | None) -> Path:
    """Claim the first of runs/NAME, runs/NAME-2, … that is empty and not in use."""
    number = 1
    while True:
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        _check_place(folder, source)
        with suppress(InUse), ExitStack() as claim:
            if not _content(folder):
                claim.enter_context(claimed(folder))
                if not _content(folder):  # nor has another process just written to it
                    stack.push(claim.pop_all())
                    return folder
        number += 1


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create a run folder if there is none, and hold its lock during the block.

    Raises:
        InputError: the folder is in use or cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        except OSError as error:
            raise InputError(f"cannot write to the run folder {folder}: {error.strerror}") from None
        yield


def _check_place(folder: Path, source: Path | None) -> None:
    if any(unicodedata.category(character) == "Cc" for character in str(folder)):
        raise InputError(f"--out expects a path without control characters; got {str(folder)!r}")
    # In this order: another process may create the folder in between.
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link to a place that does not exist"
        raise InputError(f"--out expects a folder; {folder} is {kind}")
    if source is not None and folder.resolve().is_relative_to(source.resolve()):
        raise InputError(f"--out {folder} lies in the data folder {source}; give another --out")


def _content(folder: Path) -> list[Path]:
    """The entries of a folder, without those that a kill leaves before its first file exists."""
    first = ("config.json", "search.json")
    begun = (LOCK, *(temporary(folder / name).name for name in first))
    return [p for p in folder.iterdir() if p.name not in begun] if folder.is_dir() else []


def _remove_run(folder: Path) -> None:
    try:
        read_config(folder / "config.json")
    except InputError as error:
        raise InputError(f"--overwrite replaces runs only, not {folder}: {error}") from None
    for entry in RUN_FILES:
        for path in (folder / entry, temporary(folder / entry)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_source(data: DataConfig) -> None:
    """Check that the data of a run are where they were.

    Raises:
        InputError: they are not.
    """
    source = Path(data.source)
    if source.is_absolute() and not source.exists():  # the name of a data set is not absolute
        raise InputError(
            f"the run's data are not at {source}: no such path exists. If they have moved, give "
            f"their new place by --data"
        )


def asked_settings(file: Path, config: Config, splits: Splits) -> Config:
    """The settings in a run's config.json, changed only where they do not resolve to `config`."""
    try:
        asked = read_config(file)
    except InputError:
        return config
    return _updated(asked, resolve(asked, splits.likelihood, len(splits.train)), config)


def _updated(asked: Any, resolved: Any, config: Any) -> Any:
    changes = {}
    for name in (field.name for field in dataclasses.fields(config)):
        old, now, new = (getattr(settings, name) for settings in (asked, resolved, config))
        if dataclasses.is_dataclass(new):
            changes[name] = _updated(old, now, new)
        elif now != new:
            changes[name] = new
    return dataclasses.replace(asked, **changes)


@contextmanager
def explained(run: Path) -> Iterator[None]:
    """Say how to continue, if a file of the run cannot be written.

    Raises:
        InputError: a file in the folder `run` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(run):
            raise
        kept = (run / "checkpoints" / "last.pt").is_file()
        again = f"continue with --resume {quote(str(run))}" if kept else "start the training again"
        raise InputError(
            f"cannot write {error.filename}: {error.strerror}. Free space or restore access, then "
            f"{again}"
        ) from error


class RunFolder:
    """config.json, metrics.jsonl and the checkpoints of a run while it trains.

    config.json holds the settings as `asked`. A run that is resumed begins with the history and the
    training state of its `checkpoint`.

    Attributes:
        history: the lines of metrics.jsonl.
        saved_epoch: number of complete epochs in last.pt.
    """

    def __init__(
        self,
        path: Path,
        asked: Config,
        config: Config,
        vae: Model,
        splits: Splits,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.path, self.config, self.vae, self.splits = path, config, vae, splits
        self.history = list(checkpoint.history) if checkpoint else []
        self._state: Callable[[], dict[str, Any]] | None = None  # not yet in last.pt
        self._best: Callable[[], bytes] | None = None  # not yet in best.pt
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asked.to_dict(), indent=2) + "\n"
        write_atomically(path / "config.json", text.encode())
        for name in ("checkpoints", "figures"):
            (path / name).mkdir(parents=True, exist_ok=True)
        # After a kill, the file may have lines of epochs that will be repeated.
        best = path / "checkpoints" / "best.pt"
        if checkpoint and config.data != checkpoint.config.data and best.is_file():
            self._best = partial(_moved, load_checkpoint(best), config, splits)
        lines = "".join(to_json(line) + "\n" for line in self.history)
        write_atomically(path / "metrics.jsonl", lines.encode())
        # From here on the folder can be resumed, with these settings.
        self._write_last(checkpoint.training if checkpoint else None)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self._write_best()  # however the training ended

    def reached(self, state: Callable[[], dict[str, Any]], save: bool = False) -> None:
        """Keep a state of the training; write it if requested or due."""
        self._state = state
        if save or time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def add(self, record: Record) -> dict[str, Any]:
        """Append a line to metrics.jsonl and keep the best model; returns the line."""
        line = record.metrics()
        self.history.append(line)
        append(self.path / "metrics.jsonl", to_json(line) + "\n")
        if record.is_best:
            # A copy takes 3 to 10 ms; encoding, also of the history, 70 after 1,000 epochs.
            best = copy.deepcopy(self.vae), self.config, self.splits, [*self.history]
            self._best = partial(serialize, *best)
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
            # A refit of an older model must not remain the model of this run.
            (self.path / "checkpoints" / "refitted.pt").unlink(missing_ok=True)
            write_atomically(self.path / "checkpoints" / "best.pt", self._best())
            self._best = None


def _moved(best: Checkpoint, config: Config, splits: Splits) -> bytes:
    """A checkpoint with the new place of its data."""
    moved = dataclasses.replace(best.config, data=config.data)
    return serialize(best.vae, moved, splits, best.history)
