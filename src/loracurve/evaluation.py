"""Judging a curve: its model average beside single adapters, their ensemble and straight lines between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loracurve import metrics
from loracurve.calibration import apply_temperature, fit_temperature
from loracurve.config import EvaluationConfig
from loracurve.curve import gram
from loracurve.inference import (
    Predictive,
    arc_length_weights,
    effective_points,
    likelihood_weights,
    quadrature,
)
from loracurve.model import CurveModel
from loracurve.objective import mixture_log_probs, negative_log_likelihood
from loracurve.randomness import generator, stream_seed
from loracurve.splits import predict_splits
from loracurve.tasks import Encoded

__all__ = [
    "Average",
    "Method",
    "choose_average",
    "compare",
    "fit_likelihood_temperature",
    "labels_of",
    "point_nll",
    "predict_split",
    "summarise",
]


@dataclass(frozen=True)
class Average:
    """Points of a curve and their weights."""

    t: Tensor
    weights: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    """how they came about, for metrics.json"""
    coefficients: Tensor | None = None
    """[n, K] where they do not lie on the curve (tunnel)"""

    @property
    def where(self) -> Tensor:
        """What `CurveModel.point_log_probs` takes: [n] t, or [n, K] coefficients."""
        return self.t if self.coefficients is None else self.coefficients


@dataclass
class Method:
    """One way to predict: its predictions by set, and the forward passes each prediction takes."""

    name: str
    passes: int
    sets: dict[str, Predictive] = field(default_factory=dict)
    t: list[float] = field(default_factory=list)
    """curve points, where there are any"""
    validation: tuple[Predictive, Tensor] | None = None
    """predictions of the validation rows and their labels, on which its temperature is fitted"""


def labels_of(encoded: Encoded) -> Tensor:
    """[E] labels of a split, -100 where there is none."""
    return torch.tensor([-100 if e.label is None else e.label for e in encoded.examples])


def predict_split(model: CurveModel, encoded: Encoded, t: Tensor, weights: Tensor | None = None) -> Predictive:
    """Predict a whole split at the points t; see `splits.predict_splits`."""
    return predict_splits(model, {"": encoded}, t, weights)[""]


def choose_average(model: CurveModel, config: EvaluationConfig, validation: Encoded) -> Average:
    """The points and weights that `config` asks for; likelihood weights look at the validation rows."""
    spec = model.spec
    draw = generator(config.seed, "quadrature")
    t, weights = quadrature(config.quadrature, config.points, spec.segments, draw, spec.closed)
    record: dict[str, Any] = {"points": config.points, "quadrature": config.quadrature, "weights": config.weights}
    if config.weights == "arc-length":
        control = gram(p.detach() for p in model.factors).cpu()
        weights = arc_length_weights(t, weights, control, spec.segments, spec.degree)
    elif config.weights == "likelihood":
        predictive = predict_split(model, validation, t)
        nll = point_nll(predictive, labels_of(validation))
        temperature = config.temperature or fit_likelihood_temperature(nll, weights)
        record |= {"temperature": temperature, "rows": nll.shape[1], "prior": weights.tolist()}
        weights = likelihood_weights(nll.sum(1), weights, temperature)
    return Average(
        t, weights, record | {"t": t.tolist(), "w": weights.tolist(), "effective": effective_points(weights)}
    )


def point_nll(predictive: Predictive, labels: Tensor) -> Tensor:
    """[n, E] NLL of each example at each point."""
    if predictive.label_log_probs is not None:
        return -predictive.label_log_probs.double()
    assert predictive.point_log_probs is not None
    return negative_log_likelihood(predictive.point_log_probs.double(), labels)


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


def summarise(methods: list[Method], labels: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures of every method on every set, for metrics.json.

    Args:
        labels: [E] labels of the labelled sets. The others are reported by their uncertainties, and by how well these
            tell them from the test set.
    """
    report: dict[str, Any] = {}
    for method in methods:
        entry: dict[str, Any] = {"passes": method.passes, "t": method.t, "sets": {}, "detection": {}}
        for name, predictive in method.sets.items():
            if name in labels:
                entry["sets"][name] = metrics.classification_summary(predictive, labels[name])
            else:
                entry["sets"][name] = {
                    key: getattr(predictive, key).mean().item()
                    for key in ("entropy", "expected_entropy", "mutual_information", "pairwise_jsd", "disagreement")
                }
            if name not in labels and "test" in method.sets:
                entry["detection"][name] = metrics.detection_summary(method.sets["test"], predictive)
        if method.validation is not None:
            entry["tempered"] = _tempered(method, *method.validation, labels)
        if "test" in method.sets and method.t:
            entry["point_nll"] = point_nll(method.sets["test"], labels["test"]).mean(1).tolist()
        report[method.name] = entry
    return report


def _tempered(method: Method, validation: Predictive, known: Tensor, labels: Mapping[str, Tensor]) -> dict[str, Any]:
    """The temperature of the averaged prediction, fitted on validation rows, and what it makes of the labelled sets."""
    rows = known >= 0
    temperature = fit_temperature(validation.log_probs[rows], known[rows])
    found: dict[str, Any] = {"temperature": temperature, "rows": int(rows.sum()), "sets": {}}
    for name, predictive in method.sets.items():
        if name in labels:
            log_probs = apply_temperature(predictive.log_probs, temperature)
            average = Predictive.from_log_probs(log_probs[None])
            summary = metrics.classification_summary(average, labels[name])
            found["sets"][name] = {key: summary[key] for key in ("nll", "brier", "ece")}
    return found


def compare(first: Method, second: Method, labels: Tensor, seed: int, split: str = "test") -> dict[str, Any]:
    """Paired differences first - second on a labelled split: NLL, accuracy, Brier with bootstrap intervals."""
    a, b = first.sets[split], second.sets[split]
    values = {
        "nll": (a.negative_log_likelihood(labels), b.negative_log_likelihood(labels)),
        "acc": (a.correct(labels), b.correct(labels)),
    }
    if a.point_log_probs is not None and b.point_log_probs is not None:
        values["brier"] = (metrics.brier_per_example(a.probs, labels), metrics.brier_per_example(b.probs, labels))
    out: dict[str, Any] = {"first": first.name, "second": second.name, "split": split}
    for name, (x, y) in values.items():
        found = metrics.paired_bootstrap(x, y, stream_seed(seed, "bootstrap", first.name, second.name, name) % 2**31)
        out[name] = {**found._asdict(), "distinguishable": found.distinguishable}
    return out
