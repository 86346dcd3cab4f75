"""A run as a command uses it: its device, its model and its data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..config import DataConfig, InputError, auto
from ..config.options import check_integer

if TYPE_CHECKING:
    import torch

    from ..data.splits import Splits
    from ..models.labels import Model
    from ..training.checkpoint import Checkpoint


def choose_device(name: str) -> torch.device:
    """Return the device called `name`. auto is cuda if available. Each local process has its GPU.

    Raises:
        InputError: this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"each process needs its own GPU: give --device cuda, not {name}")
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


def load_run_data(
    checkpoint: Checkpoint, source: str | None, root: Path | None, max_value: int | None = None
) -> Splits:
    """Load the data of a run, or other data for its model.

    Args:
        checkpoint: the run's checkpoint.
        source: `--data`; None for the data of the run. All rows of other data are test rows.
        root: `--data-root`; None for that of the run.
        max_value: `--max-value` of other data.

    Raises:
        InputError: the data are missing, have changed since the training, or do not fit the model.
    """
    from ..data.loading import load_data, load_foreign

    config: DataConfig = checkpoint.config.data
    likelihood = checkpoint.vae.likelihood_module
    if root is not None:
        config = dataclasses.replace(config, root=root)
    if source is not None:
        config = dataclasses.replace(config, source=source)
        moments = (likelihood.mean, likelihood.std)
        foreign = load_foreign(config, likelihood.spec, likelihood.units, max_value, moments)
        if foreign.fingerprint != checkpoint.fingerprint:
            return foreign
    splits = load_data(config, checkpoint.config.seed, spec=likelihood.spec)
    if splits.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"the data {config.source} are not the data that {checkpoint.path} was trained on: "
            f"their splits would mix training and test rows. Restore the data, or give --data"
        )
    return splits


@dataclass(frozen=True)
class RunArguments:
    """A run and the conditions for using it.

    Attributes:
        run: Run folder or checkpoint file.
        data: Name or path of other data to use. All its rows are test rows.
        max_value: Largest value that the data in --data can take, for example 255 for 8-bit images.
            They are converted to the range of the run's data.
        data_root: Folder of torchvision's data sets.
        seed: Seed of all random draws, including the binarization for a bernoulli likelihood.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
    """

    run: Annotated[Path, tyro.conf.Positional]
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    max_value: Annotated[int | None, auto("INT", "as the kind of data defines it")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        check_integer("max-value", self.max_value)
        if self.max_value is not None and self.data is None:
            raise InputError("--max-value is the largest value of the data in --data; give --data")


@dataclass(frozen=True)
class OpenRun:
    """A run's checkpoint, its model and its data on one device, and the seed of the draws."""

    checkpoint: Checkpoint
    vae: Model
    splits: Splits
    device: torch.device
    seed: int


def open_run(arguments: RunArguments) -> OpenRun:
    """Load a run.

    Raises:
        InputError: the device, the checkpoint or the data cannot be used.
    """
    from ..training.checkpoint import load_checkpoint

    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.run)
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root, arguments.max_value).to(
        device
    )
    _check_labels(checkpoint, splits)
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    return OpenRun(checkpoint, checkpoint.vae.to(device), splits, device, seed)


def _check_labels(checkpoint: Checkpoint, splits: Splits) -> None:
    """Check that there are the labels that a conditional model needs.

    Raises:
        InputError: a row has none.
    """
    from ..models.labels import needs_labels

    if not needs_labels(checkpoint.vae):
        return
    labels = splits.whole().labels
    missing = len(splits.whole()) if labels is None else int((labels < 0).sum())
    if missing:
        raise InputError(
            f"the model expects the label of each row; {missing:,} of {len(splits.whole()):,} rows "
            f"of {splits.name} have none: add a column or an array of labels"
        )


def refuse_existing(out: Path, overwrite: bool, endings: Sequence[str]) -> None:
    """Check that the file `out` can be written, before any work is done.

    Raises:
        InputError: the ending is not one of `endings`, the file exists and `overwrite` is false, or
            its folder does not exist.
    """
    if out.suffix.lower() not in endings:
        raise InputError(f"--out expects a file ending in {' or '.join(endings)}; got {out}")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; give another --out, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out expects an existing folder; there is no {out.absolute().parent}")
