"""Advice names a command that fits the model, with the run's path quoted for a shell."""

from __future__ import annotations

import shlex

import pytest

import pyro_vae
from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics.advice import remedies
from pyro_vae.diagnostics.findings import Check, Finding
from pyro_vae.evidence.intervals import Interval

CHECKS = {name: check for name, check in vars(verdicts).items() if isinstance(check, Check)}


def advice(name: str, run: str = "RUN", **settings) -> str:
    model = pyro_vae.ModelConfig(**settings)
    entry = Finding(CHECKS[name], Interval(9.0, 9.0, 9.0))
    return entry.as_dict(remedies(run, model))["advice"]


def commands(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith("python -m")]


MENDED = [
    "INTERVALS",
    "REGIONS",
    "WIDTH",
    "BIAS",
    "AMORTIZATION",
    "APPROXIMATION",
    "CHAIN_MEANS",
    "CHAIN_WIDTHS",
    "WEIGHTS",
    "LOCAL",
    "LIKELIHOOD_RANKS",
    "BOUNDS",
]


@pytest.mark.parametrize("name", MENDED)
def test_what_a_guide_can_mend_names_the_command(name):
    """A refit, unless the guide is refined; then draws for each row."""
    for guide in ("diagonal", "full", "flow", "mixture", "refined"):
        found = commands(advice(name, guide=guide))
        trained = [line for line in found if "refit" in line]
        assert trained == ([] if guide == "refined" else ["python -m pyro_vae.refit RUN"]), guide
        if guide == "refined":
            assert [line for line in found if "--draws" in line]
        assert len(set(found)) == len(found), "each once"


def test_widths_and_coverage_name_recalibration():
    for name in ("WIDTH", "INTERVALS"):
        assert commands(advice(name))[0] == (
            "python -m pyro_vae.encode RUN --recalibrate --out codes.npz"
        )


def test_single_rows_have_draws():
    for name in ("WEIGHTS", "REGIONS", "AMORTIZATION", "APPROXIMATION", "CHAIN_MEANS", "LOCAL"):
        found = [line for line in commands(advice(name)) if "encode" in line]
        assert found == ["python -m pyro_vae.encode RUN --draws 1000 --out draws.npz"]


def test_holes_name_the_priors_that_the_model_can_have():
    assert "--prior mixture or flow or vamp; or use" in advice("HOLES")
    assert "--prior mixture or flow; or use" in advice("HOLES", guide="mixture")
    assert "--prior mixture or vamp; or use" in advice("HOLES", latent_dim=1)
    for prior in ("mixture", "vamp", "flow"):
        assert advice("HOLES", prior=prior).startswith("use fewer latents")


@pytest.mark.parametrize("run", ["my run's/best; rm -rf", "runs/a b", "runs/{mend}"])
def test_the_path_is_quoted(run):
    for name in CHECKS:
        for line in commands(advice(name, run)):
            words = shlex.split(line)
            assert words[:2] == ["python", "-m"]
            assert words[3] == run


@pytest.mark.parametrize("name", CHECKS)
def test_every_advice_is_complete(name):
    text = advice(name)
    assert text == text.strip()
    assert "{" not in text
    assert "None" not in text
    assert text
