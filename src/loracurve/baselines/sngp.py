"""A Gaussian-process head on one adapter, in the style of SNGP (Liu et al. 2020).

Random Fourier features of the last hidden state stand for a Gaussian process with an RBF kernel; a logistic regression
on them is fitted to the training rows, and its Laplace covariance, which grows with the distance from them, shrinks the
logits (mean-field: z / sqrt(1 + pi / 8 v)). The adapter is an anchor as it is: its layers are neither trained together
with this head nor spectrally normalised, which the method's authors do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loracurve.baselines.method import Fitted, Setting, from_adapters
from loracurve.inference.hidden_states import SplitStates, states_of
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.inference.unknowns import training_rows
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.system.ranges import Amount, Count, NonNegative, Positive, check_ranges
from loracurve.tasks.encoding import Encoded

__all__ = ["SNGP"]


@dataclass(frozen=True)
class SNGP:
    """A Gaussian-process head on one anchor."""

    anchor: Amount = 0
    """Number of the anchor."""
    features: Count = 1024
    """Random Fourier features."""
    width: NonNegative = 0.0
    """Kernel width over the median distance of training rows; 0: of 1/4, 1/2, 1, 2 and 4 the one of the lowest
    validation NLL."""
    ridge: Positive = 1.0
    """Precision of the prior of each coefficient."""
    rows: Count = 3000
    """Training rows at most, drawn by the hash of their ids."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fit(self, setting: Setting) -> Fitted:
        """Raises UserError for scores of whole texts, which are read at many places."""
        task, number = setting.task, self.anchor
        of = {name: points[number : number + 1] for name, points in setting.first(number + 1).items()}
        fitted = from_adapters(setting, of, 1.0)
        assert fitted.along is not None
        along = fitted.along
        along.put_into(setting.model)
        train, _ = training_rows(task, self.rows)
        if train.scoring not in ("answer", "head"):
            raise UserError(
                f"expected scores of answer tokens or a head, found scoring {train.scoring}; choose another"
            )
        states, known = (
            states_of(setting.model, train, along.t),
            states_of(setting.model, task.encode("validation"), along.t),
        )
        scale = torch.pdist(states.states.read[0][:500].double()).median()
        found = [self._head(states, known, w * scale, setting.seed) for w in ([self.width] if self.width else _WIDTHS)]
        _, head = min(found, key=lambda pair: pair[0])

        def predict(encoded: Encoded) -> Predictive:
            along.put_into(setting.model)
            return Predictive.from_log_probs(head.log_probs(states_of(setting.model, encoded, along.t)))

        cost = 1.0 + (len(train) + len(known)) / (3 * setting.unit)
        return Fitted(predict, 1, cost, {"width": float(head.width / scale)})

    def _head(self, train: SplitStates, known: SplitStates, width: Tensor, seed: int) -> tuple[float, _Head]:
        """A head and its validation NLL."""
        h, size = train.states.read[0].double(), train.log_probs.shape[2]
        draw = generator(seed, "sngp")
        turn = torch.randn(h.shape[1], self.features, generator=draw, dtype=torch.float64) / width
        phase = 2 * math.pi * torch.rand(self.features, generator=draw, dtype=torch.float64)
        head = _Head(turn, phase, torch.zeros(size, self.features, dtype=torch.float64), torch.eye(0), width)
        phi = head.features(h)
        beta = _logistic(phi, train.labels, size, self.ridge)
        p = (phi @ beta.mT).softmax(-1).amax(-1)
        precision = self.ridge * torch.eye(self.features, dtype=torch.float64) + (phi * (p * (1 - p))[:, None]).mT @ phi
        head = _Head(turn, phase, beta, torch.linalg.inv(precision), width)
        nll = negative_log_likelihood(head.log_probs(known)[0].double(), known.labels).mean()
        return float(nll), head


_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class _Head:
    turn: Tensor
    """[d, F]"""
    phase: Tensor
    """[F]"""
    beta: Tensor
    """[C, F]"""
    covariance: Tensor
    """[F, F]"""
    width: Tensor

    def features(self, h: Tensor) -> Tensor:
        """[E, F] from states [E, d] (Rahimi & Recht 2007)."""
        return math.sqrt(2 / len(self.phase)) * (h @ self.turn + self.phase).cos()

    def log_probs(self, split: SplitStates) -> Tensor:
        """[1, E, C] float32."""
        phi = self.features(split.states.read[0].double())
        variance = ((phi @ self.covariance) * phi).sum(1, keepdim=True)
        logits = phi @ self.beta.mT / (1 + math.pi / 8 * variance).sqrt()
        logits = torch.nn.functional.pad(logits, (0, split.log_probs.shape[2] - logits.shape[1]), value=-math.inf)
        return logits.masked_fill(split.log_probs[0].isneginf(), -math.inf).log_softmax(-1).float()[None]


def _logistic(phi: Tensor, labels: Tensor, classes: int, ridge: float) -> Tensor:
    """[C, F]: the logistic regression with the highest posterior."""
    beta = torch.zeros(classes, phi.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([beta], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.cross_entropy(phi @ beta.mT, labels, reduction="sum") + ridge / 2 * beta.square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return beta.detach()
