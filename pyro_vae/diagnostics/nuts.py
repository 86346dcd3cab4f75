"""q(z|x) compared with the No-U-Turn sampler on the same Pyro model.

Hamiltonian Monte Carlo needs no guide and is exact in the long run. Chains that agree with one
another are the reference for q(z|x): differences of means and scales, in units of the chains'
standard deviation, and a distance between the two samples.

Source: "The No-U-Turn sampler", arXiv 1111.4246; "Rank-normalization, folding, and localization: an
improved R̂", arXiv 1903.08008.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import biject_to

from ..capture.captured import CapturedFunction, KnownGradient, Mode
from ..models.interface import PyroModel, held_fixed
from ..models.log_weights import with_slope
from ..runtime.memory import Callback, ignore
from ..runtime.randomness import one_thread
from .aggregate import energy_coefficient

# Number of transitions from which compiling the model's density and gradient pays.
COMPILE_FROM = 1000


@dataclass(frozen=True)
class Comparison:
    """q(z|x) and NUTS for B rows.

    Attributes:
        draws: (C, S, B, Z) of NUTS.
        r_hat: (B, Z) rank-normalized split R̂ over the chains. Below 1.01 the chains agree; below
            1.05 they are good enough for this comparison.
        effective_sample_size: (B, Z), the smaller of bulk and tail.
        divergences: number of divergent transitions, in all chains.
        mean_difference: (B, Z) (mean of q − mean of NUTS) / sd of NUTS.
        scale_ratio: (B, Z) sd of q / sd of NUTS.
        distance: (B,) `energy_coefficient` between draws of q and of NUTS, 0 to 1.
        null_distance: (B,) the same between two halves of the NUTS chains, the size of the noise.
    """

    draws: np.ndarray
    r_hat: np.ndarray
    effective_sample_size: np.ndarray
    divergences: int
    mean_difference: np.ndarray
    scale_ratio: np.ndarray
    distance: np.ndarray
    null_distance: np.ndarray


@one_thread()
def compare_with_nuts(
    vae: PyroModel,
    x: Tensor,
    num_chains: int = 4,
    num_samples: int = 300,
    num_warmup: int = 200,
    on_sample: Callback = ignore,
) -> Comparison:
    """Run NUTS on `vae.model(x)` and compare the guide with it.

    All rows are sampled together, from the product of their posteriors: one chain of B·Z dimensions
    costs little more than one of Z. Chains start at draws from the prior. Draws come from torch's
    global random state.

    Args:
        vae: with a Pyro `model(x)`, a latent site, and `posterior(x)` with mean and variance.
        x: (B, *data_shape), a few rows.
        num_chains: C, at least 2.
        num_samples: S of each chain, at least 4, after `num_warmup` steps of adaptation.
        on_sample: called with 1 after every transition, warm-up included.

    Raises:
        ValueError: fewer than two chains, or four samples.
    """
    if num_chains < 2 or num_samples < 4:
        raise ValueError(
            f"R-hat expects at least 2 chains of at least 4 samples; got {num_chains} of "
            f"{num_samples}"
        )
    draws, divergences = chains(vae, x, num_chains, num_samples, num_warmup, on_sample)
    with torch.no_grad():
        posterior = vae.posterior(x)
        own = posterior.sample((num_chains * num_samples,)).double()
        mean, scale = posterior.mean, posterior.variance.sqrt()
    # The minimum keeps the differences finite if a chain never moved.
    exact_mean, exact_scale = draws.mean((0, 1)), draws.std((0, 1)).clamp_min(1e-9)
    r_hat, effective_sample_size = convergence(draws.cpu().numpy())
    # Both samples in units of the chains' standard deviation, which gives latents equal weight
    ours = ((own - exact_mean) / exact_scale).cpu().numpy()
    theirs = ((draws.flatten(0, 1) - exact_mean) / exact_scale).cpu().numpy()
    half = num_chains // 2 * num_samples
    return Comparison(
        draws.cpu().numpy(),
        r_hat,
        effective_sample_size,
        divergences=divergences,
        mean_difference=((mean - exact_mean) / exact_scale).cpu().numpy(),
        scale_ratio=(scale / exact_scale).cpu().numpy(),
        distance=_distances(ours, theirs),
        null_distance=_distances(theirs[:half], theirs[half:]),
    )


def convergence(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R̂ and effective sample size (B, Z) of draws (C, S, B, Z); ∞ and 1 if no chain moved."""
    from arviz_stats.base import array_stats

    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(divide="ignore", invalid="ignore"):  # of chains that never moved
        r_hat = array_stats.rhat(draws, **axes)
        bulk = array_stats.ess(draws, method="bulk", **axes)
        tail = array_stats.ess(draws, method="tail", prob=(0.05, 0.95), **axes)
    r_hat = np.where(np.isnan(r_hat), np.inf, r_hat)
    # Of equal draws, arviz returns their number, or NaN.
    size = np.where(np.isfinite(r_hat), np.minimum(bulk, tail), np.nan)
    return r_hat, np.nan_to_num(size, nan=1.0)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`energy_coefficient` (B,) of draws (N, B, Z) and (M, B, Z), row by row."""
    rows = range(first.shape[1])
    return np.array([energy_coefficient(first[:, i], second[:, i]) for i in rows])


def chains(
    vae: PyroModel,
    x: Tensor,
    num_chains: int,
    num_samples: int,
    num_warmup: int,
    on_sample: Callback = ignore,
    mode: Mode | None = None,
) -> tuple[Tensor, int]:
    """Draws (C, S, B, Z) of NUTS, float64, and the number of divergent transitions.

    Arguments as in `compare_with_nuts`, and whether to capture and compile the density and its
    gradient, see `capture.Mode`; by default compiled if there are many transitions.
    """
    if mode is None:
        many = num_chains * (num_warmup + num_samples) >= COMPILE_FROM
        mode = "compiled" if many else "eager"
    with held_fixed(vae):
        sampler = _sampler(vae, x, mode)
        runs = [
            _chain(sampler(), vae, x, num_samples, num_warmup, on_sample) for _ in range(num_chains)
        ]
    return torch.stack([chain for chain, _ in runs]).double(), sum(count for _, count in runs)


def _sampler(vae: PyroModel, x: Tensor, mode: Mode) -> Callable[[], NUTS]:
    """NUTS on the density that Pyro makes of the model, with its gradient captured."""
    # Starting points are given later; without any here, Pyro would search for some.
    _, potential, transforms, _ = initialize_model(vae.model, (x,), initial_params={})

    def energy(z: Tensor) -> tuple[Tensor, Tensor]:
        return with_slope(lambda z: potential({vae.latent: z}), z)

    captured = CapturedFunction(energy, mode)

    def differentiable(values: dict[str, Tensor]) -> Tensor:
        z = values[vae.latent]
        value, slope = captured(z.detach())
        return KnownGradient.apply(value, (slope,), z)

    return partial(NUTS, potential_fn=differentiable, transforms=transforms)


def _chain(
    sampler: NUTS, vae: PyroModel, x: Tensor, num_samples: int, num_warmup: int, on_sample: Callback
) -> tuple[Tensor, int]:
    """Draws (S, B, Z) of one chain, and the number of its divergent transitions."""
    prior = vae.prior()
    start = biject_to(prior.support).inv(prior.sample((len(x),)))  # unconstrained, as NUTS is
    chain = MCMC(
        sampler,
        num_samples=num_samples,
        warmup_steps=num_warmup,
        initial_params={vae.latent: start},
        hook_fn=lambda *_: on_sample(1),
        disable_progbar=True,
    )
    chain.run()
    return chain.get_samples()[vae.latent], len(chain.diagnostics()["divergences"]["chain 0"])
