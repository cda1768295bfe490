"""The options of a run. YAML files and the command line are made from these dataclasses; there is no second list."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from loracurve.curve.config import CurveConfig, LoraOptions, check_points
from loracurve.curve.retired import Part, refusal, split_retired
from loracurve.inference.config import EvaluationConfig, UnknownsConfig
from loracurve.model.config import ModelConfig
from loracurve.system.errors import UserError
from loracurve.system.files import atomic_write
from loracurve.system.options import parse_mapping
from loracurve.system.paths import is_file
from loracurve.system.ranges import Amount, check_ranges
from loracurve.system.yaml_files import dump_yaml, load_yaml, read_yaml
from loracurve.tasks.config import TaskConfig
from loracurve.training.config import FitConfig, LoopConfig

__all__ = ["RunConfig", "load_config", "save_config", "without_retired_words"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that `loracurve fit` needs."""

    model: ModelConfig
    task: TaskConfig
    lora: LoraOptions = field(default_factory=LoraOptions)
    curve: CurveConfig = field(default_factory=CurveConfig)
    adapters: list[str] = field(default_factory=list)
    """Existing PEFT adapter folders to use as anchors instead of training them."""
    rivals: Amount = 0
    """Independent fine-tunes that are trained beside a free curve (by anchor_training), only to be compared with."""
    anchor_training: LoopConfig = field(default_factory=LoopConfig)
    curve_training: FitConfig = field(default_factory=FitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    unknowns: UnknownsConfig = field(default_factory=UnknownsConfig)
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where losses are logged while training, beside the run's own history.json."""

    def __post_init__(self) -> None:
        if self.adapters and self.curve.kind == "free":
            raise UserError(
                "adapters: expected curve.kind anchored, a curve through them, found free; set curve.kind to anchored"
            )
        if len(self.adapters) == 1:
            raise UserError("adapters: expected at least 2 adapter folders, found 1; give another")
        check_ranges(self)
        if self.rivals and self.curve.kind == "anchored":
            raise UserError("rivals: expected 0 for an anchored curve, whose anchors are rivals enough; leave it out")
        if self.rivals == 1:
            raise UserError("rivals: expected at least 2, of which an ensemble is made, found 1; raise it")
        # What cannot work should be known before training, not after it.
        spec = self.curve.spec(len(self.adapters) or self.curve.anchors)
        self.curve_training.check_curve(spec)
        if self.evaluation.inference == "tunnel" and spec.size < 3:
            raise UserError(
                "evaluation.inference: expected curve for two control points, which span a line only, found tunnel; "
                "raise curve.degree"
            )
        check_points(self.evaluation.quadrature, self.evaluation.points, spec.segments)


def load_config(path: str | Path) -> RunConfig:
    """Read a YAML file as a `RunConfig`; raises UserError for unknown keys, wrong types and missing files."""
    if not is_file(path):
        raise UserError(f"{path}: expected a YAML file with the options of a run, found none")
    values = read_yaml(Path(path))
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: expected options such as model and task, found none in it")
    return parse_mapping(RunConfig, _without_retired(values), str(path))


_PARTS: dict[str, Part] = {"curve": "curve", "anchor_training": "training", "curve_training": "training"}


def _without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run without those that have left the library; raises UserError where it was made with them."""
    out = dict(values)
    for name, part in _PARTS.items():
        if isinstance(values.get(name), Mapping):
            out[name], gone = split_retired(part, values[name])
            if gone:
                raise refusal(", ".join(f"{name}.{option}" for option in gone))
    return out


def without_retired_words(words: list[str]) -> list[str]:
    """A command line without the defaults of retired options, in its words and in the file that it names.

    Raises:
        UserError: they ask for what is retired; a file that is no YAML.
    """
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        pair = [word]
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            pair.append(value)
        part, _, option = name.removeprefix("--").partition(".")
        if name == "--config" and os.path.isfile(value):  # else the parser says what it is
            values = read_yaml(Path(value))
            known = _without_retired(values) if isinstance(values, Mapping) else values
            out += pair if known == values else [f"--config={dump_yaml(known)}"]
        elif word.startswith("--") and part in _PARTS and option:
            left, gone = split_retired(_PARTS[part], _nested(option, value))
            if gone:
                raise refusal(name.removeprefix("--"))
            out += pair if left else []
        else:
            out += pair
    return out


def _nested(option: str, value: str) -> dict[str, Any]:
    """`a.b` and its word on the command line as a file has them: {a: {b: value}}."""
    try:
        found: Any = load_yaml(value) if value else True
    except (ValueError, yaml.YAMLError):
        found = value
    for name in reversed(option.split(".")):
        found = {name: found}
    return dict(found)


def save_config(config: RunConfig, path: Path, parts: Collection[str] = ()) -> None:
    """Write a config as YAML, atomically; `load_config` reads it back equal. `parts`: only these, where the others are
    left at their defaults; none: all."""
    # As it is read: 16 for a number with a fraction comes back as 16.0, and is written so from the start.
    values = asdict(parse_mapping(RunConfig, _plain(asdict(config)), str(path)))
    text = dump_yaml(_plain({name: values[name] for name in parts or values}))
    atomic_write(path, lambda p: p.write_text(text))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
