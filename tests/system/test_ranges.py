"""Ranges of numbers: what they hold, what they say, and how dataclasses and functions are held to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from loracurve.system.errors import UserError
from loracurve.system.ranges import (
    LARGEST,
    SMALLEST,
    Amount,
    Count,
    NonNegative,
    OpenShare,
    PartBelowOne,
    Points,
    Positive,
    PositiveShare,
    Range,
    Seed,
    Share,
    check_ranges,
    in_range,
    ranged,
)


@dataclass(frozen=True)
class Options:
    steps: Count = 3
    betas: tuple[PartBelowOne, PartBelowOne] = (0.9, 0.99)
    rate: Positive | None = None
    layers: list[Amount] = field(default_factory=list)
    ranks: dict[str, Count] = field(default_factory=dict)
    name: str = "a"

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("hint", "inside", "outside"),
    [
        (Count, [1, 2, 2**63 - 1], [0, -1, 2**63, 1.5]),
        (Amount, [0, 1], [-1]),
        (Points, [1, 100_000], [0, 100_001]),
        (Seed, [-(2**63) + 1, 0, 2**63 - 1], [2**63, 10**5000]),
        (Positive, [SMALLEST, 1, LARGEST], [0, -0.0, 1e-320, 5e-324, 1e39, 10**5000]),
        (NonNegative, [0, -0.0, SMALLEST, LARGEST], [-SMALLEST, 1e-320, 1e39]),
        (Share, [0, 0.5, 1], [-1e-9, 1 + 1e-9]),
        (PartBelowOne, [0, math.nextafter(1, 0)], [1, -1e-9]),
        (PositiveShare, [SMALLEST, 1], [0, 1.1]),
        (OpenShare, [SMALLEST, math.nextafter(1, 0)], [0, 1]),
        (Annotated[float, Range(None, 3)], [-1e30, 3], [3.1]),
    ],
)
def test_bounds(hint: Any, inside: list[float], outside: list[float]) -> None:
    ((kind, about),) = ranged(hint)
    for number in inside:
        assert in_range("x", number, hint) == number
        assert type(about.read(number, kind)) is kind
    for number in [*outside, math.nan, math.inf, -math.inf, True, False, "1", None, [1], 1j, "nan"]:
        with pytest.raises(UserError, match=r"^x: expected a (whole )?number.*, found \S.{0,60}$"):
            in_range("x", number, hint)


def test_ranges_are_written_as_in_mathematics() -> None:
    written = [
        str(about) for hint in (Count, Positive, PartBelowOne, OpenShare, Points, Seed) for _, about in ranged(hint)
    ]
    assert written == [">= 1", "> 0", "in [0, 1)", "in (0, 1)", "in [1, 100000]", ""]
    assert [str(Range(None, 3)), str(Range(None, 3, open_most=True))] == ["<= 3", "< 3"]


@pytest.mark.parametrize(
    ("word", "whole", "number"),
    [
        ("3", 3, 3.0),
        (" 3 ", 3, 3.0),
        ("+3", 3, 3.0),
        ("1_000", 1000, 1000.0),
        ("1e3", 1000, 1000.0),
        ("3.0", 3, 3.0),
        ("9007199254740993", 9007199254740993, 9007199254740992.0),
        ("1.5", None, 1.5),
        (".5", None, 0.5),
        ("1e-3", None, 0.001),
        *(
            (word, None, None)
            for word in ("1:30", "0o17", "017", "0x1F", "yes", "true", "", "nan", ".inf", "1e999", "3 4")
        ),
        ("٣", None, None),
        ("1__0", None, None),
        ("9" * 5000, None, None),
    ],
)
def test_words_that_spell_numbers(word: str, whole: int | None, number: float | None) -> None:
    for kind, expected in ((int, whole), (float, number)):
        if expected is None:
            with pytest.raises(UserError, match="expected a"):
                Range().read(word, kind, words=True)
        else:
            assert Range().read(word, kind, words=True) == expected
        with pytest.raises(UserError):
            Range().read(word, kind)


@pytest.mark.parametrize(
    "number", [3, 3.0, np.int64(3), np.float32(3), Fraction(3), Decimal(3), torch.tensor(3), torch.tensor(3.0)]
)
def test_numbers_of_other_libraries_become_plain(number: Any) -> None:
    options = Options(steps=number, rate=number, betas=(np.float64(0.5), 0.9), layers=[number])
    assert (options.steps, options.rate, options.betas, options.layers) == (3, 3, (0.5, 0.9), [3])
    assert {type(x) for x in (options.steps, options.layers[0])} == {int}
    assert type(options.betas[0]) is float and type(options.rate) in (int, float)


def test_what_is_right_stays_the_same_object() -> None:
    betas, layers = (0.5, 0.6), [1, 2]
    options = Options(betas=betas, layers=layers, rate=16)
    assert options.betas is betas and options.layers is layers
    assert type(options.rate) is int, "as it was written"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number >= 1, found 0"),
        ({"steps": 2.5}, "steps: expected a whole number >= 1, found 2.5"),
        ({"steps": np.bool_(True)}, "steps: expected a whole number >= 1, found np.True_"),
        ({"steps": torch.tensor([1, 2])}, "steps: expected a whole number >= 1, found tensor([1, 2])"),
        ({"steps": None}, "steps: expected a whole number >= 1, found None"),
        ({"steps": 2**63}, "steps: expected a whole number >= 1 of at most 63 bits, found 9223372036854775808"),
        ({"rate": 1e-320}, "rate: expected a number > 0 that float32 tells from 0 and from infinity, found 1e-320"),
        ({"betas": (0.9, 1.5)}, "betas: expected numbers in [0, 1), found 1.5"),
        ({"betas": (0.9,)}, "betas: expected 2 numbers, found 1"),
        ({"betas": 0.9}, "betas: expected a list of numbers, found 0.9"),
        ({"layers": [-1]}, "layers: expected whole numbers >= 0, found -1"),
        ({"ranks": {"a": 0}}, "ranks: expected whole numbers >= 1, found 0"),
        ({"ranks": [4]}, "ranks: expected a mapping of names to numbers, found [4]"),
    ],
)
def test_dataclasses_refuse_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Options(**values)
    assert str(caught.value) == message
