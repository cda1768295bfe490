"""The options that a cell's numbers depend on: recorded with its results, and compared when these are used again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracurve.baselines.curve import own_options
from loracurve.bench.config import SuiteConfig
from loracurve.bench.registry import method_name
from loracurve.bench.retired import RetiredCurve, merged, of_results, with_defaults
from loracurve.bench.suite import Cell, method_of, with_training

__all__ = ["fingerprint", "made_with", "options_of", "plain"]


_BEFORE = {"training": {"validation_share": None}}
"""what options meant before there were any, where their defaults mean something else"""


def plain(value: Any, defaults: bool = True) -> Any:
    """Dataclasses as mappings that YAML and JSON can hold; methods keep their names.

    Args:
        defaults: with False, fields that have their default value are left out.
    """
    if isinstance(value, RetiredCurve):
        return merged(plain(value.present, defaults), value.in_full if defaults else value.retired)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = method_name(value)
        found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kept = {f.name for f in dataclasses.fields(value) if defaults or found[f.name] != _default(f)}
        return ({"method": name} if name else {}) | {k: plain(v, defaults) for k, v in found.items() if k in kept}
    if isinstance(value, Mapping):
        return {str(k): plain(v, defaults) for k, v in value.items()}
    return [plain(v, defaults) for v in value] if isinstance(value, list | tuple) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def options_of(
    suite: SuiteConfig, cell: Cell | None = None, task: str = "", seed: int = 0, defaults: bool = True
) -> dict[str, Any]:
    """Everything that a cell's (or without one, a task's anchors') numbers depend on, folders' places apart."""
    task, seed = (cell.task, cell.seed) if cell else (task, seed)
    values = {
        "model": plain(suite.model, defaults) | {"name": Path(suite.model.name).name},
        "task": _task(suite, task, defaults),
        "lora": plain(suite.lora, defaults),
        "training": plain(suite.training_of(task, seed), defaults),
        "anchors": suite.anchors,
    }
    if cell:
        method = method_of(suite, cell.method, task)
        # All options of a curve's training: they stand in no field, and what the library's defaults are may change.
        method = with_training(method, own_options) if defaults else method
        values |= {"method": plain(method, defaults), "samples": suite.samples}
        values |= {"train_rows": suite.train_rows, "ood_rows": suite.ood_rows}
    found: dict[str, Any] = _same_numbers(values)
    return found


def _task(suite: SuiteConfig, task: str, defaults: bool) -> dict[str, Any]:
    values = plain(suite.tasks[task], defaults) | {"data": Path(suite.tasks[task].data or task).name}
    values.pop("curve_learning_rate", None)  # stands with the methods that it changes
    return values


def made_with(recorded: Mapping[str, Any], suite: SuiteConfig, cell: Cell | None = None, **which: Any) -> bool:
    """Whether recorded `options_of` are those of the suite. Options that came into the library since must have their
    defaults, which change nothing, or `_BEFORE`; so must those that have left it."""
    chosen, known = options_of(suite, cell, defaults=False, **which), merged(_BEFORE, of_results(recorded))
    return _within(known, with_defaults(options_of(suite, cell, **which))) and _within(chosen, known)


def fingerprint(suite: SuiteConfig, cell: Cell | None = None, task: str = "", seed: int = 0) -> str:
    """Hash of `options_of`, for names of folders."""
    text = json.dumps(options_of(suite, cell, task, seed), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _within(part: Any, whole: Any) -> bool:
    """Whether every key of nested mappings is in the other one, with an equal value."""
    if isinstance(part, Mapping) and isinstance(whole, Mapping):
        return all(k in whole and _within(v, whole[k]) for k, v in part.items())
    return bool(part == whole)


def _same_numbers(value: Any) -> Any:
    """2 and 2.0 are one option."""
    if isinstance(value, dict):
        return {k: _same_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_same_numbers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
