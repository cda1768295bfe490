"""How far an input is from the training data, by the last hidden state, and how rare that is among known inputs.

The relative Mahalanobis distance (Ren et al. 2021) of a state h is

    min_c (h - m_c)^T S^-1 (h - m_c)  -  (h - m)^T S_0^-1 (h - m)

with means m_c and common covariance S of the classes, and mean m and covariance S_0 of all training rows; covariances
are shrunk (Ledoit & Wolf 2004). Without classes it is the second term alone, with its sign turned. It says nothing of
errors on known inputs: a hard row can be quite familiar.

What is reported is a conformal p-value against validation rows: of known inputs at most a part alpha has a p-value of
at most alpha, whatever the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from loracurve.inference.hidden_states import SplitStates
from loracurve.inference.prediction import Read
from loracurve.model.states import States
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch

__all__ = ["NEIGHBOURS", "Familiarity", "cosine_distance", "fit_familiarity", "p_values"]


NEIGHBOURS = 10
"""Nearest training texts whose mean cosine counts."""

_LEAST_ROWS = 20


@dataclass(frozen=True)
class Familiarity:
    """Distances from training rows at n points; made by `fit_familiarity`."""

    means: Tensor
    """[n, C, d] of the classes; C = 0 without classes"""
    whitening: Tensor
    """[n, d, d], W with W W^T = S^-1; [n, 0, 0] without classes"""
    centre: Tensor
    """[n, d] of all rows"""
    background: Tensor
    """[n, d, d], W with W W^T = S_0^-1"""
    weights: Tensor
    """[n] of the points, summing to 1"""
    rows: int
    """training rows"""
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[m] distances of validation rows, ascending; empty: there are no p-values"""

    def read(self, log_probs: Tensor, states: States, batch: Batch) -> Read:
        """As `prediction.Reader`: adds the distance, leaves the probabilities alone."""
        del batch
        return Read(log_probs, distance=self.distance(states))

    def distance(self, states: States) -> Tensor:
        """[E] float64, the mean over the points of the relative Mahalanobis distance."""
        if len(states.read) != len(self.centre):
            raise ValueError(f"expected the states at {len(self.centre)} points, found {len(states.read)}")
        weights = self.weights.to(states.read.device)
        return weights @ torch.stack([self._at(i, h.double()) for i, h in enumerate(states.read)])

    def _at(self, point: int, h: Tensor) -> Tensor:
        whole = ((h - _to(self.centre[point], h)) @ _to(self.background[point], h)).square().sum(1)
        if not self.means.shape[1]:
            return whole
        turn = _to(self.whitening[point], h)
        nearest = torch.cdist(h @ turn, _to(self.means[point], h) @ turn).square().amin(1)
        return nearest - whole

    def p_values(self, distance: Tensor) -> Tensor:
        """[E] float64: `p_values` against the validation rows; ValueError where there are none."""
        return p_values(distance, self.known.to(distance.device))


def p_values(distance: Tensor, known: Tensor) -> Tensor:
    """Conformal p-values (1 + #{known at least as far}) / (m + 1), [E] float64.

    Where the input is exchangeable with the known ones, P(p <= alpha) <= alpha.

    Args:
        distance: [E]. known: [m], ascending.

    Raises:
        ValueError: nothing known.
    """
    if not len(known):
        raise ValueError("expected distances of known rows, found none")
    nearer = torch.searchsorted(known.contiguous(), distance.to(known).contiguous())
    return (1 + len(known) - nearer.double()) / (len(known) + 1)


def fit_familiarity(train: SplitStates, weights: Tensor | None = None, classes: int = 0) -> Familiarity:
    """Means and covariances of training rows at every point.

    Args:
        train: of training rows.
        weights: [n] of the points; equal if None.
        classes: C where labels are classes that rows share; 0: they are not (choices of a row's own, texts).

    Raises:
        UserError: fewer than 20 rows, states that are not finite.
    """
    points, count, size = train.states.read.shape
    if count < _LEAST_ROWS:
        raise UserError(f"familiarity: expected at least {_LEAST_ROWS} training rows, found {count}; give more")
    if not train.states.read.isfinite().all():
        raise UserError("familiarity: expected finite hidden states, found others")
    weights = torch.full((points,), 1 / points, dtype=torch.float64) if weights is None else weights.double()
    labelled = train.labels >= 0
    there = train.labels[labelled].unique() if classes > 1 else train.labels[:0]
    means, whitening, centre, background = [], [], [], []
    for state in train.states.read.double():
        centre.append(state.mean(0))
        background.append(_whitening(state - centre[-1]))
        own = torch.stack([state[train.labels == c].mean(0) for c in there]) if len(there) > 1 else state[:0]
        means.append(own)
        if len(own):
            place = torch.searchsorted(there, train.labels[labelled])
            whitening.append(_whitening(state[labelled] - own[place]))
        else:
            whitening.append(state.new_zeros(0, 0))
    return Familiarity(
        torch.stack(means).float(), torch.stack(whitening), torch.stack(centre).float(), torch.stack(background),
        weights, count,
    )  # fmt: skip


def _whitening(centred: Tensor) -> Tensor:
    """[d, d] float32 W with W W^T the inverse of the shrunk covariance of rows [E, d]."""
    covariance, _ = ledoit_wolf(centred.cpu().numpy(), assume_centered=True)
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    # Rows that are all alike have no covariance: nothing is unfamiliar by more than rounding then.
    least = torch.finfo(torch.float32).eps * values[-1].clamp_min(1e-12)
    return (vectors / values.clamp_min(least).sqrt()).float()


def cosine_distance(states: Tensor, train: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """1 - the mean cosine to the nearest training rows, [E] for states [E, d] and training states [N, d]."""
    cosine = torch.nn.functional.normalize(states, dim=-1) @ torch.nn.functional.normalize(train.to(states), dim=-1).mT
    return 1 - cosine.topk(min(neighbours, cosine.shape[1]), dim=1).values.double().mean(1)


def _to(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype)
