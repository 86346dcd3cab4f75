"""The guide held against NUTS: chains and comparison against the oracle, with planted faults.

NUTS is slow, so it runs a few times only. What is made of its draws is tested on exact independent
draws in its place, whose errors are known.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from conftest import batch, example_vae
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal

from pyro_vae.capture.captured import CapturedFunction, KnownGradient
from pyro_vae.data.splits import DataSpec
from pyro_vae.diagnostics import nuts
from pyro_vae.diagnostics.aggregate import energy_coefficient
from pyro_vae.diagnostics.nuts import compare_with_nuts
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.vae import VAE

# Each test rejects a true hypothesis at most so often, however many numbers it looks at.
FALSE_ALARM = 1e-4


def sigmas(count: int = 1) -> float:
    """How many standard errors `count` normal estimates may be off, with FALSE_ALARM in all."""
    return stats.norm.isf(FALSE_ALARM / 2 / count)


def oracle(guide="exact", count: int = 2, latent_dim: int = 2, **settings):
    """An oracle whose two latents have a posterior correlation of −0.62."""
    torch.manual_seed(2)
    weight = torch.tensor([[1, 0.8], [0.5, 1], [0, 0.3], [0.2, 0.1]]).double()[:, :latent_dim]
    vae = LinearGaussian(weight, torch.randn(4).double(), 0.8, guide, **settings)
    return vae, vae.likelihood(vae.prior().sample((count,))).sample().detach()


def exact_draws(vae, x, num_chains: int, num_samples: int) -> torch.Tensor:
    """(C, S, B, Z), independent, from p(z|x)."""
    return vae.exact_posterior(x).sample((num_chains, num_samples)).detach()


def compare(draws: torch.Tensor, vae, x, monkeypatch, diverged=(0,), distances=True):
    """`compare_with_nuts`, with chains that are these draws (C, S, B, Z)."""
    if not distances:  # which take longest
        monkeypatch.setattr(nuts, "energy_coefficient", lambda *_: 0.0)
    chains, counts = iter(draws), iter(diverged * len(draws))
    monkeypatch.setattr(nuts, "_sampler", lambda *_: lambda: None)
    monkeypatch.setattr(nuts, "_chain", lambda *_: (next(chains), next(counts)))
    return compare_with_nuts(vae, x, *draws.shape[:2])


# The chains


def moments_agree(comparison, mean: np.ndarray, scale: np.ndarray) -> bool:
    """Whether the chains' means and deviations (B, Z) are these, within Monte Carlo error."""
    size = comparison.effective_sample_size
    draws = comparison.draws
    means_off = np.abs(draws.mean((0, 1)) - mean) * np.sqrt(size) / scale
    scales_off = np.abs(draws.std((0, 1)) / scale - 1) * np.sqrt(2 * size)
    return bool(max(means_off.max(), scales_off.max()) < sigmas(2 * mean.size))


@pytest.fixture(scope="module")
def sampled():
    """Three chains of NUTS, with the exact guide."""
    vae, x = oracle()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    pyro.param("mine", torch.ones(2))
    torch.manual_seed(0)
    done = []
    comparison = compare_with_nuts(vae, x, 3, 200, 100, done.append)
    assert done == [1] * 900
    assert list(pyro.get_param_store().keys()) == ["mine"]
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())
    return vae, x, comparison


def test_chains_are_of_the_exact_posterior(sampled):
    vae, x, comparison = sampled
    exact = vae.exact_posterior(x)
    mean, scale = exact.mean.detach().numpy(), exact.stddev.detach().numpy()
    assert comparison.draws.shape == (3, 200, 2, 2)
    assert comparison.draws.dtype == np.float64
    assert (comparison.r_hat < 1.05).all()
    assert (comparison.effective_sample_size > 150).all()
    assert comparison.divergences == 0
    assert moments_agree(comparison, mean, scale)
    # the correlation of the latents, by Fisher's transformation
    wanted = exact.covariance_matrix[0, 0, 1].item() / scale[0].prod()
    error = sigmas(2) / math.sqrt(comparison.effective_sample_size.min() - 3)
    for image in range(2):
        found = np.corrcoef(comparison.draws[:, :, image].reshape(-1, 2).T)[0, 1]
        assert abs(math.atanh(found) - math.atanh(wanted)) < error
    # power: other posteriors, of a model whose noise is 30% off or of other images
    assert not moments_agree(comparison, mean + 0.4 * scale, scale)
    assert not moments_agree(comparison, mean, 1.3 * scale)
    assert not moments_agree(comparison, mean[::-1], scale)
    assert abs(wanted) > 1.5 * error


def test_the_exact_guide_agrees_with_its_chains(sampled):
    _, _, comparison = sampled
    error = sigmas(8) / np.sqrt(comparison.effective_sample_size)
    assert (np.abs(comparison.mean_difference) < error).all()
    assert (np.abs(comparison.scale_ratio - 1) < error / math.sqrt(2)).all()
    # 600 draws: noise of the coefficient is of the order of 1/600, or of 1/ESS
    assert (np.abs(comparison.distance) < 0.03).all()
    assert (np.abs(comparison.null_distance) < 0.03).all()


def test_a_wrong_guide_differs_from_the_chains():
    """Faults planted in the guide leave the chains as they are."""
    vae, x = oracle(scale_factor=0.5, shift=1.0)
    torch.manual_seed(1)
    comparison = compare_with_nuts(vae, x, 2, 100, 60)
    exact = vae.exact_posterior(x)
    assert moments_agree(comparison, exact.mean.detach().numpy(), exact.stddev.detach().numpy())
    error = sigmas(8) / np.sqrt(comparison.effective_sample_size)
    assert (np.abs(comparison.mean_difference - 1) < error * math.sqrt(1.5)).all()
    assert (np.abs(comparison.scale_ratio - 0.5) < error / 2 / math.sqrt(2)).all()
    assert (comparison.distance > 0.1).all()
    assert (np.abs(comparison.null_distance) < 0.1).all()


class Squared(nn.Module):
    def forward(self, z):
        return z.square()


class Broad(nn.Module):
    """A guide N(0, 1)."""

    def forward(self, x):
        return torch.zeros(*x.shape[:-1], 2, dtype=x.dtype)


@pytest.mark.slow
def test_two_modes_do_not_pass_for_one():
    """x = z² + noise: posteriors around ±2, between which no chain crosses.

    Chains that found both modes disagree, and R-hat says so. All four find one and the same with
    probability 1/8, and then nothing in the draws tells.
    """
    spec = DataSpec((1,), None, discrete=False)
    likelihood = LIKELIHOODS["gaussian"](spec, torch.zeros(1), torch.ones(1))
    likelihood.log_scale.data.fill_(math.log(0.2))
    decoder = nn.Sequential(Squared(), nn.Unflatten(-1, (1, 1)))
    vae = VAE(StandardNormal(1), Broad(), decoder, likelihood).double()
    torch.manual_seed(3)
    comparison = compare_with_nuts(vae, torch.full((24, 1), 4.0).double(), 4, 160, 40)
    assert (np.abs(np.abs(comparison.draws) - 2) < 0.5).all()
    sides = np.sign(comparison.draws[..., 0])  # (C, S, B)
    assert (sides == sides[:, :1]).all(), "no chain crosses"
    both = np.abs(sides.mean((0, 1))) < 1
    assert (~both).sum() <= stats.binom.isf(FALSE_ALARM, 24, 1 / 8)
    assert (comparison.r_hat[both] > 1.05).all()
    # where R-hat says nothing, the draws are of one mode, which is what they show
    one = comparison.r_hat[~both]
    assert one.size == 0 or np.median(one) < 1.05


@pytest.mark.parametrize("name", ["bernoulli", "discretized-logistic"])
def test_an_untrained_vae(name, tmp_path):
    """Any likelihood; parameters that were fixed stay so; an interruption restores all."""
    vae, splits = example_vae(name, tmp_path)
    x = batch(splits, name, 2)
    frozen = next(vae.decoder.parameters()).requires_grad_(False)
    torch.manual_seed(4)
    comparison = compare_with_nuts(vae, x, 2, 6, 4)
    assert comparison.draws.shape == (2, 6, 2, 3)
    assert np.isfinite(comparison.distance).all()

    class Stop(Exception):
        pass

    def stop(_):
        assert not any(p.requires_grad for p in vae.parameters())
        raise Stop

    with pytest.raises(Stop):
        compare_with_nuts(vae, x, 2, 6, 4, stop)
    for parameter in vae.parameters():
        assert parameter.requires_grad == (parameter is not frozen)
        assert parameter.grad is None
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", ["bernoulli", "discretized-logistic"])
@pytest.mark.parametrize("mode", ["graph", pytest.param("compiled", marks=pytest.mark.slow)])
def test_captured_chains_are_the_eager_ones(name, mode, tmp_path, monkeypatch):
    """Draw for draw, in float64, with one graph for all chains; a wrong gradient is seen."""
    made = []

    def recorded(*arguments):
        made.append(CapturedFunction(*arguments))
        return made[-1]

    monkeypatch.setattr(nuts, "CapturedFunction", recorded)
    vae, splits = example_vae(name, tmp_path)
    x = batch(splits, name, 2)

    def run(mode):
        pyro.set_rng_seed(3)
        return nuts.chains(vae, x, 2, 5, 5, mode=mode)

    eager, captured = run("eager"), run(mode)
    torch.testing.assert_close(captured, eager, rtol=1e-6, atol=1e-6)
    assert [function.graphs.captures for function in made] == [0, 1]
    assert None not in made[1].graphs.graphs.values()
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())
    assert len(pyro.get_param_store()) == 0

    class Doubled(KnownGradient):
        @staticmethod
        def backward(ctx, outer):
            return KnownGradient.backward(ctx, 2 * outer)

    monkeypatch.setattr(nuts, "KnownGradient", Doubled)
    assert not torch.allclose(run(mode)[0], eager[0], rtol=1e-3), "power"


def test_captured_chains_of_a_prior_on_the_simplex():
    """NUTS moves in the unconstrained space, and the draws are back in the prior's."""

    class OnTheSimplex(nn.Module):
        latent = "z"

        def prior(self):
            return dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]).double())

        def model(self, x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)

    x = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).double()
    draws = []
    for mode in ("eager", "graph"):
        pyro.set_rng_seed(4)
        draws.append(nuts.chains(OnTheSimplex(), x, 2, 20, 20, mode=mode)[0])
    torch.testing.assert_close(*draws, rtol=1e-6, atol=1e-6)
    assert draws[1].shape == (2, 20, 2, 3)
    torch.testing.assert_close(draws[1].sum(-1), torch.ones(2, 20, 2).double())


def test_many_transitions_are_compiled_and_few_not(monkeypatch):
    """Of all chains together, warm-up included, unless a mode is given."""
    chosen = []

    def captured(function, mode):
        chosen.append(mode)
        return CapturedFunction(function, "eager")

    monkeypatch.setattr(nuts, "CapturedFunction", captured)
    monkeypatch.setattr(nuts, "COMPILE_FROM", 30)
    vae, x = oracle()
    for num_warmup, mode in ((3, None), (4, None), (4, "graph")):
        nuts.chains(vae, x, 3, 6, num_warmup, mode=mode)
    assert chosen == ["eager", "compiled", "graph"]


def test_the_seed_decides():
    vae, x = oracle()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(compare_with_nuts(vae, x, 2, 4, 4).draws)
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    assert (draws[0][0] != draws[0][1]).all(), "chains are not one and the same"


def test_bad_arguments():
    vae, x = oracle()
    for numbers in ((1, 100), (2, 3)):
        with pytest.raises(ValueError, match="at least 2 chains of at least 4 samples; got"):
            compare_with_nuts(vae, x, *numbers)


# The comparison, on exact draws


@pytest.mark.parametrize("guide", ["exact", "diagonal", "collapsed"])
@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (0.8, 0.3)])
def test_differences_are_the_closed_forms(guide, factor, shift, monkeypatch):
    """Scale ratio c, or c / √(Λⱼⱼ Σⱼⱼ) for independent latents; mean difference s of those."""
    vae, x = oracle(guide, 10, scale_factor=factor, shift=shift)
    exact = vae.exact_posterior(x)
    mean, covariance = exact.mean.detach(), exact.covariance_matrix[0].detach()
    scale = covariance.diagonal().sqrt()
    own = {
        "exact": scale,
        "diagonal": vae.posterior_precision.detach().diagonal().rsqrt(),
        "collapsed": torch.ones(2).double(),
    }[guide]
    ratio = factor * own / scale
    difference = shift * own / scale - (mean / scale if guide == "collapsed" else 0)
    torch.manual_seed(5)
    found = compare(exact_draws(vae, x, 4, 2000), vae, x, monkeypatch, distances=False)
    error = sigmas(40) / math.sqrt(8000)
    # errors of the mean and of the deviation, both those of exact independent draws
    scales = np.abs(found.scale_ratio / ratio.expand(10, 2).numpy() - 1)
    assert (scales < 1.1 * error / math.sqrt(2)).all()
    wanted = difference.expand(10, 2).numpy()
    limit = error * np.sqrt(1 + wanted**2 / 2)
    assert (np.abs(found.mean_difference - wanted) < limit).all()
    # power: a guide 0.2 deviations away, or a tenth too wide, is another
    if guide != "collapsed":
        assert (np.abs(found.mean_difference - wanted - 0.2) > limit).all()
    assert (np.abs(found.scale_ratio / ratio.numpy() / 1.1 - 1) > error).all()
    if guide == "diagonal":
        assert (own / scale < 0.9).all(), "latents here depend on each other"


def brute_force(first: np.ndarray, second: np.ndarray) -> float:
    """The energy coefficient by its definition, pair by pair."""

    def mean(a, b, same):
        pairs = [math.dist(p, q) for i, p in enumerate(a) for j, q in enumerate(b)]
        if same:
            pairs = [d for k, d in enumerate(pairs) if k // len(a) != k % len(a)]
        return sum(pairs) / len(pairs)

    between = mean(first, second, False)
    within = mean(first, first, True) + mean(second, second, True)
    return (2 * between - within) / (2 * between)


def test_everything_again_from_the_draws(monkeypatch):
    """Each number by hand, from unequal chains and the guide's draws for the same seed."""
    vae, x = oracle("diagonal", 3, scale_factor=0.7, shift=0.5)
    torch.manual_seed(6)
    draws = exact_draws(vae, x, 3, 20) * torch.tensor([1.0, 10.0])
    draws[2] += 1
    torch.manual_seed(7)
    found = compare(draws, vae, x, monkeypatch, diverged=(2,))
    torch.manual_seed(7)
    posterior = vae.posterior(x)
    own = posterior.sample((60,)).numpy()
    flat = draws.reshape(60, 3, 2).numpy()
    mean, scale = flat.mean(0), flat.std(0, ddof=1)
    np.testing.assert_allclose(
        found.mean_difference, (posterior.mean.detach().numpy() - mean) / scale
    )
    np.testing.assert_allclose(found.scale_ratio, posterior.stddev.detach().numpy() / scale)
    np.testing.assert_array_equal(found.draws, draws.numpy())
    assert found.divergences == 6
    ours, theirs = (own - mean) / scale, (flat - mean) / scale
    for image in range(3):
        mine, exact = ours[:, image], theirs[:, image]
        assert found.distance[image] == pytest.approx(brute_force(mine, exact))
        # of three chains, one against two
        assert found.null_distance[image] == pytest.approx(brute_force(exact[:20], exact[20:]))


def test_distance_is_the_closed_form(monkeypatch):
    """One latent, 80 images: E|X − Y| of normals is known; 0 for the exact guide.

    Means over images have an error of their own, and 79 degrees of freedom.
    """
    root = 2 / math.sqrt(math.pi)
    found = {}
    for factor, shift in [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.8, -0.5)]:
        vae, x = oracle("exact", 80, 1, scale_factor=factor, shift=shift)
        torch.manual_seed(8)
        comparison = compare(exact_draws(vae, x, 2, 150), vae, x, monkeypatch)
        between = stats.foldnorm(abs(shift) / math.hypot(1, factor), scale=math.hypot(1, factor))
        wanted = 1 - root * (1 + factor) / (2 * between.mean())
        limit = stats.t.isf(FALSE_ALARM / 2 / 8, 79) / math.sqrt(80)
        for values, truth in ((comparison.distance, wanted), (comparison.null_distance, 0)):
            assert abs(values.mean() - truth) < limit * values.std(ddof=1)
        found[factor, shift] = comparison.distance.mean()
        if factor != 1 or shift:
            assert found[factor, shift] > 10 * limit * comparison.null_distance.std()
    assert abs(found[1.0, 0.0]) < 0.002


def autoregressive(memory: float, shape: tuple[int, ...]) -> torch.Tensor:
    """(C, S, B, Z) of stationary chains with unit variance and correlation `memory` at lag one."""
    noise = np.random.default_rng(9).standard_normal(shape)
    draws = np.empty(shape)
    draws[:, 0] = noise[:, 0]
    for step in range(1, shape[1]):
        draws[:, step] = memory * draws[:, step - 1]
        draws[:, step] += math.sqrt(1 - memory**2) * noise[:, step]
    return torch.from_numpy(draws)


@pytest.mark.parametrize(("memory", "share"), [(0.0, 1.0), (0.6, 0.25), (0.9, 1 / 19)])
def test_effective_sample_size_is_the_closed_form(memory, share, monkeypatch):
    """(1 − φ) / (1 + φ) of the draws, within 15%, in the mean over 40 columns."""
    vae, x = oracle(count=20)
    draws = autoregressive(memory, (4, 1000, 20, 2))
    found = compare(draws, vae, x, monkeypatch, distances=False)
    assert found.effective_sample_size.mean() / 4000 == pytest.approx(share, rel=0.15)
    assert (found.r_hat < (1.01 if memory < 0.9 else 1.05)).all()


def test_r_hat_sees_chains_that_disagree(monkeypatch):
    """In location, in scale, and within a chain; in the one number that is off and no other."""
    vae, x = oracle(count=3)
    torch.manual_seed(10)
    sound = torch.randn(4, 200, 3, 2).double()
    draws = sound.clone()
    draws[0, :, 0, 0] += 1
    draws[1, :, 1, 1] *= 4
    draws[:, 100:, 2, 0] += 1
    seen = np.array([[True, False], [False, True], [True, False]])
    found = compare(draws, vae, x, monkeypatch, distances=False)
    np.testing.assert_array_equal(found.r_hat > 1.05, seen)
    assert (compare(sound, vae, x, monkeypatch).r_hat < 1.03).all()


def test_tails_that_are_not_explored_lower_the_sample_size(monkeypatch):
    """Chains that visit both tails by turns, in one run of draws: their bulk mixes well."""
    vae, x = oracle(count=1)
    torch.manual_seed(11)
    draws = 0.05 + 0.9 * torch.rand(4, 500, 1, 2).double()
    draws[:, 200:250:2, 0, 0] = 0.04 * torch.rand(4, 25).double()
    draws[:, 201:250:2, 0, 0] = 1 - 0.04 * torch.rand(4, 25).double()
    bulk = array_stats.ess(draws.numpy(), chain_axis=0, draw_axis=1, method="bulk")
    assert (bulk > 1500).all()
    tail, full = compare(draws, vae, x, monkeypatch, distances=False).effective_sample_size[0]
    assert full > 1000
    assert tail < 300


# The distance


def test_energy_coefficient_by_brute_force():
    random = np.random.default_rng(12)
    for sizes in ((2, 2), (7, 12), (20, 5)):
        first = random.standard_normal((sizes[0], 3))
        second = random.normal((1, 0, 0), 1, (sizes[1], 3))
        found = energy_coefficient(first, second)
        assert found == pytest.approx(brute_force(first, second), abs=1e-12)
        assert found == pytest.approx(energy_coefficient(second, first), abs=1e-12)
        # lengths have no unit
        assert found == pytest.approx(energy_coefficient(5 * first, 5 * second), abs=1e-12)
    apart = energy_coefficient(first, second + 1e9)
    assert apart == pytest.approx(1, abs=1e-6)


def test_energy_coefficient_of_equal_distributions_has_mean_zero():
    """300 repetitions of 20 and 30 draws; with the draws' distance to themselves it has not."""
    random = np.random.default_rng(13)
    values, biased = [], []
    for _ in range(300):
        first, second = random.standard_normal((20, 2)), random.standard_normal((30, 2))
        found = energy_coefficient(first, second)
        values.append(found)
        # E|X − X'| over all pairs is (1 − 1/N) of that over different ones, here about 1/2 each
        biased.append(1 - (1 - found) * (1 - (1 / 20 + 1 / 30) / 2))
    error = stats.t.isf(FALSE_ALARM / 2, 299) * np.std(values, ddof=1) / math.sqrt(300)
    assert abs(np.mean(values)) < error
    assert abs(np.mean(biased)) > 3 * error


def test_energy_coefficient_sees_dependence():
    """Equal marginals, other correlation: one latent at a time sees nothing."""
    random = np.random.default_rng(14)
    first = random.standard_normal((400, 2))
    second = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    torch.manual_seed(15)
    second = second.sample((400,)).numpy()
    assert energy_coefficient(first, second) > 0.02
    for j in range(2):
        assert abs(energy_coefficient(first[:, j : j + 1], second[:, j : j + 1])) < 0.01


def test_chains_that_never_move_are_not_trusted(monkeypatch):
    """R-hat of constant chains is 0/0; it has to come out as no agreement, without a warning."""
    vae = LinearGaussian(torch.ones(2, 1).double(), torch.zeros(2).double(), 1.0)
    starts = iter([0.0, 1.0])
    monkeypatch.setattr(
        nuts, "_chain", lambda *_: (torch.full((6, 3, 1), next(starts)).double(), 0)
    )
    result = compare_with_nuts(vae, torch.zeros(3, 2).double(), 2, 6, 0)
    assert (result.r_hat > 1.05).all()
    assert np.isfinite(result.effective_sample_size).all()
    monkeypatch.setattr(nuts, "_chain", lambda *_: (torch.zeros(6, 3, 1).double(), 0))
    result = compare_with_nuts(vae, torch.zeros(3, 2).double(), 2, 6, 0)
    assert (result.r_hat > 1.05).all()
    assert np.isfinite(result.mean_difference).all()
    assert np.isfinite(result.scale_ratio).all()


def test_chains_start_apart_wherever_the_guide_is(monkeypatch):
    """From the prior: a guide that sits in one mode would start all chains there."""
    starts = []

    class Stop(Exception):
        pass

    def keep(kernel, **settings):
        starts.append(settings["initial_params"]["z"])
        raise Stop

    monkeypatch.setattr(nuts, "MCMC", keep)
    vae, x = oracle("exact", count=4000, shift=8.0)
    with pytest.raises(Stop):
        compare_with_nuts(vae, x, 2, 4, 1)
    (start,) = starts
    error = sigmas(4) / math.sqrt(len(x))
    assert (start.mean(0).abs() < error).all()
    assert ((start.std(0) - 1).abs() < error).all()


def test_the_null_distance_is_between_equal_halves_of_all_chains(monkeypatch):
    """Two chains lie elsewhere than the other two: the halves must differ as these do."""
    vae, x = oracle(count=1)
    draws = exact_draws(vae, x, 4, 100)
    draws[2:] += 3 * draws.std((0, 1))
    apart = compare(draws, vae, x, monkeypatch).null_distance
    scale = draws.std((0, 1))
    halves = (draws / scale).reshape(2, 200, -1).numpy()
    np.testing.assert_allclose(apart, energy_coefficient(*halves), rtol=1e-6)
