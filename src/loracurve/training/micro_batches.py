"""Micro-batches of a step, what a training objective gives the loop, and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loracurve.curve.quadrature import quadrature
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import laid_out_for, predict
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.model.routes import Layout
from loracurve.system.distributed import world
from loracurve.tasks.batching import Batch, collate
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.packing import packed_rows
from loracurve.training.config import FitConfig, LoopConfig, check_validation_points
from loracurve.training.validation_plan import ValidationPlan

__all__ = [
    "CAPTURED_LENGTHS",
    "MicroBatch",
    "TrainingObjective",
    "Validation",
    "label_count",
    "micro_batch_of",
    "training_batch",
    "validation_points",
]


# Captured rows are padded to multiples of this many tokens: few graphs, and tiles that tensor cores like.
CAPTURED_LENGTHS = 32


class Validation:
    """Validation batches, laid out once; NLL of points and of their average."""

    def __init__(self, model: CurveModel, encoded: Encoded, config: LoopConfig) -> None:
        self.model, self.count = model, encoded.predictions
        self.summarise = encoded.scoring == "lm"
        self.batches = laid_out_for(model, encoded, config.row_tokens)
        self.labels, self.names = encoded.labels, encoded.name_of

    def predictive(self, t: Tensor, weights: Tensor | None = None) -> Predictive:
        return predict(
            *(self.model, self.batches, t, weights, None, self.summarise, self.count), shared=True, names=self.names
        )


def label_count(encoded: Encoded, numbers: Sequence[int]) -> int:
    """Labels of so many examples: one each, or all tokens of a text."""
    if encoded.scoring != "lm":
        return len(numbers)
    return sum(len(encoded.examples[i].choices[0]) for i in numbers)


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
        packing = model.runner.takes_trees(encoded, config.row_tokens)
        return collate(encoded, numbers, config.row_tokens, packing, slots, own_points=own_points)
    examples = -(-config.batch_size // (config.accumulation * world()[1]))
    # Captured, a text has a row of its own, with any number of read-outs.
    row_tokens = 1 if captured and encoded.scoring == "lm" else config.row_tokens
    rows = packed_rows(encoded, examples, row_tokens, not own_points)
    packing, pad_to = model.runner.takes_trees(encoded, row_tokens), CAPTURED_LENGTHS if captured else 1
    return collate(encoded, numbers, row_tokens, packing, slots, pad_to, rows, own_points)


def micro_batch_of(model: CurveModel, batch: Batch, coefficients: Tensor, share: Tensor) -> MicroBatch:
    """A micro-batch run in the way that suits its coefficients (`Runner.arrange`)."""
    arranged, layout = model.runner.arrange(batch, coefficients)
    assert arranged is not None
    return MicroBatch(batch, arranged, layout, share)


def validation_points(points: int, spec: CurveSpec) -> tuple[Tensor, Tensor]:
    """t and weights of the average that tells a curve's states apart (`quadrature`, uniform).

    Raises:
        UserError: all of them are anchors, which training does not move.
    """
    check_validation_points(points, spec)
    return quadrature("uniform", points, spec.segments, closed=spec.closed)


@dataclass
class MicroBatch:
    """A micro-batch, made on the CPU, moved to the device by the stepper."""

    batch: Batch
    coefficients: Tensor
    layout: Layout
    share: Tensor
    """weight of this micro-batch, or [E] of each of its examples, in the step's loss"""
    other: Batch | None = None
    """inputs on which the diversity term is taken; None: the micro-batch's own"""


class TrainingObjective(Protocol):
    """What is trained: the loop asks it for micro-batches, losses and validation figures."""

    groups: int
    """Independent things trained side by side (anchors, curves), each clipped, validated and kept on its own; as many
    consecutive control points belong to each."""
    figures: tuple[str, ...]
    """Names of what `loss` returns beside the loss."""
    sets: Mapping[str, Encoded]
    """What it is trained on (`train`) and validated with (`validation`), and further inputs."""
    plan: ValidationPlan
    synchronises: bool
    """Whether `loss` waits for other processes, where there are several."""

    def parts(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, on the CPU."""

    def loss(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """What a micro-batch adds to the loss, and its figures [F], detached; runs on the device, looks at no value."""

    def validate(self) -> list[float]:
        """Validation NLL of each group, in nats."""

    def decay_gram(self) -> Tensor:
        """[K, K] G with decay P <- P - lr * weight_decay * G P."""
