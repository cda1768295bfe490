"""Fitting anchors and curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from loracurve import curve
from loracurve.batching import Batch, collate, evaluation_batches, packed_rows
from loracurve.bootstrap import BootstrapWeights
from loracurve.corruption import corrupt, ordinary_tokens, unlabelled
from loracurve.errors import UserError
from loracurve.fit_config import FitConfig
from loracurve.inference import predict, quadrature
from loracurve.layers import Layout
from loracurve.loop import FitResult, LoopConfig, batch_numbers, run_loop
from loracurve.model import CurveModel
from loracurve.objective import ObjectiveConfig, negative_log_likelihood, objective, resolve_tau
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
        self,
        model: CurveModel,
        train: Encoded,
        validation: Encoded,
        config: LoopConfig,
        anchors: int,
        bootstrap: BootstrapWeights | None = None,
    ) -> None:
        self.model, self.train, self.config, self.groups, self.bootstrap = model, train, config, anchors, bootstrap
        self.validation = _Validation(model, validation, config)
        self.seeds = slot_seeds(config.seed, anchors)

    def parts(self, step: int) -> list[Part]:
        c = self.config
        drawn = [batch_numbers(s, step, len(self.train), c.batch_size) for s in self.seeds]
        batches = []
        for places in torch.arange(c.batch_size).chunk(c.accumulation):
            numbers = [numbers[i] for numbers in drawn for i in places.tolist()]
            slots = [m for m in range(self.groups) for _ in places]
            batches.append(_collate(self.model, self.train, numbers, c, slots))
        of_examples = [b.slots for b in batches if b.slots is not None]
        counts = torch.bincount(torch.cat(of_examples), minlength=self.groups)
        eye = torch.eye(self.groups, dtype=torch.float64)
        parts = [_part(self.model, b, eye, 1 / counts[s].double()) for b, s in zip(batches, of_examples, strict=True)]
        if self.bootstrap is not None:
            times = slot_times(self.groups)
            for part, own in zip(parts, of_examples, strict=True):
                part.weights = self.bootstrap.weights(_numbers(self.train, part.batch), times[own][None])[0]
        return parts

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        log_probs = self.model.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
        nll = negative_log_likelihood(log_probs, part.batch.labels)[0]
        each = nll * part.share.to(nll.dtype)
        loss = (each if part.weights is None else each * part.weights.to(each)).sum()
        return loss, each.detach().sum()[None] / self.groups

    def validate(self) -> list[float]:
        predictive = self.validation.predictive(slot_times(self.groups))
        if self.validation.summarise:
            return (-predictive.label_log_probs.double().mean(1)).tolist()
        nll = negative_log_likelihood(predictive.point_log_probs, self.validation.labels)
        return nll.double().mean(1).tolist()

    def decay_gram(self) -> Tensor:
        return torch.eye(self.groups, dtype=torch.float64)


class _Curve:
    """The curve as a whole: every example at n points, the objective over them.

    Args:
        vocabulary: tokens that corruption may touch and draw.
        others: inputs without labels on which the diversity term is taken.
        tau: target of the hinge, in nats.
    """

    groups = 1
    figures = ("nll", "jsd")

    def __init__(
        self,
        model: CurveModel,
        train: Encoded,
        validation: Encoded,
        config: FitConfig,
        vocabulary: Tensor | None = None,
        others: Encoded | None = None,
        tau: float | None = None,
    ) -> None:
        self.model, self.train, self.config = model, train, config
        self.vocabulary, self.others, self.tau = vocabulary, others, tau
        self.validation = _Validation(model, validation, config)
        self.bootstrap = config.bootstrap.weights(config.seed, model.spec.anchor_times)

    def parts(self, step: int) -> list[Part]:
        chunks = self._chunks(self.config.seed, step, self.train)
        batches = [_collate(self.model, self.train, chunk, self.config) for chunk in chunks]
        total = sum(len(b.labels) for b in batches)
        parts = []
        for i, batch in enumerate(batches):
            t, share = self._points(batch, step, i), torch.tensor(len(batch.labels) / total)
            if self.config.layerwise:
                each = torch.stack([self._points(batch, step, i, name) for name in self.model.layers])
                part = Part(batch, self.model.coefficients(each), Layout("points", len(t)), share)
            else:
                part = _part(self.model, batch, self.model.coefficients(t), share)
            if self.bootstrap is not None:
                at = t if t.dim() == 1 else t[:, batch.rows]
                part.weights = self.bootstrap.weights(_numbers(self.train, batch), at)
            part.other = self._other(batch, step, i)
            parts.append(part)
        return parts

    def _chunks(self, seed: int, step: int, encoded: Encoded) -> list[list[int]]:
        c = self.config
        numbers = torch.tensor(batch_numbers(seed, step, len(encoded), c.batch_size))
        return [chunk.tolist() for chunk in numbers.chunk(c.accumulation)]

    def _points(self, batch: Batch, step: int, part: int, *layer: str) -> Tensor:
        """The t of a micro-batch: [n] shared by all rows, or [n, N]; of one layer where each has its own."""
        c, spec = self.config, self.model.spec
        if c.share_points:
            count: tuple[int, ...] = (c.points,)
        else:
            count = (c.points, len(batch.input_ids if batch.units is None else batch.labels))
        # The points of all steps are one sequence of one stream; other ways draw anew.
        sequence = c.sampling == "quasi-random"
        draw = generator(c.seed, "points", *layer, *(() if sequence else (step, part)))
        rows = 1 if c.share_points else -(-c.batch_size // c.accumulation)
        start = (step * c.accumulation + part) * c.points * rows
        lengths = curve.gram(p.detach() for p in self.model.factors).cpu() if c.sampling == "arc-length" else None
        t = sample_points(count, c.sampling, draw, lengths, spec.segments, spec.degree, start if sequence else 0)
        return t if c.share_points or batch.units is None else t[:, batch.units]

    def _other(self, batch: Batch, step: int, part: int) -> Batch | None:
        """The inputs on which the diversity term is taken."""
        kind, seed = self.config.corruption.kind, self.config.seed
        if kind == "none":
            return None
        if kind == "text":
            assert self.others is not None
            chunk = self._chunks(stream_seed(seed, "unlabelled"), step, self.others)[part]
            return _collate(self.model, self.others, chunk, self.config)
        assert self.vocabulary is not None
        draw = generator(seed, "corruption", step, part)
        copy, visible = corrupt(batch, kind, self.config.corruption.rate, self.vocabulary, draw)
        return copy if copy.attention_mask is not None else replace(copy, visible=visible)

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        log_probs = self.model.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
        other: Tensor | None = None
        if part.other is not None:
            other = self.model.scores(part.other, part.coefficients, part.layout).log_softmax(-1)
        labels, config = part.batch.labels, self.config.objective
        loss, figures = objective(log_probs, labels, config, part.weights, other, self.tau)
        return loss * part.share, torch.stack([figures[name] for name in self.figures]) * part.share

    def validate(self) -> list[float]:
        spec = self.model.spec
        t, weights = quadrature("uniform", self.config.evaluation_points, spec.segments, closed=spec.closed)
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
        # An example with a point of its own has a row of its own; so has a text, whose read-outs come in any number.
        apart = encoded.scoring == "lm" or (isinstance(config, FitConfig) and not config.share_points)
        row_tokens = 1 if apart else config.row_tokens
        rows = packed_rows(encoded, -(-config.batch_size // config.accumulation), row_tokens)
        return collate(encoded, numbers, row_tokens, model.supports_trees, slots, CAPTURED_LENGTHS, rows)
    return collate(encoded, numbers, config.row_tokens, model.supports_trees, slots)


def _numbers(encoded: Encoded, batch: Batch) -> Tensor:
    """[E] number of each example of a batch in its split; all tokens of a text have its number."""
    if encoded.scoring != "lm":
        return batch.index
    return torch.bucketize(batch.index, torch.tensor(encoded.token_offsets[1:]), right=True)


def _part(model: CurveModel, batch: Batch, coefficients: Tensor, share: Tensor) -> Part:
    arranged, layout = model.arrange(batch, coefficients)
    assert arranged is not None
    return Part(batch, arranged, layout, share)


def fit_anchors(
    model: CurveModel,
    task: Task,
    config: LoopConfig | None = None,
    folder: Path | None = None,
    bootstrap: BootstrapWeights | None = None,
    **loop: object,
) -> FitResult:
    """Fine-tune the M adapters of a model made with `CurveSpec.slots(M)`, side by side in one pass.

    Each adapter has its own initial draw, data order, clipping, validation and best snapshot; the result equals M
    separate fine-tunes. Adapters start from fresh draws by `slot_seeds`.

    Args:
        model: its control points are replaced.
        task: with train and validation rows.
        config: steps, batch size, learning rate, ...
        folder: for checkpoints; a run is resumed from what is there.
        bootstrap: adapter m is trained with the weights at its t (`slot_times`); its validation stays unweighted.
        loop: `progress`, `label`, `accelerator`, passed to the loop.
    """
    from loracurve.lora_space import initial_control_points

    config = config or LoopConfig()
    anchors = model.spec.size
    points = initial_control_points(model.layers, slot_seeds(config.seed, anchors), model.config.init_lora_weights)
    model.set_curve(model.spec, points)
    program = _Anchors(model, task.encode("train"), task.encode("validation"), config, anchors, bootstrap)
    return run_loop(model, program, config, folder, **{"label": "anchors", **loop})  # type: ignore[arg-type]


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

    Raises:
        UserError: the loss is not finite (the last good state is kept), nothing is trainable, options that do not suit
            the curve, a file of other inputs that cannot be read.
    """
    config = config or FitConfig()
    if not model.spec.mask.any():
        raise UserError("no control point is trainable: an anchored polygonal chain (degree 1) has no inner points")
    config.check_curve(model.spec)
    accelerator = loop.setdefault("accelerator", Accelerator())
    assert isinstance(accelerator, Accelerator)
    model.to(accelerator.device)  # where the noise is drawn
    corruption = config.corruption
    vocabulary = ordinary_tokens(task.tokenizer) if corruption.kind in ("tokens", "attention") else None
    others = None if corruption.file is None else unlabelled(task, corruption.file)
    program = _Curve(model, task.encode("train"), task.encode("validation"), config, vocabulary, others)
    settled: dict[str, float] = {}
    if config.objective.jsd == "hinge":
        settled = _hinge_target(program, config.objective)
        program.tau = settled["tau"]
    noise = Perturbation(config.perturbation, model.layers, config.steps, config.seed)
    with noise.attached():
        options = {"label": "curve", "perturbation": None if config.perturbation.kind == "none" else noise, **loop}
        result = run_loop(model, program, config, folder, **options)  # type: ignore[arg-type]
    result.settled = settled
    return result


def _hinge_target(program: _Curve, config: ObjectiveConfig) -> dict[str, float]:
    """The hinge's target in nats, and the anchors' divergence where it was measured for it."""
    if config.tau > 0:
        return {"tau": config.tau}
    spec = program.model.spec
    times = spec.anchor_times[:-1] if spec.closed else spec.anchor_times
    jsd = float(program.validation.predictive(torch.tensor(times, dtype=torch.float64)).pairwise_jsd.mean())
    return {"tau": resolve_tau(config, jsd), "anchor_jsd": jsd}
