"""Findings of the posterior checks: a size with its interval, a verdict, and advice.

The whole 95% interval of a size is compared with two limits:

    sound      the interval lies within the first limit: the error is shown to be small
    wrong      the interval lies beyond the second: the error is shown to be large
    doubtful   otherwise: the size is in between, or too uncertain

No verdict rests on a p-value. For a guide that is not exact, a p-value measures the number of
simulations; here too few simulations give doubtful findings, not sound ones. The limits are
conventions, and each finding states its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ..evidence.annealing import Annealed
from ..evidence.intervals import Interval, interval, share_interval
from .advice import remedies
from .latents import LatentUse
from .nuts import Comparison
from .predictive import PredictiveCheck
from .refinement import Gaps
from .sbc import HDR, LIKELIHOOD, MEAN, Coverage, Simulations

Verdict = Literal["sound", "doubtful", "wrong"]


def number(value: float) -> str:
    """Format a size: two decimals, three below 1."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


@dataclass(frozen=True)
class Check:
    """One row of the table of checks.

    Attributes:
        name: name of the check.
        effect: the reported number, with its unit. `{ideal}` and `{subject}` are filled in.
        limits: of sound and of wrong, as distances from `ideal`, or ratios if `is_ratio`.
        meaning: how to read the number; `{direction}` is one of `directions`.
        advice: what to do if the finding is not sound; names in braces are `remedies`.
        ideal: the value for an exact guide.
        directions: the words for a size up to `ideal`, and for a larger one.
        is_ratio: whether deviations are ratios to `ideal`, 2 and ½ being equally far.
        unreliable: precedes the meaning if the check itself did not work.
    """

    name: str
    effect: str
    limits: tuple[float, float]
    meaning: str
    advice: str
    ideal: float = 0.0
    directions: tuple[str, str] = ("", "")
    is_ratio: bool = False
    unreliable: str = ""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: its row of the table.
        size: the number and its 95% confidence interval.
        subject: the latent, statistic or family that the number describes, named in the effect.
        reliable: whether the check itself worked; if not, the verdict is doubtful.
    """

    check: Check
    size: Interval
    subject: str = ""
    reliable: bool = True

    @property
    def verdict(self) -> Verdict:
        check, size = self.check, self.size
        distances = [self._distance(size.low), self._distance(size.high)]
        # np.min and np.max of NaN are NaN, which lies neither within a limit nor beyond it.
        least = 0.0 if size.low <= check.ideal <= size.high else np.min(distances)
        if self.reliable and np.max(distances) <= check.limits[0]:
            return "sound"
        return "wrong" if self.reliable and least > check.limits[1] else "doubtful"

    def _distance(self, value: float) -> float:
        if not self.check.is_ratio:
            return abs(value - self.check.ideal)
        ratio = max(value, 1e-12) / self.check.ideal
        return max(ratio, 1 / ratio)

    def as_dict(self, texts: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The finding as an entry of diagnostics.json, with the `remedies` of a run."""
        check = self.check
        meaning = check.meaning.format(direction=check.directions[self.size.estimate > check.ideal])
        if not np.isfinite(self.size.estimate):
            meaning = "this size is not a finite number: densities or draws overflow"
        return {
            "check": check.name,
            "verdict": self.verdict,
            "effect": check.effect.format(ideal=check.ideal, subject=self.subject),
            **asdict(self.size),
            "ideal": check.ideal,
            "limits": check.limits,
            "meaning": ("" if self.reliable else check.unreliable) + meaning,
            "advice": check.advice.format(**(texts or remedies())).strip(),
        }


WEIGHTS = Check(
    "importance weights",
    "share of rows whose Pareto k is too high to rely on log p(x)",
    (0.1, 0.5),
    "where k is high, q(z|x) lacks mass that p(z|x) has, and log p(x) is underestimated",
    "report log p(x) as a lower bound, with its number of samples; {mend}{or_draws}",
)
BOUNDS = Check(
    "log p(x), bounded",
    "annealed upper bound minus importance-sampled log p(x), nats per row",
    (0.2, 2.0),
    "`evaluate` underestimates log p(x) by at most this much; part of it may be the annealing's "
    "own error, see annealing_gap in diagnostics.json",
    "use more importance samples; report the annealed lower bound where it is higher; {mend}",
)
AMORTIZATION = Check(
    "amortization gap",
    "ELBO of the best {subject} minus the encoder's, nats per row",
    (1.0, 5.0),
    "a posterior fitted to each row alone is better than the encoder's by this much",
    "{mend}{or_draws}if training and validation ELBO differ, more data or fewer epochs help too",
)
APPROXIMATION = Check(
    "approximation gap",
    "log p(x) minus the ELBO of the best {subject}, nats per row",
    (1.0, 5.0),
    "no Gaussian with independent latents comes closer, however it is trained",
    "{mend}{or_draws}or train with more particles and --objective dreg, or fewer latents",
)
FULL_APPROXIMATION = replace(
    APPROXIMATION,
    meaning="no Gaussian comes closer, however it is trained; a flow or a mixture, which contains "
    "or approximates a Gaussian, may",
)
WIDTH = Check(
    "posterior width",
    "factor by which posterior sds are too small (root mean square z-score)",
    (1.1, 1.5),
    "intervals of q(z|x) are too {direction}",
    "multiply the standard deviations by this factor before you use them as error bars:\n"
    "{recalibrate}or {mend}",
    ideal=1.0,
    directions=("wide: the guide is underconfident", "narrow: the guide is overconfident"),
    is_ratio=True,
)
BIAS = Check(
    "posterior bias",
    "mean z-score of {subject}, the worst latent, in posterior sds",
    (0.2, 0.5),
    "on simulated rows, the posterior mean of this latent is too {direction} by this much",
    "{mend}or train longer, with a learning rate that falls (--schedule cosine)",
    directions=("high", "low"),
)
INTERVALS = Check(
    "coverage, intervals",
    "share of truths inside the central {ideal:.0%} intervals of single latents",
    (0.03, 0.1),
    "regions contain the truth {direction} often than they claim",
    "multiply their widths by the factor of `posterior width`:\n{recalibrate}or {mend}",
    ideal=0.9,
    directions=("less", "more"),
)
REGIONS = replace(
    INTERVALS,
    name="coverage, regions",
    effect="share of truths inside the joint highest-density {ideal:.0%} regions",
    limits=(0.05, 0.2),
    advice="{mend}{or_draws}",
)
LIKELIHOOD_RANKS = Check(
    "use of the data",
    "mean rank of log p(x|z) at the truth among draws from q(z|x), 0 to 1",
    (0.05, 0.2),
    "draws from q(z|x) explain x {direction} than draws from the posterior would",
    "above ½: use --kl-warmup and more capacity against collapse, or {mend}"
    "below ½: the guide is too narrow, see `posterior width`",
    ideal=0.5,
    directions=("better", "worse"),
)
COLLAPSE = Check(
    "collapsed latents",
    "share of the {subject} latents with a KL below 0.01 nats",
    (0.5, 0.99),
    "the model does not use these latents: their posterior is the prior",
    "none needed, or reduce --latent-dim by their number",
)
FULL_COLLAPSE = replace(
    COLLAPSE,
    meaning="every latent ignores x: the model is a likelihood without latents",
    advice="use --kl-warmup 0.2, a smaller decoder, or a lower --beta",
)
CHAIN_MEANS = Check(
    "means against NUTS",
    "root mean square difference of posterior means, in sds of NUTS",
    (0.3, 1.0),
    "the centre of q(z|x) is this far from that of the same row's posterior",
    "{mend}{or_draws}",
    unreliable="the chains disagree (R-hat above 1.05), run them longer; ",
)
CHAIN_WIDTHS = Check(
    "widths against NUTS",
    "geometric mean of sd of q(z|x) / sd of NUTS",
    (1.2, 2.0),
    "q(z|x) is {direction} than the posterior of the same row",
    "{mend}or divide the sds by this ratio",
    ideal=1.0,
    directions=("narrower", "wider"),
    is_ratio=True,
    unreliable=CHAIN_MEANS.unreliable,
)
PREDICTIONS = Check(
    "predictive check",
    "{subject} of held-out rows minus that of replicates, in sds of the replicates",
    (0.5, 2.0),
    "replicates that the model draws, given this guide, differ from the rows in this statistic",
    "try another --likelihood, a larger decoder or more latents; log p(x|z) alone indicates "
    "overfitting or a wrong guide",
)
AGGREGATE = Check(
    "aggregate posterior",
    "energy coefficient between it and the prior, on simulated rows, 0 to 1",
    (0.02, 0.1),
    "averaged over data of the model, q(z|x) does not equal p(z)",
    "fix the errors of `posterior width` and `posterior bias`, which add up to this",
)
HOLES = Check(
    "holes in the prior",
    "share of p(z) where the aggregate posterior of training rows is 10 times thinner",
    (0.1, 1.0),  # no share exceeds 1: holes depend on data and model, and are no error of inference
    "the decoder was not trained on z from there: samples may be unlike any data",
    "{prior}use fewer latents, --beta above 1, or draw z from the aggregate posterior",
)
LOCAL = Check(
    "local test",
    "share of pairs in which a classifier, given x, tells the truth from a draw",
    (0.05, 0.15),
    "given x, q(z|x) differs from p(z|x) by as much as the classifier can tell; `local` in "
    "diagnostics.json has a p-value for each held-out row",
    "{mend}{or_draws}",
    ideal=0.5,
)


def about_weights(unreliable: np.ndarray) -> Finding:
    """Importance weights of held-out rows: (B,) whether k̂ of a row exceeds `reliable_k`."""
    return Finding(WEIGHTS, share_interval(unreliable))


def about_bounds(annealed: Annealed, importance: np.ndarray) -> Finding:
    """Upper estimate of the error of importance-sampled log p(x), on simulated rows.

    Doubtful if the annealed bounds are as far from each other as from the estimate.

    Args:
        annealed: with its reverse chains.
        importance: (B,) importance-sampled log p(x) of the same rows.

    Raises:
        ValueError: there are no reverse chains.
    """
    if annealed.upper is None:
        raise ValueError("the bounds expect reverse chains, from the z that generated x; got none")
    short = interval(annealed.upper.cpu().numpy() - importance)
    between = (annealed.upper - annealed.lower).mean().item()
    return Finding(BOUNDS, short, reliable=between < max(0.2, short.estimate / 2))


def about_gaps(gaps: Gaps) -> list[Finding]:
    """Amortization and approximation gap of held-out rows."""
    reliable = bool((gaps.evidence.effective_sample_size > 10).double().mean() > 0.5)
    approximation = APPROXIMATION if gaps.reference == "diagonal Gaussian" else FULL_APPROXIMATION
    sizes = (interval(part.cpu().numpy()) for part in (gaps.amortization, gaps.approximation))
    return [
        Finding(AMORTIZATION, next(sizes), gaps.reference),
        Finding(approximation, next(sizes), gaps.reference, reliable),
    ]


def about_spread(simulations: Simulations) -> Finding:
    """The width of q(z|x), over all latents."""
    scores = simulations.z_scores
    squares = ((scores - scores.mean(0)) ** 2).mean(1)
    return Finding(WIDTH, _transformed(squares, _root))


def about_bias(simulations: Simulations) -> Finding:
    """The largest systematic error of a latent's mean."""
    worst, size = worst_mean(simulations.z_scores)
    return Finding(BIAS, size, simulations.names[worst])


def about_coverage(coverage: Coverage, level: float = 0.9) -> list[Finding]:
    """Central intervals and highest-density regions at the level nearest to the one given."""
    row = int(np.abs(coverage.nominal - level).argmin())
    findings = []
    for check, name in ((INTERVALS, MEAN), (REGIONS, HDR)):
        column = coverage.names.index(name)
        covered = (coverage.covered, coverage.low, coverage.high)
        size = Interval(*(float(values[row, column]) for values in covered))
        findings.append(Finding(replace(check, ideal=float(coverage.nominal[row])), size))
    return findings


def about_likelihood_ranks(simulations: Simulations) -> Finding:
    """Ranks of log p(x|z): whether the guide uses x as much as the posterior does."""
    ranks = simulations.ranks[:, simulations.names.index(LIKELIHOOD)]
    # The L draws divide [0, 1] into L + 1 cells. Uniform ranks have cell midpoints of mean ½.
    return Finding(LIKELIHOOD_RANKS, interval((ranks + 0.5) / (simulations.num_draws + 1)))


def about_collapse(use: LatentUse) -> Finding:
    """Latents that carry no information. Pruned latents are no error, unless all are."""
    share = float(use.collapsed.mean())
    check = FULL_COLLAPSE if use.collapsed.all() else COLLAPSE
    return Finding(check, Interval(share, share, share), str(len(use.kl)))


def about_chains(comparison: Comparison) -> list[Finding]:
    """q(z|x) compared with NUTS. Doubtful if the chains disagree."""
    agree = bool(comparison.r_hat.max() < 1.05)
    # The chains' own means have the variance 1/ESS, which the mean square contains.
    squares = comparison.mean_difference**2 - 1 / comparison.effective_sample_size
    ratio = _transformed(np.log(comparison.scale_ratio).mean(1), np.exp)
    return [
        Finding(CHAIN_MEANS, _transformed(squares.mean(1), _root), reliable=agree),
        Finding(CHAIN_WIDTHS, ratio, reliable=agree),
    ]


def about_predictions(check: PredictiveCheck) -> Finding:
    """The statistic in which held-out rows differ most from their replicates."""
    worst, size = worst_mean(check.effects)
    return Finding(PREDICTIONS, size, check.names[worst])


def about_aggregate(blocks: np.ndarray) -> Finding:
    """The aggregate posterior of simulated rows, which for an exact guide is the prior.

    Args:
        blocks: energy coefficients of independent parts of the draws.
    """
    return Finding(AGGREGATE, interval(blocks))


def about_holes(shares: np.ndarray, count: int) -> Finding:
    """Holes of the aggregate posterior of real rows.

    The interval contains two: of the mean of the repetitions, whose spread is the classifier's too,
    and of the share of all draws of the prior, which counts where all repetitions are equal.

    Args:
        shares: (R,) of `holes`, each on draws of its own.
        count: number of the prior's draws of each.
    """
    repeated = interval(shares)
    drawn = share_interval(np.arange(len(shares) * count) < round(shares.sum() * count))
    low, high = min(repeated.low, drawn.low), max(repeated.high, drawn.high)
    return Finding(HOLES, Interval(repeated.estimate, max(low, 0.0), min(high, 1.0)))


def about_local(correct: np.ndarray) -> Finding:
    """The local test: (N,) whether its classifier finds the truth in pairs new to it."""
    return Finding(LOCAL, share_interval(correct))


def worst_mean(values: np.ndarray) -> tuple[int, Interval]:
    """The column of (B, K) whose mean is furthest from 0, and the interval of this mean.

    The intervals hold for all columns at once, by Bonferroni's correction.
    """
    intervals = [interval(column, 0.05 / values.shape[1]) for column in values.T]
    worst = int(np.argmax([abs(one.estimate) for one in intervals]))
    return worst, intervals[worst]


def _transformed(values: np.ndarray, transform: Callable[[float], float]) -> Interval:
    """The interval of the mean of `values`, on another scale."""
    mean = interval(values)
    return Interval(*(float(transform(v)) for v in (mean.estimate, mean.low, mean.high)))


def _root(square: float) -> float:
    return max(square, 0.0) ** 0.5
