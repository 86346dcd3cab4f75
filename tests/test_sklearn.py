"""The scikit-learn estimator: its contract, and its numbers against exact answers."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from pyro_vae.sklearn import VAE

SMALL = {"hidden": (8,), "epochs": 2, "num_samples": 5}
RANDOM = np.random.default_rng(0)


def rows(count: int = 60, width: int = 4) -> np.ndarray:
    return RANDOM.normal(size=(count, 2)) @ RANDOM.normal(size=(2, width)) + RANDOM.normal(
        size=(count, width)
    )


def test_the_contract_of_scikit_learn():
    found = check_estimator(VAE(**SMALL), on_fail=None, on_skip=None)
    assert [r["check_name"] for r in found if r["status"] == "failed"] == []
    # It needs an environment variable that must be set before scipy is imported.
    skipped = {r["check_name"] for r in found if r["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}
    assert len(found) > 40


def test_scores_are_exact_where_the_posterior_is():
    """A model without latents' influence is a Gaussian with independent columns."""
    X = RANDOM.normal(size=(200, 3)) * [1, 2, 5] + [0, 1, -4]
    vae = VAE(hidden=(), epochs=1, num_samples=50, random_state=0).fit(X)
    with torch.no_grad():
        vae.vae_.decoder.layers[-1].weight.zero_()
        for parameter in vae.vae_.encoder.parameters():
            parameter.zero_()  # q(z|x) = p(z)
    x = torch.from_numpy(X)
    p = vae.vae_.likelihood(torch.zeros(2, dtype=torch.float64))
    np.testing.assert_allclose(vae.score_samples(X), p.log_prob(x).detach(), rtol=1e-6)
    assert vae.score(X) == pytest.approx(vae.score_samples(X).mean())
    np.testing.assert_allclose(vae.transform(X), 0)


def test_values_are_those_of_the_data():
    """Counts stay counts, and means are in the units of X."""
    X = load_digits().data[:200]
    vae = VAE(**SMALL, random_state=0).fit(X)
    draws = vae.sample(30, random_state=1)
    assert draws.shape == (30, 64)
    assert set(np.unique(draws)) <= set(range(17))
    np.testing.assert_array_equal(draws, vae.sample(30, random_state=1))
    assert (draws != vae.sample(30, random_state=2)).any()
    means = vae.inverse_transform(vae.transform(X))
    assert abs(means.mean() - X.mean()) < 1
    wide = VAE(**SMALL, random_state=0).fit(rows() * 1e3 + 1e7)
    assert abs(wide.sample(50).mean() - 1e7) < 1e4


def test_a_row_has_the_same_score_alone_and_among_others():
    X = RANDOM.uniform(size=(40, 6))
    vae = VAE(**SMALL, likelihood="bernoulli", random_state=0).fit(X)
    scores = vae.score_samples(X)
    np.testing.assert_allclose(vae.score_samples(X[::-1])[::-1], scores, rtol=1e-9)
    np.testing.assert_allclose(vae.score_samples(X[7:8]), scores[7:8], rtol=1e-9)


def test_the_best_epoch_is_kept():
    vae = VAE(hidden=(32,), epochs=8, learning_rate=0.3, random_state=0).fit(rows(80))
    best = max(elbo for _, elbo in vae.history_)
    assert best > vae.history_[-1][1]  # the rate is too high to end at the best


def test_pipelines_searches_and_frames():
    X, y = load_digits(return_X_y=True)
    X, y = X[:300], y[:300]
    pipe = make_pipeline(
        VAE(hidden=(32,), epochs=15, random_state=0).set_output(transform="pandas"),
        StandardScaler(),
        LogisticRegression(),
    )
    search = GridSearchCV(pipe, {"vae__latent_dim": [1, 8]}, cv=2).fit(X, y)
    assert search.best_params_ == {"vae__latent_dim": 8}
    frame = pd.DataFrame(X[:50], columns=[f"pixel {i}" for i in range(64)])
    vae = VAE(3, **SMALL, random_state=0).set_output(transform="pandas").fit(frame)
    assert list(vae.transform(frame).columns) == ["vae0", "vae1", "vae2"]
    assert list(vae.feature_names_in_) == list(frame.columns)


def test_copies_and_seeds():
    X = rows()
    vae = VAE(**SMALL, random_state=3).fit(X)
    again = clone(vae).fit(X)
    np.testing.assert_array_equal(vae.transform(X), again.transform(X))
    restored = pickle.loads(pickle.dumps(vae))
    np.testing.assert_array_equal(vae.score_samples(X), restored.score_samples(X))
    state = torch.get_rng_state()
    vae.fit(X).sample(3)
    assert torch.equal(state, torch.get_rng_state())
    assert VAE(**SMALL).fit(X).seed_ != VAE(**SMALL).fit(X).seed_


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"latent_dim": 0}, "latent-dim"),
        ({"validation_fraction": 1.5}, "validation_fraction expects a number between 0 and 1"),
        ({"likelihood": "bernoulli"}, "bernoulli expects"),
        ({"guide": "round"}, "expects one of diagonal, full"),
        ({"objective": "elbo"}, "objective"),
    ],
)
def test_wrong_parameters_say_what_is_expected(params, message):
    with pytest.raises(ValueError, match=message):
        VAE(**{**SMALL, **params}).fit(rows())


def test_wrong_latents_and_rows():
    vae = VAE(**SMALL, random_state=0).fit(rows())
    with pytest.raises(ValueError, match="expects 2 latents; got 3"):
        vae.inverse_transform(np.zeros((4, 3)))
    counts = VAE(**SMALL, random_state=0).fit(load_digits().data[:50])
    with pytest.raises(ValueError, match="support"):
        counts.score_samples(np.full((1, 64), 99.0))
