"""What JSON of a known kind has to hold, said as Python types and compared with what it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loracurve.system.errors import UserError, one_line

__all__ = ["Shape", "check_shape"]

Shape = type | None | list[Any] | tuple[Any, ...] | Mapping[Any, Any]
"""A type (int and float: finite; int is a float, and bool neither); None; `[shape]`, a list; `(shape, ...)`, one of
several; `{name: shape}`, a mapping that may hold more, where a name that ends in ? may be missing; `{str: shape}`, a
mapping of any names."""

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "entries"}


def check_shape(value: Any, shape: Shape, where: str) -> None:
    """Raise UserError where a value is not of a shape; `where` names the file, and begins the message."""
    found = _difference(value, shape, "")
    if found:
        raise UserError(f"{where}: {found}; make it again")


def _difference(value: Any, shape: Shape, place: str) -> str | None:
    """The first place where they differ, in words."""
    if isinstance(shape, tuple):
        found = [_difference(value, one, place) for one in shape]
        return None if None in found else found[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _told(place, "a list", value)
        (inner,) = shape
        return next((d for i, v in enumerate(value) if (d := _difference(v, inner, f"{place}[{i}]"))), None)
    if isinstance(shape, Mapping):
        return _entries(value, shape, place)
    if shape is None:
        return None if value is None else _told(place, "nothing", value)
    fits = type(value) is shape or (shape is float and type(value) is int)
    if fits and shape in (int, float):
        fits = abs(value) < 1e300 and not math.isnan(value)
    return None if fits else _told(place, _WORDS.get(shape, shape.__name__), value)


def _entries(value: Any, shape: Mapping[Any, Any], place: str) -> str | None:
    if not isinstance(value, dict):
        return _told(place, "named entries", value)
    if list(shape) == [str]:
        named = {name: (name, shape[str]) for name in value}
    else:
        named = {name.removesuffix("?"): (name, inner) for name, inner in shape.items()}
    for name, (written, inner) in named.items():
        here = f"{place}.{name}" if place else str(name)
        if name in value:
            if found := _difference(value[name], inner, here):
                return found
        elif not written.endswith("?"):
            return f"expected the entry {one_line(here, 120)!r}, found none"
    return None


def _told(place: str, expected: str, value: Any) -> str:
    shown = f"{len(value)} entries" if isinstance(value, dict | list) else one_line(repr(value)[:80], 60)
    return f"expected {expected}{f' as {one_line(place, 120)!r}' if place else ''}, found {shown}"
