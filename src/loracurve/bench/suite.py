"""What a suite is: model, tasks, seeds, methods, training, sets. YAML is read into it by `bench.suite_files`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.method import Method
from loracurve.bench.config import LANDSCAPE, SuiteConfig, SuiteTask, slug
from loracurve.bench.registry import method_class
from loracurve.bench.retired import RetiredCurve, without_retired
from loracurve.bench.suite_files import config_arguments, suite_parser
from loracurve.system.errors import UserError
from loracurve.system.options import parse, parse_mapping
from loracurve.training.config import FitConfig

__all__ = [
    "Cell",
    "cells_of",
    "full_ensemble",
    "load_suite",
    "method_from",
    "method_of",
    "scans_of",
    "suite_of",
    "with_training",
]


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    task: str
    seed: int
    method: str

    def folder(self, out: Path) -> Path:
        return out / "cells" / slug(self.task) / str(self.seed) / slug(self.method)

    def __str__(self) -> str:
        return f"{self.task} / seed {self.seed} / {self.method}"


def cells_of(suite: SuiteConfig) -> list[Cell]:
    """All cells, tasks outermost, then seeds."""
    methods = [*suite.methods]
    if full_ensemble(suite) not in methods:
        methods.append(full_ensemble(suite))
    return [Cell(task, seed, method) for task in suite.tasks for seed in suite.seeds for method in methods]


def scans_of(suite: SuiteConfig) -> list[Cell]:
    """The scans of the anchors, one for each task and seed; none where the suite asks for none."""
    return [Cell(t, s, LANDSCAPE) for t in suite.tasks for s in suite.seeds] if suite.landscape.pairs else []


def full_ensemble(suite: SuiteConfig) -> str:
    """Name of the ensemble of all anchors, which every suite has: its members are what others are measured by."""
    whole = Ensemble(suite.anchors)
    return next((n for n, m in suite.methods.items() if m == whole), f"ensemble {suite.anchors}")


def method_of(suite: SuiteConfig, name: str, task: str | None = None) -> Any:
    """The method of a cell, or what the scan of the anchors is to do; `task` adds what is set for a task alone."""
    if name == LANDSCAPE:
        return suite.landscape
    found: Method = suite.methods[name] if name in suite.methods else Ensemble(suite.anchors)
    rate = None if task is None else suite.tasks[task].curve_learning_rate
    return found if rate is None else with_training(found, lambda curve: {"learning_rate": rate} | curve.training)


def with_training(method: Any, options: Callable[[Curve], dict[str, Any]]) -> Any:
    """A method whose curve, its own or that of a method inside, has these options of its training."""
    if isinstance(method, Curve):
        return replace(method, training=options(method))
    inside = getattr(method, "of", None)
    return method if inside is None else replace(method, of=with_training(inside, options))


def load_suite(path: str | Path, changes: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite from a file, or a shipped one by name; `changes` are options as on the command line.

    Raises UserError for unknown keys, tasks and methods that do not exist, and wrong types.
    """
    return suite_of(parse(suite_parser(), config_arguments(path, changes)))


def suite_of(values: Any) -> SuiteConfig:
    """A suite from the options that its parser made: tasks and methods that are still mappings become dataclasses."""
    options = {f.name: values[f.name] for f in fields(SuiteConfig)}
    for name in ("tasks", "methods"):
        for key, entry in options[name].items():
            if not isinstance(key, str):
                raise UserError(f"{name}: expected names, found the number {key!r}; put it in quotes")
            if not (entry is None or isinstance(entry, Mapping) or is_dataclass(entry)):
                raise UserError(f"{name}.{key}: expected options such as {{a: 1}}, found {entry!r}")
    made: dict[str, Callable[[Any, str], Any]] = {
        "tasks": lambda entry, key: parse_mapping(SuiteTask, entry or {}, f"tasks.{key}"),
        "methods": lambda entry, key: method_from(entry or {}, key, f"methods.{key}"),
    }
    for name, make in made.items():
        found = options[name].items()
        options[name] = {key: entry if is_dataclass(entry) else make(entry, key) for key, entry in found}
    return SuiteConfig(**options)


def method_from(values: Mapping[str, Any], name: str, where: str) -> Any:
    """A method from its options; `method` names its class, by default `name` does."""
    options = dict(values)
    kind = method_class(str(options.pop("method", name)))
    if "of" in {f.name for f in fields(kind)}:
        inner = options.pop("of", None)
        own = next((c for c in kind.__bases__ if is_dataclass(c)), None)
        if not isinstance(inner, Mapping) or "method" not in inner or (options and own is None):
            only = "only " if own is None else ""
            raise UserError(f"{where}: expected {only}of: {{method: ..., and its options}}, found {dict(values)}")
        found = {} if own is None else vars(parse_mapping(own, options, where))
        return kind(of=method_from(inner, "", f"{where}.of"), **found)
    return _curve_from(options, where) if kind is Curve else parse_mapping(kind, options, where)


def _curve_from(values: Mapping[str, Any], where: str) -> Curve:
    options, retired = without_retired(values)
    given = options.pop("training", None) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}.training: expected options such as {{a: 1}}, found {given!r}")
    typed = parse_mapping(FitConfig, given, f"{where}.training")
    method: Curve = parse_mapping(Curve, options, where)
    found = vars(method) | {"training": {k: getattr(typed, k) for k in given}}
    return RetiredCurve(**found, retired=retired) if retired else Curve(**found)
