"""Fitting a run: anchors (if anchored), curve, evaluation, into a run directory; everything resumable."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
from accelerate.utils import is_tensorboard_available, is_wandb_available
from torch import nn

from loracurve.curve.config import CurveConfig
from loracurve.curve.files import export_adapter
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.inference.model_average import average_of
from loracurve.model.curve_model import CurveModel
from loracurve.model.fingerprint import check_adapters
from loracurve.runs.config import RunConfig, load_config, save_config
from loracurve.runs.evaluate import evaluate_methods, evaluation_sets
from loracurve.runs.identity import Identity, identity_of, read_identity, write_identity
from loracurve.runs.run import base_and_task, build_unknowns, logger, spread
from loracurve.system.consent import consented
from loracurve.system.distributed import is_main, main_holds, on_main
from loracurve.system.environment import environment
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import results_folder
from loracurve.system.paths import exists
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.repeats import in_training
from loracurve.tasks.task import Task
from loracurve.training.corruption import unlabelled
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.origin import MAY_BE_LOWERED, MAY_CHANGE, check_changes, flat_options, options_changed
from loracurve.training.perturbation import Perturbation

__all__ = ["Opened", "checked_config", "first_model", "fit_run", "join_anchors", "open_parts", "trains_anchors"]


def fit_run(
    config: RunConfig, out: Path, resume: bool = False, progress: bool = True, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Train anchors and curve, evaluate the curve beside single adapters and their ensemble, write the run directory.

    Args:
        config: all options.
        out: new folder.
        resume: go on with a run that was interrupted. Its options have to be the same, but for those that
            `training.origin` names; metrics.json says what was changed, and after which step.
        progress: show progress bars.
        trust_remote_code: consent to run code that comes with the base; it is noted in the run's config.yaml.

    Returns:
        What is in the run's metrics.json.

    Raises:
        UserError: the folder is in use, holds something else, or the options do not suit data, model or each other.
    """
    config = checked_config(config, trust_remote_code)
    with main_holds(lambda: results_folder(out, resume)):
        return _fit_run(config, out, progress)


def checked_config(config: RunConfig, trust_remote_code: bool = False) -> RunConfig:
    """The options of a run, with a note of consent to run code of the base.

    Raises:
        UserError: a tracker that is not installed, data in memory, code of the base without consent.
    """
    _check_tracker(config.tracker)
    if not isinstance(config.task.data, str):
        raise UserError(
            f"task.data: expected a path or a name for a run, which is opened again later, found "
            f"{type(config.task.data).__name__}; write the rows to a file, such as by to_parquet, and give its path"
        )
    if consented(config.model.trust_remote_code, f"model {config.model.name!r}", trust_remote_code):
        return replace(config, model=replace(config.model, trust_remote_code=True))
    return config


# Of the options outside training: where losses are logged, how the base is held, a record of consent.
_FREE = ("tracker", "model.shard", "model.trust_remote_code")

_TRAININGS = ("anchor_training", "curve_training")


def _check_options(path: Path, config: RunConfig) -> None:
    """Refuse other options than a run began with, but for those that may change; the checkpoints say what did."""
    changes = options_changed(flat_options(load_config(path)), flat_options(config))
    free, lowered = ([f"{t}.{name}" for t in _TRAININGS for name in names] for names in (MAY_CHANGE, MAY_BE_LOWERED))
    check_changes(changes, str(path), [*_FREE, *free], lowered)


@dataclass(frozen=True)
class Opened:
    """What a run is made from, before anything of it is written."""

    base: nn.Module
    task: Task
    sets: dict[str, Encoded]
    """what it is judged on (`evaluation_sets`)"""
    identity: Identity
    known: Identity | None
    """what the run's folder says already, where it was begun before; the same"""


def open_parts(config: RunConfig, out: Path) -> Opened:
    """Open base and task and tokenise all that training and evaluation take: faults in the data are found before hours
    of training.

    Args:
        config: from `checked_config`.
        out: the run's folder.

    Raises:
        UserError: base, data and options that do not suit each other, or the run that was begun; adapters of another
            base.
    """
    trusted = config.model.trust_remote_code  # with consent, or it would not have come here
    base, task = base_and_task(config, trusted)
    sets = evaluation_sets(task, config.evaluation)
    task.encode("validation")
    for words in in_training(task.dataset) if is_main() else ():
        logger.warning("%s: %s", task.dataset.name, words)
    identity = identity_of(config, base, task.tokenizer, task)
    if (known := read_identity(out)) is not None:
        known.check_same(identity, base, task.tokenizer, str(out))
    if config.adapters:
        check_adapters(config.adapters, base, config.model, config.task.scoring == "head", trusted)
    if config.curve_training.corruption.file is not None:
        unlabelled(task, config.curve_training.corruption.file)
    return Opened(base, task, sets, identity, known)


def first_model(base: nn.Module, config: RunConfig) -> CurveModel:
    """The model that is trained first: a free curve, or independent control points, the adapters that are given or
    those that will be anchors or rivals.

    Raises:
        UserError: options of the adapters, or noise in training, that the base cannot have.
    """
    lora = config.lora.to_peft(config.model.name, config.task.scoring == "head")
    free = config.curve.kind == "free"
    if free and config.curve.anchors != CurveConfig.anchors and is_main():
        logger.warning("curve.anchors: a free curve has none; curve.kind anchored makes one through anchors")
    if free and not config.rivals:
        model = CurveModel(base, lora, config.curve.spec(0), seed=config.curve_training.seed)
    elif config.adapters:
        model = CurveModel.with_adapters(base, config.adapters)
    else:
        model = CurveModel(base, lora, CurveSpec.slots(config.rivals or config.curve.anchors))
    spread(model, config)
    if trains_anchors(config) and config.curve_training.perturbation.kind == "flat_lora":
        # Says before anchors are trained that a quantised base cannot have it.
        Perturbation(config.curve_training.perturbation, model.layers, config.curve_training.steps, seed=0)
    return model


def trains_anchors(config: RunConfig) -> bool:
    """Whether a run trains anchors, or rivals of a free curve; else it has none, or is given them."""
    return bool(config.rivals) or (config.curve.kind == "anchored" and not config.adapters)


def join_anchors(model: CurveModel, config: RunConfig) -> None:
    """Turn independent adapters into the curve through them, as `config` shapes it; rivals give way to a free one."""
    shape = config.curve
    if shape.kind == "free":
        spec = shape.spec(0)
        model.set_curve(spec, model.fresh_points(spec, config.curve_training.seed))
        return
    model.anchor(
        shape.degree,
        shape.alignment,
        shape.inner,
        config.curve_training.seed,
        shape.pieces,
        shape.closed,
    )


def _fit_run(config: RunConfig, out: Path, progress: bool) -> dict[str, Any]:
    resumed = exists(out / "config.yaml")
    if resumed:
        _check_options(out / "config.yaml", config)
    opened = open_parts(config, out)
    base, task, sets = opened.base, opened.task, opened.sets

    def begin() -> None:
        if not resumed:
            save_config(config, out / "config.yaml")
        if opened.known is None:
            write_identity(opened.identity, out)
        write_json(out / "environment.json", environment())

    on_main(begin)
    timings: dict[str, float] = {}
    changes: list[dict[str, Any]] = []
    accelerator = _tracking(config, out)
    loop = {"progress": progress, "accelerator": accelerator}
    started = time.perf_counter()
    model = first_model(base, config)
    anchors: ControlPoints | None = None
    if trains_anchors(config):
        result = fit_anchors(model, task, config.anchor_training, out / "anchors", **loop)
        on_main(partial(write_json, out / "anchors" / "history.json", result.history))
        timings["anchors"] = result.seconds
        changes += _named(result.changes, "anchor_training")
    if config.curve.kind == "anchored" or config.rivals:
        anchors = model.control_points()
        on_main(partial(_export, model, anchors, out / "anchors"))
        join_anchors(model, config)
    result = fit(model, task, config.curve_training, out / "training", **loop)
    accelerator.end_training()
    timings["curve"] = result.seconds
    changes += _named(result.changes, "curve_training")

    def save_curve() -> None:
        if resumed:  # only now have the checkpoints agreed to what changed
            save_config(config, out / "config.yaml")
        write_json(out / "training" / "history.json", result.history)
        model.save_pretrained(out / "curve")

    on_main(save_curve)
    evaluated = time.perf_counter()
    average = average_of(model, config.evaluation, task)
    built = time.perf_counter()
    if config.task.scoring != "lm":
        average = replace(average, unknowns=build_unknowns(model, task, average, config.unknowns, out))
    timings["unknowns"] = time.perf_counter() - built
    report = evaluate_methods(model, task, config.evaluation, sets, anchors, out, average)
    report["training"] = {
        "best_step": result.best_step,
        "validation_nll": result.validation_nll,
        "validation": result.validation,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "processes": result.processes,
        "changes": changes,
    } | result.settled
    report["seconds"] = timings | {
        "evaluation": time.perf_counter() - evaluated - timings["unknowns"],
        "total": time.perf_counter() - started,
    }
    report["task"] = task.describe()
    on_main(partial(write_json, out / "metrics.json", report))
    return report


def _named(changes: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Changes of a training's options, these by their names in config.yaml."""
    own = ("device", "processes")
    return [
        c | {"option": c["option"] if c["option"] in own else f"{part}.{c['option']}", "part": part} for c in changes
    ]


def _export(model: CurveModel, adapters: ControlPoints, folder: Path) -> None:
    """Write stacked adapters as PEFT folders 0, 1, ..."""
    for m in range(len(next(iter(adapters.values())))):
        adapter = {n: p[m] for n, p in adapters.items()}
        export_adapter(model.config, adapter, folder / str(m), model.base_weights)


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
