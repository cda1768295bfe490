"""Predictions for new rows: probabilities, the parts of their uncertainty, and, calibrated, whether to abstain."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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
from loracurve.tasks.own_data import rows_from_table
from loracurve.tasks.tables import ENDINGS
from loracurve.tasks.templates import LETTERS

__all__ = [
    "average_of_classes",
    "familiarity_of",
    "parts_of",
    "predict_file",
    "predict_rows",
    "prediction_records",
    "prediction_table",
    "rows_of",
    "say_what_is_missing",
]


logger = logging.getLogger("loracurve")

_JSON_LINES = (".jsonl", ".ndjson", ".json")


def average_of_classes(run: Run, evaluation: EvaluationConfig | None = None) -> Average:
    """`Run.average`; raises UserError for runs without classes to predict."""
    if run.config.task.scoring == "lm":
        raise UserError("this run is of language modelling, which has no classes to predict; use evaluate")
    return run.average(evaluation)


def rows_of(run: Run, path: Path, labelled: bool) -> list[Row]:
    """Rows of a file as the run's own, their labels in the order of its classes.

    A run that was fitted to a table takes tables with the same columns, in any format, labels and ids where they are
    asked for; another run takes JSON lines as its own, and tables with the columns text, text2 and label.
    """
    dataset, columns = run.task.dataset, run.config.task.columns
    identity = TaskIdentity.of(run.task)
    if columns.text is None and (path.suffix.lower() not in ENDINGS or path.suffix.lower() in _JSON_LINES):
        rows, labels = read_rows(path, dataset.kind, dataset.labels, require_labels=labelled), dataset.labels
    elif dataset.kind != "classification":
        raise UserError(f"{path}: expected JSON lines, as a table has no {dataset.kind} rows, found {path.suffix!r}")
    else:
        second = identity.template is not None and "text2" in identity.template.fields
        rows, labels = rows_from_table(path, columns, labelled, second)
    return rows_in_class_order(rows, labels, identity, str(path))


def predict_rows(run: Run, path: Path, evaluation: EvaluationConfig | None = None) -> Iterator[dict[str, Any]]:
    """One record for each row of a file: probabilities, uncertainty in nats, and whether to abstain.

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
            "%s: no Gaussians and no familiarity in this run; loracurve calibrate builds them from its training rows",
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


def predict_file(run: str, rows: Path, points: int | None = None, base: str | None = None, ending: str = "") -> bytes:
    """Probabilities and uncertainty of each row of a file (`predict_rows`), in their order.

    Args:
        run: run directory.
        rows: a file as `rows_of` takes it.
        points: of the curve. Default: the run's own.
        base: where the base model is now, as `open_run` takes it.
        ending: .csv, .tsv or .parquet for a table (`prediction_table`), anything else for JSON lines.
    """
    opened = open_run(run, base=base)
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    records = [*predict_rows(opened, rows, evaluation)]
    if ending.lower() not in (".csv", ".tsv", ".parquet"):
        return "".join(json.dumps(line) + "\n" for line in records).encode()
    shared = TaskIdentity.of(opened.task).shares_classes
    table = prediction_table(records, opened.task.classes if shared else ())
    target = io.BytesIO()
    if ending.lower() == ".parquet":
        pq.write_table(table, target, compression="zstd")
        return target.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if ending.lower() == ".tsv" else ",", lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows([_cell(value) for value in row.values()] for row in table.to_pylist())
    return text.getvalue().encode()


def prediction_table(records: Sequence[dict[str, Any]], classes: Sequence[str]) -> pa.Table:
    """Predictions as a table: id, prediction, a column ``prob_CLASS`` for each class, the uncertainties in nats, and
    where the run has them familiarity, abstain, reasons and set (lists of words).

    Args:
        records: as `predict_rows` has them.
        classes: names; none where each row has its own choices, which are then counted by their letters.
    """
    names = classes or LETTERS[: max(len(record["probs"]) for record in records)]
    columns: dict[str, Any] = {name: [record[name] for record in records] for name in ("id", "prediction")}
    for number, name in enumerate(names):
        columns[f"prob_{name}"] = [dict(enumerate(record["probs"])).get(number) for record in records]
    left = [name for name in records[0] if name not in ("id", "prediction", "label", "probs")]
    columns |= {name: [record[name] for record in records] for name in left}
    types = {"reasons": pa.list_(pa.string()), "set": pa.list_(pa.string())}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


def _cell(value: Any) -> Any:
    """A value as CSV has it: lists with semicolons, nothing for what is not there."""
    if isinstance(value, list):
        return "; ".join(value)
    return str(value).lower() if isinstance(value, bool) else value
