"""One adapter that learns the averaged probabilities of a curve instead of labels.

Hinton, Vinyals & Dean 2015 (arXiv 1503.02531) at temperature 1; of ensembles, Bucila, Caruana & Niculescu-Mizil 2006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracurve.model.curve_model import CurveModel
from loracurve.tasks.batching import Batch
from loracurve.tasks.encoding import Encoded
from loracurve.training.anchors import AnchorsObjective
from loracurve.training.config import LoopConfig

__all__ = ["DistilledObjective", "soft_cross_entropy"]


def soft_cross_entropy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """-sum_c q_c log p_c ``[..., E]`` of log-probabilities ``[..., E, C]`` and probabilities q ``[E, C]``; classes of
    probability 0 count nothing, whatever their log-probability."""
    return -torch.where(targets > 0, targets * log_probs, 0.0).sum(-1)


class DistilledObjective(AnchorsObjective):
    """One adapter, from where it is; validated by the NLL of labels, as a fine-tune.

    Args:
        model: with one slot (`CurveSpec.slots(1)`).
        rows: what it is trained on, with or without labels.
        targets: ``[rows, C]`` probabilities to learn.
    """

    def __init__(
        self, model: CurveModel, rows: Encoded, targets: Tensor, validation: Encoded, config: LoopConfig
    ) -> None:
        super().__init__(model, rows, validation, config, 1)
        self.targets = targets.float()

    def of_examples(self, log_probs: Tensor, batch: Batch) -> Tensor:
        self.targets = self.targets.to(log_probs.device)  # training may have moved the model since
        return soft_cross_entropy(log_probs, self.targets[batch.index])
