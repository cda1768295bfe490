"""The axes of the matrix and a covering design: for each family all pairs of axis values, with few cases."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import combinations, product
from zlib import crc32

ALL = os.environ.get("LORACURVE_CONFORMANCE") == "all"
"""whether the whole matrix runs, or a case of each family"""
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


Kinds = Mapping[str, tuple[str, Set[str]]]
"""Kinds of families, and axis values that they have not."""


def cases_of(families: Kinds) -> dict[str, list[Case]]:
    """The cases of each family: all of its covering design or, where not `ALL`, one of it."""
    designs = {}
    for name, (kind, without) in families.items():
        axes = {axis: [value for value in values if value not in without] for axis, values in AXES[kind].items()}
        designs[name] = [Case(name, *row) for row in covering(axes, crc32(name.encode()))]
    return designs if ALL else _one_of_each(designs, families)


def _one_of_each(designs: dict[str, list[Case]], families: Kinds) -> dict[str, list[Case]]:
    """The families of a kind cover all pairs of values together; where nothing is missing, float32 is the sharpest."""
    covered: set[tuple[str, str, str]] = set()
    out = {}
    for name, cases in designs.items():
        kind, _ = families[name]

        def pairs(case: Case, kind: str = kind) -> set[tuple[str, str, str]]:
            return {(kind, a, b) for a, b in combinations((getattr(case, axis) for axis in AXES[kind]), 2)}

        best = max(cases, key=lambda case: (len(pairs(case) - covered), case.dtype == "float32"))  # noqa: B023
        covered |= pairs(best)
        out[name] = [best]
    return out
