"""Variational autoencoders as Pyro programs.

  pyro-vae train      train a model and write a run folder
  pyro-vae evaluate   compute ELBO, log p(x), bits per dimension and active units of a run
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
"""

from __future__ import annotations

import importlib
import sys

from .cli import fail, run_command
from .config import VERSION

COMMANDS = (
    "train",
    "evaluate",
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
    if name not in COMMANDS:
        return fail(f"expected one of {', '.join(COMMANDS)}; got {name}")
    return importlib.import_module(f"pyro_vae.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
