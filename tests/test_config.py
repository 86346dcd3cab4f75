"""One truth for flags, file and checkpoint; what cannot be meant fails at construction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pyro_vae import Config, DataConfig, FitConfig, InputError, ModelConfig
from pyro_vae.config import read_config, resolve


def test_round_trip_through_json(tmp_path):
    config = Config(
        data=DataConfig("a.npy", root=Path("/data"), image_size=(3, 4)),
        model=ModelConfig(hidden=(5, 6), architecture="conv"),
        fit=FitConfig(epochs=3, gradient_clip=float("inf")),
        seed=7,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert read_config(path) == config


def test_missing_settings_take_their_defaults():
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"fit": {"epochs": 3}}).fit == FitConfig(epochs=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown setting epoch"),
        ({"fit": {"epoch": 3}}, "unknown setting fit.epoch"),
        ({"fit": {"epochs": "three"}}, "fit.epochs = 'three'"),
        ({"fit": 3}, "fit. expects settings by name"),
        ({"model": {"kind": "gan"}}, "model.kind = 'gan'"),
        ({"model": {"hidden": [3, "a"]}}, "model.hidden"),
        ({"model": {"latent_dim": 0}}, "--latent-dim expects an integer of at least 1; got 0"),
        ([], "expects settings by name"),
    ],
)
def test_bad_files(values, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_json(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_config(tmp_path / "nowhere.json")
    (tmp_path / "a.json").write_bytes(b"\xff\x00{")
    with pytest.raises(InputError, match="is not a config"):
        read_config(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ModelConfig, {"latent_dim": 0}),
        (ModelConfig, {"hidden": (4, 0)}),
        (ModelConfig, {"architecture": "conv", "hidden": ()}),
        (DataConfig, {"validation_size": 0}),
        (DataConfig, {"image_size": (0, 4)}),
        (DataConfig, {"max_value": 0}),
        (FitConfig, {"epochs": 0}),
        (FitConfig, {"batch_size": 0}),
        (FitConfig, {"num_particles": 0}),
        (FitConfig, {"patience": 0}),
        (FitConfig, {"learning_rate": 0.0}),
        (FitConfig, {"learning_rate": float("nan")}),
        (FitConfig, {"learning_rate": float("inf")}),
        (FitConfig, {"beta": 0.0}),
        (FitConfig, {"beta": -1.0}),
        (FitConfig, {"gradient_clip": 0.0}),
        (FitConfig, {"kl_warmup": 1.5}),
        (FitConfig, {"learning_rate_warmup": -0.1}),
        (FitConfig, {"objective": "iwae", "beta": 2.0}),
        (FitConfig, {"objective": "iwae", "kl_warmup": 0.1}),
        (Config, {"seed": -1}),
    ],
)
def test_settings_out_of_range(kind, settings):
    with pytest.raises(InputError, match="--"):
        kind(**settings)


@pytest.mark.parametrize(
    "fit", [{"beta": 2.0}, {"kl_warmup": 0.5}, {"objective": "iwae"}, {"num_particles": 5}]
)
def test_settings_without_effect_fail(fit):
    with pytest.raises(InputError, match="no effect on --model ae"):
        Config(model=ModelConfig(kind="ae"), fit=FitConfig(**fit))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


def test_defaults_that_follow_the_data():
    config = resolve(Config(), "binomial", 1457)
    assert config.model.likelihood == "binomial"
    assert config.model.hidden == (512, 256)
    assert config.fit.epochs == round(2500 / 6)
    conv = Config(model=ModelConfig(architecture="conv", likelihood="gaussian"))
    resolved = resolve(conv, "binomial", 1000)
    assert (resolved.model.likelihood, resolved.model.hidden) == ("gaussian", (32, 64))
    assert resolve(resolved, "bernoulli", 1000) == resolved


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    assert DataConfig("mnist").absolute().source == "mnist"
    assert DataConfig("./mnist").absolute().source == str(tmp_path / "mnist")
    assert DataConfig("digits").absolute().root == tmp_path / "data"


def test_batch_larger_than_the_training_set():
    with pytest.raises(InputError, match="--batch-size 256 is larger than the training set of 9"):
        resolve(Config(), "binomial", 9)
