"""Variational autoencoders as Pyro programs: train them, and know whether to believe them.

    splits = pyro_vae.load_data(pyro_vae.DataConfig("digits"))
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2), splits)
    records = pyro_vae.fit(vae, splits, pyro_vae.FitConfig(epochs=50))
    pyro_vae.log_evidence(vae, x, num_samples=5000)
    pyro_vae.miscalibration(pyro_vae.simulate(vae))

Names are imported on first use, so that `import pyro_vae` and `--help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import VERSION as __version__
from .config import Config, DataConfig, FitConfig, InputError, ModelConfig

if TYPE_CHECKING:
    from .annealing import anneal
    from .autoencoder import Autoencoder
    from .calibration import check_ranks, miscalibration, simulate
    from .checkpoint import load
    from .data import DataSpec, Split, Splits
    from .evidence import importance_sample, log_evidence, upper_bound
    from .factory import build
    from .gradients import measure_gradients
    from .latents import latent_use
    from .linear_gaussian import LinearGaussian
    from .loading import load_data
    from .nuts import compare_with_nuts
    from .objectives import objective
    from .predictive import predictive_check
    from .program import Program
    from .records import Record
    from .refinement import gaps, refine
    from .svi import fit, iterate
    from .vae import VAE

__all__ = [
    "VAE",
    "Autoencoder",
    "Config",
    "DataConfig",
    "DataSpec",
    "FitConfig",
    "InputError",
    "LinearGaussian",
    "ModelConfig",
    "Program",
    "Record",
    "Split",
    "Splits",
    "__version__",
    "anneal",
    "build",
    "check_ranks",
    "compare_with_nuts",
    "fit",
    "gaps",
    "importance_sample",
    "iterate",
    "latent_use",
    "load",
    "load_data",
    "log_evidence",
    "measure_gradients",
    "miscalibration",
    "objective",
    "predictive_check",
    "refine",
    "simulate",
    "upper_bound",
]

_HOMES = {
    "VAE": "vae",
    "Autoencoder": "autoencoder",
    "DataSpec": "data",
    "LinearGaussian": "linear_gaussian",
    "Program": "program",
    "Record": "records",
    "Split": "data",
    "Splits": "data",
    "anneal": "annealing",
    "build": "factory",
    "check_ranks": "calibration",
    "compare_with_nuts": "nuts",
    "fit": "svi",
    "gaps": "refinement",
    "importance_sample": "evidence",
    "iterate": "svi",
    "latent_use": "latents",
    "load": "checkpoint",
    "load_data": "loading",
    "log_evidence": "evidence",
    "measure_gradients": "gradients",
    "miscalibration": "calibration",
    "objective": "objectives",
    "predictive_check": "predictive",
    "refine": "refinement",
    "simulate": "calibration",
    "upper_bound": "evidence",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
