"""Fitting anchors and curves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from loracurve.model.curve_model import CurveModel
from loracurve.model.injection import initial_control_points
from loracurve.system.distributed import is_main, join, world
from loracurve.system.errors import UserError
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task
from loracurve.training.anchors import AnchorsObjective, slot_seeds
from loracurve.training.config import FitConfig, LoopConfig, ObjectiveConfig, resolve_tau
from loracurve.training.corruption import ordinary_tokens, unlabelled
from loracurve.training.curves import CurveObjective
from loracurve.training.doubts import doubts
from loracurve.training.loop import FitResult, run_loop
from loracurve.training.micro_batches import TrainingObjective
from loracurve.training.perturbation import Perturbation

__all__ = ["anchors_objective", "curve_objective", "fit", "fit_anchors", "noise_on"]

logger = logging.getLogger("loracurve")


def fit_anchors(
    model: CurveModel,
    task: Task,
    config: LoopConfig | None = None,
    folder: Path | None = None,
    **loop: object,
) -> FitResult:
    """Fine-tune the M adapters of a model made with `CurveSpec.slots(M)`, side by side in one pass.

    Each adapter has its own initial draw, data order, clipping, validation and best snapshot; the result equals M
    separate fine-tunes. Adapters start from fresh draws by `slot_seeds`.

    Args:
        model: its control points are replaced.
        task: with train and validation rows.
        config: steps, batch size, learning rate, ...
        folder: for checkpoints; training goes on from what is there. What decides its numbers has to be the same, but
            the learning rate may be lower (`training.origin`). None: no checkpoints.
        loop: `progress` (whether a bar is shown), `label` (what stands before it), `accelerator` (accelerate's, where
            losses are logged).

    Returns:
        What was done: steps, seconds, the best step and validation NLL of each adapter, history, options that changed
        on the way.

    Raises:
        UserError: a loss that is not finite, a split that is missing, a checkpoint that is damaged or of another
            training.
    """
    config = config or LoopConfig()
    join()
    loop.setdefault("accelerator", Accelerator())
    program = anchors_objective(model, task.encode("train"), task.encode("validation"), config)
    result = run_loop(model, program, config, folder, **{"label": "anchors", **loop})  # type: ignore[arg-type]
    _tell_doubts(result, program, config, "anchors")
    return result


def fit(
    model: CurveModel, task: Task, config: FitConfig | None = None, folder: Path | None = None, **loop: object
) -> FitResult:
    """Train a curve: all control points of a free one, the inner ones of an anchored one.

    Args:
        model: from `CurveModel.from_config` or `CurveModel.from_adapters`.
        task: with train and validation rows.
        config: how the curve is trained.
        folder: as for `fit_anchors`.
        loop: as for `fit_anchors`.

    Returns:
        What was done: steps, seconds, the best step and validation NLL (one of each), history.

    Raises:
        UserError: the loss is not finite (the last checkpoint stays), nothing is trainable, options that do not suit
            the curve, a file of other inputs that cannot be read, a checkpoint that is damaged or of another training.
    """
    config = config or FitConfig()
    join()
    accelerator = loop.setdefault("accelerator", Accelerator())
    assert isinstance(accelerator, Accelerator)
    program = curve_objective(model, task, task.encode("validation"), config, accelerator.device)
    settled: dict[str, float] = {}
    if config.objective.jsd == "hinge":
        settled = _hinge_target(program, config.objective)
        program.tau = settled["tau"]
    with noise_on(model, config) as noise:
        options = {"label": "curve", "perturbation": noise, **loop}
        result = run_loop(model, program, config, folder, **options)  # type: ignore[arg-type]
    result.settled = settled
    _tell_doubts(result, program, config, "curve")
    return result


def _tell_doubts(result: FitResult, program: TrainingObjective, config: LoopConfig, label: str) -> None:
    if is_main():
        for words in doubts(result, program.sets["validation"], label, config.learning_rate):
            logger.warning("%s", words)


def anchors_objective(model: CurveModel, train: Encoded, validation: Encoded, config: LoopConfig) -> AnchorsObjective:
    """What anchors are trained by, side by side; the model's control points become fresh draws."""
    anchors = model.spec.size
    points = initial_control_points(model.layers, slot_seeds(config.seed, anchors), model.config.init_lora_weights)
    model.set_curve(model.spec, points)
    return AnchorsObjective(model, train, validation, config, anchors)


def curve_objective(
    model: CurveModel, task: Task, validation: Encoded, config: FitConfig, device: torch.device
) -> CurveObjective:
    """What a curve is trained by, its model on the device; a hinge has no target yet.

    Raises:
        UserError: as `fit`, for what cannot be trained.
    """
    if not model.spec.mask.any():
        raise UserError("no control point is trainable: an anchored polygonal chain (degree 1) has no inner points")
    config.check_curve(model.spec)
    if model.runner.sharded and config.perturbation.kind == "flat_lora":
        raise UserError(
            "perturbation.kind: expected none, lora_space or sam with a base spread over processes, found flat_lora; "
            "change it, or set model.shard to false"
        )
    model.to(device)  # where the noise is drawn
    corruption = config.corruption
    if corruption.kind == "text" and task.config.scoring == "lm" and world()[1] > 1:
        raise UserError(
            "corruption.kind: expected another than text for language modelling in several processes, found text; "
            "train in one process"
        )
    vocabulary = ordinary_tokens(task.tokenizer) if corruption.kind in ("tokens", "attention") else None
    others = None if corruption.file is None else unlabelled(task, corruption.file)
    return CurveObjective(model, task.encode("train"), validation, config, vocabulary, others)


@contextmanager
def noise_on(model: CurveModel, config: FitConfig) -> Iterator[Perturbation | None]:
    """Inside the block the layers draw the noise that they are trained with, if any."""
    noise = Perturbation(config.perturbation, model.layers, config.steps, config.seed)
    with noise.attached():
        yield None if config.perturbation.kind == "none" else noise


def _hinge_target(program: CurveObjective, config: ObjectiveConfig) -> dict[str, float]:
    """The hinge's target in nats, and the anchors' divergence where it was measured for it."""
    if config.tau > 0:
        return {"tau": config.tau}
    spec = program.model.spec
    times = spec.anchor_times[:-1] if spec.closed else spec.anchor_times
    jsd = float(program.validation.predictive(torch.tensor(times, dtype=torch.float64)).pairwise_jsd.mean())
    return {"tau": resolve_tau(config, jsd), "anchor_jsd": jsd}
