"""Linear layers that carry a whole curve of adapters, and the route that says where each row of a batch lies on it.

A point of the curve is theta = sum_k c_k P_k, so a row's own t is only its coefficient vector c. Three ways to run give
the same result: *rows* (each row its own c), *points* (groups of rows share a c, factors are materialised once for each
group) and *merged* (one c for all rows, folded into a copy of the weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from loracurve.perturbation import MapNoise

__all__ = ["CurveDense", "CurveLayer", "CurveLinear", "Layout", "OutputHead", "Route"]


@dataclass(frozen=True)
class Layout:
    """How rows and coefficients belong together: plain numbers, known before anything runs on a device."""

    kind: Literal["base", "rows", "points", "merged"]
    replicas: int = 1
    """how often each row of the batch is run"""
    windows: int = 1
    """*rows*: equal consecutive groups of rows that lie in one segment each"""


@dataclass
class Route:
    """Where the rows of the running forward pass lie on the curve; one object shared by all layers of a model."""

    kind: Literal["base", "rows", "points", "merged"] = "base"
    """`base` leaves the pretrained model alone."""
    coefficients: Tensor | None = None
    """[R, K], the coefficient vector of each row, in the compute dtype; R = replicas * rows of the batch."""
    groups: Tensor | None = None
    """[G, K], *points*: rows lie in G equal consecutive groups of one coefficient vector each."""
    windows: int = 1
    """*rows*: rows lie in this many equal consecutive groups, one for each segment, and use its control points only."""
    degree: int = 1
    """Degree of a segment, the stride of the windows."""
    replicas: int = 1
    """How often each row of the batch is run, at different points."""
    rows: int = 0
    """Rows of the batch before it is replicated."""
    positions: Tensor | None = None
    """[P] flat positions in [R * T] at which the output head is wanted; None: all."""
    position_rows: Tensor | None = None
    """[P] the row of each position."""
    token_ids: Tensor | None = None
    """[C] rows of the output head that are wanted; None: all."""


def _expand(coefficients: Tensor, rows: int) -> Tensor:
    """Repeat row coefficients for inputs whose tokens were flattened into the leading dimension."""
    if coefficients.shape[0] == rows:
        return coefficients
    if rows % coefficients.shape[0]:
        raise RuntimeError(
            f"a layer got {rows} rows for a batch of {coefficients.shape[0]}: it does not keep the batch dimension, "
            "so rows cannot have their own point of the curve"
        )
    return coefficients.repeat_interleave(rows // coefficients.shape[0], dim=0)


def _windows(stack: Tensor, route: Route) -> Tensor:
    """[K, ...] -> [W, k, ...]: the control points that each group of rows uses."""
    if route.windows == 1:
        return stack[None]
    return torch.stack([stack[s * route.degree : (s + 1) * route.degree + 1] for s in range(route.windows)])


def _window_coefficients(route: Route, coefficients: Tensor) -> Tensor:
    """[R, K] -> [W, R/W, k]: the coefficients that belong to `_windows`."""
    grouped = coefficients.reshape(route.windows, -1, coefficients.shape[-1])
    if route.windows == 1:
        return grouped
    return torch.stack([grouped[s][:, s * route.degree : (s + 1) * route.degree + 1] for s in range(route.windows)])


def _rows_product(x: Tensor, stack: Tensor, coefficients: Tensor) -> Tensor:
    """sum_k c_k (x @ stack_k): x [W, N, T, i], stack [W, k, i, o], coefficients [W, N, k] -> [W, N, T, o]."""
    w, n, t, _ = x.shape
    k, o = stack.shape[1], stack.shape[3]
    flat = stack.transpose(1, 2).reshape(w, stack.shape[2], k * o)
    each = torch.bmm(x.reshape(w, n * t, -1), flat).view(w, n, t, k, o)
    return (each * coefficients[:, :, None, :, None]).sum(3)


class CurveLayer(nn.Module):
    """What curve layers share: the base layer, the route, and control points as parameters of leading dimension K."""

    def __init__(self, base_layer: nn.Module, route: Route) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.route = route

    def factors(self) -> dict[str, nn.Parameter]:
        """The layer's control points by PEFT's parameter suffix (`lora_A.weight`, ...), each [K, ...]."""
        raise NotImplementedError

    def shapes(self) -> dict[str, list[int]]:
        """Shape of one control point's tensors by suffix, in PEFT's layout."""
        raise NotImplementedError

    def set_factors(self, factors: dict[str, Tensor]) -> None:
        """Replace the control points by tensors of any leading dimension K, in PEFT's layout."""
        raise NotImplementedError

    def merge(self, coefficients: Tensor) -> None:
        """Fold the point with these coefficients [K] into a copy of the weight, used by the route kind `merged`."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Drop the copy that `merge` made."""
        raise NotImplementedError


class CurveLinear(CurveLayer):
    """y = W0 x + s B(t) A(t) x with stacked factors.

    `A` is [K, r, n_in] and `B` is stored transposed, [K, r, n_out], so that the stacked up-projection is one
    contiguous matrix [K r, n_out]. `scaling` is PEFT's alpha / r (or alpha / sqrt(r)).
    """

    base_layer: nn.Linear
    A: nn.Parameter
    B: nn.Parameter
    noise: MapNoise | None = None
    """perturbs the map in training mode where rows run in groups at few points (`loracurve.perturbation`)"""

    def __init__(
        self, base_layer: nn.Module, route: Route, rank: int, scaling: float, dropout: float, n_in: int, n_out: int
    ) -> None:
        super().__init__(base_layer, route)
        self.rank, self.scaling = rank, scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.in_features, self.out_features = n_in, n_out
        # GPT-2's Conv1D keeps its weight as [n_in, n_out].
        self.transposed = type(base_layer).__name__ == "Conv1D"
        self._merged: Tensor | None = None

    def shapes(self) -> dict[str, list[int]]:
        return {"lora_A.weight": [self.rank, self.in_features], "lora_B.weight": [self.out_features, self.rank]}

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def set_factors(self, factors: dict[str, Tensor]) -> None:
        self.A = nn.Parameter(factors["lora_A.weight"])
        self.B = nn.Parameter(factors["lora_B.weight"].mT.contiguous())

    def merge(self, coefficients: Tensor) -> None:
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise RuntimeError("merged evaluation needs floating-point base weights; use points=... instead")
        a, b = (torch.tensordot(coefficients.to(f), f.detach(), dims=1) for f in (self.A, self.B))
        delta = self.scaling * (b.mT @ a)
        self._merged = (weight.detach().float() + (delta.mT if self.transposed else delta).float()).to(weight.dtype)

    def unmerge(self) -> None:
        self._merged = None

    def forward(self, x: Tensor) -> Tensor:
        route = self.route
        if route.kind == "merged":
            assert self._merged is not None
            weight = self._merged.mT if self.transposed else self._merged
            return F.linear(x, weight, self.base_layer.bias)
        y = self.base_layer(x)
        if route.kind == "base":
            return y
        assert route.coefficients is not None
        if route.kind == "points" or (self.noise is not None and self.training):
            a, b, noise = self._point_factors()
            y = self._add_points(y, self.dropout(x), a, b)
            return y if noise is None else noise.output(y, x, a, b)
        c = _expand(route.coefficients, x.shape[0])
        return self._add_rows(y, self.dropout(x), c, self.A, self.B)

    def select(self, x: Tensor, rows: Tensor, token_ids: Tensor | None) -> Tensor:
        """The layer at chosen inputs x [P, n_in] that come from the batch's `rows` [P], for chosen outputs only."""
        ids = slice(None) if token_ids is None else token_ids
        bias = self.base_layer.bias
        weight = self.base_layer.weight if self._merged is None else self._merged
        y = F.linear(x, (weight.mT if self.transposed else weight)[ids], None if bias is None else bias[ids])
        if self.route.kind in ("base", "merged"):
            return y
        c = self.route.coefficients
        assert c is not None
        if self.noise is not None and self.training:
            a, b, noise = self._point_factors()
            b = b[:, :, ids]
            group, own = rows // (len(c) // len(a)), torch.eye(len(a), dtype=x.dtype, device=x.device)
            y = self._add_rows(y, self.dropout(x), own[group], a, b, windows=False)
            return y if noise is None else noise.output(y, x, a, b, token_ids, group)
        return self._add_rows(y, self.dropout(x), c[rows], self.A, self.B[:, :, ids], windows=False)

    def _point_factors(self) -> tuple[Tensor, Tensor, MapNoise | None]:
        """Factors [G, r, n_in] and [G, r, n_out] at the points of the groups, perturbed, and what perturbs outputs."""
        groups, noise = self.route.groups, self.noise if self.training else None
        if groups is None:
            raise RuntimeError("a perturbation needs rows in equal groups at shared points of the curve")
        a, b = ((groups.to(f) @ f.flatten(1)).view(groups.shape[0], *f.shape[1:]) for f in (self.A, self.B))
        return (a, b, None) if noise is None else (*noise.factors(a, b), noise)

    def _add_points(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT.to(x.dtype))
        out = torch.baddbmm(y.reshape(len(a), -1, y.shape[-1]), hidden, b.to(x.dtype), alpha=self.scaling)
        return out.view(y.shape)

    def _add_rows(self, y: Tensor, x: Tensor, c: Tensor, a: Tensor, b: Tensor, windows: bool = True) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        route = self.route if windows else Route()
        w = route.windows
        c = _window_coefficients(route, c)
        hidden = _rows_product(x.reshape(w, c.shape[1], -1, x.shape[-1]), _windows(a, route).mT, c)
        # The same coefficients expand the hidden vector again: sum_k c_k B_k h is one product with the stacked B.
        spread = (hidden[:, :, :, None, :] * c[:, :, None, :, None]).flatten(3).flatten(1, 2)
        out = torch.baddbmm(y.reshape(w, -1, y.shape[-1]), spread, _windows(b, route).flatten(1, 2), alpha=self.scaling)
        return out.view(y.shape)


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
        weight = torch.tensordot(coefficients.to(self.weight), self.weight.detach(), dims=1)
        bias = None if self.bias is None else torch.tensordot(coefficients.to(self.bias), self.bias.detach(), dims=1)
        self._merged = weight, bias

    def unmerge(self) -> None:
        self._merged = None

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
        c = _expand(route.coefficients, x.shape[0])[None]
        y = _rows_product(x.reshape(1, c.shape[1], -1, x.shape[-1]), self.weight.to(x.dtype).mT[None], c)[0]
        if self.bias is not None:
            y = y + (c[0] @ self.bias.to(x.dtype))[:, None]
        return y.reshape(*x.shape[:-1], -1)


class OutputHead(nn.Module):
    """The language-model head, computed only at the positions and for the tokens that the route asks for.

    Without positions it is the head itself. With positions its output is [P, C] instead of [R, T, vocabulary]; what a
    model does to logits afterwards (scaling, soft-capping) acts element by element and stays as it is.
    """

    inner: nn.Linear | CurveLinear

    def __init__(self, inner: nn.Linear | CurveLinear, route: Route) -> None:
        super().__init__()
        self.inner = inner
        self.route = route

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that ties or inspects output embeddings."""
        return (self.inner.base_layer if isinstance(self.inner, CurveLinear) else self.inner).weight

    def forward(self, hidden: Tensor) -> Tensor:
        route = self.route
        if route.positions is None:
            return self.inner(hidden)
        chosen = hidden.reshape(-1, hidden.shape[-1])[route.positions]
        if isinstance(self.inner, CurveLinear):
            assert route.position_rows is not None
            return self.inner.select(chosen, route.position_rows, route.token_ids)
        ids = slice(None) if route.token_ids is None else route.token_ids
        bias = self.inner.bias
        return F.linear(chosen, self.inner.weight[ids], None if bias is None else bias[ids])
