"""Linear layers that carry a whole curve of adapters; a route (`routes`) says where each row of a batch lies on it.

A point of the curve is theta = sum_k c_k P_k, so a row's own t is only its coefficient vector c. Four ways to run give
the same result: *rows* (each row its own c), *tokens* (each token, where examples share rows), *points* (groups of rows
share a c, factors are materialised once for each group) and *merged* (one c for all rows, folded into a copy of the
weight).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loracurve.model.functional import (
    BaseMap,
    Mixing,
    add_product,
    combine,
    contract,
    expand,
    linear_maps,
    mixing,
    read_out,
)
from loracurve.model.routes import Route, Shared, repeat_for_rows
from loracurve.model.weight_noise import MapNoise
from loracurve.system.errors import UserError

__all__ = ["CurveLayer", "CurveLinear", "join_siblings"]


class CurveLayer(nn.Module):
    """What curve layers share: the base layer, the route, and control points as parameters of leading dimension K."""

    def __init__(self, base_layer: nn.Module, route: Route) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.route = route

    def select(self, x: Tensor, rows: Tensor, token_ids: Tensor | None) -> Tensor:
        """The layer at chosen inputs x [P, n_in] that come from the batch's `rows` [P], for chosen outputs only."""
        raise NotImplementedError

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
        """Fold the point with these coefficients [K] into a copy of the weight, used by the route kind `merged`. Until
        `unmerge` the copy keeps its place in memory: CUDA graphs read it there."""
        raise NotImplementedError

    def fold(self, factors: Mapping[str, Tensor]) -> None:
        """The same for factors that are given, by suffix, in PEFT's layout and of any rank."""
        raise NotImplementedError

    def merged_leaves(self) -> dict[str, Tensor]:
        """Make the copy that `fold` made a leaf that requires gradients; by suffix, that of a map by A's."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Drop the copy that `merge` or `fold` made."""
        raise NotImplementedError


class CurveLinear(CurveLayer):
    """y = W0 x + s B(t) A(t) x with stacked factors.

    `A` is [K, r, n_in] and `B` is stored transposed, [K, r, n_out], so that the stacked up-projection is one
    contiguous matrix [K r, n_out]. `scaling` is PEFT's alpha / r (or alpha / sqrt(r)).
    """

    base_layer: nn.Linear
    A: nn.Parameter
    B: nn.Parameter
    cast: tuple[Tensor, Tensor] | None = None
    """A and B in the compute dtype, where those of all layers were cast together for this pass"""
    noise: MapNoise | None = None
    """perturbs the map in training mode where rows run in groups at few points (`training.perturbation`)"""

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
        self.siblings: tuple[CurveLinear, ...] = (self,)
        """layers expected to see the same input, this one among them; they are run together"""
        self.place = 0
        """place among the siblings"""

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that look at it (T5 at its dtype), as PEFT's layers have it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, likewise (Jamba sets its data)."""
        return self.base_layer.bias

    def shapes(self) -> dict[str, list[int]]:
        return {"lora_A.weight": [self.rank, self.in_features], "lora_B.weight": [self.out_features, self.rank]}

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def set_factors(self, factors: dict[str, Tensor]) -> None:
        self.A = nn.Parameter(factors["lora_A.weight"])
        self.B = nn.Parameter(factors["lora_B.weight"].mT.contiguous())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cast": None}  # belongs to a pass: copies of the layer have none

    def _stack(self, which: Literal[0, 1], dtype: torch.dtype) -> Tensor:
        """A (0) or B (1), all control points, in a dtype."""
        if self.cast is not None and self.cast[which].dtype == dtype:
            return self.cast[which]
        return (self.A, self.B)[which].to(dtype)

    def _at_groups(self, which: Literal[0, 1], dtype: torch.dtype) -> Tensor:
        """[G, r, n], A (0) or B (1) at the points of the groups."""
        assert self.route.groups is not None
        if self.route.whole:
            return self._stack(which, dtype)
        stack, held = (self.A, self.B)[which], self.route.held
        if held is None or torch.is_grad_enabled():
            return combine(self.route.groups, stack, dtype)
        version = 0 if stack.is_inference() else stack._version
        found = held.get((self, which, dtype))
        if found is None or found[0] is not stack or found[1] != version:
            found = stack, version, combine(self.route.groups, stack, dtype)
            held[self, which, dtype] = found
        return found[2]

    def merge(self, coefficients: Tensor) -> None:
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise UserError("folding needs floating-point base weights, found quantised ones; run points together")
        weight = weight.detach()
        a, b = (combine(coefficients[None].to(f.device), f.detach(), weight.dtype)[0] for f in (self.A, self.B))
        left, right = (a.mT, b) if self.transposed else (b.mT, a)
        if self._merged is None:
            self._merged = torch.empty_like(weight)
        # The product is added in the accumulators, so that the sum is rounded once.
        torch.addmm(weight, left, right, alpha=self.scaling, out=self._merged)

    def fold(self, factors: Mapping[str, Tensor]) -> None:
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise UserError(
                "a scan folds adapters into floating-point weights, found quantised ones; load the base in bfloat16"
            )
        # float32 while the update is added (float64 for a float64 base), rounded once.
        precise = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factors[f"lora_{x}.weight"].to(weight.device, precise) for x in "AB")
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        self._merged = torch.addmm(weight.detach().to(precise), left, right, alpha=self.scaling).to(weight.dtype)

    def merged_leaves(self) -> dict[str, Tensor]:
        assert self._merged is not None
        self._merged = self._merged.detach().requires_grad_()
        return {"lora_A.weight": self._merged}

    def unmerge(self) -> None:
        self._merged = None

    def forward(self, x: Tensor) -> Tensor:
        route = self.route
        if route.kind == "merged":
            assert self._merged is not None
            weight = self._merged.mT if self.transposed else self._merged
            return F.linear(x, weight, self.base_layer.bias)
        if route.kind == "base":
            return self.base_layer(x)
        if self.noise is not None and self.training:
            return self._perturbed(x, self.noise)
        return self._with_siblings(x)

    def select(self, x: Tensor, rows: Tensor, token_ids: Tensor | None) -> Tensor:
        ids = slice(None) if token_ids is None else token_ids
        weight = self.base_layer.weight if self._merged is None else self._merged
        y = read_out(x, weight.mT if self.transposed else weight, self.base_layer.bias, token_ids)
        if self.route.kind in ("base", "merged"):
            return y
        c = self.route.coefficients
        assert c is not None
        if self.noise is None or not self.training:
            return self._add_selected(y, x, self.A, self.B[:, :, ids], c[rows])
        a, b = self._perturbed_factors(self.noise)
        b, group = b[:, :, ids], rows // (len(c) // len(a))
        own = torch.eye(len(a), dtype=x.dtype, device=x.device)[group]
        return self.noise.output(self._add_selected(y, x, a, b, own), x, a, b, token_ids, group)

    def _add_selected(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """y + s B(t) A(t) x for inputs [P, n_in] with coefficients [P, K], in the memory of y [P, C]."""
        hidden = contract(self.dropout(x)[None, :, None], a.to(x.dtype)[None], c[None])
        return y.addmm_(expand(hidden, c[None] * self.scaling)[0].to(y.dtype), b.to(y.dtype).flatten(0, 1))

    def _perturbed_factors(self, noise: MapNoise) -> tuple[Tensor, Tensor]:
        """Factors [G, r, n_in] and [G, r, n_out] at the points of the groups, perturbed."""
        groups = self.route.groups
        if groups is None:
            raise RuntimeError("a perturbation needs rows in equal groups at shared points of the curve")
        return noise.factors(*(combine(groups, f, f.dtype) for f in (self.A, self.B)))

    def _perturbed(self, x: Tensor, noise: MapNoise) -> Tensor:
        """The layer under noise; without siblings, because factors and draws are this layer's own."""
        a, b = self._perturbed_factors(noise)
        hidden = torch.bmm(self.dropout(x).reshape(len(a), -1, x.shape[-1]), a.mT.to(x.dtype)) * self.scaling
        y = self.base_layer(x.reshape(len(a), -1, x.shape[-1]))
        y = add_product(y, hidden, b.to(x.dtype), in_place=self._is_plain(x))
        return noise.output(y.view(*x.shape[:-1], -1), x, a, b)

    def _with_siblings(self, x: Tensor) -> Tensor:
        """The layer's output; siblings take what the first of them computed for all."""
        route = self.route
        # Dropout gives each an input of its own; with points by layer each has a route of its own.
        dropping = self.training or not isinstance(self.dropout, nn.Dropout)
        dropping = dropping and not isinstance(self.dropout, nn.Identity)
        if len(self.siblings) == 1 or dropping or any(layer.route is not route for layer in self.siblings):
            return self._together(x, (self,))[0]
        shared = route.shared
        if shared is None or shared.siblings[0] is not self.siblings[0] or self.place not in shared.outputs:
            if shared is not None:  # some of its layers are not called: their outputs were made in vain
                _part(shared.siblings)
            shared = route.shared = Shared(self.siblings, x, dict(enumerate(self._together(x, self.siblings))))
        elif shared.x is not x:
            _part(self.siblings)
            route.shared = None
            return self._together(x, (self,))[0]
        y = shared.outputs.pop(self.place)
        if not shared.outputs:
            route.shared = None
        return y

    def _together(self, x: Tensor, layers: tuple[CurveLinear, ...]) -> list[Tensor]:
        """Outputs of layers that see x, in as few products as can be."""
        route = self.route
        if route.kind == "points":
            a = [layer._at_groups(0, x.dtype) for layer in layers]
            mix = Mixing(self.scaling)
            parts = len(a[0])
        else:
            a = [layer._stack(0, x.dtype) for layer in layers]
            mix = self._mixing(x)
            parts = route.windows
        flat = x.reshape(parts, -1, x.shape[-1])
        z = flat if layers != (self,) or isinstance(self.dropout, nn.Identity) else self.dropout(flat)
        bases = [layer._base(flat) for layer in layers]
        b = [
            layer._at_groups(1, base.dtype) if route.kind == "points" else layer._stack(1, base.dtype)
            for layer, base in zip(layers, bases, strict=True)
        ]
        return [y.view(*x.shape[:-1], -1) for y in linear_maps(flat, z, mix, bases, a, b)]

    def _mixing(self, x: Tensor) -> Mixing:
        """Of the rows of x, or of its tokens where these have their own; made once for all layers of a pass."""
        route = self.route
        assert route.coefficients is not None
        rows = x.shape[:-1].numel() if route.kind == "tokens" else x.shape[0]
        key = rows, x.dtype, self.scaling
        if key not in route.mixing:
            own = repeat_for_rows(route.coefficients, rows).to(x.dtype)
            route.mixing[key] = mixing(own, self.scaling, route.windows, route.degree)
        return route.mixing[key]

    def _base(self, x: Tensor) -> BaseMap:
        """The base layer's map, or where it does more than multiply (quantised, hooked, autocast) its output at x."""
        if not self._is_plain(x):
            return BaseMap(output=self.base_layer(x))
        weight = self.base_layer.weight
        return BaseMap(weight.mT if self.transposed else weight, self.base_layer.bias)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the base layer gives W x + b in x's dtype and nothing else happens there."""
        base, weight = self.base_layer, self.base_layer.weight
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            (type(base) is nn.Linear or self.transposed)
            and type(weight) in (nn.Parameter, Tensor)
            and weight.dtype == x.dtype
            and not hooks
            and "forward" not in base.__dict__
            and not torch.is_autocast_enabled(x.device.type)
        )


def _part(layers: tuple[CurveLinear, ...]) -> None:
    """Layers that turned out not to be siblings."""
    for layer in layers:
        layer.siblings, layer.place = (layer,), 0


# Maps of one module that see the same input in most architectures; a layer that does not is noticed when it runs.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


def join_siblings(layers: Mapping[str, CurveLayer]) -> None:
    """Let layers of one parent module that see the same input run together, if their ranks and scalings agree.

    Args:
        layers: curve layers by module name.
    """
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        for group in SIBLINGS:
            if child not in group:
                continue
            found = [layers.get(f"{parent}.{other}") for other in group]
            siblings = tuple(x for x in found if isinstance(x, CurveLinear))
            alike = len({(x.in_features, x.rank, x.scaling) for x in siblings}) == 1
            if isinstance(layer, CurveLinear) and alike:
                layer.siblings, layer.place = siblings, siblings.index(layer)
