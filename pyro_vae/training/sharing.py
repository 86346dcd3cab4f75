"""Models on the Hugging Face Hub: an exported folder there and back.

Three files are ever downloaded: weights, settings and the card. None of them holds code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import VERSION, InputError
from ..models.labels import Model
from ..runtime.packages import of_extra
from .checkpoint import load, load_checkpoint
from .exported import CARD, CONFIG, WEIGHTS, is_export

DOWNLOADED = [WEIGHTS, CONFIG, CARD]
# What `export` writes. Other files in the folder are not uploaded.
UPLOADED = [*DOWNLOADED, "*.pt2", "*.onnx"]


def from_pretrained(
    name: str | Path, revision: str | None = None, cache: str | Path | None = None
) -> Model:
    """Load an exported model from the Hugging Face Hub or from a folder, as `load` does.

    Requires `pip install 'pyro-vae[hub]'`, except for a folder. Runs no code from the files.

    Args:
        name: a folder of `export`, or the name of a repository, as in "user/model".
        revision: branch, tag or commit of the repository. A commit is always the same model.
        cache: folder of the downloads; None for that of huggingface-hub.

    Raises:
        InputError: there is no such model, it cannot be downloaded, or a file of it is damaged.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a folder, which has no revisions; got {revision!r}")
        return load(name)
    hub = _hub()
    with _explained(f"cannot download the model {name}"):
        folder = hub.snapshot_download(
            str(name),
            revision=revision,
            cache_dir=cache,
            allow_patterns=DOWNLOADED,
            library_name="pyro-vae",
            library_version=VERSION,
        )
    if not is_export(Path(folder)):
        raise InputError(f"{name} is not a model of pyro_vae: it has no file {WEIGHTS}")
    return load(folder)


def push_to_hub(
    folder: str | Path,
    name: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload a model of pyro_vae",
) -> str:
    """Upload a folder of `export` to the Hugging Face Hub.

    Requires `pip install 'pyro-vae[hub]'` and `hf auth login`. The repository is created if there
    is none. Only the files that `export` writes are uploaded.

    Args:
        folder: of `python -m pyro_vae.export`.
        name: of the repository, as in "user/model".
        private: whether a new repository is private; None for the default of the account.
        revision: branch to upload to; None for the main one.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the folder is not an exported model, or the upload fails.
    """
    path = Path(folder)
    if not is_export(path):
        raise InputError(
            f"expected a folder of python -m pyro_vae.export; got {folder}, without {WEIGHTS}"
        )
    load_checkpoint(path)  # what cannot be loaded here cannot be loaded there
    api = _hub().HfApi(library_name="pyro-vae", library_version=VERSION)
    with _explained(f"cannot upload {folder} to {name}"):
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=path,
            allow_patterns=UPLOADED,
            revision=revision,
            commit_message=message,
        )
    return commit.commit_url


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn errors of names, access and network into one line.

    Raises:
        InputError: `what`, and the first line of the reason.
    """
    # The last is the base class of errors of its network library, which changes with its version.
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    network: Any = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError, network) as error:
        first = str(error).strip().splitlines()
        raise InputError(f"{what}: {first[0] if first else type(error).__name__}") from None


def _hub() -> Any:
    return of_extra("huggingface_hub", "hub", "the hub requires a package")
