"""Compare runs on the same held-out rows: paired differences with intervals.

ELBO, log p(x), reconstruction, KL and accuracy are compared row by row, on rows that are test rows
of both runs of a pair. Intervals over rows say whether one trained model is better than another.
Runs that differ only in the seed are one method: with two seeds or more, intervals over seeds say
whether one method is better than another. Runs are ranked only where the intervals exclude 0.

Data without a test split of their own are split by the seed, and runs of other seeds then have few
test rows in common.

  python -m pyro_vae.compare runs/small runs/large
  python -m pyro_vae.compare runs/a0 runs/a1 runs/b0 runs/b1 --out comparison.html
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .cli import RunArguments, open_run, parse, print_json, refuse_existing, run_command
from .config import InputError, auto
from .config.options import check_integer

if TYPE_CHECKING:
    from .data.splits import Split
    from .evidence.candidates import Candidate
    from .evidence.comparison import Comparison
    from .page.comparison import Line
    from .training.checkpoint import Checkpoint


@dataclass(frozen=True)
class CompareArguments:
    """Arguments of `compare`.

    Attributes:
        runs: Run folders or checkpoint files, at least two.
        data: Name or path of other data to use. All their rows are test rows.
        max_value: Largest value that the data in --data can take, for example 255 for 8-bit images.
        data_root: Folder of torchvision's data sets.
        num_samples: Number of importance samples of z per row (K).
        num_rows: Number of test rows of each run, from the beginning.
        seed: Seed of all random draws, the same for all runs, including the binarization for a
            bernoulli likelihood.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
        json: Print the numbers as JSON.
        out: File to write, ending in .html: the page of `report` with this comparison.
        overwrite: Replace an existing file.
    """

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN RUN [RUN ...]", help_behavior_hint=""),
    ]
    data: Annotated[str | None, auto("NAME|PATH", "the runs' own")] = None
    max_value: Annotated[int | None, auto("INT", "as the kind of data defines it")] = None
    data_root: Annotated[Path | None, auto("DIR", "the runs' own")] = None
    num_samples: int = 5000
    num_rows: Annotated[int | None, auto("INT", "all")] = None
    seed: int = 0
    device: str = "auto"
    json: bool = False
    out: Annotated[Path | None, auto("FILE", "none")] = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_integer("num-samples", self.num_samples)
        check_integer("num-rows", self.num_rows)
        check_integer("seed", self.seed, 0)
        if len({run.resolve() for run in self.runs}) < max(2, len(self.runs)):
            names = " ".join(map(str, self.runs))
            raise InputError(f"expected two runs or more, each once; got {names or 'none'}")
        if self.overwrite and self.out is None:
            raise InputError("--overwrite replaces the file in --out; give --out")

    def of(self, run: Path) -> RunArguments:
        """The arguments of a command for one of the runs."""
        places = self.data, self.max_value, self.data_root
        return RunArguments(run, *places, seed=self.seed, device=self.device)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(CompareArguments, argv, "compare", __doc__)))


def _main(arguments: CompareArguments) -> None:
    if arguments.out is not None:
        refuse_existing(arguments.out, arguments.overwrite, (".html",))
        _check_folders(arguments.runs)
    from tqdm import tqdm

    from .evidence.comparison import compare
    from .evidence.evaluation import num_pairs
    from .page.comparison import differing_settings

    checkpoints, models = _open(arguments)
    most = arguments.num_rows
    total = sum(
        num_pairs(m.vae, min(len(m.test), most or len(m.test)), arguments.num_samples)
        for m in models
    )
    with tqdm(total=total, unit="sample", unit_scale=True, disable=None) as bar:
        found = compare(
            models, arguments.num_samples, arguments.num_rows, arguments.seed, bar.update
        )
    settings = differing_settings(checkpoints)
    if arguments.json:
        runs = {name: str(checkpoint.path) for name, checkpoint in checkpoints.items()}
        print_json({"runs": runs, **asdict(found), "settings": settings})
    else:
        print(_text(found, settings))
    if arguments.out is not None:
        _write(arguments, checkpoints, found)


def _open(arguments: CompareArguments) -> tuple[dict[str, Checkpoint], list[Candidate]]:
    """The checkpoints by the names of their runs, and the models to compare.

    Raises:
        InputError: a run or its data cannot be used, or their data differ.
    """
    from .page.comparison import candidates
    from .page.write import distinct_names

    checkpoints: dict[str, Checkpoint] = {}

    def opened() -> Iterator[tuple[str, Checkpoint, Split]]:
        for name, path in zip(distinct_names(arguments.runs), arguments.runs, strict=True):
            run = open_run(arguments.of(path))
            checkpoints[name] = run.checkpoint
            yield name, run.checkpoint, run.splits.test

    return checkpoints, candidates(opened())


def _check_folders(runs: Sequence[Path]) -> None:
    for run in runs:
        if not run.is_dir():
            raise InputError(
                f"--out shows run folders; {run} is none: give the folder, or no --out"
            )


def _write(
    arguments: CompareArguments, checkpoints: dict[str, Checkpoint], found: Comparison
) -> None:
    """Write the page of the runs, on their own data, with the comparison."""
    from .cli import load_run_data
    from .page.comparison import view
    from .page.summary import overview
    from .page.write import write_page
    from .plots.codes import latent_codes

    assert arguments.out is not None
    views = []
    for run, checkpoint in zip(arguments.runs, checkpoints.values(), strict=True):
        checkpoint.vae.cpu()
        splits = load_run_data(checkpoint, None, arguments.data_root)
        codes = latent_codes(checkpoint.vae, splits, checkpoint.config.seed)
        views.append(overview(run, checkpoint, splits, codes, len(arguments.runs)))
    write_page(arguments.out, views, view(found))
    print(arguments.out, file=sys.stderr if arguments.json else sys.stdout)


def _text(found: Comparison, settings: dict[str, dict[str, str]]) -> str:
    """The comparison as tables."""
    from .page.comparison import LABELS, MEANING, MEANING_OF_SEEDS, notes, protocol, view

    shown = view(found)
    runs = list(found.num_rows)
    lines = [protocol(found), "nats per row", ""]
    table = [["run", "rows", *(LABELS[name] for name in found.measures), "MC error", "unreliable"]]
    for run in runs:
        means = [f"{m.means[run]:.3f}" if run in m.means else "-" for m in found.measures.values()]
        errors = _number(found.monte_carlo_error.get(run), ".3f")
        shares = _number(found.unreliable_weights.get(run), ".1%")
        table.append([run, f"{found.num_rows[run]:,}", *means, errors, shares])
    lines += [
        *_columns(table),
        "means over the test rows of each run; MC error: Monte Carlo error of log p(x); "
        "unreliable: share of rows with heavy-tailed weights",
    ]
    table = [["settings that differ", *runs]]
    table += [[flag, *(values[run] for run in runs)] for flag, values in settings.items()]
    lines += ["", *(_columns(table) if settings else ["no setting differs"])]
    for title, parts, meaning in (
        ("over seeds", shown.seeds, MEANING_OF_SEEDS),
        ("over rows", shown.rows, MEANING),
    ):
        if parts:
            lines += ["", f"{title}. {meaning}"]
            lines += shown.methods if title == "over seeds" else []
            lines += _columns([_cells(line) for line in parts])
    if shown.rankings:
        lines += ["", *_columns([["ranking", ""], *map(list, shown.rankings)])]
    return "\n".join([*lines, *(f"note: {note}" for note in notes(found))])


def _cells(line: Line) -> list[str]:
    return [line.measure, line.pair, line.numbers, line.basis, line.verdict]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns of equal width, the first of a line indented."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


if __name__ == "__main__":
    sys.exit(main())
