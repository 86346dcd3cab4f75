"""The oracle table: every estimator of the package beside the truth, with its z-score.

    pytest -n0 -s tests/diagnostics/test_oracle_table.py

Truth is in closed form (`linear_gaussian.py`). Estimates are means over images, their standard
errors come from the spread over independent repetitions or over images. Unbiased estimates have to
lie within 4 standard errors, bounds on their side of the truth: false-alarm rate 6e-5 a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import SIGMAS

from pyro_vae.diagnostics.refinement import elbo, refine
from pyro_vae.diagnostics.sbc import miscalibration, simulate
from pyro_vae.evidence.annealing import anneal
from pyro_vae.evidence.importance import importance_sample, upper_bound
from pyro_vae.models.linear_gaussian import LinearGaussian

# name, truth, estimate, standard error, and on which side of the truth it may lie: = < >
Row = tuple[str, float, float, float, str]


def sound(row: Row) -> bool:
    _, truth, estimate, error, side = row
    score = (estimate - truth) / error
    return {"=": abs(score) < SIGMAS, "<": score < SIGMAS, ">": score > -SIGMAS}[side]


def over(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error of independent values."""
    values = values.double().flatten()
    return values.mean().item(), max(values.std().item() / math.sqrt(len(values)), 1e-12)


def rows() -> list[Row]:
    torch.manual_seed(0)
    weight = torch.randn(6, 3, dtype=torch.float64)
    loc = torch.randn(6, dtype=torch.float64)
    exact = LinearGaussian(weight, loc, 1.0)
    diagonal = LinearGaussian(weight, loc, 1.0, "diagonal")
    narrow = LinearGaussian(weight, loc, 1.0, "diagonal", scale_factor=0.8)
    z = exact.prior().sample((800,))
    x = exact.likelihood(z).sample().detach()
    truth = exact.exact_log_evidence(x).detach()
    mean, gap = truth.mean().item(), diagonal.approximation_gap.item()

    def difference(name: str, values: torch.Tensor, side: str, truth_: float = mean) -> Row:
        """Its error is that of the difference to each image's own log p(x)."""
        off, error = over(values - truth)
        return name, truth_, mean + off, error, side

    def repeated(estimate: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.stack([estimate() for _ in range(20)]).mean(0)

    refined = refine(narrow, x, num_steps=300)
    with torch.no_grad():
        direct = elbo(exact, exact.posterior(x), x, 1)
        table = [
            (
                "ELBO, exact guide",
                mean,
                direct.mean().item(),
                1e-9 / SIGMAS,  # to floating-point accuracy, whatever the draw
                "=",
            ),
            difference(
                "ELBO, diagonal guide",
                elbo(diagonal, diagonal.posterior(x), x, 2000),
                "=",
                mean - gap,
            ),
            difference(
                "ELBO, guide refined by SVI",
                elbo(narrow, refined.posterior(x), x, 2000),
                "<",
                mean - gap,
            ),
            difference(
                "importance sampling, K = 5000",
                importance_sample(diagonal, x, 5000).log_evidence,
                "=",
            ),
            difference(
                "importance sampling, K = 2",
                repeated(lambda: importance_sample(diagonal, x, 2).log_evidence),
                "<",
            ),
            difference("upper bound, K = 2", repeated(lambda: upper_bound(diagonal, x, z, 2)), ">"),
            difference("upper bound, K = 5000", upper_bound(diagonal, x, z, 5000), "="),
        ]
    annealed = anneal(diagonal, x, 200, 8, z)
    table += [
        difference("annealing, forward, T = 200", annealed.lower, "<"),
        difference("annealing, reverse, T = 200", annealed.upper, ">"),
    ]
    overconfident = LinearGaussian(weight, loc, 1.0, scale_factor=0.8)
    sizes = miscalibration(simulate(overconfident, 3000))
    for j, spread in enumerate(sizes.spread):
        error = (spread.high - spread.low) / 2 / 1.96
        table.append((f"spread of z{j + 1}, sd * 0.8", 1 / 0.8, spread.estimate, error, "="))
    return table


@pytest.mark.slow
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows()
    lines = [f"{'estimator':<32}{'truth':>10}{'estimate':>10}{'error':>10}{'z':>8}"]
    for name, truth, estimate, error, side in table:
        score = (estimate - truth) / error
        lines.append(f"{name:<32}{truth:>10.4f}{estimate:>10.4f}{error:>10.1e}{score:>8.2f} {side}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert [row[0] for row in table if not sound(row)] == []
    assert max(row[3] for row in table if row[4] == "=") < 0.03, "errors small enough to matter"
    # power: the same rule rejects the diagonal guide's ELBO as log p(x), a bound on the wrong side,
    # and an overconfident guide taken for an exact one
    by_name = {row[0]: row for row in table}
    name, _, estimate, error, _ = by_name["ELBO, diagonal guide"]
    assert not sound((name, table[0][1], estimate, error, "="))
    for name, side in (("importance sampling, K = 2", ">"), ("upper bound, K = 2", "<")):
        assert not sound((*by_name[name][:4], side))
    for j in range(3):
        name, _, estimate, error, _ = by_name[f"spread of z{j + 1}, sd * 0.8"]
        assert not sound((name, 1.0, estimate, error, "="))
