"""Draws in ArviZ's groups: at their places, and of the right distributions."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import SIGMAS
from scipy.stats import kstest

import pyro_vae
from pyro_vae import InputError
from pyro_vae.diagnostics import datatree
from pyro_vae.models.linear_gaussian import LinearGaussian

pytest.importorskip("arviz_base", reason="needs pip install '.[arviz]'")


@pytest.fixture(scope="module")
def exact():
    """A linear-Gaussian model of wide noise, and six rows."""
    torch.manual_seed(0)
    vae = LinearGaussian(torch.tensor([[0.5, 0.0], [0.3, 0.4], [0.0, -0.2]]), torch.zeros(3), 1.0)
    x = torch.randn(6, 3)
    torch.manual_seed(1)
    return vae, x, pyro_vae.to_datatree(vae, x, 4000, 4000, rows=list("abcdef"), latents=["u", "v"])


def test_groups_have_names(exact):
    tree = exact[2]
    sizes = {group: dict(tree[group].sizes) for group in tree.children}
    draws = {"chain": 1, "draw": 4000}
    assert sizes == {
        "posterior": {**draws, "row": 6, "latent": 2},
        "posterior_predictive": {**draws, "row": 6, "column": 3},
        "log_likelihood": {**draws, "row": 6},
        "observed_data": {"row": 6, "column": 3},
        "prior": {**draws, "latent": 2},
        "prior_predictive": {**draws, "column": 3},
        "sample_stats": {"row": 6},
    }
    assert list(tree["posterior"].row.values) == list("abcdef")
    assert list(tree["prior"].latent.values) == ["u", "v"]
    assert set(tree["sample_stats"].method.values) == {"importance"}


def test_draws_have_the_exact_moments(exact):
    """At SIGMAS standard errors of the effective number of draws."""
    vae, x, tree = exact
    q = vae.exact_posterior(x)
    count = tree["sample_stats"].effective_draws.values[:, None]
    z = tree["posterior"].z
    error = q.variance.sqrt().detach().numpy() / np.sqrt(count)
    assert (abs(z.mean(("chain", "draw")).values - q.mean.detach().numpy()) < SIGMAS * error).all()
    replicates = tree["posterior_predictive"].x
    mean = vae.likelihood(q.mean).mean.detach().numpy()
    assert (
        abs(replicates.mean(("chain", "draw")).values - mean).max() < SIGMAS * 1.5 / 4000**0.5 * 2
    )
    assert abs(tree["prior"].z.values.std() - 1) < SIGMAS / 8000**0.5
    expected = vae.likelihood(torch.from_numpy(z.values)).log_prob(x).detach().numpy()
    np.testing.assert_allclose(tree["log_likelihood"].x.values, expected, rtol=1e-5)
    np.testing.assert_array_equal(tree["observed_data"].x.values, x.numpy())


def test_leave_one_out_is_the_evidence(exact):
    """The latents of a row without it have their prior: its density is p(x)."""
    stats = pytest.importorskip("arviz_stats")
    vae, x, tree = exact
    found = stats.loo(tree, pointwise=True)
    assert (found.pareto_k < 0.5).all()
    np.testing.assert_allclose(found.elpd_i, vae.exact_log_evidence(x).detach(), atol=0.05)


def test_a_program_of_the_users_own():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) * 2 / 3, 3**-0.5).to_event(1))

    x = torch.randn(4, 2)
    tree = pyro_vae.to_datatree(pyro_vae.Program(model, guide, x), x, 50, 200)
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 50, "row": 4, "latent": 1}


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((3,), ["column"]),
        ((2, 9), ["channel", "time"]),
        ((1, 4, 4), ["channel", "height", "width"]),
        ((1, 4, 4, 4), ["channel", "depth", "height", "width"]),
    ],
)
def test_values_have_the_names_of_their_dimensions(shape, dims):
    assert datatree._data_dims(torch.zeros(5, *shape)) == dims


def test_mistakes(exact, monkeypatch):
    vae, x, _ = exact
    with pytest.raises(pyro_vae.InputError, match="rows expects 6 names; got 2"):
        pyro_vae.to_datatree(vae, x, rows=["a", "b"])
    with pytest.raises(pyro_vae.InputError, match="lower num_draws"):
        pyro_vae.to_datatree(vae, x, num_draws=10**12)
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(pyro_vae.InputError, match=r"pip install 'pyro-vae\[arviz\]'"):
        pyro_vae.to_datatree(vae, x)


def test_simulations_become_shares_that_agree_with_our_own_check(exact):
    """Their distribution function is that of the ranks; both show a guide that is too narrow."""
    vae, x, _ = exact
    torch.manual_seed(2)
    simulations = pyro_vae.simulate(vae, 300, 99)
    tree = pyro_vae.to_datatree(vae, x, 10, 2000, latents=["u", "v"], simulations=simulations)
    found = tree["prior_sbc"].z
    assert dict(found.sizes) == {"chain": 1, "draw": 300, "latent": 2}
    for i, name in enumerate("uv"):
        shares = found.sel(latent=name, chain=0).values
        for rank in (0, 24, 99):
            below = (simulations.ranks[:, i] <= rank).mean()
            assert (shares <= (rank + 0.5) / 100).mean() == below
        assert kstest(shares, "uniform").pvalue > 1e-4  # of ranks that are uniform
    torch.manual_seed(2)
    parts = vae.weight.detach(), vae.loc.detach(), 1.0
    narrow = pyro_vae.simulate(LinearGaussian(*parts, scale_factor=0.5), 300, 99)
    shares = pyro_vae.to_datatree(vae, x, 10, 2000, simulations=narrow)["prior_sbc"].z.values
    assert kstest(shares[0, :, 0], "uniform").pvalue < 1e-6
    assert pyro_vae.check_ranks(narrow)[0].p_value < 1e-6
    three = dataclasses.replace(narrow, z=np.zeros((300, 3)))
    with pytest.raises(InputError, match="simulations of 2 latents; got 3"):
        pyro_vae.to_datatree(vae, x, 10, 2000, simulations=three)
