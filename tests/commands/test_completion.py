"""The script that completes commands and flags in a shell."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from pyro_vae.__main__ import COMMANDS
from pyro_vae.cli.completion import SHELLS, completion
from pyro_vae.config import InputError


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_and_choices(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(completion(COMMANDS, "bash"), encoding="utf-8")

    def completed(*words: str) -> list[str]:
        """What bash offers for the last word."""
        line = (
            'source "$0"; registered=($(complete -p pyro-vae)); COMP_WORDS=(pyro-vae "$@"); '
            'COMP_CWORD=$#; "${registered[2]}"; echo "${COMPREPLY[@]}"'
        )
        call = ["bash", "--norc", "-c", line, str(script), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()

    assert {*COMMANDS} <= {*completed("")}
    assert completed("dia") == ["diagnose"]
    assert completed("train", "--late") == ["--latent-dim"]
    assert completed("train", "--model", "") == ["vae", "ae"]
    assert completed("evaluate", "run", "--spl") == ["--split"]
    assert completed("evaluate", "run", "--late") == []


def test_each_script_has_all_commands():
    for shell in SHELLS:
        script = completion(COMMANDS, shell)
        assert all(name in script for name in COMMANDS)


def test_another_shell_is_refused():
    with pytest.raises(InputError, match="one of bash, zsh; got 'fish'"):
        completion(COMMANDS, "fish")
