"""Predictions for new rows, and their calibration: temperature, abstention, prediction sets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from loracurve.inference.calibration import (
    SelectiveThreshold,
    apply_temperature,
    conformal_quantile,
    fit_temperature,
    prediction_sets,
    selective_threshold,
)
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.prediction import predict_split
from loracurve.inference.predictive import Predictive
from loracurve.runs.run import Run, open_run
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json
from loracurve.system.folders import locked
from loracurve.system.randomness import generator
from loracurve.tasks.dataset import Row, read_rows
from loracurve.tasks.encoding import Encoded

__all__ = ["Calibration", "calibrate_run", "predict_file", "predict_rows", "prediction_records", "read_calibration"]


Measure = Literal["entropy", "mutual_information"]


def _predict(run: Run, rows: Sequence[Row], name: str, labelled: bool, evaluation: EvaluationConfig | None) -> Any:
    if run.config.task.scoring == "lm":
        raise UserError("this run is of language modelling, which has no classes to predict; use evaluate")
    average = run.average(evaluation)
    encoded = run.task.encode_rows(rows, name, labelled)
    return encoded, predict_split(run.model, encoded, average.where, average.weights)


def _rows(run: Run, path: Path, labelled: bool) -> list[Row]:
    dataset = run.task.dataset
    return read_rows(path, dataset.kind, dataset.labels, require_labels=labelled)


@dataclass(frozen=True)
class Calibration:
    """What predict needs of calibration.json."""

    temperature: float
    quantile: float
    """of the prediction sets' scores"""
    measure: Measure
    selective: SelectiveThreshold


def read_calibration(run: Path) -> Calibration | None:
    """What `calibrate_run` wrote into a run directory; None where it has not. Raises UserError for something else."""
    path = run / "calibration.json"
    if not path.exists():
        return None
    values = read_json(path)
    try:
        selective = SelectiveThreshold(**values["selective"])
        quantile, threshold = float(values["conformal"]["quantile"]), selective.threshold
        found = Calibration(float(values["temperature"]), quantile, values["measure"], selective)
        sound = 0 < found.temperature < math.inf and 0 <= quantile <= 1 and found.measure in get_args(Measure)
        if not sound or not (threshold is None or isinstance(threshold, float | int)):
            raise ValueError("numbers that no calibration gives")
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a calibration, found {error!r}; run loracurve calibrate again") from error
    return found


def predict_rows(run: Run, path: Path, evaluation: EvaluationConfig | None = None) -> Iterator[dict[str, Any]]:
    """One record for each row of a JSONL file: probabilities, uncertainty in nats, and whether to abstain.

    With RUN/calibration.json, `probs` are tempered, `abstain` and `set` are added; the uncertainties stay untempered.
    """
    rows = _rows(run, path, labelled=False)
    encoded, predictive = _predict(run, rows, path.name, False, evaluation)
    yield from prediction_records(rows, encoded, predictive, read_calibration(run.folder))


def prediction_records(
    rows: Sequence[Row], encoded: Encoded, predictive: Predictive, calibration: Calibration | None
) -> Iterator[dict[str, Any]]:
    """One record for each predicted row, as `predict_rows` has them; `encoded` and `predictive` [E] are of the rows."""
    probs, sets, abstain = predictive.probs, None, None
    if calibration is not None:
        probs = apply_temperature(predictive.log_probs, calibration.temperature).exp()
        sets = prediction_sets(probs, calibration.quantile)
        abstain = ~calibration.selective.answered(getattr(predictive, calibration.measure))
    for i, (row, example) in enumerate(zip(rows, encoded.examples, strict=True)):
        names = row.choices or encoded.classes
        count = example.n_choices
        best = int(probs[i, :count].argmax())
        record: dict[str, Any] = {
            "id": row.id,
            "label": best,
            "prediction": names[best],
            "probs": [round(p, 6) for p in probs[i, :count].tolist()],
            **{
                k: round(float(getattr(predictive, k)[i]), 6)
                for k in ("entropy", "expected_entropy", "mutual_information")
            },
        }
        if sets is not None and abstain is not None:
            record["abstain"] = bool(abstain[i])
            record["set"] = [names[c] for c in range(count) if sets[i, c]]
        yield record


def calibrate_run(
    run: Run, risk: float, delta: float, alpha: float, measure: Measure, path: Path | None = None
) -> list[str]:
    """Write RUN/calibration.json from labelled rows; returns lines that say what was found.

    The temperature is fitted on one half of the rows (drawn by the seed), the prediction sets on the other, so that
    their coverage is exact; the threshold looks at uncertainties that no temperature changes and uses all rows.
    """
    with locked(run.folder):
        return _calibrate(run, risk, delta, alpha, measure, path)


def _calibrate(run: Run, risk: float, delta: float, alpha: float, measure: Measure, path: Path | None) -> list[str]:
    rows = run.task.dataset.rows("validation") if path is None else _rows(run, path, labelled=True)
    encoded, predictive = _predict(run, rows, "calibration", True, None)
    labels = encoded.labels
    if bool((labels < 0).any()) or len(labels) < 20:
        raise UserError(f"calibration: expected at least 20 labelled rows, found {int((labels >= 0).sum())}")
    order = torch.randperm(len(labels), generator=generator(run.config.evaluation.seed, "calibration"))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = fit_temperature(predictive.log_probs[first], labels[first])
    tempered = apply_temperature(predictive.log_probs, temperature).exp()
    quantile = conformal_quantile(tempered[second], labels[second], alpha)
    selective = selective_threshold(getattr(predictive, measure), ~predictive.correct(labels), risk, delta)
    source = "the validation split" if path is None else path.name
    write_json(
        run.folder / "calibration.json",
        {
            "rows": len(labels),
            "source": source,
            "temperature": temperature,
            "measure": measure,
            "selective": asdict(selective),
            "conformal": {"alpha": alpha, "quantile": quantile, "rows": len(second)},
        },
    )
    return _describe(predictive, tempered, labels, temperature, selective, quantile, alpha, measure, source)


def _describe(
    predictive: Predictive,
    tempered: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    selective: SelectiveThreshold,
    quantile: float,
    alpha: float,
    measure: str,
    source: str,
) -> list[str]:
    nll = -tempered.gather(1, labels[:, None]).log().mean()
    lines = [
        f"{len(labels)} rows of {source}",
        f"temperature {temperature:.3f}: NLL {predictive.negative_log_likelihood(labels).mean():.4f} -> {nll:.4f}",
    ]
    if selective.threshold is None:
        lines.append(f"abstain always: no threshold on {measure} is certified ({selective.reason})")
    else:
        lines.append(
            f"answer where {measure} < {selective.threshold:.4f}: {selective.coverage:.1%} of rows, error "
            f"{selective.selective_risk:.2%}; at most {selective.risk:.1%} with probability {1 - selective.delta:.0%}"
        )
    size = float(prediction_sets(tempered, quantile).sum(1).double().mean())
    lines.append(f"prediction sets hold the label with probability {1 - alpha:.0%}: {size:.2f} classes on average")
    if source == "the validation split":
        lines.append(
            "the validation split also chose the trained state; give --input with unseen rows for exact guarantees"
        )
    return lines


def predict_file(run: str, rows: Path, points: int | None = None) -> str:
    """JSON lines with probabilities and uncertainty of each row of a JSONL file (`predict_rows`)."""
    opened = open_run(run)
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    return "".join(json.dumps(line) + "\n" for line in predict_rows(opened, rows, evaluation))
