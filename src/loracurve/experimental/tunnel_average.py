"""Averages over posterior samples off a fitted curve (`loracurve.experimental.tunnel`) instead of points on it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loracurve.curve.bezier import arc_length, gram
from loracurve.curve.quadrature import quadrature
from loracurve.experimental.tunnel import Tunnel, sample_tunnel
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.model_average import Average, effective_points, fit_likelihood_temperature
from loracurve.inference.prediction import point_nll, predict
from loracurve.model.curve_model import CurveModel
from loracurve.system.randomness import generator
from loracurve.tasks.batching import evaluation_batches
from loracurve.tasks.task import Task

__all__ = ["tunnel_average"]


def tunnel_average(model: CurveModel, config: EvaluationConfig, task: Task) -> Average:
    """`config.points` posterior samples of (t, xi), equally weighted, with the likelihood of a fixed subset of rows.

    Raises:
        UserError: control points on a line, beside which there is no tunnel.
    """
    options, spec = config.tunnel, model.spec
    encoded = task.encode(options.split)
    order = torch.randperm(len(encoded), generator=generator(config.seed, "tunnel rows"))[: options.rows]
    subset = replace(encoded, examples=[encoded.examples[i] for i in order.sort().values.tolist()])
    lm = subset.scoring == "lm"
    packing = model.runner.takes_trees(subset)
    batches = [b.to(model.device) for b in evaluation_batches(subset, packing=packing, shared=True)]
    examples = subset.predictions
    labels = subset.labels
    scale = len(encoded) / len(subset)

    def nll(where: Tensor) -> Tensor:
        """[n, E], of the subset."""
        found = predict(model, batches, where, None, summarise=lm, examples=examples, shared=True)
        return point_nll(found, labels)

    control = gram(p.detach() for p in model.factors).cpu()
    width = options.sigma * float(arc_length(control, spec.segments, spec.degree))
    tunnel = Tunnel(control, spec.segments, spec.degree, width, options.prior)
    temperature = options.temperature
    if not temperature:
        t, weights = quadrature("uniform", config.points, spec.segments, closed=spec.closed)
        temperature = scale * fit_likelihood_temperature(nll(t), weights)
    samples = sample_tunnel(
        tunnel,
        lambda row: -scale * float(nll(row[None]).sum()),
        config.points,
        generator(config.seed, "tunnel"),
        temperature,
        options.warm_up,
        options.thin,
    )
    weights = torch.full((config.points,), 1 / config.points, dtype=torch.float64)
    record = {
        "points": config.points,
        "inference": "tunnel",
        "temperature": temperature,
        "rows": len(subset),
        "split": options.split,
        "sigma": width,
        "dimension": tunnel.dimension,
        "evaluations": samples.evaluations,
        "t": samples.t.tolist(),
        "xi": samples.xi.tolist(),
        "log_likelihood": samples.log_likelihood.tolist(),
        "w": weights.tolist(),
        "effective": effective_points(weights),
    }
    return Average(samples.t, weights, record, samples.coefficients)
