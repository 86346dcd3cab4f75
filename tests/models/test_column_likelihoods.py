"""The likelihood of each kind of column against scipy, sums and integrals, and their composition.

A comparison of moments is at four standard errors, which rejects a true hypothesis once in 15,800
times; there are about 60 of them here.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import mixed_tables
import numpy as np
import pyro
import pytest
import torch
from conftest import SIGMAS
from mixed_tables import KINDS, small_vae, spec_of, splits_of
from pyro.infer import SVI
from scipy import integrate, stats

import pyro_vae
from pyro_vae.capture.captured import CapturedSVI, capture
from pyro_vae.capture.optimizer import OneOptimizer
from pyro_vae.config.columns import COUNTS, ColumnKind
from pyro_vae.models.build import build_blank
from pyro_vae.models.column_inputs import ColumnInputs, Statistics
from pyro_vae.models.columns import ColumnsLikelihood
from pyro_vae.objectives.registry import objective

SPLITS = splits_of(mixed_tables.values(1000))
# Kind → raw outputs of the decoder: each a tuple of its parameters.
RAW: dict[str, list[tuple[float, ...]]] = {
    "gaussian": [(-2.0,), (0.0,), (1.5,)],
    "student-t": [(-2.0,), (0.0,), (1.5,)],
    "log-normal": [(-2.0,), (0.0,), (1.5,)],
    "poisson": [(-3.0,), (0.0,), (2.0,)],
    "negative-binomial": [(-3.0,), (0.0,), (2.0,)],
    "zero-inflated-poisson": [(-1.0, -2.0), (0.0, 0.0), (1.0, 3.0)],
    "zero-inflated-negative-binomial": [(-1.0, -2.0), (0.0, 0.0), (1.0, 3.0)],
    "bernoulli": [(-3.0,), (0.0,), (8.0,)],
    "categorical": [(0.0, 0.0, 0.0, 0.0), (-1.0, 2.0, 0.5, 0.0), (9.0, -9.0, 0.0, 1.0)],
    "ordinal": [(-3.0,), (0.0,), (8.0,)],
}
CASES = [(name, raw) for name, list_of in RAW.items() for raw in list_of]
each_case = pytest.mark.parametrize(("name", "raw"), CASES, ids=lambda v: str(v))


def column_of(name: str) -> int:
    return next(j for j, kind in enumerate(KINDS) if kind.name == name)


def one_column(name: str) -> ColumnsLikelihood:
    """The likelihood of the first column of a kind, alone, in float64."""
    column = column_of(name)
    part = splits_of(mixed_tables.values(1000)[:, [column]], (KINDS[column],))
    statistics = Statistics.of(part.train)
    moments = statistics.mean.float(), statistics.variance.sqrt().float()
    return ColumnsLikelihood(part.spec, *moments, statistics).double()


def distribution(name: str, raw: tuple[float, ...]) -> Any:
    return one_column(name)(torch.tensor(raw, dtype=torch.float64))


def truth(name: str, raw: tuple[float, ...]) -> Any:
    """The same distribution of scipy; for zero-inflated counts a pair with the share of zeros."""
    likelihood = one_column(name)
    centre, spread = likelihood.centre.item(), likelihood.spread.item()
    log_scale, log_df = likelihood.log_scale.detach()[:, 0].tolist()
    loc, scale = centre + spread * raw[0], spread * (0.01 + math.exp(log_scale))
    if name == "gaussian":
        return stats.norm(loc, scale)
    if name == "student-t":
        return stats.t(2 + math.exp(log_df), loc, scale)
    if name == "log-normal":
        return stats.lognorm(scale, scale=math.exp(loc))
    if name == "bernoulli":
        return stats.bernoulli(1 / (1 + math.exp(-raw[0])))
    if name == "ordinal":
        return stats.binom(4, 1 / (1 + math.exp(-raw[0])))
    if name == "categorical":
        shares = np.exp(raw) / np.exp(raw).sum()
        return stats.rv_discrete(values=(range(4), shares))
    if name.endswith("poisson"):
        counts = stats.poisson(math.exp(loc))
    else:
        r = math.exp(log_scale)
        counts = stats.nbinom(r, r / (r + math.exp(loc)))
    return (counts, 1 / (1 + math.exp(-raw[1]))) if name.startswith("zero") else counts


def log_density(name: str, raw: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """scipy's log p(x)."""
    found = truth(name, raw)
    if name.startswith("zero"):
        counts, share = found
        with np.errstate(divide="ignore"):
            zero = np.where(x == 0, np.log(share), -np.inf)
        return np.logaddexp(zero, np.log1p(-share) + counts.logpmf(x))
    return found.logpdf(x) if hasattr(found, "logpdf") and name in RAW_REAL else found.logpmf(x)


RAW_REAL = ("gaussian", "student-t", "log-normal")


@each_case
def test_log_probabilities_are_those_of_scipy(name, raw):
    values = {"gaussian": np.linspace(100, 260, 9), "student-t": np.linspace(-60, 60, 9)}
    values |= {"log-normal": np.geomspace(1, 1e9, 9), "categorical": np.arange(4.0)}
    values |= {"bernoulli": np.arange(2.0), "ordinal": np.arange(5.0)}
    x = values.get(name, np.array([0, 1, 2, 3, 7, 20, 55, 300.0]))
    ours = distribution(name, raw).log_prob(torch.from_numpy(x)[:, None])
    np.testing.assert_allclose(ours.detach().numpy(), log_density(name, raw, x), rtol=1e-9)


@each_case
def test_each_column_is_normalized(name, raw):
    """Sums to 1 within 1e-9, or integrates to 1 within 1e-6."""
    p = distribution(name, raw)

    def density(x: float) -> float:
        return p.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item()

    if name not in RAW_REAL:
        top = {"bernoulli": 1, "categorical": 3, "ordinal": 4}.get(name, 20_000)
        grid = torch.arange(top + 1.0, dtype=torch.float64)[:, None]
        assert p.log_prob(grid).exp().sum().item() == pytest.approx(1, abs=1e-9)
        return
    found = truth(name, raw)
    edges = found.ppf([1e-13, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1 - 1e-9])
    total = sum(integrate.quad(density, a, b)[0] for a, b in itertools.pairwise(edges))
    assert total == pytest.approx(1, abs=1e-6)


@each_case
def test_draws_have_the_moments_of_the_distribution(name, raw):
    torch.manual_seed(3)
    p = distribution(name, raw)
    draws = p.sample((100_000,)).squeeze(-1)
    assert torch.isfinite(p.log_prob(draws[:, None])).all()  # within the support
    found = truth(name, raw)
    if name == "categorical":
        assert p.mean.item() == np.argmax(raw)  # the most probable code
        shares = np.exp(raw) / np.exp(raw).sum()
        found = np.bincount(draws.long(), minlength=4) / len(draws)
        error = np.sqrt(shares * (1 - shares) / len(draws))
        assert (abs(found - shares) <= SIGMAS * error + 1e-12).all()
        return
    mean, variance = found[0].stats() if isinstance(found, tuple) else found.stats()
    if isinstance(found, tuple):
        mean, variance = (1 - found[1]) * mean, (1 - found[1]) * (variance + found[1] * mean**2)
    assert p.mean.item() == pytest.approx(mean, rel=1e-9)
    if name == "log-normal":  # whose moments a sample shows badly: those of its logarithm
        draws, mean = draws.log(), math.log(truth(name, raw).median())
        variance = truth(name, raw).kwds.get("s", truth(name, raw).args[0]) ** 2
    assert abs(draws.mean() - mean) <= SIGMAS * draws.std() / math.sqrt(len(draws))
    square = (draws - mean).square()
    if name != "student-t":  # whose variance may lack an error
        assert abs(square.mean() - variance) <= SIGMAS * square.std() / math.sqrt(len(draws)) + 1e-9
    quantile = np.quantile(draws, 0.9)
    if name == "student-t":
        assert truth(name, raw).cdf(quantile) == pytest.approx(0.9, abs=SIGMAS * 0.3 / 316)


def test_variances_are_those_of_scipy():
    for name, raw in CASES:
        if name in COUNTS or name == "log-normal":
            found = truth(name, raw)
            if isinstance(found, tuple):
                mean, variance = found[0].stats()
                expected = (1 - found[1]) * (variance + found[1] * mean**2)
            else:
                expected = found.var()
            ours = distribution(name, raw).base_dist.parts[0].variance.item()
            assert ours == pytest.approx(expected, rel=1e-9), name


# Composition


def test_columns_of_unlike_kinds_keep_their_places():
    """log p of each column is that of a model of this column alone.

    Kinds are interleaved, and the two categorical columns have unlike numbers of categories.
    """
    vae = small_vae(SPLITS).double()
    likelihood: Any = vae.likelihood_module
    x = next(SPLITS.test.fixed("real", 0, 50)).double()
    torch.manual_seed(0)
    raw = torch.randn(50, sum(likelihood.outputs), dtype=torch.float64)
    with torch.no_grad():
        each = likelihood.each(raw).log_prob(x)
        assert each.shape == x.shape
        torch.testing.assert_close(likelihood(raw).log_prob(x), each.sum(1))
        for j, kind in enumerate(KINDS):
            alone = ColumnsLikelihood(spec_of((kind,)), *(m[[j]] for m in (likelihood.mean,) * 2))
            alone = alone.double()
            alone.centre.copy_(likelihood.centre[[j]])
            alone.spread.copy_(likelihood.spread[[j]])
            alone.log_scale.copy_(likelihood.log_scale[:, [j]])
            own = alone(raw[:, outputs_of(likelihood, j)]).log_prob(x[:, [j]])
            torch.testing.assert_close(own, each[:, j], msg=kind.name)


def outputs_of(likelihood: ColumnsLikelihood, column: int) -> list[int]:
    """The places of a column's parameters in the decoder's output, counted by hand."""
    start, kind = 0, KINDS[column]
    for name, size in zip(likelihood.names, likelihood.outputs, strict=True):
        columns = [j for j, other in enumerate(KINDS) if other.name == name]
        if name == kind.name:
            place = columns.index(column)
            if name == "categorical":
                before = sum(len(KINDS[j].categories) for j in columns[:place])
                return list(range(start + before, start + before + len(kind.categories)))
            per_column = size // len(columns)
            return [start + p * len(columns) + place for p in range(per_column)]
        start += size
    raise AssertionError


def test_draws_and_means_are_in_the_order_of_the_columns():
    torch.manual_seed(0)
    vae = small_vae(SPLITS)
    with torch.no_grad():
        p = vae.likelihood(vae.prior().sample((20_000,)))
        draws = p.sample()
    x = SPLITS.train.values[:800].double()
    for j, kind in enumerate(KINDS):
        if kind.name in ("gaussian", "log-normal"):
            middle = draws[:, j].median().item()
            assert x[:, j].quantile(0.2) < middle < x[:, j].quantile(0.8)
        elif kind.categories:
            assert draws[:, j].max().item() == len(kind.categories) - 1
            assert p.mean[:, j].max().item() <= len(kind.categories) - 1
        if kind.is_discrete:
            assert draws[:, j].equal(draws[:, j].round())
            assert draws[:, j].min().item() >= 0


def test_shapes_and_validation():
    vae = small_vae(SPLITS)
    p = vae.likelihood(torch.randn(6, 3, 2))
    assert (p.batch_shape, p.event_shape) == ((6, 3), (12,))
    x = p.sample()
    assert p.log_prob(x).shape == (6, 3)
    assert p.expand((2, 6, 3)).log_prob(x).shape == (2, 6, 3)
    assert p.sample((5,)).shape == (5, 6, 3, 12)
    for name, wrong in (("poisson", -1.0), ("categorical", 4.0), ("log-normal", 0.0)):
        bad = x.clone()
        bad[..., column_of(name)] = wrong
        with pytest.raises(ValueError, match="support"):
            p.log_prob(bad)
    bad = x.clone()
    bad[..., 5] = 3.0  # a category of the other categorical column
    with pytest.raises(ValueError, match="support"):
        p.log_prob(bad)


def test_moments_of_the_data_before_training():
    """With an output that does not depend on z, means and shares are those of the training rows."""
    vae = small_vae(SPLITS)
    x = SPLITS.train.values[SPLITS.train.rows].double()
    with torch.no_grad():
        columns = vae.likelihood_module.each(vae.decoder.bias)
    for j, kind in enumerate(KINDS):
        if kind.name == "categorical":
            part, place = part_of(columns, j)
            shares = part.logits.softmax(-1)[place.tolist().index(j)][: len(kind.categories)]
            expected = np.bincount(x[:, j].long(), minlength=len(kind.categories)) / len(x)
            np.testing.assert_allclose(shares.numpy(), expected, atol=2e-3)
        elif kind.name not in ("log-normal", "student-t"):
            assert columns.mean[j].item() == pytest.approx(x[:, j].mean().item(), rel=5e-3), kind
        if kind.name.endswith("negative-binomial"):
            part, _ = part_of(columns, j)
            assert part.variance.item() == pytest.approx(x[:, j].var().item(), rel=0.02)


def part_of(columns: Any, column: int) -> tuple[Any, torch.Tensor]:
    pairs = zip(columns.parts, columns.places, strict=True)
    return next((part, place) for part, place in pairs if column in place)


def test_encoder_inputs():
    kinds = (*KINDS[:4], KINDS[4], KINDS[8])
    inputs = ColumnInputs(kinds, torch.tensor([5, 1, 2, 0.5, 3, 2.0]), torch.full((6,), 2.0))
    x = torch.tensor([[9.0, 2.0, math.e - 1, 1.0, math.e**5, 4.0]])
    assert inputs.size == 5 + 4
    expected = [[2.0, -0.5, 0.25, 1.0, 1.0, 0, 0, 1, 0]]
    torch.testing.assert_close(inputs(x), torch.tensor(expected))
    grad = torch.tensor([[0.0, 1.5, 0.0, 0.0, -1.0, 0.0]], requires_grad=True)
    inputs(grad).sum().backward()  # a pseudo-input may be anywhere
    assert torch.isfinite(grad.grad).all()


def test_gradients_are_finite_at_extreme_outputs_and_values():
    likelihood: Any = small_vae(SPLITS).likelihood_module
    x = next(SPLITS.test.fixed("real", 0, 3))
    for size in (1.0, 80.0, 1e4, 1e9):
        for scale in (-50.0, 0.0, 50.0):
            likelihood.zero_grad()
            likelihood.log_scale.data.fill_(scale)
            for signs in (1, -1):
                raw = torch.full((3, sum(likelihood.outputs)), signs * size, requires_grad=True)
                likelihood(raw).log_prob(x).sum().backward()
                assert not raw.grad.isnan().any()
                assert not likelihood.log_scale.grad.isnan().any()


def test_degrees_of_freedom_and_overdispersion_are_bounded():
    likelihood: Any = small_vae(SPLITS).likelihood_module
    for value in (-1e6, 1e6):
        likelihood.log_scale.data.fill_(value)
        with torch.no_grad():
            columns = likelihood.each(torch.zeros(sum(likelihood.outputs)))
        student = columns.parts[likelihood.names.index("student-t")]
        counts = columns.parts[likelihood.names.index("negative-binomial")]
        assert 2 < student.df.item() < 200
        assert math.exp(-5.1) < counts.parameters[1].exp().item() < math.exp(9.1)
        assert torch.isfinite(student.variance).all()


def test_large_counts_keep_their_digits_in_single_precision():
    x = np.array([[900_000.0], [1_000_000.0], [1_001_000.0]] * 20)
    part = splits_of(x, (ColumnKind("poisson"),))
    vae = small_vae(part)
    raw = torch.zeros(1)
    with torch.no_grad():
        p = vae.likelihood_module(raw)
        ours = p.log_prob(torch.tensor([[1_000_000.0]])).item()
    assert ours == pytest.approx(stats.poisson(p.mean.item()).logpmf(1_000_000), rel=1e-5)


# As a part of the whole


def test_weights_are_loaded_where_they_belong():
    vae = small_vae(SPLITS)
    config = pyro_vae.ModelConfig(likelihood="columns", latent_dim=2, hidden=(16,))
    blank = build_blank(config, SPLITS.spec)
    blank.load_state_dict(vae.state_dict())
    x = next(SPLITS.test.fixed("real", 0, 20))
    z = torch.randn(20, 2)
    with torch.no_grad():
        assert blank.likelihood(z).log_prob(x).equal(vae.likelihood(z).log_prob(x))
        assert blank.posterior(x).mean.equal(vae.posterior(x).mean)
    meta = build_blank(config, SPLITS.spec, "meta").state_dict()
    assert {k: v.shape for k, v in meta.items()} == {
        k: v.shape for k, v in vae.state_dict().items()
    }


@pytest.mark.slow
def test_a_captured_step_is_that_of_svi():
    x = next(SPLITS.train.fixed("real", 0, 32))
    ends = []
    vae = small_vae(SPLITS)
    for captured in (False, True):
        own = copy.deepcopy(vae)
        pyro.clear_param_store()
        optimizer = OneOptimizer(torch.optim.Adam(own.parameters(), lr=0.01, fused=True))
        elbo: Any = objective("trace", 1, 1)
        if captured:
            svi: Any = CapturedSVI(own.model, own.guide, optimizer, capture(elbo, "graph"))
        else:
            svi = SVI(own.model, own.guide, optimizer, loss=elbo)
        torch.manual_seed(1)
        losses = [svi.step(x) for _ in range(4)]
        ends.append((losses, [v.clone() for v in own.state_dict().values()]))
        if captured:
            assert len(svi.loss.graphs if hasattr(svi.loss, "graphs") else [1]) == 1
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_elbo_of_svi_is_that_of_the_three_distributions():
    vae = small_vae(SPLITS).double()
    x = next(SPLITS.test.fixed("real", 0, 20)).double()
    torch.manual_seed(5)
    loss = SVI(
        vae.model, vae.guide, pyro.optim.Adam({}), loss=objective("trace", 1, 1)
    ).evaluate_loss(x)
    torch.manual_seed(5)
    with torch.no_grad():
        q = vae.posterior(x)
        z = q.sample()
        each = vae.likelihood_module.each(vae.decoder(z)).log_prob(x)
        elbo = each.sum() + (vae.prior().log_prob(z) - q.log_prob(z)).sum()
    assert -loss == pytest.approx(elbo.item(), rel=1e-9)


@pytest.mark.parametrize("prior", ["normal", "vamp", "mixture"])
def test_priors_and_discreteness(prior):
    vae = small_vae(
        SPLITS, prior={"family": prior} | ({} if prior == "normal" else {"components": 3})
    )
    assert not vae.likelihood_module.is_discrete
    x = next(SPLITS.train.fixed("real", 0, 8))
    loss = objective("trace", 1, 1).differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.parameters())
    whole = tuple(dataclasses.replace(kind) for kind in KINDS if kind.is_discrete)
    columns = [j for j, kind in enumerate(KINDS) if kind.is_discrete]
    part = splits_of(mixed_tables.values(60)[:, columns], whole)
    assert small_vae(part).likelihood_module.is_discrete


# Missing values


def lacking_splits(count: int = 400) -> pyro_vae.Splits:
    """The table without a fifth of its values."""
    x = mixed_tables.values(count)
    x[np.random.default_rng(1).random(x.shape) < 0.2] = np.nan
    return splits_of(x, missing=True)


def test_missing_values_are_left_out_of_the_density():
    """log p(x|z) is the sum over observed columns, and no gradient is NaN."""
    splits = lacking_splits()
    vae = small_vae(splits)
    x = next(splits.train.fixed("real", 0, 40))
    assert x.isnan().any(0).all()
    z = torch.randn(40, 2)
    with torch.no_grad():
        columns = vae.likelihood_module.each(vae.decoder(z))
        for i in range(40):
            seen = ~x[i].isnan()
            full = torch.where(seen, x[i], vae.likelihood_module.fill_values())
            own = columns.log_prob(full)[i][seen].sum()
            torch.testing.assert_close(vae.likelihood(z).log_prob(x)[i], own)
    loss = objective("trace", 1, 1).differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.parameters())
    values = splits.train.values[splits.train.rows].double()
    with torch.no_grad():
        mean = vae.likelihood_module.each(vae.decoder.bias).mean
    for j, kind in enumerate(KINDS):  # the moments of the observed values
        if kind.name == "gaussian" or kind.name in COUNTS:
            assert mean[j].item() == pytest.approx(values[:, j].nanmean().item(), rel=5e-3)


def test_the_encoder_sees_zeros_and_what_is_observed():
    splits = lacking_splits()
    vae = small_vae(splits)
    inputs: Any = vae.encoder.inputs
    assert vae.encoder.layers[1].in_features == 2 * inputs.size
    caught = []
    vae.encoder.layers.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    x = next(splits.train.fixed("real", 0, 30))
    vae.posterior(x)
    values, observed = caught[0].chunk(2, dim=1)
    missing = inputs(x).isnan()
    assert missing.any()
    assert observed.equal((~missing).float())
    assert (values[missing] == 0).all()
    assert values[~missing].equal(inputs(x)[~missing])
    others = inputs.others.tolist()
    assert missing[:, : len(others)].equal(x[:, others].isnan())
    assert missing[:, len(others) :].equal(x[:, inputs.columns].isnan())


def test_imputed_categories_are_the_most_probable():
    """Of the mixture over z, not the mean of codes: 0 and 3 in equal shares are not 1 or 2."""
    likelihood: Any = small_vae(SPLITS).likelihood_module
    raw = torch.zeros(2, sum(likelihood.outputs))
    place = outputs_of(likelihood, 1)
    raw[0, place] = torch.tensor([5.0, 0.0, 0.0, 4.0])
    raw[1, place] = torch.tensor([0.0, 0.0, 1.0, 6.0])
    with torch.no_grad():
        p = likelihood(raw)
        expected = likelihood.expected(p)
        assert likelihood.summary(expected).equal(p.mean)
        mixed = likelihood.summary(expected.mean(0))
    assert p.mean[:, 1].tolist() == [0, 3]
    assert mixed[1].item() == 3
    torch.testing.assert_close(mixed[0], p.mean[:, 0].mean())


def test_imputation_of_every_kind():
    splits = lacking_splits()
    vae = small_vae(splits)
    x = next(splits.test.fixed("real", 0))
    torch.manual_seed(0)
    found = pyro_vae.impute(vae, x, num_draws=20, num_samples=100)
    seen = ~x.isnan()
    for values in (found.mean, *found.draws):
        assert not values.isnan().any()
        assert values[seen].equal(x[seen])
    for j, kind in enumerate(KINDS):
        draws = found.draws[..., j]
        if kind.is_discrete:
            assert draws.equal(draws.round())
        if kind.categories:
            assert 0 <= draws.min() <= draws.max() < len(kind.categories)
        if kind.name == "categorical":
            assert found.mean[:, j].equal(found.mean[:, j].round())
