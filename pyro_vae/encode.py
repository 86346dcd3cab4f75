"""Encode data: mean and standard deviation of q(z|x) for every row.

The .npz holds mean (N, Z) and standard_deviation (N, Z) in the order of the data; labels (N,) and
class_names where there are any; and split (N,) for the run's own data.

  python -m pyro_vae.encode runs/digits --out codes.npz
  python -m pyro_vae.encode runs/photos --data more_photos/ --out codes.npz
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .command import choose_device, load_run_data, parse, refuse_existing, run_command
from .config import auto, check_seed


@dataclass(frozen=True)
class EncodeArguments:
    """What to encode.

    Attributes:
        run: Run folder, or a checkpoint file.
        out: File to write, ending in .npz.
        data: Data to encode, a name or a path.
        data_root: Folder of torchvision's data sets.
        seed: Seed of the binarization of grey images, where the likelihood is bernoulli.
        overwrite: Replace the file.
        device: Where to compute: cpu, cuda, cuda:1, or auto (cuda where there is one).
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    overwrite: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        check_seed(self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(EncodeArguments, argv, "encode", __doc__)))


def _main(arguments: EncodeArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".npz",))
    import numpy as np
    import torch

    from .checkpoint import load_checkpoint, write_atomically

    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.run)
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root).to(device)
    vae = checkpoint.vae.to(device)
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    whole = splits.whole()
    means, deviations = [], []
    with torch.no_grad():
        for x in whole.fixed(vae.likelihood_module.units, seed):
            posterior = vae.posterior(x)
            means.append(posterior.mean.cpu())
            deviations.append(posterior.variance.sqrt().cpu())
    arrays = {
        "mean": torch.cat(means).numpy(),
        "standard_deviation": torch.cat(deviations).numpy(),
    }
    if len(splits.train):  # the run's own data
        arrays["split"] = np.empty(len(whole), dtype="U10")
        for name in ("train", "validation", "test"):
            arrays["split"][getattr(splits, name).rows.numpy()] = name
    if whole.labels is not None:
        arrays["labels"] = whole.labels.numpy()
        arrays["class_names"] = np.array(splits.class_names)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(arguments.out, buffer.getvalue())
    print(
        f"{arguments.out}: posterior means and standard deviations of {len(whole)} rows, "
        f"{arrays['mean'].shape[1]} latents"
    )


if __name__ == "__main__":
    sys.exit(main())
