"""The commands let torch's waiting threads leave their core to other processes."""

import os
import subprocess
import sys

import pytest
import torch  # noqa: F401 (imported before the setting is made)

from pyro_vae.cli import share_cores

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_DISPLAY_ENV")


def openmp(program: str, **variables: str) -> str:
    """What GNU OpenMP prints about its settings when `program` imports torch."""
    rest = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**rest, "OMP_DISPLAY_ENV": "verbose", **variables},
        capture_output=True,
        text=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch uses another OpenMP than GNU's on this machine")
    return done.stderr


COMMAND = "from pyro_vae.evaluate import main; main(['no such run'])"


@pytest.mark.slow
def test_a_command_spins_briefly():
    assert "GOMP_SPINCOUNT = '1000'" in openmp(COMMAND)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("GOMP_SPINCOUNT", "77", "GOMP_SPINCOUNT = '77'"),
        ("OMP_WAIT_POLICY", "active", "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
@pytest.mark.slow
def test_a_users_setting_stays(name, value, shown):
    found = openmp(COMMAND, **{name: value})
    assert shown in found
    assert "'1000'" not in found


def test_a_setting_that_comes_too_late_is_not_made(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ
