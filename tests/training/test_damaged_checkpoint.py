"""Damaged and hostile checkpoints are refused by name, before memory is taken."""

from __future__ import annotations

import copy
import random
import resource
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_splits

import pyro_vae
from pyro_vae import Config, FitConfig, InputError, ModelConfig
from pyro_vae.config import resolve
from pyro_vae.training import checkpoint
from pyro_vae.training.checkpoint import load_checkpoint, serialize

WEIGHT = "encoder.layers.1.weight"  # (4, 20)


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A small checkpoint with the state of a training."""
    splits = example_splits("binomial", tmp_path_factory.mktemp("data"))
    config = resolve(Config(model=ModelConfig(latent_dim=2, hidden=(4,))), "binomial", 1000)
    vae = pyro_vae.build(config.model, splits)
    (record,) = pyro_vae.fit(vae, splits, FitConfig(epochs=1, batch_size=24))
    return serialize(vae, config, splits, [record.metrics()], record.state())


@pytest.fixture
def file(content, tmp_path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    return path


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return one == other


def values(loaded: checkpoint.Checkpoint) -> dict[str, Any]:
    """All that a checkpoint restores."""
    return {**vars(loaded), "vae": dict(loaded.vae.state_dict())}


def rewrite(file: Path, change, with_digests: bool) -> None:
    """Change the content of a file, in version 1, or with right digests in version 2."""
    content = torch.load(file, weights_only=True)
    del content["digests"]
    change(content)
    content["format_version"] = 2 if with_digests else 1
    if with_digests:
        content["digests"] = checkpoint._digests(checkpoint._leaves(content))
    torch.save(content, file)


def test_a_file_of_version_1_loads(file):
    whole = values(load_checkpoint(file))
    rewrite(file, lambda content: None, with_digests=False)
    assert equal(values(load_checkpoint(file)), whole)


def test_a_damaged_file_of_version_1_fails_its_checksum(file):
    rewrite(file, lambda content: None, with_digests=False)
    content = bytearray(file.read_bytes())
    weight = load_checkpoint(file).vae.state_dict()[WEIGHT].numpy().tobytes()
    content[content.index(weight) + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt is damaged: .* fails its checksum"):
        load_checkpoint(file)


def test_a_value_that_is_missing_or_new_is_noticed(file):
    whole = torch.load(file, weights_only=True)
    for history in ([], [*whole["history"], {}, {"epoch": 2}]):
        torch.save({**whole, "history": history}, file)
        with pytest.raises(InputError, match=r"history/\d/\S+ is not as it was saved"):
            load_checkpoint(file)


def test_best_and_last(content, tmp_path):
    for name, epoch in {"best": 1, "last": 2}.items():
        path = tmp_path / "checkpoints" / f"{name}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        rewrite(path, entry("history/0/epoch", epoch), with_digests=True)
    assert load_checkpoint(tmp_path).history[0]["epoch"] == 1
    assert load_checkpoint(tmp_path, "last").history[0]["epoch"] == 2
    (tmp_path / "checkpoints" / "best.pt").unlink()
    assert load_checkpoint(tmp_path).history[0]["epoch"] == 2


def test_digests_are_required_in_version_2(file):
    content = torch.load(file, weights_only=True)
    del content["digests"]
    torch.save(content, file)
    with pytest.raises(InputError, match=r"model\.pt is inconsistent: 'digests'"):
        load_checkpoint(file)


def test_every_value_has_a_digest(file):
    """One bit in a tensor or another plain value, in an archive that is whole."""
    names = [name for name, _ in checkpoint._leaves(torch.load(file, weights_only=True))]
    names = [name for name in names if not name.startswith("digests/")]
    assert f"weights/{WEIGHT}" in names
    assert "training/optimizer/state/0/exp_avg" in names
    for name in names:
        content = torch.load(file, weights_only=True)
        *path, last = name.split("/")
        part = content
        for key in path:
            part = part[int(key) if isinstance(part, list) or key.isdigit() else key]
        last = int(last) if last.isdigit() else last
        if isinstance(part, tuple):
            continue  # Adam's betas
        value = part[last]
        if isinstance(value, torch.Tensor):
            value.view(-1).view(torch.uint8)[-4] ^= 1
        elif name not in ("format", "format_version"):
            part[last] = not value if isinstance(value, bool | str | None) else value + 1
        else:
            continue
        damaged = file.with_name("damaged.pt")
        torch.save(content, damaged)
        with pytest.raises(InputError, match=r"damaged\.pt"):
            load_checkpoint(damaged)


@pytest.mark.parametrize("change", ["value", "shape", "dtype"])
def test_digest(change):
    x = torch.arange(6.0).reshape(2, 3)
    other = {
        "value": x + (x == 5),
        "shape": x.reshape(3, 2),
        "dtype": x.view(torch.int32),
    }[change]
    assert checkpoint._digest(x) == checkpoint._digest(x.t().contiguous().t())
    assert checkpoint._digest(x) != checkpoint._digest(other)


def weights(change):
    def apply(content: dict[str, Any]) -> None:
        content["weights"][WEIGHT] = change(content["weights"][WEIGHT])

    return apply


def entry(path: str, value: Any):
    def apply(content: dict[str, Any]) -> None:
        *names, last = (int(name) if name.isdigit() else name for name in path.split("/"))
        for name in names:
            content = content[name]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return apply


def huge(content: dict[str, Any]) -> None:
    """A layer of a billion units, whose weights are one value each, repeated by a stride of 0."""
    content["config"]["model"]["hidden"] = [10**9]
    for name, shape in {
        "encoder.layers.1.weight": (10**9, 20),
        "encoder.layers.1.bias": (10**9,),
        "encoder.layers.3.weight": (4, 10**9),
        "decoder.layers.0.weight": (10**9, 2),
        "decoder.layers.0.bias": (10**9,),
        "decoder.layers.2.weight": (20, 10**9),
    }.items():
        content["weights"][name] = torch.zeros(1).expand(shape)


class Beyond:
    """A pickled tensor of a billion values whose storage holds one."""

    def __reduce__(self):
        storage = torch.zeros(1).storage()
        arguments = (storage, 0, (10**9,), (1,), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def quantized(w: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tensors are deprecated
        return torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)


def wide(units: int):
    def apply(content: dict[str, Any]) -> None:
        content["config"]["model"]["hidden"] = [units]

    return apply


def shared_lists(content: dict[str, Any]) -> None:
    """A list of 2^64 leaves in a few bytes."""
    part: list[Any] = [0, 0]
    for _ in range(64):
        part = [part, part]
    content["extra"] = part


FIRST = "training/optimizer/state/0"
HOSTILE = {
    "NaN": (weights(lambda w: w * torch.nan), f"{WEIGHT} expects finite values"),
    "infinity": (weights(lambda w: w / 0), f"{WEIGHT} expects finite values"),
    "integers": (weights(lambda w: w.long()), "expects float32 of shape .* got strided int64"),
    "complex": (weights(lambda w: w.to(torch.complex64)), "got strided complex64"),
    "double": (weights(lambda w: w.double()), "got strided float64"),
    "sparse": (weights(lambda w: w.to_sparse()), "got sparse_coo float32"),
    "quantized": (weights(quantized), "got strided qint8"),
    "beyond its storage": (weights(lambda w: Beyond()), "not a checkpoint of pyro_vae"),
    "meta": (weights(lambda w: torch.empty_like(w, device="meta")), "got fewer values"),
    "expanded": (weights(lambda w: torch.zeros(1).expand(w.shape)), "got fewer values"),
    "no tensor": (weights(lambda w: w.tolist()), f"{WEIGHT} expects float32 .* got list"),
    "another shape": (weights(lambda w: w.t()), r"of shape \(4, 20\); got .*\(20, 4\)"),
    "missing": (entry(f"weights/{WEIGHT}", None), f"do not suit the config, in {WEIGHT}"),
    "additional": (entry("weights/more", torch.zeros(1)), "do not suit the config, in more"),
    "a billion units": (huge, "not enough memory|got fewer values"),
    "three billion units": (wide(3 * 10**9), "not enough memory"),
    "many units": (wide(10**7), "of shape"),
    "units beyond int64": (wide(10**30), "--hidden expects an integer from 1 to"),
    "rows of any size": (entry("data/shape", [10**12]), "memory|overflow|of shape"),
    "no shape": (entry("data/shape", ["a"]), "data.shape = .*: expected integers"),
    "a state of NaN": (entry(f"{FIRST}/exp_avg", torch.full((20,), torch.nan)), "exp_avg of par"),
    "moments of another shape": (entry(f"{FIRST}/exp_avg", torch.zeros(3)), "exp_avg of par"),
    "no moments": (entry(f"{FIRST}/exp_avg_sq", None), "the moments of parameter 0 expects"),
    "an unknown parameter": (entry("training/optimizer/state/99", {}), "optimizer expects"),
    "other parameters": (entry("training/optimizer/param_groups/0/params", [0]), "optimizer exp"),
    "no groups": (entry("training/optimizer/param_groups", 3), "optimizer expects"),
    "no optimizer": (entry("training/optimizer", 3), "optimizer expects .* got int"),
    "no random state": (entry("training/random", {}), "random state is not"),
    "a random state of zeros": (
        entry("training/random/cpu", torch.zeros(5056, dtype=torch.uint8)),
        "random state is not",
    ),
    "text for a number": (entry("training/epoch", "1"), "training's epoch expects"),
    "half an epoch": (entry("training/step", 0.5), "training's step expects"),
    "steps below zero": (entry("training/step", -1), "training's step expects"),
    "no score": (entry("training/best", torch.nan), "training's best expects"),
    "infinite score": (entry("training/best", torch.inf), "training's best expects"),
    "sums of NaN": (entry("training/sums/kl", torch.nan), "training's kl expects"),
    "other sums": (entry("training/sums/more", 1.0), "its sums expects"),
    "more in the state": (entry("training/more", 1.0), "a training's state expects"),
    "history": (entry("history", {"a": 1}), "history expects"),
    "lines of the history": (entry("history/0", 3), "history expects"),
    "setting out of range": (entry("config/model/latent_dim", 0), "latent-dim"),
    "no config": (entry("config", 3), "expects settings by name"),
}
# No digest can be made of these.
UNSTORED = (
    "sparse",
    "quantized",
    "meta",
    "expanded",
    "beyond its storage",
    "a billion units",
)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
@pytest.mark.parametrize(
    ("name", "with_digests"),
    [(n, d) for n in HOSTILE for d in (False, True) if not (d and n in UNSTORED)],
)
def test_hostile_content_is_refused_before_memory_is_taken(name, with_digests, file):
    change, message = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rewrite(file, change, with_digests)
    with pytest.raises(InputError, match=rf"model\.pt is (inconsistent: .*)?({message})") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_file_of_endless_content(file):
    """The number of leaves is bounded by that of the digests."""
    content = torch.load(file, weights_only=True)
    shared_lists(content)
    torch.save(content, file)
    with pytest.raises(InputError, match=r"extra/0/0/.* is not as it was saved"):
        load_checkpoint(file)


def test_a_loaded_state_does_not_change_the_file(file):
    content = file.read_bytes()
    loaded = load_checkpoint(file)
    before = copy.deepcopy(values(loaded))
    for x in (loaded.training["optimizer"]["state"][0]["exp_avg"], *loaded.vae.parameters()):
        x.data.fill_(7.0)
    assert file.read_bytes() == content
    assert equal(values(load_checkpoint(file)), {**before, "path": file})
    state = load_checkpoint(file).training
    file.write_bytes(b"")  # nothing that was loaded is still part of the file
    assert equal(state, before["training"])


def damages(content: bytes, count: int):
    """Single bits in the directory, in local headers and anywhere; runs of bytes; truncations."""
    chance = random.Random(0)
    directory = content.index(b"PK\x01\x02")
    heads = [i for i in range(directory) if content[i : i + 4] == b"PK\x03\x04"]
    for i in range(count):
        damaged = bytearray(content)
        place = [
            chance.randrange(directory, len(content)),
            chance.choice(heads) + chance.randrange(64),
            chance.randrange(len(content)),
        ][i % 3]
        if i % 10 == 9:
            length = chance.randrange(1, 100)
            damaged[place : place + length] = chance.randbytes(length)
        elif i % 10 == 8:
            del damaged[place : place + chance.choice([1, 64, len(content)])]
        else:
            damaged[place] ^= 1 << chance.randrange(8)
        yield bytes(damaged)


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_damage_is_told_or_has_no_effect(count, content, file):
    whole, outcomes = values(load_checkpoint(file)), []
    for damaged in damages(content, count):
        file.write_bytes(damaged)
        message, found = "", None
        try:
            found = values(load_checkpoint(file))
        except InputError as error:
            message = str(error)
        assert equal(found, whole) if found else "model.pt" in message and message.isprintable()
        outcomes.append("equal" if found else "refused")
    assert outcomes.count("refused") > count / 4
    assert outcomes.count("equal") > count / 10


@pytest.mark.parametrize("setting", ["meta", "default device", "double", "inference"])
def test_a_file_loads_under_any_settings(setting, file):
    whole = values(load_checkpoint(file))
    before = torch.get_default_dtype()
    contexts = {
        "meta": torch.device("meta"),
        "default device": torch.device("cpu"),
        "double": torch.no_grad(),
        "inference": torch.inference_mode(),
    }
    with contexts[setting]:
        try:
            torch.set_default_dtype(torch.float64 if setting == "double" else before)
            loaded = load_checkpoint(file)
            assert torch.get_default_dtype() == (torch.float64 if setting == "double" else before)
        finally:
            torch.set_default_dtype(before)
    assert equal(values(loaded), whole)
    assert all(p.requires_grad and not p.is_inference() for p in loaded.vae.parameters())
