"""What surrounds the work of a command: streams in any encoding, errors without tracebacks."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..config import InputError
from ..runtime.files import printable, to_json
from .cores import share_cores


def run_command(work: Callable[[], int | None]) -> int:
    """Run a command. A user's mistake becomes one line on stderr and exit status 2."""
    share_cores()
    logging.getLogger("pyro.infer").setLevel(logging.WARNING)  # no guesses of plate nesting
    _prepare_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            try:
                return work() or 0
            finally:
                _flush()  # a closed pipe is noticed here, not when the interpreter exits
    except InputError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader has closed the pipe, as in `--help | head`
        return 141
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC and not place:
            place = ": stdout or a file is incomplete"
        return fail(f"{error.strerror or error}{place}")
    except _out_of_memory() as error:
        reason = str(error).strip().split("\n")[0] or "no details"
        return fail(f"not enough memory for these sizes; lower them ({reason})")
    except KeyboardInterrupt:
        return fail("interrupted", status=130)


# Signs in tables and help that few encodings have, and that Unicode relates to no ASCII.
_ASCII = {"‖": "||", "−": "-", "→": "->", "β": "beta", "·": "*", "─": "-", "│": "|"}  # noqa: RUF001
_ASCII |= dict.fromkeys("╭╮╰╯", "+")


def _prepare_streams() -> None:
    """Make every output possible: in any encoding, and where stdout or stderr are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="pyro_vae")


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Error handler "pyro_vae" of an encoding: ASCII that looks like the text, or its code."""
    assert isinstance(error, UnicodeEncodeError)
    text = ""
    for sign in error.object[error.start : error.end]:
        similar = _ASCII.get(sign) or unicodedata.normalize("NFKC", sign)
        text += similar if similar.isascii() else sign.encode("unicode_escape").decode()
    return text, error.end


codecs.register_error("pyro_vae", _readable)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # the reader is gone, or the disk is full
        # The interpreter flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _out_of_memory() -> tuple[type[Exception], ...]:
    """Types of the errors raised by a failed allocation.

    On the CPU, torch raises a plain RuntimeError. Sizes are therefore checked before (`memory`).
    """
    torch = sys.modules.get("torch")  # not imported for a command that never needed it
    return (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning, without the source line if it comes from this package."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    if Path(filename).is_relative_to(Path(__file__).parent.parent):
        text = f"note: {printable(str(message))}\n"
    print(text, end="", file=file or sys.stderr)


def fail(message: str, status: int = 2) -> int:
    with contextlib.suppress(OSError):  # stderr on a full disk
        print(f"error: {printable(message)}", file=sys.stderr)
    return status


def print_json(values: dict[str, Any]) -> None:
    print(to_json(values, indent=2))
