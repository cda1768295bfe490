"""Several batches as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loracurve.batching import Batch

__all__ = ["join_batches"]


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of one task as one: rows and examples of the first, then of the second, ...

    Each has equally many rows in it; where a batch has fewer, empty ones.
    """
    if any(b.ends is not None for b in batches):
        batches = [_as_trees(b) for b in batches]
    if any(b.visible is not None for b in batches):
        batches = [b if b.visible is not None else replace(b, visible=b.input_ids >= 0) for b in batches]
    if any(b.choice_mask is not None for b in batches):
        batches = [b if b.choice_mask is not None else replace(b, choice_mask=_every_choice(b)) for b in batches]
    most, width = (max(b.input_ids.shape[i] for b in batches) for i in (0, 1))
    starts = [i * most for i in range(len(batches))]
    first = batches[0]

    def grid(name: str, padding: Tensor) -> Tensor:
        """A field [N, T]; `padding` [T] or [1] where a row is empty or ends."""
        out = padding.expand(len(batches) * most, width).clone()
        for start, batch in zip(starts, batches, strict=True):
            value = getattr(batch, name)
            out[start : start + len(value), : value.shape[1]] = value
        return out

    zero = torch.zeros(1, dtype=torch.long)
    # Padding attends to itself only.
    paddings = {"ends": torch.arange(1, width + 1), "visible": zero == 0}
    grids = ("input_ids", "ends", "position_ids", "attention_mask", "visible", "token_type_ids")
    lists = ("index", "labels", "targets", "choice_lengths", "choice_mask")
    made: dict[str, Any] = {n: grid(n, paddings.get(n, zero)) for n in grids if getattr(first, n) is not None}
    made |= {n: torch.cat([getattr(b, n) for b in batches]) for n in lists if getattr(first, n) is not None}
    positions, owners, choices = [], [], 0
    last = sum(b.choice_lengths.numel() for b in batches if b.choice_lengths is not None)
    for batch, start in zip(batches, starts, strict=True):
        if batch.positions is not None:
            old = batch.input_ids.shape[1]
            positions.append((batch.positions // old + start) * width + batch.positions % old)
        if batch.owner is not None and batch.choice_lengths is not None:
            own = batch.choice_lengths.numel()
            # Read-outs that fill up the shape of a batch belong to one choice too many.
            owners.append(torch.where(batch.owner < own, batch.owner + choices, last))
            choices += own
    made |= {n: torch.cat(v) for n, v in (("positions", positions), ("owner", owners)) if v}
    made["rows"] = torch.cat([b.rows + start for b, start in zip(batches, starts, strict=True)])
    return replace(first, units=None, **made)


def _as_trees(batch: Batch) -> Batch:
    """Plain causal rows as trees: each token attends to all before it."""
    if batch.ends is not None:
        return batch
    ids = batch.input_ids
    place = torch.arange(ids.shape[1]).expand_as(ids)
    return replace(batch, ends=torch.full_like(ids, ids.shape[1]), position_ids=place)


def _every_choice(batch: Batch) -> Tensor:
    assert batch.answer_ids is not None
    return torch.ones(len(batch.labels), len(batch.answer_ids), dtype=torch.bool)
