"""Files come back whole or are refused by name; nothing in them is executed; no write loses one."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import all_likelihoods, batch, example_splits

import pyro_vae
from pyro_vae import Config, InputError, ModelConfig
from pyro_vae.config import resolve
from pyro_vae.runtime.files import write_atomically
from pyro_vae.training.checkpoint import load_checkpoint, serialize


@all_likelihoods
@pytest.mark.parametrize("kind", ["vae", "ae"])
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_round_trip(name, kind, architecture, tmp_path):
    splits = example_splits(name, tmp_path, shape=(3, 9, 8))
    asked = Config(
        model=ModelConfig(
            kind=kind, architecture=architecture, latent_dim=3, likelihood=name, activation="Tanh"
        )
    )
    config = resolve(asked, splits.likelihood, 1000)
    vae = pyro_vae.build(config.model, splits)
    path = tmp_path / "model.pt"
    write_atomically(path, serialize(vae, config, splits, [{"epoch": 1}]))
    loaded = load_checkpoint(path)
    assert (loaded.config, loaded.history, loaded.training) == (config, [{"epoch": 1}], None)
    assert loaded.fingerprint == splits.fingerprint
    again = pyro_vae.load(path)
    x = batch(splits, name).float()
    assert torch.equal(again.posterior(x).mean, vae.posterior(x).mean)
    z = torch.randn(4, 3)
    assert torch.equal(again.likelihood(z).log_prob(x[:4]), vae.likelihood(z).log_prob(x[:4]))
    assert not again.training


@pytest.fixture
def file(tmp_path) -> Path:
    splits = example_splits("binomial", tmp_path)
    config = resolve(Config(), "binomial", 1000)
    vae = pyro_vae.build(config.model, splits)
    path = tmp_path / "model.pt"
    path.write_bytes(serialize(vae, config, splits, []))
    return path


def rewritten(file: Path, **changes) -> Path:
    content = torch.load(file, weights_only=True)
    torch.save({**content, **changes}, file)
    return file


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.999])
def test_truncated_file_is_named(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(
        InputError, match=r"model\.pt is not a checkpoint of pyro_vae, or it is dam"
    ):
        pyro_vae.load(file)


def test_a_flipped_bit_in_a_weight_is_noticed(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt"):
        pyro_vae.load(file)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_executed(tmp_path, file):
    trap = tmp_path / "executed"
    pickled = tmp_path / "pickle.pt"
    pickled.write_bytes(pickle.dumps(Exploit(trap)))
    torch.save({"format": "pyro_vae checkpoint", "weights": Exploit(trap)}, tmp_path / "saved.pt")
    for path in (pickled, tmp_path / "saved.pt"):
        with pytest.raises(InputError, match=path.name):
            pyro_vae.load(path)
    assert not trap.exists()


def test_foreign_files_are_named(tmp_path, file):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt is a file of another program"):
        pyro_vae.load(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(InputError, match=r"archive\.pt is not a checkpoint"):
        pyro_vae.load(tmp_path / "archive.pt")


def test_other_versions_are_named(file):
    rewritten(file, format_version=99, pyro_vae="9.0")
    with pytest.raises(InputError, match=r"written by pyro_vae 9\.0 in format 99; this is"):
        pyro_vae.load(file)


def test_contents_that_do_not_fit_are_named(file):
    weights = torch.load(file, weights_only=True)["weights"]
    weights.pop("decoder.bias")
    rewritten(file, weights=weights)
    with pytest.raises(InputError, match=r"model\.pt is inconsistent"):
        pyro_vae.load(file)
    rewritten(file, config={"model": {"width": 3}})
    with pytest.raises(InputError, match=r"model\.pt is inconsistent.*model\.width"):
        pyro_vae.load(file)


def test_missing_runs(tmp_path):
    with pytest.raises(InputError, match=r"no .*nowhere exists"):
        pyro_vae.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no checkpoints"):
        pyro_vae.load(tmp_path)


def test_a_failed_write_leaves_the_earlier_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    write_atomically(path, b"earlier")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
