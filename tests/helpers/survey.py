"""Answers of a survey: five texts that come again and again, so that their scores are tied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = ["very bad", "bad", "so so", "good", "very good indeed"]
POSITIVE = [0, 1, 4, 9, 10]  # of ten
NAMES = ["no", "yes"]


def survey(count: int) -> list[dict[str, Any]]:
    """Rows of five texts in turn, each with the same share of positive labels whatever the count (of 50s)."""
    return [
        {"id": str(i), "text": TEXTS[i % 5], "label": int((i // 5 * 7) % 10 < POSITIVE[i % 5])} for i in range(count)
    ]


def put(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
