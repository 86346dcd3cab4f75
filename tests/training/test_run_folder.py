"""The files of a run while it trains."""

from __future__ import annotations

import json

from conftest import example_splits

import pyro_vae
from pyro_vae import Config, FitConfig, ModelConfig, iterate
from pyro_vae.config import resolve
from pyro_vae.training.checkpoint import load_checkpoint
from pyro_vae.training.run import RunFolder


def test_the_best_model_is_written_before_the_last_and_never_behind_it(tmp_path):
    """A kill right after a checkpoint must leave the best model of its history."""
    splits = example_splits("binomial", tmp_path, count=100)
    asked = Config(model=ModelConfig(latent_dim=2, hidden=(16,)))
    config = resolve(asked, "binomial", 300)
    vae = pyro_vae.build(config.model, splits)
    folder = RunFolder(tmp_path / "run", asked, config, vae, splits)
    best = 0
    for record in iterate(vae, splits, FitConfig(epochs=6, batch_size=20, learning_rate=1e-2)):
        folder.add(record)
        best = record.epoch if record.is_best else best
        folder.reached(record.state, save=True)
        file = folder.path / "checkpoints" / "best.pt"  # not the folder, where last.pt may serve
        assert load_checkpoint(file).history[-1]["epoch"] == best
        assert load_checkpoint(folder.path, "last").training["epoch"] == record.epoch
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
