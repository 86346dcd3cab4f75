"""Models to and from a hub, which a folder stands for: what is called, and what is refused."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import example_splits

import pyro_vae
from pyro_vae import Config, InputError, ModelConfig
from pyro_vae.config import VERSION, resolve
from pyro_vae.runtime.files import write_together
from pyro_vae.training.checkpoint import Checkpoint, export_model
from pyro_vae.training.sharing import DOWNLOADED

hub = pytest.importorskip("huggingface_hub", reason="needs pip install '.[hub]'")


@pytest.fixture
def folder(tmp_path) -> Path:
    splits = example_splits("binomial", tmp_path)
    config = resolve(Config(model=ModelConfig(latent_dim=2, hidden=(4,))), "binomial", 1000)
    vae = pyro_vae.build(config.model, splits)
    fields = (vae, config, splits.fingerprint, None, [], Path("best.pt"), config.model, [])
    path = tmp_path / "export"
    path.mkdir()
    write_together(path, export_model(Checkpoint(*fields)))
    (path / "README.md").write_text("card")
    return path


class Hub:
    """Repositories as folders, with the two calls of `HfApi` and `snapshot_download`."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", repo_id, options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.calls.append(("upload_folder", repo_id, options))
        self._copy(Path(folder_path), self.root / repo_id, options["allow_patterns"])
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("snapshot_download", repo_id, options))
        copy = self.root / "cache" / (options["revision"] or "main")
        copy.mkdir(parents=True)
        self._copy(self.root / repo_id, copy, options["allow_patterns"])
        return str(copy)

    def _copy(self, source: Path, target: Path, patterns: list[str]) -> None:
        for path in source.rglob("*"):
            name = str(path.relative_to(source))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "hub")

    def api(**options: Any) -> Hub:
        made.calls.append(("HfApi", options))
        return made

    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
    return made


def equal(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_there_and_back(folder, fake):
    for name in ("encoder.pt2", "decoder.onnx", "notes.txt", ".token"):
        (folder / name).write_bytes(b"x")
    url = pyro_vae.push_to_hub(folder, "me/digits", private=True, revision="dev")
    assert url == "https://hub/me/digits/commit/1"
    there = {p.name for p in (fake.root / "me/digits").iterdir()}
    assert there == {*DOWNLOADED, "encoder.pt2", "decoder.onnx"}
    assert [call[0] for call in fake.calls] == ["HfApi", "create_repo", "upload_folder"]
    assert fake.calls[0][1] == {"library_name": "pyro-vae", "library_version": VERSION}
    assert fake.calls[1][1:] == ("me/digits", {"private": True, "exist_ok": True})
    assert fake.calls[2][2]["revision"] == "dev"
    vae = pyro_vae.from_pretrained("me/digits", revision="v1", cache="there")
    name, repository, options = fake.calls[-1]
    assert (name, repository) == ("snapshot_download", "me/digits")
    assert (options["revision"], options["cache_dir"]) == ("v1", "there")
    assert {p.name for p in (fake.root / "cache" / "v1").iterdir()} == set(DOWNLOADED)
    assert equal(vae, pyro_vae.load(folder))


def test_the_calls_are_those_of_the_installed_library(folder, monkeypatch):
    """The signatures of the real functions take these arguments."""
    import inspect

    seen = []

    def bound(function: Any, result: Any, own: bool = True) -> Any:
        signature = inspect.signature(function)

        def call(*arguments: Any, **options: Any) -> Any:
            signature.bind(*arguments, **options)
            seen.append(function.__name__)
            return result

        return call

    commit = SimpleNamespace(commit_url="url")
    for name, result in (("create_repo", None), ("upload_folder", commit)):
        monkeypatch.setattr(hub.HfApi, name, bound(getattr(hub.HfApi, name), result))
    download = bound(hub.snapshot_download, str(folder))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert pyro_vae.push_to_hub(folder, "me/digits") == "url"
    assert equal(pyro_vae.from_pretrained("me/digits"), pyro_vae.load(folder))
    assert seen == ["create_repo", "upload_folder", "snapshot_download"]


def test_a_folder_needs_no_hub(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert equal(pyro_vae.from_pretrained(folder), pyro_vae.load(folder))
    with pytest.raises(InputError, match="is a folder, which has no revisions; got 'v1'"):
        pyro_vae.from_pretrained(folder, revision="v1")
    for call in (
        lambda: pyro_vae.from_pretrained("me/digits"),
        lambda: pyro_vae.push_to_hub(folder, "me/digits"),
    ):
        with pytest.raises(InputError, match=r"pip install 'pyro-vae\[hub\]'"):
            call()


def test_only_an_exported_model_that_loads_is_uploaded(folder, fake):
    with pytest.raises(InputError, match=r"expected a folder of python -m pyro_vae\.export"):
        pyro_vae.push_to_hub(folder.parent, "me/digits")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is not the file that"):
        pyro_vae.push_to_hub(folder, "me/digits")
    assert fake.calls == []


def test_a_repository_of_another_program(fake):
    (fake.root / "me/other").mkdir(parents=True)
    (fake.root / "me/other/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"me/other is not a model of pyro_vae"):
        pyro_vae.from_pretrained("me/other")


def errors() -> list[BaseException]:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    network: Any = HfHubHTTPError.__mro__[1]
    return [
        OSError("no route\nmore"),
        EntryNotFoundError("no entry"),
        LocalEntryNotFoundError("not in the cache"),
        HFValidationError("a name"),
        network("refused"),
    ]


@pytest.mark.parametrize("error", errors(), ids=lambda e: type(e).__name__)
def test_errors_of_the_hub_are_one_line(error, folder, fake, monkeypatch):
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="cannot download the model me/digits: ") as caught:
        pyro_vae.from_pretrained("me/digits")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(fake, "create_repo", fail)
    with pytest.raises(InputError, match=r"cannot upload .* to me/digits: "):
        pyro_vae.push_to_hub(folder, "me/digits")


def test_a_name_that_is_none():
    with pytest.raises(InputError, match="cannot download the model a b/c/d: Repo id"):
        pyro_vae.from_pretrained("a b/c/d")
