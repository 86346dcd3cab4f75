"""Plain values → one HTML page that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..config import VERSION

TEMPLATES = Path(__file__).with_name("templates")


def render(values: Mapping[str, Any]) -> str:
    """The page of one run or several, side by side.

    Text among the values is escaped, except a picture's `svg`.

    Args:
        values: the names in templates/report.html.

    Raises:
        jinja2.UndefinedError: a name is missing.
    """
    css, script = ((TEMPLATES / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = _words
    template = environment.get_template("report.html")
    return template.render(values, version=VERSION, css=css, script=script)


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _words(text: str) -> Markup:
    """A sentence of a finding: capitalized, with names in backticks set as code."""
    text = str(escape(text[:1].upper() + text[1:]))
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", text))
