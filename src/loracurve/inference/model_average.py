"""Bayesian model averages along a curve: which points, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from loracurve.curve.bezier import gram, speed
from loracurve.curve.quadrature import quadrature
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.information import mixture_log_probs
from loracurve.inference.prediction import Way, point_nll, predict_split, predict_splits
from loracurve.inference.predictive import Predictive
from loracurve.inference.unknowns import Unknowns
from loracurve.model.curve_model import CurveModel
from loracurve.system.randomness import generator
from loracurve.system.ranges import Positive, in_range
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task

__all__ = [
    "Average",
    "average_of",
    "arc_length_weights",
    "choose_average",
    "equal",
    "effective_points",
    "fit_likelihood_temperature",
    "likelihood_weights",
]


REGISTERED = {"tunnel": "loracurve.experimental.tunnel_average:tunnel_average"}
"""Inference methods beside the curve's own, by the name that `EvaluationConfig.inference` has for them."""


@dataclass(frozen=True)
class Average:
    """Points of a curve and their weights."""

    t: Tensor
    weights: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    """how they came about, for metrics.json"""
    coefficients: Tensor | None = None
    """[n, K] where they do not lie on the curve (tunnel)"""
    unknowns: Unknowns | None = None
    """Gaussians at these points and the distance from the training data, where they were built"""

    def predict(self, model: CurveModel, encoded: Encoded, way: Way = "auto") -> Predictive:
        """Predict a split by this average, with its unknowns; arguments and errors as `predict_split`."""
        return self.predict_all(model, {"": encoded}, way)[""]

    def predict_all(self, model: CurveModel, splits: Mapping[str, Encoded], way: Way = "auto") -> dict[str, Predictive]:
        """The same for several splits."""
        if self.unknowns is None:
            return predict_splits(model, splits, self.where, self.weights, way)
        return self.unknowns.predict(model, splits, self.where, self.weights, way)

    @property
    def points(self) -> list[tuple[float, ...]]:
        """Place and weight of each point."""
        where = self.where.reshape(len(self.weights), -1).tolist()
        return [(*place, weight) for place, weight in zip(where, self.weights.tolist(), strict=True)]

    def has(self, points: Sequence[Sequence[float]]) -> bool:
        """Whether these are its points, up to what rounding does to weights that were fitted."""
        own = self.points
        if [len(point) for point in own] != [len(point) for point in points]:
            return False
        return all(abs(a - b) < 1e-3 for p, q in zip(own, points, strict=True) for a, b in zip(p, q, strict=True))

    @property
    def where(self) -> Tensor:
        """What `CurveModel.point_log_probs` takes: [n] t, or [n, K] coefficients."""
        return self.t if self.coefficients is None else self.coefficients


def equal(t: Tensor) -> Average:
    """Points t [n] with equal weights."""
    return Average(t, torch.full((len(t),), 1 / len(t), dtype=torch.float64))


def average_of(model: CurveModel, config: EvaluationConfig, task: Task) -> Average:
    """The points and weights to predict with, by the inference method that `config` names."""
    if config.inference == "curve":
        # Only likelihood weights need the rows, which may no longer be there.
        return choose_average(model, config, task.encode("validation") if config.weights == "likelihood" else None)
    found: Average = resolve_name(REGISTERED[config.inference])(model, config, task)
    return found


def choose_average(model: CurveModel, config: EvaluationConfig, validation: Encoded | None) -> Average:
    """The points and weights that `config` asks for; only likelihood weights look at the validation rows."""
    spec = model.spec
    draw = generator(config.seed, "quadrature")
    t, weights = quadrature(config.quadrature, config.points, spec.segments, draw, spec.closed)
    record: dict[str, Any] = {"points": config.points, "quadrature": config.quadrature, "weights": config.weights}
    if config.weights == "arc-length":
        control = gram(p.detach() for p in model.factors).cpu()
        weights = arc_length_weights(t, weights, control, spec.segments, spec.degree)
    elif config.weights == "likelihood":
        assert validation is not None
        predictive = predict_split(model, validation, t)
        nll = point_nll(predictive, validation.labels)
        temperature = config.temperature or fit_likelihood_temperature(nll, weights)
        record |= {"temperature": temperature, "rows": nll.shape[1], "prior": weights.tolist()}
        weights = likelihood_weights(nll.sum(1), weights, temperature)
    return Average(
        t, weights, record | {"t": t.tolist(), "w": weights.tolist(), "effective": effective_points(weights)}
    )


def fit_likelihood_temperature(nll: Tensor, prior: Tensor) -> float:
    """T in [0.1, 10^6] whose weights give the lowest NLL of the average on the same rows; one number, a coarse grid.

    Args:
        nll: [n, E] of each example at each point. prior: [n] weights before the data.
    """
    grid = torch.logspace(-1, 6, 57, dtype=torch.float64).tolist()

    def average_nll(temperature: float) -> float:
        w = likelihood_weights(nll.sum(1), prior, temperature)
        return float(-mixture_log_probs(-nll, w).mean())

    return min(grid, key=average_nll)


def arc_length_weights(t: Tensor, w: Tensor, gram: Tensor, segments: int, degree: int) -> Tensor:
    """Prior uniform in arc length: w_i ||theta'(t_i)||, normalised, ``[n]``; `w` itself for a curve of length 0."""
    weights = w * speed(t, gram, segments, degree).to(w)
    return weights / weights.sum() if weights.sum() > 0 else w


def likelihood_weights(total_nll: Tensor, prior_weights: Tensor, temperature: float) -> Tensor:
    """Tempered posterior over the points, w_i ~ prior_i exp(-total_nll_i / T), ``[n]`` float64, summing to 1.

    `total_nll` ``[n]`` is summed over the data, in nats. T = 1 is Bayes' rule, T = infinity leaves the prior.

    Raises:
        UserError: T is not positive, or so close to 0 that float32 does not tell them apart.
        ValueError: no point has a finite likelihood and a positive prior weight.
    """
    if temperature != math.inf:
        temperature = in_range("temperature", temperature, Positive)
    weights = (prior_weights.double().log() - total_nll.double() / temperature).softmax(0)
    if weights.isnan().any():
        raise ValueError(f"expected finite total NLL at some point, found {total_nll.tolist()}")
    return weights


def effective_points(weights: Tensor) -> float:
    """1 / sum w_i^2 (Kish): how many equally weighted points would average as much."""
    return 1 / weights.double().square().sum().item()
