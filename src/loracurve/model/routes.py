"""Where each row of a batch lies on the curve, as the layers of a model read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loracurve.model.functional import Mixing

__all__ = ["Held", "Layout", "Route", "Shared", "repeat_for_rows", "within_segments"]


Kind = Literal["base", "rows", "tokens", "points", "merged"]

Held = dict[tuple[nn.Module, int, torch.dtype], tuple[Tensor, int, Tensor]]
"""By layer, A (0) or B (1) and dtype: the control points, their version, and the factors at the groups made of them."""


@dataclass(frozen=True)
class Layout:
    """How rows and coefficients belong together: plain numbers, known before anything runs on a device."""

    kind: Kind
    replicas: int = 1
    """how often each row of the batch is run"""
    windows: int = 1
    """*rows*: equal consecutive groups of rows that lie in one segment each"""
    whole: bool = False
    """*points*: group g lies at control point g, for all control points"""


@dataclass
class Route:
    """Where the rows of the running forward pass lie on the curve; one object shared by all layers of a model."""

    kind: Kind = "base"
    """`base` leaves the pretrained model alone."""
    coefficients: Tensor | None = None
    """[R, K], the coefficient vector of each row, in the compute dtype; R = replicas * rows of the batch. *tokens*: of
    each token, [R * T, K]."""
    groups: Tensor | None = None
    """[G, K], *points*: rows lie in G equal consecutive groups of one coefficient vector each."""
    windows: int = 1
    """*rows*: rows lie in this many equal consecutive groups, one for each segment, and use its control points only."""
    degree: int = 1
    """Degree of a segment, the stride of the windows."""
    whole: bool = False
    """*points*: group g lies at control point g: factors are taken as they are."""
    held: Held | None = None
    """*points*: what layers keep of their factors at the groups from pass to pass; None: nothing."""
    replicas: int = 1
    """How often each row of the batch is run, at different points."""
    rows: int = 0
    """Rows of the batch before it is replicated."""
    positions: Tensor | None = None
    """[P] flat positions in [R * T] at which the output head is wanted; None: all."""
    position_rows: Tensor | None = None
    """[P] the place of each position's coefficients: its row, or itself where tokens have their own."""
    token_ids: Tensor | None = None
    """[C] rows of the output head that are wanted; None: all."""
    plain: bool = False
    """Whether rows are plain causal ones: every token attends to all before it in its row."""
    watched: bool = False
    """Whether what the last map sees and gives is wanted (`seen`)."""
    seen: tuple[Tensor, Tensor] | None = None
    """The last map's inputs and outputs in the running pass."""
    shared: Shared | None = None
    """What the siblings of the layer that ran last will want."""
    mixing: dict[tuple[int, torch.dtype, float], Mixing] = field(default_factory=dict)
    """Of the rows of a layer's input, by their number, dtype and the layer's scaling."""


def repeat_for_rows(coefficients: Tensor, rows: int) -> Tensor:
    """Repeat row coefficients for inputs whose tokens were flattened into the leading dimension."""
    if coefficients.shape[0] == rows:
        return coefficients
    if rows % coefficients.shape[0]:
        raise RuntimeError(
            f"a layer got {rows} rows for a batch of {coefficients.shape[0]}: it does not keep the batch dimension, "
            "so rows cannot have their own point of the curve"
        )
    return coefficients.repeat_interleave(rows // coefficients.shape[0], dim=0)


@dataclass
class Shared:
    """Outputs of sibling layers that saw the same input, computed together by the first of them."""

    siblings: tuple[Any, ...]
    x: Tensor
    outputs: dict[int, Tensor]
    """by place among the siblings, of those that did not run yet"""


def within_segments(grouped: Tensor, degree: int) -> bool:
    """Whether group s of coefficient vectors [S, R/S, K] uses the control points of segment s alone."""
    outside = grouped.detach().clone()
    for s in range(len(grouped)):
        outside[s, :, s * degree : (s + 1) * degree + 1] = 0
    return not bool(outside.any())
