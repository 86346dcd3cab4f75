"""Compress discrete data by a model, losslessly: bits-back coding.

The file has −ELBO / log 2 bits a row, besides a few random bits at its beginning; reading it needs
the model (`decompress`). Of a run whose guide was refitted, give the checkpoint of the trained one,
since a refitted guide cannot code. The output compares it with gzip, PNG and WebP on the same rows.

  python -m pyro_vae.compress runs/digits/checkpoints/best.pt --out digits.bb
  python -m pyro_vae.compress runs/scans --data scans.npy --out scans.bb
  python -m pyro_vae.decompress runs/scans scans.bb --out scans.npy
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .cli import OpenRun, RunArguments, open_run, parse, refuse_existing, run_command
from .config import InputError, auto
from .config.options import check_integer

if TYPE_CHECKING:
    from torch import Tensor

    from .models.vae import VAE


@dataclass(frozen=True, kw_only=True)
class CompressArguments(RunArguments):
    """Arguments of `compress`.

    Attributes:
        out: File to write, ending in .bb.
        num_rows: Number of rows, from the beginning of the test split.
        binarize: Code the binarization of grey values by --seed; the grey values are lost.
        overwrite: Replace an existing file.
    """

    out: Path
    num_rows: Annotated[int | None, auto("INT", "all")] = None
    binarize: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num-rows", self.num_rows)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(CompressArguments, argv, "compress", __doc__)))


def _main(arguments: CompressArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".bb",))
    from tqdm import tqdm

    from .evidence.codecs import Packed, digest_of, pack, uncoded, usual_sizes
    from .evidence.compression import Coder
    from .models.vae import VAE
    from .runtime.files import write_atomically

    run = open_run(arguments)
    if not isinstance(run.vae, VAE):
        raise InputError(f"{arguments.run} is an autoencoder, whose codes have no distribution")
    coder = Coder(run.vae)
    x = _rows(run, arguments)
    with tqdm(total=len(x), unit="row", disable=None) as bar:
        stack, first = coder.encode(x, run.seed, bar.update)
    values = x.cpu().numpy().astype("int32")
    header = Packed(len(x), tuple(x.shape[1:]), run.seed, coder.fingerprint(), digest_of(values))
    content = pack(header, stack)
    write_atomically(arguments.out, content)
    spec = run.vae.likelihood_module.spec
    sizes = {
        "bits-back": 32 * (len(stack) - len(first)) / len(x),
        "-ELBO / log 2": -_elbo(run.vae, x, run.seed) / math.log(2),
        **usual_sizes(values, coder.bound),
        "without a code": uncoded(spec.shape, coder.bound),
    }
    print(
        f"{arguments.out}: {len(x):,} {spec.row}s in {len(content):,} bytes; bits per {spec.row}:"
    )
    for name, size in sizes.items():
        print(f"  {name:<16}{size:12.2f}")
    print(f"bits-back leaves out {32 * len(first):,} bits at the beginning of the file")


def _rows(run: OpenRun, arguments: CompressArguments) -> Tensor:
    """The rows to code, (N, *data_shape), in the likelihood's units."""
    import torch

    split, units = run.splits.test, run.vae.likelihood_module.units
    if split.spec.binarizes(units) and not arguments.binarize:
        raise InputError(
            f"the model knows binary values only, and {run.splits.name} holds grey ones: "
            f"--binarize codes a binarization of them, from which they cannot be restored"
        )
    if arguments.num_rows is not None and arguments.num_rows > len(split):
        raise InputError(f"--num-rows expects at most {len(split)}; got {arguments.num_rows}")
    return torch.cat(list(split.fixed(units, run.seed, arguments.num_rows)))


def _elbo(vae: VAE, x: Tensor, seed: int) -> float:
    """Mean ELBO of the rows, nats, with ten draws of z for each."""
    import torch

    from .runtime.randomness import derive, random_states

    with random_states(x.device, derive(seed, "posterior")):
        terms = [vae.elbo_terms(x) for _ in range(10)]
    means = [(reconstruction - kl).double().mean() for reconstruction, kl in terms]
    return float(torch.stack(means).mean())


if __name__ == "__main__":
    sys.exit(main())
