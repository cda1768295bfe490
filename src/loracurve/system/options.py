"""YAML and command-line options to dataclasses and back, through jsonargparse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from loracurve.system.errors import UserError, nearest
from loracurve.system.ranges import Range, hints_of, ranged

__all__ = ["Parser", "parse", "parse_mapping"]


T = TypeVar("T")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are exceptions, so that they can be told in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(exit_on_error=False, allow_abbrev=False, **options)

    def add_class_arguments(self, theclass: type[Any], nested_key: str | None = None, **options: Any) -> list[str]:
        """The options of a dataclass, with the ranges of their types."""
        added = super().add_class_arguments(theclass, nested_key, **options)
        self._add_ranges(theclass, f"{nested_key}." if nested_key else "")
        return added

    def add_function_arguments(self, function: Callable[..., Any], *others: Any, **options: Any) -> list[str]:
        """The parameters of a function, with the ranges of their types."""
        added = super().add_function_arguments(function, *others, **options)
        self._add_ranges(function, "")
        return added

    def _add_ranges(self, kind: Any, prefix: str) -> None:
        """Ranges are annotations, which the parser leaves out of the types that it reads."""
        actions = {action.dest: action for action in self._actions}
        for name, hint in hints_of(kind).items():
            if is_dataclass(hint):
                self._add_ranges(hint, f"{prefix}{name}.")
            elif any(True for _ in ranged(hint)) and (action := actions.get(f"{prefix}{name}")):
                vars(action)["_typehint"] = _with_ranges(hint)


def parse(parser: Parser, arguments: Sequence[str]) -> Any:
    """Parse and build the dataclasses; raises UserError in one line, with the nearest valid name for an unknown one."""
    with _in_one_line(parser):
        values = parser.parse_args(_switched_on(parser, arguments))
        return parser.instantiate(values)


def parse_mapping(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping of its options; `where` begins the message of a UserError, raised as by `parse`."""
    parser = _parser_of(kind)  # type: ignore[arg-type]  # a class is hashable
    with _in_one_line(parser, f"{where}: "):
        parsed = parser.parse_object(dict(values))
        _keep_strings(values, parsed)
        found = parser.instantiate(parsed)
        return kind(**{f.name: found[f.name] for f in fields(kind)})  # type: ignore[arg-type]


def _keep_strings(given: Mapping[str, Any], found: jsonargparse.Namespace) -> None:
    """Put back strings that the parser has read as YAML once more: "null" as a prompt, "[qv]" as a pattern."""
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), jsonargparse.Namespace):
            _keep_strings(value, found[key])
        elif isinstance(value, str) and (found[key] is None or isinstance(found[key], list)):
            found[key] = value


@cache
def _parser_of(kind: type[Any]) -> Parser:
    parser = Parser()
    parser.add_class_arguments(kind)
    return parser


def _with_ranges(hint: Any, several: bool = False) -> Any:
    """A type whose numbers are classes that the parser reads, and shows in its help, with their ranges."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, about = parts
        return _number_class(kind, about, several)
    if not parts or origin is Literal:
        return hint
    union = origin in (Union, UnionType)
    inner = tuple(_with_ranges(part, several or not union) for part in parts)
    return Union[inner] if union else origin[inner]  # noqa: UP007  # made of a tuple


@cache
def _number_class(kind: type[Any], about: Range, several: bool) -> type[Any]:
    made: type[Any] = type(f"{kind.__name__} {about}".strip(), (kind,), {})
    register_type(
        made,
        serializer=lambda number: number,
        deserializer=lambda value: about.read(value, kind, several, words=True),
        type_check=lambda value, made: False,
        fail_already_registered=False,
    )
    return made


@contextmanager
def _in_one_line(parser: Parser, where: str = "") -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise (UserError(f"{where}{error}") if where else error) from error
    except (
        jsonargparse.ArgumentError, ArithmeticError, AttributeError, KeyError, OSError, RecursionError, TypeError,
        ValueError, yaml.YAMLError,
    ) as error:  # fmt: skip
        raise UserError(where + _one_line(error, parser)) from error


def _switched_on(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """`--resume` for `--resume=true`: options that are true or false need no value to be true."""
    switches = {o for a in parser._actions if getattr(a, "_typehint", None) is bool for o in a.option_strings}
    values = {"true", "false", "yes", "no"}
    following = [*arguments, ""][1:]
    return [
        f"{word}=true" if word in switches and after.lower() not in values else word
        for word, after in zip(arguments, following, strict=True)
    ]


def _one_line(error: BaseException, parser: Parser) -> str:
    """The part of a parser's message that says what is wrong."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    option = re.match(r"Parser key \"([\w.]+)\": ", text)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return f"{option[1]}: {cause}" if option else str(cause)
        cause = cause.__cause__ or cause.__context__
    names = [action.dest for action in parser._actions]
    if match := re.search(r"[Gg]roup '([\w.]+)' does not accept option '([\w.]+)'", text):
        word = f"{match[1]}.{match[2]}"
        return f"unknown option {word}{_closest(word, names)}"
    if match := re.search(r"[Uu]nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", text):
        word = match[1] or match[2]
        return f"unknown option {word}{_closest(word, names)}"
    if match := re.search(r"[Oo]ption '([\w.]+)' is not accepted", text):
        return f"unknown option {match[1]}{_closest(match[1], names)}"
    if "Unexpected config:" in text:
        return "config: expected a YAML file with options such as model and task, found none in it"
    text = re.sub(r'Parser key "([\w.]+)": ', r"\1: ", text)
    text = re.sub(r"typing\.Literal\[([^]]*)\]", r"one of \1", text).replace("Expected a one", "expected one")
    return re.sub(r"<class '(\w+)'>", r"\1", text).replace("Expected", "expected").replace("Got value:", "Found")[:400]


def _closest(word: str, names: Sequence[str]) -> str:
    """What an unknown option may have meant: whole names first, then last parts, so that a key under the wrong heading
    finds its place. Among so many names a likeness of half the letters is chance."""
    headings = {name.partition(".")[0] for name in names}
    heading = word.partition(".")[0]
    if "." in word and heading not in headings and (found := nearest(heading, headings)):
        return found
    if found := nearest(word, names, 0.7):
        return found
    last = {name.rsplit(".", 1)[-1]: name for name in names}
    if found := nearest(word.rsplit(".", 1)[-1], last, 0.7):
        return f"; did you mean {last[found.split(chr(39))[1]]!r}?"
    return ""
