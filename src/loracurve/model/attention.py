"""Which kernel `scaled_dot_product_attention` takes where gradients are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["without_cudnn_attention"]


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside the block attention takes any kernel that is allowed but cuDNN's, which is restored after it.

    With a mask and a length of 64 more than a multiple of 128, cuDNN's backward pass on H100 and H200 gives a gradient
    of the queries that is not a number where all scores of a row are low (log-sum-exp below -89): torch 2.11, which
    takes that kernel first, to 2.13 at least (pytorch/pytorch, issue 196678). The other kernels are right there.

    The forward pass chooses, and so does the one that checkpointing runs again in the backward pass: both belong into
    the block.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
