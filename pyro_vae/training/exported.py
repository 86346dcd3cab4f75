"""Exported models: model.safetensors and config.json, which hold numbers and text only.

    model.safetensors   all weights and buffers, by the names of the state dict
    config.json         the settings, the data as the model knows them, and the digest of the first

`checkpoint` restores a model from them, by the checks of a checkpoint. Other files in such a folder
(a model card, programs) are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import VERSION, InputError
from ..config.options import shown
from ..config.run import read_json

FORMAT, FORMAT_VERSION = "pyro_vae export", 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Names of all columns and categories of a wide table take megabytes.
MAX_CONFIG_BYTES = 2**24
ENTRIES = ("format", "format_version", "pyro_vae", "config", "data", "model", "sha256")


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported model. A run folder has no such file."""
    return (folder / WEIGHTS).exists()


def pack(
    config: dict[str, Any],
    data: dict[str, Any],
    model: dict[str, Any] | None,
    weights: Mapping[str, Tensor],
) -> dict[str, bytes]:
    """The files of a model, by name.

    Args:
        config, data, model, weights: as in a checkpoint, see `checkpoint.serialize`.
    """
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in weights.items()}, {"format": "pt"})
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pyro_vae": VERSION,
        "config": config,
        "data": data,
        "model": model,
        "sha256": sha256(content).hexdigest(),
    }
    return {WEIGHTS: content, CONFIG: (json.dumps(values, indent=2) + "\n").encode()}


def read(folder: Path) -> dict[str, Any]:
    """The values of a checkpoint, from the files of an exported model.

    The tensors are parts of the file, mapped into memory.

    Raises:
        InputError: a file is missing, damaged, or of another program or version.
    """
    path = folder / CONFIG
    values = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(
            f"{path} is not that of a model exported by pyro_vae; expected the folder that "
            f"python -m pyro_vae.export has written"
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} was written by pyro_vae {shown(values.get('pyro_vae'))} in format "
            f"{shown(values.get('format_version'))}; this is {VERSION}, which reads format "
            f"{FORMAT_VERSION}: install that, or export the model again"
        )
    if {*values} != {*ENTRIES}:
        names = ", ".join(sorted({*values} ^ {*ENTRIES}))
        raise InputError(f"{path} expects the entries {', '.join(ENTRIES)}; these differ: {names}")
    weights = _tensors(folder / WEIGHTS, values["sha256"])
    return {**values, "weights": weights, "training": None, "history": [], "refit": []}


def _tensors(path: Path, digest: Any) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # reading a pipe might wait for ever
        raise InputError(f"{path} is not a regular file")
    found = sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if found.hexdigest() != digest:
        raise InputError(
            f"{path} is not the file that {path.with_name(CONFIG).name} describes: it is damaged, "
            f"or one of the two is of another model; copy or export both again"
        )
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path} is not a file of safetensors: {reason}") from None
