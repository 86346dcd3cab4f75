"""The README's lines stand and run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_two_lines_are_at_the_top():
    first = re.search(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert first is not None
    lines = [line.split("#")[0].strip() for line in first[1].splitlines()]
    assert lines == [
        "pip install -e . && python -m pyro_vae.train",
        "pip install -e '.[dev]' && pytest",
    ]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_the_python_examples_run(code, capsys):
    assert len(code.strip().splitlines()) <= 28
    exec(compile(code, str(README), "exec"), {})
    out = capsys.readouterr().out
    assert "log p(x)" in out
    assert "nan" not in out


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (README.parent / path).is_file(), path


def test_every_module_is_in_the_table():
    for path in (README.parent / "pyro_vae").glob("*.py"):
        if not path.stem.startswith("__"):
            assert f"`{path.name}`" in TEXT


def test_the_example_commands_parse():
    """Every flag that the README names is one of train's."""
    from pyro_vae.train import TrainArguments, parse

    for line in re.findall(r"^python -m pyro_vae\.train (.+)$", TEXT, re.MULTILINE):
        arguments = line.split("#")[0].split()
        parse(TrainArguments, arguments, "train", None)
