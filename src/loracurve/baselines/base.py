"""What all methods have in common: options in a dataclass, `fit` to a setting, a fitted thing that predicts splits.

Methods get the same base model, prompts, anchors and training options, and return the same `Predictive`, so that only
the method differs. Most of them end as a set of adapters, which run side by side like the slots of `CurveSpec.slots`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loracurve.evaluation import predict_split
from loracurve.loop import LoopConfig
from loracurve.lora_space import ControlPoints
from loracurve.model import CurveModel
from loracurve.predictive import Predictive
from loracurve.spec import CurveSpec
from loracurve.tasks import Encoded, Task
from loracurve.training import slot_times

__all__ = ["Fitted", "Method", "Setting", "from_adapters"]


@dataclass(frozen=True)
class Setting:
    """What a method is fitted to."""

    model: CurveModel
    """carries the base model; a method puts its own curve or adapters into it"""
    task: Task
    anchors: ControlPoints
    """[M, ...] independently fine-tuned adapters, each one cost unit, shared by all methods"""
    training: LoopConfig
    """options of one fine-tune"""
    samples: int = 10
    """forward passes that a prediction may take"""
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A fitted method."""

    predict: Callable[[Encoded], Predictive]
    """predicts a split: per-sample probabilities [n, E, C] and their average"""
    passes: int
    """forward passes of a prediction"""
    cost: float
    """training in units of one fine-tune: examples x forward-backward passes"""


class Method(Protocol):
    """A frozen dataclass whose fields are the method's options."""

    def fit(self, setting: Setting) -> Fitted:
        """Train what there is to train; raises UserError where the setting does not serve."""


def from_adapters(setting: Setting, adapters: ControlPoints, cost: float, weights: Tensor | None = None) -> Fitted:
    """The average of S adapters [S, ...], with `weights` [S] (equal if None)."""
    count = len(next(iter(adapters.values())))

    def predict(encoded: Encoded) -> Predictive:
        setting.model.set_curve(CurveSpec.slots(count), adapters)
        return predict_split(setting.model, encoded, slot_times(count), weights)

    return Fitted(predict, count, cost)
