"""Train a variational autoencoder.

With no flags it learns the embedded handwritten digits in about a minute on two cores and writes a
run folder, runs/digits: config.json, metrics.jsonl (a line an epoch), checkpoints/, figures/ and
report.html, a page with all of it.

  python -m pyro_vae.train --data mnist --epochs 20
  python -m pyro_vae.train --data photos/ --image-size 32 32 --architecture conv
  python -m pyro_vae.train --preset iwae-mnist --objective dreg --num-particles 50
  python -m pyro_vae.train --resume runs/digits

Several processes, each of which takes its part of every batch, are started by torchrun:

  torchrun --nproc-per-node 2 -m pyro_vae.train --data mnist
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .command import choose_device, config_of, fail, parse, run_command
from .config import PRESETS, Config, InputError, auto, read_config, resolve

if TYPE_CHECKING:
    import torch

    from .autoencoder import Autoencoder
    from .checkpoint import Checkpoint
    from .data import Splits
    from .records import Progress, Record
    from .vae import VAE

# Checkpoints are written at most so often, in seconds: a kill costs no more than this.
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


@dataclass(frozen=True)
class TrainArguments(Config):
    """The run and its folder.

    Attributes:
        out: Run folder to write.
        overwrite: Replace the run in --out.
        resume: Continue the run in this folder with its own settings; --epochs, --patience and
            --device may be given anew.
        config: Take the settings of a run's config.json; flags given beside it win.
        preset: Take the settings of a published experiment; flags given beside it win. iwae-mnist:
            "Importance weighted autoencoders", one stochastic layer, on MNIST; choose --objective,
            --num-particles and --epochs.
        tensorboard: Also write TensorBoard events to the run folder (needs pip install
            'pyro-vae[tensorboard]').
    """

    out: Annotated[
        Path | None,
        auto("DIR", "runs/DATA, numbered where that exists"),
    ] = None
    overwrite: bool = False
    resume: Annotated[Path | None, auto("DIR", "a new run")] = None
    config: Annotated[Path | None, auto("FILE", "none")] = None
    preset: Annotated[Literal["iwae-mnist"] | None, auto("NAME", "none")] = None
    tensorboard: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    early = argparse.ArgumentParser("pyro_vae.train", add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    early.add_argument("--preset")
    given, _ = early.parse_known_args(argv)
    checkpoint = None
    default = Config()
    if given.resume and (given.config or given.preset):
        raise InputError("--resume takes the run's own settings; drop --config and --preset")
    if given.config and given.preset:
        raise InputError("--config and --preset both say what the settings are; drop one")
    if given.preset in PRESETS:
        default = PRESETS[given.preset]
    if given.config:
        default = read_config(given.config)
    if given.resume:
        from .checkpoint import load_checkpoint

        if given.resume.is_file():
            raise InputError(f"--resume expects a run folder; {given.resume} is a file")
        checkpoint = load_checkpoint(given.resume, "last")
        default = checkpoint.config
    names = [field.name for field in dataclasses.fields(Config)]
    arguments = parse(
        TrainArguments,
        argv,
        "train",
        __doc__,
        TrainArguments(**{name: getattr(default, name) for name in names}),
    )
    if checkpoint is not None:
        _check_resumable(arguments, checkpoint)
    return train(arguments, checkpoint)


def train(arguments: TrainArguments, checkpoint: Checkpoint | None = None) -> int:
    """Train as the arguments say, from the beginning or from a checkpoint; returns the status."""
    from . import distributed

    device = choose_device(arguments.device)
    with distributed.processes(device):
        return _train(arguments, checkpoint, device)


def _train(arguments: TrainArguments, checkpoint: Checkpoint | None, device: torch.device) -> int:
    from . import distributed
    from .data import load_data
    from .factory import build
    from .records import Diverged
    from .svi import elbo_terms, fit

    asked = config_of(arguments)
    if checkpoint is None:
        asked = dataclasses.replace(asked, data=asked.data.absolute())
    if arguments.tensorboard:
        _summary_writer()
    with distributed.first_here():  # which may download them
        splits = load_data(asked.data, asked.seed).to(device)
    config = resolve(asked, splits.likelihood, len(splits.train))
    if distributed.anyone(distributed.agree(splits.fingerprint) != splits.fingerprint):
        raise InputError(f"the data {asked.data.source} are not the same for all processes")
    if checkpoint is None:
        vae = build(config.model, splits, config.seed).to(device)
        # What cannot work fails before an old run is touched.
        elbo_terms(vae, splits.validation, config.seed, num_images=1)
    else:
        if splits.fingerprint != checkpoint.fingerprint:
            raise InputError(f"the data {asked.data.source} have changed since the run began")
        vae = checkpoint.vae.to(device)
    training = None if checkpoint is None else checkpoint.training
    if distributed.rank() > 0:
        return _follow(fit(vae, splits, config.fit, config.seed, training))
    folder = _folder(arguments, splits.name, checkpoint)
    run = _Run(folder, config, vae, splits, checkpoint, arguments.tensorboard)
    run.write("config.json", json.dumps(asked.to_dict(), indent=2) + "\n")
    _describe(run)
    with run:
        try:
            for record in fit(vae, splits, config.fit, config.seed, training, run.on_step):
                run.on_epoch(record)
            run.finish()
        except Diverged as error:
            kept = f"{folder / 'checkpoints'} keeps the last good state, of epoch {run.saved_epoch}"
            return fail(f"{error}. {kept}", status=1)
        except distributed.LostRank as error:  # whereupon torchrun ends this one too, by a signal
            run.keep()
            again = f"continue with the same command and --resume {folder}"
            return fail(f"{error}; {again}", status=1)
    if run.interrupted:
        print(f"stopped; continue with: python -m pyro_vae.train --resume {folder}")
        return 128 + (run.stopped or 0)
    _summarize(run)
    return 0


def _follow(records: Iterator[Record]) -> int:
    """What every rank but the first does: train, without files. The first hears the signals."""
    from . import distributed
    from .records import Diverged

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        for _ in records:
            pass
    except (Diverged, distributed.LostRank) as error:
        return fail(f"rank {distributed.rank()}: {error}", status=1)
    return 0


class _Run:
    """The folder of a run while it trains: metrics, checkpoints, progress bar, signals."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        vae: VAE | Autoencoder,
        splits: Splits,
        checkpoint: Checkpoint | None,
        tensorboard: bool,
    ) -> None:
        from tqdm import tqdm

        self.folder, self.config, self.vae, self.splits = folder, config, vae, splits
        self.history = [] if checkpoint is None else list(checkpoint.history)
        self.best: bytes | None = None  # waiting to be written
        self.saved_at = time.monotonic()
        self.saved_epoch = len(self.history)
        self.unsaved: Record | None = None  # the last epoch, where last.pt does not hold it
        self.stopped: int | None = None  # the signal that asked for it
        self.interrupted = False  # whether the training ended for it
        self.progress: Progress | None = None  # the last
        self.writer = _summary_writer()(str(folder / "tensorboard")) if tensorboard else None
        for name in ("checkpoints", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        # After a kill there may be lines of epochs that are to be done again.
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        if checkpoint is None:
            self._save(None)
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.bar = tqdm(disable=None, unit="step", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> _Run:
        self.handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.metrics.close()
        self._write_best()  # on every way out
        if self.writer is not None:
            self.writer.close()

    def _on_signal(self, number: int, frame: object) -> None:
        """Finish the step, save, stop; at the second signal stop at once."""
        if self.stopped is not None:
            raise KeyboardInterrupt
        self.stopped = number

    def on_step(self, progress: Progress) -> bool:
        self.progress = progress
        if self.bar.total is None:
            self.bar.reset(total=progress.epochs * progress.steps_per_epoch)
            self.bar.update(progress.step - 1)
        self.bar.update()
        self.bar.set_description(f"epoch {progress.epoch}/{progress.epochs}", refresh=False)
        parts = {"ELBO": progress.elbo, "rec": progress.reconstruction, "KL": progress.kl}
        shown = {key: f"{value:.2f}" for key, value in parts.items() if value is not None}
        shown["images/s"] = f"{progress.images_per_second:,.0f}"
        self.bar.set_postfix(shown, refresh=False)
        if self.stopped is not None or time.monotonic() - self.saved_at > SAVE_EVERY:
            self._save(progress.state())
        self.interrupted = self.stopped is not None
        return self.interrupted

    def on_epoch(self, record: Record) -> None:
        from .checkpoint import serialize
        from .gallery import draw_reconstructions

        line = record.metrics()
        self.history.append(line)
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        if self.writer is not None:
            for name, value in line.items():
                if value is not None and name not in ("epoch", "step"):
                    self.writer.add_scalar(name, value, record.epoch)
        if record.is_best:
            self.best = serialize(self.vae, self.config, self.splits, self.history)
        self.unsaved = record
        if record.epoch == 1 or time.monotonic() - self.saved_at > SAVE_EVERY:
            self._save(record.state())
        if record.epoch == 1:
            draw_reconstructions(
                self.vae,
                self.splits,
                self.folder / "figures",
                "reconstructions_first_epoch",
                record.epoch,
                self.config.seed,
            )
        self._say(line)

    def finish(self) -> None:
        """Bring the checkpoints up to date with the last epoch."""
        if self.unsaved is not None and not self.interrupted:
            self._save(self.unsaved.state())

    def keep(self) -> None:
        """Save the last complete step, after a failure in the next that changed nothing."""
        if self.progress is not None:
            self._save(self.progress.state())

    def _say(self, line: dict[str, Any]) -> None:
        """A line an epoch where there is no progress bar, in long runs one in so many."""
        assert self.config.fit.epochs is not None
        every = max(1, self.config.fit.epochs // 20)
        if self.bar.disable and (line["epoch"] % every == 0 or line["epoch"] == 1):
            names = ("train_elbo", "validation_elbo", "reconstruction", "kl")
            terms = "  ".join(f"{n} {line[n]:.2f}" for n in names if line[n] is not None)
            print(f"epoch {line['epoch']}/{self.config.fit.epochs}  {terms}", flush=True)

    def _save(self, training: dict[str, Any] | None) -> None:
        """Write what has changed; the best model first, so that it is never behind the last."""
        from .checkpoint import serialize, write_atomically

        self._write_best()
        content = serialize(self.vae, self.config, self.splits, self.history, training)
        write_atomically(self.folder / "checkpoints" / "last.pt", content)
        self.saved_at = time.monotonic()
        self.saved_epoch = len(self.history)
        self.unsaved = None

    def _write_best(self) -> None:
        from .checkpoint import write_atomically

        if self.best is not None:
            write_atomically(self.folder / "checkpoints" / "best.pt", self.best)
            self.best = None

    def write(self, name: str, text: str) -> None:
        from .checkpoint import write_atomically

        write_atomically(self.folder / name, text.encode())


def _folder(arguments: TrainArguments, name: str, checkpoint: Checkpoint | None) -> Path:
    """The folder of the run; where it is new, an old run in it is removed only when asked."""
    if checkpoint is not None:
        return checkpoint.path.parent.parent
    folder = arguments.out
    if folder is None:
        folder = Path("runs", name)
        number = 2
        while not arguments.overwrite and folder.exists() and any(folder.iterdir()):
            folder = Path("runs", f"{name}-{number}")
            number += 1
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out expects a folder; {folder} is a file")
    source = Path(arguments.data.absolute().source)  # the name of a data set stays relative
    inside = folder.resolve().is_relative_to(source.resolve())
    if source.is_absolute() and source.is_dir() and inside:
        raise InputError(f"--out {folder} lies in the data folder {source}; give another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not arguments.overwrite:
            raise InputError(
                f"--out {folder} exists and is not empty; continue it by --resume {folder}, "
                f"replace it by --overwrite, or give another --out"
            )
        try:
            read_config(folder / "config.json")
        except InputError as error:
            raise InputError(f"--overwrite replaces runs only; {folder} is none: {error}") from None
        for entry in RUN_FILES:
            path = folder / entry
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the run folder {folder}: {error.strerror}") from None
    return folder


def _check_resumable(arguments: TrainArguments, checkpoint: Checkpoint) -> None:
    """Refuse flags that would make another run of this one."""
    if arguments.out is not None or arguments.overwrite:
        raise InputError("--resume writes to the run's own folder; drop --out and --overwrite")
    before, after = checkpoint.config, config_of(arguments)
    fit = dataclasses.replace(after.fit, epochs=before.fit.epochs, patience=before.fit.patience)
    if dataclasses.replace(after, fit=fit, device=before.device) != before:
        raise InputError(
            "--resume continues a run with its own settings; only --epochs, --patience and "
            "--device may be given anew. For others start a new run by --config RUN/config.json"
        )
    done = len(checkpoint.history)
    if done > (arguments.fit.epochs or 0):
        raise InputError(f"--epochs expects at least the {done} that the run has; got fewer")
    if done == arguments.fit.epochs and os.environ.get("RANK", "0") == "0":
        print(f"the run is complete with {done} epochs, more are given by --epochs; drawing again")


def _summary_writer() -> Any:
    """TensorBoard's writer class."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs a package: pip install 'pyro-vae[tensorboard]'"
        ) from None
    return SummaryWriter


def _describe(run: _Run) -> None:
    """What is about to be trained, on what, and where to."""
    from .svi import run_mode

    splits, model, spec = run.splits, run.config.model, run.splits.spec
    sizes = " ".join(str(size) for size in model.hidden or ())
    count = sum(p.numel() for p in run.vae.parameters())
    binarized = spec.binarizes(run.vae.likelihood_module.units)
    binarization = " (binarized afresh at each access)" if binarized else ""
    print(
        f"data   {splits.name}: {len(splits.train):,} training, {len(splits.validation):,} "
        f"validation, {len(splits.test):,} test rows of {'x'.join(map(str, spec.shape))}, "
        f"{splits.describe()}"
        f"{f', {len(splits.class_names)} classes' if splits.class_names else ''}"
    )
    print(
        f"model  {model.kind}: {model.architecture} {sizes}, {model.latent_dim} latents, "
        f"likelihood {model.likelihood}{binarization}, "
        f"{count:,} parameters on {next(run.vae.parameters()).device}"
    )
    if run_mode(run.config.fit, splits.train) == "compiled":
        print("graph  the ELBO is captured and compiled first, some ten seconds")
    print(f"run    {run.folder}", flush=True)


def _summarize(run: _Run) -> None:
    """Draw the pictures and say where everything is."""
    from .checkpoint import load_checkpoint
    from .codes import latent_codes
    from .gallery import draw_reconstructions, draw_run
    from .pages import write_report

    history, figures, seed = run.history, run.folder / "figures", run.config.seed
    device = next(run.vae.parameters()).device
    last = history[-1]["epoch"]
    draw_reconstructions(run.vae, run.splits, figures, "reconstructions_last_epoch", last, seed)
    best = load_checkpoint(run.folder)
    codes = latent_codes(best.vae.to(device), run.splits, seed)
    draw_run(best.vae, run.splits, history, figures, seed, codes)
    report = write_report(run.folder, best, run.splits, codes)

    line = best.history[-1]
    names = {
        "validation_elbo": "ELBO",
        "validation_reconstruction": "reconstruction",
        "validation_kl": "KL",
    }
    terms = ", ".join(f"{n} {line[k]:.2f}" for k, n in names.items() if line[k] is not None)
    print(
        f"done   {history[-1]['seconds']:.0f} s of training; best epoch {line['epoch']} of {last}"
    )
    print(f"       validation: {terms} nats per image")
    print(f"see    {report}, {figures}/*.png, {run.folder / 'metrics.jsonl'}")
    print(f"next   python -m pyro_vae.evaluate {run.folder}")


if __name__ == "__main__":
    sys.exit(main())
