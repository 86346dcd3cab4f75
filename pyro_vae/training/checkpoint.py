"""Checkpoints: files that restore a model, or the state of a training, without running code.

A checkpoint is a dictionary of plain values and tensors, written by `torch.save` and read with
`weights_only=True`. It contains the config and the shape of the data, so it is self-contained.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import VERSION, Config, InputError
from ..data.splits import DataSpec, Splits
from ..models.autoencoder import Autoencoder
from ..models.build import build_blank
from ..models.vae import VAE

FORMAT = "pyro_vae checkpoint"
FORMAT_VERSION = 1

# Fields of `DataSpec` that checkpoints of version 0.1 do not have.
SPEC_OPTIONS = ("columns", "offset", "scale")


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
    """

    vae: VAE | Autoencoder
    config: Config
    fingerprint: str
    training: dict[str, Any] | None
    history: list[dict[str, Any]]
    path: Path


def serialize(
    vae: VAE | Autoencoder,
    config: Config,
    splits: Splits,
    history: list[dict[str, Any]],
    training: dict[str, Any] | None = None,
) -> bytes:
    """Return the bytes of a checkpoint file."""
    spec = splits.spec
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "pyro_vae": VERSION,
            "config": config.to_dict(),
            "data": {
                "shape": list(spec.shape),
                "max_value": spec.max_value,
                "discrete": spec.discrete,
                "fingerprint": splits.fingerprint,
                **{name: getattr(spec, name) for name in SPEC_OPTIONS},
            },
            "weights": vae.state_dict(),
            "training": training,
            "history": history,
        },
        buffer,
    )
    return buffer.getvalue()


def load(run: str | Path) -> VAE | Autoencoder:
    """Load the trained model of a run, on the CPU, in evaluation mode.

    Args:
        run: a run folder, whose checkpoint with the best validation ELBO is loaded, or a checkpoint
            file.

    Raises:
        InputError: there is no run, or the file is damaged, of another program or another version.
    """
    return load_checkpoint(run).vae


def load_checkpoint(run: str | Path, which: str = "best") -> Checkpoint:
    """Load a checkpoint file, or a run folder's checkpoint `which`: best or last.

    Raises:
        InputError: there is no run, or the file is damaged, of another program or another version.
    """
    path = Path(run)
    if not path.is_file():
        path = _find(path, which)
    content = _read(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} was written by pyro_vae {content.get('pyro_vae')} in format {version}; this "
            f"is {VERSION}, which reads format {FORMAT_VERSION}. Install that, or train again"
        )
    try:
        config = Config.from_dict(content["config"])
        data = content["data"]
        options = {name: data[name] for name in SPEC_OPTIONS if name in data}
        spec = DataSpec(tuple(data["shape"]), data["max_value"], data["discrete"], **options)
        vae = build_blank(config.model, spec)
        vae.load_state_dict(content["weights"])
        fingerprint, history = data["fingerprint"], content["history"]
        training = content["training"]
        if not isinstance(history, list) or not isinstance(training, dict | None):
            raise TypeError("history or training state have the wrong type")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is inconsistent: {first_line}. It is damaged, or from another version than "
            f"{VERSION}"
        ) from None
    return Checkpoint(vae.eval(), config, fingerprint, training, history, path)


def _find(run: Path, which: str) -> Path:
    if not run.is_dir():
        raise InputError(
            f"expected a run folder, made by python -m pyro_vae.train; no {run} exists"
        )
    names = ["best.pt", "last.pt"] if which == "best" else ["last.pt"]
    for name in names:
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise InputError(
        f"{run} holds no checkpoints/{names[0]}: it is not a run folder, or the run ended before "
        f"its first checkpoint"
    )


def _read(path: Path) -> dict[str, Any]:
    """Read the dictionary in a checkpoint file; only plain values and tensors are unpickled."""
    try:
        # torch.load does not verify the archive's checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path} is damaged: {damaged} in it fails its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        NotImplementedError,
    ):
        raise InputError(
            f"{path} is not a checkpoint of pyro_vae, or it is damaged; use another checkpoint of "
            f"the run, or train again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is a file of another program, not a checkpoint of pyro_vae")
    return content
