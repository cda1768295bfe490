"""The training loop: one for anchors, curves, and adapters that a method trains in its own way.

Its state is a value that a checkpoint holds completely.

Every random draw is a function of (seed, step, stream), so a resumed run takes the same steps as an uninterrupted one,
to the bit on the CPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from loracurve.inference.prediction import NoNumbersError
from loracurve.model.curve_model import CurveModel
from loracurve.system.distributed import backend, gathered, is_main, same_everywhere, world
from loracurve.system.errors import CheckpointError, UserError
from loracurve.system.randomness import generator, stream_seed
from loracurve.training.checkpoint import Checkpoint, LoopState
from loracurve.training.config import FitConfig, LoopConfig
from loracurve.training.micro_batches import TrainingObjective
from loracurve.training.origin import MAY_BE_LOWERED, Changes, Origin
from loracurve.training.perturbation import Perturbation
from loracurve.training.step import StepConfig, Stepper
from loracurve.training.validation_plan import validation_interval

__all__ = [
    "FitResult",
    "Trained",
    "TrainedPoints",
    "batch_numbers",
    "has_dropout",
    "learning_rate_factor",
    "recomputing",
    "run_loop",
    "seed_forward",
    "take_steps",
]


logger = logging.getLogger("loracurve")

BETWEEN_CHECKPOINTS = 60.0
"""Seconds at least, by default: a checkpoint of a curve takes one, and training that long is all that it can save."""


def learning_rate_factor(config: LoopConfig, step: int) -> float:
    """Learning rate of a step (0-based) as a fraction of the peak."""
    warm = math.ceil(config.warmup * config.steps)
    if config.schedule == "one-cycle":
        # Smith & Topin 2018 with cosine phases, from 1/25 of the peak up to it and down to 1/250000.
        if step < warm:
            return 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * step / warm)) / 2
        left = (step - warm) / max(config.steps - warm - 1, 1)
        return 1 / 250_000 + (1 - 1 / 250_000) * (1 + math.cos(math.pi * min(left, 1.0))) / 2
    if step < warm:
        return (step + 1) / warm
    left = (step - warm) / max(config.steps - warm, 1)
    return {"constant": 1.0, "linear": 1 - left, "cosine": (1 + math.cos(math.pi * left)) / 2}[config.schedule]


def seed_forward(config: LoopConfig, step: int) -> None:
    """Dropout is drawn from the global generator: seeded by the step, it needs no saving."""
    torch.manual_seed(stream_seed(config.seed, "forward", step, *([world()[0]] if world()[0] else [])))


def batch_numbers(seed: int, step: int, examples: int, batch_size: int) -> list[int]:
    """Examples of a step: the next `batch_size` of an endless row of permutations, so that none is ever skipped."""
    numbers: list[int] = []
    place = step * batch_size
    while len(numbers) < batch_size:
        epoch, offset = divmod(place + len(numbers), examples)
        order = torch.randperm(examples, generator=generator(seed, "order", epoch))
        numbers += order[offset : offset + batch_size - len(numbers)].tolist()
    return numbers


@dataclass
class FitResult:
    """What a fit did."""

    steps: int
    seconds: float
    best_step: list[int]
    """step after which validation NLL was best: one for a curve, one for each adapter that was trained beside others"""
    validation_nll: list[float]
    """that NLL, in nats, on the rows that `validation` tells of"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """logged figures: step, loss, learning rate, validation"""
    stopped_early: bool = False
    settled: dict[str, float] = field(default_factory=dict)
    """what was settled before the first step: the target of a hinge, in nats"""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """options that changed when training went on from a checkpoint: `option`, `before`, `now`, and the `step` after
    which"""
    validation: dict[str, Any] = field(default_factory=dict)
    """its `rows` `of` all, `times`, `points` and `share` of the training's products (`ValidationPlan`)"""
    processes: dict[str, Any] = field(default_factory=dict)
    """their number, the examples of a step in each, how they talk, and whether the base is spread over them"""


class Trained(Protocol):
    """What the loop trains."""

    groups: int
    """independent things trained side by side, each validated and kept on its own; as many consecutive rows of every
    tensor belong to each"""
    figures: tuple[str, ...]
    """names of what a step returns, `nll` among them"""
    every: int
    """steps from one validation to the next; the last step is followed by one too"""

    def tensors(self) -> Sequence[Tensor]:
        """All that was learnt, to be copied and, for the best state, written back in place."""

    def step(self, number: int, factor: float) -> Tensor:
        """Take step `number` (0-based) at `factor` times the peak learning rate; returns its figures [F].

        Training ends with an error where one of the first two is not finite (a loss, the norm of its gradient); the
        loop looks at them now and then, and a step that finds them so changes nothing from then on.
        """

    def validate(self) -> list[float]:
        """Validation NLL of each group, in nats."""


class TrainedPoints:
    """The control points of a model, which is moved to a device, trained by an objective.

    Args:
        perturbation: attached to the model's layers by the caller; started before each step.

    Raises:
        UserError: micro-batches smaller than the number of processes.
    """

    def __init__(
        self,
        model: CurveModel,
        program: TrainingObjective,
        config: LoopConfig,
        device: torch.device,
        perturbation: Perturbation | None = None,
    ) -> None:
        model.to(device)
        self.processes = _processes(config, model.device, model.runner.sharded)
        self.program, self.perturbation, self.factors = program, perturbation, model.factors
        self.groups, self.figures = program.groups, ("loss", "grad_norm", *program.figures)
        self.every = program.plan.every
        options = StepConfig(**{f.name: getattr(config, f.name) for f in fields(StepConfig)})
        capture = config.capture and not model.runner.sharded
        self.stepper = Stepper(
            program, self.factors, model.spec.mask, options, capture, perturbation, model.dependences
        )

    def tensors(self) -> Sequence[Tensor]:
        return self.factors

    def step(self, number: int, factor: float) -> Tensor:
        if self.perturbation is not None:
            self.perturbation.start(number)
        return self.stepper(self.program.parts(number), factor)

    def validate(self) -> list[float]:
        return self.program.validate()


def run_loop(
    model: CurveModel,
    program: TrainingObjective,
    config: LoopConfig,
    folder: Path | None = None,
    label: str = "fit",
    progress: bool = True,
    accelerator: Accelerator | None = None,
    stop_after: int | None = None,
    perturbation: Perturbation | None = None,
) -> FitResult:
    """Train the control points of `model`; with `folder`, checkpoint there and resume from what is there.

    Args:
        stop_after: leave after this step as if interrupted (the checkpoint stays).
        perturbation: attached to the model's layers by the caller; started before each step.

    Several processes take the same steps as one; the main one alone writes. Only dropout differs.

    Raises:
        UserError: the loss or its gradient is not finite (an earlier checkpoint is kept), micro-batches smaller than
            the number of processes.
        CheckpointError: a checkpoint that is damaged or of another training (`training.origin`).
    """
    accelerator = accelerator or Accelerator()
    trained = TrainedPoints(model, program, config, accelerator.device, perturbation)
    checkpoint = None
    if folder is not None:
        origin = Origin(model, config, program.sets)
        checkpoint = Checkpoint(folder, trained.factors, trained.stepper.optimizer, origin)
    if progress and is_main():
        print(f"{label}: validation: {program.plan}")
    result = take_steps(model, trained, config, label, progress, checkpoint, accelerator.log, stop_after)
    trained.stepper.forget_gradients()
    result.validation = program.plan.record
    result.processes = trained.processes
    return result


def take_steps(
    model: CurveModel,
    trained: Trained,
    config: LoopConfig,
    label: str,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    log: Callable[..., None] | None = None,
    stop_after: int | None = None,
) -> FitResult:
    """The loop: steps, validations, and in the end the best state of each group, or the last (`config.keep`).

    Args:
        model: is run in training mode, on its device.
        label: of the bar, and of what is logged.
        checkpoint: saved to now and then, and resumed from.
        log: called with the figures and `step` now and then.
        stop_after: see `run_loop`.

    Raises:
        UserError: the loss or a prediction is not finite (an earlier checkpoint is kept).
        CheckpointError: a checkpoint that is damaged or of another training.
    """
    groups, tensors = trained.groups, trained.tensors()
    state = LoopState(0, [p.detach().clone() for p in tensors], [math.inf] * groups, [0] * groups, [0] * groups, [])
    changes = {} if checkpoint is None else checkpoint.load(state)
    same_everywhere(tensors)
    due = _checkpoints(config)
    # A look at the figures waits for the device: on the CPU every step, elsewhere now and then.
    look_every = 1 if model.device.type == "cpu" else 20
    finished = state.step >= config.steps or bool(config.patience and min(state.stale) >= config.patience)
    _note_changes(state, changes, finished, label)
    kept = state.step
    started, past = time.perf_counter(), state.seconds
    waiting: list[dict[str, Any]] = []
    rows: list[Tensor] = []
    model.train()
    with (
        recomputing(model.model, config.gradient_checkpointing),
        _bar(label, groups, config.steps, state.step, progress and is_main()) as show,
    ):
        while state.step < config.steps and not finished:
            seed_forward(config, state.step)
            factor = learning_rate_factor(config, state.step)
            rows.append(trained.step(state.step, factor))
            state.step += 1
            waiting.append({"step": state.step, "learning_rate": config.learning_rate * factor})
            last = state.step == config.steps or state.step == stop_after
            validate, save = state.step % trained.every == 0, checkpoint is not None and due(state.step)
            if not (validate or save or last or state.step % look_every == 0):
                continue
            if (bad := _collect(state, waiting, rows, trained.figures)) is not None:
                raise UserError(f"{bad}{_advice(config, checkpoint, kept)}")
            if validate or state.step == config.steps:
                nll = _validate(trained, state.step, _advice(config, checkpoint, kept))
                state.history[-1]["validation_nll"] = nll
                _keep_best(state, nll, trained.tensors(), config.patience)
                finished = bool(config.patience and min(state.stale) >= config.patience)
            figures = {k: v for k, v in state.history[-1].items() if isinstance(v, float)}
            if log is not None:
                log({f"{label}/{k}": v for k, v in figures.items()}, step=state.step)
            show(state.step, figures["nll"], min(state.best_nll))
            state.seconds = past + time.perf_counter() - started
            if checkpoint is not None and (save or finished or last):
                checkpoint.save(state)
                kept = state.step
                due = _checkpoints(config)
            if state.step == stop_after:
                break
    if config.keep == "best" and math.isfinite(min(state.best_nll)):
        with torch.no_grad():
            for p, best in zip(trained.tensors(), state.best, strict=True):
                p.copy_(best)
    stopped = finished and state.step < config.steps
    return FitResult(
        state.step, state.seconds, state.best_step, state.best_nll, state.history, stopped, changes=state.changes
    )


def _checkpoints(config: LoopConfig) -> Callable[[int], bool]:
    """Whether to save after a step, the same in all processes; to be made anew at each checkpoint."""
    if config.checkpoint_every:
        return lambda step: step % config.checkpoint_every == 0
    every, saved = validation_interval(config), time.perf_counter()

    def due(step: int) -> bool:
        # Of several processes the main one's clock counts.
        return step % every == 0 and gathered(lambda: time.perf_counter() - saved >= BETWEEN_CHECKPOINTS)[0]

    return due


def _note_changes(state: LoopState, changes: Changes, finished: bool, label: str) -> None:
    """Put the changes of options into the state, and say so; raises CheckpointError for those that come too late."""
    for option, (before, now) in changes.items():
        if not finished:
            state.changes.append({"step": state.step, "option": option, "before": before, "now": now})
            logger.info("%s: %s is %s after step %d, it was %s", label, option, now, state.step, before)
        elif option in MAY_BE_LOWERED:
            raise CheckpointError(
                f"{label}: {option}: expected {before}, with which all {state.step} steps were taken, found {now}; "
                f"leave it at {before}, or begin anew in another folder"
            )


def _advice(config: LoopConfig, checkpoint: Checkpoint | None, kept: int) -> str:
    """What helps against steps that run away. The checkpoint of step `kept` (0: none) is from before, and stays: the
    state now is finite perhaps, but gives no finite loss."""
    noise = isinstance(config, FitConfig) and config.perturbation.kind != "none"
    lower = "lower learning_rate or perturbation.rho" if noise else "lower learning_rate"
    if checkpoint is None:
        return f"; {lower}"
    where = f"the last good state, of step {kept}, is in {checkpoint.folder}" if kept else "no step is kept"
    return f"; {where}; {lower} and go on (fit: --resume), or begin anew"


def _processes(config: LoopConfig, device: torch.device, sharded: bool) -> dict[str, Any]:
    """What is recorded of the processes; raises UserError where a micro-batch leaves one of them without an example."""
    size = world()[1]
    chunks = [len(c) for c in torch.arange(config.batch_size).chunk(config.accumulation)]
    if chunks[-1] < size:
        raise UserError(
            f"batch_size: expected micro-batches of at least {size} examples for {size} processes, found "
            f"{config.batch_size} in {len(chunks)} micro-batches; raise it, or lower accumulation"
        )
    return {
        "count": size,
        "examples": [sum(len(range(rank, chunk, size)) for chunk in chunks) for rank in range(size)],
        "backend": backend(device),
        "base": "sharded" if sharded else "whole",
    }


def has_dropout(base: Any) -> bool:
    """Whether what is computed again needs the random states of its first time, which CUDA graphs cannot read. Noise of
    layers draws by keys."""
    own = any(m.p > 0 for m in base.modules() if isinstance(m, nn.Dropout))
    options = vars(base.config)
    return own or any("drop" in name and isinstance(p, float) and p > 0 for name, p in options.items())


@contextmanager
def recomputing(base: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing of a Hugging Face model inside the block; afterwards it is as before, hooks included."""
    if not on:
        yield
        return
    keywords = {"use_reentrant": False, "preserve_rng_state": has_dropout(base)}
    enable, disable = (_renamed(base, f"checkpointing_{what}") for what in ("enable", "disable"))
    enable(keywords)
    try:
        yield
    finally:
        disable()
        if hasattr(base, "_require_grads_hook"):  # transformers leaves it on the input embeddings
            base.disable_input_require_grads()


def _renamed(base: Any, what: str) -> Callable[..., None]:
    """A method that later versions of transformers call `activation_...`, and warn of the old name."""
    found: Callable[..., None] = getattr(base, f"activation_{what}", None) or getattr(base, f"gradient_{what}")
    return found


def _validate(trained: Trained, step: int, advice: str) -> list[float]:
    try:
        return trained.validate()
    except NoNumbersError as error:  # the step itself went too far
        raise UserError(f"the predictions are not finite after step {step}{advice}") from error


def _collect(state: LoopState, waiting: list[dict[str, Any]], rows: list[Tensor], names: Sequence[str]) -> str | None:
    """Move figures of finished steps into the history; returns what is not finite at the first step of which the loss
    or its gradient is not."""
    if not rows:
        return None
    for entry, values in zip(waiting, torch.stack(rows).tolist(), strict=True):
        if not all(map(math.isfinite, values[:2])):
            what = "gradient of the loss" if math.isfinite(values[0]) else "loss"
            return f"the {what} is not finite at step {entry['step']}"
        state.history.append(entry | dict(zip(names, values, strict=True)))
    waiting.clear()
    rows.clear()
    return None


def _keep_best(state: LoopState, nll: list[float], tensors: Sequence[Tensor], patience: int) -> None:
    for group, (new, old) in enumerate(zip(nll, state.best_nll, strict=True)):
        if patience and state.stale[group] >= patience:
            continue  # on its own it would have stopped
        state.stale[group] = 0 if new < old else state.stale[group] + 1
        if new < old:
            state.best_nll[group], state.best_step[group] = new, state.step
            for best, p in zip(state.best, tensors, strict=True):
                best.chunk(len(nll))[group].copy_(p.detach().chunk(len(nll))[group])


@contextmanager
def _bar(
    label: str, groups: int, steps: int, done: int, visible: bool
) -> Iterator[Callable[[int, float, float], None]]:
    """NLL of the step, of several adapters the mean, and the best on validation rows so far, of the best adapter; short
    enough for 80 columns."""
    nll = f"of {groups}: mean NLL" if groups > 1 else "NLL"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{nll} {{task.fields[loss]:.3f}}, best validation {{task.fields[best]:.3f}}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not visible) as bar:
        task = bar.add_task(label, total=steps, completed=done, loss=math.nan, best=math.nan)
        yield lambda step, loss, best: bar.update(task, completed=step, loss=loss, best=best)
