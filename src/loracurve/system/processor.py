"""What the processor can do, as far as a choice of ours depends on it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["multiplies_bfloat16"]


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16; elsewhere they are several times slower than in
    float32. False where nobody knows."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
