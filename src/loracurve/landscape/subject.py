"""What a scan looks at: a finished run, or PEFT adapters that somebody already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import accelerate
import peft

from loracurve.curve.files import load_adapter
from loracurve.curve.lora_space import ControlPoints
from loracurve.model.base_model import model_window, open_base
from loracurve.model.config import Dtype, ModelConfig
from loracurve.model.curve_model import CurveModel
from loracurve.model.fingerprint import check_adapters
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import Task, load_task, open_dataset

__all__ = ["Subject", "adapters_to_scan"]


@dataclass(frozen=True)
class Subject:
    """What is scanned: a model with a curve, the adapters it joins in their own gauges, a task."""

    model: CurveModel
    anchors: ControlPoints
    task: Task
    trained: bool
    """whether the model's curve was trained, or is only the way to carry the adapters"""
    record: dict[str, Any]


def adapters_to_scan(
    adapters: Sequence[str],
    task: str,
    base: str | None,
    scoring: Literal["letter", "label", "text", "head", "lm"] | None,
    dtype: Dtype,
) -> Subject:
    """Load PEFT adapters of one base and a data set; nothing is trained.

    `base` defaults to the model that the adapters name, `scoring` to head for classifiers, letter for multiple choice
    and label otherwise. Raises UserError for adapters that do not fit each other or the base.
    """
    if len(adapters) < 2:
        raise UserError(f"adapters: expected at least 2 folders, found {len(adapters)}; give --adapters A B")
    first, _ = load_adapter(adapters[0])
    name = base or first.base_model_name_or_path
    if not name:
        raise UserError(f"{adapters[0]} does not name its base model; give --base MODEL")
    dataset = open_dataset(task)
    if scoring is None:
        classifier = first.task_type == peft.TaskType.SEQ_CLS
        scoring = "head" if classifier else "letter" if dataset.kind == "multiple_choice" else "label"
    config = TaskConfig(data=task, scoring=scoring)
    options = ModelConfig(name, dtype=dtype)
    loaded, tokenizer = open_base(options, config)
    check_adapters(adapters, loaded, options, scoring == "head")
    model = CurveModel.with_adapters(loaded, list(adapters)).to(accelerate.PartialState().device)
    anchors = model.control_points()
    model.anchor()
    record = {"adapters": [str(a) for a in adapters], "base": name, "task": task, "scoring": scoring}
    return Subject(
        model,
        anchors,
        load_task(config, tokenizer, model_window(loaded)),
        False,
        record,
    )
