"""Validation and test rows where a data set has none: drawn by hash, by class, and by group."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

__all__ = ["divide"]


def divide(
    keys: Sequence[str],
    labels: Sequence[int | None],
    groups: Sequence[Hashable | None] = (),
    parts: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Divide rows into train and `parts`. Which part a row goes to depends on keys, labels, groups and seed only, and
    never on the order of the rows.

    Rows of one key (a text) and rows of one group stay together, and so do rows that are joined by a chain of these.
    Such units are ranked in each class by the hash of their least key; the first go to the parts, as long as a part's
    share of the class's rows is not exceeded by more than half. A class of fewer units than there are parts, train
    among them, is trained only; each other class is in all parts where the groups admit it.

    Args:
        keys: of each row.
        labels: class of each row, None for none.
        groups: of each row, None for a row that stands alone; empty: no groups.
        parts: share of the rows by name. Default: a tenth each for validation and test.
        seed: of the hash.

    Returns:
        Numbers of the rows in each part and in train, ascending.
    """
    parts = {"validation": 0.1, "test": 0.1} if parts is None else parts
    units = _units(keys, groups)
    ranked = sorted(units, key=lambda u: hashlib.sha256(f"{seed}:{min(keys[i] for i in u)}".encode()).digest())
    classes = [Counter(labels[i] for i in unit) for unit in ranked]
    strata: dict[int | None, list[int]] = {}
    for number, counts in enumerate(classes):
        most = max(counts.values())
        strata.setdefault(min((c for c in counts if counts[c] == most), key=_order), []).append(number)
    place = ["train"] * len(ranked)
    for stratum in sorted(strata, key=_order):
        _draw(strata[stratum], [len(unit) for unit in ranked], parts, place)
    _complete(classes, parts, place)
    found: dict[str, list[int]] = {name: [] for name in ("train", *parts)}
    for unit, name in zip(ranked, place, strict=True):
        found[name] += unit
    return {name: sorted(rows) for name, rows in found.items()}


def _order(label: int | None) -> int:
    return -1 if label is None else label


def _units(keys: Sequence[str], groups: Sequence[Hashable | None]) -> list[list[int]]:
    """Rows that stay together."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        ties: list[Hashable] = [("key", key)]
        if groups and groups[row] is not None:
            ties.append(("group", groups[row]))
        for tie in ties:
            parent[root(row)] = root(first.setdefault(tie, row))
    units: dict[int, list[int]] = {}
    for row in range(len(keys)):
        units.setdefault(root(row), []).append(row)
    return list(units.values())


def _draw(units: Sequence[int], sizes: Sequence[int], parts: Mapping[str, float], place: list[str]) -> None:
    """Choose units of one class for the parts; one at least for each, where one is left for train."""
    if len(units) < len(parts) + 1:
        return
    total = sum(sizes[u] for u in units)
    left = list(units)
    for number, (name, share) in enumerate(parts.items()):
        waiting = len(parts) - number  # units that train and the further parts need
        wanted, filled = max(round(share * total), 1), 0
        for unit in list(left):
            if filled >= wanted or len(left) <= waiting:
                break
            if filled + sizes[unit] <= 1.5 * wanted:
                place[unit] = name
                left.remove(unit)
                filled += sizes[unit]
        if not filled:
            least = min(left, key=lambda u: sizes[u])
            place[least] = name
            left.remove(least)


def _complete(classes: Sequence[Counter[int | None]], parts: Mapping[str, float], place: list[str]) -> None:
    """Move units of several classes from train to parts that lack a class, where train keeps all its classes."""
    count = Counter(c for counts in classes for c in counts)
    there = {name: Counter[int | None]() for name in ("train", *parts)}
    for number, counts in enumerate(classes):
        there[place[number]].update(counts.keys())
    for label in sorted(count, key=lambda c: (count[c], _order(c))):
        for name in parts:
            if there[name][label] or count[label] < len(parts) + 1:
                continue
            movable = [
                u
                for u, counts in enumerate(classes)
                if place[u] == "train" and label in counts and all(there["train"][c] > 1 for c in counts)
            ]
            if movable:
                unit = min(movable, key=lambda u: classes[u].total())
                place[unit] = name
                there["train"].subtract(classes[unit].keys())
                there[name].update(classes[unit].keys())
