"""Rows that are out of distribution: other data in a task's prompt, where only the text is foreign and never the
format, and classes that a model is not told of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from loracurve.system.errors import UserError, nearest
from loracurve.tasks.dataset import Dataset, Row, as_text
from loracurve.tasks.repeats import shared_rows

__all__ = ["HELD_OUT", "MOST_SHARED", "adopted", "check_foreign", "without_classes"]

HELD_OUT = "held_out"
"""Name of the split with the test rows of classes that are left out."""

MOST_SHARED = 0.01
"""Part of the rows of another data set that may stand in the task's own data."""


def adopted(rows: Sequence[Row], dataset: Dataset) -> list[Row]:
    """Rows of any data in the form of `dataset`.

    For a multiple choice a text becomes the question. Choices and context that a row lacks are those of one of the
    task's test rows, chosen by the hash of the row's id: a prompt without them would betray the row by its form, and
    other numbers of choices would change the range of the entropy. Where all rows of the task have the same choices
    (yes, no), so have these. For pairs of texts a row without a second one gets that of another foreign row, chosen
    likewise. Labels of a multiple choice are dropped.
    """
    if dataset.kind == "classification":
        return _paired(rows) if any(row.text2 for row in dataset.rows("test")) else list(rows)
    if dataset.kind != "multiple_choice":
        return list(rows)
    own = dataset.rows("test")
    same = all(row.choices == own[0].choices for row in own)
    found = []
    for row in rows:
        lender = own[_place(row, len(own))]
        question = as_text(row) if row.question is None else row.question
        choices = row.choices if row.choices and not same else lender.choices
        found.append(Row(row.id, question=question, choices=choices, context=row.context or lender.context))
    return found


def _paired(rows: Sequence[Row]) -> list[Row]:
    found = []
    for number, row in enumerate(rows):
        if not row.text2:
            other = rows[(number + 1 + _place(row, max(len(rows) - 1, 1))) % len(rows)]
            row = Row(row.id, text=as_text(row), text2=as_text(other))
        found.append(row)
    return found


def _place(row: Row, size: int) -> int:
    """A number below `size` by the hash of the row's id."""
    return int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "big") % size


def check_foreign(rows: Sequence[Row], dataset: Dataset, name: str) -> None:
    """Refuse rows of which more than `MOST_SHARED` are among those that the task learns from or is judged by: they are
    not foreign.

    Raises:
        UserError: they do, with their number.
    """
    own = (row for part in ("train", "validation", "test") for row in dataset.splits.get(part, ()))
    shared = shared_rows(rows, own)
    if shared > MOST_SHARED * len(rows):
        raise UserError(
            f"{name}: expected rows that {dataset.name} does not have, found {shared} of {len(rows)} in it; choose "
            "other data"
        )


def without_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """A classification without some of its classes, whose test rows become the split `held_out`, without labels.

    Raises:
        UserError: other data, a class that is not there, or fewer than two left.
    """
    if not names:
        return dataset
    if dataset.kind != "classification":
        raise UserError(f"held_out: expected classes of a classification, found {dataset.kind} data; leave it out")
    wrong = next((name for name in names if name not in dataset.labels), None)
    if wrong is not None:
        raise UserError(
            f"held_out: expected classes of {dataset.name}, found {wrong!r}{nearest(wrong, dataset.labels)}"
        )
    kept = [number for number, label in enumerate(dataset.labels) if label not in names]
    if len(kept) < 2:
        raise UserError(f"held_out: expected at least two classes to be left, found {len(kept)}")
    splits = {
        part: [replace(row, label=kept.index(row.label)) for row in rows if row.label in kept]
        for part, rows in dataset.splits.items()
    }
    splits[HELD_OUT] = [replace(row, label=None) for row in dataset.rows("test") if row.label not in kept]
    return replace(dataset, labels=tuple(dataset.labels[number] for number in kept), splits=splits)
