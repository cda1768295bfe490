"""How a run is judged: its curve beside its anchors and lines between them, or beside its own best point, and the base
model, on every set; predictions are kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from loracurve.curve.anchored import slot_times
from loracurve.curve.bezier import chord_length
from loracurve.curve.gauge import align, delta_w_gram
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.inference import intervals, metrics
from loracurve.inference.calibration import fit_temperature, tempered
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.model_average import Average, choose_average, equal
from loracurve.inference.prediction import point_nll, predict_base, predict_splits
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.report.adapters import chosen_adapter, chosen_name, mean_name
from loracurve.report.figures import figure_of, save
from loracurve.report.prediction_plots import posterior_over_t
from loracurve.runs.predict import say_what_is_missing
from loracurve.runs.run import Run, check_run, open_run
from loracurve.system.distributed import main_holds, on_main
from loracurve.system.environment import environment
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import locked, results_folder
from loracurve.system.paths import is_file, writable
from loracurve.system.randomness import stream_seed
from loracurve.system.tables import write_table
from loracurve.system.yaml_files import read_yaml
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task, open_dataset

__all__ = [
    "MethodPredictions",
    "awaits_evaluation",
    "compare",
    "evaluate_methods",
    "evaluate_run",
    "evaluate_saved",
    "evaluation_sets",
    "summarise",
    "write_run_predictions",
]


logger = logging.getLogger("loracurve")


@dataclass
class MethodPredictions:
    """One way to predict: its predictions by set, and the forward passes each prediction takes."""

    name: str
    passes: int
    sets: dict[str, Predictive] = field(default_factory=dict)
    t: list[float] = field(default_factory=list)
    """curve points, where there are any"""
    validation: tuple[Predictive, Tensor] | None = None
    """predictions of the validation rows and their labels, on which its temperature is fitted"""


def summarise(methods: list[MethodPredictions], labels: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures of every method on every set, for metrics.json.

    Args:
        labels: [E] labels of the labelled sets. The others are reported by their uncertainties, and by how well these
            tell them from the test set.
    """
    report: dict[str, Any] = {}
    for method in methods:
        entry: dict[str, Any] = {"passes": method.passes, "t": method.t, "sets": {}, "detection": {}}
        for name, predictive in method.sets.items():
            if name in labels:
                entry["sets"][name] = metrics.classification_summary(predictive, labels[name])
            else:
                entry["sets"][name] = {
                    key: getattr(predictive, key).mean().item()
                    for key in (*_UNCERTAINTIES, "pairwise_jsd", "disagreement")
                }
            if name not in labels and "test" in method.sets:
                entry["detection"][name] = metrics.detection_summary(method.sets["test"], predictive)
        if method.validation is not None:
            entry["tempered"] = _tempered(method, *method.validation, labels)
        if "test" in method.sets and method.t:
            entry["point_nll"] = point_nll(method.sets["test"], labels["test"]).mean(1).tolist()
        report[method.name] = entry
    return report


def _tempered(
    method: MethodPredictions, validation: Predictive, known: Tensor, labels: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The temperature of the averaged prediction, fitted on validation rows, and what it makes of the labelled sets."""
    temperature = fit_temperature(validation.log_probs, known)
    labelled = known >= 0
    nll = float(negative_log_likelihood(validation.log_probs[labelled], known[labelled]).mean())
    found: dict[str, Any] = {"temperature": temperature, "rows": int(labelled.sum()), "validation_nll": nll, "sets": {}}
    for name, predictive in method.sets.items():
        if name in labels:
            summary = metrics.classification_summary(tempered(predictive, temperature), labels[name])
            found["sets"][name] = {key: summary[key] for key in ("nll", "brier", "ece")}
    return found


def compare(
    first: MethodPredictions,
    second: MethodPredictions | Sequence[MethodPredictions],
    labels: Tensor,
    seed: int,
    split: str = "test",
) -> dict[str, Any]:
    """Paired differences first - second on a labelled split: NLL, accuracy, Brier with bootstrap intervals.

    Args:
        second: several single adapters are compared with in the mean of their figures, which is what to expect of one.
    """
    others = [second] if isinstance(second, MethodPredictions) else list(second)
    name = others[0].name if isinstance(second, MethodPredictions) else mean_name(len(others))
    mine, theirs = _each_row(first, labels, split), [_each_row(other, labels, split) for other in others]
    out: dict[str, Any] = {"first": first.name, "second": name, "split": split}
    for measure, x in mine.items():
        if all(measure in values for values in theirs):
            y = torch.stack([values[measure].double() for values in theirs]).mean(0)
            found = intervals.paired_bootstrap(x, y, stream_seed(seed, "bootstrap", first.name, name, measure) % 2**31)
            out[measure] = {**found._asdict(), "distinguishable": found.distinguishable}
    return out


def _each_row(method: MethodPredictions, labels: Tensor, split: str) -> dict[str, Tensor]:
    """[E] figures by measure."""
    predicted = method.sets[split]
    values = {"nll": predicted.negative_log_likelihood(labels), "acc": predicted.correct(labels)}
    if predicted.point_log_probs is not None:
        values["brier"] = metrics.brier_per_example(predicted.probs, labels)
    return values


def evaluation_sets(task: Task, config: EvaluationConfig) -> dict[str, Encoded]:
    """The tokenised sets: test, further splits of the data set, and the OOD sets in the same prompt."""
    sets = {name: task.encode(name) for name in task.dataset.splits if name not in ("train", "validation")}
    for data in config.ood:
        dataset = open_dataset(data, whole=True)
        if f"ood:{dataset.name}" in sets:
            raise UserError(f"evaluation.ood: expected data of different names, found two called {dataset.name!r}")
        sets[f"ood:{dataset.name}"] = task.encode_foreign(dataset.rows("test"), f"ood:{dataset.name}")
    if "test" not in sets:
        raise UserError(f"{task.dataset.name}: expected a test split, found {', '.join(task.dataset.splits)}")
    return sets


def evaluate_methods(
    model: CurveModel,
    task: Task,
    config: EvaluationConfig,
    sets: dict[str, Encoded],
    anchors: ControlPoints | None,
    out: Path,
    asked: Average,
) -> dict[str, Any]:
    """Predict every set by every method and write predictions.parquet; the model keeps its curve.

    The methods: the base model in the same prompt, where it is untouched (no classification head, no weights that
    adapters brought); of an anchored curve its anchors, their ensemble and the lines between them; of a free curve its
    best point, chosen on validation rows; the curve, last.

    Args:
        asked: the average that `config` asks for (`average_of`), with its unknowns; the others go without.
    """
    validation = task.encode("validation")
    average = asked if config.inference == "curve" else choose_average(model, config, validation)
    if config.weights == "likelihood":
        columns = {"t": average.t, "posterior": average.weights, "prior": average.record["prior"]}
        frame, temperature = pd.DataFrame(columns), average.record["temperature"]
        figure = partial(figure_of, posterior_over_t, frame, temperature=temperature)
        on_main(lambda: save(figure(), out / "figures", "posterior_over_t"))
    held_out = None if validation.scoring == "lm" else validation  # summaries cannot be tempered
    labels = {
        name: e.labels for name, e in sets.items() if e.scoring != "lm" and all(x.label is not None for x in e.examples)
    }
    curve = _along("curve", model, average, sets, held_out)
    report: dict[str, Any] = {"average": average.record}
    methods = [curve]
    if config.inference == "tunnel":
        report["tunnel"] = asked.record
        methods = [_along("tunnel", model, asked, sets, held_out), curve]
    spec, points = model.spec, model.control_points()
    singles: list[MethodPredictions] = []
    if anchors is not None:
        count = len(next(iter(anchors.values())))
        slots = CurveSpec.slots(count)
        model.set_curve(slots, anchors)
        ensemble = _along("ensemble", model, equal(slot_times(count)), sets, held_out)
        ensemble.t = []
        if sets["test"].scoring == "lm":  # summaries cannot be taken apart
            singles = [_along(f"adapter {m}", model, equal(slot_times(count)[[m]]), sets) for m in range(count)]
            for single in singles:
                single.t = []
        else:
            singles = [_single(ensemble, m, f"adapter {m}") for m in range(count)]
        methods = [*singles, ensemble, *methods[:-1]]
        for name, control in (("straight line", anchors), ("aligned line", align(anchors, "balanced+procrustes"))):
            model.set_curve(slots, control)
            methods.append(_line(name, model, average.t, sets["test"], ensemble))
        methods.append(curve)
        model.set_curve(spec, points)
    elif (best := _best_point(curve)) is not None:
        methods.insert(0, best)
    if not (model.is_classifier or model.base_weights):
        methods.insert(0, _base(model, sets, curve, held_out))
    lm = sets["test"].scoring == "lm"
    if lm:
        labels = {name: p.labels for name, p in curve.sets.items() if p.labels is not None}
    report["methods"] = summarise(methods, labels)
    names = {single.name for single in singles}
    against = [m for m in methods if m is not curve and m.name not in names]
    first = [compare(curve, singles, labels["test"], config.seed)] if singles else []
    if (chosen := chosen_adapter(report["methods"])) is not None:
        best = next(single for single in singles if single.name == chosen)
        first.append(compare(curve, replace(best, name=chosen_name(chosen)), labels["test"], config.seed))
    report["comparisons"] = first + [compare(curve, other, labels["test"], config.seed) for other in against]
    if anchors is not None:
        scalings = model.scalings
        report["anchor_distance_delta_w"] = float(chord_length(delta_w_gram(anchors, scalings)))
    if not lm:
        on_main(partial(write_run_predictions, out / "predictions.parquet", methods, sets))
    return report


_HELD_OUT = "validation rows"  # no name of a split has a blank


def _along(
    name: str, model: CurveModel, average: Average, sets: dict[str, Encoded], held_out: Encoded | None = None
) -> MethodPredictions:
    predicted = average.predict_all(model, sets if held_out is None else sets | {_HELD_OUT: held_out})
    validation = None if held_out is None else (predicted.pop(_HELD_OUT), held_out.labels)
    t = average.t.tolist() if average.coefficients is None else []
    return MethodPredictions(name, len(average.weights), predicted, t, validation)


def _line(name: str, model: CurveModel, t: Tensor, test: Encoded, anchors: MethodPredictions) -> MethodPredictions:
    """The test set at points t [n] of equal weight on a line through anchors, whose own predictions are there already:
    aligning moves an adapter's factors, not what it predicts."""
    own, nodes = anchors.sets["test"].point_log_probs, slot_times(anchors.passes)
    same = (t[:, None] - nodes).abs() < 1e-12
    between = ~same.any(1)
    if own is None or not between.any():  # summaries cannot be taken apart
        return _along(name, model, equal(t), {"test": test})
    found = predict_splits(model, {"test": test}, t[between])["test"].point_log_probs
    assert found is not None
    log_probs = own[same.long().argmax(1)]
    log_probs[between] = found
    return MethodPredictions(name, len(t), {"test": Predictive.from_log_probs(log_probs)}, t.tolist())


def _base(
    model: CurveModel, sets: dict[str, Encoded], curve: MethodPredictions, held_out: Encoded | None
) -> MethodPredictions:
    """The base model without adapters; where the curve's familiarity looked at its states, it was run already."""

    def predicted(beside: Predictive, encoded: Encoded) -> Predictive:
        found = beside.base_log_probs
        return predict_base(model, encoded) if found is None else Predictive.from_log_probs(found)

    validation = None
    if held_out is not None:
        assert curve.validation is not None
        validation = predicted(curve.validation[0], held_out), held_out.labels
    found = {name: predicted(curve.sets[name], encoded) for name, encoded in sets.items()}
    return MethodPredictions("base model", 1, found, validation=validation)


def _best_point(curve: MethodPredictions) -> MethodPredictions | None:
    """The curve's point with the lowest NLL on validation rows, as it predicts in the curve's average: with its
    Gaussian, where it has one. None where there is no choice, or no validation row to choose by."""
    if curve.validation is None or len(curve.t) < 2:
        return None
    predictive, labels = curve.validation
    known = labels >= 0
    if predictive.point_log_probs is None or not known.any():
        return None
    nll = negative_log_likelihood(predictive.point_log_probs[:, known].double(), labels[known]).mean(1)
    best = int(nll.argmin())
    return replace(_single(curve, best, "best point"), t=[curve.t[best]])


def _single(average: MethodPredictions, m: int, named: str) -> MethodPredictions:
    """One member of an ensemble, or one point of a curve, as a method of its own."""
    sets = {}
    for name, p in average.sets.items():
        if p.point_log_probs is not None:
            sets[name] = Predictive.from_log_probs(p.point_log_probs[m : m + 1])
    method = MethodPredictions(named, 1, sets)
    if average.validation is not None:
        predictive, labels = average.validation
        assert predictive.point_log_probs is not None
        method.validation = Predictive.from_log_probs(predictive.point_log_probs[m : m + 1]), labels
    return method


_UNCERTAINTIES = ("entropy", "expected_entropy", "mutual_information", "within_points", "between_points")


def write_run_predictions(path: Path, methods: list[MethodPredictions], sets: dict[str, Encoded]) -> None:
    """Write a run's predictions.parquet: one row for each example, set and method.

    Columns id, set, method, label (null without one), probs (of the average), point_probs (one list for each point, an
    average over its Gaussian where it has one), weights (of the points), entropy, expected_entropy, mutual_information
    and its parts within_points and between_points (nats), distance (from the training data, null where it was not
    measured). A suite's cells keep another form under the same file name (`bench.store.write_cell_predictions`).
    """
    tables = []
    for method in methods:
        for name, predictive in method.sets.items():
            examples = sets[name].examples
            n, count, _ = predictive.point_probs.shape
            classes = [max(e.n_choices, 1) for e in examples]
            distance = predictive.distance
            columns: dict[str, Any] = {
                "id": [e.id for e in examples],
                "set": [name] * count,
                "method": [method.name] * count,
                "label": pa.array([e.label for e in examples], pa.int32()),
                "probs": [p[:c] for p, c in zip(predictive.probs.tolist(), classes, strict=True)],
                "point_probs": [
                    [q[:c] for q in p]
                    for p, c in zip(predictive.point_probs.transpose(0, 1).tolist(), classes, strict=True)
                ],
                "weights": [predictive.weights.tolist()] * count,
                **{k: getattr(predictive, k).tolist() for k in _UNCERTAINTIES},
                "distance": pa.array([None] * count if distance is None else distance.tolist(), pa.float64()),
            }
            tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    write_table(path, table)


def awaits_evaluation(folder: Path) -> bool:
    """Whether a run was saved from Python and not evaluated yet; one that `fit` left unfinished is another matter."""
    if is_file(folder / "metrics.json") or not is_file(folder / "curve" / "curve_config.json"):
        return False
    values = read_yaml(folder / "config.yaml") if is_file(folder / "config.yaml") else None
    return isinstance(values, Mapping) and "curve_training" not in values


def evaluate_saved(folder: Path, base: str | None = None) -> None:
    """Judge a run that `awaits_evaluation`, as `fit` judges its own: report and share show what is found. Other folders
    are left alone.

    Args:
        folder: run directory; metrics.json and predictions.parquet are written into it.
        base: where the base model is now; None: where it was.

    Raises:
        UserError: base or rows that are not there, no split test, another process in the folder.
    """
    if not awaits_evaluation(folder):
        return
    with main_holds(lambda: locked(folder)):
        opened = open_run(folder, base=base)
        logger.warning("%s: not evaluated yet: predicting its test and validation rows", folder)
        task, evaluation = opened.task, opened.config.evaluation
        if task.config.scoring != "lm":
            say_what_is_missing(opened)
        sets = evaluation_sets(task, evaluation)
        report = evaluate_methods(opened.model, task, evaluation, sets, None, folder, opened.average())
        report["task"] = task.describe()
        on_main(partial(write_json, folder / "metrics.json", report))


def evaluate_run(
    run: str, task: str | None, changes: Mapping[str, Any], split: str, out: str | None, base: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Average the curve of a run on a labelled split, and write metrics and predictions.

    Args:
        run: run directory.
        task: another data set with classes of the run, in any order, put into the same prompt; None: the run's own.
        changes: options of the run's evaluation that are changed.
        split: which split.
        out: new folder; None: RUN/evaluations and a name made from the options.
        base: where the base model is now; None: where it was.

    Returns:
        What metrics.json holds, and the folder.
    """
    check_run(Path(run))
    place = Path(out) if out else Path(run) / "evaluations"
    # Before the model is opened; what the folder in RUN/evaluations is called is known after it.
    with main_holds(lambda: results_folder(place) if out else writable(place)):
        opened = open_run(run, task, base)
        evaluation = replace(opened.config.evaluation, **changes)
        encoded = opened.task.encode(split)
        if out:
            return _evaluate(opened, evaluation, split, encoded, place), place
        name = f"{opened.task.dataset.name}-{split}-{evaluation.points}-{evaluation.weights}"
        name = name.replace("/", "_").replace(" ", "_") + "-tunnel" * (evaluation.inference == "tunnel")
        with main_holds(lambda: results_folder(place / name)):
            return _evaluate(opened, evaluation, split, encoded, place / name), place / name


def _evaluate(opened: Run, evaluation: EvaluationConfig, split: str, encoded: Encoded, folder: Path) -> dict[str, Any]:
    average = opened.average(evaluation)
    predicted = average.predict(opened.model, encoded)
    method = MethodPredictions(evaluation.inference, len(average.t), {split: predicted})
    known = method.sets[split].labels
    labels = {split: encoded.labels if known is None else known}
    report = {"average": average.record, "methods": summarise([method], labels)}

    def write() -> None:
        write_json(folder / "environment.json", environment())
        if known is None:
            write_run_predictions(folder / "predictions.parquet", [method], {split: encoded})
        write_json(folder / "metrics.json", report)  # last: it says that the rest is there

    on_main(write)
    return report
