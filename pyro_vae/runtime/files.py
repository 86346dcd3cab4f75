"""Writing files, and the lock of a folder; valid JSON and printable names.

A failed atomic write leaves an earlier file unchanged. The operating system holds a lock for a
process, so the lock ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..config import InputError

fcntl: Any = None
with suppress(ImportError):  # Windows has none
    import fcntl

LOCK = ".lock"

# Errors of file systems that have no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUse(InputError):
    """Another process holds the lock of a folder."""


def temporary(path: Path) -> Path:
    """The file that `write_atomically` renames to `path`. A kill may leave it."""
    return path.with_name(f".{path.name}.part")


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file in the same folder, and rename it.

    Raises:
        OSError: the disk is full or the folder not writable. Its `filename` is `path`.
    """
    write_together(path.parent, {path.name: content})


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a folder: all to temporary files first, which are then renamed.

    Raises:
        OSError: the disk is full or the folder not writable. All earlier files are unchanged.
    """
    paths = [folder / name for name in contents]
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            with _named(path), temporary(path).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in paths:
            with _named(path):
                temporary(path).replace(path)
    except BaseException:
        for path in paths:
            with suppress(OSError):  # the folder is gone, or the file has its name
                temporary(path).unlink()
        raise


def append(path: Path, text: str) -> None:
    """Append to a text file. A full disk may cut the text short.

    Raises:
        OSError: the disk is full or the file not writable. Its `filename` is `path`.
    """
    with _named(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors: those of `write` and `fsync` name none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder during the block.

    The file .lock names the process that holds the lock. It is removed at the end. After a kill it
    remains, and the next process takes it.

    Raises:
        InUse: another process, or another block of this one, holds the lock.
        OSError: the folder is not writable.
    """
    path = folder / LOCK
    with _lock(path) as file:
        try:
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}")
            file.flush()
            yield
        finally:
            if _is_at(file, path):  # not in a folder that has taken this one's place
                with suppress(OSError):  # of a disk that has failed meanwhile
                    path.unlink()


def _lock(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read() or "another process"
            raise InUse(
                f"the run folder {path.parent} is in use by {owner}; wait for its end, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                file.close()
                raise
            warnings.warn(
                f"the file system of {path.parent} has no locks; do not train there twice at a "
                f"time",
                stacklevel=2,
            )
        if _is_at(file, path):
            return file
        file.close()  # its owner has just removed it


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:  # the file or the folder has been removed
        return False


def to_json(values: Any, indent: int | None = None) -> str:
    """Text in JSON. Numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def printable(text: str) -> str:
    r"""Escape control characters, and bytes that are not UTF-8, of a file's name: \n, \xe9."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
