"""Variational autoencoders as Pyro programs.

  pyro-vae train      train a model and write a run folder
  pyro-vae tune       search for the settings of the highest validation ELBO
  pyro-vae evaluate   compute ELBO, log p(x), bits per dimension and active units of a run
  pyro-vae compare    compare runs on the same held-out rows, with intervals
  pyro-vae generate   generate data from a run
  pyro-vae encode     write posterior means and standard deviations of data
  pyro-vae impute     write missing values, imputed from the observed ones of the same row
  pyro-vae diagnose   check the posterior of a run
  pyro-vae refit      replace the guide of a run, with the model held fixed
  pyro-vae report     write one HTML page for a run, or several side by side
  pyro-vae compress   compress discrete data by a run, losslessly
  pyro-vae decompress restore the rows in a compressed file
  pyro-vae export     write the model as a folder for others: weights, card, programs

`pyro-vae COMMAND --help` explains a command. `python -m pyro_vae.COMMAND` is the same command.
`pyro-vae --completion bash` (or zsh) prints a script by which the shell completes flags.
"""

from __future__ import annotations

import importlib
import sys

from .cli import fail, run_command
from .config import VERSION

COMMANDS = (
    "train",
    "tune",
    "evaluate",
    "compare",
    "generate",
    "encode",
    "impute",
    "diagnose",
    "refit",
    "report",
    "compress",
    "decompress",
    "export",
)


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        return run_command(lambda: print((__doc__ or "").strip()))
    if name == "--version":
        return run_command(lambda: print(VERSION))
    if name == "--completion":
        return run_command(_print_completion)
    if name not in COMMANDS:
        return fail(f"expected one of {', '.join(COMMANDS)}; got {name}")
    return importlib.import_module(f"pyro_vae.{name}").main(sys.argv[2:])


def _print_completion() -> None:
    from .cli.completion import completion

    print(completion(COMMANDS, " ".join(sys.argv[2:])))


if __name__ == "__main__":
    sys.exit(main())
