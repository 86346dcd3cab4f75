"""The notebooks run from top to bottom, and their committed outputs are of a complete run."""

from __future__ import annotations

import re
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


@pytest.mark.slow
@notebooks
# Warnings of the kernel's own dependencies: sockets and event loops that are closed late.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestWarning")
def test_runs_at_small_settings(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_QUICK", "1")
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=280, resources=resources).execute()
    assert pictures(notebook) == committed


@notebooks
def test_committed_outputs_are_of_a_complete_run(path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert pictures(notebook) >= 2
    assert path.stat().st_size < 1_000_000


TABLE = (FOLDER / "README.md").read_text(encoding="utf-8")
claims = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TABLE.splitlines()
    if re.search(r"§\d+ \|$", line)
]


def section(name, number):
    """The outputs of all cells of a numbered section, as text."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    found, inside = [], False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^## (.*)$", cell.source, re.MULTILINE):
                inside = heading.startswith(f"{number}. ")
        elif inside:
            found += [str(output.get("text", output.get("data"))) for output in cell.outputs]
    return " ".join(found)


def test_claims_cover_every_note():
    assert len(claims) > 50
    assert {note for claim in claims for note in claim[0].split(", ")} == {"", *"12345"}
    assert {claim[2] for claim in claims} == {"holds", "imprecise", "not here", ""}


@pytest.mark.parametrize("claim", claims, ids=lambda claim: claim[1][:40])
def test_numbers_of_a_claim_are_in_its_section(claim):
    """Find each number with a decimal point, exponent or thousands separator in the outputs."""
    *_, measured, where = claim
    name, number = where.split(" §")
    text = section(name, number)
    numbers = re.findall(r"(?<![\w.])[-+]?\d[\d,]*\.\d+(?:e-\d+)?%?|\d+e-\d+|\d+,\d{3}", measured)
    for value in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", text), value
