"""The trials of a search: each is a training, here or in a worker process.

A trainer is a function of a run folder and its settings that yields the validation ELBO of each
epoch. Whoever stops asking for the next one ends the training. A worker process does the same at
the other end of a pipe, so a search need not know where its trials run.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..config import Config, resolve
from ..data.labels import with_classes
from ..data.loading import load_data
from ..data.splits import Splits
from ..models.build import build
from .checks import check_labels
from .loop import iterate
from .records import Progress
from .run import RunFolder
from .stop import requested

Trainer = Callable[[Path, Config], Generator[float]]


@dataclass(frozen=True)
class Workers:
    """Where the trials of a search are trained.

    Attributes:
        trainers: one for each trial at a time.
        stop: set when the search should stop.
        processes: their processes; none if there is one trainer, which works in this one.
    """

    trainers: Sequence[Trainer]
    stop: threading.Event
    processes: Sequence[Any] = ()

    def end(self) -> None:
        """Stop at once, also in the middle of an epoch."""
        self.stop.set()
        for process in self.processes:
            process.terminate()


class LostWorker(RuntimeError):
    """A worker process has ended before its trial."""


def load_without_test(config: Config, device: torch.device) -> Splits:
    """The data of a search: training and validation rows. The test split is left out.

    Raises:
        InputError: see `load_data`.
    """
    splits = load_data(config.data, config.seed, likelihood=config.model.likelihood).to(device)
    if config.model.condition != "none":
        splits = with_classes(splits)
    test = splits.test
    labels = None if test.labels is None else test.labels[:0]
    return dataclasses.replace(
        splits, test=dataclasses.replace(test, rows=test.rows[:0], labels=labels)
    )


def train_trial(
    path: Path, config: Config, splits: Splits, stop: threading.Event
) -> Generator[float]:
    """Train a run, and yield the validation ELBO after each epoch, nats per row.

    Args:
        path: the run folder to write.
        config: the settings as given.
        splits: training and validation rows.
        stop: ends the training. It is set here if a signal requests to stop.

    Raises:
        InputError: the settings do not work together.
        Diverged: the loss, its gradient or the validation ELBO is not finite.
    """
    resolved = resolve(config, splits.likelihood, len(splits.train))
    vae = build(resolved.model, splits, config.seed).to(splits.train.device)
    check_labels(vae, splits)

    def on_step(progress: Progress) -> bool:
        if requested():
            stop.set()
        return stop.is_set()

    with RunFolder(path, config, resolved, vae, splits) as folder:
        for record in iterate(vae, splits, resolved.fit, config.seed, on_step=on_step):
            folder.add(record)
            assert record.validation_elbo is not None, "an autoencoder has no ELBO"
            yield record.validation_elbo
        folder.save()


@contextmanager
def start_workers(count: int, config: Config, splits: Splits) -> Iterator[Workers]:
    """Trainers for `count` trials at a time: one in this process, several in as many others.

    Worker processes read the data themselves, and share the threads of this process. They end with
    the block, or when this process is killed.

    Args:
        config: the settings of the data.
        splits: the data.
    """
    stop = threading.Event()
    if count == 1:
        yield Workers([partial(train_trial, splits=splits, stop=stop)], stop)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    processes, pipes = [], []
    for _ in range(count):
        here, there = context.Pipe()
        arguments = (there, config, splits.train.device, threads)
        processes.append(context.Process(target=_work, args=arguments, daemon=True))
        processes[-1].start()
        there.close()  # so that the end of the process closes the pipe
        pipes.append(here)
    found = Workers([partial(_remote, pipe, stop) for pipe in pipes], stop, processes)
    try:
        yield found
    finally:
        found.end()
        for process in processes:
            process.join()


def _remote(
    pipe: Connection, stop: threading.Event, path: Path, config: Config
) -> Generator[float]:
    """`train_trial` in the process at the other end of the pipe."""
    try:
        pipe.send((path, config))
        while (elbo := _answer(pipe)) is not None:
            wanted = False
            try:
                yield elbo
                wanted = True
            finally:
                pipe.send(wanted)
                if not wanted:
                    _answer(pipe)  # once the trial has closed its files
    except (EOFError, ConnectionError):
        if not stop.is_set():
            raise LostWorker(
                f"the worker process of trial {path.name} has ended; if memory is short, use fewer "
                f"--workers"
            ) from None


def _answer(pipe: Connection) -> float | None:
    """The next value of a trial, or None at its end. Its errors are raised here."""
    message = pipe.recv()
    if isinstance(message, Exception):
        raise message
    return message


def _work(pipe: Any, config: Config, device: torch.device, threads: int) -> None:
    """The loop of a worker process: receive a trial, send its values."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    warnings.simplefilter("ignore")  # evaluate repeats those about the best run
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):  # the first process has ended
        splits = load_without_test(config, device)
        while True:
            path, settings = pipe.recv()
            _serve(pipe, train_trial(path, settings, splits, threading.Event()))


def _serve(pipe: Any, elbos: Generator[float]) -> None:
    """Send the values of a trial while they are wanted, then None; or the error that ends it."""
    try:
        for elbo in elbos:
            pipe.send(elbo)
            if not pipe.recv():
                break
        elbos.close()
        pipe.send(None)
    except (EOFError, ConnectionError):
        raise
    except (ValueError, ArithmeticError, OSError) as error:
        pipe.send(error)
