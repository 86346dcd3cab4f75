"""Shared by the commands: flags from dataclasses, errors without tracebacks, devices, data.

This wing and the commands import torch only when they start to work, so that `--help` and an
invalid flag are answered at once.
"""

from .cores import share_cores
from .flags import config_of, default_settings, early_flags, names_given, parse
from .runs import OpenRun, RunArguments, choose_device, load_run_data, open_run, refuse_existing
from .streams import fail, print_json, run_command

__all__ = [
    "OpenRun",
    "RunArguments",
    "choose_device",
    "config_of",
    "default_settings",
    "early_flags",
    "fail",
    "load_run_data",
    "names_given",
    "open_run",
    "parse",
    "print_json",
    "refuse_existing",
    "run_command",
    "share_cores",
]
