"""The rows with the worst posterior are named by their numbers in the data, and no others."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from pyro_vae.data.splits import DataSpec, Split
from pyro_vae.diagnostics import suite
from pyro_vae.diagnostics.rows import MOST_ROWS, worst_rows
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.plots import posterior as figures

EFFORT = dataclasses.replace(
    suite.QUICK, importance_samples=400, refined=24, refine_steps=60, held_out=24
)
BAD = (107, 131, 140)  # numbers in the data, of the rows for which the guide is wrong


class WrongForSome(LinearGaussian):
    """An exact guide but for rows whose first column is above 50: far too narrow, and shifted.

    The first column carries no information on z.
    """

    def posterior(self, x):
        q = super().posterior(x)
        bad = (x[..., :1] > 50).to(x.dtype)
        scale = q.scale_tril * (1 - 0.7 * bad).unsqueeze(-1)
        return type(q)(q.mean + 2 * bad * q.stddev, scale_tril=scale)


@pytest.fixture(scope="module")
def planted():
    """A model, and data of 150 rows: rows 100 … 149 are the test split."""
    torch.manual_seed(0)
    weight = torch.cat([torch.zeros(1, 2), torch.randn(4, 2)])
    vae = WrongForSome(weight, torch.zeros(5), 1.0)
    values = vae.likelihood(vae.prior().sample((150,))).sample().detach()
    values[list(BAD), 0] = 60.0
    spec = DataSpec((5,), None, discrete=False)
    return vae, Split(values, torch.arange(100, 150), spec)


def test_the_planted_rows_are_named_and_no_others(planted):
    vae, split = planted
    numbers = suite.random_numbers(split, 50, 3)
    held_out = suite.random_rows(split, "real", 50, 3)
    assert torch.equal(split.values[numbers], held_out)
    assert numbers.tolist() != sorted(numbers.tolist()), "not the positions in the sample"
    effort = dataclasses.replace(EFFORT, refined=50)
    torch.manual_seed(1)
    weights = suite._weights(vae, held_out, effort, id)
    fitted = suite._gaps(vae, held_out, effort, id)
    study = worst_rows(vae, held_out, numbers, weights.rows | fitted.rows, effort)
    worst = study.details["worst_rows"]
    assert {line["row"] for line in worst} == set(BAD)
    assert all(line["split"] == "test" for line in worst)
    assert all(line["amortization_gap"] > 1 for line in worst)
    # log p(x) is that of the row itself, which the guide does not enter
    exact = vae.exact_log_evidence(split.values).tolist()
    for line in worst:
        assert line["log_evidence"] == pytest.approx(exact[line["row"]], abs=0.3)
    labels = [text.get_text() for text in study.figures["worst_rows"].axes[0].get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == [f"row {line['row']}" for line in worst]


def known(k, gap, log_evidence=None):
    rows = {"k": np.array(k, float), "log_evidence": -np.arange(len(k)) - 100.0}
    return rows | {"gap": np.array(gap, float), "refined_log_evidence": -np.arange(len(gap)) - 5.0}


def named(vae, rows, count):
    study = worst_rows(vae, torch.randn(count, 5), torch.arange(count) + 70, rows, EFFORT)
    return study.details["worst_rows"], study.figures


def test_the_worst_by_each_size(planted):
    """Above the limit of k for 400 draws, 0.616, or a gap above one nat; each list for itself."""
    vae, _ = planted
    k = [0.61, 0.62, math.nan, 3.0, -math.inf, math.inf, 0.1]
    worst, _ = named(vae, known(k, [5.0, 0.9, math.nan, 1.1]), 7)
    by = {line["row"]: line["worst_by"] for line in worst}
    assert by == {
        72: ["pareto_k"],
        75: ["pareto_k"],
        73: ["pareto_k", "amortization_gap"],
        71: ["pareto_k"],
        70: ["amortization_gap"],
    }
    assert [line["row"] for line in worst] == [72, 75, 73, 71, 70], "the worst k first"
    lines = {line["row"]: line for line in worst}
    assert lines[70]["log_evidence"] == -5.0, "of the refined posterior"
    assert lines[75]["log_evidence"] == -105.0
    assert math.isnan(lines[75]["amortization_gap"])


def test_no_row_is_named_if_all_are_fine(planted):
    worst, drawn = named(planted[0], known([0.1, 0.2, -math.inf], [0.3, -0.1]), 3)
    assert (worst, drawn) == ([], {})


def test_at_most_eight_of_each(planted):
    k, gap = 1 + np.arange(30) / 10, 10 - np.arange(20) / 10
    worst, _ = named(planted[0], known(k, gap), 30)
    by_k = [line["row"] for line in worst if "pareto_k" in line["worst_by"]]
    by_gap = [line["row"] for line in worst if "amortization_gap" in line["worst_by"]]
    assert by_k == list(range(99, 91, -1))
    assert sorted(by_gap) == list(range(70, 78))
    assert len(by_k) == len(by_gap) == MOST_ROWS


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9), (5,), (1,)])
def test_rows_stand_beside_their_reconstructions(shape, tmp_path):
    values = np.random.default_rng(0).random((3, *shape))
    figure = figures.worst_rows(values, values, [5, 7, 9], np.array([1.5, math.inf, 2]), np.ones(3))
    figure.savefig(tmp_path / "rows.png")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [
        "row 5\nk = 1.50, gap 1.0",
        "row 7\nk = inf, gap 1.0",
        "row 9\nk = 2.00, gap 1.0",
    ]
    unknown = figures.worst_rows(values[:1], values[:1], [5], np.array([1.5]), np.array([math.nan]))
    assert unknown.axes[0].get_yticklabels()[0].get_text() == "row 5\nk = 1.50"


def test_the_original_is_on_the_left():
    """White originals, black reconstructions."""
    white, black = np.ones((2, 1, 4, 4)), np.zeros((2, 1, 4, 4))
    figure = figures.worst_rows(white, black, [1, 2], np.ones(2), np.ones(2))
    sheet = np.asarray(figure.axes[0].images[0].get_array())
    assert np.nanmean(sheet[:, :4]) == 1
    assert np.nanmean(sheet[:, -4:]) == 0
