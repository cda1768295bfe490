"""Kernels for a GPU, where it has Triton: what would otherwise be three to ten small ones between matrix products.

Each does what a function beside it does that spells the same out, computes in float32 and rounds once. Triton compiles
a kernel in under a second and keeps it on disk. `TRITON_INTERPRET=1` runs them without a GPU (tests).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from loracurve.system.errors import one_line

__all__ = ["folded", "gated", "gated_gradients", "mixed", "runs_here", "turned"]

_there = importlib.util.find_spec("triton") is not None

if _there:
    import triton
    import triton.language as tl

logger = logging.getLogger("loracurve")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 8
"""Tokens of a program that mixes."""
BLOCK = 1024
"""Numbers of a program that works element by element."""


def runs_here(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors: on a GPU with Triton, of one dtype."""
    first = tensors[0]
    return (
        _there
        and first.is_cuda
        and first.dtype in DTYPES
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and _works(first.device)
    )


_working: dict[torch.device, bool] = {}


def _works(device: torch.device) -> bool:
    """Whether a kernel runs there, tried once: Triton needs a C compiler, and a card that it knows."""
    if device not in _working and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    if device not in _working:
        x = torch.tensor([-1.0, 2.0], device=device)
        try:
            _working[device] = bool(torch.allclose(gated(x, x), torch.nn.functional.silu(x) * x))
        except Exception as error:  # of the compiler, the driver, the loader
            logger.warning("running without Triton's kernels: %s", one_line(error, 200))
            _working[device] = False
    return _working[device]


def mixed(x: Tensor, c: Tensor, scaled: Tensor) -> Tensor:
    """scaled_k sum_j c_j x_j for x [M, s, k, r], contiguous, and c, scaled [N, k], a row for every M / N of x."""
    m, s, k, r = x.shape
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _mix[(triton.cdiv(m, ROWS), s)](
            x, c, scaled, out, m, m // len(c), s * k * r, k * r,
            k, r, ROWS, triton.next_power_of_2(k), triton.next_power_of_2(r), num_warps=2,
        )  # fmt: skip
    return out


def folded(grad: Tensor) -> Tensor:
    """[W, d + 1, ...], of windows that begin d after the one before -> [W d + 1, ...], sums where they meet."""
    if not grad[0].is_contiguous():  # windows may lie apart: siblings share one product
        grad = grad.contiguous()
    w, k, *own = grad.shape
    points, size = w * (k - 1) + 1, grad[0, 0].numel()
    out = grad.new_empty(points, *own)
    with torch.cuda.device_of(grad):
        _fold[(points, triton.cdiv(size, BLOCK))](grad, out, w, grad.stride(0), size, k - 1, BLOCK)
    return out


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys [B, H, T, D] by cos and sin [B or 1, T, D]; or its transpose, the gradient.

    (q_1 cos_1 - q_2 sin_1, q_2 cos_2 + q_1 sin_2) for the halves 1 and 2 of D (Su et al. 2021, as transformers has it).
    """
    b, heads, t, d = q.shape
    cos, sin = cos.expand(b, t, d), sin.expand(b, t, d)
    out = torch.empty_like(q), torch.empty_like(k)
    block = triton.next_power_of_2(max(heads, k.shape[1]))
    with torch.cuda.device_of(q):
        _turn[(b * t,)](
            q, k, *out, cos, sin, t, *q.stride(), *k.stride(), *out[0].stride(), *out[1].stride(), *cos.stride(),
            *sin.stride(), heads, k.shape[1], d // 2, block, triton.next_power_of_2(d // 2), back,
        )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    size = gate.numel()
    with torch.cuda.device_of(gate):
        _gate[(triton.cdiv(size, BLOCK),)](gate, up, out, size, BLOCK)
    return out


def gated_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` for gate and up."""
    out = torch.empty_like(gate), torch.empty_like(up)
    size = gate.numel()
    with torch.cuda.device_of(gate):
        _gate_back[(triton.cdiv(size, BLOCK),)](grad, gate, up, *out, size, BLOCK)
    return out


if _there:
    _jit: Any = triton.jit

    @_jit
    def _mix(  # type: ignore[no-untyped-def]
        x, c, scaled, out, m, each, row, sibling, K: tl.constexpr, R: tl.constexpr,
        ROWS: tl.constexpr, KP: tl.constexpr, RP: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        k, r = tl.arange(0, KP), tl.arange(0, RP)
        there = (rows[:, None] < m) & (k[None, :] < K)
        own = (rows // each)[:, None] * K + k[None, :]
        first = tl.load(c + own, mask=there, other=0).to(tl.float32)
        second = tl.load(scaled + own, mask=there, other=0).to(tl.float32)
        place = rows.to(tl.int64)[:, None, None] * row + tl.program_id(1) * sibling
        place += k[None, :, None] * R + r[None, None, :]
        inside = there[:, :, None] & (r[None, None, :] < R)
        values = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        total = tl.sum(values * first[:, :, None], axis=1)
        tl.store(out + place, total[:, None, :] * second[:, :, None], mask=inside)

    @_jit
    def _fold(grad, out, windows, step, size, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        point = tl.program_id(0).to(tl.int64)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        w, j = point // D + place * 0, point % D + place * 0  # a number for each place: masks are blocks
        total = tl.load(grad + w * step + j * size + place, mask=inside & (w < windows), other=0).to(tl.float32)
        # The first point of a window is the last of the one before.
        last = grad + (w - 1) * step + D * size + place
        total += tl.load(last, mask=inside & (j == 0) & (w > 0), other=0).to(tl.float32)
        tl.store(out + point * size + place, total, mask=inside)

    @_jit
    def _one(x, y, c1, c2, s1, s2, heads, h_x, d_x, h_y, d_y, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
        h, d = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
        inside = (h < heads) & (d < D)
        at, to = x + h * h_x + d * d_x, y + h * h_y + d * d_y
        first = tl.load(at, mask=inside, other=0).to(tl.float32)
        second = tl.load(at + D * d_x, mask=inside, other=0).to(tl.float32)
        tl.store(to, first * c1 - second * s1, mask=inside)
        tl.store(to + D * d_y, second * c2 + first * s2, mask=inside)

    @_jit
    def _turn(  # type: ignore[no-untyped-def]
        q, k, q_out, k_out, cos, sin, tokens,
        q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, qo_b, qo_h, qo_t, qo_d, ko_b, ko_h, ko_t, ko_d,
        c_b, c_t, c_d, s_b, s_t, s_d,
        q_heads, k_heads, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BACK: tl.constexpr,
    ):  # fmt: skip
        b, t = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
        d = tl.arange(0, DP)
        c, s, inside = cos + b * c_b + t * c_t + d * c_d, sin + b * s_b + t * s_t + d * s_d, d < D
        c1 = tl.load(c, mask=inside, other=0).to(tl.float32)[None, :]
        c2 = tl.load(c + D * c_d, mask=inside, other=0).to(tl.float32)[None, :]
        s1 = tl.load(s, mask=inside, other=0).to(tl.float32)[None, :]
        s2 = tl.load(s + D * s_d, mask=inside, other=0).to(tl.float32)[None, :]
        if BACK:
            s1, s2 = -s2, -s1
        at, to = b * q_b + t * q_t, b * qo_b + t * qo_t
        _one(q + at, q_out + to, c1, c2, s1, s2, q_heads, q_h, q_d, qo_h, qo_d, D, HP, DP)
        at, to = b * k_b + t * k_t, b * ko_b + t * ko_t
        _one(k + at, k_out + to, c1, c2, s1, s2, k_heads, k_h, k_d, ko_h, ko_d, D, HP, DP)

    @_jit
    def _gate(gate, up, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        g = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0).to(tl.float32)
        tl.store(out + place, g * tl.sigmoid(g) * u, mask=inside)

    @_jit
    def _gate_back(grad, gate, up, gate_out, up_out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        y = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        g = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(gate_out + place, y * u * s * (1 + g * (1 - s)), mask=inside)
        tl.store(up_out + place, y * g * s, mask=inside)
