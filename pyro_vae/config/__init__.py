"""The settings of a run, shared by the flags, `config.json` and the checkpoint.

`Config` is a tree of frozen dataclasses. The description of a field is the help of its flag. Each
class validates its fields on construction: a setting that is out of range, or that the chosen model
would ignore, raises `InputError`. This module imports no torch, so that `--help` answers at once.
"""

from .data import TORCHVISION_CLASSES, DataConfig
from .fit import FitConfig, resolve_epochs
from .model import DEFAULT_HIDDEN, ModelConfig
from .options import InputError, auto
from .run import PRESETS, Config, read_config, resolve

VERSION = "0.1.0"

__all__ = [
    "DEFAULT_HIDDEN",
    "PRESETS",
    "TORCHVISION_CLASSES",
    "VERSION",
    "Config",
    "DataConfig",
    "FitConfig",
    "InputError",
    "ModelConfig",
    "auto",
    "read_config",
    "resolve",
    "resolve_epochs",
]
