"""Annealed evidence against the oracle and quadrature, from both sides; faults planted in it.

What is exact: E[w] = p(x) over forward chains and E[1/w] = 1/p(x) over reverse chains from z*, for
any number of steps and any step size, as long as every kernel leaves its distribution invariant.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from conftest import SIGMAS, all_likelihoods, batch, example_spec, example_vae
from pyro.distributions import Normal
from test_importance import Encoder
from torch import nn

from pyro_vae.capture.captured import CapturedFunction
from pyro_vae.evidence import annealing
from pyro_vae.evidence.annealing import anneal
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.vae import VAE
from pyro_vae.runtime import memory as chunks


def widest(count: int) -> float:
    """The bound for the largest of `count` z-scores, with the false alarms of one at SIGMAS."""
    return NormalDist().inv_cdf(1 - NormalDist().cdf(-SIGMAS) / count)


def simulated(case, count: int, guide="exact"):
    """An oracle, z and x drawn from it, and log p(x)."""
    data_dim, latent_dim, noise_scale, seed = case
    torch.manual_seed(seed)
    weight = torch.randn(data_dim, latent_dim, dtype=torch.float64)
    loc = torch.randn(data_dim, dtype=torch.float64)
    vae = LinearGaussian(weight, loc, noise_scale, guide)
    z = vae.prior().sample((count,))
    x = vae.likelihood(z).sample().detach()
    return vae, z, x, vae.exact_log_evidence(x).detach()


def agree(result, exact) -> bool:
    """Whether forward estimates are within their claimed errors: the largest, and the mean."""
    off, error = result.lower - exact, result.standard_error
    largest = (off / error).abs().max() < widest(len(off))
    return bool(largest and off.sum().abs() < SIGMAS * error.square().sum().sqrt())


# D, Z (Z > D too), σ, seed. At these σ 60 steps leave the logarithms of the weights a deviation of
# about 0.5; with much more the errors would not be those of Gaussians.
CASES = [(2, 1, 1.0, 0), (5, 3, 1.0, 1), (3, 6, 1.5, 3), (12, 7, 2.0, 2)]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float64) for case in CASES), (CASES[1], torch.float32)]
)
def test_forward_estimates_are_within_their_errors(case, dtype):
    vae, _, x, exact = simulated(case, 20)
    torch.manual_seed(1)
    result = anneal(vae.to(dtype), x.to(dtype), num_steps=60, num_chains=200)
    assert result.lower.dtype == result.standard_error.dtype == torch.float64
    assert result.upper is None
    assert result.standard_error.max() < 0.12, "errors small enough to matter"
    assert result.standard_error.mean() < 0.07
    assert agree(result, exact)
    assert ((result.acceptance > 0.7) & (result.acceptance < 1)).all()


def test_claimed_errors_are_the_spread_over_repetitions():
    vae, _, x, _ = simulated((2, 1, 1.0, 0), 400)
    torch.manual_seed(2)
    once, again = anneal(vae, x, 20, 40), anneal(vae, x, 20, 40)
    claimed = once.standard_error.square() + again.standard_error.square()
    ratio = ((once.lower - again.lower).square() / claimed).mean()
    # χ² of one degree has variance 2; the claimed ones are off by some themselves, from 40 chains
    assert abs(ratio - 1) < SIGMAS * math.sqrt(2 / 400) + 0.05
    assert anneal(vae, x[:3], 5, 1).standard_error.isnan().all()


# Cases and T of which single weights w / p(x) have standard errors near 1% over 2,000 images.
SINGLE = [(2, 1, 1.0, 0), (5, 3, 2.0, 1)]


def weights_are_unbiased(vae, z, x, exact) -> tuple[bool, bool]:
    """Whether means over images of w / p(x) and of p(x) / w are 1, from one chain each."""
    result = anneal(vae, x, num_steps=30, num_chains=1, z=z)
    seen = []
    for ratio in ((result.lower - exact).exp(), (exact - result.upper).exp()):
        error = ratio.std() / math.sqrt(len(ratio))
        # The second condition: errors small enough to matter.
        seen.append(bool((ratio.mean() - 1).abs() < SIGMAS * error and error < 0.015))
    return seen[0], seen[1]


@pytest.mark.parametrize("case", SINGLE)
def test_forward_and_reverse_weights_are_unbiased(case):
    """Both at 4 standard errors, of about 1%; the bounds on log p(x) follow, by Jensen."""
    vae, z, x, exact = simulated(case, 2000)
    torch.manual_seed(3)
    assert weights_are_unbiased(vae, z, x, exact) == (True, True)


class WidePrior:
    """The model of a VAE but for its prior, which is 10% too wide."""

    def __init__(self, vae):
        self.vae, self.likelihood, self.posterior = vae, vae.likelihood, vae.posterior

    def prior(self):
        return Normal(torch.zeros_like(self.vae.weight[0]), 1.1).to_event(1)


@pytest.mark.parametrize("fault", ["prior", "accept", "schedule", "late", "density"])
def test_planted_faults_are_seen_by_the_same_checks(fault, monkeypatch):
    vae, _, x, exact = simulated(CASES[1], 20)
    single = simulated(SINGLE[1], 2000)
    schedule, kernel = annealing._schedule, annealing._hmc
    density = annealing._State.log_density
    if fault == "prior":
        vae = WidePrior(vae)
    elif fault == "accept":  # every proposal is taken
        monkeypatch.setattr(annealing, "_choose", lambda chosen, first, second: first)
    elif fault == "schedule":  # the last β is 0.97, not 1
        monkeypatch.setattr(annealing, "_schedule", lambda steps: [*schedule(steps)[:-1], 0.97])
    elif fault == "late":  # the kernel of β_k+1 in place of that of β_k
        late = {}
        late = {}
        for betas in map(schedule, (60, 30)):
            late |= dict(zip(betas[1:-1], [*betas[2:-1], betas[-2]], strict=True))
        monkeypatch.setattr(
            annealing, "_hmc", lambda target, z, beta, size: kernel(target, z, late[beta], size)
        )
    else:  # proposals are accepted by another density than that of their slopes
        monkeypatch.setattr(annealing._State, "log_density", lambda s, beta: density(s, beta / 2))
    torch.manual_seed(1)
    assert not agree(anneal(vae, x, 60, 200), exact)
    # x ~ p(x), whose mean of p'(x) / p(x) is 1 for any other model p': no news of the prior there
    if fault != "prior":
        torch.manual_seed(3)
        assert weights_are_unbiased(*single) == (False, False)


def bracket(steps, count: int):
    """Of single chains: mean offsets below and above log p(x), errors of both and of their sum."""
    vae, z, x, exact = simulated((12, 7, 0.6, 2), count)
    rows = []
    for num_steps in steps:
        torch.manual_seed(4)
        result = anneal(vae, x, num_steps, num_chains=1, z=z)
        sides = torch.stack([exact - result.lower, result.upper - exact])
        errors = torch.cat([sides.std(1), sides.sum(0).std()[None]]) / math.sqrt(count)
        rows.append(torch.cat([sides.mean(1), errors]))
    return torch.stack(rows).T


def slope(steps, gap, error) -> tuple[float, float]:
    """Of log gaps over log T by least squares, and its standard error from those of the gaps."""
    across = torch.tensor(steps).double().log()
    factors = (across - across.mean()) / (across - across.mean()).square().sum()
    found, spread = (factors * gap.log()).sum(), (factors * error / gap).square().sum().sqrt()
    return found.item(), spread.item()


@pytest.mark.slow
def test_both_sides_close_in_on_the_truth_as_one_over_steps(monkeypatch):
    """From 30 nats at T = 10 to 1.2 at T = 270: a slope of −1, with a standard error of 0.02."""
    steps = [10, 30, 90, 270]
    below, above, error_below, error_above, error = bracket(steps, 500)
    assert (below > SIGMAS * error_below).all()
    assert (above > SIGMAS * error_above).all()
    found, spread = slope(steps, below + above, error)
    print(f"slope {found:.3f} ± {spread:.3f}, gaps {(below + above).tolist()}")
    assert spread < 0.025, "errors small enough to matter"
    assert abs(found + 1) < SIGMAS * spread
    # power: chains that stay where they are do not close in
    monkeypatch.setattr(annealing, "_choose", lambda chosen, first, second: second)
    below, above, *_, error = bracket(steps[:3], 500)
    found, spread = slope(steps[:3], below + above, error)
    assert abs(found + 1) > SIGMAS * spread


@pytest.mark.parametrize("guide", ["exact", "diagonal", "collapsed"])
def test_the_guide_does_not_matter(guide):
    """It sets the steps' widths; the answer stays, wrong or not."""
    vae, z, x, exact = simulated((5, 3, 1.0, 1), 20, guide)
    vae.encoder.bias.data += 3.0  # where the guide looks is no matter at all
    torch.manual_seed(5)
    result = anneal(vae, x, 60, 200, z)
    assert result.standard_error.max() < 0.12
    assert agree(result, exact)
    # The reverse chains of one image share z*: only means over images have an error to go by.
    above = result.upper - exact
    assert above.mean() > -SIGMAS * above.std() / math.sqrt(20)
    assert above.abs().mean() < 0.1


@all_likelihoods
def test_every_likelihood_against_quadrature(name):
    torch.manual_seed(3)
    likelihood = LIKELIHOODS[name](example_spec(name, (5,)), torch.full((5,), 0.5), torch.ones(5))
    decoder = nn.Sequential(
        nn.Linear(1, 5 * likelihood.num_parameters),
        nn.Tanh(),
        nn.Unflatten(-1, (likelihood.num_parameters, 5)),
    )
    vae = VAE(StandardNormal(1), Encoder(), decoder, likelihood).double()
    z = vae.prior().sample((20,))
    x = vae.likelihood(z).sample()
    truth = quadrature(vae, x)
    assert truth.error.max() < 1e-6
    result = anneal(vae, x, 50, 100, z)
    assert result.standard_error.max() < 0.1, "errors small enough to matter"
    assert result.standard_error.mean() < 0.05
    assert agree(result, truth.log_evidence)
    above = result.upper - truth.log_evidence
    assert above.mean() > -SIGMAS * above.std() / math.sqrt(20)
    assert above.abs().max() < 0.5


def test_a_leapfrog_that_diverges_is_a_rejected_step(monkeypatch):
    """A wall at |z| = 2, whose slopes throw chains to infinity: NaN there, none in the answer."""

    class Walled:
        def prior(self):
            return Normal(torch.zeros(1).double(), 1.0).to_event(1)

        def posterior(self, x):
            return Normal(torch.zeros_like(x), 1.0).to_event(1)

        def likelihood(self, z):
            wall = (20 * (z.abs() - 2)).exp()
            return Normal(z + wall - wall.square(), 0.5).to_event(1)

    thrown = []
    evaluate = annealing._Target.evaluate

    def watched(target, z):
        thrown.append(bool(evaluate(target, z).log_likelihood.isnan().any()))
        return evaluate(target, z)

    monkeypatch.setattr(annealing._Target, "evaluate", watched)
    vae = Walled()
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    torch.manual_seed(0)
    result = anneal(vae, x, 30, 200)
    assert any(thrown), "a case that is one"
    truth = quadrature(vae, x, 8001)
    assert truth.error.max() < 1e-6
    assert result.standard_error.max() < 0.12
    assert agree(result, truth.log_evidence)


def test_step_sizes_are_those_of_a_pilot_run_and_then_held_fixed(monkeypatch):
    """By what is called: bounds from chains that adapt are off by too little to be seen."""
    runs, used = [], []  # starts; the step sizes of each run by β
    tune, chain, kernel = annealing._tune, annealing._chain, annealing._hmc

    def starting(run):
        def watched(target, z, *arguments, **keywords):
            runs.append(z)
            used.append({})
            return run(target, z, *arguments, **keywords)

        return watched

    def watched(target, start, beta, step_size):
        used[-1][beta] = step_size.clone()
        return kernel(target, start, beta, step_size)

    monkeypatch.setattr(annealing, "_tune", starting(tune))
    monkeypatch.setattr(annealing, "_chain", starting(chain))
    monkeypatch.setattr(annealing, "_hmc", watched)
    vae, z, x, _ = simulated((5, 3, 1.0, 1), 4)
    torch.manual_seed(8)
    anneal(vae, x, 40, 6, z)
    pilot, forward, reverse = runs
    assert not (pilot == forward).any(), "draws of their own"
    assert torch.equal(reverse, z.expand(6, 4, 3))
    tuned, *fixed = ([sizes[beta] for beta in annealing._schedule(40)[1:-1]] for sizes in used)
    # The pilot run leaves each β with the size from which it starts at the next.
    for sizes in fixed:
        assert all(map(torch.equal, sizes, tuned[1:]))
        assert all(map(torch.equal, sizes, fixed[0]))
        assert len(sizes) == 39
    sizes = torch.stack([tuned[0], *fixed[0]])[..., 0].squeeze(1)  # (T, B)
    assert (sizes.std(1)[5:] > 0).all(), "each image has its own"
    assert (sizes.diff(dim=0)[1:] != 0).all(), "and each β"
    # from one β to the next by at most 0.2 in the logarithm, over all far from the first
    assert (sizes[1:].log().diff(dim=0).abs() <= 0.2).all()
    assert (sizes[-1] > 1.3 * annealing.FIRST_STEP).all()


def test_one_step_is_importance_sampling_from_the_prior():
    """T = 1: log w = log p(x|z) at draws from the prior; from above, at z* itself."""
    vae, z, x, exact = simulated((2, 1, 1.0, 0), 20)
    torch.manual_seed(6)
    result = anneal(vae, x, 1, 20_000, z)
    torch.testing.assert_close(result.upper, vae.likelihood(z).log_prob(x).detach())
    assert result.standard_error.max() < 0.05
    assert agree(result, exact)


def test_the_same_seed_gives_the_same_numbers():
    vae, z, x, _ = simulated((2, 1, 1.0, 0), 3)
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append(anneal(vae, x, 5, 2, z))
    for name in ("lower", "upper", "standard_error", "acceptance"):
        first, again, other = (getattr(run, name) for run in runs)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert not any(parameter.grad is not None for parameter in vae.parameters())


@pytest.mark.parametrize("chunk_values", [1, 2 * 2 * 4, 2**19])
def test_images_are_taken_a_few_at_a_time(chunk_values, monkeypatch):
    """Every image keeps its own x and z*, and every step is counted."""
    monkeypatch.setattr(chunks, "CACHE_VALUES", chunk_values)
    vae, z, x, _ = simulated((2, 1, 1.0, 0), 5)
    # images far apart in what z has no part in: log p(x) differs, the chains' errors do not
    across = torch.stack([-vae.weight[1], vae.weight[0]], -1).detach() / vae.weight.norm()
    x = x + 5 * torch.arange(1, 6)[:, None] * across
    exact = vae.exact_log_evidence(x).detach()
    done = []
    torch.manual_seed(9)
    result = anneal(vae, x, 20, 4, z, on_step=done.append)
    assert max(done) <= max(4, chunk_values // 2)  # at least one image with its four chains
    # a pilot, the forward and the reverse chains
    assert sum(done) == 3 * 20 * 5 * 4
    for estimate in (result.lower, result.upper):
        assert (estimate - exact).abs().max() < 1.5
        assert ((estimate.roll(1) - exact).abs() > 1.5).all(), "power"
    # with one step the upper bound is exact in z*
    own = vae.likelihood(z).log_prob(x).detach()
    torch.testing.assert_close(anneal(vae, x, 1, 4, z).upper, own)
    done.clear()
    anneal(vae, x, 3, 4, on_step=done.append)
    assert sum(done) == 2 * 3 * 5 * 4


def captures(monkeypatch) -> list[CapturedFunction]:
    """The functions that `anneal` has captured, as it makes them."""
    made = []

    def recorded(*arguments):
        made.append(CapturedFunction(*arguments))
        return made[-1]

    monkeypatch.setattr(annealing, "CapturedFunction", recorded)
    return made


@pytest.mark.parametrize("name", ["bernoulli", "discretized-logistic"])
@pytest.mark.parametrize("mode", ["graph", pytest.param("compiled", marks=pytest.mark.slow)])
def test_captured_chains_are_the_eager_ones(name, mode, tmp_path, monkeypatch):
    """Draw for draw, in float64, with one graph for the pilot and both directions."""
    made = captures(monkeypatch)
    vae, splits = example_vae(name, tmp_path)
    x = batch(splits, name, 3)
    torch.manual_seed(0)
    z = vae.prior().sample((3,))
    runs = []
    for each in ("eager", mode):
        torch.manual_seed(1)
        runs.append(anneal(vae, x, 6, 4, z, mode=each))
    for part in ("lower", "upper", "standard_error", "acceptance"):
        eager, captured = (getattr(run, part) for run in runs)
        torch.testing.assert_close(captured, eager, rtol=1e-9, atol=1e-9)
    assert [function.graphs.captures for function in made] == [0, 1]
    assert None not in made[1].graphs.graphs.values()
    assert not any(parameter.grad is not None for parameter in vae.parameters())


@pytest.mark.parametrize("step", ["captured", "eager"])
def test_long_chains_are_compiled_and_short_ones_not(step, monkeypatch):
    """By the evaluations for one chunk of rows: a pilot and one or two directions."""
    chosen = []
    monkeypatch.setattr(
        annealing, "CapturedFunction", lambda f, mode: chosen.append(mode) or CapturedFunction(f)
    )
    vae, z, x, _ = simulated((2, 1, 1.0, 0), 2)
    monkeypatch.setattr(CapturedFunction, "__call__", lambda self, x, z: self.function(x, z))
    monkeypatch.setattr(annealing, "COMPILE_FROM", 3 * 4 * annealing.LEAPFROG_STEPS)
    if step == "captured":
        anneal(vae, x, 4, 1, z)
        anneal(vae, x, 6, 1)
        assert chosen == ["compiled"] * 2
    else:
        anneal(vae, x, 3, 1, z)
        anneal(vae, x, 5, 1)
        anneal(WidePrior(vae), x, 6, 1, z, mode="compiled")  # which is no module
        assert chosen == ["eager"] * 3


def test_bad_arguments():
    vae, _, x, _ = simulated((2, 1, 1.0, 0), 3)
    for numbers in [(0, 8), (5, 0), (-1, 8)]:
        with pytest.raises(ValueError, match=f"at least 1; got {numbers[0]} and {numbers[1]}"):
            anneal(vae, x, *numbers)
    spec = example_spec("bernoulli", (2,))
    vae.likelihood_module = LIKELIHOODS["bernoulli"](spec, torch.zeros(2), torch.ones(2)).double()
    vae.decoder = nn.Sequential(vae.decoder, nn.Unflatten(-1, (1, 2)))
    anneal(vae, (x > 0).double(), 2, 2)
    with pytest.raises(ValueError, match="support"):
        anneal(vae, x, 2, 2)
