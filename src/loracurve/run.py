"""The run directory: configs, environment, anchors, curve, predictions and figures of one fit; everything resumable."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import is_tensorboard_available, is_wandb_available

from loracurve.bases import load_base, model_window
from loracurve.config import EvaluationConfig, RunConfig
from loracurve.config_files import load_config, save_config
from loracurve.corruption import unlabelled
from loracurve.curve import chord_length
from loracurve.distributed import main_holds, on_main
from loracurve.environment import environment
from loracurve.errors import UserError
from loracurve.evaluation import (
    Average,
    Method,
    choose_average,
    compare,
    labels_of,
    point_nll,
    predict_split,
    summarise,
)
from loracurve.gauge import align, delta_w_gram
from loracurve.locking import has_results, locked
from loracurve.lora_space import ControlPoints, load_adapter, stack_adapters
from loracurve.model import CurveModel, CurveSpec
from loracurve.perturbation import Perturbation
from loracurve.predictive import Predictive
from loracurve.programs import slot_times
from loracurve.report.figures import figure_of, save
from loracurve.report.prediction_plots import posterior_over_t
from loracurve.sharding import asked_to_shard, shard_base
from loracurve.splits import predict_splits
from loracurve.storage import atomic_write, export_adapter, write_json
from loracurve.tasks import Encoded, Task, load_task, open_dataset
from loracurve.training import fit, fit_anchors
from loracurve.tunnel_inference import tunnel_average

__all__ = ["Run", "best_point", "environment", "fit_run", "new_folder", "open_run", "write_predictions"]


@dataclass
class Run:
    """An opened run: where it lies, its config, its curve and its task."""

    folder: Path
    config: RunConfig
    model: CurveModel
    task: Task

    def average(self, evaluation: EvaluationConfig | None = None) -> Average:
        """The points and weights to predict with."""
        evaluation = evaluation or self.config.evaluation
        if evaluation.inference == "tunnel":
            return tunnel_average(self.model, evaluation, self.task)
        return choose_average(self.model, evaluation, self.task.encode("validation"))


def new_folder(folder: Path, resume: bool = False) -> Path:
    """Make a folder for results; raises UserError where one with contents exists, unless it is to be resumed."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder for results, found a file; choose another --out")
    if folder.is_dir() and has_results(folder) and not resume:
        raise UserError(f"{folder} exists already; choose another --out, or go on with it by --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another --out") from error
    return folder


def open_run(folder: str | Path, data: str | None = None) -> Run:
    """Open a finished run; `data` replaces its data set (same prompt and classes)."""
    folder = Path(folder)
    if not (folder / "curve" / "curve_config.json").is_file():
        raise UserError(
            f"{folder}: expected a run directory with a fitted curve, found none; make one with loracurve fit"
        )
    config = load_config(folder / "config.yaml")
    base, task = _base_and_task(config, data)
    model = CurveModel.from_pretrained(folder / "curve", base)
    _spread(model, config)
    return Run(folder, config, model.to(accelerate.PartialState().device), task)


def _spread(model: CurveModel, config: RunConfig) -> None:
    """Spread the base over the processes where that is asked for."""
    if config.model.shard or asked_to_shard():
        shard_base(model)


def _base_and_task(config: RunConfig, data: str | None = None) -> tuple[torch.nn.Module, Task]:
    from dataclasses import replace

    classifier = config.task.scoring == "head"
    task_config = config.task if data is None else replace(config.task, data=data)
    labels = len(open_dataset(config.task.data, config.task.seed).labels) if classifier else None
    # Weights that no checkpoint holds (a new pooler or head) come from the global generator: the same at each opening.
    torch.manual_seed(config.curve_training.seed)
    model = config.model
    base, tokenizer = load_base(model.name, classifier, model.dtype, labels, model.trust_remote_code, model.quantise)
    return base, load_task(task_config, tokenizer, model_window(base))


def fit_run(config: RunConfig, out: Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train anchors and curve, evaluate them beside their rivals, write the run directory; returns metrics.json.

    Raises:
        UserError: the folder is in use, holds something else, or the options do not suit data, model or each other.
    """
    _check_tracker(config.tracker)
    on_main(lambda: new_folder(out, resume))
    with main_holds(lambda: locked(out)):
        return _fit_run(config, out, progress)


def _fit_run(config: RunConfig, out: Path, progress: bool) -> dict[str, Any]:
    if (out / "config.yaml").exists() and load_config(out / "config.yaml") != config:
        raise UserError(
            f"{out}/config.yaml differs from this configuration; resume with the same, or choose another --out"
        )
    base, task = _base_and_task(config)
    # Tokenising everything first finds faults in the data before hours of training.
    sets = evaluation_sets(task, config.evaluation)
    task.encode("train")
    if config.curve_training.corruption.file is not None:
        unlabelled(task, config.curve_training.corruption.file)

    def begin() -> None:
        save_config(config, out / "config.yaml")
        write_json(out / "environment.json", environment())

    on_main(begin)
    classifier = config.task.scoring == "head"
    lora = config.lora.to_peft(config.model.name, classifier)
    timings: dict[str, float] = {}
    accelerator = _tracking(config, out)
    loop = {"progress": progress, "accelerator": accelerator}
    started = time.perf_counter()
    anchors: ControlPoints | None = None
    if config.curve.kind == "free":
        model = CurveModel(base, lora, config.curve.spec(0), seed=config.curve_training.seed)
        _spread(model, config)
    else:
        if config.adapters:
            loaded = [load_adapter(folder) for folder in config.adapters]
            model = CurveModel.from_adapters(base, config.adapters, alignment="none")
            anchors = stack_adapters([tensors for _, tensors in loaded])
            _spread(model, config)
        else:
            model = CurveModel(base, lora, CurveSpec.slots(config.curve.anchors))
            _spread(model, config)
            if config.curve_training.perturbation.kind == "flat_lora":
                # Says before anchors are trained that a quantised base cannot have it.
                Perturbation(config.curve_training.perturbation, model.layers, config.curve_training.steps, seed=0)
            everywhere = config.curve_training.bootstrap.kind == "everywhere"
            weights = config.curve_training.bootstrap.weights(config.curve_training.seed, ()) if everywhere else None
            result = fit_anchors(model, task, config.anchor_training, out / "anchors", weights, **loop)
            on_main(partial(write_json, out / "anchors" / "history.json", result.history))
            anchors = model.control_points()
            timings["anchors"] = result.seconds
        on_main(partial(_export, model, anchors, out / "anchors"))
        model.set_curve(CurveSpec.slots(len(next(iter(anchors.values())))), anchors)
        shape = config.curve
        model.anchor(
            shape.degree,
            shape.alignment,
            shape.inner,
            config.curve_training.seed,
            shape.pieces,
            shape.closed,
            shape.smooth,
        )
    result = fit(model, task, config.curve_training, out / "training", **loop)
    accelerator.end_training()
    timings["curve"] = result.seconds

    def save_curve() -> None:
        write_json(out / "training" / "history.json", result.history)
        model.save_pretrained(out / "curve")

    on_main(save_curve)
    evaluated = time.perf_counter()
    report = evaluate_methods(model, task, config.evaluation, sets, anchors, out)
    report["training"] = {
        "best_step": result.best_step,
        "validation_nll": result.validation_nll,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "processes": result.processes,
    } | result.settled
    report["seconds"] = timings | {
        "evaluation": time.perf_counter() - evaluated,
        "total": time.perf_counter() - started,
    }
    report["task"] = task.describe()
    on_main(partial(write_json, out / "metrics.json", report))
    return report


def _export(model: CurveModel, adapters: ControlPoints, folder: Path) -> None:
    """Write stacked adapters as PEFT folders 0, 1, ..."""
    for m in range(len(next(iter(adapters.values())))):
        export_adapter(model.config, {n: p[m] for n, p in adapters.items()}, folder / str(m))


def _check_tracker(tracker: str) -> None:
    """Raise UserError where the library of a tracker is not installed."""
    available = {"none": lambda: True, "tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if not available[tracker]():
        raise UserError(
            f"tracker: expected the package {tracker}, found none; pip install {tracker}, or leave tracker at none"
        )


def _tracking(config: RunConfig, out: Path) -> accelerate.Accelerator:
    """An accelerator that logs where `config.tracker` says."""
    if config.tracker == "none":
        return accelerate.Accelerator()
    accelerator = accelerate.Accelerator(log_with=config.tracker, project_dir=out)
    accelerator.init_trackers("loracurve")
    return accelerator


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


def best_point(run: Run, points: int = 21) -> float:
    """The t of lowest validation NLL on a uniform grid of points."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    validation = run.task.encode("validation")
    nll = point_nll(predict_split(run.model, validation, t), labels_of(validation)).mean(1)
    return float(t[int(nll.argmin())])
