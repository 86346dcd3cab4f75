"""Refit the guide of a run: a new q(z|x), with the model p(z) p(x|z) held fixed.

By default, the new guide starts from the encoder's guess and finds a Gaussian for each row by some
Newton steps; its tails are fitted to rows simulated from the model, whose latents are known. With
another --guide, an encoder is trained on the ELBO of training rows and on simulated rows. The
result is RUN/checkpoints/refitted.pt, which all commands then use; best.pt keeps the trained guide.
RUN/refit.jsonl has the records, and figures and report.html are drawn anew.

  python -m pyro_vae.refit runs/digits
  python -m pyro_vae.refit runs/digits --guide full --out runs/digits-full
  python -m pyro_vae.diagnose runs/digits-full
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .cli import choose_device, load_run_data, parse, run_command
from .config import InputError, auto
from .config.families import RefitConfig
from .config.options import check_integer

if TYPE_CHECKING:
    from .data.splits import Splits
    from .training.checkpoint import Checkpoint

# What --out takes over from the run.
COPIED = ("config.json", "metrics.jsonl", "checkpoints/best.pt", "checkpoints/last.pt")


@dataclass(frozen=True, kw_only=True)
class RefitArguments(RefitConfig):
    """Arguments of `refit`.

    Attributes:
        run: Run folder.
        out: Run folder to write, with a copy of the model.
        overwrite: Replace the run in --out.
        data_root: Folder of torchvision's data sets.
        seed: Seed of all random draws.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path | None, auto("DIR", "RUN itself")] = None
    overwrite: bool = False
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(RefitArguments, argv, "refit", __doc__)))


def _main(arguments: RefitArguments) -> None:
    from .models.autoencoder import Autoencoder
    from .page.write import redraw
    from .training.checkpoint import load_checkpoint
    from .training.run import claimed, explained, new_folder

    run, device = arguments.run, choose_device(arguments.device)
    if not run.is_dir():
        raise InputError(f"expected a run folder; got {run}")
    checkpoint = load_checkpoint(run, "best")
    if isinstance(checkpoint.vae, Autoencoder):
        raise InputError(f"{run} is an autoencoder, which has no guide to refit")
    if arguments.overwrite and arguments.out is None:
        raise InputError("--overwrite replaces the run in --out; give --out")
    splits = load_run_data(checkpoint, None, arguments.data_root).to(device)
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    config = RefitConfig(**{f.name: getattr(arguments, f.name) for f in fields(RefitConfig)})
    with ExitStack() as stack:
        path = run
        if arguments.out is None:
            stack.enter_context(claimed(run))
        else:
            place = arguments.out, splits.name, run, arguments.overwrite
            path = stack.enter_context(new_folder(*place))
            _copy(run, path)
        stack.enter_context(explained(path))
        refit_run(path, checkpoint, splits, config, seed)
        report = redraw(path, splits, device)
    print(f"see    {report}, {path}/figures/*.png")
    print(f"next   python -m pyro_vae.diagnose {quote(str(path))}")


def refit_run(
    path: Path,
    checkpoint: Checkpoint,
    splits: Splits,
    config: RefitConfig,
    seed: int,
    only_if_better: bool = False,
) -> None:
    """Refit a checkpoint's guide, and write refitted.pt and refit.jsonl to the run folder `path`.

    Args:
        path: whose lock the caller holds.
        checkpoint: the trained model.
        splits: the data of the run.
        config, seed: of the refit.
        only_if_better: write nothing if the validation ELBO does not rise.
    """
    from tqdm import tqdm

    from .runtime.files import to_json, write_atomically
    from .training.checkpoint import serialize
    from .training.refitting import RefitRecord, refit, refitted_config, validation_elbo, work

    vae: Any = checkpoint.vae.to(splits.train.device)
    before, started = validation_elbo(vae, splits, seed), time.monotonic()
    print(f"refit  guide {config.guide.family}, the model held fixed")
    records: list[RefitRecord] = []
    total, unit = work(config)
    with tqdm(total=total, disable=None, unit=unit, dynamic_ncols=True) as bar:

        def show(record: RefitRecord) -> None:
            records.append(record)
            shown = {"ELBO": record.validation_elbo, "log q(z*|x*)": record.simulated_log_q}
            bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})

        refitted = refit(vae, splits, config, seed, bar.update, show)
    after = max(records, key=lambda record: record.score).validation_elbo
    kept = only_if_better and not after > before
    print(
        f"       {time.monotonic() - started:.0f} s; validation ELBO {before:.2f} → {after:.2f} "
        f"nats per row" + ("; the trained guide stays" if kept else "")
    )
    if kept:
        return
    if not after > before:
        warnings.warn(
            f"the ELBO fell. {path}/checkpoints/best.pt keeps the trained guide: delete "
            f"refitted.pt to use it",
            stacklevel=2,
        )
    lines = [record.metrics() for record in records]
    model = refitted_config(checkpoint.config.model, config)
    content = serialize(
        refitted, checkpoint.config, splits, checkpoint.history, model=model, refit=lines
    )
    write_atomically(path / "refit.jsonl", "".join(to_json(x) + "\n" for x in lines).encode())
    write_atomically(path / "checkpoints" / "refitted.pt", content)


def _copy(run: Path, path: Path) -> None:
    """Take over what is not changed by a refit."""
    for name in COPIED:
        if (run / name).is_file():
            (path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run / name, path / name)
    (path / "figures").mkdir(exist_ok=True)


def also_function(command: str, home: str, name: str) -> None:
    """Make the module of a command callable as the public function of the same name.

    Once imported, the module is in the place of the function `pyro_vae.NAME`.

    Args:
        command: the module.
        home: the module of the function.
        name: the name of both.
    """

    class Command(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), name)(*args, **kwargs)

    sys.modules[command].__class__ = Command


also_function(__name__, "pyro_vae.training.refitting", "refit")

if __name__ == "__main__":
    sys.exit(main())
