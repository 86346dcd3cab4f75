"""Can the posterior of a run be believed? One table, with a verdict a line.

Held-out rows, and data simulated from the model itself, whose true latents are known, put the guide
q(z|x) and the numbers made from it to the test. A line is sound where the error is shown to be
small, wrong where it is shown to be large, and doubtful otherwise; sizes come with 95% confidence
intervals. RUN/diagnostics.json holds all numbers, RUN/figures/diagnose_*.png show them, and
RUN/report.html is written anew with the verdicts in it.

  python -m pyro_vae.diagnose runs/digits
  python -m pyro_vae.diagnose runs/digits --quick
  python -m pyro_vae.diagnose runs/digits --strict || echo "do not use this posterior"
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .command import choose_device, load_run_data, parse, print_json, run_command
from .config import InputError, auto, check_seed

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Split, Units
    from .verdicts import Finding


@dataclass(frozen=True)
class DiagnoseArguments:
    """What to diagnose.

    Attributes:
        run: Run folder.
        quick: Fewer rows, draws and steps: under a minute on small data, wider intervals.
        strict: End with exit status 1 when a line is wrong.
        data: Other data in place of the run's own; all its rows count as held out.
        data_root: Folder of torchvision's data sets.
        seed: Seed of all draws.
        device: Where to compute: cpu, cuda, cuda:1, or auto (cuda where there is one).
        json: Print the contents of diagnostics.json instead of the table.
    """

    run: Annotated[Path, tyro.conf.Positional]
    quick: bool = False
    strict: bool = False
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    device: str = "auto"
    json: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(DiagnoseArguments, argv, "diagnose", __doc__)))


def _main(arguments: DiagnoseArguments) -> int:
    from tqdm import tqdm

    from .checkpoint import load_checkpoint
    from .figures import save
    from .gallery import latent_codes
    from .randomness import derive, random_states
    from .report import write_report
    from .studies import FULL, QUICK, studies
    from .vae import VAE

    run = arguments.run
    if not run.is_dir():
        raise InputError(f"expected a run folder, where diagnostics.json will be; got {run}")
    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(run)
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root).to(device)
    vae = checkpoint.vae.to(device)
    if not isinstance(vae, VAE):
        raise InputError(f"{run} is an autoencoder, which has no posterior to diagnose")
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    effort = QUICK if arguments.quick else FULL
    units = vae.likelihood_module.units
    if len(splits.test) < 4:
        raise InputError(f"expected at least 4 held-out rows; {splits.name} has {len(splits.test)}")
    held_out = _some_rows(splits.test, units, effort.held_out, seed)
    # Other data have no training rows: the aggregate posterior is then that of what there is.
    known = splits.train if len(splits.train) else splits.test
    training = _some_rows(known, units, effort.aggregate, seed)
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.history[-1]["step"] if checkpoint.history else 0,
        "fingerprint": splits.fingerprint,
        "data": splits.name,
        "held_out": len(held_out),
        "likelihood": checkpoint.config.model.likelihood,
        "binarization": f"fixed, seed {seed}" if splits.spec.binarizes(units) else "none",
        "seed": seed,
        "effort": {"quick": arguments.quick, **dataclasses.asdict(effort)},
        "complete": False,
        "findings": [],
        "details": {},
    }
    figures = run / "figures"
    figures.mkdir(exist_ok=True)
    bar = tqdm(
        total=100,
        disable=None,
        bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )
    try:
        with bar, random_states(device, derive(seed, "diagnose")):
            for study in studies(vae, held_out, training, effort, bar.update):
                report["findings"] += [_as_dict(finding) for finding in study.findings]
                report["details"].update(study.details)
                bar.set_postfix({"ELBO": f"{report['details']['elbo']:.2f}"})
                for name, figure in study.figures.items():
                    save(figure, figures / f"diagnose_{name}.png")
                # After every study: what an interruption leaves is whole, and says what it lacks.
                _write(run / "diagnostics.json", report)
            bar.update(100 - bar.n)
        report["complete"] = True
        _write(run / "diagnostics.json", report)
        if arguments.data is None and checkpoint.history:
            codes = latent_codes(vae, splits, checkpoint.config.seed)
            write_report(run, checkpoint, splits, codes)
    finally:
        if report["findings"] and not arguments.json:
            print(_table(report, run))
    if arguments.json:
        print_json(_plain(report))
    return int(arguments.strict and any(f["verdict"] == "wrong" for f in report["findings"]))


def _some_rows(split: Split, units: Units, count: int, seed: int) -> Tensor:
    """At most `count` rows of a split, as x, chosen at random: files are often sorted by class."""
    import torch

    from .randomness import derive

    generator = torch.Generator().manual_seed(derive(seed, "rows"))
    chosen = split.rows[torch.randperm(len(split), generator=generator)[:count]]
    part = dataclasses.replace(split, rows=chosen, labels=None)
    return torch.cat(list(part.fixed(units, seed)))


def _as_dict(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "verdict": finding.verdict,
        "effect": finding.effect,
        **dataclasses.asdict(finding.size),
        "ideal": finding.ideal,
        "limits": finding.limits,
        "meaning": finding.meaning,
        "advice": finding.advice,
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    from .checkpoint import write_atomically

    write_atomically(path, (json.dumps(_plain(report), indent=2) + "\n").encode())


def _plain(values: Any) -> Any:
    """The same with None for what is not finite, which JSON has no number for."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _table(report: dict[str, Any], run: Path) -> str:
    """Verdicts with their numbers; meaning and advice where there is something to do."""
    from .verdicts import number

    details = report["details"]
    lines = [
        report["checkpoint"],
        f"{report['held_out']:,} held-out rows of {report['data']}, and rows simulated from the "
        f"model; likelihood {report['likelihood']}; 95% intervals",
        f"ELBO {details['elbo']:.2f}, log p(x) {details['log_evidence']:.2f} nats a row "
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
        lines.append("interrupted: the studies that follow were not made")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
