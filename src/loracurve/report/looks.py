"""How methods and paths look in figures: each has one colour, line style and marker on a whole page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loracurve.landscape.config import PATHS
from loracurve.report.figures import COLOURS, styles

__all__ = ["RUN", "Look", "looks_of"]


Look = dict[str, Any]
"""keywords of a line: color, linestyle, marker"""

_OTHER_PATHS = [path for path in PATHS if path != "curve"]

RUN: Mapping[str, Look] = dict(zip(("curve", *_OTHER_PATHS, "ensemble", "single adapter"), styles(), strict=False))
"""of what a run's pages show: the curve, paths of a scan, the ensemble, and one adapter or point of the curve"""

# `runs.evaluate` has names of its own.
_SAME = {"straight line": "straight", "aligned line": "balanced+procrustes", "best point": "single adapter"}


def looks_of(names: Iterable[str], known: Mapping[str, Look] = RUN) -> dict[str, Look]:
    """The looks of what one figure shows: those that are known, and for the others what is free.

    Args:
        known: looks of a page; the same name has the same one in all its figures.
    """
    names = list(dict.fromkeys(names))
    found = {name: known[of] for name in names if (of := name if name in known else _known_as(name)) in known}
    used = list(found.values())
    taken = {look["color"] for look in used}
    full = len(taken) == len(COLOURS)  # then the other two tell them apart
    free = (look for look in styles() if look not in used and (full or look["color"] not in taken))
    return {name: found[name] if name in found else next(free) for name in names}


def _known_as(name: str) -> str:
    return "single adapter" if re.match(r"(single )?adapter\b", name) else _SAME.get(name, name)
