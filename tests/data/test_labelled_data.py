"""Labels of data: names of classes, rows without a label, and labels hidden from a training."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae
from pyro_vae import InputError
from pyro_vae.data.labels import class_shares, hide_labels, with_classes
from pyro_vae.data.loading import load_foreign

random = np.random.default_rng(0)
X = random.normal(size=(200, 3))
Y = np.array(["cat", "cow", "dog", "eel"])[random.choice(4, 200, p=[0.6, 0.25, 0.1, 0.05])]


def labelled(count, seed=0, y=Y):
    return pyro_vae.load_data((X, y), seed, labelled=count)


def test_as_many_labels_as_asked_in_the_shares_of_the_classes():
    whole = with_classes(pyro_vae.load_data((X, Y)))
    splits = labelled(40)
    kept = splits.train.labels
    assert (kept >= 0).sum() == 40
    assert torch.equal(kept[kept >= 0], whole.train.labels[kept >= 0])  # none has changed
    shares, expected = class_shares(splits.train, 4), class_shares(whole.train, 4)
    assert (shares - expected).abs().max() < 1 / 40
    assert torch.equal(splits.test.labels, whole.test.labels)
    assert torch.equal(splits.validation.labels, whole.validation.labels)
    assert splits.class_names == splits.spec.classes == ("cat", "cow", "dog", "eel")


def test_every_class_has_a_label_and_all_labels_may_be_kept():
    assert (class_shares(labelled(4).train, 4) == 0.25).all()
    known = len(labelled(4).train)
    assert (labelled(known).train.labels >= 0).all()
    for count in range(4, 60):
        assert (labelled(count).train.labels >= 0).sum() == count


def test_the_rows_are_drawn_by_the_seed():
    """And spread over the file, not its first rows."""
    splits = pyro_vae.load_data((X, Y), 0)
    first, again, other = (
        hide_labels(with_classes(splits), 40, seed).train.labels >= 0 for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 40 < first.nonzero().float().mean() < 120


def test_hidden_labels_leave_no_trace():
    """Permuting the labels of the hidden rows changes no tensor that a training sees."""
    splits = with_classes(pyro_vae.load_data((X, Y)))
    hidden = hide_labels(splits, 40, seed=5)
    where = (hidden.train.labels < 0).nonzero().flatten()
    changed = splits.train.labels.clone()
    changed[where] = changed[where.roll(17)]
    assert not torch.equal(changed, splits.train.labels)
    kept = torch.where(hidden.train.labels < 0, -1, changed)
    assert torch.equal(kept, hidden.train.labels)
    assert hidden.whole().labels[hidden.train.rows][where].eq(-1).all()


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, "expects 4, the number of classes, to"), (10**6, "the number of training rows with")],
)
def test_too_few_or_too_many_labels(count, expected):
    with pytest.raises(InputError, match=expected):
        labelled(count)


def test_empty_cells_and_nan_are_no_label(tmp_path):
    blank = random.random(200) < 0.3
    numbers = np.where(blank, np.nan, random.integers(0, 12, 200))
    frame = pd.DataFrame(X, columns=list("abc"))
    path = tmp_path / "table.csv"
    frame.assign(label=numbers).to_csv(path, index=False)
    sources = [
        (X, np.where(blank, "", Y)),
        (X, np.where(blank, " ", Y)),
        frame.assign(label=numbers),
        frame.assign(label=[None if hole else name for hole, name in zip(blank, Y, strict=True)]),
        str(path),
    ]
    for source in sources:
        splits = pyro_vae.load_data(source)
        assert torch.equal(splits.whole().labels < 0, torch.tensor(blank))
        assert "" not in splits.class_names
    assert splits.class_names[-2:] == ("10", "11")  # by number, also beside empty cells
    assert pyro_vae.load_data((X, np.full(200, ""))).train.labels is None


def test_labels_of_integers_are_all_classes():
    """Also -1, which some use for rows without a label and others for a class."""
    splits = pyro_vae.load_data((X, np.where(Y == "cat", 1, -1)))
    assert splits.class_names == ("-1", "1")
    assert (splits.train.labels >= 0).all()


def test_other_data_are_matched_by_the_names_of_their_classes(tmp_path):
    splits = with_classes(pyro_vae.load_data((X, Y)))
    for name, y in [("same", Y), ("fewer", np.where(Y == "cat", "eel", Y))]:
        path = tmp_path / f"{name}.csv"
        frame = pd.DataFrame(X, columns=list("abc")).assign(label=y)
        frame.iloc[::-1].to_csv(path, index=False)
        other = load_foreign(pyro_vae.DataConfig(str(path)), splits.spec, "real")
        assert other.class_names == splits.class_names
        names = np.array(other.class_names)[other.test.labels.numpy()]
        assert (names == y[::-1]).all()


def test_a_class_that_the_model_does_not_know_is_an_error():
    splits = with_classes(pyro_vae.load_data((X, Y)))
    with pytest.raises(InputError, match=r"knows the classes cat, cow, dog, eel; .* also has ant"):
        pyro_vae.load_data((X, np.where(Y == "cow", "ant", Y)), spec=splits.spec)
    plain = pyro_vae.load_data((X, Y))  # a model without labels knows no classes
    assert pyro_vae.load_data((X, np.where(Y == "cow", "ant", Y)), spec=plain.spec).class_names


def test_the_fingerprint_is_that_of_values_and_labels():
    plain = pyro_vae.load_data((X, Y))
    splits = with_classes(plain)
    assert splits.fingerprint != plain.fingerprint
    assert with_classes(splits) is splits
    assert pyro_vae.load_data((X, Y), spec=splits.spec).fingerprint == splits.fingerprint
    assert labelled(40).fingerprint == splits.fingerprint
    swapped = Y.copy()
    i, j = np.flatnonzero(Y == "cat")[0], np.flatnonzero(Y == "dog")[0]
    swapped[[i, j]] = swapped[[j, i]]
    other = pyro_vae.load_data((X, swapped), spec=splits.spec)
    assert other.fingerprint != splits.fingerprint
    assert pyro_vae.load_data((X, swapped)).fingerprint == plain.fingerprint


def test_new_models_need_labels_of_at_least_two_classes_in_training():
    for source, expected in [
        (X, "has none"),
        ((X, np.full(200, "a")), "at least two classes"),
    ]:
        with pytest.raises(InputError, match=expected):
            with_classes(pyro_vae.load_data(source))
    splits = pyro_vae.load_data((X, Y))
    rare = Y.copy()
    rare[splits.test.rows[0]] = "yak"
    with pytest.raises(InputError, match="has none of yak"):
        with_classes(pyro_vae.load_data((X, rare)))


def test_rows_and_labels_stay_together():
    splits = pyro_vae.load_data((np.arange(1200.0)[:, None], np.arange(1200) // 100))
    rows = list(splits.test.fixed_with_labels("real", 0))
    assert len(rows) > 0
    for x, y in splits.train.fixed_with_labels("real", 0, 700):
        whole = splits.spec.from_units(x, "real")
        assert torch.equal((whole.flatten() / 100).floor().long(), y)
    assert sum(len(x) for x, _ in splits.train.fixed_with_labels("real", 0, 700)) == 700
