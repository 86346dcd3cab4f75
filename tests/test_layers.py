"""Data goes one way: a module imports only from those left of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pyro_vae"

ORDER = [
    "config",
    "randomness",
    "sources",
    "data",
    "nets",
    "likelihoods",
    "priors",
    "vae",
    "autoencoder",
    "linear_gaussian",
    "particles",
    "weighted",
    "elbos",
    "objectives",
    "graphs",
    "granted",
    "optimizer",
    "updates",
    "calls",
    "capture_build",
    "capture",
    "distributed",
    "factory",
    "schedules",
    "records",
    "svi",
    "checkpoint",
    "quadrature",
    "evidence",
    "annealing",
    "program",
    "calibration",
    "gradients",
    "diagnostics",
    "refinement",
    "nuts",
    "verdicts",
    "figures",
    "posterior_figures",
    "gallery",
    "studies",
    "explorer",
    "page",
    "overview",
    "command",
    "report",
    "train",
    "evaluate",
    "generate",
    "encode",
    "diagnose",
]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, inside functions too, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae"):
            found.add("absolute import")
    return found


def test_every_module_has_its_place():
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(ORDER)


def test_modules_import_only_from_the_left():
    for i, name in enumerate(ORDER):
        assert imports(PACKAGE / f"{name}.py") <= set(ORDER[:i]), name


def test_figures_know_no_model():
    for name, allowed in (("figures", set()), ("posterior_figures", {"figures"})):
        assert imports(PACKAGE / f"{name}.py") == allowed
        assert "torch" not in (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def test_help_does_not_wait_for_torch():
    for command in ("train", "evaluate", "generate", "encode", "diagnose", "report"):
        code = (
            f"import sys; from pyro_vae.{command} import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_can_be_imported():
    import pyro_vae

    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name) is not None
    from pyro_vae import svi  # noqa: F401 (a module of another name than the function)

    assert callable(pyro_vae.fit)
