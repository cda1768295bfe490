"""Training a curve as a whole: every example at points of it, the objective over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loracurve.curve import bezier
from loracurve.curve.sampling import sample_points
from loracurve.model.curve_model import CurveModel
from loracurve.model.routes import Layout
from loracurve.system.distributed import share, sum_over_processes, world
from loracurve.system.randomness import generator, stream_seed
from loracurve.tasks.batching import Batch
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import FitConfig, passes_of
from loracurve.training.corruption import corrupt
from loracurve.training.loop import batch_numbers, has_dropout
from loracurve.training.micro_batches import (
    MicroBatch,
    Validation,
    label_count,
    micro_batch_of,
    training_batch,
    validation_points,
)
from loracurve.training.objective import objective
from loracurve.training.validation_plan import plan_validation

__all__ = ["CurveObjective"]


class CurveObjective:
    """The curve as a whole: every example at n points, the objective over them.

    Args:
        vocabulary: tokens that corruption may touch and draw.
        others: inputs without labels on which the diversity term is taken.
        tau: target of the hinge, in nats.
    """

    groups = 1
    figures: tuple[str, ...] = ("nll", "jsd")

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
        self.plan = plan_validation(config, train, validation, config.evaluation_points, passes_of(config))
        self.sets: Mapping[str, Encoded] = {"train": train, "validation": self.plan.rows} | (
            {} if others is None else {"unlabelled": others}
        )
        self.validation = Validation(model, self.plan.rows, config)
        self.synchronises = config.objective.jsd == "hinge"
        self.shares = world()[1] > 1
        # What is drawn row by row is drawn for the whole micro-batch; with one example in a row a share can be taken.
        by_row = config.corruption.kind in ("tokens", "attention")
        self.layout = replace(config, row_tokens=1) if self.shares and by_row else config

    def parts(self, step: int) -> list[MicroBatch]:
        chunks = self._chunks(self.config.seed, step, self.train)
        total = sum(label_count(self.train, chunk) for chunk in chunks)
        parts = []
        for i, chunk in enumerate(chunks):
            batch = self._batch(self.train, share(chunk))
            t, of_step = self._points(len(chunk), step, i), torch.tensor(len(batch.labels) / total)
            if self.config.layerwise:
                each = torch.stack([self._points(len(chunk), step, i, name) for name in self.model.layers])
                part = MicroBatch(batch, self.model.coefficients(each), Layout("points", len(t)), of_step)
            else:
                apart = t.dim() == 2 and batch.units is not None
                at_rows = t[:, batch.units] if apart else t
                part = micro_batch_of(self.model, batch, self.model.coefficients(at_rows), of_step)
            part.other = self._other(batch, chunk, step, i)
            parts.append(part)
        return parts

    def _batch(self, encoded: Encoded, numbers: Sequence[int]) -> Batch:
        return training_batch(self.model, encoded, numbers, self.layout)

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
        draw = generator(c.seed, "points", *layer, step, part)
        lengths = bezier.gram(p.detach() for p in self.model.factors).cpu() if c.sampling == "arc-length" else None
        t = sample_points(count, c.sampling, draw, lengths, spec.segments, spec.degree)
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

    def loss(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        log_probs = self.log_probs(part.batch, part.coefficients, part.layout)
        other = None if part.other is None else self.log_probs(part.other, part.coefficients, part.layout)
        share = part.share

        def of_all(jsd: Tensor) -> Tensor:
            total, weight = sum_over_processes(torch.stack([jsd * share, share.to(jsd)]))
            return total / weight

        whole = of_all if self.shares and self.synchronises else None
        loss, figures = objective(log_probs, part.batch.labels, self.config.objective, other, self.tau, whole)
        return loss * share, torch.stack([figures[name] for name in self.figures]) * share

    def log_probs(self, batch: Batch, coefficients: Tensor, layout: Layout) -> Tensor:
        """[n, E, C] at the points of a micro-batch; in several passes nothing is kept but these, and each pass is run
        again when its gradient is wanted (exact, as in Gao et al. 2021, arXiv 2101.06983)."""

        def run(c: Tensor, where: Layout) -> Tensor:
            return self.model.runner.scores(batch, c, where).log_softmax(-1)

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
        return bezier.coefficient_gram(self.model.spec.segments, self.model.spec.degree)


def _corrupted_share(batch: Batch, corrupted: Batch) -> Batch:
    """This process's share of a corrupted micro-batch whose rows belong to one example each; `batch` is the share."""
    rank, size = world()
    units = torch.arange(len(corrupted.input_ids)) if corrupted.units is None else corrupted.units
    own, width = units % size == rank, batch.input_ids.shape[1]
    names = ("input_ids", "attention_mask", "visible")
    found = {name: value[own, :width] for name in names if (value := getattr(corrupted, name)) is not None}
    return replace(batch, **found)
