"""Random draws as pure functions of (seed, stream name, numbers), so that no random state ever needs saving."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator", "stream_seed"]


def stream_seed(seed: int, *stream: str | int) -> int:
    """Return a 63-bit seed for the stream named by `stream`; different names give independent streams."""
    digest = hashlib.blake2b(repr((int(seed), *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """Return a CPU generator at the start of the stream named by `stream`."""
    return torch.Generator().manual_seed(stream_seed(seed, *stream))
