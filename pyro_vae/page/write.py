"""Runs → one HTML page, alone or side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..data.splits import Splits
from ..plots import run as figures
from ..plots.codes import Codes, latent_codes
from ..plots.from_model import draw_run
from ..runtime.files import printable, write_atomically
from ..training.checkpoint import Checkpoint, load_checkpoint
from .comparison import ComparisonView
from .render import render
from .summary import Overview, Picture, flag, flat, overview


def write_report(run: Path, checkpoint: Checkpoint, splits: Splits, codes: Codes) -> Path:
    """Write RUN/report.html; returns the file. The arguments are those of `overview`."""
    out = run / "report.html"
    write_page(out, [overview(run, checkpoint, splits, codes, 1)])
    return out


def redraw(run: Path, splits: Splits, device: torch.device) -> Path:
    """Draw the figures of a run's final model and write its page; returns the page."""
    checkpoint = load_checkpoint(run)
    history, seed = load_checkpoint(run, "last").history, checkpoint.config.seed
    codes = latent_codes(checkpoint.vae.to(device), splits, seed)
    draw_run(checkpoint.vae, splits, history, run / "figures", seed, codes)
    return write_report(run, checkpoint, splits, codes)


def write_page(
    out: Path, runs: Sequence[Overview], comparison: ComparisonView | None = None
) -> None:
    """Write the page of one run, or of several side by side, with their comparison."""
    several = len(runs) > 1
    names = distinct_names([run.path for run in runs])
    runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    row = runs[0].row if len({run.row for run in runs}) == 1 else "row"
    page = render(
        {
            "title": " · ".join(names),
            "several": several,
            "runs": runs,
            "numbers": list(dict.fromkeys(label for run in runs for label in run.numbers)),
            "checks": list(dict.fromkeys(check for run in runs for check in run.trust.by_check)),
            "warnings": _warnings(runs),
            "settings": _settings(runs),
            "curves": _curves(runs, row) if several else runs[0].curves,
            "paired": comparison,
            "row": row,
            "views": {str(k): run.interactive for k, run in enumerate(runs)},
        }
    )
    write_atomically(out, page.encode(errors="replace"))  # a folder's name may not be UTF-8


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names of runs: the folder's, or the whole path if two folders have the same name."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name} ({k})" for k, name in enumerate(names, 1)]
    return [printable(name) for name in names]


def _curves(runs: Sequence[Overview], row: str) -> Picture:
    curves = figures.compare_curves({run.name: run.history for run in runs}, row)
    names = ", ".join(run.name for run in runs)
    alt = f"ELBO, reconstruction and KL on validation data over epochs, of {names}"
    return Picture(f"By epoch, validation {row}s", figures.svg(curves), alt=alt)


def _settings(runs: Sequence[Overview]) -> list[dict[str, Any]]:
    """A row for each setting, marked if runs differ in it, or a single run changes the default."""
    default = flat(Config().to_dict())
    rows = []
    for name in runs[0].settings:
        values = [run.settings[name] for run in runs]
        if set(values) == {"None"}:  # an option of another model or objective
            continue
        if len(runs) > 1:
            marked = len(set(values)) > 1
        else:  # the root is a path of the machine
            marked = runs[0].asked[name] != default[name] and name != "root"
        rows.append({"name": flag(name), "values": values, "marked": marked})
    return sorted(rows, key=lambda line: len(runs) > 1 and not line["marked"])


def _warnings(runs: Sequence[Overview]) -> list[str]:
    """Reasons why the numbers of these runs are not comparable."""
    found = []
    if len({run.fingerprint for run in runs}) > 1:
        found.append("These runs use different data: their numbers are not comparable.")
    elif len({run.validation for run in runs}) > 1:
        found.append(
            "These runs use different rows for validation, which adds to the differences between "
            "their numbers."
        )
    if len({run.settings["likelihood"] for run in runs}) > 1:
        found.append("Their likelihoods differ: densities under them are not comparable.")
    return found
