"""How a run is judged: its curve beside its anchors and lines between them, on every set; predictions are kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from loracurve.config import EvaluationConfig
from loracurve.curve import chord_length
from loracurve.distributed import on_main
from loracurve.errors import UserError
from loracurve.evaluation import Method, choose_average, compare, labels_of, summarise
from loracurve.gauge import align, delta_w_gram
from loracurve.lora_space import ControlPoints
from loracurve.model import CurveModel, CurveSpec
from loracurve.predictive import Predictive
from loracurve.programs import slot_times
from loracurve.report.figures import figure_of, save
from loracurve.report.prediction_plots import posterior_over_t
from loracurve.splits import predict_splits
from loracurve.storage import atomic_write
from loracurve.tasks import Encoded, Task, open_dataset
from loracurve.tunnel_inference import tunnel_average

__all__ = ["evaluate_methods", "evaluation_sets", "write_predictions"]


def evaluation_sets(task: Task, config: EvaluationConfig) -> dict[str, Encoded]:
    """The tokenised sets: test, further splits of the data set, and the OOD sets in the same prompt."""
    sets = {name: task.encode(name) for name in task.dataset.splits if name not in ("train", "validation")}
    for data in config.ood:
        dataset = open_dataset(data)
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
) -> dict[str, Any]:
    """Predict every set by every method and write predictions.parquet; the model keeps its curve."""
    validation = task.encode("validation")
    average = choose_average(model, config, validation)
    if config.weights == "likelihood":
        columns = {"t": average.t, "posterior": average.weights, "prior": average.record["prior"]}
        frame, temperature = pd.DataFrame(columns), average.record["temperature"]
        figure = partial(figure_of, posterior_over_t, frame, temperature=temperature)
        on_main(lambda: save(figure(), out / "figures", "posterior_over_t"))
    held_out = None if validation.scoring == "lm" else validation  # summaries cannot be tempered
    labels = {
        name: labels_of(e)
        for name, e in sets.items()
        if e.scoring != "lm" and all(x.label is not None for x in e.examples)
    }
    curve = _along("curve", model, average.t, average.weights, sets, held_out)
    report: dict[str, Any] = {"average": average.record}
    methods = [curve]
    if config.inference == "tunnel":
        samples = tunnel_average(model, config, task)
        report["tunnel"] = samples.record
        methods = [_along("tunnel", model, samples.where, samples.weights, sets, held_out), curve]
    spec, points = model.spec, model.control_points()
    if anchors is not None:
        count = len(next(iter(anchors.values())))
        slots = CurveSpec.slots(count)
        model.set_curve(slots, anchors)
        ensemble = _along("ensemble", model, slot_times(count), None, sets, held_out)
        ensemble.t = []
        if sets["test"].scoring == "lm":  # summaries cannot be taken apart
            singles = [_along(f"adapter {m}", model, slot_times(count)[[m]], None, sets) for m in range(count)]
            for single in singles:
                single.t = []
        else:
            singles = [_single(ensemble, m) for m in range(count)]
        methods = [*singles, ensemble, *methods[:-1]]
        for name, control in (("straight line", anchors), ("aligned line", align(anchors, "balanced+procrustes"))):
            model.set_curve(slots, control)
            methods.append(_along(name, model, average.t, None, {"test": sets["test"]}, held_out))
        methods.append(curve)
        model.set_curve(spec, points)
    lm = sets["test"].scoring == "lm"
    if lm:
        labels = {name: p.labels for name, p in curve.sets.items() if p.labels is not None}
    report["methods"] = summarise(methods, labels)
    report["comparisons"] = [
        compare(curve, method, labels["test"], config.seed) for method in methods if method is not curve
    ]
    if anchors is not None:
        scalings = {f"base_model.model.{n}.lora_A.weight": getattr(x, "scaling", 1.0) for n, x in model.layers.items()}
        report["anchor_distance_delta_w"] = float(chord_length(delta_w_gram(anchors, scalings)))
    if not lm:
        on_main(partial(write_predictions, out / "predictions.parquet", methods, sets))
    return report


_HELD_OUT = "validation rows"  # no name of a split has a blank


def _along(
    name: str,
    model: CurveModel,
    t: torch.Tensor,
    weights: torch.Tensor | None,
    sets: dict[str, Encoded],
    held_out: Encoded | None = None,
) -> Method:
    predicted = predict_splits(model, sets if held_out is None else sets | {_HELD_OUT: held_out}, t, weights)
    validation = None if held_out is None else (predicted.pop(_HELD_OUT), labels_of(held_out))
    return Method(name, len(t), predicted, t.tolist() if t.dim() == 1 else [], validation)


def _single(ensemble: Method, m: int) -> Method:
    """One member of an ensemble as a method of its own."""
    sets = {}
    for name, p in ensemble.sets.items():
        if p.point_log_probs is not None:
            sets[name] = Predictive.from_log_probs(p.point_log_probs[m : m + 1])
    method = Method(f"adapter {m}", 1, sets)
    if ensemble.validation is not None:
        predictive, labels = ensemble.validation
        assert predictive.point_log_probs is not None
        method.validation = Predictive.from_log_probs(predictive.point_log_probs[m : m + 1]), labels
    return method


def write_predictions(path: Path, methods: list[Method], sets: dict[str, Encoded]) -> None:
    """Write one row for each example, set and method as Parquet (columns as documented in the README)."""
    tables = []
    for method in methods:
        for name, predictive in method.sets.items():
            examples = sets[name].examples
            n, count, _ = predictive.point_probs.shape
            classes = [max(e.n_choices, 1) for e in examples]
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
                **{k: getattr(predictive, k).tolist() for k in ("entropy", "expected_entropy", "mutual_information")},
            }
            tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    atomic_write(path, lambda p: pq.write_table(table, p, compression="zstd"))
