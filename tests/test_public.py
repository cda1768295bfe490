"""The public face: every name has a docstring and stands once in the API page."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

from helpers.places import ROOT

import loracurve


def test_api_page_has_every_public_name_once() -> None:
    named = re.findall(r"^::: loracurve\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(loracurve.__all__)


def test_version_stands_once() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert declared == loracurve.__version__ == importlib.metadata.version("loracurve")


def test_every_public_name_has_a_docstring() -> None:
    assert loracurve.__all__
    for name in loracurve.__all__:
        found = getattr(loracurve, name)
        assert isinstance(found, str) or (found.__doc__ or "").strip(), f"loracurve.{name} has no docstring"
