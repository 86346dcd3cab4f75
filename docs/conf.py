"""Configuration of Sphinx. To build the pages:

sphinx-build -W --keep-going -b html docs docs/_build/html
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import pyro_vae  # noqa: E402 (this checkout, not an installed one)

project = "pyro_vae"
author = "The pyro_vae developers"
copyright = author
version = release = pyro_vae.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_vae {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

# The notebooks are rendered from their stored outputs. Sphinx reads no files outside its source
# folder, so they are copied into it.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(ROOT / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns(".*"))

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]
default_role = "code"


def read_source(app: Any, name: str, source: list[str]) -> None:
    """Make the links and names of a page those of the build.

    - `../notebooks/X`, a path that works in the repository, becomes the copy `notebooks/X`.
    - The notebooks' README gets a table of contents.
    - In the reference, `home(f)` stands for the module that defines the public name `f`, and
      `result(f)` for the class that the public function `f` returns. Classes that are not public
      names are found wherever they live.
    """
    text = source[0]
    if name == "notebooks/README":
        text += "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"
    elif not name.startswith("notebooks/"):
        up = "../" * name.count("/")
        text = text.replace(f"]({up}../notebooks/", f"]({up}notebooks/")
    if name.startswith("reference/"):
        text = re.sub(r"home\((\w+)\)", lambda m: getattr(pyro_vae, m[1]).__module__, text)
        text = re.sub(r"result\((\w+)\)", lambda m: result_of(getattr(pyro_vae, m[1])), text)
    source[0] = text


def result_of(function: Any) -> str:
    """The full name of the class that a function returns, or returns a list of."""
    hint = get_type_hints(function)["return"]
    kind = (get_args(hint) or (hint,))[0]
    return f"{kind.__module__}.{kind.__qualname__}"


def read_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Turn this package's plain-text docstrings into reStructuredText.

    Outside a section such as "Args:", an indented block after a blank line is a formula or an
    example, shown as it is, and lines `name: text` are the items of a definition list. `*` and `|`
    are mathematics, never markup.
    """
    result: list[str] = []
    section, literal, item = "", False, None
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if line and not indented:
            section, literal = line if line in SECTIONS else "", False
        if indented and not before and not section and not literal:
            result += ["::", ""]
            literal = True
        if literal:
            result.append(line)
            continue
        if section == "Returns:" or what == "property":
            # Napoleon reads the text before a colon as a type.
            line = line.replace(": ", " \u2013 ", 1)
        starts = not before or before.startswith("    ") or item is not None
        item = ITEM.fullmatch(line) if starts else None
        result += [item[1], f"    {escape(item[2])}"] if item else [escape(line)]
    lines[:] = [*result, ""]


SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")
ITEM = re.compile(r"([a-z][\w-]*): (.+)")


def escape(text: str) -> str:
    """Escape markup outside backticks, show flags as code, and link papers."""
    text = re.sub(r"^(\s*(?:[\w, ]+: )?)([A-Z]\.)", r"\1\\\2", text)  # "K." is no list
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<!\S)(--[a-z][\w-]*)", r"``\1``", parts[i])
        parts[i] = re.sub(r"arXiv (\d{4}\.\d{4,5})", ARXIV, parts[i])
    return "".join(parts)


ARXIV = r"`arXiv \1 <https://arxiv.org/abs/\1>`__"


def write_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, result: str
) -> tuple[str, str] | None:
    """The settings show their defaults without types, whose annotations describe flags."""
    if not (dataclasses.is_dataclass(obj) and obj.__module__.startswith("pyro_vae.config.")):
        return None
    parts = []
    for field in dataclasses.fields(obj):
        nested = dataclasses.is_dataclass(field.default)
        value = f"{type(field.default).__name__}()" if nested else repr(field.default)
        parts.append(f"{field.name}={value.replace('PosixPath', 'Path')}")
    return f"({', '.join(parts)})", result


def setup(app: Any) -> None:
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", write_signature)
