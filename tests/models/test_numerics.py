"""Precision, derivatives of every mode, compilation, and torch's default dtype and device."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pyro
import pytest
import torch
from conftest import all_likelihoods, batch, example_spec, example_splits, example_vae
from torch.autograd import forward_ad

import pyro_vae
from pyro_vae.config import ModelConfig
from pyro_vae.data.splits import DataSpec
from pyro_vae.evidence.quadrature import quadrature
from pyro_vae.models import likelihoods
from pyro_vae.models.build import build_blank
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.linear_gaussian import LinearGaussian, probabilistic_pca

mostly_slow = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "bernoulli" else [pytest.mark.slow])
        for name in sorted(LIKELIHOODS)
    ],
)

# --- Binomial counts ---


def binomial(count: int):
    """Binomial(n, σ(0.3)) of one value, in float32."""
    spec = DataSpec((1,), count, discrete=True)
    likelihood = LIKELIHOODS["binomial"](spec, torch.full((1,), 0.5 * count), torch.ones(1))
    return likelihood(torch.full((1, 1, 1), 0.3))


@pytest.mark.parametrize("count", [16, 64, 65, 255, 65_535, 1_000_000])
def test_binomial_in_float32_is_exact_and_sums_to_one(count):
    values = torch.arange(count + 1.0).reshape(-1, 1, 1)
    log_prob = binomial(count).log_prob(values).double().flatten()
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-6)
    logit = torch.tensor(0.3).item()
    p = 1 / (1 + math.exp(-logit))
    for k in (0, 1, count // 3, count // 2, round(p * count), count):
        exact = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        exact += k * math.log(p) + (count - k) * math.log1p(-p)
        # the rounding of the result to float32, and of small counts' factorials
        assert log_prob[k].item() == pytest.approx(exact, rel=1e-6, abs=2e-5)
    # power: Pyro's own in float32 loses the mass of large counts
    if count == 1_000_000:
        plain = likelihoods.Binomial(count, logits=torch.tensor(0.3))
        assert abs(plain.log_prob(values.flatten()).double().exp().sum().item() - 1) > 0.1


def test_large_binomial_has_the_dtype_gradient_and_checks_of_the_small_one():
    spec = DataSpec((2,), 100_000, discrete=True)
    likelihood = LIKELIHOODS["binomial"](spec, torch.full((2,), 5e4), torch.ones(2))
    raw = torch.tensor([[[0.3, -40.0]]], requires_grad=True)
    x = torch.tensor([[50_000.0, 3.0]])
    log_prob = likelihood(raw).log_prob(x)
    assert log_prob.dtype == torch.float32
    log_prob.sum().backward()
    expected = x - 100_000 * torch.sigmoid(raw.detach()[0])  # k − n σ(l)
    torch.testing.assert_close(raw.grad[0], expected, rtol=1e-6, atol=1e-2)
    assert likelihood(raw).expand((3, 1)).log_prob(x).shape == (3, 1)
    with pytest.raises(ValueError, match="support"):
        likelihood(raw).log_prob(x + 0.5)


# --- Derivatives ---

# Within torch, when forward mode is first used
deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


@deprecated
def test_bernoulli_has_derivatives_of_every_mode_and_order():
    m = torch.linspace(-5, 5, 8, dtype=torch.float64)

    def f(m):
        one = torch.ones((), dtype=m.dtype)
        return likelihoods._Bernoulli(logits=m, validate_args=False).log_prob(one).sum()

    slope, curvature = torch.sigmoid(-m), torch.diag(-torch.sigmoid(m) * torch.sigmoid(-m))
    func = torch.func
    for first in (func.jacfwd, func.jacrev):
        torch.testing.assert_close(first(f)(m), slope)
        for second in (func.jacfwd, func.jacrev):
            torch.testing.assert_close(second(first(f))(m), curvature)
    torch.testing.assert_close(func.vmap(func.grad(f))(m[:, None])[:, 0], slope)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(m, torch.ones_like(m))
        torch.testing.assert_close(forward_ad.unpack_dual(f(dual)).tangent, slope.sum())
    inputs = m.clone().requires_grad_()
    # The function itself, which a plain call uses
    apply = likelihoods._LogSigmoid.apply
    assert torch.autograd.gradcheck(
        apply, inputs, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=False
    )
    assert torch.autograd.gradgradcheck(apply, inputs, check_fwd_over_rev=True)


@deprecated
@all_likelihoods
def test_model_has_forward_and_reverse_derivatives_and_vmap(name, tmp_path):
    vae, splits = example_vae(name, tmp_path)
    x, z = batch(splits, name), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    z, func = z.double(), torch.func

    def f(z):
        return vae.likelihood(z).log_prob(x[0])

    torch.testing.assert_close(func.jacfwd(f)(z[0]), func.jacrev(f)(z[0]))
    hessian = func.jacrev(func.jacrev(f))(z[0])
    assert hessian.abs().max() > 1e-6
    torch.testing.assert_close(func.hessian(f)(z[0]), hessian)
    torch.testing.assert_close(func.jacfwd(func.jacfwd(f))(z[0]), hessian)
    torch.testing.assert_close(func.vmap(f)(z), f(z))

    def scale(x):
        return vae.posterior(x).variance

    torch.testing.assert_close(func.jacfwd(scale)(x[0]), func.jacrev(scale)(x[0]))
    torch.testing.assert_close(func.vmap(scale)(x), scale(x))


# --- torch.compile ---


@mostly_slow
def test_distributions_and_functions_of_them_compile_whole(name, tmp_path):
    vae, splits = example_vae(name, tmp_path)
    x, z = batch(splits, name), torch.zeros(8, 3, dtype=torch.float64)

    def log_weight(x, z):
        log_joint = vae.likelihood(z).log_prob(x) + vae.prior().log_prob(z)
        return log_joint - vae.posterior(x).log_prob(z)

    def compiled(function):
        return torch.compile(function, backend="eager", fullgraph=True)

    torch._dynamo.reset()
    with pyro.validation_enabled(False):  # which reads values, and ends a graph
        torch.testing.assert_close(compiled(vae.posterior)(x).mean, vae.posterior(x).mean)
        torch.testing.assert_close(compiled(vae.likelihood)(z).mean, vae.likelihood(z).mean)
        result = compiled(log_weight)(x, z)
    torch.testing.assert_close(result, log_weight(x, z))
    result.sum().backward()
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.slow
def test_distributions_compile_with_inductor(tmp_path):
    vae, splits = example_vae("bernoulli", tmp_path)
    vae, x = vae.float(), batch(splits, "bernoulli").float()
    compiled = torch.compile(lambda x: vae.likelihood(vae.posterior(x).mean).log_prob(x))
    with pyro.validation_enabled(False):
        found = compiled(x)
    torch.testing.assert_close(found, vae.likelihood(vae.posterior(x).mean).log_prob(x))


def test_compiled_model_is_the_model_in_evaluations_and_training(tmp_path):
    """torch.compile(model) is of another type, and would pass for a model without a KL."""
    from pyro_vae.evidence.evaluation import elbo_terms, evaluate

    vae, splits = example_vae("binomial", tmp_path)
    vae = vae.float()
    compiled = torch.compile(vae)
    assert elbo_terms(compiled, splits.test) == elbo_terms(vae, splits.test)
    assert evaluate(compiled, splits.test, 30) == evaluate(vae, splits.test, 30)
    before = vae.decoder.bias.clone()
    (record,) = pyro_vae.fit(compiled, splits, pyro_vae.FitConfig(epochs=1, batch_size=24))
    assert record.validation_kl > 0
    assert not torch.equal(vae.decoder.bias, before)


# --- Default dtype and device ---


@contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


SETTINGS = {
    "plain": {},
    "float64": {"dtype": torch.float64},
    # A tensor on "meta" has no values: whatever is made without a device fails.
    "meta": {"device": "meta"},
}


def numbers(name, splits, settings):
    """Weights, densities and estimates of log p(x) of a new model under torch's defaults."""
    config = ModelConfig(likelihood=name, hidden=(4,), latent_dim=2, activation="PReLU")
    with defaults(**settings):
        vae = pyro_vae.build(config, splits, seed=3)
        blank = build_blank(config, splits.spec)
        blank.load_state_dict(vae.state_dict())
        torch.random.default_generator.manual_seed(1)
        x = next(splits.test.fixed(LIKELIHOODS[name].units, 0, 4))
        posterior = blank.posterior(x)
        z = posterior.rsample()
        evidence = pyro_vae.evidence.importance_sample(blank, x, 30, with_pareto_k=True)
        annealed = pyro_vae.evidence.anneal(blank, x, 3, 2, z=z)
        exact = quadrature(blank, x, 21)
        results = [
            *vae.state_dict().values(),
            posterior.mean,
            posterior.variance,
            z,
            blank.likelihood(z).log_prob(x),
            blank.likelihood(z).sample(),
            *blank.elbo_terms(x),
            blank.reconstruct(x),
            evidence.log_evidence,
            evidence.pareto_k,
            annealed.lower,
            annealed.upper,
            exact.log_evidence,
            exact.sample(3),
        ]
        for objective in ("trace", "iwae", "mmd", "beta-tc"):
            loss = pyro_vae.objective(objective, 2 if objective == "iwae" else 1)
            torch.random.default_generator.manual_seed(2)
            results.append(loss.differentiable_loss(blank.model, blank.guide, x))
    return [r.detach() for r in results]


@mostly_slow
def test_default_dtype_and_device_change_no_number(name, tmp_path):
    splits = example_splits(name, tmp_path, count=30)
    expected = numbers(name, splits, SETTINGS["plain"])
    for settings in (SETTINGS["float64"], SETTINGS["meta"]):
        for before, now in zip(expected, numbers(name, splits, settings), strict=True):
            assert now.dtype == before.dtype
            assert now.device == before.device
            assert torch.equal(now, before)


def test_conv_network_and_oracle_under_other_defaults(tmp_path):
    spec = example_spec("binomial", (1, 8, 9))
    config = ModelConfig(architecture="conv", likelihood="binomial", hidden=(2,), latent_dim=2)
    x = np.random.default_rng(0).normal(size=(20, 4))
    results = []
    for settings in SETTINGS.values():
        with defaults(**settings):
            torch.random.default_generator.manual_seed(0)
            conv = build_blank(config, spec)
            assert {p.dtype for p in conv.parameters()} == {torch.float32}
            assert {p.device.type for p in conv.parameters()} == {"cpu"}
            rows = torch.from_numpy(x)
            pca = probabilistic_pca(rows, 2)
            weight = torch.eye(4, 2, dtype=torch.float64, device="cpu")
            loc = torch.zeros(4, dtype=torch.float64, device="cpu")
            collapsed = LinearGaussian(weight, loc, 0.6, guide="collapsed")
            results.append(
                [
                    *(vae.exact_log_evidence(rows) for vae in (pca, collapsed)),
                    *(vae.posterior(rows).mean for vae in (pca, collapsed)),
                    pca.likelihood(pca.posterior(rows).mean).log_prob(rows),
                ]
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
