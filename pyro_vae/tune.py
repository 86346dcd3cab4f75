"""Search for the settings of the highest validation ELBO.

Settings are proposed by Optuna, and poor trials are ended early. The flags of `train` are those of
all trials. The settings in --space are searched: a .toml or .json file of ranges and choices. By
default, these are the numbers of latents, the hidden layers and the learning rate, unless they are
given as flags. The test split is not used.

  latent_dim = { low = 2, high = 64, log = true }
  hidden = { choices = [[256], [512, 256]] }

The folder holds the search (search.json, journal.log), its results (results.json, figures/) and the
run of the best trial, best/, which all commands accept. With one worker, the same seed gives the
same search; with several, proposals depend on which trial ends first.

  python -m pyro_vae.tune --data digits --epochs 20 --trials 30
  python -m pyro_vae.tune --data scans.npy --space space.toml --workers 4 --out runs/search
  python -m pyro_vae.tune --resume runs/search --trials 60
  python -m pyro_vae.train --config runs/search/best/config.json --seed 1
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .cli import (
    choose_device,
    config_of,
    default_settings,
    early_flags,
    fail,
    names_given,
    parse,
    print_json,
    run_command,
)
from .config import Config, InputError, auto, resolve
from .config.options import check_integer
from .config.space import (
    Search,
    Space,
    default_space,
    describe,
    read_search,
    read_space,
    value_text,
)

if TYPE_CHECKING:
    from .data.splits import Splits
    from .training.search import Trial

# Flags that a resumed search may have.
RESUMED = {"resume", "trials", "workers", "device", "json"}

# What --overwrite removes; search.json, which marks the folder as that of a search, is replaced.
REMOVED = ("journal.log", "results.json", "trials", "best", "figures")

SHOWN = 5


@dataclass(frozen=True)
class TuneArguments(Config):
    """The search, and the settings that all trials share.

    Attributes:
        space: Settings to search: a .toml or .json file with a range or choices for each.
        trials: Number of trials, the pruned ones included.
        workers: Number of processes, each of which trains one trial at a time.
        out: Folder to write.
        overwrite: Replace the search in --out.
        resume: Continue the search in this folder with its own settings. Only --trials, --workers
            and --device may be changed.
        config: Use the settings in a run's config.json. Other flags override them.
        preset: Use named settings, see train. Other flags override them.
        json: Print the results as JSON.
    """

    space: Annotated[Path | None, auto("FILE", "latents, hidden layers and learning rate")] = None
    trials: int = 30
    workers: int = 1
    out: Annotated[Path | None, auto("DIR", "runs/DATA-search, numbered if it exists")] = None
    overwrite: bool = False
    resume: Annotated[Path | None, auto("DIR", "a new search")] = None
    config: Annotated[Path | None, auto("FILE", "none")] = None
    preset: Annotated[Literal["iwae-mnist", "mnist"] | None, auto("NAME", "none")] = None
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("trials", self.trials)
        check_integer("workers", self.workers)
        if self.model.kind == "ae":
            raise InputError("--model ae has no ELBO to compare trials by; drop it")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    early, given = early_flags(argv), names_given(argv)
    if early.resume:
        return _resume(early.resume, argv, given)
    arguments = _parse(argv, default_settings(early))
    asked = config_of(arguments)
    space = None if arguments.space is None else _given_space(arguments.space, asked, given)
    from .training.run import new_folder
    from .training.search import check_buildable, import_optuna

    import_optuna()
    search, splits = _prepared(asked, space, arguments.trials, given)
    check_buildable(search, splits)
    source = Path(search.base.data.source)  # the name of a data set is not absolute
    data_folder = source if source.is_absolute() and source.is_dir() else None
    place = arguments.out, f"{splits.name}-search", data_folder, arguments.overwrite
    with new_folder(*place, remove=_remove) as folder:
        return _run(folder, search, splits, arguments)


def _parse(argv: Sequence[str] | None, base: Config, **defaults: Any) -> TuneArguments:
    default = TuneArguments(**vars(base), **defaults)
    return parse(TuneArguments, argv, "tune", __doc__, default)


def _given_space(path: Path, asked: Config, given: set[str]) -> Space:
    """The space in a file.

    Raises:
        InputError: it is invalid, or a flag gives a setting that it searches.
    """
    space = read_space(path, asked)
    for name in space:
        if name in given:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is given, and searched in --space {path}; drop one")
    return space


def _prepared(
    asked: Config, space: Space | None, num_trials: int, given: set[str]
) -> tuple[Search, Splits]:
    """The search and its data, without the test split."""
    import math

    from .training.trials import load_without_test

    asked = dataclasses.replace(asked, data=asked.data.absolute())
    splits = load_without_test(asked, choose_device(asked.device))
    epochs = resolve(asked, splits.likelihood, len(splits.train)).fit.epochs
    base = dataclasses.replace(asked, fit=dataclasses.replace(asked.fit, epochs=epochs))
    if space is None:
        spec = splits.spec
        space = default_space(base, math.prod(spec.shape), spec.is_table, given)
    return Search(base, space, num_trials, splits.fingerprint), splits


def _resume(folder: Path, argv: Sequence[str] | None, given: set[str]) -> int:
    from .training.run import check_source, claimed
    from .training.trials import load_without_test

    if not folder.is_dir():
        raise InputError(f"--resume expects the folder of a search; got {folder}")
    for name in sorted(given - RESUMED - {"help"}):
        raise InputError(
            f"--resume continues a search with its own settings; only --trials, --workers and "
            f"--device may be changed: drop --{name.replace('_', '-')}, or start a new search"
        )
    with claimed(folder):
        search = read_search(folder)
        arguments = _parse(argv, search.base, trials=search.num_trials)
        base = dataclasses.replace(search.base, device=arguments.device)
        check_source(base.data)
        splits = load_without_test(base, choose_device(base.device))
        if splits.fingerprint != search.fingerprint:
            raise InputError(
                f"the data {base.data.source} are not those that the search began with; restore "
                f"them, or start a new search"
            )
        search = dataclasses.replace(search, base=base, num_trials=arguments.trials)
        return _run(folder, search, splits, arguments)


def _remove(folder: Path) -> None:
    """Remove the files of a search."""
    try:
        read_search(folder)
    except InputError as error:
        raise InputError(f"--overwrite replaces searches only, not {folder}: {error}") from None
    for path in (folder / name for name in REMOVED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _run(folder: Path, search: Search, splits: Splits, arguments: TuneArguments) -> int:
    """Search, and write and print the results; returns the exit status."""
    from .runtime.files import to_json, write_atomically
    from .training.search import ended, open_study
    from .training.stop import StopSignals

    out = sys.stderr if arguments.json else sys.stdout
    again = f"python -m pyro_vae.tune --resume {quote(str(folder))}"
    _describe(folder, search, splits, out)
    try:
        write_atomically(folder / "search.json", (to_json(search.to_dict(), 2) + "\n").encode())
        study, failure = open_study(folder, search), ""
        with StopSignals() as signals:
            failure = _trials(study, search, folder, splits, arguments.workers, out)
        trials = ended(study)
        results = _results(folder, trials)
        write_atomically(folder / "results.json", (to_json(results, 2) + "\n").encode())
        _draw(folder, search, trials, splits.spec.row)
    except BrokenPipeError:  # stdout is closed
        raise
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or folder}: {error.strerror}. Free space or restore "
            f"access, then continue with: {again}"
        ) from error
    if failure:
        return fail(f"{failure}; continue with: {again}", status=1)
    stopped = signals.received
    if results["best"] is None and stopped is None:
        reasons = [f": trial {t.number}: {t.reason}" for t in trials if t.reason]
        raise InputError(f"no trial is complete{(reasons or [''])[0]}")
    if arguments.json:
        print_json(results)
    elif results["best"] is not None:
        _summarize(folder, trials, splits)
    if stopped is None:
        return 0
    print(f"stopped; continue with: {again}", file=out)
    return 128 + stopped


def _trials(
    study: Any, search: Search, folder: Path, splits: Splits, workers: int, out: Any
) -> str:
    """Run the trials, with a progress bar; returns why a worker process was lost, if one was."""
    from tqdm import tqdm

    from .training.search import best_first, ended, run_search
    from .training.trials import LostWorker, start_workers

    trials = ended(study)
    done = sum(trial.state != "interrupted" for trial in trials)
    with (
        start_workers(workers, search.base, splits) as processes,
        tqdm(total=search.num_trials, initial=done, unit="trial", disable=None) as bar,
    ):

        def on_end(trial: Trial) -> None:
            trials.append(trial)
            tqdm.write(_line(trial), file=out)
            out.flush()
            bar.update(trial.state != "interrupted")
            if best := best_first(trials):
                bar.set_postfix_str(f"best {best[0].elbo:.2f}")

        try:
            run_search(study, search, folder, processes, on_end)
        except LostWorker as error:
            return str(error)
    return ""


def _describe(folder: Path, search: Search, splits: Splits, out: Any) -> None:
    """Print data, settings and space before the search."""
    model, fit = search.base.model, search.base.fit
    print(
        f"data   {splits.name}: {len(splits.train):,} training, {len(splits.validation):,} "
        f"validation rows of {'x'.join(map(str, splits.spec.shape))}; the test rows are left out\n"
        f"trials {search.num_trials} of {fit.epochs} epochs, {model.architecture}, guide "
        f"{value_text(vars(model.guide))}, prior {value_text(vars(model.prior))}, objective "
        f"{fit.objective}",
        file=out,
    )
    for number, line in enumerate(describe(search.space)):
        print(f"{'space' * (number == 0):<6} {line}", file=out)
    print(f"folder {folder}", file=out, flush=True)


def _line(trial: Trial) -> str:
    """A trial on one line."""
    settings = ", ".join(f"{name} {value_text(v)}" for name, v in trial.settings.items())
    elbo = "" if trial.elbo is None else f"{trial.elbo:.2f}"
    reason = f": {trial.reason}" if trial.reason else ""
    return f"trial {trial.number:<4} {trial.state:<11} {elbo:>9}   {settings}{reason}"


def _results(folder: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    """The results as plain values."""
    from .training.search import best_first

    best = [{**vars(trial), "run": str(folder / "best")} for trial in best_first(trials)[:1]]
    return {"best": best[0] if best else None, "trials": [vars(trial) for trial in trials]}


def _draw(folder: Path, search: Search, trials: Sequence[Trial], row: str) -> None:
    """Write the figures of the trials that have a value."""
    from .plots.run import save_all
    from .plots.search import search_curves, search_history, search_settings

    shown = [trial for trial in trials if trial.elbo is not None and trial.state != "interrupted"]
    if not shown:
        return
    elbos = [trial.elbo for trial in shown if trial.elbo is not None]
    complete = [trial.state == "complete" for trial in shown]
    columns = {
        name: [
            trial.settings[name] if "low" in entry else value_text(trial.settings[name])
            for trial in shown
        ]
        for name, entry in search.space.items()
    }
    choices = {
        name: [value_text(choice) for choice in entry["choices"]]
        for name, entry in search.space.items()
        if "choices" in entry
    }
    log = [name for name, entry in search.space.items() if entry.get("log")]
    figures = {
        "history": search_history([trial.number for trial in shown], elbos, complete, row),
        "settings": search_settings(columns, choices, log, elbos, complete, row),
        "curves": search_curves([trial.elbos for trial in shown], complete, row),
    }
    (folder / "figures").mkdir(exist_ok=True)
    save_all(figures, folder / "figures")


def _summarize(folder: Path, trials: Sequence[Trial], splits: Splits) -> None:
    """Print the best trials, and what to do with them."""
    from .training.search import best_first

    ranked = best_first(trials)
    counts = {
        state: sum(trial.state == state for trial in trials) for state in ("pruned", "failed")
    }
    others = "".join(f", {count} {state}" for state, count in counts.items() if count)
    count = f"{len(ranked)} complete trial{'s' * (len(ranked) > 1)}{others}"
    seconds = sum(trial.seconds for trial in trials)
    run = quote(str(folder / "best"))
    print(
        f"done   {count}, {seconds:.0f} s in all; the best by validation ELBO, "
        f"nats per {splits.spec.row}:"
    )
    for trial in ranked[:SHOWN]:
        print(_line(trial))
    if len(ranked) > 1:
        print(
            f"note   {len(ranked)} trials were compared on the same {len(splits.validation):,} "
            f"validation rows, so the highest ELBO\n"
            f"       is too high on average. `evaluate` measures it on the test split"
        )
    print(f"see    {folder}/figures/*.png, {folder / 'results.json'}")
    print(f"next   python -m pyro_vae.evaluate {run}")
    print(f"       python -m pyro_vae.refit {run}")
    print(f"       python -m pyro_vae.train --config {run}/config.json")


if __name__ == "__main__":
    sys.exit(main())
