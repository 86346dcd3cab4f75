"""Completion of commands and flags in a shell."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro

from ..config import InputError
from .flags import FLAGS

SHELLS = ("bash", "zsh")


def completion(commands: Sequence[str], shell: str) -> str:
    """A script for a shell that completes `pyro-vae`, each of its commands and their flags.

    Raises:
        InputError: tyro has no completion for this shell.
    """
    if shell not in SHELLS:
        raise InputError(f"--completion expects one of {', '.join(SHELLS)}; got {shell!r}")
    kinds: list[Any] = []
    for name in commands:
        arguments = getattr(importlib.import_module(f"pyro_vae.{name}"), f"{name.title()}Arguments")
        kinds.append(Annotated[arguments, tyro.conf.subcommand(name, prefix_name=False)])
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(
            reduce(or_, kinds),
            prog="pyro-vae",
            args=["--tyro-print-completion", shell],
            config=FLAGS,
        )
    return script.getvalue()
