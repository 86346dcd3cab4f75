"""Every flag changes what it says, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from pyro_vae import (
    Config,
    InputError,
    cli,
    compare,
    diagnose,
    encode,
    evaluate,
    export,
    generate,
    load,
    load_data,
    report,
    train,
    tune,
)
from pyro_vae.cli import RunArguments, choose_device, open_run, parse, refuse_existing
from pyro_vae.config import PRESETS
from pyro_vae.config.families import FlowGuide, MixturePrior
from pyro_vae.config.options import check_integer
from pyro_vae.runtime.memory import check_memory

NAMES = {"data.source": "data", "data.root": "data-root", "model.kind": "model"}
# The setting, its value as flags, and as the value in Config.
GIVEN: dict[str, tuple[str, Any]] = {
    "data.source": ("rows.npy", "rows.npy"),
    "data.root": ("there", Path("there")),
    "data.image_size": ("3 4", (3, 4)),
    "data.layout": ("volumes", "volumes"),
    "data.max_value": ("7", 7),
    "data.validation_size": ("8", 8),
    "data.test_size": ("9", 9),
    "data.missing": ("model", "model"),
    "data.labelled": ("11", 11),
    "model.kind": ("ae", "ae"),
    "model.architecture": ("conv", "conv"),
    "model.latent_dim": ("3", 3),
    "model.guide": ("flow transforms=2", FlowGuide(transforms=2)),
    "model.prior": ("mixture components=7 covariance=full", MixturePrior("mixture", 7, "full")),
    "model.hidden": ("5 6 7", (5, 6, 7)),
    "model.encoder_hidden": ("8 9", (8, 9)),
    "model.activation": ("Tanh", "Tanh"),
    "model.likelihood": ("gaussian", "gaussian"),
    "model.condition": ("label", "label"),
    "fit.classification_weight": ("7", 7.0),
    "fit.objective": ("iwae", "iwae"),
    "fit.num_particles": ("4", 4),
    "fit.beta": ("0.5", 0.5),
    "fit.alpha": ("-0.25", -0.25),
    "fit.groups": ("2", 2),
    "fit.elbo_weight": ("0.75", 0.75),
    "fit.free_bits": ("0.3", 0.3),
    "fit.mmd_weight": ("11", 11.0),
    "data.columns": ("kinds.toml", {"a": "poisson"}),
    "fit.epochs": ("12", 12),
    "fit.batch_size": ("13", 13),
    "fit.learning_rate": ("1e-4", 1e-4),
    "fit.schedule": ("constant", "constant"),
    "fit.learning_rate_warmup": ("0.2", 0.2),
    "fit.gradient_clip": ("inf", float("inf")),
    "fit.kl_warmup": ("0.4", 0.4),
    "fit.patience": ("14", 14),
    "fit.compile": ("off", "off"),
    "fit.precision": ("medium", "medium"),
    "seed": ("15", 15),
    "device": ("cpu", "cpu"),
    "refit": ("off", "off"),
}
# The objective to which an option belongs.
BESIDE = {
    "fit.alpha": {"fit.objective": "renyi"},
    "fit.groups": {"fit.objective": "miwae", "fit.num_particles": 8},
    "fit.elbo_weight": {"fit.objective": "ciwae"},
    "fit.free_bits": {"fit.objective": "free-bits"},
    "fit.mmd_weight": {"fit.objective": "mmd"},
    "data.labelled": {"model.condition": "partial"},
    "fit.classification_weight": {"model.condition": "partial"},
}


def leaves(config: Config) -> dict[str, Any]:
    """All settings by their full names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {
                f"{field.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)
            }
        else:
            found[field.name] = value
    return found


def flags(name: str, text: str) -> list[str]:
    flag = NAMES.get(name, name.rpartition(".")[2].replace("_", "-"))
    return [f"--{flag}", *text.split()]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The arguments that `train` would train with, in a folder with a file of kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kinds.toml").write_text('a = "poisson"')

    def of(*arguments: Any) -> Any:
        caught = []
        monkeypatch.setattr(train, "train", lambda given: caught.append(given) or 0)
        assert train.main([str(argument) for argument in arguments]) == 0
        return caught[0]

    return of


def test_every_setting_has_a_flag_that_sets_it_alone(asked):
    assert GIVEN.keys() == leaves(Config()).keys()
    for name, (text, value) in GIVEN.items():
        beside = BESIDE.get(name, {})
        others = [part for key, given in beside.items() for part in flags(key, str(given))]
        expected = {**leaves(Config()), **beside, name: value}
        assert expected[name] != leaves(Config())[name]
        assert leaves(asked(*others, *flags(name, text))) == expected


def test_defaults_of_flags_are_those_of_the_dataclasses(asked, tmp_path):
    assert asked() == train.TrainArguments()
    assert leaves(asked()) == leaves(Config())
    run, out = tmp_path / "run", tmp_path / "a.npz"
    for kind, arguments, given in [
        (evaluate.EvaluateArguments, [run], {"run": run}),
        (encode.EncodeArguments, [run, "--out", out], {"run": run, "out": out}),
        (generate.GenerateArguments, [run, "--out", out], {"run": run, "out": out}),
        (diagnose.DiagnoseArguments, [run], {"run": run}),
        (report.ReportArguments, [run], {"runs": (run,)}),
        (compare.CompareArguments, [run, out], {"runs": (run, out)}),
        (export.ExportArguments, [run, "--out", out], {"run": run, "out": out}),
    ]:
        assert parse(kind, list(map(str, arguments)), "x", None) == kind(**given)


@pytest.mark.parametrize(
    ("kind", "arguments", "given"),
    [
        (train.TrainArguments, "--out o", {"out": Path("o")}),
        (train.TrainArguments, "--overwrite", {"overwrite": True}),
        (train.TrainArguments, "--resume r", {"resume": Path("r")}),
        (train.TrainArguments, "--config c", {"config": Path("c")}),
        (train.TrainArguments, "--preset iwae-mnist", {"preset": "iwae-mnist"}),
        (train.TrainArguments, "--tensorboard", {"tensorboard": True}),
        (tune.TuneArguments, "--space s", {"space": Path("s")}),
        (tune.TuneArguments, "--trials 7", {"trials": 7}),
        (tune.TuneArguments, "--workers 7", {"workers": 7}),
        (tune.TuneArguments, "--out o", {"out": Path("o")}),
        (tune.TuneArguments, "--overwrite", {"overwrite": True}),
        (tune.TuneArguments, "--resume r", {"resume": Path("r")}),
        (tune.TuneArguments, "--config c", {"config": Path("c")}),
        (tune.TuneArguments, "--preset mnist", {"preset": "mnist"}),
        (tune.TuneArguments, "--json", {"json": True}),
        (RunArguments, "--data d", {"data": "d"}),
        (RunArguments, "--data-root d", {"data_root": Path("d")}),
        (RunArguments, "--seed 0", {"seed": 0}),
        (RunArguments, "--device cpu", {"device": "cpu"}),
        (evaluate.EvaluateArguments, "--num-samples 7", {"num_samples": 7}),
        (evaluate.EvaluateArguments, "--num-images 7", {"num_images": 7}),
        (evaluate.EvaluateArguments, "--split train", {"split": "train"}),
        (evaluate.EvaluateArguments, "--json", {"json": True}),
        (encode.EncodeArguments, "--overwrite", {"overwrite": True}),
        (generate.GenerateArguments, "--num 7", {"num": 7}),
        (generate.GenerateArguments, "--draw", {"draw": True}),
        (generate.GenerateArguments, "--seed 7", {"seed": 7}),
        (generate.GenerateArguments, "--overwrite", {"overwrite": True}),
        (generate.GenerateArguments, "--device cpu", {"device": "cpu"}),
        (diagnose.DiagnoseArguments, "--quick", {"quick": True}),
        (diagnose.DiagnoseArguments, "--strict", {"strict": True}),
        (diagnose.DiagnoseArguments, "--json", {"json": True}),
        (compare.CompareArguments, "--data d", {"data": "d"}),
        (compare.CompareArguments, "--data d --max-value 7", {"data": "d", "max_value": 7}),
        (compare.CompareArguments, "--data-root d", {"data_root": Path("d")}),
        (compare.CompareArguments, "--num-samples 7", {"num_samples": 7}),
        (compare.CompareArguments, "--num-rows 7", {"num_rows": 7}),
        (compare.CompareArguments, "--seed 7", {"seed": 7}),
        (compare.CompareArguments, "--device cpu", {"device": "cpu"}),
        (compare.CompareArguments, "--json", {"json": True}),
        (compare.CompareArguments, "--out o", {"out": Path("o")}),
        (compare.CompareArguments, "--out o --overwrite", {"out": Path("o"), "overwrite": True}),
        (export.ExportArguments, "--onnx", {"onnx": True}),
        (export.ExportArguments, "--weights-only", {"weights_only": True}),
        (export.ExportArguments, "--license mit", {"license": "mit"}),
        (export.ExportArguments, "--data-license public", {"data_license": "public"}),
        (export.ExportArguments, "--num-samples 7", {"num_samples": 7}),
        (export.ExportArguments, "--num-images 7", {"num_images": 7}),
        (export.ExportArguments, "--data d", {"data": "d"}),
        (export.ExportArguments, "--data-root d", {"data_root": Path("d")}),
        (export.ExportArguments, "--overwrite", {"overwrite": True}),
        (export.ExportArguments, "--json", {"json": True}),
        (report.ReportArguments, "--out o", {"out": Path("o")}),
        (report.ReportArguments, "--overwrite", {"overwrite": True}),
        (report.ReportArguments, "--data-root d", {"data_root": Path("d")}),
    ],
)
def test_flags_of_the_commands(kind, arguments, given):
    required = {"run": Path("r"), "runs": (Path("r"), Path("s")), "out": Path("o.npz")}
    names = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    base = kind(**{name: required[name] for name in names})
    line = ["r"] * ("run" in names) + ["r", "s"] * ("runs" in names)
    line += ["--out", "o.npz"] if "out" in names else []
    assert parse(kind, [*line, *arguments.split()], "x", None) == dataclasses.replace(base, **given)


# --- files of settings, presets, flags ------------------------------------------------------------


def test_a_config_of_all_settings_comes_back(asked, tmp_path):
    apart = {"model.kind", "fit.objective", "fit.num_particles", "data.columns"}
    names = set(GIVEN) - set(BESIDE) - apart  # which do not go with all others
    arguments = [part for name in names for part in flags(name, GIVEN[name][0])]
    config = train.config_of(asked(*arguments))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert leaves(asked("--config", path)) == leaves(config)
    assert {name: leaves(config)[name] for name in names} == {n: GIVEN[n][1] for n in names}


def test_flags_win_over_a_config_or_preset_and_these_over_defaults(asked, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model": {"latent_dim": 5}, "seed": 6, "fit": {"epochs": 7}}')
    found = leaves(asked("--config", path, "--seed", 0, "--epochs", 3))
    assert found == {**leaves(Config()), "model.latent_dim": 5, "seed": 0, "fit.epochs": 3}
    preset = leaves(PRESETS["iwae-mnist"])
    assert leaves(asked("--preset", "iwae-mnist")) == preset
    found = leaves(asked("--preset=iwae-mnist", "--epochs", "None", "--hidden", 9))
    assert found == {**preset, "fit.epochs": None, "model.hidden": (9,)}
    assert get_args(get_type_hints(train.TrainArguments)["preset"])[0].__args__ == (*PRESETS,)


# --- a run and its data ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with seed 3 on grey images, binarized by the seed of the draws."""
    folder = tmp_path_factory.mktemp("flags")
    np.save(folder / "grey.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8))
    np.save(folder / "other.npy", np.random.default_rng(1).integers(0, 256, (9, 4, 4), np.uint8))
    arguments = ["--likelihood", "bernoulli", "--seed", "3", "--data-root", str(folder / "root")]
    arguments += ["--epochs", "1", "--hidden", "8", "--latent-dim", "2", "--test-size", "6"]
    out = ["--data", str(folder / "grey.npy"), "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda run: None)
        patch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)
        assert train.main([*arguments, *out]) == 0
    return folder / "run"


def opened(run: Path, **settings: Any) -> cli.OpenRun:
    return open_run(RunArguments(run, **settings))


def test_the_seed_of_the_draws_is_the_runs_own_unless_given(run):
    assert [opened(run, seed=s).seed for s in (None, 0, 5)] == [3, 0, 5]
    # the splits stay those of the training
    splits = load_data(str(run.parent / "grey.npy"), 3, test_size=6)
    assert torch.equal(opened(run).splits.test.rows, splits.test.rows)
    assert not torch.equal(
        splits.test.rows, load_data(str(run.parent / "grey.npy"), 0, test_size=6).test.rows
    )
    rows = [opened(run, seed=s).splits.test.rows for s in (None, 0, 5)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_other_data_are_test_rows_and_the_runs_own_keep_their_splits(run, tmp_path):
    sizes = {}
    copy = tmp_path / "copy.npy"
    copy.write_bytes((run.parent / "grey.npy").read_bytes())
    for name, data in [
        ("own", None),
        ("copy", str(copy)),
        ("other", str(run.parent / "other.npy")),
    ]:
        splits = opened(run, data=data).splits
        sizes[name] = [len(split) for split in (splits.train, splits.validation, splits.test)]
    assert sizes == {"own": [31, 3, 6], "copy": [31, 3, 6], "other": [0, 0, 9]}


def test_changed_data_are_refused(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="are not the data that"):
        cli.load_run_data(
            dataclasses.replace(opened(run).checkpoint, fingerprint="another"), None, None
        )


def test_the_root_of_data_sets_is_the_runs_own_unless_given(run, monkeypatch):
    import pyro_vae.data.loading as loading

    roots, load = [], loading.load_data
    monkeypatch.setattr(
        loading,
        "load_data",
        lambda config, seed, spec: roots.append(config.root) or load(config, seed, spec=spec),
    )
    opened(run)
    opened(run, data_root=Path("elsewhere"))
    assert roots == [run.parent / "root", Path("elsewhere")]


def results(capsys, run, *arguments) -> dict[str, Any]:
    capsys.readouterr()
    line = [str(run), "--json", "--num-samples", "4", *map(str, arguments)]
    assert evaluate.main(line) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_of_evaluate_change_the_numbers(run, capsys):
    own = results(capsys, run)
    assert own == results(capsys, run, "--seed", 3)
    zero = results(capsys, run, "--seed", 0)
    assert zero["log_evidence"] != own["log_evidence"]
    assert (own["binarization"], zero["binarization"]) == ("fixed, seed 3", "fixed, seed 0")
    assert results(capsys, run, "--split", "validation")["num_images"] == 3
    assert results(capsys, run, "--split", "train", "--num-images", 2)["num_images"] == 2
    assert results(capsys, run, "--data", run.parent / "other.npy")["num_images"] == 9
    assert evaluate.main([str(run), "--num-samples", "4"]) == 0
    assert capsys.readouterr().out.startswith(str(run / "checkpoints" / "best.pt"))
    assert evaluate.main([str(run), "--device", "cuda:99"]) == 2


def codes(run: Path, out: Path, *arguments: Any) -> dict[str, np.ndarray]:
    line = [str(run), "--out", str(out), "--overwrite", *map(str, arguments)]
    assert encode.main(line) == 0
    with np.load(out) as archive:
        return dict(archive)


def test_flags_of_encode_change_the_codes(run, tmp_path):
    out = tmp_path / "codes.npz"
    own, three, zero = (codes(run, out, *seed) for seed in ([], ["--seed", 3], ["--seed", 0]))
    assert np.array_equal(own["mean"], three["mean"])
    assert not np.array_equal(own["mean"], zero["mean"])
    assert np.array_equal(own["split"], zero["split"])
    assert len(codes(run, out, "--data", run.parent / "other.npy")["mean"]) == 9
    assert encode.main([str(run), "--out", str(out), "--device", "cuda:99"]) == 2
    assert encode.main([str(run), "--out", str(out)]) == 2  # without --overwrite


# --- generate -------------------------------------------------------------------------------------


def generated(run: Path, folder: Path, *arguments: Any) -> dict[str, np.ndarray]:
    out = folder / "x.npz"
    line = [str(run), "--out", str(out), "--overwrite", *map(str, arguments)]
    assert generate.main(line) == 0
    with np.load(out) as archive:
        return dict(archive)


def test_flags_of_generate_change_the_data(run, tmp_path, capsys):
    default, zero, one = (generated(run, tmp_path, *s) for s in ([], ["--seed", 0], ["--seed", 1]))
    assert np.array_equal(default["z"], zero["z"])
    assert not np.array_equal(default["z"], one["z"])
    decoded = load(run).likelihood(torch.from_numpy(default["z"])).mean.detach()
    np.testing.assert_allclose(default["x"], 255 * decoded.numpy(), rtol=1e-4)
    assert "64 means of p(x|z)" in capsys.readouterr().out
    assert len(default["x"]) == len(default["z"]) == 64
    few = generated(run, tmp_path, "--num", 3, "--draw")
    assert few["x"].shape == (3, 1, 4, 4)
    assert set(np.unique(few["x"])) <= {0, 255}, "draws of the binarized images"
    assert "3 draws from p(x|z)" in capsys.readouterr().out
    assert not set(np.unique(default["x"])) <= {0, 255}
    assert default["x"].max() > 1, "on the scale of the data"
    assert generate.main([str(run), "--out", str(tmp_path / "x.npy"), "--num", "3"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 4, 4)
    assert generate.main([str(run), "--out", str(tmp_path / "X.PNG"), "--num", "3"]) == 0
    assert (tmp_path / "X.PNG").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for line, message in [
        (["--num", "0"], "--num expects an integer of at least 1; got 0"),
        (["--device", "cuda:99"], "--device expects auto or one of cpu"),
        ([], "exists; give another --out, or --overwrite"),
    ]:
        overwrite = ["--overwrite"] * bool(line)
        assert generate.main([str(run), "--out", str(tmp_path / "x.npz"), *line, *overwrite]) == 2
        assert message in capsys.readouterr().err


def test_the_size_of_a_grid_is_limited():
    generate.GenerateArguments(Path("r"), Path("a.png"), num=2500)
    generate.GenerateArguments(Path("r"), Path("a.npy"), num=2501)
    with pytest.raises(InputError, match=r"at most 2500 for a \.png grid; got 2501"):
        generate.GenerateArguments(Path("r"), Path("a.PNG"), num=2501)


# --- devices, files, limits -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cuda", "rank", "world", "device"),
    [
        ("auto", False, None, None, "cpu"),
        ("auto", True, None, None, "cuda"),
        ("cpu", True, None, None, "cpu"),
        ("auto", True, "2", "4", "cuda:2"),
        ("cuda", True, "1", "2", "cuda:1"),
        ("cpu", True, "1", "2", "cpu"),
        ("cuda:1", True, None, None, "cuda:1"),
        ("cuda:1", True, "0", "1", "cuda:1"),
    ],
)
def test_devices(name, cuda, rank, world, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    for variable, value in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert choose_device(name) == torch.device(device)


def test_devices_that_cannot_be_meant(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="each process needs its own GPU: give --device cuda, not"):
        choose_device("cuda:0")
    for name in ("meta", "mps", "tpu", ""):
        with pytest.raises(InputError, match="--device expects auto or one of cpu"):
            choose_device(name)


def test_files_that_cannot_be_written(tmp_path):
    there = tmp_path / "a.npz"
    there.touch()
    refuse_existing(there, True, (".npz",))
    refuse_existing(tmp_path / "b.NPZ", False, (".png", ".npz"))
    for out, overwrite, message in [
        (there, False, "exists; give another --out"),
        (tmp_path / "b.npy", True, "ending in .png or .npz"),
        (tmp_path / "none" / "b.npz", True, "expects an existing folder; there is no"),
    ]:
        with pytest.raises(InputError, match=message):
            refuse_existing(out, overwrite, (".png", ".npz"))


def test_limits_are_exact(monkeypatch):
    for value in (None, 4, 2**63 - 1):
        check_integer("x", value, 4)
    for value in (3, 2**63):
        with pytest.raises(InputError, match="--x expects an integer"):
            check_integer("x", value, 4)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 10}[name])
    check_memory(10, "x", "lower it")
    with pytest.raises(InputError, match="not enough memory"):
        check_memory(11, "x", "lower it")
