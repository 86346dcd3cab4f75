"""Plain values → one HTML page that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .config import VERSION

__all__ = ["data_url", "render"]


def render(values: Mapping[str, Any]) -> str:
    """The page of one run or several, side by side.

    Text among the values is escaped; only a picture's `svg` stands in the page as it is.

    Args:
        values: what templates/report.html names.

    Raises:
        jinja2.UndefinedError: something that it names is missing.
    """
    environment = _environment()
    source = environment.loader.get_source  # type: ignore[union-attr]
    parts = {name: source(environment, f"report.{name}")[0] for name in ("css", "js")}
    return environment.get_template("report.html").render(
        values, version=VERSION, css=parts["css"], script=parts["js"]
    )


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyro_vae"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = _words
    return environment


def _words(text: str) -> Markup:
    """A remark of the diagnosis, which may begin small and quote names in backticks."""
    text = str(escape(text[:1].upper() + text[1:]))
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", text))
