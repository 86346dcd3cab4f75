"""The contents of a run's page, as plain values for `render.py`."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ..config import read_config
from ..data.images import UNREADABLE
from ..data.splits import Splits
from ..evidence.evaluation import ACTIVE_VARIANCE
from ..models.autoencoder import Autoencoder
from ..models.labels import ConditionalVAE, Model
from ..plots import from_model as gallery
from ..plots import run as figures
from ..plots.codes import Codes
from ..training.checkpoint import Checkpoint
from .explorer import Explorer, explore, interactive
from .render import data_url
from .verdicts import Trust, number_text, trust_of

# Limits for all runs on a page: the explorers' sheets, and the text of each picture. With the
# thumbnails, and the third that base64 adds, the page stays below 5 MB.
EXPLORER_BYTES = 1_500_000
PICTURE_BYTES = 400_000

# Captions of the pictures; {} is the word for a datum.
PICTURES = {
    "reconstructions": "Validation {0}s and their reconstructions by the best epoch",
    "samples": "Samples: means of p(x|z) at draws of z from the prior",
    "interpolations": "Interpolations: decoded lines between the codes of pairs of test {0}s",
}

# The figures of `diagnose` and their captions.
CAPTIONS = {
    "weights": "Pareto k̂ of the importance weights of held-out rows",
    "latents": "KL and variance of posterior means of each latent",
    "columns": "Distribution of each column in held-out rows and in draws from the model",
    "predictive": "Statistics of held-out rows and of their replicates from the model",
    "gaps": "Inference gaps: amortization, correlation, remainder",
    "ranks": "Ranks of the truth among draws from q(z|x), uniform if the guide is exact",
    "ecdf": "Distribution function of these ranks minus the uniform one, with its band",
    "coverage": "Share of truths inside regions of q(z|x), against their nominal probability",
    "recovery": "True latents against posterior means",
    "contraction": "Posterior contraction and z-scores of the truth",
    "labels": "Randomized transform of the true labels under q(y|x), uniform if it is exact",
    "bounds": "Lower and upper bounds of log p(x) on simulated rows",
    "nuts": "q(z|x) and NUTS on the same rows",
    "aggregate": "Aggregate posterior and prior",
    "worst_rows": "Rows with the worst Pareto k̂ or amortization gap, beside their reconstructions",
}


@dataclass(frozen=True)
class Picture:
    """A picture: the text of an SVG or, if that is empty, an image's URL; neither if it is missing.

    Its alternative text is the caption, unless `alt` is given.
    """

    caption: str
    svg: str = ""
    src: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Overview:
    """The contents of a run's page.

    Attributes:
        path: the run's folder.
        row: the word for a datum.
        sentence: model, data and objective in words.
        numbers: label → number and remark.
        curves, history: the ELBO and its terms by epoch, drawn and as lines of metrics.jsonl.
        interactive: data of the explorer and the scatter plot, which the words describe.
        settings, asked: flag → value, as resolved and as given.
        fingerprint: of the data.
        validation: the rows of the validation split.
        origin, command: the checkpoint, and the command that trains the run again.
        name: the run's title on its page.
    """

    path: Path
    row: str
    sentence: str
    numbers: dict[str, tuple[str, str]]
    trust: Trust
    pictures: list[Picture]
    curves: Picture
    history: list[dict[str, Any]]
    scatter_words: str
    explorer_words: str
    interactive: dict[str, Any]
    settings: dict[str, str]
    asked: dict[str, str]
    fingerprint: str
    validation: bytes
    origin: str
    command: str
    name: str = ""


def overview(
    run: Path, checkpoint: Checkpoint, splits: Splits, codes: Codes, num_runs: int
) -> Overview:
    """Compute and draw the contents of a run's page.

    Args:
        run: the run's folder.
        checkpoint: its best.
        splits: the data it was trained on.
        codes: `latent_codes` of both.
        num_runs: number of runs on the page.

    Raises:
        InputError: the run's config.json cannot be read.
    """
    vae, config, best = checkpoint.vae, checkpoint.config, checkpoint.history[-1]
    history = _history(run, checkpoint.history)
    drawn = gallery.run_figures(vae, splits, history, config.seed)
    drawn["reconstructions"] = gallery.reconstructions(vae, splits, best["epoch"], config.seed)
    for figure in drawn.values():
        figure.suptitle("")  # the page has captions
    trust = trust_of(run, checkpoint)
    trust = dataclasses.replace(trust, pictures=_diagnostic_pictures(run) if trust.findings else ())
    explorer = explore(vae, codes, EXPLORER_BYTES // num_runs)
    return Overview(
        path=run,
        row=splits.spec.row,
        sentence=sentence(checkpoint, splits),
        numbers=_numbers(checkpoint, history, codes, trust),
        trust=trust,
        pictures=_pictures(drawn, splits.spec.row, num_runs),
        curves=_curves(drawn["elbo"], history, best, splits.spec.row),
        history=history,
        scatter_words=f"{codes.title[0].upper()}{codes.title[1:]}.",
        explorer_words=_explorer_words(explorer, vae, codes),
        interactive=interactive(explorer, vae, splits, codes, num_runs),
        settings=flat(config.to_dict()),
        asked=flat(read_config(run / "config.json").to_dict()),
        fingerprint=checkpoint.fingerprint,
        validation=splits.validation.rows.numpy().tobytes(),
        origin=f"Model of {checkpoint.path}, epoch {best['epoch']}. To train it again:",
        command=f"python -m pyro_vae.train --config {quote(str(run / 'config.json'))}",
    )


def flat(values: dict[str, Any]) -> dict[str, str]:
    """Nested settings → flag → value."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "family" in value:
            options = [f"{key}={option}" for key, option in value.items() if key != "family"]
            found[name] = " ".join([value["family"], *options])
        elif name == "columns" and isinstance(value, dict):
            kinds = {k: v["kind"] if isinstance(v, dict) else v for k, v in value.items()}
            found[name] = " ".join(f"{column}={kind}" for column, kind in kinds.items())
        elif isinstance(value, dict):
            found |= flat(value)
        else:
            found[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def flag(name: str) -> str:
    """The flag of a setting in `flat`."""
    flags = {"source": "data", "root": "data-root", "kind": "model"}
    return f"--{flags.get(name, name.replace('_', '-'))}"


def _history(run: Path, best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or, if they cannot be read, those in the best checkpoint."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return best
    names = best[-1].keys()
    whole = all(isinstance(line, dict) and line.keys() == names for line in lines)
    return lines if whole and lines[: len(best)] == best else best


def sentence(checkpoint: Checkpoint, splits: Splits) -> str:
    model, fit = checkpoint.config.model, checkpoint.config.fit
    is_vae = not isinstance(checkpoint.vae, Autoencoder)
    kind = "A variational autoencoder" if is_vae else "An autoencoder"
    sizes = " ".join(map(str, model.hidden or ()))
    particles = f" with {fit.num_particles} particles" if fit.num_particles > 1 else ""
    labels = ""
    if isinstance(checkpoint.vae, ConditionalVAE):
        how = "given" if model.condition == "label" else "inferred where it is not known"
        labels = f" and a label of {checkpoint.vae.num_classes} classes, {how}"
    objective = f" by the objective {fit.objective}{particles}" if is_vae else ""
    shape = "×".join(map(str, splits.spec.shape))
    return (
        f"{kind} of {model.latent_dim} latents{labels} ({model.architecture} {sizes}, "
        f"{model.likelihood} likelihood), trained on {len(splits.train):,} rows of "
        f"{splits.name}, {shape},{objective}; epoch chosen on {len(splits.validation):,} rows."
    )


def _numbers(
    checkpoint: Checkpoint, history: Sequence[dict[str, Any]], codes: Codes, trust: Trust
) -> dict[str, tuple[str, str]]:
    """Label → the number and a remark."""
    best, last = checkpoint.history[-1], history[-1]
    densities = {
        "ELBO, validation": best["validation_elbo"],
        "Reconstruction, validation": best["validation_reconstruction"],
        "KL, validation": best["validation_kl"],
        "log p(x), held out": trust.log_evidence,
    }
    found = {k: (number_text(v), "nats per row") for k, v in densities.items() if v is not None}
    if best["kl"] is not None:
        active = int((codes.means.var(0, ddof=1) > ACTIVE_VARIANCE).sum())
        found["Active latents"] = (f"{active} of {codes.means.shape[1]}", "whose means vary")
    if "validation_accuracy" in best:
        found["Accuracy, validation"] = (number_text(best["validation_accuracy"]), "of q(y|x)")
    found["Best epoch"] = (f"{best['epoch']} of {len(history)}", "by validation")
    seconds = last["seconds"]
    time = f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
    found["Training"] = (time, f"at {last['images_per_second']:,.0f} rows per second")
    count = sum(p.numel() for p in checkpoint.vae.parameters())
    found["Parameters"] = (f"{count:,}", "encoder and decoder")
    return found


def _pictures(drawn: dict[str, Figure], row: str, num_runs: int) -> list[Picture]:
    """Figures as SVG, or as WebP if the SVG would be too large."""
    pictures = []
    for name, caption in PICTURES.items():
        if name not in drawn:
            continue
        svg, src = figures.svg(drawn[name]), ""
        if len(svg) > PICTURE_BYTES // num_runs:
            buffer = io.BytesIO()
            drawn[name].savefig(buffer, format="png", dpi=110)
            svg, src = "", _webp(Image.open(buffer), 60)
        pictures.append(Picture(caption.format(row), svg, src))
    return pictures


def _curves(
    figure: Figure, history: Sequence[dict[str, Any]], best: dict[str, Any], row: str
) -> Picture:
    term, name = ("reconstruction",) * 2 if best["kl"] is None else ("ELBO", "elbo")
    value = f"{term} {best[f'validation_{name}']:.2f} nats per {row}"
    alt = f"Curves over {len(history)} epochs; best epoch {best['epoch']}, {value}"
    return Picture(f"By epoch, training and validation {row}s", figures.svg(figure), alt=alt)


def _webp(image: Image.Image, quality: int) -> str:
    """The data URL of a picture, reduced to the width of a screen."""
    picture = image.convert("RGB")
    picture.thumbnail((1400, 1400))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality)
    return data_url(buffer.getvalue(), "image/webp")


def _diagnostic_pictures(run: Path) -> list[Picture]:
    """The figures of `diagnose`."""
    pictures = []
    for path in sorted((run / "figures").glob("diagnose_*.png")):
        name = path.stem.removeprefix("diagnose_")
        caption, src = CAPTIONS.get(name, name), ""
        try:
            with Image.open(path) as image:
                src = _webp(image, 80)
        except UNREADABLE as error:
            caption = f"{caption} (missing: {path.name} cannot be read, {error})"
        pictures.append(Picture(caption, src=src))
    return pictures


def _explorer_words(found: Explorer, vae: Model, codes: Codes) -> str:
    side, latent_dim = found.grid.shape[1], codes.means.shape[1]
    words = f"Means of p(x|z), decoded in advance at {side} values of each latent"
    if isinstance(vae, Autoencoder):
        words = f"Decoded in advance at {side} values of each latent, over the middle 98% of codes"
    if len(found.latents) < latent_dim:
        words += f", for the {len(found.latents)} latents whose means vary most"
    if found.reduced:
        words += f"; reduced to {found.tile[1]} × {found.tile[0]} pixels"
    words += {
        1: "; standardized columns from left to right",
        2: "; standardized channels over time",
        4: "; the middle slice of each",
    }.get(codes.x.ndim - 1, "")
    return words + "."
