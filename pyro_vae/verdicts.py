"""What the checks of a posterior found, in one line each: a size, its interval, a verdict, advice.

A size is compared with two limits, by its whole 95% interval:

    sound      the interval lies within the first limit: the error is shown to be small
    wrong      the interval lies beyond the second: the error is shown to be large
    doubtful   neither: in between, or too uncertain to say

So a verdict never rests on a p-value, which for a guide that is not exact only counts simulations;
and too few simulations make doubts, not trust. The limits are conventions; each finding shows its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .annealing import Annealed
from .calibration import HDR, LIKELIHOOD, MEAN, Coverage, Simulations
from .intervals import Interval, interval, share_interval
from .latents import LatentUse
from .nuts import Comparison
from .predictive import PredictiveCheck
from .refinement import Gaps

__all__ = [
    "Finding",
    "Verdict",
    "about_aggregate",
    "about_bias",
    "about_bounds",
    "about_chains",
    "about_collapse",
    "about_coverage",
    "about_gaps",
    "about_holes",
    "about_likelihood_ranks",
    "about_predictions",
    "about_spread",
    "about_weights",
    "number",
]

Verdict = Literal["sound", "doubtful", "wrong"]


def number(value: float) -> str:
    """A size as it is shown: to two places, below 1 to three."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        effect: what the number is, with its unit.
        size: the number and its 95% confidence interval.
        ideal: its value for an exact guide.
        limits: of sound and of wrong, as distances from `ideal`, or as ratios where `is_ratio`.
        is_ratio: whether deviations are ratios to `ideal`, 2 and ½ being equally far.
        meaning: what the number says.
        advice: what to do about it.
        wrong_at_all: whether the finding can be an error; if not it is doubtful at most.
        reliable: whether the check itself worked; if not the verdict is doubtful.
    """

    check: str
    effect: str
    size: Interval
    ideal: float
    limits: tuple[float, float]
    meaning: str
    advice: str
    is_ratio: bool = False
    wrong_at_all: bool = True
    reliable: bool = True

    @property
    def verdict(self) -> Verdict:
        ends = [self._distance(self.size.low), self._distance(self.size.high)]
        # The least distance is 0 where the interval holds the ideal value.
        least = 0.0 if self.size.low <= self.ideal <= self.size.high else min(ends)
        if not self.reliable:
            return "doubtful"
        if max(ends) <= self.limits[0]:
            return "sound"
        return "wrong" if least > self.limits[1] and self.wrong_at_all else "doubtful"

    def _distance(self, value: float) -> float:
        if not self.is_ratio:
            return abs(value - self.ideal)
        ratio = max(value, 1e-12) / self.ideal
        return max(ratio, 1 / ratio)


def about_weights(unreliable: np.ndarray) -> Finding:
    """Importance weights on held-out rows.

    Args:
        unreliable: (B,) whether k̂ of the row's weights is above `reliable_k`.
    """
    share = share_interval(unreliable)
    return Finding(
        check="importance weights",
        effect="share of rows whose Pareto k is too high to rely on log p(x)",
        size=share,
        ideal=0.0,
        limits=(0.1, 0.5),
        meaning="where k is high q(z|x) lacks mass that p(z|x) has, and log p(x) comes out too low",
        advice="quote log p(x) as a lower bound, with its number of samples; a wider or richer "
        "guide, or one refined for each row (pyro_vae.refinement), mends the weights",
    )


def about_bounds(annealed: Annealed, importance: np.ndarray) -> Finding:
    """How much too low importance-sampled log p(x) may be, on simulated rows.

    Args:
        annealed: with its reverse chains.
        importance: (B,) importance-sampled log p(x) of the same rows.
    """
    if annealed.upper is None:
        raise ValueError("the bounds expect reverse chains, from the z that generated x; got none")
    short = interval(annealed.upper.cpu().numpy() - importance)
    own = (annealed.upper - annealed.lower).mean().item()
    return Finding(
        check="log p(x), bounded",
        effect="annealed upper bound less importance-sampled log p(x), nats a row",
        size=short,
        ideal=0.0,
        limits=(0.2, 2.0),
        meaning="log p(x) as `evaluate` estimates it is too low by this at most; part of it may be "
        "the annealing's own error, see annealing_gap in diagnostics.json",
        advice="more importance samples; where the annealed lower bound is higher, quote that one",
        # Bounds that are as far from each other as from the estimate say nothing of it.
        reliable=own < max(0.2, short.estimate / 2),
    )


def about_gaps(gaps: Gaps) -> list[Finding]:
    """Amortization and approximation gap on held-out rows."""
    reliable = bool((gaps.evidence.effective_sample_size > 10).double().mean() > 0.5)
    return [
        Finding(
            check="amortization gap",
            effect="ELBO of the best diagonal Gaussian less the encoder's, nats a row",
            size=interval(gaps.amortization.cpu().numpy()),
            ideal=0.0,
            limits=(1.0, 5.0),
            meaning="the encoder's posterior is worse by this than one fitted to each row alone",
            advice="more data or fewer epochs, if training and validation ELBO part; else a larger "
            "encoder; or refine each row's posterior by SVI (pyro_vae.refinement)",
        ),
        Finding(
            check="approximation gap",
            effect="log p(x) less the best diagonal Gaussian's ELBO, nats a row",
            size=interval(gaps.approximation.cpu().numpy()),
            ideal=0.0,
            limits=(1.0, 5.0),
            meaning="no Gaussian with independent latents comes closer, however it is trained",
            advice="a guide with full covariance, more particles with --objective dreg, or fewer "
            "latents",
            reliable=reliable,
        ),
    ]


def about_spread(simulations: Simulations) -> Finding:
    """The width of q(z|x), over all latents."""
    scores = simulations.z_scores
    centred = interval(((scores - scores.mean(0)) ** 2).mean(1))
    ends = [max(value, 0.0) ** 0.5 for value in (centred.estimate, centred.low, centred.high)]
    narrow = ends[0] > 1
    return Finding(
        check="posterior width",
        effect="factor by which posterior sds fall short (root mean square z-score)",
        size=Interval(*ends),
        ideal=1.0,
        limits=(1.1, 1.5),
        is_ratio=True,
        meaning="intervals of q(z|x) are too "
        + ("narrow: the guide is overconfident" if narrow else "wide: the guide is too cautious"),
        advice="multiply the standard deviations by this factor before you use them as errors; "
        "--kl-warmup, more data for the encoder, or a richer guide mend it at the root",
    )


def about_bias(simulations: Simulations) -> Finding:
    """The worst systematic shift of a latent's mean.

    Simultaneous over latents: the interval of the worst is widened by Bonferroni's correction.
    """
    scores = simulations.z_scores
    intervals = [interval(column, 0.05 / scores.shape[1]) for column in scores.T]
    j = int(np.argmax([abs(i.estimate) for i in intervals]))
    return Finding(
        check="posterior bias",
        effect=f"mean z-score of {simulations.names[j]}, the worst latent, in posterior sds",
        size=intervals[j],
        ideal=0.0,
        limits=(0.2, 0.5),
        meaning="the posterior mean of that latent lies too low by this, over data of the model",
        advice="longer training, a learning rate that falls (--schedule cosine), or a larger "
        "encoder",
    )


def about_coverage(coverage: Coverage, level: float = 0.9) -> list[Finding]:
    """Central intervals and highest-density regions at the level nearest to the one given."""
    row = int(np.abs(coverage.nominal - level).argmin())
    nominal = float(coverage.nominal[row])
    findings = []
    for name, check, effect, limits in (
        (MEAN, "coverage, intervals", "of single latents' central intervals", (0.03, 0.1)),
        (HDR, "coverage, regions", "of joint highest-density regions", (0.05, 0.2)),
    ):
        column = coverage.names.index(name)
        covered = Interval(*(float(a[row, column]) for a in _coverage_arrays(coverage)))
        findings.append(
            Finding(
                check=check,
                effect=f"share of truths inside the {nominal:.0%} regions, {effect}",
                size=covered,
                ideal=nominal,
                limits=limits,
                meaning="regions hold the truth "
                + ("less" if covered.estimate < nominal else "more")
                + " often than they say",
                advice="widen them by the factor of `posterior width`"
                if name == MEAN
                else "joint regions suffer most from latents held independent: a guide with full "
                "covariance, or fewer latents",
            )
        )
    return findings


def about_likelihood_ranks(simulations: Simulations) -> Finding:
    """Ranks of log p(x|z): does the guide use x as much as the posterior does?"""
    ranks = simulations.ranks[:, simulations.names.index(LIKELIHOOD)]
    # Midpoints of the cells that the L draws make: mean ½ for uniform ranks.
    mean = interval((ranks + 0.5) / (simulations.num_draws + 1))
    return Finding(
        check="use of the data",
        effect="mean rank of log p(x|z) at the truth among draws from q(z|x), 0 to 1",
        size=mean,
        ideal=0.5,
        limits=(0.05, 0.2),
        meaning="draws from q(z|x) explain x "
        + ("worse" if mean.estimate > 0.5 else "better")
        + " than draws from the posterior would",
        advice="above ½: --kl-warmup and more capacity against collapse, or a refined guide; below "
        "½: the guide is too narrow, see `posterior width`",
    )


def about_collapse(use: LatentUse) -> Finding:
    """Latents that carry nothing. Pruned latents are no error, unless all are."""
    share = float(use.collapsed.mean())
    all_collapsed = bool(use.collapsed.all())
    return Finding(
        check="collapsed latents",
        effect=f"share of the {len(use.kl)} latents with a KL below 0.01 nats",
        size=Interval(share, share, share),
        ideal=0.0,
        limits=(0.5, 0.99),
        meaning="every latent ignores x: the model is a likelihood without latents"
        if all_collapsed
        else "latents that the model has no use for: their posterior is the prior",
        advice="--kl-warmup 0.2, a smaller decoder, a lower --beta"
        if all_collapsed
        else "nothing, or as many fewer --latent-dim",
    )


def about_chains(comparison: Comparison) -> list[Finding]:
    """q(z|x) against NUTS. Doubtful where the chains do not agree with each other."""
    agree = bool(comparison.r_hat.max() < 1.05)
    # The chains' means are themselves uncertain by 1/√ESS: the mean square has that much of noise.
    squares = comparison.mean_difference**2 - 1 / comparison.effective_sample_size
    difference = _over(squares.mean(1), lambda value: max(value, 0.0) ** 0.5)
    ratio = _over(np.log(comparison.scale_ratio).mean(1), np.exp)
    trust = "" if agree else "the chains disagree (R-hat above 1.05): run them longer; "
    return [
        Finding(
            check="means against NUTS",
            effect="root mean square difference of posterior means, in sds of NUTS",
            size=difference,
            ideal=0.0,
            limits=(0.3, 1.0),
            meaning=f"{trust}q(z|x) is centred this far from the posterior of the same row",
            advice="as for the amortization gap: refine each row's posterior, or a larger encoder",
            reliable=agree,
        ),
        Finding(
            check="widths against NUTS",
            effect="geometric mean of sd of q(z|x) / sd of NUTS",
            size=ratio,
            ideal=1.0,
            limits=(1.2, 2.0),
            is_ratio=True,
            meaning=f"{trust}independent Gaussians are narrower than the posterior's marginals by "
            "their nature",
            advice="a guide with full covariance, or divide the sds by this ratio",
            reliable=agree,
        ),
    ]


def about_predictions(check: PredictiveCheck) -> Finding:
    """The statistic in which held-out rows differ most from what the model draws for them."""
    intervals = [interval(c, 0.05 / len(check.names)) for c in check.effects.T]
    t = int(np.argmax([abs(i.estimate) for i in intervals]))
    return Finding(
        check="predictive check",
        effect=f"{check.names[t]} of held-out rows less that of their replicates, in sds of these",
        size=intervals[t],
        ideal=0.0,
        limits=(0.5, 2.0),
        meaning="rows that the model draws, given this guide, differ from real ones in this",
        advice="another --likelihood, a larger decoder or more latents; log p(x|z) alone points at "
        "overfitting or at the guide",
    )


def about_aggregate(blocks: np.ndarray) -> Finding:
    """The aggregate posterior of simulated rows, which for an exact guide is the prior.

    Args:
        blocks: energy coefficients of independent parts of the draws.
    """
    return Finding(
        check="aggregate posterior",
        effect="energy coefficient between it and the prior, on simulated rows, 0 to 1",
        size=interval(blocks),
        ideal=0.0,
        limits=(0.02, 0.1),
        meaning="averaged over the model's own data q(z|x) does not give back p(z)",
        advice="the errors of `posterior width` and `posterior bias` add up to this: mend those",
    )


def about_holes(share: float, count: int) -> Finding:
    """Holes of the aggregate posterior of real rows: no error of inference.

    Args:
        share: of the prior's mass.
        count: number of prior draws.
    """
    return Finding(
        check="holes in the prior",
        effect="share of p(z) where the aggregate posterior of training rows is 10 times thinner",
        size=share_interval(np.arange(count) < round(share * count)),
        ideal=0.0,
        limits=(0.1, 1.0),
        meaning="z drawn there was never trained on: samples from them may be unlike any data",
        advice="fewer latents, --beta above 1, or draw z from the aggregate posterior",
        wrong_at_all=False,
    )


def _coverage_arrays(coverage: Coverage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return coverage.covered, coverage.low, coverage.high


def _over(values: np.ndarray, transform: Callable[[float], float]) -> Interval:
    """The interval of a mean, on another scale."""
    mean = interval(values)
    return Interval(*(float(transform(v)) for v in (mean.estimate, mean.low, mean.high)))
