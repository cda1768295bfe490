"""Every number that is an option has a range in its type: found by reflection, so that a new one without fails here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

import loracurve
from loracurve.baselines.single import Single
from loracurve.bench.config import SuiteConfig, SuiteTask
from loracurve.bench.registry import METHODS
from loracurve.cli import COMMANDS, _command_parser, main
from loracurve.model.config import ModelConfig
from loracurve.runs.config import RunConfig
from loracurve.system.errors import UserError
from loracurve.system.options import Parser, parse, parse_mapping
from loracurve.system.ranges import LARGEST, LARGEST_WHOLE, SMALLEST, Range, hints_of, in_range
from loracurve.tasks.config import TaskConfig

# What a dataclass cannot be made without.
NEEDED: dict[type, dict[str, Any]] = {
    ModelConfig: {"name": "m"},
    TaskConfig: {"data": "d", "scoring": "head"},
    RunConfig: {"model": ModelConfig("m"), "task": TaskConfig("d", "head")},
    SuiteConfig: {"model": ModelConfig("m"), "tasks": {"a": SuiteTask()}, "methods": {"single": Single()}},
    **{kind: {"of": Single()} for kind in METHODS.values() if "of" in hints_of(kind)},
}


def config_classes() -> Iterator[type]:
    """The dataclasses of all modules `config`, and the methods of suites."""
    for package in pkgutil.iter_modules(loracurve.__path__):
        if package.ispkg and importlib.util.find_spec(f"loracurve.{package.name}.config"):
            module = importlib.import_module(f"loracurve.{package.name}.config")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                    yield kind
    yield from METHODS.values()


CLASSES = [*dict.fromkeys(config_classes())]


@dataclass(frozen=True)
class Number:
    """A number somewhere in the type of an option."""

    owner: Any
    """dataclass or function"""
    name: str
    hint: Any
    """type of the whole option"""
    kind: type
    """int or float"""
    about: Range | None
    none: bool
    """whether the option may be None"""

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    def wrapped(self, value: Any) -> Any:
        """The option's value with `value` for every number in it."""
        hint = next((p for p in get_args(self.hint) if p is not type(None)), None) if self.none else self.hint
        origin, parts = get_origin(hint), get_args(hint)
        if origin is list:
            return [value]
        if origin is tuple:
            return (value,) * len(parts)
        return {"a": value} if origin is dict else value


def leaves(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """Kind and range of every number in a type; None where there is none."""
    if get_origin(hint) is Annotated:
        kind, *about = get_args(hint)
        yield kind, next((a for a in about if isinstance(a, Range)), None)
    elif hint in (int, float):
        yield hint, None
    else:
        for part in get_args(hint):
            yield from leaves(part)


def numbers_of(owner: Any) -> Iterator[Number]:
    for name, hint in hints_of(owner).items():
        none = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
        for kind, about in dict.fromkeys(leaves(hint)):
            yield Number(owner, name, hint, kind, about, none)


OWNERS = [*CLASSES, *(command.run for command in COMMANDS.values())]
NUMBERS = [number for owner in OWNERS for number in numbers_of(owner)]
OF_CLASSES = [number for number in NUMBERS if inspect.isclass(number.owner)]


def test_the_numbers_are_found() -> None:
    names = {str(number) for number in NUMBERS}
    assert len(names) > 130
    assert {"FitConfig.betas", "SuiteTask.learning_rate", "LoraOptions.rank_pattern", "calibrate_command.risk"} <= names


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_every_number_has_a_range(number: Number) -> None:
    assert number.about is not None, f"{number}: expected a type of system.ranges, found {number.kind.__name__}"


def wrong(number: Number) -> Iterator[Any]:
    """Values outside the range, the nearest ones among them, and what is no number."""
    assert number.about is not None
    yield from (math.nan, math.inf, -math.inf, True, "3", "x")
    if not number.none:
        yield None
    yield from [1.5, -(2**70), 2**70] if number.kind is int else [1e-320, 1e39]
    about = number.about
    if about.least is not None:
        yield about.least if about.open_least else about.least - (1 if number.kind is int else 1e-3)
    if about.most is not None:
        yield about.most if about.open_most else about.most + (1 if number.kind is int else 1e-3)


def right(number: Number) -> Iterator[Any]:
    """The ends of the range, and of what its kind of number can be."""
    about = number.about
    assert about is not None
    if number.kind is int:
        yield int(-LARGEST_WHOLE if about.least is None else about.least)
        yield int(LARGEST_WHOLE if about.most is None else about.most)
    else:
        assert about.least is not None
        yield SMALLEST if about.open_least else about.least
        yield LARGEST if about.most is None else math.nextafter(about.most, 0) if about.open_most else about.most


@pytest.mark.parametrize("number", OF_CLASSES, ids=str)
def test_ranges_hold_in_python_and_in_files(number: Number) -> None:
    needed = NEEDED.get(number.owner, {})
    for value in wrong(number):
        with pytest.raises(UserError, match=rf"\b{number.name}: expected .*, found [^\n]+$"):
            number.owner(**needed | {number.name: number.wrapped(value)})
    if not needed:
        for value in wrong(number):
            if value not in ("3", None):  # in a file a number may be quoted, and null is told otherwise
                with pytest.raises(UserError, match=rf"^where: {number.name}: expected .*, found [^\n]+$"):
                    parse_mapping(number.owner, {number.name: number.wrapped(value)}, "where")
    for value in right(number):
        assert in_range(number.name, number.wrapped(value), number.hint) == number.wrapped(value)


@cache
def parser_of(name: str) -> Parser:
    return _command_parser(name)


def options_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, Number]]:
    for number in numbers_of(kind):
        yield f"{prefix}{number.name}", number
    for name, hint in hints_of(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{name}.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_range(name: str) -> None:
    command = COMMANDS[name]
    shown = parser_of(name).format_help()
    options = [*options_of(command.options)] if command.options else []
    options += [(number.name, number) for number in numbers_of(command.run)]
    assert options or name in ("init", "predict", "report", "share", "scan")
    for option, number in options:
        found = re.search(rf"^  --{re.escape(option)}\b(.*?)(?=^  -|\Z)", shown, flags=re.MULTILINE | re.DOTALL)
        assert found, option
        said = " ".join(found[1].split()).rpartition("(type: ")[2]
        assert f"{number.kind.__name__} {number.about}".strip() in said, f"{option}: {said}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": {"name": "m"}, "task": {"data": "d", "scoring": "head"}}))
    return path


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("curve_training.betas=[0.9, 1.5]", "expected numbers in [0, 1), found 1.5"),
        ("curve_training.betas=[-0.1, 0.9]", "expected numbers in [0, 1), found -0.1"),
        ("curve_training.betas=[.nan, 0.9]", "expected numbers in [0, 1), found nan"),
        ("curve_training.eps=-1e-8", "expected a number > 0, found -1e-8"),
        ("curve_training.eps=0", "expected a number > 0, found 0"),
        (
            "curve_training.eps=1e-320",
            "expected a number > 0 that float32 tells from 0 and from infinity, found 1e-320",
        ),
        ("anchor_training.weight_decay=-0.1", "expected a number >= 0, found -0.1"),
        ("curve_training.patience=-1", "expected a whole number >= 0, found -1"),
        ("curve_training.evaluate_every=-1", "expected a whole number >= 0, found -1"),
        ("curve_training.checkpoint_every=-1", "expected a whole number >= 0, found -1"),
        ("curve_training.max_grad_norm=nan", "expected a number >= 0, found 'nan'"),
        ("curve_training.max_grad_norm=.nan", "expected a number >= 0, found '.nan'"),
        ("curve_training.max_grad_norm=inf", "expected a number >= 0, found 'inf'"),
        ("curve_training.steps=1:30", "expected a whole number >= 1, found '1:30'"),
        ("curve_training.steps=0o17", "expected a whole number >= 1, found '0o17'"),
        ("curve_training.steps=010", "expected a whole number >= 1, found '010'"),
        ("curve_training.steps=yes", "expected a whole number >= 1, found 'yes'"),
        ("curve_training.steps=2.5", "expected a whole number >= 1, found 2.5"),
        ("curve_training.steps=", "expected a whole number >= 1, found ''"),
        ("task.limit_train=1:30", "expected a whole number >= 1, found '1:30'"),
        ("task.limit_train=0", "expected a whole number >= 1, found 0"),
        ("lora.layers_to_transform=[-1]", "expected whole numbers >= 0, found -1"),
        ("lora.rank_pattern={q_proj: 0}", "expected whole numbers in [1, 65536], found 0"),
        ("curve.segments=1001", "expected a whole number in [1, 1000], found 1001"),
    ],
)
def test_the_command_line_names_the_option(word: str, said: str, config: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(parser_of("fit"), ["--config", str(config), "--out", "out", f"--{word}"])
    assert str(caught.value) == f"{word.partition('=')[0]}: {said}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--out=o", "--curve_training.patience", "-1"], "patience: expected a whole number >= 0, found -1"),
        (["generate", "run", "--prompt=a", "--temperature=1e-320"], "temperature: expected a number >= 0 that float32"),
        (
            ["generate", "run", "--prompt=a", "--points=1:30"],
            "points: expected a whole number in [1, 100000], found '1:30'",
        ),
        (["export", "run", "--out=o", "--t=nan"], "t: expected a number in [0, 1], found 'nan'"),
        (["calibrate", "run", "--alpha=1"], "alpha: expected a number in (0, 1), found 1"),
        (["scan", "run", "--noise=-1"], "noise: expected a number >= 0, found -1"),
        (["bench", "smoke", "--jobs=-1"], "jobs: expected a whole number >= 0, found -1"),
        (["serve", "run", "--port=65536"], "port: expected a whole number in [0, 65535], found 65536"),
    ],
)
def test_commands_refuse_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in (message := capsys.readouterr().err) and message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("curve_training: {steps: 1:30}", "curve_training.steps: expected a whole number >= 1, found '1:30'"),
        ("curve_training: {steps: true}", "curve_training.steps: expected a whole number >= 1, found True"),
        ("curve_training: {steps: 3, steps: 4}", "not valid YAML (key 'steps' stands twice, again in line 1)"),
        ("evaluation: {temperature: .inf}", "evaluation.temperature: expected a number >= 0, found inf"),
    ],
)
def test_files_name_the_option(
    options: str, said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(f"{options}\nmodel: {{name: m}}\ntask: {{data: d, scoring: head}}\n")
    assert main(["fit", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    assert said in (message := capsys.readouterr().err) and message.count("\n") == 1, message


def test_numbers_may_be_written_in_several_ways_and_words_stay_words() -> None:
    written = {"steps": 1e2, "learning_rate": 1, "evaluate_every": "1_0", "patience": "2", "row_tokens": 64.0}
    found = parse_mapping(RunConfig, {
        "model": {"name": "m"},
        "task": {"data": "no", "scoring": "label", "prompt": "{text}", "answers": ["no", "yes"]},
        "anchor_training": written,
    }, "where")  # fmt: skip
    training = found.anchor_training
    assert (training.steps, training.evaluate_every, training.patience, training.row_tokens) == (100, 10, 2, 64)
    assert type(training.learning_rate) is float and type(training.steps) is int
    assert found.task.data == "no" and found.task.answers == ["no", "yes"]
