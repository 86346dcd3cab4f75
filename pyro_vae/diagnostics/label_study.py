"""The study of q(y|x) that `diagnose` makes of a semi-supervised model."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..evidence.intervals import interval
from ..models.labels import SemiSupervisedVAE
from ..plots import calibration as figures
from .findings import Check, Finding, worst_mean
from .labels import LabelSimulations, check_labels, simulate_labels
from .study import Study

# Cells into which the histogram divides [0, 1]
CELLS = 200

CONFIDENCE = Check(
    "label confidence",
    "mean probability of the most probable label minus its accuracy, on simulated rows",
    (0.03, 0.1),
    "q(y|x) is {direction} of the labels of rows that the model draws",
    "train longer, or with more --labelled rows; with a lower --classification-weight, rows "
    "without a label count for more",
    directions=("not sure enough", "too sure"),
)
SHARES = Check(
    "label shares",
    "mean probability of {subject}, the worst label, minus its share, on simulated rows",
    (0.03, 0.1),
    "averaged over data of the model, q(y|x) gives this label too {direction} probability",
    CONFIDENCE.advice,
    directions=("little", "much"),
)


def label_study(vae: SemiSupervisedVAE, num_simulations: int, like: Tensor | None = None) -> Study:
    """Calibration of q(y|x) on simulated rows. Draws come from torch's global random state.

    Simulated rows lack values as the rows `like` (M, *data_shape) do.
    """
    simulations = simulate_labels(vae, num_simulations, like=like)
    tests = check_labels(simulations)
    details = {
        "label_tests": {
            "p_transform": tests.p_transform,
            "p_classes": tests.p_classes,
            "p_confidence": tests.p_confidence,
        },
        "label_accuracy": float(simulations.correct.mean()),
        "label_residuals": dict(
            zip(vae.class_names, simulations.residuals.mean(0).tolist(), strict=True)
        ),
    }
    ranks = np.minimum((CELLS * simulations.transform).astype(int), CELLS - 1)
    title = "Randomized transform of the true labels of simulated rows"
    figure = figures.rank_histograms(ranks[:, None], CELLS - 1, ["y"], title)
    return Study(about_labels(simulations, vae.class_names), details, {"labels": figure})


def about_labels(simulations: LabelSimulations, names: tuple[str, ...]) -> list[Finding]:
    """q(y|x) of simulated rows: its confidence, and the mean probability of the worst class."""
    worst, size = worst_mean(-simulations.residuals)
    return [
        Finding(CONFIDENCE, interval(simulations.confidence - simulations.correct)),
        Finding(SHARES, size, f"label {names[worst]}"),
    ]
