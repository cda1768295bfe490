"""One adapter: the first anchor, or a fine-tune of the same seed without early stopping or with weight decay (MAP)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from loracurve.baselines.method import Fitted, Setting, fine_tune, from_adapters
from loracurve.system.ranges import NonNegative, check_ranges

__all__ = ["Single"]


@dataclass(frozen=True)
class Single:
    """A single LoRA adapter; nothing is trained where its options are the anchors' own."""

    keep: Literal["best", "last"] = "best"
    """best: early stopping at the best validation NLL; last: the last step."""
    weight_decay: NonNegative | None = None
    """Decoupled weight decay; the maximum a posteriori under a Gaussian prior. Default: the anchors'."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fit(self, setting: Setting) -> Fitted:
        decay = setting.training.weight_decay if self.weight_decay is None else self.weight_decay
        training = replace(setting.training, keep=self.keep, weight_decay=decay)
        if training == setting.training:
            return from_adapters(setting, setting.first(1), 1.0)
        return fine_tune(setting, training)
