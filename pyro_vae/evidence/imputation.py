"""Missing values given the observed ones, by importance sampling from q(z|x_observed).

    zₖ ~ q(z|x_o),  wₖ = p(x_o|zₖ) p(zₖ) / q(zₖ|x_o),  w̃ₖ = wₖ / Σ w,  k = 1 … K
    E[x_m|x_o] ≈ Σₖ w̃ₖ E[x_m|zₖ]
    draws      z ~ {zₖ} with probabilities w̃ₖ,  x_m ~ p(x_m|z)

x_o are the observed values of a row and x_m the missing ones, which are independent of x_o given z.
The weights are Pareto-smoothed. For K → ∞ both are exact for any guide; a draw from q(z|x_o) alone
is not. Values are assumed to be missing at random.

Source: "MIWAE: Deep generative modelling and imputation of incomplete data sets", arXiv 1812.02633;
"Pareto smoothed importance sampling", arXiv 1507.02646.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import InputError
from ..models.columns import ColumnsLikelihood
from ..models.interface import LatentModel
from ..models.log_weights import log_weights
from ..runtime.memory import Callback, check_memory, ignore, rows_at_once
from ..runtime.randomness import one_thread
from .importance import MIN_TAIL_SAMPLES, pareto_smoothed

# torch draws from at most so many categories.
MAX_SAMPLES = 2**24
# Cache-sized chunks of draws of z to keep
CHUNKS = 16
# Samples of the least weights are left out of a mean, this share of the weight at most.
NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Imputation:
    """B rows without missing values, in the units of x. Observed values are those of x.

    Attributes:
        mean: (B, *data_shape), E[x_m|x_o] in the place of missing values; of a categorical column
            the code of the largest p(x_m|x_o).
        draws: (S, B, *data_shape), independent draws from p(x_m|x_o) in their place. Those of one
            row are joint: they have the correlations of its missing values.
        pareto_k: (B,) float64, k̂ of the row's weights: above `reliable_k(K)`, mean and draws cannot
            be relied on. NaN for rows that lack no value.
    """

    mean: Tensor
    draws: Tensor
    pareto_k: Tensor


@one_thread()
@torch.no_grad()
def impute(
    vae: LatentModel,
    x: Tensor,
    num_draws: int = 100,
    num_samples: int = 5000,
    on_rows: Callback = ignore,
) -> Imputation:
    """Impute the missing values of each row: their mean and draws given the observed ones.

    Draws come from torch's global random state.

    Args:
        vae: model with `prior()`, `posterior(x)` and `likelihood(z)`, trained with missing values.
        x: (B, *data_shape), in the likelihood's units. NaN marks a missing value.
        num_draws: S, 0 or more.
        num_samples: K, draws of z for each row.
        on_rows: called with the number of rows just done, of those that lack a value.

    Raises:
        ValueError: a number is out of range, or the draws exceed the memory (`InputError`).
        InputError: the model was trained without missing values.
    """
    if num_draws < 0:
        raise ValueError(f"num_draws expects an integer of at least 0; got {num_draws}")
    if not MIN_TAIL_SAMPLES <= num_samples <= MAX_SAMPLES:
        raise ValueError(
            f"num_samples expects {MIN_TAIL_SAMPLES} to {MAX_SAMPLES:,}; got {num_samples}"
        )
    todo = x.isnan().flatten(1).any(1).nonzero()[:, 0]
    likelihood = getattr(vae, "likelihood_module", None)
    if len(todo) and likelihood is not None and not likelihood.spec.missing:
        raise InputError(
            "the model was trained without missing values, of which its encoder knows nothing: "
            "train with --missing model"
        )
    what = f"{num_draws:,} draws for each of {len(x):,} rows"
    check_memory(2 * num_draws * x.numel(), what, "lower the number of draws")
    mean, draws = x.clone(), x.expand(num_draws, *x.shape).clone()
    k = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
    (latent_dim,) = vae.prior().event_shape
    size = rows_at_once(num_samples * latent_dim, x.device, CHUNKS)
    for rows in todo.split(size) if len(todo) else ():
        part = x[rows]
        z, shares, k[rows] = _weighted(vae, part, num_samples)
        mean[rows] = _completed(part, _mean(vae, z, shares))
        index = torch.multinomial(shares.T, max(1, num_draws), replacement=True).T[:num_draws]
        chosen = z.gather(0, index.unsqueeze(-1).expand(*index.shape, latent_dim))
        size = rows_at_once(part.numel(), x.device)
        for first, some in zip(range(0, num_draws, size), chosen.split(size), strict=False):
            drawn = vae.likelihood(some).sample()
            draws[first : first + size, rows] = _completed(part, drawn)
        on_rows(len(rows))
    return Imputation(mean, draws, k)


def _weighted(vae: LatentModel, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws z (K, B, Z) from q(z|x), their shares of the weight (K, B), float64, and k̂ (B,)."""
    q = vae.posterior(x)
    z = q.sample((num_samples,))
    _, weights = log_weights(vae, q, x, z)
    usable = weights.amax(0).isfinite()  # else outliers, beyond the range of floats
    smoothed, k = pareto_smoothed(weights.where(usable, 0.0))
    return z, smoothed.softmax(0), k.where(usable, torch.inf)


def _mean(vae: LatentModel, z: Tensor, shares: Tensor) -> Tensor:
    """Σₖ w̃ₖ E[x|zₖ] (B, *data_shape), float64, from the largest weight to the least.

    Categories are weighted by their probabilities, and summarized at last.
    """
    likelihood = getattr(vae, "likelihood_module", None)
    kinds = isinstance(likelihood, ColumnsLikelihood)
    shares, order = shares.sort(dim=0, descending=True)
    z = z.gather(0, order.unsqueeze(-1).expand(z.shape))
    values = vae.likelihood(z[:1]).event_shape.numel() * z.shape[1]
    size = rows_at_once(values, z.device)
    total: Tensor | float = 0.0
    done = torch.zeros(shares.shape[1], dtype=torch.float64, device=z.device)
    for weights, some in zip(shares.split(size), z.split(size), strict=True):
        p = vae.likelihood(some)
        means = (likelihood.expected(p) if kinds else p.mean).double()  # type: ignore[union-attr]
        total = total + torch.einsum("kb,kb...->b...", weights, means)
        done = done + weights.sum(0)
        if (done > 1 - NEGLIGIBLE).all():
            break
    assert isinstance(total, Tensor)
    mean = total / done.reshape(-1, *[1] * (total.dim() - 1))
    return likelihood.summary(mean) if kinds else mean  # type: ignore[union-attr]


def _completed(x: Tensor, values: Tensor) -> Tensor:
    """x (B, *data_shape), with `values` (..., B, *data_shape) where it lacks them."""
    return torch.where(x.isnan(), values.to(x), x)
