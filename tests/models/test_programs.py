"""Programs of torch.export and ONNX: equal to the model, on any number of rows, in every family."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import family_models
import mixed_tables
import numpy as np
import pytest
import torch
from masked import missing_vae
from scipy import special
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

import pyro_vae
from pyro_vae import InputError, ModelConfig
from pyro_vae.models import programs
from pyro_vae.models.likelihoods import LIKELIHOODS
from pyro_vae.models.log_weights import log_weights
from pyro_vae.models.programs import TOLERANCE, Part, difference, example_rows, parts


def rebuilt(family: str, outputs: dict[str, Tensor]) -> Any:
    """q(z|x) from the outputs of an encoder, by torch's distributions."""
    if family == "diagonal":
        return Independent(Normal(outputs["loc"], outputs["scale"]), 1)
    if family == "full":
        return MultivariateNormal(outputs["loc"], scale_tril=outputs["scale_tril"])
    parts = Independent(Normal(outputs["loc"], outputs["scale"]), 1)
    return MixtureSameFamily(Categorical(logits=outputs["logits"]), parts)


def outputs_of(part: Part, run: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip(part.outputs, run(*(rows[k] for k in part.inputs)), strict=True))


def check(vae: Any, x: Tensor, y: Tensor | None = None, onnx: bool = False) -> list[dict[str, Any]]:
    """Export all parts, which compares them with their own module.

    Returns:
        The rows and the outputs of all parts: of torch.export, and of ONNX if asked for.
    """
    if onnx:
        pytest.importorskip("onnxruntime", reason="needs pip install '.[onnx]'")
    vae, x = vae.float().eval(), x.float()
    # 72 rows: `difference` computes them in batches of 1, 7 and 64.
    many = torch.arange(72) % len(x)
    rows = example_rows(vae, x[many], None if y is None else y[many], seed=0)
    readers = {"pt2": programs.run_pt2} | ({"onnx": programs.run_onnx} if onnx else {})
    found: dict[str, dict[str, Any]] = {kind: {"rows": rows} for kind in readers}
    for name, part in parts(vae).items():
        for file in programs.program_files(name, part, rows, onnx):
            kind = file.name.rpartition(".")[2]
            found[kind][name] = outputs_of(part, readers[kind](file.content), rows)
    return list(found.values())


def check_densities(vae: Any, *args: Any, onnx: bool = False) -> list[dict[str, Any]]:
    every = check(vae, *args, onnx=onnx)
    for found in every:
        check_density(vae, found)
    return every


def check_density(vae: Any, found: dict[str, Any]) -> None:
    """log w of draws, from the programs' outputs by their names; and means of p(x|z)."""
    rows, encoder, densities = (found[name] for name in ("rows", "encoder", "log_likelihood"))
    model = vae.given(rows["y"]) if "y" in rows else vae
    with torch.no_grad():
        q, x, z = model.posterior(rows["x"]), rows["x"], rows["z"]
        if "log_q" in encoder:
            z, log_q = encoder["z"], encoder["log_q"]
            expected = q.from_normals(rows["noise"])
            torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(log_q, q.log_prob(z), rtol=1e-5, atol=1e-4)
        else:
            log_q = rebuilt(vae.family.kind, encoder).log_prob(rows["z"])
            expected = log_weights(model, q, x, z.unsqueeze(0))[1][0].float()
            log_w = densities["log_likelihood"] + densities["log_prior"] - log_q
            torch.testing.assert_close(log_w, expected, rtol=1e-5, atol=1e-4)
            mean = model.likelihood(z).mean
            torch.testing.assert_close(found["decoder"]["mean"], mean, rtol=1e-4, atol=1e-5)


def randomized(guide: str, prior: str, name: str = "gaussian") -> tuple[Any, Tensor]:
    splits = family_models.rows(name)
    config = family_models.config(guide, prior, likelihood=name)
    vae = family_models.randomized(pyro_vae.build(config, splits))
    return vae, next(splits.train.fixed(LIKELIHOODS[name].units, seed=0, num_images=20))


QUICK = [("full", "mixture"), ("mixture", "normal")]
# Each guide and each prior once
IN_ONNX = [("diagonal", "mixture"), ("full", "vamp"), ("mixture", "flow"), ("flow", "normal")]


@pytest.mark.parametrize(
    ("guide", "prior", "onnx"),
    [
        pytest.param(*pair, False, marks=[] if pair in QUICK else [pytest.mark.slow])
        for pair in family_models.PAIRS
        if pair not in IN_ONNX
    ]
    + [pytest.param(*pair, True, marks=pytest.mark.slow) for pair in IN_ONNX],
)
def test_programs_of_every_guide_and_prior(guide, prior, onnx):
    vae, x = randomized(guide, prior)
    check_densities(vae, x, onnx=onnx)


@pytest.mark.parametrize(
    ("name", "onnx"),
    [
        ("gaussian", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in sorted(LIKELIHOODS)),
    ],
)
def test_programs_of_every_likelihood_with_missing_values(name, onnx):
    vae, splits = missing_vae(name)
    vae = family_models.randomized(vae)
    x = next(splits.train.fixed(LIKELIHOODS[name].units, seed=0, num_images=20))
    assert x.isnan().any()
    check_densities(vae, x, onnx=onnx)


@pytest.mark.slow
def test_programs_of_columns_of_every_kind_with_missing_values():
    values = mixed_tables.values(60)
    values[3::7, ::5] = np.nan
    splits = mixed_tables.splits_of(values, missing=True)
    vae = family_models.randomized(mixed_tables.small_vae(splits))
    x = next(splits.train.fixed("real", seed=0, num_images=20))
    check_densities(vae, x, onnx=True)


@pytest.mark.parametrize(
    ("condition", "onnx"),
    [
        ("partial", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("label", "partial")),
    ],
)
def test_programs_of_models_with_labels_take_y(condition, onnx, digits):
    config = ModelConfig(latent_dim=3, hidden=(16,), condition=condition)
    vae = pyro_vae.build(config, digits)
    x, y = next(digits.test.fixed_with_labels("count", 0, 20))
    y = vae.classifier(x).argmax(-1) if condition == "partial" else y
    for found in check_densities(vae, x, y, onnx=onnx):
        if condition == "partial":
            expected = vae.label_posterior(found["rows"]["x"]).probs.detach()
            probabilities = found["classifier"]["probabilities"]
            torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)
        else:
            assert "classifier" not in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_programs_of_convolutions_and_autoencoders(kind, digits):
    config = ModelConfig(kind=kind, latent_dim=3, hidden=(4, 8), architecture="conv")
    vae = family_models.randomized(pyro_vae.build(config, digits))
    x = next(digits.test.fixed("count", 0, 20))
    for found in check(vae, x, onnx=True):
        if kind == "ae":
            code = vae.encoder(found["rows"]["x"]).detach()
            torch.testing.assert_close(found["encoder"]["z"], code, rtol=1e-4, atol=1e-5)
            assert set(found["log_likelihood"]) == {"log_likelihood"}
        else:
            check_density(vae, found)


def test_a_refined_guide_has_no_encoder(digits):
    vae = pyro_vae.build(ModelConfig(latent_dim=2, hidden=(8,)), digits)
    refined = pyro_vae.refit(vae, digits)
    assert set(parts(refined)) == {"decoder", "log_likelihood"}
    assert set(parts(vae)) == {"encoder", "decoder", "log_likelihood"}


@pytest.mark.slow
def test_onnx_computes_what_float32_would_lose():
    """Logits at which ONNX's own log σ is −∞, and exp(x) − 1 cancels."""
    pytest.importorskip("onnxruntime", reason="needs pip install '.[onnx]'")
    x, z = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[300.0], [-1e-6]])

    class Sums(torch.nn.Module):
        def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
            x, z = rows
            log_sigmoid = torch.nn.functional.logsigmoid(x - z)
            both = torch.logaddexp(x - 5 * z.abs(), -5 * z.abs())
            total = torch.logsumexp(x - 5 * z.abs(), -1)
            others = torch.expm1(z), torch.lgamma(x + 3), torch.sigmoid(-z / 10)
            return log_sigmoid, *others, both, total

    vector, column = ((2,), torch.float32), ((1,), torch.float32)
    units = dict.fromkeys(("log_sigmoid", "expm1", "lgamma", "sigmoid", "both", "total"), 1e-30)
    part = Part(Sums(), {"x": vector, "z": column}, units)
    run = programs.run_onnx(programs.to_onnx(part, programs.exported(part)))
    found, expected = run(x, z), part.module(x, z)
    assert min(expected[0].min(), expected[4].min(), expected[5].min()) < -200
    assert 0 < expected[3].min() < 1e-12
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=0.0)


def test_operations_that_onnx_lacks():
    values = np.concatenate([np.logspace(-3, 9, 400), np.arange(1, 50)])
    found = programs._lgamma(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, special.gammaln(values), rtol=1e-10, atol=1e-11)
    values = np.concatenate([-np.logspace(-12, 2, 200), [0.0], np.logspace(-12, 2, 200)])
    found = programs._expm1(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, np.expm1(values), rtol=1e-10, atol=0)
    x = torch.linspace(-200, 200, 101, dtype=torch.float64)
    torch.testing.assert_close(programs._log_sigmoid(x), torch.nn.functional.logsigmoid(x))
    expected = torch.logaddexp(x, x.flip(0) - 150)
    torch.testing.assert_close(programs._logaddexp(x, x.flip(0) - 150), expected)
    torch.testing.assert_close(programs._sigmoid(x), torch.sigmoid(x), rtol=1e-12, atol=0.0)
    torch.manual_seed(0)
    a = torch.randn(3, 5, 5, dtype=torch.float64).tril() + 3 * torch.eye(5, dtype=torch.float64)
    b = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(a, b, upper=False)
    torch.testing.assert_close(programs._solve_triangular(a, b, upper=False), expected)
    with pytest.raises(NotImplementedError):
        programs._solve_triangular(a, b, upper=True)


# --- what a file holds ----------------------------------------------------------------------------


def test_a_file_holds_the_weights_of_its_part_and_no_row_of_the_data():
    vae, x = randomized("diagonal", "vamp")
    names = {"encoder": set(), "decoder": set(), "log_likelihood": set()}
    for name, part in parts(vae.eval()).items():
        content = programs.to_pt2(programs.exported(part))
        program = torch.export.load(io.BytesIO(content))
        names[name] = {key.split(".")[1] for key in program.state_dict}
        assert not any(row.numpy().tobytes() in content for row in x.float())
        for example in program.example_inputs[0]:
            assert not example.any()
    assert names["encoder"] == {"encoder"}
    assert names["decoder"] == {"decoder", "likelihood_module"}
    assert names["log_likelihood"] == {
        "decoder",
        "likelihood_module",
        "prior_module",
        "encoder",
    }
    assert vae.encoder is not None  # the model itself keeps all its modules


# --- the check has power --------------------------------------------------------------------------


def part_and_rows(name: str = "encoder") -> tuple[Part, list[Tensor]]:
    vae, x = randomized("diagonal", "normal")
    part = parts(vae.eval())[name]
    rows = example_rows(vae, x.float(), None, seed=0)
    return part, [rows[key] for key in part.inputs]


def test_the_difference_is_relative_to_value_or_unit():
    part, inputs = part_and_rows()
    assert difference(part, part.module, inputs) < 1e-6
    for size, refused in ((3e-5, True), (3e-6, False)):

        def shifted(*rows: Tensor, size: float = size) -> Any:
            loc, scale = part.module(*rows)
            return loc + size * loc.abs().clamp_min(1), scale

        assert (difference(part, shifted, inputs) > TOLERANCE) is refused
    wide = replace(part, outputs={"loc": 100.0, "scale": 1.0})
    assert difference(wide, lambda *r: (part.module(*r)[0] + 1e-4, part.module(*r)[1]), inputs) < (
        TOLERANCE
    )


FAULTS = {
    "one value of one row": lambda loc, scale: (loc * (1 + 3e-5 * (loc == loc.max())), scale),
    "swapped outputs": lambda loc, scale: (scale, loc),
    "sign": lambda loc, scale: (-loc, scale),
    "variance for scale": lambda loc, scale: (loc, scale**2),
    "rows reversed": lambda loc, scale: (loc.flip(0), scale.flip(0)),
    "one row for all": lambda loc, scale: (loc[:1].expand_as(loc), scale),
    "latents reversed": lambda loc, scale: (loc.flip(1), scale),
    "another shape": lambda loc, scale: (loc[:, :1], scale),
    "float64": lambda loc, scale: (loc.double(), scale.double()),
    "NaN": lambda loc, scale: (loc * torch.nan, scale),
    "infinity": lambda loc, scale: (loc / 0, scale),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_program_with_a_fault_is_refused(fault, monkeypatch):
    part, inputs = part_and_rows()
    rows = dict(zip(part.inputs, inputs, strict=True))
    change = FAULTS.get(fault, lambda *outputs: outputs)
    monkeypatch.setattr(programs, "exported", lambda part: None)
    monkeypatch.setattr(programs, "to_pt2", lambda program: b"")
    monkeypatch.setattr(programs, "run_pt2", lambda _: lambda *r: change(*part.module(*r)))
    if fault is None:
        (file,) = programs.program_files("encoder", part, rows)
        assert file.difference < 1e-6
        return
    with pytest.raises(InputError, match=r"encoder\.pt2 would differ from the model by"):
        list(programs.program_files("encoder", part, rows))


@pytest.mark.parametrize("weight", ["encoder.layers.1.weight", "encoder.mean", "encoder.std"])
def test_a_program_of_other_weights_or_moments_is_noticed(weight):
    part, inputs = part_and_rows()
    run = programs.run_pt2(programs.to_pt2(programs.exported(part)))
    assert difference(part, run, inputs) < 1e-6
    value = dict(part.module.vae.state_dict())[weight]
    with torch.no_grad():
        value.mul_(1.001)
    assert difference(part, run, inputs) > TOLERANCE


def test_an_infinite_density_of_both_is_no_difference():
    part, inputs = part_and_rows()
    infinite = replace(part, module=_Infinite())
    assert difference(infinite, _Infinite(), inputs) == 0


class _Infinite(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)[:, :2]
        return torch.full_like(flat, -torch.inf), torch.full_like(flat, torch.nan)
