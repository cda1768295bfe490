"""Several independent adapters trained side by side in one pass: the anchors of a curve, and the deep ensemble."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loracurve.curve.anchored import slot_times
from loracurve.inference.information import negative_log_likelihood
from loracurve.model.curve_model import CurveModel
from loracurve.system.distributed import share
from loracurve.system.randomness import stream_seed
from loracurve.tasks.batching import Batch
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import LoopConfig
from loracurve.training.loop import batch_numbers
from loracurve.training.micro_batches import MicroBatch, Validation, label_count, micro_batch_of, training_batch
from loracurve.training.validation_plan import plan_validation

__all__ = ["AnchorsObjective", "slot_seeds"]


def slot_seeds(seed: int, anchors: int) -> list[int]:
    """The seeds of M anchors; anchor m is the same whatever M."""
    return [stream_seed(seed, "anchor", m) for m in range(anchors)]


class AnchorsObjective:
    """M independent adapters in one pass: slot m sees its own mini-batches; the loss is the sum of the slots' means."""

    figures: tuple[str, ...] = ("nll",)
    synchronises = False

    def __init__(
        self,
        model: CurveModel,
        train: Encoded,
        validation: Encoded,
        config: LoopConfig,
        anchors: int,
    ) -> None:
        self.model, self.train, self.config, self.groups = model, train, config, anchors
        self.plan = plan_validation(config, train, validation)
        self.sets: Mapping[str, Encoded] = {"train": train, "validation": self.plan.rows}
        self.validation = Validation(model, self.plan.rows, config)
        self.seeds = slot_seeds(config.seed, anchors)

    def parts(self, step: int) -> list[MicroBatch]:
        c = self.config
        drawn = [batch_numbers(s, step, len(self.train), c.batch_size) for s in self.seeds]
        batches = []
        for places in torch.arange(c.batch_size).chunk(c.accumulation):
            mine = share(places.tolist())
            numbers = [numbers[i] for numbers in drawn for i in mine]
            slots = [m for m in range(self.groups) for _ in mine]
            batches.append(training_batch(self.model, self.train, numbers, c, slots, even_rows=True))
        of_examples = [b.slots for b in batches if b.slots is not None]
        counts = torch.tensor([label_count(self.train, numbers) for numbers in drawn])
        eye = torch.eye(self.groups, dtype=torch.float64)
        return [
            micro_batch_of(self.model, b, eye, 1 / counts[s].double())
            for b, s in zip(batches, of_examples, strict=True)
        ]

    def loss(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        log_probs = self.model.runner.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
        each = self.of_examples(log_probs, part.batch)[0]
        loss = (each * part.share.to(each.dtype)).sum()
        return loss, loss.detach()[None] / self.groups

    def of_examples(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Loss ``[1, E]`` of each example, of log-probabilities ``[1, E, C]``."""
        return negative_log_likelihood(log_probs, batch.labels)

    def validate(self) -> list[float]:
        predictive = self.validation.predictive(slot_times(self.groups))
        if predictive.label_log_probs is not None:
            return (-predictive.label_log_probs.double().mean(1)).tolist()
        assert predictive.point_log_probs is not None
        nll = negative_log_likelihood(predictive.point_log_probs, self.validation.labels)
        return nll.double().mean(1).tolist()

    def decay_gram(self) -> Tensor:
        return torch.eye(self.groups, dtype=torch.float64)
