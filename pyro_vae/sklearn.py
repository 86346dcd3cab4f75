"""A variational autoencoder as a scikit-learn estimator.

    from pyro_vae.sklearn import VAE

    codes = VAE(latent_dim=10, random_state=0).fit_transform(X)

`transform` returns posterior means, `score_samples` estimates log p(x) by importance sampling, and
`sample` draws from the model. `vae_` is the trained `pyro_vae.VAE`, for all other functions of this
package. Codes and scores are computed in float64 and, where they are random, row by row: those of a
row do not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from .config import FitConfig, ModelConfig
from .config.families import Guide, Prior
from .data.loading import load_data
from .evidence.importance import importance_sample
from .models.build import build
from .runtime.randomness import random_states
from .training.loop import iterate

# Training, validation and test rows need one each.
MIN_ROWS = 3


class VAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    """Variational autoencoder: p(z) p(x|z) with the amortized posterior q(z|x).

    Args:
        latent_dim: number of latents, the features of `transform`.
        hidden: sizes of the encoder's hidden layers; the decoder reverses them.
        activation: name of an activation in `torch.nn`.
        likelihood: p(x|z), see `ModelConfig`; "auto" follows the data.
        guide: family of q(z|x), see `ModelConfig`.
        prior: family of p(z), see `ModelConfig`.
        objective: what the training maximizes, see `FitConfig`.
        num_particles: number of draws of z per row and step.
        epochs: number of passes over the rows; None for about 2500 steps.
        batch_size: number of rows per step, at most.
        learning_rate: maximum learning rate of Adam.
        patience: stop after this number of epochs without a better validation ELBO.
        validation_fraction: part of the rows that are held out in `fit`, on which the best epoch is
            chosen.
        num_samples: importance samples of z for each row in `score_samples`.
        random_state: seed of the weights, the training and all draws; None for a new one in each
            `fit`.

    Attributes:
        vae_: the trained model, of the best epoch.
        history_: training and validation ELBO of each epoch, nats per row.
        seed_: the seed that was used.
        n_features_in_, feature_names_in_: of the rows in `fit`.
    """

    def __init__(
        self,
        latent_dim: int = 2,
        *,
        hidden: tuple[int, ...] = (512, 256),
        activation: str = "SiLU",
        likelihood: str = "auto",
        guide: str | Guide = "diagonal",
        prior: str | Prior = "normal",
        objective: str = "trace",
        num_particles: int = 1,
        epochs: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        patience: int | None = None,
        validation_fraction: float = 0.1,
        num_samples: int = 500,
        random_state: Any = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.activation = activation
        self.likelihood = likelihood
        self.guide = guide
        self.prior = prior
        self.objective = objective
        self.num_particles = num_particles
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.num_samples = num_samples
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> VAE:
        """Train the model on rows X (N, D). Labels y are ignored.

        Raises:
            InputError: a ValueError: a parameter or the data are out of range.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=MIN_ROWS)
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction expects a number between 0 and 1; got "
                f"{self.validation_fraction}"
            )
        held_out = min(len(X) - 2, max(1, round(self.validation_fraction * len(X))))
        model, config = self._settings(len(X) - held_out)
        splits = load_data(X, self.seed_, test_size=1, validation_size=held_out)
        # The caller has the test rows: the one that `load_data` needs is trained on.
        rows = torch.cat([splits.train.rows, splits.test.rows]).sort().values
        splits = dataclasses.replace(splits, train=dataclasses.replace(splits.train, rows=rows))
        vae: Any = build(model, splits, self.seed_)
        best: dict[str, Tensor] = {}
        self.history_ = []
        for record in iterate(vae, splits, config, self.seed_):
            if record.is_best:
                best = {name: value.clone() for name, value in vae.state_dict().items()}
            self.history_.append((record.train_elbo, record.validation_elbo))
        vae.load_state_dict(best)
        self.vae_ = vae.double().eval()
        self._n_features_out = self.latent_dim
        return self

    def _settings(self, num_rows: int) -> tuple[ModelConfig, FitConfig]:
        """The parameters as settings of the package, which check them."""
        params = self.get_params(deep=False)
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        model = {**{n: v for n, v in params.items() if n in names}, "hidden": tuple(self.hidden)}
        names = {field.name for field in dataclasses.fields(FitConfig)}
        config = FitConfig(**{n: v for n, v in params.items() if n in names})
        size = min(config.batch_size, num_rows)
        return ModelConfig(**model), dataclasses.replace(config, batch_size=size)

    def transform(self, X: Any) -> np.ndarray:
        """Posterior means E_q[z|x], (N, latent_dim)."""
        x = self._rows(X)
        with torch.no_grad():
            return self.vae_.posterior(x).mean.numpy()

    def inverse_transform(self, Z: Any) -> np.ndarray:
        """Means of p(x|z), (N, D), of latents Z (N, latent_dim), in the units of the data."""
        check_is_fitted(self)
        Z = check_array(Z, dtype=np.float64)
        if Z.shape[1] != self.latent_dim:
            raise ValueError(f"Z expects {self.latent_dim} latents; got {Z.shape[1]} columns")
        with torch.no_grad():
            return self._values(
                self.vae_.likelihood(torch.from_numpy(np.ascontiguousarray(Z))).mean
            )

    def score_samples(self, X: Any) -> np.ndarray:
        """Estimates of log p(x), (N,), nats, by `num_samples` draws of z for each row.

        In the likelihood's units, see `ModelConfig`. Every row uses the same seed.

        Raises:
            ValueError: a row is outside the support of the likelihood.
        """
        found = []
        for x in self._rows(X).split(1):
            with random_states(x.device, self.seed_):
                found.append(importance_sample(self.vae_, x, self.num_samples, mode="eager"))
        return torch.cat([evidence.log_evidence for evidence in found]).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log p(x), nats per row. Labels y are ignored."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draws from the model: x ~ p(x|z), z ~ p(z); (n_samples, D), in the units of the data.

        `random_state`: a seed or generator; None for the seed of `fit`.
        """
        from .plots.from_model import generate_images

        check_is_fitted(self)
        seed = (
            self.seed_
            if random_state is None
            else check_random_state(random_state).randint(2**31 - 1)
        )
        with torch.no_grad(), random_states(torch.device("cpu"), seed):
            return self._values(generate_images(self.vae_, n_samples, draw=True)[0])

    def _rows(self, X: Any) -> Tensor:
        """Rows X as x, in float64. Where grey values are binarized, each row has the same draws."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        likelihood, values = self.vae_.likelihood_module, torch.from_numpy(np.array(X))
        spec, units = likelihood.spec, likelihood.units
        if not spec.binarizes(units):
            return spec.to_units(values, units).double()
        generators = (torch.Generator().manual_seed(self.seed_) for _ in values)
        rows = [
            spec.to_units(row, units, generator)
            for row, generator in zip(values.split(1), generators, strict=True)
        ]
        return torch.cat(rows).double()

    def _values(self, x: Tensor) -> np.ndarray:
        likelihood = self.vae_.likelihood_module
        return likelihood.spec.from_units(x, likelihood.units).numpy()
