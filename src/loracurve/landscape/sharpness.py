"""Sharpness of the loss around points of a path, in the balanced gauge: (A, B) and (R A, B R^-1) are one model, but
noise and Hessian in LoRA space depend on R, so one gauge is fixed for all points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loracurve.curve.gauge import balanced
from loracurve.inference.information import negative_log_likelihood
from loracurve.landscape.paths import Path
from loracurve.landscape.scan import LaidOut, mean_loss
from loracurve.model.curve_model import CurveModel
from loracurve.model.fused_parts import as_written
from loracurve.model.runner import evaluation_mode
from loracurve.model.weight_noise import perturb_factors
from loracurve.system.randomness import generator

__all__ = ["balanced_adapter", "hessian_top_eigenvalue", "perturbed", "sharpness_along"]


def balanced_adapter(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with every map's factors in the balanced gauge (`gauge.balanced`)."""
    out = dict(adapter)
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            name_b = name.replace("lora_A", "lora_B")
            out[name], out[name_b] = balanced(a, adapter[name_b])
    return out


def perturbed(adapter: Mapping[str, Tensor], sigma: float, seed: int, draw: int = 0) -> dict[str, Tensor]:
    """Gaussian noise on the factors, `sigma` times their size in the balanced gauge, whatever gauge they are in
    (`weight_noise.perturb_factors`). Dense heads stay as they are."""
    out = dict(adapter)
    noise = generator(seed, "sharpness", draw)
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            name_b = name.replace("lora_A", "lora_B")
            b = adapter[name_b]
            moved_a, moved_b = perturb_factors(a.cpu(), b.cpu().mT, sigma, noise)
            out[name], out[name_b] = moved_a.to(a), moved_b.mT.to(b)
    return out


def hessian_top_eigenvalue(
    model: CurveModel, adapter: Mapping[str, Tensor], split: LaidOut, iterations: int = 20, seed: int = 0
) -> float:
    """Eigenvalue of largest magnitude of the Hessian of the mean NLL with respect to all factors (dense heads fixed).

    Power iteration with exact Hessian-vector products (Pearlmutter 1994). Slow: every iteration differentiates twice
    through the model. A bfloat16 base rounds the products; use float32.
    """
    noise = generator(seed, "hessian")
    leaves = {n: p.detach().clone().requires_grad_() for n, p in adapter.items() if "lora_" in n}
    direction = [torch.randn(p.shape, generator=noise).to(p) for p in leaves.values()]
    value = 0.0
    for _ in range(iterations):
        length = torch.stack([d.double().square().sum() for d in direction]).sum().sqrt()
        direction = [d / length.to(d) for d in direction]
        product = [torch.zeros_like(d) for d in direction]
        # The math kernel is the one that can be differentiated twice.
        with evaluation_mode(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), as_written():
            for batch in split.batches:
                with model.merger.adapter({**adapter, **leaves}):
                    log_probs = model.runner.scores(batch, None).log_softmax(-1)
                    loss = negative_log_likelihood(log_probs, batch.labels)[0].sum() / split.examples
                    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
                    along = torch.stack([(g * d).sum() for g, d in zip(first, direction, strict=True)]).sum()
                    second = torch.autograd.grad(along, list(leaves.values()))
                product = [p + s for p, s in zip(product, second, strict=True)]
        value = float(sum((p.double() * d.double()).sum() for p, d in zip(product, direction, strict=True)))
        if not any(bool(p.any()) for p in product):
            return 0.0
        direction = [p.detach() for p in product]
    return value


def sharpness_along(
    model: CurveModel,
    path: Path,
    split: LaidOut,
    t: Sequence[float],
    sigma: float = 0.1,
    draws: int = 3,
    hessian_iterations: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """How much noise on the factors raises the loss at points of a path.

    Args:
        split: rows the loss is taken on.
        t: positions.
        sigma: noise relative to row (A) and column (B) RMS in the balanced gauge.
        draws: noises averaged; the same for every position.
        hessian_iterations: of `hessian_top_eigenvalue`; 0 leaves it out.
        progress: called after every position.

    Returns:
        t, loss (nats), noisy (mean loss under noise), increase (noisy - loss) and hessian (None if left out).
    """
    rows = []
    for position in t:
        adapter = balanced_adapter(path.adapter(position))
        loss = mean_loss(model, adapter, split)
        noisy = [mean_loss(model, perturbed(adapter, sigma, seed, i), split) for i in range(draws)]
        top = hessian_top_eigenvalue(model, adapter, split, hessian_iterations, seed) if hessian_iterations else None
        mean = sum(noisy) / draws
        rows.append((position, loss, mean, mean - loss, top))
        if progress is not None:
            progress("sharpness")
    return pd.DataFrame(rows, columns=["t", "loss", "noisy", "increase", "hessian"])
