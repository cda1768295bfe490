"""Rows that stand in a data set twice: the same text, whatever its case, punctuation and spacing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loracurve.tasks.dataset import Dataset, Row, as_text

__all__ = ["in_training", "shared_rows"]


def shared_rows(rows: Iterable[Row], others: Iterable[Row], choices: bool = False) -> int:
    """How many of the rows have the text of one of the others, and if so asked the same choices in any order."""
    known = {_bare(row, choices) for row in others}
    return sum(_bare(row, choices) in known for row in rows)


def in_training(dataset: Dataset, splits: Sequence[str] = ("validation", "test")) -> list[str]:
    """For each of the splits that has rows of the training split, a sentence that says how many."""
    train = dataset.splits.get("train", ())
    found = {name: shared_rows(dataset.splits[name], train, choices=True) for name in splits if name in dataset.splits}
    return [
        f"{count} of {len(dataset.splits[name])} {name} rows stand among the training rows too (the same text but for "
        "case, punctuation and spacing): what is measured on them says nothing of new texts"
        for name, count in found.items()
        if count
    ]


def _bare(row: Row, choices: bool) -> tuple[str, ...]:
    text, *others = (
        "".join(c for c in part.lower() if c.isalnum()) for part in (as_text(row), *(row.choices if choices else ()))
    )
    return text, *sorted(others)
