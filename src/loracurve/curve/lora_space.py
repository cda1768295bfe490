"""LoRA space: adapters and control points as named tensors.

Control points are a `dict[str, Tensor]` with PEFT's parameter names (`base_model.model.<map>.lora_A.weight`, ...) and a
leading dimension K; A is [K, r, n_in], B is [K, n_out, r], dense heads [K, ...]. One adapter is such a dict without K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracurve.system.errors import UserError

__all__ = ["PREFIX", "ControlPoints", "adapter_at", "column", "head_labels", "stack_adapters"]


ControlPoints = dict[str, Tensor]

PREFIX = "base_model.model."


def column(values: Tensor, like: Tensor) -> Tensor:
    """[K] or [1] -> [K, 1, ...] in the dtype and on the device of `like`, to weigh or mask stacked control points."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))


def adapter_at(points: ControlPoints, coefficients: Tensor) -> dict[str, Tensor]:
    """One adapter: sum_k c_k P_k for coefficients [K], taken in float64 and returned in the points' dtype."""
    return {
        name: torch.tensordot(coefficients.double().to(p.device), p.detach().double(), dims=1).to(p.dtype)
        for name, p in points.items()
    }


def stack_adapters(adapters: list[dict[str, Tensor]]) -> ControlPoints:
    """Stack M adapters of the same names and shapes into tensors of leading dimension M."""
    first = adapters[0]
    for i, adapter in enumerate(adapters[1:], 1):
        if adapter.keys() != first.keys():
            odd = sorted(adapter.keys() ^ first.keys())[0]
            raise UserError(f"adapters have different targets: {odd} is not in both adapter 0 and adapter {i}")
        for name, tensor in adapter.items():
            if tensor.shape != first[name].shape:
                raise UserError(
                    f"adapters have different shapes at {name}: {list(first[name].shape)} in adapter 0, "
                    f"{list(tensor.shape)} in adapter {i}; all ranks and targets must agree"
                )
    return {name: torch.stack([a[name].float() for a in adapters]) for name in first}


def head_labels(points: ControlPoints) -> int | None:
    """How many labels the classification head among stacked tensors ``[K, ...]`` has; None where there is none.

    Of several dense layers it is the one whose outputs no other one takes.
    """
    dense = [p.shape[1:] for name, p in points.items() if p.dim() == 3 and ".lora_" not in name]
    taken = {inputs for _, inputs in dense}
    return next((outputs for outputs, _ in dense if outputs not in taken), max((o for o, _ in dense), default=None))
