"""Anchors tuned on validation rows: the best configuration of every set beside that of `suites/final.yaml`.

python results/tuning.py results/tuning/tuning.jsonl

One line a configuration (set, rate, length in units, decay, dropout): best validation NLL of three adapters, seed 0.
With `rows.jsonl` beside it, differences have 95 % intervals over validation rows (paired bootstrap of the adapters'
mean); these do not know of the choice among configurations, which makes the best one look better than it is.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loracurve.system.escaping import markdown_cell

Record = dict[str, Any]
SETS = ("sst2", "ag_news", "subj", "cr", "mrpc", "rte", "cola", "wic")
AT_HALF = ("ag_news", "cr")  # final.yaml: 5e-4, the others 1e-3; every length is in units of its steps
DRAWS = 2000


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(r: Record) -> tuple[Any, ...]:
    return r["set"], r["rate"], round(r["length"], 2), r["decay"], r["dropout"]


def score(r: Record) -> float:
    """Mean over adapters; a fit that failed is worse than all others."""
    return sum(r["validation_nll"]) / len(r["validation_nll"]) if r["status"] == "done" else math.inf


def present(name: str) -> tuple[Any, ...]:
    return name, 5e-4 if name in AT_HALF else 1e-3, 1.0, 0.0, 0.0


def spelled(r: Record) -> str:
    length = {1.0: "1", 1.67: "5/3"}.get(round(r["length"], 2), f"{r['length']:g}")
    extra = "".join(f", {n} {r[n]:g}" for n in ("decay", "dropout") if r[n])
    return f"{r['rate']:.1e}".replace("e-0", "e-").replace(".0e", "e") + f" x {length}{extra}"


def interval(rows: dict[tuple[Any, ...], Record], better: Record, worse: Record) -> str:
    """95 % interval of the difference, by resampling validation rows."""
    if key(better) not in rows or key(worse) not in rows:
        return ""
    a, b = (rows[key(r)]["label_log_probs"] for r in (better, worse))
    each = [sum(y) / len(y) - sum(x) / len(x) for x, y in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)]
    draw = random.Random(0)
    means = sorted(sum(draw.choices(each, k=len(each))) / len(each) for _ in range(DRAWS))
    return f" [{means[int(0.025 * DRAWS)]:.4f}, {means[int(0.975 * DRAWS)]:.4f}]"


def table(head: list[str], body: Iterable[list[str]]) -> None:
    for line in (head, ["---"] * len(head), *(map(markdown_cell, cells) for cells in body)):
        print("|", " | ".join(line), "|")
    print()


def main(path: Path) -> None:
    found = {key(r): r for r in read(path) if r["status"] == "done"}
    failed = {key(r): r for r in [*read(path), *read(path.with_name("failures.jsonl"))] if key(r) not in found}
    rows = {key(r): r for r in read(path.with_name("rows.jsonl"))}
    body, gains, short_gains, averages, tried = [], [], [], [], 0
    for name in SETS:
        own = [r for r in found.values() if r["set"] == name]
        tried += len(own) + sum(k[0] == name for k in failed)
        now = found.get(present(name))
        if not own or now is None:
            body.append([name, str(len(own)), "not run", "", "", "", "", "", "", ""])
            continue
        best, short = min(own, key=score), min((r for r in own if r["length"] == 1), key=score)
        gains.append(score(best) - score(now))
        short_gains.append(score(short) - score(now))
        averages.append([r["ensemble"]["nll"] for r in (now, best, min(own, key=lambda r: r["ensemble"]["nll"]))])
        body.append(
            [
                name,
                f"{len(own)} + {sum(k[0] == name for k in failed)}",
                f"{score(now):.4f}",
                f"{spelled(short)}: {score(short):.4f}",
                f"{spelled(best)}: {score(best):.4f}",
                f"{score(best) - score(now):.4f}{interval(rows, best, now)}",
                ", ".join(map(str, best["best_step"])) + f" of {best['steps']}",
                f"{now['ensemble']['nll']:.4f} / {best['ensemble']['nll']:.4f}",
                f"{sum(now['accuracy']) / 3:.3f} / {sum(best['accuracy']) / 3:.3f}",
                f"{best['peak_reserved_bytes'] / 1e9:.1f}" if best["peak_reserved_bytes"] else "",
            ]
        )
    ends = ["configurations done + failed", "present", "best of one unit", "best", "difference [95 %, rows]"]
    table(["set", *ends, "best steps", "ensemble of 3: present / best", "ACC: present / best", "GB"], body)
    if gains:
        print(f"{tried} configurations. Best minus present, mean of {len(gains)} sets: {sum(gains) / len(gains):.4f};")
        print(f"best of one unit minus present: {sum(short_gains) / len(gains):.4f}.")
        means = " / ".join(f"{sum(values) / len(values):.4f}" for values in zip(*averages, strict=True))
        print(f"Averages of the three adapters: present / of the best single ones / best average, mean: {means}.\n")
    grid = [r for r in found.values() if not r["decay"] and not r["dropout"]]
    rates, lengths = sorted({r["rate"] for r in grid}), sorted({round(r["length"], 2) for r in grid})
    print("Validation NLL, mean of three adapters, without decay and dropout (* best step last for two or three):\n")
    body = []
    for name in SETS:
        for rate in rates:
            line = [found.get((name, rate, n, 0.0, 0.0)) for n in lengths]
            if any(line):
                cells = [f"{score(r):.4f}{'*' * (_last(r) >= 2)}" if r else "" for r in line]
                body.append([name, f"{rate:g}", *cells])
    table(["set", "rate", *(f"{n:g} units" for n in lengths)], body)
    print("Decay and dropout: difference to the same rate and length without them.\n")
    body = []
    for r in sorted(found.values(), key=lambda r: (SETS.index(r["set"]), r["decay"], r["dropout"])):
        base = found.get((*key(r)[:3], 0.0, 0.0))
        if (r["decay"] or r["dropout"]) and base:
            change = f"{score(r) - score(base):+.4f}{interval(rows, r, base)}"
            body.append([r["set"], spelled(r), f"{score(r):.4f}", change])
    table(["set", "configuration", "NLL", "difference"], body)
    for r in failed.values():
        print(f"failed: {r['set']}, {spelled(r)}: {r.get('reason', '')[:160]}")
    print("Again as in results/final (first three anchors of seed 0; best of a validation every 50 steps):\n")
    stored = Path(__file__).resolve().parent / "final" / "anchors"
    body = []
    for name in SETS:
        file = stored / name / "0" / "anchors.json"
        if file.is_file() and (now := found.get(present(name))):
            old = json.loads(file.read_text())["validation_nll"][:3]
            body.append([name, *(", ".join(f"{x:.4f}" for x in v) for v in (old, now["validation_nll"]))])
    table(["set", "results/final", "here"], body)
    if found:
        of = list(found.values())
        spent, beside = sum(r["seconds"] for r in of), max(r["beside"] for r in of)
        print(f"Fits: {spent:.0f} s in all, beside {beside} others at most; {of[0]['device']},")
        print(f"commit {sorted({r['commit'] for r in of})}, versions {of[0]['versions']}.")


def _last(r: Record) -> int:
    return sum(step == r["steps"] for step in r["best_step"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
