"""The package's HTML templates, which print all that they are given as text."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import jinja2

from loracurve.system.escaping import visible

__all__ = ["render_html"]


def render_html(name: str, **values: Any) -> str:
    """A template of this package with its values; they are escaped, and characters that hide or reorder are shown."""
    environment: Any = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalize)
    source = files("loracurve.report").joinpath(name).read_text(encoding="utf-8")
    return str(environment.from_string(source).render(values))


def _finalize(value: Any) -> Any:
    """A number and its percent sign stay in one line."""
    return re.sub(r"(?<=\d) %", "\u00a0%", visible(value)) if type(value) is str else value
