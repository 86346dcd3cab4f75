"""Commands that mend what `diagnose` finds, for the guide and the prior of a run.

The advice of a finding names them in braces, and `remedies` gives their text. A command has a line
of its own, quoted for a shell.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import ModelConfig

# The next richer family of guides
RICHER = {"diagonal": "full", "full": "flow"}


def remedies(
    run: str | Path = "RUN", model: ModelConfig | None = None, refitted: bool = False
) -> dict[str, str]:
    """The texts that the advice of findings can contain.

    Args:
        run: the run's folder.
        model: its model, by default the one of a new run.
        refitted: whether its guide has been trained anew with the model fixed.

    Returns:
        mend: a guide trained anew; of a richer family if it is diagonal or has been refitted; draws
            for each row if there is no richer family.
        or_draws: draws for each row, as an alternative to it.
        richer: a guide of a richer family, if there is one, or draws for each row.
        recalibrate: factors for the posterior's standard deviations.
        prior: a prior that is not N(0, I), or empty if the run has one.
    """
    model = ModelConfig() if model is None else model
    guide, prior, name = model.guide.family, model.prior.family, shlex.quote(str(run))
    family = RICHER.get(guide) if model.latent_dim > 1 else None
    if prior == "vamp" and family == "flow":  # its components are posteriors, Gaussians
        family = None
    refit, draws = (
        f"python -m pyro_vae.refit {name}",
        (
            "draw from the posterior of each row itself:\n"
            f"python -m pyro_vae.encode {name} --draws 1000 --out draws.npz\n"
        ),
    )
    richer = ""
    if family is not None:
        kind = {"full": "with correlated latents", "flow": "that need not be Gaussian"}[family]
        richer = f"fit a guide {kind}, the model held fixed:\n{refit} --guide {family}\n"
    mend = f"fit the guide anew, the model held fixed:\n{refit}\n"
    if refitted or (guide == "diagonal" and richer):
        mend = richer
    others = [
        "mixture",
        *(["flow"] if model.latent_dim > 1 else []),
        *(["vamp"] if guide in ("diagonal", "full") else []),
    ]
    return {
        "mend": mend or draws,
        "or_draws": f"or {draws}" if mend else "",
        "richer": f"{richer}or {draws}" if richer else draws,
        "recalibrate": f"python -m pyro_vae.encode {name} --recalibrate --out codes.npz\n",
        "prior": f"train with --prior {' or '.join(others)}; or " if prior == "normal" else "",
    }
