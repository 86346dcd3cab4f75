"""What `diagnose` looks into: each study computes, judges and draws one side of the inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import posterior_figures as draw
from . import verdicts
from .aggregate import aggregate_posterior, energy_coefficient, energy_test, holes
from .annealing import anneal
from .calibration import (
    Simulations,
    check_ranks,
    coverage,
    gamma_band,
    miscalibration,
    simulate,
)
from .chunks import rows_at_once
from .evidence import importance_sample, reliable_k, upper_bound
from .latents import latent_use
from .nuts import compare_with_nuts
from .predictive import predictive_check
from .refinement import gaps
from .vae import VAE
from .verdicts import Finding

__all__ = ["FULL", "QUICK", "Effort", "Study", "studies"]


@dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        held_out: rows for weights, latents and predictive checks, at most.
        importance_samples: of z, for each of these and of the annealed rows.
        refined: rows with guides of their own, each by `refine_steps` of SVI for either family.
        simulations: for calibration, with `draws` each.
        annealed: simulated rows, by `anneal_steps` on `anneal_chains` chains each.
        chain_rows: rows for NUTS, on `chains` chains of `chain_warmup` and `chain_draws`.
        aggregate: draws from the aggregate posterior, at most.
    """

    held_out: int
    importance_samples: int
    refined: int
    refine_steps: int
    simulations: int
    draws: int
    annealed: int
    anneal_steps: int
    anneal_chains: int
    chain_rows: int
    chains: int
    chain_warmup: int
    chain_draws: int
    aggregate: int


QUICK = Effort(
    held_out=200,
    importance_samples=1000,
    refined=32,
    refine_steps=200,
    simulations=500,
    draws=199,
    annealed=16,
    anneal_steps=200,
    anneal_chains=4,
    chain_rows=4,
    chains=2,
    chain_warmup=50,
    chain_draws=50,
    aggregate=500,
)
FULL = Effort(
    held_out=1000,
    importance_samples=5000,
    refined=128,
    refine_steps=1000,
    simulations=4000,
    draws=199,
    annealed=64,
    anneal_steps=1000,
    anneal_chains=8,
    chain_rows=8,
    chains=4,
    chain_warmup=200,
    chain_draws=300,
    aggregate=2000,
)


@dataclass(frozen=True)
class Study:
    """Attributes:
    findings: lines of the table.
    details: numbers behind them, fit for JSON.
    figures: name → figure.
    """

    findings: list[Finding]
    details: dict[str, Any]
    figures: dict[str, Figure]


def studies(
    vae: VAE, held_out: Tensor, training: Tensor, effort: Effort, advance: Callable[[float], object]
) -> Iterator[Study]:
    """All studies, one after the other. Draws come from torch's global random state.

    Args:
        vae: the model with its guide.
        held_out: (B, *data_shape) rows that the training has not seen, at least 4.
        training: (N, *data_shape) rows that it has.
        effort: how much to compute.
        advance: called with percentages of the whole work as they are done.
    """
    # The share of the work that each study is, in percent, as measured on the digits.
    yield _weights(
        vae, held_out, effort, _steps(advance, 8, len(held_out) * effort.importance_samples)
    )
    yield _latents(vae, held_out, advance)
    yield _gaps(
        vae, held_out[: effort.refined], effort, _steps(advance, 25, 2 * effort.refine_steps)
    )
    yield _calibration(vae, effort, _steps(advance, 8, effort.simulations))
    pairs = 3 * effort.anneal_steps * effort.annealed * effort.anneal_chains
    yield _bounds(vae, effort, _steps(advance, 30, pairs))
    transitions = effort.chains * (effort.chain_warmup + effort.chain_draws)
    yield _chains(vae, held_out[: effort.chain_rows], effort, _steps(advance, 25, transitions))
    yield _aggregate(vae, training, effort, advance)


def _steps(
    advance: Callable[[float], object], percent: float, count: int
) -> Callable[[int], object]:
    return lambda done: advance(percent * done / count)


def _weights(vae: VAE, x: Tensor, effort: Effort, on_chunk: Callable[[int], object]) -> Study:
    evidence = importance_sample(vae, x, effort.importance_samples, on_chunk, with_pareto_k=True)
    assert evidence.pareto_k is not None
    k = evidence.pareto_k.cpu().numpy()
    size = evidence.effective_sample_size.cpu().numpy()
    threshold = reliable_k(effort.importance_samples)
    with torch.no_grad():
        kl = torch.distributions.kl_divergence(vae.posterior(x), vae.prior()).double()
    elbo = evidence.reconstruction - kl
    details = {
        "elbo": elbo.mean().item(),
        "log_evidence": evidence.log_evidence.mean().item(),
        "importance_samples": effort.importance_samples,
        "pareto_k": {"limit": threshold, **_summary(k[np.isfinite(k)])},
        "effective_sample_size": _summary(size),
    }
    figure = draw.weight_tails(
        k, size, effort.importance_samples, threshold, "Importance weights of held-out rows"
    )
    return Study([verdicts.about_weights(k > threshold)], details, {"weights": figure})


def _latents(vae: VAE, x: Tensor, advance: Callable[[float], object]) -> Study:
    use, check = latent_use(vae, x), predictive_check(vae, x)
    advance(2)
    names = [f"z{j + 1}" for j in range(len(use.kl))]
    details = {
        "latent_kl": use.kl.tolist(),
        "latent_mean_variance": use.mean_variance.tolist(),
        "active_units": int(use.active.sum()),
        "predictive_effects": dict(zip(check.names, check.effects.mean(0).tolist(), strict=True)),
        "predictive_p_values_beyond_95%": dict(
            zip(check.names, (abs(check.p_values - 0.5) > 0.475).mean(0).tolist(), strict=True)
        ),
    }
    return Study(
        [verdicts.about_collapse(use), verdicts.about_predictions(check)],
        details,
        {
            "latents": draw.latent_use(
                use.kl, use.mean_variance, use.active, names, "What each latent carries"
            ),
            "predictive": draw.predictive_checks(
                check.observed,
                check.replicated_mean,
                check.replicated_scale,
                check.names,
                "Held-out rows and what the model draws in their place",
            ),
        },
    )


def _gaps(vae: VAE, x: Tensor, effort: Effort, on_step: Callable[[int], object]) -> Study:
    result = gaps(vae, x, effort.refine_steps, effort.importance_samples, on_step)
    parts = {
        "amortization_gap": result.amortization,
        "correlation_gap": result.correlation,
        "remaining_gap": result.remainder,
        "refined_log_evidence": result.evidence.log_evidence,
    }
    arrays = {name: part.cpu().numpy() for name, part in parts.items()}
    assert result.evidence.pareto_k is not None
    k = result.evidence.pareto_k.cpu().numpy()
    details: dict[str, Any] = {name: _summary(array) for name, array in arrays.items()}
    details["refined_pareto_k"] = _summary(k[np.isfinite(k)])
    figure = draw.inference_gaps(
        arrays["amortization_gap"],
        arrays["correlation_gap"],
        arrays["remaining_gap"],
        "What the ELBO of held-out rows lacks to log p(x)",
    )
    return Study(verdicts.about_gaps(result), details, {"gaps": figure})


def _calibration(vae: VAE, effort: Effort, on_chunk: Callable[[int], object]) -> Study:
    simulations = simulate(vae, effort.simulations, effort.draws, on_chunk=on_chunk)
    covered = coverage(simulations)
    sizes = miscalibration(simulations)
    names = simulations.names[: simulations.z.shape[1]]
    details = {
        "rank_tests": {
            test.name: {
                "gamma": test.gamma,
                "p_gamma": test.p_gamma,
                "p_chi_squared": test.p_chi_squared,
            }
            for test in check_ranks(simulations)
        },
        "bias": {n: [i.estimate, i.low, i.high] for n, i in zip(names, sizes.bias, strict=True)},
        "spread": {
            n: [i.estimate, i.low, i.high] for n, i in zip(names, sizes.spread, strict=True)
        },
        "coverage": {
            "nominal": covered.nominal.tolist(),
            **dict(zip(covered.names, covered.covered.T.tolist(), strict=True)),
        },
        "contraction": dict(zip(names, simulations.contraction.mean(0).tolist(), strict=True)),
        "recovery": dict(zip(names, simulations.recovery.tolist(), strict=True)),
    }
    findings = [
        verdicts.about_spread(simulations),
        verdicts.about_bias(simulations),
        *verdicts.about_coverage(covered),
        verdicts.about_likelihood_ranks(simulations),
    ]
    return Study(findings, details, _calibration_figures(simulations, names))


def _calibration_figures(simulations: Simulations, names: tuple[str, ...]) -> dict[str, Figure]:
    levels = tuple(np.linspace(0.1, 0.95, 18))
    curve = coverage(simulations, levels)
    band = gamma_band(len(simulations.ranks), simulations.num_draws)
    # The two quantities of all latents first: of many latents only some are shown.
    order = [*range(len(names), len(simulations.names)), *range(len(names))]
    quantities = [simulations.names[i] for i in order]
    ranks, num_draws = simulations.ranks[:, order], simulations.num_draws
    return {
        "ranks": draw.rank_histograms(
            ranks, num_draws, quantities, "Ranks of the truth among draws from q(z|x)"
        ),
        "ecdf": draw.ecdf_differences(
            ranks, num_draws, quantities, *band, "Ranks: distribution less the uniform one"
        ),
        "coverage": draw.coverage_curve(
            curve.nominal, curve.covered, curve.low, curve.high, curve.names, "Expected coverage"
        ),
        "recovery": draw.recovery(
            simulations.z, simulations.mean, names, "Truth and posterior mean, simulated rows"
        ),
        "contraction": draw.contraction_and_z(
            simulations.contraction,
            simulations.z_scores,
            names,
            "Posterior z-score and contraction, simulated rows",
        ),
    }


def _bounds(vae: VAE, effort: Effort, on_step: Callable[[int], object]) -> Study:
    with torch.no_grad():
        z = vae.prior().sample((effort.annealed,))
        x = vae.likelihood(z).sample()
    importance = importance_sample(vae, x, effort.importance_samples).log_evidence
    free = upper_bound(vae, x, z, effort.importance_samples)
    annealed = anneal(vae, x, effort.anneal_steps, effort.anneal_chains, z, on_step)
    assert annealed.upper is not None
    bounds = {
        "importance sampling": (importance, "lower"),
        "annealing, forward": (annealed.lower, "lower"),
        "annealing, reverse": (annealed.upper, "upper"),
        "importance sampling with the true z": (free, "upper"),
    }
    details = {
        "bounds": {name: _summary(values.cpu().numpy()) for name, (values, _) in bounds.items()},
        "annealing_gap": _summary((annealed.upper - annealed.lower).cpu().numpy()),
        "acceptance": annealed.acceptance.mean().item(),
    }
    # Drawn against the annealed upper bound of each row: the rows' own spread would hide the rest.
    shown = []
    for name, (values, kind) in bounds.items():
        difference = (values - annealed.upper).double()
        error = difference.std().item() / len(x) ** 0.5
        shown.append((name, difference.mean().item(), error, kind))
    return Study(
        [verdicts.about_bounds(annealed, importance.cpu().numpy())],
        details,
        {
            "bounds": draw.sandwich(
                shown, "log p(x) of simulated rows, less its annealed upper bound"
            )
        },
    )


def _chains(vae: VAE, x: Tensor, effort: Effort, on_sample: Callable[[int], object]) -> Study:
    result = compare_with_nuts(
        vae, x, effort.chains, effort.chain_draws, effort.chain_warmup, on_sample
    )
    with torch.no_grad():
        posterior = vae.posterior(x)
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
    figure = draw.chains_against_guide(
        posterior.mean.cpu().numpy(),
        posterior.variance.sqrt().cpu().numpy(),
        result.draws.mean((0, 1)),
        result.draws.std((0, 1)),
        "q(z|x) and NUTS, held-out rows",
    )
    return Study(verdicts.about_chains(result), details, {"nuts": figure})


def _aggregate(
    vae: VAE, training: Tensor, effort: Effort, advance: Callable[[float], object]
) -> Study:
    count = min(effort.aggregate, len(training))
    with torch.no_grad():
        z = vae.prior().sample((effort.aggregate,))
        rows = rows_at_once(training[0].numel(), z.device)
        simulated_x = torch.cat([vae.likelihood(part).sample() for part in z.split(rows)])
        prior = vae.prior().sample((effort.aggregate,)).cpu().numpy()
    simulated = aggregate_posterior(vae, simulated_x)
    seen = aggregate_posterior(vae, training[:count])
    blocks = [
        energy_coefficient(a, b)
        for a, b in zip(np.array_split(simulated, 10), np.array_split(prior, 10), strict=True)
    ]
    test = energy_test(simulated, prior)
    share = holes(seen, prior[:count])
    advance(2)
    details = {
        "aggregate": {
            "simulated": {"energy_coefficient": test.coefficient, "p_value": test.p_value},
            "training": {"energy_coefficient": energy_coefficient(seen, prior), "holes": share},
        }
    }
    figure = draw.aggregate_posterior(
        prior, seen, "Prior, and the aggregate posterior of training rows"
    )
    findings = [
        verdicts.about_aggregate(np.array(blocks)),
        verdicts.about_holes(share, count),
    ]
    return Study(findings, details, {"aggregate": figure})


def _summary(values: np.ndarray) -> dict[str, float | None]:
    """Mean, median and extremes, or nothing of no values."""
    if values.size == 0:
        return dict.fromkeys(("mean", "median", "least", "largest"))
    numbers = (values.mean(), np.median(values), values.min(), values.max())
    names = ("mean", "median", "least", "largest")
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}
