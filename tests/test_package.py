"""The package as a whole: size limits, public names, and a fast `--help`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae
from pyro_vae.__main__ import COMMANDS

PACKAGE = Path(pyro_vae.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_at_most_18_files_at_the_top():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 18


def test_no_module_above_400_lines_and_no_function_above_60():
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_help_does_not_wait_for_torch():
    for command in COMMANDS:
        code = (
            f"import sys; from pyro_vae.{command} import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_can_be_imported():
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name) is not None


def test_no_public_function_has_the_name_of_a_module():
    """Importing such a module would put it in the function's place."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert modules & set(pyro_vae.__all__) == {"refit", "impute"}  # commands and functions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "home"),
    [("refit", "pyro_vae.training.refitting"), ("impute", "pyro_vae.evidence.imputation")],
)
def test_commands_can_be_called_as_the_functions_of_their_names(name, home):
    """In either order of the imports."""
    before = f"import pyro_vae; assert pyro_vae.{name}.__module__ == '{home}'"
    after = (
        f"import pyro_vae.{name}, pyro_vae\n"
        "from unittest import mock\n"
        f"assert callable(pyro_vae.{name}.main)\n"
        f"with mock.patch('{home}.{name}', lambda *a, **k: (a, k)):\n"
        f"    assert pyro_vae.{name}(1, seed=2) == ((1,), {{'seed': 2}})"
    )
    for code in (before, after):
        subprocess.run([sys.executable, "-c", code], check=True)
