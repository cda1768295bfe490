"""R curves of one shape in one pass (`fit_curves`) against R fits one after the other, on prompts of real lengths.

The same steps, rows and points; everything from the first step on is in the seconds (capture, laying out batches), but
no validation.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from anchors import seconds
from common import (
    DEVICE,
    arguments,
    build,
    curve_model,
    note,
    peak_memory,
    random_adapters,
    report,
    reset_memory,
    show,
    stacked,
)
from training_step import STEP
from whole_set import encode, texts

from loracurve.fit_config import FitConfig
from loracurve.programs import CurveProgram
from loracurve.several import CurvesProgram, StackedSpec
from loracurve.spec import CurveSpec
from loracurve.stepping import Stepper


def main() -> None:
    options = arguments(
        __doc__,
        steps={"type": int, "default": 100 if DEVICE.type == "cuda" else 5},
        curves={"type": int, "default": 3},
        rows={"type": int, "default": 16},
    )
    if options.shape == "7b":
        options.shape = "smollm2"
    begin, count = time.perf_counter(), options.curves
    spec = CurveSpec(2, 2)
    base = build(options.shape)
    encoded = encode(texts(None, 1000), base.config.vocab_size)
    model = curve_model(base, 8, spec)
    curves = [stacked(random_adapters(model, spec.size))] * count
    config = FitConfig(batch_size=options.rows, points=2, share_points=True)

    def run(program: Any, steps: int = options.steps) -> float:
        model.train()
        stepper = Stepper(program, model.factors, model.spec.mask, STEP)
        reset_memory()
        return seconds(lambda: [stepper(program.parts(step), 1.0) for step in range(steps)])

    def apart(steps: int = options.steps) -> list[float]:
        found = []
        for seed in range(count):
            model.set_curve(spec, curves[seed])
            found.append(run(CurveProgram(model, encoded, encoded, replace(config, seed=seed)), steps))
        return found

    def together(steps: int = options.steps) -> float:
        shape = StackedSpec.of(spec, count)
        model.set_curve(shape, shape.stacked(curves))
        return run(CurvesProgram(model, encoded, encoded, config, range(count)), steps)

    figures: dict[str, Any] = {"curves": count, "rows": options.rows, "points": config.points, "steps": options.steps}
    apart(2)
    together(2)
    # Taken in turn, so that what else runs on the machine falls on both.
    pairs = []
    for _ in range(3):
        alone = sum(apart())
        figures["one_by_one_gib"] = peak_memory()
        pairs.append((alone, together()))
        figures["side_by_side_gib"] = peak_memory()
        note(begin, f"one by one {pairs[-1][0]:.2f} s, side by side {pairs[-1][1]:.2f} s")
    figures["one_by_one_s"], figures["side_by_side_s"] = (min(p[i] for p in pairs) for i in (0, 1))
    figures["one_by_one_over_side_by_side"] = figures["one_by_one_s"] / figures["side_by_side_s"]
    report("curves", options, figures)
    show("curves", figures)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
