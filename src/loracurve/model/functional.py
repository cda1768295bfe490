"""Products with stacked factors: plain functions of tensors, without a copy of anything as large as an output.

Sums of such tensors are made in the accumulators of matrix products. Scalings sit on the small hidden vectors, never on
outputs or their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loracurve.model import kernels

__all__ = [
    "BaseMap",
    "Mixing",
    "add_product",
    "cast_together",
    "combine",
    "contract",
    "expand",
    "grouped_linear",
    "linear_maps",
    "mixing",
    "read_out",
]


class _Cast(torch.autograd.Function):
    """Many tensors in another dtype, by few kernels; so are their gradients, which come back contiguous."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shapes, ctx.dtype = [t.shape for t in tensors], tensors[0].dtype
        out = [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch._foreach_copy_(out, list(tensors))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = {i: g for i, g in enumerate(grads) if g is not None}
        out = {i: torch.empty(ctx.shapes[i], dtype=ctx.dtype, device=g.device) for i, g in there.items()}
        torch._foreach_copy_([*out.values()], [*there.values()])
        return (None, *(out.get(i) for i in range(len(grads))))


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies of contiguous tensors of one dtype in another one; differentiable once."""
    found: tuple[Tensor, ...] = _Cast.apply(dtype, *tensors)
    return found


class _GroupedLinear(torch.autograd.Function):
    """x a^T for each group. The gradient of a comes in a's own layout, a product's would come transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return torch.bmm(x, a.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, a = ctx.saved_tensors
        of_x, of_a = ctx.needs_input_grad
        return torch.bmm(grad, a) if of_x else None, torch.bmm(grad.mT, x) if of_a else None


def grouped_linear(x: Tensor, a: Tensor) -> Tensor:
    """x [G, M, n], a [G, r, n] -> [G, M, r]"""
    found: Tensor = _GroupedLinear.apply(x, a)
    return found


@dataclass(frozen=True)
class Mixing:
    """What lies between A and B of maps of one scaling: h -> scaled_k sum_j c_j h_j, or h -> scaling h."""

    scaling: float
    c: Tensor | None = None
    """[W, N, k]: coefficients of the rows, or tokens, in each of W windows of control points; None: points are made"""
    scaled: Tensor | None = None
    """scaling times c"""
    degree: int = 1
    """by which a window begins after the one before"""

    def windows(self, factor: Tensor) -> Tensor:
        """Control points [K, r, n] -> [W, k r, n], a view: those of each segment, neighbours share one. Points
        [G, r, n] as they are."""
        if self.c is None:
            return factor
        count, _, k = self.c.shape
        if count == 1:
            return factor.flatten(0, 1).unsqueeze(0)
        factor = factor.contiguous()
        step, *own = factor.stride()
        return factor.as_strided((count, k, *factor.shape[1:]), (self.degree * step, step, *own)).flatten(1, 2)

    def folded(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of control points or points of this shape from that of their `windows`."""
        if self.c is None or len(self.c) == 1:
            return grad.reshape(shape)
        grad = grad.unflatten(1, (-1, shape[1]))
        if kernels.runs_here(grad):
            return kernels.folded(grad)
        out = torch.cat([grad[:, :-1].flatten(0, 1), grad[-1:, -1]])
        out[self.degree : -1 : self.degree] += grad[:-1, -1]
        return out

    def __call__(self, hidden: Tensor, maps: int) -> Tensor:
        """Of hidden vectors [W, M, s k r] of s maps, or [G, M, s r]. Linear and symmetric, so it is also what it does
        to gradients."""
        if self.c is None or self.scaled is None:
            return hidden * self.scaling
        w, n, k = self.c.shape
        split = hidden.view(w * n, hidden.shape[1] // n, maps, k, -1)
        if kernels.runs_here(hidden, self.c):
            return kernels.mixed(split.flatten(0, 1), self.c.flatten(0, 1), self.scaled.flatten(0, 1)).view_as(hidden)
        c, scaled = (x.view(w * n, 1, 1, k, 1) for x in (self.c, self.scaled))
        return ((split * c).sum(3, keepdim=True) * scaled).view_as(hidden)


def mixing(coefficients: Tensor, scaling: float, windows: int, degree: int) -> Mixing:
    """Of rows or tokens with coefficients [R, K]; with several windows, group w of the rows lies in segment w."""
    grouped = coefficients.reshape(windows, -1, coefficients.shape[-1]).contiguous()
    if windows > 1:
        grouped = torch.stack([grouped[s, :, s * degree : (s + 1) * degree + 1] for s in range(windows)])
    return Mixing(scaling, grouped, grouped * scaling, degree)


@dataclass(frozen=True)
class BaseMap:
    """What a low-rank update is added to: W x + b of a frozen map, or an output that is there."""

    weight: Tensor | None = None
    """[n_out, n_in]"""
    bias: Tensor | None = None
    output: Tensor | None = None
    """[P, M, n_out]"""

    @property
    def dtype(self) -> torch.dtype:
        """Of its outputs."""
        known = self.weight if self.output is None else self.output
        assert known is not None
        return known.dtype


class _LinearMaps(torch.autograd.Function):
    """`linear_maps`; gradients of the shared input are summed inside the products that make them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, mix: Mixing, bases: Sequence[BaseMap], *tensors: Any
    ) -> tuple[Tensor, ...]:
        count = len(bases)
        given, a, b = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        stacked = _joined([mix.windows(f) for f in a])
        u = mix(torch.bmm(z, stacked.mT), count)
        found = []
        for base, output, own, f in zip(bases, given, u.chunk(count, -1), b, strict=True):
            weight: Any = base.weight
            # No views: a model may change what a map gives in place (Longformer divides its queries so).
            at = x[0] if len(x) == 1 else x
            y = F.linear(at, weight, base.bias) if output is None else output
            found.append(add_product(y, own.to(y.dtype), mix.windows(f), in_place=output is None))
        ctx.save_for_backward(z, u, stacked, *b, *(base.weight for base in bases))
        ctx.mix, ctx.shapes, ctx.same = mix, [f.shape for f in a], x is z
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        z, u, stacked, *others = ctx.saved_tensors
        mix, count = ctx.mix, len(grads)
        b, weights = others[:count], others[count:]
        need_x, need_z, _, _, *need = ctx.needs_input_grad
        dx: Tensor | None = None
        du: list[Tensor] = []
        db: list[Tensor | None] = []
        for grad, own, f, weight in zip(grads, u.chunk(count, -1), b, weights, strict=True):
            if grad is None:
                du.append(torch.zeros_like(own))
                db.append(None)
                continue
            grad = grad.reshape(*z.shape[:2], -1)
            up = mix.windows(f)
            du.append(torch.bmm(grad, up.mT).to(z.dtype))
            db.append(mix.folded(torch.bmm(own.to(grad.dtype).mT, grad), f.shape) if need[2 * count] else None)
            if need_x and weight is not None:
                dx = _plus_product(dx, grad, weight)
        hidden = mix(_joined(du, -1), count)
        dz = None
        if ctx.same and need_x:
            dx = torch.bmm(hidden, stacked) if dx is None else add_product(dx, hidden, stacked)
        elif need_z:
            dz = torch.bmm(hidden, stacked)
        da: Sequence[Tensor | None] = [None] * count
        if need[count]:
            da = [mix.folded(g, s) for g, s in zip(torch.bmm(hidden.mT, z).chunk(count, 1), ctx.shapes, strict=True)]
        shape = *z.shape[:2], -1
        given = [g.reshape(shape) if g is not None and n else None for g, n in zip(grads, need[:count], strict=True)]
        return dx, dz, None, None, *given, *da, *db


def linear_maps(
    x: Tensor, z: Tensor, mix: Mixing, bases: Sequence[BaseMap], a: Sequence[Tensor], b: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """y_i = base_i(x) + B_i^T mix(A_i z), maps of one input with factors of one rank; differentiable once.

    Args:
        x: [P, M, n_in].
        z: what the updates see: x itself, or x after dropout.
        mix: of the rows; P is its W, or the G of points that are made.
        bases: weights get no gradients.
        a: [K, r, n_in] control points, or [G, r, n_in] points.
        b: the same [., r, n_out].

    Returns:
        [P, M, n_out] for each, [M, n_out] where P is 1.
    """
    found: tuple[Tensor, ...] = _LinearMaps.apply(x, z, mix, bases, *(base.output for base in bases), *a, *b)
    return found


def add_product(y: Tensor, hidden: Tensor, b: Tensor, in_place: bool = True) -> Tensor:
    """y + hidden b for hidden [P, M, k], b [P, k, n] and y [P, M, n], or [M, n] where P is 1: in the memory of y, or as
    [M, n] where P is 1."""
    if len(b) == 1:  # a product of matrices has faster kernels
        flat = y if y.dim() == 2 else y.squeeze(0)
        if in_place:
            flat.addmm_(hidden.squeeze(0), b.squeeze(0))
            return y
        return torch.addmm(flat, hidden.squeeze(0), b.squeeze(0))
    return y.baddbmm_(hidden, b) if in_place else torch.baddbmm(y, hidden, b)


def _plus_product(x: Tensor | None, grad: Tensor, weight: Tensor) -> Tensor:
    """x + grad weight, in the memory of x, for a weight that is shared by all groups."""
    if x is None:
        return grad @ weight
    x.view(-1, x.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), weight)
    return x


def _joined(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def combine(coefficients: Tensor, stack: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k c_gk stack_k: [G, K] and [K, ...] -> [G, ...], summed in the stack's dtype and given in `dtype`."""
    c = coefficients.to(stack.dtype)
    return (c @ stack.flatten(1)).view(-1, *stack.shape[1:]).to(dtype)


def contract(x: Tensor, stack: Tensor, coefficients: Tensor) -> Tensor:
    """sum_k c_k (stack_k x): x [W, N, T, i], stack [W, k, o, i], coefficients [W, N, k] -> [W, N, T, o]."""
    w, n, t, _ = x.shape
    k, o = stack.shape[1], stack.shape[2]
    each = grouped_linear(x.reshape(w, n * t, -1), stack.flatten(1, 2)).view(w, n, t, k, o)
    return (each * coefficients[:, :, None, :, None]).sum(3)


def expand(hidden: Tensor, coefficients: Tensor) -> Tensor:
    """[W, N, T, r] and [W, N, k] -> [W, N T, k r], so that sum_k c_k (h B_k) is one product with the stacked B."""
    return (hidden[:, :, :, None, :] * coefficients[:, :, None, :, None]).flatten(3).flatten(1, 2)


class _FloatProduct(torch.autograd.Function):
    """x W^T in float32 for half-precision x [P, n_in] and frozen W [C, n_in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        if x.is_cuda:
            return torch.mm(x, weight.mT, out_dtype=torch.float32)  # what the accumulators hold
        return x.float() @ weight.mT.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None


def read_out(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """Logits x W^T + b [P, C] of chosen outputs (None: all), float32 from half precision.

    bfloat16 would round a logit of 10 to a multiple of 1/16, as much as neighbouring points of a curve differ. `weight`
    gets no gradient from half precision.
    """
    if ids is not None:
        weight, bias = weight[ids], None if bias is None else bias[ids]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x, weight, bias)
    y = _FloatProduct.apply(x, weight)
    return y if bias is None else y + bias
