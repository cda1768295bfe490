"""Predictions for new rows: probabilities, the parts of their uncertainty, and, calibrated, whether to abstain."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.inference.calibration import apply_temperature, prediction_sets
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.model_average import Average
from loracurve.inference.predictive import Predictive
from loracurve.report.parts import THREE, TWO
from loracurve.runs.calibration import Calibration, calibration_for
from loracurve.runs.run import Run, open_run
from loracurve.system.errors import UserError
from loracurve.system.paths import is_file
from loracurve.tasks.classes import TaskIdentity, rows_in_class_order
from loracurve.tasks.dataset import Row, read_rows
from loracurve.tasks.encoding import Encoded

__all__ = [
    "average_of_classes",
    "familiarity_of",
    "parts_of",
    "predict_file",
    "predict_rows",
    "prediction_records",
    "rows_of",
    "say_what_is_missing",
]


logger = logging.getLogger("loracurve")


def average_of_classes(run: Run, evaluation: EvaluationConfig | None = None) -> Average:
    """`Run.average`; raises UserError for runs without classes to predict."""
    if run.config.task.scoring == "lm":
        raise UserError("this run is of language modelling, which has no classes to predict; use evaluate")
    return run.average(evaluation)


def rows_of(run: Run, path: Path, labelled: bool) -> list[Row]:
    """Rows of a JSONL file as the run's own, their labels in the order of its classes."""
    dataset = run.task.dataset
    rows = read_rows(path, dataset.kind, dataset.labels, require_labels=labelled)
    return rows_in_class_order(rows, dataset.labels, TaskIdentity.of(run.task), str(path))


def predict_rows(run: Run, path: Path, evaluation: EvaluationConfig | None = None) -> Iterator[dict[str, Any]]:
    """One record for each row of a JSONL file: probabilities, uncertainty in nats, and whether to abstain.

    With RUN/calibration.json, `probs` are tempered, `abstain` and `set` are added; the uncertainties stay untempered.
    """
    rows = rows_of(run, path, labelled=False)
    average = average_of_classes(run, evaluation)
    calibration = calibration_for(run, average)
    say_what_is_missing(run)
    encoded = run.task.encode_rows(rows, path.name, labelled=False)
    yield from prediction_records(rows, encoded, average.predict(run.model, encoded), calibration, average)


def say_what_is_missing(run: Run) -> None:
    """A line in the log for a run that knows nothing of unknown inputs."""
    asked = run.config.unknowns
    if (asked.gaussians, asked.familiarity) != ("none", "none") and not is_file(run.folder / "unknowns.json"):
        logger.warning(
            "%s: no Gaussians and no familiarity, which this run was made before; loracurve calibrate builds them from "
            "its training rows",
            run.folder,
        )


def prediction_records(
    rows: Sequence[Row],
    encoded: Encoded,
    predictive: Predictive,
    calibration: Calibration | None,
    average: Average | None = None,
) -> Iterator[dict[str, Any]]:
    """One record for each predicted row, as `predict_rows` has them; `encoded` and `predictive` [E] are of the rows,
    by the average."""
    probs, sets, abstain = predictive.probs, None, None
    familiarity = familiarity_of(predictive, average, 0.0 if calibration is None else calibration.foreign_tolerance)
    foreign = None
    parts = ["entropy", *TWO, *(name for name in parts_of(average) if name not in TWO)]
    if calibration is not None:
        probs = apply_temperature(predictive.log_probs, calibration.temperature).exp()
        # A class that is there can reach 0 by underflow, and still be in a set of all.
        there = probs.clamp_min(torch.finfo(probs.dtype).tiny)
        sets = prediction_sets(there, calibration.quantile, calibration.tolerance)
        abstain = ~calibration.selective.answered(getattr(predictive, calibration.measure))
        if familiarity is not None and calibration.foreign is not None:
            foreign = familiarity < calibration.foreign
    for i, (row, example) in enumerate(zip(rows, encoded.examples, strict=True)):
        names = row.choices or encoded.classes
        count = example.n_choices
        best = int(probs[i, :count].argmax())
        record: dict[str, Any] = {
            "id": row.id,
            "label": best,
            "prediction": names[best],
            "probs": [round(p, 6) for p in probs[i, :count].tolist()],
            **{k: round(float(getattr(predictive, k)[i]), 6) for k in parts},
        }
        if familiarity is not None:
            record["familiarity"] = round(float(familiarity[i]), 6)
        if sets is not None and abstain is not None:
            reasons = ["uncertain"] * bool(abstain[i]) + ["foreign"] * (foreign is not None and bool(foreign[i]))
            record |= {"abstain": bool(reasons), "reasons": reasons}
            record["set"] = [names[c] for c in range(count) if sets[i, c]]
        yield record


def parts_of(average: Average | None) -> tuple[str, ...]:
    """The parts that add up to the entropy of predictions by an average: two, or with Gaussians three."""
    unknowns = None if average is None else average.unknowns
    return TWO if unknowns is None or unknowns.gaussians is None else THREE


def familiarity_of(predictive: Predictive, average: Average | None, tolerance: float) -> Tensor | None:
    """[E] p-values of the rows' distances from the training data, which may be smaller by the tolerance."""
    if predictive.distance is None or average is None or average.unknowns is None:
        return None
    known = average.unknowns.familiarity
    return None if known is None else known.p_values(predictive.distance.cpu() - tolerance)


def predict_file(run: str, rows: Path, points: int | None = None, base: str | None = None) -> str:
    """JSON lines with probabilities and uncertainty of each row of a JSONL file (`predict_rows`); `base`: where the
    base model is now, as `open_run` takes it."""
    opened = open_run(run, base=base)
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    return "".join(json.dumps(line) + "\n" for line in predict_rows(opened, rows, evaluation))
