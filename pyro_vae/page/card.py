"""The model card of an exported model: README.md, with the metadata that model hubs read.

Every number in it comes from the arguments: what is not known, the card says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import VERSION
from ..data.splits import DataSpec, Splits, Units
from ..evidence.evaluation import Evaluation
from ..models.autoencoder import Autoencoder
from ..models.labels import ConditionalVAE, SemiSupervisedVAE
from ..models.priors import Vamp
from ..models.programs import OPSET, ROWS, TOLERANCE, File
from ..models.refined import Refined
from ..runtime.files import printable
from ..training.checkpoint import Checkpoint
from .summary import flat, sentence
from .verdicts import Trust

# Settings of a machine, of no meaning elsewhere
LOCAL = ("root", "device")


@dataclass(frozen=True)
class Licences:
    """SPDX identifier of the model's licence, and the licence of the data in words, if given."""

    model: str | None = None
    data: str | None = None


def card(
    name: str,
    checkpoint: Checkpoint,
    splits: Splits,
    trust: Trust,
    evaluation: Evaluation,
    files: Sequence[File],
    sizes: dict[str, int],
    licences: Licences,
) -> str:
    """The text of a model card.

    Args:
        name: title of the card.
        checkpoint, splits: the model and the data it was trained on.
        trust: the verdicts of `diagnose`, see `verdicts.trust_of`.
        evaluation: on rows of the test split.
        files: the programs.
        sizes: bytes of the other files, by name.
        licences: of model and data.
    """
    sections = {
        "Use": _use(checkpoint.vae),
        "Is the posterior right?": _verdicts(trust),
        "Numbers": _numbers(evaluation, checkpoint, splits),
        "Files": _files(checkpoint.vae, files, sizes),
        "Data": _data(splits, checkpoint, licences),
        "Training": _training(checkpoint),
        "Limits": _limits(checkpoint.vae, splits.spec),
        "Licence": _licence(licences),
    }
    tags = "\n".join(f"- {tag}" for tag in ("variational-autoencoder", "pyro", "pytorch"))
    licence = f"license: {licences.model.lower()}\n" if licences.model else ""
    head = f"---\n{licence}library_name: pyro-vae\ntags:\n{tags}\n---\n"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{head}\n# {_plain(name)}\n\n{_plain(sentence(checkpoint, splits))}\n\n{body}\n"


def describe_x(spec: DataSpec, units: Units) -> str:
    """How x, the input of a model, follows from the stored values of the data."""
    how = "the value itself"
    if units == "binary":
        how = "0 or 1"
        if not spec.is_binary:
            how += f", drawn with probability value / {spec.max_value} of 1"
    elif units == "count":
        how = f"the value itself, an integer from 0 to {spec.max_value}"
    elif spec.describe_units():
        how = f"computed in float64 by {spec.describe_units()}"
    elif spec.kinds:
        how = (
            "the value itself; of a category its code, the place of its name in `data.kinds` of "
            "`config.json`, from 0"
        )
    elif spec.max_value not in (None, 1):
        how = f"value / {spec.max_value}, from 0 to 1"
    missing = "; NaN marks a missing value" if spec.missing else ""
    return f"x has the shape {_shape(spec.shape)}, float32: {how}{missing}."


def _use(vae: Any) -> str:
    lines = ["import pyro_vae", "", 'vae = pyro_vae.load("FOLDER")  # the folder of this card']
    lines.append('# or: vae = pyro_vae.from_pretrained("USER/NAME"), from a hub')
    if isinstance(vae, ConditionalVAE):
        lines.append(f"vae = vae.given({vae.class_names[0]!r})  # at one of the labels below")
    if isinstance(vae, Autoencoder):
        lines += ["codes = vae.posterior(x).mean", "x = vae.likelihood(codes).mean"]
    else:
        lines += [
            "z = vae.prior().sample((16,))  # p(z)",
            "x = vae.likelihood(z).mean  # p(x|z)",
            "q = vae.posterior(x)  # q(z|x)",
        ]
    likelihood = vae.likelihood_module
    return _code("python", lines) + "\n\n" + describe_x(likelihood.spec, likelihood.units)


def _verdicts(trust: Trust) -> str:
    """The verdicts in a table. Those on another state of the run do not count."""
    if trust.stale or trust.command:
        text = "Not diagnosed. Whether q(z|x) is close to p(z|x) is not known. With the data:"
        return f"{text}\n\n" + _code("sh", ["python -m pyro_vae.diagnose FOLDER --data DATA"])
    if not trust.findings:
        return trust.words
    rows = [[f.check, f.verdict, f.numbers, f.ideal, _plain(f.effect)] for f in trust.findings]
    head = ["check", "verdict", "size [95% interval]", "ideal", "the size is"]
    return f"{_plain(trust.words)}\n\n{_table(head, rows)}"


def _numbers(evaluation: Evaluation, checkpoint: Checkpoint, splits: Splits) -> str:
    found, given = evaluation, checkpoint.model.condition == "label"
    words = f"{found.num_images:,} of {len(splits.test):,} test rows of {_plain(splits.name)}"
    if found.binarization != "none":
        words += f", binarized once ({found.binarization})"
    if given:
        words += "; densities given the label of each row"
    remark = f"{found.num_samples or 0:,} importance samples per row"
    if found.standard_error is not None:
        remark += f"; standard error {found.standard_error:.3g} over rows"
    lines = {
        "ELBO": (found.elbo, "nats per row"),
        "log p(x)": (found.log_evidence, f"nats per row; {remark}"),
        "reconstruction": (found.reconstruction, "nats per row"),
        "KL(q(z|x) ‖ p(z))": (found.kl, "nats per row"),
        "unreliable importance weights": (found.unreliable_weights, "share of rows"),
        "bits per dimension": (found.bits_per_dim, "from log p(x)"),
        "active units": (found.active_units, f"of {checkpoint.model.latent_dim} latents"),
    }
    if found.accuracies is not None:
        lines["accuracy of q(y|x)"] = (found.accuracies.accuracy, "share of rows with a label")
    rows = [[k.replace("|", "\\|"), f"{v:.4g}", r] for k, (v, r) in lines.items() if v is not None]
    return f"{words}.\n\n{_table(['number', 'value', ''], rows)}"


def _files(vae: Any, files: Sequence[File], sizes: dict[str, int]) -> str:
    """Sizes, inputs and outputs of the files, and how far programs are from the model."""
    rows = [[f"`{name}`", f"{size:,}", "", "", ""] for name, size in sizes.items()]
    for file in files:
        inputs = ", ".join(
            f"{name} {_shape(shape)} {str(dtype).removeprefix('torch.')}"
            for name, (shape, dtype) in file.part.inputs.items()
        )
        outputs = ", ".join(file.part.outputs)
        size = f"{len(file.content):,}"
        rows.append([f"`{file.name}`", size, inputs, outputs, f"{file.difference:.1e}"])
    text = _table(["file", "bytes", "inputs", "outputs", "difference"], rows)
    if not files:
        return text
    text += (
        f"\n\nB is any number of rows. Log-densities are in nats per row. The difference is the "
        f"largest one from the model on at most {ROWS} test rows, relative to max(unit, value); it "
        f"was required to be at most {TOLERANCE:g}. The unit is 1 for parameters of q(z\\|x), "
        f"latents and probabilities, the standard deviation of the data for means of p(x\\|z), and "
        f"1 nat for each value of a row for log-densities. Files `.onnx` have opset {OPSET}. "
        f"`torch.export.load` unpickles parts of a `.pt2` file, which may run code: open only "
        f"files that you trust. `pyro_vae.load` opens neither."
    )
    if isinstance(getattr(vae, "family", None), Refined):
        text += f"\n\n{NO_ENCODER}"
    return text


NO_ENCODER = (
    "There is no encoder program: the guide is refined, a search for each row that depends on the "
    "model. `pyro_vae.load` makes it. The encoder as it was trained is in `checkpoints/best.pt` of "
    "the run, which `export` takes too."
)


def _data(splits: Splits, checkpoint: Checkpoint, licences: Licences) -> str:
    sizes = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    lines = [
        f"- Name: {_plain(splits.name)}",
        f"- Rows: {sizes['train']:,} training, {sizes['validation']:,} validation, "
        f"{sizes['test']:,} test; split by the seed {checkpoint.config.seed}",
        f"- Values: {_plain(splits.describe())}",
        f"- Digest: `{checkpoint.fingerprint}`",
        f"- Licence: {_plain(licences.data) if licences.data else 'not stated'}",
    ]
    vae = checkpoint.vae
    if isinstance(vae, ConditionalVAE):
        shares = vae.label_logits.softmax(-1).tolist()
        pairs = zip(vae.class_names, shares, strict=True)
        classes = ", ".join(f"{i}: {_plain(n)} ({p:.3g})" for i, (n, p) in enumerate(pairs))
        lines.append(f"- Labels y, with their shares: {classes}")
    return "\n".join(lines)


def _training(checkpoint: Checkpoint) -> str:
    values = checkpoint.config.to_dict()
    settings = {k: v for k, v in flat(values).items() if v != "None" and k not in LOCAL}
    settings["source"] = settings["source"].rstrip("/").rpartition("/")[2]
    rows = [[f"`{name}`", f"`{_plain(value)}`"] for name, value in settings.items()]
    text = _table(["setting", "value"], rows)
    if checkpoint.refit:
        guide = checkpoint.model.guide.family
        text += f"\n\nThe guide was refitted after the training (`{guide}`), the model held fixed."
    return f"Exported with pyro_vae {VERSION}.\n\n{text}"


def _limits(vae: Any, spec: DataSpec) -> str:
    lines = [
        "- The model describes rows like those of the training split. Of other rows, its densities "
        "and codes mean little."
    ]
    if isinstance(getattr(vae, "prior_module", None), Vamp):
        lines.append(
            "- The pseudo-inputs of the prior started as training rows, and may resemble them."
        )
    if isinstance(vae, SemiSupervisedVAE):
        lines.append("- Labels are inferred, and may be wrong; see the accuracy above.")
    if spec.columns or spec.classes:
        lines.append("- `config.json` holds the names of columns, categories and classes.")
    return "\n".join(lines)


def _licence(licences: Licences) -> str:
    if licences.model:
        return f"Of the weights and the other files in this folder: {licences.model}."
    return "Not stated. Without a licence, nobody but its authors may copy or change the model."


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, ('B', *shape)))})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _plain(text: str) -> str:
    """User-supplied text on one line, without the signs of Markdown and HTML."""
    return "".join(f"\\{c}" if c in "\\`*[]<>|#" else c for c in printable(text))
