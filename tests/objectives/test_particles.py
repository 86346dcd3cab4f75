"""Objectives on Pyro programs of any kind: plates, scales, masks, several and discrete latents.

Each program here says what its densities are without Pyro (`terms`), so that the objectives' values
can be written by hand from the very draws that an objective made (`Recorder`). What has to hold
whatever the program is, memory in chunks, random numbers, the parameter store, is held against the
package's own VAE.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import pyro
import pytest
import torch
from conftest import all_likelihoods, batch, example_splits, example_vae
from pyro import poutine
from pyro.distributions import (
    Bernoulli,
    Categorical,
    Delta,
    LogNormal,
    Normal,
    Poisson,
    constraints,
)
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from scipy import stats
from torch import Tensor

import pyro_vae
from pyro_vae import FitConfig, fit, iterate, objective
from pyro_vae.config.options import KL_WEIGHTED, Objective
from pyro_vae.objectives import particles
from pyro_vae.runtime import memory as chunks

# Each call of `agree` rejects a true hypothesis at most so often, however many numbers it compares;
# seeds are fixed, so a test that passes once passes always.
FALSE_ALARM = 1e-4

K = 8
NAMES = get_args(Objective)
OPTIONS: dict[str, dict[str, float]] = {
    "renyi": {"alpha": 0.3},
    "miwae": {"groups": 4},
    "piwae": {"groups": 2},
    "ciwae": {"elbo_weight": 0.3},
    "beta": {"beta": 2.5},
    "free-bits": {"free_bits": 0.4},
    "beta-tc": {"beta": 3.0},
    "mmd": {"mmd_weight": 20.0},
}
WEIGHTED = ("stl", "score-baseline", "iwae", "dreg", "renyi", "miwae", "ciwae", "piwae")
WEIGHTED += ("wake-sleep",)
PENALTIES = ("free-bits", "beta-tc", "mmd")
ANY_GUIDE = ("trace", "score-function", "score-baseline", "wake-sleep")

every_objective = pytest.mark.parametrize("name", NAMES)
every_weighted = pytest.mark.parametrize("name", WEIGHTED)


def make(name: str, count: int = K, nesting: float = math.inf):
    return objective(name, count, max_plate_nesting=nesting, **OPTIONS.get(name, {}))


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(value, truth, tolerance: float = 1e-9) -> None:
    value, truth = (torch.as_tensor(a, dtype=torch.float64).detach() for a in (value, truth))
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


# --- values by hand -------------------------------------------------------------------------------


@dataclass
class Latent:
    """A Gaussian latent site: draws (K, N, Z), means and deviations that broadcast to them."""

    z: Tensor
    q: tuple[Any, Any]
    p: tuple[Any, Any]


def log_normal(z: Tensor, loc, scale) -> Tensor:
    """Σⱼ log N(zⱼ; locⱼ, scaleⱼ²)."""
    scale = torch.as_tensor(scale, dtype=z.dtype)
    return (-(((z - loc) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2).sum(-1)


def log_weights(log_likelihood: Tensor, latents: list[Latent]) -> Tensor:
    return log_likelihood + sum(log_normal(s.z, *s.p) - log_normal(s.z, *s.q) for s in latents)


def bound(name: str, log_w: Tensor) -> Tensor:
    """(K, N) → (N,), in plain exponentials: the weights here are neither large nor small."""
    options, count, w = OPTIONS.get(name, {}), len(log_w), log_w.exp()
    if name in ("stl", "score-baseline", "trace", "score-function"):
        return log_w.mean(0)
    if name == "renyi":
        alpha = options["alpha"]
        return (w ** (1 - alpha)).mean(0).log() / (1 - alpha)
    if name == "miwae":  # consecutive particles make a group
        size = count // int(options["groups"])
        groups = [w[i : i + size].mean(0).log() for i in range(0, count, size)]
        return sum(groups) / len(groups)
    if name == "ciwae":
        share = options["elbo_weight"]
        return share * log_w.mean(0) + (1 - share) * w.mean(0).log()
    assert name in ("iwae", "dreg", "piwae", "wake-sleep")
    return w.mean(0).log()


def divergence(q, p, like: Tensor) -> Tensor:
    """KL of Gaussians in each latent dimension, (K, N, Z)."""
    (m, s), (n, t) = ([torch.as_tensor(a).double() for a in pair] for pair in (q, p))
    return ((m - n) ** 2 / t**2 + (s / t) ** 2 - 1 - 2 * (s / t).log()).expand_as(like) / 2


def total_correlation(site: Latent) -> Tensor:
    """(K,) sums over the batch, by loops over draws and images."""
    loc, scale = (torch.as_tensor(a).double().expand_as(site.z) for a in site.q)
    count = site.z.shape[1]
    total = []
    for k in range(len(site.z)):
        value = 0.0
        for n in range(count):
            each = torch.stack(
                [
                    -(((site.z[k, n] - loc[k, m]) / scale[k, m]) ** 2) / 2
                    - scale[k, m].log()
                    - math.log(2 * math.pi) / 2
                    for m in range(count)
                ]
            )  # (N, Z)
            value = value + each.sum(-1).exp().mean().log() - each.exp().mean(0).log().sum()
        total.append(value)
    return torch.stack(total)


def discrepancy(own: Tensor, prior: Tensor, scale: float) -> Tensor:
    """(K,) unbiased MMD² of (K, N, Z), by loops over pairs; `scale` is the prior's deviation."""

    def square(a, b):
        return ((a - b) ** 2).sum()

    count = own.shape[1]
    pairs = [(i, j) for i in range(count) for j in range(count)]
    spread = 2 * own.shape[-1] * scale**2  # E d² of two draws from the prior

    def kernel(a, b):
        d = square(a, b)
        return sum(s * spread / (s * spread + d) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    found = []
    for a, b in zip(own, prior, strict=True):
        off = [(i, j) for i, j in pairs if i != j]
        within = sum(kernel(v[i], v[j]) for v in (a, b) for i, j in off) / len(off)
        found.append(within - 2 * sum(kernel(a[i], b[j]) for i, j in pairs) / len(pairs))
    return torch.stack(found)


def by_hand(name: str, log_likelihood: Tensor, latents: list[Latent], state: Tensor) -> Tensor:
    """The objective of K draws (K, N), ().

    Args:
        state: torch's random state after the model's run, with which mmd draws from the prior.
    """
    options = OPTIONS.get(name, {})
    reconstruction = log_likelihood.mean(0).sum()
    if name == "beta":
        ratio = log_weights(log_likelihood, latents) - log_likelihood
        return reconstruction + options["beta"] * ratio.mean(0).sum()
    kls = [divergence(s.q, s.p, s.z) for s in latents]
    if name == "mean-field":
        return reconstruction - sum(kl.mean(0).sum() for kl in kls)
    if name == "free-bits":
        count = log_likelihood.shape[1]
        floors = [kl.mean((0, 1)).clamp_min(options["free_bits"]).sum() for kl in kls]
        return reconstruction - count * sum(floors)
    if name == "beta-tc":
        penalty = sum(total_correlation(s).mean() for s in latents)
        elbo = log_weights(log_likelihood, latents).mean(0).sum()
        return elbo - (options["beta"] - 1) * penalty
    if name == "mmd":
        torch.set_rng_state(state)
        found = 0.0
        for s in latents:
            prior = s.p[0] + s.p[1] * torch.randn(s.z.shape, dtype=s.z.dtype)
            found = found + discrepancy(s.z, prior, s.p[1]).mean()
        return reconstruction - options["mmd_weight"] * log_likelihood.shape[1] * found
    return bound(name, log_weights(log_likelihood, latents)).sum()


class Recorder(Messenger):
    """Keeps each site's value of its first visit, and the random state after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.state = torch.get_rng_state()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.values.setdefault(msg["name"], torch.as_tensor(msg["value"]).detach())
        self.state = torch.get_rng_state()


def recorded_loss(elbo, model, guide, *args) -> tuple[float, Recorder]:
    torch.manual_seed(5)
    with Recorder() as recorder:
        loss = elbo.loss(model, guide, *args)
    return loss, recorder


# --- the plainest program, in plates of all kinds -------------------------------------------------

WEIGHT = torch.tensor([[1.2, -0.4], [0.3, 0.8], [-0.5, 0.6]]).double()
GAIN = 0.4 * WEIGHT.T
SPREAD = torch.tensor([0.6, 0.9]).double()
N, B = 20, 5


def standard(size: int = 2):
    return Normal(torch.zeros(size).double(), 1.0).to_event(1)


def body(x: Tensor) -> None:
    z = pyro.sample("z", standard())
    pyro.sample("x", Normal(z @ WEIGHT.T, 0.8).to_event(1), obs=x)


def guide_body(x: Tensor) -> None:
    pyro.sample("z", Normal(x @ GAIN.T, SPREAD).to_event(1))


def plain_log_w(z: Tensor, x: Tensor) -> Tensor:
    """(K, N) of the program above, for z (K, N, 2)."""
    log_likelihood = log_normal(x.expand(*z.shape[:-1], 3), z @ WEIGHT.T, 0.8)
    return log_weights(log_likelihood, [Latent(z, (x @ GAIN.T, SPREAD), (0.0, 1.0))])


def in_plate(program, **plate):
    """`program(rows)` in a plate "data"."""

    def run(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1, **plate) as index:
            program(x[index])

    return run


@pytest.fixture
def rows() -> Tensor:
    torch.manual_seed(2)
    return 1.2 * doubles(N, 3)


FACTORS = torch.tensor([0.5, 3.0, 1.0, 0.1, 2.0]).double()


@every_weighted
@pytest.mark.parametrize("scale", [1.0, 0.25, FACTORS], ids=["none", "number", "tensor"])
@pytest.mark.parametrize("which", ["subsample", "subsample_size"])
def test_scale_stays_outside_of_the_bound(name, which, scale, rows):
    """N/B Σ bound of each datum, not the bound of scaled weights; so for any scale around all."""
    index = torch.tensor([7, 0, 13, 4, 18])
    plate = {"subsample": index} if which == "subsample" else {"subsample_size": B}
    model, guide = (
        poutine.scale(in_plate(program, **plate), scale=scale) for program in (body, guide_body)
    )
    elbo = make(name, nesting=1)
    loss, recorder = recorded_loss(elbo, model, guide, rows)
    if which == "subsample_size":
        index = recorder.values["data"]
    bounds = bound(name, plain_log_w(recorder.values["z"], rows[index]))
    assert recorder.values["z"].shape == (K, B, 2)
    close(loss, -(N / B * scale * bounds).sum())
    # The gradient is scaled as the value: here with respect to x, the same as of the rows alone.
    torch.manual_seed(5)
    moving = rows.clone().requires_grad_()
    elbo.differentiable_loss(model, guide, moving).backward()
    gradient = moving.grad.clone()
    alone = rows[index].clone().requires_grad_()
    if which == "subsample":
        torch.manual_seed(5)
        plain = [in_plate(program) for program in (body, guide_body)]
        elbo.differentiable_loss(*plain, alone).backward()
        factor = torch.as_tensor(N / B * scale).expand(B)
        close(gradient[index], factor[:, None] * alone.grad)
    others = torch.ones(N, dtype=torch.bool)
    others[index] = False
    assert (gradient[others] == 0).all()


@every_objective
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_subsample_counts_as_all_data_in_every_objective(name, scale, rows):
    """Loss and gradient are N/B times those of the rows alone, penalties included."""
    index = torch.tensor([7, 0, 13, 4, 18])
    results = []
    for plate, x, factor in (({"subsample": index}, rows, scale), ({}, rows[index], 1.0)):
        model, guide = (
            poutine.scale(in_plate(program, **plate), scale=factor)
            for program in (body, guide_body)
        )
        moving = x.clone().requires_grad_()
        torch.manual_seed(5)
        elbo = make(name, nesting=1)
        elbo.differentiable_loss(model, guide, moving).backward()
        torch.manual_seed(5)  # the value that counts; a score function's surrogate has another
        results.append((elbo.loss(model, guide, x), moving.grad))
    (loss, gradient), (alone, gradient_alone) = results
    close(loss, N / B * scale * alone)
    close(gradient[index], N / B * scale * gradient_alone)


@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_pyros_own_bound_takes_the_scale_into_the_logarithm(name, rows):
    """RenyiELBO(alpha=0) is IWAE on a full plate. On a subsampled one, from the same draws, it is
    Σ log mean w^(N/B), which is no bound of anything; ours is N/B Σ log mean w."""
    index = torch.tensor([7, 0, 13, 4, 18])
    theirs = RenyiELBO(0.0, num_particles=K, max_plate_nesting=1, vectorize_particles=True)
    for plate, x, scale in (({}, rows, 1.0), ({"subsample": index}, rows[index], N / B)):
        model, guide = in_plate(body, **plate), in_plate(guide_body, **plate)
        ours, recorder = recorded_loss(make(name, nesting=1), model, guide, rows)
        torch.manual_seed(5)
        other = theirs.loss(model, guide, rows)
        log_w = plain_log_w(recorder.values["z"], x)
        close(ours, -scale * log_w.exp().mean(0).log().sum())
        close(other, -(scale * log_w).exp().mean(0).log().sum())
    assert abs(ours - other) > 5, "and the two are far from each other"


@every_weighted
def test_masked_data_count_nothing(name, rows):
    """By poutine.mask, and by a mask of the distributions, as for images that are missing."""
    x = rows[:6]
    mask = torch.tensor([True, False, True, True, False, True])

    def masked_body(rows):
        z = pyro.sample("z", standard().expand([len(rows)]).mask(mask))
        pyro.sample("x", Normal(z @ WEIGHT.T, 0.8).to_event(1).mask(mask), obs=rows)

    def masked_guide(rows):
        pyro.sample("z", Normal(rows @ GAIN.T, SPREAD).to_event(1).mask(mask))

    for programs in (
        [poutine.mask(program, mask=mask) for program in (body, guide_body)],
        [masked_body, masked_guide],
    ):
        model, guide = (in_plate(program) for program in programs)
        loss, recorder = recorded_loss(make(name, nesting=1), model, guide, x)
        bounds = bound(name, plain_log_w(recorder.values["z"], x))
        close(loss, -bounds[mask].sum())


@every_objective
def test_what_is_masked_has_no_influence(name, rows):
    """Whatever stands in the rows that are masked, padding of a batch for instance."""
    mask = torch.tensor([True, False, True, True, False, True])
    model, guide = (in_plate(poutine.mask(program, mask=mask)) for program in (body, guide_body))
    losses = []
    for padding in (0.0, 3.0):
        x = torch.where(mask[:, None], rows[:6], padding)
        torch.manual_seed(5)
        losses.append(make(name, nesting=1).loss(model, guide, x))
    close(losses[0], losses[1])


@every_weighted
@pytest.mark.parametrize("number", ["one row", "one particle", "both"])
def test_one_row_and_one_particle(name, number, rows):
    """Plates of size 1 are plates."""
    x = rows[:1] if number != "one particle" else rows
    count = K if number == "one row" else 1
    if count == 1 and name in ("score-baseline", "miwae", "piwae"):
        return  # which expect more
    elbo = make(name, count, nesting=1)
    loss, recorder = recorded_loss(elbo, in_plate(body), in_plate(guide_body), x)
    assert recorder.values["z"].shape == (count, len(x), 2)
    close(loss, -bound(name, plain_log_w(recorder.values["z"], x)).sum())


@every_weighted
def test_observations_may_be_masked_alone(name, rows):
    """Then the latents of a datum without an image have still their weights p(z)/q(z)."""
    x, mask = rows[:4], torch.tensor([True, False, True, False])

    def model(rows):
        with pyro.plate("data", len(rows)):
            z = pyro.sample("z", standard())
            with poutine.mask(mask=mask):
                pyro.sample("x", Normal(z @ WEIGHT.T, 0.8).to_event(1), obs=rows)

    loss, recorder = recorded_loss(make(name, nesting=1), model, in_plate(guide_body), x)
    z = recorder.values["z"]
    likelihood = log_normal(x.expand(K, 4, 3), z @ WEIGHT.T, 0.8) * mask
    log_w = log_weights(likelihood, [Latent(z, (x @ GAIN.T, SPREAD), (0.0, 1.0))])
    close(loss, -bound(name, log_w).sum())


@every_weighted
def test_two_plates_that_hold_everything(name, rows):
    """A datum is an element of both; the scales of both stay outside."""
    x = rows.reshape(4, 5, 3)

    def both(program):
        def run(x):
            columns = pyro.plate("columns", 10, subsample=torch.arange(5), dim=-1)
            with pyro.plate("rows", 4, dim=-2), columns:
                program(x)

        return run

    loss, recorder = recorded_loss(make(name, nesting=2), both(body), both(guide_body), x)
    log_w = plain_log_w(recorder.values["z"].reshape(K, N, 2), rows)
    close(loss, -2 * bound(name, log_w).sum())


@every_weighted
def test_sites_that_are_scaled_differently_are_refused_by_name(name, rows):
    def annealed(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.125):
                z = pyro.sample("z", standard())
            pyro.sample("x", Normal(z @ WEIGHT.T, 0.8).to_event(1), obs=x)

    def annealed_guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.125):
            guide_body(x)

    message = r"scaled alike; '[xz]' has (1|0\.125), '[xz]' has (1|0\.125)\. Use .* trace"
    with pytest.raises(ValueError, match=message):
        make(name).loss(annealed, annealed_guide, rows)
    make("trace").loss(annealed, annealed_guide, rows)  # for which it is no mistake

    def outside(x):
        common = pyro.sample("common", Normal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample=torch.arange(B)) as index:
            body(x[index] - common.unsqueeze(-2))

    def outside_guide(x):
        pyro.sample("common", Normal(torch.zeros(3).double(), 0.1).to_event(1))
        with pyro.plate("data", len(x), subsample=torch.arange(B)) as index:
            guide_body(x[index])

    message = r"'common' has 1, 'z' has 4\..*outside a subsampled"
    with (
        pytest.warns(UserWarning, match="no plate holds all sites"),
        pytest.raises(ValueError, match=message),
    ):
        make(name).loss(outside, outside_guide, rows)

    def tensor(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=torch.arange(1.0, N + 1)):
                z = pyro.sample("z", standard())
            pyro.sample("x", Normal(z @ WEIGHT.T, 0.8).to_event(1), obs=x)

    with pytest.raises(ValueError, match=rf"'z' has \({N},\) factors, 'x' has 1\."):
        make(name).loss(tensor, in_plate(guide_body), rows)


@every_weighted
@pytest.mark.parametrize("where", ["no plate", "latent outside"])
def test_without_a_common_plate_the_batch_is_one_datum_with_a_warning(name, where, rows):
    x = rows[:4]

    def model(x):
        if where == "no plate":
            z = pyro.sample("z", standard().expand([len(x)]).to_event(1))
            pyro.sample("x", Normal(z @ WEIGHT.T, 0.8).to_event(2), obs=x)
        else:
            z = pyro.sample("z", standard().expand([len(x)]).to_event(1))
            with pyro.plate("data", len(x)):
                loc = (z.squeeze(-3) if z.dim() > 3 else z) @ WEIGHT.T
                pyro.sample("x", Normal(loc, 0.8).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", Normal(x @ GAIN.T, SPREAD).to_event(2))

    nesting = 0 if where == "no plate" else 1
    with pytest.warns(UserWarning, match="no plate holds all sites of model and guide"):
        loss, recorder = recorded_loss(make(name, nesting=nesting), model, guide, x)
    whole = plain_log_w(recorder.values["z"].reshape(K, 4, 2), x).sum(1, keepdim=True)
    close(loss, -bound(name, whole).sum())


@every_weighted
def test_a_deterministic_site_outside_of_the_plate_is_no_datum(name, rows):
    """Pyro counts `pyro.deterministic` as observed, with density 1: it has nothing to weigh, and
    makes of the batch neither one datum nor a mistake."""

    def model(x):
        pyro.deterministic("noise", torch.tensor(0.8, dtype=torch.float64))
        with pyro.plate("data", len(x), subsample=torch.arange(B)) as index:
            body(x[index])

    guide = in_plate(guide_body, subsample=torch.arange(B))
    loss, recorder = recorded_loss(make(name, nesting=1), model, guide, rows)
    log_w = plain_log_w(recorder.values["z"], rows[:B])
    close(loss, -N / B * bound(name, log_w).sum())


@every_weighted
def test_a_deterministic_site_in_the_plate(name, rows):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            loc = pyro.deterministic("loc", z @ WEIGHT.T, event_dim=1)
            pyro.sample("x", Normal(loc, 0.8).to_event(1), obs=x)

    loss, recorder = recorded_loss(make(name, nesting=1), model, in_plate(guide_body), rows)
    close(loss, -bound(name, plain_log_w(recorder.values["z"], rows)).sum())


@every_weighted
@pytest.mark.parametrize("validation", [True, False])
def test_a_forgotten_to_event_is_no_silent_sum(name, validation, rows):
    """Found by the plate's size or by Pyro's checks; where rows and values are equally many, by the
    checks alone, as for Pyro's own ELBOs."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            pyro.sample("x", Normal(z @ WEIGHT.T, 0.8), obs=x)

    x = rows[:3] if validation else rows
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=r"site|plate"):
        make(name, nesting=1).loss(model, in_plate(guide_body), x)


def test_a_common_plate_gives_no_warning(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("iwae").loss(in_plate(body), in_plate(guide_body), rows)


# --- programs that a user might write -------------------------------------------------------------


@dataclass
class Program:
    """A model and guide, and what is known of them by hand.

    Attributes:
        nesting: number of plates inside each other.
        terms: recorded values → log p(x|z) (K, N) and the latents.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Tensor, ...]
    nesting: int
    terms: Callable[[dict[str, Tensor]], tuple[Tensor, list[Latent]]]


def hierarchical(count: int = 6) -> Program:
    """z1 → z2 → x with a skip, in model and guide; weights and noise are parameters."""
    torch.manual_seed(3)
    x, start = 1.3 * doubles(count, 3), {"noise": torch.tensor(0.7, dtype=torch.float64)}
    start |= {"weight": doubles(3, 2), "mix": 0.5 * doubles(2, 2)}
    start |= {"to1": 0.3 * doubles(2, 3), "to2": 0.3 * doubles(2, 3), "gate": doubles(2, 2)}
    start |= {"scale1": torch.tensor([0.5, 0.8]).double(), "scale2": 0.6 * torch.ones(2).double()}

    def param(name):
        positive = name.startswith(("scale", "noise"))
        constraint = constraints.positive if positive else constraints.real
        return pyro.param(name, start[name].clone(), constraint=constraint)

    def model(x):
        weight, mix, noise = param("weight"), param("mix"), param("noise")
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", standard())
            z2 = pyro.sample("z2", Normal((z1 @ mix.T).tanh(), 0.9).to_event(1))
            loc = z2 @ weight.T + z1.sum(-1, keepdim=True)
            pyro.sample("x", Normal(loc, noise).to_event(1), obs=x)

    def guide(x):
        to1, to2, gate = param("to1"), param("to2"), param("gate")
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(x @ to1.T, param("scale1")).to_event(1))
            loc = x @ to2.T + 0.7 * (z1 @ gate.T).sin()
            pyro.sample("z2", Normal(loc, param("scale2")).to_event(1))

    def terms(values):
        z1, z2 = values["z1"], values["z2"]
        loc = z2 @ start["weight"].T + z1.sum(-1, keepdim=True)
        first = Latent(z1, (x @ start["to1"].T, start["scale1"]), (0.0, 1.0))
        q = (x @ start["to2"].T + 0.7 * (z1 @ start["gate"].T).sin(), start["scale2"])
        second = Latent(z2, q, ((z1 @ start["mix"].T).tanh(), 0.9))
        return log_normal(x.expand_as(loc), loc, start["noise"]), [first, second]

    return Program(model, guide, (x,), 1, terms)


def counts(kind: str) -> Program:
    """Discrete observations."""
    torch.manual_seed(4)
    weight, gain = doubles(4, 2), 0.3 * doubles(2, 4)
    x = {
        "categorical": torch.tensor([0, 3, 2, 2, 1, 0]),
        "poisson": torch.poisson(torch.full((6, 4), 2.0).double()),
        "bernoulli": torch.bernoulli(torch.full((6, 4), 0.4).double()),
    }[kind]
    seen = torch.nn.functional.one_hot(x, 4).double() if kind == "categorical" else x

    def likelihood(z):
        linear = z @ weight.T
        if kind == "categorical":
            return Categorical(logits=linear)
        if kind == "poisson":
            return Poisson((linear / 2).exp()).to_event(1)
        return Bernoulli(logits=linear).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = pyro.param("scale", SPREAD.clone(), constraint=constraints.positive)
            pyro.sample("z", Normal(seen @ gain.T, scale).to_event(1))

    def terms(values):
        z = values["z"]
        linear = z @ weight.T
        if kind == "categorical":
            log_likelihood = (linear - linear.logsumexp(-1, keepdim=True))[:, range(6), x]
        elif kind == "poisson":
            log_likelihood = (x * linear / 2 - (linear / 2).exp() - (x + 1).lgamma()).sum(-1)
        else:
            log_likelihood = (x * linear - torch.nn.functional.softplus(linear)).sum(-1)
        return log_likelihood, [Latent(z, (seen @ gain.T, SPREAD), (0.0, 1.0))]

    return Program(model, guide, (x,), 1, terms)


def pixels(dim: int) -> Program:
    """Pixels in an inner plate at `dim`, the data in the other of the last two dimensions."""
    torch.manual_seed(6)
    weight, gain = doubles(4, 2), 0.3 * doubles(2, 4)
    x = torch.bernoulli(torch.full((6, 4), 0.4).double())
    outer = -3 - dim

    def arranged(x):  # as the plates have it
        return x if dim == -1 else x.T

    def model(x):
        with pyro.plate("data", 6, dim=outer):
            z = pyro.sample("z", standard())
            with pyro.plate("pixels", 4, dim=dim):
                logits = ((weight if dim == -1 else weight.unsqueeze(1)) * z).sum(-1)
                pyro.sample("x", Bernoulli(logits=logits), obs=arranged(x))

    def guide(x):
        with pyro.plate("data", 6, dim=outer):
            scale = pyro.param("scale", SPREAD.clone(), constraint=constraints.positive)
            loc = x @ gain.T
            pyro.sample("z", Normal(loc.unsqueeze(1) if dim == -1 else loc, scale).to_event(1))

    def terms(values):
        z = values["z"].reshape(K, 6, 2)
        linear = z @ weight.T
        log_likelihood = (x * linear - torch.nn.functional.softplus(linear)).sum(-1)
        return log_likelihood, [Latent(z, (x @ gain.T, SPREAD), (0.0, 1.0))]

    return Program(model, guide, (x,), 2, terms)


def automatic() -> Program:
    """Two latent sites, and a guide that Pyro makes."""
    torch.manual_seed(7)
    x = doubles(6, 3)

    def model(x):
        noise = pyro.param(
            "noise", torch.tensor(0.7, dtype=torch.float64), constraint=constraints.positive
        )
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", standard())
            z2 = pyro.sample("z2", Normal(z1, 0.9).to_event(1))
            pyro.sample("x", Normal(z2 @ WEIGHT.T, noise).to_event(1), obs=x)

    guide = AutoNormal(model, init_scale=0.6)
    guide(x)  # which makes its parameters
    with torch.no_grad():
        for site in ("z1", "z2"):  # in float64, and not all the same
            loc = getattr(guide.locs, site)
            loc.copy_(torch.randn_like(loc))
    before = {site: getattr(guide.locs, site).detach().clone() for site in ("z1", "z2")}
    scales = {site: getattr(guide.scales, site).detach().clone() for site in ("z1", "z2")}

    def terms(values):
        z1, z2 = values["z1"], values["z2"]
        latents = [
            Latent(z1, (before["z1"], scales["z1"]), (0.0, 1.0)),
            Latent(z2, (before["z2"], scales["z2"]), (z1, 0.9)),
        ]
        return log_normal(x.expand(K, 6, 3), z2 @ WEIGHT.T, 0.7), latents

    return Program(model, guide, (x,), 1, terms)


PROGRAMS = {
    "hierarchical": hierarchical,
    "categorical": lambda: counts("categorical"),
    "poisson": lambda: counts("poisson"),
    "bernoulli": lambda: counts("bernoulli"),
    "pixels at -2": lambda: pixels(-2),
    "pixels at -1": lambda: pixels(-1),
    "autoguide": automatic,
}


def parameters() -> dict[str, Tensor]:
    """The unconstrained ones of Pyro's store."""
    return dict(pyro.get_param_store().named_parameters())


@every_objective
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_step_of_svi_has_the_value_by_hand(name, kind):
    program = PROGRAMS[kind]()
    elbo = make(name, nesting=program.nesting)
    svi = SVI(program.model, program.guide, pyro.optim.SGD({"lr": 1e-3}), loss=elbo)
    torch.manual_seed(5)
    if name in PENALTIES and kind == "autoguide":
        with pytest.raises(ValueError, match=r"expects a guide with"):
            svi.step(*program.args)
        return
    with Recorder() as recorder:
        loss = svi.step(*program.args)
    log_likelihood, latents = program.terms(recorder.values)
    # mmd's prior draws come after the model's run; no step draws anything else.
    assert log_likelihood.shape == (K, 6)
    if name == "mean-field" and kind == "autoguide":
        name = "trace"  # its latents are points, of which there is no closed form
    close(loss, -by_hand(name, log_likelihood, latents, recorder.state))
    moved = parameters()
    assert moved
    assert all(p.isfinite().all() for p in moved.values())


@every_objective
def test_a_latent_on_the_positive_half_line_with_an_automatic_guide(name):
    """AutoNormal then has an auxiliary site, and the latent itself as a point: the weights are
    still those of a log-normal q. Objectives that put a penalty in the KL's place say that they
    want the model's sites only; mean-field has no closed form of a point's KL, and samples."""
    torch.manual_seed(8)
    x = doubles(5)

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", LogNormal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", Normal(0.0, rate), obs=x)

    guide = AutoNormal(model, init_scale=0.5)
    guide(x)
    elbo = make(name, nesting=1)
    if name in PENALTIES:
        with pytest.raises(ValueError, match=r"beta-tc expects|and no others; got rate_unc"):
            recorded_loss(elbo, model, guide, x)
        return
    loss, recorder = recorded_loss(elbo, model, guide, x)
    r = recorder.values["rate"]
    loc, scale = guide.locs.rate.detach(), guide.scales.rate.detach()

    def log_lognormal(loc, scale):
        return log_normal(r.log().unsqueeze(-1), loc.unsqueeze(-1), scale.unsqueeze(-1)) - r.log()

    ratio = log_lognormal(torch.zeros(5).double(), torch.ones(5).double())
    ratio = ratio - log_lognormal(loc, scale)
    likelihood = log_normal((x / r).unsqueeze(-1), torch.zeros(1), torch.ones(1)) - r.log()
    if name in ("beta", "mean-field"):
        weight = OPTIONS["beta"]["beta"] if name == "beta" else 1.0
        close(loss, -(likelihood + weight * ratio).mean(0).sum())
    else:
        close(loss, -bound(name, likelihood + ratio).sum())


@pytest.mark.parametrize("name", ["stl", "iwae", "dreg", "piwae", "wake-sleep"])
def test_an_automatic_guide_of_all_data_at_once_is_one_datum(name):
    """Its one joint site lies in no plate, whatever the model does."""
    torch.manual_seed(9)
    x = doubles(3, 3)
    model = in_plate(body)
    guide = AutoMultivariateNormal(model, init_scale=0.5)
    guide(x)
    with pytest.warns(UserWarning, match="no plate holds all sites"):
        loss, recorder = recorded_loss(make(name, nesting=1), model, guide, x)
    z = recorder.values["z"]
    tril = (guide.scale.unsqueeze(-1) * guide.scale_tril).detach()
    joint = torch.distributions.MultivariateNormal(guide.loc.detach(), scale_tril=tril)
    log_q = joint.log_prob(z.reshape(K, 6))
    log_p = log_normal(x.expand(K, 3, 3), z @ WEIGHT.T, 0.8)
    log_p = (log_p + log_normal(z, 0.0, 1.0)).sum(1)
    close(loss, -bound(name, (log_p - log_q)[:, None]).sum())


# --- gradients of several latents -----------------------------------------------------------------


def gradients(elbo, program: Program, *args: Tensor, scale: float = 1.0, loss=None) -> Tensor:
    """One estimate for each parameter of the store, end to end."""
    if loss is None:
        loss = elbo.differentiable_loss(program.model, program.guide, *args)
    (scale * loss).backward()
    found = parameters()
    flat = torch.cat([found[name].grad.flatten() for name in sorted(found)])
    for parameter in found.values():
        parameter.grad = None
    return flat


def estimates(name: str, program: Program, count: int, draws=25, copies=150) -> Tensor:
    """(draws, …) independent means over copies of the batch."""
    (x,) = program.args
    many, elbo = x.repeat(copies, *[1] * (x.dim() - 1)), make(name, count, nesting=1)
    return torch.stack([gradients(elbo, program, many, scale=1 / copies) for _ in range(draws)])


def agree(draws: Tensor, other: Tensor) -> None:
    """Two sets of draws (R, …), or one and the exact mean (…), have the same mean.

    Student's t with Bonferroni's correction; of two sets with the degrees of freedom of one, which
    is on the safe side.
    """
    variance, mean = draws.var(0) / len(draws), other
    if other.dim() == draws.dim():
        variance, mean = variance + other.var(0) / len(other), other.mean(0)
    limit = stats.t.isf(FALSE_ALARM / 2 / mean.numel(), len(draws) - 1)
    off = (draws.mean(0) - mean) / (variance.sqrt() + 1e-12)
    assert (off.abs() <= limit).all(), f"{off} standard errors off"


@pytest.mark.parametrize(("name", "like"), [("stl", "trace"), ("dreg", "iwae")])
def test_gradient_of_a_hierarchical_guide_is_unbiased(name, like, monkeypatch):
    """Where q(z2|z1, x) hangs on the draw of z1, log q has to be taken again at held draws."""
    program = hierarchical(4)
    torch.manual_seed(10)
    truth = estimates(like, program, 3)
    agree(estimates(name, program, 3), truth)

    # power: what has to hold z fixed does not, so that the path through log q is lost
    again, first = particles._again, []

    def not_fixed(guide, trace, values, args, kwargs):
        if any(value.requires_grad for value in values.values()):
            first[:] = [values]
        return again(guide, trace, first[0], args, kwargs)

    monkeypatch.setattr(particles, "_again", not_fixed)
    wrong = estimates(name, program, 3)
    with pytest.raises(AssertionError, match="standard errors off"):
        agree(wrong, truth)


@pytest.mark.parametrize("name", ["score-function", "score-baseline"])
def test_score_of_a_hierarchical_guide_is_unbiased(name, monkeypatch):
    """z1 is held fixed in q(z2|z1, x) as in everything else."""
    program = hierarchical(2)
    torch.manual_seed(10)
    truth = estimates("trace", program, 4)
    agree(estimates(name, program, 4, copies=1000), truth)
    # power: draws that are still on their way to the parameters
    monkeypatch.setattr(particles.Detached, "_pyro_post_sample", lambda self, msg: None)
    wrong = estimates(name, program, 4, copies=1000)
    with pytest.raises(AssertionError, match="standard errors off"):
        agree(wrong, truth)


def chain(shift: float = 0.0) -> tuple[Program, Tensor]:
    """z1 ~ N(0, 1), z2 ~ N(a z1, s²), x ~ N(b z2 + c z1, r²) and its posterior as the guide.

    Returns also log p(x), (N,).
    """
    a, s, b, c, r = 0.8, 0.6, 1.3, 0.5, 0.7
    torch.manual_seed(11)
    x = 1.5 * doubles(5)
    precision = torch.tensor(  # of (z1, z2) given x
        [
            [1 + a**2 / s**2 + c**2 / r**2, -a / s**2 + b * c / r**2],
            [-a / s**2 + b * c / r**2, 1 / s**2 + b**2 / r**2],
        ],
        dtype=torch.float64,
    )
    covariance = torch.linalg.inv(precision)
    gain = covariance @ torch.tensor([c, b], dtype=torch.float64) / r**2  # E[z|x] = gain · x
    slope = -precision[0, 1] / precision[1, 1]  # of E[z2|z1, x] in z1
    start = {
        "gain1": gain[0] + shift,
        "scale1": covariance[0, 0].sqrt(),
        "gain2": gain[1] - slope * gain[0],
        "slope": slope,
        "scale2": precision[1, 1].rsqrt(),
    }

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(torch.zeros(()).double(), 1.0))
            z2 = pyro.sample("z2", Normal(a * z1, s))
            pyro.sample("x", Normal(b * z2 + c * z1, r), obs=x)

    def guide(x):
        p = {name: pyro.param(name, value.clone()) for name, value in start.items()}
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(p["gain1"] * x, p["scale1"]))
            pyro.sample("z2", Normal(p["gain2"] * x + p["slope"] * z1, p["scale2"]))

    spread = math.sqrt((b * a + c) ** 2 + (b * s) ** 2 + r**2)
    evidence = log_normal(x.unsqueeze(-1), torch.zeros(1), spread)
    return Program(model, guide, (x,), 1, lambda values: (evidence, [])), evidence


@pytest.mark.parametrize("name", ["stl", "dreg", "score-baseline"])
def test_no_variance_where_a_hierarchical_guide_is_the_posterior(name):
    """All weights are p(x), and the gradient is zero at every draw."""
    program, evidence = chain()
    elbo = make(name, 4, nesting=1)
    for seed in range(3):
        torch.manual_seed(seed)
        close(elbo.loss(program.model, program.guide, *program.args), -evidence.sum())
        assert gradients(elbo, program, *program.args).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["stl", "dreg"])
def test_there_is_variance_if_log_q_is_not_taken_again(name, monkeypatch):
    """Power: q(z2|z1, x) as it was when drawn, with z1 still on its way to the parameters. (Its
    mean is not off under stl, so that no comparison of means would see it.)"""

    def not_again(guide, trace, values, args, kwargs):
        return particles._with_values(trace, values)

    monkeypatch.setattr(particles, "_again", not_again)
    program, _ = chain()
    assert gradients(make(name, 4, nesting=1), program, *program.args).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["trace", "iwae", "score-function", "wake-sleep"])
def test_others_have_variance_there(name):
    """Power of the test above."""
    program, _ = chain()
    assert gradients(make(name, 4, nesting=1), program, *program.args).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["stl", "dreg"])
def test_a_guide_that_is_not_the_posterior_has_a_gradient(name):
    program, _ = chain(shift=0.2)
    assert gradients(make(name, 4, nesting=1), program, *program.args).abs().max() > 1e-2


# --- discrete latents -----------------------------------------------------------------------------

CODES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).double()


def discrete(kind: str, count: int = 4) -> tuple[Program, Callable[[Tensor], Tensor]]:
    """Two bits, or one of three classes, behind x. Also log w (K, N) of draws, with gradients."""
    torch.manual_seed(12)
    x = doubles(count, 3)
    size = 2 if kind == "bernoulli" else 3
    start = {"weight": doubles(3, size), "prior": doubles(size), "to": 0.5 * doubles(size, 3)}

    def param(name):
        return pyro.param(name, start[name].clone())

    def distribution(logits):
        if kind == "bernoulli":
            return Bernoulli(logits=logits).to_event(1)
        return Categorical(logits=logits)

    def mean(z):
        weight = param("weight")
        return z @ weight.T if kind == "bernoulli" else weight.T[z]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", distribution(param("prior")))
            pyro.sample("x", Normal(mean(z), 0.9).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", distribution(x @ param("to").T))

    def mass(z, logits):
        if kind == "bernoulli":
            return (z * logits - torch.nn.functional.softplus(logits)).sum(-1)
        logits = (logits - logits.logsumexp(-1, keepdim=True)).expand(*z.shape, 3)
        return logits.gather(-1, z.unsqueeze(-1)).squeeze(-1)

    def log_joint(z, x):
        loc = mean(z)
        return mass(z, param("prior")) + log_normal(x.expand_as(loc), loc, 0.9)

    def terms(z, x):
        return log_joint(z, x), mass(z, x @ param("to").T)

    return Program(model, guide, (x,), 1, None), terms


discrete_kinds = pytest.mark.parametrize("kind", ["bernoulli", "categorical"])


@discrete_kinds
@pytest.mark.parametrize("name", ANY_GUIDE)
def test_value_with_discrete_latents(name, kind):
    program, terms = discrete(kind)
    loss, recorder = recorded_loss(
        make(name, nesting=1), program.model, program.guide, *program.args
    )
    log_p, log_q = terms(recorder.values["z"], *program.args)
    assert log_p.shape == (K, 4)
    close(loss, -bound(name, log_p - log_q).sum())


@discrete_kinds
@pytest.mark.parametrize("name", ["trace", "score-function", "score-baseline"])
def test_gradient_with_discrete_latents_is_that_of_the_enumerated_elbo(name, kind):
    program, terms = discrete(kind)
    codes = CODES if kind == "bernoulli" else torch.arange(3)
    codes = codes.unsqueeze(1).expand(-1, 4, *codes.shape[1:])
    log_p, log_q = terms(codes, *program.args)
    close(log_q.exp().sum(0), torch.ones(4))  # it enumerates all
    (-(log_q.exp() * (log_p - log_q)).sum()).backward()
    found = parameters()
    exact = torch.cat([found[name].grad.flatten() for name in sorted(found)])
    for parameter in found.values():
        parameter.grad = None
    torch.manual_seed(13)
    draws = estimates(name, program, 4)
    agree(draws, exact)
    # power: the encoder's part, without which the decoder's is as it was
    with pytest.raises(AssertionError, match="standard errors off"):
        agree(draws, exact * 0.8)


@discrete_kinds
@pytest.mark.parametrize("name", ["iwae", "dreg", "stl", "renyi", "ciwae", "miwae", "piwae"])
def test_discrete_latents_are_refused_by_name(name, kind):
    program, _ = discrete(kind)
    use = "Use trace, score-function, score-baseline or wake-sleep"
    message = rf"site 'z' is a {kind.capitalize()}.* {use}"
    with pytest.raises(ValueError, match=message):
        make(name).loss(program.model, program.guide, *program.args)


@discrete_kinds
@pytest.mark.parametrize("name", ["free-bits", "beta-tc", "mmd"])
def test_discrete_latents_are_refused_by_penalties(name, kind):
    program, _ = discrete(kind)
    message = "reparameterized samplers; site 'z' is a .*, which has none. Use trace, score"
    with pytest.raises(ValueError, match=message):
        make(name).loss(program.model, program.guide, *program.args)


@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_one_discrete_latent_among_others_is_refused(name, rows):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("class", Bernoulli(torch.tensor(0.4).double()))
            guide_body(x)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("class", Bernoulli(torch.tensor(0.5).double()))
            body(x)

    with pytest.raises(ValueError, match="site 'class' is a Bernoulli"):
        make(name).loss(model, guide, rows)
    # A point, on the other hand, has a reparameterized sampler.
    for program in (model, guide):
        assert Delta(torch.zeros(())).has_rsample, program


# --- memory: particles in chunks ------------------------------------------------------------------


def digits_like(tmp_path, name="binomial", **settings):
    """A VAE whose draws, 8 × 2 a particle, fill whole blocks of torch's generator of normals, so
    that chunks draw what one pass draws."""
    vae, splits = example_vae(name, tmp_path, **{"latent_dim": 2, **settings})
    return vae, batch(splits, name)


@contextmanager
def chunks_of(size: int, x: Tensor):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MEMORY_VALUES", size * x.numel())
        yield


def step(elbo, vae, x) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, gradients, and the random state after."""
    torch.manual_seed(21)
    vae.zero_grad()
    loss = elbo.loss_and_grads(vae.model, vae.guide, x)
    return loss, {n: p.grad.clone() for n, p in vae.named_parameters()}, torch.get_rng_state()


# mmd draws from the prior once a chunk, and beta-tc and the others do not: with the same seed it
# sees other prior draws. That its chunks are sound is tested by hand below.
SAME_IN_CHUNKS = [name for name in NAMES if name != "mmd"]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", SAME_IN_CHUNKS)
def test_chunks_have_the_loss_and_gradient_of_one_pass(name, size, tmp_path):
    """Also where a group of miwae or piwae is spread over chunks (3, 3, 2), and each particle's
    weight of the path comes from all of them."""
    vae, x = digits_like(tmp_path)
    elbo = make(name, nesting=1)
    loss, gradient, state = step(elbo, vae, x)
    with chunks_of(size, x):
        assert len(particles.chunk_sizes(K, (x,), {})) == math.ceil(K / size)
        loss_in_chunks, gradient_in_chunks, state_after = step(elbo, vae, x)
        torch.manual_seed(21)
        loss_alone = elbo.loss(vae.model, vae.guide, x)
    close(loss_in_chunks, loss)
    close(loss_alone, loss)
    assert torch.equal(state_after, state), "what is drawn again leaves the state as it was"
    for key, value in gradient.items():
        close(gradient_in_chunks[key], value)
        assert value.abs().max() > 0


@contextmanager
def given_noise(noise: tuple[Tensor, Tensor]):
    """Two sites in turn take their normal draws from `noise`, the next particles at each call.

    Chunks draw in another order than one pass, so that a seed would not do. What is drawn again for
    the gradient is told by the random state, which has to be the same.
    """
    seen: dict[bytes, Tensor] = {}
    taken = [0, 0]

    def drawn(shape, dtype, device):
        key = torch.get_rng_state().numpy().tobytes()
        torch.rand(1)  # so that the next call has another state
        if key not in seen:
            site = len(seen) % 2
            seen[key] = noise[site][taken[site] : taken[site] + shape[0]]
            taken[site] += shape[0]
        return seen[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributions.normal._standard_normal", drawn)
        yield
    assert taken == [K, K]


@pytest.mark.parametrize("kind", ["hierarchical", "autoguide"])
@every_weighted
def test_chunks_of_several_latents(name, kind):
    program = PROGRAMS[kind]()
    (x,) = program.args
    noise = doubles(K, 6, 2), doubles(K, 6, 2)
    results = []
    for size in (K, 3):
        torch.manual_seed(22)
        with chunks_of(size, x), given_noise(noise):
            elbo = make(name, nesting=1)
            loss = elbo.differentiable_loss(program.model, program.guide, x)
            results.append((loss, gradients(elbo, program, x, loss=loss)))
    for whole, part in zip(*results, strict=True):
        close(part, whole)
    assert results[0][1].abs().max() > 0


def test_chunks_of_mmd_by_hand(tmp_path):
    """Each chunk has its own prior draws; the value is the mean over all particles."""
    vae, x = digits_like(tmp_path)
    elbo = make("mmd", nesting=1)
    torch.manual_seed(23)
    posterior = vae.posterior(x)
    state, total = torch.get_rng_state(), 0.0
    for size in (3, 3, 2):
        torch.set_rng_state(state)
        z = posterior.mean + posterior.stddev * torch.randn(size, 8, 2, dtype=torch.float64)
        prior = torch.randn(size, 8, 2, dtype=torch.float64)
        state = torch.get_rng_state()
        reconstruction = vae.likelihood(z).log_prob(x).sum()
        total = total + reconstruction - 20.0 * 8 * discrepancy(z, prior, 1.0).sum()
    vae.zero_grad()
    (-total / K).backward()
    by_hand = {n: p.grad.clone() for n, p in vae.named_parameters()}
    vae.zero_grad()
    torch.manual_seed(23)
    with chunks_of(3, x):
        loss = elbo.loss_and_grads(vae.model, vae.guide, x)
    close(loss, -total.item() / K)
    for name, parameter in vae.named_parameters():
        close(parameter.grad, by_hand[name])


@every_objective
def test_no_more_particles_at_once_than_memory_allows(name, tmp_path, monkeypatch):
    """Also where the gradient is taken; and what is kept for it does not grow with K."""
    vae, x = digits_like(tmp_path)
    largest = []
    likelihood = vae.likelihood

    def watched(z):
        largest.append(z.shape[:-1].numel() // len(x))
        return likelihood(z)

    monkeypatch.setattr(vae, "likelihood", watched)
    elbo = make(name, nesting=1)
    elbo.loss_and_grads(vae.model, vae.guide, x)
    assert largest == [K]
    del largest[:]
    with chunks_of(3, x):
        elbo.loss(vae.model, vae.guide, x)
        assert largest == [3, 3, 2]
        del largest[:]
        elbo.loss_and_grads(vae.model, vae.guide, x)
    assert max(largest) == 3
    # once more for the gradient where the chunks' weights have to be known first
    assert sum(largest) == (2 * K if name in WEIGHTED else K)


@every_weighted
def test_what_is_kept_for_the_gradient_does_not_grow_with_the_likelihood(name, tmp_path):
    """Numbers that autograd keeps between the forward and the backward pass."""
    vae, x = digits_like(tmp_path)
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    def total() -> int:
        del kept[:]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            make(name, nesting=1).differentiable_loss(vae.model, vae.guide, x)
        return sum(kept)

    whole = total()
    with chunks_of(1, x):
        assert total() < whole / 20


def test_a_subsample_is_the_same_in_all_chunks(rows):
    """A plate that draws its subsample by itself draws one for all particles: a mean of weights of
    different data is the weight of nothing. With many rows as the argument there are many chunks.
    """

    def loss_of(name, size):
        model, guide = (in_plate(p, subsample_size=B) for p in (body, guide_body))
        with chunks_of(size, rows):
            torch.manual_seed(24)
            elbo = make(name, nesting=1)
            return torch.tensor([elbo.loss(model, guide, rows) for _ in range(150)]).double()

    for name in ("iwae", "dreg"):
        agree(loss_of(name, 2)[:, None], loss_of(name, K)[:, None])


# --- how often what is run ------------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize("size", [K, 3])
def test_particles_share_a_pass(name, size, tmp_path):
    """The guide runs once for all particles of a chunk, not once for each; so does the encoder."""
    vae, x = digits_like(tmp_path)
    calls = {"guide": 0, "model": 0, "encoder": 0, "decoder": 0}

    def counted(key, function):
        def run(*args):
            calls[key] += 1
            return function(*args)

        return run

    for key in ("encoder", "decoder"):
        getattr(vae, key).register_forward_pre_hook(counted(key, lambda module, args: None))
    model, guide = counted("model", vae.model), counted("guide", vae.guide)
    elbo, chunks = make(name, nesting=1), math.ceil(K / size)
    with chunks_of(size, x):
        elbo.loss(model, guide, x)
        assert calls == dict.fromkeys(calls, chunks)
        calls.update(dict.fromkeys(calls, 0))
        elbo.loss_and_grads(model, guide, x)
    again = 2 if chunks > 1 and name in WEIGHTED else 1
    assert calls == dict.fromkeys(calls, chunks * again)


@pytest.mark.parametrize(("name", "runs"), [("stl", 3), ("dreg", 3), ("piwae", 3), ("iwae", 1)])
def test_a_guide_of_several_sites_runs_again_where_it_has_to(name, runs):
    program = hierarchical()
    calls = []

    def guide(x):
        calls.append(1)
        program.guide(x)

    make(name, nesting=1).loss(program.model, guide, *program.args)
    assert len(calls) == runs


# --- what is left as it was -----------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize("count", [1, K])
def test_finding_the_plates_costs_no_random_numbers(name, count, tmp_path):
    if name == "score-baseline":
        count = K
    if name in ("miwae", "piwae"):
        count = K
    vae, x = digits_like(tmp_path)
    results = []
    for nesting in (1, math.inf):
        results.append(step(make(name, count, nesting), vae, x))
    assert results[0][0] == results[1][0]
    for key, value in results[0][1].items():
        assert torch.equal(results[1][1][key], value)
    assert torch.equal(results[0][2], results[1][2])


@every_objective
def test_store_and_validation(name, tmp_path):
    """Only the model's own parameters are in the store; Pyro's checks find nothing; twice."""
    vae, x = digits_like(tmp_path)
    elbo = make(name)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    with pyro.validation_enabled(True):
        for _ in range(2):
            assert math.isfinite(svi.step(x))
        assert math.isfinite(svi.evaluate_loss(x))
    own = {id(parameter) for parameter in vae.parameters()}
    assert {id(parameter) for parameter in parameters().values()} == own
    assert len(parameters()) == len(own)
    assert elbo.max_plate_nesting in (1, 2, math.inf)


@every_objective
@pytest.mark.parametrize("where", ["model", "guide"])
def test_validation_sees_sites_that_do_not_match(name, where, rows):
    """As Pyro's own ELBOs do: a latent of one that the other lacks."""

    def more(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", standard())
            (body if where == "model" else guide_body)(x)

    model, guide = in_plate(body), in_plate(guide_body)
    model, guide = (more, guide) if where == "model" else (model, more)
    elbo, warned = make(name, nesting=1), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            elbo.loss(model, guide, rows)
        except (ValueError, KeyError, AssertionError) as error:
            warned = str(error)
    assert any("but not" in str(w.message) for w in caught) or "y" in (warned or "")


# --- every objective on every model of the package ------------------------------------------------


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@all_likelihoods
def test_every_objective_moves_every_parameter(name, architecture, tmp_path):
    """One step of Adam moves each element whose gradient is not zero, by the learning rate."""
    shape = (1, 8, 9) if architecture == "conv" else (1, 4, 5)
    vae, splits = example_vae(name, tmp_path, shape, architecture=architecture)
    x = batch(splits, name)
    start = {key: value.clone() for key, value in vae.state_dict().items()}
    for objective_name in NAMES:
        vae.load_state_dict(start)
        pyro.clear_param_store()
        torch.manual_seed(31)
        adam = pyro.optim.Adam({"lr": 1e-3})
        svi = SVI(vae.model, vae.guide, adam, loss=make(objective_name))
        assert math.isfinite(svi.step(x)), objective_name
        for key, parameter in vae.named_parameters():
            moved = (parameter.detach() - start[key]).abs()
            assert parameter.isfinite().all(), (objective_name, key)
            assert moved.max() > 1e-5, (objective_name, key)


# --- training -------------------------------------------------------------------------------------

TIMINGS = ("seconds", "images_per_second")


def metrics(records) -> list[dict]:
    lines = [record.metrics() for record in records]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def small(tmp_path):
    splits = example_splits("binomial", tmp_path, count=100)
    return pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(16,)), splits), splits


def fit_config(name: str, **settings) -> FitConfig:
    settings = {"epochs": 4, "batch_size": 20, "learning_rate": 1e-2, **settings}
    options = {k: int(v) if k == "groups" else v for k, v in OPTIONS.get(name, {}).items()}
    return FitConfig(objective=name, num_particles=K, **options, **settings)


@every_objective
def test_every_objective_trains(name, tmp_path):
    """81 rows in batches of 20, the last of which is one row."""
    vae, splits = small(tmp_path)
    records = fit(vae, splits, fit_config(name, epochs=8, batch_size=19))
    assert len(records) == 8
    for record in records:
        values = [v for v in record.metrics().values() if v is not None]
        assert all(math.isfinite(v) for v in values)
        assert record.train_elbo == pytest.approx(record.reconstruction - record.kl)
    if name != "score-function":  # whose gradient is mostly noise
        assert records[-1].reconstruction > records[0].reconstruction
    assert not list(pyro.get_param_store())


@every_objective
def test_a_last_batch_of_one_row(name, tmp_path):
    """81 rows in batches of 20: an epoch that a user may well ask for."""
    vae, splits = small(tmp_path)
    (record,) = fit(vae, splits, fit_config(name, epochs=1))
    assert math.isfinite(record.train_elbo)


@pytest.mark.parametrize("name", ["iwae", "dreg", "piwae", "mmd", "free-bits"])
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(name, tmp_path):
    config = fit_config(name, batch_size=27)
    vae, splits = small(tmp_path)
    whole = metrics(fit(vae, splits, config))
    weights = {key: value.clone() for key, value in vae.state_dict().items()}
    vae, splits = small(tmp_path)
    records = iterate(vae, splits, config)
    head = [next(records), next(records)]
    state = head[-1].state()
    torch.manual_seed(99)  # the global state of the new process is another
    torch.randn(7)
    assert metrics(head) + metrics(fit(vae, splits, config, state=state)) == whole
    for key, value in vae.state_dict().items():
        assert torch.equal(value, weights[key])


def test_weights_of_the_kl_belong_to_those_that_have_one():
    """What `fit` would change from step to step exists where it is said to, and nowhere else."""
    assert not set(KL_WEIGHTED) & set(WEIGHTED)
    for name in KL_WEIGHTED:
        assert make(name).kl_weight == (OPTIONS["beta"]["beta"] if name == "beta" else 1.0)
    for name in WEIGHTED:
        assert not hasattr(make(name), "kl_weight")
