"""Name → `pyro.infer.ELBO`. Particles are drawn in one vectorized pass."""

from __future__ import annotations

from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

__all__ = ["objective"]


def objective(name: str = "trace", num_particles: int = 1) -> ELBO:
    """The objective called `name`.

    trace: E_q[log p(x, z) − log q(z|x)], the ELBO sampled with reparameterized gradients
        (arXiv 1312.6114). For any model and guide.
    mean-field: E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)), the same bound with the KL in closed form where
        torch knows one: less variance where the KL is not the noisier part.
    iwae: E[log ⅟K Σₖ p(x, zₖ) / q(zₖ|x)], the importance-weighted bound (arXiv 1509.00519), tighter
        as K = `num_particles` grows. Pyro's RenyiELBO at α = 0, which weighs each image by itself
        only where all sites are in one plate that is neither scaled nor subsampled, as in `VAE`.

    Args:
        name: trace, mean-field or iwae.
        num_particles: number of draws of z per image, K.

    Raises:
        ValueError: the name is unknown.
    """
    particles = {
        "num_particles": num_particles,
        "vectorize_particles": num_particles > 1,
        "max_plate_nesting": 1,
    }
    if name == "trace":
        return Trace_ELBO(**particles)
    if name == "mean-field":
        return TraceMeanField_ELBO(**particles)
    if name == "iwae":
        return RenyiELBO(alpha=0, **particles)
    raise ValueError(f"objective expects trace, mean-field or iwae; got {name!r}")
