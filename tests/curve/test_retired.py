"""The one table of retired options."""

from __future__ import annotations

from typing import Any

import pytest

from loracurve.curve.retired import DEFAULTS, LAST_COMMIT, Part, refusal, split_retired


@pytest.mark.parametrize(
    ("part", "options", "here", "gone"),
    [
        ("curve", {"segments": 2, "smooth": False}, {"segments": 2}, {}),
        ("curve", {"segments": 2, "smooth": True}, {"segments": 2}, {"smooth": True}),
        ("training", {"steps": 3, **DEFAULTS["training"]}, {"steps": 3}, {}),
        ("training", {"bootstrap": {"kind": "none"}}, {}, {}),
        ("training", {"bootstrap": {"kind": "tied"}}, {}, {"bootstrap": {"kind": "tied"}}),
        ("training", {"sampling": "stratified"}, {"sampling": "stratified"}, {}),
        ("training", {"sampling": "quasi-random"}, {}, {"sampling": "quasi-random"}),
        ("training", {"objective": {"jsd": "bonus"}}, {"objective": {"jsd": "bonus"}}, {}),
        ("training", {"objective": {"jsd": "mixture"}}, {}, {"objective": {"jsd": "mixture"}}),
        ("curve", {"sampling": "quasi-random"}, {"sampling": "quasi-random"}, {}),  # not one of a curve's options
    ],
)
def test_options_are_split(part: Part, options: dict[str, Any], here: dict[str, Any], gone: dict[str, Any]) -> None:
    before = repr(options)
    assert split_retired(part, options) == (here, gone) and repr(options) == before


def test_the_refusal_is_one_line_that_says_where_it_still_is() -> None:
    said = str(refusal("curve.smooth"))
    assert said.startswith("curve.smooth: expected none") and "results/NOTES.md" in said
    assert f"commit {LAST_COMMIT} " in said and "\n" not in said
