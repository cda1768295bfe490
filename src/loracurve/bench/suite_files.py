"""Suites from YAML: the profile first, the file over it, then the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from loracurve.bench.config import SuiteConfig
from loracurve.system.errors import UserError, nearest
from loracurve.system.options import Parser
from loracurve.system.paths import is_file
from loracurve.system.yaml_files import read_yaml

__all__ = ["config_arguments", "find", "shipped", "suite_parser"]


def shipped(kind: str) -> dict[str, Path]:
    """YAML files that come with the package, by name; kind is profiles or suites."""
    folder = Path(str(files("loracurve"))) / "configs" / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def suite_parser(**options: Any) -> Parser:
    """The parser of a `SuiteConfig`."""
    parser = Parser(**options)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_class_arguments(SuiteConfig)
    return parser


def find(name: str | Path, kind: str) -> Path:
    """A YAML file, or one that is shipped under this name."""
    known = shipped(kind)
    if is_file(name):
        return Path(name)
    if str(name) in known:
        return known[str(name)]
    close = nearest(str(name), known)
    raise UserError(f"{kind[:-1]}: expected a YAML file or one of {', '.join(known)}, found {str(name)!r}{close}")


def config_arguments(name: str | Path, changes: Sequence[str]) -> list[str]:
    """`changes` behind the files that they change: the profile named in them or in the suite's file, and that file."""
    file = find(name, "suites")
    values = read_yaml(file)
    profile = str(values.get("profile", "default") if isinstance(values, Mapping) else "default")
    for word, after in zip(changes, [*changes[1:], ""], strict=False):
        if word == "--profile" or word.startswith("--profile="):
            profile = after if word == "--profile" else word.partition("=")[2]
    return ["--config", str(find(profile, "profiles")), "--config", str(file), *changes]
