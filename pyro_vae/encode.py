"""Encode data: write the mean and standard deviation of q(z|x) for each row.

The .npz holds `mean` and `standard_deviation` (N, Z) in the order of the data, `labels` (N,) and
`class_names` if the data have labels, and `split` (N,) if the data are the run's own.

  python -m pyro_vae.encode runs/digits --out codes.npz
  python -m pyro_vae.encode runs/photos --data more_photos/ --out codes.npz
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli import RunArguments, open_run, parse, refuse_existing, run_command


@dataclass(frozen=True, kw_only=True)
class EncodeArguments(RunArguments):
    """Arguments of `encode`.

    Attributes:
        out: File to write, ending in .npz.
        overwrite: Replace an existing file.
    """

    out: Path
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(EncodeArguments, argv, "encode", __doc__)))


def _main(arguments: EncodeArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".npz",))
    import numpy as np
    import torch

    from .files import write_atomically
    from .models.networks import MAX_STANDARDIZED

    run = open_run(arguments)
    splits, whole = run.splits, run.splits.whole()
    likelihood = run.vae.likelihood_module
    means, deviations, far = [], [], []
    with torch.no_grad():
        for x in whole.fixed(likelihood.units, run.seed):
            far.append((likelihood.deviations(x).abs() > MAX_STANDARDIZED).flatten(1).any(1).cpu())
            posterior = run.vae.posterior(x)
            means.append(posterior.mean.cpu())
            deviations.append(posterior.variance.sqrt().cpu())
    outliers = torch.cat(far).nonzero().flatten()
    if len(outliers) and likelihood.units == "real":
        warnings.warn(
            f"{len(outliers)} of {len(whole)} rows hold values further from the mean of the "
            f"training data than {MAX_STANDARDIZED:,.0f} standard deviations, the first row "
            f"{whole.rows[outliers[0]]} (counted from 0): their codes are those of values near "
            f"that limit",
            stacklevel=2,
        )
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
