"""Numbers as readers see them: in the terminal, on pages, and in the tables of a suite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["digits_of", "interval", "number", "rounded", "star"]


FINE = 0.005
"""Width of an interval below which a third decimal would hide it."""


def number(value: float | None, digits: int | None = 4, sign: bool = False, missing: str = "–") -> str:
    """A number for a table.

    Args:
        value: None or NaN where there is none.
        digits: behind the point; None: 4, or 1 from 100 on.
        sign: write + too.
        missing: what stands for no number.
    """
    if value is None or math.isnan(value):
        return missing
    if digits is None:
        digits = 4 if abs(value) < 100 else 1
    return f"{value:{'+' if sign else ''}.{digits}f}"


def interval(found: Mapping[str, Any], digits: int | None = 4, sign: bool = True, missing: str = "–") -> str:
    """``estimate [low, high]``, of a mapping with these entries; arguments as for `number`."""
    estimate, low, high = (number(found[k], digits, sign, missing) for k in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def digits_of(found: Mapping[str, Any]) -> int:
    """Digits that an interval bears: three, or four where it is narrower than `FINE`."""
    low, high = found["low"], found["high"]
    return 4 if low is not None and high is not None and high - low < FINE else 3


def rounded(found: Mapping[str, Any], sign: bool = True) -> str:
    """`interval` with the digits that it bears."""
    return interval(found, digits_of(found), sign)


def star(found: Mapping[str, Any], without: str = "") -> str:
    """A star behind an interval that excludes 0 (entry `distinguishable`), else `without`."""
    return " *" if found["distinguishable"] else without
