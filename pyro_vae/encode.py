"""Encode data: write the mean and standard deviation of q(z|x) for each row, and draws from p(z|x).

The .npz holds `mean` and `standard_deviation` (N, Z) in the order of the data, `labels` (N,) and
`class_names` if the data have labels, and `split` (N,) if the data are the run's own.

--draws S adds `draws` (N, S, Z) from the posterior p(z|x), `method` (N,), the method that made
them, `pareto_k` (N,) of their importance weights, and `effective_draws` (N,), less than S where
draws repeat. --recalibrate adds `recalibrated_standard_deviation` (N, Z) and its `factors` (Z,).

  python -m pyro_vae.encode runs/digits --out codes.npz
  python -m pyro_vae.encode runs/photos --data more_photos/ --out codes.npz
  python -m pyro_vae.encode runs/digits --draws 100 --recalibrate --out codes.npz
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

if TYPE_CHECKING:
    import numpy as np

# Copies of the draws in memory, at most: their parts, whole, by row, in the file's buffer twice
COPIES = 5
# Rows of data whose missing values simulated rows lack
EXAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class EncodeArguments(RunArguments):
    """Arguments of `encode`.

    Attributes:
        out: File to write, ending in .npz.
        draws: Number of draws from the posterior p(z|x) of each row, by importance sampling from
            q(z|x) where that is reliable, else from a Gaussian refined for the row, else by NUTS.
        recalibrate: Also write standard deviations that are right on average over rows of the
            model.
        overwrite: Replace an existing file.
    """

    out: Path
    draws: Annotated[int | None, auto("INT", "none")] = None
    recalibrate: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("draws", self.draws)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(EncodeArguments, argv, "encode", __doc__)))


def _main(arguments: EncodeArguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite, (".npz",))
    import numpy as np

    from .files import write_atomically
    from .memory import check_memory
    from .models.vae import VAE

    run = open_run(arguments)
    if (arguments.draws or arguments.recalibrate) and not isinstance(run.vae, VAE):
        raise InputError(
            f"{arguments.run} is an autoencoder, whose codes have no distribution: leave out "
            f"--draws and --recalibrate"
        )
    splits, whole = run.splits, run.splits.whole()
    if arguments.draws:
        values = arguments.draws * len(whole) * run.checkpoint.config.model.latent_dim
        what = f"{arguments.draws:,} draws for each of {len(whole):,} rows"
        check_memory(COPIES * values, what, "lower --draws")
    arrays, lines = _moments(run)
    if arguments.recalibrate:
        lines.append(_recalibrate(run, arrays))
    if arguments.draws:
        lines.append(_draw(run, arguments.draws, arrays))
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
    print(f"{arguments.out}: " + "\n".join(lines))


def _moments(run: OpenRun) -> tuple[dict[str, np.ndarray], list[str]]:
    """Means and standard deviations of q(z|x), and the line that says so. Outliers are noted."""
    import torch

    from .models.flows import MOMENT_DRAWS, FlowDistribution
    from .models.networks import MAX_STANDARDIZED

    whole, likelihood = run.splits.whole(), run.vae.likelihood_module
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
    mean = torch.cat(means).numpy()
    line = f"posterior means and standard deviations of {len(whole)} rows, {mean.shape[1]} latents"
    if isinstance(posterior, FlowDistribution):
        line += f"; a flow has none in closed form, they are those of {MOMENT_DRAWS} even draws"
    return {"mean": mean, "standard_deviation": torch.cat(deviations).numpy()}, [line]


def _recalibrate(run: OpenRun, arrays: dict[str, np.ndarray]) -> str:
    """Add recalibrated standard deviations and their factors; a line with the coverage."""
    from .diagnostics.recalibration import recalibrate
    from .diagnostics.suite import random_rows
    from .randomness import derive, random_states

    units, like = run.vae.likelihood_module.units, None
    if run.splits.spec.missing:
        like = random_rows(run.splits.whole(), units, EXAMPLES, run.seed)
    with random_states(run.device, derive(run.seed, "recalibrate")):
        found = recalibrate(run.vae, like=like)  # type: ignore[arg-type]
    arrays["factors"] = found.factors
    wider = arrays["standard_deviation"] * found.factors
    arrays["recalibrated_standard_deviation"] = wider.astype(arrays["mean"].dtype)
    before, after = (
        f"{share.estimate:.3f} [{share.low:.3f}, {share.high:.3f}]"
        for share in (found.mean_before, found.mean_after)
    )
    return (
        f"recalibrated standard deviations: times {found.factors.min():.2f} to "
        f"{found.factors.max():.2f}. On simulated rows, central {found.level:.0%} intervals of "
        f"single latents hold the truth in a share of {before} before and {after} after"
    )


def _draw(run: OpenRun, num_draws: int, arrays: dict[str, np.ndarray]) -> str:
    """Add draws from p(z|x); a line with the number of rows of each method."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from .diagnostics.draws import METHODS, posterior_draws
    from .randomness import derive, random_states

    x = torch.cat(list(run.splits.whole().fixed(run.vae.likelihood_module.units, run.seed)))
    shown = ""
    with (
        tqdm(unit_scale=True, disable=None) as bar,
        random_states(run.device, derive(run.seed, "draws")),
    ):

        def show(method: str, done: int, total: int) -> None:
            nonlocal shown
            if method != shown:
                bar.reset(total)
                bar.set_description(method)
                shown = method
            bar.update(done)

        found = posterior_draws(run.vae, x, num_draws, on_progress=show)  # type: ignore[arg-type]
    arrays["draws"] = np.ascontiguousarray(found.draws.cpu().numpy().swapaxes(0, 1))
    arrays["method"] = found.method
    arrays["pareto_k"] = found.pareto_k.cpu().numpy()
    arrays["effective_draws"] = found.effective_draws.cpu().numpy()
    counts = {name: int((found.method == name).sum()) for name in METHODS}
    used = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{num_draws:,} draws from p(z|x) for each row; rows by method: {used}"


if __name__ == "__main__":
    sys.exit(main())
