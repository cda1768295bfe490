"""One ordinary adapter in place of a curve: trained to the curve's averaged probabilities, so that one pass serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loracurve.curve.lora_space import adapter_at, stack_adapters
from loracurve.curve.spec import CurveSpec
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.metrics import accuracy
from loracurve.inference.model_average import average_of
from loracurve.inference.prediction import point_nll
from loracurve.inference.predictive import Predictive
from loracurve.runs.predict import rows_of
from loracurve.runs.run import Run, build_unknowns, check_run, open_run
from loracurve.runs.save import write_run
from loracurve.system.distributed import main_holds, on_main
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import results_folder
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import LoopConfig
from loracurve.training.distillation import DistilledObjective, soft_cross_entropy
from loracurve.training.loop import run_loop

__all__ = ["distill_run"]

_PART = 5
"""A fifth of the curve's steps by default: what one fine-tune takes of them."""


def distill_run(
    run: str,
    out: Path,
    input: str | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    base: str | None = None,
) -> list[str]:
    """Train one adapter to the averaged probabilities of a run's curve, on its training rows and texts without labels.

    It starts at the point of the average that has the lowest validation NLL, and keeps the state of the lowest. What is
    written is a run of one point, which all commands take, with Gaussians and familiarity of its own, with
    `distilled.json`, what it was made from and how near it comes, and with `adapter`, a PEFT folder.

    Args:
        run: run directory.
        out: new folder.
        input: a file of further rows, as for `loracurve predict`: labels and ids are not needed.
        steps: of training. None: a fifth of the curve's.
        learning_rate: peak. None: the curve's.
        base: where the base model is now. None: where it was.

    Returns:
        What was found, a line each.

    Raises:
        UserError: no run there, a folder with something in it, a task without classes, rows that are gone.
    """
    check_run(Path(run))
    with main_holds(lambda: results_folder(out)):
        return _distill(open_run(run, base=base), out, input, steps, learning_rate)


def _distill(opened: Run, out: Path, input: str | None, steps: int | None, learning_rate: float | None) -> list[str]:
    model, task = opened.model, opened.task
    if task.config.scoring == "lm":
        raise UserError("distill: expected a task with classes, found language modelling")
    average = opened.average()
    sets = {"train": task.encode("train"), "validation": task.encode("validation")}
    if input is not None:
        sets["unlabelled"] = task.encode_rows(rows_of(opened, Path(input), labelled=False), "unlabelled", False)
    taught = average.predict_all(model, sets)
    rows, targets = _together(sets, taught)
    validation, labels = taught["validation"], sets["validation"].labels
    places = model.coefficients(average.t) if average.coefficients is None else average.coefficients  # [n, K]
    start = places[int(point_nll(validation, labels).mean(1).argmin())]
    model.set_curve(CurveSpec.slots(1), stack_adapters([adapter_at(model.control_points(), start)]))

    own = opened.config.curve_training
    options = {f.name: getattr(own, f.name) for f in fields(LoopConfig)}
    training = replace(
        LoopConfig(**options),
        steps=steps or max(own.steps // _PART, 1),
        learning_rate=learning_rate or own.learning_rate,
    )
    program = DistilledObjective(model, rows, targets, sets["validation"], training)
    result = run_loop(model, program, training, label="distill")

    one = EvaluationConfig(points=1)
    write_run(model, task, out, one, unknowns=opened.config.unknowns)
    alone = average_of(model, one, task)
    unknowns = build_unknowns(model, task, alone, opened.config.unknowns, out)
    found = replace(alone, unknowns=unknowns).predict(model, sets["validation"])
    record = {
        "curve": str(opened.folder.resolve()),
        "passes": len(average.weights),
        "rows": {name: len(encoded) for name, encoded in sets.items()},
        "steps": result.steps,
        "best_step": result.best_step[0],
        "learning_rate": training.learning_rate,
        "validation": _compared(validation, found, labels),
    }
    on_main(partial(_write, opened, out, record))
    return _lines(record, out)


def _together(sets: Mapping[str, Encoded], taught: Mapping[str, Predictive]) -> tuple[Encoded, torch.Tensor]:
    """Everything that is trained on, and ``[rows, C]`` the curve's probabilities there."""
    names = [name for name in sets if name != "validation"]
    probs = [taught[name].probs for name in names]
    classes = max(p.shape[1] for p in probs)
    targets = torch.cat([torch.nn.functional.pad(p, (0, classes - p.shape[1])) for p in probs])
    examples = [example for name in names for example in sets[name].examples]
    return replace(sets["train"], examples=examples), targets


def _compared(curve: Predictive, alone: Predictive, labels: torch.Tensor) -> dict[str, Any]:
    """NLL and accuracy of both, and the mean KL divergence of the adapter's probabilities from the curve's, in nats."""
    both = {"curve": curve, "distilled": alone}
    kl = soft_cross_entropy(alone.log_probs.double(), curve.probs.double()) - curve.entropy
    return {
        "nll": {name: float(p.negative_log_likelihood(labels).mean()) for name, p in both.items()},
        "accuracy": {name: accuracy(p.probs, labels) for name, p in both.items()},
        "kl": float(kl.mean()),
    }


def _write(opened: Run, out: Path, record: Mapping[str, Any]) -> None:
    opened.model.export(out / "adapter", 0.0)
    write_json(out / "distilled.json", record)


def _lines(record: Mapping[str, Any], out: Path) -> list[str]:
    found, rows = record["validation"], sum(n for name, n in record["rows"].items() if name != "validation")
    nll, right = found["nll"], found["accuracy"]
    return [
        f"{record['steps']:,} steps on {rows:,} texts; kept: step {record['best_step']:,}",
        f"validation NLL: curve ({record['passes']} passes) {nll['curve']:.3f}, one adapter {nll['distilled']:.3f}; "
        f"accuracy {right['curve']:.3f} and {right['distilled']:.3f}; mean KL divergence {found['kl']:.4f}",
        f"The adapter is in {out / 'adapter'}; {out} is a run of it, which loracurve calibrate, predict, evaluate, "
        "report and serve take",
    ]
