"""What the cells of one task and seed share: base model, tokenised sets, and anchors, trained once and stored."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
from torch import Tensor

from loracurve.bench.config import SuiteConfig, SuiteTask, slug
from loracurve.bench.provenance import fingerprint, made_with, options_of
from loracurve.bench.tiny_model import TINY, tiny_model
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.model.base_model import model_window, open_base
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError, is_passing
from loracurve.system.files import read_json, write_json
from loracurve.system.paths import entries, is_file, is_folder
from loracurve.system.tensors import read_tensors, write_tensors
from loracurve.tasks.dataset import Dataset, Row, subset
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.hub_datasets import HUB
from loracurve.tasks.ood import HELD_OUT
from loracurve.tasks.task import Task, load_task, open_dataset
from loracurve.training.fit import fit_anchors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Shared", "anchors_folder", "open_sets", "open_shared", "remove_work", "train_anchors"]


@dataclass
class Shared:
    """Model, task and sets of one task and seed."""

    model: CurveModel
    task: Task
    sets: dict[str, Encoded]
    """validation, test, train (some rows), shift:NAME, ood:NAME"""
    labels: dict[str, Tensor]
    """[E] labels of the sets that have any"""


def open_shared(suite: SuiteConfig, name: str, seed: int) -> Shared:
    """Load the base model and tokenise the sets of a task; the same whatever was opened before."""
    options: SuiteTask = suite.tasks[name]
    if suite.model.name == TINY:
        torch.manual_seed(seed)
        base, tokenizer = tiny_model(suite.model.dtype)
    else:
        base, tokenizer = open_base(suite.model, options.to_task(_place(suite, options.data or name)), seed)
    task, sets = open_sets(suite, name, tokenizer, model_window(base))
    lora = suite.lora.to_peft(suite.model.name, options.scoring == "head")
    model_with_curve = CurveModel(base, lora, CurveSpec.slots(suite.anchors)).to(accelerate.PartialState().device)
    known = {s: e.labels for s, e in sets.items() if not s.startswith("ood:")}
    missing = next((s for s, y in known.items() if (y < 0).any()), None)
    if missing:
        raise UserError(f"{name}, {missing}: expected a label on every row, found some without")
    return Shared(model_with_curve, task, sets, known)


def open_sets(
    suite: SuiteConfig, name: str, tokenizer: PreTrainedTokenizerBase, window: int | None
) -> tuple[Task, dict[str, Encoded]]:
    """A task for a tokenizer, and the sets that its methods predict (see `Shared`)."""
    options: SuiteTask = suite.tasks[name]
    task = load_task(options.to_task(_place(suite, options.data or name)), tokenizer, window)
    sets = {"validation": task.encode("validation"), "test": task.encode("test")}
    if suite.train_rows:
        sets["train"] = task.encode_rows(subset(task.dataset.rows("train"), suite.train_rows), "train rows")
    for kind, names in (("shift", options.shift), ("ood", options.ood)):
        for other in names:
            if kind == "ood" and other == HELD_OUT:
                every = task.dataset.rows(HELD_OUT)
            else:
                every = _rows_of(suite, other, task.dataset if kind == "shift" else None)
            rows = subset(every, suite.ood_rows)
            short = f"{kind}:{other.rstrip('*_')}"
            sets[short] = task.encode_rows(rows, short) if kind == "shift" else task.encode_foreign(rows, short)
    return task, sets


def _place(suite: SuiteConfig, data: str) -> str:
    """A data set's folder, in the suite's folder if it is there."""
    if suite.data_folder and is_folder(Path(suite.data_folder) / data):
        return str(Path(suite.data_folder) / data)
    return data


def _rows_of(suite: SuiteConfig, entry: str, like: Dataset | None) -> list[Row]:
    """Rows of a further set: NAME, NAME:SPLIT, or a pattern that joins several; `like` must have the same classes."""
    name, _, split = entry.partition(":")
    names = [name]
    if "*" in name:
        there = [p.name for p in entries(suite.data_folder)] if suite.data_folder else [*HUB]
        names = sorted(n for n in there if fnmatch(n, name))
        if not names:
            raise UserError(f"{entry}: expected data sets of such names, found none; give --data_folder")
    rows: list[Row] = []
    for one in names:
        dataset = open_dataset(_place(suite, one))
        if like is not None and (dataset.kind, dataset.kind == "classification" and dataset.labels) != (
            like.kind,
            like.kind == "classification" and like.labels,
        ):
            raise UserError(
                f"shift: expected the classes of {like.name}, {list(like.labels)}, found {list(dataset.labels)} in "
                f"{one}; list it under ood"
            )
        rows += dataset.rows(split or "test")
    return rows


def anchors_folder(out: Path, name: str, seed: int) -> Path:
    return out / "anchors" / slug(name) / str(seed)


def train_anchors(
    suite: SuiteConfig, shared: Shared, name: str, seed: int, out: Path, progress: bool = False
) -> ControlPoints:
    """The anchors of a task and seed: from the store, or trained side by side and stored.

    A store that came without its tensors has them trained once more.

    Raises:
        UserError: the stored ones were made with other options; training fails, or failed before (`failed.json`).
    """
    folder = anchors_folder(out, name, seed)
    options = options_of(suite, task=name, seed=seed)
    stored = is_file(folder / "anchors.json")
    if stored:
        if not made_with(_options_in(folder / "anchors.json"), suite, task=name, seed=seed):
            raise UserError(f"{folder}: the anchors were trained with other options; choose another --out")
        remove_work(folder)
        if is_file(folder / "anchors.safetensors"):
            return read_tensors(folder / "anchors.safetensors")
    failed = folder / "failed.json"
    if is_file(failed) and _options_in(failed) == options:
        raise UserError(str(read_json(failed).get("reason")))
    spec = CurveSpec.slots(suite.anchors)
    shared.model.set_curve(spec, shared.model.fresh_points(spec))
    try:
        result = fit_anchors(
            shared.model,
            shared.task,
            suite.training_of(name, seed),
            folder / f"work-{fingerprint(suite, task=name, seed=seed)}",
            progress=progress,
        )
    except UserError as error:  # said once for all cells, and not tried again by each of them
        if is_passing(error):
            raise
        write_json(failed, {"options": options, "reason": f"the anchors: {error}"})
        raise UserError(f"the anchors: {error}") from error
    points = shared.model.control_points()
    write_tensors(folder / "anchors.safetensors", points)
    if stored:  # the record is that of the fit which earlier cells used
        remove_work(folder)
        return points
    record = {
        "options": options,
        "seconds": result.seconds,
        "steps": result.steps,
        "best_step": result.best_step,
        "validation_nll": result.validation_nll,
        "task": shared.task.describe(),
    }
    write_json(folder / "anchors.json", record)
    remove_work(folder)
    return points


def _options_in(path: Path) -> dict[str, Any]:
    record = read_json(path)
    options = record.get("options") if isinstance(record, dict) else None
    if not isinstance(options, dict):
        raise UserError(f"{path}: expected the record of a task's anchors, found something else; delete its folder")
    return options


def remove_work(folder: Path) -> None:
    """Delete the checkpoints of what is done."""
    for work in folder.glob("work-*"):
        shutil.rmtree(work, ignore_errors=True)
