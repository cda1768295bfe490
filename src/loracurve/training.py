"""Fitting anchors and curves."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from loracurve import curve
from loracurve.batching import Batch, collate, evaluation_batches
from loracurve.errors import UserError
from loracurve.fit_config import FitConfig
from loracurve.inference import predict, quadrature
from loracurve.loop import FitResult, LoopConfig, batch_numbers, run_loop
from loracurve.model import CurveModel
from loracurve.objective import negative_log_likelihood, objective
from loracurve.perturbation import Perturbation
from loracurve.randomness import generator, stream_seed
from loracurve.sampling import sample_points
from loracurve.stepping import Part
from loracurve.tasks import Encoded, Task

__all__ = ["FitConfig", "fit", "fit_anchors", "slot_seeds", "slot_times"]

# Captured rows are padded to multiples of this many tokens: few graphs, and tiles that tensor cores like.
CAPTURED_LENGTHS = 32


def slot_seeds(seed: int, anchors: int) -> list[int]:
    """The seeds of M anchors; anchor m is the same whatever M."""
    return [stream_seed(seed, "anchor", m) for m in range(anchors)]


def slot_times(anchors: int) -> Tensor:
    """[M] the t of M adapters on the chain through them (`CurveSpec.slots`)."""
    return torch.linspace(0, 1, anchors, dtype=torch.float64) if anchors > 1 else torch.zeros(1, dtype=torch.float64)


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

    figures = ("nll",)

    def __init__(
        self, model: CurveModel, train: Encoded, validation: Encoded, config: LoopConfig, anchors: int
    ) -> None:
        self.model, self.train, self.config, self.groups = model, train, config, anchors
        self.validation = _Validation(model, validation, config)
        self.seeds = slot_seeds(config.seed, anchors)

    def parts(self, step: int) -> list[Part]:
        c = self.config
        drawn = [batch_numbers(s, step, len(self.train), c.batch_size) for s in self.seeds]
        batches = []
        for part in torch.arange(c.batch_size).chunk(c.accumulation):
            numbers = [numbers[i] for numbers in drawn for i in part.tolist()]
            slots = [m for m in range(self.groups) for _ in part]
            batches.append(_collate(self.model, self.train, numbers, c, slots))
        of_examples = [b.slots for b in batches if b.slots is not None]
        counts = torch.bincount(torch.cat(of_examples), minlength=self.groups)
        eye = torch.eye(self.groups, dtype=torch.float64)
        return [_part(self.model, b, eye, 1 / counts[s].double()) for b, s in zip(batches, of_examples, strict=True)]

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        log_probs = self.model.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
        nll = negative_log_likelihood(log_probs, part.batch.labels)[0]
        loss = (nll * part.share.to(nll.dtype)).sum()
        return loss, loss.detach()[None] / self.groups

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
    figures = ("nll", "jsd")

    def __init__(self, model: CurveModel, train: Encoded, validation: Encoded, config: FitConfig) -> None:
        self.model, self.train, self.config = model, train, config
        self.validation = _Validation(model, validation, config)

    def parts(self, step: int) -> list[Part]:
        c = self.config
        numbers = batch_numbers(c.seed, step, len(self.train), c.batch_size)
        chunks = torch.tensor(numbers).chunk(c.accumulation)
        batches = [_collate(self.model, self.train, chunk.tolist(), c) for chunk in chunks]
        total = sum(len(b.labels) for b in batches)
        return [
            _part(self.model, b, self._coefficients(b, step, i), torch.tensor(len(b.labels) / total))
            for i, b in enumerate(batches)
        ]

    def _coefficients(self, batch: Batch, step: int, part: int) -> Tensor:
        c, spec = self.config, self.model.spec
        if c.share_points:
            count: tuple[int, ...] = (c.points,)
        else:
            count = (c.points, len(batch.input_ids if batch.units is None else batch.labels))
        # The points of all steps are one sequence of one stream; other ways draw anew.
        sequence = c.sampling == "quasi-random"
        draw = generator(c.seed, "points", *(() if sequence else (step, part)))
        rows = 1 if c.share_points else -(-c.batch_size // c.accumulation)
        start = (step * c.accumulation + part) * c.points * rows
        lengths = curve.gram(p.detach() for p in self.model.factors).cpu() if c.sampling == "arc-length" else None
        t = sample_points(count, c.sampling, draw, lengths, spec.segments, spec.degree, start if sequence else 0)
        return self.model.coefficients(t if c.share_points or batch.units is None else t[:, batch.units])

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        log_probs = self.model.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
        loss, figures = objective(log_probs, part.batch.labels, self.config.objective)
        return loss * part.share, torch.stack([figures[name] for name in self.figures]) * part.share

    def validate(self) -> list[float]:
        t, weights = quadrature("uniform", self.config.evaluation_points, self.model.spec.segments)
        predictive = self.validation.predictive(t, weights)
        labels = None if self.validation.summarise else self.validation.labels
        return [float(predictive.negative_log_likelihood(labels).mean())]

    def decay_gram(self) -> Tensor:
        return curve.coefficient_gram(self.model.spec.segments, self.model.spec.degree)


def _collate(
    model: CurveModel, encoded: Encoded, numbers: list[int], config: LoopConfig, slots: list[int] | None = None
) -> Batch:
    """A training batch: packed where that saves work, of few shapes where steps are captured."""
    if config.capture and model.device.type == "cuda":
        return collate(encoded, numbers, 1, model.supports_trees, slots, pad_to=CAPTURED_LENGTHS)
    return collate(encoded, numbers, config.row_tokens, model.supports_trees, slots)


def _part(model: CurveModel, batch: Batch, coefficients: Tensor, share: Tensor) -> Part:
    arranged, layout = model.arrange(batch, coefficients)
    assert arranged is not None
    return Part(batch, arranged, layout, share)


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
    accelerator = loop.setdefault("accelerator", Accelerator())
    assert isinstance(accelerator, Accelerator)
    model.to(accelerator.device)  # where the noise is drawn
    noise = Perturbation(config.perturbation, model.layers, config.steps, config.seed)
    with noise.attached():
        options = {"label": "curve", "perturbation": None if config.perturbation.kind == "none" else noise, **loop}
        return run_loop(model, program, config, folder, **options)  # type: ignore[arg-type]
