"""P13, P14: what it costs to know what a curve does not know.

Building the Gaussians and the distance from the training data at ten points, as a share of the curve's training (2,000
steps of 32 rows beside 3,000 rows to build from, both measured on fewer), and predictions with them over predictions
without, with the curve's states and with the base's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ANSWERS, DEVICE, arguments, build, check, curve_model, note, random_adapters, report, show, stacked
from training_step import ours
from whole_set import encode, texts

from loracurve.curve.spec import CurveSpec
from loracurve.inference.config import UnknownsConfig
from loracurve.inference.prediction import predict_splits
from loracurve.inference.unknowns import fit_unknowns
from loracurve.tasks.encoding import Encoded

STEPS, BATCH, BUILT_FROM = 2000, 32, 3000


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def part(encoded: Encoded, first: int, last: int) -> Encoded:
    return replace(encoded, examples=encoded.examples[first:last])


def main() -> None:
    options = arguments(__doc__, data={"type": Path}, rows={"type": int}, points={"type": int, "default": 10})
    begin = time.perf_counter()
    figures: dict[str, Any] = {"relative_errors": check()}
    rows = options.rows or (BUILT_FROM if DEVICE.type == "cuda" else 1000)
    base = build(options.shape)
    encoded = encode(texts(options.data, 2 * rows), base.config.vocab_size)
    train, other = part(encoded, 0, rows), part(encoded, rows, 2 * rows)
    known = part(other, 0, max(20, len(other) // 6))
    spec = CurveSpec(4, 2)
    model = curve_model(base, 8, spec)
    model.set_curve(spec, stacked(random_adapters(model, spec.size)))
    t = torch.linspace(0, 1, options.points, dtype=torch.float64)
    step, _ = ours(model, train, BATCH, DEVICE.type == "cuda")
    for _ in range(3):
        step()
    step_s = statistics.median(seconds(step) for _ in range(options.repeats))
    model.eval()
    model.set_curve(spec, stacked(random_adapters(model, spec.size)))
    note(begin, f"training: {step_s:.3f} s a step of {BATCH} rows")
    figures |= {"data": options.data.name if options.data else "synthetic", "rows": rows, "points": options.points}
    figures |= {"classes": len(ANSWERS), "step_s": step_s}
    runs: dict[str, Callable[[], Any]] = {"without": lambda: predict_splits(model, {"": other}, t)}
    for name, familiarity in (("curve", "curve"), ("base", "both")):
        config = UnknownsConfig(familiarity=familiarity, rows=rows)  # type: ignore[arg-type]

        def built(config: UnknownsConfig = config) -> Any:
            return fit_unknowns(model, train, known, t, None, config)

        unknowns = built()  # the first time fills caches and captures
        build_s = seconds(built)
        figures[f"build_{name}_s"] = build_s
        figures[f"build_{name}_share"] = (build_s / rows * BUILT_FROM) / (step_s * STEPS)
        runs[name] = lambda unknowns=unknowns: unknowns.predict(model, {"": other}, t)
        note(begin, f"building, {name}: {build_s:.2f} s from {rows} rows")
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if i:
                found[name].append(taken)
    for name, times in found.items():
        figures[f"predict_{name}_s"] = statistics.median(times)
        ratios = [a / b for a, b in zip(times, found["without"], strict=True)]
        if name != "without":
            figures[f"predict_{name}_over_without"] = statistics.median(ratios)
    command = f"python benchmarks/unknowns.py --shape {options.shape} --rows {rows} --repeats {options.repeats}"
    report("unknowns", options, figures, command)
    show("unknowns", figures)


if __name__ == "__main__":
    main()
