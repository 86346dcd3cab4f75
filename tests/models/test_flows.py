"""Densities of all families, flows among them, against quadrature in two dimensions.

Each density integrates to one; draws, moments and pathwise gradients agree with it. The models have
random weights, since new flows are the identity. Statistical tests reject a true hypothesis with
probability 1e-5 for each family; a draw from another density is rejected by the same check.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from family_models import GUIDES, PRIORS, config, model, rows
from pyro.distributions import MixtureOfDiagNormals
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution, biject_to

import pyro_vae
from pyro_vae.models.build import build
from pyro_vae.models.flows import FlowDistribution
from pyro_vae.models.posteriors import Mixture

FALSE_ALARMS = 1e-5
FAMILIES = [*(("guide", name) for name in GUIDES), *(("prior", name) for name in PRIORS)]
families = pytest.mark.parametrize(("role", "family"), FAMILIES)


def widest(count: int) -> float:
    """The bound of the largest of `count` absolute z-scores."""
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * count))


@cache
def distribution(role: str, family: str) -> Any:
    """Batch (2,) for guides, () for priors."""
    if role == "prior":
        return model("diagonal", family)[0].prior()
    vae, x = model(family, "normal")
    return vae.posterior(x[:2])


def grid(q: Any, num_nodes: int = 241) -> tuple[Tensor, Tensor]:
    """Nodes (M, *1, 2) that hold all of q, batch (...), and the area of a cell."""
    with torch.no_grad():
        torch.manual_seed(0)
        draws = q.sample((4000,)).reshape(-1, 2)
    low, high = draws.amin(0), draws.amax(0)
    middle, reach = (low + high) / 2, high - low  # twice the draws' own
    line = torch.linspace(-1, 1, num_nodes, dtype=torch.float64)
    nodes = middle + reach * torch.cartesian_prod(line, line)
    area = (2 * reach / (num_nodes - 1)).prod()
    return nodes.reshape(-1, *[1] * len(q.batch_shape), 2), area


@cache
def tabulated(role: str, family: str) -> tuple[Tensor, Tensor]:
    """Nodes (M, *1, 2) and the masses of their cells (M, ...)."""
    with torch.no_grad():
        q = distribution(role, family)
        nodes, area = grid(q)
        return nodes, q.log_prob(nodes).exp() * area


@families
def test_the_density_integrates_to_one(role, family):
    _, masses = tabulated(role, family)
    total = masses.sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=2e-5, atol=0)


@families
def test_the_density_is_the_same_after_expand_and_in_any_batch(role, family):
    q = distribution(role, family)
    batch = q.batch_shape
    torch.manual_seed(0)
    with torch.no_grad():
        z = q.sample((3,))
        expected = q.log_prob(z)
        for shape in ((3, *batch), (4, 3, *batch)):
            wide = q.expand(shape)
            assert (wide.batch_shape, wide.event_shape) == (shape, (2,))
            assert wide.sample().shape == (*shape, 2)
            assert wide.sample((5, 6)).shape == (5, 6, *shape, 2)
            assert wide.mean.shape == wide.variance.shape == (*shape, 2)
            torch.testing.assert_close(wide.mean, q.mean.expand(*shape, 2))
            torch.testing.assert_close(wide.log_prob(z), expected.expand(shape))
        assert torch.equal(biject_to(q.support)(z), z)  # the space in which NUTS samples
        assert q.has_rsample == (role == "guide" or family in ("normal", "flow"))
        if role == "guide":  # of one row without a batch, of rows in two dimensions
            vae, x = model(family, "normal")
            torch.testing.assert_close(vae.posterior(x[0]).log_prob(z[:, 0]), expected[:, 0])
            square = vae.posterior(x[:4].reshape(2, 2, *x.shape[1:]))
            assert square.batch_shape == (2, 2)
            torch.testing.assert_close(square.log_prob(z.unsqueeze(1))[:, 0], expected)
            assert square.rsample((3,)).shape == (3, 2, 2, 2)


def functions(z: Tensor) -> Tensor:
    """(..., 2) → (..., 6): bounded functions that tell distributions apart."""
    directions = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1.0], [2, 1], [-1, 3]]).to(z)
    return torch.cos(z @ directions.T + 0.7)


def deviation(draws: Tensor, nodes: Tensor, masses: Tensor) -> float:
    """The largest z-score of draws (S, ..., 2) against a tabulated density."""
    masses = masses.unsqueeze(-1)
    centre = (masses * nodes).sum(0)
    spread = (masses * (nodes - centre).square()).sum(0).sqrt()
    values = functions((draws - centre) / spread)
    exact = (masses * functions((nodes - centre) / spread)).sum(0)
    scores = (values.mean(0) - exact) / (values.std(0) / len(values) ** 0.5)
    return scores.abs().max().item() / widest(scores.numel())


@families
def test_draws_have_the_density(role, family):
    q, (nodes, masses) = distribution(role, family), tabulated(role, family)
    torch.manual_seed(1)
    with torch.no_grad():
        draws = q.sample((4000,))
        assert deviation(draws, nodes, masses) < 1
        if q.has_rsample:
            assert deviation(q.rsample((4000,)), nodes, masses) < 1
    # power: draws that are a fifth of a standard deviation off, or 40% too wide, in one latent
    spread = q.variance.sqrt().detach()
    one = torch.tensor([1.0, 0.0]).double()
    assert deviation(draws + 0.2 * spread * one, nodes, masses) > 1
    assert deviation(q.mean + (draws - q.mean) * (1 + 0.4 * one), nodes, masses) > 1


@families
def test_mean_and_variance_are_those_of_the_density(role, family):
    q, (nodes, masses) = distribution(role, family), tabulated(role, family)
    with torch.no_grad():
        weights = masses.unsqueeze(-1)
        mean = (weights * nodes).sum(0)
        variance = (weights * (nodes - mean).square()).sum(0)
        sampled = family == "flow"  # from 512 draws that cover N(0, I) evenly
        off = (q.mean - mean) / variance.sqrt()
        assert off.abs().max() < (0.02 if sampled else 1e-5)
        ratio = q.variance / variance
        assert (ratio - 1).abs().max() < (0.05 if sampled else 1e-4)


def pathwise(family: Any, features: Tensor, blocks: int = 24, size: int = 500) -> Tensor:
    """Gradients (blocks, F) of E_q[f(z)] in the features, each from `size` draws."""
    found = []
    for _ in range(blocks):
        leaf = features.clone().requires_grad_()
        value = functions(family(leaf).rsample((size,))).sum(-1).mean()
        found.append(torch.autograd.grad(value, leaf)[0])
    return torch.stack(found)


def largest_score(gradients: Tensor, exact: Tensor) -> float:
    """In units of the bound of Student's statistic, for as many comparisons."""
    blocks, count = gradients.shape
    scores = (gradients.mean(0) - exact) / (gradients.std(0) / blocks**0.5).clamp_min(1e-12)
    return scores.abs().max().item() / stats.t.isf(FALSE_ALARMS / (2 * count), blocks - 1)


@pytest.mark.parametrize("family", GUIDES)
def test_pathwise_gradients_are_those_of_the_integral(family):
    vae, x = model(family, "normal")
    features = vae.encoder(x[0]).detach()
    leaf = features.clone().requires_grad_()
    q = vae.family(leaf)
    nodes, area = grid(q)
    exact = torch.autograd.grad(
        (q.log_prob(nodes).exp() * area * functions(nodes).sum(-1)).sum(), leaf
    )[0]
    torch.manual_seed(2)
    gradients = pathwise(vae.family, features)
    assert largest_score(gradients, exact) < 1
    assert largest_score(-gradients, exact) > 1  # power
    if family == "mixture":
        # Pyro's own gradient of the logits is wrong, which is why it is not used.
        def theirs(leaf: Tensor) -> Any:
            q = vae.family(leaf)
            normals, logits = q.component_distribution.base_dist, q.mixture_distribution.logits
            return MixtureOfDiagNormals(normals.loc, normals.scale, logits)

        assert largest_score(pathwise(theirs, features), exact) > 1


def test_gradients_of_the_network_of_a_flow():
    """In a direction of all weights, by finite differences with the same noise."""
    vae, x = copy.deepcopy(model("flow", "flow"))

    def value() -> Tensor:
        torch.manual_seed(3)
        z = vae.posterior(x).rsample((20,))
        torch.manual_seed(4)
        return functions(z).mean() + functions(vae.prior().rsample((20,))).mean()

    weights = [*vae.family.parameters(), *vae.prior_module.parameters()]
    directions = [torch.randn_like(w) for w in weights]
    gradients = torch.autograd.grad(value(), weights)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(step * direction)
            ends.append(value().item())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_a_mixture_of_many_latents_has_finite_gradients(scale):
    """In float32, with equal components, and with components far from one another."""
    latents, components = 64, 5
    mixture = pyro_vae.models.posteriors.Mixture(components)
    torch.manual_seed(0)
    for spread in (0.0, 1.0, 1e4):
        features = torch.zeros(7, components * (2 * latents + 1))
        parts = features[:, components:].unflatten(-1, (components, 2 * latents))
        parts[..., :latents] = spread * torch.randn(7, components, latents)
        parts[..., latents:] = np.log(scale)
        features.requires_grad_()
        z = mixture(features).rsample()
        (gradient,) = torch.autograd.grad(z.sum(), features)
        assert gradient.isfinite().all()


def test_a_mixture_of_equal_components_has_the_gradient_of_one():
    """dz/dμ sums to 1 over the components, dz/dσ to that of the Gaussian."""
    mixture = pyro_vae.models.posteriors.Mixture(3)
    features = torch.zeros(1, 15).double()
    features[:, :3] = torch.tensor([0.3, -1.0, 0.5])
    features[:, 3:] = torch.tensor([0.4, -0.2, 0.1, -0.7]).repeat(3)
    features.requires_grad_()
    torch.manual_seed(0)
    z = mixture(features).rsample()
    g = torch.tensor([[0.7, -1.3]]).double()
    (gradient,) = torch.autograd.grad((z * g).sum(), features)
    parts = gradient[:, 3:].reshape(3, 4).sum(0)
    noise = z.detach() - torch.tensor([0.4, -0.2])
    torch.testing.assert_close(parts, torch.cat([g, g * noise], -1)[0])
    torch.testing.assert_close(gradient[:, :3], torch.zeros(1, 3).double())


# --- zuko -----------------------------------------------------------------------------------------


IMPORT = """
import sys
from torch.distributions import Distribution, Normal
from pyro_vae.models.flows import coupling_flow

Distribution.set_default_validate_args(True)
before = Distribution._validate_args, Distribution.arg_constraints
assert "zuko" not in sys.modules
coupling_flow(2, 1, 1, 2)
assert "zuko" in sys.modules
assert Distribution._validate_args is before[0] is True
assert Distribution.arg_constraints is before[1]
try:
    Normal(0.0, -1.0)
except ValueError:
    print("validated")
"""


def test_zuko_leaves_torch_as_it_was(monkeypatch, capsys):
    """It is imported by the first flow only, and changes no setting of torch's distributions."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    validate = Distribution._validate_args
    try:
        exec(IMPORT, {})
    finally:
        Distribution.set_default_validate_args(validate)
    assert capsys.readouterr().out == "validated\n"


@pytest.mark.slow
def test_zuko_leaves_torch_as_it_was_in_a_fresh_process():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("validated\n", 0), done.stderr


def test_a_new_flow_is_a_gaussian():
    for guide, prior in (("flow", "normal"), ("diagonal", "flow")):
        vae = build(config(guide, prior), rows("gaussian"))
        x = next(rows("gaussian").train.fixed("real", seed=0, num_images=4))
        torch.manual_seed(0)
        if guide == "flow":
            q = vae.posterior(x)
            same = torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril)
        else:
            q, same = vae.prior(), build(config("full", "normal"), rows("gaussian")).prior()
        assert isinstance(q, FlowDistribution)
        z = same.sample((10,))
        torch.testing.assert_close(q.log_prob(z), same.log_prob(z), rtol=1e-4, atol=1e-4)


def test_a_mixture_draw_without_density_has_no_gradient(monkeypatch):
    """As rounding may give one, far from all components: finite, where 1 / density is not."""
    features = torch.zeros(1, 2 * (2 * 3 + 1), requires_grad=True)
    q = Mixture(2)(features)
    monkeypatch.setattr(type(q), "sample", lambda self, shape: torch.tensor([[0.0, 60.0, 0.5]]))
    q.rsample().sum().backward()
    assert torch.isfinite(features.grad).all()
    locs = features.grad[:, 2:].unflatten(-1, (2, -1))[..., :3].sum(-2)
    assert locs[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert locs[0, 1] == 0.0
