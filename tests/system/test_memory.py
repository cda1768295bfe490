"""Memory of devices and of pieces of work."""

from __future__ import annotations

import psutil
import pytest
import torch

from loracurve.system.memory import PeakMemory, device_memory, out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_errors_that_say_that_no_memory_is_left(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected


def test_what_the_allocator_of_the_cpu_says_is_known() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(found.value)


def test_the_machine_has_what_psutil_says() -> None:
    has = device_memory(torch.device("cpu"))
    assert has.total == psutil.virtual_memory().total and 0 < has.free <= has.total


@pytest.mark.skipif(torch.cuda.is_available() or not psutil.LINUX, reason="the peak of the process, on Linux")
def test_a_peak_has_passed_when_it_is_told() -> None:
    size = 200_000_000
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        torch.ones(size, dtype=torch.uint8)
    with PeakMemory() as after:
        pass
    assert peak.bytes is not None and before.bytes is not None and after.bytes is not None
    assert peak.bytes == peak.reserved and min(peak.bytes - before.bytes, peak.bytes - after.bytes) > 0.9 * size
