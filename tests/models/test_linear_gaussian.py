"""The oracle against itself, against independent formulas, and against faults planted in it."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from conftest import SIGMAS, oracle
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_vae
from pyro_vae.capture.optimizer import OneOptimizer
from pyro_vae.models.linear_gaussian import LinearGaussian, probabilistic_pca

CASES = [(2, 1, 0), (5, 3, 1), (12, 7, 2), (3, 6, 3)]  # D, Z (Z > D too), seed


def elbo_draws(vae, x, count: int = 1):
    """log p(x, z) − log q(z|x) at draws of z: (count, B)."""
    posterior = vae.posterior(x)
    z = posterior.sample((count,))
    log_joint = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z)
    return (log_joint - posterior.log_prob(z)).detach()


@pytest.mark.parametrize("case", CASES)
def test_elbo_of_the_exact_guide_is_the_evidence_of_every_image(case):
    vae, x = oracle(*case)
    exact = vae.exact_log_evidence(x)
    draws = elbo_draws(vae, x, 5)
    torch.testing.assert_close(draws, exact.expand(5, 40), rtol=1e-9, atol=1e-9)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    assert -loss == pytest.approx(exact.sum().item(), rel=1e-9)
    torch.testing.assert_close(
        pyro_vae.log_evidence(vae, x, 3), exact.detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "fault", [{"scale_factor": 0.8}, {"shift": 0.1}, {"guide": "diagonal"}, {"guide": "collapsed"}]
)
def test_every_wrong_guide_is_seen_by_the_same_check(fault):
    vae, x = oracle(5, 3, 1, **fault)
    off = elbo_draws(vae, x)[0] - vae.exact_log_evidence(x)
    assert off.abs().median() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_exact_posterior_by_conditioning_the_joint_gaussian(case):
    """An independent formula: z and x are jointly Gaussian."""
    vae, x = oracle(*case)
    weight, noise = vae.weight, vae.noise_scale**2
    gain = weight.T @ torch.linalg.inv(weight @ weight.T + noise * torch.eye(len(weight)).double())
    posterior = vae.exact_posterior(x)
    torch.testing.assert_close(posterior.mean, (x - vae.loc) @ gain.T)
    covariance = torch.eye(case[1]).double() - gain @ weight
    torch.testing.assert_close(posterior.covariance_matrix[0], covariance)
    guide = vae.posterior(x)
    torch.testing.assert_close(guide.mean, posterior.mean)
    torch.testing.assert_close(guide.covariance_matrix, posterior.covariance_matrix)


def test_evidence_by_quadrature():
    """With one latent: Gauss-Hermite on 100 nodes."""
    import numpy as np

    vae, x = oracle(2, 1, 0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    log_weights = torch.from_numpy(np.log(weights / weights.sum()))[:, None]
    log_likelihood = vae.likelihood(torch.from_numpy(nodes)[:, None, None]).log_prob(x)
    torch.testing.assert_close(
        (log_likelihood + log_weights).logsumexp(0), vae.exact_log_evidence(x)
    )


@pytest.mark.parametrize("case", CASES)
def test_gap_of_the_diagonal_guide_is_the_closed_form(case):
    vae, x = oracle(*case, guide="diagonal")
    gap = kl_divergence(vae.posterior(x), vae.exact_posterior(x))
    torch.testing.assert_close(gap, vae.approximation_gap.expand(40))
    assert (vae.approximation_gap > 1e-3) == (case[1] > 1)
    # by simulation too: log p(x) − ELBO
    torch.manual_seed(0)
    short = vae.exact_log_evidence(x) - elbo_draws(vae, x, 20_000)
    error = short.std(0) / math.sqrt(20_000)
    assert ((short.mean(0) - vae.approximation_gap).abs() <= SIGMAS * error + 1e-9).all()


def test_no_other_diagonal_guide_is_better():
    vae, x = oracle(5, 3, 1, guide="diagonal")
    best = kl_divergence(vae.posterior(x), vae.exact_posterior(x)).mean()
    for name, change in [("log_scale", 0.05), ("log_scale", -0.05), ("bias", 0.02)]:
        getattr(vae.encoder, name).data += change
        assert kl_divergence(vae.posterior(x), vae.exact_posterior(x)).mean() > best
        getattr(vae.encoder, name).data -= change


@pytest.mark.parametrize("guide", ["exact", "diagonal", "collapsed"])
def test_planted_faults_are_what_they_say(guide):
    vae, x = oracle(5, 3, 1, guide=guide)
    wrong, _ = oracle(5, 3, 1, guide=guide, scale_factor=0.8, shift=0.5)
    torch.testing.assert_close(wrong.posterior(x).stddev, 0.8 * vae.posterior(x).stddev)
    shift = (wrong.posterior(x).mean - vae.posterior(x).mean) / vae.posterior(x).stddev
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5))


STEPS = 3000


def sample_data() -> torch.Tensor:
    torch.manual_seed(5)
    mixing = torch.randn(2, 6, dtype=torch.float64) * torch.tensor([[2.0], [1.0]])
    noise = 0.5 * torch.randn(2000, 6, dtype=torch.float64)
    return torch.randn(2000, 2, dtype=torch.float64) @ mixing + noise + 3


def test_probabilistic_pca_is_a_maximum():
    """The gradient of the exact likelihood vanishes there, and steps away lower it."""
    x = sample_data()
    vae = probabilistic_pca(x, 2)
    parameters = [vae.decoder.weight, vae.decoder.bias, vae.likelihood_module.log_scale]
    best = vae.exact_log_evidence(x).mean()
    for gradient in torch.autograd.grad(best, parameters):
        assert gradient.abs().max() < 1e-9
    torch.manual_seed(0)
    for parameter in parameters:
        for _ in range(5):
            step = 0.05 * torch.randn_like(parameter)
            parameter.data += step
            assert vae.exact_log_evidence(x).mean() < best
            parameter.data -= step


def test_scikit_learn_finds_the_same_likelihood():
    from sklearn.decomposition import PCA

    x = sample_data()
    ours = probabilistic_pca(x, 2).exact_log_evidence(x).mean().item()
    # scikit-learn divides the covariance by N − 1
    assert ours == pytest.approx(PCA(2).fit(x.numpy()).score(x.numpy()), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["exact", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_svi_reaches_the_optimum(guide):
    """From a random start: likelihood within 0.02 nats an image, posterior within KL 0.01."""
    x = sample_data()
    optimum = probabilistic_pca(x, 2)
    torch.manual_seed(1)
    vae = LinearGaussian(torch.randn(6, 2).double(), torch.zeros(6).double(), 1.0, guide)
    optimizer = OneOptimizer(torch.optim.Adam(vae.parameters(), lr=0.05))
    svi = SVI(vae.model, vae.guide, optimizer, loss=TraceMeanField_ELBO())
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for step in range(STEPS):
            optimizer.optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
            svi.step(x)
    short = optimum.exact_log_evidence(x).mean() - vae.exact_log_evidence(x).mean()
    assert 0 <= short.item() < 0.02
    exact = vae.exact_posterior(x)
    posterior = vae.posterior(x)
    if guide == "diagonal":  # at the optimum the guide has turned the latents until they fit it
        posterior = MultivariateNormal(posterior.mean, posterior.variance.diag_embed())
    assert kl_divergence(posterior, exact).mean().item() < 0.01


def test_bad_arguments():
    with pytest.raises(ValueError, match="latent_dim expects 1 to 5"):
        probabilistic_pca(sample_data(), 6)
    with pytest.raises(ValueError, match="variance beyond 2 directions; got none"):
        probabilistic_pca(torch.eye(6).double()[:1].expand(9, 6), 2)
