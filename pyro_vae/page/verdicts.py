"""The verdicts of `diagnose` in plain words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..diagnostics.findings import number
from ..models.autoencoder import Autoencoder
from ..training.checkpoint import Checkpoint, digest_of

if TYPE_CHECKING:
    from .summary import Picture

VERDICTS = ("wrong", "doubtful", "sound")


@dataclass(frozen=True)
class FindingLine:
    """A finding of `diagnose` as text, with its size and interval as `numbers`."""

    check: str
    verdict: str
    effect: str
    meaning: str
    advice: str
    ideal: str
    numbers: str


@dataclass(frozen=True)
class Trust:
    """The verdicts of `diagnose`.

    Attributes:
        words: a summary.
        command: runs `diagnose`, if there are no verdicts or they are stale.
        stale: a warning, if the verdicts describe another state of the run.
        findings: the worst first.
        pictures: figures of `diagnose`.
        log_evidence: mean over held-out rows, of this state of the run.
    """

    words: str
    command: str = ""
    stale: str = ""
    findings: Sequence[FindingLine] = ()
    pictures: Sequence[Picture] = ()
    log_evidence: float | None = None

    @property
    def by_check(self) -> dict[str, FindingLine]:
        return {finding.check: finding for finding in self.findings}


def trust_of(run: Path, checkpoint: Checkpoint) -> Trust:
    """The verdicts in a run's diagnostics.json in plain words, without pictures."""
    if isinstance(checkpoint.vae, Autoencoder):
        return Trust("An autoencoder has no posterior and no density of data to test.")
    command = f"python -m pyro_vae.diagnose {quote(str(run))}"
    try:
        report = json.loads((run / "diagnostics.json").read_text(encoding="utf-8"))
        findings = [_finding(finding) for finding in report["findings"]]
        words = _in_words(report, findings)
        evidence = report["details"]["log_evidence"]
        state = (report.get("step"), report.get("fingerprint"))
        digest = report.get("digest")  # reports of version 0.1 have none
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Trust("Not tested yet. To test it:", command)
    findings.sort(key=lambda finding: VERDICTS.index(finding.verdict))
    step = checkpoint.history[-1]["step"] if checkpoint.history else 0
    # A refit changes the guide, and no step.
    same = digest is None or digest == digest_of(checkpoint.path)
    if same and state == (step, checkpoint.fingerprint):
        return Trust(words, "", "", findings, log_evidence=evidence)
    stale = (
        "These verdicts describe an earlier state of the run, or other data. To test "
        "its best epoch:"
    )
    return Trust(words, command, stale, findings)


def _finding(finding: dict[str, Any]) -> FindingLine:
    if finding["verdict"] not in VERDICTS:
        raise ValueError(f"expected a verdict; got {finding['verdict']!r}")
    estimate, low, high = (number_text(finding[key]) for key in ("estimate", "low", "high"))
    names = ("check", "verdict", "effect", "meaning", "advice")
    texts = {name: str(finding[name]) for name in names}
    numbers = f"{estimate} [{low}, {high}]"
    return FindingLine(**texts, ideal=f"{finding['ideal']:g}", numbers=numbers)


def _in_words(report: dict[str, Any], findings: Sequence[FindingLine]) -> str:
    """The number of checks and of each verdict."""
    checks = {v: [f.check for f in findings if f.verdict == v] for v in reversed(VERDICTS)}
    quick = "with --quick, on" if report["effort"]["quick"] else "on"
    words = [
        f"{len(findings)} checks were made, {quick} {report['held_out']:,} held-out rows of "
        f"{report['data']} and on rows simulated from the model, whose latents are known: "
        + ", ".join(f"{len(names)} {verdict}" for verdict, names in checks.items())
        + "."
    ]
    if checks["wrong"]:
        words.append(f"Errors shown to be large: {'; '.join(checks['wrong'])}.")
    elif not checks["doubtful"]:
        words.append("All errors are shown to be small.")
    if not report["complete"]:
        words.append("The diagnosis was interrupted: the remaining checks were not made.")
    return " ".join(words)


def number_text(value: float | None) -> str:
    return "–" if value is None else number(value).replace("-", "−")
