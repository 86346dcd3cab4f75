"""Variational autoencoders as Pyro programs, and checks of their posterior.

    splits = pyro_vae.load_data("digits")
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2), splits)
    records = pyro_vae.fit(vae, splits, pyro_vae.FitConfig(epochs=50))
    pyro_vae.log_evidence(vae, x, num_samples=5000)
    pyro_vae.miscalibration(pyro_vae.simulate(vae))

The public names are listed in `__init__.pyi` and imported on first use, so that `import pyro_vae`
and `--help` do not wait for torch.
"""

from __future__ import annotations

import logging

import lazy_loader

from .config import VERSION as __version__  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# The application decides whether and where messages are shown.
logging.getLogger(__name__).addHandler(logging.NullHandler())
