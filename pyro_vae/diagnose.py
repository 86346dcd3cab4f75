"""Check the posterior of a run: a table of errors, each with a verdict.

The guide q(z|x) is tested on held-out rows and on rows simulated from the model, whose true latents
are known. Each error has a 95% confidence interval. The verdict is sound if the error is shown to
be small, wrong if it is shown to be large, and doubtful otherwise. RUN/diagnostics.json holds all
numbers, RUN/figures/diagnose_*.png show them, and RUN/report.html is rewritten with the verdicts.
Advice gives the command that mends what was found. The rows with the worst posterior are named by
their numbers in the data, counted from 0.

With a second run, for example the refitted one, both are printed side by side. Each is diagnosed if
its diagnostics.json is missing or describes another checkpoint.

A model with labels is diagnosed at one label, on the rows that have it: q(z|x, y) is tested. If
labels are inferred, q(y|x) is tested too, on rows simulated with all labels.

  python -m pyro_vae.diagnose runs/digits
  python -m pyro_vae.diagnose runs/digits --quick
  python -m pyro_vae.diagnose runs/digits --strict || echo "do not use this posterior"
  python -m pyro_vae.diagnose runs/digits runs/refitted
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from .cli import OpenRun, RunArguments, open_run, parse, print_json, run_command
from .config import InputError, auto

if TYPE_CHECKING:
    from torch import Tensor

    from .diagnostics.suite import Effort, Study
    from .models.vae import VAE


MIN_ROWS = 5  # the search for holes cross-validates over 5 parts of them


@dataclass(frozen=True, kw_only=True)
class DiagnoseArguments(RunArguments):
    """Arguments of `diagnose`.

    Attributes:
        run2: Second run, to print beside the first.
        label: Name of a class or, unless names are numbers, its number, for a model with labels.
        quick: Use fewer rows, draws and steps: faster, with wider intervals.
        strict: Exit with status 1 if a finding is wrong, of the second run if there are two.
        json: Print the contents of diagnostics.json instead of the table.
    """

    run2: Annotated[Path | None, tyro.conf.Positional] = None
    label: Annotated[str | None, auto("NAME|INT", "the most frequent one")] = None
    quick: bool = False
    strict: bool = False
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(DiagnoseArguments, argv, "diagnose", __doc__)))


def _main(arguments: DiagnoseArguments) -> int:
    if arguments.run2 is not None:
        reports = _compare(arguments, arguments.run2)
        if arguments.json:
            print_json(reports)
        else:
            print(_side_by_side(reports))
        report = reports["after"]
    else:
        report = _diagnose(arguments, _open(arguments), show=not arguments.json)
        if arguments.json:
            print_json(report)
    return int(arguments.strict and any(f["verdict"] == "wrong" for f in report["findings"]))


def _open(arguments: DiagnoseArguments) -> OpenRun:
    """Load a run that has a posterior. A model with labels is that at one label, with its rows."""
    from .models.autoencoder import Autoencoder

    folder = arguments.run
    if not folder.is_dir():
        raise InputError(f"expected a run folder, where diagnostics.json will be; got {folder}")
    run = open_run(arguments)
    if isinstance(run.vae, Autoencoder):
        raise InputError(f"{folder} is an autoencoder, which has no posterior to diagnose")
    return run


def _at_label(run: OpenRun, label: str | None) -> tuple[OpenRun, str | None]:
    """A model with labels at one of them, with the rows that have it; and its name.

    Raises:
        InputError: there is no such class, or the model has no labels.
    """
    from .models.labels import ConditionalVAE, class_number, rows_with_label

    if not isinstance(run.vae, ConditionalVAE):
        if label is not None:
            raise InputError("--label expects a model with labels; this one has none")
        return run, None
    number = int(run.vae.label_logits.argmax())
    if label is not None:
        number = class_number(label, run.vae.class_names)
    splits = run.splits
    parts: dict[str, Any] = {
        name: rows_with_label(run.vae, getattr(splits, name), number, run.seed)
        for name in ("train", "test")
    }
    given = dataclasses.replace(
        run, vae=run.vae.given(number), splits=dataclasses.replace(splits, **parts)
    )
    return given, run.vae.class_names[number]


def _diagnose(arguments: DiagnoseArguments, run: OpenRun, show: bool) -> dict[str, Any]:
    """Make all studies, write their results, print the table if `show`, and return the report."""
    from tqdm import tqdm

    from .diagnostics.label_study import label_study
    from .diagnostics.suite import FULL, QUICK, studies
    from .models.labels import SemiSupervisedVAE
    from .page.write import write_report
    from .plots.codes import latent_codes
    from .runtime.randomness import derive, random_states

    folder, whole = arguments.run, run
    effort = QUICK if arguments.quick else FULL
    run, label = _at_label(whole, arguments.label)
    vae = cast("VAE", run.vae)
    held_out, training, numbers = _rows(run, effort, label)
    report = _report(run, len(held_out), arguments.quick, effort, label)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "diagnose_worst_rows.png").unlink(missing_ok=True)  # there may be none
    style = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=100, disable=None, bar_format=style)
    try:
        with bar, random_states(run.device, derive(run.seed, "diagnose")):
            for study in studies(vae, held_out, training, effort, bar.update, numbers):
                _record(study, report, folder, run)
                bar.set_postfix({"ELBO": f"{report['details']['elbo']:.2f}"})
            if isinstance(whole.vae, SemiSupervisedVAE):
                _record(label_study(whole.vae, effort.simulations, held_out), report, folder, run)
            bar.update(100 - bar.n)
        report["complete"] = True
        _write(folder / "diagnostics.json", report)
        if arguments.data is None and run.checkpoint.history:
            codes = latent_codes(whole.vae, whole.splits, run.checkpoint.config.seed)
            write_report(folder, run.checkpoint, whole.splits, codes)
    finally:
        if report["findings"] and show:
            print(_table(report, folder))
    return report


def _rows(run: OpenRun, effort: Effort, label: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random held-out and training rows, as x, and the numbers of the first in the data."""
    from .diagnostics.suite import random_numbers, random_rows

    splits, units = run.splits, run.vae.likelihood_module.units
    # Other data have no training rows: the aggregate posterior is then that of the test rows.
    known = splits.train if len(splits.train) else splits.test
    for kind, split in (("held-out", splits.test), ("training", known)):
        if len(split) < MIN_ROWS:
            raise InputError(
                f"expected at least {MIN_ROWS} {kind} rows"
                + ("" if label is None else f" of label {label}")
                + f"; {splits.name} has {len(split)}: give more rows by --data"
                + ("" if label is None else ", or another --label")
            )
    held_out = random_rows(splits.test, units, effort.held_out, run.seed)
    training = random_rows(known, units, effort.aggregate, run.seed)
    return held_out, training, random_numbers(splits.test, effort.held_out, run.seed)


def _report(
    run: OpenRun, num_rows: int, quick: bool, effort: Effort, label: str | None = None
) -> dict[str, Any]:
    """The contents of diagnostics.json before the first study."""
    from .training.checkpoint import digest_of

    checkpoint, splits = run.checkpoint, run.splits
    binarized = splits.spec.binarizes(checkpoint.vae.likelihood_module.units)
    return {
        "checkpoint": str(checkpoint.path),
        "digest": digest_of(checkpoint.path),
        "step": checkpoint.history[-1]["step"] if checkpoint.history else 0,
        "fingerprint": splits.fingerprint,
        "data": splits.name,
        "held_out": num_rows,
        "likelihood": checkpoint.config.model.likelihood,
        "binarization": f"fixed, seed {run.seed}" if binarized else "none",
        "seed": run.seed,
        **({} if label is None else {"label": label}),
        "effort": {"quick": quick, **dataclasses.asdict(effort)},
        "complete": False,
        "findings": [],
        "details": {},
    }


def _record(study: Study, report: dict[str, Any], folder: Path, run: OpenRun) -> None:
    """Add a study to the report and write both, so that an interruption loses no finished study."""
    from .diagnostics.advice import remedies
    from .plots.run import save_all

    checkpoint = run.checkpoint
    texts = remedies(folder, checkpoint.model)
    report["findings"] += [finding.as_dict(texts) for finding in study.findings]
    report["details"].update(study.details)
    pictures = {f"diagnose_{name}": figure for name, figure in study.figures.items()}
    save_all(pictures, folder / "figures")
    _write(folder / "diagnostics.json", report)


def _write(path: Path, report: dict[str, Any]) -> None:
    from .runtime.files import to_json, write_atomically

    write_atomically(path, (to_json(report, indent=2) + "\n").encode())


def _table(report: dict[str, Any], run: Path) -> str:
    """Findings with their numbers; meaning and advice of those that are not sound."""
    details = report["details"]
    lines = [
        report["checkpoint"],
        f"{report['held_out']:,} held-out rows of {report['data']}{_with_label(report)}, and rows "
        f"simulated from the model; likelihood {report['likelihood']}; 95% intervals",
        f"ELBO {details['elbo']:.2f}, log p(x) {details['log_evidence']:.2f} nats per row "
        f"({details['importance_samples']:,} importance samples)",
        "",
    ]
    for finding in report["findings"]:
        lines.append(f"{finding['verdict']:<9} {finding['check']:<21} {_numbers(finding)}")
        lines.append(f"{'':10}{finding['effect']}; ideal {finding['ideal']:g}")
        if finding["verdict"] != "sound":
            lines += textwrap.wrap(
                finding["meaning"], 100, initial_indent=" " * 10, subsequent_indent=" " * 12
            )
            lines += _advice(finding["advice"])
    lines += ["", *_worst_rows(details.get("worst_rows", []))]
    files = f"numbers in {run / 'diagnostics.json'}, figures in {run / 'figures'}"
    lines.append(f"{_counts(report)}; {files}")
    if not report["complete"]:
        lines.append("interrupted: the remaining studies were not run")
    return "\n".join(lines)


def _with_label(report: dict[str, Any]) -> str:
    """The label at which a model with labels was diagnosed, or nothing."""
    return f" with label {report['label']} (another by --label)" if "label" in report else ""


def _numbers(finding: dict[str, Any]) -> str:
    """Size and interval of a finding. JSON has null for a number that is not finite."""
    from .diagnostics.findings import number

    values = (finding[key] for key in ("estimate", "low", "high"))
    estimate, low, high = ("nan" if value is None else number(value) for value in values)
    return f"{estimate} [{low}, {high}]"


def _counts(report: dict[str, Any]) -> str:
    verdicts = [finding["verdict"] for finding in report["findings"]]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in ("sound", "doubtful", "wrong"))


def _advice(advice: str) -> list[str]:
    """The lines of an advice. A command is not wrapped, so that it can be copied."""
    lines = []
    for i, text in enumerate(advice.split("\n")):
        if text.startswith("python -m"):
            lines.append(" " * 14 + text)
        else:
            first = " " * 12 if i else " " * 10 + "→ "
            lines += textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=" " * 12)
    return lines


def _worst_rows(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each size: the rows where it is worst, with their sizes."""
    lines = []
    for name, key in (("Pareto k", "pareto_k"), ("amortization gap", "amortization_gap")):
        # Rows that were chosen for the other size may be fine by this one.
        worst = sorted((r for r in rows if key in r["worst_by"]), key=lambda r: -_size(r[key]))
        if worst:
            named = ", ".join(f"{row['row']} ({row[key]:.2f})" for row in worst)
            lines.append(f"worst rows by {name}: {named}")
    return [*lines, ""] if lines else []


def _size(value: float) -> float:
    return float("inf") if value != value else value


def _compare(arguments: DiagnoseArguments, run2: Path) -> dict[str, Any]:
    """The reports of two runs of the same data and likelihood, each made if it is not there."""
    both = [dataclasses.replace(arguments, run=run, run2=None) for run in (arguments.run, run2)]
    runs = [_open(one) for one in both]
    kinds = [(r.splits.fingerprint, r.checkpoint.config.model.likelihood) for r in runs]
    if kinds[0] != kinds[1]:
        first, second = (
            f"{r.splits.name} {kind[0][:8]} ({kind[1]})"
            for r, kind in zip(runs, kinds, strict=True)
        )
        raise InputError(
            f"expected two runs of the same data and likelihood; got {first} and {second}: "
            f"diagnose them one by one"
        )
    reports = {}
    for name, one, run in zip(("before", "after"), both, runs, strict=True):
        report = _kept(one.run)
        reason = _outdated(report, run, arguments)
        if reason:
            print(f"{one.run}: {reason}; diagnosing {run.checkpoint.path}", file=sys.stderr)
            _diagnose(one, run, show=False)
            report = _kept(one.run)
        reports[name] = report
    return reports


def _kept(run: Path) -> dict[str, Any]:
    """The contents of a run's diagnostics.json, empty if it cannot be read."""
    try:
        report = json.loads((run / "diagnostics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _outdated(report: dict[str, Any], run: OpenRun, arguments: DiagnoseArguments) -> str:
    """Why a report is not the one that `diagnose` would make of a run; empty if it is."""
    from .training.checkpoint import digest_of

    if not report:
        return "no diagnostics.json"
    if not report.get("complete"):
        return "its diagnostics.json is incomplete"
    if report.get("digest") != digest_of(run.checkpoint.path):
        return (
            f"its diagnostics.json describes another checkpoint, {report.get('checkpoint')} at "
            f"step {report.get('step')}"
        )
    if (report.get("fingerprint"), report.get("seed")) != (run.splits.fingerprint, run.seed):
        return "its diagnostics.json describes other data or another seed"
    if report["effort"]["quick"] != arguments.quick:
        return f"its diagnostics.json was made with{'out' if arguments.quick else ''} --quick"
    if arguments.label is not None and report.get("label") != arguments.label:
        return "its diagnostics.json was made at another label"
    return ""


def _side_by_side(reports: dict[str, Any]) -> str:
    """Two reports: checkpoint, ELBO and log p(x), and each finding with its verdict and numbers."""
    both = list(reports.values())

    def line(name: str, texts: list[str]) -> str:
        return f"{name:<21} {texts[0]:<36} {texts[1]}".rstrip()

    lines = [f"{name:<7} {report['checkpoint']}" for name, report in reports.items()]
    seeds = {report["seed"] for report in both}
    lines.append(
        f"held-out rows of {both[0]['data']}, {'the same' if len(seeds) == 1 else 'different'} "
        f"ones, and rows simulated from each model; 95% intervals"
    )
    lines += ["", line("", list(reports))]
    for name, key in (("ELBO", "elbo"), ("log p(x)", "log_evidence")):
        values = [report["details"][key] for report in both]
        lines.append(line(name, ["nan" if v is None else f"{v:.2f}" for v in values]))
    found = [{finding["check"]: finding for finding in report["findings"]} for report in both]
    for check in dict.fromkeys([*found[0], *found[1]]):
        pair = [findings.get(check) for findings in found]
        lines.append(line(check, [f"{f['verdict']:<9} {_numbers(f)}" if f else "-" for f in pair]))
    lines += ["", line("", [_counts(report) for report in both])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
