"""The examples of the documentation run as written, and its pages build without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PAGES = [p for p in sorted([*DOCS.glob("*.md"), *DOCS.glob("guide/*.md")]) if examples(p)]


def test_there_are_examples():
    assert {p.stem for p in PAGES} >= {
        "tutorial",
        "posterior",
        "data",
        "objectives",
        "speed",
        "runs",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    """In order, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for code in examples(page):
        exec(compile(code, str(page), "exec"), names)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("myst_nb", reason="needs pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "notebooks" / "elbo_estimators.html").is_file()
