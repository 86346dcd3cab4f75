"""Draws and densities of a model as an `xarray.DataTree` with ArviZ's groups.

    posterior               z from p(z|x) of each row              (chain, draw, row, latent)
    posterior_predictive    x' ~ p(x|z) at these z                 (chain, draw, row, …)
    log_likelihood          log p(x|z) at these z, nats            (chain, draw, row)
    prior                   z ~ p(z)                               (chain, draw, latent)
    prior_predictive        x' ~ p(x|z) at these z                 (chain, draw, …)
    observed_data           x                                      (row, …)
    sample_stats            method and k̂ of a row's draws          (row)
    prior_sbc               ranks of `simulate`, as shares         (chain, draw, latent)

There is one chain: the draws are independent, or resampled. Values are in the likelihood's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import InputError
from ..models.interface import LatentModel
from ..models.log_weights import log_likelihood
from ..runtime.memory import check_memory, rows_at_once
from ..runtime.packages import of_extra
from ..runtime.randomness import one_thread
from .draws import posterior_draws
from .sbc import Simulations


@one_thread()
def to_datatree(
    vae: LatentModel,
    x: Tensor,
    num_draws: int = 500,
    num_samples: int = 5000,
    rows: Sequence[Any] | None = None,
    latents: Sequence[Any] | None = None,
    simulations: Simulations | None = None,
) -> Any:
    """Draw from prior and posterior, and convert the draws to ArviZ's `DataTree`.

    The latents of a row belong to it alone: given the other rows, they have their prior. With the
    decoder held fixed, the leave-one-out density of a row in `arviz_stats.loo` is therefore its
    log p(x), estimated from weights 1/p(x|z). Its k̂ is seldom good; `log_evidence` is the better
    estimate. Draws come from torch's global random state.

    Args:
        vae: model with `prior()`, `posterior(x)` and `likelihood(z)`, such as a `VAE` or `Program`.
        x: (B, *data_shape), in the likelihood's units.
        num_draws: N, of z from the prior, and of z for each row from its posterior, see
            `posterior_draws`.
        num_samples: importance samples from which posterior draws are resampled.
        rows: (B,) names of the rows; by default their numbers.
        latents: (Z,) names of the latents; by default their numbers.
        simulations: of `simulate`; the shares (rank + ½) / (L + 1) become the group `prior_sbc`,
            which `arviz_plots.plot_ecdf_pit` compares with the uniform distribution.

    Returns:
        An `xarray.DataTree`. Columns of a table have the coordinate `column`, with their names if
        the model knows them.

    Raises:
        InputError: the package arviz-base is missing, the draws exceed the memory, or there are
            not as many names as rows or latents, or the simulations have other latents.
    """
    from_dict = of_extra("arviz_base", "arviz", "to_datatree requires a package").from_dict
    prior = vae.prior()
    dims, coords = _data_dims(x), _coordinates(vae, len(x), prior.event_shape[0], rows, latents)
    what = f"{num_draws:,} replicates of {len(x):,} rows"
    check_memory(3 * num_draws * x.numel(), what, "lower num_draws")
    found = posterior_draws(vae, x, num_draws, num_samples)
    of_rows, of_model = _draws(vae, x, found.draws, prior.sample((num_draws,)))
    names = ("pareto_k", "effective_draws")
    of_draws = {"method": found.method, **{n: getattr(found, n).cpu().numpy() for n in names}}
    tree = from_dict(of_rows, dims={"z": ["row", "latent"], "x": ["row", *dims]}, coords=coords)
    model = from_dict(of_model, dims={"z": ["latent"], "x": dims}, coords=coords)
    names_of_dims = {name: ["row"] for name in of_draws}
    options = {"sample_dims": [], "dims": names_of_dims, "coords": coords}
    stats = from_dict({"sample_stats": of_draws}, **options)
    children = {**tree.children, **model.children, **stats.children}
    if simulations is not None:
        shares = {"z": _shares(simulations, prior.event_shape[0])[None]}
        sbc = from_dict({"prior_sbc": shares}, dims={"z": ["latent"]}, coords=coords)
        children |= sbc.children
    return tree.assign(children)


@torch.no_grad()
def _draws(vae: LatentModel, x: Tensor, of_rows: Tensor, of_prior: Tensor) -> tuple[Any, Any]:
    """Groups of draws of z from the posterior of each row (N, B, Z), and from the prior (N, Z)."""
    rows = {
        "posterior": {"z": _chain(of_rows)},
        "posterior_predictive": {"x": _chain(_replicates(vae, of_rows, x))},
        "log_likelihood": {"x": _chain(log_likelihood(vae, x, of_rows))},
        "observed_data": {"x": x.cpu().numpy()},
    }
    model = {
        "prior": {"z": _chain(of_prior)},
        "prior_predictive": {"x": _chain(_replicates(vae, of_prior, x[0]))},
    }
    return rows, model


def _shares(simulations: Simulations, latent_dim: int) -> np.ndarray:
    """(N, Z) the ranks of the latents between 0 and 1."""
    found = simulations.z.shape[1]
    if found != latent_dim:
        raise InputError(f"expected simulations of {latent_dim} latents; got {found}")
    return (simulations.ranks[:, :latent_dim] + 0.5) / (simulations.num_draws + 1)


def _coordinates(
    vae: LatentModel,
    num_rows: int,
    latent_dim: int,
    rows: Sequence[Any] | None,
    latents: Sequence[Any] | None,
) -> dict[str, list[Any]]:
    """Names of rows, latents and columns."""
    coords = {}
    for name, size, given in (("row", num_rows, rows), ("latent", latent_dim, latents)):
        coords[name] = list(range(size) if given is None else given)
        if len(coords[name]) != size:
            raise InputError(f"{name}s expects {size} names; got {len(coords[name])}")
    spec = getattr(getattr(vae, "likelihood_module", None), "spec", None)
    if spec is not None and spec.columns:
        coords["column"] = list(spec.columns)
    return coords


def _chain(draws: Tensor) -> np.ndarray:
    """Draws (N, ...) as those of one chain, (1, N, ...)."""
    return draws.unsqueeze(0).cpu().numpy()


def _data_dims(x: Tensor) -> list[str]:
    """Names of the dimensions of a row."""
    return {
        2: ["column"],
        3: ["channel", "time"],
        4: ["channel", "height", "width"],
        5: ["channel", "depth", "height", "width"],
    }.get(x.dim(), [f"x_dim_{i}" for i in range(x.dim() - 1)])


def _replicates(vae: LatentModel, z: Tensor, x: Tensor) -> Tensor:
    """Draws from p(x|z), for z (N, ..., Z), a few at once. `x` is one of their size."""
    chunks = z.split(rows_at_once(x.numel(), z.device))
    return torch.cat([vae.likelihood(chunk).sample() for chunk in chunks])
