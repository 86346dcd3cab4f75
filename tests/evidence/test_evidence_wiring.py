"""What connects the estimators: temperatures, limits, means over rows, and the numbers reported."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIGMAS, example_splits, example_vae, oracle

import pyro_vae
from pyro_vae.evidence import annealing, evaluation, importance
from pyro_vae.evidence.evaluation import ACTIVE_VARIANCE, elbo_terms, evaluate
from pyro_vae.evidence.importance import Evidence, importance_sample, reliable_k
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.log_weights import log_likelihood, log_weights
from pyro_vae.runtime.randomness import derive, random_states

# --- Annealing ---


def tempered(beta: float, steps: int, step_size: float, at: float | None = None):
    """The spread of chains started in π_β, which has precision 1 + 9 β, after steps of HMC on it.

    `at`: another temperature for the steps, a planted fault.
    """
    weight = torch.full((1, 1), 3.0, dtype=torch.float64)
    vae = LinearGaussian(weight, torch.zeros(1, dtype=torch.float64), 1.0)
    torch.manual_seed(0)
    # Many rows: each step draws one length for all chains of a row.
    x = torch.zeros(2000, 1, dtype=torch.float64)
    target = annealing._target(vae, annealing._likelihood(vae), x, [0.0, 1.0])
    precision = 1 + 9 * beta
    z = torch.randn(10, 2000, 1, dtype=torch.float64) / math.sqrt(precision)
    state, size = target.evaluate(z), torch.full((1, 2000, 1), step_size, dtype=torch.float64)
    for _ in range(steps):
        state, probability = annealing._hmc(target, state, beta if at is None else at, size)
    return state.z.flatten().square() * precision, probability.mean().item()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_kernel_leaves_its_own_temperature_invariant(beta):
    """Steps so large that their acceptance matters: about one in four is rejected."""
    squares, acceptance = tempered(beta, steps=6, step_size=1.8)
    assert 0.3 < acceptance < 0.8
    error = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - 1) <= SIGMAS * error
    # power: steps at a temperature a tenth away
    other, _ = tempered(beta, steps=6, step_size=1.8, at=beta + 0.1)
    assert abs(other.mean() - 1) > SIGMAS * error


def test_schedule_starts_at_the_prior_ends_at_the_posterior_and_is_slow_at_both_ends():
    betas = np.array(annealing._schedule(100))
    assert (betas[0], betas[-1], len(betas)) == (0, 1, 101)
    steps = np.diff(betas)
    assert (steps > 0).all()
    assert steps[50] > 5 * steps[0]
    np.testing.assert_allclose(steps, steps[::-1])


def test_width_is_that_of_prior_and_guide_and_step_sizes_follow_the_acceptance():
    vae, x = oracle(4, 2, 0, guide="diagonal")
    torch.manual_seed(0)
    target = annealing._target(vae, annealing._likelihood(vae), x[:3], [0.0, 1.0])
    torch.testing.assert_close(target.width(0.0), torch.ones(3, 2).double(), rtol=0.15, atol=0)
    guide = vae.posterior(x[:3]).variance.sqrt()
    torch.testing.assert_close(target.width(1.0), guide.detach(), rtol=0.3, atol=0)
    size = torch.ones(1, 2, 1)
    rate = torch.tensor([[1.0, 0.2]]).double()  # of two rows
    adapted = annealing._adapt(size, rate).flatten()
    assert adapted[0] > 1 > adapted[1]
    expected = torch.tensor([1 - annealing.ACCEPTANCE, 0.2 - annealing.ACCEPTANCE]).mul(0.2).exp()
    torch.testing.assert_close(adapted, expected.to(adapted))


def test_acceptance_is_the_mean_over_chains_and_inner_temperatures(monkeypatch):
    vae, x = oracle(4, 2, 0)
    torch.manual_seed(0)
    rates = []
    original = annealing._hmc

    def spy(*args):
        state, probability = original(*args)
        rates.append(probability)
        return state, probability

    monkeypatch.setattr(annealing, "_hmc", spy)
    count = []
    result = annealing.anneal(vae, x[:2], num_steps=6, num_chains=3, on_step=count.append)
    final = torch.stack(rates[5:])  # five steps of the pilot run, then five of the chains
    assert len(rates) == 10
    assert rates[0].shape == (3, 2)
    torch.testing.assert_close(result.acceptance, final.mean((0, 1)))
    assert count == [6] * 12  # one for each step of both runs


# --- Importance sampling ---


def test_log_weights_add_and_subtract_the_right_terms():
    vae, x = oracle(4, 2, 1, guide="diagonal")
    torch.manual_seed(0)
    q = vae.posterior(x)
    z = q.sample((5,))
    reconstruction, log_w = log_weights(vae, q, x, z)
    expected = torch.stack([vae.likelihood(row).log_prob(x) for row in z])
    torch.testing.assert_close(reconstruction, expected)
    torch.testing.assert_close(log_w, expected + vae.prior().log_prob(z) - q.log_prob(z))
    nodes = z[:, :1]  # (S, 1, Z): the same z for all rows
    torch.testing.assert_close(
        log_likelihood(vae, x, nodes),
        torch.stack([vae.likelihood(row.expand(40, 2)).log_prob(x) for row in nodes]),
    )


def test_estimates_are_those_of_the_weights(monkeypatch):
    """In several blocks, of which the last is smaller."""
    torch.manual_seed(0)
    log_w = torch.randn(70, 3, dtype=torch.float64) * 2 - 5
    log_lik = torch.randn(70, 3, dtype=torch.float64)
    blocks = iter(zip(log_lik.split(32), log_w.split(32), strict=True))
    seen = []
    result = importance._estimate(blocks, torch.device("cpu"), 70, seen.append, with_pareto_k=True)
    w = log_w.exp()
    torch.testing.assert_close(result.log_evidence, w.mean(0).log())
    torch.testing.assert_close(result.elbo, log_w.mean(0))
    torch.testing.assert_close(result.reconstruction, log_lik.mean(0))
    torch.testing.assert_close(result.effective_sample_size, w.sum(0).square() / w.square().sum(0))
    torch.testing.assert_close(result.standard_error, w.std(0) / w.mean(0) / math.sqrt(70))
    torch.testing.assert_close(result.pareto_k, importance.pareto_k(log_w))
    assert seen == [96, 96, 18]
    assert result.num_samples == 70


def test_weights_to_keep_are_compared_with_the_memory():
    vae, x = oracle(4, 2, 0)
    with pytest.raises(ValueError, match=r"not enough memory: the weights of 1,000,000,000,000"):
        importance_sample(vae, x, 10**12, with_pareto_k=True)
    with pytest.raises(ValueError, match=r"not enough memory: 1,000,000,000,000 steps of 8 chains"):
        pyro_vae.evidence.anneal(vae, x, 10**12)
    with pytest.raises(ValueError, match=r"not enough memory: 5 steps of 1,000,000,000,000 chains"):
        pyro_vae.evidence.anneal(vae, x, 5, 10**12)


def test_particles_of_a_step_are_limited_before_it():
    x = np.random.default_rng(0).normal(size=(60, 3000)).astype(np.float32)
    splits = pyro_vae.load_data(x)
    vae = pyro_vae.build(pyro_vae.ModelConfig(hidden=(4,), latent_dim=2), splits)
    config = pyro_vae.FitConfig(objective="iwae", num_particles=10**7, epochs=1, batch_size=40)
    with pytest.raises(ValueError, match="40 rows with 10,000,000 particles have 1,200,000,000"):
        pyro_vae.fit(vae, splits, config)


# --- Evaluation ---


@pytest.mark.parametrize(("num_samples", "share"), [(100, 0.75), (10_000, 0.25)])
def test_unreliable_share_follows_the_number_of_samples(num_samples, share, monkeypatch, tmp_path):
    """The limit of k is 0.5 for 100 samples and 0.7 for 10,000."""
    assert reliable_k(100) == pytest.approx(0.5)
    assert reliable_k(10_000) == pytest.approx(0.7)
    vae, splits = example_vae("binomial", tmp_path)
    ones = torch.ones(4, dtype=torch.float64)
    tails = torch.tensor([0.45, 0.55, 0.65, 0.75], dtype=torch.float64)

    def fixed(vae, x, num_samples, *args, **kwargs):
        return Evidence(-ones, ones, -ones, -ones, ones, num_samples, tails, ones, ones[:, None])

    monkeypatch.setattr(evaluation, "importance_sample", fixed)
    result = evaluate(vae.float(), splits.train, num_samples, num_rows=4)
    assert result.unreliable_weights == share


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_evaluation_is_that_of_each_row_in_turn(name, tmp_path):
    """Every number, against the distributions themselves, with three channels in each image."""
    vae, splits = example_vae(name, tmp_path, shape=(3, 3, 4))
    vae = vae.float()
    units = LIKELIHOODS[name].units
    count, samples = 5, 40
    result = evaluate(vae, splits.train, samples, count, seed=3)
    x = next(splits.train.fixed(units, 3, count))
    with torch.no_grad(), random_states(torch.device("cpu"), derive(3, "posterior")):
        evidence = importance_sample(vae, x, samples, with_pareto_k=True)
        posterior = vae.posterior(x)
    kl = (posterior.variance + posterior.mean.square() - 1 - posterior.variance.log()) / 2
    kl = kl.sum(1).double().mean().item()
    density = evidence.log_evidence
    assert result.reconstruction == pytest.approx(evidence.reconstruction.mean().item())
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.elbo == pytest.approx(result.reconstruction - result.kl)
    assert result.log_evidence == pytest.approx(density.mean().item())
    deviation = (density - density.mean()).square().sum() / (count - 1)
    assert result.standard_error == pytest.approx(math.sqrt(deviation / count))
    errors = evidence.standard_error.square().sum().sqrt().item() / count
    assert result.monte_carlo_error == pytest.approx(errors)
    if units in ("binary", "count"):  # 3 channels of 3 × 4 pixels
        assert result.bits_per_dim == pytest.approx(-result.log_evidence / 36 / math.log(2))
    else:
        assert result.bits_per_dim is None
    assert (result.num_images, result.num_samples) == (count, samples)
    assert result.binarization == "none"


def test_active_units_are_those_whose_mean_varies(tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    vae = vae.float()
    x = next(splits.train.fixed("count", 0))
    head = vae.encoder.layers[-1]
    with torch.no_grad():
        for j, factor in enumerate((0.9, 1.1, 4.0)):  # in units of the limit's deviation
            means = vae.posterior(x).mean[:, j]
            scale = factor * math.sqrt(ACTIVE_VARIANCE) / means.std()
            head.weight[j] *= scale
            head.bias[j] *= scale
    assert evaluate(vae, splits.train, 5, len(x)).active_units == 2


def test_the_posterior_of_a_row_is_found_once(tmp_path, monkeypatch):
    """That of a refined guide costs as much as hundreds of draws."""
    vae, splits = example_vae("binomial", tmp_path)
    vae = vae.float()
    rows, true = [], vae.posterior
    monkeypatch.setattr(vae, "posterior", lambda x: rows.append(len(x)) or true(x))
    evaluate(vae, splits.train, 5, 7)
    assert sum(rows) == 7


def test_few_samples_or_rows_leave_out_what_they_cannot_give(tmp_path):
    vae, splits = example_vae("binomial", tmp_path)
    vae = vae.float()
    one = evaluate(vae, splits.train, 30, 1)
    assert (one.standard_error, one.active_units) == (None, None)
    assert evaluate(vae, splits.train, 24, 4).unreliable_weights is None
    assert evaluate(vae, splits.train, 25, 4).unreliable_weights is not None
    assert evaluate(vae, splits.train, 1, 4).monte_carlo_error is None
    assert evaluate(vae, splits.train, 2, 4).monte_carlo_error is not None


def test_on_batch_has_the_means_so_far(tmp_path, monkeypatch):
    from pyro_vae.data import splits as data_splits

    monkeypatch.setattr(data_splits, "CHUNK", 10)
    vae, splits = example_vae("binomial", tmp_path)
    vae, seen, chunks = vae.float(), [], []
    result = evaluate(
        vae, splits.train, 30, 25, on_chunk=chunks.append, on_batch=lambda *v: seen.append(v)
    )
    assert len(seen) == 3
    assert seen[-1] == pytest.approx((result.elbo, result.log_evidence))
    first = evaluate(vae, splits.train, 30, 10)
    assert seen[0] == pytest.approx((first.elbo, first.log_evidence))
    assert sum(chunks) == 25 * 30


def test_elbo_terms_average_all_rows_of_unequal_batches(tmp_path, monkeypatch):
    from pyro_vae.data import splits as data_splits

    monkeypatch.setattr(data_splits, "CHUNK", 10)
    vae, splits = example_vae("binomial", tmp_path)
    vae = vae.float()
    _, kl = elbo_terms(vae, splits.train, num_images=13)
    x = torch.cat(list(splits.train.fixed("count", 0, 13)))
    posterior = vae.posterior(x)
    expected = torch.distributions.kl_divergence(posterior, vae.prior()).mean().item()
    assert kl == pytest.approx(expected, rel=1e-5)


def test_evaluation_reads_the_split_that_it_is_given(tmp_path):
    """Sentinel rows: each split has values of its own."""
    splits = example_splits("gaussian", tmp_path)
    vae = pyro_vae.build(pyro_vae.ModelConfig(hidden=(4,), latent_dim=2), splits).double()
    values = torch.zeros_like(splits.train.values)
    for level, name in enumerate(("train", "validation", "test"), 1):
        values[getattr(splits, name).rows] = 10.0 * level
    densities = []
    for name in ("train", "validation", "test"):
        split = replace(getattr(splits, name), values=values)
        densities.append(evaluate(vae.float(), split, 20, 3).reconstruction)
    assert densities[0] > densities[1] > densities[2]


# --- Models ---


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_reconstruction_is_a_mean_and_no_draw(name, tmp_path):
    vae, splits = example_vae(name, tmp_path)
    x = next(splits.train.fixed(LIKELIHOODS[name].units, 0, 6)).double()
    first, second = vae.reconstruct(x), vae.reconstruct(x)
    assert torch.equal(first, second)
    loc = vae.encoder(x).chunk(2, -1)[0]
    torch.testing.assert_close(first, vae.likelihood_module(vae.decoder(loc)).mean)


def test_discretized_logistic_starts_with_the_deviation_of_the_data(tmp_path):
    splits = example_splits("discretized-logistic", tmp_path)
    vae = pyro_vae.build(pyro_vae.ModelConfig(hidden=(4,), latent_dim=2), splits)
    x = next(splits.train.fixed("count", 0)).double()
    start = vae.likelihood_module.initial_bias()
    scale = vae.likelihood_module(start).base_dist.scale.double()
    deviation = scale * math.pi / math.sqrt(3)
    spread = (x - x.mean()).square().mean().sqrt()
    torch.testing.assert_close(deviation, spread.expand(1, 4, 5), rtol=1e-5, atol=0)
    torch.testing.assert_close(vae.decoder.bias.detach(), start)


@pytest.mark.parametrize("seed", [0, 3])
def test_binarization_and_noise_follow_the_seed(seed, tmp_path):
    """Of grey values, which are drawn as 0 or 1."""
    splits = example_splits("binomial", tmp_path)
    config = pyro_vae.ModelConfig(likelihood="bernoulli", hidden=(4,), latent_dim=2)
    vae = pyro_vae.build(config, splits)
    x = next(splits.train.fixed("binary", seed))
    with random_states(torch.device("cpu"), derive(seed, "posterior")):
        evidence = importance_sample(vae, x, 30)
    with random_states(torch.device("cpu"), derive(seed, "posterior")):
        reconstruction, kl = vae.elbo_terms(x)
    result = evaluate(vae, splits.train, 30, seed=seed)
    assert result.log_evidence == pytest.approx(evidence.log_evidence.mean().item(), rel=1e-12)
    assert result.binarization == f"fixed, seed {seed}"
    terms = elbo_terms(vae, splits.train, seed)
    expected = (reconstruction.double().mean().item(), kl.double().mean().item())
    assert terms == pytest.approx(expected, rel=1e-12)
