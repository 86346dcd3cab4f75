"""Simulation-based calibration: whether q(z|x) is right on average over data from the model.

    z* ~ p(z),  x ~ p(x|z*),  z₁ … z_L ~ q(z|x)

If q(z|x) = p(z|x), then z*, z₁ … z_L are exchangeable given x: for any function f the rank of
f(z*, x) among the f(z_l, x) is uniform on {0, …, L}, z* has the mean and variance of q, and regions
with probability p under q contain z* with probability p.

Ranks of the latents alone cannot detect a guide that ignores x: q(z|x) = p(z) passes. Ranks of
log p(x|z) detect it. No trained guide is exact, and its p-values decrease with the number of
simulations; `miscalibration` and `coverage` give the size of the error with intervals.

Source: "Validating Bayesian inference algorithms with simulation-based calibration", arXiv
1804.06788; "Simulation-based calibration checking for Bayesian computation: the choice of test
quantities shapes sensitivity", arXiv 2211.02383.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

import numpy as np
import torch
from pyro.distributions import Distribution
from scipy import special, stats
from torch import Tensor

from ..data.missing import hidden_at_random
from ..evidence.intervals import Interval, interval, share_interval
from ..models.interface import LatentModel
from ..models.log_weights import log_likelihood
from ..runtime.memory import Callback, ignore, rows_at_once
from ..runtime.randomness import one_thread

Quantity = Callable[[Tensor, Tensor], Tensor]

LIKELIHOOD, DENSITY = "log p(x|z)", "log q(z|x)"

# Cache-sized chunks whose draws are made together
CHUNKS_PER_BLOCK = 4


@dataclass(frozen=True)
class Simulations:
    """N simulations with L draws each from the guide.

    Attributes:
        names: of the Q quantities: the latents, `LIKELIHOOD`, `DENSITY`, and the caller's.
        ranks: (N, Q) int64, 0 … L, the number of draws below the truth. Ties are broken at random.
        num_draws: L.
        z: (N, Z) the truths.
        mean, scale: (N, Z) mean and standard deviation of q(z|x).
        prior_scale: (Z,) standard deviation of p(z).
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    num_draws: int
    z: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    prior_scale: np.ndarray

    @property
    def z_scores(self) -> np.ndarray:
        """(N, Z): (truth − mean) / scale; mean 0 and mean square 1 for the exact posterior."""
        return (self.z - self.mean) / self.scale

    @property
    def contraction(self) -> np.ndarray:
        """(N, Z): 1 − posterior variance / prior variance; 0 if x has no information on z."""
        return 1 - (self.scale / self.prior_scale) ** 2

    @property
    def recovery(self) -> np.ndarray:
        """(Z,): correlation of truth and posterior mean over simulations; 0 if constant."""
        z, mean = self.z - self.z.mean(0), self.mean - self.mean.mean(0)
        norm = np.sqrt((z**2).sum(0) * (mean**2).sum(0))
        return np.divide((z * mean).sum(0), norm, out=np.zeros_like(norm), where=norm > 0)


@one_thread()
@torch.no_grad()
def simulate(
    vae: LatentModel,
    num_simulations: int = 1000,
    num_draws: int = 199,
    quantities: Mapping[str, Quantity] | None = None,
    on_chunk: Callback = ignore,
    like: Tensor | None = None,
) -> Simulations:
    """Draw data from the model, and rank the true z among draws from the guide.

    Draws come from torch's global random state.

    Args:
        vae: model with `prior()`, `posterior(x)`, with mean and variance, and `likelihood(z)`.
        num_simulations: N.
        num_draws: L. With L + 1 a multiple of 200, central regions of 50, 90 and 95% are exact.
        quantities: further quantities to rank, name → f(z (S, B, Z), x (B, *data_shape)) → (S, B).
        on_chunk: called with the number of simulations just done.
        like: (M, *data_shape), rows of data. Each simulated row lacks the values that one of them
            lacks, chosen at random: the guide is then tested on rows as it sees them. This assumes
            that values are missing completely at random.

    Raises:
        ValueError: a number is not positive, or a quantity has the wrong shape or is NaN.
    """
    if num_simulations < 1 or num_draws < 1:
        raise ValueError(
            f"num_simulations and num_draws expect at least 1; got {num_simulations}, {num_draws}"
        )
    prior = vae.prior()
    truths = prior.sample((num_simulations,))
    size = vae.likelihood(truths[:1]).event_shape.numel()
    rows = rows_at_once(size * (num_draws + 1), truths.device, CHUNKS_PER_BLOCK)
    ranks, means, scales = [], [], []
    for truth in truths.split(rows):
        x = hidden_at_random(vae.likelihood(truth).sample(), like)
        posterior = vae.posterior(x)
        z = torch.cat([truth.unsqueeze(0), posterior.sample((num_draws,))])  # (1 + L, B, Z)
        values = _quantities(vae, posterior, x, z, quantities or {})
        ranks.append(torch.stack([_rank(v) for v in values.values()], dim=1))
        means.append(posterior.mean)
        scales.append(posterior.variance.sqrt())
        on_chunk(len(x))
    return Simulations(
        names=tuple(values),
        ranks=torch.cat(ranks).cpu().numpy(),
        num_draws=num_draws,
        z=truths.double().cpu().numpy(),
        mean=torch.cat(means).double().cpu().numpy(),
        scale=torch.cat(scales).double().cpu().numpy(),
        prior_scale=prior.variance.sqrt().double().cpu().numpy(),
    )


def _quantities(
    vae: LatentModel, posterior: Distribution, x: Tensor, z: Tensor, further: Mapping[str, Quantity]
) -> dict[str, Tensor]:
    """The quantities to rank, (1 + L, B) each, at x (B, *data_shape) and z (1 + L, B, Z)."""
    values = {f"z{j + 1}": z[..., j] for j in range(z.shape[-1])}
    values[LIKELIHOOD] = log_likelihood(vae, x, z)
    values[DENSITY] = posterior.log_prob(z)
    for name, quantity in further.items():
        values[name] = value = quantity(z, x)
        if value.shape != z.shape[:2] or value.isnan().any():
            raise ValueError(
                f"quantity {name!r} expects finite values of shape {tuple(z.shape[:2])}; got "
                f"{tuple(value.shape)}" + (", NaN among them" if value.isnan().any() else "")
            )
    return values


def _rank(values: Tensor) -> Tensor:
    """values (1 + L, B) → ranks (B,) of the first among the others, ties broken at random."""
    below = (values[1:] < values[0]).sum(0)
    ties = (values[1:] == values[0]).sum(0)
    # The number of ties that count as below is uniform on 0 … ties.
    uniform = torch.rand(below.shape, device=values.device, dtype=torch.float64)
    return below + (uniform * (ties + 1)).floor().to(below.dtype)


@dataclass(frozen=True)
class RankTest:
    """Tests of one quantity's ranks against the uniform distribution on {0, …, L}.

    Attributes:
        name: of the quantity.
        gamma: the gamma discrepancy, 0 to 1, small where the ranks are far from uniform.
        p_gamma: P(Γ ≤ gamma) under uniform ranks, exact.
        chi_squared: Pearson's statistic over equal bins of ranks.
        p_chi_squared: its p-value.
    """

    name: str
    gamma: float
    p_gamma: float
    chi_squared: float
    p_chi_squared: float

    @property
    def p_value(self) -> float:
        """p-value of both tests together, by Bonferroni's correction."""
        return min(1.0, 2 * min(self.p_gamma, self.p_chi_squared))


def check_ranks(simulations: Simulations) -> list[RankTest]:
    """Test the ranks of each quantity. For an exact guide every `p_value` is uniform or larger.

    The bins of the chi-squared test expect at least 20 simulations each.

    Raises:
        ValueError: fewer than 40 simulations.
    """
    count, num_ranks = len(simulations.ranks), simulations.num_draws + 1
    if count < 40:
        raise ValueError(f"testing ranks expects at least 40 simulations; got {count}")
    bins = max(b for b in range(1, min(num_ranks, count // 20, 50) + 1) if num_ranks % b == 0)
    tests = []
    for name, ranks in zip(simulations.names, simulations.ranks.T, strict=True):
        gamma = gamma_discrepancy(ranks, simulations.num_draws)
        observed = np.bincount(ranks * bins // num_ranks, minlength=bins)
        # If L + 1 has no small divisor there is one bin, and no test: p = 1.
        chi_squared, p_value = stats.chisquare(observed) if bins > 1 else (0.0, 1.0)
        p_gamma = gamma_p_value(gamma, count, simulations.num_draws)
        tests.append(RankTest(name, gamma, p_gamma, float(chi_squared), float(p_value)))
    return tests


def gamma_discrepancy(ranks: np.ndarray, num_draws: int) -> float:
    """γ = 2 minᵢ min(P(R ≤ Rᵢ), P(R ≥ Rᵢ)) for ranks (N,) of 0 … L, with L draws.

    Rᵢ counts the ranks below i, and R ~ Bin(N, i/(L+1)).
    """
    counts = np.bincount(ranks, minlength=num_draws + 1).cumsum()[:-1]  # R₁ … R_L
    tails = _tails(len(ranks), num_draws)
    return float(min(1.0, 2 * tails[np.arange(num_draws), counts].min()))


def gamma_p_value(gamma: float, num_simulations: int, num_draws: int) -> float:
    """P(Γ ≤ γ) for N independent uniform ranks, exact up to rounding (1e-10)."""
    # Equal tails of different i may differ in their last digits.
    gamma *= 1 + 1e-9
    if gamma >= 1:
        return 1.0
    allowed = 2 * _tails(num_simulations, num_draws) > gamma
    return float(np.clip(1 - _stays_within(allowed, num_simulations), 1e-12, 1))


def gamma_band(
    num_simulations: int, num_draws: int, probability: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Simultaneous band of the ranks' distribution function, (L,) lower and (L,) upper ends.

    For uniform ranks, the share of ranks below i lies within the band for all i = 1 … L with the
    given probability.
    """
    tails = _tails(num_simulations, num_draws)
    low, high = 0.0, 1.0  # P(Γ > low) > probability ≥ P(Γ > high)
    for _ in range(30):
        middle = (low + high) / 2
        within = _stays_within(2 * tails > middle, num_simulations) >= probability
        low, high = (middle, high) if within else (low, middle)
    allowed = 2 * tails > low
    first = allowed.argmax(1)
    last = num_simulations - allowed[:, ::-1].argmax(1)
    return first / num_simulations, last / num_simulations


def _tails(num_simulations: int, num_draws: int) -> np.ndarray:
    """(L, N + 1): min(P(R ≤ r), P(R ≥ r)) for R ~ Bin(N, i/(L+1)), i = 1 … L, r = 0 … N."""
    r = np.arange(num_simulations + 1)
    chance = np.arange(1, num_draws + 1)[:, None] / (num_draws + 1)
    below = special.bdtr(r, num_simulations, chance)
    return np.minimum(below, below[::-1, ::-1])  # P(R ≥ r) at i is P(R ≤ N − r) at L + 1 − i


def _stays_within(allowed: np.ndarray, num_simulations: int) -> float:
    """P(every Rᵢ is allowed) for uniform ranks, given `allowed` (L, N + 1), an interval each row.

    The counts of the L + 1 ranks are independent Poisson variables given that they sum to N. Their
    partial sums are a Markov chain, whose distribution is computed exactly.
    """
    mean = num_simulations / (len(allowed) + 1)
    most = int(stats.poisson.isf(1e-15, mean)) + 1
    step = stats.poisson.pmf(np.arange(min(most, num_simulations) + 1), mean)
    first, state = 0, np.ones(1)
    for row in allowed:
        state = np.convolve(state, step)
        start, stop = int(row.argmax()), len(row) - int(row[::-1].argmax())
        left, right = max(first, start), min(first + len(state), stop)
        if not row[start] or left >= right:
            return 0.0
        state, first = state[left - first : right - first], left
    rest = num_simulations - (first + np.arange(len(state)))
    final = (state * stats.poisson.pmf(rest, mean)).sum()
    return float(min(1.0, final / stats.poisson.pmf(num_simulations, num_simulations)))


@dataclass(frozen=True)
class Coverage:
    """Shares of simulations whose truth lies in regions of q(z|x), with 95% confidence intervals.

    Attributes:
        names: of the R regions: the central interval of each latent, their mean, and "HDR", the
            highest-density region of all latents together.
        nominal: (M,) probability of each region under q.
        covered: (M, R) share of simulations whose truth lies inside.
        low, high: (M, R) ends of the confidence interval of `covered`: Student's over simulations
            for the mean over latents, Clopper and Pearson's for the others.
    """

    names: tuple[str, ...]
    nominal: np.ndarray
    covered: np.ndarray
    low: np.ndarray
    high: np.ndarray


MEAN, HDR = "mean over latents", "HDR"


def coverage(
    simulations: Simulations, levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
) -> Coverage:
    """Expected coverage of central intervals and of highest-density regions.

    Regions are sets of ranks: each level is moved to the nearest that L draws allow, `nominal`. An
    exact guide covers with exactly this probability.

    Raises:
        ValueError: a level is not between 0 and 1.
    """
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels expect probabilities between 0 and 1; got {levels}")
    num_ranks = simulations.num_draws + 1
    latent_dim = simulations.z.shape[1]
    latents = simulations.ranks[:, :latent_dim]
    density = simulations.ranks[:, simulations.names.index(DENSITY)]
    nominal, rows = [], []
    for level in levels:
        # Ranks outside the interval at either end; the HDR leaves out the lowest 2·out
        out = min(max(round((1 - level) * num_ranks / 2), 0), (num_ranks - 1) // 2)
        inside = (latents >= out) & (latents < num_ranks - out)
        central = [share_interval(column) for column in inside.T]
        rows.append([*central, interval(inside.mean(1)), share_interval(density >= 2 * out)])
        nominal.append(1 - 2 * out / num_ranks)
    table = np.array([[astuple(column) for column in columns] for columns in rows])  # (M, R, 3)
    names = (*simulations.names[:latent_dim], MEAN, HDR)
    return Coverage(names, np.array(nominal), *np.moveaxis(table, -1, 0))


@dataclass(frozen=True)
class Miscalibration:
    """Errors of q(z|x) in mean and standard deviation, for each latent.

    Attributes:
        bias: (Z,) intervals of the mean z-score: the guide's mean is too low by this many of its
            standard deviations. 0 for an exact guide.
        spread: (Z,) intervals of the z-scores' standard deviation: the guide's standard deviation
            is too small by this factor. 1 for an exact guide; above 1 the guide is overconfident.
    """

    bias: list[Interval]
    spread: list[Interval]


def miscalibration(simulations: Simulations) -> Miscalibration:
    """Sizes of the guide's errors, with Student's 95% intervals over simulations."""
    columns = simulations.z_scores.T
    return Miscalibration(
        bias=[interval(column) for column in columns],
        spread=[interval((column - column.mean()) ** 2).sqrt() for column in columns],
    )
