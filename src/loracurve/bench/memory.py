"""Memory between cells: what it is called when there is none left, and how it is given back."""

from __future__ import annotations

import gc

import torch

__all__ = ["NO_MEMORY", "free_memory"]


NO_MEMORY = "the device ran out of memory"  # reason of a failed cell


def free_memory(model_too: bool = False) -> None:
    """Give back what nothing uses on a GPU: captured steps, with all their activations, hang in circles of references.

    Without one the collector finds its own time: a third of a second for each cell would be most of a small one.

    Args:
        model_too: a model was let go of, beside which the next one must not stand, on the CPU either.
    """
    if model_too or torch.cuda.is_available():
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
