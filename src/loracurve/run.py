"""The run directory: configs, environment, anchors, curve, predictions and figures of one fit; everything resumable."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import is_tensorboard_available, is_wandb_available

from loracurve.bases import load_base, model_window
from loracurve.config import CurveConfig, EvaluationConfig, RunConfig
from loracurve.config_files import load_config, save_config
from loracurve.corruption import unlabelled
from loracurve.distributed import is_main, main_holds, on_main
from loracurve.environment import environment
from loracurve.errors import UserError
from loracurve.evaluation import (
    Average,
    choose_average,
    labels_of,
    point_nll,
    predict_split,
)
from loracurve.locking import has_results, locked
from loracurve.lora_space import ControlPoints, load_adapter, stack_adapters
from loracurve.model import CurveModel, CurveSpec
from loracurve.perturbation import Perturbation
from loracurve.run_evaluation import evaluate_methods, evaluation_sets
from loracurve.sharding import asked_to_shard, shard_base
from loracurve.storage import export_adapter, write_json
from loracurve.tasks import Task, load_task, open_dataset
from loracurve.training import fit, fit_anchors
from loracurve.tunnel_inference import tunnel_average

__all__ = ["Run", "best_point", "environment", "fit_run", "new_folder", "open_run"]

logger = logging.getLogger("loracurve")


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
        if config.curve.anchors != CurveConfig.anchors and is_main():
            logger.warning("curve.anchors: a free curve has none; curve.kind anchored makes one through anchors")
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


def best_point(run: Run, points: int = 21) -> float:
    """The t of lowest validation NLL on a uniform grid of points."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    validation = run.task.encode("validation")
    nll = point_nll(predict_split(run.model, validation, t), labels_of(validation)).mean(1)
    return float(t[int(nll.argmin())])
