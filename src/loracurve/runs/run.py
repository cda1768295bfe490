"""The run directory: configs, environment, anchors, curve, predictions and figures of one fit; everything resumable."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import accelerate
import torch

from loracurve.inference.config import EvaluationConfig
from loracurve.inference.model_average import Average, average_of
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.model.base_model import model_window, open_base
from loracurve.model.curve_model import CurveModel
from loracurve.model.fsdp import asked_to_shard, shard_base
from loracurve.runs.config import RunConfig, load_config
from loracurve.system.errors import UserError
from loracurve.tasks.task import Task, load_task

__all__ = ["Run", "base_and_task", "best_point", "open_run", "spread"]


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
    """Open a finished run: its `config`, its `task`, its `model` (a `CurveModel`), and `average()`, the points and
    weights to predict with.

    Args:
        folder: the run directory.
        data: another data set in place of the run's (same prompt and classes).

    Raises:
        UserError: no run with a fitted curve there, a base model or data that cannot be opened.
    """
    folder = Path(folder)
    if not (folder / "curve" / "curve_config.json").is_file():
        raise UserError(
            f"{folder}: expected a run directory with a fitted curve, found none; make one with loracurve fit"
        )
    config = load_config(folder / "config.yaml")
    base, task = base_and_task(config, data)
    model = CurveModel.from_pretrained(folder / "curve", base)
    spread(model, config)
    return Run(folder, config, model.to(accelerate.PartialState().device), task)


def spread(model: CurveModel, config: RunConfig) -> None:
    """Spread the base over the processes where that is asked for."""
    if config.model.shard or asked_to_shard():
        shard_base(model)


def base_and_task(config: RunConfig, data: str | None = None) -> tuple[torch.nn.Module, Task]:
    """The base model of a run and its task; `data` replaces the data set (same prompt and classes)."""
    base, tokenizer = open_base(config.model, config.task, config.curve_training.seed)
    task = config.task if data is None else replace(config.task, data=data)
    return base, load_task(task, tokenizer, model_window(base))


def best_point(run: Run, points: int = 21) -> float:
    """The t of lowest validation NLL on a uniform grid of points."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    validation = run.task.encode("validation")
    nll = point_nll(predict_split(run.model, validation, t), validation.labels).mean(1)
    return float(t[int(nll.argmin())])
