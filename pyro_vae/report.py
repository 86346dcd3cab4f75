"""Write a run, or several side by side, as one HTML page that opens anywhere.

The page holds the summary, the verdicts of `diagnose` where they have been made, a latent explorer
that shows what the decoder makes of the point under the pointer, the codes, pictures, curves and
settings. It needs no network and no server. Training writes one too.

  python -m pyro_vae.report runs/digits
  python -m pyro_vae.report runs/digits runs/digits-2 --out comparison.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .command import load_run_data, parse, refuse_existing, run_command
from .config import Config, InputError, auto

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .data import Splits
    from .gallery import Codes


@dataclass(frozen=True)
class ReportArguments:
    """What to report.

    Attributes:
        runs: Run folder, or several to compare.
        out: File to write, ending in .html.
        overwrite: Replace the file; a run's own report.html is always replaced.
        data_root: Folder of torchvision's data sets.
    """

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
    ]
    out: Annotated[
        Path | None, auto("FILE", "RUN/report.html; comparison.html of several runs")
    ] = None
    overwrite: bool = False
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(ReportArguments, argv, "report", __doc__)))


def _main(arguments: ReportArguments) -> None:
    runs = arguments.runs
    if not runs:
        raise InputError("expected at least one run folder, as in: report runs/digits")
    for run in runs:
        if not run.is_dir():
            raise InputError(f"expected a run folder, as python -m pyro_vae.train makes; got {run}")
    own = runs[0] / "report.html" if len(runs) == 1 else None
    out = arguments.out or own or Path("comparison.html")
    if own is None or out.resolve() != own.resolve():
        refuse_existing(out, arguments.overwrite, (".html",))

    from tqdm import tqdm

    from .checkpoint import load_checkpoint
    from .gallery import latent_codes
    from .overview import overview

    views = []
    with tqdm(total=len(runs), disable=None, unit="run") as bar:
        for run in runs:
            checkpoint = load_checkpoint(run)
            if not checkpoint.history:
                raise InputError(
                    f"{run} was stopped within its first epoch, there is nothing to report yet; "
                    f"continue it by python -m pyro_vae.train --resume {run}"
                )
            splits = load_run_data(checkpoint, None, arguments.data_root)
            codes = latent_codes(checkpoint.vae, splits, checkpoint.config.seed)
            views.append(overview(run, checkpoint, splits, codes, len(runs)))
            bar.update()
    _write(out, views)
    print(out)


def write_report(run: Path, checkpoint: Checkpoint, splits: Splits, codes: Codes) -> Path:
    """Write RUN/report.html; returns the file.

    Args:
        run: the run's folder.
        checkpoint: its best.
        splits: the data it was trained on.
        codes: `gallery.latent_codes` of both.
    """
    from .overview import overview

    _write(run / "report.html", [overview(run, checkpoint, splits, codes, 1)])
    return run / "report.html"


def _write(out: Path, views: Sequence[dict[str, Any]]) -> None:
    """The overviews of the runs → one page."""
    from . import figures
    from .checkpoint import write_atomically
    from .page import render

    several = len(views) > 1
    names = _distinct([view["path"] for view in views])
    for view, name in zip(views, names, strict=True):
        view["name"] = name
    if several:
        curves = figures.compare_curves({view["name"]: view["history"] for view in views})
        svg, best = figures.svg(curves), ", ".join(names)
        alt = f"ELBO, reconstruction and KL on validation data over epochs, of {best}"
    else:
        svg, alt = views[0]["curves"], views[0]["curves_alt"]
    checks = dict.fromkeys(check for view in views for check in view["trust"]["by_check"])
    numbers = dict.fromkeys(label for view in views for label in view["numbers"])
    rows = {view["row"] for view in views}
    which = "validation" if several else "training and validation"
    row = rows.pop() if len(rows) == 1 else "row"
    page = render(
        {
            "title": " · ".join(names),
            "several": several,
            "runs": views,
            "numbers": list(numbers),
            "checks": list(checks),
            "warnings": _warnings(views),
            "settings": _settings(views),
            "curves": {"caption": f"By epoch, {which} {row}s", "svg": svg, "alt": alt},
            "row": row,
            "views": {str(k): view["interactive"] for k, view in enumerate(views)},
        }
    )
    write_atomically(out, page.encode(errors="replace"))  # a folder's name may be no UTF-8


def _distinct(paths: Sequence[Path]) -> list[str]:
    """Names of runs: the folder's, or as much of the path as tells them apart."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name} ({k})" for k, name in enumerate(names, 1)]
    return [name.encode(errors="replace").decode() for name in names]


def _settings(views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting; marked are those that differ, or that are not the default."""
    from .overview import flat

    default = flat(Config().to_dict())
    flags = {"source": "data", "root": "data-root", "kind": "model"}
    rows = []
    for name in views[0]["settings"]:
        values = [view["settings"][name] for view in views]
        if len(views) > 1:
            marked = len(set(values)) > 1
        else:  # the root is a path of the machine
            marked = views[0]["asked"][name] != default[name] and name != "root"
        if set(values) == {"None"}:  # an option of another model or objective
            continue
        flag = f"--{flags.get(name, name.replace('_', '-'))}"
        rows.append({"name": flag, "values": values, "marked": marked})
    return sorted(rows, key=lambda line: len(views) > 1 and not line["marked"])


def _warnings(views: Sequence[dict[str, Any]]) -> list[str]:
    """What stands in the way of comparing these runs."""
    found = []
    if len({view["fingerprint"] for view in views}) > 1:
        found.append("These runs are of different data: their numbers do not compare.")
    elif len({view["validation"] for view in views}) > 1:
        found.append(
            "These runs hold other rows of the data back for validation, which is a difference "
            "between their numbers too."
        )
    if len({view["settings"]["likelihood"] for view in views}) > 1:
        found.append("Their likelihoods differ: densities of one do not compare with the other's.")
    return found


if __name__ == "__main__":
    sys.exit(main())
