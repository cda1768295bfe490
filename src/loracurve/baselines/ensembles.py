"""Deep ensembles of adapters (Lakshminarayanan et al. 2017), equally weighted, trained longer, or best mixed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracurve.baselines.method import Fitted, Setting, fine_tune, from_adapters
from loracurve.inference.information import mixture_log_probs
from loracurve.inference.prediction import point_nll
from loracurve.system.errors import UserError
from loracurve.system.ranges import Positive, Slots, check_ranges

__all__ = ["ConvexMix", "Ensemble", "LongerEnsemble", "mixture_weights"]


@dataclass(frozen=True)
class Ensemble:
    """The average of the first anchors' probabilities."""

    members: Slots = 3
    """Number of anchors."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fit(self, setting: Setting) -> Fitted:
        return from_adapters(setting, setting.first(self.members), float(self.members))


@dataclass(frozen=True)
class LongerEnsemble:
    """An ensemble whose members share a larger budget: the control for a curve's extra steps."""

    members: Slots = 3
    """Number of adapters."""
    units: Positive = 5.0
    """Training of all members together, in units of one fine-tune."""
    learning_rate: Positive | None = None
    """Peak learning rate. Default: the anchors'."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.units < self.members:
            raise UserError(f"units: expected at least one for each of {self.members} members, found {self.units}")

    def fit(self, setting: Setting) -> Fitted:
        own = setting.training
        steps = round(own.steps * self.units / self.members)
        training = replace(own, steps=steps, learning_rate=self.learning_rate or own.learning_rate)
        return fine_tune(setting, training, self.members)


@dataclass(frozen=True)
class ConvexMix:
    """The convex mix of the anchors' probabilities of the lowest validation NLL."""

    members: Slots = 3
    """Number of anchors."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fit(self, setting: Setting) -> Fitted:
        anchors = setting.first(self.members)
        validation = setting.task.encode("validation")
        predictive = from_adapters(setting, anchors, 0.0).predict(validation)
        weights = mixture_weights(-point_nll(predictive, validation.labels))
        return from_adapters(setting, anchors, float(self.members), weights, {"weights": weights.tolist()})


def mixture_weights(label_log_probs: Tensor, iterations: int = 2000) -> Tensor:
    """Weights ``[M]`` of a mixture of fixed components that maximise its likelihood, by expectation-maximisation.

    The problem is concave; every step raises the likelihood (Dempster et al. 1977).

    Args:
        label_log_probs: ``[M, E]``, log-probability of each example's label under each component.
        iterations: at most; less where the weights move by less than 1e-10.
    """
    log_probs = label_log_probs.double()
    weights = torch.full((len(log_probs),), 1 / len(log_probs), dtype=torch.float64)
    for _ in range(iterations):
        shares = (weights.log()[:, None] + log_probs - mixture_log_probs(log_probs, weights)).exp()
        change = (shares.mean(1) - weights).abs().max()
        weights = shares.mean(1) / shares.mean(1).sum()
        if change < 1e-10:
            break
    return weights
