"""How fast the loss changes along a path, and what bounds it.

By the chain rule dL/dt = sum_m <grad_{W_m} L, W_m'(t)>, and by Cauchy and Schwarz

    |dL/dt| <= sum_m ||grad_{W_m} L||_F ||W_m'(t)||_F    at each t,

with W_m' = (alpha / r) (B' A + B A'). Gradients at a grid of t certify nothing between its points, and none of this
bounds the height of the path (docs/theory.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from loracurve.curve.lora_space import PREFIX
from loracurve.inference.information import negative_log_likelihood
from loracurve.landscape.paths import Path, update_norms
from loracurve.landscape.scan import LaidOut, mean_loss
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.runner import evaluation_mode

__all__ = ["loss_slopes", "weight_gradients"]


def weight_gradients(
    model: CurveModel, adapter: Mapping[str, Tensor], split: LaidOut
) -> tuple[float, dict[str, Tensor]]:
    """Mean NLL (nats) of a split by one adapter, and its gradient with respect to every merged weight.

    The gradients take as much memory as the touched weights.

    Returns:
        The loss; gradients by the parameter name of A as ``[n_out, n_in]``, of dense tensors by their own name.
    """
    total = 0.0
    with evaluation_mode(model), torch.enable_grad(), model.merger.adapter(adapter):
        leaves = model.merger.weights()
        for batch in split.batches:
            log_probs = model.runner.scores(batch, None).log_softmax(-1)
            loss = negative_log_likelihood(log_probs, batch.labels)[0].sum() / split.examples
            torch.autograd.backward(loss, inputs=list(leaves.values()))
            total += float(loss.detach())
    gradients = {}
    for name, leaf in leaves.items():
        layer = model.layers.get(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradients[name] = grad.mT if isinstance(layer, CurveLinear) and layer.transposed else grad
    return total, gradients


def loss_slopes(
    model: CurveModel,
    path: Path,
    split: LaidOut,
    t: Sequence[float],
    step: float = 1e-2,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """The slope of the loss along a path beside its bound, on one split.

    Args:
        split: few rows are enough: loss, slope and bound are of the same rows.
        t: positions.
        step: half width of the difference quotient, cut at the ends of the segment: at a joint the slope jumps, and
            as for the derivative the right-hand one is meant.
        progress: called after every position.

    Returns:
        t, loss (nats), slope (dL/dt by automatic differentiation), measured (difference quotient of the loss),
        bound (sum of products of norms) and speed (||d Delta W / dt||_F); nats and norm for each unit of t.
    """
    rows = []
    for position in t:
        adapter, velocity = path.adapter(position), path.velocity(position)
        loss, gradients = weight_gradients(model, adapter, split)
        norms = update_norms(velocity, path.scalings)
        slope = bound = 0.0
        for name, gradient in gradients.items():
            slope += _inner(gradient, velocity, name, path.scalings)
            bound += float(gradient.double().norm()) * norms[name]
        low, high = _around(position, step, path.segments)
        ends = [mean_loss(model, path.adapter(x), split) for x in (low, high)]
        rows.append((position, loss, slope, (ends[1] - ends[0]) / (high - low), bound, path.speed(position)))
        if progress is not None:
            progress("slopes")
    return pd.DataFrame(rows, columns=["t", "loss", "slope", "measured", "bound", "speed"])


def _around(t: float, step: float, segments: int) -> tuple[float, float]:
    segment = min(int(t * segments), segments - 1)
    return max(t - step, segment / segments), min(t + step, (segment + 1) / segments)


def _inner(gradient: Tensor, velocity: Mapping[str, Tensor], name: str, scalings: Mapping[str, float]) -> float:
    """<gradient, W'> of one map or dense tensor, without W' itself."""
    gradient = gradient.double().cpu()
    if not name.endswith("lora_A.weight"):
        return float((gradient * velocity[name].double()).sum())
    a, b = velocity[name].double(), velocity[name.replace("lora_A", "lora_B")].double()
    return scalings.get(name, 1.0) * float((b * (gradient @ a.mT)).sum())
