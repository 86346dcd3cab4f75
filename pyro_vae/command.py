"""What the commands share: flags from dataclasses, errors without tracebacks, devices, data.

This module and the commands import torch only once they have work to do, so that `--help` and a
mistyped flag are answered at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import tyro

from .config import Config, DataConfig, InputError, auto, check_seed

if TYPE_CHECKING:
    import torch

    from .autoencoder import Autoencoder
    from .checkpoint import Checkpoint
    from .data import Splits
    from .vae import VAE

__all__ = [
    "OpenRun",
    "RunArguments",
    "choose_device",
    "config_of",
    "fail",
    "load_run_data",
    "open_run",
    "parse",
    "print_json",
    "refuse_existing",
    "run_command",
]

Arguments = TypeVar("Arguments")


def parse(
    arguments: type[Arguments],
    argv: Sequence[str] | None,
    prog: str,
    doc: str | None,
    default: Any = None,
) -> Arguments:
    """Flags → a dataclass; a mistyped flag or a value out of range exits with status 2."""
    options = {} if default is None else {"default": default}
    return tyro.cli(
        arguments,
        args=argv,
        prog=f"python -m pyro_vae.{prog}",
        description=doc,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        **options,
    )


def run_command(work: Callable[[], int | None]) -> int:
    """Do the work of a command: a user's mistake becomes one line on stderr and status 2."""
    logging.getLogger("pyro.infer").setLevel(logging.WARNING)  # below that Pyro tells its guesses
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            return work() or 0
    except InputError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as in `--help | head`
        sys.stderr.close()
        return 141
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return fail(f"{error.strerror or error}{place}")
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        words = ("memory", "alloc", "overflow", "too large", "invalid dimension")
        if isinstance(error, RuntimeError) and not any(word in reason for word in words):
            raise
        return fail(f"not enough memory for these sizes, lower them ({reason or 'out of memory'})")
    except KeyboardInterrupt:
        return fail("interrupted", status=130)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """This package's own warnings are for the user, and need no line of source."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    if Path(filename).parent == Path(__file__).parent:
        text = f"note: {message}\n"
    print(text, end="", file=file or sys.stderr)


def fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto is cuda where there is one, its own for each local process.

    Raises:
        InputError: no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"several processes have a GPU each: give --device cuda, not {name}")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise InputError(
            f"--device expects auto or one of {here} on this machine; got {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from None
    return device


def load_run_data(checkpoint: Checkpoint, source: str | None, root: Path | None) -> Splits:
    """The data of a run, or others of the same kind.

    Args:
        checkpoint: of the run.
        source: `--data` in place of the run's own. All its rows are test rows, unless they are the
            very data of the run, which keep their splits.
        root: `--data-root` in place of the run's own.

    Raises:
        InputError: the data are missing, have changed since the training, or do not suit the model.
    """
    from .data import load_data, load_foreign

    config: DataConfig = checkpoint.config.data
    likelihood = checkpoint.vae.likelihood_module
    if root is not None:
        config = dataclasses.replace(config, root=root)
    if source is not None:
        config = dataclasses.replace(config, source=source)
        foreign = load_foreign(config, likelihood.spec, likelihood.units)
        if foreign.fingerprint != checkpoint.fingerprint:
            return foreign
    splits = load_data(config, checkpoint.config.seed)
    if splits.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"the data {config.source} are not those that {checkpoint.path} was trained on: their "
            f"splits would mix training and test rows. Restore them, or name other data by --data"
        )
    return splits


@dataclass(frozen=True)
class RunArguments:
    """A run and the conditions for using it.

    Attributes:
        run: Run folder, or a checkpoint file.
        data: Other data in place of the run's own, a name or a path; all its rows are test rows.
        data_root: Folder of torchvision's data sets.
        seed: Seed of all draws, and of the binarization where the likelihood is bernoulli.
        device: Where to compute: cpu, cuda, cuda:1, or auto (cuda where there is one).
    """

    run: Annotated[Path, tyro.conf.Positional]
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True)
class OpenRun:
    """A run's checkpoint, its model and its data on one device, and the seed to draw by."""

    checkpoint: Checkpoint
    vae: VAE | Autoencoder
    splits: Splits
    device: torch.device
    seed: int


def open_run(arguments: RunArguments) -> OpenRun:
    """Load a run.

    Raises:
        InputError: the device, the checkpoint or the data cannot be used.
    """
    from .checkpoint import load_checkpoint

    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.run)
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root).to(device)
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    return OpenRun(checkpoint, checkpoint.vae.to(device), splits, device, seed)


def refuse_existing(out: Path, overwrite: bool, endings: Sequence[str]) -> None:
    """Check that the file `out` can be written, before any work is done.

    Raises:
        InputError: another ending, an existing file without `overwrite`, or no such folder.
    """
    if out.suffix.lower() not in endings:
        raise InputError(f"--out expects a file ending in {' or '.join(endings)}; got {out}")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; give another --out, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out expects an existing folder; {out.absolute().parent} is none")


def print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2))


def config_of(arguments: Config) -> Config:
    """The `Config` within a command's arguments that extend it."""
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(arguments, name) for name in names})
