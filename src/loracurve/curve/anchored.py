"""Curves through adapters that were fine-tuned independently: loading, alignment, inner control points, positions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
from torch import Tensor

from loracurve.curve import bezier
from loracurve.curve.config import Alignment
from loracurve.curve.files import load_adapter
from loracurve.curve.gauge import align
from loracurve.curve.lora_space import ControlPoints, column, stack_adapters
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError

__all__ = ["load_anchors", "same_base", "same_place", "slot_times", "through"]

# What has to be the same in the configs of adapters that one curve runs through.
_AGREED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def slot_times(anchors: int) -> Tensor:
    """[M] the t of M adapters on the chain through them (`CurveSpec.slots`)."""
    return torch.linspace(0, 1, anchors, dtype=torch.float64) if anchors > 1 else torch.zeros(1, dtype=torch.float64)


def same_place(first: str, second: str) -> bool:
    """Whether two names of a base model mean the same one: a hub name and its folder in the hub's cache, or paths to
    one folder that are spelt differently."""
    names = [re.sub(r".*models--([^/]+)--([^/]+)/snapshots/.*", r"\1/\2", name) for name in (first, second)]
    if names[0] == names[1]:
        return True
    return all(map(os.path.exists, names)) and Path(first).resolve() == Path(second).resolve()


def same_base(first: str, second: str) -> bool:
    """Whether two names can mean the same base: `same_place`, or paths of other machines with the same last part.
    Nothing is known of an empty name."""
    here = all(map(os.path.exists, (first, second)))
    return "" in (first, second) or same_place(first, second) or (not here and Path(first).name == Path(second).name)


def load_anchors(folders: Sequence[str | Path]) -> tuple[peft.LoraConfig, ControlPoints]:
    """Read adapters that PEFT saved: the config of the first, and all stacked ``[M, ...]`` in the order given.

    Raises:
        UserError: fewer than two, damaged folders, adapters of different bases, ranks, scalings or targets.
    """
    loaded = [load_adapter(f) for f in folders]
    if len(loaded) < 2:
        raise UserError(f"an anchored curve needs at least 2 adapter folders, found {len(loaded)}")
    config = loaded[0][0]
    for folder, (other, _) in zip(folders, loaded, strict=True):
        if not same_base(*(c.base_model_name_or_path or "" for c in (config, other))):
            raise UserError(
                f"{folder}: base_model_name_or_path is {other.base_model_name_or_path!r}, but "
                f"{config.base_model_name_or_path!r} in {folders[0]}; anchors must be of one base"
            )
        for key in _AGREED:
            mine, found = getattr(config, key), getattr(other, key)
            if mine != found:
                raise UserError(f"{folder}: {key} is {found!r}, but {mine!r} in {folders[0]}; anchors must agree")
    return config, stack_adapters([tensors for _, tensors in loaded])


def through(
    anchors: ControlPoints,
    degree: int = 2,
    alignment: Alignment = "balanced+procrustes",
    pieces: int = 1,
    closed: bool = False,
    fresh: Callable[[CurveSpec], ControlPoints] | None = None,
) -> tuple[CurveSpec, ControlPoints]:
    """The curve through M adapters ``[M, ...]``, aligned to each other; its anchors are frozen.

    Args:
        fresh: draws control points of a shape for the inner ones to start from; None: they start on the straight line
            between their anchors (Garipov et al. 2018).
    """
    aligned = align(anchors, alignment)
    count = len(next(iter(aligned.values())))
    spec = CurveSpec.anchored(count, degree, alignment, pieces, closed)
    if closed:
        aligned = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in aligned.items()}
    points = {name: bezier.on_line(tensor, degree * pieces) for name, tensor in aligned.items()}
    if fresh is not None:
        drawn = fresh(spec)
        points = {n: torch.where(column(spec.mask, p).bool(), drawn[n].to(p), p) for n, p in points.items()}
    return spec, spec.tie(points)
