"""Real data of any scale, far from zero or not, train like the same data at scale 1."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae import InputError, evaluate, generate, load_data, train
from pyro_vae.data.precision import FAR, offset_and_scale
from pyro_vae.data.splits import DataSpec, moments
from pyro_vae.training.checkpoint import load_checkpoint, serialize

QUICK = ["--batch-size", "16", "--epochs", "1", "--hidden", "8", "--latent-dim", "2"]


def table(count: int = 64) -> np.ndarray:
    """Correlated columns of several scales, in float64."""
    random = np.random.default_rng(3)
    mixed = random.standard_normal((count, 2)) @ [[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]]
    return mixed + 0.3 * random.standard_normal((count, 3)) + [0.5, -3.0, 20.0]


def trained_elbo(values: np.ndarray) -> tuple[float, DataSpec]:
    """The validation ELBO after three epochs, in nats per row of x."""
    splits = load_data(values)
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(8,)), splits)
    fit = pyro_vae.FitConfig(epochs=3, batch_size=16, learning_rate=1e-2)
    return pyro_vae.fit(vae, splits, fit)[-1].validation_elbo, splits.spec


@pytest.fixture(scope="module")
def plain() -> float:
    elbo, spec = trained_elbo(table())
    assert spec.offset is None
    return elbo


@pytest.mark.parametrize("exponent", [8, 20, 38, 100, 300, -8, -20, -38, -100, -300])
def test_any_scale_trains_like_scale_one(exponent, plain):
    """log p(value) = log p(x) - the sum of log scale, and differs by D·k·log 10 from the plain."""
    elbo, spec = trained_elbo(table() * 10.0**exponent)
    elbo -= spec.log_scale  # in the units of the values
    assert elbo == pytest.approx(plain - 3 * exponent * math.log(10), abs=2e-3)
    # power: a wrong sign of the offset, or one column's scale forgotten, is far outside
    assert (spec.scale is None) == (abs(exponent) < 10)
    if spec.scale is not None:
        assert abs(spec.log_scale) > 40


@pytest.mark.parametrize("offset", [1e6, 1e9, -1e9, 1e12])
def test_any_offset_trains_like_none(offset, plain):
    """Float64 rounds values at 1e12 by 1e-4 at most, a ten-thousandth of the spread."""
    elbo, spec = trained_elbo(table() + offset)
    assert elbo == pytest.approx(plain, abs=2e-3)
    assert spec.log_scale == 0
    assert spec.offset is not None
    assert all(abs(o - offset) < 30 for o in spec.offset)
    # power: in float32, the spread is lost, and the ELBO is off by nats
    lost, _ = trained_elbo(((table() + offset).astype(np.float32)).astype(float))
    assert abs(offset) < 1e8 or abs(lost - plain) > 0.1


def test_columns_of_all_scales_together(plain):
    scales = [1e-200, 1.0, 1e200]
    elbo, spec = trained_elbo(table() * scales + [0, 1e9, 0])
    assert spec.scale is not None
    assert spec.scale[1] == 1
    total = sum(map(math.log, scales))
    assert elbo - spec.log_scale == pytest.approx(plain - total, abs=2e-3)


def test_x_is_the_value_less_the_offset_over_the_scale():
    values = table() * [1e-40, 1, 1e40] + [0, 1e10, 0]
    splits = load_data(values)
    spec = splits.spec
    x = splits.whole().take(torch.arange(64), "real")
    assert x.dtype == torch.float32
    expected = (values - np.array(spec.offset)) / np.array(spec.scale)
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
    back = spec.from_units(x, "real")
    assert back.dtype == torch.float64
    error = np.abs(back.numpy() - values) / values.std(0)
    assert error.max() < 1e-5
    mean, std = moments(splits.train, "real")
    rows = expected[splits.train.rows.numpy()]
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, rows.std(0), rtol=1e-5)


def test_images_have_one_offset_and_scale():
    random = np.random.default_rng(0)
    pixels = random.standard_normal((30, 4, 5))
    splits = load_data(1e9 + pixels)
    assert (splits.spec.shape, len(splits.spec.offset or ())) == ((1, 4, 5), 1)
    x = splits.whole().take(torch.arange(30), "real")[:, 0].numpy()
    np.testing.assert_allclose(x - x.mean(), pixels - pixels.mean(), atol=1e-5)
    splits = load_data(1e-50 * pixels)
    assert splits.describe().startswith("real values from -")
    tiny = splits.spec
    nats = 20 * math.log((tiny.scale or (0,))[0])
    assert tiny.log_scale == pytest.approx(nats)
    assert tiny.describe_units() == (
        f"x = (value - offset) / scale (offset 0, scale {(tiny.scale or (0,))[0]:g}); "
        f"add {-nats:.6g} nats per row to log p(x) for that of the values"
    )
    assert load_data(1e9 + pixels).spec.describe_units().endswith("is also that of the values")
    assert load_data(pixels).spec.describe_units() == ""
    assert load_data(1e20 * pixels).describe().startswith("real values")  # though all are integers


def test_ordinary_data_keep_their_numbers():
    """No offset, no scale, no copy, below the limits; the limits themselves."""
    values = table().astype(np.float32)
    assert load_data(values).spec.offset is None
    assert load_data(values).train.values.data_ptr() == values.ctypes.data
    near, far = table() + np.array([0, 0, 0.5 * FAR]), table() + np.array([0, 0, 5 * FAR])
    assert load_data(near).spec.offset is None
    assert load_data(near).train.values.dtype == torch.float32
    offset = load_data(far).spec.offset
    assert offset is not None
    assert offset[:2] == (0, 0)
    for factor, scaled in ((1e10, False), (1e-10, False), (1e15, True), (1e-15, True)):
        assert (load_data(table() * factor).spec.scale is not None) == scaled
    # float32 data in memory that need an offset are shared too, and converted batch by batch
    single = (table() + 1e7).astype(np.float32)
    splits = load_data(single)
    assert splits.spec.offset is not None
    assert splits.train.values.data_ptr() == single.ctypes.data


@pytest.mark.filterwarnings("ignore:row 0 of array")
def test_one_far_row_does_not_choose_the_offset():
    """The median and the quartiles follow the bulk."""
    values = table() + 1e9
    values[::16] = 0
    splits = load_data(values)
    assert splits.spec.offset is not None
    assert all(abs(o - 1e9) < 30 for o in splits.spec.offset)


def test_offset_and_scale_come_from_the_training_rows():
    values = table()
    held_out = load_data(values).test.rows.numpy()
    values[held_out] += 1e9
    assert load_data(values).spec.offset is None


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (1e17 + np.tile([0.0, 16.0, 32.0, -16.0], 16), "column 1 .* varies by .* around 1e.17"),
        (10**17 + np.arange(64) % 3, "column 1 .* float64 cannot hold"),
        (np.uint64(2**63) + np.arange(64, dtype=np.uint64), "float64 cannot hold"),
        (np.longdouble(1e18) + np.arange(64), "float64 cannot hold"),
        ((1e9 + 64 * (np.arange(64) % 5)).astype(np.float32), "float32 cannot hold"),
    ],
    ids=["float64", "int64", "uint64", "longdouble", "float32"],
)
def test_a_spread_that_no_float_keeps_is_refused_by_column(column, message):
    if column.dtype == np.longdouble and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no wider float here")
    values = np.stack([np.zeros_like(column), column], 1)
    with pytest.raises(InputError, match=message):
        load_data(values)


def test_large_integers_whose_spread_is_kept():
    """Nanoseconds since 1970 over a day: float64 keeps them to 256 ns."""
    random = np.random.default_rng(0)
    times = 1_700_000_000 * 10**9 + random.integers(0, 86400 * 10**9, 60)
    splits = load_data(times[:, None])
    x = splits.whole().take(torch.arange(60), "real")[:, 0].double()
    assert torch.corrcoef(torch.stack([x, torch.from_numpy((times - times[0]).astype(float))]))[
        0, 1
    ].item() == pytest.approx(1, abs=1e-12)
    for dtype in (np.uint64, np.longdouble):
        assert load_data(times[:, None].astype(dtype)).spec == splits.spec


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, -1e300, 1e-300, 10.0**18])
def test_a_constant_column_is_constant(value):
    values = np.stack([table()[:, 0], np.full(64, value)], 1)
    splits = load_data(values)
    mean, std = moments(splits.train, "real")
    assert std[1] == 1
    assert splits.spec.log_scale == 0
    x = splits.whole().take(torch.arange(64), "real")
    assert x[:, 1].unique().numel() == 1
    assert abs(mean[1]) <= FAR
    np.testing.assert_allclose(
        splits.spec.from_units(x, "real")[:, 1].numpy(), value, rtol=1e-7, atol=0
    )


def test_rounding_errors_are_no_spread():
    """0.1 + 0.2 and 0.3: constant, and said."""
    column = np.where(np.arange(64) % 2, 0.1 + 0.2, 0.3)
    values = np.stack([table()[:, 0], column], 1)
    with pytest.warns(UserWarning, match=r"column 1 .* is read as constant"):
        splits = load_data(values)
    assert moments(splits.train, "real")[1][1] == 1


def test_a_column_between_0_and_1_whose_spread_float32_loses():
    values = np.stack([0.5 + 1e-9 * np.random.default_rng(0).random(64), np.linspace(0, 1, 64)], 1)
    splits = load_data(values)
    assert (splits.likelihood, splits.spec.max_value) == ("gaussian", None)
    with pytest.raises(InputError, match=r"--max-value 1: float32 loses the spread of column 0"):
        load_data(values, max_value=1)
    shares = np.stack([1e-20 * np.arange(64), np.linspace(0, 1, 64)], 1)
    assert load_data(shares).likelihood == "continuous-bernoulli"
    # counts in a tiny unit are no shares of 1
    assert load_data(1e-8 * (np.arange(128).reshape(64, 2) % 17)).likelihood == "gaussian"


def test_values_that_do_not_fit_are_refused_by_row():
    values = table()
    values[load_data(values).test.rows[0], 1] = 1e200
    row = int(load_data(table()).test.rows[0])
    with pytest.raises(InputError, match=rf"1 value .* beyond 3e38, the first in row {row} at \(1"):
        load_data(values)
    values = table() + np.array([1e9, 0, 0])
    values[row, 2] = -1e300
    with pytest.raises(InputError, match=rf"times the scale .* row {row} at \(2,\)"):
        load_data(values)
    for bad in (1.7e308, np.inf, np.nan):
        values[row, 2] = bad
        with pytest.raises(InputError, match=rf"infinite or beyond 1e307, .* row {row} at \(2,\)"):
            load_data(values)
    with pytest.raises(InputError, match="at most 16777216"):
        load_data(np.array([[0], [2**24 + 1], [7]]), max_value=2**25)


def test_half_precision():
    values = (table() / 8).astype(np.float16)
    splits = load_data(values)
    assert splits.spec.offset is None
    x = splits.whole().take(torch.arange(64), "real")
    assert np.array_equal(x.numpy(), values.astype(np.float32))


def test_no_overflow_at_the_ends_of_float64():
    with np.errstate(all="raise"):
        units = offset_and_scale(1e307 * np.array([[-1.0], [1.0], [0.5], [0.2]]), (), "data")
        assert units is not None
        assert 1e305 < units[1][0] < 1e308
        assert offset_and_scale(np.array([[-(2**63)], [2**63 - 1]]), (), "data") is not None
        assert offset_and_scale(np.zeros((1, 3)), (), "data") is None


def test_the_commands_tell_the_units(tmp_path, capsys, monkeypatch):
    """train and evaluate say what x is; a run reloads and resumes with the same spec."""
    for name in ("draw_reconstructions", "draw_run"):
        monkeypatch.setattr(f"pyro_vae.plots.from_model.{name}", lambda *a, **k: None)
    monkeypatch.setattr("pyro_vae.page.write.write_report", lambda run, *a, **k: run)
    values = table() * [1, 1e-20, 1] + [1e9, 0, 0]
    path, run = tmp_path / "a.csv", tmp_path / "run"
    np.savetxt(path, values, "%.17g", ",", header="a,b,c", comments="")
    assert train.main(["--data", str(path), "--out", str(run), *QUICK]) == 0
    out = capsys.readouterr().out
    splits = load_data(path)
    assert splits.spec.columns == ("a", "b", "c")
    assert "3 columns a, b, c" in out
    nats = -splits.spec.log_scale
    assert nats == pytest.approx(20 * math.log(10), abs=2.31)  # a power of ten near 1e-20
    assert "column a: offset 1e+09, scale 1; column b: offset 0, scale 1e-2" in out
    assert f"add {nats:.6g} nats per row to log p(x)" in out
    saved = load_checkpoint(run)
    assert saved.vae.likelihood_module.spec == splits.spec
    assert evaluate.main([str(run), "--num-samples", "5"]) == 0
    assert f"add {nats:.6g} nats" in capsys.readouterr().out
    assert evaluate.main([str(run), "--num-samples", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nats_to_units_of_data"] == nats
    assert train.main(["--resume", str(run), "--epochs", "2"]) == 0
    assert load_checkpoint(run, "last").vae.likelihood_module.spec == splits.spec
    out_file = tmp_path / "x.npy"
    assert generate.main([str(run), "--out", str(out_file), "--num", "400", "--draw"]) == 0
    drawn = np.load(out_file)
    assert drawn.dtype == np.float64
    np.testing.assert_allclose(drawn.std(0), values.std(0), rtol=0.6)
    np.testing.assert_allclose(drawn.mean(0), values.mean(0), atol=values.std(0).max(), rtol=1e-8)


def test_a_spec_and_data_of_another_shape():
    spec = load_data(table() + 1e9).spec
    with pytest.raises(InputError, match=r"expects rows of shape \(3,\); array holds .* \(2,\)"):
        load_data(table()[:, :2], spec=spec)
    for wrong in ({"offset": (0.0,)}, {"scale": None}, {"offset": None}):
        with pytest.raises(ValueError, match="3 offsets and scales"):
            dataclasses.replace(spec, **wrong)


def test_a_checkpoint_of_version_0_1(tmp_path):
    """It has no columns, offsets and scales."""
    splits = load_data(table())
    config = pyro_vae.Config(model=pyro_vae.ModelConfig(hidden=(8,), likelihood="gaussian"))
    vae = pyro_vae.build(config.model, splits)
    content = torch.load(io.BytesIO(serialize(vae, config, splits, [])), weights_only=True)
    for name in ("columns", "offset", "scale"):
        del content["data"][name]
    del content["digests"]
    content["format_version"] = 1
    torch.save(content, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").vae.likelihood_module.spec == splits.spec


def test_data_of_an_old_run_are_stored_as_then(tmp_path):
    """A checkpoint of version 0.1 has no offset: its model knows the values themselves."""
    values = table() + 1e6
    old = DataSpec((3,), None, discrete=False)
    splits = load_data(values, spec=old)
    assert splits.spec == old
    x = splits.whole().take(torch.arange(64), "real").numpy()
    assert np.array_equal(x, values.astype(np.float32))


def test_a_value_that_decides_the_standard_deviation_is_named():
    values = table(60)
    usual = np.quantile(np.abs(values - np.median(values, 0)), 0.75, axis=0)
    values[7, 1] = np.median(values[:, 1]) + 0.9e6 * usual[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(values, seed=1)
    values[7, 1] = np.median(values[:, 1]) - 1.1e6 * usual[1]
    assert 7 in load_rows(values)
    with pytest.warns(UserWarning, match=r"row 7 of array .*holds -.* in column 1 .*1e\+06 times"):
        load_data(values, seed=1)


def load_rows(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_data(values, seed=1).train.rows.tolist()
