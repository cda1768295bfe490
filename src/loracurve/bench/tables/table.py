"""Tables in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loracurve.inference.intervals import Interval
from loracurve.report.numbers import number, rounded
from loracurve.system.escaping import csv_cell, inline, latex, markdown, markdown_cell
from loracurve.system.files import atomic_write

__all__ = ["Table", "Value", "shown", "write_table"]


Value = str | int | float | Interval | None


@dataclass
class Table:
    """A table: Interval cells become three columns in CSV, and `estimate [low, high]` elsewhere; None is a dash."""

    name: str
    title: str
    columns: list[str]
    rows: list[Sequence[Value]] = field(default_factory=list)
    notes: str = ""
    bold: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        lines = [f"## {markdown(self.title)}", ""]
        if self.notes:
            lines += [markdown(self.notes), ""]
        lines += ["| " + " | ".join(map(markdown_cell, self.columns)) + " |"]
        lines += ["|" + "|".join("---" if self.is_text(i) else "---:" for i in range(len(self.columns))) + "|"]
        lines += ["| " + " | ".join(markdown_cell(_quoted(v)) for v in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A tabular for package booktabs."""
        alignment = "".join("l" if self.is_text(i) else "r" for i in range(len(self.columns)))
        rows = [" & ".join(latex(_quoted(v)) for v in row) + r" \\" for row in self.rows]
        head = " & ".join(map(latex, self.columns)) + r" \\"
        begin, end = rf"\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
        return "\n".join(
            [f"% {inline(self.title)}", begin, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", end, ""]
        )

    def csv(self) -> str:
        wide = [any(isinstance(row[i], Interval) for row in self.rows) for i in range(len(self.columns))]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        header: list[str] = []
        for column, three in zip(self.columns, wide, strict=True):
            named = [column, f"{column} low", f"{column} high"] if three else [column]
            header += map(csv_cell, named)
        writer.writerow(header)
        for row in self.rows:
            cells: list[object] = []
            for value, three in zip(row, wide, strict=True):
                if isinstance(value, Interval):
                    cells += [_exact(v) for v in value]
                else:
                    cells += [_exact(value)] + ["", ""] * three
            writer.writerow(cells)
        return buffer.getvalue()

    def is_text(self, column: int) -> bool:
        return any(isinstance(row[column], str) for row in self.rows)


def write_table(table: Table, folder: Path) -> None:
    """Write NAME.md, NAME.tex and NAME.csv; of a table without rows remove those of an earlier call."""
    for suffix, text in (("md", table.markdown), ("tex", table.latex), ("csv", table.csv)):
        path = folder / f"{table.name}.{suffix}"
        if table.rows:
            _write(path, text())
        else:
            path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def shown(value: Value, digits: int | None = None) -> str:
    """A value as readers of a page see it; `digits` of a single number as for `number`."""
    if isinstance(value, Interval) and not math.isnan(value.low):
        return rounded(value._asdict(), sign=False, missing="-")
    if isinstance(value, Interval):
        value = value.estimate
    return number(value, digits, missing="-") if value is None or isinstance(value, float) else str(value)


def _quoted(value: Value) -> str:
    """A value in Markdown and LaTeX, from which texts quote: four digits behind the point, one from 100 on."""
    if isinstance(value, Interval) and not math.isnan(value.low):
        estimate, low, high = map(_quoted, value)
        return f"{estimate} [{low}, {high}]"
    if isinstance(value, Interval):
        value = value.estimate
    if value is None or isinstance(value, float):
        return number(value, 4 if value is None or abs(value) < 100 else 1, missing="-")
    return str(value)


def _exact(value: Value) -> object:
    if isinstance(value, str):
        return csv_cell(value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
