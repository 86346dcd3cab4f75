"""Flags from dataclasses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tyro

from ..config import PRESETS, Config, InputError, read_config
from ..config.options import expected, shown, typed, without_none

Arguments = TypeVar("Arguments")

# How flags are made of the fields of a dataclass
FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def parse(
    arguments: type[Arguments],
    argv: Sequence[str] | None,
    prog: str,
    doc: str | None,
    default: Any = None,
) -> Arguments:
    """Parse flags into a dataclass. Of a flag given twice, the last counts. `--help` exits with 0.

    Raises:
        InputError: a flag is unknown or missing, or its value is invalid.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = {} if default is None else {"default": default}
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_flag_value)
    errors = io.StringIO()
    if shutil.get_terminal_size().columns < 40:  # tyro's help hangs in one of 5
        os.environ["COLUMNS"] = "40"
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                arguments,
                args=argv,
                prog=f"python -m pyro_vae.{prog}",
                description=doc,
                config=FLAGS,
                registry=registry,
                **options,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        raise InputError(_one_line(errors.getvalue()) if cause is None else str(cause)) from None


def _flag_value(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How tyro reads a number, several integers or a choice: the error says what is expected."""
    hint: Any = info.type
    kind = without_none(hint)
    several = kind in (tuple[int, int], tuple[int, ...])
    if not (several or kind in (int, float) or get_origin(kind) is Literal):
        return None
    convert = {Literal: str, float: float}.get(get_origin(kind) or kind, _integer)

    def read(texts: list[str]) -> Any:
        if texts == ["None"] and kind is not hint:
            return None
        with contextlib.suppress(ValueError):  # InputError is one
            values = tuple(convert(text) for text in texts)
            square = kind == tuple[int, int] and len(values) == 1
            return typed(values if several and not square else values[0], hint, "")
        raise ValueError(f"expects {expected(hint)}; got {shown(' '.join(texts))}")

    choices = ",".join(get_args(kind)) if get_origin(kind) is Literal else ""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=f"{{{choices}}}" if choices else "FLOAT" if kind is float else "INT",
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: list(
            map(str, value if isinstance(value, tuple) else [value])
        ),
    )


def _integer(text: str) -> int:
    return int(text[:4000])  # Python reads at most 4300 digits; no setting has more than 19


def _one_line(box: str) -> str:
    """tyro's message on one line. tyro prints a title, then sections: the message, then advice."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    text = "\n".join(line.strip(" │╰╯") for line in lines)
    message, *advice = [part for part in re.split(r"^[─-]*$", text, flags=re.MULTILINE) if part]
    message = re.sub(r"^Error parsing (--[\w-]+):", r"\1", " ".join(message.split()))
    similar = re.search(r"^--[\w-]+", "\n".join(advice), re.MULTILINE)
    if message.startswith("Unrecognized") and similar:
        message += f"; did you mean {similar[0]}?"
    return message


def config_of(arguments: Config) -> Config:
    """The `Config` in the arguments of a command that extends it."""
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(arguments, name) for name in names})


def early_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """--config, --preset and --resume, on which the defaults of the other flags depend."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # `parse` refuses a flag without its value.
    early.add_argument("--config", type=Path, nargs="?")
    early.add_argument("--resume", type=Path, nargs="?")
    early.add_argument("--preset", nargs="?")
    return early.parse_known_args(argv)[0]


def default_settings(given: argparse.Namespace) -> Config:
    """The settings of --config or --preset, which other flags override; else the defaults.

    Raises:
        InputError: both are given, or the file is no config.json.
    """
    if given.config and given.preset:
        raise InputError("--config and --preset both give the settings; drop one")
    if given.config:
        return read_config(given.config)
    return PRESETS.get(given.preset, Config())


def names_given(argv: Sequence[str] | None) -> set[str]:
    """The names of the flags on the command line, as fields: latent_dim for --latent-dim 8."""
    words = sys.argv[1:] if argv is None else argv
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return {flag[2:].replace("-", "_") for flag in flags}
