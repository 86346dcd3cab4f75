"""Held-out log p(x) of a VAE on real mixed tables, against independent columns and a copula.

    python tests/benchmarks/mixed_table.py [diabetes wine titanic]

diabetes, wine   scikit-learn's tables in their own units; sex and cultivar are categories
titanic          class, age, sex and survival of 2,201 people, from the report of the British Board
                 of Trade (Dawson 1995, doi 10.1080/10691898.1995.11910499)

All three see the same rows: training, and validation to choose an epoch (VAE) or added to the
training (the others). Nats per row of test rows; the error is over rows.

    independent    each column by its kind, fitted by maximum likelihood
    copula         a Gaussian copula of these columns: correlations of the normal scores of real
                   columns, and a probit regression on them for a column of two values. A column of
                   more values has no place in it: for these, an own copula for each category
    saturated      for tables of categories: a probability for each combination of them
    VAE            pyro_vae, log p(x) from 5,000 importance samples
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pandas
import torch
from scipy import optimize, stats
from sklearn import datasets

import pyro_vae

SEEDS = (0, 1, 2)
# Class, age, sex → died, survived
TITANIC = {
    ("first", "adult", "male"): (118, 57),
    ("first", "child", "male"): (0, 5),
    ("first", "adult", "female"): (4, 140),
    ("first", "child", "female"): (0, 1),
    ("second", "adult", "male"): (154, 14),
    ("second", "child", "male"): (0, 11),
    ("second", "adult", "female"): (13, 80),
    ("second", "child", "female"): (0, 13),
    ("third", "adult", "male"): (387, 75),
    ("third", "child", "male"): (35, 13),
    ("third", "adult", "female"): (89, 76),
    ("third", "child", "female"): (17, 14),
    ("crew", "adult", "male"): (670, 192),
    ("crew", "adult", "female"): (3, 20),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "diabetes": {
        "latent_dim": 4,
        "hidden": (32,),
        "epochs": 400,
        "batch_size": 32,
        "columns": {"progression": "gaussian"},  # which the copula needs: integers from 25 to 346
    },
    "wine": {"latent_dim": 4, "hidden": (32,), "epochs": 400, "batch_size": 16},
    "titanic": {"latent_dim": 2, "hidden": (32,), "epochs": 100, "batch_size": 32},
}


def table(name: str) -> pandas.DataFrame:
    if name == "titanic":
        rows = [
            (*key, answer)
            for key, counts in TITANIC.items()
            for answer, count in zip(("no", "yes"), counts, strict=True)
            for _ in range(count)
        ]
        return pandas.DataFrame(rows, columns=["cabin", "age", "sex", "survived"])
    if name == "diabetes":
        found = datasets.load_diabetes(as_frame=True, scaled=False)
        frame = found.data.assign(progression=found.target)
        return frame.assign(sex=frame.sex.map({1.0: "1", 2.0: "2"}))
    found = datasets.load_wine(as_frame=True)
    return found.data.assign(cultivar=[f"c{k}" for k in found.target])


def marginal(kind: Any, x: np.ndarray) -> Any:
    """The distribution of maximum likelihood, of scipy; the shares of categories."""
    if kind.categories and kind.name != "ordinal":
        return np.bincount(x.astype(int), minlength=len(kind.categories)) / len(x)
    if kind.name == "ordinal":
        return stats.binom(len(kind.categories) - 1, x.mean() / (len(kind.categories) - 1))
    if kind.name == "log-normal":
        return stats.lognorm(np.log(x).std(), scale=np.exp(np.log(x).mean()))
    if kind.name == "student-t":
        return stats.t(*stats.t.fit(x))
    return stats.norm(x.mean(), x.std())


def log_marginal(kind: Any, found: Any, x: np.ndarray) -> np.ndarray:
    if isinstance(found, np.ndarray):
        with np.errstate(divide="ignore"):
            return np.log(found[x.astype(int)])
    return found.logpmf(x) if kind.is_discrete else found.logpdf(x)


def independent(kinds: Any, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    pairs = enumerate(kinds)
    return sum(log_marginal(k, marginal(k, train[:, j]), test[:, j]) for j, k in pairs)  # type: ignore[return-value]


def copula(kinds: Any, train: np.ndarray, test: np.ndarray) -> np.ndarray | None:
    """A Gaussian copula; None for tables without real columns."""
    real = [j for j, kind in enumerate(kinds) if not kind.is_discrete]
    others = [j for j in range(len(kinds)) if j not in real]
    if not real or len(others) > 1:
        return None
    if others and len(kinds[others[0]].categories) > 2:  # a copula for each category
        j, total = others[0], np.zeros(len(test))
        for code, share in enumerate(marginal(kinds[j], train[:, j])):
            a, b = (np.delete(x[x[:, j] == code], j, axis=1) for x in (train, test))
            own = [kind for i, kind in enumerate(kinds) if i != j]
            total[test[:, j] == code] = np.log(share) + copula(own, a, b)
        return total
    found = {j: marginal(kinds[j], train[:, j]) for j in real}

    def scores(x: np.ndarray) -> np.ndarray:
        levels = np.column_stack([found[j].cdf(x[:, j]) for j in real])
        return stats.norm.ppf(levels.clip(1e-9, 1 - 1e-9))

    z, z_test = scores(train), scores(test)
    correlation = np.corrcoef(z.T)
    joint = stats.multivariate_normal(np.zeros(len(real)), correlation)
    total = joint.logpdf(z_test) - stats.norm.logpdf(z_test).sum(1)
    total = total + sum(log_marginal(kinds[j], found[j], test[:, j]) for j in real)
    if others:
        signs = 2 * train[:, others[0]] - 1
        design = np.column_stack([np.ones(len(z)), z])
        weight = optimize.minimize(
            lambda w: -stats.norm.logcdf(signs * (design @ w)).sum(), np.zeros(design.shape[1])
        ).x
        predicted = np.column_stack([np.ones(len(z_test)), z_test]) @ weight
        total = total + stats.norm.logcdf((2 * test[:, others[0]] - 1) * predicted)
    return total


def vae(splits: pyro_vae.Splits, seed: int, settings: dict[str, Any]) -> np.ndarray:
    config = pyro_vae.ModelConfig(latent_dim=settings["latent_dim"], hidden=settings["hidden"])
    model = pyro_vae.build(config, splits, seed)
    fit = {name: settings[name] for name in ("epochs", "batch_size")}
    training = pyro_vae.FitConfig(learning_rate=3e-3, **fit)
    best: list[Any] = [-np.inf, None]
    for record in pyro_vae.iterate(model, splits, training, seed):
        if record.validation_elbo > best[0]:
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            best = [record.validation_elbo, weights]
    model.load_state_dict(best[1])
    x = torch.cat(list(splits.test.fixed("real", 0)))
    return pyro_vae.log_evidence(model, x, num_samples=5000).numpy()


def saturated(kinds: Any, train: np.ndarray, test: np.ndarray) -> np.ndarray | None:
    """The share of each combination of categories, with half a row added to each."""
    if not all(kind.categories for kind in kinds):
        return None
    counts = np.full([len(kind.categories) for kind in kinds], 0.5)
    np.add.at(counts, tuple(train.T.astype(int)), 1)
    return np.log(counts / counts.sum())[tuple(test.T.astype(int))]


def mean_and_error(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def main() -> None:
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or SETTINGS:
        frame, lines = table(name), {}
        settings = dict(SETTINGS[name])
        columns = settings.pop("columns", None)
        for seed in SEEDS:
            size = len(frame) // 4
            options = {"test_size": size, "validation_size": size // 3, "columns": columns}
            splits = pyro_vae.load_data(frame, seed, **options)
            rows = splits.whole().values.numpy().astype(np.float64)
            kept = np.concatenate([splits.train.rows, splits.validation.rows])
            args = splits.spec.kinds, rows[kept], rows[splits.test.rows.numpy()]
            for method in (independent, copula, saturated):
                if (found := method(*args)) is not None:
                    lines.setdefault(method.__name__, []).append(found)
            lines.setdefault("VAE", []).append(vae(splits, seed, settings))
        print(f"\n{name}: {frame.shape}, {[kind.name for kind in splits.spec.kinds]}")
        for method, values in lines.items():
            print(f"{method:12}", "   ".join(map(mean_and_error, values)))
            if method != "VAE":
                gains = [v - w for v, w in zip(lines["VAE"], values, strict=True)]
                print(" VAE minus it", "   ".join(map(mean_and_error, gains)), flush=True)


if __name__ == "__main__":
    main()
