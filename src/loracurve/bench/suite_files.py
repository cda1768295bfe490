"""Suites from YAML: the profile first, the file over it, then the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from loracurve.baselines.curve import Curve
from loracurve.bench.registry import method_class
from loracurve.bench.suite import SuiteConfig, SuiteTask
from loracurve.config_files import Parser, parse, parse_mapping
from loracurve.errors import UserError, nearest
from loracurve.training import FitConfig
from loracurve.yaml_files import read_yaml

__all__ = ["config_arguments", "find", "load_suite", "method_from", "shipped", "suite_of", "suite_parser"]


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


def load_suite(path: str | Path, changes: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite from a file, or a shipped one by name; `changes` are options as on the command line.

    Raises UserError for unknown keys, tasks and methods that do not exist, and wrong types.
    """
    return suite_of(parse(suite_parser(), config_arguments(path, changes)))


def find(name: str | Path, kind: str) -> Path:
    """A YAML file, or one that is shipped under this name."""
    known = shipped(kind)
    if Path(name).is_file():
        return Path(name)
    if str(name) in known:
        return known[str(name)]
    close = nearest(str(name), known)
    raise UserError(f"{kind[:-1]}: expected a YAML file or one of {', '.join(known)}, found {str(name)!r}{close}")


def suite_of(values: Any) -> SuiteConfig:
    """A suite from what its parser made: tasks and methods are still mappings."""
    options = {f.name: values[f.name] for f in fields(SuiteConfig)}
    for name in ("tasks", "methods"):
        for key, entry in options[name].items():
            if entry is not None and not isinstance(entry, Mapping):
                raise UserError(f"{name}.{key}: expected options such as {{a: 1}}, found {entry!r}")
    options["tasks"] = {k: parse_mapping(SuiteTask, v or {}, f"tasks.{k}") for k, v in options["tasks"].items()}
    options["methods"] = {k: method_from(v or {}, k, f"methods.{k}") for k, v in options["methods"].items()}
    return SuiteConfig(**options)


def method_from(values: Mapping[str, Any], name: str, where: str) -> Any:
    """A method from its options; `method` names its class, by default `name` does."""
    options = dict(values)
    kind = method_class(str(options.pop("method", name)))
    if "of" in {f.name for f in fields(kind)}:
        inner = options.pop("of", None)
        if not isinstance(inner, Mapping) or "method" not in inner or options:
            raise UserError(f"{where}: expected only of: {{method: ..., and its options}}, found {dict(values)}")
        return kind(of=method_from(inner, "", f"{where}.of"))
    if kind is Curve and isinstance(options.get("training"), Mapping):
        given = options["training"]
        typed = parse_mapping(FitConfig, given, f"{where}.training")
        options["training"] = {}
        method: Curve = parse_mapping(Curve, options, where)
        return Curve(**vars(method) | {"training": {k: getattr(typed, k) for k in given}})
    return parse_mapping(kind, options, where)


def config_arguments(name: str | Path, changes: Sequence[str]) -> list[str]:
    """`changes` behind the files that they change: the profile named in them or in the suite's file, and that file."""
    file = find(name, "suites")
    values = read_yaml(file)
    profile = str(values.get("profile", "default") if isinstance(values, Mapping) else "default")
    for word, after in zip(changes, [*changes[1:], ""], strict=False):
        if word == "--profile" or word.startswith("--profile="):
            profile = after if word == "--profile" else word.partition("=")[2]
    return ["--config", str(find(profile, "profiles")), "--config", str(file), *changes]
