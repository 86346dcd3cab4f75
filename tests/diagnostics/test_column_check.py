"""Distributions of columns in data and in draws: distances, true kinds pass, wrong ones fail."""

from __future__ import annotations

import mixed_tables
import numpy as np
import pytest
import torch
from mixed_tables import KINDS, small_vae, splits_of
from scipy import stats

import pyro_vae
from pyro_vae.config.columns import ColumnKind
from pyro_vae.diagnostics.columns import ColumnCheck, _distances, about_columns, check_columns
from pyro_vae.diagnostics.predictive import predictive_check
from pyro_vae.diagnostics.rows import columns_study

GAUSSIAN, POISSON = ColumnKind("gaussian"), ColumnKind("poisson")


def test_distances_are_those_of_kolmogorov_and_smirnov():
    """Ties included, on either side of a step."""
    random = np.random.default_rng(0)
    for sets in (random.standard_normal((4, 30)), random.poisson(2.0, (4, 30)) * 1.0):
        found = _distances(torch.from_numpy(sets), GAUSSIAN)
        pooled = sets[1:].flatten()
        expected = [stats.ks_2samp(row, pooled).statistic for row in sets]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_distances_of_categories_are_of_their_shares():
    kind = ColumnKind("categorical", ("a", "b", "c"))
    sets = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 1, 2]]).double()
    # pooled shares of the last two: 3/8, 3/8, 2/8
    np.testing.assert_allclose(_distances(sets, kind), [5 / 8, 1 / 8, 1 / 8])


def test_excess_p_values_and_verdicts():
    random = np.random.default_rng(0)
    chance = 0.05 + 0.01 * random.standard_normal((99, 2))
    both = (np.zeros((5, 2)),) * 2
    for far, verdict in ((0.06, "sound"), (0.11, "doubtful"), (0.4, "wrong")):
        check = ColumnCheck(("a", "b"), (GAUSSIAN,) * 2, np.array([0.05, far]), chance, *both)
        assert check.excess == pytest.approx([0, far - 0.05], abs=0.005)
        assert 0.2 < check.p_values[0] < 0.8
        finding = about_columns(check)
        assert finding.subject == "b"
        assert finding.verdict == verdict
    assert check.p_values[1] == 0.01


def trained(
    kinds: tuple[ColumnKind, ...], columns: list[int], rows: int, epochs: int
) -> tuple[pyro_vae.VAE, torch.Tensor]:
    """A model of some columns with these kinds, and 1,000 rows that it has not seen."""
    vae = small_vae(splits_of(mixed_tables.values(rows)[:, columns], kinds), hidden=(32,))
    held_out = mixed_tables.values(1000, seed=9)[:, columns]
    config = pyro_vae.FitConfig(epochs=epochs, batch_size=64, learning_rate=5e-3)
    splits = splits_of(mixed_tables.values(rows)[:, columns], kinds)
    pyro_vae.fit(vae, splits, config)
    torch.manual_seed(0)
    return vae, torch.from_numpy(held_out.astype(np.float32))


def compared(columns: list[int], wrong: dict[int, ColumnKind], rows: int, epochs: int) -> None:
    """True kinds are near the data, and planted wrong ones far: none by chance in 200 draws."""
    true = tuple(KINDS[j] for j in columns)
    check = check_columns(*trained(true, columns, rows, epochs))
    assert (check.excess < 0.05).all(), dict(zip(columns, check.excess, strict=True))
    planted = tuple(wrong.get(j, KINDS[j]) for j in columns)
    check = check_columns(*trained(planted, columns, rows, epochs))
    for place, j in enumerate(columns):
        if j in wrong:
            assert check.excess[place] > 0.04, KINDS[j]
            assert check.p_values[place] < 0.01, KINDS[j]
        else:
            assert check.excess[place] < 0.05, KINDS[j]
    assert about_columns(check).verdict == "wrong"


def test_true_kinds_pass_and_planted_wrong_kinds_fail():
    compared([0, 3, 4, 9, 10], {4: GAUSSIAN, 10: POISSON}, 1500, 12)


@pytest.mark.slow
def test_true_kinds_pass_and_planted_wrong_kinds_fail_among_twelve():
    wrong = {j: ColumnKind("ordinal", KINDS[j].categories) for j in (1, 5)}
    wrong |= dict.fromkeys((4, 7, 8), GAUSSIAN) | dict.fromkeys((2, 10, 11), POISSON)
    compared(list(range(12)), wrong, 3000, 25)


def test_predictive_statistics_of_columns():
    splits = splits_of(mixed_tables.values(200))
    vae = small_vae(splits)
    x = next(splits.test.fixed("real", 0, 20))
    torch.manual_seed(0)
    check = predictive_check(vae, x, num_draws=10)
    assert check.names[0] == "log p(x|z)"
    assert len(check.names) == 13
    j = check.names.index("categorical 1 = a")
    np.testing.assert_allclose(check.observed[:, j], (x[:, 1] == 0).double())
    j = check.names.index("log-normal 4")
    assert np.abs(check.observed[:, j]).max() < 5  # standardized logarithms
    assert np.isfinite(check.effects).all()


def test_the_study_names_each_column():
    splits = splits_of(mixed_tables.values(300))
    torch.manual_seed(0)
    study = columns_study(small_vae(splits), next(splits.test.fixed("real", 0)))
    assert set(study.details["columns"]) == set(mixed_tables.NAMES)
    assert study.details["columns"]["poisson 7"]["kind"] == "poisson"
    assert len(study.figures["columns"].axes) == 12
    with pytest.raises(ValueError, match="a kind for each column"):
        check_columns(
            pyro_vae.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0), torch.ones(3, 2)
        )
