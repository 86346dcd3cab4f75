"""A search space: what can be searched, and what its file may hold."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pyro_vae import Config, DataConfig, FitConfig, InputError, ModelConfig
from pyro_vae.config.space import (
    REFUSED,
    SEARCHED,
    Search,
    check_space,
    default_space,
    describe,
    read_search,
    read_space,
    setting,
    value_text,
    with_values,
)

TOML = """
latent-dim = { low = 2, high = 64, log = true }
learning_rate = { low = 1e-4, high = 1 }
hidden = { choices = [[200], [500, 500]] }
guide = { choices = ["diagonal", { family = "flow", transforms = 2 }] }
"""
SPACE = {
    "latent_dim": {"low": 2, "high": 64, "log": True},
    "learning_rate": {"low": 1e-4, "high": 1.0, "log": False},
    "hidden": {"choices": [[200], [500, 500]]},
    "guide": {
        "choices": [{"family": "diagonal"}, {"family": "flow", "transforms": 2, "hidden": 64}]
    },
}


def test_files_in_both_formats(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(json.dumps(SPACE))
    for name in ("a.toml", "a.json"):
        space = read_space(tmp_path / name, Config())
        assert space == SPACE
        assert type(space["learning_rate"]["high"]) is float, "ends have the setting's type"
    assert check_space(SPACE, Config()) == SPACE
    assert describe(SPACE) == [
        "latent_dim     2 to 64, logarithmic",
        "learning_rate  0.0001 to 1",
        "hidden         200 | 500 500",
        "guide          diagonal | flow transforms=2 hidden=64",
    ]


def test_every_setting_can_be_searched_or_has_a_reason():
    names = {f.name for cls in (ModelConfig, FitConfig) for f in dataclasses.fields(cls)}
    others = {f.name for cls in (DataConfig, Config) for f in dataclasses.fields(cls)}
    others -= {"data", "model", "fit"}
    assert set(SEARCHED) | set(REFUSED) >= names
    assert not set(SEARCHED) & (set(REFUSED) | others)
    for name in (others | names) - set(SEARCHED):
        with pytest.raises(InputError, match=f"space: {name} cannot be searched: "):
            check_space({name: {"choices": [1, 2]}}, Config())


@pytest.mark.parametrize("name", ["likelihood", "condition", "max_value", "missing", "source"])
def test_settings_that_change_the_measure_are_refused(name):
    with pytest.raises(InputError, match="compared by densities of other things"):
        check_space({name: {"choices": ["a", "b"]}}, Config())


def test_values_are_set_alone():
    values = {"latent_dim": 7, "learning_rate": 0.5, "hidden": [3, 4], "prior": {"family": "vamp"}}
    config = with_values(Config(seed=3), values)
    assert (config.model.latent_dim, config.fit.learning_rate) == (7, 0.5)
    assert (config.model.hidden, config.model.prior.family, config.seed) == ((3, 4), "vamp", 3)
    changed = {name for name in SEARCHED if setting(config, name) != setting(Config(), name)}
    assert changed == set(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expects settings with their ranges or choices"),
        ({}, "expects settings with their ranges or choices"),
        ({"latents": {"low": 1, "high": 2}}, "unknown setting latents; known are architecture"),
        ({"latent_dim": 3}, "latent_dim expects low and high, and perhaps log, or choices; got 3"),
        ({"latent_dim": {"low": 1}}, "expects low and high, and perhaps log, or choices; got low"),
        ({"latent_dim": {"low": 1, "high": 2, "step": 1}}, "got low, high, step"),
        ({"latent_dim": {"low": 1, "choices": [1]}}, "got low, choices"),
        ({"latent_dim": {"low": 0, "high": 2}}, "--latent-dim expects an integer of at least 1"),
        ({"latent_dim": {"low": 1.5, "high": 2}}, "expected an integer"),
        ({"latent_dim": {"low": 4, "high": 4}}, "expects low < high, both finite; got 4 and 4"),
        ({"gradient_clip": {"low": 4, "high": float("inf")}}, "expects low < high, both finite"),
        ({"beta": {"low": None, "high": 4}}, "expects low < high, both finite; got None"),
        ({"kl_warmup": {"low": 0, "high": 1, "log": True}}, "low above 0 with log; got 0.0"),
        ({"latent_dim": {"low": 1, "high": 2, "log": 1}}, "log = true or false; got 1"),
        ({"hidden": {"low": 1, "high": 2}}, "hidden is not a number, so it has no range"),
        ({"hidden": {"choices": [[3]]}}, "expects two choices or more"),
        ({"hidden": {"choices": 3}}, "expects two choices or more"),
        ({"hidden": {"choices": [[3], [3]]}}, "expects different choices"),
        ({"guide": {"choices": ["full", {"family": "full"}]}}, "expects different choices"),
        ({"guide": {"choices": ["full", "fuller"]}}, "--guide expects one of diagonal, full"),
        ({"alpha": {"low": 0, "high": 0.5}}, "no option alpha; it belongs to renyi"),
        ({"latent_dim": {"low": 1, "high": 2}, "latent-dim": {"low": 1, "high": 2}}, "twice"),
    ],
)
def test_spaces_that_cannot_be_meant(values, message):
    with pytest.raises(InputError) as error:
        check_space(values, Config(), "--space x")
    assert str(error.value).startswith("--space x")
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for name, text, message in [
        ("a.yaml", "", "--space expects a .toml or .json file"),
        ("none.toml", None, "--space: cannot read"),
        ("a.toml", "a = ", "is not TOML"),
        ("a.json", '{"beta": 1, "beta": 2}', "is not JSON: it names 'beta' twice"),
        ("b.json", "[" * 100_000, "is not JSON"),
        ("c.json", " " * (2**20 + 1), "expected ranges of settings; got over a megabyte"),
    ]:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_space(tmp_path / name, Config())


@pytest.mark.parametrize(
    ("settings", "size", "is_table", "fixed", "expected"),
    [
        ({}, 784, False, (), {"latent_dim": 64, "hidden": [1024, 512], "learning_rate": 1e-2}),
        ({}, 9, True, (), {"latent_dim": 9, "hidden": [512, 256], "learning_rate": 1e-2}),
        ({}, 2, True, (), {"hidden": [512, 256], "learning_rate": 1e-2}),
        (
            {"architecture": "conv"},
            784,
            False,
            ("latent_dim", "learning_rate"),
            {"hidden": [64, 128]},
        ),
    ],
)
def test_default_spaces(settings, size, is_table, fixed, expected):
    space = default_space(Config(model=ModelConfig(**settings)), size, is_table, set(fixed))
    assert {n: e.get("high", e.get("choices", [0])[-1]) for n, e in space.items()} == expected
    with pytest.raises(InputError, match="leave nothing to search; give --space"):
        default_space(Config(), 9, False, {"latent_dim", "hidden", "learning_rate"})


def test_a_search_comes_back_from_its_file(tmp_path):
    base = Config(model=ModelConfig(latent_dim=7), fit=FitConfig(epochs=4))
    search = Search(base, SPACE, 17, "abc")
    written: dict[str, Any] = search.to_dict()
    (tmp_path / "search.json").write_text(json.dumps(written))
    assert read_search(tmp_path) == search
    for changes, message in [
        ({"num_trials": 0}, "--trials expects an integer of at least 1"),
        ({"num_trials": "3"}, "expected an integer"),
        ({"space": {"seed": {"low": 1, "high": 2}}}, "cannot be searched"),
        ({"base": {"model": {"latents": 3}}}, "unknown setting model.latents"),
        ({"other": 1}, "it is not a search of pyro_vae"),
    ]:
        (tmp_path / "search.json").write_text(json.dumps({**written, **changes}))
        with pytest.raises(InputError, match=message):
            read_search(tmp_path)


def test_texts_of_values():
    values = [0.00123456, 512, [512, 256], [], "full", {"family": "full"}, None]
    assert [value_text(value) for value in values] == [
        "0.001235", "512", "512 256", "none", "full", "full", "None",
    ]  # fmt: skip
