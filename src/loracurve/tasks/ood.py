"""Rows of other data in a task's prompt (out of distribution): only their text is foreign, never the format."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from loracurve.tasks.dataset import Dataset, Row, as_text

__all__ = ["adopted"]


def adopted(rows: Sequence[Row], dataset: Dataset) -> list[Row]:
    """Rows of any data as multiple-choice questions of `dataset`; for other kinds of data they stay as they are.

    A text becomes the question. Choices and context that a row lacks are those of one of the task's test rows, chosen
    by the hash of the row's id: a prompt without them would betray the row by its form, and other numbers of choices
    would change the range of the entropy. Where all rows of the task have the same choices (yes, no), so have these.
    Labels are dropped.
    """
    if dataset.kind != "multiple_choice":
        return list(rows)
    own = dataset.rows("test")
    same = all(row.choices == own[0].choices for row in own)
    found = []
    for row in rows:
        lender = own[int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "big") % len(own)]
        question = as_text(row) if row.question is None else row.question
        choices = row.choices if row.choices and not same else lender.choices
        found.append(Row(row.id, question=question, choices=choices, context=row.context or lender.context))
    return found
