"""Impute missing values: their means and draws given the observed values of the same row.

The run must have been trained with --missing model. Observed values are written as they are, in the
order of the data, and missing ones are found by importance sampling from q(z|x_observed). A model
with labels is used at the label of each row or, if it infers labels, at the most probable one.

  .npz   mean and missing (N, *shape), draws (N, S, *shape), pareto_k (N,)
  .npy   the data, completed by the means
  .csv   the same for a table, with names, text and units of its columns, and its labels in label

The means of integers are rounded in .npy and .csv. In the place of a mean, a category has the most
probable one, in .npy and .npz its code. A row's Pareto k above 0.7 says that its means
and draws cannot be relied on; refit the guide, or raise --num-samples.

  python -m pyro_vae.impute runs/patients --out completed.csv
  python -m pyro_vae.impute runs/patients --data more.csv --draws 20 --out draws.npz
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .cli import OpenRun, RunArguments, open_run, parse, refuse_existing, run_command
from .config import InputError, auto
from .config.options import check_integer
from .refit import also_function

if TYPE_CHECKING:
    import numpy as np

    from .evidence.imputation import Imputation

DRAWS = 100
# Copies of the draws in memory, at most: in two orders, and in the file's buffer twice
COPIES = 4


@dataclass(frozen=True, kw_only=True)
class ImputeArguments(RunArguments):
    """Arguments of `impute`.

    Attributes:
        out: File to write, ending in .npz, .npy or .csv.
        draws: Number of draws for each row, in a .npz.
        num_samples: Number of importance samples of z per row (K).
        overwrite: Replace an existing file.
    """

    out: Path
    draws: Annotated[int | None, auto("INT", str(DRAWS))] = None
    num_samples: int = 5000
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("draws", self.draws)
        check_integer("num-samples", self.num_samples, 25)
        if self.draws is not None and self.out.suffix.lower() != ".npz":
            raise InputError(f"--draws are written to a .npz only; --out is {self.out}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(ImputeArguments, argv, "impute", __doc__)))


def _main(arguments: ImputeArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".npz", ".npy", ".csv"))
    import numpy as np

    from .data.export import rounded
    from .evidence.importance import reliable_k
    from .runtime.files import write_atomically

    run, ending = _open(arguments), arguments.out.suffix.lower()
    whole = run.splits.whole()
    num_draws = (arguments.draws or DRAWS) if ending == ".npz" else 0
    found = _impute(run, num_draws, arguments.num_samples)
    stored = whole.values[whole.rows.to(whole.values.device)].cpu().numpy()
    missing, k = np.isnan(stored), found.pareto_k.cpu().numpy()
    buffer = io.BytesIO()
    if ending == ".npz":
        mean, draws = _values(run, stored, found.mean), _values(run, stored, found.draws)
        arrays = {"mean": mean, "draws": draws.swapaxes(0, 1), "pareto_k": k, "missing": missing}
        np.savez(buffer, **arrays)
    else:
        completed = _values(run, stored, found.mean)
        completed = np.where(missing, rounded(run.splits.spec, completed), stored)
        if ending == ".npy":
            np.save(buffer, completed)
        else:
            buffer.write(_table(run, completed).encode())
    write_atomically(arguments.out, buffer.getvalue())
    rows, limit = missing.reshape(len(missing), -1).any(1), reliable_k(arguments.num_samples)
    print(
        f"{arguments.out}: {len(missing):,} rows of {run.splits.name}, {rows.sum():,} of them with "
        f"missing values ({missing.mean():.1%} of all), imputed by "
        f"{f'their means and {num_draws:,} draws' if num_draws else 'their means'}; Pareto k above "
        f"{limit:.2f} in {(k > limit).sum():,} rows"
    )


def _open(arguments: ImputeArguments) -> OpenRun:
    """Load a run whose model knows of missing values.

    Raises:
        InputError: it does not, or the data suit no .csv or exceed the memory.
    """
    import math

    from .models.autoencoder import Autoencoder
    from .runtime.memory import check_memory

    run = open_run(arguments)
    spec = run.splits.spec
    if isinstance(run.vae, Autoencoder):
        raise InputError(
            f"{arguments.run} is an autoencoder, whose codes have no distribution to draw from; "
            f"train with --model vae"
        )
    if not spec.missing:
        raise InputError(
            f"{arguments.run} was trained without missing values, of which its encoder knows "
            f"nothing: train with --missing model"
        )
    if arguments.out.suffix.lower() == ".csv" and not spec.is_table:
        raise InputError(f"--out expects .npz or .npy for {spec.row}s; got {arguments.out}")
    if arguments.out.suffix.lower() == ".npz":
        count, draws = len(run.splits.whole()), arguments.draws or DRAWS
        what = f"{draws:,} draws for each of {count:,} rows"
        check_memory(COPIES * draws * count * math.prod(spec.shape), what, "lower --draws")
    if not run.splits.missing:
        warnings.warn(
            f"no value of {run.splits.name} is missing: {arguments.out} holds it unchanged",
            stacklevel=2,
        )
    return run


def _impute(run: OpenRun, num_draws: int, num_samples: int) -> Imputation:
    """Impute all rows in the order of the data, with a progress bar."""
    import torch
    from tqdm import tqdm

    from .evidence.imputation import Imputation, impute
    from .models.labels import ConditionalVAE, labels_at, models_at
    from .runtime.randomness import derive, random_states

    units, vae = run.vae.likelihood_module.units, run.vae
    batches = list(run.splits.whole().fixed_with_labels(units, run.seed))
    x, given = torch.cat([x for x, _ in batches]), None
    if isinstance(vae, ConditionalVAE):
        given = torch.cat([labels_at(vae, *rows) for rows in batches])
    total = int(x.isnan().flatten(1).any(1).sum())
    with (
        tqdm(total=total, unit="row", disable=None) as bar,
        random_states(run.device, derive(run.seed, "impute")),
    ):
        mean, draws = x.clone(), x.expand(num_draws, *x.shape).clone()
        k = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
        for _, model, rows in models_at(vae, given):
            found = impute(model, x[rows], num_draws, num_samples, bar.update)
            mean[rows], draws[:, rows], k[rows] = found.mean, found.draws, found.pareto_k
        return Imputation(mean, draws, k)


def _values(run: OpenRun, stored: np.ndarray, x: object) -> np.ndarray:
    """Stored values (..., N, *shape) of imputed x, with the observed ones as they are."""
    import numpy as np
    import torch

    assert isinstance(x, torch.Tensor)
    spec, units = run.splits.spec, run.vae.likelihood_module.units
    values = spec.from_units(x, units).cpu().numpy().astype(stored.dtype)
    return np.where(np.isnan(stored), values, stored)


def _table(run: OpenRun, values: np.ndarray) -> str:
    """The text of a table with these values (N, D): names, cells, and a label for each row."""
    from .data.export import table_text

    labels = run.splits.whole().labels
    names = (*run.splits.class_names, "")  # −1 is a label that is not known
    named = None if labels is None else [names[i] for i in labels.tolist()]
    return table_text(run.splits.spec, values, named)


also_function(__name__, "pyro_vae.evidence.imputation", "impute")

if __name__ == "__main__":
    sys.exit(main())
