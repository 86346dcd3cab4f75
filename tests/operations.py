"""File operations of this process, seen and failed one by one, by an audit hook of Python's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Events that change a folder. `open` is one if it may write.
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_watchers: list[Callable[[str, Path], None]] = []


def _hook(event: str, arguments: tuple) -> None:
    if not _watchers or (event not in EVENTS and event != "open"):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
        return
    if isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0]))
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # within shutil.rmtree
            path = Path(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        for watcher in list(_watchers):
            watcher(event, path)


@contextmanager
def watched(watcher: Callable[[str, Path], None]) -> Iterator[None]:
    """Call `watcher` with name and path before each operation. It fails what it raises for."""
    if not hasattr(sys, "_operations_are_watched"):  # a hook cannot be removed
        sys._operations_are_watched = True
        sys.addaudithook(_hook)
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_before(number: int | None, root: Path) -> Iterator[list[str]]:
    """Fail operation `number` in a folder and all after it, so that no cleanup undoes anything.

    Yields the operations so far. None fails none.
    """
    done: list[str] = []

    def watcher(event: str, path: Path) -> None:
        if path.is_relative_to(root):
            if number is not None and len(done) >= number:
                raise Killed
            done.append(f"{event} {path.relative_to(root)}")

    with suppress(Killed), watched(watcher):
        yield done
