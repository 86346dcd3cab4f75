"""Variational autoencoders as Pyro programs: train them, and know whether to believe them.

    splits = pyro_vae.load_data(pyro_vae.DataConfig("digits"))
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2), splits)
    for record in pyro_vae.fit(vae, splits, pyro_vae.FitConfig(epochs=50)):
        print(record.epoch, record.validation_elbo)
    pyro_vae.log_evidence(vae, x, num_samples=5000)

Names are imported on first use, so that `import pyro_vae` and `--help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import VERSION as __version__
from .config import Config, DataConfig, FitConfig, InputError, ModelConfig

if TYPE_CHECKING:
    from .autoencoder import Autoencoder
    from .checkpoint import load
    from .data import DataSpec, Split, Splits, load_data
    from .evidence import importance_sample, log_evidence
    from .factory import build
    from .objectives import objective
    from .svi import Record, fit
    from .vae import VAE

__all__ = [
    "VAE",
    "Autoencoder",
    "Config",
    "DataConfig",
    "DataSpec",
    "FitConfig",
    "InputError",
    "ModelConfig",
    "Record",
    "Split",
    "Splits",
    "__version__",
    "build",
    "fit",
    "importance_sample",
    "load",
    "load_data",
    "log_evidence",
    "objective",
]

_HOMES = {
    "VAE": "vae",
    "Autoencoder": "autoencoder",
    "DataSpec": "data",
    "Record": "svi",
    "Split": "data",
    "Splits": "data",
    "build": "factory",
    "fit": "svi",
    "importance_sample": "evidence",
    "load": "checkpoint",
    "load_data": "data",
    "log_evidence": "evidence",
    "objective": "objectives",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
