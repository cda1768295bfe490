"""What is trained, anchors side by side or a curve: its micro-batches, losses and validations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loracurve import curve
from loracurve.batching import Batch, collate
from loracurve.bootstrap import BootstrapWeights
from loracurve.corruption import corrupt
from loracurve.distributed import share, sum_over_processes, world
from loracurve.fit_config import FitConfig, validation_points
from loracurve.inference import predict
from loracurve.loop import LoopConfig, batch_numbers, has_dropout
from loracurve.model import CurveModel
from loracurve.objective import negative_log_likelihood, objective
from loracurve.packing import packed_rows
from loracurve.randomness import generator, stream_seed
from loracurve.routes import Layout
from loracurve.sampling import sample_points
from loracurve.splits import laid_out_for
from loracurve.stepping import Part
from loracurve.tasks import Encoded

__all__ = ["CAPTURED_LENGTHS", "AnchorsProgram", "CurveProgram", "slot_seeds", "slot_times", "training_batch"]

# Captured rows are padded to multiples of this many tokens: few graphs, and tiles that tensor cores like.
CAPTURED_LENGTHS = 32


def slot_seeds(seed: int, anchors: int) -> list[int]:
    """The seeds of M anchors; anchor m is the same whatever M."""
    return [stream_seed(seed, "anchor", m) for m in range(anchors)]


def slot_times(anchors: int) -> Tensor:
    """[M] the t of M adapters on the chain through them (`CurveSpec.slots`)."""
    return torch.linspace(0, 1, anchors, dtype=torch.float64) if anchors > 1 else torch.zeros(1, dtype=torch.float64)


class Validation:
    """Validation batches, laid out once; NLL of points and of their average."""

    def __init__(self, model: CurveModel, encoded: Encoded, config: LoopConfig) -> None:
        self.model = model
        self.count = encoded.token_offsets[-1] if encoded.scoring == "lm" else len(encoded)
        self.summarise = encoded.scoring == "lm"
        self.batches = laid_out_for(model, encoded, config.row_tokens)
        self.labels = torch.tensor([-100 if e.label is None else e.label for e in encoded.examples])

    def predictive(self, t: Tensor, weights: Tensor | None = None):  # type: ignore[no-untyped-def]
        summarise, count = self.summarise, self.count
        return predict(self.model, self.batches, t, weights, summarise=summarise, examples=count, shared=True)


class AnchorsProgram:
    """M independent adapters in one pass: slot m sees its own mini-batches; the loss is the sum of the slots' means."""

    figures = ("nll",)
    synchronises = False

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
        self.validation = Validation(model, validation, config)
        self.seeds = slot_seeds(config.seed, anchors)

    def parts(self, step: int) -> list[Part]:
        c = self.config
        drawn = [batch_numbers(s, step, len(self.train), c.batch_size) for s in self.seeds]
        batches = []
        for places in torch.arange(c.batch_size).chunk(c.accumulation):
            mine = share(places.tolist())
            numbers = [numbers[i] for numbers in drawn for i in mine]
            slots = [m for m in range(self.groups) for _ in mine]
            batches.append(training_batch(self.model, self.train, numbers, c, slots, even_rows=True))
        of_examples = [b.slots for b in batches if b.slots is not None]
        counts = torch.tensor([_labels(self.train, numbers) for numbers in drawn])
        eye = torch.eye(self.groups, dtype=torch.float64)
        parts = [
            _part_of(self.model, b, eye, 1 / counts[s].double()) for b, s in zip(batches, of_examples, strict=True)
        ]
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


class CurveProgram:
    """The curve as a whole: every example at n points, the objective over them.

    Args:
        vocabulary: tokens that corruption may touch and draw.
        others: inputs without labels on which the diversity term is taken.
        tau: target of the hinge, in nats.
    """

    groups = 1
    figures = ("nll", "jsd")
    even_rows = False
    """every batch of a size fills as many rows (`training_batch`)"""

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
        self.validation = Validation(model, validation, config)
        self.bootstrap = config.bootstrap.weights(config.seed, model.spec.anchor_times)
        self.synchronises = config.objective.jsd == "hinge"
        self.shares = world()[1] > 1
        # What is drawn row by row is drawn for the whole micro-batch; with one example in a row a share can be taken.
        by_row = config.corruption.kind in ("tokens", "attention")
        self.layout = replace(config, row_tokens=1) if self.shares and by_row else config

    def parts(self, step: int) -> list[Part]:
        chunks = self._chunks(self.config.seed, step, self.train)
        total = sum(_labels(self.train, chunk) for chunk in chunks)
        parts = []
        for i, chunk in enumerate(chunks):
            batch = self._batch(self.train, share(chunk))
            t, of_step = self._points(len(chunk), step, i), torch.tensor(len(batch.labels) / total)
            if self.config.layerwise:
                each = torch.stack([self._points(len(chunk), step, i, name) for name in self.model.layers])
                part = Part(batch, self.model.coefficients(each), Layout("points", len(t)), of_step)
            else:
                apart = t.dim() == 2 and batch.units is not None
                at_rows = t[:, batch.units] if apart else t
                part = _part_of(self.model, batch, self.model.coefficients(at_rows), of_step)
            if self.bootstrap is not None:
                at = t if t.dim() == 1 else t[:, _units(batch)]
                part.weights = self.bootstrap.weights(_numbers(self.train, batch), at)
            part.other = self._other(batch, chunk, step, i)
            parts.append(part)
        return parts

    def _batch(self, encoded: Encoded, numbers: Sequence[int]) -> Batch:
        return training_batch(self.model, encoded, numbers, self.layout, even_rows=self.even_rows)

    def _chunks(self, seed: int, step: int, encoded: Encoded) -> list[list[int]]:
        c = self.config
        numbers = torch.tensor(batch_numbers(seed, step, len(encoded), c.batch_size))
        return [chunk.tolist() for chunk in numbers.chunk(c.accumulation)]

    def _points(self, examples: int, step: int, part: int, *layer: str) -> Tensor:
        """The t of a micro-batch: [n] shared by all examples, or [n, E]; of one layer where each has its own.

        They are drawn for all its `examples`; [n, E] are those of this process's share of them.
        """
        c, spec = self.config, self.model.spec
        count = (c.points,) if c.share_points else (c.points, examples)
        # The points of all steps are one sequence of one stream; other ways draw anew.
        sequence = c.sampling == "quasi-random"
        draw = generator(c.seed, "points", *layer, *(() if sequence else (step, part)))
        most = 1 if c.share_points else -(-c.batch_size // c.accumulation)
        start = (step * c.accumulation + part) * c.points * most
        lengths = curve.gram(p.detach() for p in self.model.factors).cpu() if c.sampling == "arc-length" else None
        t = sample_points(count, c.sampling, draw, lengths, spec.segments, spec.degree, start if sequence else 0)
        return t[:, share(range(examples))] if self.shares and not c.share_points else t

    def _other(self, batch: Batch, chunk: list[int], step: int, part: int) -> Batch | None:
        """The inputs on which the diversity term is taken; `batch` is this process's share of the examples `chunk`."""
        kind, seed = self.config.corruption.kind, self.config.seed
        if kind == "none":
            return None
        if kind == "text":
            assert self.others is not None
            others = self._chunks(stream_seed(seed, "unlabelled"), step, self.others)[part]
            return self._batch(self.others, share(others))
        assert self.vocabulary is not None
        draw = generator(seed, "corruption", step, part)
        whole = self._batch(self.train, chunk) if self.shares else batch
        copy, visible = corrupt(whole, kind, self.config.corruption.rate, self.vocabulary, draw)
        copy = copy if copy.attention_mask is not None else replace(copy, visible=visible)
        return _corrupted_share(batch, copy) if self.shares else copy

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        log_probs = self.log_probs(part.batch, part.coefficients, part.layout)
        other = None if part.other is None else self.log_probs(part.other, part.coefficients, part.layout)
        return self.loss_of(log_probs, other, part.batch.labels, part.weights, part.share)

    def loss_of(
        self, log_probs: Tensor, other: Tensor | None, labels: Tensor, weights: Tensor | None, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`loss` of a micro-batch from its log-probabilities [n, E, C], and those of its other inputs."""

        def of_all(jsd: Tensor) -> Tensor:
            total, weight = sum_over_processes(torch.stack([jsd * share, share.to(jsd)]))
            return total / weight

        whole = of_all if self.shares and self.synchronises else None
        loss, figures = objective(log_probs, labels, self.config.objective, weights, other, self.tau, whole)
        return loss * share, torch.stack([figures[name] for name in self.figures]) * share

    def log_probs(self, batch: Batch, coefficients: Tensor, layout: Layout) -> Tensor:
        """[n, E, C] at the points of a micro-batch; in several passes nothing is kept but these, and each pass is run
        again when its gradient is wanted (exact, as in Gao et al. 2021, arXiv 2101.06983)."""

        def run(c: Tensor, where: Layout) -> Tensor:
            return self.model.scores(batch, c, where).log_softmax(-1)

        passes, n = self.config.point_passes, layout.replicas
        if passes == 1:
            return run(coefficients, layout)
        several = coefficients.dim() == 2 and len(coefficients) > n  # of each point, by rows or groups of them
        by_point = coefficients.unflatten(0, (n, -1)) if several else coefficients
        found, keep = [], has_dropout(self.model.model)
        for part in by_point.chunk(passes, dim=1 if self.config.layerwise else 0):
            points = part.shape[1 if self.config.layerwise else 0]
            own = part.flatten(0, 1) if several else part
            found.append(
                checkpoint(run, own, Layout(layout.kind, points), use_reentrant=False, preserve_rng_state=keep)
            )
        return torch.cat(found)

    def validate(self) -> list[float]:
        predictive = self.validation.predictive(*validation_points(self.config.evaluation_points, self.model.spec))
        labels = None if self.validation.summarise else self.validation.labels
        return [float(predictive.negative_log_likelihood(labels).mean())]

    def decay_gram(self) -> Tensor:
        return curve.coefficient_gram(self.model.spec.segments, self.model.spec.degree)


def _labels(encoded: Encoded, numbers: Sequence[int]) -> int:
    """Labels of so many examples: one each, or all tokens of a text."""
    if encoded.scoring != "lm":
        return len(numbers)
    return sum(len(encoded.examples[i].choices[0]) for i in numbers)


def _corrupted_share(batch: Batch, corrupted: Batch) -> Batch:
    """This process's share of a corrupted micro-batch whose rows belong to one example each; `batch` is the share."""
    rank, size = world()
    units = torch.arange(len(corrupted.input_ids)) if corrupted.units is None else corrupted.units
    own, width = units % size == rank, batch.input_ids.shape[1]
    names = ("input_ids", "attention_mask", "visible")
    found = {name: value[own, :width] for name in names if (value := getattr(corrupted, name)) is not None}
    return replace(batch, **found)


def training_batch(
    model: CurveModel,
    encoded: Encoded,
    numbers: Sequence[int],
    config: LoopConfig,
    slots: list[int] | None = None,
    even_rows: bool = False,
) -> Batch:
    """A training batch: packed where that saves work, of few shapes where steps are captured, or with as many rows as
    any other of its size."""
    captured = config.capture and model.device.type == "cuda"
    own_points = isinstance(config, FitConfig) and not config.share_points
    if not (captured or even_rows):
        return collate(encoded, numbers, config.row_tokens, model.supports_trees, slots, own_points=own_points)
    # Captured, an example with a point of its own has a row of its own; so has a text, with any number of read-outs.
    apart = captured and (encoded.scoring == "lm" or own_points)
    row_tokens = 1 if apart else config.row_tokens
    examples = -(-config.batch_size // (config.accumulation * world()[1]))
    rows = packed_rows(encoded, examples, row_tokens)
    pad_to = CAPTURED_LENGTHS if captured else 1
    return collate(encoded, numbers, row_tokens, model.supports_trees, slots, pad_to, rows)


def _numbers(encoded: Encoded, batch: Batch) -> Tensor:
    """[E] number of each example of a batch in its split; all tokens of a text have its number."""
    if encoded.scoring != "lm":
        return batch.index
    return torch.bucketize(batch.index, torch.tensor(encoded.token_offsets[1:]), right=True)


def _units(batch: Batch) -> Tensor:
    """[E] the text (its place in the micro-batch) of each example of a batch: itself, or that of a token."""
    if batch.scoring != "lm":
        return torch.arange(len(batch.labels))
    assert batch.positions is not None
    return batch.rows if batch.token_units is None else batch.token_units.flatten()[batch.positions]


def _part_of(model: CurveModel, batch: Batch, coefficients: Tensor, share: Tensor) -> Part:
    arranged, layout = model.arrange(batch, coefficients)
    assert arranged is not None
    return Part(batch, arranged, layout, share)
