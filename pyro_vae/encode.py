"""Encode data: write the mean and standard deviation of q(z|x) for each row, and draws from p(z|x).

The .npz holds `mean` and `standard_deviation` (N, Z) in the order of the data, `labels` (N,) and
`class_names` if the data have labels, and `split` (N,) if the data are the run's own.

A conditional model encodes each row at its label, q(z|x, y). A semi-supervised one encodes it at
the label that is most probable by q(y|x), and adds `label_probabilities` (N, C). Labels that are
not known are -1.

--draws S adds `draws` (N, S, Z) from the posterior p(z|x), `method` (N,), the method that made
them, `pareto_k` (N,) of their importance weights, and `effective_draws` (N,), less than S where
draws repeat. --recalibrate adds `recalibrated_standard_deviation` (N, Z) and its `factors` (Z,);
of a model with labels, `factors` (C, Z) of each class in the data, else NaN.

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
from typing import TYPE_CHECKING, Annotated, Any

from .cli import OpenRun, RunArguments, open_run, parse, refuse_existing, run_command
from .config import InputError, auto
from .config.options import check_integer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

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

    from .models.autoencoder import Autoencoder
    from .runtime.files import write_atomically
    from .runtime.memory import check_memory

    run = open_run(arguments)
    if (arguments.draws or arguments.recalibrate) and isinstance(run.vae, Autoencoder):
        raise InputError(
            f"{arguments.run} is an autoencoder, whose codes have no distribution: leave out "
            f"--draws and --recalibrate"
        )
    splits, whole = run.splits, run.splits.whole()
    if arguments.draws:
        values = arguments.draws * len(whole) * run.checkpoint.config.model.latent_dim
        what = f"{arguments.draws:,} draws for each of {len(whole):,} rows"
        check_memory(COPIES * values, what, "lower --draws")
    arrays, lines, given = _moments(run)
    if arguments.recalibrate:
        lines.append(_recalibrate(run, arrays, given))
    if arguments.draws:
        lines.append(_draw(run, arguments.draws, arrays, given))
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


def _moments(run: OpenRun) -> tuple[dict[str, np.ndarray], list[str], Tensor | None]:
    """Means and standard deviations of q(z|x), the line that says so, and the labels (N,) used.

    Outliers are noted.
    """
    import torch

    from .models.flows import MOMENT_DRAWS, FlowDistribution
    from .models.labels import ConditionalVAE, SemiSupervisedVAE, labels_at
    from .models.networks import MAX_STANDARDIZED

    whole, likelihood = run.splits.whole(), run.vae.likelihood_module
    means, deviations, far, given, shares = [], [], [], [], []
    with torch.no_grad():
        for x, y in whole.fixed_with_labels(likelihood.units, run.seed):
            far.append((likelihood.deviations(x).abs() > MAX_STANDARDIZED).flatten(1).any(1).cpu())
            model: Any = run.vae
            if isinstance(run.vae, ConditionalVAE):
                given.append(labels_at(run.vae, x, y))
                model = run.vae.given(given[-1])
            posterior = model.posterior(x)
            if isinstance(run.vae, SemiSupervisedVAE):
                shares.append(run.vae.label_posterior(x).probs.cpu())
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
    arrays = {"mean": mean, "standard_deviation": torch.cat(deviations).numpy()}
    if shares:
        arrays["label_probabilities"] = torch.cat(shares).numpy()
    return arrays, [line], torch.cat(given) if given else None


def _recalibrate(run: OpenRun, arrays: dict[str, np.ndarray], given: Tensor | None) -> str:
    """Add recalibrated standard deviations and their factors; a line with the coverage."""
    import numpy as np

    from .diagnostics.recalibration import recalibrate
    from .diagnostics.suite import random_rows
    from .models.labels import models_at
    from .runtime.randomness import derive, random_states

    units, like = run.vae.likelihood_module.units, None
    if run.splits.spec.missing:
        like = random_rows(run.splits.whole(), units, EXAMPLES, run.seed)
    deviations = arrays["standard_deviation"]
    arrays["recalibrated_standard_deviation"] = np.empty_like(deviations)
    if given is not None:
        size = (len(run.splits.class_names), deviations.shape[1])
        arrays["factors"] = np.full(size, np.nan)
    results = []
    with random_states(run.device, derive(run.seed, "recalibrate")):
        for label, vae, rows in models_at(run.vae, given):
            found = recalibrate(vae, like=like)
            results.append(found)
            if label is None:
                arrays["factors"] = found.factors
            else:
                arrays["factors"][label] = found.factors
                rows = rows.cpu().numpy()
            arrays["recalibrated_standard_deviation"][rows] = deviations[rows] * found.factors
    factors = np.stack([found.factors for found in results])
    text = f"recalibrated standard deviations: times {factors.min():.2f} to {factors.max():.2f}"
    for (label, *_), found in zip(models_at(run.vae, given), results, strict=True):
        before, after = (
            f"{share.estimate:.3f} [{share.low:.3f}, {share.high:.3f}]"
            for share in (found.mean_before, found.mean_after)
        )
        where = "" if label is None else f" of label {run.splits.class_names[label]}"
        text += (
            f". On simulated rows{where}, central {found.level:.0%} intervals of single latents "
            f"hold the truth in a share of {before} before and {after} after"
        )
    return text


def _draw(run: OpenRun, num_draws: int, arrays: dict[str, np.ndarray], given: Tensor | None) -> str:
    """Add draws from p(z|x); a line with the number of rows of each method."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from .diagnostics.draws import METHODS, posterior_draws
    from .models.labels import models_at
    from .runtime.randomness import derive, random_states

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

        parts = []
        for _, vae, rows in models_at(run.vae, given):
            found = posterior_draws(vae, x[rows], num_draws, on_progress=show)
            parts.append(
                {
                    "draws": np.ascontiguousarray(found.draws.cpu().numpy().swapaxes(0, 1)),
                    "method": found.method,
                    "pareto_k": found.pareto_k.cpu().numpy(),
                    "effective_draws": found.effective_draws.cpu().numpy(),
                }
            )
    for name in parts[0]:
        arrays[name] = np.concatenate([part[name] for part in parts])
    if given is not None:  # the parts are sorted by label
        order = np.argsort(np.argsort(given.cpu().numpy(), kind="stable"))
        for name in parts[0]:
            arrays[name] = arrays[name][order]
    method = arrays["method"]
    counts = {name: int((method == name).sum()) for name in METHODS}
    used = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{num_draws:,} draws from p(z|x) for each row; rows by method: {used}"


if __name__ == "__main__":
    sys.exit(main())
