"""Packages that an extra of pyro_vae installs."""

from __future__ import annotations

import importlib
from typing import Any

from ..config import InputError


def of_extra(module: str, extra: str, reason: str) -> Any:
    """Import a module.

    Args:
        module: its name.
        extra: the extra that installs it.
        reason: what needs it, in the message.

    Raises:
        InputError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{reason}: pip install 'pyro-vae[{extra}]'") from None
