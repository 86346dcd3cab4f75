"""Shared by the commands: flags from dataclasses, errors without tracebacks, devices, data.

This module and the commands import torch only when they start to work, so that `--help` and an
invalid flag are answered at once.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import errno
import io
import logging
import os
import re
import shutil
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar, get_args, get_origin

import tyro

from .config import Config, DataConfig, InputError, auto
from .config.options import check_integer, expected, shown, typed, without_none
from .files import printable, to_json

if TYPE_CHECKING:
    import torch

    from .data.splits import Splits
    from .models.autoencoder import Autoencoder
    from .models.vae import VAE
    from .training.checkpoint import Checkpoint

Arguments = TypeVar("Arguments")


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
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
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


def share_cores() -> None:
    """Let waiting threads of torch leave their core to other processes, from torch's import on.

    GNU OpenMP's threads spin while they wait. If another process needs the same core, a step of a
    few milliseconds takes up to twenty times as long. A short spin costs nothing on idle cores. A
    user's own setting stays.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


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
    if Path(filename).is_relative_to(Path(__file__).parent):
        text = f"note: {printable(str(message))}\n"
    print(text, end="", file=file or sys.stderr)


def fail(message: str, status: int = 2) -> int:
    with contextlib.suppress(OSError):  # stderr on a full disk
        print(f"error: {printable(message)}", file=sys.stderr)
    return status


def choose_device(name: str) -> torch.device:
    """Return the device called `name`. auto is cuda if available. Each local process has its GPU.

    Raises:
        InputError: this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"each process needs its own GPU: give --device cuda, not {name}")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise InputError(
            f"--device expects auto or one of {here} on this machine; got {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from None
    return device


def load_run_data(
    checkpoint: Checkpoint, source: str | None, root: Path | None, max_value: int | None = None
) -> Splits:
    """Load the data of a run, or other data for its model.

    Args:
        checkpoint: the run's checkpoint.
        source: `--data`; None for the data of the run. All rows of other data are test rows.
        root: `--data-root`; None for that of the run.
        max_value: `--max-value` of other data.

    Raises:
        InputError: the data are missing, have changed since the training, or do not fit the model.
    """
    from .data.loading import load_data, load_foreign

    config: DataConfig = checkpoint.config.data
    likelihood = checkpoint.vae.likelihood_module
    if root is not None:
        config = dataclasses.replace(config, root=root)
    if source is not None:
        config = dataclasses.replace(config, source=source)
        moments = (likelihood.mean, likelihood.std)
        foreign = load_foreign(config, likelihood.spec, likelihood.units, max_value, moments)
        if foreign.fingerprint != checkpoint.fingerprint:
            return foreign
    splits = load_data(config, checkpoint.config.seed, spec=likelihood.spec)
    if splits.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"the data {config.source} are not the data that {checkpoint.path} was trained on: "
            f"their splits would mix training and test rows. Restore the data, or give --data"
        )
    return splits


@dataclass(frozen=True)
class RunArguments:
    """A run and the conditions for using it.

    Attributes:
        run: Run folder or checkpoint file.
        data: Name or path of other data to use. All its rows are test rows.
        max_value: Largest value that the data in --data can take, for example 255 for 8-bit images.
            They are converted to the range of the run's data.
        data_root: Folder of torchvision's data sets.
        seed: Seed of all random draws, including the binarization for a bernoulli likelihood.
        device: Device: cpu, cuda, cuda:1, or auto (cuda if available).
    """

    run: Annotated[Path, tyro.conf.Positional]
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    max_value: Annotated[int | None, auto("INT", "as the kind of data defines it")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        check_integer("max-value", self.max_value)
        if self.max_value is not None and self.data is None:
            raise InputError("--max-value is the largest value of the data in --data; give --data")


@dataclass(frozen=True)
class OpenRun:
    """A run's checkpoint, its model and its data on one device, and the seed of the draws."""

    checkpoint: Checkpoint
    vae: VAE | Autoencoder
    splits: Splits
    device: torch.device
    seed: int


def open_run(arguments: RunArguments) -> OpenRun:
    """Load a run.

    Raises:
        InputError: the device, the checkpoint or the data cannot be used.
    """
    from .training.checkpoint import load_checkpoint

    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.run)
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root, arguments.max_value).to(
        device
    )
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    return OpenRun(checkpoint, checkpoint.vae.to(device), splits, device, seed)


def refuse_existing(out: Path, overwrite: bool, endings: Sequence[str]) -> None:
    """Check that the file `out` can be written, before any work is done.

    Raises:
        InputError: the ending is not one of `endings`, the file exists and `overwrite` is false, or
            its folder does not exist.
    """
    if out.suffix.lower() not in endings:
        raise InputError(f"--out expects a file ending in {' or '.join(endings)}; got {out}")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; give another --out, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out expects an existing folder; there is no {out.absolute().parent}")


def print_json(values: dict[str, Any]) -> None:
    print(to_json(values, indent=2))


def config_of(arguments: Config) -> Config:
    """The `Config` in the arguments of a command that extends it."""
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(arguments, name) for name in names})
