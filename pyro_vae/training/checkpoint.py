"""Checkpoints: files that restore a model, or the state of a training, without running code.

An exported model (`exported`) has the same values in other files, and is restored by the same
checks.

A checkpoint is a dictionary of plain values and tensors, written by `torch.save` and read with
`weights_only=True`. It contains the config and the shape of the data, so it is self-contained, and
a digest of every value, so that damage is noticed.
"""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..config import VERSION, Config, DataConfig, InputError, ModelConfig
from ..config.columns import ColumnKind
from ..config.data import TORCHVISION_CLASSES
from ..config.options import hints_of, shown, structure, typed
from ..data.splits import DataSpec, Splits
from ..models.build import build_blank
from ..models.labels import Model
from ..runtime.memory import check_memory
from ..runtime.randomness import usual_settings
from . import exported
from .records import check_tensor, unpack

FORMAT = "pyro_vae checkpoint"
# Version 1 has no digests.
FORMAT_VERSION = 2

# Fields of `DataSpec` that checkpoints of version 0.1 do not have.
SPEC_OPTIONS = ("columns", "offset", "scale", "missing", "classes")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        vae: the model, on the CPU, in evaluation mode.
        config: the settings of the run, with all defaults filled in.
        fingerprint: digest of the data, see `Splits`.
        training: state for `fit`; None if the file holds only a model.
        history: one metrics dictionary per epoch.
        path: the file.
        model: the settings of `vae`: those in `config` or, after a refit, with another guide.
        refit: one metrics dictionary per record of a refit; empty if the guide is the trained one.
    """

    vae: Model
    config: Config
    fingerprint: str
    training: dict[str, Any] | None
    history: list[dict[str, Any]]
    path: Path
    model: ModelConfig
    refit: list[dict[str, Any]]


def serialize(
    vae: Model,
    config: Config,
    splits: Splits,
    history: list[dict[str, Any]],
    training: dict[str, Any] | None = None,
    model: ModelConfig | None = None,
    refit: Sequence[dict[str, Any]] = (),
) -> bytes:
    """Return the bytes of a checkpoint file.

    `model` and `refit` are those of a refitted model, see `Checkpoint`.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pyro_vae": VERSION,
        "config": config.to_dict(),
        "data": _data(splits.spec, splits.fingerprint),
        "weights": vae.state_dict(),
        "training": training,
        "history": history,
        "model": None if model is None else json.loads(json.dumps(asdict(model))),
        "refit": list(refit),
    }
    buffer = io.BytesIO()
    torch.save({**content, "digests": _digests(_leaves(content))}, buffer)
    return buffer.getvalue()


def export_model(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files model.safetensors and config.json of a model, by name.

    They hold neither the history nor the state of the training. Of the place of the data, they name
    the last part: the path of a machine is of no use on another.
    """
    data = checkpoint.config.data
    named = data.source == "digits" or data.source in TORCHVISION_CLASSES
    source = data.source if named else Path(data.source).name
    config = replace(
        checkpoint.config, data=replace(data, source=source, root=DataConfig.root), device="auto"
    )
    changed = None if checkpoint.model == config.model else asdict(checkpoint.model)
    spec = checkpoint.vae.likelihood_module.spec
    return exported.pack(
        config.to_dict(),
        _data(spec, checkpoint.fingerprint),
        changed,
        checkpoint.vae.state_dict(),
    )


def _data(spec: DataSpec, fingerprint: str) -> dict[str, Any]:
    """The data of a model as plain values."""
    return {
        "shape": list(spec.shape),
        "max_value": spec.max_value,
        "discrete": spec.discrete,
        "fingerprint": fingerprint,
        **{name: getattr(spec, name) for name in SPEC_OPTIONS},
        "kinds": [[kind.name, list(kind.categories)] for kind in spec.kinds],
    }


def load(run: str | Path) -> Model:
    """Load the trained model of a run, or an exported model, on the CPU, in evaluation mode.

    Args:
        run: a run folder, of which the refitted model is loaded or, if there is none, the
            checkpoint with the best validation ELBO; a checkpoint file; or a folder of `export`.

    Raises:
        InputError: there is no run, or the file is damaged, of another program or another version.
    """
    return load_checkpoint(run).vae


def load_checkpoint(run: str | Path, which: str = "final") -> Checkpoint:
    """Load a checkpoint file, a checkpoint of a run folder, or an exported model.

    Args:
        run: the file or the folder.
        which: final: refitted.pt or, if there is none, best.pt. best: best.pt, the trained model.
            last: last.pt, with the state of the training.

    Raises:
        InputError: there is no run, or the file is damaged, of another program or another version.
    """
    path = Path(run)
    is_export = exported.is_export(path)
    if is_export and which != "final":
        raise InputError(
            f"{path} is an exported model, without the state of a training; give the run folder "
            f"that it was exported from"
        )
    if is_export:
        path = path / exported.WEIGHTS
    elif not path.is_file():
        path = _find(path, which)
    with usual_settings():
        content = exported.read(path.parent) if is_export else _read(path)
        try:
            return _restore(content, path)
        except (
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            OverflowError,
            RuntimeError,
        ) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path} is inconsistent: {first_line}. It is damaged, or from another version "
                f"than {VERSION}"
            ) from None


def digest_of(path: Path) -> str:
    """The digest of a checkpoint file, by which `diagnose` tells which it has tested."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _restore(content: dict[str, Any], path: Path) -> Checkpoint:
    """The checkpoint with this content. Sizes are checked before memory is taken."""
    config, data = Config.from_dict(content["config"]), content["data"]
    spec = _spec(data)
    weights, training, history = (content[name] for name in ("weights", "training", "history"))
    changed, refit = content.get("model"), content.get("refit", [])
    model = config.model if changed is None else structure(ModelConfig, changed, "model.")
    blank = build_blank(model, spec, "meta")
    expected = blank.state_dict()
    if set(weights) != set(expected):
        names = ", ".join(sorted(map(str, set(weights) ^ set(expected))))
        raise InputError(f"the weights do not suit the config, in {names}")
    for name, value in expected.items():
        check_tensor(name, weights[name], value.shape, value.dtype)
    if training is not None:
        unpack(training, list(blank.parameters()))
    for lines in (history, refit):
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise InputError("the history expects a list of dictionaries")
    if content["format"] == FORMAT and content["format_version"] > 1:
        _check_digests(content)
    vae = build_blank(model, spec)
    vae.load_state_dict(weights)
    training = tree_map_only(Tensor, Tensor.clone, training)  # out of the mapped file
    return Checkpoint(
        vae.eval(), config, data["fingerprint"], training, history, path, model, refit
    )


def _spec(data: dict[str, Any]) -> DataSpec:
    """The data of a model, from plain values of the right types and ranges."""
    hints = hints_of(DataSpec)
    names = ("shape", "max_value", "discrete", *(name for name in SPEC_OPTIONS if name in data))
    values = {name: typed(data[name], hints[name], f"data.{name}") for name in names}
    kinds = typed(data.get("kinds", []), tuple[tuple[str, tuple[str, ...]], ...], "data.kinds")
    values["kinds"] = tuple(ColumnKind(*kind) for kind in kinds)
    spec = DataSpec(**values)
    sizes = [len(kind.categories) for kind in spec.kinds if kind.name == "categorical"]
    cells = 16 * len(sizes) * max(sizes, default=0)
    check_memory(cells, "the categories of all columns", "use another file")
    if not 0 < len(spec.shape) < 5 or min(spec.shape) < 1:
        raise InputError(f"data.shape expects one to four sizes; got {shown(spec.shape)}")
    if spec.max_value is not None and spec.max_value < 1:
        raise InputError(f"data.max_value expects an integer above 0; got {spec.max_value}")
    if (
        not all(map(math.isfinite, (*(spec.offset or ()), *(spec.scale or ()))))
        or min(spec.scale or (1.0,)) <= 0
    ):
        raise InputError("data.offset and data.scale expect finite numbers, scales above 0")
    return spec


def _find(run: Path, which: str) -> Path:
    if not run.is_dir():
        raise InputError(
            f"expected a run folder, made by python -m pyro_vae.train; no {run} exists"
        )
    names = ["refitted.pt", "best.pt", "last.pt"]
    names = names[["final", "best", "last"].index(which) :]
    for name in names:
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise InputError(
        f"{run} holds no checkpoints/{names[-2:][0]}: it is not a run folder, or the run ended "
        f"before its first checkpoint"
    )


def _read(path: Path) -> dict[str, Any]:
    """Read and verify the dictionary in a checkpoint file.

    Only plain values and tensors are unpickled. The tensors are parts of the file, mapped into
    memory.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        with file, zipfile.ZipFile(file) as archive:
            compressed = [x.filename for x in archive.infolist() if x.compress_type]
            damaged = archive.testzip() if not compressed else compressed[0]
        # torch.load does not verify the archive's checksums. Without mmap, it trusts sizes in it.
        content = None
        if damaged is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kinds of tensors that are refused below
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # on damaged bytes, zipfile, pickle and torch raise errors of any type
        raise InputError(
            f"{path} is not a checkpoint of pyro_vae, or it is damaged; use another checkpoint of "
            f"the run, or train again"
        ) from None
    if damaged is not None:
        raise InputError(f"{path} is damaged: {damaged[:40]!r} in it fails its checksum")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is a file of another program, not a checkpoint of pyro_vae")
    version = content.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise InputError(
            f"{path} was written by pyro_vae {content.get('pyro_vae')} in format {version}; "
            f"this is {VERSION}, which reads formats 1 to {FORMAT_VERSION}. Install that, or train "
            f"again"
        )
    return content


def _check_digests(content: dict[str, Any]) -> None:
    """Check that all values are those that were saved.

    Raises:
        InputError: a value is another, is missing, or has been added.
    """
    expected = content["digests"]
    found = _digests(_leaves({k: v for k, v in content.items() if k != "digests"}), len(expected))
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise InputError(f"{name} is not as it was saved")


def _digests(leaves: Iterable[tuple[str, Any]], limit: int | None = None) -> dict[str, str]:
    """Digests of the first `limit` leaves and one more, by name."""
    one_more = None if limit is None else limit + 1
    return {name: _digest(value) for name, value in islice(leaves, one_more)}


def _digest(value: Any) -> str:
    """A digest of a tensor's dtype, shape and bytes, or of a plain value."""
    if not isinstance(value, Tensor):
        return blake2b(repr(value).encode(), digest_size=16).hexdigest()
    if value.nbytes > value.untyped_storage().nbytes():  # of which a copy could be any size
        raise InputError(f"a tensor of shape {tuple(value.shape)} holds fewer values than that")
    digest = blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=16)
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of all tensors and plain values in nested dictionaries and sequences."""
    if isinstance(tree, dict | list | tuple):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, part in parts:
            yield from _leaves(part, f"{name}/{key}" if name else str(key))
    else:
        yield name, tree
