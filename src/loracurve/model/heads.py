"""Heads: a classification head that is a point of the curve itself, and a language-model head read only at places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loracurve.model.functional import contract, read_out
from loracurve.model.layers import CurveLayer
from loracurve.model.routes import Route, repeat_for_rows

__all__ = ["CurveDense", "OutputHead"]


class CurveDense(CurveLayer):
    """A dense layer trained whole (a head of `modules_to_save`): weight [K, o, i] and bias [K, o] are curve points."""

    base_layer: nn.Linear
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base_layer: nn.Linear, route: Route) -> None:
        super().__init__(base_layer, route)
        self._merged: tuple[Tensor, Tensor | None] | None = None

    def shapes(self) -> dict[str, list[int]]:
        return {suffix: list(p.shape) for suffix, p in self.base_layer.named_parameters()}

    def factors(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def set_factors(self, factors: dict[str, Tensor]) -> None:
        self.weight = nn.Parameter(factors["weight"])
        self.bias = nn.Parameter(factors["bias"]) if "bias" in factors else None

    def merge(self, coefficients: Tensor) -> None:
        def combined(points: Tensor, place: Tensor | None) -> Tensor:
            found = torch.tensordot(coefficients.to(points), points.detach(), dims=1)
            return found if place is None else place.copy_(found)

        weight, bias = self._merged or (None, None)
        self._merged = combined(self.weight, weight), None if self.bias is None else combined(self.bias, bias)

    def fold(self, factors: Mapping[str, Tensor]) -> None:
        device = self.base_layer.weight.device
        parts = {suffix: tensor.to(device) for suffix, tensor in factors.items()}
        self._merged = parts["weight"], parts.get("bias")

    def merged_leaves(self) -> dict[str, Tensor]:
        assert self._merged is not None
        weight, bias = self._merged
        weight = weight.detach().requires_grad_()
        bias = None if bias is None else bias.detach().requires_grad_()
        self._merged = weight, bias
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    def unmerge(self) -> None:
        self._merged = None

    def select(self, x: Tensor, rows: Tensor, token_ids: Tensor | None) -> Tensor:
        route, base = self.route, self.base_layer
        if route.kind == "base":
            return read_out(x, base.weight, base.bias, token_ids)
        ids = slice(None) if token_ids is None else token_ids
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as `read_out`
        if route.kind == "merged":
            assert self._merged is not None
            weight, bias = self._merged
            return F.linear(x, weight[ids].to(x.dtype), None if bias is None else bias[ids].to(x.dtype))
        assert route.coefficients is not None
        c = route.coefficients[rows].to(x.dtype)
        # One control point after the other: of a whole vocabulary all at once would be K times as large as the logits.
        y = c[:, :1] * F.linear(x, self.weight[0, ids].to(x.dtype))
        for k in range(1, len(self.weight)):
            y = y + c[:, k : k + 1] * F.linear(x, self.weight[k, ids].to(x.dtype))
        return y if self.bias is None else y + c @ self.bias[:, ids].to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        route = self.route
        if route.kind == "base":
            return self.base_layer(x)
        if route.kind == "merged":
            assert self._merged is not None
            weight, bias = self._merged
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        assert route.coefficients is not None
        # A head is small: all control points at once, whatever the way to run.
        c = repeat_for_rows(route.coefficients, x.shape[0])[None]
        y = contract(x.reshape(1, c.shape[1], -1, x.shape[-1]), self.weight.to(x.dtype)[None], c)[0]
        if self.bias is not None:
            y = y + (c[0] @ self.bias.to(x.dtype))[:, None]
        return y.reshape(*x.shape[:-1], -1)


class OutputHead(nn.Module):
    """The language-model head, computed only at the positions and for the tokens that the route asks for.

    Without positions it is the head itself. With positions its output is [P, C] instead of [R, T, vocabulary]; what a
    model does to logits afterwards (scaling, soft-capping) acts element by element and stays as it is.
    """

    inner: nn.Linear | CurveLayer

    def __init__(self, inner: nn.Linear | CurveLayer, route: Route) -> None:
        super().__init__()
        self.inner = inner
        self.route = route

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that ties or inspects output embeddings."""
        head: Any = self.inner.base_layer if isinstance(self.inner, CurveLayer) else self.inner
        weight: Tensor = head.weight
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        route = self.route
        if route.positions is None:
            return self.inner(hidden)
        chosen = hidden.reshape(-1, hidden.shape[-1])[route.positions]
        if isinstance(self.inner, CurveLayer):
            assert route.position_rows is not None
            return self.inner.select(chosen, route.position_rows, route.token_ids)
        return read_out(chosen, self.inner.weight, self.inner.bias, route.token_ids)
