"""The studies of `diagnose`: numbers, findings and figures of one aspect of the inference each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data.missing import hidden_at_random
from ..data.splits import Split, Units
from ..evidence.annealing import anneal
from ..evidence.importance import importance_sample, reliable_k, upper_bound
from ..models.vae import VAE
from ..plots import calibration as calibration_figures
from ..plots import posterior as posterior_figures
from ..runtime.memory import rows_at_once
from ..runtime.randomness import derive
from . import findings as verdicts
from .aggregate import aggregate_posterior, energy_coefficient, energy_test, holes
from .latents import latent_use
from .nuts import compare_with_nuts
from .predictive import has_kinds, predictive_check
from .refinement import gaps
from .rows import columns_study, local_study, worst_rows
from .sbc import Simulations, check_ranks, coverage, gamma_band, miscalibration, simulate
from .study import Effort, Study

FULL = Effort()
QUICK = Effort(
    held_out=200,
    importance_samples=1000,
    refined=32,
    refine_steps=200,
    simulations=500,
    annealed=16,
    anneal_steps=200,
    anneal_chains=4,
    chain_rows=4,
    chains=2,
    chain_warmup=50,
    chain_draws=50,
    aggregate=500,
)
HOLE_REPETITIONS = 8  # of the search for holes, whose classifier varies with the draws


def random_numbers(split: Split, count: int, seed: int) -> Tensor:
    """Numbers in the data of at most `count` rows of a split: (B,).

    They are chosen at random: files are often sorted by class.
    """
    generator = torch.Generator().manual_seed(derive(seed, "rows"))
    return split.rows[torch.randperm(len(split), generator=generator, device="cpu")[:count]]


def random_rows(split: Split, units: Units, count: int, seed: int) -> Tensor:
    """The rows of `random_numbers`, as x."""
    part = dataclasses.replace(split, rows=random_numbers(split, count, seed), labels=None)
    return torch.cat(list(part.fixed(units, seed)))


def studies(
    vae: VAE,
    held_out: Tensor,
    training: Tensor,
    effort: Effort,
    advance: Callable[[float], object],
    numbers: Tensor,
) -> Iterator[Study]:
    """Make all studies in turn. Draws come from torch's global random state.

    Simulated rows lack values as held-out rows do, see `simulate`.

    Args:
        vae: the model with its guide.
        held_out: (B, *data_shape) rows outside the training split, at least 5.
        training: (N, *data_shape) rows of the training split, at least 5.
        effort: sizes of the computations.
        advance: called with the percentage of the whole work just done.
        numbers: (B,) numbers in the data of the held-out rows.
    """

    def part(percent: float, total: int) -> Callable[[int], object]:
        """Progress within a study that takes `percent` of the time, as measured on the digits."""
        return lambda done: advance(percent * done / total)

    weights = _weights(vae, held_out, effort, part(3, len(held_out) * effort.importance_samples))
    yield weights
    yield _latents(vae, held_out)
    advance(2)
    refined = held_out[: effort.refined]
    fitted = _gaps(vae, refined, effort, part(13, 2 * effort.refine_steps))
    yield fitted
    yield _calibration(vae, effort, part(8, effort.simulations), held_out)
    moves = 3 * effort.anneal_steps * effort.annealed * effort.anneal_chains
    yield _bounds(vae, effort, part(29, moves), held_out)
    transitions = effort.chains * (effort.chain_warmup + effort.chain_draws)
    yield _chains(vae, held_out[: effort.chain_rows], effort, part(18, transitions))
    yield _aggregate(vae, training, effort, held_out)
    advance(2)
    yield local_study(vae, refined, numbers, effort, part(25, 4 * effort.simulations))
    yield worst_rows(vae, held_out, numbers, weights.rows | fitted.rows, effort)


def _weights(vae: VAE, x: Tensor, effort: Effort, on_chunk: Callable[[int], object]) -> Study:
    num_samples = effort.importance_samples
    evidence = importance_sample(
        vae, x, num_samples, on_chunk, with_pareto_k=True, with_posterior=True
    )
    assert evidence.kl is not None
    k, size = _array(evidence.pareto_k), _array(evidence.effective_sample_size)
    limit = reliable_k(num_samples)

    # k is NaN if no weight of a row is finite, which is not reliable either.
    findings = [verdicts.about_weights(~(k <= limit))]
    details = {
        "elbo": (evidence.reconstruction - evidence.kl).mean().item(),
        "log_evidence": evidence.log_evidence.mean().item(),
        "importance_samples": num_samples,
        "pareto_k": {"limit": limit, **_summary(k[np.isfinite(k)])},
        "effective_sample_size": _summary(size),
    }
    figure = posterior_figures.weight_tails(
        k, size, num_samples, limit, "Importance weights of held-out rows"
    )
    rows = {"k": k, "log_evidence": _array(evidence.log_evidence)}
    return Study(findings, details, {"weights": figure}, rows)


def _latents(vae: VAE, x: Tensor) -> Study:
    use, check = latent_use(vae, x), predictive_check(vae, x)

    columns = columns_study(vae, x) if has_kinds(vae) else Study([], {}, {})
    findings = [verdicts.about_collapse(use), verdicts.about_predictions(check), *columns.findings]
    outside = abs(check.p_values - 0.5) > 0.475
    details = {
        "latent_kl": use.kl.tolist(),
        "latent_mean_variance": use.mean_variance.tolist(),
        "active_units": int(use.active.sum()),
        "predictive_effects": _by_name(check.names, check.effects.mean(0)),
        "predictive_p_values_beyond_95%": _by_name(check.names, outside.mean(0)),
        **columns.details,
    }
    names = [f"z{j + 1}" for j in range(len(use.kl))]
    title = "Statistics of held-out rows and of their replicates from the model"
    figures = {
        "latents": posterior_figures.latent_use(
            use.kl, use.mean_variance, use.active, names, "Use of each latent"
        ),
        "predictive": posterior_figures.predictive_checks(
            check.observed, check.replicated_mean, check.replicated_scale, check.names, title
        ),
        **columns.figures,
    }
    return Study(findings, details, figures)


def _gaps(vae: VAE, x: Tensor, effort: Effort, on_step: Callable[[int], object]) -> Study:
    result = gaps(vae, x, effort.refine_steps, effort.importance_samples, on_step)
    parts = {
        "amortization_gap": _array(result.amortization),
        "correlation_gap": _array(result.correlation),
        "remaining_gap": _array(result.remainder),
    }
    k = _array(result.evidence.pareto_k)

    details = {name: _summary(values) for name, values in parts.items()}
    details["refined_log_evidence"] = _summary(_array(result.evidence.log_evidence))
    details["refined_pareto_k"] = _summary(k[np.isfinite(k)])
    amortization, correlation, remainder = parts.values()
    title = "Gap between log p(x) and ELBO of held-out rows"
    figure = posterior_figures.inference_gaps(amortization, correlation, remainder, title)
    rows = {"gap": amortization, "refined_log_evidence": _array(result.evidence.log_evidence)}
    return Study(verdicts.about_gaps(result), details, {"gaps": figure}, rows)


def _calibration(
    vae: VAE, effort: Effort, on_chunk: Callable[[int], object], like: Tensor | None = None
) -> Study:
    simulations = simulate(vae, effort.simulations, effort.draws, on_chunk=on_chunk, like=like)
    covered, sizes = coverage(simulations), miscalibration(simulations)
    names = simulations.names[: simulations.z.shape[1]]

    findings = [
        verdicts.about_spread(simulations),
        verdicts.about_bias(simulations),
        *verdicts.about_coverage(covered),
        verdicts.about_likelihood_ranks(simulations),
    ]
    details = {
        "rank_tests": {
            test.name: {
                "gamma": test.gamma,
                "p_gamma": test.p_gamma,
                "p_chi_squared": test.p_chi_squared,
            }
            for test in check_ranks(simulations)
        },
        "bias": dict(zip(names, map(astuple, sizes.bias), strict=True)),
        "spread": dict(zip(names, map(astuple, sizes.spread), strict=True)),
        "coverage": {
            "nominal": covered.nominal.tolist(),
            **_by_name(covered.names, covered.covered.T),
        },
        "contraction": _by_name(names, simulations.contraction.mean(0)),
        "recovery": _by_name(names, simulations.recovery),
    }
    return Study(findings, details, _calibration_figures(simulations, names))


def _calibration_figures(simulations: Simulations, names: Sequence[str]) -> dict[str, Figure]:
    curve = coverage(simulations, tuple(np.linspace(0.1, 0.95, 18)))
    band = gamma_band(len(simulations.ranks), simulations.num_draws)
    # The two joint quantities come first, since only some of many latents are shown.
    order = [*range(len(names), len(simulations.names)), *range(len(names))]
    quantities = [simulations.names[i] for i in order]
    ranks, num_draws = simulations.ranks[:, order], simulations.num_draws
    return {
        "ranks": calibration_figures.rank_histograms(
            ranks, num_draws, quantities, "Ranks of the truth among draws from q(z|x)"
        ),
        "ecdf": calibration_figures.ecdf_differences(
            ranks, num_draws, quantities, *band, "Distribution of the ranks minus the uniform one"
        ),
        "coverage": calibration_figures.coverage_curve(
            curve.nominal, curve.covered, curve.low, curve.high, curve.names, "Expected coverage"
        ),
        "recovery": calibration_figures.recovery(
            simulations.z, simulations.mean, names, "Truth and posterior mean, simulated rows"
        ),
        "contraction": calibration_figures.contraction_and_z(
            simulations.contraction,
            simulations.z_scores,
            names,
            "Posterior z-score and contraction, simulated rows",
        ),
    }


def _bounds(
    vae: VAE, effort: Effort, on_step: Callable[[int], object], like: Tensor | None = None
) -> Study:
    with torch.no_grad():
        z = vae.prior().sample((effort.annealed,))
        x = hidden_at_random(vae.likelihood(z).sample(), like)
    importance = importance_sample(vae, x, effort.importance_samples).log_evidence
    free = upper_bound(vae, x, z, effort.importance_samples)
    annealed = anneal(vae, x, effort.anneal_steps, effort.anneal_chains, z, on_step)
    upper = _array(annealed.upper)
    bounds = {
        "importance sampling": (_array(importance), "lower"),
        "annealing, forward": (_array(annealed.lower), "lower"),
        "annealing, reverse": (upper, "upper"),
        "importance sampling with the true z": (_array(free), "upper"),
    }

    findings = [verdicts.about_bounds(annealed, _array(importance))]
    details = {
        "bounds": {name: _summary(values) for name, (values, _) in bounds.items()},
        "annealing_gap": _summary(upper - _array(annealed.lower)),
        "acceptance": annealed.acceptance.mean().item(),
    }
    # Relative to the annealed upper bound of each row, since log p(x) varies more between rows.
    shown = []
    for name, (values, kind) in bounds.items():
        difference = values - upper
        error = difference.std(ddof=1) / len(x) ** 0.5
        shown.append((name, float(difference.mean()), float(error), kind))
    title = "log p(x) of simulated rows, minus its annealed upper bound"
    figure = posterior_figures.sandwich(shown, title)
    return Study(findings, details, {"bounds": figure})


def _chains(vae: VAE, x: Tensor, effort: Effort, on_sample: Callable[[int], object]) -> Study:
    result = compare_with_nuts(
        vae, x, effort.chains, effort.chain_draws, effort.chain_warmup, on_sample
    )
    with torch.no_grad():
        posterior = vae.posterior(x)
        mean, scale = _array(posterior.mean), _array(posterior.variance.sqrt())

    details = {
        "nuts": {
            "rows": len(x),
            "r_hat": _summary(result.r_hat),
            "effective_sample_size": _summary(result.effective_sample_size),
            "divergences": result.divergences,
            "mean_difference": result.mean_difference.tolist(),
            "scale_ratio": result.scale_ratio.tolist(),
            "energy_coefficient": result.distance.tolist(),
            "energy_coefficient_of_halves": result.null_distance.tolist(),
        }
    }
    figure = posterior_figures.chains_against_guide(
        mean,
        scale,
        result.draws.mean((0, 1)),
        result.draws.std((0, 1)),
        "q(z|x) and NUTS, held-out rows",
    )
    return Study(verdicts.about_chains(result), details, {"nuts": figure})


def _aggregate(vae: VAE, training: Tensor, effort: Effort, like: Tensor | None = None) -> Study:
    count = min(effort.aggregate, len(training))
    with torch.no_grad():
        z = vae.prior().sample((effort.aggregate,))
        rows = rows_at_once(training[0].numel(), z.device)
        x = torch.cat([vae.likelihood(part).sample() for part in z.split(rows)])
        x = hidden_at_random(x, like)
        prior = _array(vae.prior().sample((effort.aggregate,)))
        priors = [_array(vae.prior().sample((count,))) for _ in range(HOLE_REPETITIONS)]
    simulated = aggregate_posterior(vae, x)
    blocks = zip(np.array_split(simulated, 10), np.array_split(prior, 10), strict=True)
    test = energy_test(simulated, prior)
    seen = [aggregate_posterior(vae, training[:count]) for _ in priors]
    shares = np.array([holes(a, b) for a, b in zip(seen, priors, strict=True)])

    findings = [
        verdicts.about_aggregate(np.array([energy_coefficient(a, b) for a, b in blocks])),
        verdicts.about_holes(shares, count),
    ]
    details = {
        "aggregate": {
            "simulated": {"energy_coefficient": test.coefficient, "p_value": test.p_value},
            "training": {
                "energy_coefficient": energy_coefficient(seen[0], prior),
                "holes": shares.tolist(),
            },
        }
    }
    title = "Prior, and the aggregate posterior of training rows"
    figure = posterior_figures.aggregate_posterior(prior, seen[0], title)
    return Study(findings, details, {"aggregate": figure})


def _array(values: Tensor | None) -> np.ndarray:
    """The values of a tensor that is not None."""
    assert values is not None
    return values.detach().cpu().numpy()


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))


def _summary(values: np.ndarray) -> dict[str, float | None]:
    """Mean, median and extremes; None if there are no values."""
    names = ("mean", "median", "least", "largest")
    if values.size == 0:
        return dict.fromkeys(names)
    numbers = (values.mean(), np.median(values), values.min(), values.max())
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}
