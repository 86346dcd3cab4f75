"""Model and guide are the three distributions, and SVI trains all of both."""

from __future__ import annotations

import copy
import math

import pyro
import pytest
import torch
from conftest import all_likelihoods, batch, example_vae
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import kl_divergence

import pyro_vae


def by_hand(vae, x, sign=1.0, kl_weight=1.0):
    """Σ over images of log p(x|z) + w·(log p(z) − log q(z|x)) at one draw of z."""
    posterior = vae.posterior(x)
    z = posterior.rsample()
    kl = posterior.log_prob(z) - vae.prior().log_prob(z)
    return (vae.likelihood(z).log_prob(x) - sign * kl_weight * kl).sum().item()


@all_likelihoods
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_elbo_of_svi_is_that_of_the_three_distributions(name, architecture, tmp_path):
    shape = (1, 4, 5) if architecture == "mlp" else (3, 9, 8)
    vae, splits = example_vae(name, tmp_path, shape, architecture=architecture)
    x = batch(splits, name)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    torch.manual_seed(1)
    loss = svi.evaluate_loss(x)
    torch.manual_seed(1)
    assert -loss == pytest.approx(by_hand(vae, x), rel=1e-9)
    # power: a wrong sign of the KL is far outside that tolerance
    torch.manual_seed(1)
    assert -loss != pytest.approx(by_hand(vae, x, sign=-1.0), rel=1e-9)


def test_kl_weight_scales_model_and_guide(tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    x = batch(splits, "binomial")
    losses = {}
    for name in ("trace", "mean-field"):
        elbo = pyro_vae.objective(name)
        elbo.kl_weight = 0.3
        torch.manual_seed(1)
        losses[name] = -elbo.loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    assert losses["trace"] == pytest.approx(by_hand(vae, x, kl_weight=0.3), rel=1e-9)
    torch.manual_seed(1)
    posterior = vae.posterior(x)
    reconstruction = vae.likelihood(posterior.sample()).log_prob(x)
    analytic = (reconstruction - 0.3 * kl_divergence(posterior, vae.prior())).sum().item()
    assert losses["mean-field"] == pytest.approx(analytic, rel=1e-9)


@all_likelihoods
@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_every_parameter_moves_with_a_second_model_alive(name, kind, tmp_path):
    """Under Pyro's own optimizer and global store, the traps of which are silent."""
    first, splits = example_vae(name, tmp_path, kind=kind)
    models = [first, example_vae(name, tmp_path, kind=kind)[0], copy.deepcopy(first)]
    x = batch(splits, name)
    for vae in models:
        before = {key: value.clone() for key, value in vae.named_parameters()}
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
        svi.step(x)
        svi.step(x)  # with a zero output layer at first, gradients reach the rest one step later
        still = [k for k, value in vae.named_parameters() if torch.equal(value, before[k])]
        assert not still
    assert len(pyro.get_param_store()) == 3 * len(list(first.parameters()))


def test_sites_plate_and_shapes(tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    x = batch(splits, "binomial")
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
    assert set(guide.stochastic_nodes) == {"data", "z"}  # Pyro counts the plate
    assert set(model.stochastic_nodes) == {"data", "z"}
    assert set(model.observation_nodes) == {"x"}
    for site in (model.nodes["z"], model.nodes["x"], guide.nodes["z"]):
        (plate,) = site["cond_indep_stack"]
        assert (plate.name, plate.size, plate.dim) == ("data", 8, -1)
    assert (vae.prior().batch_shape, vae.prior().event_shape) == ((), (3,))
    posterior = vae.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((8,), (3,))
    likelihood = vae.likelihood(torch.zeros(5, 2, 3).double())
    assert (likelihood.batch_shape, likelihood.event_shape) == ((5, 2), (1, 4, 5))


def test_elbo_terms_average_to_the_elbo(tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    x = batch(splits, "binomial")
    torch.manual_seed(3)
    reconstruction, kl = vae.elbo_terms(x)
    assert reconstruction.shape == kl.shape == (8,)
    assert (kl >= 0).all()
    torch.manual_seed(3)
    loss = pyro.infer.TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    assert (reconstruction - kl).sum().item() == pytest.approx(-loss, rel=1e-9)


def test_untrained_decoder_knows_the_mean_of_the_data(tmp_path):
    vae, splits = example_vae("bernoulli", tmp_path)
    mean = splits.train.values[splits.train.rows].float().mean(0)
    decoded = torch.sigmoid(vae.decoder.bias[0])
    expected = mean.clamp(1e-3, 1 - 1e-3).double()
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_autoencoder_is_reconstruction_alone(tmp_path):
    vae, splits = example_vae("binomial", tmp_path, kind="ae")
    x = batch(splits, "binomial")
    expected = vae.likelihood(vae.encoder(x)).log_prob(x).sum().item()
    assert -Trace_ELBO().loss(vae.model, vae.guide, x) == pytest.approx(expected, rel=1e-9)
    posterior = vae.posterior(x)
    assert posterior.event_shape == (3,)
    assert posterior.variance.abs().max() == 0
    reconstruction, kl = vae.elbo_terms(x)
    assert kl is None
    assert math.isclose(reconstruction.sum().item(), expected, rel_tol=1e-9)
    assert vae.reconstruct(x).shape == x.shape
