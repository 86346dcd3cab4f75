"""Tables with columns of every kind, whose generating process is known."""

from __future__ import annotations

import numpy as np
import torch

import pyro_vae
from pyro_vae.config.columns import ColumnKind
from pyro_vae.data.splits import DataSpec, Split, Splits

# Interleaved: columns of one kind are not neighbours.
KINDS = (
    ColumnKind("gaussian"),
    ColumnKind("categorical", ("a", "b", "c", "d")),
    ColumnKind("negative-binomial"),
    ColumnKind("bernoulli", ("no", "yes")),
    ColumnKind("log-normal"),
    ColumnKind("categorical", ("u", "v", "w")),
    ColumnKind("student-t"),
    ColumnKind("poisson"),
    ColumnKind("ordinal", ("1", "2", "3", "4", "5")),
    ColumnKind("gaussian"),
    ColumnKind("zero-inflated-poisson"),
    ColumnKind("zero-inflated-negative-binomial"),
)
NAMES = tuple(f"{kind.name} {j}" for j, kind in enumerate(KINDS))


def spec_of(kinds: tuple[ColumnKind, ...] = KINDS, missing: bool = False) -> DataSpec:
    names = tuple(f"{kind.name} {j}" for j, kind in enumerate(kinds))
    return DataSpec((len(kinds),), None, False, columns=names, kinds=kinds, missing=missing)


def values(count: int, seed: int = 0) -> np.ndarray:
    """(count, 12) draws: z ~ N(0, I) of two latents, then each column by its kind given z."""
    random = np.random.default_rng(seed)
    z = random.standard_normal((count, 2))
    a, b = z.T

    def categories(*logits: np.ndarray) -> np.ndarray:
        return (np.stack(logits, 1) + random.gumbel(size=(count, len(logits)))).argmax(1)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def negative_binomial(mean: np.ndarray, r: float) -> np.ndarray:
        return random.negative_binomial(r, r / (r + mean))

    columns = [
        170 + 8 * a + 4 * random.standard_normal(count),
        categories(a, b, -a - b, 0 * a),
        negative_binomial(np.exp(1.2 + 0.4 * b), 1.5),
        random.random(count) < sigmoid(1.5 * a),
        np.exp(9 + 0.5 * b + 0.7 * random.standard_normal(count)),
        categories(1.5 * b, 0 * b, -b + 0.5),
        2 * b + random.standard_t(3.0, count),
        random.poisson(np.exp(1.0 + 0.4 * a)),
        random.binomial(4, sigmoid(1.2 * b)),
        -3 + 0.5 * a + 0.5 * b + 0.3 * random.standard_normal(count),
        np.where(random.random(count) < 0.4, 0, random.poisson(np.exp(1.3 + 0.3 * b))),
        np.where(random.random(count) < 0.3, 0, negative_binomial(np.exp(1.5 + 0.3 * a), 3.0)),
    ]
    return np.column_stack(columns).astype(np.float64)


def splits_of(
    x: np.ndarray, kinds: tuple[ColumnKind, ...] = KINDS, missing: bool = False
) -> Splits:
    """x as training, validation and test rows, 80, 10 and 10%. NaN may mark missing values."""
    spec, rows = spec_of(kinds, missing), torch.from_numpy(x.astype(np.float32))
    first, second = int(0.8 * len(x)), int(0.9 * len(x))
    train, validation, test = (
        Split(rows, torch.arange(*part), spec)
        for part in ((0, first), (first, second), (second, len(x)))
    )
    range_ = float(np.nanmin(x)), float(np.nanmax(x))
    return Splits("mixed", train, validation, test, spec, "columns", (), *range_, False, "digest")


def small_vae(splits: Splits, **settings: object) -> pyro_vae.VAE:
    """A small untrained model for these rows."""
    config = {"likelihood": "columns", "latent_dim": 2, "hidden": (16,), **settings}
    return pyro_vae.build(pyro_vae.ModelConfig(**config), splits)
