"""From logits to class scores."""

from __future__ import annotations

import torch
from torch import Tensor

from loracurve.tasks.batching import Batch

__all__ = ["class_scores"]


def class_scores(batch: Batch, logits: Tensor) -> Tensor:
    """[n, P, V or C] read-outs -> [n, E, C] class scores, by the batch's way of scoring."""
    if batch.scoring == "answer":
        if batch.choice_mask is not None:
            logits = logits.masked_fill(~batch.choice_mask, -torch.inf)
        return logits
    if batch.scoring == "text":
        assert batch.targets is not None and batch.owner is not None and batch.choice_lengths is not None
        n, p, _ = logits.shape
        chosen = logits.gather(-1, batch.targets.expand(n, p)[..., None])[..., 0] - logits.logsumexp(-1)
        size = batch.choice_lengths.numel()
        total = chosen.new_zeros(n, size + 1).index_add(1, batch.owner, chosen)[:, :size]
        total = total.view(n, *batch.choice_lengths.shape)
        if batch.normalise == "mean":
            total = total / batch.choice_lengths.clamp_min(1)
        return total.masked_fill(batch.choice_lengths == 0, -torch.inf)
    return logits
