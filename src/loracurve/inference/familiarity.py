"""How far an input is from the training data, by the last hidden state, and how rare that is among known inputs.

The relative Mahalanobis distance (Ren et al. 2021) of a state h is

    min_c (h - m_c)^T S^-1 (h - m_c)  -  (h - m)^T S_0^-1 (h - m)

with means m_c and common covariance S of the classes, and mean m and covariance S_0 of all training rows. The second
term takes away what is far for no reason that the classes know of; of all of it, what is far from everything in a
direction that no class has would be near. So `PART` of it is taken, a little less than all.

Both covariances are shrunk towards a multiple of the identity (Ledoit & Wolf 2004), by one intensity, that of all rows:
the terms are large off the data and nearly equal, and with an intensity each their difference is that of the shrinkage,
whose sign is the wrong one. Without classes it is the second term alone, with its sign turned. Another measure is
1 - the mean cosine to the nearest training rows. Neither says anything of errors on known inputs: a hard row can be
quite familiar.

The points of a curve know what their training told apart, the untouched base knows topics and formats, and each misses
what the other sees. Together they are summed, each by how much it varies among known rows (`balanced`).

What is reported is a conformal p-value against validation rows: of known inputs at most a part alpha has a p-value of
at most alpha, whatever the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from loracurve.inference.hidden_states import SplitStates
from loracurve.inference.prediction import Read
from loracurve.model.states import States
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch

__all__ = ["NEIGHBOURS", "Familiarity", "Measure", "balanced", "cosine_distance", "fit_familiarity", "p_values"]


Measure = Literal["mahalanobis", "cosine"]

PART = 0.98

NEIGHBOURS = 10
"""Nearest training texts whose mean cosine counts."""

_LEAST_ROWS = 20

_LEFT_OUT = 1e-3


@dataclass(frozen=True)
class Inverse:
    """Inverses of n shrunk covariances, by their largest eigenvalues; the others are what shrinkage makes of 0."""

    vectors: Tensor
    """[n, d, R] float32, in columns"""
    values: Tensor
    """[n, R] float64 eigenvalues"""
    floor: Tensor
    """[n] float64, the eigenvalue of all other directions"""

    def squares(self, point: int, h: Tensor, means: Tensor) -> Tensor:
        """[E, C], (h - m)^T inverse (h - m) for states [E, d] and means [C, d]."""
        vectors, means = _to(self.vectors[point], h), _to(means, h)
        scale, floor = _to(self.values[point], h).sqrt(), _to(self.floor[point], h)
        x, y = h @ vectors, means @ vectors
        beside = torch.cdist(h, means).square() - torch.cdist(x, y).square()
        return torch.cdist(x / scale, y / scale).square() + beside.clamp_min(0) / floor


@dataclass(frozen=True)
class Familiarity:
    """Distances from training rows at n points; made by `fit_familiarity`."""

    measure: Measure
    means: Tensor
    """[n, C, d] of the classes; C = 0 without classes"""
    within: Inverse
    """S^-1 at each point; of size 0 without classes"""
    centre: Tensor
    """[n, d] of all rows"""
    whole: Inverse
    """S_0^-1 at each point"""
    weights: Tensor
    """[n] of the points, summing to 1; of the curve's points and the base as one more: `balanced`"""
    rows: int
    """training rows"""
    nearest: Tensor
    """[N, d] the training rows' states, averaged over the points and of length 1 (cosine); else [0, d]"""
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[m] distances of validation rows, ascending; empty: there are no p-values"""

    def check(self, points: int) -> None:
        """Raise ValueError for tensors whose shapes do not belong together, or numbers that no fit gives."""
        size = (self.nearest if self.measure == "cosine" else self.centre).shape[-1]
        used = 0 if self.measure == "cosine" else size
        expected: dict[str, tuple[int | None, ...]] = {
            "means": (points, None, used),
            "centre": (points, used),
            "weights": (points,),
            "nearest": (None, size),
            "known": (None,),
        }
        tensors = {name: getattr(self, name) for name in expected}
        for part in ("within", "whole"):
            inverse = getattr(self, part)
            rank = inverse.values.shape[-1]
            tensors |= {f"{part}.{k}": v for k, v in vars(inverse).items()}
            expected |= {f"{part}.vectors": (points, None, rank), f"{part}.values": (points, rank)}
            expected[f"{part}.floor"] = (points,)
        for name, shape in expected.items():
            found = tensors[name]
            fits = found.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
            if not fits or not found.is_floating_point() or not found.isfinite().all():
                raise ValueError(f"{name} of shape {list(found.shape)} or without finite numbers")
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure {self.measure!r}")

    def read(self, log_probs: Tensor, states: States, batch: Batch) -> Read:
        """As `prediction.Reader`: adds the distance, leaves the probabilities alone."""
        del batch
        return Read(log_probs, distance=self.distance(states))

    def distance(self, states: States) -> Tensor:
        """[E] float64: the mean over the points of the relative Mahalanobis distance, or the cosine distance of their
        mean state."""
        if len(states.read) != len(self.weights):
            raise ValueError(f"expected the states at {len(self.weights)} points, found {len(states.read)}")
        if self.measure == "cosine":
            return cosine_distance(_mean_state(states.read, self.weights), self.nearest)
        return self.weights.to(states.read.device) @ self.each(states)

    def each(self, states: States) -> Tensor:
        """[n, E] float64, the relative Mahalanobis distance at each point."""
        return torch.stack([self._at(i, h.double()) for i, h in enumerate(states.read)])

    def _at(self, point: int, h: Tensor) -> Tensor:
        whole = self.whole.squares(point, h, self.centre[point : point + 1])[:, 0]
        if not self.means.shape[1]:
            return whole
        return self.within.squares(point, h, self.means[point]).amin(1) - PART * whole

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


def balanced(found: Familiarity, known: States, weights: Tensor | None) -> Familiarity:
    """The same, with weights by which the curve's points together and the base vary alike among known rows.

    Args:
        found: of the curve's n points and the base as one more.
        known: of validation rows there.
        weights: [n] of the curve's points; equal if None.
    """
    each = found.each(known).cpu()
    weights = _settled(weights, len(each) - 1).cpu()
    spread = torch.stack([weights @ each[:-1], each[-1]]).std(1, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    own = torch.cat([weights / spread[0], 1 / spread[1:]])
    return replace(found, weights=own / own.sum())


def _settled(weights: Tensor | None, points: int) -> Tensor:
    """[n] float64, equal ones if None."""
    return torch.full((points,), 1 / points, dtype=torch.float64) if weights is None else weights.double()


def _mean_state(states: Tensor, weights: Tensor) -> Tensor:
    """[n, E, d] -> [E, d]"""
    return torch.einsum("n,ned->ed", weights.to(states), states)


def fit_familiarity(
    train: SplitStates, weights: Tensor | None = None, classes: int = 0, measure: Measure = "mahalanobis"
) -> Familiarity:
    """Means and covariances of training rows at every point.

    Args:
        train: of training rows.
        weights: [n] of the points; equal if None.
        classes: C where labels are classes that rows share; 0: they are not (choices of a row's own, texts).
        measure: mahalanobis: relative to the classes and to all rows. cosine: to the nearest rows.

    Raises:
        UserError: fewer than 20 rows, states that are not finite.
    """
    points, count, size = train.states.read.shape
    if count < _LEAST_ROWS:
        raise UserError(f"familiarity: expected at least {_LEAST_ROWS} training rows, found {count}; give more")
    if not train.states.read.isfinite().all():
        raise UserError("familiarity: expected finite hidden states, found others")
    weights = _settled(weights, points)
    none = Inverse(torch.zeros(points, 0, 0), torch.zeros(points, 0), torch.ones(points))
    if measure == "cosine":
        nearest = torch.nn.functional.normalize(_mean_state(train.states.read, weights), dim=-1)
        empty = torch.zeros(points, 0)
        return Familiarity(measure, torch.zeros(points, 0, 0), none, empty, none, weights, count, nearest)
    # Imported here: it takes a second, and most commands and all workers of a suite don't need it.
    from sklearn.covariance import ledoit_wolf_shrinkage

    labelled = train.labels >= 0
    there = train.labels[labelled].unique() if classes > 1 else train.labels[:0]
    means, within, centre, whole = [], [], [], []
    for state in train.states.read.double():
        centre.append(state.mean(0))
        centred = state - centre[-1]
        intensity = ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True)
        whole.append(_shrunk(centred, intensity))
        means.append(state[:0])
        if len(there) > 1:
            means[-1] = torch.stack([state[train.labels == c].mean(0) for c in there])
            place = torch.searchsorted(there, train.labels[labelled])
            within.append(_shrunk(state[labelled] - means[-1][place], intensity))
    return Familiarity(
        measure, torch.stack(means).float(), _inverse(within) if within else none, torch.stack(centre).float(),
        _inverse(whole), weights, count, torch.zeros(0, size),
    )  # fmt: skip


def _shrunk(centred: Tensor, intensity: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and -vectors of the covariance of rows [E, d], shrunk by `intensity`."""
    from sklearn.covariance import shrunk_covariance

    found = torch.linalg.eigh(
        torch.from_numpy(shrunk_covariance((centred.mT @ centred / len(centred)).numpy(), intensity))
    )
    values: Tensor = found[0]
    # Rows that are all alike have no covariance: nothing is unfamiliar by more than rounding then.
    return values.clamp_min(torch.finfo(torch.float32).eps * values[-1].clamp_min(1e-12)), found[1]


def _inverse(found: list[tuple[Tensor, Tensor]]) -> Inverse:
    """Of as many eigenvalues as differ from the smallest by more than a part of `_LEFT_OUT` at any point."""
    floor = torch.stack([values[0] for values, _ in found])
    beyond = torch.stack([values > (1 + _LEFT_OUT) * values[0] for values, _ in found]).any(0)
    return Inverse(
        torch.stack([vectors[:, beyond].float() for _, vectors in found]),
        torch.stack([values[beyond] for values, _ in found]),
        floor,
    )


def cosine_distance(states: Tensor, train: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """1 - the mean cosine to the nearest training rows, [E] for states [E, d] and training states [N, d]."""
    cosine = torch.nn.functional.normalize(states, dim=-1) @ torch.nn.functional.normalize(train.to(states), dim=-1).mT
    return 1 - cosine.topk(min(neighbours, cosine.shape[1]), dim=1).values.double().mean(1)


def _to(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype)
