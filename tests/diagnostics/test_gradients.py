"""Measured gradients: against a step whose gradient is known, and against the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from torch.distributions import kl_divergence

from pyro_vae import objective
from pyro_vae.diagnostics.gradients import BLOCKS, measure_gradients, slope
from pyro_vae.evidence.intervals import Interval
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.objectives import importance_weighted as weighted
from pyro_vae.runtime import memory as chunks

# Each test rejects a true hypothesis at most so often, however many numbers it compares, but for
# one that says otherwise.
FALSE_ALARM = 1e-4

REPETITIONS, DRAWS = 200, 100
HALF_WIDTH = stats.t.isf(0.025, BLOCKS - 1)  # of the jackknife's intervals, in standard errors

# A gradient with correlated entries of unlike size, and half as much signal as noise.
MEAN = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0, 0.3, 2.0]).double()
FACTOR = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double().tril()
FACTOR = FACTOR * 2 * MEAN.norm() / FACTOR.norm()
EXACT = MEAN + torch.linspace(-2, 1, 8).double()
BIAS = ((MEAN - EXACT).norm() / EXACT.norm()).item()
TRUE = (FACTOR.square().sum().item(), 0.5, BIAS)  # variance, signal-to-noise, bias from EXACT


def sigmas(count: int = 1) -> float:
    """How many standard errors `count` normal estimates may be off, with FALSE_ALARM in all."""
    return stats.norm.isf(FALSE_ALARM / 2 / count)


def measure(work, groups, num_draws=2 * BLOCKS, x=torch.zeros(1)):  # noqa: B008
    """Of a stand-in for an objective, which does `work(x)`."""
    stand_in = SimpleNamespace(
        loss=lambda model, guide, x: 0.0, loss_and_grads=lambda model, guide, x: work(x)
    )
    return measure_gradients(stand_in, None, None, x, groups, num_draws)


class Known:
    """A step whose gradient is normal; that of the loss is its negative."""

    def __init__(self, mean=MEAN):
        self.mean, self.drawn = mean, []
        shapes = [(2, 2), (), (3,)]
        self.parameters = [torch.zeros(s).double().requires_grad_() for s in shapes]

    def __call__(self, x):
        self.drawn.append(self.mean + FACTOR @ torch.randn(8).double())
        for parameter, piece in zip(self.parameters, self.drawn[-1].split([4, 1, 3]), strict=True):
            assert parameter.grad is None  # nothing is left from the draw before
            parameter.grad = -piece.reshape(parameter.shape)

    def measure(self, num_draws=DRAWS):
        return measure(self, {"all": self.parameters}, num_draws).gradients["all"]


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    return [Known().measure() for _ in range(REPETITIONS)]


def three(gradient) -> list[Interval]:
    return [gradient.variance, gradient.signal_to_noise, gradient.bias(EXACT)]


def test_estimates_are_those_of_the_draws():
    torch.manual_seed(0)
    known = Known()
    gradient = known.measure()
    drawn = torch.stack(known.drawn).numpy()[1:]  # the first is for the memory
    assert gradient.num_draws == len(drawn) == DRAWS
    mean, variance = drawn.mean(0), np.trace(np.cov(drawn.T))
    noise = variance / DRAWS
    signal = np.sqrt(((mean**2).sum() - noise) / variance)
    bias = np.sqrt(((mean - EXACT.numpy()) ** 2).sum() - noise) / EXACT.norm()
    np.testing.assert_allclose(gradient.mean, mean)
    np.testing.assert_allclose(gradient.standard_error, drawn.std(0, ddof=1) / DRAWS**0.5)
    found = [v.estimate for v in three(gradient)]
    np.testing.assert_allclose(found, [variance, signal, bias])
    # uphill, as the objective's, not down the loss
    assert ((gradient.mean - MEAN) / gradient.standard_error).abs().max() < sigmas(8)
    assert ((gradient.mean + MEAN) / gradient.standard_error).abs().max() > 2 * sigmas(8)


def test_intervals_cover(measured):
    few = stats.binom.ppf(FALSE_ALARM / 6, REPETITIONS, 0.95)
    for i, true in enumerate(TRUE):
        found = [three(gradient)[i] for gradient in measured]
        assert sum(v.low <= true <= v.high for v in found) >= few
        # power: intervals half as wide
        assert sum(abs(v.estimate - true) < (v.high - v.low) / 4 for v in found) < few
        # and none wider than need be
        error = np.mean([v.high - v.low for v in found]) / 2 / HALF_WIDTH
        ratio = error / np.std([v.estimate for v in found], ddof=1)
        assert abs(np.log(ratio)) < sigmas(6) / (2 * REPETITIONS) ** 0.5


@pytest.mark.parametrize("name", ["signal", "bias"])
def test_noise_is_no_signal_and_no_bias(name, measured, monkeypatch):
    """Where the truth is 0, its square is on average; that of the mean, not corrected, is not.

    `Interval.sqrt` clips the squares at 0, so it is left out here. In signal-to-noise, |mean|² has
    the estimated variance below it: a bias of at most a fifth of the average's standard error.
    """
    if name == "signal":
        torch.manual_seed(1)
        measured, noise = [Known(0 * MEAN).measure() for _ in range(REPETITIONS)], 1 / DRAWS
        values = lambda: [gradient.signal_to_noise for gradient in measured]  # noqa: E731
    else:
        noise = TRUE[0] / MEAN.square().sum().item() / DRAWS
        values = lambda: [gradient.bias(MEAN) for gradient in measured]  # noqa: E731
    assert sum(v.low > 0 for v in values()) <= stats.binom.isf(FALSE_ALARM / 2, REPETITIONS, 0.025)
    monkeypatch.setattr(Interval, "sqrt", lambda square: square)
    squares = np.array([v.estimate for v in values()])
    error = squares.std(ddof=1) / REPETITIONS**0.5
    assert abs(squares.mean()) < sigmas(2) * error
    assert abs((squares + noise).mean()) > 10 * error  # power: the mean, not corrected


def test_a_gradient_without_noise():
    """All is signal, and no overflow warns (a warning is an error here)."""
    parameter = torch.zeros(3).double().requires_grad_()

    def work(x):
        parameter.grad = torch.tensor([-0.3, -0.6, -0.99]).double()

    gradient = measure(work, {"all": [parameter]}).gradients["all"]
    assert gradient.variance.estimate < 1e-12
    assert gradient.bias(gradient.mean).estimate < 1e-6
    assert gradient.signal_to_noise.estimate > 1e6


def test_slope():
    x, errors = np.array([1.0, 3, 10, 40, 100]), np.array([0.01, 0.01, 0.02, 0.03, 0.1])
    y = 7 * x**-1.5
    exact = slope(x, [Interval(v, v, v) for v in y])
    np.testing.assert_allclose((exact.estimate, exact.low, exact.high), -1.5, atol=1e-9)
    # a point that says little of itself counts little
    y[-1] *= 2
    even = slope(x, [Interval(v, 0.9 * v, 1.1 * v) for v in y])
    np.testing.assert_allclose(even.estimate, np.polyfit(np.log(x), np.log(y), 1)[0])
    found = slope(x, [Interval(v, v - e * v, v + e * v) for v, e in zip(y, errors, strict=True)])
    assert abs(found.estimate + 1.5) < abs(even.estimate + 1.5) / 5
    # coverage, short of 95% by up to 2% since the points' errors come from so few blocks
    random, repetitions, covered = np.random.default_rng(0), 2000, 0
    for _ in range(repetitions):
        y = 7 * x**0.5 * np.exp(errors * random.standard_normal(5))
        seen = HALF_WIDTH * errors * np.sqrt(random.chisquare(BLOCKS - 1, 5) / (BLOCKS - 1))
        found = slope(x, [Interval(v, v - e * v, v + e * v) for v, e in zip(y, seen, strict=True)])
        covered += found.low < 0.5 < found.high
    few, many = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], repetitions, (0.93, 0.95))
    assert few <= covered <= many


def oracle(count=20):
    """Nowhere near an optimum, so that no gradient is small; and data."""
    torch.manual_seed(0)
    weight, loc = torch.randn(5, 3).double(), torch.randn(5).double()
    vae = LinearGaussian(weight, loc, 0.6, "diagonal", scale_factor=1.4, shift=0.5).eval()
    return vae, loc + torch.randn(count, 5).double()


def parts(vae):
    modules = {"encoder": vae.encoder, "decoder": vae.decoder, "noise": vae.likelihood_module}
    return {name: list(module.parameters()) for name, module in modules.items()}


@pytest.mark.parametrize("names", [["encoder", "decoder", "noise"], ["encoder"]])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(error, names):
    """Of any parameter that the step reaches, whether it is in a group or not."""
    vae, x = oracle()
    vae.encoder.bias.requires_grad_(False)
    for parameter in (vae.encoder.weight, vae.decoder.weight):
        parameter.grad = torch.ones_like(parameter)
    pyro.param("mine", torch.ones(2))
    state = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in vae.parameters()]
    calls = []

    def on_draw(count):
        calls.append(count)
        if error is not None and len(calls) == 3:
            raise error("stop")

    groups = {name: parts(vae)[name] for name in names}
    arguments = (objective(), vae.model, vae.guide, x, groups, 3 * BLOCKS - 1, on_draw)
    if error is None:
        gradient = measure_gradients(*arguments).gradients["encoder"]
        assert calls == [1] * gradient.num_draws == [1] * 2 * BLOCKS  # rounded down to whole blocks
        # encoder.log_scale, weight, bias: what takes no gradient has the gradient zero
        sizes = [p.numel() for p in groups["encoder"]]
        for p, found in zip(groups["encoder"], gradient.mean.split(sizes), strict=True):
            assert found.ne(0).all() == found.ne(0).any() == p.requires_grad
    else:
        with pytest.raises(error, match="stop"):
            measure_gradients(*arguments)
    assert list(pyro.get_param_store()) == ["mine"]
    assert pyro.settings.get("validate_poutine")  # off meanwhile
    for parameter, value, takes, grad in state:
        assert parameter.equal(value)
        assert parameter.requires_grad == takes
        assert parameter.grad is grad
        assert grad is None or grad.eq(1).all()


def test_draws_follow_the_seed_and_groups_are_kept_apart():
    def means(seed, *groups):
        torch.manual_seed(seed)
        known = Known()
        chosen = {str(group): (known.parameters[i] for i in group) for group in groups}
        return [g.mean for g in measure(known, chosen).gradients.values()]

    (every,) = means(0, [0, 1, 2])
    assert not every.equal(means(1, [0, 1, 2])[0])
    expected = torch.cat([every[5:], every[:4]]), every[4:5], every  # one may lie in two groups
    for found, mean in zip(means(0, [2, 0], [1], [0, 1, 2]), expected, strict=True):
        assert found.equal(mean)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_draws expects at least 40; got 39"):
        Known().measure(39)
    with pytest.raises(ValueError, match="the group 'b' expects parameters"):
        measure(Known(), {"a": [torch.zeros(1)], "b": iter([])})
    with pytest.raises(
        ValueError, match=r"exact expects the shape \(8,\) and a value other than 0; got"
    ):
        Known().measure().bias(EXACT[:7])
    good, nothing = Interval(1.0, 0.9, 1.1), Interval(0.0, 0.0, 1.0)
    for x, y in (([1], [good]), ([1, 2], [good]), ([1, 2], [good, nothing]), ([], [])):
        with pytest.raises(ValueError, match="at least two different x"):
            slope(x, y)


def closed_form(vae, x, kl_weight: float) -> dict[str, torch.Tensor]:
    """Gradients of E_q[log p(x|z)] − kl_weight · KL, summed over images."""
    q = vae.posterior(x)
    # E (x − W z − μ)² = (x − W E z − μ)² + diag(W Cov z Wᵀ)
    spread = (q.variance @ vae.weight.square().T).sum() / (2 * vae.noise_scale**2)
    kl = kl_divergence(q, vae.prior()).sum()
    elbo = vae.likelihood(q.mean).log_prob(x).sum() - spread - kl_weight * kl
    return {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(elbo, group, retain_graph=True)])
        for name, group in parts(vae).items()
    }


@pytest.mark.parametrize("kl_weight", [1.0, 1.2])
def test_gradient_of_the_elbo_on_the_oracle(kl_weight):
    """That of the closed form; with another weight of the KL the encoder's, and no other, is not.

    The intervals are of the squares, with the jackknife's degrees of freedom.
    """
    vae, x = oracle(200)
    elbo = objective("trace", max_plate_nesting=1)
    elbo.kl_weight = kl_weight
    found = measure_gradients(elbo, vae.model, vae.guide, x, parts(vae), 1000).gradients
    exact, planted = closed_form(vae, x, 1.0), closed_form(vae, x, kl_weight)
    for name, gradient in found.items():
        true = (planted[name] - exact[name]).norm().item() / exact[name].norm().item()
        assert (true > 0.01) == (kl_weight != 1 and name == "encoder")
        bias = gradient.bias(exact[name])
        error = (bias.high**2 - bias.estimate**2) / HALF_WIDTH
        student = stats.t.isf(FALSE_ALARM / 12, BLOCKS - 1)
        assert abs(bias.estimate**2 - true**2) <= student * error
        assert (bias.estimate**2 > student * error) == (true > 0.01)
        t = ((gradient.mean - exact[name]) / gradient.standard_error).abs().max()
        assert (t > sigmas(2 * (23 + 20 + 1))) == (true > 0.01)


def kib(n, x):
    return torch.zeros(128 * n, dtype=torch.float64, device=x.device)


no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_cuda)])
def test_memory_is_counted(device):
    """To the byte; a new gradient counts, the one that was there before does not."""
    x = torch.ones(1024, dtype=torch.float64, device=device)
    parameter = torch.zeros_like(x).requires_grad_()
    parameter.grad = torch.ones_like(x)

    def memory(work) -> float:
        def step(x):
            parameter.grad = kib(8, x)
            return work(x)  # held until the step is over

        return measure(step, {"all": [parameter]}, x=x).memory / 1024 - 8

    assert memory(lambda x: [kib(n, x).shape for n in (8, 4, 6)]) == 8  # each freed at once
    assert memory(lambda x: [kib(n, x) for n in (8, 4, 6)]) == 18
    assert memory(lambda x: [(a := kib(8, x)).view(2, -1).T, a[3:], a.chunk(4)]) == 8
    assert memory(lambda x: torch.add(a := kib(8, x).normal_(), 1, out=a)) == 8
    assert memory(lambda x: [x[:10].add_(1), x.view(4, -1).T, x.detach()]) == 0
    # sin keeps what it is given, cos the sine, exp its own result
    assert memory(lambda x: kib(8, x).requires_grad_().sin().cos().exp()) == 32


def test_memory_of_particles(monkeypatch):
    """Linear in K where they are taken at once; in chunks, not much more than of one chunk."""
    vae, x = oracle()

    def memory(k):
        elbo = objective("iwae", k, max_plate_nesting=1)
        return measure_gradients(elbo, vae.model, vae.guide, x, parts(vae), 2 * BLOCKS).memory

    small, at_once, large = memory(16), memory(64), memory(256)
    assert 3.8 < (large - at_once) / (at_once - small) < 4.2
    assert 3.5 < at_once / small < 4.01
    monkeypatch.setattr(chunks, "MEMORY_VALUES", 8 * x.numel())
    assert memory(8) < memory(64) < at_once / 3


def slopes(elbo, num_draws):
    """Over K: the encoder's and the decoder's signal-to-noise, and the encoder's variance."""
    torch.manual_seed(0)
    loc = torch.zeros(4).double()
    vae = LinearGaussian(torch.eye(4).double(), loc, 1.0, "diagonal", scale_factor=1.155)
    x = torch.randn(64, 4).double() * 2**0.5
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    numbers = (1, 4, 16, 64, 256)
    found = [
        measure_gradients(elbo(k), vae.model, vae.guide, x, parts(vae), n).gradients
        for k, n in zip(numbers, num_draws, strict=True)
    ]
    snr, result = "signal_to_noise", []
    for part, name in (("encoder", snr), ("decoder", snr), ("encoder", "variance")):
        y = [getattr(g[part], name) for g in found]
        count = 5 if y[4].estimate > 0 else 4
        result.append(slope(numbers[:count], y[:count]))
        print(f"{part} {name}: {result[-1]}", *[f"{v.estimate:.4g}" for v in y])
    return [v.estimate for v in result]


@pytest.mark.slow
def test_signal_to_noise_of_iwae():
    """The encoder's gradient gets lost in its noise, the decoder's gets clear.

    Not in the limit yet: with several times the draws the encoder's slope is −0.56 ± 0.004, from
    which one as noisy as this (± 0.01) leaves the range less than once in 20,000 times. At K = 256
    the signal is twice its error; were it not told from noise, it would be left out of the slope,
    where it weighs little.
    """
    encoder, decoder, _ = slopes(lambda k: objective("iwae", k, 1), [500, 1000, 2000, 2000, 1500])
    assert abs(encoder + 0.5) < 0.1
    assert abs(decoder - 0.5) < 0.1


@pytest.mark.slow
def test_signal_to_noise_of_dreg():
    """Both get clear with K: of the encoder, the noise falls as K^(−3/2) and the signal as 1/K.

    With its path weight dropped, the encoder's gradient gets clear too, but of what it is biased
    to: the noise falls as K^(−1/2), and the signal does not. Its variance tells the two apart.
    Standard errors are below 0.01, and the nearest bound is 7 of them away.
    """

    def faulty(log_w):
        good = weighted.dreg(log_w)
        return weighted.Particles(good.bound, good.decoder, good.score, path=None)

    encoder, decoder, variance = slopes(lambda k: objective("dreg", k, 1), [100] * 5)
    assert abs(encoder - 0.5) < 0.1
    assert abs(decoder - 0.5) < 0.1
    assert abs(variance + 3) < 0.15
    *_, variance = slopes(lambda k: weighted.WeightedELBO(faulty, "path", k, 1), [40] * 5)
    assert abs(variance + 1) < 0.15
