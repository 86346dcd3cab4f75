"""Export a model: a folder that others can use, without the run and without running its code.

  model.safetensors, config.json   the model, for pyro_vae.load and pyro_vae.from_pretrained
  README.md                        a model card: data, numbers, verdicts of diagnose, licence
  encoder.pt2, decoder.pt2, log_likelihood.pt2, …   programs of torch.export
  encoder.onnx, …                  the same for ONNX, with --onnx

Each program is compared with the model on test rows, and refused if it differs by more than 1e-5.
The commands take the folder in the place of a run.

  python -m pyro_vae.export runs/digits --out digits-vae --license mit
  python -m pyro_vae.export runs/digits/checkpoints/best.pt --out digits-vae --onnx
  python -m pyro_vae.generate digits-vae --out samples.png
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .cli import load_run_data, parse, print_json, run_command
from .config import InputError, auto
from .config.options import check_integer, shown

if TYPE_CHECKING:
    from .data.splits import Splits
    from .evidence.evaluation import Evaluation
    from .models.programs import File
    from .training.checkpoint import Checkpoint

# Test rows of the card's numbers, unless --num-images
EVALUATED = 1000
SPDX = r"[A-Za-z0-9][A-Za-z0-9.+-]*"
PARTS = ("encoder", "decoder", "log_likelihood", "classifier")


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Arguments of `export`.

    Attributes:
        run: Run folder or checkpoint file.
        out: Folder to write.
        onnx: Also write the programs as ONNX.
        weights_only: Write no programs.
        license: Licence of the model, an SPDX identifier such as mit, apache-2.0 or cc-by-4.0.
        data_license: Licence of the data, in words.
        num_samples: Number of importance samples of z per row, for log p(x) in the card.
        num_images: Number of test rows for the numbers in the card.
        data: Place of the run's data, if they have moved.
        data_root: Folder of torchvision's data sets.
        overwrite: Replace an exported model in --out. Other files there stay.
        json: Print sizes, differences and numbers as JSON.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path
    onnx: bool = False
    weights_only: bool = False
    license: Annotated[str | None, auto("SPDX", "not stated")] = None
    data_license: Annotated[str | None, auto("TEXT", "not stated")] = None
    num_samples: int = 100
    num_images: Annotated[int | None, auto("INT", f"at most {EVALUATED:,}")] = None
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    overwrite: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        check_integer("num-samples", self.num_samples)
        check_integer("num-images", self.num_images)
        if self.license is not None and not re.fullmatch(SPDX, self.license):
            raise InputError(
                f"--license expects an SPDX identifier, such as mit or cc-by-4.0; got "
                f"{shown(self.license)}"
            )
        if self.weights_only and self.onnx:
            raise InputError("--onnx has no effect on --weights-only; drop one")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(ExportArguments, argv, "export", __doc__)))


def _main(arguments: ExportArguments) -> None:
    from .models.programs import require_onnx
    from .page.card import Licences, card
    from .page.verdicts import trust_of
    from .runtime.files import write_together
    from .training.checkpoint import export_model, load_checkpoint
    from .training.exported import CARD

    run, out = arguments.run, arguments.out
    _check_place(out, arguments.overwrite)
    if arguments.onnx:
        require_onnx()
        logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)  # what it leaves out
    checkpoint = load_checkpoint(run)
    splits = _data(arguments, checkpoint)
    files = [] if arguments.weights_only else _programs(checkpoint, splits, arguments.onnx)
    evaluation = _evaluate(arguments, checkpoint, splits)
    contents = export_model(checkpoint)
    sizes = {name: len(content) for name, content in contents.items()}
    folder = run.parent.parent if run.is_file() else run
    trust = trust_of(folder, checkpoint)
    licences = Licences(arguments.license, arguments.data_license)
    text = card(out.resolve().name, checkpoint, splits, trust, evaluation, files, sizes, licences)
    contents |= {file.name: file.content for file in files} | {CARD: text.encode()}
    out.mkdir(parents=True, exist_ok=True)
    write_together(out, contents)
    for name in _stale(out, contents):
        (out / name).unlink()
    diagnosed = bool(trust.findings) and not trust.stale
    if arguments.json:
        print_json(_values(out, contents, files, evaluation, trust if diagnosed else None))
    else:
        _show(out, contents, files, diagnosed, licences.model)


def _check_place(out: Path, overwrite: bool) -> None:
    """Check that a model can be exported to a folder, before any work is done.

    Raises:
        InputError: it is a file, or holds anything else, or a model and `overwrite` is false.
    """
    from .training.exported import is_export

    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"--out expects a folder; {out} is a file")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--out {out} exists and is not empty; give another, or --overwrite")
    if not is_export(out):
        raise InputError(f"--overwrite replaces exported models only; {out} holds none")


def _data(arguments: ExportArguments, checkpoint: Checkpoint) -> Splits:
    """The data of the run.

    Raises:
        InputError: they are missing or have changed, or there are too few test rows.
    """
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root)
    if splits.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"--data expects the data of the run, whose test rows the model is checked on; "
            f"{arguments.data} holds others"
        )
    if arguments.num_images is not None and arguments.num_images > len(splits.test):
        raise InputError(
            f"--num-images expects at most {len(splits.test)}, the rows of the test split; got "
            f"{arguments.num_images}"
        )
    return splits


def _programs(checkpoint: Checkpoint, splits: Splits, onnx: bool) -> list[File]:
    """The parts of the model in files, compared with it on the first test rows."""
    from tqdm import tqdm

    from .models.programs import ROWS, example_rows, parts, program_files

    vae, seed = checkpoint.vae, checkpoint.config.seed
    files: list[File] = []
    x, y = next(splits.test.fixed_with_labels(vae.likelihood_module.units, seed, ROWS))
    found = parts(vae)
    with tqdm(total=len(found), unit="part", disable=None) as bar:
        rows = example_rows(vae, x, y, seed)
        for name, part in found.items():
            bar.set_description(name)
            files += program_files(name, part, rows, onnx)
            bar.update()
    return files


def _evaluate(arguments: ExportArguments, checkpoint: Checkpoint, splits: Splits) -> Evaluation:
    from tqdm import tqdm

    from .evidence.evaluation import evaluate, num_pairs

    count = arguments.num_images or min(EVALUATED, len(splits.test))
    vae, seed = checkpoint.vae, checkpoint.config.seed
    num_samples = arguments.num_samples
    total = num_pairs(vae, count, num_samples)
    with tqdm(total=total, unit="sample", unit_scale=True, disable=None) as bar:
        return evaluate(vae, splits.test, num_samples, count, seed, on_chunk=bar.update)


def _stale(out: Path, contents: dict[str, bytes]) -> list[str]:
    """Programs of an earlier export that this one does not have."""
    names = [f"{part}.{ending}" for part in PARTS for ending in ("pt2", "onnx")]
    return [name for name in names if name not in contents and (out / name).is_file()]


def _show(
    out: Path,
    contents: dict[str, bytes],
    files: Sequence[File],
    diagnosed: bool,
    license: str | None,
) -> None:
    differences = {file.name: file.difference for file in files}
    print(f"{out}: {sum(map(len, contents.values())):,} bytes")
    for name, content in contents.items():
        text = f"  {name:<22}{len(content):>12,} bytes"
        if name in differences:
            text += f"   differs from the model by {differences[name]:.1e} at most"
        print(text)
    if files and not any(file.name.startswith("encoder.") for file in files):
        print("no encoder program: the guide is refined; checkpoints/best.pt has a trained one")
    if not diagnosed:
        print("the card says that the model is not diagnosed: run pyro_vae.diagnose first")
    if license is None:
        print("the card says that no licence is stated: give --license")


def _values(
    out: Path,
    contents: dict[str, bytes],
    files: Sequence[File],
    evaluation: Evaluation,
    trust: Any,
) -> dict[str, Any]:
    """The contents of --json."""
    verdicts = None if trust is None else {f.check: f.verdict for f in trust.findings}
    return {
        "folder": str(out),
        "bytes": {name: len(content) for name, content in contents.items()},
        "differences": {file.name: file.difference for file in files},
        "evaluation": asdict(evaluation),
        "verdicts": verdicts,
    }


if __name__ == "__main__":
    sys.exit(main())
