"""The amortization gap of each family of guides is measured against the best of that family."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.distributions import Categorical, Normal
from torch.distributions import kl_divergence

import pyro_vae
from pyro_vae.diagnostics import nuts, refinement, suite
from pyro_vae.diagnostics.findings import about_gaps
from pyro_vae.diagnostics.refinement import elbo, gaps
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.posteriors import ReparameterizedMixture
from pyro_vae.models.pyro_program import Program

STEPS, SAMPLES = 150, 4000
# Standard errors of a mean over 20 rows, which with SVI's own error is below this many nats; the
# largest error of ten seeds was 0.013.
NOISE = 0.04


def oracle(guide: str, **faults: float) -> tuple[LinearGaussian, torch.Tensor]:
    torch.manual_seed(1)
    weight, loc = torch.randn(5, 3).double(), torch.randn(5).double()
    vae = LinearGaussian(weight, loc, 0.6, guide, **faults)
    return vae, vae.likelihood(vae.prior().sample((20,))).sample().detach()


@pytest.mark.parametrize(
    "faults",
    [{"scale_factor": 1.4, "shift": 0.5}, pytest.param({}, marks=pytest.mark.slow)],
    ids=["wide and shifted", "exact"],
)
def test_a_full_guide_is_compared_with_the_best_full_gaussian(faults):
    """Its whole error is amortization: nothing is missing from the family, the posterior is in it.

    Against the best diagonal Gaussian, amortization would be smaller by the oracle's gap.
    """
    vae, x = oracle("exact", **faults)
    torch.manual_seed(2)
    found = gaps(vae, x, STEPS, SAMPLES)
    cost = kl_divergence(vae.posterior(x), vae.exact_posterior(x)).mean().item()
    assert (found.amortization.mean() - cost).abs() < NOISE
    assert found.amortization.min() >= 0
    assert (found.correlation == 0).all()
    assert 0 <= found.approximation.mean() < NOISE
    assert vae.approximation_gap > 5 * NOISE, "the diagonal reference is told apart"
    total = vae.exact_log_evidence(x) - elbo(vae, vae.posterior(x), x, SAMPLES)
    parts = found.amortization + found.correlation + found.remainder
    assert (parts - total).mean().abs() < NOISE
    assert found.reference == "full Gaussian"
    amortization, approximation = (finding.as_dict() for finding in about_gaps(found))
    assert amortization["effect"].startswith("ELBO of the best full Gaussian minus the encoder's")
    assert approximation["effect"].startswith("log p(x) minus the ELBO of the best full Gaussian")
    assert "independent latents" not in approximation["meaning"]


def test_a_diagonal_guide_is_compared_with_the_best_diagonal_gaussian():
    vae, x = oracle("diagonal", shift=0.5)
    found = gaps(vae, x, 20, 50)
    assert found.reference == "diagonal Gaussian"
    assert (found.correlation != 0).all()
    amortization, approximation = (finding.as_dict() for finding in about_gaps(found))
    assert amortization["effect"].startswith("ELBO of the best diagonal Gaussian minus the enc")
    assert approximation["effect"].startswith(
        "log p(x) minus the ELBO of the best diagonal Gaussian"
    )
    assert "independent latents" in approximation["meaning"]


def test_numbers_of_a_diagonal_guide_are_those_of_the_formula():
    """Bit for bit: two fits, three ELBOs and log p(x), drawn in this order."""
    vae, x = oracle("diagonal", shift=0.5)
    torch.manual_seed(3)
    found = gaps(vae, x, 10, 40)
    torch.manual_seed(3)
    diagonal = refinement.refine(vae, x, False, 10)
    full = refinement.refine(vae, x, True, 10, start=diagonal)
    own, best, joint = (elbo(vae, q.posterior(x), x, 40) for q in (vae, diagonal, full))
    evidence = refinement.importance_sample(vae, x, 40, proposal=full.posterior(x)).log_evidence
    assert torch.equal(found.amortization, best - own)
    assert torch.equal(found.correlation, joint - best)
    assert torch.equal(found.remainder, evidence - joint)


SCALE = 0.3


def two_modes(x: torch.Tensor) -> None:
    """x ~ N(|z₁|, SCALE²), z₂ unused: the posterior of z₁ has a mode on each side of 0."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", Normal(z[..., :1].abs(), SCALE).to_event(1), obs=x)


def both_modes(x: torch.Tensor) -> None:
    """The posterior, up to what reaches across 0."""
    mean = torch.cat([x, 0 * x], 1) / (1 + SCALE**2)
    scale = torch.tensor([SCALE / math.sqrt(1 + SCALE**2), 1.0]).expand(len(x), 2, 2)
    with pyro.plate("data", len(x), dim=-1):
        locs = torch.stack([mean, -mean], 1)
        weights = Categorical(logits=torch.zeros(len(x), 2))
        pyro.sample("z", ReparameterizedMixture(weights, Normal(locs, scale).to_event(1)))


def test_a_mixture_better_than_any_gaussian_has_no_gap():
    """A Gaussian holds one of two modes and loses log 2: no gap of a mixture that holds both."""
    x = torch.linspace(1.8, 2.6, 6)[:, None]
    program = Program(two_modes, both_modes, x=x[:1])
    torch.manual_seed(4)
    found = gaps(program, x, STEPS, SAMPLES)
    assert (found.amortization == 0).all()
    assert found.approximation.abs().max() < NOISE
    # power: what the best Gaussian alone would give
    diagonal = refinement.refine(program, x, num_steps=STEPS)
    gaussian = elbo(program, diagonal.posterior(x), x, SAMPLES)
    (amortization, _) = (finding.as_dict() for finding in about_gaps(found))
    assert "full Gaussian (or of q(z|x), where that is higher) minus" in amortization["effect"]
    assert ((found.evidence.log_evidence - gaussian) > math.log(2) - NOISE).all()


LITTLE = suite.Effort(
    held_out=9,
    importance_samples=60,
    refined=5,
    refine_steps=5,
    simulations=40,
    draws=19,
    annealed=3,
    anneal_steps=4,
    anneal_chains=2,
    chain_rows=2,
    chains=2,
    chain_warmup=4,
    chain_draws=4,
    aggregate=30,
)


def flow_guided() -> pyro_vae.VAE:
    torch.manual_seed(5)
    splits = pyro_vae.load_data(torch.randn(60, 3).numpy())
    config = pyro_vae.ModelConfig(latent_dim=2, hidden=(8,), guide="flow", likelihood="gaussian")
    return pyro_vae.build(config, splits)


def test_moments_of_a_flow_have_no_gradient(monkeypatch):
    """They are computed when they are asked for, outside of the guide's own call."""
    draws = torch.randn(2, 8, 2, 2).unbind(0)
    monkeypatch.setattr(nuts, "_chain", lambda *_: (draws[0], 0))
    study = suite._chains(flow_guided(), torch.randn(2, 3), LITTLE, lambda _: None)
    assert all(math.isfinite(finding.size.estimate) for finding in study.findings)


@pytest.mark.slow
def test_every_study_takes_a_flow():
    x, numbers = torch.randn(9, 3), torch.arange(9)
    studies = list(suite.studies(flow_guided(), x, x, LITTLE, lambda _: None, numbers))
    findings = [finding for study in studies for finding in study.findings]
    assert len(findings) == 16
    assert all(math.isfinite(finding.size.estimate) for finding in findings)
