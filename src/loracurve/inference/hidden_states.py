"""The last hidden states of a whole split at points of a curve, beside its predictions there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loracurve.inference.prediction import Read, predict_splits
from loracurve.model.curve_model import CurveModel
from loracurve.model.states import States
from loracurve.system.distributed import gathered
from loracurve.tasks.batching import Batch
from loracurve.tasks.encoding import Encoded

__all__ = ["SplitStates", "states_of"]


@dataclass(frozen=True)
class SplitStates:
    """E examples (of language modelling: target tokens) at n points, on the CPU."""

    log_probs: Tensor
    """[n, E, C] float32, -inf where an example has no such choice; [n, E, 0] for language modelling"""
    states: States
    labels: Tensor
    """[E], negative where unknown"""

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, points: slice) -> SplitStates:
        """The same at some of the points."""
        return SplitStates(self.log_probs[points], self.states.at(points), self.labels)

    def index(self, numbers: Tensor) -> SplitStates:
        """Some of the examples."""
        choices = self.states.choices
        states = States(self.states.read[:, numbers], None if choices is None else choices[:, numbers])
        return SplitStates(self.log_probs[:, numbers], states, self.labels[numbers])


class _Keeper:
    """A reader that keeps what it sees."""

    def __init__(self, lm: bool) -> None:
        self.lm = lm
        self.kept: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]] = []

    def read(self, log_probs: Tensor, states: States, batch: Batch) -> Read:
        own = log_probs[..., :0] if self.lm else log_probs
        choices = None if states.choices is None else states.choices.cpu()
        self.kept.append((own.cpu(), states.read.cpu(), choices, batch.labels.cpu(), batch.index.cpu()))
        return Read(log_probs)


def states_of(model: CurveModel, encoded: Encoded, t: Tensor) -> SplitStates:
    """Predict a split at points t [n] (or coefficients [n, K]) of the curve and keep the last hidden states.

    Several processes all call this, run a share of the examples each, and return the whole.

    Raises:
        UserError: the model's logits are not what one linear map gives.
    """
    keeper = _Keeper(encoded.scoring == "lm")
    predict_splits(model, {"": encoded}, t, reader=keeper)
    kept = [part for share in gathered(lambda: keeper.kept) for part in share]
    order = torch.cat([index for *_, index in kept]).argsort()
    width = max(own.shape[2] for own, *_ in kept)
    log_probs = torch.cat([pad(own, (0, width - own.shape[2]), value=-torch.inf) for own, *_ in kept], 1)[:, order]
    choices = [of for _, _, of, _, _ in kept if of is not None]
    most = max((of.shape[2] for of in choices), default=0)
    joined = [pad(of, (0, 0, 0, most - of.shape[2])) for of in choices]
    return SplitStates(
        log_probs,
        States(
            torch.cat([read for _, read, *_ in kept], 1)[:, order],
            torch.cat(joined, 1)[:, order] if joined else None,
        ),
        torch.cat([labels for *_, labels, _ in kept])[order],
    )
