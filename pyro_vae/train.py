"""Train a variational autoencoder.

Without flags, it trains on the included handwritten digits, which takes about a minute on two
cores, and writes the run folder runs/digits: config.json, metrics.jsonl (one line per epoch),
checkpoints/, figures/ and report.html, a page that shows the run.

  python -m pyro_vae.train --data mnist --epochs 20
  python -m pyro_vae.train --data photos/ --image-size 32 32 --architecture conv
  python -m pyro_vae.train --preset iwae-mnist --objective dreg --num-particles 50
  python -m pyro_vae.train --resume runs/digits

To train with several processes, each of which takes a part of every batch, use torchrun:

  torchrun --nproc-per-node 2 -m pyro_vae.train --data mnist
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from .cli import (
    choose_device,
    config_of,
    default_settings,
    early_flags,
    fail,
    parse,
    run_command,
)
from .cli.progress import add_scalars, describe, say, show, summary_writer
from .config import Config, InputError, auto, resolve

if TYPE_CHECKING:
    import torch

    from .training.checkpoint import Checkpoint
    from .training.records import Progress, Record
    from .training.run import RunFolder


@dataclass(frozen=True)
class TrainArguments(Config):
    """Run folder and source of the settings.

    Attributes:
        out: Run folder to write.
        overwrite: Replace the run in --out.
        resume: Continue the run in this folder with its own settings. Only --epochs, --patience and
            --device may be changed, and --data and --data-root if the same data have moved.
        config: Use the settings in a run's config.json. Other flags override them.
        preset: Use named settings. Other flags override them. mnist: a flow prior and larger
            networks, for the highest log p(x) of ten minutes on two cores. iwae-mnist: "Importance
            weighted autoencoders", one stochastic layer; choose --objective and --num-particles.
        tensorboard: Also write TensorBoard events to the run folder (requires pip install
            'pyro-vae[tensorboard]').
    """

    out: Annotated[
        Path | None,
        auto("DIR", "runs/DATA, numbered if it exists"),
    ] = None
    overwrite: bool = False
    resume: Annotated[Path | None, auto("DIR", "a new run")] = None
    config: Annotated[Path | None, auto("FILE", "none")] = None
    preset: Annotated[Literal["iwae-mnist", "mnist"] | None, auto("NAME", "none")] = None
    tensorboard: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    given = early_flags(argv)
    if given.resume and (given.config or given.preset):
        raise InputError("--resume uses the run's own settings; drop --config and --preset")
    if given.resume:
        return _resume(given.resume, argv)
    return train(_parse(argv, default_settings(given)))


def _parse(argv: Sequence[str] | None, default: Config) -> TrainArguments:
    defaults = TrainArguments(**vars(default))
    return parse(TrainArguments, argv, "train", __doc__, defaults)


def _resume(run: Path, argv: Sequence[str] | None) -> int:
    from .training import distributed
    from .training.checkpoint import load_checkpoint
    from .training.run import claimed

    if run.is_file():
        raise InputError(f"--resume expects a run folder; {run} is a file")
    # Before the checkpoint is read, so that no other process writes a later one.
    with claimed(run) if run.is_dir() and distributed.is_first() else nullcontext():
        checkpoint = load_checkpoint(run, "last")
        arguments = _parse(argv, checkpoint.config)
        _check_resumable(arguments, checkpoint)
        return train(arguments, checkpoint)


def train(arguments: TrainArguments, checkpoint: Checkpoint | None = None) -> int:
    """Train, from the beginning or from a checkpoint; returns the exit status.

    The caller holds the lock of a checkpoint's run folder (`claimed`).
    """
    from .training import distributed

    device = choose_device(arguments.device)
    try:
        with distributed.processes(device):
            return _train(arguments, checkpoint, device)
    except distributed.LostRank as error:
        return fail(str(error), status=1)


def _train(arguments: TrainArguments, checkpoint: Checkpoint | None, device: torch.device) -> int:
    from .data.labels import with_classes
    from .data.loading import load_data
    from .evidence.evaluation import elbo_terms
    from .models.build import build
    from .training import distributed
    from .training.checks import check_labels, check_particles
    from .training.loop import iterate
    from .training.run import RunFolder, asked_settings, explained, new_folder

    asked = config_of(arguments)
    asked = dataclasses.replace(asked, data=asked.data.absolute())
    if arguments.tensorboard:
        summary_writer()
    with distributed.first_here():  # which may download them
        spec = None if checkpoint is None else checkpoint.vae.likelihood_module.spec
        likelihood = asked.model.likelihood
        splits = load_data(asked.data, asked.seed, likelihood=likelihood, spec=spec).to(device)
    if asked.model.condition != "none":
        splits = with_classes(splits)
    config = resolve(asked, splits.likelihood, len(splits.train))
    check_particles(config.fit, splits.train)
    same = (splits.fingerprint, checkpoint and checkpoint.history)
    if distributed.anyone(distributed.agree(same) != same):
        raise InputError(
            f"the data {asked.data.source}, or the run to resume, are not the same for all "
            f"processes"
        )
    state = None
    if checkpoint is None:
        vae = build(config.model, splits, config.seed).to(device)
        check_labels(vae, splits)
        # A model that cannot be evaluated fails before --overwrite removes an old run.
        elbo_terms(vae, splits.validation, config.seed, num_images=1)
    else:
        if splits.fingerprint != checkpoint.fingerprint:
            raise InputError(
                f"the data {asked.data.source} are not those that the run began with; restore "
                f"them, or give their new place by --data"
            )
        vae, state = checkpoint.vae.to(device), checkpoint.training
    records = partial(iterate, vae, splits, config.fit, config.seed, state)
    if distributed.rank() > 0:
        return _follow(records())
    with ExitStack() as stack:
        if checkpoint is not None:
            path = checkpoint.path.parent.parent
            asked = asked_settings(path / "config.json", config, splits)
        else:
            source = Path(asked.data.source)  # the name of a data set is not absolute
            data_folder = source if source.is_absolute() and source.is_dir() else None
            place = arguments.out, splits.name, data_folder, arguments.overwrite
            path = stack.enter_context(new_folder(*place))
        stack.enter_context(explained(path))
        folder = RunFolder(path, asked, config, vae, splits, checkpoint)
        describe(folder)
        status = _record(folder, records, arguments.tensorboard)
        if status == 0:
            _summarize(folder)
    return status


def _follow(records: Iterator[Record]) -> int:
    """Train in a rank other than the first, without files. The first one stops on signals."""
    from .training import distributed
    from .training.records import Diverged
    from .training.stop import StopSignals

    try:
        with StopSignals():
            for _ in records:
                pass
    except Diverged as error:
        return fail(f"rank {distributed.rank()}: {error}", status=1)
    except distributed.LostRank as error:
        raise distributed.LostRank(f"rank {distributed.rank()}: {error}") from error
    return 0


def _record(folder: RunFolder, records: Callable[..., Iterator[Record]], tensorboard: bool) -> int:
    """Train, and write checkpoints and metrics; returns the exit status."""
    from tqdm import tqdm

    from .plots.from_model import draw_reconstructions
    from .training.distributed import LostRank
    from .training.records import Diverged
    from .training.stop import StopSignals

    path, seed, epochs = folder.path, folder.config.seed, folder.config.fit.epochs or 0
    writer = summary_writer()(str(path / "tensorboard")) if tensorboard else nullcontext()
    bar = tqdm(disable=None, unit="step", dynamic_ncols=True, smoothing=0.05)
    again = f"--resume {quote(str(path))}"
    interrupted = False

    def on_step(progress: Progress) -> bool:
        nonlocal interrupted
        show(bar, progress)
        interrupted = signals.requested()
        folder.reached(progress.state, save=interrupted)
        return interrupted

    with StopSignals() as signals, bar, folder, writer:
        try:
            for record in records(on_step=on_step):
                line = folder.add(record)
                if tensorboard:
                    add_scalars(writer, line)
                if record.epoch == 1:
                    name = "reconstructions_first_epoch"
                    draw_reconstructions(folder.vae, folder.splits, path / "figures", name, 1, seed)
                if bar.disable:
                    say(line, epochs)
            folder.save()
        except Diverged as error:
            kept = f"{path / 'checkpoints'} keeps the last good state, of epoch"
            return fail(f"{error}. {kept} {folder.saved_epoch}", status=1)
        except LostRank as error:  # torchrun then ends this process too, by a signal
            folder.save()
            raise LostRank(f"{error}; continue with the same command and {again}") from error
    if interrupted:
        print(f"stopped; continue with: python -m pyro_vae.train {again}")
        return 128 + (signals.received or 0)
    return 0


def _check_resumable(arguments: TrainArguments, checkpoint: Checkpoint) -> None:
    """Check that the flags continue the same run.

    Raises:
        InputError: a flag would change a setting that cannot change, or the data are missing.
    """
    from .training.run import check_source

    if arguments.out is not None or arguments.overwrite:
        raise InputError("--resume writes to the run's own folder; drop --out and --overwrite")
    before, after = checkpoint.config, config_of(arguments)
    fit = dataclasses.replace(after.fit, epochs=before.fit.epochs, patience=before.fit.patience)
    data = dataclasses.replace(after.data, source=before.data.source, root=before.data.root)
    if dataclasses.replace(after, data=data, fit=fit, device=before.device) != before:
        raise InputError(
            "--resume continues a run with its own settings; only --epochs, --patience and "
            "--device may be changed, and --data and --data-root if the data have moved. To "
            "change others, start a new run with --config RUN/config.json"
        )
    check_source(arguments.data)
    done = len(checkpoint.history)
    if done > (arguments.fit.epochs or 0):
        raise InputError(
            f"--epochs expects at least {done}, the number of completed epochs; got fewer"
        )
    if done == arguments.fit.epochs and os.environ.get("RANK", "0") == "0":
        print(f"the run is complete with {done} epochs (--epochs adds more); redrawing its figures")


def _summarize(run: RunFolder) -> None:
    """Refit the guide, draw the figures, write the report, and print their paths."""
    from .page.write import redraw
    from .plots.from_model import draw_reconstructions
    from .training.checkpoint import load_checkpoint

    history, figures, seed = run.history, run.path / "figures", run.config.seed
    last, best = history[-1]["epoch"], load_checkpoint(run.path, "best")
    line = best.history[-1]
    draw_reconstructions(run.vae, run.splits, figures, "reconstructions_last_epoch", last, seed)
    names = {
        "validation_elbo": "ELBO",
        "validation_reconstruction": "reconstruction",
        "validation_kl": "KL",
    }
    terms = ", ".join(f"{n} {line[k]:.2f}" for k, n in names.items() if line[k] is not None)
    print(
        f"done   {history[-1]['seconds']:.0f} s of training; best epoch {line['epoch']} of {last}"
    )
    print(f"       validation: {terms} nats per row")
    if run.config.refit != "off":
        _refit(run, best)
    report = redraw(run.path, run.splits, next(run.vae.parameters()).device)
    print(f"see    {report}, {figures}/*.png, {run.path / 'metrics.jsonl'}")
    print(f"next   python -m pyro_vae.evaluate {quote(str(run.path))}")


def _refit(run: RunFolder, best: Checkpoint) -> None:
    """Refit the guide of the best model, by default if that is cheap and raises its ELBO."""
    from .config.families import RefitConfig
    from .models.autoencoder import Autoencoder
    from .models.labels import SemiSupervisedVAE
    from .refit import refit_run
    from .training.records import Diverged
    from .training.refitting import is_cheaper

    config, auto = RefitConfig(), run.config.refit == "auto"
    model, count = run.config.model, len(run.splits.train)
    cheap = is_cheaper(config, run.config.fit, count, model.latent_dim)
    done = (run.path / "checkpoints" / "refitted.pt").is_file()
    fixed = isinstance(best.vae, Autoencoder | SemiSupervisedVAE)
    if fixed or done or (auto and not cheap):
        return
    try:
        refit_run(run.path, best, run.splits, config, run.config.seed, only_if_better=auto)
    except (Diverged, InputError) as error:
        if not auto:
            raise
        print(f"       no refit: {error}")


if __name__ == "__main__":
    sys.exit(main())
