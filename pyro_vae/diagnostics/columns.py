"""Checks of the columns of a table: whether draws from the model are distributed like the data.

    z ~ q(z|x),  x' ~ p(x|z);  distance of the distribution of column j in x from that in x'

The distance is the largest difference of the distribution functions, or for categories half the sum
of the differences of their shares. Draws of x' of the same number of rows show how far it is by
chance. A wrong kind of column, such as counts that are scored as real numbers, has a large one.

Source: "Posterior predictive assessment of model fitness via realized discrepancies", Statistica
Sinica 6 (1996).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ..config.columns import ColumnKind
from ..evidence.intervals import Interval
from ..models.vae import VAE
from ..runtime.memory import rows_at_once
from ..runtime.randomness import one_thread
from .findings import Check, Finding
from .predictive import has_kinds

COLUMNS = Check(
    "columns",
    "distance of the distribution of {subject} in draws from that in held-out rows, beyond chance",
    (0.05, 0.1),
    "draws of this column, given this guide, are distributed unlike the data; 1 is without overlap",
    "state another kind for this column by --columns, train longer, or with more latents",
)
# Kinds whose codes have no order
UNORDERED = ("bernoulli", "categorical")


@dataclass(frozen=True)
class ColumnCheck:
    """Distances between the distributions of D columns in rows and in draws from the model.

    Attributes:
        names: of the columns.
        kinds: their kinds.
        distance: (D,) of the rows, 0 to 1.
        by_chance: (S, D) of S draws of as many rows.
        observed: (B, D) the rows.
        replicated: (B, D) one draw of them.
    """

    names: tuple[str, ...]
    kinds: tuple[ColumnKind, ...]
    distance: np.ndarray
    by_chance: np.ndarray
    observed: np.ndarray
    replicated: np.ndarray

    @property
    def excess(self) -> np.ndarray:
        """(D,) the distance beyond that which chance makes on average."""
        return self.distance - self.by_chance.mean(0)

    @property
    def p_values(self) -> np.ndarray:
        """(D,) share of draws that are as far as the rows, or further; at least 1 / (S + 1)."""
        return (1 + (self.by_chance >= self.distance).sum(0)) / (1 + len(self.by_chance))


@one_thread()
@torch.no_grad()
def check_columns(vae: VAE, x: Tensor, num_draws: int = 200) -> ColumnCheck:
    """Compare the distribution of each column of x with that of draws from the model.

    Missing values do not count, in the draws neither. Draws come from torch's global random state.

    Args:
        vae: of a table with a kind for each column.
        x: (B, D) held-out rows.
        num_draws: S, at least 2.

    Raises:
        ValueError: the model is of other data.
    """
    spec = vae.likelihood_module.spec
    if not has_kinds(vae):
        raise ValueError("check_columns expects a model of a table with a kind for each column")
    rows = rows_at_once(num_draws * x[0].numel(), x.device, num_chunks=16)
    parts = []
    for part in x.split(rows):
        draws = vae.likelihood(vae.posterior(part).sample((num_draws,))).sample()
        parts.append(torch.where(part.isnan(), part, draws).cpu())
    replicated, observed = torch.cat(parts, dim=1), x.cpu()
    found = []
    for j, kind in enumerate(spec.kinds):
        present = ~observed[:, j].isnan()
        sets = torch.cat([observed[None, present, j], replicated[:, present, j]]).double()
        found.append(_distances(sets, kind).numpy())
    distances = np.stack(found, axis=1)
    return ColumnCheck(
        spec.columns,
        spec.kinds,
        distances[0],
        distances[1:],
        observed.numpy(),
        replicated[0].numpy(),
    )


def _distances(sets: Tensor, kind: ColumnKind) -> Tensor:
    """(1 + S,) distance of each set of values (1 + S, B) from all sets but the first together."""
    pooled = sets[1:].flatten().sort().values
    count = sets.shape[1]
    if kind.name in UNORDERED:
        codes = torch.arange(len(kind.categories), dtype=sets.dtype)
        shares = (sets[..., None] == codes).double().mean(1)
        return (shares - shares[1:].mean(0)).abs().sum(1) / 2
    sets = sets.sort(dim=1).values.contiguous()
    largest = []
    for right in (True, False):  # just after a value, and just before it
        own = torch.searchsorted(sets, sets, right=right).double() / count
        together = torch.searchsorted(pooled, sets, right=right).double() / len(pooled)
        largest.append((own - together).abs().amax(1))
    return torch.stack(largest).amax(0)


def about_columns(check: ColumnCheck) -> Finding:
    """The column whose draws differ most from held-out rows.

    The interval is from the distances of draws of as many rows, for all columns at once.
    """
    worst = int(check.excess.argmax())
    quantile = NormalDist().inv_cdf(1 - 0.025 / len(check.names))
    error, excess = check.by_chance[:, worst].std(ddof=1), float(check.excess[worst])
    size = Interval(excess, excess - quantile * error, excess + quantile * error)
    return Finding(COLUMNS, size, check.names[worst])
