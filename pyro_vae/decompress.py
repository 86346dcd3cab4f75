"""Restore the rows in a file of `compress`, by the same model.

The rows are those that were compressed, to the last bit. If this machine computes other
probabilities than the one that compressed them, or the file is damaged, an error says so.

  python -m pyro_vae.decompress runs/digits/checkpoints/best.pt digits.bb --out digits.npy
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .cli import parse, refuse_existing, run_command
from .config import InputError


@dataclass(frozen=True)
class DecompressArguments:
    """Arguments of `decompress`.

    Attributes:
        run: Run folder or checkpoint file.
        file: File of `compress`.
        out: File to write, ending in .npy: the rows, unsigned integers.
        overwrite: Replace an existing file.
    """

    run: Annotated[Path, tyro.conf.Positional]
    file: Annotated[Path, tyro.conf.Positional]
    out: Path
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(DecompressArguments, argv, "decompress", __doc__)))


def _main(arguments: DecompressArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".npy",))
    import numpy as np
    from tqdm import tqdm

    from .evidence.codecs import digest_of, smallest, unpack
    from .evidence.compression import Coder
    from .models.vae import VAE
    from .runtime.files import write_atomically
    from .runtime.memory import check_memory
    from .training.checkpoint import load_checkpoint

    header, stack = unpack(arguments.file)
    vae = load_checkpoint(arguments.run).vae
    if not isinstance(vae, VAE):
        raise InputError(f"{arguments.run} is an autoencoder, which compresses nothing")
    coder = Coder(vae)
    if header.shape != coder.shape or header.model != coder.fingerprint():
        raise InputError(
            f"{arguments.file} was made by another model than {arguments.run}, or where the same "
            f"model computes other probabilities (another processor or version of torch)"
        )
    size = header.count * int(np.prod(header.shape))
    check_memory(4 * size, f"{header.count:,} rows", "the file may be damaged")
    with tqdm(total=header.count, unit="row", disable=None) as bar:
        x = coder.decode(stack, header.count, header.seed, bar.update)
    values = x.numpy().astype("int32")
    if digest_of(values) != header.digest:
        raise InputError(f"{arguments.file} is damaged: its rows are not those of its digest")
    buffer = io.BytesIO()
    np.save(buffer, smallest(values, coder.bound))
    write_atomically(arguments.out, buffer.getvalue())
    print(f"{arguments.out}: {header.count:,} rows of {'x'.join(map(str, header.shape))}")


if __name__ == "__main__":
    sys.exit(main())
