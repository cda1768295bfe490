"""P15: a captured curve step on texts of real lengths, packed into rows, against a row for each text.

Every text lies at a point of its own. `--data` are folders with JSONL files (`whole_set.py` says how they become
tokens); the first batch's loss is compared before any time is taken. The padded tokens of captured steps are counted on
any device; steps themselves are captured, and laid out so, on a GPU alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import arguments, build, check, curve_model, random_adapters, report, show, stacked, timed
from whole_set import encode, texts

from loracurve.curve.spec import CurveSpec
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import FitConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.loop import batch_numbers
from loracurve.training.micro_batches import training_batch
from loracurve.training.step import StepConfig, Stepper

ROWS = 2000
COUNTED = 60
"""Steps whose tokens are counted."""
STEP = StepConfig(1e-4, (0.9, 0.999), 1e-8, 0.0, 1.0)
WAYS = {"packed": 256, "a row each": 1}


def padded_tokens(encoded: Encoded, config: FitConfig) -> dict[str, Any]:
    """Tokens of a captured step, a mean, and the shapes that occur; only the layout is made."""
    capturing: Any = SimpleNamespace(device=torch.device("cuda"), runner=SimpleNamespace(takes_trees=lambda *_: True))
    shapes = [
        tuple(training_batch(capturing, encoded, numbers, config).input_ids.shape)
        for step in range(COUNTED)
        for numbers in [batch_numbers(0, step, len(encoded), config.batch_size)]
    ]
    return {"tokens": sum(rows * length for rows, length in shapes) / COUNTED, "shapes": sorted(set(shapes))}


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
    folders = " ".join(f"DATA/{folder.name}" for folder in options.data if folder)
    command = f"python benchmarks/real_lengths.py --shape {options.shape} --data {folders} --repeats {options.repeats}"
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

            def step(program: Any = program, stepper: Any = stepper, count: Any = count) -> None:
                stepper(program.parts(next(count)), 1.0)

            ms = timed(step, 4 * options.repeats, warm_up=4 * options.repeats)  # every shape is captured by then
            found[way] = {"ms": ms, "loss": loss, **padded_tokens(encoded, config)}
            found[way]["captured"] = len(stepper.captured.graphs)
        first, second = (found[way] for way in WAYS)
        if abs(first["loss"] - second["loss"]) > 2e-2 * abs(second["loss"]):
            raise SystemExit(f"{data}: the losses differ: {first['loss']}, {second['loss']}")
        found["packed_tokens_over_a_row_each"] = first["tokens"] / second["tokens"]
        found["packed_over_a_row_each"] = first["ms"] / second["ms"]
        report("real_lengths", options, figures, command)
    show("real_lengths", figures)


if __name__ == "__main__":
    main()
