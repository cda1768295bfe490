"""How long the steps and validations of a training take, and the memory at their peak, found by taking a few."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from loracurve.inference.prediction import NoNumbersError
from loracurve.model.cuda_graphs import WARM_UP
from loracurve.model.curve_model import CurveModel
from loracurve.system.distributed import gathered, join
from loracurve.system.errors import UserError
from loracurve.system.memory import PeakMemory
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task
from loracurve.training.config import FitConfig, LoopConfig
from loracurve.training.fit import anchors_objective, curve_objective, noise_on
from loracurve.training.loop import TrainedPoints, learning_rate_factor, recomputing, seed_forward
from loracurve.training.micro_batches import TrainingObjective
from loracurve.training.perturbation import Perturbation

__all__ = ["Clock", "StepTimes", "time_anchors", "time_curve"]


Clock = Callable[[], float]
"""Seconds since some moment."""

# Steps whose batches are looked at for the largest one, and validation rows at most.
_LOOKED_AT, _ROWS = 20, 64

_RUNS_AWAY = "loss or predictions are not finite in the first steps; lower learning_rate"

# Target of a hinge, in nats; it changes no step's cost, and anchors after a few steps give none.
_SOME_TAU = 0.02


@dataclass(frozen=True)
class StepTimes:
    """What a few steps of a training have shown."""

    step: float
    """seconds of a step of average size"""
    token: float
    """seconds of predicting one token at one point"""
    peak: int | None
    """bytes at the peak, the base among them; None where the system does not tell"""


def time_anchors(model: CurveModel, task: Task, config: LoopConfig, clock: Clock = time.perf_counter) -> StepTimes:
    """Take the first steps of `fit_anchors`, and validate on some rows; arguments and errors as there."""
    join()
    program = anchors_objective(model, task.encode("train"), _some_of(task.encode("validation")), config)
    return _timed(model, program, config, model.spec.size, None, clock)


def time_curve(model: CurveModel, task: Task, config: FitConfig, clock: Clock = time.perf_counter) -> StepTimes:
    """Take the first steps of `fit`, and validate on some rows; arguments and errors as there."""
    join()
    program = curve_objective(model, task, _some_of(task.encode("validation")), config, Accelerator().device)
    if config.objective.jsd == "hinge":
        program.tau = config.objective.tau or _SOME_TAU
    with noise_on(model, config) as noise:
        return _timed(model, program, config, config.evaluation_points, noise, clock)


def _some_of(encoded: Encoded) -> Encoded:
    """At most `_ROWS` rows, evenly spread."""
    return replace(encoded, examples=encoded.examples[:: -(-len(encoded.examples) // _ROWS)])


def _timed(
    model: CurveModel,
    program: TrainingObjective,
    config: LoopConfig,
    points: int,
    noise: Perturbation | None,
    clock: Clock,
) -> StepTimes:
    trained = TrainedPoints(model, program, config, Accelerator().device, noise)
    on_gpu = model.device.type == "cuda"
    # A GPU's first steps of a shape run as they are, and the next one captures them.
    warm_up, timed = (WARM_UP + 1, 3) if on_gpu else (1, 2)
    number, part = _largest(program, config)
    figures: list[Tensor] = []

    def step(taken: int) -> None:
        seed_forward(config, taken)
        figures.append(trained.step(number, learning_rate_factor(config, taken % config.steps)))

    def seconds(work: Callable[[], object]) -> float:
        started = _now(clock, on_gpu)
        work()
        return _now(clock, on_gpu) - started

    model.train()
    with PeakMemory() as peak, recomputing(model.model, config.gradient_checkpointing):
        for taken in range(warm_up):
            step(taken)
        of_step = sum(seconds(partial(step, warm_up + i)) for i in range(timed)) / timed
        if not torch.stack(figures)[:, :2].isfinite().all():
            raise UserError(_RUNS_AWAY)
        try:
            if on_gpu:
                trained.validate()
            of_validation = seconds(trained.validate)
        except NoNumbersError as error:
            raise UserError(_RUNS_AWAY) from error
    trained.stepper.forget_gradients()
    return StepTimes(of_step * part, of_validation / (points * program.sets["validation"].total_size), peak.reserved)


def _now(clock: Clock, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return clock()


def _largest(program: TrainingObjective, config: LoopConfig) -> tuple[int, float]:
    """Which of the first steps has the most tokens, and the average step's as a part of them."""

    def tokens(step: int) -> int:
        batches = [batch for part in program.parts(step) for batch in (part.batch, part.other) if batch is not None]
        return sum(batch.tokens for batch in batches)

    shares = gathered(lambda: [tokens(step) for step in range(min(_LOOKED_AT, config.steps))])
    sizes = [sum(of_step) for of_step in zip(*shares, strict=True)]
    return sizes.index(max(sizes)), sum(sizes) / len(sizes) / max(sizes)
