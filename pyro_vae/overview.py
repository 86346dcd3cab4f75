"""What there is to say and show of a run, as plain values for `page.py`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from . import figures, gallery
from .autoencoder import Autoencoder
from .checkpoint import Checkpoint
from .config import read_config
from .data import Splits
from .explorer import explore, png, tiles
from .gallery import Codes
from .latents import ACTIVE_VARIANCE
from .page import data_url
from .vae import VAE
from .verdicts import number

__all__ = ["flat", "overview"]

# Bytes that the sheets of all explorers may take, those of the hovering thumbnails, and a picture
# in all runs; the page stays below 5 MB with the third more that base64 takes.
EXPLORER_BYTES = 1_500_000
THUMBNAIL_BYTES = 400_000
PICTURE_BYTES = 400_000  # of each, as text

# The pictures that `diagnose` leaves, and what each shows.
CAPTIONS = {
    "weights": "Pareto k̂ of the importance weights of held-out rows",
    "latents": "KL of each latent, from collapsed to most used",
    "predictive": "Held-out rows against rows that the model draws for them",
    "gaps": "What the guide misses of log p(x): amortization, correlations, the rest",
    "ranks": "Ranks of true latents among draws of q(z|x): flat where the guide is right",
    "ecdf": "Distribution of those ranks less the uniform one, with its band",
    "coverage": "How often regions hold the true latents, against how often they should",
    "recovery": "True latents against posterior means",
    "contraction": "How far the posterior narrows the prior, and how far it errs",
    "bounds": "Estimates of log p(x) from below and from above",
    "nuts": "q(z|x) against the posterior that NUTS draws from",
    "aggregate": "Aggregate posterior against the prior",
}


def overview(
    run: Path, checkpoint: Checkpoint, splits: Splits, codes: Codes, num_runs: int
) -> dict[str, Any]:
    """The values that the page names of each of its runs.

    Args:
        run: the run's folder.
        checkpoint: its best.
        splits: the data it was trained on.
        codes: `gallery.latent_codes` of both.
        num_runs: how many share the page.

    Raises:
        InputError: the run's config.json cannot be read.
    """
    vae, config, history = checkpoint.vae, checkpoint.config, checkpoint.history
    row = "image" if splits.spec.is_image else "row"
    best = history[-1]
    whole = _history(run, history)
    drawn = gallery.run_figures(vae, splits, whole, config.seed)
    last = f"Reconstructions of validation {row}s by the best epoch"
    drawn["reconstructions"] = gallery.reconstructions(vae, splits, best["epoch"], config.seed)
    captions = {
        "reconstructions": (last, f"Pairs of validation {row}s and their reconstructions"),
        "samples": (
            "Drawn from the prior: means of p(x|z)",
            f"Grid of {row}s decoded from draws of the prior",
        ),
        "interpolations": (
            f"From one test {row} to another, in a straight line between their codes",
            f"Lines of decoded {row}s between pairs of test {row}s",
        ),
    }
    pictures = []
    for name, (caption, alt) in captions.items():
        if name in drawn:
            pictures.append({"caption": caption, "alt": alt, **_drawing(drawn[name], num_runs)})
    drawn["elbo"].suptitle("")
    key = "validation_reconstruction" if best["kl"] is None else "validation_elbo"
    interactive, explorer_words = _interactive(checkpoint, splits, codes, num_runs)
    trust = _trust(run, checkpoint)
    return {
        "path": run,
        "row": row,
        "sentence": _sentence(checkpoint, splits),
        "numbers": _numbers(checkpoint, whole, codes, trust),
        "trust": trust,
        "pictures": pictures,
        "curves": figures.svg(drawn["elbo"]),
        "curves_alt": f"Curves over {len(whole)} epochs; best epoch {best['epoch']}, "
        f"{'ELBO' if best['kl'] is not None else 'reconstruction'} {best[key]:.2f} nats per {row}",
        "history": whole,
        "scatter_words": f"{codes.title[0].upper()}{codes.title[1:]}.",
        "explorer_words": explorer_words,
        "interactive": interactive,
        "settings": flat(config.to_dict()),
        "asked": flat(read_config(run / "config.json").to_dict()),
        "fingerprint": checkpoint.fingerprint,
        "validation": splits.validation.rows.numpy().tobytes(),
        "origin": f"Model of {checkpoint.path}, epoch {best['epoch']}; the same again:",
        "command": f"python -m pyro_vae.train --config {quote(str(run / 'config.json'))}",
    }


def _drawing(figure: Figure, num_runs: int) -> dict[str, str]:
    """A figure as SVG, or as WebP where its images would take too much room."""
    figure.suptitle("")
    svg = figures.svg(figure)
    if len(svg) <= PICTURE_BYTES // num_runs:
        return {"svg": svg}
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return {"src": _webp(Image.open(buffer), 60)}


def _history(run: Path, best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; where they cannot be read, those in the best checkpoint."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return best
    names = best[-1].keys()
    whole = all(isinstance(line, dict) and line.keys() == names for line in lines)
    return lines if whole and lines[: len(best)] == best else best


def _sentence(checkpoint: Checkpoint, splits: Splits) -> str:
    model, fit = checkpoint.config.model, checkpoint.config.fit
    is_vae = isinstance(checkpoint.vae, VAE)
    kind = "A variational autoencoder" if is_vae else "An autoencoder"
    sizes = " ".join(map(str, model.hidden or ()))
    particles = f" with {fit.num_particles} particles" if fit.num_particles > 1 else ""
    objective = f" by the objective {fit.objective}{particles}" if is_vae else ""
    shape = "×".join(map(str, splits.spec.shape))
    return (
        f"{kind} of {model.latent_dim} latents ({model.architecture} {sizes}, {model.likelihood} "
        f"likelihood), trained on {len(splits.train):,} rows of {splits.name}, {shape},"
        f"{objective}; {len(splits.validation):,} rows chose the epoch."
    )


def _numbers(
    checkpoint: Checkpoint,
    history: Sequence[dict[str, Any]],
    codes: Codes,
    trust: dict[str, Any],
) -> dict[str, tuple[str, str]]:
    """Label → the number and a remark."""
    best = checkpoint.history[-1]
    found = {}
    names = {"ELBO": "elbo", "Reconstruction": "reconstruction", "KL": "kl"}
    for label, name in names.items():
        value = best[f"validation_{name}"]
        if value is not None:
            found[f"{label}, validation"] = (_number(value), "nats each")
    if trust["log_evidence"] is not None:
        found["log p(x), held out"] = (_number(trust["log_evidence"]), "nats each")
    if best["kl"] is not None:
        active = int((codes.means.var(0, ddof=1) > ACTIVE_VARIANCE).sum())
        found["Active latents"] = (f"{active} of {codes.means.shape[1]}", "have means that move")
    found["Best epoch"] = (f"{best['epoch']} of {len(history)}", "by validation")
    seconds = history[-1]["seconds"]
    time = f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
    found["Training"] = (time, f"at {history[-1]['images_per_second']:,.0f} rows a second")
    count = sum(p.numel() for p in checkpoint.vae.parameters())
    found["Parameters"] = (f"{count:,}", "encoder and decoder")
    return found


def _trust(run: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The verdicts of `diagnose` in plain words."""
    trust: dict[str, Any] = dict.fromkeys(("words", "command", "stale"), "")
    trust |= {"findings": [], "by_check": {}, "pictures": [], "log_evidence": None}
    if not isinstance(checkpoint.vae, VAE):
        trust["words"] = "An autoencoder has no posterior, and no density of data, to be tested."
        return trust
    command = f"python -m pyro_vae.diagnose {quote(str(run))}"
    try:
        report = json.loads((run / "diagnostics.json").read_text(encoding="utf-8"))
        findings = [_finding(finding) for finding in report["findings"]]
        words = _in_words(report, findings)
        evidence = report["details"]["log_evidence"]
        state = (report.get("step"), report.get("fingerprint"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return trust | {"words": "Not tested yet. This tests it:", "command": command}
    if state == (checkpoint.history[-1]["step"], checkpoint.fingerprint):
        trust["log_evidence"] = evidence
    else:
        trust["stale"] = (
            "These verdicts are of an earlier state of the run, or of other data than its own. For "
            "those of its best epoch now:"
        )
        trust["command"] = command
    for path in sorted((run / "figures").glob("diagnose_*.png")):
        name = path.stem.removeprefix("diagnose_")
        caption = CAPTIONS.get(name, name)
        with Image.open(path) as image:
            source = _webp(image, 80)
        trust["pictures"].append({"caption": caption, "alt": caption, "src": source})
    order = ["wrong", "doubtful", "sound"]
    findings.sort(key=lambda finding: order.index(finding["verdict"]))
    by_check = {finding["check"]: finding for finding in findings}
    return trust | {"words": words, "findings": findings, "by_check": by_check}


def _finding(finding: dict[str, Any]) -> dict[str, str]:
    """A line of the diagnosis, as the page shows it."""
    if finding["verdict"] not in ("sound", "doubtful", "wrong"):
        raise ValueError(f"expected a verdict; got {finding['verdict']!r}")
    estimate, low, high = (_number(finding[key]) for key in ("estimate", "low", "high"))
    names = ("check", "verdict", "effect", "meaning", "advice")
    shown = {name: str(finding[name]) for name in names}
    return {**shown, "numbers": f"{estimate} [{low}, {high}]", "ideal": f"{finding['ideal']:g}"}


def _in_words(report: dict[str, Any], findings: Sequence[dict[str, str]]) -> str:
    checks: dict[str, list[str]] = {"sound": [], "doubtful": [], "wrong": []}
    for finding in findings:
        checks[finding["verdict"]].append(finding["check"])
    quick = "quickly, on" if report["effort"]["quick"] else "on"
    words = [
        f"{len(findings)} checks were made, {quick} {report['held_out']:,} held-out rows of "
        f"{report['data']} and on rows drawn from the model itself, whose latents are known: "
        + ", ".join(f"{len(names)} {verdict}" for verdict, names in checks.items())
        + "."
    ]
    if checks["wrong"]:
        words.append(f"An error is shown to be large in: {'; '.join(checks['wrong'])}.")
    elif not checks["doubtful"]:
        words.append("Every error that they look for is shown to be small.")
    if not report["complete"]:
        words.append("The diagnosis was interrupted: the checks that follow were not made.")
    return " ".join(words)


def _webp(image: Image.Image, quality: int) -> str:
    """A picture as the data URL of one of a screen's width."""
    picture = image.convert("RGB")
    picture.thumbnail((1400, 1400))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality)
    return data_url(buffer.getvalue(), "image/webp")


def _interactive(
    checkpoint: Checkpoint, splits: Splits, codes: Codes, num_runs: int
) -> tuple[dict[str, Any], str]:
    """What the page's script draws from, and what the explorer shows in words."""
    vae = checkpoint.vae
    found = explore(vae, codes, EXPLORER_BYTES // num_runs)
    more = codes.means.shape[1] > 2
    row = "image" if splits.spec.is_image else "row"
    known = codes.labels is not None
    anchors = tiles(vae, codes.x[found.anchors], found.span)
    interactive = {
        "row": row,
        "classes": list(splits.class_names) if known else [],
        "labels": None if codes.labels is None else codes.labels.tolist(),
        "planes": [
            {
                "title": plane.second.split(" ")[0] if i else "principal components",
                "names": [_plain(plane.first), _plain(plane.second)],
                "points": _rounded(plane.points),
            }
            for i, plane in enumerate(codes.planes)
        ],
        "thumbnails": _thumbnails(vae, codes, num_runs),
        "explorer": {
            "latents": found.latents,
            "grid": [[float(f"{value:.6g}") for value in line] for line in found.grid],
            "anchors": found.anchors,
            "sheets": {" ".join(map(str, k)): data_url(v) for k, v in found.sheets.items()},
            "images": data_url(png(_side_by_side(anchors))),
            "tile": found.tile[:2],
            "codes": _rounded(codes.means[:, found.latents]),
            "more": more,
        },
    }
    side = found.grid.shape[1]
    words = f"Means of p(x|z), decoded in advance at {side} values of each latent"
    if isinstance(vae, Autoencoder):
        words = f"Decoded in advance at {side} values of each latent, over the middle 98% of codes"
    if more and len(found.latents) < codes.means.shape[1]:
        words += f"; offered are the {len(found.latents)} latents whose means vary most"
    if found.reduced:
        words += f"; reduced to {found.tile[1]} × {found.tile[0]} pixels"
    if row == "row":
        words += "; standardized columns from left to right"
    return interactive, words + "."


def _thumbnails(vae: Any, codes: Codes, num_runs: int) -> dict[str, Any] | None:
    """The images behind the dots, on one sheet; None where they would take too much room."""
    if codes.x.ndim != 4:
        return None
    parts = tiles(vae, codes.x, largest=32)
    columns = math.ceil(math.sqrt(len(parts)))
    filled = np.zeros((columns * math.ceil(len(parts) / columns), *parts.shape[1:]), parts.dtype)
    filled[: len(parts)] = parts
    lines = filled.reshape(-1, columns, *parts.shape[1:])
    content = png(np.concatenate([_side_by_side(line) for line in lines]))
    if len(content) > THUMBNAIL_BYTES // num_runs:
        return None
    return {"sheet": data_url(content), "columns": columns, "tile": parts.shape[1:3]}


def _side_by_side(parts: Any) -> Any:
    return np.concatenate(list(parts), axis=1)


def _rounded(points: Any) -> list[list[float]]:
    return [[round(float(value), 3) for value in point] for point in points]


def _plain(text: str) -> str:
    """An axis' label without its mathematics: $z_1$ → z₁."""
    return text.replace("$z_1$", "z₁").replace("$z_2$", "z₂")


def flat(values: dict[str, Any]) -> dict[str, str]:
    """Nested settings → flag → value."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value)
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found[name] = text
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return number(value).replace("-", "−")
