"""GPU hours of a full run of a suite: makes docs/evidence/cost.md of what `full_size.py` and `prompt_lengths.py` found.

    python benchmarks/cost.py

A step of a method is the micro-batches of its accumulation, each as long as a row of the task: time grows with length
as that of one adapter does between the two lengths measured. Validations and predictions go by tokens evaluated in a
second.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import Work, work_of
from table import write_table

from loracurve.baselines.laplace import Laplace
from loracurve.bench.config import SuiteConfig
from loracurve.bench.suite import load_suite
from loracurve.training.config import LoopConfig

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence" / "cost.md"
REASONING = ["winogrande_s", "winogrande_m", "arc_challenge", "arc_easy", "openbookqa", "boolq"]


@dataclass(frozen=True)
class Times:
    """What one dtype's measures say; seconds."""

    found: dict[str, Any]
    short: int
    """tokens of a row that steps were measured with"""

    def step(self, kind: str, tokens: float, micro_batches: int) -> float | None:
        """A step on rows of so many tokens; None where its kind was not measured."""
        measured = self.found.get(f"step/{kind}")
        base = self.found.get("step/1 adapter")
        if measured is None or base is None:
            return None
        longer = {
            int(n.split(", ")[1].split()[0]): v["ms"] for n, v in self.found.items() if n.startswith("step/1 adapter, ")
        }
        growth = 1.0 + sum((ms / base["ms"] - 1) / (length / self.short - 1) for length, ms in longer.items()) * (
            tokens / self.short - 1
        )
        return micro_batches * measured["ms"] / 1e3 * max(growth, 0.0)

    def evaluation(self, tokens: float) -> float:
        return tokens / float(self.found["evaluation"]["tokens_per_s"])


def training_seconds(times: Times, work: Work, training: LoopConfig, lengths: dict[str, Any]) -> float | None:
    """A method's own training on a task, with its validations."""
    if work.kind is None:
        return 0.0
    side_by_side = int(work.kind.split()[0]) if work.kind.endswith(("adapter", "adapters")) else 1
    rows = lengths["row_tokens"]
    near = min(rows, key=lambda n: abs(int(n) - side_by_side))
    step = times.step(work.kind, rows[near], training.accumulation)
    if step is None:
        return None
    every = training.evaluate_every or max(work.steps // 10, 1)
    validated = work.steps // every * work.validated * lengths["sets"]["validation"]["tokens"]
    return work.steps * step + times.evaluation(validated)


def prediction_seconds(times: Times, work: Work, lengths: dict[str, Any]) -> float:
    return times.evaluation(work.passes * sum(s["tokens"] for s in lengths["sets"].values()))


def hours(suite: SuiteConfig, times: Times, lengths: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Hours by name of method (and the shared anchors) and task, for one seed."""
    found: dict[str, dict[str, float | None]] = {f"{suite.anchors} anchors, shared": {}}
    for task in suite.tasks:
        training, own = suite.training_of(task, suite.seeds[0]), lengths[task]
        anchors = Work(f"{suite.anchors} adapters", training.steps, suite.anchors)
        seconds = training_seconds(times, anchors, training, own)
        found[f"{suite.anchors} anchors, shared"][task] = None if seconds is None else seconds / 3600
        for name, method in suite.methods.items():
            work = work_of(suite, task, method)
            seconds = None if isinstance(method, Laplace) else training_seconds(times, work, training, own)
            total = None if seconds is None else (seconds + prediction_seconds(times, work, own)) / 3600
            found.setdefault(name, {})[task] = total
    return found


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def total(values: list[float | None]) -> float | None:
    return None if None in values else sum(v for v in values if v is not None)


def lines(suite: SuiteConfig, measured: dict[str, Any], lengths: dict[str, Any]) -> list[str]:
    """Tables of times, hours by method and hours by task."""
    dtypes = [d for d in ("float32", "bfloat16") if "evaluation" in measured.get(d, {})]
    times = {d: Times(measured[d], measured["tokens"]) for d in dtypes}
    by = {d: hours(suite, times[d], lengths) for d in dtypes}
    env, seeds = measured["environment"], len(suite.seeds)
    out = [
        f"Device: {env['device']}; torch {env['packages']['torch']}, transformers {env['packages']['transformers']}.",
        "",
    ]
    head = "".join(f" {d}: ms | GiB |" for d in dtypes)
    out += ["### Micro-batches", "", f"| kind of step |{head}", "|---|" + "---|---|" * len(dtypes)]
    for name in dict.fromkeys(n for d in dtypes for n in measured[d] if n.startswith("step/")):
        cells = [measured[d].get(name) for d in dtypes]
        shown = "".join(f" {c['ms']:.0f} | {c['peak_gib']:.1f} |" if c else " - | - |" for c in cells)
        out.append(f"| {name.removeprefix('step/')} |{shown}")
    out += [
        "",
        "### Evaluation, resume, export",
        "",
        "| | " + " | ".join(dtypes) + " |",
        "|---|" + "---|" * len(dtypes),
    ]
    rows = {
        "points evaluated in a second": ("evaluation", "points_per_s", 1.0),
        "tokens evaluated in a second": ("evaluation", "tokens_per_s", 1.0),
        "checkpoint of a curve of two segments, MB": ("resume", "bytes", 1e-6),
        "resumed against uninterrupted, largest difference of a control point": ("resume", "largest_difference", 1.0),
        "adapter exported, s": ("export", "s", 1.0),
        "adapter exported, MB": ("export", "bytes", 1e-6),
    }
    for text, (name, key, scale) in rows.items():
        found = [measured[d].get(name, {}).get(key) for d in dtypes]
        out.append(f"| {text} | " + " | ".join("-" if v is None else f"{v * scale:.3g}" for v in found) + " |")
    reasoning = [t for t in suite.tasks if t in REASONING]
    out += ["", "### Hours by method, one seed", ""]
    out += ["| method |" + "".join(f" {d}: reasoning sets | all sets |" for d in dtypes)]
    out += ["|---|" + "---|---|" * len(dtypes)]
    for name in next(iter(by.values()), {}):
        sums = [total([by[d][name][t] for t in part]) for d in dtypes for part in (reasoning, list(suite.tasks))]
        out.append(f"| {name} | " + " | ".join(map(number, sums)) + " |")
    out += ["", f"### Hours by task, all methods, {seeds} seeds", "", "| task | " + " | ".join(dtypes) + " |"]
    out += ["|---|" + "---|" * len(dtypes)]
    grand = dict.fromkeys(dtypes, 0.0)
    for task in suite.tasks:
        known = {d: seeds * sum(v[task] or 0.0 for v in by[d].values()) for d in dtypes}
        grand = {d: grand[d] + known[d] for d in dtypes}
        out.append(f"| {task} | " + " | ".join(number(known[d]) for d in dtypes) + " |")
    out.append("| sum | " + " | ".join(number(grand[d]) for d in dtypes) + " |")
    for dtype in dtypes:
        if left := [f"*{n}*" for n, v in by[dtype].items() if None in v.values()]:
            out += ["", f"Not measured in {dtype}, and in no sum of it: {'; '.join(left)}."]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder with the JSON files")
    parser.add_argument("--file", default="full_size-7b-cuda.json", help="which of full_size.py's")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    source = options.results / options.file
    if source.is_file():
        measured = json.loads(source.read_text())
        suite = load_suite(measured["suite"])
        lengths = json.loads((options.results / f"prompt_lengths-{measured['suite']}.json").read_text())
        table = lines(suite, measured, lengths["tasks"])
    else:
        table = ["Not measured yet."]
    print("\n".join(table))
    write_table(options.page, table)


if __name__ == "__main__":
    main()
