"""Products with stacked factors: plain functions of tensors, without a copy of anything as large as an output.

Written so that a compiler fuses what lies between the matrix products, and so that an eager run adds to the base
layer's output in place. Scalings sit on the small hidden vectors, never on outputs or their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "cast_together",
    "combine",
    "contract",
    "expand",
    "grouped_linear",
    "read_out",
    "windowed",
    "windowed_coefficients",
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
    if torch.compiler.is_compiling():  # lays gradients out by itself
        return torch.bmm(x, a.mT)
    found: Tensor = _GroupedLinear.apply(x, a)
    return found


class _Windows(torch.autograd.Function):
    """[S d + 1, ...] -> [S, d + 1, ...], a view. A slice's own gradient would be padded to the size of the stack."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, count: int, degree: int) -> Tensor:
        ctx.degree = degree
        stack = stack.contiguous()
        # Neighbouring windows overlap in the control point that they share.
        return stack.as_strided((count, degree + 1, *stack.shape[1:]), (degree * stack.stride(0), *stack.stride()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out = torch.cat([grad[:, :-1].flatten(0, 1), grad[-1:, -1]])
        out[ctx.degree : -1 : ctx.degree] += grad[:-1, -1]
        return out, None, None


def windowed(stack: Tensor, count: int, degree: int) -> Tensor:
    """Control points [K, ...] -> [W, k, ...]: those of each of `count` segments; one window holds all of them."""
    return stack.unsqueeze(0) if count == 1 else _Windows.apply(stack, count, degree)


def windowed_coefficients(coefficients: Tensor, count: int, degree: int) -> Tensor:
    """[R, K] -> [W, R/W, k]: row coefficients for `windowed` points; group w of the rows lies in segment w."""
    grouped = coefficients.reshape(count, -1, coefficients.shape[-1])
    if count == 1:
        return grouped
    return torch.stack([grouped[s, :, s * degree : (s + 1) * degree + 1] for s in range(count)])


def combine(coefficients: Tensor, stack: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k c_gk stack_k: [G, K] and [K, ...] -> [G, ...], summed in the stack's dtype and given in `dtype`."""
    c = coefficients.to(stack.dtype)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # Spelt out it becomes one pass over the stack; a matrix product would write its result before it is cast.
        c = c.view(*c.shape, *[1] * (stack.dim() - 1))
        total = c[:, 0] * stack[0]
        for k in range(1, stack.shape[0]):
            total = total + c[:, k] * stack[k]
        return total.to(dtype)
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
