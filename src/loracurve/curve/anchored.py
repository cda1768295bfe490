"""Curves through adapters that were fine-tuned independently: alignment, inner control points, positions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["slot_times"]


def slot_times(anchors: int) -> Tensor:
    """[M] the t of M adapters on the chain through them (`CurveSpec.slots`)."""
    return torch.linspace(0, 1, anchors, dtype=torch.float64) if anchors > 1 else torch.zeros(1, dtype=torch.float64)
