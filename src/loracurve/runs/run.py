"""The run directory: configs, environment, anchors, curve, predictions and figures of one fit; everything resumable."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import accelerate
import torch
from transformers import PreTrainedTokenizerBase

from loracurve.inference.config import EvaluationConfig, UnknownsConfig
from loracurve.inference.model_average import Average, average_of
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.inference.unknowns import Unknowns, fit_unknowns, read_unknowns, training_rows, write_unknowns
from loracurve.model.base_model import load_base, load_tokenizer, model_window, open_base
from loracurve.model.curve_model import CurveModel
from loracurve.model.fsdp import asked_to_shard, shard_base
from loracurve.runs.config import RunConfig, load_config
from loracurve.runs.identity import IDENTITY, Identity, read_identity
from loracurve.system.consent import consented
from loracurve.system.distributed import on_main
from loracurve.system.errors import UserError
from loracurve.system.files import file_hash, read_json
from loracurve.system.paths import exists, is_file
from loracurve.system.processor import multiplies_bfloat16
from loracurve.tasks.classes import RecordedTask, TaskIdentity
from loracurve.tasks.dataset import Dataset
from loracurve.tasks.task import Task, load_task, settled_dataset

__all__ = ["Run", "base_and_task", "best_point", "build_unknowns", "check_run", "keep_unknowns", "open_run", "spread"]


logger = logging.getLogger("loracurve")


@dataclass
class Run:
    """An opened run: where it lies, its config, its curve and its task."""

    folder: Path
    config: RunConfig
    model: CurveModel
    task: Task

    def average(self, evaluation: EvaluationConfig | None = None) -> Average:
        """The points and weights to predict with, and what was built for them of unknown inputs; a line in the log says
        where that is of other points."""
        found = average_of(self.model, evaluation or self.config.evaluation, self.task)
        known = read_unknowns(self.folder)
        if known is None:
            return found
        unknowns, points = known
        path = self.folder / "unknowns.json"
        if (of := read_json(path).get("curve")) is not None and of != _curve_hash(self.folder):
            raise UserError(
                f"{path}: expected numbers of this run's curve, found those of another; delete it, and run "
                "loracurve calibrate"
            )
        if not found.has(points):
            logger.warning(
                "%s: without Gaussians and familiarity, which are of another average of %d points, this one has %d",
                *(path, len(points), len(found.weights)),
            )
            return found
        return replace(found, unknowns=unknowns)


def open_run(
    folder: str | Path, data: str | None = None, base: str | None = None, trust_remote_code: bool = False
) -> Run:
    """Open a finished run: its `config`, its `task`, its `model` (a `CurveModel`), and `average()`, the points and
    weights to predict with.

    Prompt and classes are those that were trained. Rows, the run's own or `data`, are read when they are first asked
    for, and their labels are put into the order of the run's classes by name.

    Args:
        folder: the run directory.
        data: another data set in place of the run's.
        base: where the base model is now: a folder, or a name on the hub. None: where it was.
        trust_remote_code: consent to run code that comes with the base; that the run was made with it is none.

    Raises:
        UserError: no run with a fitted curve there, a base model that cannot be opened or is another one than the run
            was made with; when rows are asked for: data that are not there, or have classes that the run has not.
    """
    folder = Path(folder)
    check_run(folder)
    config = load_config(folder / "config.yaml")
    identity = read_identity(folder)
    trusted = consented(config.model.trust_remote_code, str(folder), trust_remote_code)
    if base is not None:
        config = replace(config, model=replace(config.model, name=base, revision=None))
    if identity is not None:
        config = replace(config, task=replace(config.task, columns=identity.columns(config.task.columns)))
    if identity is None:
        logger.warning(
            "%s: made before runs kept an %s: that base, tokenizer and classes are those of the fit cannot be checked",
            *(folder, IDENTITY),
        )
        model, task = _unrecorded(config, data, trusted)
    else:
        model, task = _recorded(folder, config, identity, data, trusted)
    curve = CurveModel.from_pretrained(folder / "curve", model)
    if base is not None:
        curve.config.base_model_name_or_path = base
    spread(curve, config)
    return Run(
        folder,
        replace(config, task=replace(task.config, data=config.task.data)),
        curve.to(accelerate.PartialState().device),
        task,
    )


def check_run(folder: Path) -> None:
    """Raise UserError where there is no run with a fitted curve, before anything is opened or written for it."""
    if is_file(folder / "curve_config.json"):
        raise UserError(
            f"{folder}: expected a run directory, found a curve without its task; make one of both in Python with "
            "loracurve.save_run(model, task, FOLDER)"
        )
    if not is_file(folder / "curve" / "curve_config.json"):
        raise UserError(
            f"{folder}: expected a run directory with a fitted curve, found none; make one with loracurve fit"
        )


def build_unknowns(
    model: CurveModel, task: Task, average: Average, config: UnknownsConfig, folder: Path
) -> Unknowns | None:
    """Build Gaussians and familiarity for an average and write them into a run's folder; None where nothing can be had,
    with a line in the log.

    Raises:
        UserError: the training rows are not there; Gaussians that are asked for by name cannot be had.
    """
    if config.gaussians == config.familiarity == "none":
        return None
    train, total = training_rows(task, config.rows)
    validation = task.encode("validation")
    try:
        found = fit_unknowns(model, train, validation, average.where, average.weights, config, total)
    except UserError as error:
        if config.gaussians == "last_layer":
            raise
        logger.warning("%s: without Gaussians and familiarity: %s", folder, error)
        return None
    on_main(partial(keep_unknowns, found, average, folder))
    return found


def keep_unknowns(unknowns: Unknowns, average: Average, folder: Path) -> None:
    """Write what was built for an average into a run's folder, with the hash of the curve that it is of."""
    write_unknowns(unknowns, average.points, folder, _curve_hash(folder))


def _curve_hash(folder: Path) -> str:
    return file_hash(folder / "curve" / "control_points.safetensors", "a run's control points")


def spread(model: CurveModel, config: RunConfig) -> None:
    """Spread the base over the processes where that is asked for."""
    if config.model.shard or asked_to_shard():
        shard_base(model)


def base_and_task(config: RunConfig, trust_remote_code: bool = False) -> tuple[torch.nn.Module, Task]:
    """The base model of a run about to be trained, and its task; consent as for `open_run`."""
    options = config.model
    trusted = consented(options.trust_remote_code, f"model {options.name!r}", trust_remote_code)
    tokenizer = load_tokenizer(options.name, trusted, options.revision)
    # Answers that are no single tokens, and other faults of prompt and rows, are said before a model is loaded.
    task = load_task(config.task, tokenizer)
    task.encode_rows(task.dataset.rows("train")[:8])
    base, _ = open_base(options, config.task, config.curve_training.seed, trust_remote_code, tokenizer)
    on_cpu = accelerate.PartialState().device.type == "cpu"
    if on_cpu and getattr(base, "dtype", None) == torch.bfloat16 and not multiplies_bfloat16():
        logger.warning(
            "model.dtype: bfloat16 on a processor without instructions for it; with float32 training and prediction "
            "are several times faster, and the model takes twice the memory (--model.dtype float32)"
        )
    return base, task.in_window(model_window(base))


def _recorded(
    folder: Path, config: RunConfig, identity: Identity, data: str | None, trusted: bool
) -> tuple[torch.nn.Module, Task]:
    """The base and the task of a run's identity; its own data are opened only when their rows are asked for."""
    known, options = identity.task, config.model
    torch.manual_seed(config.curve_training.seed)  # weights that no checkpoint holds
    try:
        base, tokenizer = load_base(
            options.name,
            known.scoring == "head",
            options.dtype,
            len(known.labels) if known.scoring == "head" else None,
            trusted,
            options.quantise,
            options.revision or identity.revision(options.name),
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}; where the base lies elsewhere now, give --base") from error
    identity.check_base(base, tokenizer, str(folder))

    def own() -> Dataset:
        try:
            dataset, _ = settled_dataset(config.task)
        except UserError as error:
            raise UserError(
                f"{folder}: this needs the rows that the run was made with, which were in {identity.data['place']}: "
                f"{error}; put them back, or give others (evaluate --task, calibrate --input)"
            ) from error
        identity.check_rows(dataset, str(folder))
        return dataset

    window = model_window(base)
    if data is not None:
        return base, _task_on(known, data, config, tokenizer, window)
    return base, RecordedTask(known, config.task, tokenizer, window, identity.data["name"], own)


def _unrecorded(config: RunConfig, data: str | None, trusted: bool) -> tuple[torch.nn.Module, Task]:
    """The same for a run without an identity: its own data say what its classes are."""
    base, tokenizer = open_base(config.model, config.task, config.curve_training.seed, trusted)
    window = model_window(base)
    try:
        own = load_task(config.task, tokenizer, window)
    except UserError:
        if data is None:
            raise
        return base, load_task(replace(config.task, data=data), tokenizer, window)
    known = TaskIdentity.of(own)
    return base, own if data is None else _task_on(known, data, config, tokenizer, window)


def _task_on(
    known: TaskIdentity, data: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase, window: int | None
) -> Task:
    """The task on other data, which are read at once."""
    options = replace(config.task, data=data)
    # The file that it was fitted to has its test rows; another one is test rows.
    same = exists(data) and exists(config.task.data) and Path(data).resolve() == Path(config.task.data).resolve()
    dataset, _ = settled_dataset(options, whole=not same)
    task = RecordedTask(known, options, tokenizer, window, dataset.name, lambda: dataset)
    list(task.dataset.splits)
    return task


def best_point(run: Run, points: int = 21) -> float:
    """The t of lowest validation NLL on a uniform grid of points."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    validation = run.task.encode("validation")
    nll = point_nll(predict_split(run.model, validation, t), validation.labels).mean(1)
    return float(t[int(nll.argmin())])
