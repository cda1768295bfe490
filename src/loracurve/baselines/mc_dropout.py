"""MC dropout (Gal & Ghahramani 2016, arXiv 1506.02142) on the adapters' input.

Training draws a mask for every token, as LoRA dropout does. At test a pass draws one mask over the input features of
each map and keeps it for all tokens and examples: dropping feature i of x in A x is dropping column i of A, so each
pass is one adapter, a whole model, and the mutual information is between models. A single token's mask has the same
distribution either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from loracurve.baselines.method import Fitted, Setting, fine_tune, from_adapters
from loracurve.curve.lora_space import ControlPoints
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.system.randomness import generator
from loracurve.system.ranges import OpenShare, check_ranges

__all__ = ["MCDropout", "masked_adapters"]


@dataclass(frozen=True)
class MCDropout:
    """One adapter trained with dropout, averaged over dropout masks."""

    dropout: OpenShare = 0.1
    """Probability that an input feature of an adapter is dropped, while training and at test."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fit(self, setting: Setting) -> Fitted:
        """Train one adapter with dropout from scratch."""
        model = setting.model
        with _dropout(model, self.dropout):
            trained = fine_tune(setting, setting.training)
        adapters = masked_adapters(model.control_points(), self.dropout, setting.samples, setting.seed)
        return from_adapters(setting, adapters, trained.cost, notes=trained.notes)


@contextmanager
def _dropout(model: CurveModel, probability: float) -> Iterator[None]:
    """Dropout on the input of every adapted map inside the block."""
    layers = [layer for layer in model.layers.values() if isinstance(layer, CurveLinear)]
    before = [layer.dropout for layer in layers]
    try:
        for layer in layers:
            layer.dropout = nn.Dropout(probability)
        yield
    finally:
        for layer, module in zip(layers, before, strict=True):
            layer.dropout = module


def masked_adapters(adapter: ControlPoints, dropout: float, samples: int, seed: int) -> ControlPoints:
    """S adapters [S, ...] of one [1, ...]: columns of each A are dropped at random, the rest scaled by 1 / (1 - p)."""
    stacked = {}
    for name, tensor in adapter.items():
        copies = tensor.expand(samples, *tensor.shape[1:]).clone()
        if name.endswith("lora_A.weight"):
            for s in range(samples):
                kept = torch.rand(copies.shape[-1], generator=generator(seed, "mc dropout", s, name)) >= dropout
                copies[s] *= kept.to(copies) / (1 - dropout)
        stacked[name] = copies
    return stacked
