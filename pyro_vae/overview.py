"""What there is to say and show of a run, as plain values for `page.py`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import figures, gallery
from .autoencoder import Autoencoder
from .checkpoint import Checkpoint
from .config import read_config
from .data import Splits
from .diagnostics import ACTIVE_VARIANCE
from .explorer import explore, png, tiles
from .gallery import Codes
from .page import data_url
from .vae import VAE

__all__ = ["flat", "overview"]

# Bytes that the sheets of all explorers may take, and those of the hovering thumbnails; the page
# stays below 5 MB with the third more that base64 takes.
EXPLORER_BYTES = 1_800_000
THUMBNAIL_BYTES = 600_000

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
            drawn[name].suptitle("")
            svg = figures.svg(drawn[name], f"{run}/{name}")
            pictures.append({"caption": caption, "svg": svg, "alt": alt})
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
        "curves": figures.svg(drawn["elbo"], f"{run}/elbo"),
        "curves_alt": f"Curves over {len(whole)} epochs; best epoch {best['epoch']}, "
        f"{'ELBO' if best['kl'] is not None else 'reconstruction'} {best[key]:.2f} nats per {row}",
        "history": whole,
        "scatter_words": f"{codes.title[0].upper()}{codes.title[1:]}.",
        "explorer_words": explorer_words,
        "interactive": interactive,
        "settings": flat(config.to_dict()),
        "asked": flat(read_config(run / "config.json").to_dict()),
        "fingerprint": checkpoint.fingerprint,
        "origin": f"Model of {checkpoint.path}, epoch {best['epoch']}; the same again: "
        f"python -m pyro_vae.train --config {run / 'config.json'}",
    }


def _history(run: Path, best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; where they cannot be read, those in the best checkpoint."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return best
    return lines if lines[: len(best)] == best else best


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
        f"likelihood), trained on {len(splits.train):,} rows of {splits.name}, {shape}"
        f"{objective}; {len(splits.validation):,} rows chose the epoch."
    )


def _numbers(
    checkpoint: Checkpoint,
    history: Sequence[dict[str, Any]],
    codes: Codes,
    trust: dict[str, Any],
) -> dict[str, tuple[str, str]]:
    """Label → the number and a remark."""
    best, details = checkpoint.history[-1], trust["details"]
    found = {}
    names = {"ELBO": "elbo", "Reconstruction": "reconstruction", "KL": "kl"}
    for label, name in names.items():
        value = best[f"validation_{name}"]
        if value is not None:
            found[label] = (_number(value), "nats, validation rows")
    if details.get("log_evidence") is not None:
        remark = f"nats, {trust['held_out']:,} held-out rows"
        found["log p(x)"] = (_number(details["log_evidence"]), remark)
    if best["kl"] is not None:
        active = int((codes.means.var(0, ddof=1) > ACTIVE_VARIANCE).sum())
        found["Active latents"] = (str(active), f"of {codes.means.shape[1]}: their means move")
    found["Best epoch"] = (str(best["epoch"]), f"of {len(history)}")
    seconds = history[-1]["seconds"]
    time = f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
    found["Training"] = (time, f"at {history[-1]['images_per_second']:,.0f} rows a second")
    count = sum(p.numel() for p in checkpoint.vae.parameters())
    found["Parameters"] = (f"{count:,}", "encoder and decoder")
    return found


def _trust(run: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The verdicts of `diagnose` in plain words."""
    trust: dict[str, Any] = dict.fromkeys(("command", "stale"), "")
    trust |= {"findings": [], "by_check": {}, "pictures": [], "details": {}, "held_out": 0}
    if not isinstance(checkpoint.vae, VAE):
        trust["words"] = "An autoencoder has no posterior, and no density of data, to be tested."
        return trust
    try:
        report = json.loads((run / "diagnostics.json").read_text(encoding="utf-8"))
        order = ["wrong", "doubtful", "sound"]
        findings = sorted(report["findings"], key=lambda f: order.index(f["verdict"]))
        counts = {}
        for verdict in reversed(order):
            counts[verdict] = [f["check"] for f in findings if f["verdict"] == verdict]
        trust["details"], trust["held_out"] = report["details"], report["held_out"]
        for finding in findings:
            estimate, low, high = (_number(finding[key]) for key in ("estimate", "low", "high"))
            numbers = f"{estimate} [{low}, {high}]"
            shown = {**finding, "numbers": numbers, "ideal": f"{finding['ideal']:g}"}
            trust["findings"].append(shown)
            trust["by_check"][finding["check"]] = shown
    except (OSError, ValueError, KeyError, TypeError):
        trust["words"] = "Not tested yet. This tests it, then write the report again:"
        trust["command"] = f"python -m pyro_vae.diagnose {run}"
        return trust
    quick = "quickly, on" if report["effort"]["quick"] else "on"
    words = [
        f"{len(findings)} checks were made, {quick} {report['held_out']:,} held-out rows of "
        f"{report['data']} and on rows drawn from the model itself, whose latents are known: "
        + ", ".join(f"{len(checks)} {verdict}" for verdict, checks in counts.items())
        + "."
    ]
    if counts["wrong"]:
        words.append(f"An error is shown to be large in: {'; '.join(counts['wrong'])}.")
    if counts["doubtful"]:
        words.append(f"Neither shown small nor large: {'; '.join(counts['doubtful'])}.")
    if not counts["wrong"] and not counts["doubtful"]:
        words.append("Every error that they look for is shown to be small.")
    if not report["complete"]:
        words.append("The diagnosis was interrupted: the checks that follow were not made.")
    trust["words"] = " ".join(words)
    if report.get("step") != checkpoint.history[-1]["step"]:
        trust["stale"] = (
            f"These verdicts are of an earlier state of the run; for those of its best epoch now, "
            f"run python -m pyro_vae.diagnose {run} again."
        )
    for path in sorted((run / "figures").glob("diagnose_*.png")):
        name = path.stem.removeprefix("diagnose_")
        caption = CAPTIONS.get(name, name)
        trust["pictures"].append({"caption": caption, "alt": caption, "src": _picture(path)})
    return trust


def _picture(path: Path) -> str:
    """A PNG file as the data URL of a WebP picture of a screen's width."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
        picture.thumbnail((1400, 1400))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=80)
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
            "tile": found.tile,
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
    return (f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}").replace("-", "−")
