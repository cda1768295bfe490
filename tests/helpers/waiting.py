"""Waiting for an event, never for a time: the limit only ends a test that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SECONDS = 120


def until(
    condition: Callable[[], Any], what: str, alive: Callable[[], bool] = lambda: True, seconds: float = SECONDS
) -> Any:
    """The value of `condition` as soon as it is true; the test fails where what it waits for ends before."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert alive() and time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.005)
    return value
