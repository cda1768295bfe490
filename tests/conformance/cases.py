"""The axes of the matrix and a covering design: for each family all pairs of axis values, with few cases."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import combinations, product
from zlib import crc32

ALL = os.environ.get("LORACURVE_CONFORMANCE") == "all"
"""whether the whole matrix runs, or a few cases of each family"""
WRITES = ALL or os.environ.get("LORACURVE_CONFORMANCE") == "table"
"""whether the page of results is written"""

AXES: dict[str, dict[str, list[str]]] = {
    "causal": {
        "way": ["rows", "tokens", "points", "merged", "generate"],
        "scoring": ["letter", "label", "text", "lm"],
        "length": ["short", "long", "over"],
        "side": ["right", "left"],
        "adapter": ["plain", "patterns", "rslora", "saved", "grown"],
        "dtype": ["float32", "bfloat16", "nf4"],
    },
    "classifier": {
        "way": ["rows", "points", "merged"],
        "scoring": ["head"],
        "length": ["short", "long", "over"],
        "side": ["right", "left"],
        "adapter": ["plain", "patterns", "rslora", "saved", "grown"],
        "dtype": ["float32", "bfloat16", "nf4"],
    },
}
"""Values of each axis. length: `short` prompts fit into every window of attention, `long` ones exceed these windows,
`over` ones exceed the positions too and are cut."""


FLOAT32 = 1e-5
"""largest difference of log-probabilities in float32, of their size where that is above 1"""


@dataclass(frozen=True)
class Case:
    """One family with one value of each axis."""

    family: str
    way: str
    scoring: str
    length: str
    side: str
    adapter: str
    dtype: str

    @property
    def values(self) -> set[str]:
        """The axis values."""
        return {self.way, self.scoring, self.length, self.side, self.adapter, self.dtype}

    def __str__(self) -> str:
        return f"{self.family}-{self.way}-{self.scoring}-{self.length}-{self.side}-{self.adapter}-{self.dtype}"


def covering(axes: dict[str, list[str]], seed: int) -> list[tuple[str, ...]]:
    """Rows of one value for each axis in which every pair of values of two axes occurs.

    Greedy: each row is the best of some drawn around a pair that is still missing, by the new pairs it brings. The
    first rows bring most, so a beginning of the list is a good sample.
    """
    draw = random.Random(seed)
    values = list(axes.values())
    missing = {(i, a, j, b) for i, j in combinations(range(len(values)), 2) for a, b in product(values[i], values[j])}

    def pairs(row: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
        return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}

    rows = []
    while missing:
        i, a, j, b = draw.choice(sorted(missing))
        tries = []
        for _ in range(30):
            row = [draw.choice(options) for options in values]
            row[i], row[j] = a, b
            tries.append(tuple(row))
        best = max(tries, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(best)
    return rows


def cases_of(family: str, kind: str, without: Set[str] = frozenset()) -> Iterator[Case]:
    """The cases of a family: all of its covering design, or two, one of them in float32; `without`: axis values that it
    has not."""
    axes = {axis: [value for value in values if value not in without] for axis, values in AXES[kind].items()}
    rows = covering(axes, crc32(family.encode()))
    if not ALL:
        exact = next(row for row in rows if "float32" in row)
        rows = [exact, next(row for row in rows if "float32" not in row)]
    for row in rows:
        yield Case(family, *row)
