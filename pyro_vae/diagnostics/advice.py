"""Commands that mend what `diagnose` finds, for the guide and the prior of a run.

The advice of a finding names them in braces, and `remedies` gives their text. A command has a line
of its own, quoted for a shell.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import ModelConfig


def remedies(run: str | Path = "RUN", model: ModelConfig | None = None) -> dict[str, str]:
    """The texts that the advice of findings can contain.

    Args:
        run: the run's folder.
        model: its model, by default the one of a new run.

    Returns:
        mend: a guide refined for each row or, if the guide is one, draws for each row.
        or_draws: draws for each row, as an alternative to it.
        recalibrate: factors for the posterior's standard deviations.
        prior: a prior that is not N(0, I), or empty if the run has one.
    """
    model = ModelConfig() if model is None else model
    guide, prior, name = model.guide.family, model.prior.family, shlex.quote(str(run))
    draws = (
        "draw from the posterior of each row itself:\n"
        f"python -m pyro_vae.encode {name} --draws 1000 --out draws.npz\n"
    )
    mend = f"fit the guide to each row, the model held fixed:\npython -m pyro_vae.refit {name}\n"
    if guide == "refined":
        mend = ""
    others = [
        "mixture",
        *(["flow"] if model.latent_dim > 1 else []),
        *(["vamp"] if guide in ("diagonal", "full", "refined") else []),
    ]
    return {
        "mend": mend or draws,
        "or_draws": f"or {draws}" if mend else "",
        "recalibrate": f"python -m pyro_vae.encode {name} --recalibrate --out codes.npz\n",
        "prior": f"train with --prior {' or '.join(others)}; or " if prior == "normal" else "",
    }
