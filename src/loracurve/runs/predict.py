"""Predictions for new rows, and their calibration: temperature, abstention, prediction sets."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loracurve.inference.calibration import (
    TEMPERATURES,
    SelectiveThreshold,
    apply_temperature,
    conformal_quantile,
    fit_temperature,
    possible_errors,
    prediction_sets,
    selective_threshold,
)
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.model_average import Average
from loracurve.inference.predictive import Predictive
from loracurve.inference.rounding import SAFETY, PredictedAgain, first_of_each, predict_again
from loracurve.inference.unknowns import write_unknowns
from loracurve.model.curve_model import CurveModel
from loracurve.runs.run import Run, build_unknowns, open_run
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json
from loracurve.system.folders import locked
from loracurve.system.paths import exists, is_file
from loracurve.system.randomness import generator
from loracurve.tasks.classes import TaskIdentity, rows_in_class_order
from loracurve.tasks.dataset import Row, read_rows
from loracurve.tasks.encoding import Encoded

__all__ = [
    "Calibration",
    "calibrate_run",
    "calibration_for",
    "predict_file",
    "predict_rows",
    "prediction_records",
    "read_calibration",
    "say_what_is_missing",
]


logger = logging.getLogger("loracurve")

Measure = Literal["entropy", "mutual_information"]

FORMAT = 2
"""of calibration.json; without a format (before 1) there are no tolerances, before 2 no foreign rows"""


def _predict(run: Run, rows: Sequence[Row], name: str, labelled: bool, average: Average) -> tuple[Encoded, Predictive]:
    encoded = run.task.encode_rows(rows, name, labelled)
    return encoded, average.predict(run.model, encoded)


def _average(run: Run, evaluation: EvaluationConfig | None) -> Average:
    if run.config.task.scoring == "lm":
        raise UserError("this run is of language modelling, which has no classes to predict; use evaluate")
    return run.average(evaluation)


def _rows(run: Run, path: Path, labelled: bool) -> list[Row]:
    dataset = run.task.dataset
    rows = read_rows(path, dataset.kind, dataset.labels, require_labels=labelled)
    return rows_in_class_order(rows, dataset.labels, TaskIdentity.of(run.task), str(path))


@dataclass(frozen=True)
class Calibration:
    """What predict needs of calibration.json."""

    temperature: float
    quantile: float
    """of the prediction sets' scores"""
    measure: Measure
    selective: SelectiveThreshold
    tolerance: float = 0.0
    """by how much a tempered probability may differ between batches"""
    dtype: str | None = None
    """of the computation that the tolerances were measured in; None: there are none"""
    device: str | None = None
    """its kind"""
    points: tuple[tuple[float, ...], ...] = ()
    """place and weight of each point of the average: what the thresholds are of"""
    foreign: float | None = None
    """p-values of familiarity below this one are of foreign rows; None: none are"""
    foreign_tolerance: float = 0.0
    """by how much a distance may differ between batches"""


def read_calibration(run: Path) -> Calibration | None:
    """What `calibrate_run` wrote into a run directory; None where it has not. Raises UserError for something else."""
    path = run / "calibration.json"
    if not exists(path):
        return None
    values = read_json(path)
    try:
        version = values.get("format", 0)
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{path}: expected format {FORMAT} or earlier, found {version} of a newer loracurve; "
                "update loracurve or run loracurve calibrate again"
            )
        selective, conformal = SelectiveThreshold(**values["selective"]), values["conformal"]
        made: dict[str, Any] = {}
        if version != 0:
            places, weights = values["average"]["places"], values["average"]["weights"]
            made = {
                "tolerance": float(conformal["tolerance"]),
                "dtype": str(values["rounding"]["dtype"]),
                "device": str(values["rounding"]["device"]),
                "points": tuple((*map(float, p), float(w)) for p, w in zip(places, weights, strict=True)),
            }
        if (foreign := values.get("foreign")) is not None:
            made |= {"foreign": float(foreign["alpha"]), "foreign_tolerance": float(foreign["tolerance"])}
        found = Calibration(
            float(values["temperature"]), float(conformal["quantile"]), values["measure"], selective, **made
        )
        numbers = (0 if selective.threshold is None else selective.threshold, selective.tolerance)
        sound = version in range(FORMAT + 1) and found.measure in get_args(Measure)
        sound &= TEMPERATURES[0] <= found.temperature <= TEMPERATURES[1]
        sound &= 0 <= (found.foreign or 0) < 1 and 0 <= found.foreign_tolerance < math.inf
        sound &= 0 <= found.quantile <= 1 and 0 <= found.tolerance <= 1
        if not sound or not all(isinstance(number, float | int) for number in numbers) or numbers[1] < 0:
            raise ValueError("numbers that no calibration gives")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a calibration, found {error!r}; run loracurve calibrate again") from error
    return found


def calibration_for(run: Run, average: Average) -> Calibration | None:
    """The run's calibration, with a line in the log where its guarantees do not cover predictions by this average."""
    found = read_calibration(run.folder)
    if found is None:
        return None
    doubt = None
    if found.dtype is None:
        doubt = "it is of an older version, which did not allow for rounding"
    elif (here := _arithmetic(run.model)) != (found.dtype, found.device):
        doubt = f"it allows for rounding in {found.dtype} on {found.device}, this is {here[0]} on {here[1]}"
    elif not average.has(found.points):
        doubt = f"it is of another average of {len(found.points)} points, this one has {len(average.weights)}"
    if doubt is not None:
        logger.warning(
            "%s: the guarantees of abstain and set do not hold: %s; run loracurve calibrate again",
            run.folder / "calibration.json",
            doubt,
        )
    return found


def _arithmetic(model: CurveModel) -> tuple[str, str]:
    """Dtype and kind of device: what rounding depends on, and what changes when a run goes elsewhere."""
    return str(model.dtype).removeprefix("torch."), model.device.type


def predict_rows(run: Run, path: Path, evaluation: EvaluationConfig | None = None) -> Iterator[dict[str, Any]]:
    """One record for each row of a JSONL file: probabilities, uncertainty in nats, and whether to abstain.

    With RUN/calibration.json, `probs` are tempered, `abstain` and `set` are added; the uncertainties stay untempered.
    """
    rows = _rows(run, path, labelled=False)
    average = _average(run, evaluation)
    calibration = calibration_for(run, average)
    say_what_is_missing(run)
    encoded, predictive = _predict(run, rows, path.name, False, average)
    yield from prediction_records(rows, encoded, predictive, calibration, average)


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
    familiarity = _familiarity(predictive, average, 0.0 if calibration is None else calibration.foreign_tolerance)
    foreign = None
    parts = ["entropy", "expected_entropy", "mutual_information"]
    if average is not None and average.unknowns is not None and average.unknowns.gaussians is not None:
        parts += ["within_points", "between_points"]
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


def _familiarity(predictive: Predictive, average: Average | None, tolerance: float) -> Tensor | None:
    """[E] p-values of the rows' distances from the training data, which may be smaller by the tolerance."""
    if predictive.distance is None or average is None or average.unknowns is None:
        return None
    known = average.unknowns.familiarity
    return None if known is None else known.p_values(predictive.distance.cpu() - tolerance)


def calibrate_run(
    run: Run,
    risk: float,
    delta: float,
    alpha: float,
    measure: Measure,
    path: Path | None = None,
    foreign: float = 0.05,
) -> list[str]:
    """Write RUN/calibration.json from labelled rows; returns lines that say what was found.

    The temperature is fitted on one half of the rows (drawn by the seed), the prediction sets on the other, so that
    their coverage is exact; the threshold looks at uncertainties that no temperature changes and uses all rows. A
    sample of the rows is predicted again in other batches, and both guarantees allow for what that changes.

    Known inputs are taken for foreign with a probability of at most `foreign`, by their distance from the training
    data; the threshold is certified on the rows that are not. What a run lacks for that (it was made by an earlier
    version) is built first, from its training rows.
    """
    with locked(run.folder):
        return _calibrate(run, risk, delta, alpha, measure, path, foreign)


def _with_unknowns(run: Run, average: Average) -> tuple[Average, list[str]]:
    """The average with what tells unknown inputs, built where it is missing; lines that say what could not be."""
    if average.unknowns is not None:
        return average, []
    try:
        unknowns = build_unknowns(run.model, run.task, average, run.config.unknowns, run.folder)
    except UserError as error:
        return average, [f"no Gaussians and no familiarity: {error}"]
    return replace(average, unknowns=unknowns), []


def _calibrate(
    run: Run, risk: float, delta: float, alpha: float, measure: Measure, path: Path | None, foreign: float
) -> list[str]:
    seed = run.config.evaluation.seed
    average, missing = _with_unknowns(run, _average(run, None))
    rows = run.task.dataset.rows("validation") if path is None else _rows(run, path, labelled=True)
    encoded, together = _predict(run, rows, "calibration", True, average)
    labels = encoded.labels
    if bool((labels < 0).any()) or len(labels) < 20:
        raise UserError(f"calibration: expected at least 20 labelled rows, found {int((labels >= 0).sum())}")
    again = predict_again(run.model, encoded, together, average, seed)
    average = _known_by(run, average, together.distance)
    predictive = together.index(first_of_each(encoded))  # equal rows are tied to the last bit
    order = torch.randperm(len(labels), generator=generator(seed, "calibration"))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = fit_temperature(predictive.log_probs[first], labels[first])
    tempered = apply_temperature(predictive.log_probs, temperature)
    probs = tempered.exp()
    of_probs = min(again.tolerance(apply_temperature(again.predictive.log_probs, temperature).exp()), 1.0)
    of_measure = again.tolerance(getattr(again.predictive, measure))
    quantile = conformal_quantile(probs[second], labels[second], alpha)
    errors = possible_errors(probs, labels, of_probs)
    of_distance = 0.0 if again.predictive.distance is None else again.tolerance(again.predictive.distance)
    p = _familiarity(predictive, average, of_distance)
    passing = torch.ones(len(labels)).bool() if p is None else p >= foreign
    uncertainty = getattr(predictive, measure)
    selective = selective_threshold(uncertainty[passing], errors[passing], risk, delta, of_measure)
    source = "the validation split" if path is None else path.name
    nll = {
        name: [float(negative_log_likelihood(p[half], labels[half]).mean()) for p in (predictive.log_probs, tempered)]
        for name, half in (("fitted", first), ("held_out", second))
    }
    dtype, device = _arithmetic(run.model)
    points = average.points
    values = {
        "format": FORMAT,
        "rows": len(labels),
        "source": source,
        "temperature": temperature,
        "nll": nll,
        "measure": measure,
        "selective": asdict(selective),
        "conformal": {"alpha": alpha, "quantile": quantile, "tolerance": of_probs, "rows": len(second)},
        "rounding": {
            "dtype": dtype,
            "device": device,
            "rows": again.examples,
            "predictions": len(again.rows),
            "batches": again.batches,
            "safety": SAFETY,
        },
        "foreign": None if p is None else {"alpha": foreign, "tolerance": of_distance, "rows": len(labels)},
        "average": {"places": [point[:-1] for point in points], "weights": [point[-1] for point in points]},
    }
    write_json(run.folder / "calibration.json", values)
    sizes = prediction_sets(probs, quantile, of_probs).sum(1).double()
    return [
        f"{len(labels)} rows of {source}",
        *_temperature_lines(temperature, nll, len(first), len(second)),
        *([] if p is None else [_foreign_line(foreign, passing)]),
        _selective_line(selective, measure),
        f"prediction sets hold the label with probability {1 - alpha:.0%}: {sizes.mean():.2f} classes on average",
        _rounding_line(again, of_probs, of_measure, measure),
        *(
            ["the validation split also chose the trained state; give --input with unseen rows for exact guarantees"]
            if path is None
            else []
        ),
        *missing,
    ]


def _known_by(run: Run, average: Average, distance: Tensor | None) -> Average:
    """The average whose familiarity is judged against these rows' distances, also in the run's folder."""
    unknowns = average.unknowns
    if unknowns is None or unknowns.familiarity is None or distance is None:
        return average
    known = replace(unknowns.familiarity, known=distance.cpu().double().sort().values)
    unknowns = replace(unknowns, familiarity=known)
    write_unknowns(unknowns, average.points, run.folder)
    return replace(average, unknowns=unknowns)


def _foreign_line(foreign: float, passing: Tensor) -> str:
    found = 1 - passing.double().mean()
    return f"foreign where familiarity < {foreign:g}: at most so many known rows in the long run, {found:.1%} of these"


def _temperature_lines(temperature: float, nll: dict[str, list[float]], fitted: int, held_out: int) -> Iterator[str]:
    """NLL before and after, on both halves."""
    (before, after), (unseen_before, unseen_after) = nll["fitted"], nll["held_out"]
    yield (
        f"temperature {temperature:.3f}: NLL {before:.4f} -> {after:.4f} on the {fitted} rows it was fitted to, "
        f"{unseen_before:.4f} -> {unseen_after:.4f} on the {held_out} others"
    )
    if unseen_after > unseen_before:
        yield "the temperature makes probabilities worse on rows it has not seen; give more rows"


def _selective_line(selective: SelectiveThreshold, measure: str) -> str:
    if selective.threshold is None:
        return f"abstain always: no threshold on {measure} is certified ({selective.reason})"
    return (
        f"answer where {measure} < {selective.threshold:.4f}: {selective.coverage:.1%} of rows, error "
        f"{selective.selective_risk:.2%}; at most {selective.risk:.1%} with probability {1 - selective.delta:.0%}"
    )


def _rounding_line(again: PredictedAgain, of_probs: float, of_measure: float, measure: str) -> str:
    return (
        f"{again.examples} distinct rows predicted again in other batches: abstain and set allow for {SAFETY:g} times "
        f"the differences seen, {of_probs:.1e} in probability and {of_measure:.1e} in {measure.replace('_', ' ')}"
    )


def predict_file(run: str, rows: Path, points: int | None = None, base: str | None = None) -> str:
    """JSON lines with probabilities and uncertainty of each row of a JSONL file (`predict_rows`); `base`: where the
    base model is now, as `open_run` takes it."""
    opened = open_run(run, base=base)
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    return "".join(json.dumps(line) + "\n" for line in predict_rows(opened, rows, evaluation))
