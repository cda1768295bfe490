"""The run directory: configs, environment, anchors, curve, predictions and figures of one fit; everything resumable."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch

from loracurve.inference.config import EvaluationConfig
from loracurve.inference.model_average import Average, average_of
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.model.base_model import load_base, model_window
from loracurve.model.curve_model import CurveModel
from loracurve.model.fsdp import asked_to_shard, shard_base
from loracurve.runs.config import RunConfig, load_config
from loracurve.system.errors import UserError
from loracurve.tasks.task import Task, load_task, open_dataset

__all__ = ["Run", "best_point", "open_run"]


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
        return average_of(self.model, evaluation or self.config.evaluation, self.task)


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


def best_point(run: Run, points: int = 21) -> float:
    """The t of lowest validation NLL on a uniform grid of points."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    validation = run.task.encode("validation")
    nll = point_nll(predict_split(run.model, validation, t), validation.labels).mean(1)
    return float(t[int(nll.argmin())])
