"""`Predictive`: predictions at several points of a curve, their average, and the uncertainty split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from loracurve.inference.information import (
    entropy,
    jensen_shannon,
    mixture_log_probs,
    negative_log_likelihood,
    pairwise_jensen_shannon,
)

__all__ = ["Predictive"]


_CHUNK = 2**22  # log-probabilities summarised at a time: a vocabulary in float64 would not fit otherwise


@dataclass(frozen=True, eq=False)
class Predictive:
    """Predictions for E examples at n points of a curve, or by n members of an ensemble, and their average.

    Built by `from_log_probs`. Derived quantities are float64, entropies and divergences in nats; with the average
    p = sum_i w_i p_i in probability space,

        entropy = expected_entropy + mutual_information
        mutual_information = within_points + between_points

    A point may itself be an average p_i = E_w p_iw over models w around it (`inference.laplace`); without such models
    `within_points` is 0.
    """

    weights: Tensor
    """``[n]``, summing to 1"""
    confidence: Tensor
    """``[E]``, the average's largest probability"""
    prediction: Tensor
    """``[E]``, the average's most probable class"""
    entropy: Tensor
    """``[E]``, H[p]: total uncertainty"""
    expected_entropy: Tensor
    """``[E]``, sum_i w_i E_w H[p_iw]: aleatoric, what the data leave open"""
    mutual_information: Tensor
    """``[E]``, H[p] - `expected_entropy`: epistemic, what more training data could settle"""
    within_points: Tensor
    """``[E]``, sum_i w_i (H[p_i] - E_w H[p_iw]): the part within the points, large far from the training data"""
    between_points: Tensor
    """``[E]``, H[p] - sum_i w_i H[p_i]: the part between the points: the fine-tunes disagree"""
    pairwise_jsd: Tensor
    """``[E]``, mean Jensen-Shannon divergence of the pairs of points; its expectation does not grow with n as that of
    the mutual information does"""
    disagreement: Tensor
    """``[E]``, weight of the points whose most probable class is not the average's"""
    point_log_probs: Tensor | None = None
    """``[n, E, C]`` float32, absent classes at -inf; None once summarised"""
    labels: Tensor | None = None
    """``[E]``, only if summarised"""
    label_log_probs: Tensor | None = None
    """``[n, E]``, the label's log-probability at each point, only if summarised"""
    model_label_log_probs: Tensor | None = None
    """``[n, E]``, the label's log-probability under the point itself, where `point_log_probs` are averages over models
    around it; 0 where there is no label"""
    distance: Tensor | None = None
    """``[E]``, from the training data, where it was measured (`inference.familiarity`)"""
    base_log_probs: Tensor | None = None
    """``[1, E, C]`` of the base without adapters, where it was run beside the points; None once summarised"""

    @classmethod
    def from_log_probs(
        cls, point_log_probs: Tensor, weights: Tensor | None = None, open_entropy: Tensor | None = None
    ) -> Predictive:
        """Average normalised log-probabilities ``[n, E, C]`` with weights ``[n]`` (equal if None).

        Args:
            open_entropy: ``[n, E]``, E_w H[p_iw], where the points are averages over models around them; None: each
                point is one model.

        Raises:
            ValueError: shapes that do not fit, log-probabilities or weights that are NaN or not normalised.
        """
        if point_log_probs.dim() != 3 or 0 in (len(point_log_probs), point_log_probs.shape[2]):
            raise ValueError(f"expected log-probabilities [n, E, C], found shape {list(point_log_probs.shape)}")
        n, _, classes = point_log_probs.shape
        weights = torch.full((n,), 1 / n) if weights is None else weights
        weights = weights.to(point_log_probs.device, torch.float64)
        if weights.shape != (n,) or not (weights >= 0).all() or not abs(weights.sum().item() - 1) < 1e-6:
            raise ValueError(f"expected {n} weights >= 0 with sum 1, found {weights.tolist()}")
        weights = weights / weights.sum()
        size = max(1, _CHUNK // (n * classes))
        chunks = point_log_probs.split(size, dim=1)
        leaving = [None] * len(chunks) if open_entropy is None else open_entropy.split(size, dim=1)
        columns = [_per_example(chunk.double(), weights, part) for chunk, part in zip(chunks, leaving, strict=True)]
        joined = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        return cls(weights=weights, point_log_probs=point_log_probs.float(), **joined)

    @classmethod
    def cat(cls, parts: Sequence[Predictive]) -> Predictive:
        """Join along examples; where the numbers of classes differ the missing ones get log-probability -inf.

        Raises:
            ValueError: no parts, weights that differ, or summarised and full parts mixed.
        """
        if not parts:
            raise ValueError("expected at least one Predictive, found none")
        first = parts[0]
        if any(not torch.equal(part.weights, first.weights) for part in parts):
            raise ValueError("expected the same weights in all parts, found different ones")
        if len({part.point_log_probs is None for part in parts}) > 1:
            raise ValueError("expected all parts summarised or none, found both; summarise the others")
        columns = {name: [getattr(part, name) for part in parts] for name in _EXAMPLE_DIM}
        if first.point_log_probs is not None:
            classes = max(part._full.shape[-1] for part in parts)
            for name in ("point_log_probs", "base_log_probs"):
                if getattr(first, name) is not None:
                    columns[name] = [pad(x, (0, classes - x.shape[-1]), value=-math.inf) for x in columns[name]]
        joined = first._map(lambda name, _, dim: torch.cat(columns[name], dim))
        return replace(joined, weights=first.weights.clone())

    def index(self, idx: Tensor) -> Predictive:
        """The examples with these numbers (long), or where a mask ``[E]`` (bool) is true."""
        idx = idx.nonzero().squeeze(1) if idx.dtype == torch.bool else idx
        return self._map(lambda _, tensor, dim: tensor.index_select(dim, idx.to(tensor.device)))

    def to(self, device: str | torch.device) -> Predictive:
        """The same on another device."""
        return replace(self._map(lambda _, tensor, dim: tensor.to(device)), weights=self.weights.to(device))

    def summarise(self, labels: Tensor) -> Predictive:
        """Drop `point_log_probs` and with it `probs`, for outputs as wide as a vocabulary.

        The labels and their probability at each point are kept, so NLL, accuracy, ECE and uncertainties remain.
        """
        labels = self._check_labels(labels)
        points = -negative_log_likelihood(self._full, labels)
        return replace(self, point_log_probs=None, base_log_probs=None, labels=labels, label_log_probs=points)

    @cached_property
    def log_probs(self) -> Tensor:
        """``[E, C]``, log of the average in probability space; ValueError if summarised."""
        return mixture_log_probs(self._full.double(), self.weights)

    @property
    def probs(self) -> Tensor:
        """``[E, C]``, the average in probability space; ValueError if summarised."""
        return self.log_probs.exp()

    @property
    def point_probs(self) -> Tensor:
        """``[n, E, C]`` float32, each point's own probabilities; ValueError if summarised."""
        return self._full.exp()

    def __len__(self) -> int:
        return len(self.entropy)

    def negative_log_likelihood(self, labels: Tensor | None = None) -> Tensor:
        """``[E]``, -log p(label) of the average. A summarised object knows its labels: ValueError for others."""
        labels = self._check_labels(labels)
        points = self.summarise(labels).label_log_probs if self.label_log_probs is None else self.label_log_probs
        assert points is not None
        return -mixture_log_probs(points.double(), self.weights)

    def correct(self, labels: Tensor | None = None) -> Tensor:
        """``[E]`` bool, whether the average's most probable class is the label; labels as above."""
        return self.prediction == self._check_labels(labels)

    @property
    def _full(self) -> Tensor:
        if self.point_log_probs is None:
            raise ValueError("expected class probabilities, found a summarised Predictive; keep the full one")
        return self.point_log_probs

    def _check_labels(self, labels: Tensor | None) -> Tensor:
        known = self.labels if labels is None else labels.to(self.prediction.device)
        if known is None:
            raise ValueError("expected labels, found None; only a summarised Predictive knows its own")
        if known.shape != self.prediction.shape or (self.labels is not None and not torch.equal(known, self.labels)):
            raise ValueError(f"expected the labels of these {len(self)} examples, found others {list(known.shape)}")
        return known

    def _map(self, function: Callable[[str, Tensor, int], Tensor]) -> Predictive:
        """Apply function(name, tensor, dimension of the examples) to every per-example field there is."""
        there = {name: getattr(self, name) for name in _EXAMPLE_DIM if getattr(self, name) is not None}
        return replace(self, **{name: function(name, tensor, _EXAMPLE_DIM[name]) for name, tensor in there.items()})


# Dimension of the examples in every field that has one.
_EXAMPLE_DIM = {f.name: int(f.name.endswith("_log_probs")) for f in fields(Predictive)[1:]}


def _per_example(log_probs: Tensor, weights: Tensor, open_entropy: Tensor | None) -> dict[str, Tensor]:
    if not (log_probs.logsumexp(-1).abs() < 1e-3).all():
        raise ValueError("expected normalised log-probabilities without NaN, found others; apply log_softmax")
    average = mixture_log_probs(log_probs, weights)
    confidence, prediction = average.max(-1)
    between = jensen_shannon(log_probs, weights)
    of_points = weights @ entropy(log_probs)
    expected = of_points if open_entropy is None else weights @ open_entropy.to(weights)
    return {
        "confidence": confidence.exp(),
        "prediction": prediction,
        "entropy": entropy(average),
        "expected_entropy": expected,
        "mutual_information": between + (of_points - expected),
        "within_points": of_points - expected,
        "between_points": between,
        "pairwise_jsd": pairwise_jensen_shannon(log_probs),
        "disagreement": weights @ (log_probs.argmax(-1) != prediction).double(),
    }
