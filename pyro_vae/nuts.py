"""q(z|x) against the No-U-Turn sampler, on the same Pyro model.

Hamiltonian Monte Carlo needs no guide and is exact in the long run, so where its chains agree with
each other they are the truth that q(z|x) is held against: the differences of means and scales, in
units of the chains' standard deviation, and a distance between the two samples.

Source: "The No-U-Turn sampler", arXiv 1111.4246; "Rank-normalization, folding, and localization: an
improved R̂", arXiv 1903.08008.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from .diagnostics import energy_coefficient
from .interface import PyroModel, held_fixed

__all__ = ["Comparison", "compare_with_nuts"]


@dataclass(frozen=True)
class Comparison:
    """q(z|x) beside NUTS for B images.

    Attributes:
        draws: (C, S, B, Z) of NUTS.
        r_hat: (B, Z) rank-normalized split R̂ over the chains; the chains agree below 1.01, and can
            be used for what is done here below 1.05.
        effective_sample_size: (B, Z), the lesser of bulk and tail.
        divergences: number of divergent transitions, in all chains.
        mean_difference: (B, Z) (mean of q − mean of NUTS) / sd of NUTS.
        scale_ratio: (B, Z) sd of q / sd of NUTS.
        distance: (B,) `energy_coefficient` between draws of q and of NUTS, 0 to 1.
        null_distance: (B,) the same between two halves of the NUTS draws: what noise alone gives.
    """

    draws: np.ndarray
    r_hat: np.ndarray
    effective_sample_size: np.ndarray
    divergences: int
    mean_difference: np.ndarray
    scale_ratio: np.ndarray
    distance: np.ndarray
    null_distance: np.ndarray


def compare_with_nuts(
    vae: PyroModel,
    x: Tensor,
    num_chains: int = 4,
    num_samples: int = 300,
    num_warmup: int = 200,
    on_sample: Callable[[int], object] | None = None,
) -> Comparison:
    """Run NUTS on `vae.model(x)` and hold the guide against it.

    All images are sampled at once, as the product of their posteriors, which they are: one chain
    of B·Z dimensions costs little more than one of Z. Chains start at draws from the prior, far
    apart. Draws come from torch's global random state.

    Args:
        vae: with a Pyro `model(x)`, a latent site, and `posterior(x)`.
        x: (B, *data_shape), the images; a few.
        num_chains: C, at least 2.
        num_samples: S of each chain, after `num_warmup` steps of adaptation.
        on_sample: called with 1 after every transition, warm-up included.

    Raises:
        ValueError: fewer than two chains, or four samples.
    """
    from arviz_stats.base import array_stats

    if num_chains < 2 or num_samples < 4:
        raise ValueError(
            f"R-hat expects at least 2 chains of at least 4 samples; got {num_chains} of "
            f"{num_samples}"
        )
    chains, divergences = [], 0
    for _ in range(num_chains):
        draws, diverged = _chain(vae, x, num_samples, num_warmup, on_sample)
        chains.append(draws)
        divergences += diverged
    draws = torch.stack(chains).double()  # (C, S, B, Z)
    with torch.no_grad():
        posterior = vae.posterior(x)
        own = posterior.sample((draws.shape[0] * draws.shape[1],)).double()
    # A chain that never moved has no deviation: differences in units of it are then huge, not NaN.
    exact_mean, exact_scale = draws.mean((0, 1)), draws.std((0, 1)).clamp_min(1e-9)
    # Both samples in units of the chains' standard deviation: no latent counts more by its scale.
    ours = ((own - exact_mean) / exact_scale).cpu().numpy()
    theirs = ((draws.flatten(0, 1) - exact_mean) / exact_scale).cpu().numpy()
    by_image = range(len(x))
    arrays = draws.cpu().numpy()
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(divide="ignore", invalid="ignore"):  # of chains that never moved
        r_hat = array_stats.rhat(arrays, **axes)
        r_hat = np.where(np.isnan(r_hat), np.inf, r_hat)
        bulk = array_stats.ess(arrays, method="bulk", **axes)
        tail = array_stats.ess(arrays, method="tail", prob=(0.05, 0.95), **axes)
    half = num_chains // 2 * num_samples
    return Comparison(
        draws=arrays,
        r_hat=r_hat,
        effective_sample_size=np.nan_to_num(np.minimum(bulk, tail), nan=1.0),
        divergences=divergences,
        mean_difference=((posterior.mean - exact_mean) / exact_scale).cpu().numpy(),
        scale_ratio=(posterior.variance.sqrt() / exact_scale).cpu().numpy(),
        distance=np.array([energy_coefficient(ours[:, i], theirs[:, i]) for i in by_image]),
        null_distance=np.array(
            [energy_coefficient(theirs[:half, i], theirs[half:, i]) for i in by_image]
        ),
    )


def _chain(
    vae: PyroModel,
    x: Tensor,
    num_samples: int,
    num_warmup: int,
    on_sample: Callable[[int], object] | None,
) -> tuple[Tensor, int]:
    """Draws (S, B, Z) of one chain, and the number of its divergent transitions."""
    with held_fixed(vae):
        kernel = NUTS(vae.model)
        chain = MCMC(
            kernel,
            num_samples=num_samples,
            warmup_steps=num_warmup,
            initial_params={vae.latent: vae.prior().sample((len(x),))},
            hook_fn=None if on_sample is None else lambda *_: on_sample(1),
            disable_progbar=True,
        )
        chain.run(x)
    return chain.get_samples()[vae.latent], len(chain.diagnostics()["divergences"]["chain 0"])
