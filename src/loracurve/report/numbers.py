"""Numbers as readers see them: in the terminal, on pages, and in the tables of a suite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["digits_of", "interval", "number", "rounded", "star"]


DIGITS = 3
"""Digits behind the point that readers see; files keep all."""

FINE = 0.005
"""Width of an interval below which a third decimal would hide it; a tenth of it hides behind a fourth, and so on."""

_MOST = 6


def number(value: float | None, digits: int | None = None, sign: bool = False, missing: str = "–") -> str:
    """A number for a table.

    Args:
        value: None or NaN where there is none.
        digits: behind the point; None: `DIGITS`, but 1 from 100 on, and two that count below .001, up to six, so that
            a small number is not read as none.
        sign: write + too.
        missing: what stands for no number.
    """
    if value is None or math.isnan(value):
        return missing
    if digits is None:
        digits = _own_digits(value)
        value = round(value, digits) + 0.0  # no -0.000
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _own_digits(value: float) -> int:
    size = abs(value)
    if size >= 100:
        return 1
    if not 0.5 * 10**-_MOST <= size < 10**-DIGITS:
        return DIGITS
    return min(1 - math.floor(math.log10(size)), _MOST)


def interval(found: Mapping[str, Any], digits: int, sign: bool = True, missing: str = "–") -> str:
    """``estimate [low, high]``, of a mapping with these entries; arguments as for `number`."""
    estimate, low, high = (number(found[k], digits, sign, missing) for k in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def digits_of(found: Mapping[str, Any]) -> int:
    """Digits that an interval bears: three, more where it is narrower than `FINE`, one from 100 on."""
    low, high = found["low"], found["high"]
    if low is None or high is None or not math.isfinite(high - low) or high == low:
        return DIGITS
    if max(abs(low), abs(high)) >= 100:
        return 1
    digits, width = DIGITS, FINE
    while high - low < width and digits < _MOST:
        digits, width = digits + 1, width / 10
    return digits


def rounded(found: Mapping[str, Any], sign: bool = True, missing: str = "–") -> str:
    """`interval` with the digits that it bears."""
    return interval(found, digits_of(found), sign, missing)


def star(found: Mapping[str, Any], without: str = "") -> str:
    """A star behind an interval that excludes 0 (entry `distinguishable`), else `without`."""
    return " *" if found["distinguishable"] else without
