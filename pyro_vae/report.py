"""Write one HTML page of a run, or of several side by side.

The page shows a summary, the findings of `diagnose` if there are any, a latent explorer with the
decoder's output at the pointer, the latent codes, pictures, curves and settings. It needs no
network and no server. Training also writes this page. Of several runs, ELBO, reconstruction and KL
are compared on their test rows; `compare --out` adds log p(x).

  python -m pyro_vae.report runs/digits
  python -m pyro_vae.report runs/digits runs/digits-2 --out comparison.html
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .cli import load_run_data, parse, refuse_existing, run_command
from .config import InputError, auto

if TYPE_CHECKING:
    from .training.checkpoint import Checkpoint


@dataclass(frozen=True)
class ReportArguments:
    """Arguments of `report`.

    Attributes:
        runs: One run folder, or several to compare.
        out: File to write, ending in .html.
        overwrite: Replace an existing file; a run's own report.html is always replaced.
        data: Name or path of the data, if they have moved since the training.
        data_root: Folder of torchvision's data sets.
    """

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
    ]
    out: Annotated[
        Path | None, auto("FILE", "RUN/report.html; comparison.html for several runs")
    ] = None
    overwrite: bool = False
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(ReportArguments, argv, "report", __doc__)))


def _main(arguments: ReportArguments) -> None:
    runs = arguments.runs
    if not runs:
        raise InputError("expected at least one run folder, as in: report runs/digits")
    for run in runs:
        if not run.is_dir():
            raise InputError(f"expected a run folder, made by python -m pyro_vae.train; got {run}")
    own = runs[0] / "report.html" if len(runs) == 1 else None
    out = arguments.out or own or Path("comparison.html")
    if own is None or out.resolve() != own.resolve():
        refuse_existing(out, arguments.overwrite, (".html",))

    from tqdm import tqdm

    from .page.comparison import quick_view
    from .page.summary import overview
    from .page.write import distinct_names, write_page
    from .plots.codes import latent_codes
    from .training.checkpoint import load_checkpoint

    views, opened = [], []
    with tqdm(total=len(runs), disable=None, unit="run") as bar:
        for run in runs:
            checkpoint = load_checkpoint(run)
            if not checkpoint.history:
                raise InputError(
                    f"{run} was stopped in its first epoch and has nothing to report yet; "
                    f"continue it by python -m pyro_vae.train --resume {run}"
                )
            splits = load_run_data(_moved(checkpoint, arguments.data), None, arguments.data_root)
            codes = latent_codes(checkpoint.vae, splits, checkpoint.config.seed)
            views.append(overview(run, checkpoint, splits, codes, len(runs)))
            opened.append((checkpoint, splits.test))
            bar.update()
    named = [(name, *one) for name, one in zip(distinct_names(runs), opened, strict=True)]
    write_page(out, views, quick_view(named) if len(runs) > 1 else None)
    print(out)


def _moved(checkpoint: Checkpoint, source: str | None) -> Checkpoint:
    """The checkpoint with its data in another place."""
    from .training.run import check_source

    config = checkpoint.config
    if source is not None:
        data = dataclasses.replace(config.data, source=source).absolute()
        config = dataclasses.replace(config, data=data)
    check_source(config.data)
    return dataclasses.replace(checkpoint, config=config)


if __name__ == "__main__":
    sys.exit(main())
