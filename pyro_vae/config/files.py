"""Files that a user writes, in TOML or JSON → plain values. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from .options import InputError

MAX_FILE_BYTES = 2**20


def read_file(path: Path, flag: str, what: str) -> Any:
    """The values in a file.

    Args:
        path: the file, ending in .toml or .json.
        flag: the flag that names it, in messages.
        what: its content, in messages.

    Raises:
        InputError: it cannot be read, is too large, or is not of the format of its ending.
    """
    readers: dict[str, Any] = {".toml": tomllib.loads, ".json": _json}
    ending = path.suffix.lower()
    if ending not in readers:
        raise InputError(f"--{flag} expects a .toml or .json file; got {path}")
    try:
        if path.exists() and not path.is_file():  # reading a pipe might wait for ever
            raise InputError(f"--{flag} expects a regular file; got {path}")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise InputError(f"--{flag} {path}: expected {what}; got over a megabyte")
        return readers[ending](content.decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"--{flag}: cannot read {path}: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{flag} {path} is not {ending[1:].upper()}: {error}") from None


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"it names {next(n for n in names if names.count(n) > 1)!r} twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)
