"""Runs → a comparison of their models, and its numbers in words for a page or a terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..config import InputError
from ..data.splits import Split
from ..evidence.candidates import Candidate, same_values
from ..evidence.comparison import Comparison, Measure, compare
from ..evidence.differences import MIN_ROWS, Difference
from ..plots import run as figures
from ..plots.comparison import difference_intervals
from ..training.checkpoint import Checkpoint
from .summary import Picture, flag, flat

# Settings that do not change the method of training.
PLACES = ("source", "root", "device")

LABELS = {
    "elbo": "ELBO",
    "log_evidence": "log p(x)",
    "reconstruction": "reconstruction",
    "kl": "KL",
    "accuracy": "accuracy of q(y|x)",
    "bayes_accuracy": "accuracy of p(y|x)",
}

MEANING = (
    "Intervals over rows say whether one trained model is better than another on new rows of these "
    "data: training again would give other models."
)
MEANING_OF_SEEDS = (
    "Intervals over seeds say whether one method is better than another when it is trained again."
)


@dataclass(frozen=True)
class Line:
    """A difference as text: the pair, its size with the interval, its basis and its verdict."""

    measure: str
    pair: str
    numbers: str
    basis: str
    verdict: str


@dataclass(frozen=True)
class ComparisonView:
    """The contents of a page's section.

    Attributes:
        reason: why there is no comparison; the others are then empty.
        protocol: rows, draws and intervals, as a sentence.
        rankings: measure → the runs in tiers.
        rows, seeds: lines over rows and over seeds.
        methods: the runs of each method with several seeds.
        notes: sentences.
        picture: the intervals.
        meaning, meaning_of_seeds: of the two kinds of intervals.
    """

    reason: str = ""
    protocol: str = ""
    rankings: Sequence[tuple[str, str]] = ()
    rows: Sequence[Line] = ()
    seeds: Sequence[Line] = ()
    methods: Sequence[str] = ()
    notes: Sequence[str] = ()
    picture: Picture | None = None
    meaning: str = MEANING
    meaning_of_seeds: str = MEANING_OF_SEEDS


def settings_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Setting → value of a run and of its final model, whose guide may be a refitted one."""
    values = checkpoint.config.to_dict()
    return flat({**values, "model": json.loads(json.dumps(asdict(checkpoint.model)))})


def differing_settings(checkpoints: dict[str, Checkpoint]) -> dict[str, dict[str, str]]:
    """Flag → run → value, of the settings that differ between the runs, by name."""
    found = {name: settings_of(checkpoint) for name, checkpoint in checkpoints.items()}
    names = dict.fromkeys(key for settings in found.values() for key in settings)
    lines = {key: {run: own.get(key, "–") for run, own in found.items()} for key in names}
    return {
        flag(key): line
        for key, line in lines.items()
        if key not in PLACES and len({*line.values()}) > 1
    }


def candidates(runs: Iterable[tuple[str, Checkpoint, Split]]) -> list[Candidate]:
    """The models of runs (name, checkpoint, test rows).

    Those that differ only in the seed have one method.

    Raises:
        InputError: their stored values differ.
    """
    found: list[Candidate] = []
    methods: dict[object, str] = {}
    seen: Counter[object] = Counter()
    for name, checkpoint, test in runs:
        settings = {k: v for k, v in settings_of(checkpoint).items() if k not in PLACES}
        seed = settings.pop("seed")
        key = json.dumps(settings)
        # The same settings and seed again, of another version for example, are another method.
        seen[key, seed] += 1
        method = methods.setdefault((key, seen[key, seed]), f"method {len(methods) + 1}")
        if found:
            test = same_values(found[0], name, test)
        found.append(Candidate(name, checkpoint.vae, test, method, int(seed)))
    return found


def quick_view(runs: Iterable[tuple[str, Checkpoint, Split]]) -> ComparisonView:
    """The comparison of ELBO, reconstruction and KL, by one draw of z for each row."""
    try:
        return view(compare(candidates(runs), num_samples=None))
    except InputError as error:  # runs that cannot be compared are shown side by side
        return ComparisonView(reason=str(error))


def view(found: Comparison) -> ComparisonView:
    """A comparison in words and as a picture."""
    several = [
        f"{method}: {', '.join(runs.values())} (seeds {', '.join(map(str, runs))})"
        for method, runs in found.methods.items()
        if len(runs) > 1
    ]
    rows = [_line(found, name, d) for name, m in found.measures.items() for d in m.differences]
    seeds = [
        _line(found, name, d, "seed") for name, m in found.measures.items() for d in m.over_seeds
    ]
    return ComparisonView(
        protocol=protocol(found),
        rankings=[
            (LABELS[name], _ranking(m))
            for name, m in found.measures.items()
            if m.tiers and len(m.means) > 1
        ],
        rows=rows,
        seeds=seeds,
        methods=several if seeds else [],
        notes=notes(found),
        picture=_picture(found),
    )


def protocol(found: Comparison) -> str:
    """Rows, draws and intervals."""
    sizes = sorted(set(found.num_rows.values()))
    rows = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    samples = (
        "one draw of z" if found.num_samples is None else f"{found.num_samples:,} samples of z"
    )
    words = f"{rows} test rows of each run, {found.common:,} of them test rows of all; {samples} "
    words += "per row"
    if found.binarization != "none":
        words += f"; binarized once ({found.binarization})"
    if found.given_labels:
        words += "; densities given the label of each row, as log p(x|y)"
    return f"{words}; 95% intervals, simultaneous for all pairs of a measure"


def _line(found: Comparison, measure: str, d: Difference, unit: str = "row") -> Line:
    """A difference in words; `unit` is row or seed."""
    digits = 4 if "accuracy" in measure else 3
    texts = [f"{value:.{digits}f}" for value in (d.estimate, d.low, d.high)]
    numbers = f"{'+' * (d.estimate > 0)}{texts[0]} [{texts[1]}, {texts[2]}]".replace("-", "−")
    higher, lower = (d.first, d.second)[:: d.sign or 1]
    verdict = f"{higher} is higher" if d.sign else "not distinguished"
    if measure == "log_evidence" and d.sign and lower in found.underestimated:
        verdict += f", unless {lower} is underestimated"
    basis = f"{d.count:,} {unit}{'s' * (d.count != 1)}"
    return Line(LABELS[measure], f"{d.first} − {d.second}", numbers, basis, verdict)


def _ranking(measure: Measure) -> str:
    """The tiers of a measure, or why there are none."""
    if sum(map(len, measure.tiers)) < 2:
        return "no ranking: fewer than two runs have a reliable value"
    if len(measure.tiers) < 2:
        return "no ranking: the intervals do not separate the runs"
    return "; ".join(f"{k}. {', '.join(tier)}" for k, tier in enumerate(measure.tiers, 1))


def notes(found: Comparison) -> list[str]:
    """What limits the comparison, as sentences."""
    words = list(found.notes)
    for run in found.underestimated:
        share = found.unreliable_weights[run]
        words.append(
            f"log p(x) of {run} is a lower bound and has no rank: {share:.0%} of its rows have "
            f"heavy-tailed importance weights. Refit its guide, or raise --num-samples"
        )
    pairs = len(found.num_rows) * (len(found.num_rows) - 1) // 2
    shown = max((len(m.differences) for m in found.measures.values()), default=0)
    if shown < pairs:
        words.append(
            f"{pairs - shown} of {pairs} pairs of runs have fewer than {MIN_ROWS} test rows in "
            f"common, since other seeds give other splits"
        )
    counts = [d.count for m in found.measures.values() for d in m.over_seeds]
    if counts and min(counts) < 5:
        words.append(f"{min(counts)} seeds are few: intervals over so few are wide")
    return words


def _picture(found: Comparison) -> Picture:
    measures = found.measures.values()  # dictionaries keep the order of the lines
    rows = dict.fromkeys((d.first, d.second) for m in measures for d in m.differences)
    seeds = dict.fromkeys((d.first, d.second) for m in measures for d in m.over_seeds)
    pairs = [*((pair, False) for pair in rows), *((pair, True) for pair in seeds)]
    panels = {}
    for name, m in found.measures.items():
        known = {((d.first, d.second), False): d for d in m.differences}
        known |= {((d.first, d.second), True): d for d in m.over_seeds}
        ends = [(d.estimate, d.low, d.high) for d in map(known.get, pairs) if d is not None]
        numbers = np.full((len(pairs), 3), np.nan)
        numbers[[pair in known for pair in pairs]] = np.reshape(ends, (-1, 3))
        panels[LABELS[name]] = numbers
    names = [f"{first} − {second}" for (first, second), _ in pairs]
    drawn = difference_intervals(names, panels, [over_seeds for _, over_seeds in pairs])
    caption = (
        "Differences and their 95% intervals: round over rows, square over seeds; grey if they "
        "include 0"
    )
    return Picture(caption, figures.svg(drawn))
