"""Tables in the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["method_rows", "print_methods", "print_report"]

COLUMNS = {"acc": "ACC", "nll": "NLL", "ece": "ECE", "mutual_information": "MI"}


def method_rows(methods: Mapping[str, Any], split: str = "test") -> list[dict[str, Any]]:
    """Rows of the summary: single adapters are averaged into one row, the others stand as they are."""
    singles = [m for name, m in methods.items() if re.fullmatch(r"adapter \d+", name)]
    rows = []
    if singles:
        figures = {k: _mean([m["sets"][split][k] for m in singles]) for k in singles[0]["sets"][split] if k in COLUMNS}
        found = {s: _detection([m["detection"].get(s) for m in singles]) for s in singles[0]["detection"]}
        rows.append({"method": f"single adapter (mean of {len(singles)})", "passes": 1, **figures, "detection": found})
    for name, m in methods.items():
        if m in singles:
            continue
        found = {s: _detection([d]) for s, d in m["detection"].items()}
        rows.append({"method": name, "passes": m["passes"], **m["sets"][split], "detection": found})
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _detection(found: list[Mapping[str, Any] | None]) -> tuple[float | None, float | None]:
    known = [f for f in found if f]
    return _mean([f["auroc_entropy"] for f in known]), _mean([f["auroc_mi"] for f in known])


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def print_methods(methods: Mapping[str, Any], split: str = "test") -> None:
    """Print one row for each method: passes, ACC, NLL, ECE, MI, and OOD AUROC by entropy / MI."""
    rows = method_rows(methods, split)
    ood = sorted({s for row in rows for s in row["detection"]})
    table = Table(title=f"{split} split")
    table.add_column("method")
    for heading in ("passes", *COLUMNS.values(), *(f"AUROC {s}\nentropy / MI" for s in ood)):
        table.add_column(heading, justify="right")
    for row in rows:
        single = row["method"].startswith("single")
        cells = [_number(row.get(k)) for k in COLUMNS]
        if single:
            cells[-1] = "-"
        for s in ood:
            by_entropy, by_mi = row["detection"].get(s, (None, None))
            cells.append(f"{_number(by_entropy, 3)} / {'-' if single else _number(by_mi, 3)}")
        table.add_row(row["method"], str(row["passes"]), *cells)
    Console(width=None).print(table)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the table of methods and the paired comparisons of the curve with each of them."""
    print_methods(report["methods"])
    table = Table(title="curve minus other, paired over test examples, 95 % bootstrap interval")
    for heading in ("other", "NLL", "", "ACC", ""):
        table.add_column(heading)
    for c in report["comparisons"]:
        cells = []
        for measure in ("nll", "acc"):
            found = c[measure]
            better = (found["estimate"] < 0) == (measure == "nll")
            verdict = ("curve better" if better else "curve worse") if found["distinguishable"] else "not distinguishable"
            cells += [f"{found['estimate']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]", verdict]
        table.add_row(c["second"], *cells)
    Console().print(table)
