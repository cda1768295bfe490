"""Fitting anchors and curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loracurve import curve
from loracurve.batching import Batch, collate, evaluation_batches
from loracurve.errors import UserError
from loracurve.inference import predict, quadrature
from loracurve.loop import FitResult, LoopConfig, batch_numbers, run_loop
from loracurve.model import CurveModel
from loracurve.objective import ObjectiveConfig, negative_log_likelihood, objective
from loracurve.randomness import generator, stream_seed
from loracurve.tasks import Encoded, Task

__all__ = ["FitConfig", "fit", "fit_anchors", "sample_points", "slot_seeds", "slot_times"]

Sampling = Literal["stratified", "uniform"]


@dataclass(frozen=True)
class FitConfig(LoopConfig):
    """How a curve is trained."""

    points: int = 2
    """Points of the curve at which each example is seen in a step."""
    share_points: bool = True
    """All rows of a batch are run at the same points; otherwise each row has its own."""
    sampling: Sampling = "stratified"
    """How points are drawn: one from each of as many equal parts of [0, 1] as there are, or uniformly."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Diversity term beside the likelihood."""
    evaluation_points: int = 5
    """Points of the model average that is validated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 1 or self.evaluation_points < 1:
            raise UserError(f"points: expected at least 1, found {min(self.points, self.evaluation_points)}")
        if self.objective.jsd != "none" and self.points < 2:
            raise UserError(f"a JSD term needs points >= 2, found {self.points}")


def slot_seeds(seed: int, anchors: int) -> list[int]:
    """The seeds of M anchors; anchor m is the same whatever M."""
    return [stream_seed(seed, "anchor", m) for m in range(anchors)]


def slot_times(anchors: int) -> Tensor:
    """[M] the t of M adapters on the chain through them (`CurveSpec.slots`)."""
    return torch.linspace(0, 1, anchors, dtype=torch.float64) if anchors > 1 else torch.zeros(1, dtype=torch.float64)


def sample_points(count: tuple[int, ...], sampling: Sampling, draw: torch.Generator) -> Tensor:
    """Curve points of shape `count` in [0, 1], float64; stratified points ascend in reading order."""
    total = int(torch.tensor(count).prod())
    u = torch.rand(total, generator=draw, dtype=torch.float64)
    if sampling == "stratified":
        u = (torch.arange(total) + u) / total
    return u.view(count)


class _Validation:
    """Validation batches, laid out once; NLL of points and of their average."""

    def __init__(self, model: CurveModel, encoded: Encoded, config: LoopConfig) -> None:
        self.model = model
        self.count = encoded.token_offsets[-1] if encoded.scoring == "lm" else len(encoded)
        self.summarise = encoded.scoring == "lm"
        self.batches = list(evaluation_batches(encoded, row_tokens=config.row_tokens, packing=model.supports_trees))
        order = torch.cat([b.index for b in self.batches]).argsort()
        self.labels = torch.cat([b.labels for b in self.batches])[order]

    def predictive(self, t: Tensor, weights: Tensor | None = None):  # type: ignore[no-untyped-def]
        return predict(self.model, self.batches, t, weights, summarise=self.summarise, examples=self.count)


class _Anchors:
    """M independent adapters in one pass: slot m sees its own mini-batches; the loss is the sum of the slots' means."""

    def __init__(
        self, model: CurveModel, train: Encoded, validation: Encoded, config: LoopConfig, anchors: int
    ) -> None:
        self.model, self.train, self.config, self.groups = model, train, config, anchors
        self.validation = _Validation(model, validation, config)
        self.seeds = slot_seeds(config.seed, anchors)

    def batches(self, step: int) -> list[Batch]:
        c = self.config
        drawn = [batch_numbers(s, step, len(self.train), c.batch_size) for s in self.seeds]
        parts = []
        for part in torch.arange(c.batch_size).chunk(c.accumulation):
            numbers = [numbers[i] for numbers in drawn for i in part.tolist()]
            slots = [m for m in range(self.groups) for _ in part]
            parts.append(collate(self.train, numbers, c.row_tokens, self.model.supports_trees, slots))
        return parts

    def loss(self, step: int, part: int, batch: Batch, examples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        eye = torch.eye(self.groups, dtype=torch.float64)
        log_probs = self.model.scores(batch, eye).log_softmax(-1)
        nll = negative_log_likelihood(log_probs, batch.labels)[0]
        return (nll / examples[batch.slots]).sum(), {"nll": nll.detach().mean()}

    def validate(self) -> list[float]:
        predictive = self.validation.predictive(slot_times(self.groups))
        if self.validation.summarise:
            return (-predictive.label_log_probs.double().mean(1)).tolist()
        nll = negative_log_likelihood(predictive.point_log_probs, self.validation.labels)
        return nll.double().mean(1).tolist()

    def decay_gram(self) -> Tensor:
        return torch.eye(self.groups, dtype=torch.float64)


class _Curve:
    """The curve as a whole: every example at n points, the objective over them."""

    groups = 1

    def __init__(self, model: CurveModel, train: Encoded, validation: Encoded, config: FitConfig) -> None:
        self.model, self.train, self.config = model, train, config
        self.validation = _Validation(model, validation, config)

    def batches(self, step: int) -> list[Batch]:
        c = self.config
        numbers = batch_numbers(c.seed, step, len(self.train), c.batch_size)
        parts = torch.tensor(numbers).chunk(c.accumulation)
        return [collate(self.train, part.tolist(), c.row_tokens, self.model.supports_trees) for part in parts]

    def loss(self, step: int, part: int, batch: Batch, examples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        draw = generator(c.seed, "points", step, part)
        if c.share_points:
            t = sample_points((c.points,), c.sampling, draw)
        elif batch.units is None:
            t = sample_points((c.points, len(batch.input_ids)), c.sampling, draw)
        else:
            t = sample_points((c.points, len(batch.labels)), c.sampling, draw)[:, batch.units.cpu()]
        log_probs = self.model.scores(batch, self.model.coefficients(t)).log_softmax(-1)
        loss, figures = objective(log_probs, batch.labels, c.objective)
        return loss * len(batch.labels) / examples.sum(), figures

    def validate(self) -> list[float]:
        t, weights = quadrature("uniform", self.config.evaluation_points, self.model.spec.segments)
        predictive = self.validation.predictive(t, weights)
        labels = None if self.validation.summarise else self.validation.labels
        return [float(predictive.negative_log_likelihood(labels).mean())]

    def decay_gram(self) -> Tensor:
        return curve.coefficient_gram(self.model.spec.segments, self.model.spec.degree)


def fit_anchors(
    model: CurveModel, task: Task, config: LoopConfig | None = None, folder: Path | None = None, **loop: object
) -> FitResult:
    """Fine-tune the M adapters of a model made with `CurveSpec.slots(M)`, side by side in one pass.

    Each adapter has its own initial draw, data order, clipping, validation and best snapshot; the result equals M
    separate fine-tunes. Adapters start from fresh draws by `slot_seeds`.

    Args:
        model: its control points are replaced.
        task: with train and validation rows.
        config: steps, batch size, learning rate, ...
        folder: for checkpoints; a run is resumed from what is there.
        loop: `progress`, `label`, `accelerator`, passed to the loop.
    """
    from loracurve.lora_space import initial_control_points

    config = config or LoopConfig()
    anchors = model.spec.size
    points = initial_control_points(model.layers, slot_seeds(config.seed, anchors), model.config.init_lora_weights)
    model.set_curve(model.spec, points)
    program = _Anchors(model, task.encode("train"), task.encode("validation"), config, anchors)
    return run_loop(model, program, config, folder, **{"label": "anchors", **loop})  # type: ignore[arg-type]


def fit(
    model: CurveModel, task: Task, config: FitConfig | None = None, folder: Path | None = None, **loop: object
) -> FitResult:
    """Train a curve: all control points of a free one, the inner ones of an anchored one.

    Args:
        model: from `CurveModel.from_config` or `CurveModel.from_adapters`.
        task: with train and validation rows.
        config, folder, loop: as for `fit_anchors`.

    Raises:
        UserError: the loss is not finite (the last good state is kept), nothing is trainable.
    """
    config = config or FitConfig()
    if not model.spec.mask.any():
        raise UserError("no control point is trainable: an anchored polygonal chain (degree 1) has no inner points")
    program = _Curve(model, task.encode("train"), task.encode("validation"), config)
    return run_loop(model, program, config, folder, **{"label": "curve", **loop})  # type: ignore[arg-type]
