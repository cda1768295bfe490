"""JSON of a known kind is as it should be, or the first difference is told in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loracurve.system.errors import UserError
from loracurve.system.shapes import Shape, check_shape

SHAPE: Shape = {"name": str, "sizes": {str: int}, "loss?": (float, None), "rows": [{"t": float}], "done": bool}
FINE: dict[str, Any] = {"name": "x", "sizes": {"a": 1}, "rows": [{"t": 0}, {"t": 0.5, "more": []}], "done": True}


def test_what_fits_passes() -> None:
    check_shape(FINE, SHAPE, "file")
    check_shape(FINE | {"loss": None, "other": 3}, SHAPE, "file")
    check_shape(FINE | {"loss": 2, "sizes": {}, "rows": []}, SHAPE, "file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 3}, "expected text as 'name', found 3"),
        ({"name": None}, "expected text as 'name', found None"),
        ({"sizes": {"a": True}}, "expected a whole number as 'sizes.a', found True"),
        ({"sizes": {"a": 1.0}}, "expected a whole number as 'sizes.a', found 1.0"),
        ({"sizes": ["a"]}, "expected named entries as 'sizes', found 1 entries"),
        ({"loss": "1"}, "expected a number as 'loss', found '1'"),
        ({"loss": math.nan}, "expected a number as 'loss', found nan"),
        ({"loss": math.inf}, "expected a number as 'loss', found inf"),
        ({"loss": 10**400}, "expected a number as 'loss', found 1"),
        ({"rows": {}}, "expected a list as 'rows', found 0 entries"),
        ({"rows": [{"t": 1}, {}]}, r"expected the entry 'rows\[1\].t', found none"),
        ({"done": 1}, "expected true or false as 'done', found 1"),
        ({"sizes": {"\x1b[2J" * 100: "\n" * 100}}, "expected a whole number as 'sizes"),
    ],
)
def test_what_differs_is_told_in_one_line(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^file: {told}") as caught:
        check_shape(FINE | change, SHAPE, "file")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_what_is_no_mapping_or_lacks_an_entry_is_told() -> None:
    with pytest.raises(UserError, match="file: expected named entries, found 0 entries; make it again"):
        check_shape([], SHAPE, "file")
    with pytest.raises(UserError, match="file: expected the entry 'name', found none"):
        check_shape({k: v for k, v in FINE.items() if k != "name"}, SHAPE, "file")
