"""Weights that are all zero, rows beyond float32, and rows that decide a mean alone."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import oracle
from pyro.distributions import Normal

import pyro_vae
from pyro_vae.evidence import anneal, importance_sample, upper_bound
from pyro_vae.evidence.evaluation import elbo_terms, evaluate, note_outlier
from pyro_vae.evidence.importance import pareto_k, reliable_k
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.runtime.files import to_json


class Nowhere(Normal):
    """A normal density that is zero for x above 100."""

    def log_prob(self, value):
        return torch.where(value > 100, -math.inf, super().log_prob(value))


class Half:
    """A model whose second row no z can have generated."""

    def prior(self):
        return Normal(torch.zeros(1), torch.ones(1)).to_event(1)

    def posterior(self, x):
        return Normal(x / 2, 0.8).to_event(1)

    def likelihood(self, z):
        return Nowhere(z, torch.ones(1)).to_event(1)


X = torch.tensor([[1.0], [200.0]])


def test_zero_weights_give_minus_infinity_marked_as_unreliable():
    evidence = importance_sample(Half(), X, 500, with_pareto_k=True)
    expected = Normal(0.0, math.sqrt(2)).log_prob(X[0, 0]).item()
    assert abs(evidence.log_evidence[0].item() - expected) < 0.1
    assert evidence.pareto_k[0] < reliable_k(500)
    assert evidence.log_evidence[1] == evidence.elbo[1] == evidence.reconstruction[1] == -math.inf
    assert evidence.standard_error[1] == evidence.pareto_k[1] == math.inf
    assert evidence.effective_sample_size[1] == 0
    assert 1 < evidence.effective_sample_size[0] <= 500


def test_zero_weights_in_the_other_estimators():
    torch.manual_seed(0)
    z = torch.tensor([[0.5], [0.5]])
    assert upper_bound(Half(), X, z, 50)[1] == -math.inf
    annealed = anneal(Half(), X, 20, 4, z=z)
    exact = quadrature(Half(), X)
    for value in (annealed.lower, annealed.upper, exact.log_evidence):
        assert torch.isfinite(value[0])
        assert value[1] == -math.inf
    for error in (annealed.standard_error, exact.error):
        assert torch.isfinite(error[0])
        assert error[1] == math.inf
    assert torch.isfinite(annealed.acceptance).all()


def test_pareto_k_of_some_zero_weights_is_that_of_the_others_tail():
    torch.manual_seed(0)
    log_w = torch.randn(1000, 1, dtype=torch.float64)
    with_zeros = log_w.clone()
    with_zeros[log_w[:, 0].argsort()[:600]] = -math.inf
    nothing = torch.full((1000, 1), -math.inf)
    both = pareto_k(torch.cat([log_w, with_zeros, nothing], 1))
    assert both[1] == both[0]
    assert both[2] == math.inf


@pytest.fixture
def table(tmp_path):
    """A model of 3 columns, its splits, and the tensor of all rows, which a test may change."""
    random = np.random.default_rng(0)
    x = (random.normal(size=(400, 3)) @ random.normal(size=(3, 3))).astype(np.float32)
    splits = pyro_vae.load_data(x)
    return pyro_vae.build(pyro_vae.ModelConfig(hidden=(8,), latent_dim=2), splits), splits


@pytest.mark.parametrize("far", [1e30, -3e38])
def test_row_beyond_float32_is_evaluated_in_float64_and_named(table, far):
    vae, splits = table
    clean = evaluate(vae, splits.test, 100)
    row = int(splits.test.rows[7])
    splits.test.values[row, 1] = far
    away = (far - vae.likelihood_module.mean[1].item()) / vae.likelihood_module.std[1].item()
    noise = 1.01  # exp(0) + MIN_SCALE, of the untrained likelihood
    # All but log p of column 1 is lost in rounding.
    expected = -((away / noise) ** 2) / 2
    place = rf"row {row} of the data \(counted from 0\) alone decides the mean .* of 40 rows"
    column = rf"column 1 .counted from 0. holds {far:.5g}".replace("+", r"\+")
    with pytest.warns(UserWarning, match=f"{place}.* {column}"):
        result = evaluate(vae, splits.test, 100)
    assert result.log_evidence * 40 == pytest.approx(expected, rel=1e-3)
    assert result.elbo * 40 == pytest.approx(expected, rel=1e-3)
    assert all(math.isfinite(v) for v in asdict(result).values() if isinstance(v, float))
    with pytest.warns(UserWarning, match=place):
        reconstruction, kl = elbo_terms(vae, splits.test, note=True)
    assert reconstruction * 40 == pytest.approx(expected, rel=1e-3)
    assert math.isfinite(kl)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert elbo_terms(vae, splits.test)[0] == reconstruction  # no note unless requested
        # The other rows have the numbers that they had.
        assert evaluate(vae, splits.test, 100, num_rows=7) is not None
        assert math.isfinite(clean.log_evidence)


def test_autoencoder_names_the_row_too(table):
    _, splits = table
    vae = pyro_vae.build(pyro_vae.ModelConfig(kind="ae", hidden=(8,), latent_dim=2), splits)
    row = int(splits.test.rows[3])
    splits.test.values[row, 2] = 1e25
    with pytest.warns(UserWarning, match=f"row {row} of .*column 2 .counted from 0. holds 1e\\+25"):
        result = evaluate(vae, splits.test)
    assert -1e60 < result.reconstruction < -1e40
    assert result.kl is None


def test_training_names_the_row_that_chooses_the_best_epoch(table):
    vae, splits = table
    row = int(splits.validation.rows[5])
    splits.validation.values[row, 0] = 1e20
    config = pyro_vae.FitConfig(epochs=3, batch_size=100)
    with pytest.warns(UserWarning, match="decides the mean") as notes:
        records = pyro_vae.fit(vae, splits, config)
    (note,) = [str(n.message) for n in notes]  # after the first epoch only
    assert f"row {row} of the data (counted from 0) alone decides the mean ELBO of 36 rows" in note
    assert all(math.isfinite(r.validation_elbo) for r in records)


def noted(table, values):
    vae, splits = table
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        note_outlier(vae, splits.test, torch.tensor(values, dtype=torch.float64), "ELBO")
    return [str(n.message) for n in notes]


def test_note_at_both_sides_of_its_limit(table):
    """A row of ten times the distance of all nearer rows, and a little less."""
    near = [-1.0, 1, -2, 2, -3, 3, 0, 0, 0]  # distances from the median sum to 12
    assert noted(table, [*near, -119.0]) == []
    (note,) = noted(table, [*near, -121.0])
    row = int(table[1].test.rows[9])
    assert note.startswith(f"row {row} of the data (counted from 0) alone decides the mean ELBO of")
    assert "it has -121 nats, the median is 0" in note
    assert noted(table, [*near, 121.0]) != []
    # Several outliers do not hide one another; the farthest is named.
    (note,) = noted(table, [-500.0, *near, 600.0, -700.0])
    row = int(table[1].test.rows[11])
    assert note.startswith(f"row {row} of the data (counted from 0) and 2 more decide the mean")
    # Few rows, and equal rows, name nobody.
    assert noted(table, [0.0, 1, 2, 3, 4, 5, 1e9]) == []
    assert noted(table, [1.0] * 10) == []
    assert noted(table, [math.nan] * 10) == []


def test_ordinary_rows_are_not_noted(table):
    """False alarms: none in 100 splits of 40 rows with values of a Gaussian log-density."""
    torch.manual_seed(0)
    for _ in range(100):
        assert noted(table, (-torch.randn(40, 3).square().sum(1) / 2).tolist()) == []


def test_note_of_images_names_no_column(tmp_path):
    images = np.random.default_rng(0).normal(size=(60, 1, 4, 4)).astype(np.float32)
    splits = pyro_vae.load_data(images)
    vae = pyro_vae.build(pyro_vae.ModelConfig(hidden=(4,), latent_dim=2), splits)
    splits = replace(splits, test=replace(splits.train, rows=splits.train.rows[:10]))
    (note,) = noted((vae, splits), [0.0] * 9 + [-5.0])
    assert "column" not in note
    assert note.endswith("Check this row")


def test_json_is_valid_whatever_the_numbers_are():
    values = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, 2)], "c": {"d": None, "e": "NaN"}}

    def refuse(token):
        raise AssertionError(token)

    plain = json.loads(to_json(values, indent=2), parse_constant=refuse)
    assert plain == {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None, "e": "NaN"}}


def test_oracle_evidence_is_unchanged_by_an_outlier_beside_it():
    vae, x = oracle(4, 2, 0)
    torch.manual_seed(0)
    alone = importance_sample(vae, x[:5], 200).log_evidence
    torch.testing.assert_close(alone, vae.exact_log_evidence(x[:5]), atol=1e-9, rtol=0)
    far = torch.cat([x[:5], 1e12 * torch.ones(1, 4, dtype=torch.float64)])
    both = importance_sample(vae, far, 200).log_evidence
    torch.testing.assert_close(both[:5], alone, atol=1e-9, rtol=0)
    assert torch.isfinite(both).all()
