"""Generate data from a trained VAE: draw z from the prior and decode it.

x is the mean of p(x|z) or, with --draw, a draw from p(x|z).

A model with labels draws x from p(x|z, y). Without --label, y has the shares of the classes in the
training data, and an .npz also holds `labels` and `class_names`; a .png has a row for each class,
at the same z in each column.

  python -m pyro_vae.generate runs/digits --num 64 --out samples.png
  python -m pyro_vae.generate runs/digits --num 10000 --draw --out samples.npz
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .cli import choose_device, parse, refuse_existing, run_command
from .config import InputError, auto
from .config.options import check_integer

if TYPE_CHECKING:
    from .models.labels import ConditionalVAE


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `generate`.

    Attributes:
        run: Run folder or checkpoint file.
        out: File to write: .png for a grid; .npy for x, on the scale of the training data (0 to 255
            for 8-bit images); .npz for x and its latents z; .csv for a table like the data, with
            names, categories and counts. Means of categories and counts are rounded.
        num: Number of rows.
        label: Name of a class or, unless names are numbers, its number, for a model with labels.
        draw: Draw x from p(x|z) instead of taking its mean.
        seed: Seed of the draws.
        overwrite: Replace an existing file.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path
    num: int = 64
    label: Annotated[str | None, auto("NAME|INT", "as in the training data")] = None
    draw: bool = False
    seed: int = 0
    overwrite: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        check_integer("num", self.num)
        if self.num > 2500 and self.out.suffix.lower() == ".png":
            raise InputError(f"--num expects at most 2500 for a .png grid; got {self.num}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(GenerateArguments, argv, "generate", __doc__)))


def _main(arguments: GenerateArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".png", ".npy", ".npz", ".csv"))
    import numpy as np

    from .data.export import table_text
    from .models.autoencoder import Autoencoder
    from .models.labels import ConditionalVAE
    from .plots.from_model import generate_images, to_display
    from .plots.run import save
    from .plots.tiles import image_grid, in_rows
    from .runtime.files import write_atomically
    from .runtime.memory import check_memory
    from .runtime.randomness import random_states
    from .training.checkpoint import load_checkpoint

    device = choose_device(arguments.device)
    vae = load_checkpoint(arguments.run).vae.to(device)
    if isinstance(vae, Autoencoder):
        raise InputError(
            f"{arguments.run} is a deterministic autoencoder, which has no prior to draw from; "
            f"train with --model vae"
        )
    likelihood, ending = vae.likelihood_module, arguments.out.suffix.lower()
    if ending == ".csv" and not likelihood.spec.is_table:
        raise InputError(f"--out .csv expects a run on a table; that of {arguments.run} is none")
    row = vae.prior().event_shape.numel() + math.prod(likelihood.spec.shape)
    check_memory(arguments.num * row, f"{arguments.num:,} rows", "lower --num")
    labels = None
    if arguments.label is not None:
        if not isinstance(vae, ConditionalVAE):
            known = f"{arguments.run} was trained with --condition none"
            raise InputError(f"--label expects a model with labels; {known}")
        vae = vae.given(arguments.label)
    with random_states(device, arguments.seed):
        if isinstance(vae, ConditionalVAE) and ending == ".png":
            _draw_classes(vae, arguments)
            return
        if isinstance(vae, ConditionalVAE):
            labels = vae.label_prior().sample((arguments.num,))
        x, z = generate_images(vae, arguments.num, arguments.draw, labels)
    if ending == ".png":
        save(image_grid(in_rows(to_display(vae, x))), arguments.out)
    else:
        values = likelihood.spec.from_units(x, likelihood.units).cpu().numpy()
        buffer = io.BytesIO()
        if ending == ".csv":
            buffer.write(table_text(likelihood.spec, values).encode())
        elif ending == ".npy":
            np.save(buffer, values)
        else:
            arrays = {"x": values, "z": z.cpu().numpy()}
            if labels is not None:
                names = np.array(likelihood.spec.classes)
                arrays |= {"labels": labels.cpu().numpy(), "class_names": names}
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(arguments.out, buffer.getvalue())
    kind = "draws from" if arguments.draw else "means of"
    at = "" if arguments.label is None else f" at label {arguments.label}"
    at = at if labels is None else ", y as in the training data"
    print(f"{arguments.out}: {arguments.num} {kind} p(x|z{', y' * bool(at)}){at}, z from the prior")


def _draw_classes(vae: ConditionalVAE, arguments: GenerateArguments) -> None:
    """Write a grid with a row for each class."""
    from .plots.from_model import class_samples
    from .plots.run import save, short
    from .plots.tiles import image_grid

    columns = max(1, arguments.num // vae.num_classes)
    grid = class_samples(vae, columns, vae.num_classes, arguments.draw)
    names = [short(name, 12) for name in vae.class_names]
    save(image_grid(grid, row_labels=names), arguments.out)
    print(
        f"{arguments.out}: {'draws from' if arguments.draw else 'means of'} p(x|z, y), a class in "
        f"each of {vae.num_classes} rows, a z from the prior in each of {columns} columns"
    )


if __name__ == "__main__":
    sys.exit(main())
