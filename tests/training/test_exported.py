"""Exported models come back bit for bit; a folder that is damaged or hostile is one line."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import family_models
import mixed_tables
import pytest
import torch
from conftest import example_splits
from masked import missing_splits
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import pyro_vae
from pyro_vae import Config, DataConfig, InputError, ModelConfig, RefitConfig
from pyro_vae.config import resolve
from pyro_vae.runtime.files import write_together
from pyro_vae.training import exported
from pyro_vae.training.checkpoint import Checkpoint, export_model, load_checkpoint, serialize
from pyro_vae.training.refitting import refitted_config

WEIGHT = "encoder.layers.1.weight"  # (4, 20)


def checkpoint_of(vae: Any, config: Config, splits: Any, **changes: Any) -> Checkpoint:
    fields = {"model": config.model, "refit": [], "history": [], "training": None, **changes}
    return Checkpoint(vae, config, splits.fingerprint, path=Path("best.pt"), **fields)


def round_trip(vae: Any, config: Config, splits: Any, folder: Path, **changes: Any) -> Checkpoint:
    write_together(folder, export_model(checkpoint_of(vae, config, splits, **changes)))
    return load_checkpoint(folder)


def same(one: Any, other: Any) -> bool:
    """Whether two models have the same values in all weights and buffers, also those not saved."""
    a, b = one.state_dict(), other.state_dict()
    kept = all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in {*a, *b})
    buffers = dict(one.named_buffers()), dict(other.named_buffers())
    return kept and all(buffers[0][name].equal(buffers[1][name]) for name in {*buffers[0]})


@pytest.mark.parametrize(("guide", "prior"), family_models.PAIRS)
def test_every_family_comes_back(guide, prior, tmp_path):
    splits = family_models.rows("gaussian")
    asked = Config(model=family_models.config(guide, prior, likelihood="gaussian"))
    config = resolve(asked, "gaussian", 40)
    vae = family_models.randomized(pyro_vae.build(config.model, splits)).eval()
    loaded = round_trip(vae, config, splits, tmp_path)
    assert same(loaded.vae, vae)
    assert not loaded.vae.training
    assert loaded.config == config
    x = splits.train.take(torch.arange(3), "real")
    torch.manual_seed(0)
    expected = vae.posterior(x).sample()
    torch.manual_seed(0)
    assert torch.equal(loaded.vae.posterior(x).sample(), expected)
    assert torch.equal(loaded.vae.prior().log_prob(expected), vae.prior().log_prob(expected))


@pytest.mark.parametrize("kind", ["columns", "missing", "label", "partial", "ae", "refined"])
def test_every_kind_of_model_comes_back(kind, tmp_path, digits):
    splits, changes = digits, {}
    settings: dict[str, Any] = {"latent_dim": 2, "hidden": (4,)}
    if kind == "columns":
        splits = mixed_tables.splits_of(mixed_tables.values(60))
    elif kind == "missing":
        splits = missing_splits("gaussian")
    elif kind != "refined":
        settings |= {"kind": "ae"} if kind == "ae" else {"condition": kind}
    config = resolve(Config(model=ModelConfig(**settings)), splits.likelihood, 50)
    vae = family_models.randomized(pyro_vae.build(config.model, splits))
    if kind == "refined":
        vae = pyro_vae.refit(vae, splits)
        changes["model"] = refitted_config(config.model, RefitConfig())
    loaded = round_trip(vae.eval(), config, splits, tmp_path, **changes)
    assert same(loaded.vae, vae)
    assert loaded.vae.likelihood_module.spec == vae.likelihood_module.spec
    assert (loaded.config, loaded.model) == (config, changes.get("model", config.model))
    assert loaded.fingerprint == splits.fingerprint


def test_the_path_of_the_data_stays_at_home(tmp_path):
    splits = example_splits("gaussian", tmp_path)
    path = tmp_path / "patients.npy"
    data = DataConfig(str(path), root=tmp_path / "root")
    asked = Config(data, ModelConfig(latent_dim=2, hidden=(4,)), device="cuda:7")
    config = resolve(asked, "gaussian", 50)
    vae = pyro_vae.build(config.model, splits)
    loaded = round_trip(vae, config, splits, tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert (loaded.config.data.source, loaded.config.data.root) == ("patients.npy", Path("data"))
    assert loaded.config.device == "auto"


# --- damaged and hostile folders ------------------------------------------------------------------


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    splits = example_splits("binomial", tmp_path_factory.mktemp("data"))
    config = resolve(Config(model=ModelConfig(latent_dim=2, hidden=(4,))), "binomial", 1000)
    vae = pyro_vae.build(config.model, splits)
    return export_model(checkpoint_of(vae, config, splits))


@pytest.fixture
def folder(contents, tmp_path) -> Path:
    write_together(tmp_path, contents)
    return tmp_path


def rewrite(folder: Path, settings: Any = None, tensors: Any = None) -> None:
    """Change both files, with a digest that fits."""
    values = json.loads((folder / "config.json").read_bytes())
    weights = load_tensors((folder / "model.safetensors").read_bytes())
    if tensors:
        weights = tensors(weights)
    content = weights if isinstance(weights, bytes) else save_tensors(weights)
    values["sha256"] = sha256(content).hexdigest()
    if settings:
        values = settings(values) or values
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(values))


def entry(path: str, value: Any):
    def apply(values: dict[str, Any]) -> None:
        *names, last = path.split("/")
        for name in names:
            values = values[name]
        values[last] = value

    return {"settings": apply}


def weight(change):
    return {"tensors": lambda w: {**w, WEIGHT: change(w[WEIGHT])}}


def without(name: str):
    return {"tensors": lambda w: {k: v for k, v in w.items() if k != name}}


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


def dropped(name: str):
    return {"settings": lambda v: {k: x for k, x in v.items() if k != name}}


BIG = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": (weight(lambda w: w * torch.nan), f"{WEIGHT} expects finite values"),
    "another shape": (weight(lambda w: w.T.contiguous()), r"shape \(4, 20\); got .*\(20, 4\)"),
    "double": (weight(lambda w: w.double()), "got strided float64"),
    "half": (weight(lambda w: w.bfloat16()), "got strided bfloat16"),
    "missing tensor": (without(WEIGHT), f"do not suit the config, in {WEIGHT}"),
    "missing moments": (without("encoder.mean"), "do not suit the config, in encoder.mean"),
    "additional": ({"tensors": lambda w: {**w, "more": torch.ones(1)}}, "config, in more"),
    "a huge header": ({"tensors": lambda w: header(b"{}", 2**40)}, "is not a file of safetensors"),
    "more than there is": ({"tensors": lambda w: header(BIG)}, "is not a file of safetensors"),
    "no header": ({"tensors": lambda w: b"pickle"}, "is not a file of safetensors"),
    "an empty file": ({"tensors": lambda w: b""}, "is not a file of safetensors"),
    "a pickle": ({"tensors": lambda w: pickle.dumps(1)}, "is not a file of safetensors"),
    "more units": (entry("config/model/hidden", [5]), f"{WEIGHT} expects .* shape|shape"),
    "a billion units": (entry("config/model/hidden", [10**9]), "memory|of shape"),
    "rows of any size": (entry("data/shape", [10**12]), "memory|overflow|of shape"),
    "a negative size": (entry("data/shape", [-4]), "data.shape expects one to four sizes"),
    "no size": (entry("data/shape", []), "data.shape expects one to four sizes"),
    "text for sizes": (entry("data/shape", ["a"]), "data.shape = .*: expected integers"),
    "text for a bound": (entry("data/max_value", "16"), "data.max_value = '16'"),
    "a bound of 0": (entry("data/max_value", 0), "data.max_value expects"),
    "a number for classes": (entry("data/classes", 3), "data.classes = 3"),
    "infinite offsets": (entry("data/offset", [float("inf")]), "expected 1 offsets|finite"),
    "kinds of no table": (entry("data/kinds", [["gaussian", []]]), "expected kinds and names"),
    "an unknown kind": (entry("data/kinds", [["pickle", []]]), "a kind expects one of"),
    "numbers for categories": (entry("data/kinds", [["bernoulli", [0, 1]]]), "data.kinds = "),
    "no kinds": (entry("data/kinds", 7), "data.kinds = 7"),
    "an unknown setting": (entry("config/model/code", "x"), "unknown setting model.code"),
    "an unknown entry": (entry("auto_map", {"AutoModel": "x.py"}), "these differ: auto_map"),
    "out of range": (entry("config/model/latent_dim", 0), "latent-dim"),
    "no config": (entry("config", 3), "expects settings by name"),
    "no data": (entry("data", 3), "is inconsistent"),
    "another guide": (entry("model", {"guide": 7}), "guide"),
    "a later format": (entry("format_version", 2), "in format 2; this is"),
    "another program": (entry("format", "transformers"), "is not that of a model exported"),
    "no digest": (dropped("sha256"), "these differ: sha256"),
    "another digest": (entry("sha256", "0" * 64), "is not the file that config.json describes"),
    "a list": ({"settings": lambda v: [v]}, "is not that of a model exported"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_one_line_before_memory_is_taken(name, folder):
    changes, message = HOSTILE[name]
    pyro_vae.load(folder)  # imports, and the memory of the model itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rewrite(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        pyro_vae.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_categories_are_not_trusted_with_memory(folder):
    """A column of a million categories, and many others: a table of all would be their product."""
    count = 20_000
    kinds = [["categorical", ["a", "b"]]] * (count - 1)
    kinds.append(["categorical", [str(i) for i in range(500_000)]])

    def change(values: dict[str, Any]) -> None:
        values["data"] |= {"kinds": kinds, "columns": ["x"] * count, "shape": [count]}
        values["config"]["model"]["likelihood"] = "columns"

    rewrite(folder, settings=change)
    with pytest.raises(InputError, match="not enough memory: the categories"):
        pyro_vae.load(folder)


def test_files_that_are_not_there_or_not_files(folder):
    whole = {p: p.read_bytes() for p in folder.iterdir()}
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="cannot read the config"):
        pyro_vae.load(folder)
    os.mkfifo(folder / "config.json")
    with pytest.raises(InputError, match="not a regular file"):
        pyro_vae.load(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b"[" * 100_000)
    with pytest.raises(InputError, match=r"not a config\.json"):
        pyro_vae.load(folder)
    (folder / "config.json").write_bytes(b" " * (exported.MAX_CONFIG_BYTES + 1))
    with pytest.raises(InputError, match="more than 16 MiB"):
        pyro_vae.load(folder)
    (folder / "config.json").write_bytes(whole[folder / "config.json"])
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        pyro_vae.load(folder)


def test_every_flipped_bit_of_the_weights_is_noticed(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), len(content) // 50):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors is not the file that"):
            pyro_vae.load(folder)


class Executed:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_nothing_in_a_folder_is_executed(folder, monkeypatch, tmp_path):
    """Neither a program nor a module nor a checkpoint beside the two files is ever opened."""
    monkeypatch.chdir(tmp_path)
    (folder / "checkpoints").mkdir()
    for name in ("encoder.pt2", "decoder.pt2", "pytorch_model.bin", "checkpoints/best.pt"):
        (folder / name).write_bytes(pickle.dumps(Executed()))
    (folder / "modeling.py").write_text("import os; os.mkdir('executed')")
    for module, name in ((torch, "load"), (pickle, "loads"), (torch.export, "load")):
        monkeypatch.setattr(module, name, None)
    assert isinstance(pyro_vae.load(folder), pyro_vae.VAE)
    assert not Path("executed").exists()


def test_loaded_weights_are_no_part_of_the_file(folder):
    vae = pyro_vae.load(folder)
    before = copy.deepcopy(vae.state_dict())
    (folder / "model.safetensors").write_bytes(b"")
    assert all(value.equal(before[name]) for name, value in vae.state_dict().items())
    assert all(p.requires_grad for p in vae.parameters())


@pytest.mark.slow
def test_another_process_loads_the_same_weights(folder):
    vae = pyro_vae.load(folder)
    code = (
        "import pyro_vae, sys; vae = pyro_vae.load(sys.argv[1])\n"
        "print(sum(v.double().sum().item() for v in vae.state_dict().values()).hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout.strip() == sum(v.double().sum().item() for v in vae.state_dict().values()).hex()
    )


def test_an_export_has_no_state_to_resume(folder):
    for which in ("last", "best"):
        with pytest.raises(InputError, match="is an exported model, without the state"):
            load_checkpoint(folder, which)


def test_a_checkpoint_is_checked_as_an_export(tmp_path):
    """Types and ranges of the data, which version 0.1 trusted."""
    splits = example_splits("binomial", tmp_path)
    config = resolve(Config(model=ModelConfig(latent_dim=2, hidden=(4,))), "binomial", 1000)
    path = tmp_path / "a.pt"
    path.write_bytes(serialize(pyro_vae.build(config.model, splits), config, splits, []))
    content = torch.load(path, weights_only=True)
    del content["digests"]
    content["data"]["max_value"] = "16"
    torch.save({**content, "format_version": 1}, path)
    with pytest.raises(InputError, match=r"data\.max_value = '16'"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_earlier_files(contents, tmp_path, monkeypatch):
    write_together(tmp_path, dict.fromkeys(contents, b"earlier"))
    from pyro_vae.runtime import files

    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space") as caught:
        write_together(tmp_path, contents)
    assert Path(caught.value.filename).name in contents
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(
        contents, b"earlier"
    )
