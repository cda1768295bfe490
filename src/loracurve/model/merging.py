"""Folding one adapter or one point of a curve into copies of the weights it touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from loracurve.curve.lora_space import PREFIX
from loracurve.model.curve_model import CurveModel
from loracurve.model.heads import CurveDense
from loracurve.model.layers import CurveLayer, CurveLinear
from loracurve.model.routes import Route
from loracurve.system.errors import UserError

__all__ = ["merged_adapter", "merged_weights"]


@contextmanager
def merged_adapter(model: CurveModel, adapter: Mapping[str, Tensor]) -> Iterator[None]:
    """Fold one adapter of any rank into copies of the touched weights; the model's curve stays as it is.

    Args:
        adapter: by PEFT name, A ``[q, n_in]``, B ``[n_out, q]``, dense heads; all maps of the model. Tensors that
            require gradients get them, where gradients are enabled.

    Raises:
        UserError: a quantised base weight, into which nothing can be folded.
    """
    for name, layer in model.layers.items():
        _fold(layer, f"{PREFIX}{name}.", adapter)
    model.route.__dict__.update(Route("merged").__dict__)
    try:
        yield
    finally:
        for layer in model.layers.values():
            layer.unmerge()
        model.route.__dict__.update(Route("base").__dict__)


def _fold(layer: CurveLayer, prefix: str, adapter: Mapping[str, Tensor]) -> None:
    device = next(layer.base_layer.parameters()).device
    if isinstance(layer, CurveDense):
        parts = {suffix: adapter[prefix + suffix].to(device) for suffix in layer.shapes()}
        layer._merged = parts["weight"], parts.get("bias")
        return
    assert isinstance(layer, CurveLinear)
    weight = layer.base_layer.weight
    if not weight.is_floating_point():
        raise UserError(
            "a scan folds adapters into floating-point weights, found quantised ones; load the base in bfloat16"
        )
    # float32 while the update is added (float64 for a float64 base), rounded once.
    precise = torch.promote_types(weight.dtype, torch.float32)
    a, b = (adapter[f"{prefix}lora_{x}.weight"].to(device, precise) for x in "AB")
    left, right = (a.mT, b.mT) if layer.transposed else (b, a)
    layer._merged = torch.addmm(weight.detach().to(precise), left, right, alpha=layer.scaling).to(weight.dtype)


def merged_weights(model: CurveModel) -> dict[str, Tensor]:
    """Inside `merged_adapter`: make the merged weights leaves that require gradients.

    Returns:
        The weights by the parameter name of A, dense tensors by their own, in the base layer's layout.
    """
    leaves: dict[str, Tensor] = {}
    for name, layer in model.layers.items():
        if isinstance(layer, CurveDense):
            assert layer._merged is not None
            weight, bias = (None if p is None else p.detach().requires_grad_() for p in layer._merged)
            assert weight is not None
            layer._merged = weight, bias
            leaves |= {f"{PREFIX}{name}.weight": weight} | ({} if bias is None else {f"{PREFIX}{name}.bias": bias})
        else:
            assert isinstance(layer, CurveLinear) and layer._merged is not None
            layer._merged = layer._merged.detach().requires_grad_()
            leaves[f"{PREFIX}{name}.lora_A.weight"] = layer._merged
    return leaves
