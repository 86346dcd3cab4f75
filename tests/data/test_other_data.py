"""Other data for a trained model: in the units of its training data, or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pyro_vae import DataConfig, InputError, encode, load_data, train
from pyro_vae.data import loading
from pyro_vae.data.loading import load_foreign
from pyro_vae.data.splits import DataSpec, Units, moments
from pyro_vae.models.likelihoods import LIKELIHOODS

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (12, 4, 5), dtype=np.uint8)
EIGHT_BITS = DataSpec((1, 4, 5), 255, discrete=True)
SHARES = DataSpec((1, 4, 5), 1, discrete=False)
BINARY = DataSpec((1, 4, 5), 1, discrete=True)
COUNTS = DataSpec((1, 4, 5), 16, discrete=True)
ALL_UNITS: tuple[Units, ...] = ("binary", "unit", "count", "real")


def foreign(tmp_path, monkeypatch, values, spec, units: Units, *, own=None, stated=None, run=None):
    """The x of a model of `spec` for `values`, whose source knows its largest value, `own`."""
    np.save(tmp_path / "other.npy", values)

    def read(config):
        return dataclasses.replace(original(config), max_value=own)

    original = loading.read
    with monkeypatch.context() as patch:
        patch.setattr(loading, "read", read)
        config = DataConfig(str(tmp_path / "other.npy"), max_value=run)
        splits = load_foreign(config, spec, units, stated)
    assert splits.spec == spec
    intensity: Units = "unit" if units == "binary" and not spec.is_binary else units
    x = torch.cat(list(splits.test.fixed(intensity, 0)))
    assert splits.low == splits.test.values.min()
    assert splits.high == splits.test.values.max()
    return x[:, 0].numpy()


@pytest.mark.parametrize("units", ALL_UNITS)
@pytest.mark.parametrize("known", ["source", "stated"])
@pytest.mark.parametrize(
    ("values", "largest"),
    [
        (PIXELS / 255, 1),
        ((PIXELS / 255).astype(np.float32), 1),
        (PIXELS.astype(np.uint16) * 257, 65535),
        (PIXELS, 255),
        (PIXELS.astype(float) * 3, 765),
    ],
    ids=["shares", "float32", "16-bit", "8-bit", "other"],
)
def test_the_same_images_in_another_unit(values, largest, known, units, tmp_path, monkeypatch):
    """A model of 8-bit images sees the same x, whatever the unit."""
    given = {"own": largest} if known == "source" else {"stated": largest, "own": 12345}
    x = foreign(tmp_path, monkeypatch, values, EIGHT_BITS, units, **given)
    expected = PIXELS if units == "count" else PIXELS.astype(np.float32) / 255
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_one_bit_images_are_black_and_white(tmp_path, monkeypatch):
    bits = PIXELS > 127
    x = foreign(tmp_path, monkeypatch, bits, EIGHT_BITS, "count", own=1)
    assert np.array_equal(x, 255.0 * bits)
    x = foreign(tmp_path, monkeypatch, bits * 255, BINARY, "binary", own=255)
    assert np.array_equal(x, 1.0 * bits)
    for own in (255, None):  # grey is not black and white
        with pytest.raises(InputError, match="the model expects integers from 0 to 1 "):
            foreign(tmp_path, monkeypatch, PIXELS, BINARY, "binary", own=own)


def test_bytes_for_a_model_of_shares(tmp_path, monkeypatch):
    for units in ("unit", "real"):
        x = foreign(tmp_path, monkeypatch, PIXELS, SHARES, units, own=255)
        np.testing.assert_allclose(x, PIXELS / 255, rtol=1e-6)
        with pytest.raises(InputError, match="of shape"):
            foreign(tmp_path, monkeypatch, PIXELS, SHARES, units)
    x = foreign(tmp_path, monkeypatch, PIXELS / 255, SHARES, "unit")
    np.testing.assert_allclose(x, PIXELS / 255, rtol=1e-6)


@pytest.mark.parametrize("units", ALL_UNITS)
def test_a_unit_that_cannot_be_told_is_refused_with_the_remedy(units, tmp_path, monkeypatch):
    """Black images, if they were encoded."""
    remedy = "give --max-value, the largest value that these data can take"
    for values, spec in (
        (PIXELS / 255, EIGHT_BITS),
        (PIXELS // 255, EIGHT_BITS),
        (PIXELS // 16, EIGHT_BITS),
        (PIXELS / 255, COUNTS),
        (PIXELS.astype(np.uint16) * 257, EIGHT_BITS),
    ):
        with pytest.raises(InputError, match=remedy):
            foreign(tmp_path, monkeypatch, values, spec, units)


@pytest.mark.parametrize("units", ALL_UNITS)
def test_data_that_fit_are_taken_as_they_are(units, tmp_path, monkeypatch):
    for values, spec in (
        (PIXELS, EIGHT_BITS),
        (PIXELS // 4, EIGHT_BITS),  # dark, at most 63
        (PIXELS * 0, EIGHT_BITS),  # black is black in all units
        (PIXELS // 16, COUNTS),
        (PIXELS // 255, COUNTS),  # few counts are counts
        (PIXELS // 128, BINARY),
    ):
        x = foreign(tmp_path, monkeypatch, values, spec, units)
        scale = 1 if units == "count" else spec.max_value
        np.testing.assert_allclose(x, values / np.float32(scale), rtol=1e-6)


def test_twelve_bits_in_sixteen(tmp_path, monkeypatch):
    """Trained with --max-value 4095: other images of the type hold such values too."""
    spec = DataSpec((1, 4, 5), 4095, discrete=True)
    values = PIXELS.astype(np.uint16) * 16
    x = foreign(tmp_path, monkeypatch, values, spec, "count", own=65535, run=4095)
    assert np.array_equal(x, values)
    x = foreign(tmp_path, monkeypatch, PIXELS, spec, "count", own=255, run=4095)
    assert np.array_equal(x, np.rint(PIXELS * (4095 / 255)))
    with pytest.raises(InputError, match="from 0 to 4095"):
        foreign(tmp_path, monkeypatch, values * 16, spec, "count", own=65535, run=4095)
    x = foreign(tmp_path, monkeypatch, values * 16, spec, "count", stated=65535, run=4095)
    assert np.array_equal(x, np.rint(values * 16.0 * 4095 / 65535))


def test_what_is_stated_must_hold(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="expected values from 0 to 100 in other; got"):
        foreign(tmp_path, monkeypatch, PIXELS, EIGHT_BITS, "count", stated=100)
    real = DataSpec((1, 4, 5), None, discrete=False)
    with pytest.raises(InputError, match="no effect on a model of unbounded data"):
        foreign(tmp_path, monkeypatch, PIXELS, real, "real", stated=255)


def notes(tmp_path, values: np.ndarray, factor: float, shift: float = 0.0) -> list[str]:
    """The warnings of a Gaussian model of `values` about other rows, scaled and shifted."""
    import warnings

    splits = load_data(values)
    np.save(tmp_path / "other.npy", values[:20] * factor + shift)
    config = DataConfig(str(tmp_path / "other.npy"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = moments(splits.train, "real")
        load_foreign(config, splits.spec, "real", moments=measured)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("shape", [(3,), (4, 5)])
def test_rows_in_another_unit_are_noted(shape, tmp_path):
    """A thousand standard deviations away, or a thousand times narrower; not what is merely far."""
    values = RANDOM.normal(5, 2, (60, *shape))
    for fits in ((1, 0), (20, 0), (-3, 100), (0.01, 5), (1, 500), (0, 5)):
        assert notes(tmp_path, values, *fits) == []
    for off in ((1000.0, 0), (1, 5000), (-2000, 0)):
        found = notes(tmp_path, values, *off)
        assert "standard deviations of the training data from their mean" in found[0]
        assert ("column 0 (counted from 0) of other" in found[0]) == (len(shape) == 1)
    assert "vary by" in notes(tmp_path, values, 1e-5)[0]
    mixed = values.copy()
    mixed[0] = 1e6  # one row that is far is an outlier, not a unit
    np.save(tmp_path / "mixed.npy", mixed)
    splits = load_data(values)
    config = DataConfig(str(tmp_path / "mixed.npy"))
    load_foreign(config, splits.spec, "real", moments=moments(splits.train, "real"))


def test_rows_of_offset_data_are_noted_in_their_units(tmp_path):
    values = RANDOM.normal(0, 1, (60, 3)) * 1e-20
    assert notes(tmp_path, values, 1) == []
    assert len(notes(tmp_path, values, 1e5)) == 3


@pytest.mark.parametrize("name", ["binomial", "bernoulli", "gaussian"])
def test_the_commands_convert(name, tmp_path, monkeypatch, capsys):
    """encode --max-value: the same codes for the same images; without it, one line and status 2."""
    for function in ("draw_reconstructions", "draw_run"):
        monkeypatch.setattr(f"pyro_vae.plots.from_model.{function}", lambda *a, **k: None)
    monkeypatch.setattr("pyro_vae.page.write.write_report", lambda run, *a, **k: run)
    assert name in LIKELIHOODS
    values = RANDOM.integers(0, 17, (40, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "shares.npy", values / 16)
    run, data = str(tmp_path / "run"), str(tmp_path / "a.npy")
    flags = ["--batch-size", "16", "--epochs", "1", "--hidden", "8", "--latent-dim", "2"]
    flags += ["--max-value", "16", "--likelihood", name]
    assert train.main(["--data", data, "--out", run, *flags]) == 0
    assert encode.main([run, "--out", str(tmp_path / "a.npz")]) == 0
    other = [run, "--data", str(tmp_path / "shares.npy"), "--out", str(tmp_path / "b.npz")]
    capsys.readouterr()
    assert encode.main(other) == 2
    assert "give --max-value" in capsys.readouterr().err
    assert encode.main([*other, "--max-value", "1"]) == 0
    with np.load(tmp_path / "a.npz") as ours, np.load(tmp_path / "b.npz") as theirs:
        if name != "bernoulli":  # whose binarization does not depend on the unit either
            np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-5, atol=1e-6)
        assert np.array_equal(ours["mean"], theirs["mean"]) or name == "gaussian"
    assert encode.main([run, "--out", str(tmp_path / "c.npz"), "--max-value", "16"]) == 2
    assert "give --data" in capsys.readouterr().err
