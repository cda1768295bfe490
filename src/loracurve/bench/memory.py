"""Memory of a piece of work: its peak (of the GPU where there is one, else of the process, on Linux), and its end."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["NO_MEMORY", "PeakMemory", "free_memory", "out_of_memory"]


NO_MEMORY = "the device ran out of memory"  # reason of a failed cell


class PeakMemory:
    """``with PeakMemory() as peak: ...``, then `peak.bytes`; None where the system does not tell."""

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
                self._resettable = True
            except OSError:
                self._resettable = False
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        elif self._resettable:
            found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
            self.bytes = int(found[1]) * 1024 if found else None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left: allocators of our own process say so by another class than the driver."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


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
