"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["give_back_memory"]


def give_back_memory() -> None:
    """Hand freed memory to the system, where the C library (glibc) has a call for it and would keep it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
