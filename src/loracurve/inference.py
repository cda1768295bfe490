"""Bayesian model averages along a curve: quadratures over t, weights of the points, and what is predicted with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loracurve.curve import gauss_legendre, speed
from loracurve.errors import UserError
from loracurve.objective import (
    entropy,
    jensen_shannon,
    mixture_log_probs,
    negative_log_likelihood,
    pairwise_jensen_shannon,
)

__all__ = [
    "PointModel",
    "Predictive",
    "Rule",
    "arc_length_weights",
    "effective_points",
    "evaluation_mode",
    "likelihood_weights",
    "predict",
    "quadrature",
]

Rule = Literal["uniform", "gauss-legendre", "monte-carlo"]

_CHUNK = 2**22  # log-probabilities summarised at a time; a vocabulary for every pair in float64 would not fit otherwise


def quadrature(
    kind: Rule, points: int, segments: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Points t and weights, both ``[points]`` float64, for averages over t uniform on [0, 1]; the weights sum to 1.

    uniform is equally spaced with both ends and equal weights (one point: t = 0.5), gauss-legendre puts
    points / segments nodes into each segment, monte-carlo draws from `generator`.

    Raises:
        UserError: unknown kind, fewer than one point, or for gauss-legendre no multiple of `segments`.
        ValueError: monte-carlo without a generator.
    """
    if points < 1:
        raise UserError(f"points: expected at least 1, found {points}; ask for 10")
    weights = torch.full((points,), 1 / points, dtype=torch.float64)
    if kind == "uniform":
        return (torch.linspace(0, 1, points, dtype=torch.float64) if points > 1 else weights / 2), weights
    if kind == "monte-carlo":
        if generator is None:
            raise ValueError("expected a torch.Generator for monte-carlo points, found None")
        return torch.rand(points, generator=generator, dtype=torch.float64, device=generator.device), weights
    if kind == "gauss-legendre":
        if points % segments:
            close = max(round(points / segments), 1) * segments
            raise UserError(f"points: expected a multiple of the {segments} segments, found {points}; ask for {close}")
        nodes, node_weights = gauss_legendre(points // segments)
        t = (torch.arange(segments, dtype=torch.float64).unsqueeze(1) + nodes) / segments
        return t.flatten(), (node_weights / segments).repeat(segments)
    raise UserError(f"quadrature: expected uniform, gauss-legendre or monte-carlo, found {kind!r}; choose one of them")


def arc_length_weights(t: Tensor, w: Tensor, gram: Tensor, segments: int, degree: int) -> Tensor:
    """Prior uniform in arc length: w_i ||theta'(t_i)||, normalised, ``[n]``; `w` itself for a curve of length 0."""
    weights = w * speed(t, gram, segments, degree).to(w)
    return weights / weights.sum() if weights.sum() > 0 else w


def likelihood_weights(total_nll: Tensor, prior_weights: Tensor, temperature: float) -> Tensor:
    """Tempered posterior over the points, w_i ~ prior_i exp(-total_nll_i / T), ``[n]`` float64, summing to 1.

    `total_nll` ``[n]`` is summed over the data, in nats. T = 1 is Bayes' rule, T = infinity leaves the prior.

    Raises:
        UserError: T is not positive.
        ValueError: no point has a finite likelihood and a positive prior weight.
    """
    if not temperature > 0:
        raise UserError(f"temperature: expected a number above 0, found {temperature}; raise it")
    weights = (prior_weights.double().log() - total_nll.double() / temperature).softmax(0)
    if weights.isnan().any():
        raise ValueError(f"expected finite total NLL at some point, found {total_nll.tolist()}")
    return weights


def effective_points(weights: Tensor) -> float:
    """1 / sum w_i^2 (Kish): how many equally weighted points would average as much."""
    return 1 / weights.double().square().sum().item()


@dataclass(frozen=True, eq=False)
class Predictive:
    """Predictions for E examples at n points of a curve, or by n members of an ensemble, and their average.

    Built by `from_log_probs`. Derived quantities are float64, entropies and divergences in nats; with the average
    p = sum_i w_i p_i in probability space, ``entropy = expected_entropy + mutual_information``.
    """

    weights: Tensor  # [n], summing to 1
    confidence: Tensor  # [E], the average's largest probability
    prediction: Tensor  # [E], the average's most probable class
    entropy: Tensor  # [E], H[p]: total uncertainty
    expected_entropy: Tensor  # [E], sum_i w_i H[p_i]: aleatoric, what the data leave open
    mutual_information: Tensor  # [E], H[p] - sum_i w_i H[p_i]: epistemic, between the points, which are whole models
    pairwise_jsd: Tensor  # [E], mean JSD of the pairs of points; its expectation does not grow with n as the MI's does
    disagreement: Tensor  # [E], weight of the points whose most probable class is not the average's
    point_log_probs: Tensor | None = None  # [n, E, C] float32, absent classes at -inf; None once summarised
    labels: Tensor | None = None  # [E], only if summarised
    label_log_probs: Tensor | None = None  # [n, E], the label's log-probability at each point, only if summarised

    @classmethod
    def from_log_probs(cls, point_log_probs: Tensor, weights: Tensor | None = None) -> Predictive:
        """Average normalised log-probabilities ``[n, E, C]`` with weights ``[n]`` (equal if None).

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
        chunks = point_log_probs.split(max(1, _CHUNK // (n * classes)), dim=1)
        columns = [_per_example(chunk.double(), weights) for chunk in chunks]
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
            columns["point_log_probs"] = [
                pad(part._full, (0, classes - part._full.shape[-1]), value=-math.inf) for part in parts
            ]
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
        return replace(self, point_log_probs=None, labels=labels, label_log_probs=points)

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
_EXAMPLE_DIM = {f.name: int(f.name in ("point_log_probs", "label_log_probs")) for f in fields(Predictive)[1:]}


def _per_example(log_probs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    if not (log_probs.logsumexp(-1).abs() < 1e-3).all():
        raise ValueError("expected normalised log-probabilities without NaN, found others; apply log_softmax")
    average = mixture_log_probs(log_probs, weights)
    confidence, prediction = average.max(-1)
    return {
        "confidence": confidence.exp(),
        "prediction": prediction,
        "entropy": entropy(average),
        "expected_entropy": weights @ entropy(log_probs),
        "mutual_information": jensen_shannon(log_probs, weights),
        "pairwise_jsd": pairwise_jensen_shannon(log_probs),
        "disagreement": weights @ (log_probs.argmax(-1) != prediction).double(),
    }


class PointModel(Protocol):
    """A module that predicts at several points of a curve at once, such as `CurveModel`."""

    def point_log_probs(self, batch: Any, t: Tensor) -> Tensor:
        """Normalised float32 log-probabilities ``[n, E, C]`` of the batch at the points t ``[n]``."""
        ...

    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


@contextmanager
def evaluation_mode(model: PointModel | nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def predict(
    model: PointModel,
    batches: Iterable[Any],
    t: Tensor,
    weights: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    summarise: bool = False,
    examples: int | None = None,
) -> Predictive:
    """Predict every example at every curve point, in evaluation mode and without gradients.

    Args:
        model: see `PointModel`.
        batches: whatever the model takes, each with ``.index``, the numbers ``[E]`` of its examples (together 0..N-1,
            each once, in any order), and for `summarise` ``.labels`` ``[E]``.
        t, weights: curve points and their weights ``[n]``; equal weights if None.
        progress: called after each batch with the number of examples done.
        summarise: keep only per-example summaries (`Predictive.summarise`).
        examples: N where it is known; without it examples missing at the very end go unnoticed.

    Returns:
        The predictions of examples 0..N-1 in this order, on the CPU.

    Raises:
        RuntimeError: an example is missing or there twice, or the model returned another shape.
    """
    outputs, parts, indices, done = [], [], [torch.zeros(0, dtype=torch.long)], 0
    with torch.inference_mode(), evaluation_mode(model):
        for batch in batches:
            log_probs = model.point_log_probs(batch, t)
            if log_probs.shape[:-1] != (len(t), len(batch.index)):
                raise RuntimeError(f"expected [{len(t)}, {len(batch.index)}, C], found {list(log_probs.shape)}")
            if summarise:
                parts.append(Predictive.from_log_probs(log_probs, weights).summarise(batch.labels).to("cpu"))
            else:
                outputs.append(log_probs)
            indices.append(batch.index)
            done += len(batch.index)
            if progress is not None:
                progress(done)
    order = torch.cat([index.cpu() for index in indices])
    expected = done if examples is None else examples
    if not done or not torch.equal(order.sort().values, torch.arange(expected)):
        missing = set(range(expected)) - set(order.tolist())
        raise RuntimeError(
            f"expected each of the examples 0..{expected - 1} once, found {done}, without {sorted(missing)[:5]}; "
            "the batches dropped or repeated some"
        )
    # From here outside inference mode: its tensors could not take part in later gradients (temperature fits).
    if not summarise:
        parts = [Predictive.from_log_probs(part.cpu(), weights) for part in outputs]
    return Predictive.cat(parts).index(order.argsort())
