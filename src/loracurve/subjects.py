"""What a scan looks at: a finished run, or PEFT adapters that somebody already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import accelerate
import peft
import torch

from loracurve.bases import Dtype, load_base, model_window
from loracurve.errors import UserError
from loracurve.lora_space import ControlPoints, load_adapter, stack_adapters
from loracurve.model import CurveModel
from loracurve.paths import joints
from loracurve.tasks import Task, TaskConfig, load_task, open_dataset

__all__ = ["Subject", "adapters_to_scan", "run_to_scan"]


@dataclass(frozen=True)
class Subject:
    """What is scanned: a model with a curve, the adapters it joins in their own gauges, a task."""

    model: CurveModel
    anchors: ControlPoints
    task: Task
    trained: bool
    """whether the model's curve was trained, or is only the way to carry the adapters"""
    record: dict[str, Any]


def run_to_scan(folder: str | Path, dtype: Dtype) -> Subject:
    """Open a finished run; a free curve lends its joints as anchors.

    Raises:
        UserError: no fitted curve there.
    """
    from loracurve.config_files import load_config
    from loracurve.run import open_run

    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: expected a run directory, found no config.yaml in it; make one with loracurve fit")
    known = load_config(folder / "config.yaml")
    run = open_run(folder)
    if dtype != "auto" and dtype != known.model.dtype:
        run.model.model.to(getattr(torch, dtype))
        run.model.set_curve(run.model.spec, run.model.control_points())  # in the dtype that goes with the base's
    folders = sorted((p for p in (folder / "anchors").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    spec = run.model.spec
    from_anchors = len(folders) == spec.segments + 1  # fewer where several pieces lie between two of them
    if from_anchors:
        anchors = stack_adapters([load_adapter(p)[1] for p in folders])
    else:
        anchors = joints(run.model.control_points(), spec.degree)
    record = {
        "curve": asdict(spec),
        "anchors_from": "anchors" if from_anchors else "joints of the curve",
        "base": known.model.name,
        "task": known.task.data,
        "scoring": known.task.scoring,
    }
    return Subject(run.model, anchors, run.task, True, record)


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
    classifier = first.task_type == peft.TaskType.SEQ_CLS
    if scoring is None:
        scoring = "head" if classifier else "letter" if dataset.kind == "multiple_choice" else "label"
    labels = len(dataset.labels) if classifier else None
    loaded, tokenizer = load_base(name, classifier, dtype, labels)
    model = CurveModel.from_adapters(loaded, list(adapters)).to(accelerate.PartialState().device)
    anchors = stack_adapters([load_adapter(a)[1] for a in adapters])
    record = {"adapters": [str(a) for a in adapters], "base": name, "task": task, "scoring": scoring}
    return Subject(
        model,
        anchors,
        load_task(TaskConfig(data=task, scoring=scoring), tokenizer, model_window(loaded)),
        False,
        record,
    )
