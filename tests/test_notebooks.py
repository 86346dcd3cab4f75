"""The notebooks run from top to bottom, and what is committed is such a run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
notebooks = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@notebooks
# Of the kernel's own parts, which are not ours: sockets and event loops that close late.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestWarning")
def test_runs_at_small_settings(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_QUICK", "1")
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=280, resources=resources).execute()
    assert pictures(notebook) == committed


@notebooks
def test_what_is_committed_is_a_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert pictures(notebook) >= 2
    assert path.stat().st_size < 1_000_000
