"""Rows that stand in a data set twice: the same text, whatever its case, punctuation and spacing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loracurve.tasks.dataset import Dataset, Row, as_text

__all__ = ["bare", "in_training", "shared_rows"]


def shared_rows(rows: Iterable[Row], others: Iterable[Row], choices: bool = False) -> int:
    """How many of the rows have the text of one of the others, and if so asked the same choices in any order."""
    known = {bare(row, choices) for row in others}
    return sum(bare(row, choices) in known for row in rows)


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


def bare(row: Row, choices: bool = False) -> tuple[str, ...]:
    """A row's text, and if so asked its choices in alphabetical order, without case, punctuation and spacing; a text
    that has nothing else stays as it is."""
    parts = (as_text(row), *(row.choices if choices else ()))
    text, *others = ("".join(c for c in part.lower() if c.isalnum()) or part for part in parts)
    return text, *sorted(others)
