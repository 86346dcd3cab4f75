"""Each objective's value and gradient: by hand from the same draws, and against exact expectations.

Exact is the ELBO of a linear Gaussian model, and with one latent the expectation of any bound of K
importance weights, for any decoder, by quadrature (`log_mean`, `self_normalized`). A check is a
function, so that it can be shown to reject planted faults (`FAULTS`).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pyro
import pytest
import torch
from scipy import stats
from test_faults import Fault, plant
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import objective
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.vae import VAE
from pyro_vae.objectives import importance_weighted as weighted
from pyro_vae.objectives import registry as objectives

# Each call of `agree` rejects a true hypothesis at most so often, however many numbers it compares.
FALSE_ALARM = 1e-4

BATCH = 8
DRAWS, COPIES = 50, 400  # calls of an objective, each on so many copies of the batch

# What a guide's standard deviations are times those of the posterior, and its means off by.
WRONG = {"scale_factor": 1.4, "shift": 0.8}

ELBO = ["trace", "mean-field", "stl", "score-function", "score-baseline"]
SAMPLED = ["trace", "stl", "score-function", "score-baseline"]
IWAE = ["iwae", "dreg", "wake-sleep", "piwae"]

# name, number of particles, options
BOUNDS = [
    ("iwae", 2, {}),
    ("iwae", 8, {}),
    ("dreg", 2, {}),
    ("dreg", 8, {}),
    ("miwae", 6, {"groups": 2}),
    ("piwae", 6, {"groups": 2}),
    ("ciwae", 2, {"elbo_weight": 0.4}),
    ("renyi", 2, {"alpha": 0.5}),
    ("renyi", 2, {"alpha": 3.0}),
    ("renyi", 2, {"alpha": -1.0}),
    ("wake-sleep", 2, {}),
    ("wake-sleep", 8, {}),
]
OTHERS = [
    *[(name, 3, {}) for name in ELBO],
    ("beta", 3, {"beta": 4.0}),
    ("beta", 1, {"beta": 0.3}),
    ("free-bits", 1, {"free_bits": 0.7}),
    ("free-bits", 3, {"free_bits": 0.7}),
    ("beta-tc", 1, {"beta": 6.0}),
    ("beta-tc", 3, {"beta": 6.0}),
    ("mmd", 1, {"mmd_weight": 30.0}),
    ("mmd", 3, {"mmd_weight": 30.0}),
]
# Those whose gradient is that of their value, draw by draw.
PLAIN = ["trace", "mean-field", "iwae", "renyi", "miwae", "ciwae"]
PLAIN += ["beta", "free-bits", "beta-tc", "mmd"]

every_objective = pytest.mark.parametrize(("name", "count", "options"), [*OTHERS, *BOUNDS], ids=str)


# --- models, and estimates and exact gradients of their parameters --------------------------------


def oracle(latent_dim: int = 3, guide="diagonal", **faults) -> tuple[LinearGaussian, Tensor]:
    """A linear Gaussian model in float64, and x drawn from it."""
    torch.manual_seed(1)
    weight, loc = torch.randn(4, latent_dim).double(), torch.randn(4).double()
    vae = LinearGaussian(weight, loc, 0.9, guide, **faults)
    return vae, vae.likelihood(vae.prior().sample((BATCH,))).sample().detach()


def one_latent(kind: str) -> tuple[VAE, Tensor]:
    """The oracle with one latent and a wrong guide; bent: with a nonlinear decoder."""
    vae, x = oracle(1, **WRONG)
    if kind == "bent":
        vae.decoder = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 4)).double()
        with torch.no_grad():
            vae.decoder[0].weight.mul_(2)
    return vae, x


def call(elbo, vae, x) -> Tensor:
    """The objective, to be maximized, of one call."""
    return -elbo.differentiable_loss(vae.model, vae.guide, x)


def split(vae) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the encoder, and the others."""
    own = list(vae.encoder.parameters())
    return own, [p for p in vae.parameters() if all(p is not q for q in own)]


class Slopes(NamedTuple):
    """A value, and its gradient with respect to the parameters of encoder and decoder."""

    value: Tensor
    encoder: Tensor
    decoder: Tensor


def slopes(vae, value, encoder=None, decoder=None) -> Slopes:
    """Of `value`, or of the scalars of which encoder and decoder are said to take the gradient."""
    found = [value.detach().reshape(1)]
    for scalar, parameters in zip((encoder, decoder), split(vae), strict=True):
        scalar = value if scalar is None else scalar
        gradient = torch.autograd.grad(
            scalar, parameters, retain_graph=True, materialize_grads=True
        )
        found.append(torch.cat([g.flatten() for g in gradient]))
    return Slopes(*found)


def at_seed(elbo, vae, x) -> Slopes:
    """Of one call, with draws that are always the same."""
    torch.manual_seed(8)
    return slopes(vae, call(elbo, vae, x))


def same(found: Slopes, truth: Slopes, parts=Slopes._fields) -> None:
    """To 1e-9."""
    for part in parts:
        a, b = getattr(found, part), getattr(truth, part)
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12, f"{part}: {a} for {b}"


def estimates(elbo, vae, x, draws: int = DRAWS, copies: int = COPIES) -> Slopes:
    """Independent means of `copies` estimates, (draws, …) each."""
    many = x.repeat(copies, 1)
    rows = [slopes(vae, call(elbo, vae, many) / copies) for _ in range(draws)]
    return Slopes(*map(torch.stack, zip(*rows, strict=True)))


def agree(found: Slopes, truth: Slopes, parts=Slopes._fields) -> dict[str, float]:
    """The means of independent draws are the truth: Student's t, Bonferroni's correction.

    Returns, in units of the truth's norm, the error that would not have passed for chance.
    """
    count = sum(getattr(truth, part).numel() for part in parts)
    smallest = {}
    for part in parts:
        draws, exact = getattr(found, part), getattr(truth, part)
        error = draws.std(0) / math.sqrt(len(draws))
        bound = stats.t.isf(FALSE_ALARM / 2 / count, len(draws) - 1)
        off = draws.mean(0) - exact
        assert (off.abs() <= bound * error + 1e-9).all(), f"{part}: {off / error} errors off"
        smallest[part] = (bound * error.norm() / exact.norm()).item()
    return smallest


# --- exact expectations ---------------------------------------------------------------------------


def closed_form(vae: LinearGaussian, x, beta: float = 1.0) -> Tensor:
    """E_q[log p(x|z)] − β KL(q ‖ p(z)), summed over the batch; the guide's latents independent.

    Written without torch's closed forms, so that they are put to the test as well.
    """
    mean, scale = vae.encoder(x), vae.encoder.log_scale.exp()
    spread = (vae.weight.square() @ scale.square()).sum()  # tr W S Wᵀ
    square = (x - vae.loc - mean @ vae.weight.T).square().sum(-1) + spread
    variance = vae.noise_scale**2
    reconstruction = -(x.shape[1] * (2 * math.pi * variance).log() + square / variance) / 2
    return (reconstruction - beta * gaussian_kl(mean, scale).sum(-1)).sum()


def gaussian_kl(mean, scale) -> Tensor:
    """KL(N(mean, scale²) ‖ N(0, 1)), element by element."""
    return (mean**2 + scale**2 - 1) / 2 - scale.log()


NODES = torch.linspace(-9, 9, 241, dtype=torch.float64)  # of the noise ε, z = m + s ε
MASSES = (-NODES.square() / 2).exp() / math.sqrt(2 * math.pi) * (NODES[1] - NODES[0])
# u = log t, t the argument of the Laplace transforms below
U = torch.linspace(-40, 60, 401, dtype=torch.float64)
STEP = (U[1] - U[0]).item()


def at_nodes(vae, x) -> tuple[Tensor, Tensor]:
    """log w = log p(x, z) − log q(z|x) at each ε, (M, B), and z, (M, B, 1). One latent."""
    q = vae.posterior(x)
    z = q.mean + q.stddev * NODES[:, None, None]
    return vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z) - q.log_prob(z), z


def laplace(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E exp(−t w / c) at each t, (U, B); its integrand (U, M, B); log c (B,)."""
    centre = (log_w + MASSES.log()[:, None]).logsumexp(0).detach()
    weights = (log_w - centre).exp()
    parts = MASSES[:, None] * (-U.exp()[:, None, None] * weights).exp()
    return parts.sum(1), parts, centre


def log_mean(log_w: Tensor, count: int) -> Tensor:
    """E log ⅟K Σ w of K independent weights, (B,): for S = Σ w, by the trapezoidal rule in log t,

    E log S = ∫ (exp(−t) − E exp(−t S)) dt/t,  where  E exp(−t S) = (E exp(−t w))^K.
    """
    transform, _, centre = laplace(log_w)
    integrand = (-U.exp()).exp()[:, None] - transform**count
    return centre - math.log(count) + STEP * integrand.sum(0)


def self_normalized(log_w: Tensor, count: int) -> Tensor:
    """Masses (M, B) at the nodes with which E Σₖ w̃ₖ f(zₖ) is the sum of f(z).

    E [w₁/S f(z₁)] = ∫ E[w₁ f(z₁) exp(−t w₁)] (E exp(−t w))^(K−1) dt.
    """
    transform, parts, centre = laplace(log_w)
    outer = U.exp()[:, None] * transform ** (count - 1)
    return count * STEP * (log_w - centre).exp() * torch.einsum("ub,umb->mb", outer, parts)


def exact(name: str, vae, x, count: int, options) -> Slopes:
    """What an objective says of its value and gradients, for one latent."""
    log_w, z = at_nodes(vae, x)
    elbo = (MASSES[:, None] * log_w).sum()
    bound = log_mean(log_w, count).sum()
    if name in ("miwae", "piwae"):
        grouped = log_mean(log_w, count // options["groups"]).sum()
        return slopes(vae, grouped) if name == "miwae" else slopes(vae, bound, encoder=grouped)
    if name == "renyi":
        power = 1 - options["alpha"]
        return slopes(vae, log_mean(power * log_w, count).sum() / power)
    if name == "ciwae":
        return slopes(vae, options["elbo_weight"] * elbo + (1 - options["elbo_weight"]) * bound)
    if name == "wake-sleep":
        masses = self_normalized(log_w, count).detach()
        score = (masses * vae.posterior(x).log_prob(z.detach())).sum()
        return slopes(vae, bound, encoder=score)
    return slopes(vae, bound)


def test_exact_values_agree_with_a_grid_over_all_draws():
    """IWAE_K at K = 1, 2, 3 on the grid's K-th power, and the self-normalized masses at K = 2."""
    vae, x = one_latent("linear")
    log_w = at_nodes(vae, x)[0].detach()
    few, masses = log_w[::4], 4 * MASSES[::4]  # enough for errors below 1e-6
    pairs = torch.logaddexp(few[:, None], few)
    triples = torch.logaddexp(pairs[:, :, None], few)
    grids = [
        torch.einsum("mb,m->b", few, masses),
        torch.einsum("mnb,m,n->b", pairs, masses, masses) - math.log(2),
        torch.einsum("mnob,m,n,o->b", triples, masses, masses, masses) - math.log(3),
    ]
    for count, grid in enumerate(grids, 1):
        torch.testing.assert_close(log_mean(log_w, count), grid, rtol=0, atol=1e-6)
    whole = torch.logaddexp(log_w[:, None], log_w)
    share = torch.einsum("mnb,m,n->mb", (log_w[:, None] - whole).exp(), MASSES, MASSES)
    torch.testing.assert_close(self_normalized(log_w, 2), 2 * share, rtol=0, atol=1e-9)
    torch.testing.assert_close(grids[0].sum(), closed_form(vae, x).detach(), rtol=0, atol=1e-6)
    # the bounds rise to the log evidence, at last as Var(w) / (2 K p(x)²)
    evidence = vae.exact_log_evidence(x).detach()
    rising = torch.stack([log_mean(log_w, k) for k in (1, 2, 3, 8, 64, 4096)] + [evidence])
    assert (rising.diff(dim=0) > 1e-5).all()
    variance = (MASSES[:, None] * (2 * (log_w - evidence)).exp()).sum(0) - 1
    gap = evidence - rising[-2]
    torch.testing.assert_close(gap, variance / 2 / 4096, rtol=0.01, atol=0)


@pytest.mark.parametrize("faults", [{}, WRONG])
def test_closed_form_is_the_evidence_less_the_divergence(faults):
    vae, x = oracle(**faults)
    q = MultivariateNormal(vae.encoder(x), scale_tril=vae.encoder.log_scale.exp().diag())
    elbo = vae.exact_log_evidence(x) - kl_divergence(q, vae.exact_posterior(x))
    same(slopes(vae, closed_form(vae, x)), slopes(vae, elbo.sum()))


# --- values by hand, from the same draws ----------------------------------------------------------


def by_hand(name: str, vae, x, count: int, beta=1.0, **options) -> Tensor:
    """The objective, summed over the batch, of the draws that follow a seed. Written plainly."""
    q = vae.posterior(x)
    z = q.rsample((count,))  # (K, B, Z)
    likelihood, log_ratio = vae.likelihood(z).log_prob(x), vae.prior().log_prob(z) - q.log_prob(z)
    w = (likelihood + log_ratio).exp()  # (K, B): moderate numbers, so nothing overflows
    kl = gaussian_kl(q.mean, q.stddev)  # (B, Z)
    if name in IWAE:
        return w.mean(0).log().sum()
    if name == "miwae":  # groups of particles that follow each other
        groups = torch.chunk(w, options["groups"])
        return sum(group.mean(0).log().sum() for group in groups) / options["groups"]
    if name == "ciwae":
        share = options["elbo_weight"]
        return (share * w.log().mean(0) + (1 - share) * w.mean(0).log()).sum()
    if name == "renyi":
        power = 1 - options["alpha"]
        return (w**power).mean(0).log().sum() / power
    reconstruction = likelihood.sum() / count
    if name == "mean-field":
        return reconstruction - beta * kl.sum()
    if name == "free-bits":
        least = kl.new_tensor(options["free_bits"])
        return reconstruction - beta * len(x) * torch.maximum(kl.mean(0), least).sum()
    if name == "mmd":
        others = vae.prior().rsample((count, len(x)))
        return reconstruction - options["mmd_weight"] * len(x) * discrepancy(z, others)
    if name == "beta-tc":
        elbo = reconstruction + log_ratio.sum() / count
        return elbo - (beta - 1) * total_correlation(z, q.mean, q.stddev)
    return reconstruction + beta * log_ratio.sum() / count


def total_correlation(z, mean, scale) -> Tensor:
    """Σₙ log q(zₙ) − Σⱼ log q(zₙⱼ), q the batch's mixture; the mean of the particles."""
    total = torch.zeros(()).double()
    for particle in z:
        for point in particle:
            joint, each = 0, 0
            for centre, width in zip(mean, scale, strict=True):
                density = (-(((point - centre) / width) ** 2) / 2).exp() / width
                joint, each = joint + density.prod(), each + density
            total = total + (joint / len(mean)).log() - (each / len(mean)).log().sum()
    return total / len(z)


def discrepancy(z, prior) -> Tensor:
    """MMD² under Σ c / (c + d²), over pairs of different draws; the mean of the particles."""
    count, size, _ = z.shape
    spread = prior.new_tensor(2.0 * prior.shape[-1])  # E d² of two draws from N(0, I)
    total = torch.zeros(()).double()
    for own, other in zip(z, prior, strict=True):
        for i in range(size):
            for j in range(size):
                pairs = [(own[i], other[j], -2 / size**2)]
                if i != j:
                    pairs += [(s[i], s[j], 1 / size / (size - 1)) for s in (own, other)]
                for a, b, share in pairs:
                    c = spread * prior.new_tensor([0.1, 0.2, 0.5, 1, 2, 5, 10])
                    total = total + share * (c / (c + (a - b).square().sum())).sum()
    return total / count


def check_by_hand(name: str, count: int, options, kl_weight: float | None = None):
    """The value, and where it is that of the value the gradient, to 1e-9."""
    vae, x = oracle(**WRONG)
    elbo = objective(name, count, **options)
    if kl_weight is not None:
        elbo.kl_weight, options = kl_weight, {**options, "beta": kl_weight}
    found = at_seed(elbo, vae, x)
    torch.manual_seed(8)
    truth = slopes(vae, by_hand(name, vae, x, count, **options))
    same(found, truth, Slopes._fields if name in PLAIN else ["value"])


@every_objective
def test_value_by_hand(name, count, options):
    check_by_hand(name, count, options)


@pytest.mark.parametrize("name", ["trace", "mean-field", "score-function", "beta", "free-bits"])
def test_kl_weight_may_be_changed(name):
    check_by_hand(name, 3, {"free_bits": 0.7} if name == "free-bits" else {}, kl_weight=0.3)


@pytest.mark.parametrize(
    ("name", "count", "options"), [*[(name, 3, {}) for name in SAMPLED], *BOUNDS], ids=str
)
def test_exact_guide_gives_the_evidence_at_every_draw(name, count, options):
    vae, x = oracle(guide="exact")
    torch.manual_seed(0)
    value = call(objective(name, count, **options), vae, x)
    torch.testing.assert_close(value, vae.exact_log_evidence(x).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "count", "options", "other", "parts"),
    [
        # one particle
        ("iwae", 1, {}, "trace", Slopes._fields),
        ("renyi", 1, {}, "trace", Slopes._fields),
        ("dreg", 1, {}, "stl", Slopes._fields),
        ("stl", 1, {}, "trace", ["value", "decoder"]),
        ("score-function", 1, {}, "trace", ["value", "decoder"]),
        # options at their ends
        ("renyi", 6, {"alpha": 0}, "iwae", Slopes._fields),
        ("ciwae", 6, {"elbo_weight": 0}, "iwae", Slopes._fields),
        ("ciwae", 6, {"elbo_weight": 1}, "trace", Slopes._fields),
        ("miwae", 6, {"groups": 1}, "iwae", Slopes._fields),
        ("miwae", 6, {"groups": 6}, "trace", Slopes._fields),
        ("piwae", 6, {"groups": 1}, "iwae", Slopes._fields),
        ("beta", 6, {"beta": 1}, "trace", Slopes._fields),
        # what they share: the weights of the decoder, or of the encoder
        ("dreg", 6, {}, "iwae", ["value", "decoder"]),
        ("wake-sleep", 6, {}, "iwae", ["value", "decoder"]),
        ("score-baseline", 6, {}, "trace", ["value", "decoder"]),
        ("piwae", 8, {}, "iwae", ["value", "decoder"]),
        ("piwae", 8, {}, "miwae", ["encoder"]),
    ],
)
@pytest.mark.parametrize("noise", [0.9, 0.02])
def test_what_is_the_same_at_every_draw(name, count, options, other, parts, noise):
    """At little noise one weight is all, and the others less than any number."""
    vae, x = oracle(**WRONG)
    with torch.no_grad():
        vae.likelihood_module.log_scale.fill_(math.log(noise))
    found = at_seed(objective(name, count, **options), vae, x)
    same(found, at_seed(objective(other, count), vae, x), parts)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("renyi", {"alpha": 0.5}),
        ("miwae", {"groups": 8}),
        ("ciwae", {"elbo_weight": 0.05}),
        ("piwae", {"groups": 8}),
        ("beta", {"beta": 4.0}),
        ("free-bits", {"free_bits": 0.1}),
        ("beta-tc", {"beta": 6.0}),
        ("mmd", {"mmd_weight": 100.0}),
    ],
)
def test_defaults(name, options):
    vae, x = oracle(**WRONG)
    same(*(at_seed(objective(name, 16, **o), vae, x) for o in ({}, options)))


# --- values and gradients in expectation ----------------------------------------------------------


def check_elbo(name: str, kl_weight: float = 1.0) -> dict[str, float]:
    """Three latents, a wrong guide: value, encoder's and decoder's gradient are the closed form's.

    One call of `agree`.
    """
    vae, x = oracle(**WRONG)
    elbo = objective(name, 2)
    if kl_weight != 1:
        elbo.kl_weight = kl_weight
    torch.manual_seed(3)
    return agree(estimates(elbo, vae, x), slopes(vae, closed_form(vae, x, kl_weight)))


def check_bound(name: str, count: int, options, kind="linear") -> dict[str, float]:
    """One latent, a wrong guide: value and gradients are those by quadrature. One `agree`."""
    vae, x = one_latent(kind)
    torch.manual_seed(4)
    found = estimates(objective(name, count, **options), vae, x)
    return agree(found, exact(name, vae, x, count, options))


def resolves(smallest: dict[str, float], encoder: float) -> None:
    """No errors larger than these parts of the truth's norm would have passed for chance."""
    assert smallest["value"] < 0.006
    assert smallest["decoder"] < 0.04
    assert smallest["encoder"] < encoder


@pytest.mark.parametrize(
    ("name", "kl_weight"),
    [*[(name, 1.0) for name in ELBO], ("trace", 0.3), ("mean-field", 0.3), ("score-function", 0.3)],
)
def test_elbo_and_its_gradient_are_the_closed_form(name, kl_weight):
    """One false alarm in 10,000."""
    resolves(check_elbo(name, kl_weight), 0.25 if name == "score-function" else 0.08)


@pytest.mark.parametrize("kind", ["linear", "bent"])
@pytest.mark.parametrize(("name", "count", "options"), BOUNDS, ids=str)
def test_bound_and_its_gradient_are_exact(name, count, options, kind):
    """One false alarm in 10,000."""
    resolves(check_bound(name, count, options, kind), 0.15)


@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize("kind", ["linear", "bent", "three"])
def test_mean_weight_is_the_evidence(kind, count):
    """E exp(bound) = p(x) for each image. One false alarm in 10,000."""
    vae, x = oracle(**WRONG) if kind == "three" else one_latent(kind)
    if kind == "bent":
        evidence = quadrature(vae, x).log_evidence
        grid = (at_nodes(vae, x)[0] + MASSES.log()[:, None]).logsumexp(0)
        torch.testing.assert_close(grid, evidence, rtol=0, atol=1e-9)
    else:
        evidence = vae.exact_log_evidence(x)
    elbo, bounds = objective("iwae", count), []

    def rule(log_w):
        bounds.append(weighted.iwae(log_w).bound)
        return weighted.iwae(log_w)

    elbo.rule = rule
    torch.manual_seed(5)
    elbo.loss(vae.model, vae.guide, x.repeat(5000, 1))
    ratio = (bounds[0].reshape(5000, BATCH) - evidence.detach()).exp()
    nothing = torch.zeros(5000, 0)
    agree(Slopes(ratio, nothing, nothing), Slopes(torch.ones(BATCH), *nothing[:2]), ["value"])
    assert (bounds[0].reshape(5000, BATCH).mean(0) < evidence).all()


def test_wake_sleep_encoder_is_biased_as_it_has_to_be():
    """Not −∇KL(p(z|x) ‖ q), but nearer to it with K, as 1/K; without bias where q = p(z|x).

    Two false alarms in 10,000.
    """
    vae, x = one_latent("linear")

    def inclusive(vae):
        posterior = vae.exact_posterior(x)
        mean, variance = posterior.mean.detach(), posterior.variance.detach()
        q = vae.posterior(x)
        return (-q.stddev.log() - (variance + (mean - q.mean) ** 2) / 2 / q.variance).sum()

    limit = slopes(vae, inclusive(vae)).encoder
    off = [exact("wake-sleep", vae, x, k, {}).encoder - limit for k in (2, 64, 128, 256)]
    assert off[0].norm() > 0.1 * limit.norm()
    for one, other in itertools.pairwise(off[1:]):
        assert 1.9 < one.norm() / other.norm() < 2.1
    torch.manual_seed(6)
    found = estimates(objective("wake-sleep", 2), vae, x)
    truth = exact("wake-sleep", vae, x, 2, {})
    agree(found, truth)
    with pytest.raises(AssertionError, match="encoder"):
        agree(found, truth._replace(encoder=limit))
    vae, x = oracle(1)
    truth = exact("wake-sleep", vae, x, 2, {})
    assert truth.encoder.abs().max() < 1e-9
    assert slopes(vae, inclusive(vae)).encoder.abs().max() < 1e-9
    agree(estimates(objective("wake-sleep", 2), vae, x), truth)


# --- variances ------------------------------------------------------------------------------------


def check_no_variance(name: str) -> None:
    """At the exact posterior every draw's gradient is zero for the encoder."""
    vae, x = oracle(guide="exact")
    found = estimates(objective(name, 3), vae, x, draws=20, copies=1).encoder
    assert found.abs().max() < 1e-10, f"encoder: {found.abs().max()}"


@pytest.mark.parametrize("name", ["stl", "dreg", "score-baseline"])
def test_no_variance_at_the_exact_posterior(name):
    check_no_variance(name)


@pytest.mark.parametrize("name", ["trace", "iwae", "wake-sleep", "score-function"])
def test_others_have_variance_at_the_exact_posterior(name):
    with pytest.raises(AssertionError, match="encoder"):
        check_no_variance(name)


def along(name: str, count: int, vae, x, truth: Tensor) -> Tensor:
    """(200,) encoder gradients, each of 5 copies of the batch, along `truth`."""
    found = estimates(objective(name, count), vae, x, draws=200, copies=5).encoder
    return found @ truth / truth.norm()


def less_variance(one: Tensor, other: Tensor) -> bool:
    """Whether it is certain but for FALSE_ALARM: an F-test."""
    return one.var() * stats.f.isf(FALSE_ALARM, len(one) - 1, len(other) - 1) < other.var()


def test_baseline_has_less_variance():
    """One false alarm in 10,000."""
    vae, x = one_latent("linear")
    truth = slopes(vae, closed_form(vae, x)).encoder
    torch.manual_seed(7)
    found = [along(name, 4, vae, x, truth) for name in ("score-baseline", "score-function")]
    assert less_variance(*found)


def test_dreg_gains_from_particles_where_iwae_loses():
    """The encoder's gradient by its standard deviation: from K = 4 to 64 four times under dreg, a
    quarter under iwae. Half of it is asked for, ten standard errors below."""
    vae, x = one_latent("linear")
    torch.manual_seed(7)
    found, signal = {}, {}
    for name, count in itertools.product(("iwae", "dreg"), (4, 64)):
        truth = exact(name, vae, x, count, {}).encoder
        found[name, count] = along(name, count, vae, x, truth)
        signal[name, count] = (truth.norm() / found[name, count].std()).item()
    assert less_variance(found["dreg", 64], found["iwae", 64])
    assert signal["iwae", 64] < signal["iwae", 4] / 2
    assert signal["dreg", 64] > signal["dreg", 4] * 2


# --- those with another term in the KL's place ----------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_free_bits_below_and_above_every_divergence(count):
    """Below, it is mean-field; above, the encoder follows the reconstruction alone."""
    vae, x = oracle(**WRONG)
    mean_field = at_seed(objective("mean-field", count), vae, x)
    same(at_seed(objective("free-bits", count, free_bits=1e-3), vae, x), mean_field)
    torch.manual_seed(8)
    z = vae.posterior(x).rsample((count,))
    reconstruction = vae.likelihood(z).log_prob(x).sum() / count
    truth = slopes(vae, reconstruction - 3 * 50 * BATCH, encoder=reconstruction)
    same(at_seed(objective("free-bits", count, free_bits=50), vae, x), truth)


def test_total_correlation_of_nothing():
    """With beta 1 it has no weight; one image by itself has none."""
    vae, x = oracle(**WRONG)
    trace = at_seed(objective("trace", 3), vae, x)
    same(at_seed(objective("beta-tc", 3, beta=1.0), vae, x), trace)
    same(at_seed(objective("beta-tc", 3), vae, x[:1]), at_seed(objective("trace", 3), vae, x[:1]))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_discrepancy_of_the_prior_is_nothing(shift):
    """MMD² and its gradient at q(z) = p(z); above 0 where q is shifted. One false alarm in
    10,000."""
    vae, x = oracle(guide="collapsed", shift=shift)
    rows = []
    for seed in range(50):
        pair = []
        for weight in (1.0, 2.0):
            torch.manual_seed(seed)
            pair.append(slopes(vae, call(objective("mmd", 50, 1, mmd_weight=weight), vae, x)))
        rows.append([(a - b) / BATCH for a, b in zip(*pair, strict=True)])
    found = Slopes(*map(torch.stack, zip(*rows, strict=True)))
    assert (found.decoder == 0).all()
    nothing = Slopes(*(torch.zeros_like(part[0]) for part in found))
    if shift == 0:
        agree(found, nothing, ["value", "encoder"])
        return
    assert found.value.mean() > 0
    for part in ("value", "encoder"):
        with pytest.raises(AssertionError, match=part):
            agree(found, nothing, [part])


# --- the three ways to ask for it, SVI, and what is refused ---------------------------------------


@every_objective
def test_loss_gradient_and_module_agree(name, count, options):
    vae, x = oracle(**WRONG)
    elbo = objective(name, count, **options)
    assert isinstance(elbo, pyro.infer.ELBO)
    truth = at_seed(elbo, vae, x)
    torch.manual_seed(8)
    assert elbo.loss(vae.model, vae.guide, x) == pytest.approx(-truth.value.item(), rel=1e-9)
    torch.manual_seed(8)
    module = elbo(vae.model, vae.guide)
    same(slopes(vae, -module(x)), truth)
    torch.manual_seed(8)
    loss = elbo.loss_and_grads(vae.model, vae.guide, x)
    assert loss == pytest.approx(-truth.value.item(), rel=1e-9)
    for part, parameters in zip(("encoder", "decoder"), split(vae), strict=True):
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        torch.testing.assert_close(gradient, -getattr(truth, part), rtol=1e-9, atol=1e-9)


@every_objective
def test_svi_takes_a_step_along_the_gradient(name, count, options):
    """Adam's first step has the rate's length in every parameter, against the gradient's sign."""
    vae, x = oracle(**WRONG)
    elbo = objective(name, count, **options)
    truth = at_seed(elbo, vae, x)
    before = [torch.cat([p.detach().flatten() for p in part]) for part in split(vae)]
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    torch.manual_seed(8)
    assert svi.step(x) == pytest.approx(-truth.value.item(), rel=1e-9)
    for parameters, old, gradient in zip(split(vae), before, truth[1:], strict=True):
        new = torch.cat([p.detach().flatten() for p in parameters])
        moves = gradient.abs() > 1e-3
        assert moves.float().mean() > 0.5
        step = 1e-3 * gradient.sign()
        torch.testing.assert_close((new - old)[moves], step[moves], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("elbo", 1, {}, "objective expects one of trace, .*; got 'elbo'"),
        ("iwae", 2, {"alpha": 0.5}, "iwae has no option alpha; it belongs to renyi"),
        ("stl", 2, {"temperature": 0.5}, "stl has no option temperature; no objective has it"),
        ("iwae", 0, {}, "number of particles expects an integer of at least 1; got 0"),
        ("iwae", 1.5, {}, "number of particles expects an integer of at least 1; got 1.5"),
        ("score-baseline", 1, {}, "score-baseline expects at least 2 particles"),
        ("renyi", 2, {"alpha": 1}, "alpha expects a finite number other than 1"),
        ("renyi", 2, {"alpha": math.nan}, "alpha expects a finite number"),
        (
            "miwae",
            6,
            {"groups": 4},
            "miwae .* a multiple of its 4 groups",
        ),
        ("piwae", 6, {}, "piwae .* a multiple of its 8 groups"),
        (
            "miwae",
            6,
            {"groups": 0},
            "miwae .* a multiple of its 0 groups",
        ),
        (
            "miwae",
            6,
            {"groups": 1.5},
            "miwae .* a multiple of its 1.5 groups",
        ),
        (
            "miwae",
            6,
            {"groups": 2.0},
            "miwae .* a multiple of its 2.0 groups",
        ),
        (
            "miwae",
            6,
            {"groups": math.nan},
            "miwae .* a multiple of its nan groups",
        ),
        (
            "miwae",
            6,
            {"groups": math.inf},
            "miwae .* a multiple of its inf groups",
        ),
        ("ciwae", 2, {"elbo_weight": 1.1}, "elbo_weight expects 0 to 1; got 1.1"),
        ("ciwae", 2, {"elbo_weight": math.nan}, "elbo_weight expects 0 to 1; got nan"),
        ("beta", 1, {"beta": 0.0}, "beta expects a finite number above 0; got 0"),
        ("beta", 1, {"beta": math.nan}, "beta expects a finite number above 0; got nan"),
        ("beta-tc", 1, {"beta": -1.0}, "beta expects a finite number above 0; got -1"),
        ("beta-tc", 1, {"beta": math.inf}, "beta expects a finite number above 0; got inf"),
        ("free-bits", 1, {"free_bits": 0}, "free_bits expects a finite number above 0; got 0"),
        ("free-bits", 1, {"free_bits": math.nan}, "free_bits expects a finite number above 0"),
        ("mmd", 1, {"mmd_weight": -2.0}, "mmd_weight expects a finite number above 0; got -2"),
        ("mmd", 1, {"mmd_weight": math.nan}, "mmd_weight expects a finite number above 0"),
    ],
)
def test_refused(name, count, options, message):
    with pytest.raises(ValueError, match=message):
        objective(name, count, **options)


def test_batches_and_guides_that_have_no_such_term():
    vae, x = oracle(guide="exact")
    one = [
        at_seed(objective(name, 1, **o), vae, x[:1])
        for name, o in (("mmd", {}), ("beta", {"beta": 1e-12}))
    ]
    same(*one)  # nothing but the reconstruction
    with pytest.raises(ValueError, match="beta-tc expects a guide with independent latents"):
        call(objective("beta-tc"), vae, x)


# --- planted faults -------------------------------------------------------------------------------

MIWAE, PIWAE = (("miwae", 6, {"groups": 2}), ("piwae", 6, {"groups": 2}))
CIWAE, RENYI = (("ciwae", 2, {"elbo_weight": 0.4}), ("renyi", 2, {"alpha": 0.5}))
BASELINE, SCORE, BETA = (("score-baseline",), ("score-function",), ("beta", 3, {"beta": 4.0}))
FREE_BITS, TC = (("free-bits", 1, {"free_bits": 0.7}), ("beta-tc", 1, {"beta": 6.0}))
MMD = ("mmd", 1, {"mmd_weight": 30.0})
FREE_BITS_EACH = "* kl.clamp_min(self.free_bits))"
WRONG_AXIS = "logsumexp(0)"

# target, what is replaced there, by what; the check that has to fail, with its arguments; where
FAULTS = [
    ("_bound", " - math.log(log_w.shape[dim])", "", check_by_hand, ("iwae", 3, {}), "value"),
    ("iwae", "log_w.softmax(0)", "log_w.softmax(1)", check_bound, ("iwae", 2, {}), "encoder"),
    ("miwae", "(groups, -1,", "(-1, groups,", check_by_hand, MIWAE, "value"),
    ("miwae", ".mean(0)", ".sum(0)", check_by_hand, MIWAE, "value"),
    ("miwae", "softmax(1)", "softmax(0)", check_bound, MIWAE, "encoder"),
    ("ciwae", " / len(log_w)", "", check_bound, CIWAE, "encoder"),
    ("renyi", "_bound(powers) / (1 - alpha)", "_bound(powers)", check_by_hand, RENYI, "value"),
    ("renyi", "powers.softmax", "log_w.softmax", check_bound, RENYI, "encoder"),
    ("dreg", ", path=weights", "", check_bound, ("dreg", 2, {}), "encoder"),
    ("dreg", ", path=weights", "", check_bound, ("dreg", 8, {}), "encoder"),
    ("dreg", "path=weights", "path=weights**2", check_bound, ("dreg", 2, {}), "encoder"),
    ("dreg", "torch.zeros_like(log_w)", "-weights", check_bound, ("dreg", 2, {}), "encoder"),
    ("piwae", "1 / (groups * shares)", "groups * shares", check_bound, PIWAE, "decoder"),
    ("piwae", "path=ratio", "path=1 / ratio", check_bound, PIWAE, "encoder"),
    ("piwae", "-encoder, path", "-encoder / ratio, path", check_bound, PIWAE, "encoder"),
    ("wake_sleep", "s, weights)", "s, -weights)", check_bound, ("wake-sleep", 2, {}), "encoder"),
    ("stl", "torch.zeros_like(log_w)", "-2 * equal", check_no_variance, ("stl",), "encoder"),
    ("stl", "torch.zeros_like(log_w)", "-equal", check_no_variance, ("stl",), "encoder"),
    ("score_baseline", "max(1, count - 1)", "count", check_elbo, BASELINE, "encoder"),
    ("score_baseline", "(log_w - log_w.mean(0))", "-log_w", check_elbo, BASELINE, "encoder"),
    ("WeightedELBO.differentiable_loss", "(a + c)", "(a - c)", check_bound, PIWAE, "encoder"),
    ("WeightedELBO.differentiable_loss", "(a + c)", "a", check_bound, PIWAE, "encoder"),
    ("particles._weigh_gradient", "* weight", "* 2 * weight", check_bound, PIWAE, "encoder"),
    ("particles.draw_score", "Detached()", "Messenger()", check_elbo, BASELINE, "encoder"),
    ("particles.draw_path", "(copies, fixed)", "(copies, copies)", check_elbo, ("stl",), "encoder"),
    (
        "elbos.ScoreFunction._get_trace",
        "latent_sites(traces[1])",
        "{}",
        check_elbo,
        SCORE,
        "encoder",
    ),
    ("elbos.Sampled._get_trace", "self.kl_weight)", "1.0)", check_by_hand, BETA, "value"),
    ("elbos.FreeBits.penalty", "* kl)", FREE_BITS_EACH, check_by_hand, FREE_BITS, "value"),
    ("elbos.FreeBits.penalty", "numel(), -1", "numel(), 1, -1", check_by_hand, FREE_BITS, "value"),
    ("elbos.BetaTC.penalty", "logsumexp(data - 1)", WRONG_AXIS, check_by_hand, TC, "value"),
    ("elbos.BetaTC.penalty", "log_each.sum(-1)", "log_each.mean(-1)", check_by_hand, TC, "value"),
    ("elbos.BetaTC.penalty", "(self.beta - 1)", "self.beta", check_by_hand, TC, "value"),
    (
        "elbos.MaximumMeanDiscrepancy.penalty",
        "others.sum(",
        "pairs.sum(",
        check_by_hand,
        MMD,
        "value",
    ),
    ("elbos.MaximumMeanDiscrepancy.penalty", "2 * between", "between", check_by_hand, MMD, "value"),
]


@pytest.mark.parametrize(("target", "old", "new", "check", "arguments", "where"), FAULTS)
def test_planted_fault_is_rejected(target, old, new, check, arguments, where, monkeypatch):
    target = (
        target if target.startswith(("particles.", "elbos.")) else f"importance_weighted.{target}"
    )
    plant(Fault("planted", f"objectives.{target}", old, new), monkeypatch)
    sound = objectives._WEIGHTED.items()
    rules = {name: (getattr(weighted, rule.__name__), route) for name, (rule, route) in sound}
    monkeypatch.setattr(objectives, "_WEIGHTED", rules)
    with pytest.raises(AssertionError, match=f"^{where}"):
        check(*arguments)
