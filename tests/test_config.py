"""One truth for flags, file and checkpoint; what cannot be meant fails at construction."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import get_args

import pytest

from pyro_vae import Config, DataConfig, FitConfig, InputError, ModelConfig
from pyro_vae.config import PRESETS, read_config, resolve
from pyro_vae.config.options import KL_WEIGHTED, OBJECTIVE_OPTIONS, Objective


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
    large = Config(fit=FitConfig(batch_size=10))
    with pytest.raises(InputError, match="--batch-size 10 is larger than the training set of 9"):
        resolve(large, "binomial", 9)
    assert resolve(Config(fit=FitConfig(batch_size=9)), "binomial", 9).fit.batch_size == 9


@pytest.mark.parametrize("rows", [1, 9, 255, 256, 257, 5000])
def test_the_default_batch_is_all_rows_where_they_are_few(rows):
    fit = resolve(Config(), "binomial", rows).fit
    assert fit.batch_size == min(256, rows)
    assert fit.epochs == round(2500 / math.ceil(rows / 256))
    assert resolve(Config(fit=fit), "binomial", rows).fit == fit, "a resumed run"


# --- objectives and their options -----------------------------------------------------------------

OWN = {
    "alpha": {"renyi": 0.3},
    "groups": {"miwae": 2, "piwae": 4},
    "elbo_weight": {"ciwae": 0.4},
    "free_bits": {"free-bits": 0.7},
    "mmd_weight": {"mmd": 30.0},
    # under a KL-weighted objective the KL's weight, under beta-tc the total correlation's
    "beta": dict.fromkeys([*KL_WEIGHTED, "beta-tc"], 2.0),
}


@pytest.mark.parametrize("name", get_args(Objective))
@pytest.mark.parametrize("option", OWN)
def test_options_belong_to_their_objectives(name, option):
    owners = OWN[option]
    settings = {"objective": name, "num_particles": 8}
    settings[option] = owners.get(name, next(iter(owners.values())))
    if name not in owners:
        message = rf"^--objective {name}: .*has no option {option}; .*{next(iter(owners))}"
        if option == "beta":
            message = rf"^--objective {name}: .*has no option beta; it belongs to beta and beta-tc"
        with pytest.raises(InputError, match=message):
            FitConfig(**settings)
        return
    config = FitConfig(**settings)
    assert Config.from_dict(json.loads(json.dumps(Config(fit=config).to_dict()))).fit == config
    is_weight = option == "beta" and name != "beta" and name in KL_WEIGHTED
    assert config.objective_options() == ({} if is_weight else {option: owners[name]})
    assert FitConfig(objective=name, num_particles=8).objective_options() == {}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("score-baseline", {}, "at least 2 particles"),
        ("miwae", {}, "a multiple of its 8 groups; got 1"),
        ("miwae", {"num_particles": 12}, "a multiple of its 8 groups; got 12"),
        ("piwae", {"num_particles": 8, "groups": 3}, "a multiple of its 3 groups; got 8"),
        ("piwae", {"num_particles": 4, "groups": 8}, "a multiple of its 8 groups; got 4"),
        ("miwae", {"num_particles": 8, "groups": 0}, "a multiple of its 0 groups"),
        ("miwae", {"num_particles": 8, "groups": -2}, "a multiple of its -2 groups"),
        ("renyi", {"alpha": 1.0}, "other than 1, at which the bound is the ELBO"),
        ("renyi", {"alpha": math.nan}, "alpha expects a finite number"),
        ("renyi", {"alpha": -math.inf}, "alpha expects a finite number"),
        ("ciwae", {"elbo_weight": 1.01}, "elbo_weight expects 0 to 1; got 1.01"),
        ("ciwae", {"elbo_weight": -0.1}, "elbo_weight expects 0 to 1; got -0.1"),
        ("ciwae", {"elbo_weight": math.nan}, "elbo_weight expects 0 to 1"),
        ("free-bits", {"free_bits": 0.0}, "free_bits expects a finite number above 0"),
        ("free-bits", {"free_bits": math.inf}, "free_bits expects a finite number above 0"),
        ("mmd", {"mmd_weight": -1.0}, "mmd_weight expects a finite number above 0"),
        ("mmd", {"mmd_weight": math.nan}, "mmd_weight expects a finite number above 0"),
    ],
)
def test_options_out_of_range_are_refused_for_the_objective(name, settings, message):
    with pytest.raises(InputError) as caught:
        FitConfig(objective=name, **settings)
    assert str(caught.value).startswith(f"--objective {name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_objective():
    with pytest.raises(InputError, match=r"^objective = 'mdm': expected one of trace, mean-field"):
        FitConfig(objective="mdm")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["trace", "beta", "beta-tc"])
def test_beta_out_of_range(name, value):
    with pytest.raises(InputError, match=r"^--beta expects a (finite )?number"):
        FitConfig(objective=name, beta=value)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": -2.0}, {"alpha": 1.5}])
def test_orders_on_both_sides_of_one(options):
    assert FitConfig(objective="renyi", **options).objective_options() == options


def test_the_weight_of_the_kl_after_its_warm_up():
    weights = {name: FitConfig(objective=name, num_particles=8) for name in get_args(Objective)}
    weights = {name: config.kl_weight for name, config in weights.items()}
    assert weights.pop("beta") == OBJECTIVE_OPTIONS["beta"]["beta"] == 4.0
    assert set(weights.values()) == {1.0}
    for name in KL_WEIGHTED:
        assert FitConfig(objective=name, beta=2.5).kl_weight == 2.5
        assert FitConfig(objective=name, kl_warmup=0.5).kl_weight == (4.0 if name == "beta" else 1)
    # its beta weighs the total correlation
    assert FitConfig(objective="beta-tc", beta=2.5).kl_weight == 1.0
    for name in set(get_args(Objective)) - set(KL_WEIGHTED):
        with pytest.raises(InputError, match=f"--kl-warmup expects .*got --objective {name}"):
            FitConfig(objective=name, num_particles=8, kl_warmup=0.1)


def test_every_option_is_a_setting_and_of_some_objective():
    options = {name for own in OBJECTIVE_OPTIONS.values() for name in own}
    assert options == set(OWN)
    assert set(OBJECTIVE_OPTIONS) <= set(get_args(Objective))
    for option in options:  # given or not can be told
        assert getattr(FitConfig(), option) is None


def test_options_without_effect_on_the_autoencoder_fail():
    for name, settings in [
        ("renyi", {"alpha": 0.3}),
        ("miwae", {"groups": 2, "num_particles": 4}),
        ("mmd", {"mmd_weight": 3.0}),
    ]:
        with pytest.raises(InputError, match="no effect on --model ae"):
            Config(model=ModelConfig(kind="ae"), fit=FitConfig(objective=name, **settings))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_settings_like_any(name, tmp_path):
    preset = PRESETS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset.to_dict()))
    assert read_config(path) == Config.from_dict(preset.to_dict()) == preset
    resolved = resolve(preset, "binomial", 50_000)
    assert resolved.model == preset.model, "leaves nothing of the model to the data"
    assert resolved.fit == preset.fit


def test_the_preset_is_the_papers_network():
    model = PRESETS["iwae-mnist"].model
    assert (model.hidden, model.activation, model.latent_dim) == ((200, 200), "Tanh", 50)
    assert model.likelihood == "bernoulli"
    assert PRESETS["iwae-mnist"].data.source == "mnist"


# --- files and values that others make ------------------------------------------------------------

WRONG_TYPES = [
    ("fit", "epochs", True, "fit.epochs = True: expected an integer"),
    ("fit", "epochs", 3.0, "fit.epochs = 3.0: expected an integer"),
    ("fit", "learning_rate", True, "fit.learning_rate = True: expected a number"),
    ("fit", "learning_rate", 10**400, "fit.learning_rate = about 10^400: expected a number"),
    ("fit", "beta", "1", "fit.beta = '1': expected a number"),
    ("model", "hidden", [8, False], "model.hidden = [8, False]: expected integers, as in 512 256"),
    ("model", "hidden", 8, "model.hidden = 8: expected integers, as in 512 256"),
    ("data", "image_size", [28, 28, 3], "expected one or two integers, as in 28 or 28 32"),
    ("data", "image_size", True, "data.image_size = True: expected one or two integers"),
    ("data", "source", None, "data.source = None: expected text"),
    ("data", "root", 3, "data.root = 3: expected a path"),
    ("data", "source", "a\0b", r"--data expects a path; got 'a\x00b'"),
    ("data", "root", "\ud800", r"--data-root expects a path; got '\ud800'"),
    ("fit", "epochs", 2**63, "--epochs expects an integer from 1 to 2^63 - 1; got 9223372036854"),
    (
        "model",
        "hidden",
        [10**400],
        "--hidden expects an integer from 1 to 2^63 - 1; got about 10^4",
    ),
    ("fit", "beta", math.inf, "--beta expects a finite number, at most 3.4e+38; got inf"),
    ("fit", "learning_rate", math.nan, "--learning-rate expects a number above 0; got nan"),
]


@pytest.mark.parametrize(("part", "name", "value", "message"), WRONG_TYPES)
def test_values_of_a_wrong_type_or_size(part, name, value, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({part: {name: value}}))
    kind = {"data": DataConfig, "model": ModelConfig, "fit": FitConfig}[part]
    with pytest.raises(InputError) as from_file:
        read_config(path)
    assert message in str(from_file.value)
    with pytest.raises(InputError) as from_python:
        kind(**{name: tuple(value) if isinstance(value, list) else value})
    for caught in (from_file, from_python):
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_numbers_of_other_libraries_become_pythons(tmp_path):
    import numpy as np

    model = ModelConfig(latent_dim=np.int64(3), hidden=(np.int32(4), np.uint8(5)))
    fit = FitConfig(learning_rate=np.float32(0.5), gradient_clip=1, epochs=np.int64(7))
    config = Config(DataConfig(image_size=28), model, fit, seed=np.int64(2))
    assert config.data.image_size == (28, 28)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert read_config(path) == config
    for value in (model.latent_dim, *model.hidden, fit.epochs, config.seed):
        assert type(value) is int
    assert type(fit.learning_rate) is type(fit.gradient_clip) is float


FILES = {
    "brackets": (b"[" * 100_000, "nest too deep"),
    "objects": (b'{"a":' * 100_000, "nest too deep"),
    "large": (b" " * 2**20 + b"{}", "more than 1 MiB"),
    "twice": (b'{"seed": 1, "seed": 2}', "it gives seed twice"),
    "twice below": (b'{"fit": {"epochs": 1, "beta": 2.0, "epochs": 1}}', "it gives epochs twice"),
    "utf-16": ('{"seed": 1}'.encode("utf-16"), "'utf-8' codec can't decode"),
    "latin-1": ('{"device": "é"}'.encode("latin-1"), "'utf-8' codec can't decode"),
    "digits": (b'{"seed": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "empty": (b"", "Expecting value"),
    "half": (b'{"seed": 1', "delimiter"),
    "text": (b'"seed"', "the config expects settings by name; got 'seed'"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(FILES[name][0])
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert FILES[name][1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert read_config(tmp_path / "config.json").seed == 3


@pytest.mark.timeout(30)  # a pipe that is read waits for ever
def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="it is not a regular file"):
            read_config(path)


@pytest.mark.parametrize("beta", [5e-324, 3.4e38])
def test_weights_at_the_ends_of_their_range(beta):
    for name in ("trace", "beta", "beta-tc"):
        assert FitConfig(objective=name, beta=beta).beta == beta
    assert FitConfig(objective="mmd", mmd_weight=beta).mmd_weight == beta
    assert FitConfig(objective="free-bits", free_bits=beta).free_bits == beta
    assert FitConfig(objective="renyi", alpha=-beta).alpha == -beta
    with pytest.raises(InputError, match=r"alpha expects .* of at most 3.4e\+38 in absolute value"):
        FitConfig(objective="renyi", alpha=-1e39)
