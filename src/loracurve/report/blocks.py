"""What a report is built of: sections, with a block of figures, tables and sentences for each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from loracurve.report.numbers import digits_of, number
from loracurve.report.run_data import RunData

__all__ = ["Block", "Section", "Sheet", "Tile"]


@dataclass(frozen=True)
class Sheet:
    """A table: one list of strings for each row; the first column is text, the others are numbers."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    """how many columns, from the left, are text"""


@dataclass(frozen=True)
class Tile:
    """A number for readers in a hurry."""

    words: str
    found: Mapping[str, Any]
    """estimate, low, high; None where there is none"""
    meaning: str
    percent: bool = False
    difference: bool = False
    """whether its sign says something; of shares it is in percentage points"""

    @property
    def shown(self) -> tuple[str, str]:
        """The number and its interval as readers see them."""
        ends = ("estimate", "low", "high")
        if self.percent:
            form, unit = ("+.2f", "points") if self.difference else (".1f", "%")
            estimate, low, high = (f"{100 * self.found[k]:{form}}" for k in ends)
            return f"{estimate} {unit}", f"95 % interval {low} to {high} {unit}"
        digits = digits_of(self.found)
        estimate, low, high = (number(self.found[k], digits, self.difference) for k in ends)
        return estimate, "" if self.found["low"] is None else f"95 % interval {low} to {high}"


@dataclass
class Block:
    """What a section says about one run."""

    findings: list[str] = field(default_factory=list)
    """what the numbers say, in sentences before everything else"""
    tiles: list[Tile] = field(default_factory=list)
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)
    """file name, what it shows in words, the figure"""
    sheets: list[Sheet] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    """numbers shown that stand neither in metrics.json nor in scan.json, for figures/report.json"""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.findings or self.tiles or self.figures or self.sheets or self.notes)


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, and the function that makes a run's block."""

    title: str
    lead: str
    make: Callable[[RunData], Block]
    evaluation: bool = False
    """whether it is about a run's evaluation, which the scan of adapters without a run does not have"""
    of_scan: bool = False
    """whether `lead` speaks of a scan, and is left out where none was made"""
