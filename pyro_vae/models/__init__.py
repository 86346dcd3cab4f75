"""Models: p(z), p(x|z) and q(z|x) as distributions, and the Pyro programs made of them.

`LatentModel` and `PyroModel` are the interfaces that the other packages rely on. `VAE` and the
baseline `Autoencoder` are trained; `LinearGaussian` has a known posterior and evidence, for tests;
`Program` adapts any Pyro model and guide.
"""

from __future__ import annotations

from .autoencoder import Autoencoder
from .interface import LatentModel, PyroModel
from .linear_gaussian import LinearGaussian
from .pyro_program import Program
from .vae import VAE

__all__ = ["VAE", "Autoencoder", "LatentModel", "LinearGaussian", "Program", "PyroModel"]
