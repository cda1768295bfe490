"""P15: a captured curve step on texts of real lengths, packed into rows, against a row for each text.

Every text lies at a point of its own. `--data` are folders with JSONL files (`whole_set.py` says how they become
tokens); the first batch's loss is compared before any time is taken.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from common import arguments, build, check, curve_model, random_adapters, report, show, stacked, timed
from whole_set import encode, texts

from loracurve.curve.spec import CurveSpec
from loracurve.training.config import FitConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.step import StepConfig, Stepper

ROWS = 2000
STEP = StepConfig(1e-4, (0.9, 0.999), 1e-8, 0.0, 1.0)
WAYS = {"packed": 256, "a row each": 1}


def main() -> None:
    options = arguments(
        __doc__,
        data={"type": Path, "nargs": "+", "default": [None]},
        batch={"type": int, "default": 32},
        segments={"type": int, "default": 4},
    )
    figures: dict[str, Any] = {"relative_errors": check(), "batch": options.batch, "segments": options.segments}
    base = build(options.shape)
    spec = CurveSpec(options.segments, 2)
    model = curve_model(base, 16 if options.shape == "7b" else 8, spec).train()
    points = stacked(random_adapters(model, spec.size))
    command = f"python benchmarks/real_lengths.py --shape {options.shape} --data ..."
    for data in options.data:
        encoded = encode(texts(data, ROWS), base.config.vocab_size, "Text :")
        found: dict[str, Any] = {}
        figures[data.name if data else "synthetic"] = found
        for way, row_tokens in WAYS.items():
            model.set_curve(spec, points)
            config = FitConfig(batch_size=options.batch, row_tokens=row_tokens)
            program = CurveObjective(model, encoded, encoded, config)
            stepper, count = Stepper(program, model.factors, spec.mask, STEP), itertools.count()
            loss = float(stepper(program.parts(next(count)), 1.0)[0])
            shapes: list[tuple[int, int]] = []

            def step(program: Any = program, stepper: Any = stepper, count: Any = count, shapes: Any = shapes) -> None:
                parts = program.parts(next(count))
                shapes.append(tuple(parts[0].batch.input_ids.shape))
                stepper(parts, 1.0)

            ms = timed(step, 4 * options.repeats, warm_up=4 * options.repeats)  # every shape is captured by then
            sizes = sorted(set(shapes))
            tokens = sum(a * b for a, b in shapes) / len(shapes)
            found[way] = {"ms": ms, "loss": loss, "tokens": tokens, "shapes": sizes}
            found[way]["captured"] = len(stepper.captured.graphs)
        first, second = (found[way] for way in WAYS)
        if abs(first["loss"] - second["loss"]) > 2e-2 * abs(second["loss"]):
            raise SystemExit(f"{data}: the losses differ: {first['loss']}, {second['loss']}")
        found["packed_over_a_row_each"] = first["ms"] / second["ms"]
        report("real_lengths", options, figures, command)
    show("real_lengths", figures)


if __name__ == "__main__":
    main()
