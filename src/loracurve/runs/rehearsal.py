"""What a run would do, how long it would take and whether it fits, without writing anything.

Base, data and model are opened as `runs.fit` opens them; then a few steps of each training are taken.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import accelerate
import psutil
from torch import Tensor

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.model.weight_files import weights_on_disk
from loracurve.runs.config import RunConfig
from loracurve.runs.fit import Opened, checked_config, first_model, join_anchors, open_parts, trains_anchors
from loracurve.system.distributed import main_holds
from loracurve.system.errors import UserError
from loracurve.system.folders import results_folder
from loracurve.system.memory import DeviceMemory, device_memory, out_of_memory
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import LoopConfig, passes_of
from loracurve.training.timing import Clock, StepTimes, time_anchors, time_curve
from loracurve.training.validation_plan import plan_validation

__all__ = ["Memory", "Rehearsal", "Split", "Training", "gigabytes", "rehearse"]


T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Rows of a split or set, as the model reads them."""

    rows: int
    tokens: float
    """mean tokens of a row, its choices among them"""
    longest: int
    """tokens of the longest prompt with one of its choices"""
    cut: int
    """rows that are longer than the window"""


@dataclass(frozen=True)
class Training:
    """The training of anchors or curve."""

    steps: int
    batch_size: int
    epochs: float
    """passes over the training rows"""
    step: float
    """seconds of a step"""
    validations: int
    validation: float
    """seconds of a validation"""


@dataclass(frozen=True)
class Memory:
    """Bytes by count; of the training with more control points, where there are two."""

    weights: int
    """of the base"""
    points: int
    """control points"""
    gradients: int
    moments: int
    """AdamW's two"""
    best: int
    """the state of the best validation, which is kept beside the present one"""
    peak: int | None
    """measured while steps were taken, the base among them; None before, or where the system does not tell"""
    device: DeviceMemory
    on_gpu: bool

    @property
    def counted(self) -> int:
        """All that is known by count. Activations come on top."""
        return self.weights + self.points + self.gradients + self.moments + self.best


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do."""

    name: str
    """of the data"""
    splits: dict[str, Split]
    """train, validation, and the sets that are judged"""
    window: int | None
    """longest input in tokens"""
    maps: dict[str, int]
    """adapted maps: how many there are of each name"""
    adapter_parameters: int
    """numbers in one adapter"""
    spec: CurveSpec
    """shape of the curve"""
    trainings: dict[str, Training]
    """anchors (where they are trained) and curve"""
    passes: dict[str, int]
    """points of each method that predicts for the evaluation"""
    seconds: dict[str, float]
    """estimated: anchors, curve, validation (while training), unknown inputs, evaluation"""
    trainable_parameters: int
    """numbers that the curve's training moves: one adapter's times the control points that are no anchors, where no
    factor is shared"""
    memory: Memory
    upper: list[int]
    """numbers of the upper third of the layers, where all are adapted and could be fewer; empty otherwise"""


def rehearse(
    config: RunConfig, out: Path, trust_remote_code: bool = False, clock: Clock = time.perf_counter
) -> Rehearsal:
    """Open what a run is made from, take a few steps of its trainings, and count and estimate the rest.

    Args:
        config: all options.
        out: where the run would be written; nothing is.
        trust_remote_code: as for `fit_run`.
        clock: measures the steps.

    Raises:
        UserError: as `fit_run`; what the device has no memory for.
    """
    config = checked_config(config, trust_remote_code)
    with main_holds(lambda: results_folder(out)):  # looked at; what is made for it is removed again
        pass
    device = accelerate.PartialState().device
    _check_files(config, device_memory(device))
    opened = open_parts(config, out)
    model = first_model(opened.base, config)
    # Of adapters that stand for themselves first: anchors, or what a curve is compared with.
    adapters = model.spec.size if trains_anchors(config) or config.adapters else 0
    spec = config.curve.spec(len(config.adapters) or config.curve.anchors)
    parameters = sum(p[0].numel() for p in model.factors)
    on_gpu, has = device.type == "cuda", device_memory(device)
    counted = _counted(model, max(model.spec.size, spec.size), has, on_gpu)
    _check_count(config, counted)
    times: dict[str, StepTimes] = {}
    if trains_anchors(config):
        options = "anchor_training"
        times["anchors"] = _fitting(
            lambda: time_anchors(model, opened.task, config.anchor_training, clock), config, options, has
        )
    if adapters:
        join_anchors(model, config)
    times["curve"] = _fitting(
        lambda: time_curve(model, opened.task, config.curve_training, clock), config, "curve_training", has
    )
    held_within = psutil.Process().memory_info().rss if not on_gpu else 0
    peak = max((t.peak or held_within for t in times.values()), default=0) or None
    trainings = _trainings(config, opened, times, adapters)
    passes = _passes(config, model, adapters, opened.task.config.scoring == "lm")
    return Rehearsal(
        opened.task.dataset.name,
        _splits(opened),
        opened.task.window,
        dict(Counter(name.rsplit(".", 1)[-1] for name in model.layers)),
        parameters,
        spec,
        trainings,
        passes,
        _seconds(config, opened, trainings, times["curve"].token, passes),
        _moved(model),
        Memory(**{**vars(counted), "peak": peak, "device": device_memory(device)}),
        _upper_third(model, config),
    )


def _upper_third(model: CurveModel, config: RunConfig) -> list[int]:
    stack = model.runner.replication.stack
    if stack is None or config.adapters or config.lora.layers_to_transform is not None:
        return []
    count = len([*model.model.get_submodule(stack).children()])
    return [*range(count - count // 3, count)]


def _moved(model: CurveModel) -> int:
    """How many numbers of the curve's control points are trained and depend on no others."""
    count = 0
    for p, tie in zip(model.factors, model.dependences, strict=True):
        free = model.spec.mask if tie is None else model.spec.mask & (tie.diagonal() == 1)
        count += p[0].numel() * int(free.sum())
    return count


def _splits(opened: Opened) -> dict[str, Split]:
    task = opened.task
    every = {name: task.encode(name) for name in ("train", "validation")} | opened.sets
    return {name: Split(len(e), e.total_size / len(e), e.longest_path, e.truncated) for name, e in every.items()}


def _trainings(config: RunConfig, opened: Opened, times: dict[str, StepTimes], adapters: int) -> dict[str, Training]:
    task, found = opened.task, {}
    train, validation, curve = task.encode("train"), task.encode("validation"), config.curve_training
    for name, measured in times.items():
        options: LoopConfig = config.anchor_training if name == "anchors" else curve
        of_curve = () if name == "anchors" else (curve.evaluation_points, passes_of(curve))
        plan = plan_validation(options, train, validation, *of_curve)
        points = adapters if name == "anchors" else plan.points
        found[name] = Training(
            options.steps,
            options.batch_size,
            options.steps * options.batch_size / len(train),
            measured.step,
            plan.times,
            measured.token * points * plan.rows.total_size,
        )
    return found


def _passes(config: RunConfig, model: CurveModel, adapters: int, lm: bool) -> dict[str, int]:
    """Points at which each method of `evaluate_methods` predicts, but for those that are read off another's."""
    points = config.evaluation.points
    passes = {} if model.is_classifier or model.base_weights else {"base model": 1}
    if adapters:
        if lm:  # else a part of the ensemble's
            passes |= {f"adapter {m}": 1 for m in range(adapters)}
        passes |= {"ensemble": adapters, "straight line": points, "aligned line": points}
    if config.evaluation.inference == "tunnel":
        passes["tunnel"] = points
    return passes | {"curve": points}


def _seconds(
    config: RunConfig, opened: Opened, trainings: dict[str, Training], token: float, passes: dict[str, int]
) -> dict[str, float]:
    """Estimated seconds of each part; `token`: of one token at one point."""
    validation, lm = opened.task.encode("validation"), opened.task.config.scoring == "lm"
    seconds = {name: training.steps * training.step for name, training in trainings.items()}
    seconds["validation"] = sum(training.validations * training.validation for training in trainings.values())
    unknowns = not lm and not config.unknowns.gaussians == config.unknowns.familiarity == "none"
    # The base is run as one point more.
    more = 1 if unknowns and config.unknowns.familiarity in ("base", "both") else 0
    points = config.evaluation.points
    train = _tokens(opened.task.encode("train"), config.unknowns.rows)
    seconds["unknown inputs"] = token * (points + more) * (train + validation.total_size) if unknowns else 0.0
    held_out = 0 if lm else validation.total_size
    test, every = opened.sets["test"].total_size, sum(e.total_size for e in opened.sets.values())
    judged: float = sum(n * (held_out + (test if name.endswith(" line") else every)) for name, n in passes.items())
    judged += more * (held_out + every)
    if config.evaluation.weights == "likelihood":
        judged += points * validation.total_size
    if config.evaluation.inference == "tunnel":
        tunnel = config.evaluation.tunnel
        rows = _tokens(opened.task.encode(tunnel.split), tunnel.rows)
        judged += _OF_A_STATE * rows * (tunnel.warm_up + tunnel.thin * points)
    return seconds | {"evaluation": token * judged}


_OF_A_STATE = 4
"""Predictions for a state of the tunnel's chain, which takes two to six."""


def _tokens(encoded: Encoded, most: int) -> float:
    """Tokens of so many rows of average length."""
    return encoded.total_size * min(1.0, most / len(encoded))


def _counted(model: CurveModel, control_points: int, has: DeviceMemory, on_gpu: bool) -> Memory:
    own = {id(p) for p in model.factors}
    state = control_points * sum(p[0].numel() * p.element_size() for p in model.factors)
    weights: list[Tensor] = [t for t in (*model.model.parameters(), *model.model.buffers()) if id(t) not in own]
    return Memory(sum(_held(t) for t in weights), state, state, 2 * state, state, None, has, on_gpu)


def _held(tensor: Tensor) -> int:
    """Bytes of a weight in this process, which may hold a part of it."""
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(part.numel() * part.element_size())


def _check_files(config: RunConfig, has: DeviceMemory) -> None:
    """Refuse a base whose weight files alone say that it does not fit."""
    found = None if config.model.shard else weights_on_disk(config.model)
    if found is not None and found > has.free:
        raise UserError(
            f"model {config.model.name!r}: expected weights that fit into the {gigabytes(has.free)} of memory that "
            f"are free, found {gigabytes(found)}; take a smaller model, model.dtype bfloat16 or model.quantise"
        )


def _check_count(config: RunConfig, memory: Memory) -> None:
    """Refuse weights and trained state that do not fit, whatever a step needs beside them."""
    if memory.counted > memory.device.free:
        state = memory.counted - memory.weights
        raise UserError(
            f"memory: expected base weights and control points that fit into the {gigabytes(memory.device.free)} that "
            f"are free, found {gigabytes(memory.weights)} of weights and {gigabytes(state)} of control points with "
            f"gradients, AdamW's moments and the best state; lower {_curve_size(config)} or lora.r, take model.dtype "
            "bfloat16, or a smaller model"
        )


def _curve_size(config: RunConfig, options: str = "curve_training") -> str:
    """What makes for fewer control points."""
    if config.adapters:
        return "curve.degree, the number of adapters"
    if options == "anchor_training" and config.curve.kind == "free":
        return "rivals"
    return "curve.anchors" if config.curve.kind == "anchored" else "curve.segments"


def _fitting(work: Callable[[], T], config: RunConfig, options: str, has: DeviceMemory) -> T:
    """What `work` returns; raises UserError where the device has no memory for it."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        raise UserError(
            f"{options}: expected a step that fits into the {gigabytes(has.total)} of memory, found it too large; "
            f"lower {options}.batch_size, raise {options}.accumulation, lower task.max_length or "
            f"{_curve_size(config, options)}, turn {options}.gradient_checkpointing on, or take model.dtype bfloat16"
        ) from error


def gigabytes(size: float) -> str:
    """A number of bytes as people read it, in units of 10^9 or 10^6."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB"
