"""Memory: what a device has, and the peak of a piece of work (of the GPU where there is one, else of the process)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch

__all__ = ["DeviceMemory", "PeakMemory", "device_memory", "out_of_memory"]


class PeakMemory:
    """``with PeakMemory() as peak: ...``, then `peak.bytes`; None where the system does not tell (not on Linux)."""

    bytes: int | None = None
    reserved: int | None = None
    """what the allocator took of a GPU for them; without a GPU the same"""

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
            self.reserved = torch.cuda.max_memory_reserved()
        elif self._resettable:
            found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
            self.bytes = self.reserved = int(found[1]) * 1024 if found else None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left: allocators of our own process say so by another class than the driver, and
    the CPU's in other words."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device, in bytes."""

    total: int
    free: int
    """what this process can have: what it holds, and what nobody does"""


def device_memory(device: torch.device) -> DeviceMemory:
    """What a GPU or, of the CPU, the machine has now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free + torch.cuda.memory_reserved(device))
    machine = psutil.virtual_memory()
    return DeviceMemory(machine.total, min(machine.available + psutil.Process().memory_info().rss, machine.total))
