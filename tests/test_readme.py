"""README and documentation agree with the code: links, commands, modules, names, examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
# notebooks/ and _build/ are made by the build of the pages.
DOCS = [
    p for p in sorted((ROOT / "docs").rglob("*.md")) if not {"notebooks", "_build"} & {*p.parts}
]
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def test_the_two_lines_are_at_the_top():
    first = re.search(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert first is not None
    lines = [line.split("#")[0].strip() for line in first[1].splitlines()]
    assert lines == [
        "pip install -e . && python -m pyro_vae.train",
        "pip install -e '.[dev]' && pytest",
    ]


def test_it_is_short():
    assert README.stat().st_size <= 8192


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_the_python_examples_run(code, capsys):
    assert len(code.strip().splitlines()) <= 28
    exec(compile(code, str(README), "exec"), {})
    out = capsys.readouterr().out
    assert "log p(x)" in out
    assert "nan" not in out


@every_page
def test_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).is_file(), target


@every_page
def test_the_example_commands_parse(page):
    """Every flag of train that a page names is one."""
    from pyro_vae.train import TrainArguments, parse

    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL):
        for flags in re.findall(r"-m pyro_vae\.train\b(.*)", block):
            parse(TrainArguments, flags.split("#")[0].split(), "train", None)


def sections():
    """Heading of each part of the package in the design's tables → the files that it names."""
    found = {}
    for part in re.split(r"^### ", DESIGN, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        files = re.findall(r"^\| `(\w+\.py)` \|", body, re.MULTILINE)
        if files:
            found["" if heading == "Top level" else heading.strip("`/")] = files
    return found


def test_every_module_is_in_the_design():
    modules: dict[str, list[str]] = {}
    package = ROOT / "pyro_vae"
    for path in package.rglob("*.py"):
        if not path.stem.startswith("__"):
            modules.setdefault(str(path.relative_to(package).parent).strip("."), []).append(
                path.name
            )
    described = sections()
    assert set(described) == set(modules)
    for folder, names in modules.items():
        assert sorted(described[folder]) == sorted(names), folder or "top level"


def test_every_public_name_is_in_the_reference():
    import pyro_vae

    text = "\n".join(p.read_text(encoding="utf-8") for p in DOCS if p.parent.name == "reference")
    documented = set(re.findall(r"^\.\. auto\w+:: pyro_vae\.(\w+)$", text, re.MULTILINE))
    assert documented == set(pyro_vae.__all__) - {"__version__"}
