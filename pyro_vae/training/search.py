"""Search for the settings of the highest validation ELBO, by Optuna.

The value of a trial is the validation ELBO of its best epoch, that of the model which
checkpoints/best.pt then holds: reconstruction − KL in nats per row at KL weight 1, whatever the
objective of the training. All trials have the same rows, draws and binarization. Optuna's sampler
(tree-structured Parzen estimator, NeurIPS 2011, "Algorithms for hyper-parameter optimization")
proposes settings; its median rule ends a trial whose best ELBO so far is below the median of the
completed trials at the same epoch.

A proposal depends on the seed and on the trials before it only, so a search that is interrupted and
resumed makes those of an uninterrupted one. With several trials at a time, the order in which they
end matters too.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import DEFAULT_HIDDEN, Config, InputError, resolve
from ..config.space import Search, Space, setting, with_values
from ..data.splits import Splits
from ..models.build import build_blank
from ..runtime.packages import of_extra
from ..runtime.randomness import derive
from .records import Diverged
from .stop import requested
from .trials import Trainer, Workers

JOURNAL = "journal.log"

# Trials that are completed before any is pruned, and the share of the epochs after all warm-ups
# before which none is.
COMPLETE_FIRST = 5
PRUNE_AFTER = 0.25

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "interrupted"}


@dataclass(frozen=True)
class Trial:
    """A trial that has ended.

    Attributes:
        number: counted from 0.
        state: complete, pruned, failed (see `reason`) or interrupted, which is repeated.
        elbo: the best validation ELBO, nats per row; None if there is none.
        epoch: that of `elbo`, counted from 1.
        elbos: validation ELBO of each epoch.
        settings: the searched settings, values as in config.json.
        reason: why the trial failed, or empty.
        seconds: its duration.
    """

    number: int
    state: str
    elbo: float | None
    epoch: int | None
    elbos: tuple[float, ...]
    settings: dict[str, Any]
    reason: str
    seconds: float


def open_study(folder: Path, search: Search) -> Any:
    """The Optuna study in a folder, new or continued. The caller holds the folder's lock.

    Trials that were running when their process ended are marked as failed.

    Raises:
        InputError: the package optuna is missing, or the journal is damaged.
    """
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder.absolute() / JOURNAL
    _repair(path)
    journal = optuna.storages.journal
    try:
        # JSON lines: Optuna unpickles nothing of this storage.
        backend = journal.JournalFileBackend(str(path), journal.JournalFileOpenLock(str(path)))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="pyro_vae",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=COMPLETE_FIRST, n_warmup_steps=prune_from(search)
            ),
        )
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        ended(study)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"the journal {path} is damaged ({type(error).__name__}: {error}); start another "
            f"search, with another --out"
        ) from None
    return study


def import_optuna() -> Any:
    """The package optuna.

    Raises:
        InputError: it is missing.
    """
    return of_extra("optuna", "tune", "a search requires a package")


def _repair(path: Path) -> None:
    """Remove what a kill leaves of a journal: the lock of a writer, a line without its end."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def prune_from(search: Search) -> int:
    """The first epoch after which a trial may be pruned.

    While a KL weight or learning rate rises, the ELBO says little about the end, and trials may
    differ in these warm-ups. The longest is waited for, then a share of the epochs.
    """
    longest = 0.0
    for name in ("kl_warmup", "learning_rate_warmup"):
        entry = search.space.get(name, {"high": setting(search.base, name)})
        longest = max(longest, *entry.get("choices", [entry.get("high")]))
    epochs = search.base.fit.epochs or 1
    return math.ceil(longest * epochs) + math.ceil(PRUNE_AFTER * epochs)


def check_buildable(search: Search, splits: Splits) -> None:
    """Build the model of the base settings, and of each end and each choice, without memory.

    Raises:
        InputError: a model cannot be built, or a batch is too large.
    """
    for name, entry in {"": {"choices": [None]}, **search.space}.items():
        for value in entry.get("choices", [entry.get("low"), entry.get("high")]):
            config = with_values(search.base, {name: value} if name else {})
            try:
                resolved = resolve(config, splits.likelihood, len(splits.train))
                build_blank(resolved.model, splits.spec, "meta")
            except InputError as error:
                raise InputError(f"{name} = {value}: {error}" if name else str(error)) from None


def run_search(
    study: Any,
    search: Search,
    folder: Path,
    workers: Workers,
    on_end: Callable[[Trial], None],
) -> None:
    """Run trials until there are `search.num_trials`, or a signal requests to stop.

    The best one is kept as the run folder FOLDER/best, the others as values in the journal.

    Args:
        study: see `open_study`.
        workers: where trials are trained.
        on_end: called after each trial.

    Raises:
        LostWorker: a worker process has ended.
        OSError: a file cannot be written.
    """
    lock = threading.Lock()
    keep_best(study, folder)

    def work(trainer: Trainer) -> None:
        while not workers.stop.is_set():
            with lock:
                trial = _next(study, search)
                if trial is None:
                    return
                values = _suggest(trial, search.space)
            path = folder / "trials" / str(trial.number)
            _run(study, trial, search.base, values, partial(trainer, path), workers.stop)
            with lock:
                keep_best(study, folder)
                on_end(_trial(study.trials[trial.number]))

    if len(workers.trainers) == 1:  # in this thread, which handles signals
        return work(workers.trainers[0])
    with ThreadPoolExecutor(len(workers.trainers)) as pool:
        pending = {pool.submit(work, trainer) for trainer in workers.trainers}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2)
                for future in done:
                    future.result()
                if requested():
                    workers.end()
        except BaseException:
            workers.end()
            raise


def _next(study: Any, search: Search) -> Any:
    """A new Optuna trial, or None if there are enough. The first one has the base settings."""
    trials = study.get_trials(deepcopy=False)
    waiting = any(trial.state.name == "WAITING" for trial in trials)
    count = sum(trial.state.name not in ("FAIL", "WAITING") for trial in trials)
    if count >= search.num_trials:
        return None
    if count == 0 and not waiting:
        study.enqueue_trial(_base_parameters(search))
    # Of a resumed search too, proposals depend on the trials that have ended only.
    seed = derive(search.base.seed, f"trial {count}") % 2**32
    study.sampler = import_optuna().samplers.TPESampler(seed=seed)
    return study.ask()


def _base_parameters(search: Search) -> dict[str, Any]:
    """The base settings that lie in the search space, as Optuna's parameters."""
    found: dict[str, Any] = {}
    for name, entry in search.space.items():
        value = setting(search.base, name)
        if name == "hidden" and value is None:
            value = list(DEFAULT_HIDDEN[search.base.model.architecture])
        if value in entry.get("choices", ()):
            found[name] = json.dumps(value)
        elif "low" in entry and value is not None and entry["low"] <= value <= entry["high"]:
            found[name] = value
    return found


def _suggest(trial: Any, space: Space) -> dict[str, Any]:
    """Values of the searched settings, as in config.json."""
    values: dict[str, Any] = {}
    for name, entry in space.items():
        if "choices" in entry:
            texts = [json.dumps(choice) for choice in entry["choices"]]
            values[name] = json.loads(trial.suggest_categorical(name, texts))
        else:
            is_integer = isinstance(entry["low"], int)
            suggest = trial.suggest_int if is_integer else trial.suggest_float
            values[name] = suggest(name, entry["low"], entry["high"], log=entry["log"])
    return values


def _run(
    study: Any,
    trial: Any,
    base: Config,
    values: dict[str, Any],
    train: Callable[[Config], Generator[float]],
    stop: threading.Event,
) -> None:
    """Run a trial and tell the study how it ended."""
    state, best = import_optuna().trial.TrialState, -math.inf
    try:
        with closing(train(with_values(base, values))) as elbos:
            for epoch, elbo in enumerate(elbos, 1):
                trial.report(elbo, epoch)
                best = max(best, elbo)
                if epoch != base.fit.epochs and trial.should_prune():
                    study.tell(trial, state=state.PRUNED)
                    return
    except (InputError, Diverged) as error:
        # Not FAIL, of which Optuna's sampler takes no account.
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=state.PRUNED)
        return
    if stop.is_set():
        study.tell(trial, state=state.FAIL)
    else:
        study.tell(trial, best)


def keep_best(study: Any, folder: Path) -> None:
    """Make the run of the best trial FOLDER/best, and remove those of others that have ended.

    After a kill at any operation, the next call does what is left.
    """
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = max(complete, key=lambda trial: trial.value, default=None)
    for path in (folder / "trials").glob("*"):
        number = int(path.name)
        if best is not None and number == best.number:
            shutil.rmtree(folder / "best", ignore_errors=True)
            path.rename(folder / "best")
        elif trials[number].state.is_finished():
            shutil.rmtree(path)


def ended(study: Any) -> list[Trial]:
    """The trials that have ended, by number."""
    return [_trial(trial) for trial in study.get_trials() if trial.state.is_finished()]


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials, the highest ELBO first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return sorted(complete, key=lambda trial: -(trial.elbo or 0.0))


def _trial(frozen: Any) -> Trial:
    steps = sorted(frozen.intermediate_values)
    elbos = tuple(frozen.intermediate_values[step] for step in steps)
    reason = frozen.user_attrs.get("reason", "")
    settings = {
        name: json.loads(value) if isinstance(value, str) else value
        for name, value in frozen.params.items()
    }
    elbo = max(elbos, default=None)
    return Trial(
        number=frozen.number,
        state="failed" if reason else STATES[frozen.state.name],
        elbo=elbo,
        epoch=None if elbo is None else elbos.index(elbo) + 1,
        elbos=elbos,
        settings=settings,
        reason=reason,
        seconds=frozen.duration.total_seconds(),
    )
