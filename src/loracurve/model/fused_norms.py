"""RMS normalisation in one kernel: models of the hub spell it out, which takes eight on a GPU and more in the backward
pass, each reading and writing all hidden states, some of them in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["as_written", "fuse_norms", "fused_norm"]


_as_written = False


def fuse_norms(model: nn.Module) -> int:
    """Let the model's RMS norms run in one kernel where a GPU has one; returns how many do.

    Taken are modules that are called so and compute w x / sqrt(mean(x^2) + eps), which is tried; others (Gemma's scale
    by 1 + w) stay. The kernel rounds once, at the end; results differ by rounding from those as written.
    """
    found = [m for m in model.modules() if _eps(m) is not None and _is_plain(m)]
    for module in found:
        kind: Any = type(module)
        module.__class__ = _fused(kind)
    return len(found)


def fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019), computed in float32 at least."""
    return F.rms_norm(x, weight.shape, weight, eps)


@contextmanager
def as_written() -> Iterator[None]:
    """Norms run as the model spells them out, inside: the kernel cannot be differentiated twice."""
    global _as_written
    before, _as_written = _as_written, True
    try:
        yield
    finally:
        _as_written = before


def _eps(module: nn.Module) -> float | None:
    if not type(module).__name__.endswith("RMSNorm") or hasattr(type(module), "loracurve_fused"):
        return None
    weight, eps = getattr(module, "weight", None), _own_eps(module)
    fits = isinstance(weight, Tensor) and weight.dim() == 1 and not weight.is_meta
    return eps if fits and isinstance(eps, float) else None


def _own_eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_plain(module: Any) -> bool:
    """Whether the module does what the kernel does, on a made input."""
    x = torch.linspace(-2, 3, 2 * len(module.weight), device=module.weight.device).view(2, -1)
    try:
        with torch.no_grad():
            y = module(x.to(module.weight.dtype)).float()
    except (RuntimeError, TypeError):
        return False
    expected = fused_norm(x, module.weight.detach().float(), _eps(module) or 0.0)
    tolerance = 4 * torch.finfo(module.weight.dtype).eps  # x, the product and the result are rounded
    return y.shape == expected.shape and bool(((y - expected).abs() <= tolerance * (expected.abs() + 1e-3)).all())


@cache
def _fused(kind: Any) -> Any:
    """The class with a forward pass in one kernel; a class and no hook, so that copies of a model have it too."""

    class Fused(kind):
        loracurve_fused = True

        def forward(self, x: Tensor) -> Tensor:
            fits = x.is_cuda and x.dtype == self.weight.dtype and x.dtype != torch.float64
            if not fits or _as_written or torch.compiler.is_compiling():
                written: Tensor = super().forward(x)
                return written
            return fused_norm(x, self.weight, _own_eps(self))

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _blank, (kind,), self.__dict__  # pickled by the class that can be imported

    Fused.__name__ = Fused.__qualname__ = kind.__name__
    Fused.__module__ = kind.__module__
    return Fused


def _blank(kind: Any) -> Any:
    fused = _fused(kind)
    return fused.__new__(fused)
