"""Texts, rows and limits of the served run."""

from __future__ import annotations

from typing import Any

import pytest

from loracurve.serving.config import ServeConfig

TEXTS = ["the film is good", "a truly awful", "it was fine", "quite dull", "i found the music lovely", "poor " * 30]
ROWS = [{"id": f"r{i}", "text": text} for i, text in enumerate(TEXTS)]
LIMITS = ServeConfig(max_body_bytes=20_000, max_rows=8, max_tokens_per_row=100, max_new_tokens=6)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Predictions are equal up to the rounding of another batch."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, abs=3e-6) if isinstance(value, float) else value) or (
                name == "probs" and one[name] == pytest.approx(value, abs=3e-6)
            )
