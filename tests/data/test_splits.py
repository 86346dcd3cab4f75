"""Splits, units, binarization and the scan of the values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SIGMAS
from scipy import stats

from pyro_vae import DataConfig, InputError, load_data
from pyro_vae.data.loading import load_foreign
from pyro_vae.data.splits import CHUNK, binarize, moments


def save(tmp_path, values, name="a.npy") -> str:
    np.save(tmp_path / name, values)
    return str(tmp_path / name)


def test_splits_are_disjoint_cover_all_rows_and_follow_the_seed(digits):
    parts = [set(s.rows.tolist()) for s in (digits.train, digits.validation, digits.test)]
    assert sum(map(len, parts)) == 1797
    assert set.union(*parts) == set(range(1797))
    again = load_data("digits")
    assert torch.equal(again.validation.rows, digits.validation.rows)
    other = load_data("digits", seed=1)
    assert not torch.equal(other.validation.rows, digits.validation.rows)
    labels = digits.whole().labels
    assert labels is not None
    assert torch.equal(labels[digits.test.rows], digits.test.labels)
    # one tensor holds all rows, whatever the number of splits
    assert digits.train.values.data_ptr() == digits.test.values.data_ptr()


def test_sizes_of_splits(tmp_path):
    path = save(tmp_path, np.random.default_rng(0).random((50, 4)))
    splits = load_data(DataConfig(path, validation_size=7, test_size=9))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [34, 7, 9]
    with pytest.raises(InputError, match="leave none to train on"):
        load_data(DataConfig(path, validation_size=25, test_size=25))
    for rows in (1, 2):
        with pytest.raises(InputError, match=f"has {rows} row"):
            load_data(save(tmp_path, np.zeros((rows, 4)), "few.npy"))
    assert len(load_data(save(tmp_path, np.eye(3), "few.npy")).train) == 1


@pytest.mark.parametrize(
    ("values", "max_value", "discrete", "likelihood"),
    [
        (np.array([0, 1, 1], np.uint8), 1, True, "bernoulli"),
        (np.array([0.0, 1.0, 1.0]), 1, True, "bernoulli"),
        (np.array([False, True, True]), 1, True, "bernoulli"),
        (np.array([0, 3, 200], np.uint8), 255, True, "discretized-logistic"),
        (np.array([0, 3, 255], np.int64), 255, True, "discretized-logistic"),
        (np.array([0, 3, 16], np.int64), 16, True, "binomial"),
        (np.array([0.0, 3.0, 16.0]), 16, True, "binomial"),
        (np.array([0.0, 0.25, 1.0]), 1, False, "continuous-bernoulli"),
        (np.array([-0.1, 0.25, 1.0]), None, False, "gaussian"),
        (np.array([0, 3, 300], np.int64), None, False, "gaussian"),
        (np.array([-1, 3, 4], np.int64), None, False, "gaussian"),
        (np.array([0.0, 7.3, 2.0]), None, False, "gaussian"),
        (np.array([0.0, 1e38, 2.5]), None, False, "gaussian"),
    ],
)
def test_kind_of_data(values, max_value, discrete, likelihood, tmp_path):
    splits = load_data(save(tmp_path, np.stack([values] * 2, 1)))
    found = (splits.spec.max_value, splits.spec.discrete, splits.likelihood)
    assert found == (max_value, discrete, likelihood)


def test_max_value(tmp_path):
    path = save(tmp_path, np.array([[0, 3], [5, 7], [16, 2]], np.uint8))
    splits = load_data(DataConfig(path, max_value=16))
    assert (splits.spec.max_value, splits.likelihood) == (16, "binomial")
    with pytest.raises(InputError, match="expects values from 0 to 15; a ranges from 0 to 16"):
        load_data(DataConfig(path, max_value=15))


def test_values_that_are_not_finite_are_counted_and_located(tmp_path):
    values = np.zeros((5000, 2, 3))
    values[4200, 1, 2] = np.nan
    values[4500, 0, 0] = np.inf
    with pytest.raises(InputError, match=r"2 values .* first in row 4200 at \(0, 1, 2\)"):
        load_data(save(tmp_path, values))


def test_values_beyond_single_precision(tmp_path):
    with pytest.raises(InputError, match="1 value that are NaN, infinite or beyond 3e38"):
        load_data(save(tmp_path, np.array([[0.0], [1e300], [2.0], [3.0]])))


def test_ranges_are_told_with_enough_digits(tmp_path):
    for values, text in (
        ([[0.00019, 0.5], [0.25, 1.0000001], [0.5, 0.5]], "real values from 0.00019 to 1.0000001"),
        ([[0.0, 1.0], [0.25, 0.5], [0.5, 0.5]], "real values from 0 to 1"),
        ([[1e9, 1e9 + 0.5], [1e9, 1e9], [1e9, 1e9]], "from 1000000000 to 1000000000.5"),
        ([[-3, 16], [5, 7], [1, 1]], "integers from -3 to 16"),
        ([[0.1, 0.2], [0.1, 0.1], [0.1, 0.1]], "real values from 0.1 to 0.2"),
    ):
        assert load_data(np.array(values)).describe().endswith(text)
    path = save(tmp_path, np.array([[0.00019, 0.5], [0.25, 1.0000001], [0.5, 0.5]]))
    with pytest.raises(InputError, match=r"ranges from 0\.00019 to 1.0000001"):
        load_data(DataConfig(path, max_value=1))


def test_units(tmp_path):
    path = save(tmp_path, np.array([[0, 51], [255, 102], [3, 4]], np.uint8))
    spec = load_data(path).spec
    values = torch.tensor([[0, 51], [255, 102]], dtype=torch.uint8)
    assert spec.to_units(values, "count").tolist() == [[0, 51], [255, 102]]
    expected = torch.tensor([[0, 0.2], [1, 0.4]])
    torch.testing.assert_close(spec.to_units(values, "unit"), expected)
    torch.testing.assert_close(spec.to_units(values, "real"), expected)
    binary = spec.to_units(values, "binary")
    assert binary[0, 0] == 0
    assert binary[1, 0] == 1
    assert set(binary.unique().tolist()) <= {0.0, 1.0}


def test_binarization_is_afresh_in_training_and_fixed_in_evaluation(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (1300, 6), dtype=np.uint8)
    train = load_data(save(tmp_path, values)).train
    index = torch.arange(200)
    assert not torch.equal(train.take(index, "binary"), train.take(index, "binary"))

    def fixed(seed, count=None):
        batches = list(train.fixed("binary", seed, count))
        assert max(map(len, batches)) <= CHUNK
        return torch.cat(batches)

    assert torch.equal(fixed(3), fixed(3))
    assert torch.equal(fixed(3)[:100], fixed(3, 100))
    assert not torch.equal(fixed(3), fixed(4))
    # the draws have the grey values as their means
    torch.manual_seed(0)
    grey = train.take(index, "unit")
    mean = torch.stack([train.take(index, "binary") for _ in range(2000)]).mean(0)
    deviation = (mean - grey) / (grey * (1 - grey) / 2000).sqrt().clamp_min(1e-9)
    chi_square = deviation[(grey > 0.05) & (grey < 0.95)].square()
    error = math.sqrt(2 / len(chi_square))
    assert abs(chi_square.mean().item() - 1) < SIGMAS * error
    # power: grey values that are a hundredth off are seen
    off = (mean - grey - 0.01) / (grey * (1 - grey) / 2000).sqrt().clamp_min(1e-9)
    assert off[(grey > 0.05) & (grey < 0.95)].square().mean().item() - 1 > SIGMAS * error


@pytest.mark.parametrize("max_value", [255, 200, 100, 16, 3])
def test_binarization_by_bytes_is_exact(max_value):
    """Chi-square over all values, of 2^16 draws each; false alarms: 1e-5 for each of two tests."""
    torch.manual_seed(0)
    draws = 2**16
    values = torch.arange(max_value + 1, dtype=torch.uint8)
    x = torch.stack([binarize(values.repeat(256), max_value) for _ in range(draws // 256)])
    x = x.view(draws, max_value + 1).double()
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not x[:, 0].any()
    assert x[:, -1].all()

    def statistic(p: torch.Tensor) -> float:
        return ((x[:, 1:-1].mean(0) - p).square() * draws / (p * (1 - p))).sum().item()

    exact = values[1:-1] / max_value
    limit = stats.chi2.isf(1e-5, max_value - 1)
    assert statistic(exact) < limit
    # neighbours do not depend on each other
    z = (x[:, 1:-1] - exact) / (exact * (1 - exact)).sqrt()
    products = (z[:, 1:] * z[:, :-1]).flatten()
    assert abs(products.mean() / products.std()) * math.sqrt(len(products)) < stats.norm.isf(5e-6)
    # power: without the bytes that are drawn again, the probability would be a little lower
    if max_value >= 100:
        assert statistic(exact * (256 // max_value * max_value) / 256) > limit


def test_evaluation_does_not_disturb_the_global_random_state(digits):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(digits.test.fixed("binary", 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_moments_are_of_the_training_split_alone(tmp_path):
    values = np.random.default_rng(0).normal([5, -3, 7], [1, 100, 0], (2000, 3))
    splits = load_data(save(tmp_path, values))
    mean, std = moments(splits.train, "real")
    rows = values[splits.train.rows.numpy()].astype(np.float32).astype(float)
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std.numpy()[:2], rows.std(0)[:2], rtol=1e-4)
    assert std[2] == 1, "a constant column has no scale of its own"


def test_moments_far_from_zero(tmp_path):
    """A spread that is small beside the mean is a spread all the same."""
    random = np.random.default_rng(0)
    values = np.stack([1e6 + 5 * random.standard_normal(3000), np.full(3000, 1e6)], 1)
    splits = load_data(save(tmp_path, values))
    _, std = moments(splits.train, "real")
    assert std[0].item() == pytest.approx(5, rel=0.1)
    assert std[1] == 1


@pytest.mark.parametrize("units", ["unit", "count", "real"])
def test_units_and_back(units, digits):
    values = digits.train.values[:20]
    x = digits.spec.to_units(values, units)
    torch.testing.assert_close(digits.spec.from_units(x, units), values.float())


def test_rows_for_a_trained_model(tmp_path, digits):
    values = digits.train.values[:7].numpy()
    config = DataConfig(save(tmp_path, values))
    foreign = load_foreign(config, digits.spec, "count")
    assert [len(s) for s in (foreign.train, foreign.validation, foreign.test)] == [0, 0, 7]
    assert foreign.spec == digits.spec
    for broken in (values + 10, values + 0.5, values[:, :, :5], -1.0 * values):
        config = DataConfig(save(tmp_path, broken))
        with pytest.raises(InputError, match="the model expects integers from 0 to 16 of shape"):
            load_foreign(config, digits.spec, "count")
    assert (
        len(load_foreign(DataConfig(save(tmp_path, values - 3.5)), digits.spec, "real").test) == 7
    )


def test_moments_of_images_have_one_scale(digits):
    mean, std = moments(digits.train, "count")
    rows = digits.train.values[digits.train.rows].double()
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert std.shape == ()
    assert std.item() == pytest.approx(rows.std().item(), rel=1e-3)


def test_fingerprint_tells_data_apart(tmp_path, digits):
    assert load_data("digits").fingerprint == digits.fingerprint
    values = np.random.default_rng(0).random((20, 4))
    first = load_data(save(tmp_path, values)).fingerprint
    values[13, 2] += 1e-3
    assert load_data(save(tmp_path, values)).fingerprint != first
