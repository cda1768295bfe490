"""Parts of a base model in one kernel each on a GPU, where models of the hub spell them out.

RMS norms take eight kernels as written, rotary embeddings ten, gated activations two, and more in the backward pass,
each reading and writing all hidden states. A part is taken if a trial finds that it computes what the kernel computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loracurve.model import kernels

__all__ = ["as_written", "fuse_parts", "fused_norm", "gate", "turn"]


_as_written = False

ROTARY = "apply_rotary_pos_emb"


def fuse_parts(model: nn.Module) -> dict[str, int]:
    """Let parts of the model run in one kernel each; results differ by rounding from those as written.

    Returns:
        How many modules were taken for their *norm* (w x / sqrt(mean(x^2) + eps); Gemma's, which scale by 1 + w, stay),
        *gate* (down(silu(gate(x)) up(x))) and *rotary* embedding.
    """
    counts = {name: 0 for name in _KINDS}
    for module in [*model.modules()]:
        for name, (fits, _) in _KINDS.items():
            kind: Any = type(module)
            if not hasattr(kind, "loracurve_fused") and fits(module):
                module.__class__ = _fused(kind, name)
                counts[name] += 1
    return counts


def fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019), computed in float32 at least."""
    return F.rms_norm(x, weight.shape, weight, eps)


@contextmanager
def as_written() -> Iterator[None]:
    """Parts run as the model spells them out, inside: kernels cannot be differentiated twice."""
    global _as_written
    before, _as_written = _as_written, True
    try:
        yield
    finally:
        _as_written = before


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.gated(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.gated_gradients(grad.contiguous(), *ctx.saved_tensors)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return kernels.turned(q, k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *kernels.turned(q, k, cos, sin, back=True), None, None


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up; where kernels run, differentiable once."""
    found: Tensor = _Gate.apply(gate, up)
    return found


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k [B, H, T, D] by cos and sin [B or 1, T, D]; likewise."""
    found: tuple[Tensor, Tensor] = _Turn.apply(q, k, cos, sin)
    return found


def _may(*tensors: Tensor) -> bool:
    return not _as_written and kernels.runs_here(*tensors)


def _is_plain_norm(module: Any) -> bool:
    """Whether an RMS norm does what the kernel does, on a made input."""
    weight, eps = getattr(module, "weight", None), _own_eps(module)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return False
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta:
        return False
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1)
    found = _tried(lambda: module(x.to(weight.dtype)).float())
    return found is not None and _close(found, fused_norm(x, weight.detach().float(), eps), weight.dtype, 4)


def _own_eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_gated(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) up(x)), on a made input."""
    down, up, first = (getattr(module, f"{name}_proj", None) for name in ("down", "up", "gate"))
    weight = getattr(first, "weight", None)
    if not all(isinstance(m, nn.Module) for m in (down, up, first)) or not isinstance(weight, Tensor) or weight.is_meta:
        return False
    if not weight.is_floating_point() or weight.dim() != 2:
        return False
    x = torch.linspace(-2, 3, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(1, 2, -1)
    found = _tried(lambda: (module(x).float(), down(F.silu(first(x)) * up(x)).float()))  # type: ignore[misc]
    return found is not None and _close(found[0], found[1], weight.dtype, 4)


def _turns(module: Any) -> bool:
    """Whether a module's forward pass turns queries and keys by the usual function."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if (
        not isinstance(forward, FunctionType)
        or hasattr(forward, "__wrapped__")
        or ROTARY not in forward.__code__.co_names
    ):
        return False
    return _is_rotary(forward.__globals__.get(ROTARY))


@cache
def _is_rotary(function: Any) -> bool:
    """Whether a function of a model's file is the usual rotary embedding, on a made input."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(s, generator=draw) for s in ((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8)))
    found = _tried(lambda: function(q, k, cos, sin))
    half = [torch.cat((-x[..., 4:], x[..., :4]), -1) for x in (q, k)]
    wanted = [x * cos[:, None] + y * sin[:, None] for x, y in zip((q, k), half, strict=True)]
    fits = isinstance(found, tuple) and len(found) == 2
    return fits and all(_close(x, y, x.dtype, 4) for x, y in zip(found, wanted, strict=True))


def _tried(function: Callable[[], Any]) -> Any:
    """What a function gives without gradients; None if it cannot."""
    try:
        with torch.no_grad():
            return function()
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
        return None


def _close(found: Tensor, wanted: Tensor, dtype: torch.dtype, times: float) -> bool:
    tolerance = times * torch.finfo(dtype).eps  # inputs, products and results are rounded
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= tolerance * (wanted.abs() + 1e-3)).all())


def _norm(kind: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        fits = x.is_cuda and x.dtype == self.weight.dtype and x.dtype != torch.float64
        if not fits or _as_written:
            written: Tensor = kind.forward(self, x)
            return written
        return fused_norm(x, self.weight, _own_eps(self))

    return forward


def _mlp(kind: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _may(x):
            written: Tensor = kind.forward(self, x)
            return written
        found: Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
        return found

    return forward


def _attention(kind: Any) -> Any:
    written, before = kind.forward, kind.forward.__globals__[ROTARY]

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        fits = not more and not named and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3
        fits = fits and q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.shape[-1] % 2 == 0
        return turn(q, k, cos, sin) if fits and _may(q, k, cos, sin) else before(q, k, cos, sin, *more, **named)

    # The forward pass itself, which reads another function under that name.
    names = {**written.__globals__, ROTARY: rotary}
    forward = FunctionType(written.__code__, names, written.__name__, written.__defaults__, written.__closure__)
    forward.__kwdefaults__ = written.__kwdefaults__
    return forward


# What is taken, and the forward pass that a class has then.
_KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "norm": (_is_plain_norm, _norm),
    "gate": (_is_gated, _mlp),
    "rotary": (_turns, _attention),
}


@cache
def _fused(kind: Any, name: str) -> Any:
    """The class with another forward pass; a class and no hook, so that copies of a model have it too."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _blank, (kind, name), self.__dict__  # pickled by the class that can be imported

    own = {"loracurve_fused": name, "forward": _KINDS[name][1](kind), "__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), own | {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _blank(kind: Any, name: str) -> Any:
    fused = _fused(kind, name)
    return fused.__new__(fused)
