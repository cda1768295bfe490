"""Ranges of numbers that are options, as part of their types: `steps: Count`, `betas: tuple[PartBelowOne, ...]`.

A type checker sees int or float. The command line reads the range from the annotation and shows it in its help
(`system.options`); dataclasses hold themselves to it by `check_ranges` in `__post_init__`, functions by `in_range`.
Whole numbers may be written 300, 3e2 or 300.0. NaN, infinity, true and false are no numbers.
"""

from __future__ import annotations

import math
import operator
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from loracurve.system.errors import UserError, one_line

__all__ = [
    "Amount",
    "Count",
    "NonNegative",
    "OpenShare",
    "PartBelowOne",
    "Points",
    "PointsOrNone",
    "Positive",
    "PositiveShare",
    "Range",
    "Rank",
    "Rows",
    "Seed",
    "Share",
    "Slots",
    "check_ranges",
    "hints_of",
    "in_range",
    "ranged",
]

T = TypeVar("T")

# What float32, in which models are trained, tells from 0 and from infinity: 2^-126 and 2^128 - 2^104.
SMALLEST, LARGEST = 2.0**-126, 2.0**128 - 2.0**104

# Whole numbers without a bound of their own. Torch takes them as seeds.
LARGEST_WHOLE = 2**63 - 1

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")

_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; None: no bound."""

    least: float | None = None
    most: float | None = None
    open_least: bool = False
    """`least` itself is not one of them"""
    open_most: bool = False
    """`most` itself is not one of them"""

    def __str__(self) -> str:
        """`>= 1`, `> 0`, `in [0, 1)`; empty without bounds."""
        if self.least is None and self.most is None:
            return ""
        if self.most is None:
            return f"{'>' if self.open_least else '>='} {_shown(self.least)}"
        if self.least is None:
            return f"{'<' if self.open_most else '<='} {_shown(self.most)}"
        ends = "(" if self.open_least else "[", ")" if self.open_most else "]"
        return f"in {ends[0]}{_shown(self.least)}, {_shown(self.most)}{ends[1]}"

    def read(self, value: object, kind: type[Any], several: bool = False, words: bool = False) -> Any:
        """The number that `value` is, as an int or a float.

        Args:
            value: a number of any kind.
            kind: int or float.
            several: the message speaks of numbers, one of which is found wrong.
            words: whether strings that spell a number are numbers, as on the command line and in files.

        Raises:
            UserError: no number, or one outside the range: "expected a number in [0, 1), found 1.5".
        """
        number = _whole(value, words) if kind is int else _real(value, words)
        if number is not None and self._holds(number):
            return number
        noun = "whole number" if kind is int else "number"
        expected = f"{f'{noun}s' if several else f'a {noun}'} {self}".strip() + self._unsaid(number)
        spelt = isinstance(value, str) and len(value) < 30 and _NUMBER.fullmatch(value.strip())
        found = str(value).strip() if spelt else _shown(value)
        raise UserError(f"expected {expected}, found {found}")

    def _holds(self, number: float) -> bool:
        if isinstance(number, int):
            usual = abs(number) <= LARGEST_WHOLE
        else:
            usual = number == 0 or SMALLEST <= abs(number) <= LARGEST
        if not usual:
            return False
        if self.least is not None and (number < self.least or self.open_least and number == self.least):
            return False
        return self.most is None or number < self.most or number == self.most and not self.open_most

    def _unsaid(self, number: float | None) -> str:
        """What the bounds do not say of numbers that are too large or too close to 0."""
        if isinstance(number, int):
            return " of at most 63 bits" if self.most is None and abs(number) > LARGEST_WHOLE else ""
        if number and math.isfinite(number) and not SMALLEST <= abs(number) <= LARGEST:
            return " that float32 tells from 0 and from infinity"
        return ""


Count = Annotated[int, Range(1)]
"""Of something that there is at least once."""

Amount = Annotated[int, Range(0)]
"""0 turns it off, or stands for a default."""

Points = Annotated[int, Range(1, 100_000)]
"""Points of a curve, samples, resamples. Larger numbers would only fill the memory before anything says so."""

PointsOrNone = Annotated[int, Range(0, 100_000)]

Slots = Annotated[int, Range(1, 1000)]
"""Adapters, segments or pieces of a curve."""

Rank = Annotated[int, Range(1, 2**16)]

Rows = Annotated[int, Range(1, 2**20)]
"""Rows that are run together."""

Seed = Annotated[int, Range()]

Positive = Annotated[float, Range(0, open_least=True)]

NonNegative = Annotated[float, Range(0)]

Share = Annotated[float, Range(0, 1)]

PartBelowOne = Annotated[float, Range(0, 1, open_most=True)]

PositiveShare = Annotated[float, Range(0, 1, open_least=True)]

OpenShare = Annotated[float, Range(0, 1, open_least=True, open_most=True)]


def check_ranges(options: Any, heading: str = "") -> None:
    """Hold the options of a dataclass to the ranges of their types, first thing in its `__post_init__`.

    Numbers of other libraries, and whole numbers written 3.0, become Python's own.

    Args:
        options: the dataclass.
        heading: under which its options stand in a file, for the message.

    Raises:
        UserError: "betas: expected numbers in [0, 1), found 1.5".
    """
    hints = hints_of(type(options))  # type: ignore[arg-type]  # a class is hashable
    for field in fields(options):
        value = getattr(options, field.name)
        held = in_range(f"{heading}.{field.name}" if heading else field.name, value, hints[field.name])
        if held is not value:
            object.__setattr__(options, field.name, held)


def in_range(name: str, value: T, hint: Any, words: bool = False) -> T:
    """A value held to the ranges in its type; parts of the type without a range are not looked at.

    Args:
        name: stands in front of the message.
        value: a number, or a list, tuple or mapping of numbers.
        hint: one of the types above, or a list, tuple, dict or union of them.
        words: whether strings that spell a number are numbers.

    Raises:
        UserError: a value of another kind or outside its range.
    """
    try:
        return _held(value, hint, False, words) if any(True for _ in ranged(hint)) else value
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def ranged(hint: Any) -> Iterator[tuple[type[Any], Range]]:
    """Kind (int or float) and range of every number that has one in a type."""
    if get_origin(hint) is Annotated:
        kind, *about = get_args(hint)
        yield from ((kind, found) for found in about if isinstance(found, Range))
    else:
        for part in get_args(hint):
            yield from ranged(part)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass' fields or a function's parameters, ranges included."""
    return get_type_hints(kind, include_extras=True)


def _held(value: Any, hint: Any, several: bool, words: bool) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, about = parts[0], parts[1]
        number = about.read(value, kind, several, words)
        # 16 for a float is left as it was written, so that records of it do not change.
        return value if type(value) is int and number == value else number
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _held(value, next(part for part in parts if any(True for _ in ranged(part))), several, words)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"expected a mapping of names to numbers, found {_shown(value)}")
        return _same(value, {key: _held(v, parts[1], True, words) for key, v in value.items()})
    if not isinstance(value, list | tuple):
        raise UserError(f"expected a list of numbers, found {_shown(value)}")
    if origin is tuple and len(parts) != len(value):
        raise UserError(f"expected {len(parts)} numbers, found {len(value)}")
    kinds = parts if origin is tuple else parts * len(value)
    return _same(value, type(value)(_held(v, part, True, words) for v, part in zip(value, kinds, strict=True)))


def _same(value: Any, held: Any) -> Any:
    """The container itself where nothing in it has changed."""
    old, new = (list(x.values()) if isinstance(x, Mapping) else list(x) for x in (value, held))
    return value if all(a is b for a, b in zip(old, new, strict=True)) else held


def _whole(value: Any, words: bool) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        if not words or len(text) > 30:
            return None
        if _WHOLE.fullmatch(text):
            return int(text)
        return _whole(float(text), words) if _NUMBER.fullmatch(text) else None
    if _is_bool(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        number = _real(value, words)
        return int(number) if number is not None and number.is_integer() else None


def _real(value: Any, words: bool) -> float | None:
    if isinstance(value, str):
        text = value.strip()
        return float(text) if words and len(text) <= 400 and _NUMBER.fullmatch(text) else None
    if _is_bool(value) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # an array of several numbers
        return None


def _is_bool(value: Any) -> bool:
    """Python's, and those of array libraries."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _shown(value: object) -> str:
    """A number or anything else for a message, short and on one line."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"one of {value.bit_length()} bits"
    return one_line(repr(value), 60)
