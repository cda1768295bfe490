"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loracurve.report.adapters import chosen_adapter, chosen_name, mean_name, single_adapters
from loracurve.report.numbers import number, rounded, star
from loracurve.report.parts import DETECTORS, EXPLAINED, HEADINGS, THREE, detectors_of, has_three, parts_of
from loracurve.system.escaping import inline, visible

__all__ = ["method_rows", "print_barriers", "print_methods", "print_report"]


COLUMNS = {"acc": "ACC", "nll": "NLL", "ece": "ECE", "mutual_information": "MI"}


def method_rows(methods: Mapping[str, Any], split: str = "test") -> list[dict[str, Any]]:
    """Rows of the summary: single adapters are averaged into one row, and the one that validation rows choose stands
    below it; the others stand as they are."""
    singles, scores, rows = single_adapters(methods), detectors_of(methods.values()), []
    if singles:
        each = [methods[name] for name in singles]
        figures = {k: _mean([m["sets"][split][k] for m in each]) for k in each[0]["sets"][split] if k in COLUMNS}
        found = {s: _detection([m["detection"].get(s) for m in each], scores) for s in each[0]["detection"]}
        figures, found = _without_information(figures, found)
        rows.append({"method": mean_name(len(singles)), "passes": 1, **figures, "detection": found})
    shown = {name: name for name in methods if name not in singles}
    if chosen := chosen_adapter(methods):
        shown = {chosen: chosen_name(chosen)} | shown
    for name, words in shown.items():
        m = methods[name]
        figures = dict(m["sets"][split])
        found = {s: _detection([d], scores) for s, d in m["detection"].items()}
        if m["passes"] == 1 and not has_three(figures):
            figures, found = _without_information(figures, found)
        rows.append({"method": words, "passes": m["passes"], **figures, "detection": found})
    return rows


def _without_information(figures: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One point has no mutual information; a zero would read as a finding."""
    return figures | {"mutual_information": None}, {s: by | {"mi": None} for s, by in found.items()}


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _detection(found: list[Mapping[str, Any] | None], scores: Sequence[str]) -> dict[str, float | None]:
    return {name: _mean([f.get(f"auroc_{name}") for f in found if f]) for name in scores}


def print_methods(methods: Mapping[str, Any], split: str = "test") -> None:
    """Print accuracy and calibration of each method, the parts of the uncertainty where there are three, and how well
    uncertainty tells other sets from this one."""
    rows = method_rows(methods, split)
    table = _table(f"{split} split", ["method", "passes", *COLUMNS.values()])
    for row in rows:
        _add(table, row["method"], str(row["passes"]), *(number(row.get(k), missing="-") for k in COLUMNS))
    console = _console()
    console.print(table)
    if parts_of(methods.values()) == THREE:
        console.print(_parts_table(methods))
        console.print(EXPLAINED)
    sets = sorted({s for row in rows for s in row["detection"]})
    if sets:
        scores = detectors_of(methods.values())
        title = f"AUROC of telling a set from {split}, by"
        table = _table(title, ["set: method", *(DETECTORS[name] for name in scores)])
        for of in sets:
            for row in rows:
                if of in row["detection"]:
                    values = row["detection"][of]
                    _add(table, f"{of}: {row['method']}", *(number(values[k], missing="-") for k in scores))
        console.print(table)


def _parts_table(methods: Mapping[str, Any]) -> Table:
    """Entropy and its three parts, for the methods and sets that have them."""
    shown = ("entropy", *THREE)
    table = _table("mean uncertainty, nats", ["method: set", *(HEADINGS[k] for k in shown)])
    for name, method in methods.items():
        for of, figures in method["sets"].items():
            if has_three(figures):
                _add(table, f"{name}: {of}", *(number(figures[k]) for k in shown))
    return table


def print_report(report: Mapping[str, Any]) -> None:
    """Print the tables of methods and the paired comparisons of the curve with each of them."""
    print_methods(report["methods"])
    if not report["comparisons"]:
        return
    table = _table(
        "curve minus other, paired over test examples, 95 % bootstrap interval", ["other", "", "difference", ""]
    )
    for c in report["comparisons"]:
        for measure in ("nll", "acc"):
            found = c[measure]
            better = (found["estimate"] < 0) == (measure == "nll")
            verdict = (
                ("curve better" if better else "curve worse") if found["distinguishable"] else "not distinguishable"
            )
            _add(table, c["second"] if measure == "nll" else "", measure.upper(), rounded(found), verdict)
    _console().print(table)


def print_barriers(scan: Mapping[str, Any]) -> None:
    """Print the barrier of every path between neighbouring anchors, of what `landscape.survey.scan_to_folder` finds."""
    chosen = scan["settings"]["choose"]
    table = _table(
        "barriers: test NLL above the line between two anchors,\n"
        f"at the t* of most {chosen} NLL; 95 % interval, * excludes 0",
        ["path", "", "t*", "excess", "above ends"],
    )
    for b in scan["barriers"]:
        _add(
            table,
            b["path"],
            f"{b['segment']}-{b['segment'] + 1}",
            number(b["t_star"], 2),
            rounded({**b, "estimate": b["excess"]}) + star(b, "  "),
            number(b["above_ends"], sign=True),
        )
    console = _console()
    console.print(table)
    for row in scan["gauge"]:
        console.print(visible(row["sentence"]))
    cost = scan["cost"]
    console.print(f"{cost['evaluations']} merged evaluations, {cost['seconds_per_evaluation']:.2f} s each")


def _console() -> Console:
    """Brackets and colons in names are no markup."""
    return Console(markup=False, emoji=False)


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(visible(cell).replace("\n", " ") for cell in cells))


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=visible(title), title_justify="left", box=SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        # In a narrow terminal names wrap: figures that are cut short are none.
        least = max(len(heading), 6) if i and heading else None
        side: Literal["left", "right"] = "left" if i == 0 or not heading else "right"
        table.add_column(inline(heading), justify=side, no_wrap=i > 0, min_width=least)
    return table
