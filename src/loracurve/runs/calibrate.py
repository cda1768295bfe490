"""Calibrating a run on labelled rows: temperature, prediction sets, the limits of abstaining and of what is foreign."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from loracurve.inference.calibration import (
    SelectiveThreshold,
    apply_temperature,
    conformal_quantile,
    fit_temperature,
    possible_errors,
    prediction_sets,
    selective_threshold,
)
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.model_average import Average
from loracurve.inference.rounding import SAFETY, PredictedAgain, first_of_each, predict_again
from loracurve.runs.calibration import FORMAT, Measure, arithmetic_of
from loracurve.runs.predict import average_of_classes, familiarity_of, rows_of
from loracurve.runs.run import Run, build_unknowns, keep_unknowns
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import locked
from loracurve.system.randomness import generator

__all__ = ["FEWEST_ROWS", "calibrate_run"]

FEWEST_ROWS = 20
"""labelled rows without which nothing is calibrated"""


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
    average, missing = _with_unknowns(run, average_of_classes(run))
    rows = run.task.dataset.rows("validation") if path is None else rows_of(run, path, labelled=True)
    encoded = run.task.encode_rows(rows, "calibration", True)
    together = average.predict(run.model, encoded)
    labels = encoded.labels
    if bool((labels < 0).any()) or len(labels) < FEWEST_ROWS:
        raise UserError(f"calibration: expected at least {FEWEST_ROWS} labelled rows, found {int((labels >= 0).sum())}")
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
    p = familiarity_of(predictive, average, of_distance)
    passing = torch.ones(len(labels)).bool() if p is None else p >= foreign
    uncertainty = getattr(predictive, measure)
    selective = selective_threshold(uncertainty[passing], errors[passing], risk, delta, of_measure)
    source = "the validation split" if path is None else path.name
    nll = {
        name: [float(negative_log_likelihood(p[half], labels[half]).mean()) for p in (predictive.log_probs, tempered)]
        for name, half in (("fitted", first), ("held_out", second))
    }
    dtype, device = arithmetic_of(run.model)
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
    keep_unknowns(unknowns, average, run.folder)
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
