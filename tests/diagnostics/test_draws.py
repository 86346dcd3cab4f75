"""Draws from p(z|x): each method against the oracle and quadrature, its label, planted faults.

The oracle's posterior is known for each row. A draw in units of it, L⁻¹ (z − m), is N(0, I), and
independent of those of other rows: one draw of each row is an exact sample.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from arviz_stats.base import array_stats
from pyro import distributions as dist
from scipy import stats
from test_faults import Fault, plant
from torch import nn
from torch.distributions import MultivariateNormal

import pyro_vae
from pyro_vae.config.families import MixturePrior
from pyro_vae.data.splits import DataSpec
from pyro_vae.diagnostics import draws as home
from pyro_vae.diagnostics.draws import posterior_draws
from pyro_vae.diagnostics.nuts import chains
from pyro_vae.diagnostics.recalibration import Recalibration
from pyro_vae.evidence.importance import pareto_k, pareto_smoothed, reliable_k
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.vae import VAE

# Each test rejects a true hypothesis at most so often, however many numbers it looks at.
FALSE_ALARM = 1e-4


def oracle(count: int, seed: int = 0, **settings):
    """An oracle whose two latents have a posterior correlation of −0.62."""
    torch.manual_seed(seed)
    weight = torch.tensor([[1, 0.8], [0.5, 1], [0, 0.3], [0.2, 0.1]]).double()
    vae = LinearGaussian(weight, torch.randn(4).double(), 0.8, **settings)
    return vae, vae.likelihood(vae.prior().sample((count,))).sample().detach()


def whitened(vae, x, z) -> np.ndarray:
    """L⁻¹ (z − m) (B, Z), of one draw z (B, Z) for each row."""
    exact = vae.exact_posterior(x)
    away = (z - exact.mean).unsqueeze(-1)
    return (
        torch.linalg.solve_triangular(exact.scale_tril, away, upper=False)[..., 0].detach().numpy()
    )


def p_value(sample: np.ndarray) -> float:
    """Of the hypothesis that (B, Z) are independent and N(0, 1), by Bonferroni's correction."""
    count, size = sample.shape
    tests = [2 * stats.norm.sf(abs(sample.sum(0)) / math.sqrt(count))]
    squares = stats.chi2.cdf((sample**2).sum(0), count)
    tests.append(2 * np.minimum(squares, 1 - squares))
    tests.append([stats.kstest(column, "norm").pvalue for column in sample.T])
    # the sum of two N(0, 1), where they are independent
    tests.append([stats.kstest(sample.sum(1) / math.sqrt(size), "norm").pvalue])
    values = np.concatenate(tests)
    return float(values.min() * len(values))


@pytest.fixture(scope="module")
def wide():
    """Rows whose guide is wide enough: K is small, so that weights without use would show."""
    vae, x = oracle(600, scale_factor=1.4, shift=0.5)
    torch.manual_seed(1)
    return vae, x, posterior_draws(vae, x, 3, 500)


def test_resampled_draws_are_exact(wide):
    vae, x, found = wide
    assert found.draws.shape == (3, 600, 2)
    assert set(found.method) == {"importance"}
    assert (found.pareto_k <= reliable_k(500)).all()
    assert found.r_hat.isnan().all()
    for draws in found.draws:
        assert p_value(whitened(vae, x, draws)) > FALSE_ALARM
    # power: the guide's own draws, those of other rows, and latents or draws mixed up
    torch.manual_seed(2)
    assert p_value(whitened(vae, x, vae.posterior(x).sample())) < 1e-9
    assert p_value(whitened(vae, x, found.draws[0].roll(1, 0))) < 1e-9
    assert p_value(whitened(vae, x, found.draws[0].flip(1))) < 1e-9


def test_repeats_are_counted(wide):
    """N² / Σ c², from the draws alone."""
    _, _, found = wide
    for row in range(20):
        _, counts = found.draws[:, row].unique(dim=0, return_counts=True)
        assert found.effective_draws[row] == pytest.approx(9 / counts.square().sum().item())
    vae, x = oracle(2, scale_factor=1.4)
    many = posterior_draws(vae, x, 4000, 500)
    for row in range(2):
        _, counts = many.draws[:, row].unique(dim=0, return_counts=True)
        assert many.effective_draws[row] == pytest.approx(4000**2 / counts.square().sum().item())
        assert many.effective_draws[row] < 500


def by_hand(vae, x, refined, num_draws, num_samples):
    """A step for the same seed, row by row, with the formulas written out."""
    torch.manual_seed(3)
    last = round(0.1 * num_samples)
    guides = [vae.posterior(x)] if refined is None else [vae.posterior(x), refined]
    each = (num_samples - last) // len(guides)
    z = torch.cat([*(q.sample((each,)) for q in guides), vae.prior().sample((last, len(x)))])
    mixture = 0.1 * vae.prior().log_prob(z).exp()
    for q in guides:
        mixture = mixture + 0.9 / len(guides) * q.log_prob(z).exp()
    probabilities, tails = [], []
    for row, value in enumerate(x):
        joint = vae.likelihood(z[:, row]).log_prob(value) + vae.prior().log_prob(z[:, row])
        log_w = (joint - mixture[:, row].log()).detach().numpy()
        smoothed, k = array_stats.psislw(-log_w)
        probabilities.append(torch.as_tensor(np.exp(smoothed)))
        tails.append(k)
    index = torch.multinomial(torch.stack(probabilities), num_draws, replacement=True)
    return torch.stack([z[i, row] for row, i in enumerate(index)], dim=1), np.array(tails)


def check_steps_by_hand():
    """Draws, k and repeats are those by hand, where smoothing changes the largest weights."""
    vae, x = oracle(5, scale_factor=0.72, shift=0.2)
    exact = vae.exact_posterior(x)
    refined = MultivariateNormal(exact.mean + 0.3, scale_tril=0.8 * exact.scale_tril)
    for second in (None, refined):
        draws, tails = by_hand(vae, x, second, 2000, 1000)
        torch.manual_seed(3)
        found = home._resampled(vae, x, second, 2000, 1000)
        same = (found.draws == draws).all(-1).double().mean()
        assert same > 0.999  # rounding may move a uniform number across the border of two draws
        assert np.allclose(found.pareto_k, tails)
        assert second is not None or tails.max() > 0.4, "weights here have a tail"


def test_steps_by_hand():
    check_steps_by_hand()


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(home, "REFINE_STEPS", 150)


def no_chains(*_):
    raise AssertionError("no row needs a chain")


def test_narrow_guides_are_refined(monkeypatch, few_steps):
    """Every row is refined, k is the second one, and draws are exact."""
    monkeypatch.setattr(home, "chains", no_chains)
    vae, x = oracle(100, scale_factor=0.05, shift=4.0)
    first = home._resampled(vae, x, None, 2, 1000)
    assert set(first.method) == {"unreliable"}
    torch.manual_seed(4)
    found = posterior_draws(vae, x, 2, 1000)
    assert set(found.method) == {"refined"}
    assert (found.pareto_k <= reliable_k(1000)).all()
    for draws in found.draws:
        assert p_value(whitened(vae, x, draws)) > FALSE_ALARM


# --- all methods in one call ---


def exact_chains(vae, x, num_chains, num_samples, num_warmup, on_sample):
    on_sample(num_chains * (num_samples + num_warmup))
    return vae.exact_posterior(x).sample((num_chains, num_samples)).detach(), 0


def mixed(monkeypatch, chains=exact_chains):
    """Of 150 rows, the guide serves a third, a refined Gaussian a third, and chains the others.

    Each method makes exact draws, for the rows that it is given.
    """
    vae, x = oracle(150, scale_factor=1.2)
    kind = torch.arange(150) % 3
    shift = {tuple(row.tolist()): k for row, k in zip(x, kind.tolist(), strict=True)}
    sound = vae.posterior

    def guide(rows):
        q = sound(rows)
        kinds = torch.tensor([shift[tuple(row.tolist())] for row in rows])
        narrow = torch.where(kinds == 0, 1.0, 0.01).double()[:, None, None]
        return dist.MultivariateNormal(
            q.mean + 5 * (narrow[:, :, 0] < 1), scale_tril=narrow * q.scale_tril
        )

    def refined(vae, rows, full, num_steps, on_step):
        on_step(num_steps)
        q = sound(rows)
        kinds = torch.tensor([shift[tuple(row.tolist())] for row in rows])
        assert full
        assert (kinds > 0).all(), "rows that need no better method are left alone"
        narrow = torch.where(kinds == 1, 1.0, 0.01).double()[:, None, None]
        r = dist.MultivariateNormal(
            q.mean + 5 * (narrow[:, :, 0] < 1), scale_tril=narrow * q.scale_tril
        )
        return SimpleNamespace(posterior=lambda _: r)

    def checked(vae, rows, *settings):
        assert all(shift[tuple(row.tolist())] == 2 for row in rows)
        return chains(vae, rows, *settings)

    monkeypatch.setattr(vae, "posterior", guide)
    monkeypatch.setattr(home, "refine", refined)
    monkeypatch.setattr(home, "chains", checked)
    return vae, x


def check_mixed(monkeypatch):
    vae, x = mixed(monkeypatch)
    torch.manual_seed(5)
    steps: dict[str, list[int]] = {}

    def on_progress(method, done, total):
        steps.setdefault(method, [0, total])[0] += done
        assert steps[method][1] == total

    found = posterior_draws(vae, x, 2, 1000, on_progress=on_progress)
    assert found.method.tolist() == ["importance", "refined", "nuts"] * 50
    chained = torch.arange(150) % 3 == 2
    assert (found.pareto_k.isnan() == chained).all()
    assert (found.r_hat.isnan() != chained).all()
    assert (found.pareto_k[~chained] <= reliable_k(1000)).all()
    assert (found.effective_draws[chained] == 2).all()
    for draws in found.draws:
        for part in (chained, ~chained, chained | ~chained):
            assert p_value(whitened(vae, x[part], draws[part])) > FALSE_ALARM
    assert list(steps) == ["importance", "refined", "nuts"]
    assert all(done == total for done, total in steps.values())


def test_each_row_by_the_method_that_it_needs(monkeypatch):
    check_mixed(monkeypatch)


def test_chains_that_disagree_are_named(monkeypatch):
    def stuck(vae, x, *settings):
        draws, count = exact_chains(vae, x, *settings)
        draws[0] += 3 * (x[:, :1] > 0)
        return draws, count

    vae, x = mixed(monkeypatch, stuck)
    with pytest.warns(
        UserWarning, match="rows are not converged: chains of NUTS disagree"
    ) as caught:
        found = posterior_draws(vae, x, 2, 1000)
    wrong = np.flatnonzero((np.arange(150) % 3 == 2) & (x[:, 0] > 0).numpy())
    np.testing.assert_array_equal(np.flatnonzero(found.method == "not converged"), wrong)
    assert (found.r_hat[wrong] > 1.05).all()
    named = ", ".join(map(str, wrong[:10]))
    assert str(caught[0].message).endswith(f"Rows (counted from 0): {named}, …")
    assert caught[0].filename == __file__


# fmt: off
FAULTS: dict = {
    check_steps_by_hand: [
        ("weights' sign", "_resampled", "smoothed.softmax(0).T", "(-smoothed).softmax(0).T"),
        ("weights not smoothed", "_resampled", "smoothed.softmax(0).T", "weights.softmax(0).T"),
        ("no weights", "_resampled", "smoothed.softmax(0).T", "(0 * smoothed).softmax(0).T"),
        ("prior not in the density", "_Mixture.log_prob", "[*parts, self.prior", "[self.prior"),
        ("equal shares", "_Mixture.log_prob", " + math.log(PRIOR_SHARE)", " + math.log(0.5)"),
        ("only q in the density", "_Mixture.log_prob", "in self.guides]", "in self.guides[:1]]")],
    check_mixed: [
        ("k of the first step", "_put", "in PER_ROW:", "in PER_ROW[1:]:"),
        ("draws of other rows", "_put", "= part.draws", "= part.draws.flip(1)"),
        ("a third of the scale", "_refine_rows", "scale_tril[few])", "scale_tril[few] / 3)"),
        ("rows mixed up", "_unreliable", "order[waiting[order]]", "order[waiting]"),
        ("resampled along rows", "_resampled", "index.unsqueeze", "index.roll(1, 1).unsqueeze"),
        ("methods of other rows", "_put", "rows.cpu().numpy()", "rows.flip(0).sort()[0] - 1"),
        ("chains of other rows", "_sample_rows", "vae, x[rows], NUM", "vae, x[rows.flip(0)], NUM"),
        ("agreeing chains refused", "_sample_rows", "<= MAX_R_HAT", "> MAX_R_HAT")],
}
# fmt: on
PLANTED = [pytest.param(c, *row, id=row[0]) for c, rows in FAULTS.items() for row in rows]


@pytest.mark.parametrize(("check", "name", "target", "old", "new"), PLANTED)
@pytest.mark.filterwarnings("ignore")
def test_planted_faults_are_caught(check, name, target, old, new, monkeypatch):
    plant(Fault(name, f"diagnostics.draws.{target}", old, new), monkeypatch)
    with pytest.raises(AssertionError):
        check(*[monkeypatch][: check is check_mixed])


# --- posteriors that are not Gaussian ---


class Constant(nn.Module):
    """A guide N(mean, sd²) for each latent, whatever x is."""

    def __init__(self, latent_dim: int, mean: float, sd: float) -> None:
        super().__init__()
        self.features = torch.tensor([mean] * latent_dim + [math.log(sd)] * latent_dim).double()

    def forward(self, x):
        return self.features.expand(len(x), -1)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


def square(z):
    return z.square().unsqueeze(-1)


def ridge(z):
    return (z[..., 1:] + z[..., :1].square()).unsqueeze(-1)


def curved(function, latent_dim: int, noise: float, mean: float, sd: float) -> VAE:
    spec = DataSpec((1,), None, discrete=False)
    likelihood = LIKELIHOODS["gaussian"](spec, torch.zeros(1), torch.ones(1))
    likelihood.log_scale.data.fill_(math.log(noise))
    decoder = Function(function)
    return VAE(
        StandardNormal(latent_dim), Constant(latent_dim, mean, sd), decoder, likelihood
    ).double()


def ranks(exact, z: np.ndarray, latent: int) -> np.ndarray:
    """P(Z ≤ z) (B,) by quadrature, for one draw z (B, Z) of each row: uniform if z is exact."""
    nodes, masses = exact.nodes[:, latent].numpy(), exact.masses.numpy()
    spacing = exact.spacing[latent].item()
    cells = np.clip((z[None, :, latent] - nodes[:, None]) / spacing + 0.5, 0, 1)
    return (cells * masses).sum(0)


@pytest.mark.parametrize(("function", "latent_dim"), [(square, 1), (ridge, 2)])
def test_two_modes_and_a_ridge_are_resampled(function, latent_dim):
    """With a wide guide. Ranks by quadrature are uniform, those of the guide's draws are not."""
    vae = curved(function, latent_dim, 0.8, 0.0, 1.3)
    torch.manual_seed(6)
    x = vae.likelihood(vae.prior().sample((400,))).sample().detach()
    x = x[x[:, 0].abs() < 5][:300]
    exact = quadrature(vae, x, 401 if latent_dim == 1 else 101)
    found = posterior_draws(vae, x, 1, 2000)
    assert set(found.method) == {"importance"}
    for latent in range(latent_dim):
        p = stats.kstest(ranks(exact, found.draws[0].numpy(), latent), "uniform").pvalue
        assert p > FALSE_ALARM / latent_dim
    wrong = vae.posterior(x).sample().numpy()
    assert stats.kstest(ranks(exact, wrong, latent_dim - 1), "uniform").pvalue < 1e-4


def test_a_guide_at_one_of_two_modes_is_not_relied_on(monkeypatch, few_steps):
    """x = z² + noise, with a guide at z = 2: its own weights are sound, and do not show z = −2."""
    vae = curved(square, 1, 0.2, 1.98, 0.06)
    x = torch.full((4, 1), 4.0).double()
    chains = lambda vae, x, c, s, w, f: (torch.randn(c, s, len(x), 1).double(), 0)  # noqa: E731
    monkeypatch.setattr(home, "chains", chains)
    torch.manual_seed(7)
    found = posterior_draws(vae, x, 100)
    assert set(found.method) == {"nuts"}
    # power: without draws from the prior it is taken for reliable, and one mode is lost
    monkeypatch.setattr(home, "PRIOR_SHARE", 1e-9)
    found = posterior_draws(vae, x, 100)
    assert set(found.method) == {"importance"}
    assert (found.draws > 0).all()


@pytest.mark.slow
def test_chains_of_a_ridge_against_quadrature(monkeypatch):
    """No weights are reliable here, whatever their k."""
    vae = curved(ridge, 2, 0.8, 0.0, 1.0)
    x = torch.tensor([[0.5], [1.5]]).double()
    monkeypatch.setattr(home, "reliable_k", lambda _: -100.0)
    for name, number in {"REFINE_STEPS": 3, "NUM_CHAINS": 2, "WARMUP": 100}.items():
        monkeypatch.setattr(home, name, number)
    torch.manual_seed(8)
    found = posterior_draws(vae, x, 500)
    assert set(found.method) == {"nuts"}
    exact = quadrature(vae, x, 301)
    scale = exact.covariance.diagonal(dim1=1, dim2=2).sqrt()
    error = stats.norm.isf(FALSE_ALARM / 8) / found.effective_draws.sqrt().unsqueeze(-1)
    off = (found.draws.mean(0) - exact.mean) / scale
    assert (off.abs() < error).all()
    assert (found.effective_draws > 80).all()
    # power: one half of the ridge
    half = found.draws[:, :, 0].abs().mean(0)
    assert (half / scale[:, 0] > error[:, 0]).all()


def positive(x):
    """A Pyro model with a positive latent."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.full((1,), 2.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)


def narrow(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.LogNormal(x.new_full((len(x), 1), 3.0), 0.01).to_event(1))


def test_a_mixture_prior_and_a_program_have_chains(digits):
    """NUTS knows the unconstrained space of both; a few transitions."""
    program = pyro_vae.Program(positive, narrow, x=torch.zeros(1, 1))
    config = pyro_vae.ModelConfig(latent_dim=2, hidden=(4,), prior=MixturePrior(components=2))
    vae = pyro_vae.build(config, digits)
    x = next(digits.test.fixed(vae.likelihood_module.units, 0, 2))
    assert chains(vae, x, 2, 4, 2)[0].isfinite().all()
    draws, _ = chains(program, torch.tensor([[1.0], [2.0]]), 2, 4, 10)
    assert (draws > 0).all()


def test_a_positive_latent_is_not_refined_by_a_gaussian(monkeypatch):
    program = pyro_vae.Program(positive, narrow, x=torch.zeros(1, 1))
    monkeypatch.setattr(home, "refine", None)
    monkeypatch.setattr(home, "PRIOR_SHARE", 1e-9)  # which alone would do
    made = dist.Gamma(2.0, 1.0).sample((4, 250, 2, 1))
    monkeypatch.setattr(home, "chains", lambda *_: (made, 0))
    found = posterior_draws(program, torch.tensor([[1.0], [2.0]]), 1000)
    assert set(found.method) == {"nuts"}
    for row in range(2):  # all draws of all chains, each once, in some order of the rows
        own = [made[:, :, other].flatten().sort()[0] for other in range(2)]
        assert any(torch.equal(found.draws[:, row, 0].sort()[0], values) for values in own)


# --- what cannot be done ---


def test_without_a_pyro_model_rows_are_marked():
    vae, x = oracle(12, scale_factor=0.05, shift=4.0)
    three = SimpleNamespace(prior=vae.prior, posterior=vae.posterior, likelihood=vae.likelihood)
    with pytest.warns(UserWarning, match="needs a Pyro model") as caught:
        found = posterior_draws(three, x, 10, 1000)
    assert set(found.method) == {"unreliable"}
    assert "the draws of 12 of 12 rows are unreliable" in str(caught[0].message)
    assert (found.pareto_k > 0.7).any()


@pytest.mark.parametrize("far", [1e6, 1e15, 1e30, math.nan])
def test_outliers_are_marked_and_leave_other_rows_alone(far):
    vae, x = oracle(6, scale_factor=1.2)
    vae, x = vae.float(), x.float()
    x[4, 1] = far
    named = r"precision of float32.*counted from 0\): 4$"
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match=named):
        found = posterior_draws(vae, x, 10, 1000)
    assert found.method.tolist() == ["importance"] * 4 + ["unreliable", "importance"]
    assert found.pareto_k.isnan().nonzero().flatten().tolist() == [4]


def test_widened_draws_are_labelled():
    """Distances from the mean times the factors, for each latent; in place of other methods."""
    vae, x = oracle(40, scale_factor=0.05)
    factors = np.array([20.0, 2.0])
    recalibration = Recalibration(factors, 0.9, [], [], None, None)  # type: ignore[arg-type]
    torch.manual_seed(10)
    found = posterior_draws(vae, x, 5, recalibration=recalibration)
    torch.manual_seed(10)
    q = vae.posterior(x)
    z = q.sample((5,))
    torch.testing.assert_close(found.draws, q.mean + (z - q.mean) * torch.tensor([20.0, 2.0]))
    assert set(found.method) == {"recalibrated"}
    assert found.pareto_k.isnan().all()
    assert (found.effective_draws == 5).all()


def test_the_seed_decides_and_chunks_do_not(monkeypatch):
    vae, x = oracle(5, scale_factor=1.2)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(posterior_draws(vae, x, 7, 500))
    assert torch.equal(found[0].draws, found[1].draws)
    assert not torch.equal(found[0].draws, found[2].draws)
    monkeypatch.setattr(home, "rows_at_once", lambda *_: 2)
    parts = posterior_draws(vae, x, 7, 500)
    assert parts.draws.shape == (7, 5, 2)
    assert len(parts.method) == len(parts.pareto_k) == len(parts.effective_draws) == 5


def test_bad_arguments():
    vae, x = oracle(2)
    with pytest.raises(ValueError, match="num_draws expects an integer of at least 1; got 0"):
        posterior_draws(vae, x, 0)
    for number in (99, 2**24 + 1):
        with pytest.raises(ValueError, match="num_samples expects 100 to 16,777,216; got"):
            posterior_draws(vae, x, 1, number)
    with pytest.raises(pyro_vae.InputError, match="not enough memory: 10,000,000,000,000 draws"):
        posterior_draws(vae, x, 10**13)


def test_smoothing_is_that_of_arviz_and_leaves_odd_weights_alone():
    torch.manual_seed(11)
    heavy = 3 * torch.randn(1000).double()
    odd = [torch.zeros(1000), torch.full((1000,), -math.inf), -1e4 * torch.arange(1000)]
    weights = torch.stack([heavy, *(o.double() for o in odd)], dim=1)
    smoothed, k = pareto_smoothed(weights)
    wanted, tail = array_stats.psislw(-heavy.numpy())
    np.testing.assert_array_equal(smoothed[:, 0], wanted)
    assert k.tolist() == [tail, -math.inf, math.inf, math.inf]
    assert torch.equal(smoothed[:, 1:], weights[:, 1:])
    assert torch.equal(k, pareto_k(weights))
