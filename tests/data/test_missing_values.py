"""NaN in arrays and blanks in tables: read, refused or modelled, counted and described."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from masked import missing_splits, missing_values

import pyro_vae
from pyro_vae import DataConfig, InputError, load_data
from pyro_vae.data.loading import load_foreign
from pyro_vae.data.missing import MARKS, hidden_at_random
from pyro_vae.data.splits import moments

NAN = float("nan")
TABLE = np.array([[1, NAN, 7.5], [NAN, 3, 8], [2, 4, NAN], [5, 6, 9], [3, 1, 2], [4, 2, 1.25]])


def table(tmp_path, text: str):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    return str(path)


def text_of(values: np.ndarray, mark: str = "") -> str:
    lines = [",".join(mark if np.isnan(v) else f"{v:g}" for v in row) for row in values]
    return "\n".join(["a,b,c", *lines, ""])


def stored(splits: pyro_vae.Splits) -> torch.Tensor:
    return splits.train.values


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", sorted(MARKS))
def test_marks_of_a_table(mark, tmp_path):
    splits = load_data(table(tmp_path, text_of(TABLE, mark)), missing="model")
    np.testing.assert_array_equal(stored(splits).numpy(), TABLE.astype(np.float32))
    assert splits.spec.missing
    assert splits.spec.columns == ("a", "b", "c")
    assert splits.missing == pytest.approx(3 / 18)
    assert splits.describe().endswith("16.7% missing, assumed missing at random")


def frames() -> list:
    columns = {name: TABLE[:, j] for j, name in enumerate("abc")}
    none = {k: [None if np.isnan(v) else v for v in column] for k, column in columns.items()}
    masked = pd.DataFrame(none).astype({"a": "Int64", "b": "Int64", "c": "Float64"})
    return [
        pd.DataFrame(columns),
        pd.DataFrame(none, dtype=object),
        masked,
        pl.DataFrame(none),
        np.ma.masked_invalid(TABLE),
        torch.tensor(TABLE),
        TABLE,
    ]


@pytest.mark.parametrize(
    "data", frames(), ids=lambda d: f"{type(d).__module__[:6]} {type(d).__name__}"
)
def test_objects_in_memory(data):
    splits = load_data(data, missing="model")
    np.testing.assert_array_equal(stored(splits).numpy(), TABLE.astype(np.float32))
    with pytest.raises(InputError, match="--missing model"):
        load_data(data)


def test_text_in_memory_is_no_number():
    frame = pd.DataFrame({"a": ["NA", 2.0, 3.0, 4.0], "b": [1, 2, 3, 4]}, dtype=object)
    with pytest.raises(InputError, match="expected numbers or text in every column"):
        load_data(frame, missing="model")
    frame = pd.DataFrame({"a": ["1", None, "3", "1"], "b": [1, 2, 3, 4]}, dtype=object)
    assert load_data(frame, missing="model").spec.kinds[0].categories == ("1", "3")


def test_integers_with_missing_values_stay_counts():
    values = np.array([[1, 2], [3, NAN], [0, 5], [4, 4], [2, NAN]])
    splits = load_data(values, missing="model")
    assert (splits.spec.discrete, splits.spec.max_value) == (True, 5)
    assert splits.likelihood == "binomial"
    assert stored(splits).isnan().sum() == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text_of(TABLE), r"string '' .* line 2, column 2 \(b\); .*--missing model"),
        (text_of(TABLE, "NA"), r"string 'NA' .* line 2, column 2 \(b\); .*--missing model"),
        (text_of(TABLE, "nan"), "that are NaN.*--missing model"),
        (text_of(TABLE, "?"), r"string '\?'"),
    ],
)
def test_a_table_is_refused_by_default(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_data(table(tmp_path, text))


def test_other_marks_are_no_missing_values(tmp_path):
    with pytest.raises(InputError, match=r"string '\?' .* line 2"):
        load_data(table(tmp_path, text_of(TABLE, "?")), missing="model")


def test_a_first_row_with_a_mark_is_no_line_of_names(tmp_path):
    lines = text_of(TABLE, "NA").splitlines()[1:]
    splits = load_data(table(tmp_path, "\n".join(lines)), missing="model")
    assert len(stored(splits)) == len(TABLE)
    assert splits.spec.columns == ()


# --- mistakes -------------------------------------------------------------------------------------


def wrong(**changes) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(40, 3))
    for rows, value in changes.values():
        values[rows] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (wrong(row=(slice(3, 5), NAN)), "2 rows without any observed value, the first is row 3"),
        (wrong(column=((slice(None), 1), NAN)), r"column 1 .* no observed value in the training"),
        (wrong(value=((4, 2), np.inf), hole=((0, 0), NAN)), r"1 value .* row 4 at \(2,\)"),
        (wrong(value=((0, 0), -np.inf)), r"1 value .* row 0 at \(0,\)"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(InputError, match=message) as caught:
        load_data(values, missing="model")
    assert "\n" not in str(caught.value)


def test_a_column_that_only_test_rows_hold_is_an_error():
    values = wrong(column=((slice(None), 1), NAN))
    splits = load_data(np.nan_to_num(values))
    values[splits.test.rows, 1] = 1.0
    with pytest.raises(InputError, match="column 1"):
        load_data(values, missing="model")


def test_a_pixel_that_is_never_observed_is_noted():
    images = np.random.default_rng(0).normal(size=(30, 1, 8, 8))
    images[:, 0, 2:4, 0] = NAN
    with pytest.warns(UserWarning, match="2 of 64 pixels of array have no observed value"):
        splits = load_data(images, missing="model")
    mean, std = moments(splits.train, "real")
    rows = stored(splits)[splits.train.rows].double()
    torch.testing.assert_close(mean[0, 2, 0], rows.nanmean(0).nanmean().float())
    assert mean.isfinite().all()
    assert std.isfinite()


def test_channels_of_sequences():
    """Moments are those of the observed values of a channel; one without any is an error."""
    values = np.random.default_rng(0).normal([0, 50], [1, 5], size=(40, 7, 2))
    values[np.random.default_rng(1).random(values.shape) < 0.4] = NAN
    values[:, 3, 1] = NAN
    with pytest.warns(UserWarning, match="1 of 14 steps of array have no observed value"):
        splits = load_data(values, layout="sequences", missing="model")
    mean, std = moments(splits.train, "real")
    rows = stored(splits)[splits.train.rows]
    assert (mean.shape, std.shape) == ((2, 7), (2, 1))
    torch.testing.assert_close(mean[1, 3], rows.nanmean(0)[1].nanmean().float())
    assert 0.8 < std[0, 0] < 1.2
    assert 4 < std[1, 0] < 6
    values[..., 1] = NAN
    with pytest.raises(InputError, match=r"channel 1 .* no observed value in the training rows"):
        load_data(values, layout="sequences", missing="model")


def test_data_without_missing_values_are_noted():
    with pytest.warns(UserWarning, match="no value of array is missing"):
        splits = load_data(wrong(), missing="model")
    assert splits.spec.missing
    assert "missing" not in splits.describe()


def test_constant_columns_are_read():
    values = wrong(column=((slice(None), 1), 2.5), hole=((slice(3), 1), NAN))
    splits = load_data(values, missing="model")
    mean, std = moments(splits.train, "real")
    assert (mean[1], std[1]) == (2.5, 1.0)


# --- range, units, moments ------------------------------------------------------------------------


def test_offset_and_scale_are_those_of_observed_values():
    """A column around 10⁹ that float32 would lose, and an extreme value."""
    random = np.random.default_rng(0)
    values = random.normal([1e9, 0], size=(400, 2))
    gone = random.random((400, 2)) < 0.6
    gone[gone.all(1), 1] = False
    values[gone] = NAN
    splits = load_data(values, missing="model")
    assert splits.spec.offset[0] == pytest.approx(1e9, abs=0.3)
    assert splits.spec.offset[1] == 0.0
    x = next(splits.train.fixed("real", 0, 400))
    back = splits.spec.from_units(x, "real")
    np.testing.assert_allclose(back.numpy(), values[splits.train.rows][:512], atol=1e-6)
    values[5] = [NAN, 1e9]
    with pytest.warns(UserWarning, match="row 5 of array .* column 1"):
        load_data(values, missing="model")


def test_binarization_draws_observed_values_only():
    splits = missing_splits("continuous-bernoulli")
    index = torch.arange(len(splits.train))
    x = splits.train.take(index, "binary")
    values = stored(splits)[splits.train.rows]
    assert torch.equal(x.isnan(), values.isnan())
    assert set(x[~x.isnan()].tolist()) == {0.0, 1.0}
    torch.manual_seed(0)
    mean = torch.stack([splits.train.take(index, "binary") for _ in range(400)]).mean(0)
    off = (mean - values)[~values.isnan()] / 0.5 * 20
    assert off.abs().max() < 5  # a thousand means of 400 draws, none five errors off


def test_range_and_type_ignore_missing_values():
    splits = load_data(missing_values("discretized-logistic"), max_value=255, missing="model")
    assert splits.spec.discrete
    assert splits.likelihood == "discretized-logistic"
    known = missing_values("discretized-logistic")
    assert (splits.low, splits.high) == (np.nanmin(known), np.nanmax(known))


def test_a_large_sample_with_a_rarely_observed_column(monkeypatch):
    """The column has no value in the sample for offset and scale, but in the training rows."""
    monkeypatch.setattr(pyro_vae.data.scan, "SAMPLED_VALUES", 20)
    values = wrong(column=((slice(None), 1), NAN))
    splits = load_data(np.nan_to_num(values))
    values[splits.train.rows[1], 1] = 1e9 + 0.5
    assert load_data(values, missing="model").spec.offset[1] == 1e9 + 0.5


# --- data for a trained model ---------------------------------------------------------------------


def test_other_data_may_lack_values_if_the_training_data_could(tmp_path):
    path = table(tmp_path, text_of(TABLE))
    spec = load_data(path, missing="model").spec
    assert load_data(DataConfig(path), spec=spec).missing == pytest.approx(1 / 6)
    foreign = load_foreign(DataConfig(path), spec, "real")
    assert foreign.missing == pytest.approx(1 / 6)
    plain = load_data(np.nan_to_num(TABLE)).spec
    for load in (
        lambda: load_data(DataConfig(path, missing="model"), spec=plain),
        lambda: load_foreign(DataConfig(path, missing="model"), plain, "real"),
    ):
        with pytest.raises(InputError, match="--missing model"):
            load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # complete rows are no mistake here
        load_data(np.nan_to_num(TABLE), spec=spec)


def test_other_data_are_converted_to_the_range_of_the_training(tmp_path):
    counts = missing_values("discretized-logistic")
    spec = load_data(counts, max_value=255, missing="model").spec
    np.save(tmp_path / "shares.npy", counts / 255)
    config = DataConfig(str(tmp_path / "shares.npy"))
    with pytest.raises(InputError, match="--max-value"):
        load_foreign(config, spec, "count")
    foreign = load_foreign(config, spec, "count", max_value=1)
    np.testing.assert_array_equal(foreign.test.values.numpy(), counts)


def test_other_data_in_another_unit_are_noted(tmp_path):
    values = np.where(np.random.default_rng(0).random((40, 3)) < 0.3, NAN, wrong())
    values[np.isnan(values).all(1)] = 0.0
    splits = load_data(values, missing="model")
    np.save(tmp_path / "far.npy", values * [1, 1e5, 1] + [0, 1e6, 0])
    with pytest.warns(UserWarning, match="column 1 .* are they in the same unit"):
        load_foreign(
            DataConfig(str(tmp_path / "far.npy")),
            splits.spec,
            "real",
            moments=moments(splits.train, "real"),
        )


# --- patterns -------------------------------------------------------------------------------------


def test_simulated_rows_have_the_patterns_of_the_data():
    torch.manual_seed(0)
    rows = torch.tensor([[NAN, 1.0, 2.0], [0.0, NAN, NAN]])
    x = torch.randn(4000, 3)
    out = hidden_at_random(x, rows)
    assert torch.equal(out[~out.isnan()], x[~out.isnan()])
    first = (out.isnan() == rows[0].isnan()).all(1)
    second = (out.isnan() == rows[1].isnan()).all(1)
    assert (first | second).all()
    assert abs(first.double().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    state = torch.get_rng_state()
    assert hidden_at_random(x, rows.nan_to_num()) is x
    assert hidden_at_random(x, None) is x
    assert torch.equal(torch.get_rng_state(), state)
