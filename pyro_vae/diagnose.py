"""Check the posterior of a run: a table of errors, each with a verdict.

The guide q(z|x) is tested on held-out rows and on rows simulated from the model, whose true latents
are known. Each error has a 95% confidence interval. The verdict is sound if the error is shown to
be small, wrong if it is shown to be large, and doubtful otherwise. RUN/diagnostics.json holds all
numbers, RUN/figures/diagnose_*.png show them, and RUN/report.html is rewritten with the verdicts.

  python -m pyro_vae.diagnose runs/digits
  python -m pyro_vae.diagnose runs/digits --quick
  python -m pyro_vae.diagnose runs/digits --strict || echo "do not use this posterior"
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import OpenRun, RunArguments, open_run, parse, print_json, run_command
from .config import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from .diagnostics.suite import Effort, Study


MIN_ROWS = 5  # the search for holes cross-validates over 5 parts of them


@dataclass(frozen=True, kw_only=True)
class DiagnoseArguments(RunArguments):
    """Arguments of `diagnose`.

    Attributes:
        quick: Use fewer rows, draws and steps: faster, with wider intervals.
        strict: Exit with status 1 if a finding is wrong.
        json: Print the contents of diagnostics.json instead of the table.
    """

    quick: bool = False
    strict: bool = False
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(DiagnoseArguments, argv, "diagnose", __doc__)))


def _main(arguments: DiagnoseArguments) -> int:
    from tqdm import tqdm

    from .diagnostics.suite import FULL, QUICK, studies
    from .models.vae import VAE
    from .page.write import write_report
    from .plots.codes import latent_codes
    from .randomness import derive, random_states

    folder = arguments.run
    if not folder.is_dir():
        raise InputError(f"expected a run folder, where diagnostics.json will be; got {folder}")
    run = open_run(arguments)
    if not isinstance(run.vae, VAE):
        raise InputError(f"{folder} is an autoencoder, which has no posterior to diagnose")
    effort = QUICK if arguments.quick else FULL
    held_out, training = _rows(run, effort)
    report = _report(run, len(held_out), arguments.quick, effort)
    (folder / "figures").mkdir(exist_ok=True)
    style = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=100, disable=None, bar_format=style)
    try:
        with bar, random_states(run.device, derive(run.seed, "diagnose")):
            for study in studies(run.vae, held_out, training, effort, bar.update):
                _record(study, report, folder)
                bar.set_postfix({"ELBO": f"{report['details']['elbo']:.2f}"})
            bar.update(100 - bar.n)
        report["complete"] = True
        _write(folder / "diagnostics.json", report)
        if arguments.data is None and run.checkpoint.history:
            codes = latent_codes(run.vae, run.splits, run.checkpoint.config.seed)
            write_report(folder, run.checkpoint, run.splits, codes)
    finally:
        if report["findings"] and not arguments.json:
            print(_table(report, folder))
    if arguments.json:
        print_json(report)
    return int(arguments.strict and any(f["verdict"] == "wrong" for f in report["findings"]))


def _rows(run: OpenRun, effort: Effort) -> tuple[Tensor, Tensor]:
    """Random held-out and training rows, as x."""
    from .diagnostics.suite import random_rows

    splits, units = run.splits, run.vae.likelihood_module.units
    # Other data have no training rows: the aggregate posterior is then that of the test rows.
    known = splits.train if len(splits.train) else splits.test
    for kind, split in (("held-out", splits.test), ("training", known)):
        if len(split) < MIN_ROWS:
            raise InputError(
                f"expected at least {MIN_ROWS} {kind} rows; {splits.name} has {len(split)}: give "
                f"more rows by --data"
            )
    held_out = random_rows(splits.test, units, effort.held_out, run.seed)
    return held_out, random_rows(known, units, effort.aggregate, run.seed)


def _report(run: OpenRun, num_rows: int, quick: bool, effort: Effort) -> dict[str, Any]:
    """The contents of diagnostics.json before the first study."""
    checkpoint, splits = run.checkpoint, run.splits
    binarized = splits.spec.binarizes(checkpoint.vae.likelihood_module.units)
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.history[-1]["step"] if checkpoint.history else 0,
        "fingerprint": splits.fingerprint,
        "data": splits.name,
        "held_out": num_rows,
        "likelihood": checkpoint.config.model.likelihood,
        "binarization": f"fixed, seed {run.seed}" if binarized else "none",
        "seed": run.seed,
        "effort": {"quick": quick, **dataclasses.asdict(effort)},
        "complete": False,
        "findings": [],
        "details": {},
    }


def _record(study: Study, report: dict[str, Any], folder: Path) -> None:
    """Add a study to the report and write both, so that an interruption loses no finished study."""
    from .plots.run import save_all

    report["findings"] += [finding.as_dict() for finding in study.findings]
    report["details"].update(study.details)
    pictures = {f"diagnose_{name}": figure for name, figure in study.figures.items()}
    save_all(pictures, folder / "figures")
    _write(folder / "diagnostics.json", report)


def _write(path: Path, report: dict[str, Any]) -> None:
    from .files import to_json, write_atomically

    write_atomically(path, (to_json(report, indent=2) + "\n").encode())


def _table(report: dict[str, Any], run: Path) -> str:
    """Findings with their numbers; meaning and advice of those that are not sound."""
    from .diagnostics.findings import number

    details = report["details"]
    lines = [
        report["checkpoint"],
        f"{report['held_out']:,} held-out rows of {report['data']}, and rows simulated from the "
        f"model; likelihood {report['likelihood']}; 95% intervals",
        f"ELBO {details['elbo']:.2f}, log p(x) {details['log_evidence']:.2f} nats per row "
        f"({details['importance_samples']:,} importance samples)",
        "",
    ]
    for finding in report["findings"]:
        estimate, low, high = (number(finding[key]) for key in ("estimate", "low", "high"))
        numbers = f"{estimate} [{low}, {high}]"
        lines.append(f"{finding['verdict']:<9} {finding['check']:<21} {numbers}")
        lines.append(f"{'':10}{finding['effect']}; ideal {finding['ideal']:g}")
        if finding["verdict"] != "sound":
            for text in (finding["meaning"], f"→ {finding['advice']}"):
                lines += textwrap.wrap(
                    text, 100, initial_indent=" " * 10, subsequent_indent=" " * 12
                )
    verdicts = [finding["verdict"] for finding in report["findings"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("sound", "doubtful", "wrong"))
    lines += ["", f"{counts}; numbers in {run / 'diagnostics.json'}, figures in {run / 'figures'}"]
    if not report["complete"]:
        lines.append("interrupted: the remaining studies were not run")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
